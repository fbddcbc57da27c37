"""Readers that hold a job's values still, and the changes that wait for them."""

from __future__ import annotations

import threading
import time
from typing import Final

from optimd.server.errors import StepTimeoutError

READER_TIMEOUT_S: Final = 60.0
"""How long a reader that takes nothing may hold up a change, in seconds."""

READING_LIMIT_S: Final = 600.0
"""How long readers may hold up a change in all, however fast they read, in seconds."""


class ReadHold:
    """A reader's claim that nothing is applied while it reads."""

    def __init__(self) -> None:
        self.touched_s = time.monotonic()
        self.revoked = False

    def touch(self) -> None:
        """Says that the reader is alive.

        Raises:
            StepTimeoutError: a change has waited too long for this reader and has been let through.
        """
        if self.revoked:
            raise StepTimeoutError("a step waited too long for this read and has been let through; read again")
        self.touched_s = time.monotonic()


class Readers:
    """The readers of one job. All methods are called with the job's lock, that of `changed`, held.

    Args:
        changed: The job's condition.
    """

    def __init__(self, changed: threading.Condition) -> None:
        self._changed = changed
        self._holds: set[ReadHold] = set()
        self._waiting = 0
        self.queued = 0
        """How many wait for pushes that are under way."""
        self.entered = 0
        """How many have started so far."""

    @property
    def may_enter(self) -> bool:
        """Whether a new reader may start: not while a change waits, or readers could keep it waiting for ever."""
        return not self._waiting

    @property
    def may_push(self) -> bool:
        """Whether pushes of an asynchronous job may begin: there is always another one, and readers wait for none."""
        return not self._holds and not self.queued

    def enter(self, hold: ReadHold) -> None:
        """A reader starts."""
        self._holds.add(hold)
        self.entered += 1

    def leave(self, hold: ReadHold) -> None:
        """A reader is done, or does not wait any more. May be called more than once."""
        hold.revoked = True
        self._holds.discard(hold)
        self._changed.notify_all()

    def wait(self) -> None:
        """Lets readers finish before something changes. Gives up the lock: call it before looking at anything."""
        if not self._holds:
            return
        self._waiting += 1
        deadline = time.monotonic() + READING_LIMIT_S
        try:
            while self._holds:
                oldest = min(self._holds, key=lambda hold: hold.touched_s)
                left = min(oldest.touched_s + READER_TIMEOUT_S, deadline) - time.monotonic()
                if left <= 0:
                    oldest.revoked = True
                    self._holds.discard(oldest)
                else:
                    self._changed.wait(left)
        finally:
            self._waiting -= 1
            self._changed.notify_all()
