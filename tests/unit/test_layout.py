"""How parameters are described and cut into buckets."""

from __future__ import annotations

import dataclasses
import math
from itertools import pairwise
from typing import Final

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optimd.v1 import tensor_pb2
from optimd.wire.kinds import GRADIENT, PARAMETER
from optimd.wire.layout import (
    Bucket,
    Parameter,
    Slice,
    cut_buckets,
    decode_bucket,
    decode_parameter,
    encode_bucket,
    encode_parameter,
    first_difference,
    is_master_of,
    pack_bucket_ids,
    pack_present,
    unpack_bucket_ids,
    unpack_present,
)
from optimd.wire.limits import (
    DEFAULT_BUCKET_BYTES,
    MAX_BUCKET_BYTES,
    MAX_BUCKET_SLICES,
    MAX_PARAMETER_DIMS,
    MIN_BUCKET_BYTES,
    SLICE_ALIGNMENT,
)

DTYPES: Final = (
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.complex64,
    torch.complex128,
)

several = settings(max_examples=80, deadline=None)

shapes: Final = st.one_of(
    st.just(()),
    st.tuples(st.integers(0, 5000)),
    st.lists(st.integers(0, 20), min_size=2, max_size=3).map(tuple),
)


def parameter(*shape: int, name: str = "", dtype: torch.dtype = torch.float32) -> Parameter:
    """A row-major parameter."""
    return Parameter(name, dtype, shape, tuple(range(len(shape))))


@st.composite
def parameters(draw: st.DrawFn) -> Parameter:
    """A parameter of any shape, dtype and memory order, with any master dtype that it can have or none."""
    shape = draw(shapes)
    order = tuple(draw(st.permutations(range(len(shape)))))
    dtype = draw(st.sampled_from(DTYPES))
    master_dtype = draw(st.sampled_from([None, *(other for other in DTYPES if is_master_of(other, dtype))]))
    return Parameter(draw(st.text(max_size=5)), dtype, shape, order, master_dtype)


class Cut:
    """A random cut: its parameters by index, what it was asked for, and its buckets."""

    def __init__(self, members: dict[int, Parameter], group: int, first_id: int, bucket_bytes: int) -> None:
        self.members = members
        self.group = group
        self.first_id = first_id
        self.bucket_bytes = bucket_bytes
        self.buckets = cut_buckets(members.items(), group=group, first_id=first_id, bucket_bytes=bucket_bytes)


cuts: Final = st.builds(
    lambda items, first, group, first_id, bucket_bytes: Cut(
        dict(enumerate(items, first)), group, first_id, bucket_bytes
    ),
    st.lists(parameters(), max_size=30),
    st.integers(0, 100),
    st.integers(0, 5),
    st.integers(0, 1000),
    st.one_of(st.integers(MIN_BUCKET_BYTES, 20_000), st.just(DEFAULT_BUCKET_BYTES)),
)


@several
@given(cut=cuts)
def test_every_element_is_in_exactly_one_slice_and_in_order(cut: Cut) -> None:
    """The slices of a parameter, read in order of bucket, are its elements from the first to the last."""
    covered: dict[int, int] = {}
    for bucket in cut.buckets:
        for piece in bucket.slices:
            assert piece.offset == covered.get(piece.parameter, 0)
            covered[piece.parameter] = piece.end
    assert covered == {index: item.numel for index, item in cut.members.items()}


@several
@given(cut=cuts)
def test_slices_start_at_multiples_of_the_alignment(cut: Cut) -> None:
    """Cut anywhere else, torch's vectorised kernels and their tails would give other bits."""
    assert all(piece.offset % SLICE_ALIGNMENT == 0 for bucket in cut.buckets for piece in bucket.slices)


@several
@given(cut=cuts)
def test_no_payload_is_larger_than_asked_for(cut: Cut) -> None:
    """`bucket_bytes` bounds every bucket, in the bytes of the widest dtype that it travels in."""
    for bucket in cut.buckets:
        present = [True] * len(bucket.slices)
        assert bucket.nbytes == sum(piece.length for piece in bucket.slices) * bucket.dtype.itemsize
        assert bucket.payload_bytes(PARAMETER, present) == bucket.payload_bytes(GRADIENT, present) == bucket.nbytes
        assert bucket.nbytes <= bucket.payload_bytes("exp_avg", present) <= cut.bucket_bytes


@several
@given(cut=cuts)
def test_a_bucket_has_one_dtype_and_the_group_asked_for(cut: Cut) -> None:
    """An update of a bucket is one call with one group's options."""
    for bucket in cut.buckets:
        assert bucket.group == cut.group
        members = [cut.members[piece.parameter] for piece in bucket.slices]
        assert {(item.dtype, item.master_dtype) for item in members} == {(bucket.dtype, bucket.master_dtype)}


@several
@given(cut=cuts)
def test_bucket_ids_count_up_from_the_first(cut: Cut) -> None:
    """A bucket's id is its place in the job's table."""
    assert [bucket.bucket_id for bucket in cut.buckets] == list(range(cut.first_id, cut.first_id + len(cut.buckets)))


@several
@given(cut=cuts)
def test_only_empty_parameters_get_an_empty_slice_and_they_get_one(cut: Cut) -> None:
    """A parameter without elements has a step counter like any other."""
    empty = [piece for bucket in cut.buckets for piece in bucket.slices if not piece.length]
    assert sorted(piece.parameter for piece in empty) == [i for i, item in cut.members.items() if not item.numel]


@several
@given(cut=cuts)
def test_slices_follow_the_order_of_the_parameters_within_a_dtype(cut: Cut) -> None:
    """Reading a bucket touches its parameters one after another."""
    for dtypes in {(bucket.dtype, bucket.master_dtype) for bucket in cut.buckets}:
        buckets = [bucket for bucket in cut.buckets if (bucket.dtype, bucket.master_dtype) == dtypes]
        order = [piece.parameter for bucket in buckets for piece in bucket.slices]
        assert order == sorted(order)


@several
@given(cut=cuts)
def test_a_bucket_is_closed_only_when_nothing_more_fits(cut: Cut) -> None:
    """No more buckets than alignment makes necessary."""
    for before, after in pairwise(cut.buckets):
        if (before.dtype, before.master_dtype) == (after.dtype, after.master_dtype):
            room = cut.bucket_bytes // before.server_dtype.itemsize - sum(piece.length for piece in before.slices)
            assert room < min(after.slices[0].length, SLICE_ALIGNMENT)


def test_a_large_tensor_is_split_into_full_buckets() -> None:
    """10 MiB of float32 in buckets of 1 MiB are ten slices."""
    buckets = cut_buckets([(4, parameter(10, 512, 512))], group=2, first_id=7, bucket_bytes=1024 * 1024)
    assert [bucket.slices for bucket in buckets] == [(Slice(4, i * 262_144, 262_144),) for i in range(10)]
    assert [bucket.bucket_id for bucket in buckets] == list(range(7, 17))


def test_hundreds_of_tiny_parameters_share_one_bucket() -> None:
    """Biases and scales do not cost a message each."""
    buckets = cut_buckets([(i, parameter(3)) for i in range(500)], group=0, first_id=0, bucket_bytes=8192)
    assert [bucket.slices for bucket in buckets] == [tuple(Slice(i, 0, 3) for i in range(500))]


def test_a_parameter_fills_what_the_one_before_it_left() -> None:
    """The rest of a bucket is used down to the alignment: of 156 elements left, 128 are taken."""
    members = [(0, parameter(100)), (1, parameter(500))]
    buckets = cut_buckets(members, group=0, first_id=0, bucket_bytes=1024)
    assert [bucket.slices for bucket in buckets] == [
        (Slice(0, 0, 100), Slice(1, 0, 128)),
        (Slice(1, 128, 256),),
        (Slice(1, 384, 116),),
    ]


def test_a_parameter_that_fits_exactly_is_not_split() -> None:
    """The boundary itself belongs to the bucket, and an empty parameter still fits into a full one."""
    members = [(0, parameter(100)), (1, parameter(156)), (2, parameter(0)), (3, parameter())]
    buckets = cut_buckets(members, group=0, first_id=0, bucket_bytes=1024)
    assert [bucket.slices for bucket in buckets] == [
        (Slice(0, 0, 100), Slice(1, 0, 156), Slice(2, 0, 0)),
        (Slice(3, 0, 1),),
    ]


def test_dtypes_are_cut_one_after_another() -> None:
    """Parameters of other dtypes between them do not part those of one dtype."""
    half = torch.bfloat16
    members = [(0, parameter(8)), (1, parameter(8, dtype=half)), (2, parameter(8)), (3, parameter(8, dtype=half))]
    buckets = cut_buckets(members, group=0, first_id=0, bucket_bytes=1024)
    assert [(bucket.dtype, [piece.parameter for piece in bucket.slices]) for bucket in buckets] == [
        (torch.float32, [0, 2]),
        (half, [1, 3]),
    ]


def test_buckets_with_a_master_dtype_are_sized_by_it_and_kept_apart() -> None:
    """State travels in it; what has none shares no bucket with what has one."""
    half, wide = torch.bfloat16, torch.float32
    members = [
        (0, Parameter("", half, (300,), (0,), wide)),
        (1, parameter(300, dtype=half)),
        (2, Parameter("", half, (20,), (0,), wide)),
    ]
    buckets = cut_buckets(members, group=0, first_id=0, bucket_bytes=1024)
    assert [(bucket.master_dtype, bucket.slices) for bucket in buckets] == [
        (wide, (Slice(0, 0, 256),)),
        (wide, (Slice(0, 256, 44), Slice(2, 0, 20))),
        (None, (Slice(1, 0, 300),)),
    ]


@pytest.mark.parametrize("size", [0, 1])
def test_no_bucket_has_more_slices_than_its_bitmap_allows(size: int) -> None:
    """The number of slices is bounded apart from the bytes, for empty parameters too."""
    members = [(i, parameter(size)) for i in range(2 * MAX_BUCKET_SLICES + 1)]
    buckets = cut_buckets(members, group=0, first_id=0, bucket_bytes=MAX_BUCKET_BYTES)
    assert [len(bucket.slices) for bucket in buckets] == [MAX_BUCKET_SLICES, MAX_BUCKET_SLICES, 1]


def test_the_smallest_buckets_hold_the_widest_dtype() -> None:
    """Even complex128 in buckets of the minimal size moves on by one alignment a bucket."""
    members = [(0, parameter(65, dtype=torch.complex128))]
    buckets = cut_buckets(members, group=0, first_id=0, bucket_bytes=MIN_BUCKET_BYTES)
    assert [bucket.slices for bucket in buckets] == [(Slice(0, 0, 64),), (Slice(0, 64, 1),)]


def test_no_parameters_make_no_buckets() -> None:
    """A param group may be empty."""
    assert cut_buckets([], group=0, first_id=0, bucket_bytes=MIN_BUCKET_BYTES) == []


def test_the_payload_of_some_slices_counts_only_theirs() -> None:
    """Absent slices take no room."""
    bucket = Bucket(0, 0, torch.float64, (Slice(0, 0, 5), Slice(1, 0, 7), Slice(2, 0, 0)))
    assert bucket.nbytes == 96
    assert bucket.payload_bytes(PARAMETER, [True, False, True]) == 40
    assert bucket.payload_bytes(PARAMETER, [True, True, True]) == 96


def test_values_and_gradients_travel_narrow_and_state_travels_wide() -> None:
    """Of a parameter and of its bucket."""
    item = Parameter("", torch.float16, (12,), (0,), torch.float64)
    (bucket,) = cut_buckets([(0, item)], group=0, first_id=0, bucket_bytes=1024)
    for thing in (item, bucket):
        assert thing.server_dtype is torch.float64
        assert [thing.dtype_of(kind) for kind in (PARAMETER, GRADIENT, "exp_avg_sq")] == [
            torch.float16,
            torch.float16,
            torch.float64,
        ]
    assert (bucket.payload_bytes(GRADIENT, [True]), bucket.payload_bytes("exp_avg", [True])) == (24, 96)


@several
@given(present=st.lists(st.booleans(), min_size=1, max_size=70).filter(any))
def test_bitmaps_come_back(present: list[bool]) -> None:
    """What is packed is unpacked, whatever the number of slices."""
    assert unpack_present(pack_present(present), len(present)) == present


@pytest.mark.parametrize(
    ("present", "bitmap"),
    [
        ([True] * 20, b""),
        ([True, False], b"\x01"),
        ([False, True], b"\x02"),
        ([False] * 8 + [True], b"\x00\x01"),
        ([True, False, False, False, False, False, False, True, True, True], b"\x81\x03"),
    ],
)
def test_bitmaps_are_least_significant_bit_first(present: list[bool], bitmap: bytes) -> None:
    """Bit i % 8 of byte i / 8 stands for slice i, and all present is empty."""
    assert pack_present(present) == bitmap
    assert unpack_present(bitmap, len(present)) == present


@pytest.mark.parametrize(("bitmap", "count"), [(b"\x01", 9), (b"\x01\x00", 8), (b"\x01\x00\x00", 9)])
def test_a_bitmap_of_another_length_is_refused(bitmap: bytes, count: int) -> None:
    """A bitmap has a bit for each slice, and no byte more."""
    with pytest.raises(ValueError, match=f"{len(bitmap)} bytes does not fit {count} slices"):
        unpack_present(bitmap, count)


@pytest.mark.parametrize(("bitmap", "count"), [(b"\x00", 3), (b"\x08", 3), (b"\x00\xfe", 9)])
def test_a_bitmap_that_marks_no_slice_is_refused(bitmap: bytes, count: int) -> None:
    """A bucket without any slice must not be sent; bits behind the last slice do not count."""
    with pytest.raises(ValueError, match="without any slice"):
        unpack_present(bitmap, count)


@several
@given(item=parameters())
def test_parameters_come_back_from_the_wire(item: Parameter) -> None:
    """Name, dtype, shape and memory order survive serialisation."""
    spec = tensor_pb2.ParameterSpec.FromString(encode_parameter(item).SerializeToString())
    assert decode_parameter(spec) == item


def test_a_row_major_order_is_left_out() -> None:
    """The usual order costs no bytes."""
    assert not encode_parameter(parameter(2, 3, 4)).memory_order
    assert list(encode_parameter(Parameter("", torch.float32, (2, 3), (1, 0))).memory_order) == [1, 0]


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.uint8, torch.float8_e4m3fn])
def test_a_dtype_that_is_not_carried_is_refused(dtype: torch.dtype) -> None:
    """The error lists what is carried."""
    with pytest.raises(ValueError, match=r"not carried; use one of torch\.float64"):
        encode_parameter(parameter(3, dtype=dtype))


@pytest.mark.parametrize("number", [tensor_pb2.DTYPE_UNSPECIFIED, 77])
def test_a_dtype_that_is_not_known_is_refused(number: tensor_pb2.Dtype) -> None:
    """A number from a newer peer, or none at all, is an error, of parameters and of buckets."""
    with pytest.raises(ValueError, match=f"unknown dtype {number}"):
        decode_parameter(tensor_pb2.ParameterSpec(dtype=number, shape=[3]))
    with pytest.raises(ValueError, match=f"unknown dtype {number}"):
        decode_bucket(tensor_pb2.BucketSpec(dtype=number))


@pytest.mark.parametrize(
    ("shape", "order"),
    [((2, 3), (0, 0)), ((2, 3), (0, 2)), ((2, 3), (1, 2)), ((2, 3), (0,)), ((2,), (0, 1)), ((), (0,))],
)
def test_a_memory_order_that_is_no_permutation_is_refused(shape: tuple[int, ...], order: tuple[int, ...]) -> None:
    """Each dimension appears once."""
    spec = tensor_pb2.ParameterSpec(dtype=tensor_pb2.DTYPE_FLOAT32, shape=shape, memory_order=order)
    with pytest.raises(ValueError, match=f"not a permutation of {len(shape)} dimensions"):
        decode_parameter(spec)


def test_more_dimensions_than_torch_has_are_refused() -> None:
    """64 are possible, 65 are not."""
    most = tensor_pb2.ParameterSpec(dtype=tensor_pb2.DTYPE_FLOAT32, shape=[1] * MAX_PARAMETER_DIMS)
    assert decode_parameter(most).numel == 1
    most.shape.append(1)
    with pytest.raises(ValueError, match="65 dimensions"):
        decode_parameter(most)


@pytest.mark.parametrize(
    ("dtype", "master_dtype"),
    [
        (tensor_pb2.DTYPE_FLOAT32, tensor_pb2.DTYPE_FLOAT32),
        (tensor_pb2.DTYPE_FLOAT32, tensor_pb2.DTYPE_BFLOAT16),
        (tensor_pb2.DTYPE_FLOAT16, tensor_pb2.DTYPE_BFLOAT16),
        (tensor_pb2.DTYPE_COMPLEX64, tensor_pb2.DTYPE_COMPLEX128),
        (tensor_pb2.DTYPE_COMPLEX64, tensor_pb2.DTYPE_FLOAT64),
        (tensor_pb2.DTYPE_FLOAT32, tensor_pb2.DTYPE_COMPLEX128),
    ],
)
def test_a_master_dtype_that_is_not_a_wider_real_one_is_refused(
    dtype: tensor_pb2.Dtype, master_dtype: tensor_pb2.Dtype
) -> None:
    """Of parameters and of buckets."""
    with pytest.raises(ValueError, match="not a wider real floating-point type"):
        decode_parameter(tensor_pb2.ParameterSpec(dtype=dtype, master_dtype=master_dtype))
    with pytest.raises(ValueError, match="not a wider real floating-point type"):
        decode_bucket(tensor_pb2.BucketSpec(dtype=dtype, master_dtype=master_dtype))


@several
@given(cut=cuts)
def test_buckets_come_back_from_the_wire(cut: Cut) -> None:
    """A worker cuts its tensors by the table that it was sent."""
    for bucket in cut.buckets:
        spec = tensor_pb2.BucketSpec.FromString(encode_bucket(bucket).SerializeToString())
        assert decode_bucket(spec) == bucket


@several
@given(item=parameters())
def test_sizes_are_those_of_a_torch_tensor(item: Parameter) -> None:
    """`numel` and `nbytes` are torch's, of what the server keeps."""
    tensor = torch.empty(item.shape, dtype=item.server_dtype)
    assert (item.numel, item.nbytes) == (tensor.numel(), tensor.nbytes)
    assert item.numel == math.prod(item.shape)


@several
@given(items=st.lists(parameters(), max_size=6))
def test_equal_layouts_do_not_differ(items: list[Parameter]) -> None:
    """Neither memory orders nor names that one side lacks make a difference."""
    job = list(enumerate(items))
    worker = [
        (index, dataclasses.replace(item, name="", memory_order=tuple(reversed(item.memory_order))))
        for index, item in job
    ]
    assert first_difference(job, job) is None
    assert first_difference(job, worker) is None
    assert first_difference(worker, job) is None


JOB: Final = [(5, parameter(2, 3, name="w")), (6, parameter(3, name="b")), (7, parameter(name="scale"))]


@pytest.mark.parametrize(
    ("worker", "message"),
    [
        pytest.param(
            [JOB[0], (6, parameter(3, name="bias")), JOB[2]],
            "parameter 6 (b): the worker's is named bias",
            id="name",
        ),
        pytest.param(
            [(5, parameter(3, 2, name="w")), JOB[1], (7, parameter(1, name="scale"))],
            "parameter 5 (w): the job's shape is [2, 3], the worker's [3, 2]",
            id="shape, the first of two",
        ),
        pytest.param(
            [JOB[0], JOB[1], (7, parameter(1, name="scale"))],
            "parameter 7 (scale): the job's shape is [], the worker's [1]",
            id="0-dim is not one element",
        ),
        pytest.param(
            [JOB[0], (6, parameter(3, name="b", dtype=torch.float64)), JOB[2]],
            "parameter 6 (b): the job's dtype is torch.float32, the worker's torch.float64",
            id="dtype",
        ),
        pytest.param(
            [JOB[0], (6, Parameter("b", torch.float32, (3,), (0,), torch.float64)), JOB[2]],
            "parameter 6 (b): the job keeps its torch.float32 in torch.float32, the worker asks for torch.float64 "
            "(ProxyOptions.master_dtype)",
            id="master dtype",
        ),
        pytest.param(JOB[:2], "parameter 7 (scale) of shape [] is only the job's", id="too few"),
        pytest.param(
            [*JOB, (8, parameter(4, 4))], "parameter 8 of shape [4, 4] is only the worker's", id="too many, unnamed"
        ),
        pytest.param([], "parameter 5 (w) of shape [2, 3] is only the job's", id="none"),
    ],
)
def test_the_first_parameter_that_differs_is_named(worker: list[tuple[int, Parameter]], message: str) -> None:
    """A worker that does not match is told where and how."""
    assert first_difference(JOB, worker) == message


@several
@given(bucket_ids=st.frozensets(st.integers(0, 90)))
def test_bitmaps_of_buckets_come_back(bucket_ids: frozenset[int]) -> None:
    """As short as they can be, and empty where there are none."""
    bitmap = pack_bucket_ids(bucket_ids)
    assert unpack_bucket_ids(bitmap, 91) == bucket_ids
    assert not bitmap.endswith(b"\x00")


@pytest.mark.parametrize(
    ("bucket_ids", "bitmap"), [(set(), b""), ({0}, b"\x01"), ({1, 8}, b"\x02\x01"), ({7, 15}, b"\x80\x80")]
)
def test_bitmaps_of_buckets_are_least_significant_bit_first(bucket_ids: set[int], bitmap: bytes) -> None:
    """Bit i % 8 of byte i / 8 stands for bucket i. Bytes of zeros behind them say nothing."""
    assert pack_bucket_ids(bucket_ids) == bitmap
    assert unpack_bucket_ids(bitmap + bytes(3), 16) == bucket_ids


def test_a_bitmap_that_marks_a_bucket_that_there_is_not_is_refused() -> None:
    """By its number."""
    with pytest.raises(ValueError, match="bucket 9 is marked, and there are 9"):
        unpack_bucket_ids(b"\x01\x02", 9)
