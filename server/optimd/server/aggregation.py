"""How the pushes of several workers become steps: a state machine without I/O, clock or threads.

Events go in (a worker joins, leaves, is lost, pushes a bucket, ends its push; time passes), decisions come out (apply
this bucket with these contributors, commit this step, forget what that worker gave). Who calls it carries the decisions
out and holds the tensors. `SyncAggregator` is here, its asynchronous twin in `staleness.py`.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple


class Worker(NamedTuple):
    """A worker. Workers are ordered by rank."""

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
    partial_contributors: tuple[Worker, ...] = ()
    """Those of them that were lost, or left behind, in the middle of their push."""
    skipped: tuple[Worker, ...] = ()
    """Whose pushes end with the step though they brought no gradients, in order of rank."""
    late: tuple[Worker, ...] = ()
    """Who is in the middle of a push that nothing of is in the step: it comes too late, whatever follows of it."""


@dataclass(frozen=True, slots=True)
class Abandon:
    """Every worker of the open step was lost before anything was applied: forget their contributions."""

    lost: tuple[Worker, ...]


@dataclass(frozen=True, slots=True)
class TakeBack:
    """Every worker of a streamed step was lost, and buckets of it have been applied: go back to before them."""

    lost: tuple[Worker, ...]


@dataclass(frozen=True, slots=True)
class Skip:
    """The open step ends without a commit: nothing of it is applied, and all of its pushes are answered."""

    step: int
    """The number of committed steps, as it was before."""
    pushes: tuple[Worker, ...]
    """Whose pushes end with it, in order of rank."""
    late: tuple[Worker, ...] = ()
    """As in `Commit`."""


@dataclass(frozen=True, slots=True)
class Discard:
    """Nothing of a worker's unfinished push counts: forget what it has given for these buckets.

    Where gradients are added up as they come, that is all that anybody has given: the others push these buckets again.
    """

    worker: Worker
    buckets: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class TimeOut:
    """Workers that the open step may not do without have not come: it fails for all that have begun it."""

    missing: tuple[Worker, ...]


@dataclass(frozen=True, slots=True)
class Release:
    """These workers, which have waited for slower ones, are given parameters."""

    workers: tuple[Worker, ...]


Decision = ApplyBucket | Commit | Abandon | TakeBack | Skip | Discard | TimeOut | Release


class SyncAggregator:
    """Synchronous steps: each is one push of every worker that is awaited, but for those that have nothing to give.

    Awaited are the live workers. Nobody begins a push before `world_size` workers have joined, at the start and
    whenever all had left; whoever joins later does so between two steps.

    A worker that is lost in the middle of its push is no contributor: what it gave is taken out of the step again.
    Where steps are streamed it is in already, and stays; the `Commit` then names it as partial. A push that is complete
    counts, whatever becomes of its worker. With `on_loss="wait"` a lost worker is awaited still: when it comes back, it
    pushes what is missing of its push.

    A live worker that has not come when somebody has waited for `timeout_s`, its own push complete, is left behind: the
    step is committed without it, and it is awaited again once it has shown itself. Its push is then late. Where others
    have to push again meanwhile, they have that time anew. With `on_loss="wait"` nobody is left behind: the step fails.

    Args:
        world_size: How many workers the first step waits for, at least 1; None for whoever is there.
        streaming: Whether a bucket is applied as soon as it is complete, or all of them with the step's last push.
        backup_workers: How many pushes a step of `world_size` workers can do without: it is made of the first
            `world_size - backup_workers` complete ones. Not with `streaming`.
        separate: Whether the gradients of each worker are held apart until they are reduced, as `backup_workers` needs.
            Else they are added up as they come, and cannot be told from each other any more.
        on_loss: What becomes of a lost worker's place. "wait" not with `streaming`.
        timeout_s: How long a complete push waits for live workers, in seconds.
        step: The number of steps committed so far.
    """

    def __init__(
        self,
        *,
        world_size: int | None,
        streaming: bool,
        backup_workers: int = 0,
        separate: bool = False,
        on_loss: Literal["shrink", "wait"] = "shrink",
        timeout_s: float = math.inf,
        step: int = 0,
    ) -> None:
        self.world_size = world_size
        self.streaming = streaming
        self.step = step
        self._backup_workers = backup_workers
        self._separate = separate or backup_workers > 0
        self._waits_for_lost = on_loss == "wait"
        self._timeout_s = timeout_s
        self._live: set[Worker] = set()
        # Lost, and awaited still.
        self._absent: set[Worker] = set()
        # Live, and not awaited.
        self._left_behind: set[Worker] = set()
        self._formed = False
        # Of the open step:
        self._begun: set[Worker] = set()
        self._ended: set[Worker] = set()
        self._skipped: set[Worker] = set()
        # Whose push stays in though it will not be completed.
        self._torn: set[Worker] = set()
        self._pushed: dict[int, set[Worker]] = {}
        self._applied: set[int] = set()
        self._owed: dict[Worker, set[int]] = {}
        self._waited_since: float | None = None
        self.takes_back = False
        """Whether a streamed step that all of its workers are lost from is taken back, not closed as it stands."""

    # --- what it is

    @property
    def live(self) -> frozenset[Worker]:
        """The workers that are in the job, those that are lost and awaited not among them."""
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

    def has_begun(self, worker: Worker) -> bool:
        """Whether a push of the worker's is in the open step, complete or not."""
        return worker in self._begun and worker not in self._torn

    def has_ended(self, worker: Worker) -> bool:
        """Whether a worker's push of the open step is complete."""
        return worker in self._ended

    def is_awaited_absent(self, worker: Worker) -> bool:
        """Whether the place of a lost worker is kept that this one would fill."""
        return self._kept_place(worker) is not None

    def holds(self, worker: Worker, bucket_id: int) -> bool:
        """Whether a worker's part of a bucket is in the open step already."""
        return worker in self._ended or worker in self._pushed.get(bucket_id, ())

    def has_pushed(self, worker: Worker) -> bool:
        """Whether any part of a worker's push is in the open step already: a bucket, or that it is complete."""
        return worker in self._ended or any(worker in pushed for pushed in self._pushed.values())

    def owed(self, worker: Worker) -> frozenset[int]:
        """The buckets that a worker has to push again, since somebody else's share of them was discarded."""
        return frozenset(self._owed.get(worker, ()))

    def lag(self, _worker: Worker) -> int:
        """None: all of them are at the same step."""
        return 0

    def lag_seen(self, _worker: Worker) -> int:
        """None, either."""
        return 0

    def is_waiting(self, _worker: Worker) -> bool:
        """Never: it is its push that waits, in the step."""
        return False

    def will_be_released(self, _worker: Worker) -> bool:
        """Always: nobody gets ahead of the others."""
        return True

    def missing(self) -> tuple[Worker, ...]:
        """The workers that the open step waits for, in order of rank."""
        return tuple(sorted(self._awaited() - self._ended))

    # --- who is in it

    def may_join(self, worker: Worker) -> bool:
        """Whether a worker may join now: between two steps, or in the place of one that the open step waits for."""
        place = self._kept_place(worker)
        return not self._begun or (place is not None and (place == worker or place not in self._ended))

    def join(self, worker: Worker) -> list[Decision]:
        """Lets a worker in, where it may join.

        One that was lost and is awaited comes back to its push. Another one in its place begins with none.
        """
        if not self.may_join(worker):
            raise RuntimeError(f"{worker} may not join in the middle of a step")
        begun = set(self._begun)
        decisions: list[Decision] = []
        place = self._kept_place(worker)
        if place is not None:
            self._absent.discard(place)
            if place != worker and place in self._begun - self._ended:
                decisions += self._discard(place)
        self._live.add(worker)
        needed = 1 if self.world_size is None else self.world_size
        self._formed = self._formed or len(self._places()) >= needed
        return decisions + self._after_loss(begun)

    def restore(self, *, step: int, live: Collection[Worker], absent: Collection[Worker], formed: bool) -> None:
        """Goes on where another one stood between two steps.

        Args:
            step: The number of committed steps.
            live: Who is in the job.
            absent: Who was lost and is awaited still.
            formed: Whether pushes may begin.
        """
        self.step = step
        self._live, self._absent, self._formed = set(live), set(absent), formed

    def restore_step(self, applied: Mapping[int, Collection[Worker]]) -> None:
        """Goes on in a streamed step of which these buckets have been applied, with these contributors.

        Nothing else of it is there: who is in the job still has to come back and push the rest. Who is not in what has
        been applied was not awaited, and comes too late.
        """
        self._pushed = {bucket_id: set(workers) for bucket_id, workers in applied.items()}
        self._applied = set(applied)
        self._begun = set().union(*self._pushed.values())
        self._torn = self._begun - self._live
        self._left_behind = self._live - self._begun

    @property
    def absent(self) -> frozenset[Worker]:
        """The workers that are lost and awaited still."""
        return frozenset(self._absent)

    def leave(self, worker: Worker) -> list[Decision]:
        """A worker has left for good. Unknown workers are ignored.

        Where nobody is left, a step of which buckets have been applied is taken back, if that is possible. Else it is
        closed: the rest of what was pushed is applied too. A step of which nothing has been applied is abandoned.
        """
        if worker not in self._places():
            return []
        self._live.discard(worker)
        self._absent.discard(worker)
        self._left_behind.discard(worker)
        begun = set(self._begun)
        decisions: list[Decision] = []
        if worker in self._begun - self._ended - self._torn:
            decisions += self._drop(worker)
        self._owed.pop(worker, None)
        self._formed = self._formed and bool(self._places())
        return decisions + self._after_loss(begun)

    def lose(self, worker: Worker) -> list[Decision]:
        """A worker's lease has ended. Unknown workers are ignored."""
        if not self._waits_for_lost:
            return self.leave(worker)
        if worker in self._live:
            self._live.discard(worker)
            self._absent.add(worker)
        return []

    def forget_push(self, _worker: Worker) -> None:
        """Nothing: a step fails as a whole, with `forget_step`."""

    def forget_step(self, step: int) -> None:
        """Drops the open step, which could not be applied: `step` steps are committed, and nobody has begun a push."""
        self.step = step
        self._reset()

    # --- a push

    def begin(self, worker: Worker, base_step: int) -> bool:
        """A worker begins its push. The job is formed, the worker live, and it has not begun one.

        Returns:
            Whether the push is in the open step. Else it is late: its parameters come from an earlier step, or buckets
            have been applied without it.
        """
        if not self._formed or worker not in self._live or worker in self._begun:
            raise RuntimeError(f"{worker} cannot begin a push")
        if base_step != self.step or (worker in self._left_behind and self._applied):
            return False
        self._left_behind.discard(worker)
        self._begun.add(worker)
        return True

    def catch_up(self, worker: Worker) -> None:
        """A worker that was late is about to receive the parameters: it is awaited from now on."""
        self._left_behind.discard(worker)

    def push(self, worker: Worker, bucket_id: int) -> list[Decision]:
        """A worker has pushed a bucket: once in a step, but for those that it owes, between `begin` and `end`."""
        if not self._is_pushing(worker) or worker in self._pushed.get(bucket_id, ()):
            raise RuntimeError(f"{worker} cannot push bucket {bucket_id}")
        self._pushed.setdefault(bucket_id, set()).add(worker)
        self._owed.get(worker, set()).discard(bucket_id)
        if self.streaming and self._is_complete(bucket_id):
            return [self._apply(bucket_id)]
        return []

    def end(self, worker: Worker, *, skipped: bool = False) -> list[Decision]:
        """A worker has pushed all it had; nothing if it is `skipped`, and then it is no contributor of the step.

        Does nothing where the worker owes buckets: it has to push these and end again.
        """
        if not self._is_pushing(worker) or (skipped and self.has_pushed(worker)):
            raise RuntimeError(f"{worker} cannot end a push")
        if self._owed.get(worker) and not skipped:
            return []
        self._owed.pop(worker, None)
        self._ended.add(worker)
        if skipped:
            self._skipped.add(worker)
        return self._advance()

    def withdraw(self, worker: Worker) -> list[Decision]:
        """What has come of a worker's push does not count: its predecessor's, say. Not where steps are streamed."""
        if not self._is_pushing(worker) or self.streaming:
            raise RuntimeError(f"{worker} cannot withdraw what it has pushed")
        decisions = self._discard(worker)
        self._begun.add(worker)
        return decisions

    def retract(self, worker: Worker) -> list[Decision]:
        """A worker takes back a push of which it has brought no bucket yet."""
        if not self._is_pushing(worker) or self.has_pushed(worker):
            raise RuntimeError(f"{worker} cannot take back a push")
        self._begun.discard(worker)
        self._owed.pop(worker, None)
        if self._begun:
            return []
        self._reset()
        return [Abandon((worker,))]

    # --- time

    @property
    def is_timed(self) -> bool:
        """Whether somebody's complete push waits: whether `tick` has to be told of time."""
        return bool(self._ended & self._live)

    def tick(self, now: float, *, waited_for: bool = False) -> list[Decision]:
        """Time has passed.

        Args:
            now: The time, in seconds; it never goes back.
            waited_for: Whether a worker that is not in the step waits for its end: a newcomer, or one that is late.
        """
        if not self.is_timed and not (waited_for and self._begun and not self._waits_for_lost):
            self._waited_since = None
            return []
        if self._waited_since is None:
            self._waited_since = now
        if now < self._waited_since + self._timeout_s:
            return []
        self._waited_since = None
        if self._waits_for_lost:
            missing = self.missing()
            self._reset()
            return [TimeOut(missing)]
        begun = set(self._begun)
        decisions: list[Decision] = []
        for worker in self.missing():
            self._left_behind.add(worker)
            if self._is_pushing(worker):
                decisions += self._drop(worker)
        return decisions + self._after_loss(begun)

    # --- all of the above

    def _places(self) -> set[Worker]:
        """Whose places there are: of the live, and of the lost that are awaited still."""
        return self._live | self._absent

    def _awaited(self) -> set[Worker]:
        return (self._live - self._left_behind) | self._absent

    def _kept_place(self, worker: Worker) -> Worker | None:
        """The place that a worker would fill: its own, else one of its rank. The others may come back too."""
        places = [absent for absent in self._absent if absent.worker_id == worker.worker_id]
        places += sorted(absent for absent in self._absent if absent.rank == worker.rank)
        return places[0] if places else None

    def _is_pushing(self, worker: Worker) -> bool:
        return worker in self._live and worker in self._begun - self._ended - self._torn

    def _drop(self, worker: Worker) -> list[Decision]:
        """A push that will not be completed: it stays in as far as it came where steps are streamed, else it goes."""
        if not self.streaming:
            return self._discard(worker)
        if self.has_pushed(worker):
            self._torn.add(worker)
        else:
            # It had only said that it would: a step that nobody else has begun is not open.
            self._begun.discard(worker)
            return [Discard(worker, ())]
        return []

    def _discard(self, worker: Worker) -> list[Decision]:
        self._begun.discard(worker)
        self._owed.pop(worker, None)
        buckets = tuple(sorted(bucket_id for bucket_id, pushed in self._pushed.items() if worker in pushed))
        for bucket_id in buckets:
            others = self._pushed[bucket_id] - {worker}
            if self._separate:
                self._pushed[bucket_id] = others
                continue
            del self._pushed[bucket_id]
            for other in sorted(others):
                self._owed.setdefault(other, set()).add(bucket_id)
                self._ended.discard(other)
                # Whoever waits does so for pushes that have to be made again.
                self._waited_since = None
        decisions: list[Decision] = [Discard(worker, buckets)]
        places = self._places()
        # Whoever is gone cannot push again, not even a part of it.
        while gone := [other for other in self._owed if other not in places]:
            decisions += self._discard(gone[0])
        return decisions

    def _after_loss(self, begun: Collection[Worker]) -> list[Decision]:
        """What follows where some of those that had `begun` may not be in the step any more."""
        if begun and (not self._begun or not (self._places() or self._applied)):
            self._reset()
            return [Abandon(tuple(sorted(begun)))]
        if begun and self.takes_back and not self._places():
            self._reset()
            return [TakeBack(tuple(sorted(begun)))]
        return self._advance()

    def _advance(self) -> list[Decision]:
        """What follows from a change of who is awaited or has ended."""
        if not self._begun:
            return []
        step_complete = self._is_step_complete()
        decisions: list[Decision] = []
        if self.streaming or step_complete:
            decisions += [
                self._apply(bucket_id)
                for bucket_id in sorted(self._pushed)
                if bucket_id not in self._applied
                and (self.streaming or self._pushed[bucket_id] & self._ended)
                and (step_complete or self._is_complete(bucket_id))
            ]
        if step_complete:
            decisions.append(self._close())
        return decisions

    def _is_step_complete(self) -> bool:
        awaited = self._awaited()
        if self._backup_workers and self.world_size is not None:
            needed = min(self.world_size - self._backup_workers, len(awaited | self._ended))
            return len(self._ended) >= max(1, needed)
        return awaited <= self._ended

    def _is_complete(self, bucket_id: int) -> bool:
        return self._awaited() <= self._pushed[bucket_id] | self._ended

    def _apply(self, bucket_id: int) -> ApplyBucket:
        self._applied.add(bucket_id)
        contributors = self._pushed[bucket_id] | self._ended if self.streaming else self._ended
        return ApplyBucket(bucket_id, tuple(sorted(contributors - self._skipped)))

    def _close(self) -> Commit | Skip:
        in_buckets = set().union(*self._pushed.values())
        partial = self._torn & in_buckets
        contributors = (self._ended - self._skipped) | partial
        late = tuple(sorted((self._begun & self._live) - self._ended - partial))
        ends: Commit | Skip
        if contributors:
            self.step += 1
            ends = Commit(
                self.step,
                contributors=tuple(sorted(contributors)),
                partial_contributors=tuple(sorted(partial)),
                skipped=tuple(sorted(self._skipped)),
                late=late,
            )
        else:
            ends = Skip(self.step, tuple(sorted(self._ended)), late)
        self._reset()
        return ends

    def _reset(self) -> None:
        self._begun.clear()
        self._ended.clear()
        self._skipped.clear()
        self._torn.clear()
        self._pushed.clear()
        self._applied.clear()
        self._owed.clear()
        self._waited_since = None
