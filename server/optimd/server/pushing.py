"""What workers push to a job: gradients with a step, or to be held for one, and what becomes of them."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import torch

from optimd.server.aggregation import ApplyBucket, Commit, Decision, Worker
from optimd.server.errors import (
    AccumulationLostError,
    InvalidFieldError,
    NonFiniteGradientError,
    OutOfOrderError,
    RequestError,
    ShuttingDownError,
    StepTimeoutError,
    UpdateRefusedError,
)
from optimd.server.member import Member
from optimd.server.parts import JobParts
from optimd.server.receipts import Outcome, Receipt
from optimd.server.sight import Changes
from optimd.server.stepping import Round, Stepper
from optimd.server.store import StagedState, Store
from optimd.server.watching import CommittedStep, Contribution
from optimd.wire.layout import Bucket

_log = logging.getLogger(__name__)

ANSWERABLE: Final = (NonFiniteGradientError, StepTimeoutError)
"""Failures of a step that its workers can answer, by stepping again: nothing of it was applied."""


@dataclass(slots=True, eq=False)
class OpenPush:
    """One worker's push, from StepBegin to its receipt. Guarded by the job's lock."""

    member: Member
    sequence: int
    base_step: int
    store: Store
    stepper: Stepper
    round: Round | None
    """None where it came too late, from the start."""
    handed_out: int = 0
    """How many of the round's applied buckets the worker has been sent."""
    was_answered: bool = False
    """Whether that was before it came, on a stream that broke."""
    left_out: frozenset[int] = frozenset()
    """The buckets that the worker leaves out, since it was told that they are there."""
    values_version: int = 0
    """The store's, when the worker had been sent all that its receipt tells of."""


class Pushing:
    """Takes what workers push, has the aggregator decide, and carries it out.

    Thread-safe: all of it happens under the job's lock. Methods that wait say so.

    Args:
        parts: The job's.
    """

    def __init__(self, parts: JobParts) -> None:
        self._job = parts
        self._changed = parts.changed
        # All below: guarded by self._changed.
        self.changes = Changes()
        self._draining = False
        self._torn = False
        # Whether steps have been levelled that the journal has not told of.
        self._levelled = False
        # One for all workers of a synchronous step, which share a round; one for each of an asynchronous job.
        self._steppers: dict[Worker | None, Stepper] = {}

    # --- a push

    def begin(
        self,
        member: Member,
        *,
        sequence: int,
        base_step: int,
        group_count: int,
        load_count: int,
        layout_count: int,
        micro: int,
        grad_scale: float | None = None,
        steppable: bool = True,
        resumed: bool = False,
    ) -> OpenPush:
        """A worker begins a push, or comes back to the one that it was at. Waits until the job is formed.

        The numbers are those of `StepBegin`, and so is `resumed`. Whether the worker's options have to be ones to step
        with is `steppable`.

        Raises:
            OutOfOrderError: the sequence number is not the one due, the base step lies ahead, or the line is down.
            JobMismatchError: the worker has missed a param group, a load or a replacement.
            UpdateRefusedError: torch, or a server, cannot step with the worker's options.
            LimitExceededError: with the worker's options the state would take too much.
            AccumulationLostError: what the worker had accumulated is not held; counting starts anew.
            StepTimeoutError: too few workers joined within `join_timeout_s`.
            ShuttingDownError: the server is stopping.
            SupersededError: another process has taken the worker's id.
            JobDeletedError: the job went away.
        """
        with self._changed:
            stepper = self._stepper_locked(member.worker)
            push = OpenPush(member, sequence, base_step, self._job.content.store, stepper, None)
            if resumed:
                push.left_out = member.promised
            if self.answered_locked(push) is not None:
                # On the stream before this one, while the worker was on its way back.
                push.was_answered = member.occupied = True
                self._job.measures.deduplicated += 1
                return push
            self._job.company.check_sequence(member, "StepBegin", sequence)
            resumes = self._job.aggregator.has_begun(member.worker)
            self._job.measures.resumed += resumes
            if not resumes:
                self._await_turn_locked(member)
            if self._draining and not resumes and not self._job.aggregator.is_open:
                raise ShuttingDownError("the server is shutting down")
            if base_step > self._job.aggregator.step:
                raise OutOfOrderError(
                    f"StepBegin.base_step is {base_step}; the job stands at {self._job.aggregator.step}"
                )
            self._job.content.check_counts(
                member.worker.rank, group_count=group_count, layout_count=layout_count, load_count=load_count
            )
            if micro != member.held.micro or (member.held.spent and not resumes):
                held = 0 if member.held.spent else member.held.micro
                self.forget_held_locked(member)
                raise AccumulationLostError(
                    f"rank {member.worker.rank} has accumulated {micro} times for this step, the server holds {held}: "
                    "compute the gradients again"
                )
            # Also of one that takes up its predecessor's push: it is another process.
            self._check_options_locked(member, steppable=steppable or member.held.nbytes > 0)
            member.grad_scale = grad_scale
            if not resumes:
                member.staleness = 0
            if resumes or self._job.aggregator.begin(member.worker, base_step):
                push.round = stepper.open_round()
            member.occupied = True
            return push

    def set_hyperparameters(self, member: Member, group: int, options: dict[str, Any]) -> None:
        """A worker's options of one group have changed.

        Raises:
            InvalidFieldError: there is no such group.
        """
        with self._changed:
            if group >= len(member.groups):
                raise InvalidFieldError("ParamGroup.index", f"{group} is not one of {len(member.groups)} groups")
            member.groups[group] = options
            member.speaks = member.unchecked = True

    def bring(self, push: OpenPush, staged: StagedState) -> None:
        """A worker has brought all that it changed outside of steps, between `begin` and its first gradient.

        Raises:
            RequestError: the step has failed in another worker's hands.
            OutOfOrderError: the worker's line is down.
            JobDeletedError: the job went away.
        """
        with self._changed:
            self._job.company.check_alive(push.member)
            round_ = self.round_of_locked(push)
            if round_ is not None and not round_.settled:
                round_.pushed.bring(push.member.worker, staged)

    def retract(self, push: OpenPush) -> None:
        """A worker takes back a push of which it has brought no gradient yet."""
        with self._changed:
            self._job.company.check_alive(push.member)
            worker, aggregator = push.member.worker, self._job.aggregator
            # One that was resumed may have brought some on the stream before: it stays as it is.
            if self.takes_locked(push) and not aggregator.has_pushed(worker):
                push.stepper.forget_content(worker)
                self.settle_locked(aggregator.retract(worker), worker)
                self._changed.notify_all()

    def push(self, push: OpenPush, bucket: Bucket, present: list[bool], payload: torch.Tensor) -> None:
        """A worker pushes the gradients of one bucket; applies what that completes. Waits for readers.

        What came too late, or has come before on a stream that broke, is passed over.

        Args:
            push: What `begin` returned.
            bucket: One of the job's, which has not come on this stream in this push.
            present: For each slice whether there is a gradient.
            payload: The gradients, flat, on the CPU. Only read, and not kept.

        Raises:
            RequestError: the step has failed in another worker's hands.
            UpdateRefusedError: torch refuses the update.
            LimitExceededError: the device has no memory left for it.
            OutOfOrderError: the worker's line is down.
            JobDeletedError: the job went away.
        """
        member = push.member
        with self._changed:
            self._job.readers.wait()
            self._job.company.check_alive(member)
            if self.takes_locked(push) and not self._job.aggregator.holds(member.worker, bucket.bucket_id):
                self._contribute_locked(push, bucket, *member.held.take(bucket, present, payload))

    def missing(self, push: OpenPush) -> frozenset[int]:
        """What a worker has left out of its push and has to push after all, since it is not there any more.

        Said once. What others' losses have taken out of a step that goes on is owed, and not among these.
        """
        with self._changed:
            left_out, push.left_out = push.left_out, frozenset()
            if not left_out or not self.takes_locked(push):
                return frozenset()
            worker, aggregator = push.member.worker, self._job.aggregator
            gone = (bucket_id for bucket_id in left_out if not aggregator.holds(worker, bucket_id))
            return frozenset(gone) - aggregator.owed(worker)

    def end(self, push: OpenPush, *, skipped: bool = False) -> None:
        """A worker has pushed all it had; commits or skips the step if it was the last. Waits for readers.

        Args:
            push: What `begin` returned.
            skipped: Whether it brings no gradients, not even those that are held of it, because they are not finite.

        Raises:
            RequestError: the step has failed in another worker's hands.
            NonFiniteGradientError: the step's gradient is not finite, and the job refuses that.
            UpdateRefusedError: torch refuses the update.
            LimitExceededError: the device has no memory left for it.
            OutOfOrderError: the worker's line is down.
            JobDeletedError: the job went away.
        """
        member = push.member
        with self._changed:
            self._job.readers.wait()
            self._job.company.check_alive(member)
            if not self.takes_locked(push) or self._job.aggregator.has_ended(member.worker):
                return
            if not skipped:
                aggregator = self._job.aggregator
                for bucket_id, present, payload in list(member.held.rest(partial(aggregator.holds, member.worker))):
                    self._contribute_locked(push, push.store.buckets[bucket_id], present, payload)
                self.push_held_again_locked(push)
            elif self._job.aggregator.has_pushed(member.worker):
                # Its predecessor's: this one has found the gradients infinite.
                self.settle_locked(self._job.aggregator.withdraw(member.worker), member.worker)
            member.held.spend()
            self.settle_locked(self._job.aggregator.end(member.worker, skipped=skipped), member.worker)

    def refuse(self, member: Member, *, keeps: bool) -> None:
        """A worker's push is over without a receipt.

        Args:
            member: The worker.
            keeps: Whether the same push is to be made again. Else what it has used up of held gradients is lost.
        """
        with self._changed:
            if keeps:
                member.held.keep()
            else:
                member.held.settle()

    def finished(self, member: Member) -> None:
        """A worker's push or accumulation is over, and all of its answers are out. May be called more than once."""
        with self._changed:
            member.occupied = False
            member.reserved_bytes = 0
            self._changed.notify_all()

    # --- for the job, all with self._changed held

    def drain_locked(self) -> None:
        """Begins no more steps."""
        self._draining = True

    def restore_locked(
        self, round_: Round, owner: Worker | None, deferred: Mapping[int, tuple[Sequence[bool], torch.Tensor]]
    ) -> None:
        """A streamed round was open when the job was last written down: it is open again.

        Args:
            round_: What it has come to.
            owner: Of an asynchronous job: whose push it is.
            deferred: As in `Stepper.restore`.
        """
        self._stepper_locked(owner).restore(round_, deferred)
        # What others have left torn meanwhile, in an asynchronous job, waits for the end of this push.
        self._torn = self._job.settings.is_async

    def deferred_locked(self) -> Iterator[tuple[int, int, torch.Tensor]]:
        """As `Stepper.deferred`, of all steps that are open."""
        for stepper in self._steppers.values():
            yield from stepper.deferred()

    def renew_locked(self) -> None:
        """The parameters have been replaced by others."""
        self._steppers.clear()
        self.changes.forget()

    def forget_content_locked(self, worker: Worker) -> None:
        """A worker is lost: what it changed outside of steps goes with its push, unless that is complete."""
        if not self._job.aggregator.has_ended(worker):
            self._stepper_locked(worker).forget_content(worker)

    def forget_worker_locked(self, worker: Worker) -> None:
        """A worker is not in the job any more."""
        if self._job.settings.is_async:
            self._steppers.pop(worker, None)
        self._settle_torn_locked()

    def settle_locked(self, decisions: Sequence[Decision], worker: Worker | None) -> None:
        """Carries decisions out and makes what became of a step the job's.

        Args:
            decisions: The decisions.
            worker: What they followed from; None where that is time.
        """
        if worker is None and self._job.settings.is_async:
            # Nothing but that workers are released, which they find out for themselves.
            self._changed.notify_all()
            return
        step = self._job.aggregator.step - sum(isinstance(decision, Commit) for decision in decisions)
        self._note_staleness_locked(decisions, step)
        try:
            round_ = self._stepper_locked(worker).carry_out(decisions)
        except Exception:
            self._forget_locked(worker, step)
            self._settle_torn_locked()
            raise
        finally:
            self._changed.notify_all()
        if round_ is None:
            return
        if round_.taken_back:
            self._take_back_locked(round_)
        if round_.spoken and round_.is_answered:
            self._job.content.groups = round_.groups
        if round_.commit is not None:
            self._answer_commit_locked(round_)
        elif round_.skipped is not None:
            round_.version = self._job.content.store.version
            # The aggregator may have counted a step that its gradient did not allow.
            self._job.journal.round_skipped(
                round_.number,
                round_.skipped,
                disagreed=round_.disagreed,
                pushed_differently=round_.pushed_differently,
            )
            self._job.aggregator.forget_step(round_.skipped.step)
            for pushed in round_.skipped.pushes:
                self._answer_locked(pushed, round_, Outcome.SKIPPED_NONFINITE, round_.skipped.step)
        self._settle_torn_locked()

    # --- inside, all with self._changed held

    def _await_turn_locked(self, member: Member) -> None:
        """Waits until pushes may begin, and neither newcomers nor readers would wait for ever if they did."""
        company, job = self._job.company, self._job

        def may_begin() -> bool:
            return not company.newcomers or job.aggregator.is_open

        if job.settings.is_async and not job.readers.may_push:
            # Those that wait to read have one turn; then, as before any change, who takes nothing is let go.
            turns = job.readers.entered
            company.wait(
                member,
                lambda: not job.readers.queued or job.readers.entered > turns,
                job.settings.join_timeout_s,
                lambda: "somebody waits to read the job",
            )
            job.readers.wait()
        company.await_all(member)
        while not may_begin():
            company.wait(member, may_begin, job.settings.join_timeout_s, lambda: "a worker is joining")
            company.await_all(member)

    def takes_locked(self, push: OpenPush) -> bool:
        """Whether what a worker pushes may still be in a step."""
        round_ = self.round_of_locked(push)
        return round_ is not None and not round_.is_over and self._job.aggregator.has_begun(push.member.worker)

    def round_of_locked(self, push: OpenPush) -> Round | None:
        """A push's round. Tells its worker where the step has failed for good in another one's hands."""
        round_ = push.round
        if round_ is not None and not isinstance(round_.failure, ANSWERABLE):
            self.check_sound_locked(round_)
        return round_

    def check_sound_locked(self, round_: Round) -> None:
        """Tells every worker of a step that failed in another one's hands."""
        if isinstance(round_.failure, RequestError):
            raise type(round_.failure)(round_.failure.message)
        if round_.failure is not None:
            raise RequestError("the step failed on the server, whose log has the reason")

    def answered_locked(self, push: OpenPush) -> Receipt | None:
        """The receipt of a push that was answered with its step."""
        receipt = self._job.company.record(push.member.worker.worker_id).receipt
        return receipt if receipt is not None and receipt.sequence == push.sequence else None

    def forget_held_locked(self, member: Member) -> None:
        """What is held for a worker's next push is of no use: counting starts anew."""
        if member.held.micro or member.held.nbytes:
            self._job.journal.accumulation_ended(member.worker, 0, discards=True)
        member.held.forget()

    def push_held_again_locked(self, push: OpenPush) -> None:
        """Pushes again what is owed of buckets whose gradients the worker has handed over."""
        member = push.member
        for bucket_id in sorted(self._job.aggregator.owed(member.worker)):
            again = member.held.again(bucket_id)
            if again is not None:
                self._contribute_locked(push, push.store.buckets[bucket_id], *again)

    def _contribute_locked(self, push: OpenPush, bucket: Bucket, present: list[bool], payload: torch.Tensor) -> None:
        member, step = push.member, self._job.aggregator.step
        decisions = self._job.aggregator.push(member.worker, bucket.bucket_id)
        self._note_staleness_locked(decisions, step)
        try:
            push.stepper.contribute(member.worker, bucket, present, payload, decisions, grad_scale=member.grad_scale)
        except Exception:
            self._forget_locked(member.worker, step)
            self._settle_torn_locked()
            self._changed.notify_all()
            raise
        if decisions:
            self._changed.notify_all()

    def _note_staleness_locked(self, decisions: Sequence[Decision], step: int) -> None:
        """Notes how stale the gradients of asynchronous pushes are where they are applied, with `step` committed."""
        if not self._job.settings.is_async:
            return
        for decision in decisions:
            if isinstance(decision, ApplyBucket):
                for worker in decision.contributors:
                    member = self._job.company.members.get(worker)
                    if member is not None:
                        stale = member.sight.steps_since(decision.bucket_id, step - member.own_steps)
                        member.staleness = max(member.staleness, stale)

    def _take_back_locked(self, round_: Round) -> None:
        """All workers of a streamed step are lost: the job goes back to its last commit."""
        job, journal = self._job, self._job.journal
        store = journal.load_last_commit(round_.number)
        if store is None:
            _log.error("job %s: step %d stays as far as it was applied", job.name, job.aggregator.step + 1)
            journal.round_ended(round_.number)
            self._mark_torn_locked()
            return
        journal.round_taken_back(round_.number)
        job.content.store = store
        self.renew_locked()
        _log.warning(
            "job %s: all workers of step %d were lost in the middle of it: the job is back at step %d, bit for bit",
            job.name,
            job.aggregator.step + 1,
            job.aggregator.step,
        )

    def _forget_locked(self, worker: Worker | None, step: int) -> None:
        """The step could not be applied: of an asynchronous job, that of one worker."""
        if worker is not None:
            self._job.aggregator.forget_push(worker)
        self._job.aggregator.forget_step(step)

    def _answer_commit_locked(self, round_: Round) -> None:
        commit = round_.commit
        if commit is None:
            raise RuntimeError("the round has not been committed")
        self._job.measures.steps += 1
        self._job.journal.round_committed(
            round_.number,
            commit,
            disagreed=round_.disagreed,
            grad_norm=round_.grad_norm,
            pushed_differently=round_.pushed_differently,
        )
        round_.clock = self.changes.clock
        round_.version = self._job.content.store.version
        contributions = []
        outcome = Outcome.of_step(len(commit.contributors))
        ranks = tuple(worker.rank for worker in commit.contributors)
        partial = tuple(worker.rank for worker in commit.partial_contributors)
        for worker in commit.contributors:
            record = self._job.company.record(worker.worker_id)
            contributions.append(Contribution(worker.rank, worker.worker_id, record.next_sequence))
            record.pushes += 1
            member = self._job.company.members.get(worker)
            if member is not None:
                member.own_steps += 1
            self._answer_locked(worker, round_, outcome, commit.step, ranks, partial)
        for worker in commit.skipped:
            self._answer_locked(worker, round_, Outcome.SKIPPED_NONFINITE, commit.step, ranks, partial)
        self._job.history.add(
            CommittedStep(
                step=commit.step,
                contributors=tuple(contributions),
                partial_contributors=partial,
                hyperparameters_disagreed=round_.disagreed,
                grad_norm=round_.grad_norm,
                pushed_differently=round_.pushed_differently,
            )
        )
        self._job.buffers.step_committed_locked()

    def _answer_locked(
        self,
        worker: Worker,
        round_: Round,
        outcome: Outcome,
        step: int,
        contributors: tuple[int, ...] = (),
        partial_contributors: tuple[int, ...] = (),
    ) -> None:
        member = self._job.company.members.get(worker)
        self._job.company.answer(
            worker,
            Receipt(
                sequence=self._job.company.record(worker.worker_id).next_sequence,
                step=step,
                outcome=outcome,
                contributors=contributors,
                partial_contributors=partial_contributors,
                hyperparameters_disagreed=round_.disagreed,
                grad_norm=round_.grad_norm,
                pushed_differently=round_.pushed_differently,
                staleness=member.staleness if member is not None else 0,
            ),
        )

    def _check_options_locked(self, member: Member, *, steppable: bool) -> None:
        """Checks a worker's options, if they have changed. Those that have to be no ones to step with do not count."""
        if member.unchecked:
            content = self._job.content
            groups = content.with_options(member.groups)
            content.check_place_of_steps(groups)
            needed = content.bytes_with(groups) - content.full_bytes
            if needed > 0:
                self._job.check_room(needed, "the state with the worker's options")
            member.steppable = True
            try:
                content.check_steppable(groups)
            except UpdateRefusedError:
                member.steppable = False
                if steppable:
                    raise
                return
            member.unchecked = False

    def _stepper_locked(self, worker: Worker | None) -> Stepper:
        key = worker if self._job.settings.is_async else None
        stepper = self._steppers.get(key)
        if stepper is None:
            stepper = self._steppers[key] = Stepper(
                self._job.name,
                self._job.content.store,
                self._job.company.members,
                groups=lambda: self._job.content.groups,
                changes=self.changes,
                journal=self._job.journal,
                settle_torn=self._mark_torn_locked,
                mean=self._job.settings.reduction == "mean",
                atomic=self._job.settings.apply == "atomic",
                owned=self._job.settings.is_async,
                separate=self._job.settings.holds_apart,
                max_grad_norm=self._job.settings.max_grad_norm,
                nonfinite=self._job.settings.nonfinite,
            )
        return stepper

    def _mark_torn_locked(self) -> list[int]:
        """Brings parameters of which some slices have had an update and others have not to one step.

        Not while another push is under way, of which that is true as well: then later.
        """
        if self._job.settings.is_async and self._job.aggregator.is_open:
            self._torn = True
            return []
        self._torn = False
        torn = self._job.content.store.settle_partial_steps()
        self._levelled = self._levelled or bool(torn)
        return torn

    def _settle_torn_locked(self) -> None:
        if self._torn and not self._job.aggregator.is_open:
            self._mark_torn_locked()
        if self._levelled:
            # Behind what became of the round: until that is known, its slices are to be stepped still.
            self._levelled = False
            self._job.journal.steps_levelled()
