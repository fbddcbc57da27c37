"""The payload codec against protobuf's own parser and serialiser."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given, settings
from hypothesis import strategies as st

from optimd.v1 import job_pb2, reading_pb2, tensor_pb2, training_pb2
from optimd.wire.codec import MalformedMessageError, MessageTooLargeError, decode, encode
from optimd.wire.limits import MAX_BUCKET_BYTES, MAX_BUCKET_SLICES, MAX_MESSAGE_BYTES

TrainRequest = training_pb2.TrainRequest
TrainResponse = training_pb2.TrainResponse
PayloadMessage = training_pb2.TrainRequest | training_pb2.TrainResponse | reading_pb2.ReadStateResponse

PAYLOAD: Final = 15
VARINT, FIXED64, DELIMITED, START_GROUP, END_GROUP, FIXED32 = range(6)

many = settings(max_examples=100, deadline=None)


def varint(value: int, *, padding: int = 0) -> bytes:
    """`value` as a varint, with `padding` bytes more than it needs."""
    encoded = bytearray()
    while value >= 0x80:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    if padding:
        encoded[-1] |= 0x80
        encoded += b"\x80" * (padding - 1) + b"\0"
    return bytes(encoded)


def delimited(number: int, content: bytes, *, tag_padding: int = 0, length_padding: int = 0) -> bytes:
    """A length-delimited field, with varints that may be longer than they need to be."""
    tag = varint(number << 3 | DELIMITED, padding=tag_padding)
    return tag + varint(len(content), padding=length_padding) + content


def parse(message_type: type[PayloadMessage], data: bytes) -> PayloadMessage | None:
    """What protobuf makes of `data`; None where it refuses it."""
    try:
        return message_type.FromString(data)
    except DecodeError:
        return None


def assert_decodes_as_protobuf_parses(message_type: type[PayloadMessage], data: bytes) -> None:
    """Compares the codec with protobuf: the same fields, unknown ones included, and payload, or both refuse."""
    expected = parse(message_type, data)
    if expected is None:
        with pytest.raises(MalformedMessageError):
            decode(message_type, data)
        return
    message, frame = decode(message_type, data)
    assert bytes(frame.payload) == expected.payload
    assert frame.size == len(data)
    expected.ClearField("payload")
    assert message == expected
    assert message.SerializeToString() == expected.SerializeToString()


numbers: Final = st.integers(0, 2**64 - 1)

requests: Final = st.one_of(
    st.builds(TrainRequest),
    st.builds(
        lambda job, private: TrainRequest(open=job_pb2.OpenJob(job=job, private=private)),
        st.text(max_size=20),
        st.booleans(),
    ),
    st.builds(
        lambda sequence, base: TrainRequest(step_begin=training_pb2.StepBegin(sequence=sequence, base_step=base)),
        numbers,
        numbers,
    ),
    st.builds(
        lambda bucket_id, present: TrainRequest(bucket=tensor_pb2.TensorBucket(bucket_id=bucket_id, present=present)),
        st.integers(0, 2**32 - 1),
        st.binary(max_size=40),
    ),
    st.builds(lambda count: TrainRequest(step_end=training_pb2.StepEnd(bucket_count=count)), st.integers(0, 300)),
    st.builds(
        lambda digest, force: TrainRequest(load_state=training_pb2.LoadState(digest=digest, force=force)),
        st.binary(max_size=32),
        st.booleans(),
    ),
    st.builds(lambda: TrainRequest(leave=training_pb2.Leave())),
)
payloads: Final = st.binary(max_size=400)


@st.composite
def pieces(draw: st.DrawFn) -> bytes:
    """A serialised piece of a message: fields of the schema, payloads, unknown fields, in legal and odd spellings."""
    number = draw(st.sampled_from([12, 13, 14, 16, 17, 200, 2**28]))
    padding = st.integers(0, 4)
    match draw(st.integers(0, 8)):
        case 0 | 1:
            return bytes(draw(requests).SerializeToString())
        case 2 | 3:
            return delimited(PAYLOAD, draw(payloads))
        case 4:
            return delimited(PAYLOAD, draw(payloads), tag_padding=draw(padding), length_padding=draw(padding))
        case 5:
            return delimited(number, draw(payloads), tag_padding=draw(padding), length_padding=draw(padding))
        case 6:
            return varint(number << 3 | VARINT) + varint(draw(numbers), padding=draw(st.sampled_from([0, 0, 1])))
        case 7:
            wire_type, width = draw(st.sampled_from([(FIXED64, 8), (FIXED32, 4)]))
            return varint(number << 3 | wire_type) + draw(st.binary(min_size=width, max_size=width))
        case _:
            inside = delimited(PAYLOAD, draw(payloads))
            return varint(number << 3 | START_GROUP) + inside + varint(number << 3 | END_GROUP)


@many
@given(message=requests, parts=st.lists(payloads, max_size=4))
def test_protobuf_parses_what_encode_writes(message: TrainRequest, parts: list[bytes]) -> None:
    """Any language's generated client reads the codec's bytes."""
    data = encode(message, [memoryview(part) for part in parts])
    parsed = TrainRequest.FromString(data)
    assert parsed.payload == b"".join(parts)
    parsed.ClearField("payload")
    assert parsed == message


@many
@given(message=requests, payload=st.binary(min_size=1, max_size=400))
def test_encode_writes_the_very_bytes_that_protobuf_would(message: TrainRequest, payload: bytes) -> None:
    """The payload is the last field and its varints are as short as they can be."""
    data = encode(message, [memoryview(payload)])
    message.payload = payload
    assert data == message.SerializeToString()


@pytest.mark.parametrize("length", [1, 127, 128, 16_383, 16_384, MAX_BUCKET_BYTES])
def test_payloads_of_every_length_come_back(length: int) -> None:
    """The payload's length prefix grows with it."""
    message = TrainRequest(step_end=training_pb2.StepEnd(bucket_count=3))
    payload = bytes(range(256)) * (length // 256 + 1)
    data = encode(message, [memoryview(payload)[: length // 2], memoryview(payload)[length // 2 : length]])
    assert TrainRequest.FromString(data).payload == payload[:length]
    decoded, frame = decode(TrainRequest, data)
    assert decoded == message
    assert frame.payload == payload[:length]


@many
@given(message=requests, payload=payloads)
def test_decode_reads_what_protobuf_writes(message: TrainRequest, payload: bytes) -> None:
    """Any language's generated client can be a worker."""
    message.payload = payload
    assert_decodes_as_protobuf_parses(TrainRequest, message.SerializeToString())


@many
@given(message=requests, payload=st.binary(min_size=1, max_size=400))
def test_a_payload_that_comes_last_is_a_view_of_the_received_bytes(message: TrainRequest, payload: bytes) -> None:
    """The payload is not copied, whoever wrote the message."""
    ours = encode(message, [memoryview(payload)])
    message.payload = payload
    for data in (ours, message.SerializeToString()):
        _, frame = decode(TrainRequest, data)
        assert frame.payload.obj is data
        assert frame.payload.readonly
        assert frame.payload == payload


@many
@given(joined=st.lists(pieces(), max_size=6).map(b"".join))
def test_decode_agrees_with_protobuf_on_any_sequence_of_fields(joined: bytes) -> None:
    """Payloads first, repeated, followed by other or unknown fields, overlong varints, groups, high field numbers."""
    for message_type in (TrainRequest, training_pb2.TrainResponse, reading_pb2.ReadStateResponse):
        assert_decodes_as_protobuf_parses(message_type, joined)


JOB_READY: Final = TrainResponse(ready=job_pb2.JobReady(job_step=7)).SerializeToString()
STEP_END: Final = TrainRequest(step_end=training_pb2.StepEnd(bucket_count=7)).SerializeToString()


@pytest.mark.parametrize(
    ("data", "payload"),
    [
        pytest.param(delimited(PAYLOAD, b"abc") + STEP_END, b"abc", id="payload first"),
        pytest.param(STEP_END + delimited(PAYLOAD, b"abc") + delimited(PAYLOAD, b"de"), b"de", id="payload repeated"),
        pytest.param(delimited(PAYLOAD, b"abc") + STEP_END + delimited(PAYLOAD, b"de"), b"de", id="payload around"),
        pytest.param(delimited(PAYLOAD, b"abc") + delimited(98, b"x") + STEP_END, b"abc", id="unknown field behind"),
        pytest.param(STEP_END + delimited(PAYLOAD, b"abc") + delimited(99, b"x"), b"abc", id="high number behind"),
        pytest.param(delimited(99, b"x") + STEP_END + delimited(PAYLOAD, b"abc"), b"abc", id="high number before"),
        pytest.param(STEP_END + delimited(PAYLOAD, b"abc", tag_padding=2), b"abc", id="overlong tag"),
        pytest.param(STEP_END + delimited(PAYLOAD, b"abc", length_padding=2), b"abc", id="overlong length"),
        pytest.param(STEP_END + delimited(PAYLOAD, b""), b"", id="explicit empty payload"),
        pytest.param(STEP_END + delimited(PAYLOAD, b"abc") + delimited(PAYLOAD, b""), b"", id="emptied payload"),
    ],
)
def test_unusual_field_orders_decode_to_the_same_message(data: bytes, payload: bytes) -> None:
    """A peer may write its fields in any order that protobuf allows."""
    message, frame = decode(TrainRequest, data)
    assert message.step_end.bucket_count == 7
    assert bytes(frame.payload) == payload
    assert_decodes_as_protobuf_parses(TrainRequest, data)


def test_a_field_that_looks_like_the_payload_inside_another_is_not_taken_for_it() -> None:
    """Only top-level fields count."""
    inside = delimited(PAYLOAD, b"not a payload")
    message = TrainRequest(load_state=training_pb2.LoadState(digest=inside))
    decoded, frame = decode(TrainRequest, encode(message, [memoryview(b"payload")]))
    assert decoded.load_state.digest == inside
    assert bytes(frame.payload) == b"payload"


@pytest.mark.parametrize(
    "unknown",
    [
        pytest.param(varint(14 << 3 | VARINT) + varint(2**63), id="varint"),
        pytest.param(varint(14 << 3 | FIXED64) + b"\0\0\0\0\0\0\0\x7a", id="8 bytes"),
        pytest.param(varint(14 << 3 | FIXED32) + b"\0\0\0\x7a", id="4 bytes"),
        pytest.param(delimited(14, b"\x7a" * 200), id="bytes"),
    ],
)
def test_fields_of_a_newer_peer_before_the_payload_cost_no_copy(unknown: bytes) -> None:
    """They are skipped by their wire type; 121 bytes are what a walk that is one byte off would fall for."""
    known = reading_pb2.ReadStateResponse(bucket=tensor_pb2.TensorBucket(bucket_id=7)).SerializeToString()
    data = known + unknown + delimited(PAYLOAD, b"p" * 121)
    assert_decodes_as_protobuf_parses(reading_pb2.ReadStateResponse, data)
    _, frame = decode(reading_pb2.ReadStateResponse, data)
    assert frame.payload.obj is data


def test_a_value_behind_a_long_tag_is_not_taken_for_the_payload_s_tag() -> None:
    """The value 0x7a of field 16, read as a tag, would make the rest a payload of 122 bytes."""
    data = varint(16 << 3 | VARINT) + b"\x7a" + delimited(PAYLOAD, b"p" * 121)
    assert_decodes_as_protobuf_parses(TrainRequest, data)


@many
@given(message=requests, payload=payloads, data=st.data())
def test_truncated_messages_are_refused_as_protobuf_refuses_them(
    message: TrainRequest, payload: bytes, data: st.DataObject
) -> None:
    """A cut at a field's end leaves a shorter message, any other a malformed one; nothing else is raised."""
    whole = encode(message, [memoryview(payload)])
    end = data.draw(st.integers(0, len(whole)))
    assert_decodes_as_protobuf_parses(TrainRequest, whole[:end])


@many
@given(message=requests, payload=payloads, changes=st.lists(st.tuples(numbers, st.integers(0, 255)), min_size=1))
def test_damaged_messages_are_refused_as_protobuf_refuses_them(
    message: TrainRequest, payload: bytes, changes: list[tuple[int, int]]
) -> None:
    """Whatever bytes have changed, the codec raises MalformedMessageError or parses as protobuf does."""
    damaged = bytearray(encode(message, [memoryview(payload)]))
    for position, byte in changes:
        if damaged:
            damaged[position % len(damaged)] = byte
    assert_decodes_as_protobuf_parses(TrainRequest, bytes(damaged))


@many
@given(data=st.binary(max_size=60))
def test_garbage_is_refused_as_protobuf_refuses_it(data: bytes) -> None:
    """Arbitrary bytes never raise anything but MalformedMessageError."""
    assert_decodes_as_protobuf_parses(TrainRequest, data)


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"\x00", id="field number 0"),
        pytest.param(b"\x7f", id="wire type 7"),
        pytest.param(b"\x7a", id="no length"),
        pytest.param(b"\x7a\x05abc", id="payload cut short"),
        pytest.param(STEP_END[:-1] + b"\x7a\x01x", id="payload behind a cut header"),
        pytest.param(b"\x7a" + b"\xff" * 10, id="endless length"),
        pytest.param(delimited(1, delimited(1, b"\xff\xfe")), id="job name that is not UTF-8"),
    ],
)
def test_malformed_messages_name_the_expected_type(data: bytes) -> None:
    """The error says what the bytes should have been."""
    with pytest.raises(MalformedMessageError, match="not a TrainRequest"):
        decode(TrainRequest, data)


def halves(length: int) -> Sequence[memoryview]:
    content = memoryview(bytes(length))
    return content[: length // 2], content[length // 2 :]


@pytest.mark.parametrize("length", [MAX_MESSAGE_BYTES, MAX_MESSAGE_BYTES - len(STEP_END) - 5, 2 * MAX_MESSAGE_BYTES])
def test_a_message_that_reaches_the_limit_is_not_written(length: int) -> None:
    """Every peer accepts what encode returns, because it stays under gRPC's default limit."""
    with pytest.raises(MessageTooLargeError, match=f"payload of {length} bytes"):
        encode(TrainRequest.FromString(STEP_END), halves(length))


def test_a_header_that_reaches_the_limit_alone_is_not_written() -> None:
    """The limit holds for messages without a payload too."""
    with pytest.raises(MessageTooLargeError, match="do not fit"):
        encode(TrainRequest(load_state=training_pb2.LoadState(digest=bytes(MAX_MESSAGE_BYTES))))


def test_the_largest_bucket_with_the_longest_bitmap_is_written() -> None:
    """The limits of a bucket and of a message fit together."""
    header = tensor_pb2.TensorBucket(bucket_id=2**32 - 1, present=b"\xff" * (MAX_BUCKET_SLICES // 8))
    data = encode(TrainRequest(bucket=header), halves(MAX_BUCKET_BYTES))
    assert len(data) < MAX_MESSAGE_BYTES
    assert TrainRequest.FromString(data).bucket == header
