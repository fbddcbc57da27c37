"""What a step returns besides the loss."""

from __future__ import annotations

from dataclasses import dataclass

from optimd.v1 import training_pb2


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReceipt:
    """What became of one `step()`: `opt.last_receipt`. Or a step of the job, as a server step hook is told of it."""

    sequence: int | None
    """This worker's step counter, from 0. None in a hook's receipt of a step that this worker did not contribute to."""

    step: int
    """The job step that the gradients went into: the number of committed steps, this one included. Where nothing was
    applied, the job step that the worker has the parameters of now."""

    outcome: str
    """What became of the gradients, exactly one of these: "applied": they are the step, alone. "merged": they are in
    the step, with those of other workers. "dropped_late": they are in no step, since the job had gone on without this
    worker, or was set back (`ProxyOptions.on_rewind`); it has the job's parameters now. "skipped_nonfinite": nothing of
    them was applied because they, or the step's gradient, were not finite; what was pushed besides gradients holds
    nevertheless."""

    contributors: tuple[int, ...]
    """The ranks whose gradients are in the step, ascending. Empty where nothing was applied."""

    partial_contributors: tuple[int, ...]
    """Those of them that were lost or left behind midway: their gradients are in some buckets only."""

    staleness: int
    """How many job steps others had committed between this worker's pull and the application of its gradients, the most
    over its buckets: 0 in a synchronous job. Of gradients that were dropped: how many steps they came too late."""

    lag: int
    """How many pushes this worker was ahead of the slowest live one when it was given parameters, both counted since
    the later of them joined. At most `Async.max_staleness`; 0 in a synchronous job."""

    resumed: bool
    """Whether the line broke during the step, and the push was taken up again on a new one."""

    hyperparameters_disagreed: bool
    """Whether contributors had different param_groups. Those of the lowest rank held."""

    grad_norm: float | None
    """The norm of the reduced gradient before it was clipped; None without `ProxyOptions.max_grad_norm`, and where the
    step was skipped."""

    pushed_differently: tuple[int, ...]
    """The indices of parameters for which workers pushed different values or states, which they had changed outside of
    steps; those of the lowest rank hold. At most 100."""

    bytes_sent: int
    """Bytes of the step's messages to the server, less what goes through shared memory. 0 in a hook's receipt, which
    comes on another line."""

    bytes_received: int
    """Bytes of the step's messages from the server. 0 in a hook's receipt."""


def decode_receipt(
    message: training_pb2.StepReceipt,
    *,
    contributed: bool = True,
    resumed: bool = False,
    bytes_sent: int = 0,
    bytes_received: int = 0,
) -> StepReceipt:
    """The receipt that `message` is.

    Args:
        message: As the server sent it.
        contributed: Whether this worker contributed to the step.
        resumed: Whether the push was taken up again on a new line.
        bytes_sent: Bytes of the step's messages to the server.
        bytes_received: Bytes of the step's messages from the server.
    """
    return StepReceipt(
        sequence=message.sequence if contributed else None,
        step=message.step,
        outcome=training_pb2.StepOutcome.Name(message.outcome).removeprefix("STEP_OUTCOME_").lower(),
        contributors=tuple(message.contributors),
        partial_contributors=tuple(message.partial_contributors),
        staleness=message.staleness,
        lag=message.lag,
        resumed=resumed,
        hyperparameters_disagreed=message.hyperparameters_disagreed,
        grad_norm=message.grad_norm if message.HasField("grad_norm") else None,
        pushed_differently=tuple(message.pushed_differently),
        bytes_sent=bytes_sent,
        bytes_received=bytes_received,
    )
