"""What workers bring to a job besides pushes: groups, other parameters, a whole state."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from optimd.server.company import JobPhase
from optimd.server.errors import JobMismatchError, LoadNeedsForceError, OutOfOrderError
from optimd.server.member import Member
from optimd.server.parts import JobParts
from optimd.server.store import StagedState, Store
from optimd.wire.buffers import BufferValues
from optimd.wire.layout import Bucket, Parameter


@dataclass(frozen=True, slots=True, kw_only=True)
class AdoptedGroups:
    """Groups of a job as a worker that has not brought them receives them."""

    groups: list[dict[str, Any]]
    sizes: list[int]
    parameters: list[Parameter]


class LoadedState(NamedTuple):
    """A state_dict that a worker has brought, and that is not in force yet."""

    staged: StagedState
    groups: list[dict[str, Any]]
    digest: bytes


class Bringing:
    """Lets one worker at a time change what a job is, between two steps, and all others follow.

    The first worker brings the content (`await_...` returns False, or `begin_load` True); until it is complete nobody
    is let in, begins a push or reads. The others bring equal content and are given the job's. Thread-safe: all of it
    happens under the job's lock, that of `changed`. Methods that wait say so.

    Args:
        parts: The job's.
        on_replaced: Called, with the lock held, when the parameters have become others.
    """

    def __init__(self, parts: JobParts, *, on_replaced: Callable[[], None]) -> None:
        self._changed = parts.changed
        self._company = parts.company
        self._content = parts.content
        self._aggregator = parts.aggregator
        self._readers = parts.readers
        self._journal = parts.journal
        self._buffers = parts.buffers
        self._check_room = parts.check_room
        self._on_replaced = on_replaced

    def grow(
        self,
        member: Member,
        groups: Sequence[dict[str, Any]],
        sizes: Sequence[int],
        parameters: Sequence[Parameter],
    ) -> Sequence[Bucket]:
        """Adds param groups with their parameters. The values are undefined until the worker has written them.

        Until `grown` is called nobody is let in, begins a push or reads; if the worker leaves before that, what it
        added is taken back. Does not wait.

        Returns:
            The new buckets.

        Raises:
            OutOfOrderError: a step is open.
            UpdateRefusedError: the groups' options need the step to be made in the worker, and there may be several.
        """
        self._content.check_place_of_steps(groups)
        with self._changed:
            if self._aggregator.is_open:
                raise OutOfOrderError("a param group cannot be added while a step is open")
            self._company.bringing = member
            buckets = self._content.grow(groups, sizes, parameters)
            member.groups += [dict(group) for group in groups]
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
        with self._changed:
            self._company.await_quiet(member)
            if self._content.has_replacement(member.worker.rank, layout_count, sizes, parameters):
                member.ready = False
                member.held.forget()
                return True
            if self._aggregator.is_open:
                raise JobMismatchError(
                    "another worker has begun the next step with the parameters as they were: every worker replaces "
                    "them by equal ones between the same two steps"
                )
            self._company.bringing = member
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
            InvalidFieldError: a carried state is of no parameter, or is carried twice.
            JobMismatchError: a carried state is of a parameter of another kind.
            LimitExceededError: both together would take too much.
            UpdateRefusedError: the groups' options need the step to be made in the worker, and there may be several.
        """
        self._content.check_place_of_steps(groups)
        with self._changed:
            self._check_room(sum(parameter.nbytes for parameter in parameters), "the new parameters")
            return self._content.replace(groups, sizes, parameters, carried)

    def grown(self, member: Member, state: LoadedState | None = None, buffers: BufferValues | None = None) -> None:
        """The values that a worker brought are in place. Waits for readers.

        A job's creator may have brought more than values: all of it is there at once, or the job is not.

        Args:
            member: The worker.
            state: What the job begins with, if not without a state.
            buffers: Likewise; attached to, and complete.

        Raises:
            UpdateRefusedError: options of `state` need the step to be made in the worker, and there may be several.
            OutOfOrderError: the worker's line is down, and what it brought was taken back.
            JobDeletedError: the job went away.
        """
        if state is not None:
            self._content.check_place_of_steps(state.groups)
        with self._changed:
            self._readers.wait()
            self._company.check_alive(member)
            if self._company.bringing is not member:
                raise OutOfOrderError("the worker has left the job")
            self._journal.layout_brought(self._content.brought())
            self._company.bringing = None
            if self._content.settle():
                self._on_replaced()
                for other in self._company.members.values():
                    other.give(self._content.groups)
                    other.held.forget()
            if self._company.phase is JobPhase.CREATING:
                self._company.phase = JobPhase.READY
            # The lock is held on: nobody comes in, reads or goes away before this is there too.
            if state is not None:
                self.finish_load(member, state.staged, state.groups, digest=state.digest)
            if buffers is not None:
                self._buffers.hold(member, buffers)
            self._changed.notify_all()

    def give_up(self, member: Member) -> None:
        """A worker does not go on with what it was bringing."""
        with self._changed:
            self.take_back_locked(member)

    def await_growth(self, member: Member, group: int, parameters: Sequence[Parameter]) -> bool:
        """Whether another worker has already added the group of index `group`.

        Waits until all workers have joined, so that all of them see the job without the group first, and while one is
        adding its own or is in the middle of something.

        Raises:
            OutOfOrderError: it is not the worker's next group, or the worker's line is down.
            JobMismatchError: the other worker's group has other parameters, or has begun a step without.
            StepTimeoutError: it waited longer than `join_timeout_s`.
            JobDeletedError: the job went away.
        """
        with self._changed:
            self._company.await_quiet(member)
            if group != len(member.groups):
                raise OutOfOrderError(f"group {group} cannot follow the worker's {len(member.groups)} groups")
            if self._content.has_group(member.worker.rank, group, parameters):
                member.ready = False
                return True
            if self._aggregator.is_open:
                raise JobMismatchError(
                    "another worker has begun the next step without the group: every worker adds it between the same "
                    "two steps"
                )
            self._company.bringing = member
            return False

    def adopt(self, member: Member, first: int, count: int | None = None, *, keeps: bool = False) -> AdoptedGroups:
        """Gives a worker `count` of the job's groups, or all, from index `first` on.

        One that `keeps` its own options, since it only comes back to the job, is given them to know.
        """
        with self._changed:
            end = None if count is None else first + count
            if not keeps:
                member.groups[first:end] = [dict(group) for group in self._content.groups[first:end]]
            member.unchecked = True
            return AdoptedGroups(
                groups=[dict(group) for group in self._content.groups[first:end]],
                sizes=list(self._content.sizes[first:end]),
                parameters=[parameter for _, parameter in self._content.parameters_of(first, count)],
            )

    def reserve(self, member: Member, nbytes: int, *, is_first: bool = False) -> None:
        """A worker is about to bring values or state of so many bytes, which count until its exchange is over.

        Args:
            member: The worker.
            nbytes: How many.
            is_first: Whether it is the state of a job that has none yet, and for which room is set aside as it is.

        Raises:
            LimitExceededError: the job would take too much.
        """
        with self._changed:
            if is_first:
                nbytes = max(0, nbytes - self._content.full_state_bytes)
            self._check_room(nbytes, "what the worker brings")
            member.reserved_bytes += nbytes

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
            self._company.await_quiet(member)
            if self._content.has_load(member.worker.rank, load_count, digest):
                return False
            if self._aggregator.is_open:
                raise JobMismatchError(
                    "another worker has begun the next step without loading: every worker loads an equal state_dict "
                    "between the same two steps"
                )
            if self._aggregator.step and len(self._company.members) > 1 and not force:
                others = len(self._company.members) - 1
                raise LoadNeedsForceError(
                    f"the job has {self._aggregator.step} steps behind it and {others} other workers; "
                    "load_state_dict(..., force=True) replaces its state for all of them"
                )
            self._company.bringing = member
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
        self._content.check_place_of_steps(groups)
        with self._changed:
            self._readers.wait()
            self._company.check_alive(member)
            self._journal.state_brought(staged, groups, digest, self._content.store)
            self._content.load(staged, groups, digest)
            for other in self._company.members.values():
                other.give(groups[: len(other.groups)])
            member.reserved_bytes = 0
            self._company.bringing = None
            self._changed.notify_all()
            return self._content.load_count

    def take_back_locked(self, member: Member) -> None:
        """A worker does not go on with what it was bringing, if anything: what it has added goes with it."""
        if self._company.bringing is member:
            self._company.bringing = None
            member.reserved_bytes = 0
            self._content.take_back()
            self._changed.notify_all()
