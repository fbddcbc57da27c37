"""How the pushes of several workers become steps: a state machine without I/O, clock or threads.

Events go in (a worker joins, leaves, pushes a bucket, ends its push), decisions come out (apply this bucket with these
contributors, commit this step, abandon it). Who calls it carries the decisions out and holds the tensors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class Worker(NamedTuple):
    """A live worker. Workers are ordered by rank."""

    rank: int
    worker_id: str


@dataclass(frozen=True, slots=True)
class ApplyBucket:
    """The bucket is complete: reduce its contributions and apply them."""

    bucket_id: int
    contributors: tuple[Worker, ...]
    """Whose gradients count, in order of rank. One that had none for the bucket counts as zero."""


@dataclass(frozen=True, slots=True)
class Commit:
    """The open step is complete."""

    step: int
    """The number of committed steps, this one included."""
    contributors: tuple[Worker, ...]
    """Whose gradients are in it, in order of rank."""
    partial_contributors: tuple[Worker, ...]
    """Those of them that were lost in the middle of their push."""
    skipped: tuple[Worker, ...] = ()
    """Whose pushes end with the step though they brought no gradients, in order of rank."""


@dataclass(frozen=True, slots=True)
class Abandon:
    """Every worker of the open step was lost before anything was applied: forget their contributions."""

    lost: tuple[Worker, ...]


@dataclass(frozen=True, slots=True)
class Skip:
    """The open step ends without a commit: nothing of it is applied, and all of its pushes are answered."""

    step: int
    """The number of committed steps, as it was before."""
    pushes: tuple[Worker, ...]
    """Whose pushes end with it, in order of rank."""


Decision = ApplyBucket | Commit | Abandon | Skip


class SyncAggregator:
    """Synchronous steps: each is one push of every live worker, but for those that have nothing to give.

    A worker that is lost lowers the count of those waited for. What it had pushed of the open step stays in; the
    `Commit` says who was lost in the middle of a push. Nobody begins a push before `world_size` workers have joined,
    at the start and whenever all had left.

    Args:
        world_size: How many workers the first step waits for; at least 1.
        streaming: Whether a bucket is applied as soon as it is complete, or all of them with the step's last push.
        step: The number of steps committed so far.
    """

    def __init__(self, *, world_size: int, streaming: bool, step: int = 0) -> None:
        self.world_size = world_size
        self.streaming = streaming
        self.step = step
        self._live: set[Worker] = set()
        self._formed = False
        self._begun: set[Worker] = set()
        self._ended: set[Worker] = set()
        self._skipped: set[Worker] = set()
        self._lost: set[Worker] = set()
        self._pushed: dict[int, set[Worker]] = {}
        self._applied: set[int] = set()

    @property
    def live(self) -> frozenset[Worker]:
        """The workers that are in the job."""
        return frozenset(self._live)

    @property
    def is_open(self) -> bool:
        """Whether a worker has begun a push that is not committed."""
        return bool(self._begun)

    @property
    def has_applied(self) -> bool:
        """Whether a bucket of the open step has been applied."""
        return bool(self._applied)

    @property
    def is_formed(self) -> bool:
        """Whether enough workers have joined for pushes to begin."""
        return self._formed

    def has_ended(self, worker: Worker) -> bool:
        """Whether a worker's push of the open step is complete."""
        return worker in self._ended

    def missing(self) -> tuple[Worker, ...]:
        """The live workers that the open step waits for, in order of rank."""
        return tuple(sorted(self._live - self._ended))

    def join(self, worker: Worker) -> None:
        """Lets a worker in; only between two steps."""
        if self._begun:
            raise RuntimeError(f"{worker} may not join in the middle of a step")
        self._live.add(worker)
        self._formed = self._formed or len(self._live) >= self.world_size

    def leave(self, worker: Worker) -> list[Decision]:
        """A worker has left, in good order or not. Unknown workers are ignored.

        Where nobody is left, a step of which buckets have been applied is closed: the rest of what was pushed is
        applied too, since nothing could take the applied ones back. A step of which nothing has been applied is
        abandoned.
        """
        if worker not in self._live:
            return []
        begun = set(self._begun)
        self._live.discard(worker)
        if worker in self._begun and worker not in self._ended:
            if any(worker in pushed for pushed in self._pushed.values()):
                self._lost.add(worker)
            else:
                # It had only said that it would: a step that nobody else has begun is not open.
                self._begun.discard(worker)
        self._formed = self._formed and bool(self._live)
        if begun and (not self._begun or (not self._live and not self._applied)):
            abandon = Abandon(tuple(sorted(begun)))
            self._reset()
            return [abandon]
        return self._advance()

    def forget_step(self, step: int) -> None:
        """Drops the open step, which could not be applied: `step` steps are committed, and nobody has begun a push."""
        self.step = step
        self._reset()

    def begin(self, worker: Worker) -> None:
        """A worker begins its push. The job is formed, the worker live, and it has not begun one."""
        if not self._formed or worker not in self._live or worker in self._begun:
            raise RuntimeError(f"{worker} cannot begin a push")
        self._begun.add(worker)

    def push(self, worker: Worker, bucket_id: int) -> list[Decision]:
        """A worker has pushed a bucket: once in a step, between `begin` and `end`."""
        if not self._is_pushing(worker) or worker in self._pushed.get(bucket_id, ()):
            raise RuntimeError(f"{worker} cannot push bucket {bucket_id}")
        self._pushed.setdefault(bucket_id, set()).add(worker)
        if self.streaming and self._is_complete(bucket_id):
            return [self._apply(bucket_id)]
        return []

    def end(self, worker: Worker, *, skipped: bool = False) -> list[Decision]:
        """A worker has pushed all it had; nothing if it is `skipped`, and then it is no contributor of the step."""
        if not self._is_pushing(worker) or (skipped and any(worker in pushed for pushed in self._pushed.values())):
            raise RuntimeError(f"{worker} cannot end a push")
        self._ended.add(worker)
        if skipped:
            self._skipped.add(worker)
        return self._advance()

    def retract(self, worker: Worker) -> list[Decision]:
        """A worker takes back a push of which it has brought no bucket yet."""
        if not self._is_pushing(worker) or any(worker in pushed for pushed in self._pushed.values()):
            raise RuntimeError(f"{worker} cannot take back a push")
        self._begun.discard(worker)
        if self._begun:
            return []
        self._reset()
        return [Abandon((worker,))]

    def _is_pushing(self, worker: Worker) -> bool:
        return worker in self._live and worker in self._begun and worker not in self._ended

    def _advance(self) -> list[Decision]:
        """What follows from a change of who is live or has ended."""
        if not self._begun:
            return []
        step_complete = self._live <= self._ended
        decisions: list[Decision] = []
        if self.streaming or step_complete:
            decisions += [
                self._apply(bucket_id)
                for bucket_id in sorted(self._pushed)
                if bucket_id not in self._applied and self._is_complete(bucket_id)
            ]
        if step_complete:
            decisions.append(self._close())
        return decisions

    def _is_complete(self, bucket_id: int) -> bool:
        return self._live <= self._pushed[bucket_id] | self._ended

    def _apply(self, bucket_id: int) -> ApplyBucket:
        self._applied.add(bucket_id)
        contributors = (self._pushed[bucket_id] | self._ended) - self._skipped
        return ApplyBucket(bucket_id, tuple(sorted(contributors)))

    def _close(self) -> Commit | Skip:
        in_buckets = set().union(*self._pushed.values())
        partial = self._lost & in_buckets
        contributors = (self._ended - self._skipped) | partial
        ends: Commit | Skip
        if contributors:
            self.step += 1
            skipped = tuple(sorted(self._skipped))
            ends = Commit(self.step, tuple(sorted(contributors)), tuple(sorted(partial)), skipped)
        else:
            ends = Skip(self.step, tuple(sorted(self._ended)))
        self._reset()
        return ends

    def _reset(self) -> None:
        self._begun.clear()
        self._ended.clear()
        self._skipped.clear()
        self._lost.clear()
        self._pushed.clear()
        self._applied.clear()
