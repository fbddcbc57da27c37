"""Payloads in shared memory: what is read is what was written, and nothing is written over that is still needed."""

from __future__ import annotations

import time
from collections import deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optimd.v1 import tensor_pb2
from optimd.wire import rings
from optimd.wire.codec import Frame
from optimd.wire.placement import place, placed
from optimd.wire.rings import RingReader, RingWriter

SIZE = 4096


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Payloads of any size, and no waiting for readers that do not come."""
    monkeypatch.setattr(rings, "SMALLEST_BYTES", 1)
    monkeypatch.setattr(rings, "PATIENCE_S", 0.0)


def ring(size: int = SIZE) -> tuple[RingWriter, RingReader]:
    memory, done = memoryview(bytearray(size)), memoryview(bytearray(8)).cast("Q")
    return RingWriter(memory, done), RingReader(memory, done)


def filled(number: int, nbytes: int) -> bytes:
    return bytes((number + offset) % 251 for offset in range(nbytes))


def write(writer: RingWriter, content: bytes, cut: int = 0) -> int | None:
    return writer.place([memoryview(content[:cut]), memoryview(content[cut:])], len(content))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(1, SIZE // 2), st.integers(0, 5)), max_size=60))
def test_what_is_read_is_what_was_written_however_far_the_reader_lags(plan: list[tuple[int, int]]) -> None:
    """The reader takes so many payloads after each write; what finds no room goes another way, and is not missed."""
    writer, reader = ring()
    waiting: deque[tuple[int, bytes]] = deque()
    for number, (nbytes, reads) in enumerate(plan):
        content = filled(number, nbytes)
        position = write(writer, content, nbytes // 3)
        if position is not None:
            assert position % rings.ALIGNMENT == 0
            waiting.append((position, content))
        for _ in range(min(reads, len(waiting))):
            position, content = waiting.popleft()
            assert bytes(reader.read(position, len(content))) == content
            reader.release()
    # None of those that were left lying has been written over.
    for position, content in waiting:
        assert bytes(reader.read(position, len(content))) == content


def test_a_ring_is_used_again_once_its_reader_is_done() -> None:
    writer, reader = ring()
    for number in range(20):
        content = filled(number, SIZE // 2)
        position = write(writer, content)
        assert position is not None
        assert bytes(reader.read(position, len(content))) == content
        reader.release()


def test_what_is_small_takes_no_more_memory_however_often_it_comes() -> None:
    """Two payloads a step, and a reader that is done with them before the next: all steps lie where the first did."""
    writer, reader = ring()
    offsets = set()
    for number in range(50):
        contents = [filled(number, 300), filled(number + 1, 200)]
        positions = [write(writer, content) for content in contents]
        for position, content in zip(positions, contents, strict=True):
            assert position is not None
            assert bytes(reader.read(position, len(content))) == content
            reader.release()
            offsets.add(position % SIZE)
    assert offsets == {0, 320}


def test_what_was_read_last_is_good_until_it_is_released() -> None:
    writer, reader = ring()
    first = write(writer, filled(1, SIZE // 2))
    second = write(writer, filled(2, SIZE // 2))
    assert first is not None
    assert second is not None
    view = reader.read(first, SIZE // 2)
    assert write(writer, filled(3, SIZE // 2)) is None
    assert bytes(view) == filled(1, SIZE // 2)
    reader.release()
    assert write(writer, filled(3, SIZE // 2)) is not None


@pytest.mark.parametrize("nbytes", [0, SIZE // 2 + 1, 2 * SIZE])
def test_what_is_empty_or_too_large_goes_another_way(nbytes: int) -> None:
    writer, _ = ring()
    assert write(writer, bytes(nbytes)) is None


def test_what_is_small_is_better_off_in_its_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rings, "SMALLEST_BYTES", 100)
    writer, _ = ring()
    assert write(writer, bytes(99)) is None
    assert write(writer, bytes(100)) is not None


def test_a_reader_that_does_not_move_is_waited_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    pauses: list[float] = []

    def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds
        pauses.append(seconds)

    monkeypatch.setattr(rings, "PATIENCE_S", 0.01)
    monkeypatch.setattr(time, "sleep", sleep)
    monkeypatch.setattr(time, "monotonic", lambda: now)
    writer, reader = ring()
    position = write(writer, filled(1, SIZE // 2))
    assert position is not None
    assert write(writer, filled(2, SIZE // 2)) is not None
    assert write(writer, filled(3, SIZE // 2)) is None
    waited = len(pauses)
    assert waited > 1
    assert write(writer, filled(3, SIZE // 2)) is None
    assert len(pauses) == waited
    reader.read(position, SIZE // 2)
    reader.release()
    assert write(writer, filled(3, SIZE // 2)) is not None


@pytest.mark.parametrize(
    ("position", "nbytes"), [(SIZE - 64, 65), (0, SIZE + 1), (2**60 + SIZE - 1, 2), (2**64 - SIZE, 64), (2 * SIZE, 64)]
)
def test_a_place_beyond_the_ring_is_refused(position: int, nbytes: int) -> None:
    _, reader = ring()
    with pytest.raises(ValueError, match="no payload"):
        reader.read(position, nbytes)


def test_a_place_before_what_was_read_is_refused() -> None:
    """It may be written to already."""
    _, reader = ring()
    reader.read(512, 64)
    with pytest.raises(ValueError, match="no payload"):
        reader.read(512, 64)


def test_the_reader_hears_of_so_many_bytes_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rings, "ANNOUNCED_BYTES", 300)
    writer, _ = ring()
    write(writer, bytes(299))
    assert not writer.is_due
    write(writer, bytes(1))
    assert writer.is_due
    writer.announced()
    assert not writer.is_due


# --- in a message


def test_a_placed_payload_is_found_by_its_header() -> None:
    writer, reader = ring()
    header = tensor_pb2.TensorBucket(bucket_id=3)
    assert place(header, [memoryview(b"abc"), memoryview(b"defg")], 7, writer) == ()
    assert bytes(placed(header, Frame(10, memoryview(b"")), reader).payload) == b"abcdefg"


def test_a_payload_without_a_place_stays_in_its_message() -> None:
    header, parts = tensor_pb2.TensorBucket(), [memoryview(bytes(SIZE))]
    for writer in (None, ring()[0]):
        assert place(header, parts, SIZE, writer) is parts
        assert not header.HasField("placement")
    frame = Frame(10, memoryview(b"abc"))
    assert placed(header, frame, None) is frame


def test_a_place_where_there_is_no_memory_or_a_second_payload_is_refused() -> None:
    header = tensor_pb2.TensorBucket(placement=tensor_pb2.Placement(position=0, nbytes=8))
    with pytest.raises(ValueError, match="there is none"):
        placed(header, Frame(10, memoryview(b"")), None)
    with pytest.raises(ValueError, match="two places"):
        placed(header, Frame(10, memoryview(b"abc")), ring()[1])
