"""Several workers' gradients of one bucket: their sum, or each for itself until they are added up in order."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from optimd.server.aggregation import Worker
from optimd.wire.layout import Bucket


class GradientAccumulator:
    """One bucket's gradients, added up as they arrive, on the server's device and in the dtype that it keeps.

    Its memory is taken with the first contribution and kept for the steps that follow. Not thread-safe.

    Args:
        bucket: The bucket.
        device: Where the sum lives.
    """

    def __init__(self, bucket: Bucket, device: torch.device) -> None:
        self._bucket = bucket
        self._device = device
        self._lengths = [piece.length for piece in bucket.slices]
        self._sum: torch.Tensor | None = None
        self._reduced = False
        self.present = [False] * len(bucket.slices)

    def clear(self) -> None:
        """Forgets what was added, not the memory it took."""
        self._reduced = False
        self.present = [False] * len(self._bucket.slices)

    def add(self, payload: torch.Tensor, present: Sequence[bool]) -> None:
        """Adds one worker's gradients.

        Args:
            payload: The elements of the present slices, flat, on the CPU. Only read.
            present: For each slice whether the worker has a gradient for it.
        """
        payload = payload.to(device=self._device, dtype=self._bucket.server_dtype)
        if self._sum is None:
            self._sum = torch.empty(sum(self._lengths), dtype=self._bucket.server_dtype, device=self._device)
        if all(present) and not any(self.present):
            self._sum.copy_(payload)
        elif all(present) and all(self.present):
            self._sum.add_(payload)
        else:
            self._add_some(self._sum, payload, present)
        self.present = [a or b for a, b in zip(self.present, present, strict=True)]

    @property
    def nbytes(self) -> int:
        """What the sum takes."""
        return 0 if self._sum is None else self._sum.nbytes

    @property
    def is_reduced(self) -> bool:
        """Whether `reduced` has been called since `clear`."""
        return self._reduced

    @property
    def is_empty(self) -> bool:
        """Whether nothing has been added."""
        return not any(self.present)

    def packed(self) -> torch.Tensor:
        """The sum of the slices that anybody had a gradient for, flat, as a payload holds them."""
        if self._sum is None:
            return torch.empty(0, dtype=self._bucket.server_dtype, device=self._device)
        if all(self.present):
            return self._sum
        pieces = torch.split(self._sum, self._lengths)
        return torch.cat([piece for piece, here in zip(pieces, self.present, strict=True) if here])

    def reduced(self, divisor: int) -> list[torch.Tensor]:
        """The gradients of the slices that anybody had one for, divided by `divisor`. Views of the sum's memory.

        Only the first call divides: what is reduced stays so, whatever is done to it since, until `clear`.
        """
        if self._sum is None:
            return []
        if divisor != 1 and not self._reduced:
            self._sum.div_(divisor)
        self._reduced = True
        pieces = torch.split(self._sum, self._lengths)
        return [piece for piece, here in zip(pieces, self.present, strict=True) if here]

    def slice(self, position: int) -> torch.Tensor:
        """The gradient of one slice, a view of the sum's memory as `reduced` left it; zeros where nobody had one."""
        length = self._lengths[position]
        if self._sum is None or not self.present[position]:
            return torch.zeros(length, dtype=self._bucket.server_dtype, device=self._device)
        start = sum(self._lengths[:position])
        return self._sum[start : start + length]

    def _add_some(self, total: torch.Tensor, payload: torch.Tensor, present: Sequence[bool]) -> None:
        lengths = [length for length, here in zip(self._lengths, present, strict=True) if here]
        parts = iter(torch.split(payload, lengths))
        for piece, here, before in zip(torch.split(total, self._lengths), present, self.present, strict=True):
            if here:
                part = next(parts)
                if before:
                    piece.add_(part)
                else:
                    piece.copy_(part)


class SeparateGradients:
    """One bucket's gradients, held apart by worker until they are added up in order of rank.

    So the sum has the same bits whoever came first, and a worker's part can be left out of it. Takes the memory of one
    bucket for each worker that has pushed it, and keeps it for the steps that follow. Not thread-safe.

    Args:
        bucket: The bucket.
        device: Where they live.
    """

    def __init__(self, bucket: Bucket, device: torch.device) -> None:
        self._bucket = bucket
        self._device = device
        self._held: dict[Worker, GradientAccumulator] = {}
        self._spare: list[GradientAccumulator] = []

    @property
    def is_empty(self) -> bool:
        """Whether nobody's are held."""
        return not self._held

    def add(self, worker: Worker, payload: torch.Tensor, present: Sequence[bool]) -> None:
        """Takes one worker's gradients, as `GradientAccumulator.add` does."""
        held = self._spare.pop() if self._spare else GradientAccumulator(self._bucket, self._device)
        held.add(payload, present)
        self._held[worker] = held

    def discard(self, worker: Worker) -> None:
        """Forgets what a worker gave, if anything."""
        held = self._held.pop(worker, None)
        if held is not None:
            self.take_back(held)

    def clear(self) -> None:
        """Forgets what everybody gave, not the memory it took."""
        for worker in list(self._held):
            self.discard(worker)

    def add_up(self, contributors: Iterable[Worker]) -> GradientAccumulator:
        """The sum of what contributors gave, in order of rank. What they gave is used up.

        Args:
            contributors: Whose gradients count. Of one that gave none there are none.
        """
        held = [self._held.pop(worker) for worker in sorted(contributors) if worker in self._held]
        total, *others = held or [GradientAccumulator(self._bucket, self._device)]
        for other in others:
            total.add(other.packed(), other.present)
            self.take_back(other)
        return total

    def take_back(self, accumulator: GradientAccumulator) -> None:
        """A sum, or what it was made of, is not needed any more: its memory is used again."""
        accumulator.clear()
        self._spare.append(accumulator)
