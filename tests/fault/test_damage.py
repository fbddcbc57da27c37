"""Journals that end anywhere, and bits that flip: a job is brought back to the bit, or refused with a file's name."""

from __future__ import annotations

import logging
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from optimd.client import ProxyOptions
from optimd.server.errors import DataDirError
from optimd.server.files import Files
from optimd.server.job import Job
from optimd.server.kept import settings_of
from optimd.server.log import Log, LogReader, segment_starts
from optimd.server.records import FIXED_BYTES, Record
from optimd.server.recovery import JOURNAL, SNAPSHOTS, Found, recover
from optimd.server.snapshotfile import DATA_NAME, MANIFEST_NAME, SnapshotReader
from optimd.v1 import journal_pb2
from tests.faultfiles import FailingFiles
from tests.keptjobs import Mirror, Point, assert_is_one_of, parameters, recovered
from tests.support import running_server

Apply = Literal["streaming", "atomic"]


@dataclass
class History:
    """A job on disk, and what it had been at which position of its journal."""

    data_dir: Path
    points: list[tuple[int, Point]] = field(default_factory=list)
    """What had been acknowledged when the journal ended there."""

    @property
    def folder(self) -> Path:
        (folder,) = (self.data_dir / "jobs").iterdir()
        return folder

    def allowed_at(self, position: int) -> list[Point]:
        """What a journal that is whole up to there says."""
        place = max(place for place, (at, _) in enumerate(self.points) if at <= position)
        return [point for _, point in self.points[place : place + 2]]

    def copy(self, target: Path) -> History:
        shutil.copytree(self.data_dir, target)
        return History(target, self.points)


def made(folder: Path, act: Callable[[Mirror, Any], None], *, apply: Apply = "streaming", **settings: Any) -> History:
    """The history of a job whose server died."""
    history = History(folder / "left")
    files = FailingFiles()
    with running_server(files=files, data_dir=str(folder / "data"), **settings) as server:
        # Two groups are two buckets, however small.
        mirror = Mirror(
            server.address, params=parameters(sizes=(3,)), options=ProxyOptions(bucket_bytes=1024, apply=apply)
        )
        job = server.registry.get("job")
        positions = [job.journal.position]
        mirror.on_acknowledged = lambda: positions.append(job.journal.position)
        act(mirror, server)
        with files.still():
            shutil.copytree(folder / "data", history.data_dir)
        mirror.close()
    history.points = [*zip(positions, mirror.points, strict=True)]
    return history


def everything(mirror: Mirror, _: Any) -> None:
    mirror.add_group(1, (2, 1))
    mirror.step(2)
    mirror.step(3, without=(0,))
    mirror.accumulate(4)
    mirror.step(5)
    mirror.write()
    mirror.step(6)
    mirror.load()
    mirror.step(7)


def brought_back(folder: Path, *, accept_loss: bool = False) -> Found:
    device = torch.device("cpu")
    return recover(folder, Files(), lambda kept: Job(kept.job, settings_of(kept), device), accept_loss=accept_loss)


def records_of(folder: Path) -> Iterator[tuple[Path, int, Record]]:
    """The records of a journal, with their files and where in these they stand."""
    starts = segment_starts(Files(), folder / JOURNAL)
    for record in LogReader(Files(), folder / JOURNAL).records(starts[0]):
        start = max(start for start in starts if start <= record.position)
        yield folder / JOURNAL / f"{start:020d}.journal", record.position - start, record


def flip(path: Path, at: int, dice: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1 << dice.randrange(8)
    path.write_bytes(content)


@pytest.mark.parametrize("apply", ["streaming", "atomic"])
def test_a_journal_that_ends_at_any_byte_brings_back_what_was_acknowledged_before(tmp_path: Path, apply: Apply) -> None:
    """Over segments; with the buckets of a streamed step that is open. Before it has its values there is no job."""
    history = made(tmp_path, everything, apply=apply, journal_segment_bytes=600)
    (tmp_path / "cut").mkdir()
    folder = tmp_path / "cut" / "job"
    shutil.copytree(history.folder, folder)
    starts = segment_starts(Files(), folder / JOURNAL)
    assert len(starts) > 3
    end = [record for *_, record in records_of(folder)][-1].end
    created = history.points[0][0]
    opens = 0
    # From the end, so that nothing has to be copied anew.
    for position in range(end, -1, -1):
        start = max(start for start in starts if start <= position)
        path = folder / JOURNAL / f"{start:020d}.journal"
        with path.open("r+b") as file:
            file.truncate(position - start)
        found = brought_back(folder)
        if position < created:
            assert found.job is None, position
            assert history.points[0][1].step == 0
        else:
            assert found.job is not None, position
            whole = found.survey.end
            # What pads a record tells nothing.
            assert position - 8 < whole or found.torn_at == whole or not any(path.read_bytes()[whole - start :])
            assert assert_is_one_of(found.job, history.allowed_at(whole)) == 0
            opens += bool(found.open_buckets)
        if position == start:
            path.unlink()
    assert (opens > 0) == (apply == "streaming")


@pytest.mark.parametrize("fsync", ["never", "step"])
def test_a_flipped_bit_in_any_part_of_any_record_is_refused_by_name_or_was_of_the_last_step(
    tmp_path: Path, fsync: str
) -> None:
    """With accept_loss the job goes on from what stands before. What was written last may have been torn: it is cut."""
    history = made(tmp_path, everything, fsync=fsync, journal_segment_bytes=600)
    dice = random.Random(11)
    all_records = [*records_of(history.folder)]
    parts = (range(4), range(4, 8), range(8, 12), range(12, 16), range(16, 24), range(24, FIXED_BYTES))
    refused = cut = 0
    for path, offset, record in all_records:
        message = range(FIXED_BYTES, FIXED_BYTES + len(record.message))
        payload = range(message.stop, message.stop + len(record.payload))
        for part in (*parts, message, payload):
            if not part:
                continue
            content = path.read_bytes()
            flip(path, offset + dice.choice(part), dice)
            is_last = record is all_records[-1][2]
            # Nobody had been told, when the records of the last step were written, that any of them was on the disk.
            if is_last or (fsync == "step" and record.position >= history.points[-2][0]):
                found = brought_back(history.folder)
                assert found.torn_at == record.position
                cut += 1
            else:
                with pytest.raises(DataDirError, match=f"{path}, position {record.position}: .*--accept-loss"):
                    brought_back(history.folder)
                refused += 1
                if record.position < history.points[0][0]:
                    # Nothing stands before it, and what stands behind it is not deleted.
                    with pytest.raises(DataDirError, match=f"damaged at position {record.position}, before the job"):
                        brought_back(history.folder, accept_loss=True)
                    path.write_bytes(content)
                    continue
                found = brought_back(history.folder, accept_loss=True)
                assert found.lost_from == record.position
            assert found.job is not None
            assert_is_one_of(found.job, history.allowed_at(record.position))
            path.write_bytes(content)
    assert refused > 150
    assert cut >= 6


def test_what_is_lost_with_consent_is_gone_and_the_job_goes_on_from_there(tmp_path: Path) -> None:
    """The next start asks for no consent."""
    history = made(tmp_path, everything, fsync="never", journal_segment_bytes=600)
    for number in range(1, len(history.points) - 1):
        at, point = history.points[number]
        damaged = history.copy(tmp_path / str(number))
        path, offset, _ = next(place for place in records_of(damaged.folder) if place[2].position >= at)
        flip(path, offset, random.Random(number))
        with pytest.raises(DataDirError, match=str(path)), recovered(damaged.data_dir):
            pass
        with recovered(damaged.data_dir, accept_loss=True) as jobs:
            assert_is_one_of(jobs["job"], [point])
            worker = next(iter(jobs["job"].parts.company.members))
            jobs["job"].journal.worker_left(worker, place_kept=False)
        with recovered(damaged.data_dir) as jobs:
            assert not jobs["job"].parts.company.members
            assert_is_one_of(jobs["job"], [point])


@pytest.mark.parametrize("index", [0, 1, -2])
def test_a_segment_that_is_missing_is_refused_with_its_position(tmp_path: Path, index: int) -> None:
    """And the name of the one before it; the first by where the journal begins now."""
    history = made(tmp_path, everything, fsync="never", journal_segment_bytes=600)
    starts = segment_starts(Files(), history.folder / JOURNAL)
    (history.folder / JOURNAL / f"{starts[index]:020d}.journal").unlink()
    what = f"{starts[index - 1]:020d}.journal, position {starts[index]}" if index else f"position {starts[1]}"
    with pytest.raises(DataDirError, match=what):
        brought_back(history.folder)


def test_a_step_that_does_not_follow_the_one_before_it_is_refused(tmp_path: Path) -> None:
    """However whole the records are: those of the step in between have been left out."""
    history = made(tmp_path, everything)
    records = [record for *_, record in records_of(history.folder)]
    messages = [journal_pb2.JournalRecord.FromString(record.message) for record in records]
    rounds = [message.round_settled.round for message in messages if message.HasField("round_settled")]
    shutil.rmtree(history.folder / JOURNAL)
    (history.folder / JOURNAL).mkdir()
    log = Log(Files(), history.folder / JOURNAL, position=0, first_message=lambda _: records[0].message)
    for record, message in zip(records[1:], messages[1:], strict=True):
        kind = message.WhichOneof("record")
        if getattr(getattr(message, str(kind)), "round", None) != rounds[1]:
            log.append(record.message, [record.payload])
    log.close()
    with pytest.raises(DataDirError, match="step 3 does not follow step 1"):
        brought_back(history.folder)


# --- snapshots


def with_snapshots(mirror: Mirror, server: Any) -> None:
    mirror.add_group(1, (2, 1))
    for seed in range(2, 8):
        mirror.step(seed)
        if seed % 2:
            server.registry.snapshot("job")
    mirror.step(9)


def damage(path: Path, how: str) -> str:
    """Damages a snapshot. Gives the file's name."""
    name = MANIFEST_NAME if how.startswith("manifest") else DATA_NAME
    file = path / name
    match how.rpartition("-")[2]:
        case "flipped":
            flip(file, file.stat().st_size // 2, random.Random(1))
        case "cut":
            file.write_bytes(file.read_bytes()[:-1])
        case "empty":
            file.write_bytes(b"")
        case "missing":
            file.unlink()
    return name


WAYS = [f"{name}-{how}" for name in ("data", "manifest") for how in ("flipped", "cut", "empty", "missing")]


@pytest.mark.parametrize("how", WAYS)
def test_a_damaged_snapshot_is_named_and_the_one_before_it_and_a_longer_replay_stand_in_for_it(
    tmp_path: Path, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    """To the bit."""
    caplog.set_level(logging.INFO, "optimd")
    history = made(tmp_path, with_snapshots, fsync="never", journal_segment_bytes=700)
    older, newer = sorted((history.folder / SNAPSHOTS).iterdir())
    assert segment_starts(Files(), history.folder / JOURNAL)[0] > 0
    name = damage(newer, how)
    with recovered(history.data_dir) as jobs:
        assert_is_one_of(jobs["job"], [history.points[-1][1]])
    assert f"snapshot {newer.name} cannot be used: {newer / name}" in caplog.text
    assert f"recovered at step {history.points[-1][1].step} from snapshot {older.name}" in caplog.text


def test_the_damaged_snapshot_may_be_the_older_one(tmp_path: Path) -> None:
    """Nobody needs it."""
    history = made(tmp_path, with_snapshots, fsync="never", journal_segment_bytes=700)
    older, _ = sorted((history.folder / SNAPSHOTS).iterdir())
    damage(older, "data-flipped")
    found = brought_back(history.folder)
    assert found.job is not None
    assert not found.damaged
    assert_is_one_of(found.job, [history.points[-1][1]])


@pytest.mark.parametrize("accept_loss", [False, True])
def test_without_a_good_snapshot_a_job_whose_journal_has_no_beginning_is_refused_and_left_as_it_is(
    tmp_path: Path, accept_loss: bool
) -> None:
    """By the names of both. There is nothing to go on from."""
    history = made(tmp_path, with_snapshots, fsync="never", journal_segment_bytes=700)
    older, newer = sorted((history.folder / SNAPSHOTS).iterdir())
    damage(older, "manifest-flipped")
    damage(newer, "data-cut")
    before = sorted(history.folder.rglob("*"))
    with pytest.raises(DataDirError) as caught, recovered(history.data_dir, accept_loss=accept_loss):
        pass
    assert str(older / MANIFEST_NAME) in str(caught.value)
    assert str(newer / DATA_NAME) in str(caught.value)
    assert "restore the folder from a backup" in str(caught.value)
    assert sorted(history.folder.rglob("*")) == before


def test_without_a_good_snapshot_a_job_whose_journal_is_whole_is_replayed_from_its_beginning(tmp_path: Path) -> None:
    """No segment was complete when the snapshots were taken."""
    history = made(tmp_path, with_snapshots)
    for path in (history.folder / SNAPSHOTS).iterdir():
        damage(path, "data-flipped")
    found = brought_back(history.folder)
    assert found.job is not None
    assert (found.snapshot, len(found.damaged)) == ("", 2)
    assert_is_one_of(found.job, [history.points[-1][1]])


def test_a_record_before_the_snapshot_may_be_damaged_and_one_behind_it_is_refused(tmp_path: Path) -> None:
    """With accept_loss the snapshot's job goes on, and the older snapshot's where it needs what is damaged."""
    history = made(tmp_path, with_snapshots, fsync="never", journal_segment_bytes=700)
    older, newer = sorted((history.folder / SNAPSHOTS).iterdir())
    needed = SnapshotReader(Files(), newer).manifest.replay_from
    seen = set()
    for path, offset, record in [*records_of(history.folder)][:-1]:
        content = path.read_bytes()
        flip(path, offset, random.Random(record.position))
        if record.position < needed:
            found = brought_back(history.folder)
            assert found.job is not None
            assert_is_one_of(found.job, [history.points[-1][1]])
        else:
            with pytest.raises(DataDirError, match=f"{path}, position {record.position}"):
                brought_back(history.folder)
            found = brought_back(history.folder, accept_loss=True)
            assert found.job is not None
            assert_is_one_of(found.job, history.allowed_at(record.position))
        seen.add((record.position < needed, found.snapshot))
        path.write_bytes(content)
    assert seen == {(True, newer.name), (False, newer.name)}
    damage(newer, "data-flipped")
    path, offset, _ = next(place for place in records_of(history.folder) if place[2].position >= needed - 1)
    flip(path, offset, random.Random(0))
    found = brought_back(history.folder, accept_loss=True)
    assert found.job is not None
    assert found.snapshot == older.name
