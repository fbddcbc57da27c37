"""Who is in a job, by lease: a state machine without I/O, clock or threads.

A worker is in the job from its `enter` on until it leaves, until another process takes its place, or until its lease
ends: when nothing has been heard of it for `lease_s`. A broken line alone does not end it: a process that is alive
comes back, one that is dead is replaced by its successor or runs out of time.

A `worker_id` belongs to one process at a time, its last `incarnation`: those before it are fenced for ever.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto

from optimd.server.aggregation import Worker


class Verdict(Enum):
    """What becomes of a process that wants to be in a job."""

    ENTER = auto()
    """Its place is free, or held by processes that it displaces."""
    RESUME = auto()
    """It has been in its place all along: only its line was down."""
    WAIT = auto()
    """A process holds its place that may be dead: it is heard of soon, or its lease ends."""
    IN_USE = auto()
    """A live process holds its place."""
    SUPERSEDED = auto()
    """Another process has taken its `worker_id` since."""
    UNKNOWN = auto()
    """It says that it has been in the job, which knows nothing of it."""


@dataclass(slots=True)
class Place:
    """A process that is in the job."""

    incarnation: int
    heard_s: float
    """When it was last heard of. May be written to without any lock, by whoever hears of it."""
    connected: bool = True
    """Whether its line is up, as far as anybody knows."""
    sending_since_s: float | None = None
    """Since when it has taken nothing of what it is being sent; None where nothing is. Likewise."""

    def lapses_at(self, lease_s: float) -> float:
        """When its lease ends if nothing more is heard of it, and if it takes nothing more."""
        # Read once: its stream writes it meanwhile.
        since = self.sending_since_s
        return (self.heard_s if since is None else min(self.heard_s, since)) + lease_s


@dataclass(frozen=True, slots=True)
class Claim:
    """A verdict, and whom it concerns."""

    verdict: Verdict
    rivals: tuple[Worker, ...] = ()
    """Who holds the place: whom the claimant displaces, waits for, or gives way to."""


class Membership:
    """The places of one job.

    Args:
        lease_s: How long a worker stays in the job after it was last heard of, in seconds.
        while_broken: Whether leases end only while lines are broken: where nobody waits for anybody, a silent process
            keeps its place until another claims it.
    """

    def __init__(self, lease_s: float, *, while_broken: bool = False) -> None:
        self.lease_s = lease_s
        self._while_broken = while_broken
        self._places: dict[Worker, Place] = {}
        self._last_incarnation: dict[str, int] = {}
        self.is_restored = False
        """Whether it was made again from what was on disk, which may not tell of all that had come."""
        # The ids of which a process has come since.
        self._came: set[str] = set()

    def claim(self, worker: Worker, incarnation: int, *, now: float, since: float, returns: bool) -> Claim:
        """What becomes of a process that wants to be in the job as `worker`.

        Args:
            worker: Its id and rank.
            incarnation: Which process it is.
            now: The time, in seconds.
            since: When it began to ask.
            returns: Whether it says that it has been in the job before.
        """
        last = self._last_incarnation.get(worker.worker_id)
        if returns and last != incarnation and not self.has_forgotten(worker.worker_id, incarnation):
            return Claim(Verdict.UNKNOWN if last is None else Verdict.SUPERSEDED)
        rivals = {
            other: place
            for other, place in self._places.items()
            if other.worker_id == worker.worker_id or other.rank == worker.rank
        }
        own = rivals.get(worker)
        if own is not None and own.incarnation == incarnation:
            return Claim(Verdict.RESUME, (worker,))
        alive = {
            other: place
            for other, place in rivals.items()
            if place.connected
            and now < place.lapses_at(self.lease_s)
            # The same process, once with another rank: it knows that its own line is broken.
            and not (other.worker_id == worker.worker_id and place.incarnation == incarnation)
        }
        if not alive:
            return Claim(Verdict.ENTER, tuple(sorted(rivals)))
        # Only what was heard since counts: a process that died a moment ago was heard of a moment before that.
        heard = [other for other, place in alive.items() if place.heard_s > since]
        return Claim(Verdict.IN_USE, tuple(sorted(heard))) if heard else Claim(Verdict.WAIT, tuple(sorted(alive)))

    def enter(self, worker: Worker, incarnation: int, *, now: float) -> Place:
        """A process is in the job from now on. Nobody is in its place."""
        self._last_incarnation[worker.worker_id] = incarnation
        self._came.add(worker.worker_id)
        self._places[worker] = Place(incarnation, now)
        return self._places[worker]

    def restored(self) -> None:
        """All that was on disk is here."""
        self.is_restored = True
        self._came.clear()

    def has_forgotten(self, worker_id: str, incarnation: int) -> bool:
        """Whether a process may have been in the job though nothing is known of it: its coming was not on disk yet."""
        known = self._last_incarnation.get(worker_id) == incarnation
        return self.is_restored and not known and worker_id not in self._came

    @property
    def incarnations(self) -> dict[str, int]:
        """The last process of each worker_id. A copy."""
        return dict(self._last_incarnation)

    def remember(self, worker_id: str, incarnation: int) -> None:
        """A process had a worker_id, and may not be in the job any more."""
        self._last_incarnation[worker_id] = incarnation

    def resume(self, worker: Worker, *, now: float) -> Place:
        """A process that is in the job has a line again."""
        self._came.add(worker.worker_id)
        place = self._places[worker]
        place.connected, place.heard_s, place.sending_since_s = True, now, None
        return place

    def disconnect(self, worker: Worker) -> None:
        """The line of a process that is in the job is down."""
        self._places[worker].connected = False
        self._places[worker].sending_since_s = None

    def heard(self, worker: Worker, now: float) -> None:
        """A process is alive. Unknown ones are ignored. Needs no lock."""
        place = self._places.get(worker)
        if place is not None:
            place.heard_s = now

    def leave(self, worker: Worker) -> None:
        """A process is not in the job any more. Unknown ones are ignored."""
        self._places.pop(worker, None)

    def lapsed(self, now: float) -> list[Worker]:
        """The workers whose lease has ended, in order of rank."""
        # A copy, made in one piece: this is also asked without the lock.
        places = tuple(self._places.items())
        return sorted(
            worker
            for worker, place in places
            if now >= place.lapses_at(self.lease_s) and not (place.connected and self._while_broken)
        )
