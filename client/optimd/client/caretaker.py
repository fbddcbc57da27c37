"""What has to be done for open jobs while nobody calls: saying that their worker is alive, and seeing dropped ones off.

One thread for the process, which lives while there are open jobs. It never blocks on a server: what it sends, gRPC
sends for it.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import queue
import sys
import threading
import time
from dataclasses import dataclass
from enum import Enum, auto
from typing import Final, Protocol

from optimd.client import forks

_log = logging.getLogger("optimd.client")

_FAREWELL_S: Final = 5.0
"""How long a server may take to see a worker off, in seconds."""

_AT_EXIT_S: Final = 2.0
"""How long the end of the process waits for that, in seconds."""

_LOOKING_S: Final = 0.02


class Charge(Protocol):
    """An open job, as far as it has to be taken care of. No method may block."""

    @property
    def heartbeat_s(self) -> float:
        """How often to say that the worker is alive, in seconds."""

    def beat(self) -> None:
        """Says that the worker is alive."""

    def say_goodbye(self, *, failed: bool = False) -> None:
        """Tells the server that the worker leaves; where its place is to be kept if it `failed`, only if it has not."""

    def has_left(self) -> bool:
        """Whether the server has answered that."""

    def drop(self) -> None:
        """Closes the line."""


class _Word(Enum):
    ADD = auto()
    FORGET = auto()
    SEE_OFF = auto()
    EXIT = auto()


@dataclass(slots=True)
class _Care:
    due_s: float
    leaving_until_s: float | None = None


class Caretaker:
    """Takes care of this process's open jobs. Thread-safe; `see_off` may be called by a finalizer too."""

    def __init__(self) -> None:
        self._start_anew()
        forks.watch(self)
        atexit.register(self._finish)

    def _start_anew(self) -> None:
        # Reentrant: a finalizer may run while it is held. It only puts words into the mailbox, which needs no lock.
        self._lock = threading.RLock()
        self._thread: threading.Thread | None = None  # guarded by self._lock
        self._mailbox: queue.SimpleQueue[tuple[_Word, Charge | None]] = queue.SimpleQueue()
        # Belongs to the thread.
        self._charges: dict[Charge, _Care] = {}

    def forked(self) -> object:
        """In a child: knows of nothing that the parent takes care of."""
        kept = (self._mailbox, self._charges, self._thread)
        self._start_anew()
        return kept

    def add(self, charge: Charge) -> None:
        """Says from now on that a worker is alive."""
        with self._lock:
            self._mailbox.put((_Word.ADD, charge))
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._run, name="optimd-caretaker", daemon=True)
                self._thread.start()

    def forget(self, charge: Charge) -> None:
        """The worker has left by itself."""
        self._mailbox.put((_Word.FORGET, charge))

    def see_off(self, charge: Charge) -> None:
        """The job's optimizer is gone: has its worker leave. Does not wait for that."""
        self._mailbox.put((_Word.SEE_OFF, charge))

    def _run(self) -> None:
        while True:
            try:
                with contextlib.suppress(queue.Empty):
                    self._hear(*self._mailbox.get(timeout=self._pause()))
                for charge, care in list(self._charges.items()):
                    self._look_after(charge, care)
                    # It must not be kept alive while this thread sleeps.
                    del charge
            except Exception:  # noqa: BLE001  # whatever it was, the others' workers are alive
                _log.exception("an open job could not be taken care of")
            with self._lock:
                if self._mailbox.empty() and not self._charges:
                    self._thread = None
                    return

    def _look_after(self, charge: Charge, care: _Care) -> None:
        now = time.monotonic()
        if care.leaving_until_s is None:
            if now >= care.due_s:
                care.due_s = now + charge.heartbeat_s
                charge.beat()
        elif charge.has_left() or now >= care.leaving_until_s:
            del self._charges[charge]
            charge.drop()

    def _pause(self) -> float:
        now = time.monotonic()
        if any(care.leaving_until_s is not None for care in self._charges.values()):
            return _LOOKING_S
        return max(0.0, min((care.due_s - now for care in self._charges.values()), default=0.0))

    def _hear(self, word: _Word, charge: Charge | None) -> None:
        if charge is None:
            # The process ends. What it ends with has been printed by now.
            failed = hasattr(sys, "last_value")
            for other in self._charges:
                self._see_off(other, failed=failed)
            return
        match word:
            case _Word.ADD:
                self._charges[charge] = _Care(time.monotonic() + charge.heartbeat_s)
            case _Word.FORGET:
                self._charges.pop(charge, None)
            case _Word.SEE_OFF if charge in self._charges:
                self._see_off(charge)
            case _:
                charge.drop()

    def _see_off(self, charge: Charge, *, failed: bool = False) -> None:
        care = self._charges[charge]
        if care.leaving_until_s is None:
            care.leaving_until_s = time.monotonic() + _FAREWELL_S
            charge.say_goodbye(failed=failed)

    def _finish(self) -> None:
        """At the end of the process: all workers leave in good order, if that is quick."""
        thread = self._thread
        if thread is not None and thread.is_alive():
            self._mailbox.put((_Word.EXIT, None))
            thread.join(_AT_EXIT_S)


caretaker: Final = Caretaker()
