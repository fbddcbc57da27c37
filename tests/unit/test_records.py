"""Records as bytes: what was written is read back, and nothing else is."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from optimd.server import records
from optimd.server.records import ALIGNMENT, FIXED_BYTES, Record, checksum_of, frame, length_of, read_record
from optimd.wire.tensors import bytes_of

POSITIONS = st.integers(0, 2**60).map(lambda number: number * ALIGNMENT)
PARTS = st.lists(st.binary(max_size=40), max_size=4)


def reader(content: bytes, start: int) -> Callable[[int, int], bytes]:
    """Reads a file whose first byte is that of position `start`."""
    return lambda length, at: content[at - start : at - start + length]


def framed(position: int, message: bytes, parts: Sequence[bytes], *, synced: int = 0) -> bytes:
    return b"".join(frame(position, message, [memoryview(part) for part in parts], synced=synced))


@given(POSITIONS, POSITIONS, st.binary(max_size=60), PARTS)
def test_a_record_is_read_back_as_it_was_written(
    position: int, synced: int, message: bytes, parts: list[bytes]
) -> None:
    """Whatever its parts; zeros stand behind it, and nothing is found there."""
    content = framed(position, message, parts, synced=synced)
    record = read_record(reader(content, position), position)
    assert record is not None
    assert (record.position, record.synced) == (position, synced)
    assert (record.message, bytes(record.payload)) == (message, b"".join(parts))
    assert record.end == position + length_of(message, parts)
    assert record.end % ALIGNMENT == 0
    assert content[record.end - position :] == bytes(FIXED_BYTES)
    assert read_record(reader(content, position), record.end) is None


@given(POSITIONS, st.binary(max_size=60), PARTS, st.data())
def test_a_record_in_which_a_bit_has_flipped_is_none(
    position: int, message: bytes, parts: list[bytes], data: st.DataObject
) -> None:
    """Wherever in it the bit is."""
    content = bytearray(framed(position, message, parts))
    length = FIXED_BYTES + len(message) + sum(map(len, parts))
    content[data.draw(st.integers(0, length - 1))] ^= 1 << data.draw(st.integers(0, 7))
    assert read_record(reader(bytes(content), position), position) is None


@given(POSITIONS, st.binary(max_size=60), PARTS, st.data())
def test_a_record_that_ends_early_is_none(
    position: int, message: bytes, parts: list[bytes], data: st.DataObject
) -> None:
    """A file ends within it."""
    length = FIXED_BYTES + len(message) + sum(map(len, parts))
    content = framed(position, message, parts)[: data.draw(st.integers(0, length - 1))]
    assert read_record(reader(content, position), position) is None


@given(st.binary(max_size=60), PARTS, POSITIONS, POSITIONS)
def test_a_record_of_another_position_is_none(message: bytes, parts: list[bytes], wrote: int, reads: int) -> None:
    """It was left by an earlier use of the file."""
    record = read_record(reader(framed(wrote, message, parts), reads), reads)
    assert (record is not None) == (wrote == reads)


@pytest.mark.parametrize("field", [0, 1])
def test_a_record_that_claims_to_be_huge_is_none_and_is_not_read(field: int) -> None:
    """Memory is taken for what may be there only."""
    content = bytearray(framed(0, b"message", [b"payload"]))
    struct.pack_into("<I", content, 8 + 4 * field, max(records.MAX_MESSAGE_BYTES, records.MAX_PAYLOAD_BYTES) + 1)
    asked = []

    def read(length: int, at: int) -> bytes:
        asked.append(length)
        return bytes(content[at : at + length])

    assert read_record(read, 0) is None
    assert asked == [FIXED_BYTES]


def test_an_empty_record_is_one() -> None:
    """It has neither message nor payload."""
    assert read_record(reader(framed(8, b"", []), 8), 8) == Record(8, 8 + FIXED_BYTES, 0, b"", memoryview(b""))


def test_a_part_without_elements_changes_nothing() -> None:
    """An empty tensor's bytes are at address 0: what is before them is in the checksum all the same."""
    empty, full = bytes_of(torch.empty(0)), memoryview(b"payload")
    for parts in ([empty], [empty, full], [full, empty], [empty, full, empty]):
        content = b"".join(frame(0, b"message", parts))
        record = read_record(reader(content, 0), 0)
        assert record is not None, len(parts)
        assert (record.message, bytes(record.payload)) == (b"message", b"".join(parts))
    assert checksum_of([full, empty], 3) == checksum_of([full], 3) != 0
