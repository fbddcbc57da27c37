"""Where a comparison takes place: on one host, or across a line between two."""

from __future__ import annotations

import contextlib
import socket
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Final, Literal

Transport = Literal["unix", "tcp"]


@dataclass(frozen=True, slots=True)
class Side:
    """Where processes of one kind run."""

    interface: str
    """The network interface that they talk over."""
    host: str
    """Its address."""
    namespace: str | None = None
    """The network namespace that they are in; None for the one that everything is in."""


LOOPBACK: Final = Side("lo", "127.0.0.1")


class Venue:
    """Two sides, which may be the same, and new addresses to listen at on the servers' side.

    Args:
        folder: Where Unix sockets are made.
        servers: Where servers run.
        workers: Where workers run.
        device: The torch device that models are on, and that daemons keep tensors on.
    """

    def __init__(self, folder: Path, servers: Side = LOOPBACK, workers: Side = LOOPBACK, device: str = "cpu") -> None:
        self.device = device
        self.servers = servers
        self.workers = workers
        self._folder = folder
        self._numbers = count()

    def address(self, transport: Transport) -> str:
        """An address that nobody listens at: `unix:///path`, or host:port with a port that was free a moment ago."""
        if transport == "unix":
            return f"unix://{self._folder / f'{next(self._numbers)}.sock'}"
        with socket.socket() as probe:
            # In a namespace of its own nothing else listens: what is free here is free there.
            probe.bind(("127.0.0.1", 0))
            return f"{self.servers.host}:{probe.getsockname()[1]}"


@contextlib.contextmanager
def one_host(device: str = "cpu") -> Iterator[Venue]:
    """Everything on this host, with tensors on one of its devices."""
    with tempfile.TemporaryDirectory(prefix="optimd-bench-") as folder:
        yield Venue(Path(folder), device=device)
