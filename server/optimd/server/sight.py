"""Which of a job's values a worker has seen: what is new to it, and how stale its gradients are."""

from __future__ import annotations

from collections.abc import Iterable


class Changes:
    """When each bucket's values changed last, by a clock that counts changes. Guarded by the job's lock."""

    def __init__(self) -> None:
        self.clock = 0
        """How many changes there have been."""
        self._last: dict[int, int] = {}

    def mark(self, bucket_id: int) -> None:
        """A bucket's values have changed."""
        self.clock += 1
        self._last[bucket_id] = self.clock

    def last(self, bucket_id: int) -> int:
        """When a bucket's values changed last; 0 where they never have."""
        return self._last.get(bucket_id, 0)

    def forget(self) -> None:
        """The buckets are others now."""
        self._last.clear()


class Sight:
    """What one worker has seen. Guarded by the job's lock.

    For each bucket: as of which change, and when, counted in steps that others had committed by then. What it is sent
    it has not seen yet: that may be lost with its line.
    """

    def __init__(self) -> None:
        self._change = -1
        self._steps = 0
        self._buckets: dict[int, tuple[int, int]] = {}
        # Of the buckets that it has been sent since it was last known to have all: what it had seen before.
        self._before: dict[int, tuple[int, int] | None] = {}

    def see(self, bucket_id: int, change: int, steps: int) -> None:
        """The worker is sent a bucket."""
        self._before.setdefault(bucket_id, self._buckets.get(bucket_id))
        self._buckets[bucket_id] = (change, steps)

    def see_all(self, change: int, steps: int) -> None:
        """The worker has been sent all that there is, and will be told of the step that it was."""
        self._change, self._steps = change, steps
        self._buckets.clear()
        self._before.clear()

    def confirm(self) -> None:
        """The worker has all that it has been sent: it has gone on."""
        self._before.clear()

    def lose(self) -> None:
        """The worker's line broke: what it has been sent since it last went on, it may not have."""
        for bucket_id, seen in self._before.items():
            if seen is None:
                del self._buckets[bucket_id]
            else:
                self._buckets[bucket_id] = seen
        self._before.clear()

    def unseen(self, changes: Changes, bucket_ids: Iterable[int]) -> list[int]:
        """Those of `bucket_ids` that have changed since the worker saw them."""
        return [
            bucket_id
            for bucket_id in bucket_ids
            if changes.last(bucket_id) > self._buckets.get(bucket_id, (self._change, 0))[0]
        ]

    def steps_since(self, bucket_id: int, steps: int) -> int:
        """How many steps others have committed since the worker saw a bucket; `steps` is their number now."""
        return steps - self._buckets.get(bucket_id, (0, self._steps))[1]
