"""A server's data dir: whose it is, which version, and a folder for each job."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from optimd.server.datadir import DataDir
from optimd.server.errors import DataDirError
from optimd.server.files import ReadOnlyFiles
from tests.faultfiles import FailingFiles, Operation, VolatileFiles, nothing

LONG = "a" * 1024
NAMES = (
    "resnet50",
    "a/b",
    "a-b",
    "../../etc/passwd",
    "..",
    ".",
    "",
    ".hidden",
    "gone-fishing",
    "making",
    "Größe",
    "大きい",
    "a b",
    "A-B",
    LONG,
    LONG + "b",
    "🙂" * 256,
)


def test_a_data_dir_is_made_with_all_folders_above_it_and_can_be_opened_again(tmp_path: Path) -> None:
    """An empty folder will do as well."""
    for folder in (tmp_path / "a" / "b", tmp_path / "empty"):
        if folder.name == "empty":
            folder.mkdir()
        DataDir(folder).close()
        assert (folder / "FORMAT").read_text() == "optimd data dir, version 1\n"
        again = DataDir(folder)
        assert [*again.job_folders()] == []
        again.close()


def test_a_data_dir_is_one_servers_at_a_time(tmp_path: Path) -> None:
    """The second one is told so, and can have it once the first has closed it."""
    first = DataDir(tmp_path)
    with pytest.raises(DataDirError, match=f"another server is using the data dir {tmp_path}; .*--data-dir"):
        DataDir(tmp_path)
    first.close()
    DataDir(tmp_path).close()


def test_a_data_dir_that_is_read_is_left_as_it_is(tmp_path: Path) -> None:
    """Leftovers too. No server can have it meanwhile, and others can read it."""
    DataDir(tmp_path).close()
    (tmp_path / "jobs" / "job").mkdir()
    (tmp_path / "jobs" / ".gone-job").mkdir()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    first, second = (DataDir.to_read(tmp_path, ReadOnlyFiles()) for _ in range(2))
    assert [*first.job_folders()] == [*second.job_folders()] == [tmp_path / "jobs" / "job"]
    with pytest.raises(DataDirError, match="is using the data dir"):
        DataDir(tmp_path)
    for change in (first.files.make_folder, first.files.remove):
        with pytest.raises(OSError, match="Read-only"):
            change(tmp_path / "jobs" / "job")
    with pytest.raises(OSError, match="Read-only"):
        first.files.rename(tmp_path / "LOCK", tmp_path / "KEY")
    descriptor = first.files.open(tmp_path / "FORMAT")
    with pytest.raises(OSError, match="Bad file descriptor"):
        first.files.write(descriptor, [b"x"], 0)
    first.files.close(descriptor)
    first.close()
    second.close()
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    DataDir(tmp_path).close()


def test_a_data_dir_without_its_lock_can_be_read(tmp_path: Path) -> None:
    """A copy may be without: no server has ever had it."""
    DataDir(tmp_path).close()
    (tmp_path / "LOCK").unlink()
    DataDir.to_read(tmp_path, ReadOnlyFiles()).close()
    assert not (tmp_path / "LOCK").exists()


def test_a_server_of_another_process_holds_its_data_dir_until_it_dies(tmp_path: Path) -> None:
    """However it dies."""
    script = f"""
import sys, pathlib
from optimd.server.datadir import DataDir
DataDir(pathlib.Path({str(tmp_path)!r}))
print("locked", flush=True)
sys.stdin.read()
"""
    process = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "locked\n"
        with pytest.raises(DataDirError, match="another server"):
            DataDir(tmp_path)
    finally:
        process.kill()
        process.communicate(timeout=10)
    assert process.returncode == -signal.SIGKILL
    DataDir(tmp_path).close()


def test_a_folder_with_other_things_in_it_is_refused_and_left_alone(tmp_path: Path) -> None:
    """Once it is empty it can be used, by the same process too."""
    foreign = tmp_path / "thesis.tex"
    foreign.write_text("irreplaceable")
    with pytest.raises(DataDirError, match="holds other things than an optimd data dir"):
        DataDir(tmp_path)
    assert [*tmp_path.iterdir()] == [foreign]
    foreign.unlink()
    DataDir(tmp_path).close()


@pytest.mark.parametrize("text", ["optimd data dir, version 2\n", "optimd data dir, version 11\n", "", "\xff"])
def test_another_version_is_refused_and_named(tmp_path: Path, text: str) -> None:
    """So is what is none; the data dir is free again afterwards."""
    DataDir(tmp_path).close()
    (tmp_path / "FORMAT").write_bytes(text.encode("latin1"))
    for _ in range(2):
        with pytest.raises(DataDirError, match=f"{tmp_path} says .*; this server reads version 1") as caught:
            DataDir(tmp_path)
        assert text.strip() in str(caught.value) or text == "\xff"
    (tmp_path / "FORMAT").write_text("optimd data dir, version 1\n")
    DataDir(tmp_path).close()


@pytest.mark.parametrize("operation", ["make_folder", "open", "write_some", "sync", "rename", "sync_folder"])
def test_a_data_dir_that_cannot_be_made_is_an_error_with_its_path_and_can_be_made_later(
    tmp_path: Path, operation: Operation
) -> None:
    """The same process may try again."""
    files = FailingFiles()
    fault = files.fail(operation)
    with pytest.raises(DataDirError, match=f"the data dir {tmp_path} cannot be used: Input/output error"):
        DataDir(tmp_path, files)
    assert fault.fired == 1
    DataDir(tmp_path, files).close()


def test_a_file_in_the_place_of_a_data_dir_is_an_error(tmp_path: Path) -> None:
    """With the path and the reason."""
    (tmp_path / "file").touch()
    with pytest.raises(DataDirError, match="file cannot be used"):
        DataDir(tmp_path / "file")


def test_a_new_data_dir_is_on_the_disk_with_all_folders_above_it(tmp_path: Path) -> None:
    """Whatever is synced in it later would be lost without its name."""
    disk = tmp_path / "disk"
    disk.mkdir()
    files = VolatileFiles(disk)
    DataDir(disk / "a" / "b", files).close()
    files.crash(tmp_path / "left", nothing)
    left = tmp_path / "left" / "a" / "b"
    assert (left / "FORMAT").read_text() == "optimd data dir, version 1\n"
    assert (left / "jobs").is_dir()


def test_jobs_of_any_name_have_folders_of_their_own(tmp_path: Path) -> None:
    """Right below the data dir's, whatever is in the name, and never one that means something else."""
    data = DataDir(tmp_path)
    folders = [data.job_folder(name) for name in NAMES]
    assert len(set(folders)) == len(NAMES)
    for folder in folders:
        assert folder.parent == tmp_path / "jobs"
        assert len(os.fsencode(folder.name)) < 100
        assert folder.name.isascii()
        folder.mkdir()
    assert sorted(data.job_folders()) == sorted(folders)
    data.close()
    again = DataDir(tmp_path)
    assert sorted(again.job_folders()) == sorted(folders)
    assert [again.job_folder(name) for name in NAMES] == folders
    again.close()


def fill(folder: Path) -> None:
    (folder / "journal").mkdir(parents=True)
    for number in range(3):
        (folder / "journal" / f"{number}.journal").write_bytes(b"records")


@pytest.mark.parametrize(
    ("operation", "number", "is_left"),
    [("remove", 1, True), ("rename", 1, True), ("sync_folder", 1, False), ("remove", 2, False)],
)
def test_a_removal_that_fails_leaves_all_of_a_job_or_none(
    tmp_path: Path, operation: Operation, number: int, is_left: bool
) -> None:
    """It can be tried again; and a server that starts does the rest of it."""
    files = FailingFiles()
    data = DataDir(tmp_path, files)
    job, other = data.job_folder("job"), data.job_folder("other")
    fill(job)
    fill(other)
    fault = files.fail(operation, number)
    with pytest.raises(OSError, match="Input/output error"):
        data.remove_job(job)
    assert fault.fired == 1
    data.close()
    again = DataDir(tmp_path)
    assert [*again.job_folders()] == sorted([job, other] if is_left else [other])
    again.remove_job(job)
    assert [*(tmp_path / "jobs").iterdir()] == [other]
    again.close()


def test_a_job_that_was_removed_in_part_only_when_a_server_died_is_removed_by_the_next(tmp_path: Path) -> None:
    """Some of its files are gone already."""
    files = FailingFiles()
    data = DataDir(tmp_path, files)
    job = data.job_folder("job")
    fill(job)
    files.fail("remove", 2)
    with pytest.raises(OSError, match="Input/output error"):
        data.remove_job(job)
    data.close()
    (half,) = (tmp_path / "jobs").iterdir()
    (half / "journal" / "1.journal").unlink()
    DataDir(tmp_path).close()
    assert [*(tmp_path / "jobs").iterdir()] == []


def test_a_removed_job_does_not_come_back_after_a_power_loss(tmp_path: Path) -> None:
    """Nor any part of it."""
    disk = tmp_path / "disk"
    disk.mkdir()
    files = VolatileFiles(disk)
    data = DataDir(disk / "data", files)
    job = data.job_folder("job")
    files.make_folder(job / "journal")
    files.sync_folder(job.parent)
    files.sync_folder(job)
    files.crash(tmp_path / "before", nothing)
    assert [*(tmp_path / "before" / "data" / "jobs").iterdir()]
    data.remove_job(job)
    data.close()
    files.crash(tmp_path / "after", nothing)
    again = DataDir(tmp_path / "after" / "data")
    assert [*again.job_folders()] == []
    again.close()
