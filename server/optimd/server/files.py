"""The system's files, as far as a data dir uses them: the seam at which tests have them fail."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

_MOST_PARTS: Final = 512
"""How many parts the system takes in one call, with room to spare."""

Part = bytes | memoryview
"""What is written: bytes, or a contiguous view of them."""


class Files:
    """Opens, writes, syncs and names files. Thread-safe, as the system is. All methods may raise OSError."""

    def open(self, path: Path) -> int:
        """Opens a file for reading and writing; makes it if there is none. Gives its descriptor."""
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def close(self, descriptor: int) -> None:
        """Closes a file."""
        os.close(descriptor)

    def write(self, descriptor: int, parts: Sequence[Part], offset: int) -> None:
        """Writes all parts, one behind the other, from `offset` on. Where it fails, any of it may be there or not."""
        left = [memoryview(part).cast("B") for part in parts if len(part)]
        while left:
            written = self.write_some(descriptor, left[:_MOST_PARTS], offset)
            if written <= 0:
                raise OSError("nothing was written")
            offset += written
            while left and written >= left[0].nbytes:
                written -= left.pop(0).nbytes
            if written:
                left[0] = left[0][written:]

    def write_some(self, descriptor: int, parts: Sequence[memoryview], offset: int) -> int:
        """Writes what the system takes of the parts. Gives how many bytes that were."""
        return os.pwritev(descriptor, parts, offset)

    def read(self, descriptor: int, length: int, offset: int) -> bytes:
        """Reads `length` bytes from `offset` on; fewer where the file ends before."""
        pieces = []
        while length:
            piece = os.pread(descriptor, length, offset)
            if not piece:
                break
            pieces.append(piece)
            length -= len(piece)
            offset += len(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def size(self, descriptor: int) -> int:
        """The length of a file, in bytes."""
        return os.fstat(descriptor).st_size

    def truncate(self, descriptor: int, length: int) -> None:
        """Cuts a file off, or lengthens it with zeros."""
        os.ftruncate(descriptor, length)

    def sync(self, descriptor: int) -> None:
        """Returns once what was written to a file is on the disk. After a failure nobody knows what is."""
        os.fdatasync(descriptor)

    def sync_folder(self, folder: Path) -> None:
        """Returns once the names in a folder are on the disk."""
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def names(self, folder: Path) -> list[str]:
        """The names in a folder, in order; none where it is not there."""
        try:
            return sorted(path.name for path in folder.iterdir())
        except FileNotFoundError:
            return []

    def make_folder(self, folder: Path) -> None:
        """Makes a folder and those above it, unless they are there."""
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    def rename(self, path: Path, target: Path) -> None:
        """Gives a file or folder another name, in place of what may have that."""
        path.rename(target)

    def remove(self, path: Path) -> None:
        """Removes a file, or a folder with all that is in it. One that is not there is no error."""
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


class ReadOnlyFiles(Files):
    """The system's files, of which none is changed: whatever would change one raises OSError.

    Args:
        on_read: Called with the number of bytes that were read, each time.
    """

    def __init__(self, on_read: Callable[[int], object] = lambda _: None) -> None:
        self._on_read = on_read

    def open(self, path: Path) -> int:
        """Opens a file for reading. Gives its descriptor, with which it cannot be written to."""
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def read(self, descriptor: int, length: int, offset: int) -> bytes:
        """As `Files.read`."""
        data = super().read(descriptor, length, offset)
        self._on_read(len(data))
        return data

    def make_folder(self, folder: Path) -> None:
        """Raises OSError."""
        raise _read_only(folder)

    def rename(self, path: Path, target: Path) -> None:  # noqa: ARG002  # a method of Files
        """Raises OSError."""
        raise _read_only(path)

    def remove(self, path: Path) -> None:
        """Raises OSError."""
        raise _read_only(path)


def _read_only(path: Path) -> OSError:
    return OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
