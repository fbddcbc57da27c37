"""The workers of a job: who is in it, and waiting on their behalf."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from enum import Enum, auto

from optimd.server.aggregation import SyncAggregator, Worker
from optimd.server.errors import JobDeletedError, OutOfOrderError, StepTimeoutError, WorkerInUseError
from optimd.server.membership import Member, WorkerRecord
from optimd.server.settings import JobSettings


class JobPhase(Enum):
    """Where a job is in its life."""

    CREATING = auto()
    READY = auto()
    DELETED = auto()


class Company:
    """A job's members, and what keeps them busy. All methods are called with the job's lock, that of `changed`, held.

    Args:
        job: The job's name, for messages.
        settings: What its creator asked for.
        aggregator: The job's, which knows of its steps.
        changed: The job's condition: notified of all that a worker may wait for.
    """

    def __init__(
        self, job: str, settings: JobSettings, aggregator: SyncAggregator, changed: threading.Condition
    ) -> None:
        self._job = job
        self._settings = settings
        self._aggregator = aggregator
        self._changed = changed
        self.phase = JobPhase.CREATING
        self.members: dict[Worker, Member] = {}
        self.bringing: Member | None = None
        """Who is uploading parameters or state: nothing else begins meanwhile."""
        self._records: dict[str, WorkerRecord] = {}

    def record(self, worker_id: str) -> WorkerRecord:
        """What the job remembers of a worker_id."""
        return self._records.setdefault(worker_id, WorkerRecord())

    def answer(self, workers: Iterable[Worker]) -> None:
        """The pushes of these workers are over: the next ones are due."""
        for worker in workers:
            self.record(worker.worker_id).next_sequence += 1
            member = self.members.get(worker)
            if member is not None:
                member.held.forget()
                member.reserved_bytes = 0

    # --- checks

    def check_alive(self, member: Member) -> None:
        """Checks that a worker may go on.

        Raises:
            JobDeletedError: the job is gone.
            OutOfOrderError: the worker's line is down.
        """
        if self.phase is JobPhase.DELETED:
            raise JobDeletedError(f"job {self._job!r} was deleted")
        if not member.alive:
            raise OutOfOrderError("the worker has left the job")

    def check_free(self, newcomer: Worker) -> None:
        """Checks that a worker may come in.

        Raises:
            WorkerInUseError: a live worker has its id or rank.
        """
        for worker in self.members:
            if worker.worker_id == newcomer.worker_id:
                raise WorkerInUseError(
                    f"worker_id {newcomer.worker_id!r} is in job {self._job!r} already; give this one another with "
                    "ProxyOptions(worker_id=...) or another rank"
                )
            if worker.rank == newcomer.rank:
                raise WorkerInUseError(
                    f"rank {newcomer.rank} is in job {self._job!r} already, as worker_id {worker.worker_id!r}; give "
                    "this worker another with ProxyOptions(rank=...)"
                )

    def check_sequence(self, member: Member, message: str, sequence: int) -> None:
        """Checks that a push is the one that is due.

        Raises:
            OutOfOrderError: it is not.
        """
        due = self.record(member.worker.worker_id).next_sequence
        if sequence != due:
            raise OutOfOrderError(f"{message}.sequence is {sequence}; {due} is due")

    # --- waiting

    def wait(
        self,
        member: Member | None,
        condition: Callable[[], bool],
        timeout_s: float,
        waiting_for: Callable[[], str] | None = None,
    ) -> None:
        """Waits on behalf of a worker, if one is given for as long as its line is up.

        Args:
            member: The worker.
            condition: What is waited for.
            timeout_s: How long, in seconds.
            waiting_for: Tells a person what is missing; without it, what keeps the job busy is said.

        Raises:
            JobDeletedError: the job is gone.
            OutOfOrderError: the worker's line is down.
            StepTimeoutError: it took longer.
        """
        arrived = self._changed.wait_for(
            lambda: condition() or self.phase is JobPhase.DELETED or (member is not None and not member.alive),
            timeout_s,
        )
        if self.phase is JobPhase.DELETED:
            raise JobDeletedError(f"job {self._job!r} was deleted")
        if member is not None:
            self.check_alive(member)
        if not arrived:
            reason = (waiting_for or self._occupation)()
            raise StepTimeoutError(f"job {self._job!r}: waited {timeout_s:g} s, and {reason}")

    def await_quiet(self, member: Member) -> None:
        """Waits as `await_all`, and until nobody else is in the middle of a push or an accumulation.

        A push that waits for others ends the wait: whoever calls this has to be refused then.

        Raises:
            RequestError: what `wait` raises.
        """
        self.await_all(member)
        self.wait(
            member,
            lambda: (
                self._aggregator.is_open
                or (self.bringing is None and not any(o.occupied for o in self.members.values() if o is not member))
            ),
            self._settings.join_timeout_s,
        )
        self.await_all(member)

    def await_all(self, member: Member) -> None:
        """Waits until the job is formed, every worker in it has its parameters, and nobody is uploading.

        Raises:
            RequestError: what `wait` raises.
        """
        self.wait(
            member,
            lambda: (
                self._aggregator.is_formed
                and self.bringing is None
                and all(other.ready for other in self.members.values())
            ),
            self._settings.join_timeout_s,
            lambda: (
                self._occupation()
                if self._aggregator.is_formed
                else f"{len(self.members)} of {self._settings.world_size} workers have joined; start the others, or "
                "correct world_size"
            ),
        )

    def _occupation(self) -> str:
        """What keeps the job busy, for a message."""
        if self.bringing is not None:
            return f"rank {self.bringing.worker.rank} is still uploading"
        unready = [worker.rank for worker, member in self.members.items() if not member.ready]
        if unready:
            return f"rank {', '.join(map(str, sorted(unready)))} is still receiving the parameters"
        if not self._aggregator.is_open:
            occupied = [worker.rank for worker, member in self.members.items() if member.occupied]
            return f"rank {', '.join(map(str, sorted(occupied)))} is still in the middle of its last exchange"
        return "the step waits for rank " + ", ".join(str(worker.rank) for worker in self._aggregator.missing())
