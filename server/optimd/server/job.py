"""A job: one optimizer on the server.

A job owns its parameters and state, its param_groups and its workers, and serialises every change of them under one
lock. The calling threads are those of the workers' streams: the one that completes a bucket applies it.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from optimd.server.accumulating import Accumulating
from optimd.server.aggregation import Decision, Worker
from optimd.server.bringing import Bringing
from optimd.server.buffers import JobBuffers
from optimd.server.company import Company, JobPhase
from optimd.server.content import JobContent
from optimd.server.errors import LimitExceededError, StepTimeoutError, UnknownWorkerError
from optimd.server.journal import JobJournal
from optimd.server.measures import JobMeasures
from optimd.server.member import Former, Member, Standing, WorkerRecord
from optimd.server.parts import JobParts
from optimd.server.policies import aggregator_for
from optimd.server.pulling import Pulling
from optimd.server.pushing import Pushing
from optimd.server.readers import Readers, ReadHold
from optimd.server.settings import JobSettings
from optimd.server.store import Store
from optimd.server.watching import StepHistory
from optimd.wire.layout import Bucket, Parameter

_log = logging.getLogger(__name__)


class Job:
    """One optimizer: parameters, param_groups, state and workers.

    Thread-safe. Methods that wait say so; all waits have deadlines.

    Args:
        name: The job's name.
        settings: What its creator asked for.
        device: Where its tensors live.
        max_bytes: The most that it may take: values, state, buffers, held gradients, and what is on its way in.
        max_workers: The most workers at once.
        lease_s: How long a worker stays in it after it was last heard of, in seconds.
        journal: Where what it does is written down first. None: nowhere.
    """

    def __init__(
        self,
        name: str,
        settings: JobSettings,
        device: torch.device,
        *,
        max_bytes: int = sys.maxsize,
        max_workers: int = sys.maxsize,
        lease_s: float = math.inf,
        journal: JobJournal | None = None,
    ) -> None:
        self.name = name
        self._max_bytes = max_bytes
        self.settings = settings
        self.history = StepHistory(name)
        self._changed = threading.Condition()
        self.measures = JobMeasures()
        """What is counted of it."""
        self.journal = journal or JobJournal(name)
        self.journal.describe_contributions(self._contribution_locked)
        # All below: changed with self._changed held.
        self._content = JobContent(settings, device)
        self._aggregator = aggregator_for(settings)
        self._company = Company(
            name,
            settings,
            self._aggregator,
            self._changed,
            lease_s=lease_s,
            max_workers=max_workers,
            measures=self.measures,
        )
        self._readers = Readers(self._changed)
        self.buffers = JobBuffers(
            self._changed,
            lambda member, condition, waiting_for: self._company.wait(
                member, condition, settings.timeout_s, waiting_for
            ),
            time.monotonic,
            self.journal,
        )
        parts = JobParts(
            name=name,
            settings=settings,
            changed=self._changed,
            content=self._content,
            aggregator=self._aggregator,
            company=self._company,
            readers=self._readers,
            buffers=self.buffers,
            history=self.history,
            measures=self.measures,
            check_room=self._check_room_locked,
            journal=self.journal,
        )
        self.parts = parts
        """Its rooms, for who restores it or keeps it."""
        self.pushing = Pushing(parts)
        """What workers push to it."""
        self.pulling = Pulling(parts, self.pushing)
        """What goes back to them."""
        self.accumulating = Accumulating(parts)
        """What it holds for their next pushes."""
        self.bringing = Bringing(parts, on_replaced=self.pushing.renew_locked)
        """What workers bring to it besides pushes."""

    # --- what it is. May be read without the lock

    @property
    def phase(self) -> JobPhase:
        """Where it is in its life."""
        return self._company.phase

    @property
    def store(self) -> Store:
        """Its tensors: others once its parameters have been replaced."""
        return self._content.store

    def share_values(self) -> None:
        """Has its values lie where workers on this host can read them, if they stand still for that. Does not wait.

        While somebody uploads parameters, which is done without the lock, they stay where they are: the next worker
        that comes asks again.
        """
        with self._changed:
            if self.pulling.stands_still and self._company.bringing is None:
                self._content.store.share()

    @property
    def groups(self) -> Sequence[dict[str, Any]]:
        """The options of its param_groups."""
        return self._content.groups

    @property
    def group_sizes(self) -> Sequence[int]:
        """How many parameters each of its groups has."""
        return self._content.sizes

    # --- who is in it

    @property
    def step(self) -> int:
        """The number of committed steps."""
        return self._aggregator.step

    @property
    def worker_count(self) -> int:
        """How many workers are in the job. Does not wait for a step that is being applied."""
        return len(self._company.members)

    def has_workers_besides(self, worker_id: str) -> bool:
        """Whether a worker is in the job that one of this id would not displace. Does not wait for the lock."""
        members = tuple(self._company.members.items())
        return any(worker.worker_id != worker_id or member.alive for worker, member in members)

    @property
    def has_connected_workers(self) -> bool:
        """Whether a worker whose line is up is in the job. Does not wait, not even for the lock."""
        return any(member.alive for member in tuple(self._company.members.values()))

    @property
    def lease_s(self) -> float:
        """How long a worker stays in the job after it was last heard of, in seconds."""
        return self._company.membership.lease_s

    def members(self) -> list[Member]:
        """The workers that are in the job, in order of rank. Does not wait, not even for the lock."""
        return [member for _, member in sorted(self._company.members.items(), key=lambda each: each[0])]

    def awaited_absent(self) -> list[Worker]:
        """The workers that were lost and whose places are kept, in order of rank. Does not wait, either."""
        return sorted(self._aggregator.absent)

    def lag(self, member: Member) -> int:
        """How many pushes a member is ahead of the slowest, in an asynchronous job. Does not wait, either."""
        return self._aggregator.lag_seen(member.worker)

    def record(self, worker_id: str) -> WorkerRecord:
        """What the job remembers of a worker_id. Does not wait for the lock."""
        return self._company.record(worker_id)

    def is_behind(self, worker_id: str, incarnation: int, *, step: int, next_sequence: int) -> bool:
        """Whether the job is not as far as a worker has been told: its server came back with less than it had.

        Args:
            worker_id: The worker's.
            incarnation: Which process it is.
            step: The job step that it was told last.
            next_sequence: The number of its next push, as it was told.
        """
        with self._changed:
            return (
                self.step < step
                or self._company.record(worker_id).next_sequence < next_sequence
                or self._company.membership.has_forgotten(worker_id, incarnation)
            )

    def await_ready(self, member: Member) -> None:
        """Waits until the job's creator has uploaded its values.

        Raises:
            JobDeletedError: the creator gave up, or the job was deleted.
            OutOfOrderError: the worker's line is down.
            StepTimeoutError: it took longer than `join_timeout_s`.
        """
        with self._changed:
            self._company.wait(
                member,
                lambda: self.phase is not JobPhase.CREATING,
                self.settings.join_timeout_s,
                lambda: "the worker that creates the job has not uploaded its parameters",
            )

    def admit(
        self,
        member: Member,
        *,
        creates: bool,
        check: Callable[[], None],
        returns: bool = False,
        picks_rank: bool = False,
        base_step: int | None = None,
    ) -> bool:
        """Lets a worker in, or back in. A newcomer to a synchronous job waits for the open step.

        From here on no step is begun, or where steps are synchronous committed, without the worker, so that the values
        it reads next stand still.

        Args:
            member: The worker.
            creates: Whether it creates the job.
            check: Called when the worker may have its place, for the last time when nothing can change any more; raises
                what speaks against it.
            returns: Whether it says that it has been in the job before.
            picks_rank: Whether it takes any rank: `member.worker` has it then.
            base_step: The job step that its parameters are of, if it has any.

        Returns:
            Whether it has all parameters as they are: it has been in the job all along, and nothing was committed.

        Raises:
            WorkerInUseError: a live worker has its id or rank.
            SupersededError: it has been in the job, and another process has taken its id since.
            LimitExceededError: the job has as many workers as it may have.
            JobDeletedError: the job went away, or is not the one that the worker was in.
            OutOfOrderError: the worker's line is down.
            StepTimeoutError: the open step was not committed within `timeout_s`.
        """
        since = time.monotonic()
        with self._changed:
            while True:
                displaced = self._company.await_place(member, since=since, returns=returns, picks_rank=picks_rank)
                check()
                if displaced is None:
                    former = self._company.members[member.worker]
                    if former.holds_place:
                        return self._resume_locked(former, member, base_step)
                    displaced = [member.worker]
                if displaced:
                    for worker in displaced:
                        superseded = worker.worker_id == member.worker.worker_id
                        self._remove_locked(worker, lost=True, superseded=superseded, ends_stream=True)
                    continue
                if self._may_enter_locked(member):
                    break
                self._await_boundary_locked(member)
            self._enter_locked(member, creates=creates)
            return False

    def welcome(self, member: Member, *, step: int, brought: Sequence[Bucket] = (), returns: bool = False) -> Standing:
        """The worker has all parameters, as of `step`, those of the buckets that it has brought among them.

        Args:
            member: The worker.
            step: The job step that its parameters are of.
            brought: The buckets that it has brought.
            returns: Whether it has come back to the job with this, and is told what is there of its open push.

        Returns:
            Where the job and the worker stand; of one that has returned with everything, where they stood then. What
            has happened since it is told with its next push.
        """
        with self._changed:
            standing = self._standing_locked(member, step) if member.returned is None else member.returned
            member.returned = None
            if returns:
                standing = dataclasses.replace(standing, held=self._held_locked(member.worker))
                member.promised = standing.held
            member.ready = member.holds_place = True
            for bucket in brought:
                self.pulling.see_locked(member, bucket.bucket_id)
            if brought:
                member.sight.confirm()
            self._changed.notify_all()
            return standing

    def hear(self, worker_id: str, incarnation: int) -> bool:
        """A worker is alive. Returns whether it is in the job. Does not wait, not even for the lock."""
        for worker, member in tuple(self._company.members.items()):
            if worker.worker_id == worker_id and member.incarnation == incarnation:
                self._company.membership.heard(worker, time.monotonic())
                return True
        return False

    def begin_leases(self) -> None:
        """All workers have their whole lease from now on: nobody could be heard of while the server was not there."""
        with self._changed:
            for worker in self._company.members:
                self._company.membership.heard(worker, time.monotonic())

    def disconnect(self, member: Member) -> None:
        """A worker's line is down: whatever waits on its behalf stops waiting.

        It stays in the job until its lease ends, unless it was still joining.
        """
        with self._changed:
            member.alive = False
            self.bringing.take_back_locked(member)
            if self._company.members.get(member.worker) is member:
                self.buffers.disconnect_locked(member)
                if member.holds_place:
                    self._company.membership.disconnect(member.worker)
                else:
                    self._remove_locked(member.worker)
            self._changed.notify_all()

    def leave(self, member: Member) -> None:
        """A worker has left for good. Waits for readers; may be called more than once."""
        with self._changed:
            member.alive = False
            self.bringing.take_back_locked(member)
            if self._company.members.get(member.worker) is member:
                self._remove_locked(member.worker)
            self._changed.notify_all()

    def evict(self, worker_id: str, timeout_s: float = threading.TIMEOUT_MAX) -> None:
        """Takes a worker out, with its place, whatever it is doing. Waits for readers.

        One that was lost and is awaited (`on_loss="wait"`) is awaited no more. The optimizer that was in the job cannot
        come back while this server runs; another one, of whatever process, can take its `worker_id`.

        Args:
            worker_id: The worker's.
            timeout_s: How long to wait for the job, in seconds. It has nothing to say while it waits for a full disk.

        Raises:
            UnknownWorkerError: there is none of that `worker_id`.
            StepTimeoutError: the job was busy for that long. Nothing has been done.
        """
        if not self._changed.acquire(timeout=timeout_s):
            reason = self.journal.trouble or f"it has been for {timeout_s:.0f} s"
            raise StepTimeoutError(f"job {self.name!r} is busy, and the worker is still in it: {reason}")
        try:
            worker = next((each for each in self._company.members if each.worker_id == worker_id), None)
            if worker is not None:
                self._company.record(worker_id).evicted = self._company.members[worker].incarnation
                _log.warning("job %s: rank %d (%s) was taken out by an operator", self.name, worker.rank, worker_id)
                self._remove_locked(worker, evicted=True, ends_stream=True)
                return
            worker = next((each for each in self._aggregator.absent if each.worker_id == worker_id), None)
            if worker is None:
                raise UnknownWorkerError(f"job {self.name!r} has no worker {worker_id!r}")
            _log.warning("job %s: rank %d (%s) is awaited no more, says an operator", self.name, worker.rank, worker_id)
            self._give_place_up_locked(worker)
        finally:
            self._changed.release()

    def is_due(self, now: float) -> bool:
        """Whether `tick` may have something to do. Does not wait, not even for the lock."""
        timed = self._aggregator.is_timed or self._company.newcomers > 0
        return timed or bool(self._company.membership.lapsed(now))

    def tick(self, now: float) -> None:
        """Time has passed: ends leases, and waits that have been too long. Waits for readers.

        Args:
            now: The time, in seconds, as `time.monotonic` tells it.
        """
        with self._changed:
            while True:
                # First: one that was about to lapse may come back while readers are waited for, without the lock.
                self._readers.wait()
                lapsed = self._company.membership.lapsed(max(now, time.monotonic()))
                if not lapsed:
                    break
                _log.warning("job %s: rank %d (%s) was lost: its lease has ended", self.name, *lapsed[0])
                self.measures.lost += 1
                self._remove_locked(lapsed[0], lost=True, lapsed=True, ends_stream=True)
            waited_for = self._company.newcomers > 0
            if self._aggregator.is_timed or waited_for:
                self._readers.wait()
                awaited = self._aggregator.missing()
                decisions = self._aggregator.tick(now, waited_for=waited_for)
                if decisions:
                    ranks = ", ".join(str(worker.rank) for worker in awaited)
                    _log.warning("job %s: rank %s did not come in time (timeout_s)", self.name, ranks)
                    self._settle_loss_locked(decisions, None)

    def drain(self, timeout_s: float) -> bool:
        """Begins no more steps and waits for the open one. Returns whether it was committed within `timeout_s`."""
        with self._changed:
            self.pushing.drain_locked()
            self._changed.notify_all()
            return self._changed.wait_for(lambda: not self._aggregator.is_open, timeout_s)

    def take_ahead(self, member: Member) -> None:
        """A worker is about to send gradients ahead of its push. Does not wait.

        Raises:
            RequestError: what `Company.check_alive` raises.
            LimitExceededError: the job would take too much.
        """
        with self._changed:
            self._company.check_alive(member)
            needed = self._content.store.value_bytes
            if needed > member.ahead_bytes:
                self._check_room_locked(needed - member.ahead_bytes, "the gradients that are sent ahead")
                member.ahead_bytes = needed

    def delete(self) -> None:
        """Ends the job: whoever waits for it gets `JobDeletedError`."""
        self.journal.give_up()
        with self._changed:
            self._company.phase = JobPhase.DELETED
            self._content.store.hide()
            self.journal.close()
            self._changed.notify_all()
        self.history.end()

    # --- what it takes

    @property
    def full_bytes(self) -> int:
        """What values and state take once every parameter has had an update, and what the buffers take."""
        with self._changed:
            return self._content.full_bytes + self.buffers.nbytes

    @property
    def kept_bytes(self) -> int:
        """What a snapshot of it takes, about. Does not wait for the lock."""
        return self._content.full_bytes

    @property
    def is_in_mid_step(self) -> bool:
        """Whether a part of the open step has been applied. Does not wait for the lock."""
        return self._aggregator.has_applied

    @property
    def buffers_bytes(self) -> int:
        """What the buffers take. Does not wait for the lock."""
        return self.buffers.nbytes

    @property
    def bytes_left(self) -> int:
        """How much more it may take."""
        return self._max_bytes - self.full_bytes

    def group_parameters(self, first_group: int) -> list[tuple[int, Parameter]]:
        """The parameters of all groups from index `first_group` on, with their indices."""
        with self._changed:
            return self._content.parameters_of(first_group)

    # --- its state

    @contextmanager
    def reading(self, on_hold: Callable[[ReadHold], None] = lambda _: None) -> Iterator[ReadHold]:
        """Holds the values and the state still. Waits for a step that has begun to apply, and for uploads.

        Args:
            on_hold: Called first, with what `release` takes: a reader whose line goes down does not wait on.

        Raises:
            StepTimeoutError: the step was not committed within `timeout_s`, or the reader was released.
            JobDeletedError: the job is gone.
        """
        hold = ReadHold()
        on_hold(hold)
        with self._changed:
            self._readers.queued += 1
            try:
                self._company.wait(
                    None,
                    lambda: (
                        hold.revoked
                        or (
                            not self._aggregator.has_applied
                            and self._company.bringing is None
                            and self._readers.may_enter
                        )
                    ),
                    self.settings.timeout_s,
                )
                hold.touch()
                self._readers.enter(hold)
            finally:
                self._readers.queued -= 1
                self._changed.notify_all()
        try:
            yield hold
        finally:
            self.release(hold)

    def release(self, hold: ReadHold) -> None:
        """A reader is done, or its line is down. May be called more than once."""
        with self._changed:
            self._readers.leave(hold)

    # --- all below with self._changed held

    def _may_enter_locked(self, member: Member) -> bool:
        return self._aggregator.may_join(member.worker) and self._company.bringing is None

    def _await_boundary_locked(self, member: Member) -> None:
        """Waits until a newcomer may come in, or something has changed that may speak against it."""
        with self._company.waiting_at_boundary(), self.buffers.expecting_newcomer_locked():
            # The step is timed as soon as somebody waits for it: it ends before this does.
            longest_s = min(2 * self.settings.timeout_s + self.lease_s, threading.TIMEOUT_MAX)
            self._company.wait(member, lambda: self._may_enter_locked(member), longest_s)

    def _enter_locked(self, member: Member, *, creates: bool) -> None:
        worker = member.worker
        record = self._company.record(worker.worker_id)
        record.rank = worker.rank
        former, record.former = record.former, None
        self._company.members[worker] = member
        member.place = self._company.membership.enter(worker, member.incarnation, now=time.monotonic())
        if not member.groups:
            member.groups = [dict(group) for group in self.groups]
        # The same process, back after its lease had ended, says what it said.
        returns = former is not None and former.incarnation == member.incarnation
        member.speaks = creates or (returns and former is not None and former.speaks)
        if returns and former is not None and len(former.groups) <= len(self.groups):
            member.groups = former.groups
        member.holds_place = self._aggregator.is_awaited_absent(worker)
        self.journal.worker_joined(worker, member.incarnation, speaks=member.speaks)
        try:
            self.pushing.settle_locked(self._aggregator.join(worker), worker)
        finally:
            self._changed.notify_all()

    def _resume_locked(self, former: Member, member: Member, base_step: int | None) -> bool:
        """The process that has been in the job all along has a new line."""
        self.bringing.take_back_locked(former)
        self.buffers.disconnect_locked(former)
        member.take_over(former)
        if member.rewound:
            # They are of parameters that are gone.
            self.pushing.forget_held_locked(member)
        self._company.members[member.worker] = member
        member.place = self._company.membership.resume(member.worker, now=time.monotonic())
        former.cancel()
        self._changed.notify_all()
        _log.info("job %s: rank %d (%s) is back on a new line", self.name, *member.worker)
        # It is given no parameters before it would have been on its old line.
        self._company.wait(member, lambda: not self._aggregator.is_waiting(member.worker), None)
        is_current = base_step == self.step and not member.rewound and not self.pulling.unseen_locked(member)
        if is_current:
            member.returned = self._standing_locked(member, self.step)
        return is_current

    def _held_locked(self, worker: Worker) -> frozenset[int]:
        """The buckets of a worker's open push that are there."""
        if not self._aggregator.has_begun(worker):
            return frozenset()
        buckets = (bucket.bucket_id for bucket in self._content.store.buckets)
        return frozenset(bucket_id for bucket_id in buckets if self._aggregator.holds(worker, bucket_id))

    def _standing_locked(self, member: Member, step: int) -> Standing:
        record = self._company.record(member.worker.worker_id)
        if record.receipt is not None and self.settings.is_async:
            record.receipt = dataclasses.replace(record.receipt, lag=self._aggregator.lag(member.worker))
        return Standing(
            job_step=step,
            next_sequence=record.next_sequence,
            load_count=self._content.load_count,
            layout_count=self._content.layout_count,
            receipt=record.receipt,
        )

    def _remove_locked(
        self,
        worker: Worker,
        *,
        lost: bool = False,
        lapsed: bool = False,
        superseded: bool = False,
        evicted: bool = False,
        ends_stream: bool = False,
    ) -> None:
        """Takes a worker out of the job, and settles what that leads to. Waits for readers: gives up the lock.

        Args:
            worker: The worker; nothing happens if it is not in the job.
            lost: Whether it has not left by itself: its place may be kept.
            lapsed: Whether that is because its lease has ended.
            superseded: Whether another process has taken its id.
            evicted: Whether an operator has taken it out.
            ends_stream: Whether its stream has to be ended too.
        """
        member = self._company.members.get(worker)
        if member is None:
            return
        self._readers.wait()
        # Again: readers are waited for without the lock, and a worker's end is heard of in several threads.
        if self._company.members.get(worker) is not member:
            return
        member.alive, member.superseded, member.lapsed, member.evicted = False, superseded, lapsed, evicted
        self.bringing.take_back_locked(member)
        self.buffers.leave_locked(member)
        stays = lost and member.holds_place and self.settings.on_loss == "wait"
        if not stays:
            self.pushing.forget_content_locked(worker)
        if lost and not superseded:
            former = Former(member.incarnation, member.groups, member.speaks)
            self._company.record(worker.worker_id).former = former
        self._company.membership.leave(worker)
        leave = self._aggregator.lose if stays else self._aggregator.leave
        try:
            self._settle_loss_locked(leave(worker), worker)
            self.journal.worker_left(worker, place_kept=stays)
        finally:
            del self._company.members[worker]
            self.pushing.forget_worker_locked(worker)
            if ends_stream:
                member.cancel()
            self._changed.notify_all()

    def _give_place_up_locked(self, worker: Worker) -> None:
        """Nobody waits any more for a worker that was lost. Waits for readers: gives up the lock."""
        self._readers.wait()
        if worker not in self._aggregator.absent:
            # It came back, or its place was taken.
            return
        record = self._company.record(worker.worker_id)
        if record.former is not None:
            record.evicted, record.former = record.former.incarnation, None
        self.pushing.forget_content_locked(worker)
        try:
            self._settle_loss_locked(self._aggregator.leave(worker), worker)
            self.journal.worker_left(worker, place_kept=False)
        finally:
            self.pushing.forget_worker_locked(worker)
            self._changed.notify_all()

    def _settle_loss_locked(self, decisions: Sequence[Decision], worker: Worker | None) -> None:
        try:
            self.pushing.settle_locked(decisions, worker)
        except Exception as error:  # noqa: BLE001  # the others hear of it in their steps; who is lost has nobody
            _log.warning("job %s: the step failed when a worker was lost: %s", self.name, error)

    def _contribution_locked(self, worker: Worker) -> tuple[int, int, bool]:
        """The sequence number and the staleness of a worker's open push, and whether its options count."""
        member = self._company.members.get(worker)
        sequence = self._company.record(worker.worker_id).next_sequence
        return (sequence, 0, False) if member is None else (sequence, member.staleness, member.speaks)

    def _check_room_locked(self, nbytes: int, what: str) -> None:
        taken = self._content.full_bytes + self.buffers.nbytes
        taken += sum(member.reserved_bytes + member.held_bytes for member in self._company.members.values())
        if taken + nbytes > self._max_bytes:
            raise LimitExceededError(
                f"{what} would take {nbytes} bytes, and the job takes {taken} of {self._max_bytes} that this server "
                "lets it take (--max-job-bytes)"
            )
