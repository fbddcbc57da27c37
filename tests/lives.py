"""A server that dies and is there again, in this process: for workers on one address, and with no process to start."""

from __future__ import annotations

import shutil
import threading
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

from tests.faultfiles import FailingFiles, VolatileFiles
from tests.relay import Relay
from tests.support import running_server


class Lives:
    """A server with a data dir behind a relay.

    What a dead one leaves behind is a copy of its data dir as of the moment at which all of its lines broke; the one
    that goes on in the test's process is heard of by nobody.

    Args:
        folder: Where the data dirs are, one for each life.
        volatile: Whether the power goes as well: nothing is left of what was not synced.
        settings: Of the servers. Those of a life may be others.
    """

    def __init__(self, folder: Path, *, volatile: bool = False, **settings: Any) -> None:
        self._folder = folder
        self._is_volatile = volatile
        self._settings = {"drain_timeout_s": 0.2, **settings}
        self._stack = ExitStack()
        self.deaths = 0

    def __enter__(self) -> Self:
        self.data_dir.mkdir()
        self._start()
        self.relay = self._stack.enter_context(Relay(self.server.address))
        self.address = self.relay.address
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    @property
    def data_dir(self) -> Path:
        """Of the present life."""
        return self._folder / f"life-{self.deaths}"

    def die(self) -> None:
        """All lines break. What is on the disk at this moment is what `resume` begins with."""
        with self.files.still():
            self.relay.lead_to(None)
            before = self.data_dir
            self.deaths += 1
            if isinstance(self.files, VolatileFiles):
                self.files.crash(self.data_dir)
            else:
                shutil.copytree(before, self.data_dir)

    def resume(self, **settings: Any) -> None:
        """The next server is there. Waits until it has brought back its jobs."""
        self._start(**settings)
        self.relay.lead_to(self.server.address)

    def die_and_resume(self, **settings: Any) -> None:
        """Dies between two of a worker's calls."""
        self.die()
        self.resume(**settings)

    def die_behind(self, calls: int, *, operation: str = "write_some") -> Death:
        """Dies in the middle of what a worker asks for: behind so many calls that change the disk, counted from now."""
        return Death(self, calls, operation)

    def _start(self, **settings: Any) -> None:
        self.files = VolatileFiles(self.data_dir) if self._is_volatile else FailingFiles()
        self.server = self._stack.enter_context(
            running_server(files=self.files, data_dir=str(self.data_dir), **{**self._settings, **settings})
        )


class Death:
    """One that is due: happens in the server's thread, and a life of its own begins in another."""

    def __init__(self, lives: Lives, calls: int, operation: str) -> None:
        self._lives = lives
        self._left = calls
        self._operation = operation
        self._resumed = threading.Thread(target=lives.resume, daemon=True)
        self.happened = False
        lives.files.observe = self._observe

    def _observe(self, operation: str, _: Path) -> None:
        if operation != self._operation or self.happened:
            return
        self._left -= 1
        if not self._left:
            self.happened = True
            self._lives.die()
            self._resumed.start()

    def join(self) -> None:
        """Waits until the next life has begun. Nothing has happened where there were fewer calls."""
        self._lives.files.observe = lambda *_: None
        if self.happened:
            self._resumed.join(60)
            assert not self._resumed.is_alive()
