"""The steps that a job has committed, and who waits to be told of them."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from optimd.server.errors import JobDeletedError, LimitExceededError
from optimd.server.receipts import Outcome, Receipt, encode_receipt
from optimd.v1 import reading_pb2

REMEMBERED_STEPS: Final = 1024
"""How many steps a watcher may fall behind."""


@dataclass(frozen=True, slots=True)
class Contribution:
    """One worker's part in a step."""

    rank: int
    worker_id: str
    sequence: int
    """The number of its push."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CommittedStep:
    """What a job remembers of a step, for those who watch it."""

    step: int
    """The number of committed steps, this one included."""
    contributors: tuple[Contribution, ...]
    """Whose gradients are in it, in order of rank."""
    partial_contributors: tuple[int, ...] = ()
    """The ranks of those of them that were lost in the middle of their push."""
    hyperparameters_disagreed: bool = False
    grad_norm: float | None = None
    """The norm of its gradient before it was clipped, where that was computed."""
    pushed_differently: tuple[int, ...] = ()
    """The parameters of which workers had pushed different values or states."""


class StepHistory:
    """The last steps of one job. Thread-safe.

    It has a lock of its own, which is held for moments and in which nothing else is locked: the job adds its steps
    under its own lock, and watchers, however many, neither wait for an update nor hold one up.

    Args:
        job: The job's name.
    """

    def __init__(self, job: str) -> None:
        self._job = job
        self._changed = threading.Condition()
        self._steps: deque[CommittedStep] = deque(maxlen=REMEMBERED_STEPS)  # guarded by self._changed
        self._ended = False  # guarded by self._changed

    def add(self, step: CommittedStep) -> None:
        """The job has committed a step: the one after the last that was added."""
        with self._changed:
            self._steps.append(step)
            self._changed.notify_all()

    def last(self) -> list[CommittedStep]:
        """The steps that are remembered, in order."""
        with self._changed:
            return list(self._steps)

    def end(self) -> None:
        """The job is gone. May be called more than once."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def watch(self, after_step: int) -> StepWatch:
        """Begins to watch, with the first step behind `after_step`, which may lie in the past or in the future."""
        return StepWatch(self, after_step)

    def _await(self, watch: StepWatch, after_step: int) -> CommittedStep | None:
        """The step behind `after_step`; None where the watch was ended. Waits for as long as neither is the case."""
        with self._changed:
            # No deadline: a job may rest for days between two steps. The end of the watcher's call ends the wait.
            self._changed.wait_for(lambda: watch.is_ended or self._ended or self._is_past_locked(after_step))
            if watch.is_ended:
                return None
            if not self._is_past_locked(after_step):
                raise JobDeletedError(f"job {self._job!r} was deleted")
            position = after_step + 1 - self._steps[0].step
            if position < 0:
                raise LimitExceededError(
                    f"step {after_step + 1} of job {self._job!r} is no longer remembered: the last {REMEMBERED_STEPS} "
                    f"are, from {self._steps[0].step} on; watch from there on, and keep up"
                )
            return self._steps[position]

    def _is_past_locked(self, step: int) -> bool:
        return bool(self._steps) and self._steps[-1].step > step

    def _end(self, watch: StepWatch) -> None:
        with self._changed:
            watch.is_ended = True
            self._changed.notify_all()


class StepWatch:
    """One watcher. Iterated by one thread, ended by any."""

    def __init__(self, history: StepHistory, after_step: int) -> None:
        self._history = history
        self._after_step = after_step
        self.is_ended = False  # guarded by the history's lock

    def __iter__(self) -> Iterator[CommittedStep]:
        """The steps, once each and in order, as they are committed. Waits for them.

        Raises:
            LimitExceededError: the next one is no longer remembered.
            JobDeletedError: the job is gone; the steps that it committed have been given.
        """
        while (step := self._history._await(self, self._after_step)) is not None:  # noqa: SLF001  # one mechanism
            self._after_step = step.step
            yield step

    def end(self) -> None:
        """The watcher is gone: iteration ends, at once if it waits. May be called more than once."""
        self._history._end(self)  # noqa: SLF001  # one mechanism


def encode_step(step: CommittedStep, worker_id: str) -> reading_pb2.WatchStepsResponse:
    """`step` as the schema tells it to a worker."""
    own = next((part.sequence for part in step.contributors if part.worker_id == worker_id), None)
    receipt = Receipt(
        sequence=own or 0,
        step=step.step,
        outcome=Outcome.of_step(len(step.contributors)),
        contributors=tuple(part.rank for part in step.contributors),
        partial_contributors=step.partial_contributors,
        hyperparameters_disagreed=step.hyperparameters_disagreed,
        grad_norm=step.grad_norm,
        pushed_differently=step.pushed_differently,
    )
    return reading_pb2.WatchStepsResponse(receipt=encode_receipt(receipt), contributed=own is not None)
