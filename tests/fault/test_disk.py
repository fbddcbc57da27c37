"""A disk that fails, at every call in turn: nothing that was acknowledged is lost, and training goes on."""

from __future__ import annotations

import errno
import logging
import math
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from optimd.client import Adam, ConnectionLostError, JobDeletedError, ProxyOptions, Sync
from optimd.server import Server, errors, recordwriter
from tests.faultfiles import FailingFiles, Fault, Operation, VolatileFiles, nothing
from tests.keptjobs import Mirror, Point, assert_is_one_of, recovered
from tests.support import eventually, in_threads, running_server

STEPS = 5
PROMISE = "Nothing is acknowledged until it can, and nothing is lost"


@pytest.fixture(autouse=True)
def impatience(monkeypatch: pytest.MonkeyPatch) -> None:
    """A job looks at once whether its disk can be written to again."""
    monkeypatch.setattr(recordwriter, "_RETRY_S", 0.002)


def opened(server: Server, job: str) -> Mirror:
    """A job; tried again where the disk does not let it be created."""
    while True:
        try:
            return Mirror(server.address, job)
        except ConnectionLostError as error:
            assert f"job {job!r} cannot be kept in" in str(error)  # noqa: PT017  # the next one may succeed


def snapshot(server: Server, job: str) -> None:
    """Tried again where the disk does not let it be taken."""
    while True:
        try:
            server.registry.snapshot(job)
        except errors.StorageFailedError:
            continue
        return


def train(mirror: Mirror, server: Server) -> None:
    for seed in range(STEPS):
        if seed == 2:
            mirror.accumulate(100)
        mirror.step(seed)
        if seed % 2:
            snapshot(server, mirror.job)


def messages(caplog: pytest.LogCaptureFixture, job: str) -> str:
    return "\n".join(message for message in caplog.messages if job in message)


@contextmanager
def life(folder: Path, files: FailingFiles, **settings: Any) -> Iterator[Server]:
    """A server that dies when the block ends: what it has by then is in `folder / "left"`."""
    (folder / "disk").mkdir(exist_ok=True)
    with running_server(
        files=files, data_dir=str(folder / "disk" / "data"), journal_segment_bytes=5000, drain_timeout_s=0.2, **settings
    ) as server:
        yield server
        with files.still():
            shutil.copytree(folder / "disk" / "data", folder / "left")


def assert_kept(folder: Path, mirrors: dict[str, Mirror]) -> None:
    """All jobs are brought back as they were acknowledged: of a server that has died, and of the one that stopped."""
    for data_dir in (folder / "left", folder / "disk" / "data"):
        with recovered(data_dir) as jobs:
            for name, mirror in mirrors.items():
                assert_is_one_of(jobs[name], mirror.points[-1:])


FAILURES: list[tuple[Operation, int, float]] = [
    ("write_some", errno.ENOSPC, 0.0),
    ("write_some", errno.EIO, 0.5),
    ("write_some", 0, 0.3),
    ("sync", errno.EIO, 0.0),
    ("rename", errno.EIO, 0.0),
    ("sync_folder", errno.EIO, 0.0),
    ("open", errno.EMFILE, 0.0),
    ("make_folder", errno.ENOSPC, 0.0),
    ("truncate", errno.ENOSPC, 0.0),
    ("remove", errno.EIO, 0.0),
]


@pytest.mark.parametrize(("operation", "code", "written"), FAILURES)
@pytest.mark.parametrize("times", [1, 3])
def test_no_acknowledged_step_is_lost_whichever_call_fails(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    operation: Operation,
    code: int,
    written: float,
    times: int,
) -> None:
    """The server's log says what is wrong, and training goes on as soon as nothing is, with torch's bits."""
    caplog.set_level(logging.INFO, "optimd")
    files = FailingFiles()
    mirrors: dict[str, Mirror] = {}
    with life(tmp_path, files) as server:
        calls = 0
        while True:
            calls += 1
            name = f"job-{calls}"
            fault = files.fail(operation, calls, code=code, written=written, times=times, below=f"jobs/{name}-")
            mirror = mirrors[name] = opened(server, name)
            train(mirror, server)
            mirror.close()
            if not fault.fired:
                break
            assert fault.fired == min(times, fault.seen - calls + 1)
            if code:
                assert os.strerror(code) in messages(caplog, name), f"call {calls}"
    assert calls > {"write_some": 40, "sync": 10}.get(operation, 1)
    assert_kept(tmp_path, mirrors)


def test_what_a_failed_sync_was_to_bring_to_the_disk_is_acknowledged_only_once_it_is_there(tmp_path: Path) -> None:
    """Each sync of a journal in turn fails: the power may go behind any acknowledgement."""
    number = 0
    fired = 1
    while fired:
        number += 1
        folder = tmp_path / str(number)
        (folder / "disk").mkdir(parents=True)
        files = VolatileFiles(folder / "disk")
        left: list[tuple[Path, Point]] = []
        with life(folder, files) as server:
            mirror = Mirror(server.address)
            fault = files.fail("sync", number, below="/journal/")
            for seed in range(2):
                for act in (mirror.accumulate, mirror.accumulate, mirror.step):
                    act(10 * seed + len(left))
                    left.append((folder / f"{len(left)}", mirror.points[-1]))
                    files.crash(left[-1][0], nothing)
                if seed == 0:
                    mirror.add_group(seed)
            mirror.close()
            fired = fault.fired
        for path, point in left:
            with recovered(path / "data") as jobs:
                assert_is_one_of(jobs["job"], [point])
    assert number > 6


def test_a_full_disk_holds_up_its_job_and_no_other_and_training_goes_on_when_there_is_room(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing is acknowledged meanwhile; the log says why, once, and that it is over."""
    files = FailingFiles()
    with life(tmp_path, files) as server:
        full, other = Mirror(server.address, "full"), Mirror(server.address, "other")
        full.step(0)
        fault = files.fail("write_some", 2, code=errno.ENOSPC, written=0.4, times=math.inf, below="jobs/full-")
        stepping = threading.Thread(target=full.step, args=(1,))
        stepping.start()
        assert fault.fires.wait(20)
        for seed in range(5):
            other.step(seed)
        another = Mirror(server.address, "another")
        another.step(0)
        assert (full.acknowledged, len(full.points)) == (1, 3)
        with files.still():
            shutil.copytree(tmp_path / "disk" / "data", tmp_path / "meanwhile")
        assert eventually(lambda: fault.fired > 10)
        fault.stop()
        stepping.join(20)
        assert not stepping.is_alive()
        full.step(2)
        mirrors = {"full": full, "other": other, "another": another}
        for mirror in mirrors.values():
            mirror.close()
    assert_kept(tmp_path, mirrors)
    with recovered(tmp_path / "meanwhile") as jobs:
        assert_is_one_of(jobs["full"], full.points[1:3])
    said = [message for message in caplog.messages if "job full: its journal" in message]
    assert said == [
        f"job full: its journal cannot be written: {os.strerror(errno.ENOSPC)}. {PROMISE}",
        "job full: its journal can be written again",
    ]


def test_the_log_says_once_why_nothing_is_acknowledged_while_syncs_fail(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Those of the journal, and of the snapshot that is to stand in for it."""
    files = FailingFiles()
    with life(tmp_path, files) as server:
        mirror = Mirror(server.address)
        mirror.step(0)
        fault = files.fail("sync", times=6)
        mirror.step(1)
        assert fault.fired == 6
        mirror.close()
    assert_kept(tmp_path, {"job": mirror})
    assert [message for message in caplog.messages if "its journal c" in message] == [
        f"job job: its journal cannot be written: {os.strerror(errno.EIO)}. {PROMISE}",
        "job job: its journal can be written again",
    ]


@pytest.mark.parametrize("call", range(1, 5))
def test_a_server_can_be_stopped_while_its_disk_is_full_and_has_what_was_acknowledged(
    tmp_path: Path, call: int
) -> None:
    """Wherever in a step it was. The worker's step fails, once it has tried for as long as it should."""
    files = FailingFiles()
    with life(tmp_path, files) as server:
        mirror = Mirror(server.address, options=ProxyOptions(bucket_bytes=1024, retry_timeout_s=0.5))
        mirror.step(0)
        mirror.step(1)
        fault = files.fail("write_some", call, code=errno.ENOSPC, written=0.4, times=math.inf)
        stepping = threading.Thread(target=pytest.raises, args=(ConnectionLostError, mirror.step, 2))
        stepping.start()
        assert fault.fires.wait(20)
    stepping.join(20)
    assert not stepping.is_alive()
    mirror.close()
    for data_dir in (tmp_path / "left", tmp_path / "disk" / "data"):
        with recovered(data_dir) as jobs:
            assert_is_one_of(jobs["job"], mirror.allowed())


def test_a_server_whose_disk_is_full_can_be_stopped_between_two_steps(tmp_path: Path) -> None:
    """The journal has no end then, and there is no last snapshot."""
    files = FailingFiles()
    with life(tmp_path, files) as server:
        mirror = Mirror(server.address)
        mirror.step(0)
        mirror.close()
        fault = files.fail("write_some", code=errno.ENOSPC, times=math.inf)
    assert fault.fired
    assert_kept(tmp_path, {"job": mirror})


@pytest.mark.parametrize("call", range(1, 7))
def test_a_server_that_has_given_up_on_a_record_writes_none_behind_it(tmp_path: Path, call: int) -> None:
    """It stops, and there is room again at this very moment: what is on the disk has to make sense all the same."""
    files = FailingFiles()
    with life(tmp_path, files) as server:
        mirror = Mirror(server.address, options=ProxyOptions(bucket_bytes=1024, retry_timeout_s=0.2))
        for seed in range(3):
            mirror.step(seed)
        assert server.registry.storage is not None
        server.registry.storage.stopping.set()
        fault = files.fail("write_some", call, code=errno.ENOSPC)
        with pytest.raises(ConnectionLostError):
            for seed in range(3, 6):
                mirror.step(seed)
        assert fault.fired == 1
        mirror.close()
    for data_dir in (tmp_path / "left", tmp_path / "disk" / "data"):
        with recovered(data_dir) as jobs:
            assert_is_one_of(jobs["job"], mirror.allowed())


def test_a_job_that_waits_for_a_disk_can_be_deleted(tmp_path: Path) -> None:
    """Its worker is told, and the server goes on."""
    files = FailingFiles()
    with life(tmp_path, files) as server:
        mirror, other = Mirror(server.address), Mirror(server.address, "other")
        mirror.step(0)
        fault = files.fail("write_some", times=math.inf, below="jobs/job-")
        stepping = threading.Thread(target=pytest.raises, args=(JobDeletedError, mirror.step, 1))
        stepping.start()
        assert fault.fires.wait(20)
        server.registry.delete("job", force=True)
        stepping.join(20)
        assert not stepping.is_alive()
        other.step(0)
        other.close()
        mirror.close()
    with recovered(tmp_path / "left") as jobs:
        assert [*jobs] == ["other"]


@pytest.mark.parametrize("fsync", ["never", "interval", "step"])
def test_a_sync_that_failed_once_does_not_keep_snapshots_from_being_taken_for_ever(tmp_path: Path, fsync: str) -> None:
    """Nor journals from being brought to the disk: the next snapshot has all that the sync may have lost."""
    files = FailingFiles()
    with life(tmp_path, files, fsync=fsync, fsync_interval_s=1000.0) as server:
        mirror = Mirror(server.address)
        mirror.step(0)
        storage = server.registry.storage
        assert storage is not None
        fault = files.fail("sync", below="/journal/")
        if fsync == "step":
            mirror.step(1)
        else:
            storage.flush()
        assert fault.fired == 1
        mirror.step(2)
        server.registry.snapshot("job")
        mirror.step(3)
        storage.flush()
        syncs = files.calls["sync"]
        mirror.step(4)
        storage.flush()
        assert files.calls["sync"] > syncs
        assert server.registry.get("job").journal.is_sound
        mirror.close()
    assert_kept(tmp_path, {"job": mirror})


def test_one_snapshot_stands_in_for_a_failed_sync_however_many_wait_for_it(tmp_path: Path) -> None:
    """And none is left of those whose names could not be brought to the disk."""
    files = FailingFiles()
    with life(tmp_path, files) as server:

        def work(rank: int) -> None:
            options = ProxyOptions(rank=rank, world_size=3, bucket_bytes=1024, aggregation=Sync(deterministic=True))
            p = nn.Parameter(torch.zeros(300))
            with Adam([p], server=server.address, job="job", options=options) as optimizer:
                for step in range(3):
                    p.grad = torch.ones(300)
                    if step == 1 and rank == 0:
                        faults.append(files.fail("sync", below="/journal/"))
                        faults.append(files.fail("sync_folder", below="/snapshots", times=5))
                    optimizer.step()

        faults: list[Fault] = []
        in_threads(work, 3)
        assert [fault.fired for fault in faults] == [1, 5]
        (folder,) = (tmp_path / "disk" / "data" / "jobs").iterdir()
        names = [path.name for path in (folder / "snapshots").iterdir()]
        assert len(names) == 1
        assert names[0].endswith("-step-2")
