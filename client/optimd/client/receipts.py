"""What a step returns besides the loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from optimd.v1 import training_pb2


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReceipt:
    """What became of one `step()`: `opt.last_receipt`."""

    sequence: int
    """This worker's step counter, from 0."""

    step: int
    """The job step that the gradients went into: the number of committed steps, this one included. Where nothing was
    applied, the job's last step, as before."""

    outcome: str
    """What became of the gradients: "applied", or "skipped_nonfinite" where nothing was applied, because the step's
    gradient was not finite. What was pushed besides gradients holds nevertheless."""

    contributors: tuple[int, ...]
    """The ranks whose gradients are in the step, ascending."""

    partial_contributors: tuple[int, ...]
    """Those of them that were lost midway: their gradients are in some buckets only."""

    hyperparameters_disagreed: bool
    """Whether contributors had different param_groups. Those of the lowest rank held."""

    grad_norm: float | None
    """The norm of the reduced gradient before it was clipped; None without `ProxyOptions.max_grad_norm`, and where the
    step was skipped."""

    pushed_differently: tuple[int, ...]
    """The indices of parameters for which workers pushed different values or states, which they had changed outside of
    steps; those of the lowest rank hold. At most 100."""

    bytes_sent: int
    """Bytes of the step's messages to the server."""

    bytes_received: int
    """Bytes of the step's messages from the server."""

    @classmethod
    def from_message(cls, message: training_pb2.StepReceipt, *, bytes_sent: int, bytes_received: int) -> Self:
        """What the schema's receipt says."""
        outcome = training_pb2.StepOutcome.Name(message.outcome).removeprefix("STEP_OUTCOME_").lower()
        return cls(
            sequence=message.sequence,
            step=message.step,
            outcome=outcome,
            contributors=tuple(message.contributors),
            partial_contributors=tuple(message.partial_contributors),
            hyperparameters_disagreed=message.hyperparameters_disagreed,
            grad_norm=message.grad_norm if message.HasField("grad_norm") else None,
            pushed_differently=tuple(message.pushed_differently),
            bytes_sent=bytes_sent,
            bytes_received=bytes_received,
        )
