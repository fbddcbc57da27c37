"""Writes a job's records, makes them durable, and waits where a disk cannot.

Where a record cannot be written, the job waits, lock and all, until it can: nothing of it is lost or acknowledged
meanwhile, and other jobs go on.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from typing import Final

from optimd.server.errors import StorageFailedError
from optimd.server.files import Part
from optimd.server.log import Log, LogSyncError
from optimd.server.measures import SYNC_SECONDS, Histogram
from optimd.server.records import ALIGNMENT, length_of
from optimd.v1 import journal_pb2

_log = logging.getLogger(__name__)

_RETRY_S: Final = 0.25


class RecordWriter:
    """Writes one job's records. Without a log it writes none.

    What appends is called with the job's lock held; `await_durable` and what else brings to the disk is not.

    Args:
        job: The job's name, for messages.
        log: Where records go; None where the job is not kept, or by snapshots alone.
        syncs: Whether what is acknowledged has to be on the disk before.
        stopping: Set when the server stops: a job that waits for a disk waits no more.
    """

    def __init__(
        self,
        job: str,
        log: Log | None = None,
        *,
        syncs: bool = False,
        stopping: threading.Event | None = None,
    ) -> None:
        self._job = job
        self._log = log
        self._base = 0
        self._syncs = syncs
        self._stopping = stopping or threading.Event()
        self._given_up = threading.Event()
        self._repair: Callable[[], None] = lambda: None
        self.sync_seconds = Histogram(SYNC_SECONDS)
        """How long what was to be acknowledged has waited for the disk. Thread-safe."""
        # Guarded by the job's lock.
        self.has_failed = False
        """Whether something could not be written before the server stopped: then memory is not what is written down."""
        self.trouble = ""
        """Why nothing can be written just now; empty where it can."""

    def repair_with(self, repair: Callable[[], None]) -> None:
        """Has `repair` called where a sync has failed, without the job's lock.

        It brings all of the job to the disk in another way, and returns once that is done. It may raise OSError.
        """
        self._repair = repair

    @property
    def is_kept(self) -> bool:
        """Whether records are written."""
        return self._log is not None

    @property
    def position(self) -> int:
        """Where the next record goes, or would."""
        return self._log.position if self._log is not None else self._base

    def attach(self, log: Log | None, position: int) -> None:
        """Begins to write, behind what was read of an earlier server's records.

        Args:
            log: Where to; None where records are not written any more.
            position: Where the last one read ends.
        """
        self._log, self._base = log, position

    def _append(self, record: journal_pb2.JournalRecord, parts: Sequence[Part] = ()) -> int:
        """Writes a record. Gives where it stands: behind the first of a segment, where it is the second there."""
        log = self._log
        if log is None:
            return self._base
        message = record.SerializeToString()
        while True:
            if self.has_failed:
                # One is missing: what stands behind it would make no sense.
                raise StorageFailedError(f"job {self._job!r}: the server's journal could not be written")
            try:
                end = log.append(message, parts)
            except OSError as error:
                self._complain(error)
                self._pause(error)
            else:
                self._recovered()
                return end - length_of(message, parts)

    def await_durable(self) -> None:
        """Returns once all that has been written so far may be acknowledged. Blocks; without the job's lock.

        Raises:
            StorageFailedError: the server stops, and it is not.
        """
        log = self._log
        if log is None or not self._syncs:
            return
        position = log.position
        while True:
            try:
                with self.sync_seconds.timing():
                    log.sync(position)
                break
            except LogSyncError as error:
                self._complain(error)
            try:
                self._repair()
            except OSError as error:
                self._complain(error)
                self._pause(error)
        self._recovered()

    def flush(self) -> None:
        """Brings what has been written so far to the disk. Blocks; without the job's lock. May raise OSError."""
        log = self._log
        if log is not None:
            log.sync(log.position)

    @property
    def is_sound(self) -> bool:
        """Whether a sync may be believed: no one has failed."""
        return self._log is None or self._log.is_sound

    def sync_behind(self, position: int) -> None:
        """Brings what `write_again` has written from a position on to the disk. Blocks. May raise OSError."""
        if self._log is not None:
            self._log.sync_behind(position)

    def begin_anew(self, position: int) -> None:
        """A snapshot has all that was written before a position, and what stands behind that is synced."""
        if self._log is not None:
            self._log.begin_anew(position)

    def begin_snapshot(self) -> None:
        """A snapshot is about to be taken. Where nothing is written, it is at a position of its own.

        Records that are written later belong to the last of such snapshots, and must not be taken for what follows on
        one before it.
        """
        if self._log is None:
            self._base += ALIGNMENT

    def drop_before(self, position: int) -> None:
        """Nobody needs records before a position any more. May raise OSError."""
        if self._log is not None:
            self._log.drop_before(position)

    def give_up(self) -> None:
        """The job is about to be deleted: what waits for a disk waits no more. May be called without the job's lock."""
        self._given_up.set()

    def close(self, *, orderly: bool = False) -> None:
        """Writes nothing from now on. May be called more than once.

        Args:
            orderly: Whether to say that the server stops, so that whoever reads it knows that nothing is missing.
        """
        log = self._log
        if log is None:
            return
        try:
            if orderly and not self.has_failed:
                # First: so that the last record says of all others that they were on the disk.
                log.sync(log.position)
                log.append(journal_pb2.JournalRecord(journal_closed=journal_pb2.JournalClosed()).SerializeToString())
                log.sync(log.position)
        except OSError as error:
            _log.warning("job %s: the end of its journal could not be written: %s", self._job, error)
        finally:
            self._log = None
            log.close()

    def _complain(self, error: OSError) -> None:
        reason = error.strerror or str(error)
        if self.trouble != reason:
            self.trouble = reason
            _log.error(
                "job %s: its journal cannot be written: %s. Nothing is acknowledged until it can, and nothing is lost",
                self._job,
                reason,
            )

    def _pause(self, error: OSError) -> None:
        if self._given_up.wait(_RETRY_S) or self._stopping.is_set():
            self.has_failed = True
            raise StorageFailedError(
                f"job {self._job!r}: the server's journal cannot be written: {error.strerror or error}"
            ) from error

    def _recovered(self) -> None:
        if self.trouble:
            self.trouble = ""
            _log.warning("job %s: its journal can be written again", self._job)
