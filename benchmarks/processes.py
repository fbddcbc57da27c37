"""Child processes: servers that are stopped however a benchmark ends, and what a process takes of the memory.

A process's peak is the kernel's figure, `VmHWM` of /proc/PID/status: the highest resident set so far.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
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


@contextlib.contextmanager
def optimd_server(
    address: str, *flags: str, namespace: str | None = None, device: str = "cpu"
) -> Iterator[ServerProcess]:
    """An optimizer daemon with one torch thread.

    Args:
        address: Where it listens.
        flags: More flags.
        namespace: The network namespace that it runs in; None for the one that this process is in.
        device: The torch device that it keeps tensors on.

    Raises:
        ServerStartError: it did not start.
    """
    options = [f"--device={device}", "--threads=1", "--no-health", "--log-level=warning"]
    within = [] if namespace is None else ["ip", "netns", "exec", namespace]
    program = [*within, sys.executable, "-m", "optimd.server", f"--address={address}", *options, *flags]
    with _serving(program, (address,)) as server:
        yield server


def run_program(*arguments: str, timeout_s: float) -> str:
    """Runs this interpreter with `arguments` to its end. Blocks.

    Returns:
        What it wrote to stdout.

    Raises:
        subprocess.SubprocessError: it failed or took too long; what it said is on stderr.
    """
    return finish(start_program(*arguments), timeout_s=timeout_s)


def start_program(*arguments: str) -> subprocess.Popen[str]:
    """Starts this interpreter with `arguments`. Does not wait."""
    return subprocess.Popen(
        [sys.executable, *arguments], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, cwd=ROOT
    )


def finish(process: subprocess.Popen[str], *, timeout_s: float) -> str:
    """Waits for a started program.

    Returns:
        What it wrote to stdout.

    Raises:
        subprocess.SubprocessError: it failed or took too long, and is dead now.
    """
    try:
        output, _ = process.communicate(timeout=timeout_s)
    finally:
        process.kill()
        process.wait()
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, process.args)
    return output


def peak_bytes(pid: int | str) -> int:
    """The highest resident set of a process since its start, or since `reset_peak`.

    Args:
        pid: Its id, or "self".

    Raises:
        RuntimeError: the system does not say.
    """
    return parse_peak(Path(f"/proc/{pid}/status").read_text())


def parse_peak(status: str) -> int:
    """The highest resident set in the text of a /proc/PID/status, in bytes.

    Raises:
        RuntimeError: it is not there.
    """
    found = re.search(r"^VmHWM:\s+(\d+) kB$", status, re.MULTILINE)
    if found is None:
        raise RuntimeError("the system does not say what a process took at its peak (no VmHWM in /proc/PID/status)")
    return int(found[1]) * 1024


def reset_peak(pid: int | str) -> None:
    """Has the peak count from now on, where the system permits it; else it goes on counting from the start."""
    with contextlib.suppress(OSError):
        Path(f"/proc/{pid}/clear_refs").write_text("5")


def cpu_seconds(pid: int) -> float:
    """What a process has taken of the processors so far, all of its threads together, in seconds."""
    # Behind the name, in brackets, which may contain anything.
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def _serving(arguments: Sequence[str], addresses: tuple[str, ...]) -> Iterator[ServerProcess]:
    ready, ready_of_child = os.pipe()
    try:
        process = subprocess.Popen(
            [*arguments, f"--ready-fd={ready_of_child}"],
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
            raise ServerStartError(f"`{' '.join(arguments)}` did not start within {_START_TIMEOUT_S:g} s")
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
