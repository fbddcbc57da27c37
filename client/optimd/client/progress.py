"""Progress of large transfers: what a user sees while a model goes up or down the line."""

from __future__ import annotations

import logging
import sys
import time
from typing import Final

_log = logging.getLogger("optimd.client")

_SHOWN_FROM_BYTES: Final = 64 * 1024 * 1024
_INTERVAL_S: Final = 0.5
_LOG_INTERVAL_S: Final = 10.0


class Progress:
    """Counts bytes and shows them: a line on a terminal, else a log record (INFO) every ten seconds.

    Transfers under 64 MiB show nothing.

    Args:
        what: What is done: "uploading parameters".
        total: Bytes in all.
    """

    def __init__(self, what: str, total: int) -> None:
        self._what = what
        self._total = total
        self._done = 0
        self._terminal = sys.stderr is not None and sys.stderr.isatty()
        self._next_s = time.monotonic() + (_INTERVAL_S if self._terminal else _LOG_INTERVAL_S)
        self._shown = False

    def advance(self, nbytes: int) -> None:
        """Counts `nbytes` more."""
        self._done += nbytes
        if self._total < _SHOWN_FROM_BYTES:
            return
        now = time.monotonic()
        if self._terminal and (now >= self._next_s or (self._shown and self._done >= self._total)):
            self._next_s = now + _INTERVAL_S
            self._shown = True
            end = "\n" if self._done >= self._total else ""
            sys.stderr.write(f"\roptimd: {self._line()}{end}")
            sys.stderr.flush()
        elif not self._terminal and now >= self._next_s:
            self._next_s = now + _LOG_INTERVAL_S
            _log.info("%s", self._line())

    def _line(self) -> str:
        return (
            f"{self._what}: {self._done / 1e6:,.0f} of {self._total / 1e6:,.0f} MB "
            f"({100 * self._done // self._total} %)"
        )
