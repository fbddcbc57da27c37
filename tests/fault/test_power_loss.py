"""The power goes, at every moment: what was acknowledged is there, bit for bit."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Literal

import pytest

from optimd.client import ProxyOptions
from optimd.server import Server
from tests.faultfiles import Operation, VolatileFiles, everything, nothing, some
from tests.keptjobs import Mirror, Point, assert_is_one_of, recovered
from tests.support import running_server

Apply = Literal["streaming", "atomic"]


class Blackouts:
    """A disk of which copies are made behind each call that changes it, as a power loss would leave it.

    Args:
        folder: Where the disk is, and the copies.
        seed: Where comes from what is left of what was not synced.
    """

    def __init__(self, folder: Path, seed: int) -> None:
        self._folder = folder
        self._seed = seed
        self._mirror: Mirror | None = None
        self._left: list[tuple[Path, list[Point], str]] = []
        (folder / "disk").mkdir()
        self.files = VolatileFiles(folder / "disk", self._observe)
        self.data_dir = folder / "disk" / "data"

    def begin(self, mirror: Mirror) -> None:
        self._mirror = mirror

    def end(self) -> None:
        self._mirror = None

    def _observe(self, operation: Operation, path: Path) -> None:
        if self._mirror is None:
            return
        number, allowed = len(self._left), self._mirror.allowed()
        for keeps in (nothing, some(random.Random(self._seed + number))):
            left = self._folder / f"{len(self._left)}"
            self.files.crash(left, keeps)
            self._left.append((left, allowed, f"behind {operation} of {path.name}, {number // 2}"))

    def check(self) -> int:
        """Brings the job back from each copy. Gives how many there were."""
        for left, allowed, moment in self._left:
            with recovered(left / "data") as jobs:
                try:
                    assert_is_one_of(jobs["job"], allowed)
                except AssertionError as error:
                    raise AssertionError(f"{moment}: {error}") from error
            shutil.rmtree(left)
        return len(self._left)


def train(mirror: Mirror, server: Server) -> None:
    """All that a program may do to a job, with snapshots in between."""

    def snapshot() -> None:
        server.registry.snapshot("job")

    snapshot()
    mirror.step(1)
    mirror.step(2)
    snapshot()
    mirror.accumulate(3)
    mirror.accumulate(4)
    snapshot()
    mirror.step(5)
    mirror.write()
    mirror.step(6, without=(1,))
    mirror.add_group(7)
    mirror.step(8)
    snapshot()
    mirror.load()
    mirror.step(9)
    mirror.step(10)


@pytest.mark.parametrize(("apply", "seed"), [("streaming", 1), ("atomic", 2)])
def test_what_was_acknowledged_outlives_a_power_loss_behind_each_call(tmp_path: Path, apply: Apply, seed: int) -> None:
    """Whatever of the unsynced blocks and names the disk has, and with segments that are used again."""
    blackouts = Blackouts(tmp_path, seed)
    options = ProxyOptions(bucket_bytes=1024, apply=apply)
    with running_server(files=blackouts.files, data_dir=str(blackouts.data_dir), journal_segment_bytes=6000) as server:
        mirror = Mirror(server.address, options=options)
        blackouts.begin(mirror)
        train(mirror, server)
        blackouts.end()
        mirror.close()
    assert blackouts.files.calls["rename"] > 4
    assert blackouts.check() > 250


def test_the_power_may_go_while_a_job_is_created(tmp_path: Path) -> None:
    """Then it is there, with its values, or it is not there at all."""
    disk = tmp_path / "disk"
    disk.mkdir()
    files = VolatileFiles(disk)
    left: list[Path] = []

    def observe(*_: object) -> None:
        for keeps in (nothing, everything, some(random.Random(len(left)))):
            left.append(tmp_path / str(len(left)))
            files.crash(left[-1], keeps)

    with running_server(files=files, data_dir=str(disk / "data")) as server:
        files.observe = observe
        mirror = Mirror(server.address)
        files.observe = lambda *_: None
        mirror.close()
    there = []
    for path in left:
        with recovered(path / "data") as jobs:
            if "job" in jobs:
                assert_is_one_of(jobs["job"], mirror.points)
            there.append("job" in jobs)
    assert there[0] is False
    assert there[-2] is True
    # Of the last copies one has what was synced alone: the worker had been told by then.
    assert there[-3] is True


def test_what_a_server_brings_back_outlives_a_power_loss(tmp_path: Path) -> None:
    """The one before it was killed when it had written, and not yet synced: the worker is told of that by this one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    files = VolatileFiles(disk)
    heirs: list[tuple[VolatileFiles, Path]] = []

    def observe(operation: Operation, _: Path) -> None:
        if operation == "write_some":
            target = tmp_path / str(len(heirs))
            heirs.append((files.outlive(target), target))

    with running_server(files=files, data_dir=str(disk / "data"), journal_segment_bytes=4000) as server:
        mirror = Mirror(server.address)
        files.observe = observe
        for seed in range(5):
            mirror.step(seed)
        files.observe = lambda *_: None
        mirror.close()
    steps = []
    for heir, target in heirs:
        with recovered(target / "data", files=heir) as jobs:
            # What a worker that comes back has to wait for.
            jobs["job"].journal.await_durable()
            place = assert_is_one_of(jobs["job"], mirror.points[jobs["job"].step :][:2])
            before = jobs["job"].step, jobs["job"].parts.journal.rounds.keys()
        heir.crash(target.with_name(f"{target.name}-left"), nothing)
        with recovered(target.with_name(f"{target.name}-left") / "data") as jobs:
            assert (jobs["job"].step, jobs["job"].parts.journal.rounds.keys()) == before
            assert assert_is_one_of(jobs["job"], mirror.points[jobs["job"].step :][:2]) == place
        steps.append(before[0])
    assert set(steps) == set(range(6))


def test_a_server_that_syncs_now_and_then_comes_back_with_what_it_had_synced(tmp_path: Path) -> None:
    """A power loss takes what the interval allows, and no accept_loss is asked for."""
    blackouts: list[tuple[Path, int]] = []
    disk = tmp_path / "disk"
    disk.mkdir()
    files = VolatileFiles(disk)
    with running_server(
        files=files, data_dir=str(disk / "data"), fsync="interval", fsync_interval_s=1000.0, journal_segment_bytes=4000
    ) as server:
        storage = server.registry.storage
        assert storage is not None
        mirror = Mirror(server.address)
        for seed in range(12):
            mirror.step(seed)
            if seed % 4 == 1:
                storage.flush()
                synced = mirror.steps
            if seed > 0:
                for keeps in (nothing, some(random.Random(seed))):
                    target = tmp_path / str(len(blackouts))
                    files.crash(target, keeps)
                    blackouts.append((target, synced))
        mirror.close()
    lost = 0
    for target, synced in blackouts:
        with recovered(target / "data", fsync="interval") as jobs:
            step = jobs["job"].step
            assert step >= synced
            lost += step < mirror.steps
            assert_is_one_of(jobs["job"], mirror.points[step:][:2])
    assert lost
