"""Buffers as one run of bytes, and who is asked for fresh ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optimd.server.aggregation import Worker
from optimd.server.buffers import REFRESH_INTERVAL_S, BufferRefresh
from optimd.v1 import tensor_pb2
from optimd.wire.buffers import Buffer, BufferValues, decode_buffer, encode_buffer, first_buffer_difference
from optimd.wire.dtypes import decode_buffer_dtype, decode_dtype, encode_buffer_dtype, encode_dtype

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.complex64, torch.complex128)
OTHERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)

shapes = st.lists(st.integers(0, 4), max_size=3).map(tuple)
several = st.lists(st.tuples(st.sampled_from(FLOATS + OTHERS), shapes), max_size=6).map(
    lambda kinds: [Buffer(f"b{index}", dtype, shape) for index, (dtype, shape) in enumerate(kinds)]
)


def filled(buffers: list[Buffer], seed: int) -> BufferValues:
    values = BufferValues(buffers)
    generator = torch.Generator().manual_seed(seed)
    for tensor in values.tensors.values():
        tensor.copy_(torch.randint(0, 2, tensor.shape, generator=generator))
    return values


@settings(max_examples=100, deadline=None)
@given(several, st.integers(1, 70), st.integers(0, 1000))
def test_what_is_cut_into_chunks_is_put_together_again(buffers: list[Buffer], chunk_bytes: int, seed: int) -> None:
    """Any dtypes and shapes, cut anywhere; the chunks are the tensors' bytes one after another."""
    ours, theirs = filled(buffers, seed), filled(buffers, seed + 1)
    run = bytearray()
    for offset, parts in ours.chunks(chunk_bytes):
        payload = b"".join(parts)
        assert offset == len(run)
        assert 0 < len(payload) <= chunk_bytes
        run += payload
        theirs.write(offset, memoryview(payload))
    expected = b"".join(bytes(tensor.reshape(-1).view(torch.uint8).tolist()) for tensor in ours.tensors.values())
    assert run == expected
    assert len(run) == ours.nbytes == sum(buffer.nbytes for buffer in buffers)
    for buffer in buffers:
        tensor = theirs.tensors[buffer.name]
        assert (tensor.dtype, tuple(tensor.shape)) == (buffer.dtype, buffer.shape)
        assert torch.equal(tensor, ours.tensors[buffer.name])


def test_a_chunk_past_the_end_or_with_a_bool_that_is_none_is_refused() -> None:
    """A neighbour may have any byte."""
    values = BufferValues([Buffer("flags", torch.bool, (2,)), Buffer("bytes", torch.uint8, (2,))])
    values.write(0, memoryview(bytes([1, 0, 9, 255])))
    with pytest.raises(ValueError, match="it ends at byte 5, the buffers have 4"):
        values.write(3, memoryview(bytes(2)))
    with pytest.raises(ValueError, match="buffer 'flags' is of bools"):
        values.write(1, memoryview(bytes([2, 0])))
    assert values.tensors["bytes"].tolist() == [9, 255]


@pytest.mark.parametrize("dtype", FLOATS + OTHERS, ids=str)
def test_every_dtype_of_the_schema_is_one_of_buffers_and_only_torchs_trained_ones_of_parameters(
    dtype: torch.dtype,
) -> None:
    """Encoded and decoded."""
    number = encode_buffer_dtype(dtype)
    assert tensor_pb2.Dtype.Name(number) == f"DTYPE_{str(dtype).removeprefix('torch.').upper()}"
    assert decode_buffer_dtype(number) == dtype
    if dtype in FLOATS:
        assert decode_dtype(encode_dtype(dtype)) == dtype
    else:
        with pytest.raises(ValueError, match="is not carried"):
            encode_dtype(dtype)
        with pytest.raises(ValueError, match="unknown dtype"):
            decode_dtype(number)


def test_the_schema_has_no_dtype_that_buffers_do_not_carry() -> None:
    """But for the one that is never valid."""
    assert {*tensor_pb2.Dtype.values()} == {0, *map(encode_buffer_dtype, FLOATS + OTHERS)}


@given(st.sampled_from(FLOATS + OTHERS), shapes, st.text(st.characters(codec="utf-8"), min_size=1, max_size=20))
def test_a_description_survives_the_wire(dtype: torch.dtype, shape: tuple[int, ...], name: str) -> None:
    """Name, dtype, shape."""
    buffer = Buffer(name, dtype, shape)
    assert decode_buffer(tensor_pb2.BufferSpec.FromString(encode_buffer(buffer).SerializeToString())) == buffer


@pytest.mark.parametrize(
    ("worker", "difference"),
    [
        ([Buffer("a", torch.bool, (2,))], "buffer 'b' of shape [] is only the job's"),
        (
            [Buffer("a", torch.bool, (2,)), Buffer("b", torch.int64, ()), Buffer("c", torch.int64, (1,))],
            "buffer 'c' of shape [1] is only the worker's",
        ),
        ([Buffer("b", torch.int64, ())], "buffer 'a': the worker's is named 'b'"),
        ([Buffer("a", torch.bool, (3,))], "buffer 'a': the job's shape is [2], the worker's [3]"),
        ([Buffer("a", torch.int8, (2,))], "buffer 'a': the job's dtype is torch.bool, the worker's torch.int8"),
        ([Buffer("a", torch.bool, (2,)), Buffer("b", torch.int64, ())], None),
    ],
)
def test_the_first_difference_is_named(worker: list[Buffer], difference: str | None) -> None:
    """Names, shapes, dtypes, numbers."""
    assert first_buffer_difference([Buffer("a", torch.bool, (2,)), Buffer("b", torch.int64, ())], worker) == difference


class Asking:
    """A refresh whose time is told, and two workers."""

    low, high = Worker(0, "low"), Worker(5, "high")

    def __init__(self) -> None:
        self.refresh = BufferRefresh()
        self.now_s = 1000.0
        self.refresh.updated(self.now_s)

    def after(self, seconds: float, *, newcomer_waits: bool = False) -> Any:
        """Who is asked once a step is committed so much later."""
        self.now_s += seconds
        self.refresh.step_committed(self.now_s, newcomer_waits=newcomer_waits)
        return self.refresh.asked


def test_the_lowest_rank_that_has_attached_is_asked_once_the_copy_is_old() -> None:
    """Not before, and again only when that long has passed since the answer."""
    asking = Asking()
    assert asking.after(1000) is None
    asking.refresh.attach(asking.high)
    asking.refresh.updated(asking.now_s)
    assert asking.after(REFRESH_INTERVAL_S) is None
    assert asking.after(0.1) == asking.high
    asking.refresh.attach(asking.low)
    assert asking.after(1) == asking.high  # one at a time
    asking.refresh.updated(asking.now_s)
    assert asking.after(REFRESH_INTERVAL_S) is None
    assert asking.after(0.1) == asking.low


def test_a_worker_that_waits_to_join_has_one_asked_however_young_the_copy_is() -> None:
    """If there is anybody to ask."""
    asking = Asking()
    assert asking.after(0, newcomer_waits=True) is None
    asking.refresh.attach(asking.low)
    assert asking.after(0) is None
    assert asking.after(0, newcomer_waits=True) == asking.low


@pytest.mark.parametrize("how", ["decline", "leave"])
def test_who_does_not_answer_is_asked_again_unless_it_has_left(how: str) -> None:
    """And nobody else's declining or leaving answers for it."""
    asking = Asking()
    asking.refresh.attach(asking.low)
    asking.refresh.attach(asking.high)
    assert asking.after(31) == asking.low
    asking.refresh.decline(asking.high)
    assert asking.refresh.asked == asking.low
    getattr(asking.refresh, how)(asking.low)
    assert asking.refresh.asked is None
    assert asking.after(0) == (asking.low if how == "decline" else asking.high)
