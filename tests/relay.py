"""A line between a worker and a server that a test can cut, or hold up as a stopped process or a dead switch would."""

from __future__ import annotations

import contextlib
import socket
import threading
from typing import Self


class Relay:
    """Passes bytes on between whoever connects to `address` and a server, on loopback.

    Args:
        server: The server's address, "host:port".
    """

    def __init__(self, server: str) -> None:
        self._server: tuple[str, int] | None = _place(server)  # guarded by self._lock
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._lock = threading.Lock()
        self._pairs: list[tuple[socket.socket, socket.socket]] = []  # guarded by self._lock
        self._up = threading.Event()
        self._down = threading.Event()
        self._up.set()
        self._down.set()
        self.cuts = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()
        self.pass_on()
        self.cut()

    def hold(self, *, up: bool = True, down: bool = True) -> None:
        """Passes nothing on, to the server (`up`) or from it (`down`), until `pass_on`. Nobody is told."""
        if up:
            self._up.clear()
        if down:
            self._down.clear()

    def pass_on(self) -> None:
        """Passes on again, what was held first."""
        self._up.set()
        self._down.set()

    def cut(self) -> None:
        """Breaks all connections, as a restarted switch does; new ones are taken. What was held is lost."""
        with self._lock:
            pairs, self._pairs = self._pairs, []
        for pair in pairs:
            self.cuts += 1
            for end in pair:
                # Both sides hear of it at once.
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)
                end.close()

    def lead_to(self, server: str | None) -> None:
        """Breaks all connections, and takes new ones to another server only; or to none, as if it were dead."""
        with self._lock:
            self._server = None if server is None else _place(server)
        self.cut()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            # Under the lock: none that is on its way to a server outlives `lead_to`.
            with self._lock:
                far = self._connected_locked()
                if far is not None:
                    self._pairs.append((near, far))
            if far is None:
                near.close()
                continue
            for source, sink, gate in ((near, far, self._up), (far, near, self._down)):
                threading.Thread(target=self._pump, args=(source, sink, gate), daemon=True).start()

    def _connected_locked(self) -> socket.socket | None:
        try:
            return None if self._server is None else socket.create_connection(self._server)
        except OSError:
            return None

    @staticmethod
    def _pump(source: socket.socket, sink: socket.socket, gate: threading.Event) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                gate.wait()
                sink.sendall(data)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


def _place(server: str) -> tuple[str, int]:
    host, _, port = server.rpartition(":")
    return host, int(port)
