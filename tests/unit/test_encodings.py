"""Slices as payloads and back: as they are, and narrowed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optimd.client.parameters import FlatReader, FlatWriter
from optimd.v1 import tensor_pb2, training_pb2
from optimd.wire.codec import decode, encode
from optimd.wire.encodings import (
    BFLOAT16,
    EXACT,
    FLOAT16,
    Encoded,
    Encoding,
    decode_slices,
    encoding_for,
    known_encoding,
    narrowing_to,
    part_of,
    payload_of,
)
from optimd.wire.kinds import GRADIENT, PARAMETER
from optimd.wire.layout import Bucket, Parameter, cut_buckets
from optimd.wire.tensors import bytes_of, memory_order

NARROW = {torch.bfloat16: BFLOAT16, torch.float16: FLOAT16}
WIDE = (torch.float32, torch.float64)
CARRIED = (*WIDE, *NARROW, torch.complex64, torch.complex128)

SPECIAL = [
    0.0,
    -0.0,
    torch.inf,
    -torch.inf,
    torch.nan,
    65504.0,
    65519.99,
    65520.0,
    1e-8,
    6e-8,
    1e-40,
    3.5e38,
    1 + 2**-8,
]


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Bit for bit, but for the bits of NaNs."""
    assert (one.dtype, one.shape) == (other.dtype, other.shape)
    numbers = ~one.isnan()
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[one.element_size()]
    return torch.equal(one.isnan(), other.isnan()) and torch.equal(
        one.contiguous().view(bits)[numbers], other.contiguous().view(bits)[numbers]
    )


def there_and_back(encoding: Encoding, flat: torch.Tensor) -> torch.Tensor:
    payload = torch.empty(encoding.payload_bytes(flat.numel(), flat.dtype), dtype=torch.uint8)
    encoding.encode(flat, bytes_of(payload))
    returned = torch.full((flat.numel(),), 7.0, dtype=flat.dtype)
    encoding.decode(bytes_of(payload), returned)
    return returned


floats = st.one_of(st.sampled_from(SPECIAL), st.floats(width=32), st.floats())


@given(values=st.lists(floats, max_size=200), wide=st.sampled_from(WIDE), narrow=st.sampled_from([*NARROW]))
def test_narrowing_rounds_as_torch_does(values: list[float], wide: torch.dtype, narrow: torch.dtype) -> None:
    flat = torch.tensor(values, dtype=torch.float64).to(wide)
    encoding = NARROW[narrow]
    assert same(there_and_back(encoding, flat), flat.to(narrow).to(wide))
    assert same(encoding.rounded(flat), flat.to(narrow).to(wide))


@given(bits=st.lists(st.integers(-(2**15), 2**15 - 1), max_size=200), wide=st.sampled_from(WIDE))
@pytest.mark.parametrize("narrow", [*NARROW])
def test_what_is_narrow_already_comes_back_as_it_was(bits: list[int], wide: torch.dtype, narrow: torch.dtype) -> None:
    """Infinities, subnormal numbers and negative zeros included."""
    flat = torch.tensor(bits, dtype=torch.int16).view(narrow).to(wide)
    assert same(there_and_back(NARROW[narrow], flat), flat)


def test_float16_makes_infinite_what_is_beyond_its_range() -> None:
    flat = torch.tensor([65504.0, 65520.0, -1e6, 1e-8])
    assert there_and_back(FLOAT16, flat).tolist() == [65504.0, torch.inf, -torch.inf, 0.0]


@pytest.mark.parametrize("narrow", [*NARROW])
def test_a_float64_is_rounded_by_way_of_float32(narrow: torch.dtype) -> None:
    """A server rounds its float64 master of a float32 parameter in one go: with the bits of both steps."""
    flat = torch.randn(10_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    # Halfway between two narrow numbers, and a little more, which float32 does not see.
    flat = torch.cat([flat, (flat.to(narrow).double() * (1 + 2.0**-9)) * (1 + 2.0**-40)])
    assert torch.equal(there_and_back(NARROW[narrow], flat), flat.float().to(narrow).double())


@settings(deadline=None)
@given(dtype=st.sampled_from(CARRIED), numel=st.integers(0, 70))
def test_exactly_means_bit_for_bit(dtype: torch.dtype, numel: int) -> None:
    flat = torch.randint(0, 256, (numel * dtype.itemsize,), dtype=torch.uint8).view(dtype)
    returned = there_and_back(EXACT, flat)
    assert torch.equal(returned.view(torch.uint8), flat.view(torch.uint8))
    assert EXACT.payload_bytes(numel, dtype) == flat.nbytes


@pytest.mark.parametrize("encoding", [BFLOAT16, FLOAT16])
def test_only_wider_real_elements_are_narrowed(encoding: Encoding) -> None:
    assert [dtype for dtype in CARRIED if encoding.takes(dtype)] == [*WIDE]
    assert [encoding.of(dtype) for dtype in CARRIED] == [encoding, encoding, *[EXACT] * 4]
    assert all(EXACT.of(dtype) is EXACT for dtype in CARRIED)


def test_every_encoding_has_a_number_of_its_own_and_is_found_by_it() -> None:
    """Unset is what a side sends that knows no encodings."""
    assert known_encoding(0) is EXACT
    for encoding in (EXACT, BFLOAT16, FLOAT16):
        assert known_encoding(encoding.number) is encoding
        assert encoding_for(encoding.number, torch.float32) is encoding
    assert len({known_encoding(value) for value in tensor_pb2.PayloadEncoding.values()}) == 3
    assert known_encoding(99) is None


@pytest.mark.parametrize(("number", "dtype"), [(99, torch.float32), (1, torch.complex64), (2, torch.bfloat16)])
def test_what_is_said_to_be_encoded_must_be_possible(number: int, dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=f"encoding {number} is not one of {dtype}"):
        encoding_for(number, dtype)


def test_a_dtype_stands_for_the_encoding_that_narrows_to_it() -> None:
    assert [narrowing_to(None), narrowing_to(torch.bfloat16), narrowing_to(torch.float16)] == [EXACT, BFLOAT16, FLOAT16]
    for other in (torch.float32, torch.int8, "bfloat16"):
        with pytest.raises(ValueError, match=r"is not one of torch\.bfloat16, torch\.float16"):
            narrowing_to(other)


class Scaled(Encoding):
    """What a quantised encoding would be: one byte an element and a scale for each slice."""

    name = "scaled"
    number = 77  # type: ignore[assignment]  # none of the schema's
    is_exact = False
    is_elementwise = False

    def takes(self, dtype: torch.dtype) -> bool:
        return dtype is torch.float32

    def payload_bytes(self, numel: int, dtype: torch.dtype) -> int:
        return 4 + numel

    def encode(self, flat: torch.Tensor, into: memoryview) -> None:
        scale = flat.abs().amax().clamp(min=1e-30) / 127
        torch.frombuffer(into[:4], dtype=torch.uint8).copy_(scale.view(1).view(torch.uint8))
        torch.frombuffer(into[4:], dtype=torch.int8).copy_((flat / scale).round())

    def decode(self, payload: memoryview, into: torch.Tensor) -> None:
        scale = torch.frombuffer(bytearray(payload[:4]), dtype=torch.float32)
        into.copy_(torch.frombuffer(payload[4:], dtype=torch.int8) * scale)


def layout(tensors: Sequence[torch.Tensor], bucket_bytes: int) -> tuple[list[Parameter], list[Bucket]]:
    parameters = [Parameter("", each.dtype, tuple(each.shape), memory_order(each)) for each in tensors]
    return parameters, cut_buckets(enumerate(parameters), group=0, first_id=0, bucket_bytes=bucket_bytes)


def shapes_of(dtype: torch.dtype) -> list[torch.Tensor]:
    """Of all forms that a worker's tensors have."""
    made = [
        torch.randn((), dtype=dtype),
        torch.randn(0, 3, dtype=dtype),
        torch.randn(700, dtype=dtype),
        torch.randn(20, 30, dtype=dtype).t(),
        torch.randn(40, 50, dtype=dtype)[::2, ::5],
        torch.randn(2, 3, 4, 5, dtype=dtype).contiguous(memory_format=torch.channels_last),
        torch.randn(10, dtype=dtype)[::3],
    ]
    return [made[-1].conj() if dtype.is_complex else made[-1], *made[:-1]]


@pytest.mark.parametrize("encoding", [EXACT, BFLOAT16, FLOAT16, Scaled()], ids=lambda each: each.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.complex64], ids=str)
@pytest.mark.parametrize("bucket_bytes", [1024, 1 << 20])
def test_tensors_of_every_form_go_through_messages_slice_by_slice(
    encoding: Encoding, dtype: torch.dtype, bucket_bytes: int
) -> None:
    """From the reader of one worker to the writer of another, and to a server's flat elements."""
    sent = shapes_of(dtype)
    received = [each.resolve_conj().fill_(7.0) for each in shapes_of(dtype)]
    expected = [torch.empty_like(each) for each in sent]
    parameters, buckets = layout(sent, bucket_bytes)
    reader, narrowed = FlatReader(dict(enumerate(sent)), parameters, encoding), set[int]()
    writer = FlatWriter(received, parameters, narrowed=narrowed)
    rounding = FlatWriter([each.copy_(sent[i]) for i, each in enumerate(expected)], parameters)
    for bucket in buckets:
        holds = reader.encoding_of(GRADIENT, bucket)
        assert holds is (encoding if encoding.takes(dtype) else EXACT)
        present = [piece.parameter != 3 for piece in bucket.slices]
        if not any(present):
            continue
        data = encode(training_pb2.TrainRequest(), reader.parts(GRADIENT, bucket, present))
        _, frame = decode(training_pb2.TrainRequest, data)
        assert frame.payload.nbytes == bucket.payload_bytes(GRADIENT, present, holds)
        assert training_pb2.TrainRequest.FromString(data).payload == bytes(frame.payload)
        writer.write(GRADIENT, bucket, present, frame.payload, holds)
        if not holds.is_exact:
            rounding.round(bucket, present, holds)
        lengths = [piece.length for piece, here in zip(bucket.slices, present, strict=True) if here]
        elements = torch.full((sum(lengths),), 7.0, dtype=dtype)
        decode_slices(holds, frame.payload, lengths, dtype, elements)
        in_bucket = FlatReader(dict(enumerate(received)), parameters)
        writer.flush()
        assert payload_of([*in_bucket.parts(GRADIENT, bucket, present)]) == bytes(bytes_of(elements))
    writer.flush()
    rounding.flush()
    for index, each in enumerate(expected):
        there = torch.full_like(each, 7.0) if index == 3 else each
        assert torch.equal(received[index], there), index
    assert narrowed == ({0, 1, 4, 5, 6} if encoding.takes(dtype) and not encoding.is_exact else set())


def test_a_part_that_is_encoded_shows_what_its_tensor_has_when_it_is_written() -> None:
    """So a bucket is rounded into its message, and nowhere before."""
    flat = torch.zeros(8)
    part = part_of(flat, BFLOAT16, torch.float32)
    assert isinstance(part, Encoded)
    assert part.nbytes == 16
    flat.fill_(1.5)
    assert torch.frombuffer(bytearray(payload_of([part])), dtype=torch.bfloat16).tolist() == [1.5] * 8


def test_what_is_kept_wider_counts_as_the_dtype_that_travels() -> None:
    """A float64 master of a float32 parameter."""
    flat = torch.randn(64, dtype=torch.float64)
    exact, narrow = part_of(flat, EXACT, torch.float32), part_of(flat, BFLOAT16, torch.float32)
    assert (exact.nbytes, narrow.nbytes) == (256, 128)
    assert payload_of([exact]) == bytes(bytes_of(flat.float()))
    assert payload_of([narrow]) == bytes(bytes_of(flat.to(torch.bfloat16)))


def test_a_payload_that_is_no_whole_number_of_narrow_elements_is_refused() -> None:
    parameters, (bucket,) = layout([torch.zeros(100)], 1 << 20)
    writer = FlatWriter([torch.zeros(100)], parameters)
    for nbytes in (0, 199, 202, 400):
        with pytest.raises(ValueError, match=f"{nbytes} bytes for parameter of bucket 0, which takes 200"):
            writer.write(PARAMETER, bucket, [True], memoryview(bytes(nbytes)), BFLOAT16)


def test_a_writer_that_compares_tells_what_was_not_there_before() -> None:
    """By bits: a NaN that stays is no change, and a sign of zero is one."""
    values = [torch.tensor([1.0, torch.nan]), torch.tensor([0.0]), torch.tensor([2.0])]
    parameters, buckets = layout(values, 1 << 20)
    sent: dict[int, Any] = dict(enumerate([values[0].clone(), torch.tensor([-0.0]), torch.tensor([2.0])]))
    writer = FlatWriter(values, parameters, compares=True)
    for bucket in buckets:
        present = [True] * len(bucket.slices)
        payload = payload_of([*FlatReader(sent, parameters).parts(PARAMETER, bucket, present)])
        writer.write(PARAMETER, bucket, present, memoryview(payload))
    assert writer.changed == {1}
