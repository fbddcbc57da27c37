"""Bringing a job back from its folder: the newest good snapshot, and what the journal has behind it."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from google.protobuf.message import DecodeError

from optimd.server.company import JobPhase
from optimd.server.errors import DataDirError, RequestError
from optimd.server.files import Files
from optimd.server.job import Job
from optimd.server.kept import describe_environment, restore
from optimd.server.log import LogDamageError, LogReader, segment_starts
from optimd.server.records import Record
from optimd.server.recoveryplan import RecoveryPlan
from optimd.server.replay import Replay, ReplayError, Survey
from optimd.server.snapshotfile import SnapshotDamageError, SnapshotReader
from optimd.server.snapshots import MAKING
from optimd.v1 import journal_pb2

_log = logging.getLogger(__name__)

JOURNAL: Final = "journal"
SNAPSHOTS: Final = "snapshots"
_SNAPSHOT_NAME: Final = re.compile(r"\d{8,}-step-\d+")
FORMAT_VERSION: Final = 1

_REMEDY: Final = (
    "restore the folder from a backup, or start the server with --accept-loss to go on from what stands before it"
)


@dataclass(slots=True, kw_only=True)
class Found:
    """What a job's folder was found to hold, and what was made of it."""

    folder: Path
    job: Job | None = None
    kept: journal_pb2.KeptJob | None = None
    """What the job was created with."""
    snapshot: str = ""
    """The name of the snapshot that was used; empty where none was."""
    snapshot_step: int = 0
    snapshot_position: int = 0
    damaged: list[str] = field(default_factory=list)
    """What is wrong with newer snapshots, which could not be used."""
    unusable: list[str] = field(default_factory=list)
    """Their names."""
    unfinished_snapshot: bool = False
    """Whether a snapshot was being written when the server died."""
    survey: Survey = field(default_factory=Survey)
    """What the journal holds from where the snapshot needs it on."""
    torn_at: int | None = None
    """Where the journal was cut since what stood there had never been on the disk as a whole."""
    lost_from: int | None = None
    """Where the journal was cut since it is damaged, with what stood behind it."""
    end: int = 0
    """Where the journal goes on."""
    taken_back: list[int] = field(default_factory=list)
    """The atomic rounds that nothing had ended."""
    open_buckets: dict[int, tuple[int, int]] = field(default_factory=dict)
    """Of each round that is open still how many buckets are applied, and how many there are."""
    foreign: list[journal_pb2.Environment] = field(default_factory=list)
    """Where records were made that were replayed here: elsewhere."""
    without: frozenset[int] = frozenset()
    """Rounds of which nothing is to count, whatever the journal says."""
    seconds: float = 0.0

    @property
    def is_clean(self) -> bool:
        """Whether the last server had stopped in good order."""
        return self.survey.is_closed and not self.damaged and self.torn_at is None


MakeJob = Callable[[journal_pb2.KeptJob], Job]


def recover(
    folder: Path, files: Files, make_job: MakeJob, *, accept_loss: bool, taken_back: Collection[int] = ()
) -> Found:
    """Brings a job back. Nothing in its folder is changed.

    Args:
        folder: The job's.
        files: The system's files.
        make_job: Makes a job, of which nothing is there yet.
        accept_loss: Whether to go on from what stands before a damaged record.
        taken_back: Rounds of which nothing is to count, besides those of which the journal says so.

    Returns:
        What was found; without a job where its creation had not been completed.

    Raises:
        DataDirError: it cannot be brought back; the message names the file and the remedy.
        OSError: it cannot be read.
    """
    begun = time.monotonic()
    found = Found(folder=folder, without=frozenset(taken_back))
    found.unfinished_snapshot = MAKING in files.names(folder / SNAPSHOTS)
    for name in snapshot_names(files, folder)[::-1]:
        try:
            _bring_back(
                found, SnapshotReader(files, folder / SNAPSHOTS / name), files, make_job, accept_loss=accept_loss
            )
        except SnapshotDamageError as error:
            found.damaged.append(str(error))
            found.unusable.append(name)
            _log.error("snapshot %s cannot be used: %s", name, error)
        else:
            break
    else:
        _bring_back(found, None, files, make_job, accept_loss=accept_loss)
    found.seconds = time.monotonic() - begun
    return found


def snapshot_names(files: Files, folder: Path) -> list[str]:
    """The names of a job's snapshots, from the oldest to the newest."""
    return [name for name in files.names(folder / SNAPSHOTS) if _SNAPSHOT_NAME.fullmatch(name)]


def _bring_back(
    found: Found, snapshot: SnapshotReader | None, files: Files, make_job: MakeJob, *, accept_loss: bool
) -> None:
    journal = found.folder / JOURNAL
    plan = (
        RecoveryPlan(taken_back=found.without)
        if snapshot is None
        else RecoveryPlan(snapshot.folder.name, snapshot.manifest, taken_back=found.without)
    )
    survey, position = plan.survey, plan.position
    found.survey, found.torn_at, found.lost_from = survey, None, None
    if snapshot is None and segment_starts(files, journal)[:1] > [0]:
        _refuse_missing_start(found, files, journal)
    for record, message in _records(found, files, plan.replay_from, accept_loss=accept_loss):
        plan.see(record, message)
    if plan.holds_taken_back:
        raise SnapshotDamageError(f"snapshot {plan.snapshot} holds a part of a step that was taken back")
    found.end = max(survey.end, position)
    if plan.is_short:
        problem = f"{journal} ends at position {survey.end}, and snapshot {plan.snapshot} needs it up to {position}"
        if not accept_loss:
            raise DataDirError(f"{problem}; {_REMEDY}")
        raise SnapshotDamageError(problem)
    if snapshot is not None:
        # Before it is used: a bucket that is damaged is found now.
        snapshot.verify()
    kept = plan.kept_job
    if kept is None:
        _refuse_missing_start(found, files, journal)
        return
    try:
        job = make_job(kept)
    except RequestError as error:
        raise DataDirError(f"{found.folder} holds a job that this server cannot keep: {error}") from error
    parts = job.parts
    with parts.changed:
        kept_at: list[int] = []
        if snapshot is not None:
            _load(job, snapshot)
            kept_at = [content.position for content in snapshot.manifest.contents]
        replay = Replay(parts, job.pushing, survey, kept_at=kept_at, position=position)
        end = survey.end
        try:
            for record, message in _records(found, files, plan.replay_from, accept_loss=accept_loss):
                if record.position >= end:
                    break
                replay.redo(record, message)
            found.taken_back = replay.finish()
        except ReplayError as error:
            raise DataDirError(f"{journal}: {error}; {_REMEDY}") from error
        if parts.company.phase is not JobPhase.READY:
            _refuse_missing_start(found, files, journal)
            return
        count = len(parts.content.store.buckets)
        found.open_buckets = {
            number: (len({applied.bucket_id for applied in round_.applied}), count)
            for number, round_ in parts.journal.rounds.items()
            if round_.applied
        }
    here = describe_environment(parts.content.store.device)
    found.foreign = [other for other in survey.environments if other != here]
    found.job, found.kept = job, kept
    if snapshot is not None:
        found.snapshot, found.snapshot_step = snapshot.folder.name, snapshot.manifest.step
        found.snapshot_position = position


def _records(
    found: Found, files: Files, position: int, *, accept_loss: bool
) -> Iterator[tuple[Record, journal_pb2.JournalRecord]]:
    """The journal's records from a position on, parsed."""
    folder = found.folder / JOURNAL
    reader = LogReader(files, folder)
    try:
        for record in reader.records(position):
            yield record, parse_record(folder, record)
    except LogDamageError as error:
        if not accept_loss:
            raise DataDirError(f"{error}; {_REMEDY}") from error
        found.lost_from = error.position
        _log.error("%s; what stands there and behind it is lost (--accept-loss)", error)
    found.torn_at = reader.torn_at


def parse_record(journal: Path, record: Record) -> journal_pb2.JournalRecord:
    """What a record says.

    Args:
        journal: The journal's folder, for messages.
        record: The record.

    Raises:
        LogDamageError: it says nothing.
        DataDirError: it was written in another version of the format.
    """
    try:
        message = journal_pb2.JournalRecord.FromString(record.message)
    except DecodeError as error:
        raise LogDamageError(journal, record.position, f"the record is none: {error}") from error
    started = message.segment_started
    if message.HasField("segment_started") and started.format_version != FORMAT_VERSION:
        raise DataDirError(
            f"{journal} is of version {started.format_version}; this server reads {FORMAT_VERSION}: start the optimd "
            "that wrote it"
        )
    return message


def _refuse_missing_start(found: Found, files: Files, journal: Path) -> None:
    """There is no job: that is all right where it had not been given its parameters yet."""
    starts = segment_starts(files, journal)
    if found.damaged or found.lost_from is not None or (starts and starts[0] > 0):
        begins = f"its journal begins at position {starts[0]}" if starts else "it has no journal"
        if found.lost_from is not None:
            begins = f"its journal is damaged at position {found.lost_from}, before the job has its parameters"
        raise DataDirError(
            f"{found.folder} has no snapshot that can be used ({'; '.join(found.damaged) or 'none is there'}), and "
            f"{begins}; {_REMEDY.split(',', maxsplit=1)[0]}"
        )


def _load(job: Job, snapshot: SnapshotReader) -> None:
    parts = job.parts
    store = parts.content.store
    store.add(snapshot.parameters, snapshot.buckets)
    restore(snapshot.manifest, parts)
    for bucket, steps, copies in snapshot.contents():
        for kind, present, elements in copies:
            store.restore(kind, bucket, present, elements)
        store.restore_steps(bucket, steps)
    values = snapshot.buffer_values()
    if values is not None:
        parts.buffers.restore(values)
