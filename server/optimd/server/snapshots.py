"""Taking a snapshot of a job: bucket by bucket while training goes on, or in one piece while it rests.

Of a job whose journal is kept, each bucket is copied by itself, with the journal's position at that moment; a replay
then does what is newer. Where nothing is written down in between, or the updates of several buckets belong together,
the job is held still meanwhile, between two steps.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from optimd.server import update
from optimd.server.aggregation import SyncAggregator
from optimd.server.company import JobPhase
from optimd.server.content import JobContent
from optimd.server.errors import JobDeletedError
from optimd.server.files import Files
from optimd.server.job import Job
from optimd.server.kept import describe_environment, describe_locked
from optimd.server.log import LogSyncError
from optimd.server.readers import ReadHold
from optimd.server.snapshotfile import FORMAT_VERSION, DataLayout, SnapshotReader, SnapshotWriter
from optimd.v1 import journal_pb2, snapshot_pb2
from optimd.wire.buffers import encode_buffer
from optimd.wire.kinds import PARAMETER
from optimd.wire.layout import Bucket, pack_bits

_log = logging.getLogger(__name__)

_TRIES_WHILE_TRAINING: Final = 2
_QUIET_TIMEOUT_S: Final = 600.0

MAKING: Final = "making"
"""The name of a snapshot that is not complete yet."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SnapshotInfo:
    """A snapshot that is on the disk and has been read back."""

    folder: Path
    step: int
    position: int
    replay_from: int
    nbytes: int


class _ChangedMeanwhileError(Exception):
    """The job has become another while it was copied: the copies do not belong together."""


class SnapshotTaker:
    """Takes snapshots of one job, one at a time. Any thread may do so.

    Args:
        job: The job.
        kept: What it was created with.
        files: The system's files.
    """

    def __init__(self, job: Job, kept: journal_pb2.KeptJob, files: Files) -> None:
        self._job = job
        self._kept = kept
        self._files = files

    def take(self, folder: Path, *, name: str) -> SnapshotInfo:
        """Writes a snapshot into `folder`, under `name` once all of it is there and has been read back. Blocks.

        Raises:
            OSError: it cannot be written.
            SnapshotDamageError: it was written, and is not what was written.
            RequestError: the job went away, or was never still.
        """
        for attempt in range(_TRIES_WHILE_TRAINING + 1):
            holds_still = attempt == _TRIES_WHILE_TRAINING or not self._job.journal.is_kept
            try:
                with self._making(folder) as making:
                    written = self._write(making, holds_still=holds_still)
                    # What it builds on has to be as safe as it is.
                    self._job.journal.flush()
                    return self._name(making, folder / name, written)
            except _ChangedMeanwhileError:
                _log.debug("job %s changed while it was copied; begins again", self._job.name)
        raise RuntimeError("a job that is held still has changed")

    def take_locked(self, folder: Path, *, name: str, replay_from: int) -> SnapshotInfo:
        """As `take`, in one piece: with the job's lock held, so that nothing at all happens meanwhile.

        Args:
            folder: As in `take`.
            name: As in `take`.
            replay_from: Where the records begin that belong to it.
        """
        with self._making(folder) as making:
            written = self._copy(making, nullcontext(), alone=True, replay_from=replay_from)
            self._job.journal.sync_behind(replay_from)
            return self._name(making, folder / name, written)

    @contextmanager
    def _making(self, folder: Path) -> Iterator[Path]:
        making = folder / MAKING
        self._files.remove(making)
        self._files.make_folder(making)
        try:
            yield making
        finally:
            if making.exists():
                self._files.remove(making)

    def _name(self, making: Path, path: Path, written: SnapshotInfo) -> SnapshotInfo:
        SnapshotReader(self._files, making).verify()
        self._files.rename(making, path)
        try:
            self._files.sync_folder(path.parent)
        except OSError:
            # Nothing may build on it, and the next try makes another one.
            self._files.remove(path)
            raise
        return replace(written, folder=path)

    def _write(self, making: Path, *, holds_still: bool) -> SnapshotInfo:
        if not holds_still and _splits_freely(self._job.parts.content):
            return self._copy(making, self._job.parts.changed, alone=False)
        with self._job.reading() as hold:
            return self._copy(making, self._job.parts.changed, alone=True, hold=hold)

    def _copy(
        self,
        making: Path,
        lock: AbstractContextManager[object],
        *,
        alone: bool,
        hold: ReadHold | None = None,
        replay_from: int | None = None,
    ) -> SnapshotInfo:
        """Writes the files.

        Args:
            making: Where to.
            lock: What keeps the job from changing: held for a bucket at a time.
            alone: Whether nothing is applied meanwhile.
            hold: What tells that this is alive.
            replay_from: Where the records begin that belong to it, if that is known.
        """
        parts, journal = self._job.parts, self._job.journal
        with lock:
            self.await_quiet()
            journal.begin_snapshot()
            changes, store = journal.content_changes, parts.content.store
            buckets, parameters = list(store.buckets), list(store.parameters)
            begun = [round_.position for round_ in journal.rounds.values()]
            if replay_from is None:
                replay_from = journal.position if alone else min(begun, default=journal.position)
            buffers = parts.buffers.values()
            kinds = _kinds(parts.content)

        def check() -> None:
            if hold is not None:
                hold.touch()
            if parts.company.phase is JobPhase.DELETED:
                raise JobDeletedError(f"job {self._job.name!r} was deleted")
            if journal.content_changes != changes:
                raise _ChangedMeanwhileError

        layout = DataLayout(parameters, kinds, buffers.buffers if buffers is not None else ())
        writer = SnapshotWriter(self._files, making, layout)
        contents = []
        try:
            for bucket in buckets:
                with lock:
                    check()
                    position, steps = journal.position, store.steps_in(bucket)
                    copies = [(kind, *store.copy(kind, bucket)) for kind in kinds]
                contents.append(
                    snapshot_pb2.KeptBucket(
                        position=position,
                        steps=steps,
                        present=[pack_bits(present) for _, present, _ in copies],
                        checksum=writer.write_bucket(bucket, copies),
                    )
                )
            with lock:
                self.await_quiet()
                check()
                if not alone and not _splits_freely(parts.content):
                    raise _ChangedMeanwhileError
                latest = parts.buffers.values()
                if (latest is None) != (buffers is None) or not set(_kinds(parts.content)) <= set(kinds):
                    raise _ChangedMeanwhileError
                manifest = describe_locked(parts, kinds)
                manifest.replay_from = min(replay_from, *journal.held_from.values(), journal.position)
                rounds, takings_back = set(journal.rounds), journal.takings_back
            manifest.format_version = FORMAT_VERSION
            manifest.job.CopyFrom(self._kept)
            manifest.environment.CopyFrom(describe_environment(parts.content.store.device))
            manifest.contents.extend(contents)
            if latest is not None:
                manifest.buffers.extend(encode_buffer(buffer) for buffer in latest.buffers)
                manifest.buffers_checksum = writer.write_buffers(latest)
            writer.finish(manifest)
            if not alone:
                with lock:
                    self._await_end(rounds, takings_back)
        finally:
            writer.close()
        return SnapshotInfo(
            folder=making,
            step=manifest.step,
            position=manifest.position,
            replay_from=manifest.replay_from,
            nbytes=layout.nbytes,
        )

    def _await_end(self, rounds: Collection[int], takings_back: int) -> None:
        """Waits until streamed steps are over that were open when the snapshot was complete. Gives up the lock.

        One of which all workers are lost is taken back, and the snapshot would have a part of it.
        """
        parts, journal = self._job.parts, self._job.journal
        if isinstance(parts.aggregator, SyncAggregator):
            parts.company.wait(
                None, lambda: journal.rounds.keys().isdisjoint(rounds) or not journal.is_sound, _QUIET_TIMEOUT_S
            )
            if not journal.is_sound:
                # The step's workers may be waiting for what stands in for the sync, which waits for this.
                raise LogSyncError("a sync of the journal has failed meanwhile")
            if journal.takings_back != takings_back:
                raise _ChangedMeanwhileError

    def await_quiet(self) -> None:
        """Waits until nobody is bringing parameters or state. With the job's lock held; gives it up meanwhile."""
        parts = self._job.parts
        parts.company.wait(None, lambda: parts.company.bringing is None, _QUIET_TIMEOUT_S)


def _kinds(content: JobContent) -> list[str]:
    """All kinds of tensors that the job has or may have by the end of the step."""
    names = set(content.store.kinds()) - {PARAMETER}
    for options in content.groups:
        names.update(update.state_names(options))
    return [PARAMETER, *sorted(names)]


def _splits_freely(content: JobContent) -> bool:
    """Whether each bucket is updated by itself."""

    def splits(bucket: Bucket) -> bool:
        return update.is_split_invariant(content.groups[bucket.group], bucket.server_dtype)

    return all(splits(bucket) for bucket in content.store.buckets)
