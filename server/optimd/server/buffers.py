"""A job's buffers: a module's statistics, which the server keeps for who joins later and never computes with."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Final

import torch

from optimd.server.aggregation import Worker
from optimd.server.errors import JobMismatchError, LimitExceededError, OutOfOrderError
from optimd.server.journal import JobJournal
from optimd.server.member import Member
from optimd.wire.buffers import Buffer, BufferValues, first_buffer_difference

REFRESH_INTERVAL_S: Final = 30.0
"""How old the server's copy may be when a step is committed, in seconds, before a worker is asked for another: what a
worker that joins between two steps may find itself behind the others."""


class BufferRefresh:
    """Who is asked for fresh buffers, and when: a state machine without I/O, clock or threads."""

    def __init__(self) -> None:
        self._attached: set[Worker] = set()
        self._updated_s = 0.0
        self.asked: Worker | None = None
        """Who has been asked and has not answered yet."""

    def attach(self, worker: Worker) -> None:
        """A worker has the buffers."""
        self._attached.add(worker)

    def has_attached(self, worker: Worker) -> bool:
        """Whether a worker has the buffers."""
        return worker in self._attached

    def leave(self, worker: Worker) -> None:
        """A worker has left. Unknown ones are ignored."""
        self._attached.discard(worker)
        self.decline(worker)

    def updated(self, now_s: float) -> None:
        """The server has a fresh copy."""
        self._updated_s = now_s
        self.asked = None

    def decline(self, worker: Worker) -> None:
        """A worker goes on without an answer, if it was asked for one. The next step asks again."""
        if self.asked == worker:
            self.asked = None

    def step_committed(self, now_s: float, *, newcomer_waits: bool) -> None:
        """A step is committed: the lowest rank is asked, if the copy is old or somebody is about to need it."""
        due = newcomer_waits or now_s - self._updated_s > REFRESH_INTERVAL_S
        if due and self.asked is None and self._attached:
            self.asked = min(self._attached)


class JobBuffers:
    """The buffers of one job. Thread-safe; what ends in `_locked` is called with the job's lock held.

    Values are never written to once they are held, but replaced as a whole: who has got hold of some may read them
    without the lock.

    Args:
        changed: The job's condition.
        wait_locked: The job's: waits on behalf of a worker until a condition holds.
        clock: Tells the time, in seconds; it never goes back.
        journal: The job's.
    """

    def __init__(
        self,
        changed: threading.Condition,
        wait_locked: Callable[[Member, Callable[[], bool], Callable[[], str]], None],
        clock: Callable[[], float],
        journal: JobJournal,
    ) -> None:
        self._journal = journal
        self._changed = changed
        self._wait_locked = wait_locked
        self._clock = clock
        # All below: guarded by self._changed.
        self._values: BufferValues | None = None
        self._refresh = BufferRefresh()
        # Who uploads the first values, and what they will take.
        self._bringing: Member | None = None
        self._bringing_bytes = 0
        self._newcomers = 0

    @property
    def nbytes(self) -> int:
        """What they take, the copy that is received while the one before it is held included. Needs no lock."""
        values = self._values
        return self._bringing_bytes + (2 * values.nbytes if values is not None else 0)

    def values(self) -> BufferValues | None:
        """The values, for reading alone; None where no worker has attached any."""
        with self._changed:
            return self._values

    def restore(self, values: BufferValues) -> None:
        """Holds values again that were held before a restart. Nobody uses the job yet."""
        self._values = values

    def has_attached_locked(self, worker: Worker) -> bool:
        """Whether a worker has the buffers."""
        return self._refresh.has_attached(worker)

    def restore_attached(self, worker: Worker) -> None:
        """A worker had the buffers before a restart. Nobody uses the job yet."""
        self._refresh.attach(worker)

    def tensors(self) -> dict[str, torch.Tensor]:
        """The values by name, on the CPU, row-major; empty where no worker has attached any. Not to be written to."""
        values = self.values()
        return dict(values.tensors) if values is not None else {}

    def attach(
        self, member: Member, buffers: Sequence[Buffer], *, bytes_left: Callable[[], int]
    ) -> BufferValues | None:
        """A worker has these buffers. Waits for a worker that uploads them, or has been asked for fresh ones.

        Args:
            member: The worker.
            buffers: What they are, with distinct names.
            bytes_left: Tells how many bytes the job may still take.

        Returns:
            The job's values; None where the worker is the first, and has to bring them: `hold` follows.

        Raises:
            JobMismatchError: the job has other buffers; the first that differs is named.
            LimitExceededError: the worker is the first, and they take more than is left.
            OutOfOrderError: the worker has attached them already, or its line is down.
            StepTimeoutError: it waited too long.
            JobDeletedError: the job went away.
        """
        with self._changed:
            if member.buffers_attached:
                raise OutOfOrderError("the worker has attached its buffers already")
            self._wait_locked(member, lambda: self._bringing is None and self._refresh.asked is None, self._occupation)
            if self._values is None:
                # Checked when it is known who takes the memory, and before it is taken.
                needed, left = 2 * sum(buffer.nbytes for buffer in buffers), bytes_left()
                if needed > left:
                    raise LimitExceededError(
                        f"the buffers and the copy that replaces them would take {needed} bytes; this server has "
                        f"{max(left, 0)} left for this job (--max-job-bytes)"
                    )
                self._bringing, self._bringing_bytes = member, needed
                return None
            difference = first_buffer_difference(self._values.buffers, buffers)
            if difference is not None:
                raise JobMismatchError(
                    f"rank {member.worker.rank} attaches other buffers than the job has: {difference}"
                )
            self._attach_locked(member)
            return self._values

    def check_asked(self, member: Member) -> Sequence[Buffer]:
        """Checks that a worker has been asked for fresh buffers: `hold` follows.

        Returns:
            What they are.

        Raises:
            OutOfOrderError: it has not.
        """
        with self._changed:
            if self._values is None or self._refresh.asked != member.worker:
                raise OutOfOrderError("the worker has not been asked for its buffers")
            return self._values.buffers

    def hold(self, member: Member, values: BufferValues) -> None:
        """Takes the values that a worker has brought: all of them, written before.

        Raises:
            OutOfOrderError: it has left the job meanwhile.
        """
        with self._changed:
            if self._bringing is not member and self._refresh.asked != member.worker:
                raise OutOfOrderError("the worker has left the job")
            self._journal.buffers_brought(values)
            if self._bringing is member:
                self._bringing, self._bringing_bytes = None, 0
                self._attach_locked(member)
            self._values = values
            self._refresh.updated(self._clock())
            self._changed.notify_all()

    def is_asked(self, member: Member) -> bool:
        """Whether a worker is to send fresh buffers, as its receipt says. Called by its own stream."""
        # Without the lock, which other workers' updates hold: once asked, a worker stays so until its own stream or its
        # leaving changes it.
        return self._refresh.asked == member.worker

    def decline(self, member: Member) -> None:
        """A worker goes on with something else, and sends none if it was asked. Called by its own stream."""
        if self.is_asked(member):
            with self._changed:
                self._refresh.decline(member.worker)
                self._changed.notify_all()

    @contextmanager
    def expecting_newcomer_locked(self) -> Iterator[None]:
        """A worker waits for the open step: for a copy that is as fresh as the parameters it will get."""
        self._newcomers += 1
        try:
            yield
        finally:
            self._newcomers -= 1

    def step_committed_locked(self) -> None:
        """A step is committed."""
        if self._values is not None:
            self._refresh.step_committed(self._clock(), newcomer_waits=self._newcomers > 0)

    def leave_locked(self, member: Member) -> None:
        """A worker of the job is leaving it. The caller notifies."""
        self._refresh.leave(member.worker)
        self.disconnect_locked(member)

    def disconnect_locked(self, member: Member) -> None:
        """A worker's line is down: what it was to bring does not come. The caller notifies."""
        self._refresh.decline(member.worker)
        if self._bringing is member:
            self._bringing, self._bringing_bytes = None, 0

    def _attach_locked(self, member: Member) -> None:
        self._journal.buffers_attached(member.worker)
        member.buffers_attached = True
        self._refresh.attach(member.worker)

    def _occupation(self) -> str:
        if self._bringing is not None:
            return f"rank {self._bringing.worker.rank} is still uploading its buffers"
        asked = self._refresh.asked
        return "fresh buffers are still due" + (f" from rank {asked.rank}" if asked is not None else "")
