"""What a job's parameters are and how they are cut into buckets.

A bucket is a list of (parameter, offset, length) slices of one group and one dtype: the unit of a message and of an
update. The cut is the server's to make; its table travels to the workers, which need not know how it was made.

A parameter may have a master dtype: a wider one in which the server keeps its value and its state, and in which its
state travels. Values and gradients travel in the worker's own dtype; in the course of steps they may be narrowed (see
`encodings`).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Final

import torch

from optimd.v1 import tensor_pb2
from optimd.wire.dtypes import decode_dtype, encode_dtype
from optimd.wire.encodings import EXACT, Encoding
from optimd.wire.kinds import GRADIENT, PARAMETER
from optimd.wire.limits import MAX_BUCKET_SLICES, MAX_NAME_BYTES, MAX_PARAMETER_DIMS, SLICE_ALIGNMENT

_IN_OWN_DTYPE: Final = frozenset({PARAMETER, GRADIENT})


@dataclass(frozen=True, slots=True)
class Parameter:
    """What all workers of a job agree on about one parameter."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    memory_order: tuple[int, ...]
    master_dtype: torch.dtype | None = None
    """What the server keeps it in, where that is wider than `dtype`."""

    @property
    def server_dtype(self) -> torch.dtype:
        """What the server keeps its value and its state in."""
        return self.master_dtype or self.dtype

    @property
    def numel(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """The number of bytes that its value takes on the server."""
        return self.numel * self.server_dtype.itemsize

    def dtype_of(self, kind: str) -> torch.dtype:
        """What its tensor `kind` travels in: its value and its gradient in its own dtype, state in the server's."""
        return self.dtype if kind in _IN_OWN_DTYPE else self.server_dtype

    def holds_like(self, other: Parameter) -> bool:
        """Whether its elements, on the server, are as many, as wide and in the same order as another's."""
        mine = (self.server_dtype, self.shape, self.memory_order)
        return mine == (other.server_dtype, other.shape, other.memory_order)

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
    master_dtype: torch.dtype | None = None
    """That of its parameters."""

    @property
    def server_dtype(self) -> torch.dtype:
        """What the server keeps its parameters' values and state in."""
        return self.master_dtype or self.dtype

    @property
    def nbytes(self) -> int:
        """The size of the payload that carries all of its values."""
        return sum(piece.length for piece in self.slices) * self.dtype.itemsize

    def dtype_of(self, kind: str) -> torch.dtype:
        """What its parameters' tensors `kind` travel in, as `Parameter.dtype_of`."""
        return self.dtype if kind in _IN_OWN_DTYPE else self.server_dtype

    def payload_bytes(self, kind: str, present: Sequence[bool], encoding: Encoding = EXACT) -> int:
        """The size of the payload that carries the tensors `kind` of its present slices in an encoding."""
        dtype = self.dtype_of(kind)
        lengths = (piece.length for piece, here in zip(self.slices, present, strict=True) if here)
        if encoding.is_elementwise:
            return encoding.payload_bytes(sum(lengths), dtype)
        return sum(encoding.payload_bytes(length, dtype) for length in lengths if length)


def is_master_of(master_dtype: torch.dtype, dtype: torch.dtype) -> bool:
    """Whether a server can keep parameters of `dtype` in `master_dtype`: both real floating types, the master wider."""
    return dtype.is_floating_point and master_dtype.is_floating_point and master_dtype.itemsize > dtype.itemsize


def cut_buckets(
    parameters: Iterable[tuple[int, Parameter]], *, group: int, first_id: int, bucket_bytes: int
) -> list[Bucket]:
    """Cuts the parameters of one group into buckets.

    Slices follow the order of the parameters, those of one dtype and master dtype together. A parameter larger than
    what is left of a bucket is split at a multiple of `SLICE_ALIGNMENT` elements from its own start; small ones share a
    bucket. A parameter without elements gets one slice of length 0: it has a step counter like any other.

    Args:
        parameters: The group's parameters with their indices.
        group: The group's index.
        first_id: The id of the first bucket.
        bucket_bytes: The largest payload, of whichever kind of tensor; at least `MIN_BUCKET_BYTES`.
    """
    by_dtype: dict[tuple[torch.dtype, torch.dtype | None], list[tuple[int, Parameter]]] = {}
    for index, parameter in parameters:
        by_dtype.setdefault((parameter.dtype, parameter.master_dtype), []).append((index, parameter))
    buckets: list[Bucket] = []
    for (dtype, master_dtype), members in by_dtype.items():
        capacity = bucket_bytes // (master_dtype or dtype).itemsize
        for slices in _fill(members, capacity):
            buckets.append(Bucket(first_id + len(buckets), group, dtype, tuple(slices), master_dtype))
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


def pack_bits(bits: Sequence[bool]) -> bytes:
    """A bitmap: bit i is bit i % 8, from the least significant, of byte i / 8."""
    packed = bytearray((len(bits) + 7) // 8)
    for index, bit in enumerate(bits):
        if bit:
            packed[index // 8] |= 1 << index % 8
    return bytes(packed)


def unpack_bits(bitmap: bytes, count: int) -> list[bool]:
    """The first `count` bits of a bitmap that has as many."""
    return [bool(bitmap[index // 8] >> index % 8 & 1) for index in range(count)]


def pack_present(present: Sequence[bool]) -> bytes:
    """The bitmap of `TensorBucket.present`: empty where all slices are present."""
    return b"" if all(present) else pack_bits(present)


def unpack_present(bitmap: bytes, count: int) -> list[bool]:
    """Which of `count` slices `bitmap` says are present.

    Raises:
        ValueError: the bitmap has another length than `count` slices need, or marks none.
    """
    if not bitmap:
        return [True] * count
    if len(bitmap) != (count + 7) // 8:
        raise ValueError(f"a bitmap of {len(bitmap)} bytes does not fit {count} slices")
    present = unpack_bits(bitmap, count)
    if not any(present):
        raise ValueError("a bucket without any slice must not be sent")
    return present


def pack_bucket_ids(bucket_ids: Collection[int]) -> bytes:
    """The bitmap of `JobReady.held_buckets`: empty where there are none."""
    held = frozenset(bucket_ids)
    return pack_bits([bucket_id in held for bucket_id in range(max(held, default=-1) + 1)])


def unpack_bucket_ids(bitmap: bytes, count: int) -> frozenset[int]:
    """The buckets that `bitmap` stands for, of `count` that there are.

    Raises:
        ValueError: it marks one that there is not.
    """
    bucket_ids = frozenset(index for index, held in enumerate(unpack_bits(bitmap, 8 * len(bitmap))) if held)
    if max(bucket_ids, default=-1) >= count:
        raise ValueError(f"bucket {max(bucket_ids)} is marked, and there are {count}")
    return bucket_ids


def encode_parameter(parameter: Parameter) -> tensor_pb2.ParameterSpec:
    """`parameter` as the schema writes it."""
    row_major = parameter.memory_order == tuple(range(len(parameter.shape)))
    return tensor_pb2.ParameterSpec(
        name=parameter.name,
        dtype=encode_dtype(parameter.dtype),
        shape=parameter.shape,
        memory_order=() if row_major else parameter.memory_order,
        master_dtype=_encode_master(parameter.master_dtype),
    )


def decode_parameter(spec: tensor_pb2.ParameterSpec) -> Parameter:
    """The parameter that `spec` describes.

    Raises:
        ValueError: its name, dtype, shape, memory order or master dtype is not one.
    """
    shape = tuple(spec.shape)
    if len(spec.name.encode()) > MAX_NAME_BYTES:
        raise ValueError(f"a name of {len(spec.name.encode())} bytes; at most {MAX_NAME_BYTES} are possible")
    if len(shape) > MAX_PARAMETER_DIMS:
        raise ValueError(f"{len(shape)} dimensions; at most {MAX_PARAMETER_DIMS} are possible")
    order = tuple(spec.memory_order) or tuple(range(len(shape)))
    if sorted(order) != list(range(len(shape))):
        raise ValueError(f"memory order {order} is not a permutation of {len(shape)} dimensions")
    dtype = decode_dtype(spec.dtype)
    return Parameter(spec.name, dtype, shape, order, _decode_master(spec.master_dtype, dtype))


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
        master_dtype=_encode_master(bucket.master_dtype),
    )


def decode_bucket(spec: tensor_pb2.BucketSpec) -> Bucket:
    """The bucket that `spec` describes.

    Raises:
        ValueError: its dtype or its master dtype is not one.
    """
    dtype = decode_dtype(spec.dtype)
    slices = tuple(Slice(piece.parameter, piece.offset, piece.length) for piece in spec.slices)
    return Bucket(spec.bucket_id, spec.group, dtype, slices, _decode_master(spec.master_dtype, dtype))


def _encode_master(master_dtype: torch.dtype | None) -> tensor_pb2.Dtype:
    return tensor_pb2.DTYPE_UNSPECIFIED if master_dtype is None else encode_dtype(master_dtype)


def _decode_master(number: int, dtype: torch.dtype) -> torch.dtype | None:
    if number == tensor_pb2.DTYPE_UNSPECIFIED:
        return None
    master_dtype = decode_dtype(number)
    if not is_master_of(master_dtype, dtype):
        raise ValueError(f"{master_dtype} is not a wider real floating-point type than {dtype}")
    return master_dtype


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
        if theirs.server_dtype != ours.server_dtype:
            return (
                f"{title}: the job keeps its {theirs.dtype} in {theirs.server_dtype}, the worker asks for "
                f"{ours.server_dtype} (ProxyOptions.master_dtype)"
            )
    if len(job) != len(worker):
        longer = job if len(job) > len(worker) else worker
        index, extra = longer[min(len(job), len(worker))]
        whose = "the job" if longer is job else "the worker"
        return f"{extra.title(index)} of shape {list(extra.shape)} is only {whose}'s"
    return None
