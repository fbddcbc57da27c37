"""The files that other tests fail and crash: what they leave is what a disk may be left with."""

from __future__ import annotations

import errno
import math
import random
from pathlib import Path

import pytest

from optimd.server.files import Files
from tests.faultfiles import FailingFiles, VolatileFiles, everything, nothing, some


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b"folder"
        for path in sorted(folder.rglob("*"))
    }


@pytest.fixture
def disk(tmp_path: Path) -> VolatileFiles:
    root = tmp_path / "disk"
    root.mkdir()
    return VolatileFiles(root)


def make(files: Files, path: Path, content: bytes, *, synced: bool = True) -> int:
    descriptor = files.open(path)
    files.write(descriptor, [content], 0)
    if synced:
        files.sync(descriptor)
        files.sync_folder(path.parent)
    return descriptor


def test_what_was_synced_outlives_a_power_loss_and_nothing_else_has_to(disk: VolatileFiles, tmp_path: Path) -> None:
    """Contents and names are two things, each with a sync of its own."""
    root = tmp_path / "disk"
    both = make(disk, root / "both", b"a" * 2000)
    make(disk, root / "unnamed", b"synced", synced=False)
    disk.sync(both)
    disk.write(both, [b"b" * 600], 1000)
    disk.rename(root / "both", root / "renamed")
    disk.crash(tmp_path / "nothing", nothing)
    assert contents(tmp_path / "nothing") == {"both": b"a" * 2000}
    disk.crash(tmp_path / "everything", everything)
    assert contents(tmp_path / "everything") == contents(root)
    disk.sync_folder(root)
    disk.crash(tmp_path / "named", nothing)
    assert contents(tmp_path / "named") == {"renamed": b"a" * 2000, "unnamed": b""}


def test_blocks_and_names_survive_in_no_order_and_a_file_never_has_two_names(
    disk: VolatileFiles, tmp_path: Path
) -> None:
    """All mixtures come about."""
    root = tmp_path / "disk"
    descriptor = make(disk, root / "file", b"a" * 1536)
    disk.write(descriptor, [b"b" * 1536], 0)
    disk.rename(root / "file", root / "spare")
    disk.rename(root / "spare", root / "again")
    seen = set()
    for seed in range(100):
        disk.crash(tmp_path / str(seed), some(random.Random(seed)))
        ((name, content),) = contents(tmp_path / str(seed)).items()
        assert len(content) == 1536
        seen.add((name, content[::512]))
    assert {name for name, _ in seen} == {"file", "spare", "again"}
    assert {blocks for _, blocks in seen} >= {b"aaa", b"bbb", b"aab", b"baa", b"aba", b"bab"}


def test_a_removed_folder_may_be_there_in_part(disk: VolatileFiles, tmp_path: Path) -> None:
    """Until the one above it is synced."""
    root = tmp_path / "disk"
    disk.make_folder(root / "folder")
    for name in "ab":
        make(disk, root / "folder" / name, b"content")
    disk.sync_folder(root)
    disk.remove(root / "folder")
    assert contents(root) == {}
    seen = set()
    for seed in range(60):
        disk.crash(tmp_path / str(seed), some(random.Random(seed)))
        seen.add(tuple(contents(tmp_path / str(seed))))
    assert {(), ("folder",), ("folder", "folder/a"), ("folder", "folder/a", "folder/b")} <= seen
    disk.sync_folder(root)
    disk.crash(tmp_path / "after", nothing)
    assert contents(tmp_path / "after") == {}


def test_what_a_failed_sync_was_to_bring_to_the_disk_never_gets_there(disk: VolatileFiles, tmp_path: Path) -> None:
    """Though the next one succeeds: the system has said so once."""
    root = tmp_path / "disk"
    descriptor = make(disk, root / "file", b"synced")
    fault = disk.fail("sync")
    disk.write(descriptor, [b"lost"], 0)
    with pytest.raises(OSError, match="Input/output error"):
        disk.sync(descriptor)
    assert fault.fired == 1
    disk.write(descriptor, [b"behind"], 6)
    disk.sync(descriptor)
    disk.crash(tmp_path / "left", nothing)
    assert contents(tmp_path / "left") == {"file": b"syncedbehind"}
    assert contents(root) == {"file": b"losted" + b"behind"}


def test_the_call_that_is_to_fail_fails_and_no_other(tmp_path: Path) -> None:
    """Counted from when it was planned, below a path, once or until it is stopped."""
    files = FailingFiles()
    other = make(files, tmp_path / "other", b"before")
    descriptor = files.open(tmp_path / "file")
    once = files.fail("write_some", 2, code=errno.ENOSPC, written=0.5, below="file")
    files.write(other, [b"not counted"], 0)
    files.write(descriptor, [b"first"], 0)
    with pytest.raises(OSError, match="No space left"):
        files.write(descriptor, [b"SECOND"], 5)
    assert (tmp_path / "file").read_bytes() == b"firstSEC"
    files.write(descriptor, [b"third"], 0)
    assert (once.seen, once.fired) == (3, 1)
    lasting = files.fail("sync", times=math.inf)
    for _ in range(3):
        with pytest.raises(OSError, match="Input/output error"):
            files.sync(descriptor)
    lasting.stop()
    files.sync(descriptor)
    assert lasting.fired == 3
    short = files.fail("write_some", code=0, written=0.2)
    files.write(descriptor, [b"in two pieces"], 0)
    assert short.fired == 1
    assert (tmp_path / "file").read_bytes() == b"in two pieces"
