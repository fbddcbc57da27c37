"""What a step returns besides the loss."""

from __future__ import annotations

from dataclasses import dataclass


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
    gradient was not finite (`ProxyOptions.nonfinite`)."""

    contributors: tuple[int, ...]
    """The ranks whose gradients are in the step, ascending."""

    partial_contributors: tuple[int, ...]
    """Those of them that were lost midway: their gradients are in some buckets only."""

    hyperparameters_disagreed: bool
    """Whether contributors had different param_groups. Those of the lowest rank held."""

    grad_norm: float | None
    """The norm of the reduced gradient before it was clipped; None without `ProxyOptions.max_grad_norm`, and where the
    step was skipped."""

    bytes_sent: int
    """Bytes of the step's messages to the server."""

    bytes_received: int
    """Bytes of the step's messages from the server."""
