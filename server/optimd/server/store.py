"""The tensors of a job: values and optimizer state, on the server's device, seen through buckets.

Shapes: every tensor here is 1-D (`flat`), with a parameter's elements in the job's memory order. A bucket's tensors
are views of these, one for each slice, so that an update of a bucket works in place and neighbouring slices never
share a view. Values and state are kept in the parameter's `server_dtype`: where it has a master dtype, its values are
its master weights, which are rounded where they are read.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import torch

from optimd.server import update
from optimd.server.transfers import Transfers
from optimd.wire.encodings import EXACT, Encoding, Part, part_of
from optimd.wire.kinds import PARAMETER
from optimd.wire.layout import Bucket, Parameter, Slice
from optimd.wire.sharedvalues import ValuesFile
from optimd.wire.tensors import bytes_of

_log = logging.getLogger(__name__)

# Integers of the sizes of the dtypes that workers can have in fewer bits than the store.
_BITS: Final = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(slots=True)
class ParameterState:
    """The state of one parameter, less its step counters, which its slices keep."""

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)


@dataclass(slots=True)
class _BucketViews:
    """The slices of a bucket as views: one list for each tensor of a parameter, built when first needed."""

    values: list[torch.Tensor]
    steps: list[torch.Tensor]
    state: dict[str, list[torch.Tensor]] = field(default_factory=dict)
    complete: set[str] = field(default_factory=set)
    """The names of the state tensors of which all slices are there."""


class Store:
    """Values and state of a job's parameters.

    Not thread-safe: the job that owns it serialises changes. It reads without that where nothing can change: values of
    a step that stand still until all its workers have gone on. Those may be moved meanwhile (`share`).

    Args:
        device: Where the tensors live.
        shares: Whether values are to lie where workers on this host can read them, as `share` says.
    """

    def __init__(self, device: torch.device, *, shares: bool = False) -> None:
        self.device = device
        self.shares = shares and device.type == "cpu"
        """Whether values are to lie where workers on this host can read them. There may be no memory for all."""
        self.shared: dict[int, ValuesFile] = {}
        """Memory of values that they can read, by its first parameter."""
        self.version = 0
        """How often values have changed."""
        self.parameters: list[Parameter] = []
        self.buckets: list[Bucket] = []
        self._values: list[torch.Tensor] = []
        self._state: list[ParameterState] = []
        self._views: list[_BucketViews] = []
        # For each parameter the places of its slices, in order of offset: (bucket id, position in the bucket).
        self._places: list[list[tuple[int, int]]] = []

    @property
    def value_bytes(self) -> int:
        """Bytes that the values take."""
        return sum(parameter.nbytes for parameter in self.parameters)

    @property
    def state_bytes(self) -> int:
        """Bytes that the state tensors take now. A parameter gets its state with its first update."""
        return sum(tensor.nbytes for entry in self._state for tensor in entry.tensors.values())

    def add(self, parameters: Sequence[Parameter], buckets: Sequence[Bucket]) -> None:
        """Takes memory for more parameters, whose indices and bucket ids go on from the last.

        The values are undefined until `write_values` has been called for each of the buckets.
        """
        self._values += self._memory(len(self.parameters), parameters)
        for parameter in parameters:
            self.parameters.append(parameter)
            self._state.append(ParameterState())
            self._places.append([])
        for bucket in buckets:
            self.buckets.append(bucket)
            self._views.append(
                _BucketViews(
                    values=[self._slice(self._values[piece.parameter], piece) for piece in bucket.slices],
                    steps=[torch.zeros((), dtype=torch.float32) for _ in bucket.slices],
                )
            )
            for position, piece in enumerate(bucket.slices):
                self._places[piece.parameter].append((bucket.bucket_id, position))

    def _memory(self, first: int, parameters: Sequence[Parameter]) -> list[torch.Tensor]:
        """Memory for the values of parameters, of which `first` is the first."""
        file = self._shared_memory(parameters) if self.shares else None
        if file is not None:
            self.shared[first] = file
            return file.flats
        return [torch.empty(each.numel, dtype=each.server_dtype, device=self.device) for each in parameters]

    def _shared_memory(self, parameters: Sequence[Parameter]) -> ValuesFile | None:
        """Memory for the values of parameters where workers can read them; None where there is too little, or none."""
        if not parameters:
            return None
        try:
            file = ValuesFile.create(parameters)
        except OSError as error:
            _log.info("values are where workers on this host cannot read them: %s", error)
            return None
        file.change(self.version)
        return file

    def share(self) -> None:
        """Moves values to where workers on this host can read them, and has those that are added later be there too.

        Does nothing on a device, and where there is too little memory of that kind. Not while values are written. They
        may be read meanwhile, without a lock: what is read is in either place, and the same. What views of the values
        were given out keep what they show.
        """
        if self.shares or self.device.type != "cpu":
            return
        if not self.parameters:
            self.shares = True
            return
        file = self._shared_memory(self.parameters)
        if file is None:
            return
        for value, old in zip(file.flats, self._values, strict=True):
            value.copy_(old)
        # In this order: nobody finds what is not there yet.
        self._values = file.flats
        for bucket, views in zip(self.buckets, self._views, strict=True):
            views.values = [self._slice(self._values[piece.parameter], piece) for piece in bucket.slices]
        self.shared[0] = file
        self.shares = True

    def hide(self) -> None:
        """No worker that comes from now on finds the values."""
        for file in self.shared.values():
            file.close()

    def is_shared(self, bucket: Bucket) -> bool:
        """Whether workers on this host can read a bucket's values where they are, in the dtype that they travel in."""
        # The parameters of a bucket were added together.
        one = bucket.slices[0].parameter
        return bucket.server_dtype is bucket.dtype and any(
            first <= one < first + len(file.flats) for first, file in self.shared.items()
        )

    def _change(self) -> None:
        """Values are about to change."""
        self.version += 1
        for file in self.shared.values():
            file.change(self.version)

    def truncate(self, parameter_count: int, bucket_count: int) -> None:
        """Drops the parameters and buckets that were added last, down to these numbers of them."""
        self.shared = {first: file for first, file in self.shared.items() if first < parameter_count}
        for things in (self.parameters, self._values, self._state, self._places):
            del things[parameter_count:]
        del self.buckets[bucket_count:]
        del self._views[bucket_count:]

    def write_values(self, bucket: Bucket, payload: torch.Tensor) -> None:
        """Sets the values of a whole bucket, for the first time: nobody has read them, and nobody's have changed.

        Args:
            bucket: One of the store's.
            payload: Its elements, flat, on the CPU.
        """
        pieces = torch.split(payload, [piece.length for piece in bucket.slices])
        for view, piece in zip(self._views[bucket.bucket_id].values, pieces, strict=True):
            view.copy_(piece.view_as(view))

    def read(self, kind: str, bucket: Bucket, present: Sequence[bool]) -> list[memoryview]:
        """The bytes of a bucket's present slices of one kind of tensor, in the dtype that it travels in.

        On a CPU these are views of the store's memory, unless they had to be converted: they show what the store holds
        when they are read.

        Args:
            kind: `PARAMETER` or a key of the state.
            bucket: One of the store's.
            present: For each slice whether it is wanted. A parameter of a wanted slice has the tensor.
        """
        dtype = bucket.dtype_of(kind)
        return [bytes_of(part.to(dtype).cpu()) for part in self._chosen(kind, bucket, present)]

    def parts(self, kind: str, bucket: Bucket, present: Sequence[bool], encoding: Encoding) -> list[Part]:
        """As `read`, as parts of a payload.

        Args:
            kind: As in `read`.
            bucket: As in `read`.
            present: As in `read`.
            encoding: One that takes the dtype that they travel in.
        """
        dtype = bucket.dtype_of(kind)
        return [part_of(part, encoding, dtype) for part in self._chosen(kind, bucket, present)]

    def begin_read(
        self, bucket: Bucket, present: Sequence[bool], encoding: Encoding, transfers: Transfers
    ) -> Callable[[], Sequence[Part]]:
        """Begins to read the values of a bucket's present slices. On a device, reads them as they are now, all at once.

        Args:
            bucket: As in `read`.
            present: As in `read`.
            encoding: As in `parts`.
            transfers: What brings them from the device.

        Returns:
            Waits for them, and gives what `parts` gives: to be used up before more than two other reads are begun.
        """
        if self.device.type == "cpu":
            parts = self.parts(PARAMETER, bucket, present, encoding)
            return lambda: parts
        dtype = bucket.dtype_of(PARAMETER)
        chosen = list(self._chosen(PARAMETER, bucket, present))
        if not chosen:
            return list
        lengths = [len(piece) for piece in chosen]
        # Copied there first, which is quick: what is updated next need not wait until it is here.
        finish = transfers.to_host(torch.cat([piece.to(dtype) for piece in chosen]))
        return lambda: [part_of(piece, encoding, dtype) for piece in torch.split(finish(), lengths)]

    def _chosen(self, kind: str, bucket: Bucket, present: Sequence[bool]) -> Iterator[torch.Tensor]:
        for piece, here in zip(bucket.slices, present, strict=True):
            if here and piece.length:
                whole = (
                    self._values[piece.parameter] if kind == PARAMETER else self._state[piece.parameter].tensors[kind]
                )
                yield whole[piece.offset : piece.end]

    def kinds(self) -> list[str]:
        """The kinds of tensors that any parameter has: its value, and the state of those that have one."""
        names = {name for entry in self._state for name in entry.tensors}
        return [PARAMETER, *sorted(names)]

    def copy(self, kind: str, bucket: Bucket) -> tuple[list[bool], torch.Tensor]:
        """One kind of tensor of a bucket, in the dtype that the store keeps.

        Returns:
            Which of its slices have it; and their elements, a flat copy on the CPU.
        """
        wholes = [
            self._values[piece.parameter] if kind == PARAMETER else self._state[piece.parameter].tensors.get(kind)
            for piece in bucket.slices
        ]
        parts = [
            whole[piece.offset : piece.end]
            for piece, whole in zip(bucket.slices, wholes, strict=True)
            if whole is not None
        ]
        copied = torch.cat(parts).cpu() if parts else torch.empty(0, dtype=bucket.server_dtype)
        return [whole is not None for whole in wholes], copied

    def steps_in(self, bucket: Bucket) -> list[float]:
        """The step counters of a bucket's slices."""
        return [float(step) for step in self._views[bucket.bucket_id].steps]

    def restore(self, kind: str, bucket: Bucket, present: Sequence[bool], elements: torch.Tensor) -> None:
        """Puts what `copy` gave in place. What a parameter has not had of that kind is zeros but for these slices.

        Args:
            kind: The kind.
            bucket: One of the store's.
            present: Which of its slices there are.
            elements: Theirs, flat, on the CPU, in the dtype that the store keeps.
        """
        self._change()
        pieces = [piece for piece, here in zip(bucket.slices, present, strict=True) if here]
        for piece, part in zip(pieces, torch.split(elements, [piece.length for piece in pieces]), strict=True):
            whole = self._values[piece.parameter]
            if kind != PARAMETER:
                whole = self._state[piece.parameter].tensors.setdefault(kind, torch.zeros_like(whole))
            whole[piece.offset : piece.end].copy_(part)

    def restore_steps(self, bucket: Bucket, steps: Sequence[float]) -> None:
        """Sets the step counters of a bucket's slices."""
        for counter, step in zip(self._views[bucket.bucket_id].steps, steps, strict=True):
            counter.fill_(step)

    def apply(
        self,
        bucket: Bucket,
        present: Sequence[bool],
        grads: Sequence[torch.Tensor],
        options: Mapping[str, Any],
        *,
        grad_scale: float | None = None,
    ) -> None:
        """Updates the present slices of a bucket with one fused call.

        Args:
            bucket: One of the store's.
            present: For each slice whether it has a gradient.
            grads: The gradients of the present slices, flat, on any device, in the bucket's dtype or in the server's.
            options: The options of the bucket's group.
            grad_scale: What the gradients were multiplied by, if by anything.

        Raises:
            RuntimeError: torch refuses the options.
        """
        dtype = bucket.server_dtype
        reason = update.refusal(options, dtype, self.device)
        if reason is not None:
            raise RuntimeError(reason)
        self._change()
        views = self._views[bucket.bucket_id]
        names = update.state_names(options)
        for name in names:
            if name not in views.complete:
                self._ensure_state(bucket, views, name, present)
        self._place_steps(views, options, dtype)
        chosen = [position for position, here in enumerate(present) if here]
        update.update(
            [views.values[position] for position in chosen],
            [
                # Most of them as they are: what torch's operators cost shows in a bucket of many slices.
                grad
                if grad.dtype is dtype and grad.shape == views.values[position].shape and grad.device == self.device
                else grad.to(device=self.device, dtype=dtype).view_as(views.values[position])
                for position, grad in zip(chosen, grads, strict=True)
            ],
            {name: [views.state[name][position] for position in chosen] for name in names},
            [views.steps[position] for position in chosen],
            options,
            grad_scale=grad_scale,
        )

    def apply_whole(self, index: int, grads: Sequence[torch.Tensor], options: Mapping[str, Any]) -> None:
        """Updates one parameter in one piece, for kernels whose bits depend on the split.

        Args:
            index: The parameter's index.
            grads: The gradients of its slices in order of offset, in the dtype that the server keeps.
            options: The options of its group.

        Raises:
            RuntimeError: torch refuses the options.
        """
        self._change()
        dtype = self.parameters[index].server_dtype
        entry = self._state[index]
        for name in update.state_names(options):
            if name not in entry.tensors:
                entry.tensors[name] = torch.zeros_like(self._values[index])
        bucket_id, position = self._places[index][0]
        step = update.new_step(options, dtype, self.device)
        step.copy_(self._views[bucket_id].steps[position])
        whole = Slice(index, 0, self.parameters[index].numel)
        value = self._slice(self._values[index], whole)
        update.update(
            [value],
            [torch.cat(list(grads)).to(self.device).view_as(value)],
            {name: [self._slice(tensor, whole)] for name, tensor in entry.tensors.items()},
            [step],
            options,
        )
        self.set_step(index, float(step))

    def places(self, index: int) -> Sequence[tuple[int, int]]:
        """Where the slices of a parameter are, in order of offset: (bucket id, position in the bucket)."""
        return self._places[index]

    def steps_of(self, index: int) -> list[float]:
        """The step counters of a parameter's slices, in order of offset."""
        return [float(self._views[bucket].steps[place]) for bucket, place in self._places[index]]

    def step_of(self, index: int) -> float:
        """The step counter of a parameter: that of its slices, which stand at one step between two job steps."""
        bucket_id, position = self._places[index][0]
        return float(self._views[bucket_id].steps[position])

    def set_step(self, index: int, step: float) -> None:
        """Sets the step counters of a parameter's slices."""
        for bucket_id, position in self._places[index]:
            self._views[bucket_id].steps[position].fill_(step)

    def state_names_of(self, index: int) -> tuple[str, ...]:
        """The state tensors that a parameter has: none before its first update."""
        return tuple(self._state[index].tensors)

    def settle_partial_steps(self) -> list[int]:
        """Brings the slices of every parameter to one step, the highest of them.

        Returns:
            The indices of the parameters of which some slices were updated and others were not.
        """
        partial = []
        for index in range(len(self.parameters)):
            steps = self.steps_of(index)
            if min(steps) != max(steps):
                partial.append(index)
                self.set_step(index, max(steps))
        return partial

    def stage(
        self,
        entries: Iterable[tuple[int, float, Sequence[str]]],
        *,
        values: Iterable[int] = (),
        received_as: Mapping[int, Encoding] | None = None,
    ) -> StagedState:
        """Takes memory for states, and values, that are to replace those of this store.

        Args:
            entries: For each parameter whose state is replaced its index, its step and the names of its tensors.
            values: The indices of the parameters whose values are replaced.
            received_as: What the worker had received these in, by index, where not as they are.
        """
        staged = StagedState(received_as)
        for index in values:
            staged.values[index] = torch.empty_like(self._values[index], dtype=self.parameters[index].dtype)
        for index, step, names in entries:
            value = self._values[index]
            staged.steps[index] = step
            staged.tensors[index] = {name: torch.zeros_like(value) for name in names}
        return staged

    def replace_state(self, staged: StagedState) -> None:
        """Puts a staged state in the place of the present one. Parameters it does not name lose theirs."""
        for index in range(len(self.parameters)):
            self._state[index] = ParameterState(staged.tensors.get(index, {}))
            self.set_step(index, staged.steps.get(index, 0.0))
        for views in self._views:
            views.state.clear()
            views.complete.clear()

    def install(self, staged: StagedState) -> None:
        """Puts staged values and states in place, parameter by parameter. What it does not name stays."""
        for index, value in staged.values.items():
            self.install_value(index, value, staged.received_as.get(index, EXACT))
        for index, tensors in staged.tensors.items():
            self.install_state(index, staged.steps[index], tensors)

    def install_value(self, index: int, value: torch.Tensor, received_as: Encoding = EXACT) -> None:
        """Sets the value of one parameter to what a worker has made of it, in place.

        An element that the worker has more bits of here than it was given, as of a master weight, and that rounds to
        the worker's, keeps its low bits: the worker has left it alone, or could not have seen the difference.

        Args:
            index: The parameter's index.
            value: Its elements, flat, in the parameter's own dtype, on the store's device.
            received_as: What the worker was given it in, or a part of it.
        """
        self._change()
        kept = self._values[index]
        parameter = self.parameters[index]
        encoding = received_as.of(parameter.dtype)
        if parameter.master_dtype is None and encoding.is_exact:
            kept.copy_(value)
            return
        bits = _BITS[parameter.dtype.itemsize]
        for bucket_id, position in self._places[index]:
            piece = self.buckets[bucket_id].slices[position]
            here, given = kept[piece.offset : piece.end], value[piece.offset : piece.end]
            seen = here.to(parameter.dtype)
            # Bits, not values: a NaN that stays is not a change, and 0.0 in the place of -0.0 is one.
            unchanged = seen.view(bits) == given.view(bits)
            if not encoding.is_exact:
                unchanged |= encoding.rounded(seen).view(bits) == given.view(bits)
            here.copy_(torch.where(unchanged, here, given.to(here.dtype)))

    def install_state(self, index: int, step: float, tensors: Mapping[str, torch.Tensor]) -> None:
        """Replaces the state of one parameter. Without tensors it has none, as before its first update.

        Args:
            index: The parameter's index.
            step: How many updates it has had.
            tensors: Its state tensors, flat, on the store's device. Kept.
        """
        self._state[index] = ParameterState(dict(tensors))
        self.set_step(index, step)
        for bucket_id, position in self._places[index]:
            views = self._views[bucket_id]
            views.complete.clear()
            for slices in views.state.values():
                slices[position] = torch.empty(0, dtype=self.buckets[bucket_id].server_dtype)

    def carry_state(self, index: int, other: Store, other_index: int) -> None:
        """Gives a parameter the state of an equal one of another store, which must not be used for it any more."""
        self.install_state(index, other.step_of(other_index), other._state[other_index].tensors)

    def _slice(self, flat: torch.Tensor, piece: Slice) -> torch.Tensor:
        """A slice as kernels see it: flat, but for scalars, with which torch has rules of promotion of its own."""
        return flat[piece.offset : piece.end] if self.parameters[piece.parameter].shape else flat.view(())

    def _ensure_state(self, bucket: Bucket, views: _BucketViews, name: str, present: Sequence[bool]) -> None:
        """Makes `views.state[name]` complete for the present slices, with zeros where a parameter is new to it."""
        known = views.state.get(name)
        # Views of parameters that have never had a gradient are empty placeholders, replaced when they get one.
        if known is None:
            known = [torch.empty(0, dtype=bucket.server_dtype) for _ in bucket.slices]
            views.state[name] = known
        for position, (piece, here) in enumerate(zip(bucket.slices, present, strict=True)):
            if not here or (known[position].numel() == piece.length and piece.length):
                continue
            tensors = self._state[piece.parameter].tensors
            if name not in tensors:
                tensors[name] = torch.zeros_like(self._values[piece.parameter])
            known[position] = self._slice(tensors[name], piece)
        if all(present):
            views.complete.add(name)

    def _place_steps(self, views: _BucketViews, options: Mapping[str, Any], dtype: torch.dtype) -> None:
        """Moves the step counters where the kernel reads them; they stay unless the options changed."""
        if self.device.type == "cpu":
            return
        wanted = update.new_step(options, dtype, self.device).device
        if views.steps[0].device != wanted:
            views.steps = [step.to(wanted) for step in views.steps]


class StagedState:
    """States and values on their way in: they replace the store's when they are complete, or never."""

    def __init__(self, received_as: Mapping[int, Encoding] | None = None) -> None:
        self.steps: dict[int, float] = {}
        """By parameter, whose state is replaced."""
        self.tensors: dict[int, dict[str, torch.Tensor]] = {}
        """By parameter, flat."""
        self.values: dict[int, torch.Tensor] = {}
        """By parameter, flat, where the value is replaced."""
        self.received_as = dict(received_as or {})
        """What the worker that replaces a value had received it in: by parameter, where not as it is."""

    @property
    def kinds(self) -> set[str]:
        """The kinds of tensors that it is made of."""
        names = {name for tensors in self.tensors.values() for name in tensors}
        return names | {PARAMETER} if self.values else names

    def buckets_of(self, store: Store) -> Iterator[tuple[str, Bucket, list[bool]]]:
        """What it is made of, in order: kinds of tensors, buckets, and which of their slices it has."""
        for kind in sorted(self.kinds):
            for bucket in store.buckets:
                present = self.expects(kind, bucket)
                if any(present):
                    yield kind, bucket, present

    def read(self, kind: str, bucket: Bucket, present: Sequence[bool]) -> list[memoryview]:
        """The bytes of one kind of tensor of a bucket's present slices, as `write` takes them."""
        parts = []
        for piece, here in zip(bucket.slices, present, strict=True):
            if here and piece.length:
                whole = self.values[piece.parameter] if kind == PARAMETER else self.tensors[piece.parameter][kind]
                parts.append(bytes_of(whole[piece.offset : piece.end].to(bucket.dtype_of(kind)).cpu()))
        return parts

    def expects(self, kind: str, bucket: Bucket) -> list[bool]:
        """For each slice of `bucket` whether its parameter has a tensor `kind` in this."""
        if kind == PARAMETER:
            return [piece.parameter in self.values for piece in bucket.slices]
        return [kind in self.tensors.get(piece.parameter, {}) for piece in bucket.slices]

    def write(self, kind: str, bucket: Bucket, present: Sequence[bool], payload: torch.Tensor) -> None:
        """Sets one kind of tensor of a bucket's present slices from their elements, flat, on the CPU."""
        pieces = [piece for piece, here in zip(bucket.slices, present, strict=True) if here]
        parts = torch.split(payload, [piece.length for piece in pieces])
        for piece, part in zip(pieces, parts, strict=True):
            whole = self.values[piece.parameter] if kind == PARAMETER else self.tensors[piece.parameter][kind]
            whole[piece.offset : piece.end].copy_(part)
