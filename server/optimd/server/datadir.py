"""A server's data dir: its version, its lock, and a folder for each job."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from fcntl import LOCK_EX, LOCK_NB, LOCK_SH, flock
from pathlib import Path
from typing import Final

from optimd.server.errors import DataDirError
from optimd.server.files import Files, ReadOnlyFiles

FORMAT_VERSION: Final = 1
"""The version of all that is in a data dir. Another one is refused."""

_FORMAT: Final = "FORMAT"
_NEW_FORMAT: Final = "FORMAT.new"
_LOCK: Final = "LOCK"
_JOBS: Final = "jobs"
_GONE: Final = ".gone-"
"""What the name of a removed job's folder begins with. No job's does: see `DataDir.job_folder`."""
_READABLE: Final = 60


class DataDir:
    """A folder that one server at a time keeps its jobs in.

    Args:
        path: The folder. Made if there is none.
        files: The system's files.

    Raises:
        DataDirError: another server has it, it is of another version, or it cannot be used.
    """

    def __init__(self, path: Path, files: Files | None = None) -> None:
        self.path = path
        self.files = files or Files()
        try:
            missing = [folder for folder in (path, *path.parents) if not folder.exists()]
            self.files.make_folder(path)
            for folder in missing:
                self.files.sync_folder(folder.parent)
            self._refuse_foreign()
            self._lock: int | None = self._take_lock()
            try:
                self._check_version()
                self.files.make_folder(path / _JOBS)
                self.files.sync_folder(path)
                for name in self.files.names(path / _JOBS):
                    # Deleted by a server that was killed before all of it was gone.
                    if name.startswith(_GONE):
                        self.files.remove(path / _JOBS / name)
            except BaseException:
                self.close()
                raise
        except OSError as error:
            raise DataDirError(f"the data dir {path} cannot be used: {error.strerror or error}") from error

    @classmethod
    def to_read(cls, path: Path, files: ReadOnlyFiles) -> DataDir:
        """A data dir of which nothing is changed: nothing is made in it, and nothing removed.

        No server can take it until it is closed; others may read it meanwhile.

        Raises:
            DataDirError: a server is using it, it is of another version, or there is none that can be read.
        """
        self = cls.__new__(cls)
        self.path, self.files, self._lock = path, files, None
        try:
            if _FORMAT not in files.names(path):
                raise DataDirError(f"{path} is no data dir of an optimd server: it has no file named {_FORMAT}")
            self._lock = self._share_lock()
            try:
                self._check_format()
            except BaseException:
                self.close()
                raise
        except OSError as error:
            raise DataDirError(f"the data dir {path} cannot be read: {error.strerror or error}") from error
        return self

    def job_folders(self) -> Iterator[Path]:
        """The folders of the jobs that are kept, in order."""
        for name in self.files.names(self.path / _JOBS):
            if not name.startswith(_GONE) and (self.path / _JOBS / name).is_dir():
                yield self.path / _JOBS / name

    def job_folder(self, job: str) -> Path:
        """Where a job of this name is kept. Jobs have any printable names; folders do not."""
        readable = re.sub(r"[^A-Za-z0-9._-]+", "-", job)[:_READABLE].strip(".-") or "job"
        return self.path / _JOBS / f"{readable}-{hashlib.sha256(job.encode()).hexdigest()[:16]}"

    def remove_job(self, folder: Path) -> None:
        """Removes a job. Where that is interrupted, what is left of it is none."""
        if folder.exists():
            gone = folder.with_name(_GONE + folder.name)
            self.files.remove(gone)
            self.files.rename(folder, gone)
            self.files.sync_folder(folder.parent)
            self.files.remove(gone)

    def close(self) -> None:
        """Lets another server have it."""
        if self._lock is not None:
            os.close(self._lock)

    def _take_lock(self) -> int:
        descriptor = os.open(self.path / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            flock(descriptor, LOCK_EX | LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise DataDirError(
                f"another server is using the data dir {self.path}; stop it, or choose another with --data-dir"
            ) from None
        return descriptor

    def _share_lock(self) -> int | None:
        if _LOCK not in self.files.names(self.path):
            # A copy of the rest: a server makes that file before it does anything else.
            return None
        descriptor = os.open(self.path / _LOCK, os.O_RDONLY | os.O_CLOEXEC)
        try:
            flock(descriptor, LOCK_SH | LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise DataDirError(f"a server is using the data dir {self.path}: stop it first, or use a copy") from None
        return descriptor

    def _refuse_foreign(self) -> None:
        names = self.files.names(self.path)
        if _FORMAT not in names and any(name not in (_LOCK, _NEW_FORMAT, "lost+found") for name in names):
            raise DataDirError(
                f"{self.path} holds other things than an optimd data dir; choose an empty folder with --data-dir"
            )

    def _check_version(self) -> None:
        path = self.path / _FORMAT
        if not path.exists():
            descriptor = self.files.open(self.path / _NEW_FORMAT)
            try:
                self.files.write(descriptor, [f"optimd data dir, version {FORMAT_VERSION}\n".encode()], 0)
                self.files.sync(descriptor)
            finally:
                self.files.close(descriptor)
            self.files.rename(self.path / _NEW_FORMAT, path)
            self.files.sync_folder(self.path)
            return
        self._check_format()

    def _check_format(self) -> None:
        text = (self.path / _FORMAT).read_text(encoding="utf-8", errors="replace").strip()
        if text != f"optimd data dir, version {FORMAT_VERSION}":
            raise DataDirError(
                f"the data dir {self.path} says {text!r}; this server reads version {FORMAT_VERSION}: start the optimd "
                "that wrote it, or choose another with --data-dir"
            )
