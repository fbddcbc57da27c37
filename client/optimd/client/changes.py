"""Noticing what somebody else has written into parameters.

torch has no hook on a tensor's memory. A write under `no_grad` moves the tensor's version, `p.data = x` its data
pointer; a write through `.data` moves neither and is seen by its content: all of a small tensor's, a sample of a large
one's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

import torch

from optimd.wire.tensors import flatten, memory_order

WHOLE_UP_TO: Final = 4096
"""Tensors of at most so many elements are compared whole."""

_RUNS: Final = 128
_RUN: Final = 16  # float32 elements of a cache line: they cost as much as one


class _Mark(NamedTuple):
    """What a tensor was when it was last in order, less its content."""

    pointer: int
    version: int


class ValueWatch:
    """Remembers parameters as they are, and tells which of them are not so any more.

    Not thread-safe. Keeps the memory of the remembered tensors alive.
    """

    def __init__(self) -> None:
        self._marks: list[_Mark] = []
        self._samples: list[_Sample] = []

    def remember(self, tensors: Sequence[torch.Tensor]) -> None:
        """Takes the tensors as they are now for being in order."""
        marks = [_mark(tensor) for tensor in tensors]
        same_memory = len(marks) == len(self._marks) and all(
            new.pointer == old.pointer for new, old in zip(marks, self._marks, strict=True)
        )
        self._marks = marks
        if not same_memory or not all(sample.fits(tensors) for sample in self._samples):
            by_place: dict[tuple[torch.device, torch.dtype], list[int]] = {}
            for index, tensor in enumerate(tensors):
                by_place.setdefault((tensor.device, tensor.dtype), []).append(index)
            self._samples = [_Sample(indices, tensors) for indices in by_place.values()]
        for sample in self._samples:
            sample.remember()

    def changed(self, tensors: Sequence[torch.Tensor]) -> set[int]:
        """The indices of the tensors that have, or may have, been written to since `remember`.

        Where a write shows in a tensor's content alone, all are named: such writes usually go over the whole model, and
        a sample may have missed the others.

        Args:
            tensors: As many as were remembered, of the same shapes and dtypes; each the same, or another in its place.
        """
        moved = {
            index
            for index, (tensor, mark) in enumerate(zip(tensors, self._marks, strict=True))
            if _mark(tensor) != mark
        }
        if any(sample.differs(moved) for sample in self._samples):
            return set(range(len(tensors)))
        return moved


class _Sample:
    """The sampled contents of the tensors of one device and dtype."""

    def __init__(self, indices: list[int], tensors: Sequence[torch.Tensor]) -> None:
        self._indices = indices
        self._shapes = [(tensors[index].shape, tensors[index].stride()) for index in indices]
        self._views = [_sampled(tensors[index].detach()) for index in indices]
        like = self._views[0]
        counts = [view.numel() for view in self._views]
        self._kept = torch.empty(sum(counts), dtype=like.dtype, device=like.device)
        self._now = torch.empty_like(self._kept)
        self._slots_kept = _slots(self._kept, counts, self._views)
        self._slots_now = _slots(self._now, counts, self._views)

    def fits(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Whether it looks at these tensors, whose memory is where it was."""
        return all(
            (tensors[index].shape, tensors[index].stride()) == shape
            for index, shape in zip(self._indices, self._shapes, strict=True)
        )

    @torch.no_grad()
    def remember(self) -> None:
        torch._foreach_copy_(self._slots_kept, self._views)  # torch's own optimizers use it

    @torch.no_grad()
    def differs(self, moved: set[int]) -> bool:
        """Whether the content of a tensor that is still where it was has changed."""
        if moved.isdisjoint(self._indices):
            torch._foreach_copy_(self._slots_now, self._views)
        else:
            # The memory of one that has moved may be gone.
            self._now.copy_(self._kept)
            still = [place for place, index in enumerate(self._indices) if index not in moved]
            for place in still:
                self._slots_now[place].copy_(self._views[place])
        return not torch.equal(_bits(self._kept), _bits(self._now))


def _mark(tensor: torch.Tensor) -> _Mark:
    # Tensors made in inference mode keep no version.
    return _Mark(tensor.data_ptr(), -1 if tensor.is_inference() else tensor._version)  # noqa: SLF001


def _sampled(tensor: torch.Tensor) -> torch.Tensor:
    """A view of all of a small tensor, or of runs spread over a large one."""
    if tensor.numel() <= WHOLE_UP_TO:
        return tensor
    order = memory_order(tensor)
    if tensor.permute(order).is_contiguous():
        flat = flatten(tensor, order)
        stride = (flat.numel() - _RUN) // (_RUNS - 1)
        return flat.as_strided((_RUNS, _RUN), (stride, 1), flat.storage_offset())
    while tensor.numel() > WHOLE_UP_TO:
        widest = max(range(tensor.dim()), key=tensor.size)
        tensor = tensor[(slice(None),) * widest + (slice(None, None, 2),)]
    return tensor


def _slots(flat: torch.Tensor, counts: list[int], views: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [slot.view(view.shape) for slot, view in zip(torch.split(flat, counts), views, strict=True)]


def _bits(flat: torch.Tensor) -> torch.Tensor:
    """The bits of a flat tensor: a NaN is not equal to itself, they are."""
    return flat.view(torch.uint8)
