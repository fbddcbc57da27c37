"""What a job optimizes: parameters with their values and state, in param groups."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from optimd.server import update
from optimd.server.errors import InvalidFieldError, JobMismatchError, OutOfOrderError, UpdateRefusedError
from optimd.server.settings import PARAMETER_OVERHEAD_BYTES, JobSettings
from optimd.server.store import StagedState, Store
from optimd.wire.layout import Bucket, Parameter, cut_buckets, first_difference


@dataclass(slots=True, kw_only=True)
class _Replacement:
    """Parameters on their way in: they replace the job's when their values are there, or never."""

    store: Store
    groups: list[dict[str, Any]]
    sizes: list[int]
    carried: Sequence[tuple[int, int]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Brought:
    """Parameters that have been brought and whose values are there: what is about to be in force."""

    replaces: bool
    """Whether they come in the place of all others."""
    store: Store
    """Where they are."""
    first_group: int
    groups: Sequence[dict[str, Any]]
    sizes: Sequence[int]
    parameters: Sequence[Parameter]
    buckets: Sequence[Bucket]
    carried: Sequence[tuple[int, int]]


class JobContent:
    """Parameters, param_groups, and how often they were replaced. Guarded by the job's lock.

    What a worker brings is in place only once `settle` says that its values are there; until then `take_back` undoes
    it.

    Args:
        settings: What the job's creator asked for.
        device: Where its tensors live.
    """

    def __init__(self, settings: JobSettings, device: torch.device) -> None:
        self._settings = settings
        self.store = Store(device)
        self.groups: list[dict[str, Any]] = []
        """The options of each group."""
        self.sizes: list[int] = []
        """How many parameters each group has."""
        self.load_count = 0
        """How often a state_dict has been loaded."""
        self.load_digest = b""
        """The last one's."""
        self.layout_count = 0
        """How often the parameters have been replaced."""
        # The sizes to go back to, or what is to come, until the values are there.
        self._before_growth: tuple[int, int, int] | None = None
        self._replacement: _Replacement | None = None

    # --- more parameters, or others

    def grow(
        self,
        groups: Sequence[dict[str, Any]],
        sizes: Sequence[int],
        parameters: Sequence[Parameter],
        buckets: Sequence[Bucket] | None = None,
    ) -> Sequence[Bucket]:
        """Adds param groups with their parameters, whose values are undefined yet.

        Args:
            groups: The options of the groups.
            sizes: How many parameters each has.
            parameters: Their parameters.
            buckets: How these were cut, if they have been before.

        Returns:
            The new buckets.
        """
        self._before_growth = (len(self.groups), len(self.store.parameters), len(self.store.buckets))
        if buckets is None:
            buckets = self._cut(self.store, len(self.groups), sizes, parameters)
        self.sizes += sizes
        self.groups += [dict(group) for group in groups]
        self.store.add(parameters, buckets)
        return buckets

    def replace(
        self,
        groups: Sequence[dict[str, Any]],
        sizes: Sequence[int],
        parameters: Sequence[Parameter],
        carried: Sequence[tuple[int, int]],
        buckets: Sequence[Bucket] | None = None,
    ) -> Store:
        """Takes memory for parameters in the place of all others, whose values are undefined yet.

        Args:
            groups: As in `grow`, of all groups.
            sizes: As in `grow`.
            parameters: As in `grow`.
            carried: Which of them keep the state of which of the job's: pairs of indices.
            buckets: As in `grow`.

        Returns:
            The store that they will be in.

        Raises:
            InvalidFieldError: a carried state is of no parameter, or is carried twice.
            JobMismatchError: a carried state is of a parameter of another kind.
        """
        for seen in zip(*carried, strict=True):
            if len(set(seen)) != len(seen):
                raise InvalidFieldError("CarriedState", "a parameter is named twice")
        for index, origin in carried:
            if not (index < len(parameters) and origin < len(self.store.parameters)):
                raise InvalidFieldError("CarriedState", f"there are no parameters {index} and {origin}")
            if not parameters[index].holds_like(self.store.parameters[origin]):
                raise JobMismatchError(
                    f"parameter {index} cannot keep the state of {origin}: its shape, dtype or memory order is another"
                )
        store = Store(self.store.device, shares=self.store.shares)
        store.add(parameters, self._cut(store, 0, sizes, parameters) if buckets is None else buckets)
        self._replacement = _Replacement(
            store=store, groups=[dict(group) for group in groups], sizes=list(sizes), carried=carried
        )
        return store

    def brought(self) -> Brought:
        """What `settle` is about to put in force.

        Raises:
            RuntimeError: there is nothing.
        """
        new = self._replacement
        if new is not None:
            return Brought(
                replaces=True,
                store=new.store,
                first_group=0,
                groups=new.groups,
                sizes=new.sizes,
                parameters=new.store.parameters,
                buckets=new.store.buckets,
                carried=new.carried,
            )
        if self._before_growth is None:
            raise RuntimeError("nothing has been brought")
        groups, parameters, buckets = self._before_growth
        return Brought(
            replaces=False,
            store=self.store,
            first_group=groups,
            groups=self.groups[groups:],
            sizes=self.sizes[groups:],
            parameters=self.store.parameters[parameters:],
            buckets=self.store.buckets[buckets:],
            carried=(),
        )

    def settle(self) -> bool:
        """The values of what was brought are there. Returns whether the parameters are others now."""
        replacement, self._replacement, self._before_growth = self._replacement, None, None
        if replacement is None:
            return False
        for index, origin in replacement.carried:
            replacement.store.carry_state(index, self.store, origin)
        self.store, self.groups, self.sizes = replacement.store, replacement.groups, replacement.sizes
        self.layout_count += 1
        return True

    def take_back(self) -> None:
        """The values of what was brought will not come: it goes."""
        if self._before_growth is not None:
            groups, parameters, buckets = self._before_growth
            del self.groups[groups:]
            del self.sizes[groups:]
            self.store.truncate(parameters, buckets)
        self._before_growth = self._replacement = None

    def load(self, staged: StagedState, groups: Sequence[dict[str, Any]], digest: bytes) -> None:
        """Replaces the whole state and the options of all groups."""
        self.store.replace_state(staged)
        self.groups = [dict(group) for group in groups]
        self.load_count += 1
        self.load_digest = digest

    # --- what a worker claims

    def has_group(self, rank: int, group: int, parameters: Sequence[Parameter]) -> bool:
        """Whether a group that a worker adds is there already.

        Raises:
            OutOfOrderError: it leaves a gap.
            JobMismatchError: it is there with other parameters.
        """
        if group > len(self.groups):
            raise OutOfOrderError(f"group {group} cannot follow the job's {len(self.groups)} groups")
        if group == len(self.groups):
            return False
        first = sum(self.sizes[:group])
        difference = first_difference(self.parameters_of(group, 1), list(enumerate(parameters, first)))
        if difference is not None:
            raise JobMismatchError(f"rank {rank} adds another param group than the job has: {difference}")
        return True

    def has_replacement(
        self, rank: int, layout_count: int, sizes: Sequence[int], parameters: Sequence[Parameter]
    ) -> bool:
        """Whether parameters that a worker brings as replacement number `layout_count` are there already.

        Raises:
            JobMismatchError: others are, or the worker has missed a replacement.
        """
        if layout_count == self.layout_count and layout_count:
            difference = first_difference(self.parameters_of(), list(enumerate(parameters)))
            if difference is None and list(sizes) != self.sizes:
                difference = f"the job's groups have {self.sizes} parameters, the worker's {list(sizes)}"
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
        return False

    def has_load(self, rank: int, load_count: int, digest: bytes) -> bool:
        """Whether a state_dict that a worker brings as load number `load_count` is there already.

        In an asynchronous job the last one that is brought holds.

        Raises:
            JobMismatchError: another one is, or the worker has missed a load.
        """
        if self._settings.is_async:
            return load_count <= self.load_count and digest == self.load_digest
        if load_count == self.load_count and load_count:
            if digest != self.load_digest:
                raise JobMismatchError(
                    f"rank {rank} loads another state_dict than the job has loaded: every worker loads an equal one"
                )
            return True
        if load_count != self.load_count + 1:
            raise JobMismatchError(
                f"this would be load {load_count} for rank {rank}, the job has had {self.load_count}"
            )
        return False

    def check_counts(self, rank: int, *, group_count: int, layout_count: int, load_count: int | None = None) -> None:
        """Checks that a worker has seen all groups, replacements and, if given, loads.

        In an asynchronous job workers add groups and load when they come to it: others may be ahead.

        Raises:
            JobMismatchError: it has not.
        """
        is_async = self._settings.is_async
        if group_count > len(self.groups) or (group_count < len(self.groups) and not is_async):
            raise JobMismatchError(
                f"rank {rank} has {group_count} param groups, the job has {len(self.groups)}: every worker adds a "
                "group between the same two steps"
            )
        if load_count is not None and load_count != self.load_count and not is_async:
            raise JobMismatchError(
                f"rank {rank} has loaded {load_count} state_dicts, the job {self.load_count}: every worker loads an "
                "equal one between the same two steps"
            )
        if layout_count != self.layout_count:
            raise JobMismatchError(
                f"rank {rank} has replaced its parameters {layout_count} times, the job's were replaced "
                f"{self.layout_count} times: every worker replaces them by equal ones between the same two steps"
            )

    # --- options

    def with_options(self, groups: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """A worker's options of the groups that it knows, and the job's of the others."""
        return [*groups, *self.groups[len(groups) :]]

    def check_place_of_steps(self, groups: Sequence[dict[str, Any]]) -> None:
        """Checks that steps that are made in the worker are made in one.

        Raises:
            UpdateRefusedError: there may be several.
        """
        if self._settings.world_size != 1 and any(update.is_made_in_worker(options) for options in groups):
            raise UpdateRefusedError(
                "these options have the step made in the worker, which needs a job of one worker (world_size 1)"
            )

    def check_steppable(self, groups: Sequence[dict[str, Any]]) -> None:
        """Checks the options of all groups.

        Raises:
            UpdateRefusedError: torch, or a server, cannot step with them.
        """
        first = 0
        for options, size in zip(groups, self.sizes, strict=True):
            dtypes = {parameter.server_dtype for parameter in self.store.parameters[first : first + size]}
            first += size
            if update.is_made_in_worker(options):
                # Pushes bring values and states; a gradient would be refused where it is applied.
                continue
            # Others never have a gradient.
            for dtype in (dtype for dtype in dtypes if dtype.is_floating_point or dtype.is_complex):
                refusal = update.refusal(options, dtype, self.store.device)
                if refusal:
                    raise UpdateRefusedError(refusal)

    # --- what it is

    @property
    def full_bytes(self) -> int:
        """What values and state take once every parameter has had an update, with what keeps account of them."""
        return self.bytes_with(self.groups)

    @property
    def full_state_bytes(self) -> int:
        """What the state alone takes once every parameter has had an update."""
        return self._state_bytes_with(self.groups)

    def bytes_with(self, groups: Sequence[dict[str, Any]]) -> int:
        """As `full_bytes`, with these options of the groups."""
        overhead = PARAMETER_OVERHEAD_BYTES * len(self.store.parameters)
        return overhead + self.store.value_bytes + self._state_bytes_with(groups)

    def _state_bytes_with(self, groups: Sequence[dict[str, Any]]) -> int:
        total, first = 0, 0
        for options, size in zip(groups, self.sizes, strict=True):
            nbytes = sum(parameter.nbytes for parameter in self.store.parameters[first : first + size])
            total += nbytes * len(update.state_names(options))
            first += size
        return total

    def parameters_of(self, first_group: int = 0, count: int | None = None) -> list[tuple[int, Parameter]]:
        """The parameters of `count` groups, or all, from index `first_group` on, with their indices."""
        first = sum(self.sizes[:first_group])
        end = None if count is None else sum(self.sizes[: first_group + count])
        return list(enumerate(self.store.parameters))[first:end]

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
                bucket_bytes=self._settings.bucket_bytes,
            )
            offset += size
        return buckets
