"""When to try again after a line has broken, and until when: a state machine without I/O, clock or chance."""

from __future__ import annotations

from typing import Final

_FIRST_PAUSE_S: Final = 0.1
_LONGEST_PAUSE_S: Final = 5.0


class Retry:
    """Takes all breaks since the server has last answered for one. Not thread-safe.

    Times are in seconds, as a clock tells them that never goes back.

    Args:
        timeout_s: How long to try, from the first break on.
    """

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._until_s: float | None = None
        self._pause_s = _FIRST_PAUSE_S

    @property
    def is_under_way(self) -> bool:
        """Whether the server has answered nothing since a break."""
        return self._until_s is not None

    def next_pause(self, now: float) -> float | None:
        """The line has broken, or a try has failed. How long to pause before the next try; None where time is over.

        The first try is made at once. A line that breaks again and again, however well each try goes, is no answer.
        """
        if self._until_s is None:
            self._until_s = now + self._timeout_s
            return 0.0
        if now >= self._until_s:
            return None
        pause = min(self._pause_s, self._until_s - now)
        self._pause_s = min(2 * self._pause_s, _LONGEST_PAUSE_S)
        return pause

    def left(self, now: float) -> float:
        """How long is still to be tried; not positive where time is over."""
        return self._timeout_s if self._until_s is None else self._until_s - now

    def limit(self, until_s: float) -> None:
        """Tries until then."""
        self._until_s = until_s

    def answered(self) -> None:
        """The server has answered what was asked: the next break has all of the time."""
        self._until_s, self._pause_s = None, _FIRST_PAUSE_S
