"""How long a call may take to say what it wants."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

from optimd.server.errors import LimitExceededError

_LOOKING_S: Final = 0.5
"""How often calls are looked at, in seconds."""


class Patience:
    """Ends calls that hold a thread and say nothing. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._calls: dict[int, tuple[float, Callable[[], object]]] = {}  # guarded by self._lock
        self._silent: Counter[str] = Counter()  # by connection; guarded by self._lock
        self._next_call = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, name="optimd-patience", daemon=True)

    def start(self) -> None:
        """Begins to look."""
        self._thread.start()

    def stop(self) -> None:
        """Looks no more."""
        self._over.set()
        if self._thread.is_alive():
            self._thread.join()

    def hold(self, seconds: float, end: Callable[[], object]) -> Callable[[], None]:
        """Has `end` called after so many seconds, unless what is returned is called before. Neither blocks."""
        with self._lock:
            number, self._next_call = self._next_call, self._next_call + 1
            self._calls[number] = (time.monotonic() + seconds, end)

        def release() -> None:
            with self._lock:
                self._calls.pop(number, None)

        return release

    @contextmanager
    def silent(self, connection: str, seconds: float, end: Callable[[], object], *, most: int) -> Iterator[None]:
        """A call has a thread, and has not said what it wants yet: that is what the block waits for.

        Args:
            connection: Whose call it is, as `grpc.ServicerContext.peer` says.
            seconds: How long it may take.
            end: Ends it. Must not block.
            most: How many calls of the connection may be in such a block.

        Raises:
            LimitExceededError: there are too many of that connection.
        """
        with self._lock:
            if self._silent[connection] >= most:
                raise LimitExceededError(f"{most} calls of this connection have not said yet what they want")
            self._silent[connection] += 1
        release = self.hold(seconds, end)
        try:
            yield
        finally:
            release()
            with self._lock:
                self._silent[connection] -= 1
                if not self._silent[connection]:
                    del self._silent[connection]

    def _look(self) -> None:
        while not self._over.wait(_LOOKING_S):
            now = time.monotonic()
            with self._lock:
                late = [number for number, (until, _) in self._calls.items() if until <= now]
                ends = [self._calls.pop(number)[1] for number in late]
            for end in ends:
                end()
