"""A journal's bytes: what was appended is read back in order, and what is not whole is known not to be."""

from __future__ import annotations

import errno
import os
import random
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optimd.server.files import Files
from optimd.server.log import Log, LogDamageError, LogReader, LogSyncError, segment_starts
from optimd.server.records import FIXED_BYTES, Record, read_record
from tests.faultfiles import FailingFiles, Keeps, Operation, VolatileFiles, everything, nothing, some

SEGMENT_BYTES = 320


class SyncedFiles(Files):
    """Knows how far each segment is on the disk, and which records say more."""

    def __init__(self) -> None:
        self.written: dict[int, int] = {}
        self.synced: dict[int, int] = {}
        self.overstated: list[int] = []
        self._starts: dict[int, int] = {}

    def open(self, path: Path) -> int:
        descriptor = super().open(path)
        self._starts[descriptor] = int(path.stem) if path.stem.isdecimal() else 0
        return descriptor

    def write_some(self, descriptor: int, parts: Sequence[memoryview], offset: int) -> int:
        written = super().write_some(descriptor, parts, offset)
        start = self._starts[descriptor]
        record = read_record(lambda length, at: self.read(descriptor, length, at - start), start + offset)
        assert record is not None
        if start < record.synced and self.synced.get(start, 0) < record.synced:
            self.overstated.append(record.position)
        self.written[start] = record.end
        return written

    def sync(self, descriptor: int) -> None:
        # Nothing is really synced: no test outlives a power loss.
        start = self._starts[descriptor]
        self.synced[start] = max(self.synced.get(start, 0), self.written[start])

    def sync_folder(self, folder: Path) -> None:
        pass


def opened(
    folder: Path, files: Files, *, position: int = 0, durable: bool = True, segment_bytes: int = SEGMENT_BYTES
) -> Log:
    return Log(
        files,
        folder,
        position=position,
        first_message=lambda start: b"begins at %d" % start,
        segment_bytes=segment_bytes,
        durable=durable,
    )


def written(folder: Path, count: int, *, files: Files | None = None, durable: bool = True) -> list[tuple[int, int]]:
    """A log of `count` records over some segments. Gives where they begin and end."""
    log = opened(folder, files or FailingFiles(), durable=durable)
    places = []
    for number in range(count):
        end = log.append(message(number), [payload(number)])
        places.append((end - length(number), end))
        log.sync(end)
    log.close()
    return places


def message(number: int) -> bytes:
    return b"record %d" % number


def payload(number: int) -> memoryview:
    return memoryview(random.Random(number).randbytes(11 * number % 70))


def length(number: int) -> int:
    content = FIXED_BYTES + len(message(number)) + len(payload(number))
    return -(-content // 8) * 8


def read(folder: Path, position: int = 0) -> tuple[list[Record], LogReader]:
    """All records but those that begin segments."""
    reader = LogReader(Files(), folder)
    return [record for record in reader.records(position) if not record.message.startswith(b"begins")], reader


def assert_records(records: list[Record], numbers: Iterator[int] | range) -> None:
    assert [(record.message, bytes(record.payload)) for record in records] == [
        (message(number), bytes(payload(number))) for number in numbers
    ]


LONG = b"too long for what is left of a segment"


def recycling(folder: Path, files: Files) -> Log:
    """A log of which the files of the first segments wait to be used again."""
    log = opened(folder, files)
    for number in range(30):
        log.append(message(number))
    log.sync(log.position)
    log.drop_before(log.position)
    assert [path for path in folder.iterdir() if path.name.startswith("spare")]
    return log


def fill(folder: Path, log: Log) -> None:
    """Leaves room for an empty record in the segment, and not for `LONG`."""
    while segment_starts(Files(), folder)[-1] + SEGMENT_BYTES - log.position >= 2 * FIXED_BYTES:
        log.append(b"")
    assert FIXED_BYTES <= segment_starts(Files(), folder)[-1] + SEGMENT_BYTES - log.position < FIXED_BYTES + len(LONG)


# --- in order


def test_records_are_read_back_in_order_over_segments(tmp_path: Path) -> None:
    """From the first, and from each of the others."""
    places = written(tmp_path, 20)
    assert len(segment_starts(Files(), tmp_path)) > 3
    for number, (begin, _) in enumerate(places):
        records, reader = read(tmp_path, begin)
        assert_records(records, range(number, 20))
        assert reader.torn_at is None
    assert not read(tmp_path, places[-1][1])[0]


def test_a_segment_begins_with_its_own_record_and_where_the_one_before_it_ends(tmp_path: Path) -> None:
    """Nothing is lost between two, and each says which it is."""
    written(tmp_path, 20)
    records = list(LogReader(Files(), tmp_path).records(0))
    firsts = [record.position for record in records if record.message == b"begins at %d" % record.position]
    assert firsts == segment_starts(Files(), tmp_path)
    assert [record.end for record in records[:-1]] == [record.position for record in records[1:]]


def test_a_log_goes_on_in_a_segment_of_its_own_when_it_is_opened_again(tmp_path: Path) -> None:
    """Behind what the one before it has written."""
    end = written(tmp_path, 5)[-1][1]
    log = opened(tmp_path, Files(), position=end)
    log.append(message(5), [payload(5)])
    log.close()
    assert_records(read(tmp_path)[0], range(6))
    assert end in segment_starts(Files(), tmp_path)


def test_a_record_longer_than_a_segment_has_one_of_its_own(tmp_path: Path) -> None:
    """The limit is where the next one begins, not how long a record may be."""
    log = opened(tmp_path, Files())
    log.append(b"before")
    log.append(b"long", [memoryview(bytes(10 * SEGMENT_BYTES))])
    log.append(b"behind")
    log.close()
    assert [record.message for record in read(tmp_path)[0]] == [b"before", b"long", b"behind"]


def test_a_log_that_was_never_written_to_has_no_records(tmp_path: Path) -> None:
    """Nor a file."""
    opened(tmp_path, Files()).close()
    assert read(tmp_path)[0] == []
    assert [*tmp_path.iterdir()] == []


# --- files that are used again


def test_what_an_earlier_use_of_a_file_has_left_is_never_read(tmp_path: Path) -> None:
    """Whole records of it stand right behind the end, at other positions."""
    log = recycling(tmp_path, FailingFiles())
    start = segment_starts(Files(), tmp_path)[0]
    stale = 0
    for number in range(30, 90):
        log.append(message(number))
        records, reader = read(tmp_path, start)
        assert records[-1].message == message(number)
        assert reader.torn_at is None
        path = tmp_path / f"{segment_starts(Files(), tmp_path)[-1]:020d}.journal"
        stale += path.stat().st_size > log.position - int(path.stem) + FIXED_BYTES
    assert stale > 5
    log.close()


def test_a_file_that_was_to_be_used_again_when_the_server_died_holds_no_records(tmp_path: Path) -> None:
    """It has its new name, and its old content."""
    files = FailingFiles()
    log = recycling(tmp_path, files)
    fill(tmp_path, log)
    end = log.position
    fault = files.fail("write_some")
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        log.append(LONG)
    assert fault.fired == 1
    log.close()
    path = tmp_path / f"{end:020d}.journal"
    assert path.stat().st_size > 0
    records, reader = read(tmp_path, segment_starts(Files(), tmp_path)[0])
    assert (records[-1].end, reader.torn_at) == (end, end)
    reader.cut(end)
    assert not path.exists()
    records, reader = read(tmp_path, segment_starts(Files(), tmp_path)[0])
    assert (records[-1].end, reader.torn_at) == (end, None)


# --- what is not whole


def test_a_log_that_ends_anywhere_has_the_records_before_that(tmp_path: Path) -> None:
    """Whatever the byte; and it can be gone on with from there."""
    whole = tmp_path / "whole"
    whole.mkdir()
    log = opened(whole, Files(), segment_bytes=1 << 20)
    for number in range(8):
        log.append(message(number), [payload(number)])
    log.close()
    content = (whole / f"{0:020d}.journal").read_bytes()
    all_records = list(LogReader(Files(), whole).records(0))
    for size in range(len(content)):
        folder = tmp_path / f"{size}"
        folder.mkdir()
        (folder / f"{0:020d}.journal").write_bytes(content[:size])
        there = [
            record
            for record in all_records
            if record.position + FIXED_BYTES + len(record.message) + len(record.payload) <= size
        ]
        reader = LogReader(Files(), folder)
        assert list(reader.records(0)) == there
        end = there[-1].end if there else 0
        # Zeros tell nothing: of a record that has been begun there is more.
        assert reader.torn_at == (end if any(content[end:size]) else None)
        reader.cut(end)
        log = opened(folder, Files(), position=end)
        log.append(b"record behind")
        log.close()
        assert [record.message for record in read(folder)[0]] == [
            *(record.message for record in there[1:]),
            b"record behind",
        ]


@pytest.mark.parametrize("durable", [True, False])
def test_a_flipped_bit_is_found_wherever_it_is(tmp_path: Path, durable: bool) -> None:
    """With good records behind it the file and the position are named; the last one is told to be torn."""
    places = written(tmp_path, 9, durable=durable)
    starts = segment_starts(Files(), tmp_path)
    assert len(starts) > 2
    records = list(LogReader(Files(), tmp_path).records(0))
    dice = random.Random(3)
    for record in records:
        start = max(start for start in starts if start <= record.position)
        path = tmp_path / f"{start:020d}.journal"
        content = path.read_bytes()
        for at in range(record.position, record.position + FIXED_BYTES + len(record.message) + len(record.payload)):
            flipped = bytearray(content)
            flipped[at - start] ^= 1 << dice.randrange(8)
            path.write_bytes(flipped)
            reader = LogReader(Files(), tmp_path)
            seen: list[Record] = []
            if record is records[-1]:
                seen += reader.records(0)
                assert reader.torn_at == record.position
            else:
                with pytest.raises(LogDamageError) as caught:
                    seen.extend(reader.records(0))
                assert (caught.value.path, caught.value.position) == (path, record.position)
                assert str(path) in str(caught.value)
            assert [each.position for each in seen] == [
                each.position for each in records if each.position < record.position
            ]
        path.write_bytes(content)
    assert read(tmp_path)[0][-1].end == places[-1][1]


def test_a_missing_segment_is_named(tmp_path: Path) -> None:
    """By the one that should be followed by it; the first by the one behind it. The last is not missed."""
    written(tmp_path, 20)
    starts = segment_starts(Files(), tmp_path)
    for index, start in enumerate(starts[:-1]):
        path = tmp_path / f"{start:020d}.journal"
        content = path.read_bytes()
        path.unlink()
        with pytest.raises(LogDamageError) as caught:
            list(LogReader(Files(), tmp_path).records(0))
        assert caught.value.position == start
        assert caught.value.path == tmp_path / f"{starts[index - 1] if index else starts[1]:020d}.journal"
        path.write_bytes(content)


def test_cutting_takes_away_what_stands_behind_and_nothing_else(tmp_path: Path) -> None:
    """Wherever it is cut, in the middle of a segment and between two."""
    (tmp_path / "whole").mkdir()
    places = written(tmp_path / "whole", 12)
    for number, (begin, _) in enumerate(places):
        folder = tmp_path / f"{number}"
        folder.mkdir()
        for path in (tmp_path / "whole").iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        LogReader(Files(), folder).cut(begin)
        records, reader = read(folder)
        assert_records(records, range(number))
        assert reader.torn_at is None


# --- durability


def test_what_did_not_reach_the_disk_before_the_power_went_is_cut_and_all_before_it_is_there(tmp_path: Path) -> None:
    """Blocks reach a disk in any order: a whole record may stand behind one that is not."""
    holes = 0
    for seed in range(200):
        dice = random.Random(seed)
        disk = tmp_path / f"{seed}"
        disk.mkdir()
        files = VolatileFiles(disk)
        log = opened(disk, files, segment_bytes=3000)
        synced = 0
        for number in range(20):
            end = log.append(message(number), [memoryview(dice.randbytes(dice.choice((10, 700))))])
            if dice.random() < 0.2:
                log.sync(end)
                synced = number + 1
        files.crash(tmp_path / f"{seed}-left", some(dice))
        records, reader = read(tmp_path / f"{seed}-left")
        assert [record.message for record in records] == [message(number) for number in range(len(records))]
        assert synced <= len(records)
        torn = reader.torn_at
        if torn is not None:
            left = [*(tmp_path / f"{seed}-left").iterdir()]
            holes += any(
                message(number) in path.read_bytes() for number in range(len(records) + 1, 20) for path in left
            )
            reader.cut(torn)
        log.close()
        log = opened(tmp_path / f"{seed}-left", Files(), position=records[-1].end if records else torn or 0)
        log.append(b"record behind")
        log.close()
        assert [record.message for record in read(tmp_path / f"{seed}-left")[0]] == [
            *(message(number) for number in range(len(records))),
            b"record behind",
        ]
    assert holes > 20, "no record stood behind one that was lost"


@pytest.mark.parametrize("keeps", [nothing, everything])
def test_all_that_was_synced_is_on_the_disk_whatever_else_is(tmp_path: Path, keeps: Keeps) -> None:
    """Names included: a segment's own and that of a file that is used again."""
    disk = tmp_path / "disk"
    disk.mkdir()
    files = VolatileFiles(disk)
    log = opened(disk, files)
    for number in range(40):
        begin = log.position
        log.sync(log.append(message(number), [payload(number)]))
        files.crash(tmp_path / f"{number}", keeps)
        assert_records(read(tmp_path / f"{number}", begin if number > 10 else 0)[0][-1:], [number])
        if number > 10:
            log.drop_before(begin)
    assert files.calls["rename"] > 2
    log.close()


class BlockingFiles(Files):
    """Whose syncs wait until they are let go, and are counted."""

    def __init__(self) -> None:
        self.syncs = 0
        self.begun = threading.Semaphore(0)
        self.let_go = threading.Semaphore(0)
        self.fails = False

    def sync(self, descriptor: int) -> None:
        self.syncs += 1
        self.begun.release()
        assert self.let_go.acquire(timeout=20)
        if self.fails:
            raise OSError(errno.EIO, "the disk is gone")


def test_one_sync_serves_all_that_have_come_meanwhile(tmp_path: Path) -> None:
    """Five wait while one is under way; the next one is for all of them."""
    files = BlockingFiles()
    log = opened(tmp_path, files, segment_bytes=1 << 20)
    with ThreadPoolExecutor(6) as pool:
        first = pool.submit(log.sync, log.append(b"first"))
        assert files.begun.acquire(timeout=20)
        waiting = [pool.submit(log.sync, log.append(b"another")) for _ in range(5)]
        files.let_go.release()
        first.result(20)
        assert files.begun.acquire(timeout=20)
        assert not any(each.done() for each in waiting)
        files.let_go.release(6)
        for each in waiting:
            each.result(20)
    assert files.syncs == 2
    log.close()


def test_what_is_appended_during_a_sync_is_not_counted_as_synced(tmp_path: Path) -> None:
    """The sync may or may not have it on the disk."""
    files = BlockingFiles()
    log = opened(tmp_path, files, segment_bytes=1 << 20)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(log.sync, log.append(b"before"))
        assert files.begun.acquire(timeout=20)
        end = log.append(b"meanwhile")
        files.let_go.release()
        first.result(20)
        assert files.syncs == 1
        second = pool.submit(log.sync, end)
        assert files.begun.acquire(timeout=20)
        assert not second.done()
        files.let_go.release()
        second.result(20)
    assert files.syncs == 2
    log.sync(end)
    assert files.syncs == 2
    log.close()


def test_no_record_counts_what_is_not_on_the_disk_as_synced(tmp_path: Path) -> None:
    """Whatever other threads sync while segments are begun: after a power loss that would be taken for damage."""
    files = SyncedFiles()
    log = opened(tmp_path, files, segment_bytes=120)
    ended = threading.Event()

    def sync() -> None:
        while not ended.is_set():
            log.sync(log.position)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(2) as pool:
            syncing = [pool.submit(sync) for _ in range(2)]
            for number in range(2000):
                log.append(message(number))
                if number % 50 == 0:
                    log.drop_before(log.position)
            ended.set()
            for each in syncing:
                each.result(20)
    finally:
        ended.set()
        sys.setswitchinterval(interval)
    log.close()
    assert files.overstated == []
    assert len(files.written) == 2000


def test_a_segment_that_is_begun_during_a_sync_is_synced_with_the_next(tmp_path: Path) -> None:
    """And the one before it is let go of once it is complete and on the disk."""
    files = BlockingFiles()
    log = opened(tmp_path, files)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(log.sync, log.append(b"before"))
        assert files.begun.acquire(timeout=20)
        while len(segment_starts(Files(), tmp_path)) < 2:
            end = log.append(b"meanwhile")
        files.let_go.release()
        first.result(20)
        files.let_go.release(2)
        log.sync(end)
        assert files.syncs == 3  # both segments
        files.let_go.release()
        log.sync(log.append(b"behind"))
        assert files.syncs == 4
    log.close()


def test_a_failed_sync_fails_all_that_follow_until_the_log_begins_anew(tmp_path: Path) -> None:
    """Who waited for it hears of it as well; what had been synced before stays so."""
    files = BlockingFiles()
    log = opened(tmp_path, files, segment_bytes=1 << 20)
    files.let_go.release()
    synced = log.append(b"before")
    log.sync(synced)
    files.begun.acquire()
    files.fails = True
    with ThreadPoolExecutor(3) as pool:
        end = log.append(b"lost")
        failing = [pool.submit(log.sync, end)]
        assert files.begun.acquire(timeout=20)
        failing += [pool.submit(log.sync, log.append(b"lost too")) for _ in range(2)]
        files.let_go.release()
        for each in failing:
            with pytest.raises(LogSyncError, match="the disk is gone"):
                each.result(20)
    assert files.syncs == 2, "after a failure another sync tells nothing"
    files.fails = False
    log.sync(synced)
    assert not log.is_sound
    with pytest.raises(LogSyncError):
        log.sync(log.append(b"and this"))
    # All of it is kept elsewhere, but for what is in a segment of its own.
    log.leave_segment()
    start = log.position
    log.append(b"kept")
    files.let_go.release()
    log.sync_behind(start)
    assert (files.syncs, log.is_sound) == (3, False)
    log.begin_anew(start)
    assert log.is_sound
    log.sync(log.position)
    assert files.syncs == 3
    files.let_go.release()
    log.sync(log.append(b"anew"))
    assert files.syncs == 4
    assert segment_starts(Files(), tmp_path) == [0, start]
    assert [record.message for record in read(tmp_path, start)[0]] == [b"kept", b"anew"]
    log.close()


def test_a_log_of_which_all_is_kept_elsewhere_begins_anew_with_the_next_record(tmp_path: Path) -> None:
    """No file of those before is synced again, or open."""
    before = open_files()
    files = FailingFiles()
    log = opened(tmp_path, files)
    for number in range(20):
        log.append(message(number))
    files.fail("sync")
    with pytest.raises(LogSyncError):
        log.sync(log.position)
    start = log.position
    log.leave_segment()
    log.sync_behind(start)
    log.begin_anew(start)
    assert (files.calls["sync"], open_files()) == (0, before)
    log.sync(log.append(b"anew"))
    assert (files.calls["sync"], open_files()) == (1, before + 1)
    assert [record.message for record in read(tmp_path, start)[0]] == [b"anew"]
    log.close()


def open_files() -> int:
    return len([*Path("/proc/self/fd").iterdir()])


def test_a_log_that_nobody_syncs_keeps_few_files_open(tmp_path: Path) -> None:
    """However many segments there are."""
    log = opened(tmp_path, Files(), durable=False)
    before = open_files()
    for number in range(400):
        log.append(message(number))
    assert len(segment_starts(Files(), tmp_path)) > 60
    assert open_files() - before < 40
    log.sync(log.position)
    log.close()
    assert open_files() == before
    assert [record.message for record in read(tmp_path)[0]] == [message(number) for number in range(400)]


# --- dropping


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_dropping_never_takes_what_is_needed(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Neither what stands at or behind the position, nor what is not synced yet."""
    folder = tmp_path_factory.mktemp("log")
    log = opened(folder, FailingFiles())
    places: list[tuple[int, int]] = []
    dropped = synced = 0
    for number in range(data.draw(st.integers(1, 40))):
        end = log.append(message(number), [payload(number)])
        places.append((end - length(number), end))
        action = data.draw(st.sampled_from(("none", "none", "none", "sync", "drop")))
        if action == "sync":
            log.sync(end)
            synced = end
        elif action == "drop":
            position = data.draw(st.sampled_from(places))[0]
            dropped = max(dropped, position)
            log.drop_before(position)
    needed = [number for number, (begin, end) in enumerate(places) if begin >= dropped or end > synced]
    records, _ = read(folder, places[needed[0]][0]) if needed else ([], None)
    assert_records(records, [*needed] if not needed else range(needed[0], len(places)))
    log.close()


def test_dropped_files_are_kept_for_use_in_a_small_number(tmp_path: Path) -> None:
    """The others are removed."""
    log = opened(tmp_path, Files(), durable=False)
    for number in range(400):
        log.append(message(number))
    log.sync(log.position)
    log.drop_before(log.position)
    assert len(segment_starts(Files(), tmp_path)) == 1
    assert 0 < len([path for path in tmp_path.iterdir() if path.name.startswith("spare")]) <= 16
    log.close()


# --- appending that fails


@pytest.mark.parametrize("code", [errno.ENOSPC, 0])
def test_an_append_that_fails_at_any_byte_can_be_tried_again(tmp_path: Path, code: int) -> None:
    """Of the bytes before it all are on the disk. A short write is gone on with and is no failure."""
    tries = 0
    for tenth in range(11):
        for call in range(1, 13):
            folder = tmp_path / f"{tenth}-{call}"
            folder.mkdir()
            files = FailingFiles()
            log = opened(folder, files)
            fault = files.fail("write_some", call, code=code, written=tenth / 10)
            for number in range(12):
                try:
                    log.append(message(number), [payload(number)])
                except OSError:
                    tries += 1
                    log.append(message(number), [payload(number)])
            assert fault.fired == 1
            log.sync(log.position)
            log.close()
            records, reader = read(folder)
            assert_records(records, range(12))
            assert reader.torn_at is None
    assert tries == (11 * 12 if code else 0)


@pytest.mark.parametrize("operation", ["open", "rename", "sync_folder", "write_some"])
def test_a_segment_that_could_not_be_begun_is_begun_with_the_next_append(tmp_path: Path, operation: Operation) -> None:
    """Even where that one would have fitted into the segment before it, and wherever the files come from."""
    files = FailingFiles()
    log = recycling(tmp_path, files)
    fill(tmp_path, log)
    start = log.position
    fault = files.fail(operation)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        log.append(LONG)
    assert fault.fired == 1
    assert log.position == start
    log.append(b"")
    log.append(b"behind")
    log.sync(log.position)
    log.close()
    records, reader = read(tmp_path, segment_starts(Files(), tmp_path)[0])
    assert [record.message for record in records[-2:]] == [b"", b"behind"]
    assert reader.torn_at is None
    assert start in segment_starts(Files(), tmp_path)
