"""Messages that end in a payload, written and read without passing the payload through protobuf.

The bytes are plain protobuf: a message with its `payload` field (number 15, always the last) set. What is special is
only how they are made and taken apart. Writing joins the serialised small fields, the payload's tag and length, and
the payload's parts in one copy. Reading hands out a view of the received bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Final, NamedTuple, TypeVar

from google.protobuf.message import DecodeError, Message

from optimd.wire.limits import MAX_MESSAGE_BYTES

_PAYLOAD_FIELD: Final = 15
_BUNDLED_FIELD: Final = 31
_LENGTH_DELIMITED: Final = 2
_PAYLOAD_TAG: Final = _PAYLOAD_FIELD << 3 | _LENGTH_DELIMITED
_MAX_VARINT_BYTES: Final = 10
_BUNDLED_TAG: Final = bytes((0x80 | _BUNDLED_FIELD << 3 & 0x7F | _LENGTH_DELIMITED, _BUNDLED_FIELD >> 4))

BUNDLE_BYTES: Final = 128 * 1024
"""What a bundle holds at most. A message as large as that travels by itself: a call's cost does not show then."""

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


def encode(message: Message, parts: Iterable[memoryview] = ()) -> bytes:
    """Serialises `message` with the concatenation of `parts` as its payload.

    Args:
        message: A message whose own `payload` field is unset.
        parts: Contiguous buffers of bytes. They are copied once.

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
    return b"".join((header, bytes((_PAYLOAD_TAG,)), _varint(length), *pieces))


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


def bundle(messages: Sequence[bytes]) -> bytes:
    """One message that stands for `messages`, serialised, in their order. A single one is given back as it is."""
    if len(messages) == 1:
        return messages[0]
    return b"".join(part for message in messages for part in (_BUNDLED_TAG, _varint(len(message)), message))


def bundled(messages: Iterable[bytes]) -> Iterator[bytes]:
    """Messages, serialised, with small ones that follow each other bundled."""
    small: list[bytes] = []
    nbytes = 0
    for message in messages:
        if small and nbytes + len(message) > BUNDLE_BYTES:
            yield bundle(small)
            small, nbytes = [], 0
        small.append(message)
        nbytes += len(message)
        if nbytes > BUNDLE_BYTES:
            yield message
            small, nbytes = [], 0
    if small:
        yield bundle(small)


def unbundle(data: bytes) -> list[bytes]:
    """The messages that a received one stands for: itself, where it is no bundle.

    Raises:
        MalformedMessageError: it begins as a bundle, and has something else in it.
    """
    if not data.startswith(_BUNDLED_TAG):
        return [data]
    messages, position = [], 0
    while position < len(data):
        parsed = _read_varint(data, position + len(_BUNDLED_TAG)) if data.startswith(_BUNDLED_TAG, position) else None
        if parsed is None or parsed[0] + parsed[1] > len(data):
            raise MalformedMessageError("a bundle has something else in it")
        length, start = parsed
        position = start + length
        messages.append(data[start:position])
    return messages


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
            parsed = _read_varint(data, position)
            if parsed is None:
                return None
            length, position = parsed
            if tag == _PAYLOAD_TAG:
                return (field_start, position) if position + length == end else None
            position += length
        elif wire_type == 0:
            parsed = _read_varint(data, position)
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


def _read_varint(data: bytes, position: int) -> tuple[int, int] | None:
    """The varint at `position` and the position behind it; None where it is cut off or too long."""
    value = 0
    for index, byte in enumerate(data[position : position + _MAX_VARINT_BYTES]):
        value |= (byte & 0x7F) << 7 * index
        if byte < 0x80:
            return value, position + index + 1
    return None


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value >= 0x80:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)
