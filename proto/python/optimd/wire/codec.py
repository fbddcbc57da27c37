"""Messages that end in a payload, written and read without passing the payload through protobuf.

The bytes are plain protobuf: a message with its `payload` field (number 15, always the last) set. What is special is
only how they are made and taken apart. Writing joins the serialised small fields, the payload's tag and length, and
the payload's parts in one copy. Reading hands out a view of the received bytes.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, NamedTuple, TypeVar

from google.protobuf.message import DecodeError, Message

from optimd.wire.encodings import Part, bytes_from
from optimd.wire.limits import MAX_MESSAGE_BYTES

_PAYLOAD_FIELD: Final = 15
_LENGTH_DELIMITED: Final = 2
_PAYLOAD_TAG: Final = _PAYLOAD_FIELD << 3 | _LENGTH_DELIMITED
_MAX_VARINT_BYTES: Final = 10

M = TypeVar("M", bound=Message)


class MessageTooLargeError(ValueError):
    """A message would exceed the limit that every gRPC peer accepts by default."""


class MalformedMessageError(ValueError):
    """Received bytes are not a message of the expected type."""


class Frame(NamedTuple):
    """A received message, its payload apart."""

    size: int
    """Bytes on the wire."""
    payload: memoryview
    """The payload's bytes: a view of the received message, read-only, of any alignment."""


def encode(message: Message, parts: Iterable[Part] = ()) -> bytes:
    """Serialises `message` with the concatenation of `parts` as its payload.

    Args:
        message: A message whose own `payload` field is unset.
        parts: Contiguous buffers of bytes, which are copied once, and what is encoded where it is written.

    Raises:
        MessageTooLargeError: the result would not stay under `MAX_MESSAGE_BYTES`.
    """
    header = message.SerializeToString()
    pieces = list(parts)
    length = sum(piece.nbytes for piece in pieces)
    if len(header) + length + 1 + _MAX_VARINT_BYTES >= MAX_MESSAGE_BYTES:
        raise MessageTooLargeError(
            f"a {type(message).__name__} of {len(header)} bytes and a payload of {length} bytes do not "
            f"fit into a message of {MAX_MESSAGE_BYTES} bytes"
        )
    if not length:
        return header
    return bytes_from(b"".join((header, bytes((_PAYLOAD_TAG,)), varint(length))), pieces)


def decode(message_type: type[M], data: bytes) -> tuple[M, Frame]:
    """Parses `data`, leaving the payload where it is.

    Where the payload is the last field and the only one of its number, it is a view of `data`; else `data` is parsed in
    full, as protobuf demands.

    Raises:
        MalformedMessageError: `data` is not a `message_type`.
    """
    split = _find_payload(data)
    try:
        if split is not None:
            header_end, payload_start = split
            return message_type.FromString(data[:header_end]), Frame(len(data), memoryview(data)[payload_start:])
        message = message_type.FromString(data)
    except DecodeError as error:
        raise MalformedMessageError(f"not a {message_type.__name__}: {error}") from error
    payload = memoryview(getattr(message, "payload", b""))
    if payload.nbytes:
        message.ClearField("payload")
    return message, Frame(len(data), payload)


def _find_payload(data: bytes) -> tuple[int, int] | None:
    """Where the header ends and the payload starts, if the payload is last and unique; else None.

    Walks the top-level fields. Whatever it does not know (groups, field numbers over 15, overlong tags) is left to a
    full parse, which is always right.
    """
    position = 0
    end = len(data)
    while position < end:
        tag = data[position]
        if tag >= 0x80:
            return None
        field_start = position
        position += 1
        wire_type = tag & 7
        if wire_type == _LENGTH_DELIMITED:
            parsed = read_varint(data, position)
            if parsed is None:
                return None
            length, position = parsed
            if tag == _PAYLOAD_TAG:
                return (field_start, position) if position + length == end else None
            position += length
        elif wire_type == 0:
            parsed = read_varint(data, position)
            if parsed is None:
                return None
            _, position = parsed
        elif wire_type == 1:
            position += 8
        elif wire_type == 5:
            position += 4
        else:
            return None
    return None


def read_varint(data: bytes, position: int) -> tuple[int, int] | None:
    """The varint at `position` and the position behind it; None where it is cut off or too long."""
    value = 0
    for index, byte in enumerate(data[position : position + _MAX_VARINT_BYTES]):
        value |= (byte & 0x7F) << 7 * index
        if byte < 0x80:
            return value, position + index + 1
    return None


def varint(value: int) -> bytes:
    """A number as protobuf writes it."""
    encoded = bytearray()
    while value >= 0x80:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)
