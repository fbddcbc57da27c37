"""Payloads in memory that two processes share: one writes them, the other reads them, and a message says where.

A ring is written in order. Positions count the bytes that have been written since it was made, those that were left out
at its end included; `position % size` is where they lie. The reader says how far it is done, by a number that lies in
the shared memory too, and what it is done with is written over. So nothing is read that is being written: the writer
keeps away from what the reader is not done with, and the reader looks only at what a message has told it of, which is
written before the message is sent.

The number is written and read as one aligned word. Between that and the payload's bytes lies, on both sides, a `fence`.
Between a payload and the message that tells of it lie the system's own, on its way through a socket.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable
from typing import Final

from optimd.wire.encodings import Part, write_parts

ALIGNMENT: Final = 64
"""Payloads begin at multiples of this: a cache line."""

SMALLEST_BYTES: Final = 32 * 1024
"""What is smaller is better off in its message."""

ANNOUNCED_BYTES: Final = 6 * 1024 * 1024
"""How much is written before the reader has to hear of it: a message costs a tenth of the update of that."""

PATIENCE_S: Final = 0.05
"""How long the writer waits for room, in seconds. Then what it has goes another way."""

_PAUSE_S: Final = 0.0002


def fence() -> None:
    """Loads and stores of this thread are not moved from one side of this to the other, whatever the processor.

    A lock that is taken and given back says so to processors that would: x86 moves nothing here that matters, ARM may.
    One of its own, which no fork finds taken.
    """
    with threading.Lock():  # noqa: PLW2101  # what it orders is memory
        pass


class RingWriter:
    """Writes payloads. Belongs to one thread at a time.

    Args:
        memory: The ring's bytes.
        done: One unsigned 64-bit number: how far the reader is done.
    """

    def __init__(self, memory: memoryview, done: memoryview) -> None:
        self._memory = memory
        self._done = done
        self._size = memory.nbytes
        self._written = 0
        # The reader is done with everything before this, whatever it has said yet.
        self._begun_at = 0
        # How far the reader was when it was last waited for in vain.
        self._stuck_at = -1
        self.unannounced = 0
        """How many bytes have been written since the reader was last told."""

    def place(self, parts: Iterable[Part], nbytes: int) -> int | None:
        """Writes a payload, where there is room for it or soon is. May wait, for `PATIENCE_S` at most.

        Args:
            parts: Its parts.
            nbytes: How many they are.

        Returns:
            Its position; None where it has to go another way.
        """
        if not SMALLEST_BYTES <= nbytes <= self._size // 2:
            return None
        if self._done[0] == self._written:
            # From the start again: what is small goes through the same memory each time, and takes no more of it.
            self._begun_at = self._written = -(-self._written // self._size) * self._size
        position = -(-self._written // ALIGNMENT) * ALIGNMENT
        offset = position % self._size
        if offset + nbytes > self._size:
            position, offset = position + self._size - offset, 0
        if not self._await_room(position + nbytes):
            return None
        fence()
        write_parts(parts, self._memory[offset : offset + nbytes])
        self._written = position + nbytes
        self.unannounced += nbytes
        return position

    def announced(self) -> None:
        """The reader is told of all that has been written."""
        self.unannounced = 0

    @property
    def is_due(self) -> bool:
        """Whether the reader should hear of what has been written."""
        return self.unannounced >= ANNOUNCED_BYTES

    def _await_room(self, end: int) -> bool:
        if end - max(self._done[0], self._begun_at) <= self._size:
            return True
        if self._done[0] == self._stuck_at:
            # It has been waited for, and has not moved since.
            return False
        deadline_s = time.monotonic() + PATIENCE_S
        while end - max(self._done[0], self._begun_at) > self._size:
            if time.monotonic() > deadline_s:
                self._stuck_at = self._done[0]
                return False
            time.sleep(_PAUSE_S)
        return True


class RingReader:
    """Reads payloads, in the order in which they were written. Belongs to one thread at a time.

    Args:
        memory: As the writer's.
        done: As the writer's.
    """

    def __init__(self, memory: memoryview, done: memoryview) -> None:
        self._memory = memory
        self._done = done
        self._read = 0

    def read(self, position: int, nbytes: int) -> memoryview:
        """The bytes of a payload that a message told of: good until `release`.

        Raises:
            ValueError: they are not in the ring, lie before what was read last, or where no writer can be yet.
        """
        size = self._memory.nbytes
        offset = position % size
        # A writer keeps within the ring from where the reader is, or from the ring's next start.
        furthest = self._read + 2 * size
        if position < self._read or offset + nbytes > size or position + nbytes > furthest:
            raise ValueError(f"there is no payload of {nbytes} bytes at {position}")
        self._read = position + nbytes
        return self._memory[offset : offset + nbytes]

    def release(self) -> None:
        """What has been read is not needed any more."""
        if self._done[0] != self._read:
            fence()
            self._done[0] = self._read
