"""The embedded server: one child process for all optimizers of this process, or of the torchrun group on this host.

Server and workers find each other in a folder that only this user can enter. It holds the server's socket and a named
pipe, the lifeline: every process that uses the server keeps the pipe open for writing, and the server stops when it
reads the pipe's end. That works however a process ends, and for a group as well as for one.
"""

from __future__ import annotations

import hashlib
import os
import select
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from fcntl import LOCK_EX, flock
from pathlib import Path
from typing import Final

from optimd.client import forks
from optimd.client.exceptions import EmbeddedServerError

_START_TIMEOUT_S: Final = 120.0
_ABANDONED_AFTER_S: Final = 600.0
# What `sockaddr_un` has room for, less the name of the socket.
_MAX_FOLDER_LENGTH: Final = 90
_SOCKET: Final = "server.sock"
_LIFELINE: Final = "lifeline"


class EmbeddedServer:
    """This process's claim on an embedded server: alive as long as the process is, or until `release`."""

    def __init__(self, folder: Path, lifeline: int) -> None:
        self.address = f"unix://{folder / _SOCKET}"
        self.folder = folder
        self._lifeline = lifeline
        forks.watch(self)

    def is_alive(self) -> bool:
        """Whether this process holds on to the server and the server answers."""
        return self._lifeline >= 0 and _answers(self.folder)

    def release(self) -> None:
        """Lets go of the server. It stops when nobody else holds on to it."""
        if self._lifeline >= 0:
            os.close(self._lifeline)
            self._lifeline = -1

    def forked(self) -> object:
        """In a child: does not keep the server alive for longer than the parent."""
        self.release()
        return None


_MAX_WORKERS: Final = 1024
"""How many optimizers may be open at once: some programs have one for each parameter."""

_lock = threading.Lock()
_servers: dict[str | None, EmbeddedServer] = {}  # guarded by _lock


def embedded_server(group: str | None) -> EmbeddedServer:
    """The embedded server of this process, started if need be. Blocks until it answers. Thread-safe.

    Args:
        group: What the processes that share it have in common; None for a server of this process alone.

    Raises:
        EmbeddedServerError: it did not start; the message has what it said.
    """
    with _lock:
        server = _servers.get(group)
        # A child process does not share its parent's server: the claim was released in the fork.
        if server is not None and server.is_alive():
            return server
        if server is not None:
            server.release()
        with _user_folder() as parent:
            _sweep(parent)
            if group is None:
                folder = Path(tempfile.mkdtemp(prefix="process-", dir=parent))
            else:
                folder = parent / ("group-" + hashlib.sha256(group.encode()).hexdigest()[:16])
                folder.mkdir(mode=0o700, exist_ok=True)
                lifeline = _join(folder) or _start(folder)
        if group is None:
            # Nobody else looks for it: others need not wait while it starts.
            lifeline = _start(folder)
        _servers[group] = EmbeddedServer(folder, lifeline)
        return _servers[group]


@contextmanager
def _user_folder() -> Iterator[Path]:
    """This user's folder for embedded servers, locked against the user's other processes."""
    base = Path(tempfile.gettempdir())
    if len(str(base)) > _MAX_FOLDER_LENGTH - 40:
        base = Path("/tmp")  # noqa: S108  # the folder below is created with mode 0700 and its owner is checked
    folder = base / f"optimd-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()
    if status.st_uid != os.getuid() or status.st_mode & 0o077 or folder.is_symlink():
        raise EmbeddedServerError(
            f"{folder} belongs to somebody else, or others may enter it; remove it, or set TMPDIR"
        )
    descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        flock(descriptor, LOCK_EX)
        yield folder
    finally:
        os.close(descriptor)


def _join(folder: Path) -> int | None:
    """Takes hold of the lifeline of a server that answers; None where there is none."""
    try:
        # Fails where nobody reads, that is, where the server is gone.
        lifeline = os.open(folder / _LIFELINE, os.O_WRONLY | os.O_NONBLOCK)
    except OSError:
        return None
    if _answers(folder):
        return lifeline
    os.close(lifeline)
    return None


def _start(folder: Path) -> int:
    """Starts a server and waits until it takes calls. Returns its lifeline."""
    lifeline_path = folder / _LIFELINE
    lifeline_path.unlink(missing_ok=True)
    os.mkfifo(lifeline_path, 0o600)
    # Opened both ways, so that it does not wait for the server, and the server finds a writer.
    lifeline = os.open(lifeline_path, os.O_RDWR)
    ready, ready_of_child = os.pipe()
    try:
        # Its stderr is this process's: whatever it has to say, the user sees.
        process = subprocess.Popen(  # noqa: S603  # this interpreter, this package
            [
                sys.executable,
                "-P",
                "-m",
                "optimd.server",
                f"--address=unix://{folder / _SOCKET}",
                "--no-health",
                f"--max-workers={_MAX_WORKERS}",
                "--log-level=warning",
                f"--lifeline={lifeline_path}",
                f"--ready-fd={ready_of_child}",
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            pass_fds=(ready_of_child,),
            # Ctrl-C is the worker's to handle; the server follows when the worker has ended.
            start_new_session=True,
        )
        os.close(ready_of_child)
        ready_of_child = -1
        try:
            if not _wait_for_line(ready, _START_TIMEOUT_S):
                raise EmbeddedServerError(  # noqa: TRY301  # ends the process below, as an interrupt does
                    "the embedded server did not start; what it said is on this process's stderr. Start one by hand "
                    "with `optimd serve` and pass server=..."
                )
            # From here on only as a writer: a reader of our own would hide that the server is gone.
            writer = os.open(lifeline_path, os.O_WRONLY | os.O_NONBLOCK)
        except BaseException:
            process.kill()
            process.wait()
            shutil.rmtree(folder, ignore_errors=True)
            raise
    finally:
        os.close(lifeline)
        os.close(ready)
        if ready_of_child >= 0:
            os.close(ready_of_child)
    _reap_in_background(process)
    return writer


def _wait_for_line(descriptor: int, timeout_s: float) -> bool:
    """Whether something can be read from `descriptor` before its writer is gone and within `timeout_s`."""
    readable, _, _ = select.select([descriptor], [], [], timeout_s)
    return bool(readable) and bool(os.read(descriptor, 64))


def _reap_in_background(process: subprocess.Popen[bytes]) -> None:
    """A server that ends before this process does must not stay behind as a zombie."""
    threading.Thread(target=process.wait, name="optimd-embedded-server", daemon=True).start()


def _answers(folder: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(folder / _SOCKET))
        except OSError:
            return False
    return True


def _sweep(parent: Path) -> None:
    """Removes folders whose server was killed before it could do so itself."""
    for folder in parent.glob("*-*"):
        # Servers remove their own folders meanwhile.
        with suppress(FileNotFoundError):
            if time.time() - folder.stat().st_mtime > _ABANDONED_AFTER_S and not _answers(folder):
                shutil.rmtree(folder, ignore_errors=True)
