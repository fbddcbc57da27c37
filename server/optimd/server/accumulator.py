"""The sum of several workers' gradients of one bucket."""

from __future__ import annotations

from collections.abc import Sequence

import torch

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
