"""Asynchronous steps, and how far ahead of the slowest worker the others may get: a pure state machine.

With a bound it is stale synchronous parallel: Ho et al., "More Effective Distributed ML via a Stale Synchronous
Parallel Parameter Server", 2013.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from optimd.server.aggregation import Abandon, ApplyBucket, Commit, Decision, Release, Skip, Worker


@dataclass(slots=True)
class _Push:
    """A push that is under way."""

    pushed: set[int] = field(default_factory=set)
    applied: set[int] = field(default_factory=set)


class AsyncAggregator:
    """Asynchronous steps: each push is a step of its own, committed when it is complete.

    A worker's clock counts its complete pushes; one that joins starts with that of the slowest. Its lag is how far its
    clock is ahead of the slowest live worker's. With `max_staleness`, a worker whose lag is larger than that waits
    for the slower ones before it is given parameters.

    A worker for which others have waited for `timeout_s` is not waited for any more until it begins its next push, with
    the clock that the slowest of the others has then.

    Args:
        max_staleness: The largest lag with which a worker is given parameters; None for any.
        streaming: Whether a bucket is applied as it comes, or all of them with the push's end.
        timeout_s: How long a worker waits for slower ones, in seconds.
        step: The number of steps committed so far.
    """

    def __init__(
        self, *, max_staleness: int | None, streaming: bool, timeout_s: float = math.inf, step: int = 0
    ) -> None:
        self.max_staleness = max_staleness
        self.streaming = streaming
        self.step = step
        self._timeout_s = timeout_s
        self._clocks: dict[Worker, int] = {}
        # Live, and not waited for.
        self._left_behind: set[Worker] = set()
        self._open: dict[Worker, _Push] = {}
        # Who waits for slower ones, since when; None where no time has passed yet.
        self._waiting: dict[Worker, float | None] = {}
        # The slowest clock so far: it never goes back, though all that were waited for may leave.
        self._floor = 0

    # --- what it is

    @property
    def live(self) -> frozenset[Worker]:
        """The workers that are in the job."""
        return frozenset(self._clocks)

    @property
    def is_open(self) -> bool:
        """Whether a push is under way."""
        return bool(self._open)

    @property
    def has_applied(self) -> bool:
        """Whether a bucket of a push that is under way has been applied."""
        return any(push.applied for push in self._open.values())

    @property
    def is_formed(self) -> bool:
        """Whether pushes may begin: whoever is there may."""
        return bool(self._clocks)

    @property
    def absent(self) -> frozenset[Worker]:
        """None: no place is kept."""
        return frozenset()

    def has_begun(self, worker: Worker) -> bool:
        """Whether a worker's push is under way."""
        return worker in self._open

    def has_ended(self, _worker: Worker) -> bool:
        """Never: a complete push is committed."""
        return False

    def is_awaited_absent(self, _worker: Worker) -> bool:
        """Never: no place is kept."""
        return False

    def holds(self, worker: Worker, bucket_id: int) -> bool:
        """Whether a bucket of the worker's push is there already."""
        push = self._open.get(worker)
        return push is not None and bucket_id in push.pushed

    def has_pushed(self, worker: Worker) -> bool:
        """Whether a bucket of the worker's push is there already."""
        push = self._open.get(worker)
        return push is not None and bool(push.pushed)

    def owed(self, _worker: Worker) -> frozenset[int]:
        """None: nobody's gradients are added to another's."""
        return frozenset()

    def missing(self) -> tuple[Worker, ...]:
        """The workers that are waited for, in order of rank."""
        slowest = self._slowest()
        return tuple(sorted(w for w in self._awaited() if self._clocks[w] == slowest)) if self._waiting else ()

    def lag(self, worker: Worker) -> int:
        """How far a worker's clock is ahead of the slowest one's that is waited for."""
        return max(0, self._clocks[worker] - self._slowest()) if worker in self._clocks else 0

    def lag_seen(self, worker: Worker) -> int:
        """`lag` as another thread may read it while this one changes: of clocks that are copied at once."""
        clocks, left_behind = dict(self._clocks), frozenset(self._left_behind)
        slowest = min((clock for other, clock in clocks.items() if other not in left_behind), default=0)
        return max(0, clocks[worker] - max(self._floor, slowest)) if worker in clocks else 0

    def will_be_released(self, worker: Worker) -> bool:
        """Whether a worker would not have to wait if its push were complete now."""
        own = self._clocks[worker]
        if worker in self._left_behind:
            own = max(own, self._slowest())
        others = [self._clocks[other] for other in self._awaited() - {worker}]
        return self.max_staleness is None or not others or (own + 1 - min(others) <= self.max_staleness)

    def is_waiting(self, worker: Worker) -> bool:
        """Whether a worker waits for slower ones."""
        return worker in self._waiting

    # --- who is in it

    def may_join(self, _worker: Worker) -> bool:
        """Always: nobody waits for anybody's first push."""
        return True

    def join(self, worker: Worker) -> list[Decision]:
        """Lets a worker in, with the clock of the slowest."""
        self._clocks[worker] = self._slowest()
        return []

    def restore(self, *, step: int, clocks: Mapping[Worker, int], floor: int) -> None:
        """Goes on where another one stood, with no push under way.

        Args:
            step: The number of committed steps.
            clocks: Who is in the job, and how many pushes each has completed.
            floor: The slowest clock so far.
        """
        self.step = step
        self._clocks, self._floor = dict(clocks), floor

    def restore_push(self, worker: Worker, applied: Collection[int]) -> None:
        """Goes on in a streamed push of which these buckets have been applied."""
        self._open[worker] = _Push(set(applied), set(applied))

    def count_push(self, worker: Worker, step: int) -> None:
        """A worker, which may have left by now, has completed a push, with which `step` steps were committed."""
        self.step = step
        if worker in self._clocks:
            self._clocks[worker] += 1
            self._slowest()

    def await_slower(self) -> None:
        """Has those wait that are too far ahead and have begun no push: what they were doing is not known any more."""
        for worker in self._clocks.keys() - self._open.keys():
            if self.max_staleness is not None and self.lag(worker) > self.max_staleness:
                self._waiting[worker] = None

    @property
    def clocks(self) -> Mapping[Worker, int]:
        """How many pushes each worker in the job has completed, counted from the slowest at its coming."""
        return dict(self._clocks)

    @property
    def floor(self) -> int:
        """The slowest clock so far."""
        return self._slowest()

    def leave(self, worker: Worker) -> list[Decision]:
        """A worker has left or is lost. Unknown workers are ignored.

        What has been applied of a push that is not complete stays, and makes a step; else it is forgotten.
        """
        if worker not in self._clocks:
            return []
        decisions: list[Decision] = []
        push = self._open.pop(worker, None)
        if push is not None and push.applied:
            self.step += 1
            decisions.append(Commit(self.step, (worker,), partial_contributors=(worker,)))
        elif push is not None:
            decisions.append(Abandon((worker,)))
        del self._clocks[worker]
        self._left_behind.discard(worker)
        self._waiting.pop(worker, None)
        return decisions + self._release()

    def lose(self, worker: Worker) -> list[Decision]:
        """A worker's lease has ended: as if it had left."""
        return self.leave(worker)

    def forget_push(self, worker: Worker) -> None:
        """Drops a push that could not be applied: the worker has begun none, and waits for nobody.

        If it was complete its clock has counted it, and keeps it: others may have been released for it.
        """
        self._open.pop(worker, None)
        self._waiting.pop(worker, None)

    def forget_step(self, step: int) -> None:
        """`step` steps are committed."""
        self.step = step

    # --- a push

    def begin(self, worker: Worker, base_step: int) -> bool:
        """A live worker begins its push, of which it has begun none. It is never late. Returns True."""
        if worker not in self._clocks or worker in self._open or worker in self._waiting:
            raise RuntimeError(f"{worker} cannot begin a push")
        if base_step > self.step:
            raise RuntimeError(f"{worker} has parameters of step {base_step}, and {self.step} are committed")
        self._show(worker)
        self._open[worker] = _Push()
        return True

    def catch_up(self, _worker: Worker) -> None:
        """Nothing: nobody is ever late."""

    def push(self, worker: Worker, bucket_id: int) -> list[Decision]:
        """A worker has pushed a bucket, once, between `begin` and `end`."""
        push = self._open.get(worker)
        if push is None or bucket_id in push.pushed:
            raise RuntimeError(f"{worker} cannot push bucket {bucket_id}")
        push.pushed.add(bucket_id)
        if not self.streaming:
            return []
        push.applied.add(bucket_id)
        return [ApplyBucket(bucket_id, (worker,))]

    def end(self, worker: Worker, *, skipped: bool = False) -> list[Decision]:
        """A worker has pushed all it had; nothing if it is `skipped`, and then it is no contributor of a step."""
        push = self._open.get(worker)
        if push is None or (skipped and push.pushed):
            raise RuntimeError(f"{worker} cannot end a push")
        del self._open[worker]
        decisions: list[Decision] = []
        if skipped:
            decisions.append(Skip(self.step, (worker,)))
        else:
            decisions += [ApplyBucket(bucket_id, (worker,)) for bucket_id in sorted(push.pushed - push.applied)]
            self.step += 1
            decisions.append(Commit(self.step, (worker,)))
        # Those that waited for this push do so no more, skipped or not.
        self._show(worker)
        self._clocks[worker] += 1
        self._waiting[worker] = None
        return decisions + self._release()

    def withdraw(self, worker: Worker) -> list[Decision]:
        """Not of a push that is applied as it comes, and nobody takes up another's."""
        raise RuntimeError(f"{worker} cannot withdraw what it has pushed")

    def retract(self, worker: Worker) -> list[Decision]:
        """A worker takes back a push of which it has brought no bucket yet."""
        push = self._open.get(worker)
        if push is None or push.pushed:
            raise RuntimeError(f"{worker} cannot take back a push")
        del self._open[worker]
        return [Abandon((worker,))]

    # --- time

    @property
    def is_timed(self) -> bool:
        """Whether somebody waits for slower workers: whether `tick` has to be told of time."""
        return bool(self._waiting)

    def tick(self, now: float, *, waited_for: bool = False) -> list[Decision]:
        """Time has passed: `now`, in seconds, never goes back. Nobody from outside is ever `waited_for` here."""
        del waited_for
        for worker, since in self._waiting.items():
            if since is None:
                self._waiting[worker] = now
        if self.max_staleness is None:
            return []
        for worker, since in self._waiting.items():
            if since is not None and now >= since + self._timeout_s:
                bound = self._clocks[worker] - self.max_staleness
                self._left_behind |= {other for other in self._awaited() if self._clocks[other] < bound}
        return self._release()

    # --- all of the above

    def _show(self, worker: Worker) -> None:
        """A worker that was left behind is waited for again."""
        if worker in self._left_behind:
            self._clocks[worker] = max(self._clocks[worker], self._slowest())
            self._left_behind.discard(worker)

    def _awaited(self) -> set[Worker]:
        return self._clocks.keys() - self._left_behind

    def _slowest(self) -> int:
        self._floor = max(self._floor, min((self._clocks[worker] for worker in self._awaited()), default=0))
        return self._floor

    def _release(self) -> list[Decision]:
        released = [
            worker for worker in self._waiting if self.max_staleness is None or self.lag(worker) <= self.max_staleness
        ]
        for worker in released:
            del self._waiting[worker]
        return [Release(tuple(sorted(released)))] if released else []
