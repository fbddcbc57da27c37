"""What goes back to workers that push: new parameters, and receipts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

from optimd.server.company import JobPhase
from optimd.server.errors import JobMismatchError
from optimd.server.member import Member
from optimd.server.parts import JobParts
from optimd.server.pushing import OpenPush, Pushing
from optimd.server.receipts import Outcome, Receipt
from optimd.server.stepping import Round
from optimd.server.transfers import Transfers
from optimd.wire.encodings import EXACT, Encoding, Part, payload_of
from optimd.wire.layout import Bucket

_MOST_PASSES: Final = 3
"""How often what changes while a worker is being sent values is sent again, before it is left at an earlier step."""


@dataclass(slots=True)
class CatchUp:
    """What a worker is being sent that is new to it, while the job goes on. Guarded by the job's lock."""

    step: int = 0
    """The job step that the worker stands at when it has been sent everything."""
    sent: set[int] = field(default_factory=set)
    """Buckets that need not be sent although they have changed."""
    passes: int = 0
    queue: list[int] = field(default_factory=list)


class Pulling:
    """Tells what a worker is to be sent, and when.

    Thread-safe: all of it happens under the job's lock. Methods that wait say so.

    Args:
        parts: The job's.
        pushing: Its pushes.
    """

    def __init__(self, parts: JobParts, pushing: Pushing) -> None:
        self._job = parts
        self._changed = parts.changed
        self._pushing = pushing
        # Where nothing can be applied while a worker is sent the step that it has a part in, that needs no lock.
        alone = parts.settings.world_size == 1
        self.stands_still = not parts.settings.is_async and (
            alone or (parts.settings.apply == "atomic" and not parts.settings.backup_workers)
        )
        """Whether values stay as a step has left them until all workers that are waited for push again."""

    def ready(self, push: OpenPush) -> list[tuple[int, list[bool]]]:
        """The applied buckets that a worker can be sent while it still pushes. Does not wait for others.

        Where the worker will have to wait for slower ones, there are none yet.
        """
        if push.round is None or self._job.settings.apply != "streaming":
            return []
        if self.stands_still:
            return _hand_out(push, push.round)
        with self._changed:
            worker = push.member.worker
            if not self._job.aggregator.will_be_released(worker) or not self._pushing.takes_locked(push):
                return []
            applied = _hand_out(push, push.round)
            if not self._job.settings.is_async:
                return applied
            # All of them: others may have changed the slices that this push did not.
            return [(bucket_id, [True] * len(present)) for bucket_id, present in applied]

    def await_progress(self, push: OpenPush) -> tuple[list[tuple[int, list[bool]]], frozenset[int]]:
        """Waits until there is something to send to a worker that has pushed all it had, or its push is over.

        Returns:
            The applied buckets that it can be sent, and the ids of those that it has to push again. Where there are
            neither its push is over: `catch_up_of` and `settle` go on from there.

        Raises:
            OutOfOrderError: the worker's line is down.
            RequestError: the step has failed in another worker's hands.
            UpdateRefusedError: torch refused the step.
            NonFiniteGradientError: the step's gradient is not finite, and the job refuses that.
            StepTimeoutError: workers that the step may not do without did not come.
            JobDeletedError: the job went away.
        """
        round_, worker, aggregator = push.round, push.member.worker, self._job.aggregator
        if round_ is None:
            return [], frozenset()

        def has_news() -> bool:
            return (
                len(round_.applied) > push.handed_out
                or not self._pushing.takes_locked(push)
                or bool(aggregator.owed(worker))
            )

        with self._changed:
            while True:
                self._wait_locked(push.member, has_news)
                self._pushing.check_sound_locked(round_)
                if self._pushing.takes_locked(push) and aggregator.owed(worker):
                    self._pushing.push_held_again_locked(push)
                    owed = aggregator.owed(worker)
                    if owed:
                        return [], owed
                    self._pushing.settle_locked(aggregator.end(worker), worker)
                elif self._needs_catch_up_locked(push):
                    return [], frozenset()
                else:
                    applied = _hand_out(push, round_)
                    if applied or round_.is_answered:
                        return applied, frozenset()

    def catch_up_of(self, push: OpenPush) -> CatchUp | None:
        """What a worker whose push is over is to be sent besides the buckets of its step, if anything may be.

        Waits until the worker may be given parameters: for slower ones, or for a step that is being applied.

        Raises:
            JobMismatchError: the parameters have been replaced by others meanwhile.
            OutOfOrderError: the worker's line is down.
            JobDeletedError: the job went away.
        """
        worker, aggregator = push.member.worker, self._job.aggregator
        with self._changed:
            if not self._needs_catch_up_locked(push):
                return None
            if self._job.settings.is_async:
                self._wait_locked(push.member, lambda: not aggregator.is_waiting(worker))
            else:
                with self._job.company.waiting_at_boundary():
                    self._wait_locked(push.member, lambda: not aggregator.has_applied)
                aggregator.catch_up(worker)
            if push.store is not self._job.content.store:
                raise JobMismatchError(
                    f"rank {worker.rank} was in the middle of a step when another worker replaced the parameters: in "
                    "an asynchronous job, replace them while no other worker is in it"
                )
            sent = {bucket_id for bucket_id, _ in push.round.applied[: push.handed_out]} if push.round else set()
            return CatchUp(sent=sent if self._job.settings.is_async else set())

    def next_unseen(self, member: Member, catch_up: CatchUp) -> int | None:
        """The next bucket that is new to a worker; None when it has been sent all that is.

        What changes meanwhile is sent again, but not for ever: then the worker is left at the step at which the last
        pass began. In an asynchronous job there is one pass.

        Raises:
            RequestError: what `Company.check_alive` raises.
        """
        with self._changed:
            self._job.company.check_alive(member)
            while not catch_up.queue:
                unseen = [number for number in self.unseen_locked(member) if number not in catch_up.sent]
                if self._job.settings.is_async and catch_up.passes:
                    unseen = []
                if not unseen:
                    catch_up.step = self._job.aggregator.step
                if not unseen or catch_up.passes >= _MOST_PASSES:
                    return None
                catch_up.passes += 1
                catch_up.step = self._job.aggregator.step
                catch_up.queue = unseen[::-1]
            return catch_up.queue.pop()

    def begin_read(
        self,
        member: Member,
        bucket: Bucket,
        present: list[bool],
        transfers: Transfers,
        *,
        unmoved: bool,
        encoding: Encoding = EXACT,
    ) -> Callable[[], Sequence[Part]]:
        """The values of a bucket's present slices, for a worker that is sent them now. Views or copies of them.

        Args:
            member: The worker.
            bucket: The bucket.
            present: Which of its slices are wanted.
            transfers: What brings them from the device, of the calling thread.
            unmoved: Whether they belong to a step that the worker has a part in, and that cannot change under it.
            encoding: What they go out in: one that takes the bucket's dtype.

        Returns:
            Gives them; waits where they are on their way from a GPU. To be called in the order of these calls.

        Raises:
            RequestError: what `Company.check_alive` raises.
        """
        if unmoved and self.stands_still:
            return self._job.content.store.begin_read(bucket, present, encoding, transfers)
        with self._changed:
            self._job.company.check_alive(member)
            self.see_locked(member, bucket.bucket_id)
            store = self._job.content.store
            finish = store.begin_read(bucket, present, encoding, transfers)
            if store.device.type != "cpu":
                # What is copied from there is copied as it is now.
                return finish
            # Copies: what is sent is read without the lock.
            views = finish()
            copied = [memoryview(payload_of(views))] if views else []
            return lambda: copied

    def may_leave_in_place(self, push: OpenPush, bucket: Bucket, encoding: Encoding) -> bool:
        """Whether a worker on this host may read a bucket of its step where it is, whenever it comes to that.

        Should others go on without it meanwhile, it finds that out by `OpenPush.values_version`.
        """
        return self.stands_still and encoding.is_exact and push.store.is_shared(bucket)

    def _wait_locked(self, member: Member, condition: Callable[[], bool]) -> None:
        """Waits as `Company.wait`, for as long as it takes, and counts that as the worker's waiting."""
        with member.waits.one():
            self._job.company.wait(member, condition, None)

    def confirm(self, member: Member) -> None:
        """A worker has gone on: it has all that it has been sent."""
        with self._changed:
            member.sight.confirm()

    def unseen_locked(self, member: Member) -> list[int]:
        """The buckets of the groups that a worker knows that are new to it. With the job's lock held."""
        known = (bucket.bucket_id for bucket in self._job.content.store.buckets if bucket.group < len(member.groups))
        return member.sight.unseen(self._pushing.changes, known)

    def see_locked(self, member: Member, bucket_id: int) -> None:
        """A worker is about to be sent a bucket as it is now. With the job's lock held."""
        member.sight.see(bucket_id, self._pushing.changes.clock, self._job.aggregator.step - member.own_steps)

    def settle(self, push: OpenPush, catch_up: CatchUp | None) -> Receipt | None:
        """What a worker is told of its push, once it has been sent all that goes before.

        Args:
            push: The push.
            catch_up: What `catch_up_of` gave.

        Returns:
            Its receipt; None where others have just gone on without it, and `catch_up_of` has something now.

        Raises:
            RequestError: what `Company.check_alive` raises.
        """
        member, aggregator = push.member, self._job.aggregator
        with self._changed:
            if self.stands_still and self._job.company.phase is not JobPhase.DELETED:
                self._job.company.check_alive(member)
                if catch_up is None and self._has_moved_locked(push):
                    return None
                push.values_version = push.store.version
            answered = self._pushing.answered_locked(push)
            if answered is None:
                answered = Receipt(
                    sequence=push.sequence,
                    step=aggregator.step if catch_up is None else catch_up.step,
                    outcome=Outcome.DROPPED_LATE,
                    staleness=max(0, aggregator.step - push.base_step),
                )
                self._job.journal.push_answered(member.worker, answered)
                self._job.company.record(member.worker.worker_id).dropped += 1
                self._job.company.answer(member.worker, answered)
            elif catch_up is None and push.round is not None and push.round.commit is not None:
                # It has been sent all that its step has changed, and stood at the step before.
                member.sight.see_all(push.round.clock, 0)
            elif self._job.settings.is_async:
                answered = dataclasses.replace(answered, lag=aggregator.lag(member.worker))
                self._job.company.record(member.worker.worker_id).receipt = answered
            return answered

    def _needs_catch_up_locked(self, push: OpenPush) -> bool:
        """Whether a push is over, and its worker has not been sent everything with the buckets of its step."""
        if self._pushing.takes_locked(push):
            return False
        if self._job.settings.is_async or self._has_moved_locked(push):
            return True
        answered = self._pushing.answered_locked(push)
        return answered is None or push.was_answered or push.member.worker.rank in answered.partial_contributors

    def _has_moved_locked(self, push: OpenPush) -> bool:
        """Whether the values of a push's step have changed since: others had waited for this worker long enough.

        Where they stand still otherwise they are read without the lock: what it was sent may be of two steps.
        """
        round_ = push.round
        return self.stands_still and round_ is not None and round_.is_answered and push.store.version != round_.version


def _hand_out(push: OpenPush, round_: Round) -> list[tuple[int, list[bool]]]:
    applied = round_.applied[push.handed_out :]
    push.handed_out += len(applied)
    return applied
