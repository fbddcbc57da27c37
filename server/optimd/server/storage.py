"""What a server keeps on disk: a folder for each job, with its journal and its snapshots."""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final, Literal

import torch

from optimd.server.aggregation import SyncAggregator
from optimd.server.company import JobPhase
from optimd.server.datadir import DataDir
from optimd.server.errors import DataDirError, JobDeletedError, NotDurableError, RequestError, StorageFailedError
from optimd.server.job import Job
from optimd.server.journal import JobJournal
from optimd.server.kept import describe_environment, describe_job, settings_of
from optimd.server.log import SEGMENT_BYTES, Log, LogReader, LogSyncError
from optimd.server.recovery import FORMAT_VERSION, JOURNAL, SNAPSHOTS, Found, recover, snapshot_names
from optimd.server.settings import JobSettings
from optimd.server.snapshotfile import SnapshotDamageError, SnapshotReader
from optimd.server.snapshots import MAKING, SnapshotInfo, SnapshotTaker
from optimd.server.store import Store
from optimd.v1 import journal_pb2

_log = logging.getLogger(__name__)

_JOURNAL_TIMES_STATE: Final = 4
_LEAST_JOURNAL_BYTES: Final = 256 * 1024 * 1024
_SYNC_AHEAD_BYTES: Final = 16 * 1024 * 1024
_RETRY_S: Final = 5.0
_LOADING_TRIES: Final = 3
_UNUSABLE: Final = "unusable-"


@dataclass(frozen=True, slots=True, kw_only=True)
class StorageSettings:
    """How jobs are kept. The fields are those of `ServerConfig`."""

    durability: Literal["snapshot", "log"] = "log"
    fsync: Literal["never", "step", "interval"] = "step"
    fsync_interval_s: float = 1.0
    snapshot_steps: int = 0
    snapshot_s: float = 600.0
    snapshots_kept: int = 2
    journal_max_bytes: int = 0
    segment_bytes: int = SEGMENT_BYTES
    accept_loss: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class SnapshotTold:
    """What is known of a job's last snapshot."""

    step: int
    age_s: float
    """Of one that an earlier server took: since this one has started."""
    took_s: float
    """How long it took; 0 where an earlier server took it."""


class _Kept:
    """One job on disk."""

    def __init__(self, folder: Path, kept: journal_pb2.KeptJob) -> None:
        self.folder = folder
        self.kept = kept
        self.job: Job | None = None
        self.taking = threading.Lock()
        """Held while a snapshot is taken."""
        # Of the last snapshot: when, at which step and position it was. Written with `taking` held.
        self.taken_s = time.monotonic()
        self.taken_step = 0
        self.taken_position = 0
        self.taken_in_s = 0.0
        self.has_snapshot = False
        self.failed_s: float | None = None


class Storage:
    """Keeps a server's jobs in its data dir. Thread-safe.

    Args:
        data_dir: The data dir, locked.
        settings: How jobs are kept.
        device: Where jobs keep their tensors.
    """

    def __init__(self, data_dir: DataDir, settings: StorageSettings, device: torch.device) -> None:
        self._dir = data_dir
        self._files = data_dir.files
        self._settings = settings
        self._device = device
        self.stopping = threading.Event()
        """Set when the server stops: what waits for a disk waits no more."""
        self._lock = threading.Lock()
        self._kept: dict[str, _Kept] = {}  # guarded by self._lock

    # --- jobs

    def create(self, name: str, settings: JobSettings) -> JobJournal:
        """A folder and a journal for a new job. What an earlier one of that name has left is removed, as by `forget`.

        Raises:
            StorageFailedError: it cannot be made.
        """
        with self._lock:
            former = self._kept.get(name)
        if former is not None and former.job is not None:
            # Another thread is about to remove it, and its folder has the new one's name.
            former.job.delete()
            self.forget(former.job)
        folder = self._dir.job_folder(name)
        kept = _Kept(folder, describe_job(name, uuid.uuid4().hex, settings))
        try:
            self._dir.remove_job(folder)
            self._files.make_folder(folder / SNAPSHOTS)
            self._files.make_folder(folder / JOURNAL)
            self._files.sync_folder(folder)
            self._files.sync_folder(folder.parent)
        except OSError as error:
            raise StorageFailedError(f"job {name!r} cannot be kept in {folder}: {error.strerror or error}") from error
        journal = self._journal(name)
        journal.attach(self._log_at(kept, 0), 0)
        self._watch_over(kept, journal)
        with self._lock:
            self._kept[name] = kept
        return journal

    def _watch_over(self, kept: _Kept, journal: JobJournal) -> None:
        journal.repair_with(partial(self._repair, kept))
        journal.restore_with(partial(self._load_last_commit, kept))

    def keep(self, job: Job) -> None:
        """A job has been made with the journal that `create` gave."""
        with self._lock:
            self._kept[job.name].job = job
        _take_steps_back(job)

    def forget(self, job: Job) -> None:
        """A job is gone, for good: so is its folder. Waits for a snapshot that is under way. May be called again."""
        with self._lock:
            kept = self._kept.get(job.name)
        if kept is None or kept.job is not job:
            return
        with kept.taking:
            with self._lock:
                if self._kept.get(job.name) is not kept:
                    return
            try:
                self._dir.remove_job(kept.folder)
            except OSError as error:
                _log.warning("job %s: its folder %s could not be removed: %s", job.name, kept.folder, error)
            finally:
                # Not before: the folder of another job of this name would be removed.
                with self._lock:
                    del self._kept[job.name]

    def recover(self, make_job: Callable[[str, JobSettings, JobJournal], Job]) -> list[Job]:
        """Brings all jobs back. Says in the log what was found, and what was made of it.

        Args:
            make_job: Makes a job of that name, with these settings and this journal.

        Raises:
            DataDirError: one cannot be brought back; the message names the file and the remedy.
        """
        jobs: dict[str, Job] = {}
        for folder in list(self._dir.job_folders()):
            try:
                job = self._recover_one(folder, make_job, jobs)
            except OSError as error:
                raise DataDirError(f"{folder} cannot be brought back: {error.strerror or error}") from error
            if job is not None:
                jobs[job.name] = job
        return list(jobs.values())

    def _recover_one(
        self, folder: Path, make_job: Callable[[str, JobSettings, JobJournal], Job], others: Mapping[str, Job]
    ) -> Job | None:
        found = recover(
            folder,
            self._files,
            lambda kept: make_job(kept.job, settings_of(kept), self._journal(kept.job)),
            accept_loss=self._settings.accept_loss,
        )
        if found.job is None or found.kept is None:
            _log.warning("%s holds a job whose creation was never completed: removed", folder)
            self._dir.remove_job(folder)
            return None
        if found.job.name in others:
            raise DataDirError(
                f"{folder} and another folder hold job {found.job.name!r}: take one of them out of {folder.parent}"
            )
        self._go_on(found, found.job, found.kept)
        return found.job

    def _go_on(self, found: Found, job: Job, description: journal_pb2.KeptJob) -> None:
        kept = _Kept(found.folder, description)
        kept.job = job
        self._files.remove(found.folder / SNAPSHOTS / MAKING)
        for name in found.unusable:
            # It may be whole, and of records that are lost: what comes in their place must not be replayed on it.
            aside = found.folder / SNAPSHOTS / f"{_UNUSABLE}{name}"
            self._files.remove(aside)
            self._files.rename(found.folder / SNAPSHOTS / name, aside)
        if found.unusable:
            self._files.sync_folder(found.folder / SNAPSHOTS)
        self._files.make_folder(found.folder / JOURNAL)
        journal = LogReader(self._files, found.folder / JOURNAL)
        if found.torn_at is not None or found.lost_from is not None:
            journal.cut(found.end)
        if self._settings.fsync != "never":
            journal.sync()
        with job.parts.changed:
            job.journal.attach(self._log_at(kept, found.end), found.end)
            self._watch_over(kept, job.journal)
            _take_steps_back(job)
            job.parts.company.membership.restored()
            for number in found.taken_back:
                job.journal.round_taken_back(number)
            for number, round_ in list(job.journal.rounds.items()):
                if not round_.applied:
                    # As `Replay.finish` has it.
                    job.journal.round_ended(number)
        kept.taken_step, kept.taken_position = found.snapshot_step, found.snapshot_position
        kept.has_snapshot = bool(found.snapshot)
        with self._lock:
            self._kept[job.name] = kept
        _tell(found, job)

    def _journal(self, name: str) -> JobJournal:
        return JobJournal(
            name,
            syncs=self._settings.durability == "log" and self._settings.fsync == "step",
            stopping=self.stopping,
        )

    def _log_at(self, kept: _Kept, position: int) -> Log | None:
        if self._settings.durability != "log":
            return None
        environment = describe_environment(self._device)

        def first_message(start: int) -> bytes:
            started = journal_pb2.SegmentStarted(
                format_version=FORMAT_VERSION, position=start, job=kept.kept, environment=environment
            )
            return journal_pb2.JournalRecord(segment_started=started).SerializeToString()

        return Log(
            self._files,
            kept.folder / JOURNAL,
            position=position,
            first_message=first_message,
            segment_bytes=self._settings.segment_bytes,
            durable=self._settings.fsync != "never",
            sync_ahead_bytes=_SYNC_AHEAD_BYTES if self._settings.fsync == "step" else 0,
        )

    # --- snapshots

    def snapshot(self, job: Job) -> SnapshotInfo:
        """Takes a snapshot of a job, and drops what nobody needs any more. Blocks.

        Raises:
            NotDurableError: the job is not kept.
            StorageFailedError: it could not be written.
            JobDeletedError: the job went away.
        """
        kept = self._kept_as(job)
        if kept is None:
            raise NotDurableError(f"job {job.name!r} is not kept on disk")
        with kept.taking:
            return self._take(kept, job)

    def replay_bytes(self, job: Job) -> int:
        """How much of a job's journal a restart would replay, in bytes. Does not wait."""
        kept = self._kept_as(job)
        return 0 if kept is None or not job.journal.is_kept else job.journal.position - kept.taken_position

    @property
    def snapshot_s(self) -> float:
        """How often snapshots are taken of jobs that have changed, in seconds; 0: not by time."""
        return self._settings.snapshot_s

    def last_snapshot(self, job: Job) -> SnapshotTold | None:
        """What is known of a job's last snapshot; None where it has none. Does not wait."""
        kept = self._kept_as(job)
        if kept is None or not kept.has_snapshot:
            return None
        return SnapshotTold(step=kept.taken_step, age_s=time.monotonic() - kept.taken_s, took_s=kept.taken_in_s)

    def _kept_as(self, job: Job) -> _Kept | None:
        with self._lock:
            kept = self._kept.get(job.name)
        return kept if kept is not None and kept.job is job else None

    def _take(self, kept: _Kept, job: Job) -> SnapshotInfo:
        begun = time.monotonic()
        taker = SnapshotTaker(job, kept.kept, self._files)
        try:
            try:
                info = taker.take(kept.folder / SNAPSHOTS, name=self._next_name(kept, job))
            except LogSyncError:
                # What it builds on cannot be brought to the disk: one that builds on nothing.
                info = self._begin_anew(kept, job)
        except (OSError, SnapshotDamageError) as error:
            kept.failed_s = time.monotonic()
            reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            _log.error("job %s: no snapshot could be written: %s. Those before it are as they were", job.name, reason)
            raise StorageFailedError(f"no snapshot of job {job.name!r} could be written: {reason}") from error
        kept.taken_in_s = time.monotonic() - begun
        self._settle(kept, job, info)
        _log.info(
            "job %s: snapshot %s of step %d, %.1f MB in %.2f s",
            job.name,
            info.folder.name,
            info.step,
            info.nbytes / 1e6,
            kept.taken_in_s,
        )
        return info

    def _next_name(self, kept: _Kept, job: Job) -> str:
        names = snapshot_names(self._files, kept.folder)
        number = 1 + max((int(name.partition("-")[0]) for name in names), default=0)
        return f"{number:08d}-step-{job.step}"

    def _settle(self, kept: _Kept, job: Job, info: SnapshotInfo) -> None:
        """A snapshot is there: older ones, and records that none needs, go."""
        kept.taken_s, kept.failed_s = time.monotonic(), None
        kept.taken_step, kept.taken_position, kept.has_snapshot = info.step, info.position, True
        try:
            folder = kept.folder / SNAPSHOTS
            names = snapshot_names(self._files, kept.folder)
            for name in names[: -self._settings.snapshots_kept]:
                self._files.remove(folder / name)
            needed = info.replay_from
            for name in names[-self._settings.snapshots_kept : -1]:
                try:
                    needed = min(needed, SnapshotReader(self._files, folder / name).manifest.replay_from)
                except SnapshotDamageError as error:
                    _log.error("job %s: an older snapshot is damaged: %s", job.name, error)
            job.journal.drop_before(needed)
            if self._settings.durability != "log":
                # Of a server that did write one.
                self._files.remove(kept.folder / JOURNAL)
        except OSError as error:
            _log.warning("job %s: what is not needed any more could not be removed: %s", job.name, error)

    def _repair(self, kept: _Kept) -> None:
        """A sync of the journal has failed: brings the job to the disk as a snapshot, and begins anew.

        Raises:
            OSError: it cannot be written.
            RequestError: the job went away, or the server stops.
        """
        if kept.job is not None:
            with kept.job.parts.changed:
                # A snapshot that waits for the end of a step waits no more.
                kept.job.parts.changed.notify_all()
        with kept.taking:
            # Unless another one that waited for the sync has done so.
            if kept.job is not None and not kept.job.journal.is_sound:
                self._begin_anew(kept, kept.job)

    def _begin_anew(self, kept: _Kept, job: Job) -> SnapshotInfo:
        """As `_repair`, with `kept.taking` held."""
        company, journal = job.parts.company, job.journal
        taker = SnapshotTaker(job, kept.kept, self._files)
        with job.parts.changed:
            taker.await_quiet()
            start = journal.write_again(
                [
                    (member, company.record(member.worker.worker_id).next_sequence)
                    for member in company.members.values()
                    # What comes again if this server dies, as all of a push does that is not applied as it comes, must
                    # not be there already.
                    if job.settings.applies_at_once or not member.held.has_given
                ],
                job.pushing.deferred_locked(),
                job.store,
            )
            try:
                info = taker.take_locked(kept.folder / SNAPSHOTS, name=self._next_name(kept, job), replay_from=start)
            except SnapshotDamageError as error:
                raise OSError(str(error)) from error
            journal.begin_anew(start)
            _log.warning("job %s: a sync of its journal failed; snapshot %s has it all", job.name, info.folder.name)
            self._settle(kept, job, info)
        return info

    def _load_last_commit(self, kept: _Kept, round_number: int) -> Store | None:
        """As `JobJournal.load_last_commit`. With the job's lock held: nothing is appended meanwhile."""
        for _ in range(_LOADING_TRIES):
            try:
                found = recover(
                    kept.folder,
                    self._files,
                    lambda description: Job(description.job, settings_of(description), self._device),
                    accept_loss=False,
                    taken_back={round_number},
                )
            except (DataDirError, OSError, MemoryError, torch.OutOfMemoryError) as error:
                # A snapshot that is being taken may just have replaced what was looked at.
                _log.warning("job %s: its last commit could not be loaded: %s", kept.kept.job, error)
            else:
                if found.job is not None:
                    return found.job.store
        return None

    # --- time

    def is_due(self, job: Job, now: float) -> bool:
        """Whether a snapshot of a job is due. Does not wait, not even for the job's lock."""
        with self._lock:
            kept = self._kept.get(job.name)
        if kept is None or kept.job is not job or job.phase is not JobPhase.READY:
            return False
        if kept.failed_s is not None and now < kept.failed_s + _RETRY_S:
            return False
        steps = job.step - kept.taken_step
        written = job.journal.position - kept.taken_position
        settings = self._settings
        if not steps and not written:
            return False
        limit = settings.journal_max_bytes or max(_LEAST_JOURNAL_BYTES, _JOURNAL_TIMES_STATE * job.kept_bytes)
        return (
            bool(settings.snapshot_steps and steps >= settings.snapshot_steps)
            or bool(settings.snapshot_s and now >= kept.taken_s + settings.snapshot_s)
            or written > limit
        )

    def _has_news(self, job: Job) -> bool:
        """Whether a job has changed since its last snapshot, if it has any."""
        with self._lock:
            kept = self._kept.get(job.name)
        if kept is None:
            # Its last worker has left this very moment.
            return False
        position = job.journal.position
        return not kept.has_snapshot or (job.step, position) != (kept.taken_step, kept.taken_position)

    def tick(self, job: Job) -> None:
        """Takes the snapshot that is due, unless one is being taken. What goes wrong is in the log."""
        with self._lock:
            kept = self._kept.get(job.name)
        if kept is not None and kept.taking.acquire(blocking=False):
            try:
                self._take(kept, job)
            except JobDeletedError:
                pass
            except RequestError as error:
                kept.failed_s = time.monotonic()
                _log.warning("job %s: no snapshot was taken: %s", job.name, error)
            finally:
                kept.taking.release()

    def flush(self) -> None:
        """Brings all journals to the disk. Blocks; what goes wrong is in the log."""
        for kept in self._all_kept():
            if kept.job is not None:
                self._flush(kept, kept.job)

    def _flush(self, kept: _Kept, job: Job) -> None:
        try:
            try:
                job.journal.flush()
            except LogSyncError:
                self._repair(kept)
        except JobDeletedError:
            pass
        except (OSError, RequestError) as error:
            _log.error("job %s: its journal could not be brought to the disk: %s", job.name, error)

    @property
    def flush_interval_s(self) -> float | None:
        """How often `flush` is to be called; None where never."""
        is_due = self._settings.durability == "log" and self._settings.fsync == "interval"
        return self._settings.fsync_interval_s if is_due else None

    def close(self) -> None:
        """The server has stopped serving: takes a last snapshot of each job, and ends the journals."""
        for job in self._jobs():
            if not self._has_news(job):
                _log.info("job %s: its last snapshot is of step %d still", job.name, job.step)
            elif job.journal.has_failed:
                # What is in memory is not what is written down; what is written down has all that was acknowledged.
                _log.warning("job %s: no last snapshot: its journal could not be written", job.name)
            elif job.is_in_mid_step:
                _log.warning("job %s: no last snapshot: it is in the middle of step %d", job.name, job.step + 1)
            else:
                try:
                    self.snapshot(job)
                except RequestError as error:
                    _log.warning("job %s: no last snapshot was taken: %s", job.name, error)
            with job.parts.changed:
                job.journal.close(orderly=True)
        self._dir.close()

    def _jobs(self) -> list[Job]:
        return [kept.job for kept in self._all_kept() if kept.job is not None]

    def _all_kept(self) -> list[_Kept]:
        """Those whose jobs are there."""
        with self._lock:
            all_kept = list(self._kept.values())
        return [kept for kept in all_kept if kept.job is not None and kept.job.phase is JobPhase.READY]


def _take_steps_back(job: Job) -> None:
    """Where steps are streamed and written down, one that nobody is left of can be taken back."""
    aggregator = job.parts.aggregator
    if isinstance(aggregator, SyncAggregator):
        aggregator.takes_back = aggregator.streaming and job.journal.is_kept


def _tell(found: Found, job: Job) -> None:
    survey = found.survey
    source = f"snapshot {found.snapshot} (step {found.snapshot_step})" if found.snapshot else "its journal alone"
    _log.info(
        "job %s: recovered at step %d from %s and %d records (%.1f MB) behind it, in %.2f s%s",
        job.name,
        job.step,
        source,
        survey.records,
        survey.nbytes / 1e6,
        found.seconds,
        "; the server had stopped in good order" if found.is_clean else "",
    )
    for name in found.unusable:
        _log.warning("job %s: snapshot %s could not be used: it is called %s%s now", job.name, name, _UNUSABLE, name)
    if found.unfinished_snapshot:
        _log.info("job %s: a snapshot was being written: removed", job.name)
    if found.torn_at is not None:
        _log.warning("job %s: what had not reached the disk was cut, at position %d", job.name, found.torn_at)
    for applied, count in found.open_buckets.values():
        _log.info("job %s: a step is open still, %d of %d buckets applied", job.name, applied, count)
    for number in found.taken_back:
        _log.info("job %s: round %d had not been committed: discarded", job.name, number)
    for other in found.foreign:
        _log.warning(
            "job %s: records were made elsewhere (torch %s, %s, %s, %d threads): bits may differ",
            job.name,
            other.torch_version,
            other.cpu_capability,
            other.device,
            other.threads,
        )
