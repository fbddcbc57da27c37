"""Memory that a worker and a server on one host share.

A worker makes a file in /dev/shm that nobody but its user may open, with random bytes in it, and tells the server its
name and these bytes. A server that finds them there is on the same host, whatever the address says, and runs as the
same user: whoever may write to such a file may also cut it short, which kills a process that has it mapped. Then the
worker takes the memory, both map it, and the file loses its name: what ends, however it ends, leaves nothing behind.

What lies in the file: the random bytes; two numbers, for how far the reader of each ring is done; and the rings, of
what goes to the server (`up`) and of what comes from it (`down`).
"""

from __future__ import annotations

import errno
import fcntl
import hmac
import mmap
import os
import re
import secrets
import stat
from pathlib import Path
from typing import Final, Self

from optimd.wire.rings import RingReader, RingWriter

FOLDER: Final = Path("/dev/shm")  # noqa: S108  # what POSIX calls shared memory, on Linux
RING_BYTES: Final = 12 * 1024 * 1024
"""The size of a ring: four of the largest buckets. What goes through it stays in the processor's cache."""
MAX_RING_BYTES: Final = 64 * 1024 * 1024
"""The largest ring that a server maps."""

_PREFIX: Final = "optimd-"
_NAME: Final = re.compile(re.escape(_PREFIX) + r"[0-9a-f]{32}")
_TOKEN_BYTES: Final = 32
HEADER_BYTES: Final = 4096
"""What lies before the rings, or the values."""
# Each in a cache line of its own: one process writes it, the other reads it.
_UP_DONE: Final = 128
_DOWN_DONE: Final = 256


class NotSharedError(Exception):
    """Memory cannot be shared. Its text says why."""


class Mapping:
    """A mapped file: two rings. It goes when nothing refers to it or to what was read of it.

    Args:
        descriptor: The file, reserved; not kept.
        up_bytes: The size of the ring to the server.
        down_bytes: That of the ring from it.
    """

    def __init__(self, descriptor: int, up_bytes: int, down_bytes: int) -> None:
        view = memoryview(mmap.mmap(descriptor, HEADER_BYTES + up_bytes + down_bytes))
        self._up = view[HEADER_BYTES : HEADER_BYTES + up_bytes]
        self._down = view[HEADER_BYTES + up_bytes :]
        self._up_done = view[_UP_DONE : _UP_DONE + 8].cast("Q")
        self._down_done = view[_DOWN_DONE : _DOWN_DONE + 8].cast("Q")

    def worker_side(self) -> tuple[RingWriter, RingReader]:
        """Where a worker writes, and where it reads."""
        return RingWriter(self._up, self._up_done), RingReader(self._down, self._down_done)

    def server_side(self) -> tuple[RingWriter, RingReader]:
        """Where a server writes, and where it reads."""
        return RingWriter(self._down, self._down_done), RingReader(self._up, self._up_done)


class Segment:
    """A worker's file. Close it when the server has answered: a mapping stays good.

    Made with `create`.
    """

    def __init__(self, path: Path, descriptor: int, token: bytes) -> None:
        self._path = path
        self._descriptor = descriptor
        self.name = path.name
        self.token = token

    @classmethod
    def create(cls) -> Self:
        """A new file, without rings. Removes what others have left behind that are dead.

        Raises:
            OSError: there can be none.
        """
        return cls(*new_file())

    def reserve(self, ring_bytes: int = RING_BYTES) -> Mapping:
        """Takes the memory of both rings, all of it now: there is none to be missing later.

        Raises:
            OSError: there is not as much.
        """
        os.posix_fallocate(self._descriptor, 0, HEADER_BYTES + 2 * ring_bytes)
        return Mapping(self._descriptor, ring_bytes, ring_bytes)

    def close(self) -> None:
        """Removes the file. May be called more than once."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            remove_file(self._path, descriptor)


def new_file() -> tuple[Path, int, bytes]:
    """A new file with random bytes in it, as long as a header, locked.

    Removes what others have left behind that are dead.

    Returns:
        Where it is, an open descriptor that holds the lock, and the bytes.

    Raises:
        OSError: there can be none.
    """
    sweep()
    while True:
        path = FOLDER / f"{_PREFIX}{secrets.token_hex(16)}"
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        token = secrets.token_bytes(_TOKEN_BYTES)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            os.posix_fallocate(descriptor, 0, HEADER_BYTES)
            os.pwrite(descriptor, token, 0)
            if os.fstat(descriptor).st_nlink:
                return path, descriptor, token
        except BaseException:
            remove_file(path, descriptor)
            raise
        # Somebody who sweeps has come between the first two lines.
        remove_file(path, descriptor)


def remove_file(path: Path, descriptor: int) -> None:
    """Takes a file of `new_file` its name, and closes it."""
    path.unlink(missing_ok=True)
    os.close(descriptor)


def check_shared(name: str, token: bytes) -> None:
    """Whether a worker's file is there, on this host and of this user.

    Raises:
        NotSharedError: it is not.
    """
    os.close(find_file(name, token))


def attach(name: str, token: bytes, up_bytes: int, down_bytes: int) -> Mapping:
    """Maps a worker's file.

    Raises:
        NotSharedError: it is not there, not this user's, or not as large.
    """
    descriptor = find_file(name, token)
    try:
        if not all(0 < size <= MAX_RING_BYTES and size % mmap.PAGESIZE == 0 for size in (up_bytes, down_bytes)):
            raise NotSharedError(f"rings of {up_bytes} and {down_bytes} bytes are none to share")
        status = os.fstat(descriptor)
        if status.st_size < HEADER_BYTES + up_bytes + down_bytes or status.st_blocks * 512 < status.st_size:
            raise NotSharedError("the memory has not been taken")
        return Mapping(descriptor, up_bytes, down_bytes)
    except (OSError, ValueError) as error:
        raise NotSharedError(f"the memory cannot be mapped: {error}") from error
    finally:
        os.close(descriptor)


def sweep() -> None:
    """Removes the files of this user whose makers are dead. Whoever lives holds a lock on its own."""
    try:
        entries = list(os.scandir(FOLDER))
    except OSError:
        return
    for entry in entries:
        if _NAME.fullmatch(entry.name) is None:
            continue
        try:
            descriptor = os.open(entry.path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:
            # Another user's, or gone already.
            continue
        try:
            if os.fstat(descriptor).st_uid == os.geteuid():
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                Path(entry.path).unlink(missing_ok=True)
        except OSError:
            # Its maker lives.
            continue
        finally:
            os.close(descriptor)


def is_full(error: OSError) -> bool:
    """Whether an error of `Segment` says that there is too little shared memory."""
    return error.errno in (errno.ENOSPC, errno.ENOMEM, errno.EFBIG)


def find_file(name: str, token: bytes) -> int:
    """A descriptor of a file of `new_file` of another process on this host.

    Raises:
        NotSharedError: it is not there, or not of this user.
    """
    if _NAME.fullmatch(name) is None or len(token) != _TOKEN_BYTES:
        raise NotSharedError("that is not the name of shared memory")
    try:
        descriptor = os.open(FOLDER / name, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        raise NotSharedError(
            "worker and server are on different hosts, or in containers that share no memory"
        ) from None
    except PermissionError:
        raise NotSharedError("worker and server run as different users") from None
    except OSError as error:
        raise NotSharedError(f"the worker's shared memory cannot be opened: {error.strerror}") from None
    reason = _mismatch(descriptor, token)
    if reason:
        os.close(descriptor)
        raise NotSharedError(reason)
    return descriptor


def _mismatch(descriptor: int, token: bytes) -> str:
    """Why an open file is not the worker's; empty where it is."""
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
            return "worker and server run as different users"
        found = os.pread(descriptor, _TOKEN_BYTES, 0)
    except OSError as error:
        return f"the worker's shared memory cannot be read: {error.strerror}"
    return "" if hmac.compare_digest(found, token) else "worker and server are on different hosts"
