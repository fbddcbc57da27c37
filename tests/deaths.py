"""A training job whose server is killed over and over, at moments that a seed chooses."""

from __future__ import annotations

import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Deaths:
    """What the log of the servers says of the moments at which their predecessors died."""

    kills: int = 0
    in_open_step: int = 0
    in_snapshot: int = 0
    recoveries: int = 0
    log: list[str] = field(default_factory=list)

    def see(self, line: str) -> None:
        self.log.append(line)
        self.recoveries += "recovered at step" in line
        self.in_open_step += bool(re.search(r"a step is open still|had not been committed", line))
        self.in_snapshot += "a snapshot was being written" in line


class MortalServer:
    """A server with a data dir, on one address for all of its lives.

    Args:
        data_dir: Where it keeps its jobs.
        flags: More flags.
    """

    def __init__(self, data_dir: Path, *flags: str) -> None:
        self.address = f"127.0.0.1:{free_port()}"
        self.data_dir = data_dir
        self.deaths = Deaths()
        self._flags = flags
        self._process: subprocess.Popen[str] | None = None
        self._reader: threading.Thread | None = None
        self._ready = threading.Event()

    def start(self) -> None:
        self._ready.clear()
        self._process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "optimd.server",
                f"--address={self.address}",
                f"--data-dir={self.data_dir}",
                "--no-health",
                "--threads=1",
                *self._flags,
            ],
            stderr=subprocess.PIPE,
            text=True,
        )
        self._reader = threading.Thread(target=self._read, args=(self._process,), daemon=True)
        self._reader.start()
        assert self._ready.wait(60), "\n".join(self.deaths.log[-20:])

    def _read(self, process: subprocess.Popen[str]) -> None:
        assert process.stderr is not None
        for line in process.stderr:
            self.deaths.see(line)
            if "serving on" in line:
                self._ready.set()
        process.stderr.close()

    def kill(self, number: signal.Signals = signal.SIGKILL) -> None:
        process, reader = self._process, self._reader
        assert process is not None
        assert reader is not None
        assert process.poll() is None, "\n".join(self.deaths.log[-20:])
        process.send_signal(number)
        process.wait(60)
        reader.join(10)
        self._process = None
        self.deaths.kills += number is signal.SIGKILL

    def await_writing(self, timeout_s: float) -> None:
        """Returns as soon as something is being written to a journal, or after the time."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            # Files are used again: their length says nothing.
            newest = max(self.data_dir.glob("jobs/*/journal/*.journal"), key=lambda path: path.name)
            before = newest.stat().st_mtime_ns
            for _ in range(500):
                if newest.stat().st_mtime_ns != before:
                    return

    def await_snapshot(self, timeout_s: float) -> None:
        """Returns as soon as a snapshot is being written, or after the time."""
        deadline = time.monotonic() + timeout_s
        while not [*self.data_dir.glob("jobs/*/snapshots/making")] and time.monotonic() < deadline:
            pass

    @contextmanager
    def running(self) -> Iterator[MortalServer]:
        self.start()
        try:
            yield self
        finally:
            if self._process is not None and self._process.poll() is None:
                self._process.kill()
                self._process.wait(10)
            if self._reader is not None:
                self._reader.join(10)


def haunt(server: MortalServer, progress: Callable[[], int], *, steps: int, kills: int, seed: int) -> None:
    """Kills a server and starts it again, so often while `steps` steps are made, at moments that a seed chooses.

    Some moments are when something is being written to a journal, some when a snapshot is.

    Args:
        server: The server, running.
        progress: How many steps have been made.
        steps: How many will be.
        kills: How often to kill it.
        seed: Where the moments come from.
    """
    dice = random.Random(seed)
    for number in range(kills):
        # Spread over the steps, but for the first, before which there is no job to bring back, and the last ones.
        due = max(1, int(0.9 * steps * (number + dice.random()) / kills))
        deadline = time.monotonic() + 60
        while progress() < due:
            assert time.monotonic() < deadline, f"no step within a minute; {server.deaths.log[-20:]}"
            time.sleep(0.001)
        time.sleep(dice.uniform(0, 0.01))
        if number % 4 == 2:
            server.await_snapshot(2)
        elif number % 8:
            server.await_writing(2)
            time.sleep(dice.choice((0, 0, 0.001, 0.003)))
        server.kill()
        server.start()
