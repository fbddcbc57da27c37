"""Servers as child processes: started, awaited until they take calls, and stopped however a benchmark ends."""

from __future__ import annotations

import os
import select
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_START_TIMEOUT_S: Final = 120.0
_STOP_TIMEOUT_S: Final = 15.0
ROOT: Final = Path(__file__).resolve().parents[1]
"""The folder that children are started in, so that they find this package."""


class ServerStartError(RuntimeError):
    """A server ended, or said nothing, before it took calls. What it said is on stderr."""


@dataclass(frozen=True, slots=True)
class ServerProcess:
    """A server that takes calls."""

    addresses: tuple[str, ...]
    pid: int


def unix_address(folder: Path, name: str) -> str:
    """The address of a Unix socket in `folder`."""
    return f"unix://{folder / name}"


def loopback_address() -> str:
    """A loopback address with a port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


@contextmanager
def optimd_server(address: str) -> Iterator[ServerProcess]:
    """An optimizer daemon with one torch thread, on the CPU.

    Raises:
        ServerStartError: it did not start.
    """
    options = ["--device=cpu", "--threads=1", "--no-health", "--log-level=warning"]
    with _serving(["-m", "optimd.server", f"--address={address}", *options], (address,)) as server:
        yield server


@contextmanager
def echo_server(*addresses: str) -> Iterator[ServerProcess]:
    """A server that sends every message back as it came.

    Raises:
        ServerStartError: it did not start.
    """
    with _serving(["-m", "benchmarks.echo", *addresses], addresses) as server:
        yield server


@contextmanager
def _serving(arguments: Sequence[str], addresses: tuple[str, ...]) -> Iterator[ServerProcess]:
    ready, ready_of_child = os.pipe()
    try:
        process = subprocess.Popen(
            [sys.executable, *arguments, f"--ready-fd={ready_of_child}"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            pass_fds=(ready_of_child,),
            cwd=ROOT,
            # Ctrl-C ends the benchmark, which then stops its servers.
            start_new_session=True,
        )
    finally:
        os.close(ready_of_child)
    try:
        readable, _, _ = select.select([ready], [], [], _START_TIMEOUT_S)
        if not readable or not os.read(ready, 64):
            raise ServerStartError(f"`python {' '.join(arguments)}` did not start within {_START_TIMEOUT_S:g} s")
        yield ServerProcess(addresses, process.pid)
    finally:
        os.close(ready)
        _stop(process)


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(_STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
