"""A job: one optimizer on the server.

A job owns its parameters and state, its param_groups and its workers, and serialises every change of them under one
lock. The calling threads are those of the workers' streams: the one that completes a bucket applies it.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from optimd.server.aggregation import Decision, SyncAggregator
from optimd.server.bringing import Bringing
from optimd.server.buffers import JobBuffers
from optimd.server.company import Company, JobPhase
from optimd.server.content import JobContent
from optimd.server.errors import (
    AccumulationLostError,
    InvalidFieldError,
    LimitExceededError,
    OutOfOrderError,
    RequestError,
    ShuttingDownError,
    UpdateRefusedError,
)
from optimd.server.membership import Member, WorkerRecord
from optimd.server.readers import Readers, ReadHold
from optimd.server.settings import JobSettings
from optimd.server.stepping import Round, Stepper
from optimd.server.store import StagedState, Store
from optimd.server.watching import CommittedStep, Contribution, StepHistory
from optimd.wire.layout import Bucket, Parameter

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """Where a job and one of its workers stand between two steps."""

    job_step: int
    """How many steps are committed."""
    next_sequence: int
    """The number of the worker's next push."""
    load_count: int
    """How often a state_dict has been loaded."""
    layout_count: int
    """How often the parameters have been replaced."""


class Job:
    """One optimizer: parameters, param_groups, state and workers.

    Thread-safe. Methods that wait say so; all waits have deadlines.

    Args:
        name: The job's name.
        settings: What its creator asked for.
        device: Where its tensors live.
        max_bytes: The most that it may take: values, state, buffers, held gradients, and what is on its way in.
    """

    def __init__(self, name: str, settings: JobSettings, device: torch.device, *, max_bytes: int = sys.maxsize) -> None:
        self.name = name
        self._max_bytes = max_bytes
        self.settings = settings
        self.history = StepHistory(name)
        self._changed = threading.Condition()
        # All below: changed with self._changed held.
        self._content = JobContent(settings, device)
        self._aggregator = SyncAggregator(world_size=settings.world_size, streaming=settings.apply == "streaming")
        self._company = Company(name, settings, self._aggregator, self._changed)
        self._stepper = self._new_stepper()
        self._readers = Readers(self._changed)
        self.bringing = Bringing(
            self._changed,
            self._company,
            self._content,
            self._aggregator,
            self._readers,
            check_room=self._check_room_locked,
            on_replaced=self._renew_stepper_locked,
        )
        """What workers bring to it besides pushes."""
        self.buffers = JobBuffers(
            self._changed,
            lambda member, condition, waiting_for: self._company.wait(
                member, condition, settings.timeout_s, waiting_for
            ),
            time.monotonic,
        )
        self._draining = False

    # --- what it is. May be read without the lock

    @property
    def phase(self) -> JobPhase:
        """Where it is in its life."""
        return self._company.phase

    @property
    def store(self) -> Store:
        """Its tensors: others once its parameters have been replaced."""
        return self._content.store

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

    def members(self) -> list[Member]:
        """The workers that are in the job, in order of rank."""
        with self._changed:
            return [self._company.members[worker] for worker in sorted(self._company.members)]

    def record(self, worker_id: str) -> WorkerRecord:
        """What the job remembers of a worker_id."""
        with self._changed:
            return self._company.record(worker_id)

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

    def admit(self, member: Member, *, creates: bool, check: Callable[[], None]) -> None:
        """Lets a worker in, between two steps. Waits for the open step.

        From here on no step is committed without the worker, so that the values it reads next stand still.

        Args:
            member: The worker.
            creates: Whether it creates the job.
            check: Called when nothing can change any more; raises what speaks against the worker.

        Raises:
            WorkerInUseError: a live worker has its id or rank.
            JobDeletedError: the job went away while it waited.
            OutOfOrderError: the worker's line is down.
            StepTimeoutError: the open step was not committed within `timeout_s`.
        """
        with self._changed:
            self._company.check_free(member.worker)
            with self.buffers.expecting_newcomer_locked():
                self._company.wait(
                    member,
                    lambda: not self._aggregator.is_open and self._company.bringing is None,
                    self.settings.timeout_s,
                )
            self._company.check_free(member.worker)
            check()
            self._aggregator.join(member.worker)
            self._company.members[member.worker] = member
            member.groups = [dict(group) for group in self.groups]
            member.speaks = creates
            self._changed.notify_all()

    def welcome(self, member: Member) -> Standing:
        """The worker has all parameters.

        Returns:
            Where the job and the worker stand.
        """
        with self._changed:
            member.ready = True
            self._changed.notify_all()
            return Standing(
                job_step=self.step,
                next_sequence=self._company.record(member.worker.worker_id).next_sequence,
                load_count=self._content.load_count,
                layout_count=self._content.layout_count,
            )

    def disconnect(self, member: Member) -> None:
        """A worker's line is down: whatever waits on its behalf stops waiting. Its stream calls `leave` next."""
        with self._changed:
            member.alive = False
            self._changed.notify_all()

    def leave(self, member: Member) -> None:
        """A worker's stream has ended, in good order or not. Waits for readers; may be called more than once."""
        with self._changed:
            member.alive = False
            self.bringing.take_back_locked(member)
            if self._company.members.get(member.worker) is member:
                self._readers.wait()
            # Again: readers are waited for without the lock, and a worker's end is heard of in two threads.
            if self._company.members.get(member.worker) is member:
                self.buffers.leave_locked(member)
                step = self.step
                if not self._aggregator.has_ended(member.worker):
                    self._stepper.forget_content(member.worker)
                decisions = self._aggregator.leave(member.worker)
                try:
                    self._settle_locked(decisions, step)
                except Exception as error:  # noqa: BLE001  # the others hear of it in their steps; who leaves has nobody
                    _log.warning("job %s: the step failed when rank %d left: %s", self.name, member.worker.rank, error)
                finally:
                    del self._company.members[member.worker]
                    self._changed.notify_all()

    def drain(self, timeout_s: float) -> bool:
        """Begins no more steps and waits for the open one. Returns whether it was committed within `timeout_s`."""
        with self._changed:
            self._draining = True
            self._changed.notify_all()
            return self._changed.wait_for(lambda: not self._aggregator.is_open, timeout_s)

    def delete(self) -> None:
        """Ends the job: whoever waits for it gets `JobDeletedError`."""
        with self._changed:
            self._company.phase = JobPhase.DELETED
            self._changed.notify_all()
        self.history.end()

    @property
    def full_bytes(self) -> int:
        """What values and state take once every parameter has had an update, and what the buffers take."""
        with self._changed:
            return self._content.full_bytes + self.buffers.nbytes_locked

    @property
    def buffers_bytes(self) -> int:
        """What the buffers take."""
        with self._changed:
            return self.buffers.nbytes_locked

    @property
    def bytes_left(self) -> int:
        """How much more it may take."""
        return self._max_bytes - self.full_bytes

    def group_parameters(self, first_group: int) -> list[tuple[int, Parameter]]:
        """The parameters of all groups from index `first_group` on, with their indices."""
        with self._changed:
            return self._content.parameters_of(first_group)

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
    ) -> Round:
        """A worker begins a push. Waits until the job is formed.

        The numbers are those of `StepBegin`. Whether the worker's options have to be ones to step with is `steppable`.

        Raises:
            OutOfOrderError: the sequence number or the base step is not the one due, or the worker's line is down.
            JobMismatchError: the worker has missed a param group, a load or a replacement.
            UpdateRefusedError: torch, or a server, cannot step with the worker's options.
            LimitExceededError: with the worker's options the state would take too much.
            AccumulationLostError: what the worker had accumulated is not held; counting starts anew.
            StepTimeoutError: too few workers joined within `join_timeout_s`.
            ShuttingDownError: the server is stopping.
            JobDeletedError: the job went away.
        """
        with self._changed:
            self._company.await_all(member)
            if self._draining:
                raise ShuttingDownError("the server is shutting down")
            self._company.check_sequence(member, "StepBegin", sequence)
            if base_step != self.step:
                raise OutOfOrderError(f"StepBegin.base_step is {base_step}; the job stands at {self.step}")
            self._content.check_counts(
                member.worker.rank, group_count=group_count, layout_count=layout_count, load_count=load_count
            )
            if micro != member.held.micro or member.held.spent:
                held = 0 if member.held.spent else member.held.micro
                member.held.forget()
                raise AccumulationLostError(
                    f"rank {member.worker.rank} has accumulated {micro} times for this step, the server holds {held}: "
                    "compute the gradients again"
                )
            self._check_options_locked(member, steppable=steppable or member.held.nbytes > 0)
            self._aggregator.begin(member.worker)
            member.occupied = True
            member.grad_scale = grad_scale
            return self._stepper.open_round(self.groups)

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

    def retract(self, member: Member) -> None:
        """A worker takes back a push of which it has brought no gradient yet."""
        with self._changed:
            step = self.step
            self._stepper.forget_content(member.worker)
            self._settle_locked(self._aggregator.retract(member.worker), step)
            self._changed.notify_all()

    def finished(self, member: Member) -> None:
        """A worker's push or accumulation is over, and all of its answers are out. May be called more than once."""
        with self._changed:
            member.occupied = False
            member.reserved_bytes = 0
            self._changed.notify_all()

    def bring(self, member: Member, round_: Round, staged: StagedState) -> None:
        """A worker has brought all that it changed outside of steps, between `begin` and its first gradient.

        Raises:
            RequestError: the step has failed in another worker's hands.
            OutOfOrderError: the worker's line is down.
            JobDeletedError: the job went away.
        """
        with self._changed:
            self._company.check_alive(member)
            self._check_sound_locked(round_)
            round_.pushed.bring(member.worker, staged)

    def push(self, member: Member, round_: Round, bucket: Bucket, present: list[bool], payload: torch.Tensor) -> None:
        """A worker pushes the gradients of one bucket; applies what that completes. Waits for readers.

        Args:
            member: The worker, between `begin` and `end`.
            round_: What `begin` returned.
            bucket: One of the job's, which the worker has not pushed in this step.
            present: For each slice whether there is a gradient.
            payload: The gradients, flat, on the CPU. Only read, and not kept.

        Raises:
            RequestError: the step has failed in another worker's hands.
            UpdateRefusedError: torch refuses the update.
            LimitExceededError: the device has no memory left for it.
            OutOfOrderError: the worker's line is down.
            JobDeletedError: the job went away.
        """
        with self._changed:
            self._readers.wait()
            self._company.check_alive(member)
            self._check_sound_locked(round_)
            self._contribute_locked(member, bucket, *member.held.take(bucket, present, payload))

    def end(self, member: Member, round_: Round, *, skipped: bool = False) -> None:
        """A worker has pushed all it had; commits or skips the step if it was the last. Waits for readers.

        Args:
            member: The worker.
            round_: What `begin` returned.
            skipped: Whether it brings no gradients, not even those that are held of it, because they are not finite.

        Raises:
            RequestError: the step has failed in another worker's hands.
            NonFiniteGradientError: the step's gradient is not finite, and the job refuses that.
            UpdateRefusedError: torch refuses the update.
            LimitExceededError: the device has no memory left for it.
            OutOfOrderError: the worker's line is down.
            JobDeletedError: the job went away.
        """
        with self._changed:
            self._readers.wait()
            self._company.check_alive(member)
            self._check_sound_locked(round_)
            rest = [] if skipped else list(member.held.rest())
            member.held.spend()
            for bucket_id, present, payload in rest:
                self._contribute_locked(member, self.store.buckets[bucket_id], present, payload)
            step = self.step
            self._settle_locked(self._aggregator.end(member.worker, skipped=skipped), step)

    def await_progress(self, member: Member, round_: Round, seen: int) -> int:
        """Waits until more than `seen` buckets are applied or the step is committed or skipped.

        Returns:
            How many buckets are applied.

        Raises:
            StepTimeoutError: nothing happened for `timeout_s`.
            OutOfOrderError: the worker's line is down.
            RequestError: the step has failed in another worker's hands.
            UpdateRefusedError: torch refused the step.
            NonFiniteGradientError: the step's gradient is not finite, and the job refuses that.
            JobDeletedError: the job went away.
        """
        with self._changed:
            self._company.wait(member, lambda: len(round_.applied) > seen or round_.is_over, self.settings.timeout_s)
            self._check_sound_locked(round_)
            return len(round_.applied)

    # --- gradients without a step

    def begin_accumulation(
        self, member: Member, *, sequence: int, micro: int, group_count: int, layout_count: int
    ) -> bool:
        """A worker brings gradients to be held for its next push. Does not wait.

        Returns:
            Whether they are new: False where they have been added already.

        Raises:
            OutOfOrderError: the sequence or the micro number is not one that is due, or the worker's line is down.
            JobMismatchError: the worker has missed a param group or a replacement.
            LimitExceededError: the job would take too much.
            JobDeletedError: the job went away.
        """
        with self._changed:
            self._company.check_alive(member)
            self._company.check_sequence(member, "Accumulate", sequence)
            self._content.check_counts(member.worker.rank, group_count=group_count, layout_count=layout_count)
            if micro > member.held.micro:
                raise OutOfOrderError(f"Accumulate.micro is {micro}; {member.held.micro} is due")
            new = micro == member.held.micro
            if new and not member.held.nbytes:
                # All of it at once: a sum that is held in part would be of no use.
                self._check_room_locked(
                    sum(parameter.nbytes for parameter in self.store.parameters), "the gradients that are to be held"
                )
            member.occupied = True
            return new

    def accumulate(self, member: Member, bucket: Bucket, present: list[bool], payload: torch.Tensor) -> None:
        """Adds the gradients of one bucket to what is held of the worker's. Only read, and not kept."""
        with self._changed:
            member.held.add(bucket, present, payload, self.store.device)

    def end_accumulation(self, member: Member) -> None:
        """A worker has brought all gradients of one accumulation."""
        with self._changed:
            member.held.micro += 1

    def discard_accumulated(self, member: Member, *, sequence: int, micro: int) -> None:
        """Forgets what is held of a worker's gradients. Does not wait.

        Raises:
            OutOfOrderError: the sequence or the micro number is not one that is due.
        """
        with self._changed:
            self._company.check_sequence(member, "DiscardAccumulated", sequence)
            if micro > member.held.micro:
                raise OutOfOrderError(f"DiscardAccumulated.micro is {micro}; {member.held.micro} is due")
            if micro == member.held.micro:
                member.held.discard()
                member.held.micro += 1

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
            self._company.wait(
                None,
                lambda: (
                    hold.revoked
                    or (not self._aggregator.has_applied and self._company.bringing is None and self._readers.may_enter)
                ),
                self.settings.timeout_s,
            )
            hold.touch()
            self._readers.enter(hold)
        try:
            yield hold
        finally:
            self.release(hold)

    def release(self, hold: ReadHold) -> None:
        """A reader is done, or its line is down. May be called more than once."""
        with self._changed:
            self._readers.leave(hold)

    # --- all below with self._changed held

    def _contribute_locked(self, member: Member, bucket: Bucket, present: list[bool], payload: torch.Tensor) -> None:
        step = self.step
        decisions = self._aggregator.push(member.worker, bucket.bucket_id)
        try:
            self._stepper.contribute(member.worker, bucket, present, payload, decisions, grad_scale=member.grad_scale)
        except Exception:
            self._aggregator.forget_step(step)
            self._changed.notify_all()
            raise
        if decisions:
            self._changed.notify_all()

    def _renew_stepper_locked(self) -> None:
        self._stepper = self._new_stepper()

    def _new_stepper(self) -> Stepper:
        return Stepper(
            self.name,
            self.store,
            self._company.members,
            mean=self.settings.reduction == "mean",
            max_grad_norm=self.settings.max_grad_norm,
            nonfinite=self.settings.nonfinite,
        )

    def _settle_locked(self, decisions: Sequence[Decision], step: int) -> None:
        """Carries decisions out and makes what became of a step the job's. `step` were committed before."""
        try:
            round_ = self._stepper.carry_out(decisions)
        except Exception:
            self._aggregator.forget_step(step)
            raise
        finally:
            self._changed.notify_all()
        if round_ is not None and round_.commit is not None:
            self._content.groups = round_.groups
            contributions = []
            for worker in round_.commit.contributors:
                record = self._company.record(worker.worker_id)
                contributions.append(Contribution(worker.rank, worker.worker_id, record.next_sequence))
                record.pushes += 1
            self._company.answer((*round_.commit.contributors, *round_.commit.skipped))
            self.history.add(
                CommittedStep(
                    step=round_.commit.step,
                    contributors=tuple(contributions),
                    partial_contributors=tuple(worker.rank for worker in round_.commit.partial_contributors),
                    hyperparameters_disagreed=round_.disagreed,
                    grad_norm=round_.grad_norm,
                    pushed_differently=round_.pushed_differently,
                )
            )
            self.buffers.step_committed_locked()
        if round_ is not None and round_.skipped is not None:
            if round_.settled:
                self._content.groups = round_.groups
            self._aggregator.forget_step(round_.skipped.step)
            self._company.answer(round_.skipped.pushes)

    def _check_options_locked(self, member: Member, *, steppable: bool) -> None:
        """Checks a worker's options, if they have changed. Those that have to be no ones to step with do not count."""
        if member.unchecked:
            self._content.check_place_of_steps(member.groups)
            needed = self._content.bytes_with(member.groups) - self._content.full_bytes
            if needed > 0:
                self._check_room_locked(needed, "the state with the worker's options")
            member.steppable = True
            try:
                self._content.check_steppable(member.groups)
            except UpdateRefusedError:
                member.steppable = False
                if steppable:
                    raise
                return
            member.unchecked = False

    def _check_room_locked(self, nbytes: int, what: str) -> None:
        taken = self._content.full_bytes + self.buffers.nbytes_locked
        taken += sum(member.reserved_bytes + member.held.nbytes for member in self._company.members.values())
        if taken + nbytes > self._max_bytes:
            raise LimitExceededError(
                f"{what} would take {nbytes} bytes, and the job takes {taken} of {self._max_bytes} that this server "
                "lets it take (--max-job-bytes)"
            )

    def _check_sound_locked(self, round_: Round) -> None:
        """Tells every worker of a step that failed in another one's hands."""
        if isinstance(round_.failure, RequestError):
            raise type(round_.failure)(round_.failure.message)
        if round_.failure is not None:
            raise RequestError("the step failed on the server, whose log has the reason")
