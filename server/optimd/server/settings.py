"""What a job's creator asks for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

PARAMETER_OVERHEAD_BYTES: Final = 2048
"""What a parameter takes besides its elements, about: its views, counters and places."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JobSettings:
    """What the job's creator asked for. All workers of a job ask for the same."""

    aggregation: Literal["sync", "async"] = "sync"
    world_size: int | None
    """How many workers the first synchronous step waits for; None for whoever is there, as in an asynchronous job."""
    reduction: Literal["mean", "sum"] = "mean"
    backup_workers: int = 0
    deterministic: bool = False
    on_loss: Literal["shrink", "wait"] = "shrink"
    max_staleness: int | None = None
    max_grad_norm: float | None = None
    nonfinite: Literal["allow", "skip", "error"] = "allow"
    apply: Literal["streaming", "atomic"]
    bucket_bytes: int
    timeout_s: float
    join_timeout_s: float
    private: bool

    @property
    def is_async(self) -> bool:
        """Whether each push is a step of its own."""
        return self.aggregation == "async"

    @property
    def holds_apart(self) -> bool:
        """Whether the gradients of each worker are held apart until they are reduced."""
        return self.deterministic or self.backup_workers > 0

    @property
    def applies_at_once(self) -> bool:
        """Whether each bucket of a push is applied as it comes, since nobody else's gradients are awaited for it."""
        return self.apply == "streaming" and (self.is_async or self.world_size == 1)
