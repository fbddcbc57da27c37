"""Syncs of a journal that are begun before anybody waits for one."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from optimd.server.files import Files
from optimd.server.log import Log, LogReader, LogSyncError
from tests.support import eventually

TIMEOUT_S = 20.0
AHEAD = 4000
PAYLOAD = bytes(range(250)) * 4


class SlowFiles(Files):
    """Syncs end when the test lets them, and fail if it says so."""

    def __init__(self) -> None:
        self.begun = threading.Semaphore(0)
        self.may_end = threading.Semaphore(0)
        self.syncs: list[str] = []
        self.fails = False

    def sync(self, descriptor: int) -> None:
        self.syncs.append(threading.current_thread().name)
        self.begun.release()
        assert self.may_end.acquire(timeout=TIMEOUT_S)
        if self.fails:
            raise OSError(5, "Input/output error")
        super().sync(descriptor)

    @property
    def in_background(self) -> int:
        return sum(name.startswith("optimd-sync") for name in self.syncs)


def log_in(folder: Path, files: Files) -> Log:
    return Log(files, folder, position=0, first_message=lambda _: b"first", sync_ahead_bytes=AHEAD)


def append(log: Log, count: int) -> None:
    for _ in range(count):
        log.append(b"message", [PAYLOAD])


def test_a_sync_is_begun_while_records_still_come_and_serves_who_waits_later(tmp_path: Path) -> None:
    """The appending thread goes on meanwhile; all that had come by then needs no other sync."""
    files = SlowFiles()
    log = log_in(tmp_path, files)
    append(log, 3)
    assert files.syncs == []
    append(log, 1)
    assert files.begun.acquire(timeout=TIMEOUT_S)
    synced = log.position
    append(log, 2)
    files.may_end.release()
    log.sync(synced)
    assert files.in_background == len(files.syncs) == 1
    files.may_end.release()
    log.sync(log.position)
    assert (files.in_background, len(files.syncs)) == (1, 2)
    log.close()
    assert len(list(LogReader(Files(), tmp_path).records(0))) == 7


def test_no_second_sync_is_begun_while_one_is_under_way(tmp_path: Path) -> None:
    """A slow disk is not given more to do than it can: what came meanwhile goes with the next one."""
    files = SlowFiles()
    log = log_in(tmp_path, files)
    append(log, 4)
    assert files.begun.acquire(timeout=TIMEOUT_S)
    append(log, 12)
    assert files.in_background == 1
    for _ in range(10):
        files.may_end.release()
    log.sync(log.position)
    assert log._ahead is not None
    log._ahead.result(TIMEOUT_S)
    append(log, 4)
    assert eventually(lambda: files.in_background == 2)
    log.close()


def test_who_waits_for_a_sync_is_told_that_one_in_the_background_failed(tmp_path: Path) -> None:
    """Nothing before it is acknowledged, and nothing behind it, until the log begins anew."""
    files = SlowFiles()
    files.fails = True
    log = log_in(tmp_path, files)
    append(log, 4)
    assert files.begun.acquire(timeout=TIMEOUT_S)
    files.may_end.release()
    with pytest.raises(LogSyncError, match="Input/output error"):
        log.sync(log.position)
    assert files.in_background == len(files.syncs) == 1
    append(log, 1)
    with pytest.raises(LogSyncError):
        log.sync(log.position)
    files.fails = False
    log.leave_segment()
    log.begin_anew(log.position)
    append(log, 1)
    files.may_end.release()
    log.sync(log.position)
    log.close()


def test_a_log_is_closed_behind_the_sync_that_is_under_way(tmp_path: Path) -> None:
    """Its file is not closed under it, and its thread ends."""
    before = threading.enumerate()
    files = SlowFiles()
    log = log_in(tmp_path, files)
    append(log, 4)
    assert files.begun.acquire(timeout=TIMEOUT_S)
    (worker,) = (thread for thread in threading.enumerate() if thread not in before)
    closing = threading.Thread(target=log.close)
    closing.start()
    files.may_end.release()
    closing.join(TIMEOUT_S)
    worker.join(TIMEOUT_S)
    assert not closing.is_alive()
    assert not worker.is_alive()
