"""The workers of a job: who is in it, who may come in, and waiting on their behalf."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum, auto
from typing import Final

from optimd.server.aggregation import Worker
from optimd.server.errors import (
    EvictedError,
    JobDeletedError,
    LeaseEndedError,
    LimitExceededError,
    OutOfOrderError,
    StepTimeoutError,
    SupersededError,
    WorkerInUseError,
)
from optimd.server.measures import JobMeasures
from optimd.server.member import Member, WorkerRecord
from optimd.server.membership import Membership, Verdict
from optimd.server.policies import Aggregator
from optimd.server.receipts import Receipt
from optimd.server.settings import JobSettings

_LOOKING_S: Final = 0.05
"""How often a newcomer looks whether the process in its place has been heard of, which notifies nobody."""


class JobPhase(Enum):
    """Where a job is in its life."""

    CREATING = auto()
    READY = auto()
    DELETED = auto()


def evicted(job: str, worker: Worker) -> str:
    """What a process is told that an operator has taken out of a job."""
    return (
        f"job {job!r}: an operator has taken worker {worker.worker_id!r} (rank {worker.rank}) out of the job; start it "
        "again to have it back"
    )


class Company:
    """A job's members, and what keeps them busy. All methods are called with the job's lock, that of `changed`, held.

    Args:
        job: The job's name, for messages.
        settings: What its creator asked for.
        aggregator: The job's, which knows of its steps.
        changed: The job's condition: notified of all that a worker may wait for.
        lease_s: How long a worker stays in the job after it was last heard of, in seconds.
        max_workers: The most workers at once.
        measures: What is counted of the job.
    """

    def __init__(
        self,
        job: str,
        settings: JobSettings,
        aggregator: Aggregator,
        changed: threading.Condition,
        *,
        lease_s: float,
        max_workers: int,
        measures: JobMeasures,
    ) -> None:
        self._job = job
        self._settings = settings
        self._aggregator = aggregator
        self._changed = changed
        self._max_workers = max_workers
        self._measures = measures
        self.membership = Membership(lease_s, while_broken=settings.private)
        self.phase = JobPhase.CREATING
        self.members: dict[Worker, Member] = {}
        self.bringing: Member | None = None
        """Who is uploading parameters or state: nothing else begins meanwhile."""
        self.newcomers = 0
        """How many wait for the end of a step that they are not in, to be let in or to be given parameters."""
        self._records: dict[str, WorkerRecord] = {}

    def record(self, worker_id: str) -> WorkerRecord:
        """What the job remembers of a worker_id."""
        return self._records.setdefault(worker_id, WorkerRecord())

    def records(self) -> dict[str, WorkerRecord]:
        """What the job remembers, by worker_id. The job's own dict."""
        return self._records

    def answer(self, worker: Worker, receipt: Receipt, *, replayed: bool = False) -> None:
        """A worker's push is over: the next one is due.

        Args:
            worker: The worker.
            receipt: What became of the push.
            replayed: Whether that was before the server was started, which counts what it does itself.
        """
        record = self.record(worker.worker_id)
        record.next_sequence = receipt.sequence + 1
        record.receipt = receipt
        if not replayed:
            self._measures.answered(receipt)
        member = self.members.get(worker)
        if member is not None:
            member.held.forget()
            member.promised = frozenset()
            member.reserved_bytes = 0

    @contextmanager
    def waiting_at_boundary(self) -> Iterator[None]:
        """A worker waits for the end of a step that it is not in: no other begins before it, and that one is timed."""
        self.newcomers += 1
        try:
            yield
        finally:
            self.newcomers -= 1
            self._changed.notify_all()

    def free_rank(self, worker_id: str) -> int:
        """The rank of a worker that asks for none: the one that it had, or else the lowest that nobody has."""
        taken = {worker.rank for worker in self.members if worker.worker_id != worker_id}
        had = self.record(worker_id).rank
        if had is not None and had not in taken:
            return had
        return next(rank for rank in range(len(taken) + 1) if rank not in taken)

    # --- checks

    def check_alive(self, member: Member) -> None:
        """Checks that a worker may go on.

        Raises:
            JobDeletedError: the job is gone.
            EvictedError: an operator has taken it out.
            SupersededError: another process has taken the worker's id.
            OutOfOrderError: the worker's line is down.
        """
        if self.phase is JobPhase.DELETED:
            raise JobDeletedError(f"job {self._job!r} was deleted")
        if member.evicted:
            raise EvictedError(evicted(self._job, member.worker))
        if member.superseded:
            raise SupersededError(
                f"another process has taken worker_id {member.worker.worker_id!r} of job {self._job!r}; this one is "
                "not in the job any more"
            )
        if member.lapsed:
            raise LeaseEndedError(f"nothing was heard of rank {member.worker.rank} for as long as its lease")
        if not member.alive:
            raise OutOfOrderError("the worker has left the job")

    def check_sequence(self, member: Member, message: str, sequence: int) -> None:
        """Checks that a push is the one that is due.

        Raises:
            OutOfOrderError: it is not.
        """
        due = self.record(member.worker.worker_id).next_sequence
        if sequence != due:
            raise OutOfOrderError(f"{message}.sequence is {sequence}; {due} is due")

    # --- coming in

    def await_place(self, member: Member, *, since: float, returns: bool, picks_rank: bool) -> list[Worker] | None:
        """Waits until a process may have its place, while the one that holds it may be dead.

        Args:
            member: The process.
            since: When it began to ask.
            returns: Whether it says that it has been in the job before.
            picks_rank: Whether it takes any rank.

        Returns:
            Whom it displaces; None where it is in its place already.

        Raises:
            WorkerInUseError: a live process holds its id or its rank.
            SupersededError: it was replaced.
            LimitExceededError: the job is full.
            JobDeletedError: the job is gone, or it is not the one that the process was in.
            OutOfOrderError: the process's line is down.
        """
        while True:
            self.check_alive(member)
            if picks_rank:
                member.worker = Worker(self.free_rank(member.worker.worker_id), member.worker.worker_id)
                size = self._settings.world_size
                if size is not None and member.worker.rank >= size:
                    raise WorkerInUseError(
                        f"job {self._job!r} has all of its {size} workers; give this one the rank of another with "
                        "ProxyOptions(rank=...), or a larger world_size to all of them"
                    )
            claim = self.membership.claim(
                member.worker, member.incarnation, now=time.monotonic(), since=since, returns=returns
            )
            match claim.verdict:
                case Verdict.RESUME:
                    return None
                case Verdict.ENTER:
                    if len(self.members.keys() - set(claim.rivals)) >= self._max_workers:
                        raise LimitExceededError(
                            f"job {self._job!r} has {len(self.members)} workers, and this server lets a job have "
                            f"{self._max_workers} (--max-job-workers)"
                        )
                    return list(claim.rivals)
                case Verdict.WAIT:
                    self._changed.wait(_LOOKING_S)
                case Verdict.IN_USE:
                    raise self._in_use(member.worker, claim.rivals[0])
                case Verdict.SUPERSEDED:
                    member.superseded = True
                    self.check_alive(member)
                case Verdict.UNKNOWN:
                    raise JobDeletedError(
                        f"job {self._job!r} is not the one that this worker was in: that was deleted, or its server "
                        "was started again and has not kept it, and another of that name has been created since"
                    )

    def _in_use(self, newcomer: Worker, holder: Worker) -> WorkerInUseError:
        if newcomer.worker_id == holder.worker_id:
            return WorkerInUseError(
                f"worker_id {newcomer.worker_id!r} is in job {self._job!r} already; give this one another with "
                "ProxyOptions(worker_id=...) or another rank"
            )
        return WorkerInUseError(
            f"rank {newcomer.rank} is in job {self._job!r} already, as worker_id {holder.worker_id!r}; give this "
            "worker another with ProxyOptions(rank=...)"
        )

    # --- waiting

    def wait(
        self,
        member: Member | None,
        condition: Callable[[], bool],
        timeout_s: float | None,
        waiting_for: Callable[[], str] | None = None,
    ) -> None:
        """Waits on behalf of a worker, if one is given for as long as its line is up.

        Args:
            member: The worker.
            condition: What is waited for.
            timeout_s: How long, in seconds; None where the aggregator's own deadlines and the leases bound it.
            waiting_for: Tells a person what is missing; without it, what keeps the job busy is said.

        Raises:
            JobDeletedError: the job is gone.
            SupersededError: another process has taken the worker's id.
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
            reason = (waiting_for or self.occupation)()
            raise StepTimeoutError(f"job {self._job!r}: waited {timeout_s:g} s, and {reason}")

    def await_quiet(self, member: Member) -> None:
        """Waits as `await_all`, and until nobody else is in the middle of a push or an accumulation.

        A push that waits for others ends the wait: whoever calls this has to be refused then. In an asynchronous job
        nobody waits for this worker: there, nobody begins a push meanwhile.

        Raises:
            RequestError: what `wait` raises.
        """
        self.await_all(member)
        if self._settings.is_async:
            self.bringing = member
            try:
                self.wait(
                    member,
                    lambda: not self._others_occupied(member) and not self._aggregator.is_open,
                    self._settings.join_timeout_s,
                )
            finally:
                if self.bringing is member:
                    self.bringing = None
            return
        self.wait(
            member,
            lambda: self._aggregator.is_open or (self.bringing is None and not self._others_occupied(member)),
            self._settings.join_timeout_s,
        )
        self.await_all(member)

    def _others_occupied(self, member: Member) -> bool:
        # Who waits for slower workers has nothing under way, and may be waiting for this very one.
        return any(
            other.occupied and not self._aggregator.is_waiting(worker)
            for worker, other in self.members.items()
            if other is not member
        )

    def await_all(self, member: Member) -> None:
        """Waits until the job is formed, every worker in it has its parameters, and nobody is uploading.

        In an asynchronous job workers do not wait for those that are still receiving theirs.

        Raises:
            RequestError: what `wait` raises.
        """
        self.wait(
            member,
            lambda: (
                self._aggregator.is_formed
                and self.bringing is None
                and (self._settings.is_async or all(other.ready for other in self.members.values()))
            ),
            self._settings.join_timeout_s,
            lambda: (
                self.occupation()
                if self._aggregator.is_formed
                else f"{len(self.members)} of {self._settings.world_size} workers have joined; start the others, or "
                "correct world_size"
            ),
        )

    def occupation(self) -> str:
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
