"""A journal's bytes: records in segment files, appended, made durable, dropped when nobody needs them any more.

Positions count the bytes of the whole journal, from 0, whichever files they are in. A segment file is named by the
position of its first record, and ends where the next one begins. Files of dropped segments are used again: writing to
blocks that a file has already is two to three times as fast.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Final

from optimd.server.files import Files, Part
from optimd.server.records import ALIGNMENT, FIXED_BYTES, MAGIC, Record, frame, length_of, read_record

SEGMENT_BYTES: Final = 64 * 1024 * 1024
"""How long a segment gets before the next one is begun."""

_SUFFIX: Final = ".journal"
_SPARE: Final = "spare-"
_MOST_SPARE: Final = 16
_MOST_UNSYNCED: Final = 32
_SEARCH_BYTES: Final = 1 << 20


class LogSyncError(OSError):
    """What was written may not be on the disk, now or ever: nothing of it may be acknowledged."""


class LogDamageError(Exception):
    """A record is not whole, and good ones stand behind it.

    Args:
        path: The file.
        position: Where in the journal.
        reason: What is wrong, for a person.
    """

    def __init__(self, path: Path, position: int, reason: str) -> None:
        super().__init__(f"{path}, position {position}: {reason}")
        self.path = path
        self.position = position


@dataclass(slots=True)
class _Segment:
    """A segment that is being written to, or has been and is not synced yet."""

    path: Path
    start: int
    descriptor: int


class Log:
    """Appends records. One thread at a time may append; any may sync, read and drop. All methods may raise OSError.

    What `append` could not write is not there: it may be tried again.

    Args:
        files: The system's files.
        folder: Where the segments are. It exists.
        position: Where the first record goes. What is in the folder ends there or before.
        first_message: Gives the message of a segment's first record, by its position.
        segment_bytes: How long a segment gets.
        durable: Whether somebody waits for syncs: then names too have to be on the disk before anything under them can
            be acknowledged.
    """

    def __init__(
        self,
        files: Files,
        folder: Path,
        *,
        position: int,
        first_message: Callable[[int], bytes],
        segment_bytes: int = SEGMENT_BYTES,
        durable: bool = True,
    ) -> None:
        self._files = files
        self._folder = folder
        self._first_message = first_message
        self._segment_bytes = segment_bytes
        self._durable = durable
        self._segment: _Segment | None = None  # written with self._lock held, by the thread that appends
        self._lock = threading.Lock()
        self.position = position
        """Where the next record goes. Written by the thread that appends."""
        self._unsynced: list[_Segment] = []  # guarded by self._lock
        self._synced = position  # guarded by self._lock
        self._failed: OSError | None = None  # guarded by self._lock
        self._syncing = threading.Lock()
        """Held by who syncs for all."""

    # --- writing

    def append(self, message: bytes, parts: Sequence[Part] = ()) -> int:
        """Writes a record behind the others. Does not sync.

        Returns:
            Where it ends: what `sync` takes.
        """
        length = length_of(message, parts)
        segment = self._segment
        if segment is None or self.position + length > segment.start + self._segment_bytes:
            segment = self._begin_segment()
        self._write(segment, message, parts)
        return self.position

    def _write(self, segment: _Segment, message: bytes, parts: Sequence[Part]) -> None:
        self._files.write(segment.descriptor, frame(self.position, message, parts), self.position - segment.start)
        self.position += length_of(message, parts)

    def _begin_segment(self) -> _Segment:
        path = self._folder / f"{self.position:020d}{_SUFFIX}"
        spare = next((name for name in self._files.names(self._folder) if name.startswith(_SPARE)), None)
        if spare is not None:
            self._files.rename(self._folder / spare, path)
        segment = _Segment(path, self.position, self._files.open(path))
        try:
            # Nothing in it may be acknowledged under a name that power loss could take away.
            if self._durable:
                self._files.sync_folder(self._folder)
            self._write(segment, self._first_message(self.position), ())
        except BaseException:
            self._files.close(segment.descriptor)
            raise
        with self._lock:
            self._segment = segment
            self._unsynced.append(segment)
        if not self._durable and len(self._unsynced) > _MOST_UNSYNCED and self._syncing.acquire(blocking=False):
            # Nobody waits for its sync.
            with self._lock:
                self._files.close(self._unsynced.pop(0).descriptor)
            self._syncing.release()
        return segment

    # --- durability

    def sync(self, position: int) -> None:
        """Returns once all records before a position are on the disk. Blocks; who comes meanwhile is served as well.

        Raises:
            LogSyncError: they may not be. From then on always, until `begin_anew`.
        """
        with self._lock:
            if self._synced >= position:
                return
        with self._syncing:
            with self._lock:
                if self._synced >= position:
                    return
                if self._failed is not None:
                    raise LogSyncError(str(self._failed)) from self._failed
                # In this order: what is appended meanwhile may be synced too, and is not counted.
                target, segments = self.position, list(self._unsynced)
                complete = [segment for segment in segments if segment is not self._segment]
            try:
                for segment in segments:
                    self._files.sync(segment.descriptor)
            except OSError as error:
                with self._lock:
                    self._failed = error
                raise LogSyncError(str(error)) from error
            with self._lock:
                self._synced = target
                for segment in complete:
                    self._unsynced.remove(segment)
                    self._files.close(segment.descriptor)

    @property
    def is_sound(self) -> bool:
        """Whether no sync has failed."""
        with self._lock:
            return self._failed is None

    def begin_anew(self) -> None:
        """All records so far are kept elsewhere: goes on in a new segment, of which a sync may be believed again.

        No thread may append meanwhile.
        """
        with self._syncing, self._lock:
            self._close_locked()
            self._failed = None
            self._synced = self.position

    # --- housekeeping

    def drop_before(self, position: int) -> None:
        """Takes away the segments of which nothing stands at or behind a position. Their files are used again."""
        starts = segment_starts(self._files, self._folder)
        spare = sum(name.startswith(_SPARE) for name in self._files.names(self._folder))
        with self._lock:
            held = {segment.start for segment in self._unsynced}
        current = self._segment.start if self._segment is not None else None
        for start, end in pairwise(starts):
            if end > position or start in held or start == current:
                break
            path = self._folder / f"{start:020d}{_SUFFIX}"
            if spare < _MOST_SPARE:
                self._files.rename(path, self._folder / f"{_SPARE}{start:020d}")
                spare += 1
            else:
                self._files.remove(path)

    def close(self) -> None:
        """Closes the files. Does not sync."""
        with self._syncing, self._lock:
            self._close_locked()

    def _close_locked(self) -> None:
        # The one that is written to is among them.
        for segment in self._unsynced:
            self._files.close(segment.descriptor)
        self._unsynced.clear()
        self._segment = None


def segment_starts(files: Files, folder: Path) -> list[int]:
    """Where the segments in a folder begin, in order."""
    names = (name.removesuffix(_SUFFIX) for name in files.names(folder) if name.endswith(_SUFFIX))
    return sorted(int(name) for name in names if name.isdecimal())


class LogReader:
    """Reads a journal's records, in order, from disk. Not thread-safe.

    Args:
        files: The system's files.
        folder: Where the segments are.
    """

    def __init__(self, files: Files, folder: Path) -> None:
        self._files = files
        self._folder = folder
        self.torn_at: int | None = None
        """Where a last record stands that is not whole, if there is one, once all were read."""

    def records(self, position: int) -> Iterator[Record]:
        """The records from a position on, which has to be one's.

        Raises:
            LogDamageError: one is not whole, and is not the last; or those at the position are not there.
        """
        starts = segment_starts(self._files, self._folder)
        wanted = [start for start in starts if start <= position]
        if not wanted:
            if starts:
                path = self._path(starts[0])
                raise LogDamageError(path, position, "the segments before this one are missing")
            return
        rest = [wanted[-1], *(start for start in starts if start > position)]
        for index, start in enumerate(rest):
            following = rest[index + 1] if index + 1 < len(rest) else None
            if index and start != position:
                # Only what comes behind tells that something is missing: see the check below.
                raise LogDamageError(self._path(start), position, "records are missing before this segment")
            position = yield from self._segment_records(start, position, following)

    def _segment_records(self, start: int, position: int, following: int | None) -> Generator[Record, None, int]:
        path = self._path(start)
        descriptor = self._files.open(path)
        try:

            def read(length: int, at: int) -> bytes:
                return self._files.read(descriptor, length, at - start)

            while position != following:
                record = read_record(read, position)
                if record is None:
                    self._check_end(path, read, position, following, self._files.size(descriptor) + start)
                    break
                yield record
                position = record.end
        finally:
            self._files.close(descriptor)
        return position

    def _check_end(
        self, path: Path, read: Callable[[int, int], bytes], position: int, following: int | None, end: int
    ) -> None:
        """No whole record stands at a position: that is all right only where nothing good stands behind it."""
        behind = following if following is not None and following > position else None
        if behind is None:
            behind = _next_record(read, position + ALIGNMENT, end)
        if behind is not None:
            raise LogDamageError(path, position, f"the record is damaged, and a good one stands at {behind}")
        if any(read(FIXED_BYTES, position)):
            self.torn_at = position

    def cut(self, position: int) -> None:
        """Takes away what stands at or behind a position: of a last record that is not whole, or of lost ones."""
        for start in segment_starts(self._files, self._folder):
            path = self._path(start)
            if start >= position:
                self._files.remove(path)
                continue
            descriptor = self._files.open(path)
            try:
                if self._files.size(descriptor) > position - start:
                    self._files.truncate(descriptor, position - start)
                    self._files.sync(descriptor)
            finally:
                self._files.close(descriptor)
        self._files.sync_folder(self._folder)

    def _path(self, start: int) -> Path:
        return self._folder / f"{start:020d}{_SUFFIX}"


def _next_record(read: Callable[[int, int], bytes], position: int, end: int) -> int | None:
    """The first position from `position` on at which a whole record stands; None where there is none."""
    while position < end:
        piece = read(_SEARCH_BYTES, position)
        at = piece.find(MAGIC)
        while at >= 0:
            if (position + at) % ALIGNMENT == 0 and read_record(read, position + at) is not None:
                return position + at
            at = piece.find(MAGIC, at + 1)
        if len(piece) < _SEARCH_BYTES:
            return None
        position += len(piece) - len(MAGIC) + 1
    return None
