"""Records as bytes: framed with lengths, position and checksum, so that what is not whole is known not to be.

A record is a fixed part (magic, CRC-32 of all that follows it, length of the message, length of the payload, the
record's position in its journal, how far the journal was on the disk), the message, the payload, and zeros up to a
multiple of `ALIGNMENT`. The position is in it because segment files are used again: what an earlier use has left there
stands at another position. How far the journal was on the disk is in it because blocks reach a disk in any order: where
the power went, a whole record may stand behind one that is not. Behind the last record stand zeros, which the next one
replaces: so the end of a journal is told from a record that is not whole.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final
from zlib import crc32

from optimd.server.files import Part

MAGIC: Final = b"opJ1"
ALIGNMENT: Final = 8
FIXED_BYTES: Final = 32
"""The length of the part before the message."""

MAX_MESSAGE_BYTES: Final = 1 << 30
MAX_PAYLOAD_BYTES: Final = 1 << 30
"""No record is longer than these: whatever claims to be is none."""

_FIXED: Final = struct.Struct("<4sI")
_CHECKED: Final = struct.Struct("<IIQQ")


@dataclass(frozen=True, slots=True)
class Record:
    """A whole record, as it was read."""

    position: int
    end: int
    """Where the next one begins."""
    synced: int
    """How far the journal was known to be on the disk when it was written."""
    message: bytes
    payload: memoryview


def checksum_of(parts: Sequence[Part], before: int = 0) -> int:
    """The CRC-32 of parts that follow one another, behind what has the checksum `before`."""
    for part in parts:
        # An empty tensor is at address 0, and zlib takes that for a wish to begin anew.
        if len(part):
            before = crc32(part, before)
    return before


def length_of(message: bytes, parts: Sequence[Part]) -> int:
    """The bytes that a record takes."""
    content = FIXED_BYTES + len(message) + sum(len(part) for part in parts)
    return -(-content // ALIGNMENT) * ALIGNMENT


def frame(position: int, message: bytes, parts: Sequence[Part], *, synced: int = 0) -> list[Part]:
    """A record as the parts to be written: `length_of` bytes, and the zeros behind it. The payload is not copied.

    Args:
        position: Where it will stand, a multiple of `ALIGNMENT`.
        message: Its message, serialised.
        parts: Its payload's parts: flat views of bytes.
        synced: How far the journal is known to be on the disk.
    """
    payload_bytes = sum(len(part) for part in parts)
    checked = _CHECKED.pack(len(message), payload_bytes, position, synced)
    checksum = checksum_of(parts, crc32(message, crc32(checked)))
    padding = -(FIXED_BYTES + len(message) + payload_bytes) % ALIGNMENT
    return [_FIXED.pack(MAGIC, checksum) + checked + message, *parts, bytes(padding + FIXED_BYTES)]


def read_record(read: Callable[[int, int], bytes], position: int) -> Record | None:
    """The record at a position; None where there is no whole one.

    Args:
        read: Reads so many bytes from a position on; gives fewer where there are no more.
        position: The position.
    """
    fixed = read(FIXED_BYTES, position)
    if len(fixed) < FIXED_BYTES:
        return None
    magic, checksum = _FIXED.unpack_from(fixed)
    message_bytes, payload_bytes, stands_at, synced = _CHECKED.unpack_from(fixed, _FIXED.size)
    if (
        magic != MAGIC
        or stands_at != position
        or message_bytes > MAX_MESSAGE_BYTES
        or payload_bytes > MAX_PAYLOAD_BYTES
    ):
        return None
    body = read(message_bytes + payload_bytes, position + FIXED_BYTES)
    if len(body) < message_bytes + payload_bytes or crc32(body, crc32(fixed[_FIXED.size :])) != checksum:
        return None
    content = FIXED_BYTES + message_bytes + payload_bytes
    end = position + -(-content // ALIGNMENT) * ALIGNMENT
    return Record(position, end, synced, body[:message_bytes], memoryview(body)[message_bytes:])
