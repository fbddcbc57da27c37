"""What a job's parameters are and how they are cut into buckets.

A bucket is a list of (parameter, offset, length) slices of one group and one dtype: the unit of a message and of an
update. The cut is the server's to make; its table travels to the workers, which need not know how it was made.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from optimd.v1 import tensor_pb2
from optimd.wire.dtypes import decode_dtype, encode_dtype
from optimd.wire.limits import MAX_BUCKET_SLICES, MAX_NAME_BYTES, MAX_PARAMETER_DIMS, SLICE_ALIGNMENT


@dataclass(frozen=True, slots=True)
class Parameter:
    """What all workers of a job agree on about one parameter."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    memory_order: tuple[int, ...]

    @property
    def numel(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """The number of bytes of its value."""
        return self.numel * self.dtype.itemsize

    def holds_like(self, other: Parameter) -> bool:
        """Whether its elements, in memory, are as many, as wide and in the same order as another's."""
        return (self.dtype, self.shape, self.memory_order) == (other.dtype, other.shape, other.memory_order)

    def title(self, index: int) -> str:
        """How a message to a person names it."""
        return f"parameter {index} ({self.name})" if self.name else f"parameter {index}"


@dataclass(frozen=True, slots=True)
class Slice:
    """A run of elements of one parameter, in its memory order."""

    parameter: int
    offset: int
    length: int

    @property
    def end(self) -> int:
        """The first element behind it."""
        return self.offset + self.length


@dataclass(frozen=True, slots=True)
class Bucket:
    """Slices that travel and are updated together."""

    bucket_id: int
    group: int
    dtype: torch.dtype
    slices: tuple[Slice, ...]

    @property
    def nbytes(self) -> int:
        """The size of its payload when every slice is present."""
        return sum(piece.length for piece in self.slices) * self.dtype.itemsize

    def payload_bytes(self, present: Sequence[bool]) -> int:
        """The size of its payload when only some slices are present."""
        elements = sum(piece.length for piece, here in zip(self.slices, present, strict=True) if here)
        return elements * self.dtype.itemsize


def cut_buckets(
    parameters: Iterable[tuple[int, Parameter]], *, group: int, first_id: int, bucket_bytes: int
) -> list[Bucket]:
    """Cuts the parameters of one group into buckets.

    Slices follow the order of the parameters, dtype by dtype. A parameter larger than what is left of a bucket is
    split at a multiple of `SLICE_ALIGNMENT` elements from its own start; small ones share a bucket. A parameter
    without elements gets one slice of length 0: it has a step counter like any other.

    Args:
        parameters: The group's parameters with their indices.
        group: The group's index.
        first_id: The id of the first bucket.
        bucket_bytes: The largest payload; at least `MIN_BUCKET_BYTES`.
    """
    by_dtype: dict[torch.dtype, list[tuple[int, Parameter]]] = {}
    for index, parameter in parameters:
        by_dtype.setdefault(parameter.dtype, []).append((index, parameter))
    buckets: list[Bucket] = []
    for dtype, members in by_dtype.items():
        capacity = bucket_bytes // dtype.itemsize
        for slices in _fill(members, capacity):
            buckets.append(Bucket(first_id + len(buckets), group, dtype, tuple(slices)))
    return buckets


def _fill(members: Iterable[tuple[int, Parameter]], capacity: int) -> Iterable[list[Slice]]:
    slices: list[Slice] = []
    used = 0
    for index, parameter in members:
        offset = 0
        while True:
            left = parameter.numel - offset
            room = capacity - used
            length = left if left <= room else room // SLICE_ALIGNMENT * SLICE_ALIGNMENT
            if len(slices) == MAX_BUCKET_SLICES or (left and not length):
                yield slices
                slices, used = [], 0
                continue
            slices.append(Slice(index, offset, length))
            used += length
            offset += length
            if offset == parameter.numel:
                break
    if slices:
        yield slices


def pack_present(present: Sequence[bool]) -> bytes:
    """The bitmap of `TensorBucket.present`: empty where all slices are present."""
    if all(present):
        return b""
    bits = bytearray((len(present) + 7) // 8)
    for index, here in enumerate(present):
        if here:
            bits[index // 8] |= 1 << index % 8
    return bytes(bits)


def unpack_present(bitmap: bytes, count: int) -> list[bool]:
    """Which of `count` slices `bitmap` says are present.

    Raises:
        ValueError: the bitmap has another length than `count` slices need, or marks none.
    """
    if not bitmap:
        return [True] * count
    if len(bitmap) != (count + 7) // 8:
        raise ValueError(f"a bitmap of {len(bitmap)} bytes does not fit {count} slices")
    present = [bool(bitmap[index // 8] >> index % 8 & 1) for index in range(count)]
    if not any(present):
        raise ValueError("a bucket without any slice must not be sent")
    return present


def encode_parameter(parameter: Parameter) -> tensor_pb2.ParameterSpec:
    """`parameter` as the schema writes it."""
    row_major = parameter.memory_order == tuple(range(len(parameter.shape)))
    return tensor_pb2.ParameterSpec(
        name=parameter.name,
        dtype=encode_dtype(parameter.dtype),
        shape=parameter.shape,
        memory_order=() if row_major else parameter.memory_order,
    )


def decode_parameter(spec: tensor_pb2.ParameterSpec) -> Parameter:
    """The parameter that `spec` describes.

    Raises:
        ValueError: its name, dtype, shape or memory order is not one.
    """
    shape = tuple(spec.shape)
    if len(spec.name.encode()) > MAX_NAME_BYTES:
        raise ValueError(f"a name of {len(spec.name.encode())} bytes; at most {MAX_NAME_BYTES} are possible")
    if len(shape) > MAX_PARAMETER_DIMS:
        raise ValueError(f"{len(shape)} dimensions; at most {MAX_PARAMETER_DIMS} are possible")
    order = tuple(spec.memory_order) or tuple(range(len(shape)))
    if sorted(order) != list(range(len(shape))):
        raise ValueError(f"memory order {order} is not a permutation of {len(shape)} dimensions")
    return Parameter(spec.name, decode_dtype(spec.dtype), shape, order)


def encode_bucket(bucket: Bucket) -> tensor_pb2.BucketSpec:
    """`bucket` as the schema writes it."""
    return tensor_pb2.BucketSpec(
        bucket_id=bucket.bucket_id,
        group=bucket.group,
        dtype=encode_dtype(bucket.dtype),
        slices=[
            tensor_pb2.BucketSlice(parameter=piece.parameter, offset=piece.offset, length=piece.length)
            for piece in bucket.slices
        ],
    )


def decode_bucket(spec: tensor_pb2.BucketSpec) -> Bucket:
    """The bucket that `spec` describes.

    Raises:
        ValueError: its dtype is not one.
    """
    slices = tuple(Slice(piece.parameter, piece.offset, piece.length) for piece in spec.slices)
    return Bucket(spec.bucket_id, spec.group, decode_dtype(spec.dtype), slices)


def first_difference(job: Sequence[tuple[int, Parameter]], worker: Sequence[tuple[int, Parameter]]) -> str | None:
    """Names the first parameter of a worker that is not the job's, and how it differs; None where all agree.

    Memory orders may differ, elements travel in the job's order. Names count only where both sides have one.
    """
    for (index, theirs), (_, ours) in zip(job, worker, strict=False):
        title = theirs.title(index)
        if theirs.name and ours.name and theirs.name != ours.name:
            return f"{title}: the worker's is named {ours.name}"
        if theirs.shape != ours.shape:
            return f"{title}: the job's shape is {list(theirs.shape)}, the worker's {list(ours.shape)}"
        if theirs.dtype != ours.dtype:
            return f"{title}: the job's dtype is {theirs.dtype}, the worker's {ours.dtype}"
    if len(job) != len(worker):
        longer = job if len(job) > len(worker) else worker
        index, extra = longer[min(len(job), len(worker))]
        whose = "the job" if longer is job else "the worker"
        return f"{extra.title(index)} of shape {list(extra.shape)} is only {whose}'s"
    return None
