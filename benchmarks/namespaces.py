"""Two network namespaces with a slow line between them, which go away however the benchmark ends.

They are removed by a child process once a pipe to it ends: that happens when the benchmark is done, and when it is
killed.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from itertools import count
from typing import Final

from benchmarks.venues import Side

PREFIX: Final = "optimd-bench-"
"""What the namespaces' names begin with; the benchmark's process id follows."""
RATE_BITS_PER_S: Final = 1_000_000_000
"""What the line carries each way, Ethernet's headers included."""

_INTERFACE: Final = "bench0"
_HOSTS: Final = ("10.213.77.1", "10.213.77.2")
_REMOVE_TIMEOUT_S: Final = 20.0
_numbers = count()


class LinkUnavailableError(RuntimeError):
    """There is no such line to be had here. Says why."""


@contextlib.contextmanager
def slow_link() -> Iterator[tuple[Side, Side]]:
    """A line of 1 Gbit/s each way. Needs root.

    Returns:
        Its two ends.

    Raises:
        LinkUnavailableError: this process may not make one, or has not the programs for it.
    """
    if missing := [name for name in ("ip", "tc", "sh") if shutil.which(name) is None]:
        raise LinkUnavailableError(f"there is no `{missing[0]}` (package iproute2)")
    if os.geteuid():
        raise LinkUnavailableError("network namespaces need root")
    number = next(_numbers)
    names = [f"{PREFIX}{os.getpid()}-{number}{end}" for end in ("a", "b")]
    sides = [Side(_INTERFACE, host, name) for name, host in zip(names, _HOSTS, strict=True)]
    with _removing(names):
        for name in names:
            _ip("netns", "add", name)
            _ip("-n", name, "link", "set", "lo", "up")
        one, other = names
        peer = ("peer", "name", _INTERFACE, "netns", other)
        _ip("link", "add", _INTERFACE, "netns", one, "type", "veth", *peer)
        for side in sides:
            assert side.namespace is not None
            _ip("-n", side.namespace, "address", "add", f"{side.host}/24", "dev", _INTERFACE)
            _ip("-n", side.namespace, "link", "set", _INTERFACE, "up")
            shaper = ("tbf", "rate", f"{RATE_BITS_PER_S}bit", "burst", "256kb", "latency", "50ms")
            _run("tc", "-n", side.namespace, "qdisc", "add", "dev", _INTERFACE, "root", *shaper)
        yield sides[0], sides[1]


@contextlib.contextmanager
def _removing(names: list[str]) -> Iterator[None]:
    script = "cat > /dev/null; " + "; ".join(f"ip netns delete {name}" for name in names)
    keeper = subprocess.Popen(
        ["sh", "-c", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        # Where making them has failed there is less to remove.
        stderr=subprocess.DEVNULL,
        # Ctrl-C is for the benchmark.
        start_new_session=True,
    )
    try:
        yield
    finally:
        keeper.communicate(timeout=_REMOVE_TIMEOUT_S)


def _ip(*arguments: str) -> None:
    _run("ip", *arguments)


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise LinkUnavailableError(f"`{' '.join(command)}` said: {done.stderr.strip()}")
