"""The jobs of a server, by name."""

from __future__ import annotations

import dataclasses
import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest

import torch

from optimd.server.aggregation import Worker
from optimd.server.company import JobPhase, evicted
from optimd.server.errors import (
    EvictedError,
    JobDeletedError,
    JobExistsError,
    JobInUseError,
    JobMismatchError,
    JobRewoundError,
    LimitExceededError,
    NotDurableError,
    UnknownJobError,
)
from optimd.server.job import Job
from optimd.server.journal import JobJournal
from optimd.server.member import Member
from optimd.server.opening import Opening, WorkerLayout
from optimd.server.settings import JobSettings
from optimd.server.snapshots import SnapshotInfo
from optimd.server.storage import Storage
from optimd.v1 import job_pb2
from optimd.wire.layout import first_difference

_log = logging.getLogger(__name__)

# What may differ between the workers of a job: the first one's holds.
_CREATORS_CHOICE = frozenset({"bucket_bytes"})


@dataclass(frozen=True, slots=True)
class Entry:
    """How a worker has come into a job."""

    job: Job
    creates: bool = False
    """Whether it has created the job and has to upload its values."""
    is_current: bool = False
    """Whether it returns, and has everything that it would be sent."""


class JobRegistry:
    """Creates, finds and drops jobs. Thread-safe.

    Args:
        device: Where jobs keep their tensors.
        max_jobs: The most jobs at once.
        max_job_bytes: The most bytes that values and state of one job may take.
        max_job_workers: The most workers of one job at once.
        lease_s: How long a worker stays in a job after it was last heard of, in seconds.
        storage: Keeps them on disk. None: they live in memory.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        max_jobs: int,
        max_job_bytes: int,
        max_job_workers: int,
        lease_s: float,
        storage: Storage | None = None,
    ) -> None:
        self.device = device
        self.max_job_bytes = max_job_bytes
        self._max_jobs = max_jobs
        self._max_job_workers = max_job_workers
        self._lease_s = lease_s
        self.storage = storage
        self._lock = threading.Lock()
        self._jobs: dict[str, Job] = {}  # guarded by self._lock

    def enter(self, opening: Opening, layout: WorkerLayout, member: Member, *, on_job: Callable[[Job], None]) -> Entry:
        """Lets a worker into a job, which it creates if there is none. Waits as `Job.admit` does.

        Args:
            opening: What the worker asks for.
            layout: What it has.
            member: The worker.
            on_job: Called with the job that the worker is about to wait for.

        Raises:
            JobExistsError: it exists and the worker wants a new one.
            JobDeletedError: the worker returns to a job that is not there any more.
            JobMismatchError: the worker's settings or parameters are not the job's.
            JobRewoundError: the worker returns to a job that is not as far as it was told, and does not follow it.
            LimitExceededError: there are too many jobs.
            RequestError: what `Job.admit` raises.
        """
        while True:
            job, creates = self._find_or_create(opening)
            try:
                on_job(job)
                if creates:
                    job.admit(member, creates=True, check=lambda: None, picks_rank=opening.rank is None)
                    return Entry(job, creates=True)
                job.await_ready(member)
                # Before it waits for anything: others may take the job past this worker's point again, by another way.
                member.rewound = opening.returns_at_step is not None and job.is_behind(
                    opening.worker_id,
                    opening.incarnation,
                    step=opening.returns_at_step,
                    next_sequence=opening.returns_with_sequence,
                )
                # Said at once, not when the open step is over; and again when nothing can change any more.
                _check_match(job, opening, layout)
                is_current = job.admit(
                    member,
                    creates=False,
                    check=partial(_check_admissible, job, opening, layout, member),
                    returns=opening.returns_at_step is not None,
                    picks_rank=opening.rank is None,
                    base_step=opening.returns_at_step,
                )
            except JobDeletedError:
                if opening.returns_at_step is not None:
                    raise
                # Its creator gave up before it was ready, or an operator dropped it: look again.
                continue
            return Entry(job, is_current=is_current)

    def leave(self, job: Job, member: Member) -> None:
        """Takes a worker out of a job. Drops the job if it is private, or if the worker was still creating it."""
        try:
            job.leave(member)
        finally:
            self._drop_if_over(job)

    def disconnect(self, job: Job, member: Member) -> None:
        """A worker's line is down, as `Job.disconnect` says. Drops the job as `leave` does."""
        try:
            job.disconnect(member)
        finally:
            self._drop_if_over(job)

    def tick(self, job: Job, now: float) -> None:
        """Time has passed, as `Job.tick` says. Drops the job as `leave` does."""
        try:
            job.tick(now)
        finally:
            self._drop_if_over(job)

    def due(self, now: float) -> list[Job]:
        """The jobs for which `tick` may have something to do. Does not wait for any."""
        with self._lock:
            jobs = list(self._jobs.values())
        return [job for job in jobs if job.is_due(now)]

    def hear(self, name: str, worker_id: str, incarnation: int) -> bool:
        """A worker is alive. Returns whether it is in its job. Does not wait."""
        # Without the lock, which is held while a job's folder is made or removed: others' leases do not wait for that.
        job = self._jobs.get(name)
        return job is not None and job.hear(worker_id, incarnation)

    def _drop_if_over(self, job: Job) -> None:
        with self._lock:
            ends = not job.worker_count and (job.settings.private or job.phase is JobPhase.CREATING)
            if ends and self._jobs.get(job.name) is job:
                del self._jobs[job.name]
        if ends:
            self._end(job)

    def _end(self, job: Job) -> None:
        job.delete()
        if self.storage is not None:
            self.storage.forget(job)

    def get(self, name: str) -> Job:
        """The job of that name.

        Raises:
            UnknownJobError: there is none, or it is still being created.
        """
        with self._lock:
            job = self._jobs.get(name)
        if job is None or job.phase is not JobPhase.READY:
            raise UnknownJobError(f"there is no job {name!r} on this server")
        return job

    def all(self) -> list[Job]:
        """The jobs that are ready, in order of name."""
        with self._lock:
            jobs = [self._jobs[name] for name in sorted(self._jobs)]
        return [job for job in jobs if job.phase is JobPhase.READY]

    def delete(self, name: str, *, force: bool) -> None:
        """Drops a job.

        Raises:
            UnknownJobError: there is none of that name.
            JobInUseError: workers are in it and `force` is not set.
        """
        job = self.get(name)
        workers = job.worker_count
        if workers and not force:
            raise JobInUseError(f"job {name!r} has {workers} workers in it; force ends them")
        with self._lock:
            if self._jobs.get(name) is job:
                del self._jobs[name]
        self._end(job)
        _log.info("job %s: deleted at step %d", name, job.step)

    def evict(self, name: str, worker_id: str, timeout_s: float) -> None:
        """Takes a worker out of a job, as `Job.evict` says. Drops the job as `leave` does.

        Raises:
            UnknownJobError: there is none of that name.
            UnknownWorkerError: it has no such worker.
            StepTimeoutError: the job was busy for `timeout_s`.
        """
        job = self.get(name)
        try:
            job.evict(worker_id, timeout_s)
        finally:
            self._drop_if_over(job)

    def _find_or_create(self, opening: Opening) -> tuple[Job, bool]:
        with self._lock:
            job = self._jobs.get(opening.job)
            if job is not None and job.phase is not JobPhase.CREATING:
                occupied = job.has_workers_besides(opening.worker_id)
                forming = occupied and job.step == 0
                fresh = opening.returns_at_step is None
                if opening.on_existing == job_pb2.ON_EXISTING_FAIL and not forming and fresh:
                    raise JobExistsError(
                        f"job {opening.job!r} exists, at step {job.step}; choose another name, or "
                        'on_existing="resume" or "replace"'
                    )
                if opening.on_existing == job_pb2.ON_EXISTING_REPLACE and not occupied and fresh:
                    _log.info("job %s: replaced at step %d", job.name, job.step)
                    self._end(job)
                    job = None
            if job is not None:
                return job, False
            if opening.returns_at_step is not None:
                raise JobDeletedError(
                    f"job {opening.job!r} is not on this server any more: it was deleted, or the server was started "
                    "again and has not kept it (--data-dir keeps jobs). Start the worker again to create it anew"
                )
            if len(self._jobs) >= self._max_jobs:
                raise LimitExceededError(
                    f"this server takes {self._max_jobs} jobs and no more (--max-jobs); delete one"
                )
            journal = self.storage.create(opening.job, opening.settings) if self.storage is not None else None
            job = self._make(opening.job, opening.settings, journal)
            if self.storage is not None:
                self.storage.keep(job)
            self._jobs[opening.job] = job
            return job, True

    def _make(self, name: str, settings: JobSettings, journal: JobJournal | None) -> Job:
        return Job(
            name,
            settings,
            self.device,
            max_bytes=self.max_job_bytes,
            max_workers=self._max_job_workers,
            lease_s=self._lease_s,
            journal=journal,
        )

    def recover(self) -> None:
        """Brings back the jobs that are kept on disk. To be called before anybody may enter one.

        Raises:
            DataDirError: one cannot be brought back.
        """
        if self.storage is not None:
            for job in self.storage.recover(self._make):
                self._jobs[job.name] = job
                # Its worker had left, and the server died before the job was gone.
                self._drop_if_over(job)

    def begin(self) -> None:
        """Workers can come from now on: until then nothing could be heard of those that were in a job."""
        for job in self.all():
            job.begin_leases()

    def snapshot(self, name: str) -> SnapshotInfo:
        """Has a snapshot of a job written to the disk. Blocks until it is there.

        Raises:
            UnknownJobError: there is none of that name.
            NotDurableError: this server keeps nothing on disk.
            StorageFailedError: it could not be written.
            JobDeletedError: the job went away.
        """
        job = self.get(name)
        if self.storage is None:
            raise NotDurableError("this server keeps nothing on disk; start it with --data-dir")
        return self.storage.snapshot(job)


def _check_admissible(job: Job, opening: Opening, layout: WorkerLayout, member: Member) -> None:
    if job.record(opening.worker_id).evicted == opening.incarnation:
        raise EvictedError(evicted(job.name, Worker(member.worker.rank, opening.worker_id)))
    if member.rewound and not opening.follows_rewind:
        due = job.record(opening.worker_id).next_sequence
        raise JobRewoundError(
            f"job {job.name!r} stands at step {job.step}, with push {due} of {_who(opening)} to come; the worker was "
            f"told of step {opening.returns_at_step} and push {opening.returns_with_sequence}: the server was started "
            "again from what it had on disk, and that was less. Go back to a checkpoint of that step and start the "
            'worker again, or have it take the job as it is: ProxyOptions(on_rewind="follow")'
        )
    _check_match(job, opening, layout)


def _check_match(job: Job, opening: Opening, layout: WorkerLayout) -> None:
    for setting in dataclasses.fields(job.settings):
        ours, theirs = getattr(job.settings, setting.name), getattr(opening.settings, setting.name)
        if ours != theirs and setting.name not in _CREATORS_CHOICE:
            raise JobMismatchError(f"job {job.name!r} has {setting.name} {ours}, {_who(opening)} asks for {theirs}")
    # While a worker's line was down, others may have added groups: it will come to that.
    returns = opening.returns_at_step is not None
    parameters = list(enumerate(layout.parameters))
    difference = first_difference(job.group_parameters(0)[: len(parameters) if returns else None], parameters)
    if difference is None:
        sizes = list(job.group_sizes)
        difference = _first_group_difference(sizes[: len(layout.sizes) if returns else None], layout.sizes)
    if difference is not None:
        raise JobMismatchError(f"{_who(opening)} does not match job {job.name!r}: {difference}")


def _who(opening: Opening) -> str:
    return f"worker {opening.worker_id}" if opening.rank is None else f"rank {opening.rank}"


def _first_group_difference(ours: Sequence[int], theirs: Sequence[int]) -> str | None:
    for index, (mine, other) in enumerate(zip_longest(ours, theirs, fillvalue=0)):
        if mine != other:
            return f"param group {index} has {mine} parameters in the job, {other} in the worker"
    return None
