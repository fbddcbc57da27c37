"""What a server counts and times about its jobs, for whoever asks: nothing here knows who that is."""

from __future__ import annotations

import threading
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Final

from optimd.server.receipts import Outcome, Receipt

STEP_SECONDS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
"""From a model of some tensors on one host to one of gigabytes across a slow line, or a step that waits for others."""

BUCKET_SECONDS: Final = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0)
"""From a few small tensors to buckets of 3 MiB whose gradients are written down first."""

SYNC_SECONDS: Final = (0.0001, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0)
"""From an SSD's cache to a disk that is in trouble."""

STALENESS_STEPS: Final = (0, 1, 2, 3, 4, 6, 8, 12, 16, 32, 64, 128)


class Histogram:
    """How often values were how large. Thread-safe.

    Args:
        bounds: The upper ends of its classes, rising; the last class has none.
    """

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        self._lock = threading.Lock()
        self._counts = [0] * (len(bounds) + 1)  # guarded by self._lock
        self._sum = 0.0  # guarded by self._lock

    def observe(self, value: float) -> None:
        """Counts a value."""
        place = bisect_left(self.bounds, value)
        with self._lock:
            self._counts[place] += 1
            self._sum += value

    @contextmanager
    def timing(self) -> Iterator[None]:
        """Counts how long the block takes, in seconds, however it ends."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.observe(time.perf_counter() - began)

    def counts(self) -> tuple[list[int], float]:
        """How many values are in each class, and what all of them add up to."""
        with self._lock:
            return list(self._counts), self._sum


class Waits:
    """How long a worker has waited, one wait after another. They begin and end with its job's lock held."""

    def __init__(self) -> None:
        # The sum of those that are over, and when the present one began: replaced at once, for who has not the lock.
        self._state: tuple[float, float | None] = (0.0, None)

    @property
    def total_s(self) -> float:
        """So far, in seconds, the present wait included. May be read without the lock."""
        over_s, began = self._state
        return over_s if began is None else over_s + time.perf_counter() - began

    @contextmanager
    def one(self) -> Iterator[None]:
        """It waits for as long as the block takes."""
        self._state = (self._state[0], time.perf_counter())
        try:
            yield
        finally:
            self._state = (self.total_s, None)


class JobMeasures:
    """What is counted of one job since it is here. Thread-safe, where nothing else is said."""

    def __init__(self) -> None:
        self.step_seconds = Histogram(STEP_SECONDS)
        """From StepBegin to the receipt, by push: what others were waited for included."""
        self.bucket_seconds = Histogram(BUCKET_SECONDS)
        """What a bucket of gradients took, once it was here: added up or applied, and written down."""
        self.staleness_steps = Histogram(STALENESS_STEPS)
        """How stale pushes were that are in a step."""
        # All below: changed with the job's lock held, but for the bytes.
        self.steps = 0
        """How many were committed."""
        self.outcomes: Counter[Outcome] = Counter(dict.fromkeys(Outcome, 0))
        """What became of pushes."""
        self.resumed = 0
        """How many pushes went on where a line had broken."""
        self.lost = 0
        """How many workers' leases have ended."""
        self.deduplicated = 0
        """How many came that had been answered on a line that broke: they changed nothing."""
        self._began_s = time.monotonic()
        self._bytes_lock = threading.Lock()
        self._received = self._sent = 0  # guarded by self._bytes_lock

    def answered(self, receipt: Receipt) -> None:
        """A push has become what its receipt says. With the job's lock held."""
        self.outcomes[receipt.outcome] += 1
        if receipt.outcome in (Outcome.APPLIED, Outcome.MERGED):
            self.staleness_steps.observe(receipt.staleness)

    @property
    def age_s(self) -> float:
        """Since when it is here, in seconds."""
        return time.monotonic() - self._began_s

    def transferred(self, *, received: int, sent: int) -> None:
        """So many bytes have come and gone, in shared memory too."""
        with self._bytes_lock:
            self._received += received
            self._sent += sent

    @property
    def bytes_transferred(self) -> tuple[int, int]:
        """How many bytes have come, and gone."""
        with self._bytes_lock:
            return self._received, self._sent
