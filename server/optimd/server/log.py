"""A journal's bytes: records in segment files, appended, made durable, dropped when nobody needs them any more.

Positions count the bytes of the whole journal, from 0, whichever files they are in. A segment file is named by the
position of its first record, and ends where the next one begins. Files of dropped segments are used again: writing to
blocks that a file has already is two to three times as fast.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
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
    """A record is not whole though it had been: one behind it tells that it was on the disk.

    Args:
        path: The file.
        position: Where in the journal.
        reason: What is wrong, for a person.
    """

    def __init__(self, path: Path, position: int, reason: str) -> None:
        super().__init__(f"{path}, position {position}: {reason}")
        self.path = path
        self.position = position
        self.reason = reason


@dataclass(slots=True, eq=False)
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
        position: Where the first record goes. What is in the folder ends there or before, and is on the disk.
        first_message: Gives the message of a segment's first record, by its position.
        segment_bytes: How long a segment gets.
        durable: Whether somebody waits for syncs: then names too have to be on the disk before anything under them can
            be acknowledged, and what was not synced may be missed after a power loss. Else nothing may.
        sync_ahead_bytes: After how many bytes a sync of them is begun in the background, so that who waits for one when
            all have come finds little left to do; 0: never.
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
        sync_ahead_bytes: int = 0,
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
        self._sync_ahead_bytes = sync_ahead_bytes
        # Its thread is started when there is something for it to do.
        self._background = ThreadPoolExecutor(1, thread_name_prefix="optimd-sync")
        # The last sync ahead, and where the journal ended when it was begun. Belong to the thread that appends.
        self._ahead: Future[None] | None = None
        self._ahead_of = position

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
        self.position = self._write(segment, message, parts)
        if self._sync_ahead_bytes and self.position - self._ahead_of >= self._sync_ahead_bytes:
            self._begin_sync_ahead()
        return self.position

    def _write(self, segment: _Segment, message: bytes, parts: Sequence[Part]) -> int:
        """Writes a record at the log's position. Gives where it ends."""
        with self._lock:
            synced = self._synced if self._durable else self.position
        framed = frame(self.position, message, parts, synced=synced)
        self._files.write(segment.descriptor, framed, self.position - segment.start)
        return self.position + length_of(message, parts)

    def _begin_segment(self) -> _Segment:
        with self._lock:
            # Where this fails, the one before it is not gone on with: there may be a file of the new one's name.
            self._segment = None
        path = segment_path(self._folder, self.position)
        names = self._files.names(self._folder)
        spare = next((name for name in names if name.startswith(_SPARE)), None)
        if spare is not None and path.name not in names:
            self._files.rename(self._folder / spare, path)
        segment = _Segment(path, self.position, self._files.open(path))
        try:
            # Nothing in it may be acknowledged under a name that power loss could take away.
            if self._durable:
                self._files.sync_folder(self._folder)
            end = self._write(segment, self._first_message(self.position), ())
        except BaseException:
            self._files.close(segment.descriptor)
            raise
        with self._lock:
            # In one moment: a sync that counted the record without knowing the file would take it to be on the disk.
            self._segment = segment
            self._unsynced.append(segment)
            self.position = end
        if not self._durable and len(self._unsynced) > _MOST_UNSYNCED and self._syncing.acquire(blocking=False):
            # Nobody waits for its sync.
            with self._lock:
                # A sync that has just ended may have left none but the one that is written to.
                if len(self._unsynced) > _MOST_UNSYNCED:
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
                    raise LogSyncError(*self._failed.args) from self._failed
                # In this order: what is appended meanwhile may be synced too, and is not counted.
                target, segments = self.position, list(self._unsynced)
                complete = [segment for segment in segments if segment is not self._segment]
            try:
                for segment in segments:
                    self._files.sync(segment.descriptor)
            except OSError as error:
                with self._lock:
                    self._failed = error
                raise LogSyncError(*error.args) from error
            with self._lock:
                self._synced = target
                for segment in complete:
                    self._unsynced.remove(segment)
                    self._files.close(segment.descriptor)

    def _begin_sync_ahead(self) -> None:
        """Begins a sync in the background, unless one is under way there: the next record tries again."""
        if self._ahead is None or self._ahead.done():
            self._ahead_of = self.position
            self._ahead = self._background.submit(self._sync_ahead, self.position)

    def _sync_ahead(self, position: int) -> None:
        # Who waits for a sync is told of what went wrong in this one.
        with suppress(LogSyncError):
            self.sync(position)

    @property
    def is_sound(self) -> bool:
        """Whether no sync has failed."""
        with self._lock:
            return self._failed is None

    def leave_segment(self) -> None:
        """What is appended from now on stands in a segment of its own. Called by the thread that appends."""
        with self._lock:
            self._segment = None

    def sync_behind(self, position: int) -> None:
        """Brings the segments that begin at or behind a position to the disk, whatever has become of others. Blocks."""
        with self._syncing:
            for segment in self._behind(position):
                self._files.sync(segment.descriptor)

    def begin_anew(self, position: int) -> None:
        """All records before a position are kept elsewhere, those behind it stand in segments that were synced.

        From here on a sync may be believed again. No thread may append meanwhile.
        """
        behind = self._behind(position)
        with self._syncing, self._lock:
            self._close_locked(but=behind)
            self._failed = None
            self._synced = self.position

    def _behind(self, position: int) -> list[_Segment]:
        with self._lock:
            return [segment for segment in self._unsynced if segment.start >= position]

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
            path = segment_path(self._folder, start)
            if spare < _MOST_SPARE:
                self._files.rename(path, self._folder / f"{_SPARE}{start:020d}")
                spare += 1
            else:
                self._files.remove(path)

    def close(self) -> None:
        """Closes the files. Does not sync."""
        self._background.shutdown(wait=False)
        with self._syncing, self._lock:
            self._close_locked()

    def _close_locked(self, *, but: Sequence[_Segment] = ()) -> None:
        # The one that is written to is among them.
        for segment in self._unsynced:
            if segment not in but:
                self._files.close(segment.descriptor)
        self._unsynced = list(but)
        if self._segment not in but:
            self._segment = None


def segment_path(folder: Path, start: int) -> Path:
    """The file of the segment that begins at a position."""
    return folder / f"{start:020d}{_SUFFIX}"


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
        """Where the first record stands that never was on the disk as a whole, if there is one, once all were read."""

    def records(self, position: int) -> Iterator[Record]:
        """The records from a position on, which has to be one's.

        Raises:
            LogDamageError: one is not whole that once was; or those at the position are not there.
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
            if index and start != position:
                # The one before it has records beyond where this one begins.
                raise LogDamageError(self._path(start), position, "this segment does not follow the one before it")
            position = yield from self._segment_records(start, position, rest[index + 1 :])
            if self.torn_at is not None:
                return

    def _segment_records(self, start: int, position: int, later: Sequence[int]) -> Generator[Record, None, int]:
        with self._reading(start) as (read, _):
            while not later or position != later[0]:
                record = read_record(read, position)
                if record is None:
                    is_begun = any(read(FIXED_BYTES, position))
                    break
                yield record
                position = record.end
            else:
                return position
        self._check_end(start, position, later, is_begun=is_begun)
        return position

    def _check_end(self, start: int, position: int, later: Sequence[int], *, is_begun: bool) -> None:
        """No whole record stands at a position: that is all right where none behind it tells that there was one."""
        for record in self._whole_ones(start, position + ALIGNMENT, later):
            is_begun = True
            if record.synced > position:
                raise LogDamageError(
                    self._path(start),
                    position,
                    f"the record is damaged; it was whole when that at {record.position} was written",
                )
        if is_begun or later:
            self.torn_at = position

    def _whole_ones(self, start: int, position: int, later: Sequence[int]) -> Iterator[Record]:
        """The whole records of a segment from a position on, and of those behind it, whatever stands between them."""
        for segment in (start, *later):
            with self._reading(segment) as (read, end):
                at = max(position, segment)
                while (record := _next_record(read, at, end)) is not None:
                    yield record
                    at = record.end

    @contextmanager
    def _reading(self, start: int) -> Iterator[tuple[Callable[[int, int], bytes], int]]:
        """What reads a segment by position, and where its file ends."""
        descriptor = self._files.open(self._path(start))
        try:
            yield (
                lambda length, at: self._files.read(descriptor, length, at - start),
                self._files.size(descriptor) + start,
            )
        finally:
            self._files.close(descriptor)

    def cut(self, position: int) -> None:
        """Takes away what stands at or behind a position: what is not whole, or lost."""
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

    def sync(self) -> None:
        """Brings it all to the disk: whoever wrote it may have died before that. Blocks."""
        for start in segment_starts(self._files, self._folder):
            descriptor = self._files.open(self._path(start))
            try:
                self._files.sync(descriptor)
            finally:
                self._files.close(descriptor)
        self._files.sync_folder(self._folder)

    def _path(self, start: int) -> Path:
        return segment_path(self._folder, start)


def _next_record(read: Callable[[int, int], bytes], position: int, end: int) -> Record | None:
    """The first whole record from `position` on; None where there is none."""
    while position < end:
        piece = read(_SEARCH_BYTES, position)
        at = piece.find(MAGIC)
        while at >= 0:
            record = read_record(read, position + at) if (position + at) % ALIGNMENT == 0 else None
            if record is not None:
                return record
            at = piece.find(MAGIC, at + 1)
        if len(piece) < _SEARCH_BYTES:
            return None
        position += len(piece) - len(MAGIC) + 1
    return None
