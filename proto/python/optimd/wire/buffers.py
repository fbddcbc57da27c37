"""A module's buffers: what they are, and their values as the one run of bytes that travels in chunks.

The run is the concatenation of all buffers in the order of their specs, each row-major, with nothing between them.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Final

import torch

from optimd.v1 import tensor_pb2
from optimd.wire.dtypes import decode_buffer_dtype, encode_buffer_dtype
from optimd.wire.limits import MAX_NAME_BYTES, MAX_PARAMETER_DIMS
from optimd.wire.tensors import bytes_of, tensor_over

# torch multiplies the sizes, taking 0 for 1, when it computes strides.
_MAX_EXTENT: Final = 2**63


@dataclass(frozen=True, slots=True)
class Buffer:
    """What all workers of a job agree on about one buffer."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """The number of bytes of its value."""
        return math.prod(self.shape) * self.dtype.itemsize


class BufferValues:
    """The values of buffers, on the CPU. Takes their memory at once; its contents are undefined until written.

    Not thread-safe while it is written to. Who shares one has written all of it before.

    Args:
        buffers: What they are, with distinct names.
    """

    def __init__(self, buffers: Sequence[Buffer]) -> None:
        self.buffers = tuple(buffers)
        # Bytes first: allocated so, they are aligned for any dtype.
        self._raw = [torch.empty(buffer.nbytes, dtype=torch.uint8) for buffer in buffers]
        self.tensors: dict[str, torch.Tensor] = {
            buffer.name: raw.view(buffer.dtype).view(buffer.shape)
            for buffer, raw in zip(self.buffers, self._raw, strict=True)
        }
        """The values by name, row-major. Views: what is written shows in them."""
        self._starts = [0]
        for buffer in self.buffers:
            self._starts.append(self._starts[-1] + buffer.nbytes)

    @property
    def nbytes(self) -> int:
        """The length of the run."""
        return self._starts[-1]

    def chunks(self, chunk_bytes: int) -> Iterator[tuple[int, list[memoryview]]]:
        """The run in chunks of at most `chunk_bytes` bytes: where each starts, and its bytes, as views."""
        for start in range(0, self.nbytes, chunk_bytes):
            pieces = self._pieces(start, min(start + chunk_bytes, self.nbytes))
            yield start, [bytes_of(raw[begin:end]) for raw, begin, end in pieces]

    def write(self, offset: int, payload: memoryview) -> None:
        """Writes a part of the run.

        Args:
            offset: Where it starts, in bytes.
            payload: Its bytes.

        Raises:
            ValueError: it reaches past the end, or gives an element of a bool buffer that is neither 0 nor 1.
        """
        end = offset + payload.nbytes
        if end > self.nbytes:
            raise ValueError(f"it ends at byte {end}, the buffers have {self.nbytes}")
        received = tensor_over(payload, torch.uint8)
        for index, (raw, begin, stop) in zip(self._covered(offset, end), self._pieces(offset, end), strict=True):
            part, received = received[: stop - begin], received[stop - begin :]
            # What torch computes with such an element is undefined.
            if self.buffers[index].dtype is torch.bool and bool((part > 1).any()):
                raise ValueError(f"buffer {self.buffers[index].name!r} is of bools, each byte 0 or 1")
            raw[begin:stop].copy_(part)

    def _covered(self, start: int, end: int) -> list[int]:
        """The buffers that have bytes between two places of the run."""
        first = max(bisect_right(self._starts, start) - 1, 0)
        covered = []
        for index in range(first, len(self.buffers)):
            if self._starts[index] >= end:
                break
            if self._starts[index + 1] > start:
                covered.append(index)
        return covered

    def _pieces(self, start: int, end: int) -> list[tuple[torch.Tensor, int, int]]:
        """Of each covered buffer its bytes, and where in them the part begins and ends."""
        return [
            (
                self._raw[index],
                max(start - self._starts[index], 0),
                min(end, self._starts[index + 1]) - self._starts[index],
            )
            for index in self._covered(start, end)
        ]


def encode_buffer(buffer: Buffer) -> tensor_pb2.BufferSpec:
    """`buffer` as the schema writes it.

    Raises:
        ValueError: its dtype is not carried.
    """
    return tensor_pb2.BufferSpec(name=buffer.name, dtype=encode_buffer_dtype(buffer.dtype), shape=buffer.shape)


def decode_buffer(spec: tensor_pb2.BufferSpec) -> Buffer:
    """The buffer that `spec` describes.

    Raises:
        ValueError: its name, dtype or shape is not one.
    """
    length = len(spec.name.encode())
    if not 0 < length <= MAX_NAME_BYTES:
        raise ValueError(f"a name of {length} bytes; 1 to {MAX_NAME_BYTES} are possible")
    shape = tuple(spec.shape)
    if len(shape) > MAX_PARAMETER_DIMS:
        raise ValueError(f"{len(shape)} dimensions; at most {MAX_PARAMETER_DIMS} are possible")
    buffer = Buffer(spec.name, decode_buffer_dtype(spec.dtype), shape)
    if math.prod(max(size, 1) for size in shape) * buffer.dtype.itemsize >= _MAX_EXTENT:
        raise ValueError(f"shape {list(shape)} is no tensor's")
    return buffer


def first_buffer_difference(job: Sequence[Buffer], worker: Sequence[Buffer]) -> str | None:
    """Names the first buffer of a worker that is not the job's, and how it differs; None where all agree."""
    for theirs, ours in zip_longest(job, worker):
        if ours is None or theirs is None:
            extra, whose = (theirs, "the job") if ours is None else (ours, "the worker")
            return f"buffer {extra.name!r} of shape {list(extra.shape)} is only {whose}'s"
        if theirs.name != ours.name:
            return f"buffer {theirs.name!r}: the worker's is named {ours.name!r}"
        if theirs.shape != ours.shape:
            return f"buffer {theirs.name!r}: the job's shape is {list(theirs.shape)}, the worker's {list(ours.shape)}"
        if theirs.dtype != ours.dtype:
            return f"buffer {theirs.name!r}: the job's dtype is {theirs.dtype}, the worker's {ours.dtype}"
    return None
