"""A server is started on a data dir that another one has left: with other settings, or with what cannot be read."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from optimd.client import Adam, ProxyOptions
from optimd.server.errors import DataDirError
from optimd.server.recovery import JOURNAL, SNAPSHOTS
from optimd.server.snapshotfile import MANIFEST_NAME
from tests.fault.test_damage import damage, flip, records_of
from tests.faultfiles import FailingFiles, Operation
from tests.keptjobs import Mirror, assert_is_one_of, contents, gradients, parameters, recovered
from tests.lives import Lives
from tests.support import assert_alike, running_server


def job_folder(data_dir: Path) -> Path:
    (folder,) = (data_dir / "jobs").iterdir()
    return folder


@pytest.mark.parametrize("durability", ["log", "snapshot"])
def test_a_job_that_is_resumed_is_as_one_that_was_never_stopped_and_one_that_is_begun_with_its_values_is_not(
    tmp_path: Path, durability: str
) -> None:
    """Three ways: uninterrupted, stopped in good order and started again, and the values alone in a fresh Adam."""
    warm, straight = parameters(), parameters()
    options = ProxyOptions(bucket_bytes=1024)

    def train(params: list[Any], optimizer: torch.optim.Optimizer, seeds: range) -> None:
        for seed in seeds:
            for param, grad in zip(params, gradients(seed, params), strict=True):
                param.grad = grad
            optimizer.step()

    settings = {"data_dir": str(tmp_path / "data"), "durability": durability}
    with (
        running_server(**settings) as server,
        Adam(warm, lr=0.1, fused=True, server=server.address, job="job", options=options) as optimizer,
    ):
        train(warm, optimizer, range(4))
    cold = [torch.nn.Parameter(param.detach().clone()) for param in warm]
    with running_server(**settings) as server:
        with Adam(warm, lr=0.1, fused=True, server=server.address, job="job", options=options) as optimizer:
            assert (optimizer.job_step, optimizer.next_sequence, optimizer.resumed) == (4, 4, True)
            train(warm, optimizer, range(4, 8))
            state = optimizer.state_dict()["state"]
        with Adam(cold, lr=0.1, fused=True, server=server.address, job="cold", options=options) as optimizer:
            train(cold, optimizer, range(4, 8))
    theirs = torch.optim.Adam(straight, lr=0.1, fused=True)
    train(straight, theirs, range(8))
    assert_alike([param.detach() for param in warm], [param.detach() for param in straight])
    assert_alike(state, theirs.state_dict()["state"])
    assert not any(torch.equal(mine, other) for mine, other in zip(cold, straight, strict=True))


def test_a_data_dir_goes_from_a_journal_to_snapshots_and_back(tmp_path: Path) -> None:
    """Nothing is lost where servers stop in good order, whatever is kept of it."""
    with Lives(tmp_path, journal_segment_bytes=3000) as lives:
        mirror = Mirror(lives.address)
        seed = 0
        for durability in ("log", "snapshot", "log", "snapshot", "snapshot", "log"):
            if seed:
                if durability == "log" or seed > 6:
                    # Between two lives without a journal there is a snapshot alone.
                    lives.server.registry.snapshot("job")
                lives.die_and_resume(durability=durability)
            for _ in range(3):
                mirror.step(seed)
                seed += 1
        mirror.close()
    with recovered(lives.data_dir) as jobs:
        assert_is_one_of(jobs["job"], mirror.points[-1:])


def test_a_journal_is_not_replayed_on_a_snapshot_that_lies_before_its_beginning(tmp_path: Path) -> None:
    """Two snapshots were taken without one: it goes on behind the newer alone."""
    with Lives(tmp_path) as lives:
        mirror = Mirror(lives.address)
        mirror.step(0)
        lives.die_and_resume(durability="snapshot")
        for seed in (1, 2):
            mirror.step(seed)
            lives.server.registry.snapshot("job")
        lives.die_and_resume(durability="log")
        mirror.step(3)
        mirror.close()
        lives.die()
    with recovered(lives.data_dir) as jobs:
        assert_is_one_of(jobs["job"], mirror.points[-1:])
    _, newer = sorted((job_folder(lives.data_dir) / SNAPSHOTS).iterdir())
    damage(newer, "data-flipped")
    with (
        pytest.raises(DataDirError, match=r"journal.*: the segments before this one are missing; restore"),
        recovered(lives.data_dir),
    ):
        pass


@pytest.mark.parametrize("fsync", ["never", "interval", "step"])
def test_settings_may_change_from_one_start_to_the_next(tmp_path: Path, fsync: str) -> None:
    """Of syncs, of segments, of snapshots that are kept."""
    with Lives(tmp_path, fsync="step", journal_segment_bytes=3000, snapshots_kept=3) as lives:
        mirror = Mirror(lives.address)
        for seed in range(4):
            mirror.step(seed)
            lives.server.registry.snapshot("job")
        lives.die_and_resume(fsync=fsync, journal_segment_bytes=100_000, snapshots_kept=1)
        for seed in range(4, 8):
            mirror.step(seed)
        lives.server.registry.snapshot("job")
        assert len([*(job_folder(lives.data_dir) / SNAPSHOTS).iterdir()]) == 1
        mirror.step(8)
        lives.die_and_resume(fsync="never", journal_segment_bytes=500)
        mirror.step(9)
        mirror.close()
    with recovered(lives.data_dir) as jobs:
        assert_is_one_of(jobs["job"], mirror.points[-1:])


# --- what cannot be read, or written


@pytest.mark.parametrize("operation", ["open", "sync", "sync_folder", "truncate", "remove", "make_folder"])
def test_a_start_that_fails_is_an_error_with_the_folders_name_and_changes_nothing(
    tmp_path: Path, operation: Operation
) -> None:
    """Whichever call it is that fails: the next start has the job."""
    with Lives(tmp_path, journal_segment_bytes=3000) as lives:
        mirror = Mirror(lives.address)
        mirror.step(0)
        lives.server.registry.snapshot("job")
        mirror.step(1)
        mirror.close()
        lives.die()
    (job_folder(lives.data_dir) / SNAPSHOTS / "making").mkdir()
    # A last record that is not whole, for which there is something to be cut.
    journal, _, last = [*records_of(job_folder(lives.data_dir))][-1]
    whole = journal.read_bytes()[: last.end - int(journal.stem)]
    number = 0
    while True:
        number += 1
        shutil.copytree(lives.data_dir, tmp_path / str(number))
        (copied,) = (tmp_path / str(number)).rglob(journal.name)
        copied.write_bytes(whole + b"torn" * 50)
        files = FailingFiles()
        fault = files.fail(operation, number)
        try:
            with recovered(tmp_path / str(number), files=files) as jobs:
                assert_is_one_of(jobs["job"], mirror.points[-1:])
        except DataDirError as error:
            said = str(error)
            assert fault.fired == 1
            assert str(tmp_path / str(number)) in said
            assert "Input/output error" in said
        with recovered(tmp_path / str(number)) as jobs:
            assert_is_one_of(jobs["job"], mirror.points[-1:])
        if not fault.fired:
            break
    assert number > 1


def test_things_that_others_have_put_into_a_jobs_folder_are_left_alone(tmp_path: Path) -> None:
    """Neither snapshots nor segments: copies, what a file manager leaves."""
    with Lives(tmp_path) as lives:
        mirror = Mirror(lives.address)
        mirror.step(0)
        lives.server.registry.snapshot("job")
        lives.die()
        folder = job_folder(lives.data_dir)
        (snapshot,) = (folder / SNAPSHOTS).iterdir()
        shutil.copytree(snapshot, folder / SNAPSHOTS / "backup")
        names = (f"{SNAPSHOTS}/.DS_Store", f"{JOURNAL}/notes.txt", f"{JOURNAL}/old.journal", "../.DS_Store")
        for name in names:
            (folder / name).write_text("somebody else's")
        lives.resume()
        for seed in range(1, 5):
            mirror.step(seed)
            lives.server.registry.snapshot("job")
        assert all((folder / name).read_text() == "somebody else's" for name in names)
        assert len([*(folder / SNAPSHOTS / "backup").iterdir()]) == 2
        mirror.close()
    with recovered(lives.data_dir) as jobs:
        assert_is_one_of(jobs["job"], mirror.points[-1:])


def test_a_snapshot_that_is_known_to_be_damaged_does_not_count_as_one_that_is_kept(tmp_path: Path) -> None:
    """The good one before it stays until there are as many good ones as asked for."""
    with Lives(tmp_path) as lives:
        mirror = Mirror(lives.address)
        for seed in range(2):
            mirror.step(seed)
            lives.server.registry.snapshot("job")
        lives.die()
        good, bad = sorted((job_folder(lives.data_dir) / SNAPSHOTS).iterdir())
        damage(bad, "data-flipped")
        lives.resume()
        mirror.step(2)
        lives.server.registry.snapshot("job")
        mirror.step(3)
        older, newer, aside = sorted((job_folder(lives.data_dir) / SNAPSHOTS).iterdir())
        assert (older.name, aside.name) == (good.name, f"unusable-{bad.name}")
        lives.die()
        flip(job_folder(lives.data_dir) / SNAPSHOTS / newer.name / MANIFEST_NAME, 50, random.Random(1))
        lives.resume()
        mirror.step(4)
        mirror.close()
        lives.die()
    with recovered(lives.data_dir) as jobs:
        assert_is_one_of(jobs["job"], mirror.points[-1:])


def test_a_snapshot_of_what_is_lost_with_consent_is_not_gone_on_from(tmp_path: Path) -> None:
    """It is whole, and needs a record that is damaged: the older one is gone on from, and no later start mixes them."""
    with Lives(tmp_path) as lives:
        mirror = Mirror(lives.address)
        mirror.step(0)
        lives.server.registry.snapshot("job")
        mirror.step(1)
        mirror.accumulate(2)
        info = lives.server.registry.snapshot("job")
        assert info.replay_from < info.position
        mirror.close()
        lives.die()
        (path,) = {
            path for path, _, record in records_of(job_folder(lives.data_dir)) if record.position == info.replay_from
        }
        flip(path, info.replay_from - int(path.stem) + 40, random.Random(0))
        with pytest.raises(DataDirError, match=str(path)), recovered(lives.data_dir):
            pass
        lives.resume(accept_loss=True)
        again = Mirror(lives.address)
        assert again.ours.job_step == 2
        for seed in range(8):
            # Past the position that the newer snapshot is of.
            again.give(seed)
            again.ours.step()
        job = lives.server.registry.get("job")
        assert job.journal.position > info.position
        before = contents(job)
        again.close()
        lives.die()
    with recovered(lives.data_dir) as jobs:
        assert jobs["job"].step == 10
        assert_alike(contents(jobs["job"]), before)
