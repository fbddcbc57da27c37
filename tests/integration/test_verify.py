"""`optimd jobs verify`: what it finds in a data dir, and that a server finds the same."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from typer.testing import CliRunner

from optimd.cli.app import app
from optimd.client import ProxyOptions
from optimd.server.errors import DataDirError
from optimd.server.files import Files, ReadOnlyFiles
from optimd.server.job import Job
from optimd.server.log import LogReader
from optimd.server.records import Record, frame
from optimd.server.snapshotfile import SnapshotReader
from optimd.server.verifying import DataDirReport, JobReport, RecoveryReport, verify
from optimd.v1 import journal_pb2
from tests.keptjobs import Mirror, recovered
from tests.support import running_server

JOBS = ("alpha", "beta/1")
SNAPSHOTS = ("00000002-step-12", "00000003-step-18")
STEPS = 23


@dataclass(frozen=True)
class KeptJob:
    """One job's folder, in a copy of a data dir."""

    data_dir: Path
    folder: Path

    @property
    def segments(self) -> list[Path]:
        return sorted((self.folder / "journal").glob("*.journal"))

    def snapshot(self, number: int) -> Path:
        return self.folder / "snapshots" / SNAPSHOTS[number]

    def records(self) -> list[tuple[Record, str]]:
        """All of its records, and what kind each is of."""
        start = int(self.segments[0].stem)
        return [
            (record, str(journal_pb2.JournalRecord.FromString(record.message).WhichOneof("record")))
            for record in LogReader(Files(), self.folder / "journal").records(start)
        ]

    def segment_of(self, position: int) -> Path:
        return max(path for path in self.segments if int(path.stem) <= position)

    def flip(self, position: int) -> Path:
        """One bit of the journal. Gives the file."""
        path = self.segment_of(position)
        flip(path, position - int(path.stem))
        return path

    def cut(self, position: int) -> None:
        """The journal ends there, as where a server died."""
        for path in self.segments:
            if int(path.stem) >= position:
                path.unlink()
            else:
                with path.open("r+b") as file:
                    file.truncate(min(path.stat().st_size, position - int(path.stem)))


def flip(path: Path, offset: int, bit: int = 4) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1 << bit
    path.write_bytes(data)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A data dir as it was in the middle of its server's life, and when that had stopped in good order."""
    folder = tmp_path_factory.mktemp("kept")
    settings = {"fsync": "never", "snapshot_s": 0.0, "journal_max_bytes": 1 << 40, "journal_segment_bytes": 6000}
    with running_server(data_dir=str(folder / "stopped"), **settings) as server:
        mirrors = [
            Mirror(server.address, job, options=ProxyOptions(bucket_bytes=1024, apply=apply))
            for job, apply in zip(JOBS, ("streaming", "atomic"), strict=True)
        ]
        for step in range(STEPS):
            for mirror in mirrors:
                mirror.step(step)
            if step in (5, 11, 17):
                for job in JOBS:
                    server.registry.snapshot(job)
        shutil.copytree(folder / "stopped", folder / "died")
        for mirror in mirrors:
            mirror.close()
    return folder / "died", folder / "stopped"


@pytest.fixture
def died(images: tuple[Path, Path], tmp_path: Path) -> Path:
    """What a server leaves that is killed between two steps."""
    return shutil.copytree(images[0], tmp_path / "died")


@pytest.fixture
def job(died: Path) -> KeptJob:
    """The streamed job of that."""
    (folder,) = died.glob("jobs/alpha-*")
    return KeptJob(died, folder)


def optimd(*arguments: object) -> tuple[int, str]:
    """Runs the command: its status, and what it wrote."""
    result = CliRunner().invoke(app, [str(each) for each in arguments], env={"COLUMNS": "200", "TERM": "dumb"})
    return result.exit_code, result.output


def content(folder: Path) -> dict[str, tuple[bytes, int, int]]:
    return {
        str(path): (path.read_bytes() if path.is_file() else b"", path.stat().st_mtime_ns, path.stat().st_mode)
        for path in folder.rglob("*")
    }


def checked(data_dir: Path, name: str | None = None) -> DataDirReport:
    """Verifies, and that nothing is changed by that."""
    before = content(data_dir)
    report = verify(data_dir, name)
    assert content(data_dir) == before
    return report


def assert_foretold(job: Job | None, told: RecoveryReport | None) -> None:
    """A job is as it was said that it would be."""
    assert (job is None) == (told is None)
    if job is not None and told is not None:
        assert job.step == told.step
        count = len(job.store.buckets)
        rounds = job.parts.journal.rounds.values()
        assert [(len({each.bucket_id for each in round_.applied}), count) for round_ in rounds] == told.open_steps


def assert_a_server_agrees(data_dir: Path, reports: Sequence[JobReport], tmp_path: Path) -> None:
    """Starts on copies, as it is and with --accept-loss, and compares."""
    refused = [report for report in reports if report.was_created and report.recovery is None]
    for accept_loss in (False, True):
        copy = shutil.copytree(data_dir, tmp_path / f"copy-{accept_loss}")
        try:
            with recovered(copy, accept_loss=accept_loss) as jobs:
                assert accept_loss or not refused
                for report in reports:
                    foretold = report.recovery or report.accepting_loss
                    assert_foretold(jobs.get(report.job), foretold)
        except DataDirError:
            assert refused
            assert not accept_loss or any(report.accepting_loss is None for report in refused)
        shutil.rmtree(copy)


def test_a_data_dir_of_a_server_that_stopped_in_good_order_is_as_it_was_written(
    images: tuple[Path, Path], tmp_path: Path
) -> None:
    """Each job comes back from its last snapshot, at its last step."""
    report = checked(images[1])
    assert report.is_sound
    assert [job.job for job in report.jobs] == [*JOBS]
    for job in report.jobs:
        assert len(job.uid) == 32
        assert [snapshot.step for snapshot in job.snapshots] == [18, STEPS]
        assert job.journal.is_closed
        assert job.recovery is not None
        assert (job.recovery.step, job.recovery.snapshot_step, job.recovery.open_steps) == (STEPS, STEPS, [])
    assert_a_server_agrees(images[1], report.jobs, tmp_path)


def test_a_data_dir_of_a_server_that_was_killed_is_as_it_was_written(job: KeptJob, tmp_path: Path) -> None:
    """The journal is read from its first segment on, though the last snapshot needs no more than its end."""
    report = checked(job.data_dir)
    assert report.is_sound
    (alpha, _) = report.jobs
    records = job.records()
    assert [snapshot.name for snapshot in alpha.snapshots] == [*SNAPSHOTS]
    assert [snapshot.step for snapshot in alpha.snapshots] == [12, 18]
    assert not any(snapshot.damage for snapshot in alpha.snapshots)
    journal = alpha.journal
    assert journal.segments == len(job.segments) > 5
    assert journal.nbytes == sum(path.stat().st_size for path in job.segments)
    assert (journal.records, journal.begins, journal.ends) == (
        len(records),
        int(job.segments[0].stem),
        records[-1][0].end,
    )
    commits = [record for record, kind in records if kind == "round_committed"]
    assert (journal.first_step, journal.last_step) == (STEPS - len(commits) + 1, STEPS)
    assert not journal.is_closed
    recovery = alpha.recovery
    assert recovery is not None
    assert (recovery.snapshot, recovery.snapshot_step, recovery.step) == (SNAPSHOTS[1], 18, STEPS)
    behind = [record for record, _ in records if record.position >= (alpha.snapshots[1].replay_from or 0)]
    assert recovery.records == len(behind) < len(records)
    assert_a_server_agrees(job.data_dir, report.jobs, tmp_path)


def test_one_job_can_be_checked_alone(job: KeptJob) -> None:
    """By its name, whatever its folder is called; damage of another one is not looked for."""
    flip(job.snapshot(1) / "manifest", 40)
    (beta,) = checked(job.data_dir, "beta/1").jobs
    assert (beta.job, beta.is_sound) == ("beta/1", True)
    assert optimd("jobs", "verify", job.data_dir, "beta/1")[0] == 0
    assert optimd("jobs", "verify", job.data_dir, "alpha")[0] == 1


def test_a_step_that_is_open_is_told(job: KeptJob, tmp_path: Path) -> None:
    """A streamed one stays open, an atomic one is discarded; neither is damage."""
    (folder,) = job.data_dir.glob("jobs/beta-1-*")
    for each in (job, KeptJob(job.data_dir, folder)):
        record = [record for record, kind in each.records() if kind == "bucket_applied"][-1]
        each.cut(record.end)
    report = checked(job.data_dir)
    assert report.is_sound
    alpha, beta = (each.recovery for each in report.jobs)
    assert alpha is not None
    assert beta is not None
    assert (alpha.step, beta.step) == (STEPS - 1, STEPS - 1)
    assert (alpha.open_steps, alpha.discarded_rounds) == ([(2, 2)], 0)
    assert (beta.open_steps, beta.discarded_rounds) == ([], 1)
    assert "a step is open, 2 of 2 buckets applied" in optimd("jobs", "verify", job.data_dir)[1]
    assert_a_server_agrees(job.data_dir, report.jobs, tmp_path)


def test_a_last_record_that_is_torn_is_no_damage(job: KeptJob, tmp_path: Path) -> None:
    """It is what a crash leaves: told, with where it stands, and cut by a server."""
    torn = job.records()[-1][0]
    job.cut(torn.end - 5)
    report = checked(job.data_dir)
    assert report.is_sound
    journal = report.jobs[0].journal
    assert (journal.torn_at, journal.torn_in) == (torn.position, str(job.segment_of(torn.position)))
    assert journal.ends == torn.position
    assert_a_server_agrees(job.data_dir, report.jobs, tmp_path)


@pytest.mark.parametrize("name", ["data.safetensors", "manifest"])
def test_a_flipped_bit_in_a_snapshot_is_found_and_named(job: KeptJob, name: str, tmp_path: Path) -> None:
    """In the last one and in the one before; with the other and the journal nothing is lost."""
    for number in (0, 1):
        path = job.snapshot(number) / name
        whole = path.read_bytes()
        flip(path, len(whole) - 30)
        report = checked(job.data_dir)
        alpha = report.jobs[0]
        assert str(path) in alpha.snapshots[number].damage
        assert alpha.snapshots[1 - number].damage == ""
        (problem,) = alpha.problems
        assert str(path) in problem.what
        assert "nothing is lost" in problem.remedy
        assert alpha.recovery is not None
        assert (alpha.recovery.step, alpha.recovery.snapshot) == (STEPS, SNAPSHOTS[1 - number])
        assert_a_server_agrees(job.data_dir, report.jobs, tmp_path)
        path.write_bytes(whole)


def test_a_snapshot_that_is_cut_short_or_has_lost_a_file_is_damaged(job: KeptJob) -> None:
    """Each file of it is needed."""
    data = job.snapshot(1) / "data.safetensors"
    with data.open("r+b") as file:
        file.truncate(data.stat().st_size - 1)
    assert "not as long as it was written" in checked(job.data_dir).jobs[0].snapshots[1].damage
    data.unlink()
    assert f"{data} is missing" in checked(job.data_dir).jobs[0].snapshots[1].damage
    (job.snapshot(1) / "manifest").unlink()
    assert "manifest is missing" in checked(job.data_dir).jobs[0].snapshots[1].damage


def test_a_damaged_record_that_is_needed_stops_a_server_and_the_remedies_are_named(
    job: KeptJob, tmp_path: Path
) -> None:
    """With the file and the position; with --accept-loss the job goes on from the step before."""
    commits = [record for record, kind in job.records() if kind == "round_committed"]
    damaged = commits[-3]
    path = job.flip(damaged.end - 10)
    report = checked(job.data_dir)
    alpha, beta = report.jobs
    assert beta.is_sound
    (damage,) = alpha.journal.damage
    assert (damage.path, damage.position) == (str(path), damaged.position)
    assert alpha.journal.last_step == STEPS
    assert alpha.recovery is None
    assert alpha.accepting_loss is not None
    assert alpha.accepting_loss.step == STEPS - 3
    (problem,) = alpha.problems
    assert str(path) in problem.what
    assert f"position {damaged.position}" in problem.what
    assert "backup" in problem.remedy
    assert f"--accept-loss: the job goes on from step {STEPS - 3}" in problem.remedy
    status, output = optimd("jobs", "verify", job.data_dir)
    assert status == 1
    assert "a server does not start" in output
    assert f"{path}, position {damaged.position}" in output
    assert "--accept-loss" in output
    assert_a_server_agrees(job.data_dir, report.jobs, tmp_path)


def test_damage_that_no_good_snapshot_meets_is_found_all_the_same(job: KeptJob, tmp_path: Path) -> None:
    """A server does without those records; what follows them is read nevertheless."""
    early = [record for record, kind in job.records() if kind == "bucket_applied"][1]
    late = (checked(job.data_dir).jobs[0].snapshots[1].replay_from or 0) - 8
    assert early.position < late
    job.flip(early.end - 9)
    report = checked(job.data_dir)
    alpha = report.jobs[0]
    assert [damage.position for damage in alpha.journal.damage] == [early.position]
    assert alpha.journal.last_step == STEPS
    assert alpha.recovery is not None
    assert (alpha.recovery.step, alpha.recovery.snapshot) == (STEPS, SNAPSHOTS[1])
    assert "a server does without it" in alpha.problems[0].remedy
    assert_a_server_agrees(job.data_dir, report.jobs, tmp_path)


def test_a_missing_segment_is_damage(job: KeptJob, tmp_path: Path) -> None:
    """In the middle: where its first record stood. Before the first that is there: what a snapshot needs is missing."""
    gone = job.segments[-3]
    gone.unlink()
    alpha = checked(job.data_dir).jobs[0]
    assert [damage.position for damage in alpha.journal.damage] == [int(gone.stem)]
    assert alpha.recovery is None
    assert_a_server_agrees(job.data_dir, checked(job.data_dir).jobs, tmp_path)
    for path in job.segments[:-1]:
        path.unlink()
    report = checked(job.data_dir)
    assert report.jobs[0].recovery is None
    assert "the segments before this one are missing" in report.jobs[0].problems[0].what
    assert_a_server_agrees(job.data_dir, report.jobs, tmp_path)


def test_a_journal_that_ends_before_what_the_last_snapshot_needs_stops_a_server(job: KeptJob, tmp_path: Path) -> None:
    """Of a snapshot that was taken while a step was under way."""
    folder = job.snapshot(1)
    manifest = SnapshotReader(Files(), folder).manifest
    end = job.records()[-1][0].end
    manifest.position = end + 800
    (folder / "manifest").write_bytes(b"".join(frame(0, manifest.SerializeToString(), ())))
    report = checked(job.data_dir)
    alpha = report.jobs[0]
    (problem,) = alpha.problems
    assert f"ends at position {end}, and snapshot {SNAPSHOTS[1]} needs it up to {end + 800}" in problem.what
    assert alpha.recovery is None
    assert alpha.accepting_loss is not None
    assert alpha.accepting_loss.snapshot == SNAPSHOTS[0]
    assert_a_server_agrees(job.data_dir, report.jobs, tmp_path)


def test_without_a_good_snapshot_only_a_backup_helps(job: KeptJob, tmp_path: Path) -> None:
    """Unless the journal begins at the beginning."""
    for number in (0, 1):
        flip(job.snapshot(number) / "manifest", 40)
    report = checked(job.data_dir)
    alpha = report.jobs[0]
    assert (alpha.job, alpha.recovery, alpha.accepting_loss) == ("alpha", None, None)
    assert len(alpha.problems) == 3
    assert all("backup" in problem.remedy and "accept-loss" not in problem.remedy for problem in alpha.problems)
    assert_a_server_agrees(job.data_dir, report.jobs, tmp_path)


def test_a_job_whose_creation_was_never_completed_is_told(tmp_path: Path) -> None:
    """A server removes it; that is no damage."""
    with running_server(data_dir=str(tmp_path / "data"), fsync="never", snapshot_s=0.0) as server:
        mirror = Mirror(server.address, "alpha")
        shutil.copytree(tmp_path / "data", tmp_path / "died")
        mirror.close()
    (folder,) = (tmp_path / "died").glob("jobs/*")
    job = KeptJob(tmp_path / "died", folder)
    puts = [record for record, kind in job.records() if kind == "put_tensors"]
    whole = checked(job.data_dir).jobs[0]
    assert whole.recovery is not None
    assert (whole.recovery.snapshot, whole.recovery.step) == ("", 0)
    job.cut(puts[-1].position)
    report = checked(job.data_dir)
    assert report.is_sound
    assert (report.jobs[0].was_created, report.jobs[0].recovery) == (False, None)
    assert "never completed" in optimd("jobs", "verify", job.data_dir)[1]
    assert_a_server_agrees(job.data_dir, report.jobs, tmp_path)


def test_a_job_without_a_journal_comes_back_from_its_last_snapshot(tmp_path: Path) -> None:
    """Of a server that keeps snapshots alone."""
    settings = {"durability": "snapshot", "snapshot_s": 0.0}
    with running_server(data_dir=str(tmp_path / "data"), **settings) as server:
        mirror = Mirror(server.address, "alpha")
        for step in range(4):
            mirror.step(step)
            if step == 2:
                server.registry.snapshot("alpha")
        shutil.copytree(tmp_path / "data", tmp_path / "died")
        mirror.close()
    report = checked(tmp_path / "died")
    (alpha,) = report.jobs
    assert (alpha.is_sound, alpha.journal.segments) == (True, 0)
    assert alpha.recovery is not None
    assert (alpha.recovery.step, alpha.recovery.records) == (3, 0)
    assert_a_server_agrees(tmp_path / "died", report.jobs, tmp_path)
    (damaged,) = (tmp_path / "died").glob("jobs/*/snapshots/*/manifest")
    flip(damaged, 40)
    report = checked(tmp_path / "died")
    assert (report.jobs[0].recovery, report.jobs[0].accepting_loss) == (None, None)
    assert_a_server_agrees(tmp_path / "died", report.jobs, tmp_path)


def test_two_folders_of_one_job_are_told(job: KeptJob, tmp_path: Path) -> None:
    """A server would not know which to take."""
    shutil.copytree(job.folder, job.folder.with_name("zeta"))
    report = checked(job.data_dir)
    assert [each.is_sound for each in report.jobs] == [True, True, False]
    assert "both hold job 'alpha'" in report.jobs[-1].problems[0].what
    with pytest.raises(DataDirError, match="another folder"), recovered(job.data_dir):
        pass


def test_files_that_the_disk_does_not_give_are_damage(job: KeptJob, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the journal: where reading stopped. The rest is read."""
    read, opened = ReadOnlyFiles.read, ReadOnlyFiles.open
    bad, tries = {job.segments[2], job.snapshot(0) / "data.safetensors"}, []
    paths: dict[int, Path] = {}

    def open_noted(self: ReadOnlyFiles, path: Path) -> int:
        descriptor = opened(self, path)
        paths[descriptor] = path
        return descriptor

    def read_badly(self: ReadOnlyFiles, descriptor: int, length: int, offset: int) -> bytes:
        if paths[descriptor] in bad:
            tries.append(paths[descriptor])
            raise OSError(5, "Input/output error")
        return read(self, descriptor, length, offset)

    monkeypatch.setattr(ReadOnlyFiles, "open", open_noted)
    monkeypatch.setattr(ReadOnlyFiles, "read", read_badly)
    alpha = checked(job.data_dir).jobs[0]
    assert {*tries} == bad
    assert "Input/output error" in alpha.snapshots[0].damage
    (damage,) = alpha.journal.damage
    assert (damage.path, damage.position) == (str(job.segments[2]), int(job.segments[2].stem))
    assert "Input/output error" in damage.reason
    assert alpha.journal.last_step == STEPS


def test_json_has_all_of_it(job: KeptJob) -> None:
    """For a program; the status is the same."""
    status, output = optimd("jobs", "verify", job.data_dir, "--json")
    told = json.loads(output)
    assert (status, told["sound"], told["data_dir"]) == (0, True, str(job.data_dir))
    alpha = told["jobs"][0]
    assert (alpha["job"], alpha["sound"], alpha["problems"]) == ("alpha", True, [])
    assert [snapshot["step"] for snapshot in alpha["snapshots"]] == [12, 18]
    assert (alpha["journal"]["last_step"], alpha["journal"]["damage"]) == (STEPS, [])
    assert (alpha["recovery"]["step"], alpha["recovery"]["open_steps"]) == (STEPS, [])
    damaged = job.records()[-1][0]
    flip(job.snapshot(1) / "data.safetensors", 2000)
    job.flip(job.records()[-4][0].end - 9)
    status, output = optimd("jobs", "verify", job.data_dir, "--json")
    told = json.loads(output)
    assert (status, told["sound"]) == (1, False)
    assert len(told["jobs"][0]["problems"]) == 2
    assert told["jobs"][0]["journal"]["damage"][0]["position"] < damaged.position


def test_a_person_is_told_of_every_part(job: KeptJob) -> None:
    """A line for each snapshot, for one that was being written, and for the journal."""
    (job.folder / "snapshots" / "making").mkdir()
    (alpha, _) = checked(job.data_dir).jobs
    assert (alpha.unfinished_snapshot, alpha.is_sound) == (True, True)
    status, output = optimd("jobs", "verify", job.data_dir)
    assert status == 0
    assert "was being written" in output
    assert f"a server goes on from step {STEPS}: snapshot {SNAPSHOTS[1]}" in output
    for name in (*JOBS, *SNAPSHOTS, "good", f" - {STEPS}", "did not stop in good order", "all is as it was written"):
        assert name in output


def test_progress_is_told_in_bytes_and_ends_at_the_end(job: KeptJob) -> None:
    """Of all files that are read, whether all of their bytes are or not."""
    seen: list[tuple[int, int]] = []
    verify(job.data_dir, on_progress=lambda done, total: seen.append((done, total)))
    files = [path for pattern in ("*.journal", "data.safetensors", "manifest") for path in job.data_dir.rglob(pattern)]
    assert {total for _, total in seen} == {sum(path.stat().st_size for path in files)}
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert len(seen) > 100
    assert seen[-1][0] == seen[-1][1]


def test_a_data_dir_that_a_server_uses_is_refused(tmp_path: Path) -> None:
    """In one sentence, with status 2. What is being checked no server can take, but others can check it."""
    with running_server(data_dir=str(tmp_path / "data")):
        status, output = optimd("jobs", "verify", tmp_path / "data")
    assert (status, output.count("\n")) == (2, 1)
    assert f"optimd: a server is using the data dir {tmp_path / 'data'}" in output
    refused: list[str] = []

    def intrude(_done: int, _total: int) -> None:
        if not refused:
            assert verify(tmp_path / "data").is_sound
            with (
                pytest.raises(DataDirError, match="is using the data dir"),
                running_server(data_dir=str(tmp_path / "data")),
            ):
                pass
            refused.append("once")

    with running_server(data_dir=str(tmp_path / "data")) as server:
        Mirror(server.address).close()
    assert verify(tmp_path / "data", on_progress=intrude).is_sound
    assert refused


def test_what_is_no_data_dir_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    """A folder of something else, an empty one, none, a file, one of another version, and a job that is not there."""
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.tex").write_text("x")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "FORMAT").write_text("optimd data dir, version 7\n")
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "FORMAT").write_text("optimd data dir, version 1\n")
    before = content(tmp_path)
    for name, arguments, reason in (
        ("foreign", (), "is no data dir"),
        ("empty", (), "is no data dir"),
        ("none", (), "is no data dir"),
        ("file", (), "cannot be read"),
        ("other", (), "version 7"),
        ("bare", ("alpha",), "holds no job 'alpha'"),
    ):
        status, output = optimd("jobs", "verify", tmp_path / name, *arguments)
        assert (status, reason in output, output.count("\n")) == (2, True, 1), output
    assert optimd("jobs", "verify", tmp_path / "bare") == (0, "no jobs\n")
    assert content(tmp_path) == before


def damages(seed: int) -> Iterator[Callable[[KeptJob], object]]:
    """One to three things that happen to disks."""
    dice = random.Random(seed)

    def filled(paths: Iterable[Path]) -> list[Path]:
        return [path for path in sorted(paths) if path.is_file() and path.stat().st_size]

    def flip_somewhere(job: KeptJob) -> None:
        path = dice.choice(filled(job.folder.rglob("*")))
        flip(path, dice.randrange(path.stat().st_size), dice.randrange(8))

    def truncate(job: KeptJob) -> None:
        segments = filled(job.segments)
        path = dice.choice([*segments, segments[-1], segments[-1]])
        with path.open("r+b") as file:
            file.truncate(dice.randrange(path.stat().st_size))

    def lose(job: KeptJob) -> None:
        dice.choice(filled([*job.segments, *job.folder.glob("snapshots/*/*")])).unlink()

    def zero(job: KeptJob) -> None:
        path = dice.choice(filled(job.segments))
        data = bytearray(path.read_bytes())
        start = dice.randrange(len(data))
        data[start : start + 512] = bytes(len(data[start : start + 512]))
        path.write_bytes(data)

    def end(job: KeptJob) -> None:
        last = filled(job.segments)[-1]
        job.cut(dice.randrange(int(job.segments[0].stem), int(last.stem) + last.stat().st_size))

    def happen(job: KeptJob) -> None:
        of_the_journal = [truncate, zero, end] if filled(job.segments) else []
        dice.choice([flip_somewhere, flip_somewhere, lose, *of_the_journal])(job)

    for _ in range(dice.randint(1, 3)):
        yield happen


@pytest.mark.parametrize("seed", range(8))
def test_a_server_makes_of_any_damage_what_was_foretold(images: tuple[Path, Path], seed: int, tmp_path: Path) -> None:
    """It starts or refuses as was said, with the step and the open buckets that were named; with --accept-loss too."""
    for number in range(5):
        data_dir = shutil.copytree(images[0], tmp_path / str(number))
        (folder,) = data_dir.glob(f"jobs/{('alpha', 'beta')[seed % 2]}-*")
        before = content(folder)
        for damage in damages(1000 * seed + number):
            damage(KeptJob(data_dir, folder))
        assert content(folder) != before
        assert_a_server_agrees(data_dir, checked(data_dir).jobs, tmp_path)
