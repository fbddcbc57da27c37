"""Noticing what somebody else has written into parameters.

torch has no hook on a tensor's memory. A write under `no_grad` moves the tensor's version, `p.data = x` its data
pointer; a write through `.data` moves neither and is seen by its content: small tensors are compared whole, larger ones
by the sums of blocks of their bits, the largest by a sample. Comparing all whole would cost a tenth of a step.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Final, NamedTuple

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from optimd.client.parameters import has_memory, is_held
from optimd.wire.tensors import flatten, memory_order

WHOLE_UP_TO: Final = 4096
"""Tensors of at most so many elements are compared whole."""

_RAW_UP_TO_BYTES: Final = 64 * 1024
"""So too are those in the host's memory of at most so many bytes, if they are row-major: larger ones by a hash."""

SUMMED_UP_TO: Final = 1 << 17
"""Tensors of at most so many elements are compared by sums of blocks."""

_BLOCK_BYTES: Final = 2048
"""How much is summed up."""

_RUNS: Final = 256
"""How many places of the largest tensors are looked at, at least."""

_RUN_BYTES: Final = 64
"""How much is looked at in each: a cache line, which costs as much as one element."""

_WORDS: Final = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


Content = bytes | int | tuple[torch.Tensor, ...]
"""What stands for a tensor's bits: see `content_of`."""


class _Mark(NamedTuple):
    """What a tensor was when it was last in order."""

    memory: StorageWeakRef
    """Its memory, which is not kept: whether it is still there tells a later one at the same address apart."""
    pointer: int
    version: int
    content: Content


class ValueWatch:
    """Remembers parameters as they are, and tells which of them are not so any more.

    Noticed is all but some writes through `.data`: exchanges, of elements or of signs, within single 2 KiB blocks of
    tensors of more than `WHOLE_UP_TO` elements, and what a sample of those of more than `SUMMED_UP_TO` does not meet.
    It meets every row of at least 1 KiB. Does not keep the tensors alive. Not thread-safe.
    """

    def __init__(self) -> None:
        self._marks: list[_Mark | None] = []
        self._looked_at: dict[int, _Mark | None] = {}

    def look_at(self, index: int, tensor: torch.Tensor) -> None:
        """A tensor is as `remember` will find it, which then takes less time."""
        self._looked_at[index] = _mark(tensor)

    def remember(self, tensors: Sequence[torch.Tensor]) -> None:
        """Takes the tensors as they are now for being in order.

        What `look_at` was given holds, unless a tensor's pointer or version is another now. Should it have become
        another unnoticed, it counts as written to.
        """
        looked_at, self._looked_at = self._looked_at, {}
        self._marks = [
            mark if (mark := looked_at.get(index)) is not None and _is_there(tensor, mark) else _mark(tensor)
            for index, tensor in enumerate(tensors)
        ]

    def changed(self, tensors: Sequence[torch.Tensor]) -> set[int]:
        """The indices of the tensors that have been written to, or may have been, since `remember`.

        Args:
            tensors: As many as were remembered, of the same shapes and dtypes; each the same, or another in its place.
        """
        pairs = zip(tensors, self._marks, strict=True)
        return {index for index, (tensor, mark) in enumerate(pairs) if not _is_still(tensor, mark)}


def _mark(tensor: torch.Tensor) -> _Mark | None:
    """None where the job has none of a tensor's elements, or they cannot be looked at."""
    # Some libraries free the memory of parameters that are not needed for a while.
    if not is_held(tensor) or not has_memory(tensor):
        return None
    memory = StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]
    return _Mark(memory, tensor.data_ptr(), _version(tensor), content_of(tensor))


def _is_still(tensor: torch.Tensor, mark: _Mark | None) -> bool:
    if not is_held(tensor):
        return mark is None
    if not has_memory(tensor):
        # There is nothing to be pushed, until there is.
        return True
    if mark is None or not _is_there(tensor, mark):
        return False
    return is_same(content_of(tensor), mark.content)


def _is_there(tensor: torch.Tensor, mark: _Mark) -> bool:
    """Whether a tensor has the memory that it was marked with, and no writes that torch counts since."""
    if not is_held(tensor) or (tensor.data_ptr(), _version(tensor)) != (mark.pointer, mark.version):
        return False
    return not mark.memory.expired()  # type: ignore[no-untyped-call]


def _version(tensor: torch.Tensor) -> int:
    # Tensors made in inference mode keep none.
    return -1 if tensor.is_inference() else tensor._version  # noqa: SLF001


def is_same(now: Content, then: Content) -> bool:
    """Whether a tensor, of one shape and layout, has kept what `content_of` has told of it."""
    if not isinstance(now, tuple) or not isinstance(then, tuple):
        return now == then
    return all(torch.equal(one, other) for one, other in zip(now, then, strict=True))


def content_of(tensor: torch.Tensor) -> Content:
    """What stands for a tensor's bits (a NaN is not equal to itself), of one form for each shape and layout.

    What it misses is said of `ValueWatch`.
    """
    nbytes = tensor.numel() * tensor.element_size()
    if (
        nbytes <= _RAW_UP_TO_BYTES
        and tensor.device.type == "cpu"
        and tensor.is_contiguous()
        and not tensor.is_complex()
    ):
        # Of a small model these are most of the tensors, and what torch's operators cost is most of a step.
        content = ctypes.string_at(tensor.data_ptr(), nbytes)
        return content if tensor.numel() <= WHOLE_UP_TO else hash(content)
    plain = tensor.detach()
    rows = 1
    if plain.is_contiguous() and not plain.is_complex():
        # By far the most common, and the shortest way.
        flat = plain.view(-1)
        rows = plain.size(0) if plain.dim() else 1
    else:
        order = memory_order(plain)
        if order[:1] == (0,):
            rows = plain.size(0)
        # A copy where the tensor is not dense: the memory between its elements is none of its business.
        flat = flatten(plain.resolve_conj().resolve_neg(), order).contiguous()
        if flat.is_complex():
            flat = torch.view_as_real(flat).view(-1)
    bits = flat.view(_WORDS[flat.element_size()])
    count = plain.numel()
    if count <= WHOLE_UP_TO:
        return (bits.clone(),)
    if count > SUMMED_UP_TO:
        return (_sample(bits, rows),)
    in_blocks = len(bits) * bits.element_size() // _BLOCK_BYTES * _BLOCK_BYTES // bits.element_size()
    words = bits[:in_blocks]
    words = words.view(torch.int32) if words.storage_offset() * words.element_size() % 4 == 0 else words
    # Summed up in 8 bytes: in 4, or with words of 8, every other flipped sign would drop out. Weights, for what changes
    # places, would take five times as long.
    return words.view(-1, _BLOCK_BYTES // words.element_size()).sum(1), bits[in_blocks:].clone()


def _sample(bits: torch.Tensor, rows: int) -> torch.Tensor:
    """Runs spread evenly over a large tensor: one of each row, where rows are long."""
    run = _RUN_BYTES // bits.element_size()
    columns = len(bits) // rows
    if rows >= _RUNS and columns >= 16 * run:
        return bits.view(rows, columns)[:, :run].clone()
    stride = (len(bits) - run) // (_RUNS - 1)
    return bits.as_strided((_RUNS, run), (stride, 1), bits.storage_offset()).clone()
