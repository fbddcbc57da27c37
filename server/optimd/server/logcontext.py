"""What a thread is about, for the log: every record that it writes meanwhile is of that job and worker."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

_here = threading.local()


def bind(
    *, job: str, step: Callable[[], int] | None = None, worker: str | None = None, rank: int | None = None
) -> None:
    """What this thread does from now on is about a job, and about a worker if one is given.

    Args:
        job: The job's name.
        step: Gives how many steps it has committed, whenever something is written; None where it is not known yet
            whether there is such a job.
        worker: The worker's `worker_id`.
        rank: Its rank.
    """
    _here.fields = {"job": job, "worker": worker, "rank": rank}
    _here.step = step


def clear() -> None:
    """It is about nothing in particular any more."""
    _here.fields = {}
    # What gives the step has the job, and a thread of a pool lives longer than most of those.
    _here.step = None


@contextmanager
def about(*, job: str, step: Callable[[], int]) -> Iterator[None]:
    """What this thread does in the block is about a job."""
    bind(job=job, step=step)
    try:
        yield
    finally:
        clear()


def fields() -> dict[str, Any]:
    """What a record of this thread is about now: job, step, worker and rank, as far as there are any."""
    bound = getattr(_here, "fields", None)
    if not bound:
        return {}
    told = {name: value for name, value in bound.items() if value is not None}
    return told if _here.step is None else {**told, "step": _here.step()}
