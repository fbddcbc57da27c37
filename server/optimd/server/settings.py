"""What a job's creator asks for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

PARAMETER_OVERHEAD_BYTES: Final = 2048
"""What a parameter takes besides its elements, about: its views, counters and places."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JobSettings:
    """What the job's creator asked for. All workers of a job ask for the same."""

    world_size: int
    reduction: Literal["mean", "sum"]
    max_grad_norm: float | None = None
    nonfinite: Literal["allow", "skip", "error"] = "allow"
    apply: Literal["streaming", "atomic"]
    bucket_bytes: int
    timeout_s: float
    join_timeout_s: float
    private: bool
