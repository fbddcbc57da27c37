"""Runs a server until it is told to stop."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable
from types import FrameType

from optimd.server.allocator import ask_for_huge_pages, keep_messages_memory
from optimd.server.app import Server
from optimd.server.config import ServerConfig

_log = logging.getLogger(__name__)


def run(config: ServerConfig, *, on_ready: Callable[[Server], None], lifeline: int | None = None) -> None:
    """Serves until SIGTERM, SIGINT or the end of the lifeline. Blocks; only in the main thread.

    A second signal stops at once, without waiting for open steps. SIGHUP has the tokens read again.

    Args:
        config: The server's settings.
        on_ready: Called once the server takes calls.
        lifeline: A pipe's reading end, or None. When nobody holds its writing end any more, the server stops.

    Raises:
        ConfigurationError: the server cannot start.
    """
    keep_messages_memory()
    ask_for_huge_pages()
    # A pipe rather than an Event: a handler that sets an Event which its own thread is about to wait for waits for
    # itself, and a signal that the system gives to another thread would not wake this one.
    wake, waker = os.pipe()
    os.set_blocking(waker, False)  # as set_wakeup_fd demands
    received: list[int] = []

    def on_signal(number: int, _frame: FrameType | None) -> None:
        if received:
            os._exit(128 + number)
        received.append(number)

    server = Server(config)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, on_signal)
    # What is to be done is done below: the number of every signal that has a handler comes through the pipe.
    signal.signal(signal.SIGHUP, lambda _number, _frame: None)
    signal.set_wakeup_fd(waker)
    if lifeline is not None:
        threading.Thread(target=_watch, args=(lifeline, waker), name="optimd-lifeline", daemon=True).start()
    address = server.start()
    _log.info("serving on %s, device %s", address, server.device)
    on_ready(server)
    while os.read(wake, 1)[0] == signal.SIGHUP:
        server.reload()
    _log.info("stopping")
    server.stop()


def _watch(lifeline: int, waker: int) -> None:
    # Nothing is ever written: a read returns when the last writer is gone.
    while os.read(lifeline, 1):
        pass
    os.write(waker, b"\0")
