"""A job: one optimizer on the server.

A job owns its parameters and state, its param_groups and its workers, and serialises every change of them under one
lock. The calling threads are those of the workers' streams: the one that completes a bucket applies it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any, Literal

import torch

from optimd.server import update
from optimd.server.aggregation import Decision, SyncAggregator, Worker
from optimd.server.buffers import JobBuffers
from optimd.server.errors import (
    AccumulationLostError,
    InvalidFieldError,
    JobDeletedError,
    JobMismatchError,
    LoadNeedsForceError,
    OutOfOrderError,
    RequestError,
    ShuttingDownError,
    StepTimeoutError,
    UpdateRefusedError,
    WorkerInUseError,
)
from optimd.server.membership import Member, WorkerRecord
from optimd.server.readers import Readers, ReadHold
from optimd.server.stepping import Round, Stepper
from optimd.server.store import StagedState, Store
from optimd.server.watching import CommittedStep, Contribution, StepHistory
from optimd.wire.layout import Bucket, Parameter, cut_buckets, first_difference

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class JobSettings:
    """What the job's creator asked for. All workers of a job ask for the same."""

    world_size: int
    reduction: Literal["mean", "sum"]
    max_grad_norm: float | None = None
    nonfinite: Literal["allow", "skip", "error"] = "allow"
    apply: Literal["streaming", "atomic"]
    bucket_bytes: int
    timeout_s: float
    join_timeout_s: float
    private: bool


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


@dataclass(slots=True, kw_only=True)
class _Replacement:
    """Parameters on their way in: they replace the job's when their values are there, or never."""

    store: Store
    groups: list[dict[str, Any]]
    sizes: list[int]
    carried: Sequence[tuple[int, int]]


class JobPhase(Enum):
    """Where a job is in its life."""

    CREATING = auto()
    READY = auto()
    DELETED = auto()


class Job:
    """One optimizer: parameters, param_groups, state and workers.

    Thread-safe. Methods that wait say so; all waits have deadlines.

    Args:
        name: The job's name.
        settings: What its creator asked for.
        device: Where its tensors live.
    """

    def __init__(self, name: str, settings: JobSettings, device: torch.device) -> None:
        self.name = name
        self.settings = settings
        self.store = Store(device)
        self.history = StepHistory(name)
        self._changed = threading.Condition()
        # All below: changed with self._changed held. `phase`, `step` and `worker_count` may be read without it.
        self.phase = JobPhase.CREATING
        self.groups: list[dict[str, Any]] = []
        self.group_sizes: list[int] = []
        self.load_count = 0
        self.layout_count = 0
        self._load_digest = b""
        self._aggregator = SyncAggregator(world_size=settings.world_size, streaming=settings.apply == "streaming")
        self._members: dict[Worker, Member] = {}
        self._records: dict[str, WorkerRecord] = {}
        self._stepper = self._new_stepper()
        self._readers = Readers(self._changed)
        self.buffers = JobBuffers(
            self._changed,
            lambda member, condition, waiting_for: self._wait_locked(
                member, condition, settings.timeout_s, waiting_for
            ),
            time.monotonic,
        )
        self._draining = False
        # Who is uploading parameters or state, and the sizes to go back to if it does not finish.
        self._bringing: Member | None = None
        self._before_growth: tuple[int, int, int] | None = None
        self._replacement: _Replacement | None = None

    # --- who is in it

    @property
    def step(self) -> int:
        """The number of committed steps."""
        return self._aggregator.step

    @property
    def worker_count(self) -> int:
        """How many workers are in the job. Does not wait for a step that is being applied."""
        return len(self._members)

    def members(self) -> list[Member]:
        """The workers that are in the job, in order of rank."""
        with self._changed:
            return [self._members[worker] for worker in sorted(self._members)]

    def record(self, worker_id: str) -> WorkerRecord:
        """What the job remembers of a worker_id."""
        with self._changed:
            return self._record_locked(worker_id)

    def await_ready(self, member: Member) -> None:
        """Waits until the job's creator has uploaded its values.

        Raises:
            JobDeletedError: the creator gave up, or the job was deleted.
            OutOfOrderError: the worker's line is down.
            StepTimeoutError: it took longer than `join_timeout_s`.
        """
        with self._changed:
            self._wait_locked(
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
            self._check_free_locked(member.worker)
            with self.buffers.expecting_newcomer_locked():
                self._wait_locked(
                    member,
                    lambda: not self._aggregator.is_open and self._bringing is None,
                    self.settings.timeout_s,
                    self._occupation_locked,
                )
            self._check_free_locked(member.worker)
            check()
            self._aggregator.join(member.worker)
            self._members[member.worker] = member
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
                next_sequence=self._record_locked(member.worker.worker_id).next_sequence,
                load_count=self.load_count,
                layout_count=self.layout_count,
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
            if self._bringing is member:
                self._take_back_growth_locked()
            if self._members.get(member.worker) is member:
                self.buffers.leave_locked(member)
                self._readers.wait()
                step = self.step
                decisions = self._aggregator.leave(member.worker)
                try:
                    self._settle_locked(decisions, step)
                except Exception as error:  # noqa: BLE001  # the others hear of it in their steps; who leaves has nobody
                    _log.warning("job %s: the step failed when rank %d left: %s", self.name, member.worker.rank, error)
                finally:
                    del self._members[member.worker]
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
            self.phase = JobPhase.DELETED
            self._changed.notify_all()
        self.history.end()

    # --- its parameters

    def grow(
        self,
        member: Member,
        groups: Sequence[dict[str, Any]],
        sizes: Sequence[int],
        parameters: Sequence[Parameter],
    ) -> list[Bucket]:
        """Adds param groups with their parameters. The values are undefined until the worker has written them.

        Until `grown` is called nobody is let in, begins a push or reads; if the worker leaves before that, what it
        added is taken back. Does not wait.

        Returns:
            The new buckets.

        Raises:
            OutOfOrderError: a step is open.
            UpdateRefusedError: the groups' options need the step to be made in the worker, and there may be several.
        """
        self._check_place_of_steps(groups)
        with self._changed:
            if self._aggregator.is_open:
                raise OutOfOrderError("a param group cannot be added while a step is open")
            self._bringing = member
            self._before_growth = (len(self.groups), len(self.store.parameters), len(self.store.buckets))
            buckets = self._cut(self.store, len(self.groups), sizes, parameters)
            self.group_sizes += sizes
            self.groups += [dict(group) for group in groups]
            member.groups += [dict(group) for group in groups]
            self.store.add(parameters, buckets)
            return buckets

    def _cut(
        self, store: Store, first_group: int, sizes: Sequence[int], parameters: Sequence[Parameter]
    ) -> list[Bucket]:
        """The buckets of new groups, behind those of `store`."""
        buckets: list[Bucket] = []
        first = len(store.parameters)
        offset = 0
        for group, size in enumerate(sizes, first_group):
            buckets += cut_buckets(
                [(first + i, parameters[i]) for i in range(offset, offset + size)],
                group=group,
                first_id=len(store.buckets) + len(buckets),
                bucket_bytes=self.settings.bucket_bytes,
            )
            offset += size
        return buckets

    def await_replacement(
        self, member: Member, *, layout_count: int, sizes: Sequence[int], parameters: Sequence[Parameter]
    ) -> bool:
        """Whether another worker has already replaced the parameters by these.

        Waits until all workers have joined, and while one is bringing something.

        Raises:
            JobMismatchError: the other worker brought other ones, has begun a step without, or this one has missed one.
            OutOfOrderError: the worker's line is down.
            StepTimeoutError: it waited longer than `join_timeout_s`.
            JobDeletedError: the job went away.
        """
        rank = member.worker.rank
        with self._changed:
            self._await_company_locked(member)
            if layout_count == self.layout_count and layout_count:
                difference = first_difference(list(enumerate(self.store.parameters)), list(enumerate(parameters)))
                if difference is None and list(sizes) != self.group_sizes:
                    difference = f"the job's groups have {self.group_sizes} parameters, the worker's {list(sizes)}"
                if difference is not None:
                    raise JobMismatchError(
                        f"rank {rank} replaces the parameters by others than another worker has: {difference}"
                    )
                return True
            if layout_count != self.layout_count + 1:
                raise JobMismatchError(
                    f"this would be replacement {layout_count} of the parameters for rank {rank}, the job has had "
                    f"{self.layout_count}"
                )
            if self._aggregator.is_open:
                raise JobMismatchError(
                    "another worker has begun the next step with the parameters as they were: every worker replaces "
                    "them by equal ones between the same two steps"
                )
            self._bringing = member
            return False

    def replace(
        self,
        groups: Sequence[dict[str, Any]],
        sizes: Sequence[int],
        parameters: Sequence[Parameter],
        carried: Sequence[tuple[int, int]],
    ) -> Store:
        """Takes memory for parameters that replace the job's. The job's stay in force until `grown` is called.

        To be called once `await_replacement` has said that nobody else has brought them.

        Args:
            groups: All param_groups.
            sizes: How many parameters each has.
            parameters: All parameters.
            carried: Which of them keep the state of which of the job's: pairs of indices.

        Returns:
            The store whose values the worker has to write.

        Raises:
            InvalidFieldError: a carried state is not of an equal parameter, or is carried twice.
            UpdateRefusedError: the groups' options need the step to be made in the worker, and there may be several.
        """
        self._check_place_of_steps(groups)
        store = Store(self.store.device)
        store.add(parameters, self._cut(store, 0, sizes, parameters))
        with self._changed:
            for seen in zip(*carried, strict=True):
                if len(set(seen)) != len(seen):
                    raise InvalidFieldError("CarriedState", "a parameter is named twice")
            for index, origin in carried:
                if not (index < len(parameters) and origin < len(self.store.parameters)):
                    raise InvalidFieldError("CarriedState", f"there are no parameters {index} and {origin}")
                if not parameters[index].holds_like(self.store.parameters[origin]):
                    raise InvalidFieldError(
                        "CarriedState", f"parameter {index} cannot keep the state of {origin}, which is another kind"
                    )
            self._replacement = _Replacement(
                store=store, groups=[dict(group) for group in groups], sizes=list(sizes), carried=carried
            )
            return store

    def grown(self, member: Member) -> None:
        """The values that a worker brought are in place. Waits for readers."""
        with self._changed:
            self._readers.wait()
            if self._bringing is member:
                if self._replacement is not None:
                    self._put_in_force_locked(self._replacement)
                self._bringing = self._before_growth = self._replacement = None
            if self.phase is JobPhase.CREATING:
                self.phase = JobPhase.READY
            self._changed.notify_all()

    def give_up(self, member: Member) -> None:
        """A worker does not go on with what it was bringing."""
        with self._changed:
            if self._bringing is member:
                self._take_back_growth_locked()

    def await_growth(self, member: Member, group: int, parameters: Sequence[Parameter]) -> bool:
        """Whether another worker has already added the group of index `group`.

        Waits until all workers have joined, so that all of them see the job without the group first, and while one is
        adding its own.

        Raises:
            OutOfOrderError: the worker's count of groups is not the job's, or its line is down.
            JobMismatchError: the other worker's group has other parameters.
            StepTimeoutError: it waited longer than `join_timeout_s`.
            JobDeletedError: the job went away.
        """
        with self._changed:
            self._await_company_locked(member)
            if group not in (len(self.groups), len(self.groups) - 1):
                raise OutOfOrderError(f"group {group} cannot follow the job's {len(self.groups)} groups")
            if group == len(self.groups):
                self._bringing = member
                return False
            known = self.group_parameters(group)
            first = len(self.store.parameters) - self.group_sizes[group]
            difference = first_difference(known, list(enumerate(parameters, first)))
            if difference is not None:
                raise JobMismatchError(
                    f"rank {member.worker.rank} adds another param group than the job has: {difference}"
                )
            return True

    def adopt_groups(self, member: Member, first: int) -> list[dict[str, Any]]:
        """Gives a worker the job's groups from index `first` on."""
        with self._changed:
            member.groups[first:] = [dict(group) for group in self.groups[first:]]
            return [dict(group) for group in self.groups[first:]]

    @property
    def full_bytes(self) -> int:
        """What values and state take once every parameter has had an update, and what the buffers take."""
        with self._changed:
            total, first = self.buffers.nbytes_locked, 0
            for options, size in zip(self.groups, self.group_sizes, strict=True):
                nbytes = sum(parameter.nbytes for parameter in self.store.parameters[first : first + size])
                total += nbytes * (1 + len(update.state_names(options)))
                first += size
            return total

    def group_parameters(self, first_group: int) -> list[tuple[int, Parameter]]:
        """The parameters of all groups from index `first_group` on, with their indices."""
        with self._changed:
            first = sum(self.group_sizes[:first_group])
            return list(enumerate(self.store.parameters))[first:]

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
    ) -> Round:
        """A worker begins a push. Waits until the job is formed.

        The numbers are those of `StepBegin`.

        Raises:
            OutOfOrderError: the sequence number or the base step is not the one due, or the worker's line is down.
            JobMismatchError: the worker has missed a param group, a load or a replacement.
            UpdateRefusedError: torch, or a server, cannot step with the worker's options.
            AccumulationLostError: what the worker had accumulated is not held; counting starts anew.
            StepTimeoutError: too few workers joined within `join_timeout_s`.
            ShuttingDownError: the server is stopping.
            JobDeletedError: the job went away.
        """
        with self._changed:
            self._await_company_locked(member)
            if self._draining:
                raise ShuttingDownError("the server is shutting down")
            self._check_sequence_locked(member, "StepBegin", sequence)
            if base_step != self.step:
                raise OutOfOrderError(f"StepBegin.base_step is {base_step}; the job stands at {self.step}")
            if group_count != len(self.groups):
                raise JobMismatchError(
                    f"rank {member.worker.rank} has {group_count} param groups, the job has {len(self.groups)}: "
                    "every worker adds a group between the same two steps"
                )
            if load_count != self.load_count:
                raise JobMismatchError(
                    f"rank {member.worker.rank} has loaded {load_count} state_dicts, the job {self.load_count}: "
                    "every worker loads an equal one between the same two steps"
                )
            self._check_layout_count_locked(member, layout_count)
            if micro != member.held.micro or member.held.spent:
                held = 0 if member.held.spent else member.held.micro
                member.held.forget()
                raise AccumulationLostError(
                    f"rank {member.worker.rank} has accumulated {micro} times for this step, the server holds {held}: "
                    "compute the gradients again"
                )
            for index, options in enumerate(member.groups):
                self._check_options(options, self._dtypes_of_locked(index))
            self._aggregator.begin(member.worker)
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
            member.speaks = True

    def bring(self, member: Member, round_: Round, staged: StagedState) -> None:
        """A worker has brought all that it changed outside of steps, between `begin` and its first gradient.

        Raises:
            RequestError: the step has failed in another worker's hands.
            OutOfOrderError: the worker's line is down.
            JobDeletedError: the job went away.
        """
        with self._changed:
            self._check_alive_locked(member)
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
            UpdateRefusedError: torch refuses the update.
            LimitExceededError: the device has no memory left for it.
            OutOfOrderError: the worker's line is down.
            JobDeletedError: the job went away.
        """
        with self._changed:
            self._readers.wait()
            self._check_alive_locked(member)
            self._check_sound_locked(round_)
            self._contribute_locked(member, bucket, *member.held.take(bucket, present, payload))

    def end(self, member: Member, round_: Round, *, skipped: bool = False) -> None:
        """A worker has pushed all it had; commits or skips the step if it was the last. Waits for readers.

        Args:
            member: The worker.
            round_: What `begin` returned.
            skipped: Whether it brings no gradients, not even those that are held of it, because they are not finite.

        Raises:
            NonFiniteGradientError: the step's gradient is not finite, and the job refuses that.
            UpdateRefusedError: torch refuses the update.
            LimitExceededError: the device has no memory left for it.
            OutOfOrderError: the worker's line is down.
            JobDeletedError: the job went away.
        """
        with self._changed:
            self._readers.wait()
            self._check_alive_locked(member)
            self._check_sound_locked(round_)
            for bucket_id, present, payload in () if skipped else member.held.rest():
                self._contribute_locked(member, self.store.buckets[bucket_id], present, payload)
            member.held.spend()
            step = self.step
            self._settle_locked(self._aggregator.end(member.worker, skipped=skipped), step)

    def await_progress(self, member: Member, round_: Round, seen: int) -> int:
        """Waits until more than `seen` buckets are applied or the step is committed or skipped.

        Returns:
            How many buckets are applied.

        Raises:
            StepTimeoutError: nothing happened for `timeout_s`.
            UpdateRefusedError: torch refused the step.
            NonFiniteGradientError: the step's gradient is not finite, and the job refuses that.
            JobDeletedError: the job went away.
        """
        with self._changed:
            self._wait_locked(
                member,
                lambda: len(round_.applied) > seen or round_.is_over,
                self.settings.timeout_s,
                self._occupation_locked,
            )
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
            JobDeletedError: the job went away.
        """
        with self._changed:
            self._check_alive_locked(member)
            self._check_sequence_locked(member, "Accumulate", sequence)
            if group_count != len(self.groups):
                raise JobMismatchError(
                    f"rank {member.worker.rank} has {group_count} param groups, the job has {len(self.groups)}"
                )
            self._check_layout_count_locked(member, layout_count)
            if micro > member.held.micro:
                raise OutOfOrderError(f"Accumulate.micro is {micro}; {member.held.micro} is due")
            return micro == member.held.micro

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
            self._check_sequence_locked(member, "DiscardAccumulated", sequence)
            if micro > member.held.micro:
                raise OutOfOrderError(f"DiscardAccumulated.micro is {micro}; {member.held.micro} is due")
            if micro == member.held.micro:
                member.held.discard()
                member.held.micro += 1

    # --- its state

    @contextmanager
    def reading(self) -> Iterator[ReadHold]:
        """Holds the values and the state still. Waits for a step that has begun to apply, and for uploads.

        Raises:
            StepTimeoutError: the step was not committed within `timeout_s`.
            JobDeletedError: the job is gone.
        """
        with self._changed:
            self._wait_locked(
                None,
                lambda: not self._aggregator.has_applied and self._bringing is None and self._readers.may_enter,
                self.settings.timeout_s,
                self._occupation_locked,
            )
            hold = self._readers.enter()
        try:
            yield hold
        finally:
            self.release(hold)

    def release(self, hold: ReadHold) -> None:
        """A reader is done, or its line is down. May be called more than once."""
        with self._changed:
            self._readers.leave(hold)

    def begin_load(self, member: Member, *, digest: bytes, load_count: int, force: bool) -> bool:
        """A worker brings a state_dict. Waits until all workers have joined, and while another one loads.

        Where its content is needed, no other worker may begin a push or bring anything until `finish_load`.

        Returns:
            Whether its content is needed: False where another worker has loaded the same.

        Raises:
            JobMismatchError: another worker has loaded a different one, or has begun a step without it.
            LoadNeedsForceError: it would replace the state of a job with steps and other workers.
            StepTimeoutError: it waited longer than `join_timeout_s`.
            OutOfOrderError: the worker's line is down.
            JobDeletedError: the job went away.
        """
        with self._changed:
            self._await_company_locked(member)
            if load_count == self.load_count and self.load_count:
                if digest != self._load_digest:
                    raise JobMismatchError(
                        f"rank {member.worker.rank} loads another state_dict than the job has loaded: every worker "
                        "loads an equal one"
                    )
                return False
            if load_count != self.load_count + 1:
                raise JobMismatchError(
                    f"this would be load {load_count} for rank {member.worker.rank}, the job has had {self.load_count}"
                )
            if self._aggregator.is_open:
                raise JobMismatchError(
                    "another worker has begun the next step without loading: every worker loads an equal state_dict "
                    "between the same two steps"
                )
            if self.step and len(self._members) > 1 and not force:
                raise LoadNeedsForceError(
                    f"job {self.name!r} has {self.step} steps behind it and {len(self._members) - 1} other workers; "
                    "load_state_dict(..., force=True) replaces its state for all of them"
                )
            self._bringing = member
            return True

    def finish_load(
        self,
        member: Member,
        staged: StagedState,
        groups: list[dict[str, Any]],
        *,
        digest: bytes,
    ) -> int:
        """Puts the state that a worker brought in force. Waits for readers.

        Returns:
            How often a state_dict has been loaded, this one included.

        Raises:
            UpdateRefusedError: the groups' options need the step to be made in the worker, and there may be several.
            OutOfOrderError: the worker's line is down.
            JobDeletedError: the job went away.
        """
        self._check_place_of_steps(groups)
        with self._changed:
            self._readers.wait()
            self._check_alive_locked(member)
            self.store.replace_state(staged)
            self.groups = [dict(group) for group in groups]
            for other in self._members.values():
                other.groups = [dict(group) for group in groups]
            self.load_count += 1
            self._load_digest = digest
            self._bringing = None
            self._changed.notify_all()
            return self.load_count

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

    def _put_in_force_locked(self, replacement: _Replacement) -> None:
        for index, origin in replacement.carried:
            replacement.store.carry_state(index, self.store, origin)
        self.store = replacement.store
        self._stepper = self._new_stepper()
        self.groups = replacement.groups
        self.group_sizes = replacement.sizes
        self.layout_count += 1
        for member in self._members.values():
            member.groups = [dict(group) for group in self.groups]
            member.held.forget()

    def _new_stepper(self) -> Stepper:
        return Stepper(
            self.name,
            self.store,
            self._members,
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
            self.groups = round_.groups
            contributions = []
            for worker in round_.commit.contributors:
                record = self._record_locked(worker.worker_id)
                contributions.append(Contribution(worker.rank, worker.worker_id, record.next_sequence))
                record.pushes += 1
            self._answer_locked((*round_.commit.contributors, *round_.commit.skipped))
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
            self._aggregator.forget_step(round_.skipped.step)
            self._answer_locked(round_.skipped.pushes)

    def _answer_locked(self, workers: Sequence[Worker]) -> None:
        """The pushes of these workers are over: the next ones are due."""
        for worker in workers:
            self._record_locked(worker.worker_id).next_sequence += 1
            member = self._members.get(worker)
            if member is not None:
                member.held.forget()

    def _take_back_growth_locked(self) -> None:
        """The worker that was uploading is gone: what it had added without its values goes with it."""
        if self._before_growth is not None:
            groups, parameters, buckets = self._before_growth
            del self.groups[groups:]
            del self.group_sizes[groups:]
            self.store.truncate(parameters, buckets)
        self._bringing = self._before_growth = self._replacement = None
        self._changed.notify_all()

    def _check_sound_locked(self, round_: Round) -> None:
        """Tells every worker of a step that failed in another one's hands."""
        if isinstance(round_.failure, RequestError):
            raise type(round_.failure)(round_.failure.message)
        if round_.failure is not None:
            raise RequestError("the step failed on the server, whose log has the reason")

    def _await_company_locked(self, member: Member) -> None:
        """Waits until the job is formed, every worker in it has its parameters, and nobody is uploading."""
        self._wait_locked(
            member,
            lambda: (
                self._aggregator.is_formed
                and self._bringing is None
                and all(other.ready for other in self._members.values())
            ),
            self.settings.join_timeout_s,
            lambda: (
                self._occupation_locked()
                if self._aggregator.is_formed
                else f"{len(self._members)} of {self.settings.world_size} workers have joined; start the others, or "
                "correct world_size"
            ),
        )

    def _wait_locked(
        self,
        member: Member | None,
        condition: Callable[[], bool],
        timeout_s: float,
        waiting_for: Callable[[], str],
    ) -> None:
        """Waits on behalf of a worker, if one is given for as long as its line is up."""
        arrived = self._changed.wait_for(
            lambda: condition() or self.phase is JobPhase.DELETED or (member is not None and not member.alive),
            timeout_s,
        )
        if self.phase is JobPhase.DELETED:
            raise JobDeletedError(f"job {self.name!r} was deleted")
        if member is not None:
            self._check_alive_locked(member)
        if not arrived:
            raise StepTimeoutError(f"job {self.name!r}: waited {timeout_s:g} s, and {waiting_for()}")

    def _occupation_locked(self) -> str:
        """What keeps the job busy, for a message."""
        if self._bringing is not None:
            return f"rank {self._bringing.worker.rank} is still uploading"
        unready = [worker.rank for worker, member in self._members.items() if not member.ready]
        if unready:
            return f"rank {', '.join(map(str, sorted(unready)))} is still receiving the parameters"
        return "the step waits for rank " + ", ".join(str(worker.rank) for worker in self._aggregator.missing())

    def _record_locked(self, worker_id: str) -> WorkerRecord:
        return self._records.setdefault(worker_id, WorkerRecord())

    def _check_sequence_locked(self, member: Member, message: str, sequence: int) -> None:
        due = self._record_locked(member.worker.worker_id).next_sequence
        if sequence != due:
            raise OutOfOrderError(f"{message}.sequence is {sequence}; {due} is due")

    def _check_layout_count_locked(self, member: Member, layout_count: int) -> None:
        if layout_count != self.layout_count:
            raise JobMismatchError(
                f"rank {member.worker.rank} has replaced its parameters {layout_count} times, the job's were replaced "
                f"{self.layout_count} times: every worker replaces them by equal ones between the same two steps"
            )

    def _check_place_of_steps(self, groups: Sequence[dict[str, Any]]) -> None:
        if self.settings.world_size > 1 and any(update.is_made_in_worker(options) for options in groups):
            raise UpdateRefusedError(
                "these options have the step made in the worker, which needs a job of one worker (world_size 1)"
            )

    def _check_options(self, options: dict[str, Any], dtypes: Collection[torch.dtype]) -> None:
        if update.is_made_in_worker(options):
            # Its pushes bring values and states; a gradient would be refused where it is applied.
            return
        for dtype in dtypes:
            refusal = update.refusal(options, dtype, self.store.device)
            if refusal:
                raise UpdateRefusedError(refusal)

    def _dtypes_of_locked(self, group: int) -> set[torch.dtype]:
        first = sum(self.group_sizes[:group])
        return {parameter.server_dtype for parameter in self.store.parameters[first : first + self.group_sizes[group]]}

    def _check_free_locked(self, newcomer: Worker) -> None:
        for worker in self._members:
            if worker.worker_id == newcomer.worker_id:
                raise WorkerInUseError(
                    f"worker_id {newcomer.worker_id!r} is in job {self.name!r} already; give this one another with "
                    "ProxyOptions(worker_id=...) or another rank"
                )
            if worker.rank == newcomer.rank:
                raise WorkerInUseError(
                    f"rank {newcomer.rank} is in job {self.name!r} already, as worker_id {worker.worker_id!r}; give "
                    "this worker another with ProxyOptions(rank=...)"
                )

    def _check_alive_locked(self, member: Member) -> None:
        if self.phase is JobPhase.DELETED:
            raise JobDeletedError(f"job {self.name!r} was deleted")
        if not member.alive:
            raise OutOfOrderError("the worker has left the job")
