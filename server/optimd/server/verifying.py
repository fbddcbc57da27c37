"""Checking a data dir whose server is stopped: every byte of every snapshot and of every journal.

Nothing of it is changed. What a server would make of it is told besides, without a server, a device or a second copy
of a job in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

from optimd.server.datadir import DataDir
from optimd.server.errors import DataDirError
from optimd.server.files import Files, ReadOnlyFiles
from optimd.server.log import LogDamageError, LogReader, segment_path, segment_starts
from optimd.server.recovery import JOURNAL, SNAPSHOTS, parse_record, snapshot_names
from optimd.server.recoveryplan import Prospect, RecoveryPlan, choose
from optimd.server.snapshotfile import SnapshotDamageError, SnapshotReader
from optimd.server.snapshots import MAKING
from optimd.v1 import journal_pb2

_BACKUP: Final = "restore the job's folder from a backup"


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """Something that is not as it was written."""

    what: str
    """What, and where: names the file."""
    remedy: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SnapshotReport:
    """A snapshot of a job."""

    name: str
    nbytes: int
    """What its files take."""
    step: int | None = None
    """How many steps were committed; None, as all below, where its manifest cannot be read."""
    position: int | None = None
    """Where the journal stood when it was complete."""
    replay_from: int | None = None
    """From where on it needs the journal."""
    damage: str = ""
    """What is damaged, and where; empty where all of it is as it was written."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DamageReport:
    """A place in a journal where a record is not what it was, or missing."""

    path: str
    position: int
    """Where in the journal."""
    reason: str


@dataclass(slots=True, kw_only=True)
class JournalReport:
    """A job's journal. Positions count its bytes from its beginning, whichever files they are in."""

    segments: int
    nbytes: int
    """What its files take, those that wait to be used again left out."""
    begins: int
    """Where its first segment begins."""
    ends: int
    """Where its last whole record ends."""
    records: int = 0
    record_bytes: int = 0
    first_step: int | None = None
    """Of the first commit; None where there is none."""
    last_step: int | None = None
    torn_at: int | None = None
    """Where something begins that never was on the disk as a whole: what a crash leaves, and a server cuts off."""
    torn_in: str = ""
    """The file."""
    is_closed: bool = False
    """Whether its last record says that the server stopped in good order."""
    damage: list[DamageReport] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class RecoveryReport:
    """What a server would bring back of a job."""

    snapshot: str
    """The snapshot that it would begin with; empty for the journal alone."""
    snapshot_step: int
    records: int
    """How many records it would read besides."""
    record_bytes: int
    step: int
    """How many committed steps the job would have."""
    open_steps: list[tuple[int, int]]
    """Of each step that would be open how many buckets are applied, and how many there are."""
    discarded_rounds: int
    """How many atomic steps had begun and not been committed: nothing of them counts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JobReport:
    """One job's folder."""

    folder: str
    job: str
    """Its name; empty where nothing says it."""
    uid: str
    snapshots: list[SnapshotReport]
    """From the oldest to the newest."""
    unfinished_snapshot: bool
    """Whether one was being written when the server died: the next one removes it."""
    journal: JournalReport
    recovery: RecoveryReport | None
    """What a server would bring back; None where it would not start, or where there is nothing."""
    accepting_loss: RecoveryReport | None
    """Where it would not start: what it would bring back with --accept-loss, if anything."""
    was_created: bool
    """Whether the job was given its parameters; else a server removes what there is of it."""
    problems: list[Problem]

    @property
    def is_sound(self) -> bool:
        """Whether all of it is as it was written."""
        return not self.problems


@dataclass(frozen=True, slots=True, kw_only=True)
class DataDirReport:
    """A data dir, or one job of it."""

    data_dir: str
    jobs: list[JobReport]

    @property
    def is_sound(self) -> bool:
        """Whether all of it is as it was written."""
        return all(job.is_sound for job in self.jobs)


def verify(
    path: Path, job: str | None = None, *, on_progress: Callable[[int, int], object] | None = None
) -> DataDirReport:
    """Reads all of a data dir. Blocks; no server can take the data dir meanwhile.

    Args:
        path: The data dir.
        job: The name of the one job to check; None for all.
        on_progress: Called now and then with how many bytes have been read, and how many there are.

    Raises:
        DataDirError: a server is using it, it is of another version, there is none that can be read, or it has no such
            job.
    """
    done = total = 0

    def on_read(count: int) -> None:
        nonlocal done
        # Where something is damaged, what stands behind it is read more than once.
        done = min(done + count, total)
        if on_progress is not None:
            on_progress(done, total)

    files = ReadOnlyFiles(on_read)
    data_dir = DataDir.to_read(path, files)
    try:
        folders = list(data_dir.job_folders())
        if job is not None:
            folders = [folder for folder in folders if folder == data_dir.job_folder(job)]
            if not folders:
                raise DataDirError(f"the data dir {path} holds no job {job!r}")
        total = sum(_size(path) for folder in folders for path in _files_of(folder, files))
        reports = [_JobCheck(folder, files).report() for folder in folders]
        on_read(total)
    except OSError as error:
        raise DataDirError(f"the data dir {path} cannot be read: {error}") from error
    finally:
        data_dir.close()
    return DataDirReport(data_dir=str(path), jobs=_unlike(reports))


class _JobCheck:
    """Checks one job's folder."""

    def __init__(self, folder: Path, files: Files) -> None:
        self._folder = folder
        self._files = files
        self._starts = segment_starts(files, folder / JOURNAL)
        self._refusal = ""
        """Why no server of this version can read it."""
        self._plans: list[RecoveryPlan] = []
        """From the newest snapshot to the oldest, and of the journal alone."""
        self._kept = journal_pb2.KeptJob()
        """What the job was created with, as far as anything says so."""
        self._damage: LogDamageError | None = None
        """The last one of the journal."""

    def report(self) -> JobReport:
        snapshots = [self._check_snapshot(name) for name in snapshot_names(self._files, self._folder)]
        self._plans = [*self._plans[::-1], RecoveryPlan()]
        journal = self._check_journal()
        prospect, at_a_loss = self._choose(snapshots, accept_loss=False), self._choose(snapshots, accept_loss=True)
        accepting_loss = _foretell(at_a_loss.plan) if prospect.refusal and not self._refusal else None
        return JobReport(
            folder=str(self._folder),
            job=self._kept.job,
            uid=self._kept.uid,
            snapshots=snapshots,
            unfinished_snapshot=MAKING in self._files.names(self._folder / SNAPSHOTS),
            journal=journal,
            recovery=_foretell(prospect.plan),
            accepting_loss=accepting_loss,
            was_created=prospect.plan is not None or bool(prospect.refusal),
            problems=self._problems(snapshots, journal, prospect, accepting_loss),
        )

    def _check_snapshot(self, name: str) -> SnapshotReport:
        folder = self._folder / SNAPSHOTS / name
        nbytes = sum(map(_size, _files_in(folder, self._files)))
        try:
            reader = SnapshotReader(self._files, folder)
        except SnapshotDamageError as error:
            return SnapshotReport(name=name, nbytes=nbytes, damage=str(error))
        except DataDirError as error:
            self._refusal = self._refusal or str(error)
            return SnapshotReport(name=name, nbytes=nbytes)
        except OSError as error:
            return SnapshotReport(
                name=name, nbytes=nbytes, damage=f"{folder} cannot be read: {error.strerror or error}"
            )
        damage = ""
        try:
            reader.verify()
        except SnapshotDamageError as error:
            damage = str(error)
        except OSError as error:
            damage = f"{folder} cannot be read: {error.strerror or error}"
        manifest = reader.manifest
        self._kept = manifest.job
        self._plans.append(RecoveryPlan(name, manifest, is_damaged=bool(damage)))
        return SnapshotReport(
            name=name,
            nbytes=nbytes,
            step=manifest.step,
            position=manifest.position,
            replay_from=manifest.replay_from,
            damage=damage,
        )

    def _check_journal(self) -> JournalReport:
        folder = self._folder / JOURNAL
        paths = _segments_in(folder, self._files)
        begins = self._starts[0] if self._starts else 0
        report = JournalReport(segments=len(paths), nbytes=sum(map(_size, paths)), begins=begins, ends=begins)
        for plan in self._plans:
            if self._starts and plan.replay_from < begins:
                # As a reader of the journal finds out.
                first = folder / paths[0].name
                plan.end(LogDamageError(first, plan.replay_from, "the segments before this one are missing"))
        position: int | None = begins
        while position is not None and not self._refusal:
            position = self._read_journal(position, report)
        for plan in self._plans:
            plan.end()
        return report

    def _read_journal(self, position: int, report: JournalReport) -> int | None:
        """Reads records until one cannot be read. Gives where to go on behind it; None where there is nothing more."""
        folder = self._folder / JOURNAL
        reader, begun_at = LogReader(self._files, folder), position
        damage: LogDamageError | None = None
        try:
            for record in reader.records(position):
                message = parse_record(folder, record)
                position = record.end
                if message.HasField("segment_started"):
                    self._kept = message.segment_started.job
                _count(report, record.end, record.end - record.position, message)
                for plan in self._plans:
                    plan.see(record, message)
        except LogDamageError as error:
            damage = error
        except DataDirError as error:
            self._refusal = str(error)
            return None
        except OSError as error:
            path = self._path_at(position)
            damage = LogDamageError(path, position, f"the file cannot be read: {error.strerror or error}")
        stopped_at = damage.position if damage is not None else position
        if damage is None:
            if reader.torn_at is not None:
                report.torn_at, report.torn_in = reader.torn_at, str(self._path_at(reader.torn_at))
        elif self._damage is not None and stopped_at == begun_at and begun_at not in self._starts:
            # A snapshot that needs the journal from the middle of what is missing on.
            damage = self._damage
        else:
            self._damage = damage
            report.damage.append(DamageReport(path=str(damage.path), position=stopped_at, reason=damage.reason))
        for plan in self._plans:
            if plan.replay_from <= stopped_at:
                plan.end(damage)
        later = [plan.replay_from for plan in self._plans if not plan.has_ended]
        if damage is not None:
            later += self._starts
        return min((place for place in later if place > stopped_at), default=None)

    def _path_at(self, position: int) -> Path:
        start = max((start for start in self._starts if start <= position), default=0)
        return segment_path(self._folder / JOURNAL, start)

    def _choose(self, snapshots: Sequence[SnapshotReport], *, accept_loss: bool) -> Prospect:
        if self._refusal:
            return Prospect(refusal=self._refusal, is_hopeless=True)
        return choose(
            self._plans,
            skipped=any(snapshot.position is None for snapshot in snapshots),
            begins=self._starts[0] if self._starts else 0,
            accept_loss=accept_loss,
        )

    def _problems(
        self,
        snapshots: Sequence[SnapshotReport],
        journal: JournalReport,
        prospect: Prospect,
        accepting_loss: RecoveryReport | None,
    ) -> list[Problem]:
        if self._refusal:
            return [Problem(what=self._refusal, remedy="start the optimd that wrote it")]
        remedy = _BACKUP
        if not prospect.refusal:
            remedy = "none is needed: a server does without it, and nothing is lost"
        elif accepting_loss is not None:
            remedy = (
                f"{_BACKUP}, or start the server with --accept-loss: the job goes on from step {accepting_loss.step}, "
                "and what came behind is lost"
            )
        found = [snapshot.damage for snapshot in snapshots if snapshot.damage]
        found += [f"{damage.path}, position {damage.position}: {damage.reason}" for damage in journal.damage]
        if prospect.refusal and prospect.refusal not in found:
            found.append(f"{self._folder}: {prospect.refusal}")
        return [Problem(what=what, remedy=remedy) for what in found]


def _count(report: JournalReport, end: int, nbytes: int, message: journal_pb2.JournalRecord) -> None:
    report.ends = end
    report.records += 1
    report.record_bytes += nbytes
    report.is_closed = message.HasField("journal_closed")
    if message.HasField("round_committed"):
        report.last_step = message.round_committed.step
        if report.first_step is None:
            report.first_step = report.last_step


def _foretell(plan: RecoveryPlan | None) -> RecoveryReport | None:
    if plan is None:
        return None
    return RecoveryReport(
        snapshot=plan.snapshot,
        snapshot_step=plan.snapshot_step,
        records=plan.survey.records,
        record_bytes=plan.survey.nbytes,
        step=plan.step,
        open_steps=plan.open_steps,
        discarded_rounds=len(plan.discarded_rounds),
    )


def _unlike(reports: Sequence[JobReport]) -> list[JobReport]:
    """The same; where two hold jobs of one name, the second has that as a problem: a server does not start."""
    folders: dict[str, str] = {}

    def checked(report: JobReport) -> JobReport:
        first = folders.setdefault(report.job, report.folder)
        if first == report.folder or not report.job:
            return report
        twice = Problem(
            what=f"{report.folder} and {first} both hold job {report.job!r}",
            remedy=f"take one of them out of {Path(first).parent}",
        )
        return replace(report, problems=[*report.problems, twice])

    return [checked(report) for report in reports]


def _segments_in(journal: Path, files: Files) -> list[Path]:
    return [segment_path(journal, start) for start in segment_starts(files, journal)]


def _files_in(folder: Path, files: Files) -> Iterable[Path]:
    return (folder / name for name in files.names(folder)) if folder.is_dir() else [folder]


def _files_of(folder: Path, files: Files) -> list[Path]:
    """All files of a job that are read."""
    snapshots = [path for name in snapshot_names(files, folder) for path in _files_in(folder / SNAPSHOTS / name, files)]
    return [*snapshots, *_segments_in(folder / JOURNAL, files)]


def _size(path: Path) -> int:
    return path.stat().st_size
