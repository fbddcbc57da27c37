"""Synchronous aggregation, on random schedules of all that workers and time can do. By example: `test_aggregation.py`.

A schedule is a list of numbers, each of which picks one of the events that are legal at its time. `Simulation` keeps
its own account of who did what, against which the properties compare the aggregator's decisions, and carries these out
on gradients that are nothing but the names of those who computed them.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Final, Literal

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from optimd.server.aggregation import (
    Abandon,
    ApplyBucket,
    Commit,
    Decision,
    Discard,
    Skip,
    SyncAggregator,
    TimeOut,
    Worker,
)

A, B, C = (Worker(rank, f"host-{rank}") for rank in range(3))
# B's successors, by its rank and by its id.
WORKERS: Final = (A, B, C, Worker(1, "host-3"), Worker(3, "host-1"))
BUCKETS: Final = (0, 1, 2)
TIMEOUT_S: Final = 10.0
PAUSES_S: Final = (1.0, 5.0, TIMEOUT_S)
KINDS: Final = (
    *("join",) * 5,
    *("begin",) * 5,
    *("push",) * 9,
    *("end",) * 4,
    *("skip", "skip", "retract"),
    *("leave",) * 2,
    *("lose",) * 3,
    *("catch up",) * 2,
    *("tick",) * 4,
    "newcomer",
)


@dataclass(frozen=True)
class Rules:
    """What a job was made with."""

    world_size: int | None
    streaming: bool = False
    backup_workers: int = 0
    separate: bool = False
    on_loss: Literal["shrink", "wait"] = "shrink"

    def aggregator(self) -> SyncAggregator:
        """An aggregator of these rules."""
        return SyncAggregator(
            world_size=self.world_size,
            streaming=self.streaming,
            backup_workers=self.backup_workers,
            separate=self.separate,
            on_loss=self.on_loss,
            timeout_s=TIMEOUT_S,
        )


SHRINK_OR_WAIT: Final[tuple[Literal["shrink", "wait"], ...]] = ("shrink", "wait")
ALL_RULES: Final = (
    # Twice: there are fewer kinds of them than of atomic ones.
    *(Rules(size, streaming=True) for size in (1, 2, 3, None) * 2),
    *(
        Rules(size, separate=separate, on_loss=on_loss)
        for size in (1, 2, 3, None)
        for separate in (False, True)
        for on_loss in SHRINK_OR_WAIT
    ),
    *(
        Rules(size, backup_workers=backups, separate=True, on_loss=on_loss)
        for size, backups in ((2, 1), (3, 1), (3, 2))
        for on_loss in SHRINK_OR_WAIT
    ),
)


@dataclass
class Applied:
    """A bucket that was applied, and how often each worker's gradient was in it."""

    bucket_id: int
    contributors: tuple[Worker, ...]
    shares: Counter[Worker]


@dataclass
class Step:
    """What happened in one step, by the simulation's own account."""

    begun: set[Worker] = field(default_factory=set)
    ended: set[Worker] = field(default_factory=set)
    skipped: set[Worker] = field(default_factory=set)
    torn: set[Worker] = field(default_factory=set)
    """Whose push stays in a streamed step though it was not completed."""
    pushed: dict[int, set[Worker]] = field(default_factory=lambda: defaultdict(set))
    """Whose share of a bucket counts."""
    owed: dict[Worker, set[int]] = field(default_factory=lambda: defaultdict(set))
    produced: dict[Worker, set[int]] = field(default_factory=lambda: defaultdict(set))
    """The buckets for which a worker has a gradient, as far as it has said."""
    held: dict[int, Counter[Worker]] = field(default_factory=lambda: defaultdict(Counter))
    """Whose gradients have come and are not applied, and how often: what carrying out the decisions leads to."""
    applied: list[Applied] = field(default_factory=list)
    unanswered: set[Worker] = field(default_factory=set)

    def pushers(self) -> set[Worker]:
        """Whose share of any bucket counts."""
        return set().union(*self.pushed.values())


@dataclass(frozen=True)
class Outcome:
    """An event, the step that it belongs to as it stands after it, and what the aggregator decided."""

    kind: str
    worker: Worker
    step: Step
    begun_before: frozenset[Worker]
    applied_before: frozenset[int]
    missing: tuple[Worker, ...]
    """Who had not ended of those that the step waited for before."""
    awaited: frozenset[Worker]
    """Whom the step waited for when the event had happened, before it had led to anything."""
    is_complete: bool
    """Whether the step had all that it waits for."""
    is_overdue: bool
    """Whether that was a look at the time at which somebody had waited for too long."""
    timed_inside: bool
    """Whether a live worker's complete push waited before."""
    out: frozenset[Worker]
    """Whose push it took out of the step."""
    decisions: list[Decision]

    @property
    def close(self) -> Commit | Abandon | Skip | TimeOut | None:
        """The decision that ended the step, if one did."""
        return next((item for item in self.decisions if isinstance(item, Commit | Abandon | Skip | TimeOut)), None)

    @property
    def buckets(self) -> list[ApplyBucket]:
        """The buckets that it had applied."""
        return [item for item in self.decisions if isinstance(item, ApplyBucket)]


class Simulation:
    """Plays a schedule, keeps account, and carries the decisions out."""

    def __init__(self, rules: Rules) -> None:
        self.rules = rules
        self.aggregator = rules.aggregator()
        self.live: set[Worker] = set()
        self.absent: set[Worker] = set()
        self.left_behind: set[Worker] = set()
        self.formed = False
        self.base_steps: dict[Worker, int] = {}
        """Of which step the parameters are that a live worker has."""
        self.late: set[Worker] = set()
        """Live workers whose push came too late: they need parameters before they can begin another."""
        self.step = Step()
        self.commits = 0
        self.now = 0.0
        self.waited_since: float | None = None
        self.has_newcomer = False
        """Whether somebody waits for the open step's end to join."""
        self.script: list[str] = []

    # --- its account

    @property
    def here(self) -> set[Worker]:
        """The workers that have a place."""
        return self.live | self.absent

    @property
    def awaited(self) -> set[Worker]:
        """The workers that a step waits for."""
        return (self.live - self.left_behind) | self.absent

    @property
    def waited_for(self) -> bool:
        """Whether somebody waits for the open step's end who is not in it, to join or to be given parameters."""
        return self.has_newcomer or bool(self.late & self.live and self.step.applied)

    @property
    def is_timed(self) -> bool:
        """Whether the open step has to end though nobody does any more for it."""
        return bool(self.step.ended & self.live) or (
            self.waited_for and bool(self.step.begun) and self.rules.on_loss == "shrink"
        )

    def is_too_late(self, worker: Worker) -> bool:
        """Whether a push that a live worker begins now is not in the step."""
        shut = worker in self.left_behind and bool(self.step.applied)
        return self.base_steps[worker] != self.commits or shut

    def is_legal(self, kind: str, worker: Worker, bucket: int) -> bool:
        """Whether the protocol allows the event now."""
        step = self.step
        is_pushing = worker in (self.live & step.begun) - step.ended - step.torn
        match kind:
            case "join":
                return not any(_same_place(worker, other) for other in self.live) and self.may_join(worker)
            case "begin":
                return self.formed and worker in self.live - step.begun - self.late
            case "push":
                return is_pushing and worker not in step.pushed[bucket]
            case "end":
                return is_pushing
            case "skip" | "retract":
                return is_pushing and worker not in step.pushers()
            case "catch up":
                return worker in self.live & self.late and not step.applied
            case "newcomer":
                return bool(step.begun) and not self.has_newcomer
            case "tick":
                return True
            case _:
                return worker in self.live or (kind == "leave" and worker in self.absent)

    def may_join(self, worker: Worker) -> bool:
        """Whether a worker would not disturb the open step."""
        place = self.kept_place(worker)
        return not self.step.begun or any(worker == other or other not in self.step.ended for other in place)

    def kept_place(self, worker: Worker) -> set[Worker]:
        """The place that a worker would fill: its own, or else one of its rank."""
        own = {other for other in self.absent if other.worker_id == worker.worker_id}
        return own or {other for other in self.absent if other.rank == worker.rank}

    def _is_complete(self) -> bool:
        awaited, ended, rules = self.awaited, self.step.ended, self.rules
        if rules.backup_workers and rules.world_size is not None:
            return len(ended) >= max(1, min(rules.world_size - rules.backup_workers, len(awaited | ended)))
        return awaited <= ended

    def _account(self, kind: str, worker: Worker, bucket: int) -> set[Worker]:
        """Notes an event. Returns whose pushes it takes out of the step."""
        step = self.step
        match kind:
            case "join":
                replaced = self.kept_place(worker)
                self.absent -= replaced
                self.live.add(worker)
                self.base_steps[worker] = self.commits
                self.formed = self.formed or len(self.here) >= (self.rules.world_size or 1)
                return self._take_out(*(replaced & step.begun) - step.ended - {worker})
            case "begin" if self.is_too_late(worker):
                self.late.add(worker)
            case "begin":
                step.begun.add(worker)
                step.unanswered.add(worker)
                self.left_behind.discard(worker)
            case "push":
                step.pushed[bucket].add(worker)
                step.produced[worker].add(bucket)
                step.owed[worker].discard(bucket)
                step.held[bucket][worker] += 1
            case "end" if not step.owed[worker]:
                step.ended.add(worker)
            case "skip":
                step.ended.add(worker)
                step.skipped.add(worker)
                step.owed[worker].clear()
                step.produced[worker].clear()
            case "retract":
                step.begun.discard(worker)
                step.owed.pop(worker, None)
                step.produced.pop(worker, None)
            case "newcomer":
                self.has_newcomer = True
            case "catch up":
                self._catch_up(worker)
                self.left_behind.discard(worker)
            case "lose" if self.rules.on_loss == "wait":
                self._go(worker)
                self.absent.add(worker)
            case "leave" | "lose":
                self._go(worker)
                self.absent.discard(worker)
                self.formed = self.formed and bool(self.here)
                return self._drop(worker)
        return set()

    def _go(self, worker: Worker) -> None:
        self.live.discard(worker)
        self.left_behind.discard(worker)
        self.late.discard(worker)

    def _catch_up(self, worker: Worker) -> None:
        self.base_steps[worker] = self.commits
        self.late.discard(worker)

    def _drop(self, *workers: Worker) -> set[Worker]:
        """These workers will not complete their pushes, if they are at one."""
        step = self.step
        out = set[Worker]()
        for worker in workers:
            if worker in step.begun - step.ended - step.torn:
                if self.rules.streaming and worker in step.pushers():
                    step.torn.add(worker)
                else:
                    out |= self._take_out(worker)
        return out

    def _take_out(self, *workers: Worker) -> set[Worker]:
        """Nothing of these pushes counts, nor of those that cannot be told from them and cannot come again."""
        step, out = self.step, set[Worker]()
        queue = [*workers]
        while queue:
            worker = queue.pop()
            out.add(worker)
            step.begun.discard(worker)
            step.ended.discard(worker)
            step.owed.pop(worker, None)
            step.produced.pop(worker, None)
            for bucket, pushers in step.pushed.items():
                if worker in pushers:
                    pushers.discard(worker)
                    if not self.rules.separate:
                        for other in pushers:
                            step.owed[other].add(bucket)
                            step.ended.discard(other)
                            # Whoever waits does so for pushes that are made again: they have that time anew.
                            self.waited_since = None
                        pushers.clear()
            queue += {other for other, owed in step.owed.items() if owed and other not in self.here} - {*queue}
        return out

    # --- playing

    def attempt(self, kind: str, worker: Worker, bucket: int) -> list[Decision]:
        """Hands the event to the aggregator, legal or not."""
        match kind:
            case "join":
                return self.aggregator.join(worker)
            case "begin":
                assert self.aggregator.begin(worker, self.base_steps.get(worker, 0)) == (worker in self.step.begun)
            case "push":
                return self.aggregator.push(worker, bucket)
            case "end":
                return self.aggregator.end(worker)
            case "skip":
                return self.aggregator.end(worker, skipped=True)
            case "retract":
                return self.aggregator.retract(worker)
            case "catch up":
                self.aggregator.catch_up(worker)
            case "tick":
                return self.aggregator.tick(self.now, waited_for=self.waited_for)
            case "leave":
                return self.aggregator.leave(worker)
            case "lose":
                return self.aggregator.lose(worker)
        return []

    def choose(self, choice: int) -> Outcome:
        """Lets a legal event happen. The remainder of the choice by the number of kinds picks the kind."""
        wanted = KINDS[choice % len(KINDS)]
        legal = [event for event in events([wanted]) if self.is_legal(*event)]
        if legal:
            return self.play(*legal[choice // len(KINDS) % len(legal)])
        others = [*events(["begin", "push", "end", "join", "tick"])]
        start = choice % len(others)
        return self.play(*next(event for event in (*others[start:], *others[:start]) if self.is_legal(*event)))

    def play(self, kind: str, worker: Worker, bucket: int) -> Outcome:
        """Lets an event happen."""
        step = self.step
        begun_before, timed_inside = frozenset(step.begun), bool(step.ended & self.live)
        applied_before = frozenset(item.bucket_id for item in step.applied)
        self.now += PAUSES_S[bucket] if kind == "tick" else 0.0
        self.script.append(f"{kind} {worker.worker_id} {bucket}" if kind != "tick" else f"tick {self.now}")
        is_overdue = kind == "tick" and self.waited_since is not None and self.now >= self.waited_since + TIMEOUT_S
        missing = tuple(sorted(self.awaited - step.ended))
        out = self._account(kind, worker, bucket)
        if is_overdue:
            self.waited_since = None
            if self.rules.on_loss == "shrink":
                self.left_behind |= {*missing}
                out = self._drop(*missing)
        outcome = Outcome(
            kind,
            worker,
            step,
            begun_before,
            applied_before,
            missing,
            awaited=frozenset(self.awaited),
            is_complete=self._is_complete(),
            is_overdue=is_overdue,
            timed_inside=timed_inside,
            out=frozenset(out),
            decisions=self.attempt(kind, worker, bucket),
        )
        if kind == "retract":
            step.unanswered.discard(worker)
        self._carry_out(outcome)
        if not self.is_timed:
            self.waited_since = None
        elif self.waited_since is None:
            self.waited_since = self.now
        # The time is told whenever something has happened.
        assert self.aggregator.tick(self.now, waited_for=self.waited_for) == []
        return outcome

    def _carry_out(self, outcome: Outcome) -> None:
        step, separate = self.step, self.rules.separate
        for item in outcome.decisions:
            if isinstance(item, Discard):
                step.unanswered.discard(item.worker)
                if item.worker in self.live:
                    self.late.add(item.worker)
                for bucket in item.buckets:
                    if separate:
                        del step.held[bucket][item.worker]
                    else:
                        step.held[bucket].clear()
        for apply in outcome.buckets:
            held = step.held.pop(apply.bucket_id, Counter())
            shares = Counter({worker: held[worker] for worker in apply.contributors}) if separate else held
            step.applied.append(Applied(apply.bucket_id, apply.contributors, shares))
        if outcome.close is not None:
            if isinstance(outcome.close, Commit):
                self.commits += 1
                for worker in {*outcome.close.contributors, *outcome.close.skipped} & self.live:
                    self._catch_up(worker)
                self.late |= {*outcome.close.partial_contributors} & self.live
            if isinstance(outcome.close, Commit | Skip):
                self.late |= {*outcome.close.late}
            self.step, self.has_newcomer = Step(), False


def _same_place(one: Worker, other: Worker) -> bool:
    return one.rank == other.rank or one.worker_id == other.worker_id


def events(kinds: Iterable[str]) -> Iterable[tuple[str, Worker, int]]:
    """All events of `kinds`; the bucket counts for pushes only, and is how much time passes."""
    for kind in kinds:
        for worker in WORKERS[:1] if kind in {"tick", "newcomer"} else WORKERS:
            for bucket in BUCKETS if kind in {"push", "tick"} else BUCKETS[:1]:
                yield kind, worker, bucket


Check = Callable[[Simulation, Outcome], None]
MOST_CHOICES: Final = len(KINDS) * 12
several = settings(max_examples=100, deadline=None)
schedules = st.lists(st.integers(0, MOST_CHOICES - 1), min_size=20, max_size=60)


def play(schedule: list[int], rules: Rules, check: Check) -> Simulation:
    """Plays a schedule and checks what every event leads to. A schedule that fails is told event by event."""
    simulation = Simulation(rules)
    try:
        for choice in schedule:
            check(simulation, simulation.choose(choice))
    except AssertionError as error:
        error.add_note("\n".join([repr(rules), *simulation.script]))
        raise
    return simulation


def on_random_schedules(check: Check) -> Callable[[], None]:
    """Makes a test of what holds after every event."""

    def test(schedule: list[int], rules: Rules) -> None:
        play(schedule, rules, check)

    test.__name__, test.__doc__ = check.__name__, check.__doc__
    return several(given(schedule=schedules, rules=st.sampled_from(ALL_RULES))(test))


def test_random_schedules_reach_every_kind_of_end() -> None:
    """The properties below are about things that happen."""
    seen: Counter[tuple[str, str]] = Counter()
    dice = random.Random(0)

    def count(simulation: Simulation, outcome: Outcome) -> None:
        rules, close = simulation.rules, outcome.close
        mode = "streaming" if rules.streaming else "separate" if rules.separate else "summing"
        mode = f"{mode}, {rules.on_loss}" + ", backup" * (rules.backup_workers > 0)
        marks = {
            type(close).__name__: close is not None,
            "commit without workers": isinstance(close, Commit) and not simulation.here,
            "partial": isinstance(close, Commit) and bool(close.partial_contributors),
            "skipped beside others": isinstance(close, Commit) and bool(close.skipped),
            "late": isinstance(close, Commit) and bool(close.late),
            "closed by a loss": outcome.kind == "lose" and isinstance(close, Commit | Skip),
            "closed by time": outcome.is_overdue and isinstance(close, Commit | Skip),
            "closed by time for who waits outside": outcome.is_overdue
            and not outcome.timed_inside
            and close is not None,
            "left behind in a push": outcome.is_overdue and bool(outcome.out),
            "begun too late": outcome.kind == "begin" and outcome.worker not in outcome.step.begun,
            "owed": any(outcome.step.owed.values()),
            "a complete push out": len(outcome.out) > 1 and outcome.kind != "tick",
            "back in the step": outcome.kind == "join" and simulation.aggregator.has_begun(outcome.worker),
            "replaced in the step": outcome.kind == "join" and bool(outcome.out),
        }
        seen.update((mode, mark) for mark, holds in marks.items() if holds)

    for _ in range(1200):
        schedule = [dice.randrange(MOST_CHOICES) for _ in range(60)]
        play(schedule, dice.choice(ALL_RULES), count)
    of_shrinking = {"Commit", "Skip", "Abandon", "skipped beside others", "closed by a loss", "closed by time"}
    of_shrinking |= {"begun too late", "left behind in a push", "closed by time for who waits outside"}
    of_waiting = {"Commit", "Skip", "Abandon", "TimeOut", "skipped beside others"}
    of_waiting |= {"back in the step", "replaced in the step"}
    reached = {
        *(("streaming, shrink", mark) for mark in of_shrinking | {"partial", "commit without workers"}),
        *(("summing, shrink", mark) for mark in of_shrinking | {"owed", "a complete push out"}),
        *(("separate, shrink", mark) for mark in of_shrinking),
        *(("separate, shrink, backup", mark) for mark in of_shrinking | {"late"}),
        *(("summing, wait", mark) for mark in of_waiting | {"owed"}),
        *(("separate, wait", mark) for mark in of_waiting),
        *(("separate, wait, backup", mark) for mark in of_waiting | {"late", "begun too late"}),
    }
    assert reached - {event for event, times in seen.items() if times >= 3} == set()


# --- what is in a step


@on_random_schedules
def test_a_commit_names_exactly_those_whose_gradients_are_in(simulation: Simulation, outcome: Outcome) -> None:
    """Once each: of a full contributor all that it had, of a partial one something, of anybody else nothing."""
    if isinstance(outcome.close, Commit):
        step = outcome.step
        partial = {*outcome.close.partial_contributors}
        full = {*outcome.close.contributors} - partial
        assert partial <= {*outcome.close.contributors}
        parts = defaultdict[Worker, set[int]](set)
        for item in step.applied:
            for worker, times in item.shares.items():
                if times:
                    assert times == 1
                    parts[worker].add(item.bucket_id)
        assert parts.keys() <= full | partial
        assert all(parts[worker] == step.produced[worker] for worker in full)
        assert all(parts[worker] for worker in partial)


@on_random_schedules
def test_what_is_held_of_an_open_step_is_what_counts_of_it(simulation: Simulation, outcome: Outcome) -> None:
    """Each gradient once: those of discarded pushes are out, and those that are owed are not in yet."""
    step = outcome.step
    applied = {item.bucket_id for item in step.applied}
    if outcome.close is None:
        for bucket in BUCKETS:
            held = step.held[bucket]
            assert set(held) == (set() if bucket in applied else step.pushed[bucket])
            assert all(times == 1 for times in held.values())
    elif isinstance(outcome.close, Commit) and not simulation.rules.separate:
        # Sums are not looked through for what came too late: the next step would take them for its own.
        assert not any(step.held.values())


@on_random_schedules
def test_a_bucket_is_applied_at_most_once_a_step(simulation: Simulation, outcome: Outcome) -> None:
    """Whoever is lost when."""
    times = Counter(item.bucket_id for item in outcome.step.applied)
    assert all(count == 1 for count in times.values())


@on_random_schedules
def test_a_bucket_is_applied_only_when_it_is_complete(simulation: Simulation, outcome: Outcome) -> None:
    """Every worker that is waited for has pushed it or has ended without it; of atomic steps, all are complete."""
    for item in outcome.buckets:
        pushed = outcome.step.pushed[item.bucket_id]
        if simulation.rules.streaming:
            assert outcome.awaited <= pushed | outcome.step.ended
            assert pushed
        else:
            assert outcome.is_complete
            assert pushed & outcome.step.ended


@on_random_schedules
def test_the_contributors_of_a_bucket_have_pushed_it_or_ended(simulation: Simulation, outcome: Outcome) -> None:
    """All of them, torn pushes included, in order of rank: the mean divides by their number."""
    step = outcome.step
    for item in outcome.buckets:
        there = step.ended | (step.pushed[item.bucket_id] if simulation.rules.streaming else set())
        assert item.contributors == tuple(sorted(there - step.skipped))


@on_random_schedules
def test_no_complete_bucket_is_held_back(simulation: Simulation, outcome: Outcome) -> None:
    """It is applied by the very event that completes it; of atomic steps by the one that commits the step."""
    step, applied = outcome.step, {item.bucket_id for item in outcome.step.applied}
    counting = step.ended | step.torn
    if isinstance(outcome.close, Commit):
        assert applied == {bucket for bucket, pushed in step.pushed.items() if pushed & counting}
    elif outcome.close is None and simulation.rules.streaming:
        for bucket in {bucket for bucket, pushed in step.pushed.items() if pushed} - applied:
            assert not simulation.awaited <= step.pushed[bucket] | step.ended


@on_random_schedules
def test_atomic_steps_are_applied_whole_or_not_at_all(simulation: Simulation, outcome: Outcome) -> None:
    """Applications come right before the commit, in order of bucket id; what is discarded goes before."""
    buckets = [item.bucket_id for item in outcome.buckets]
    assert buckets == sorted(buckets)
    places = {Discard: 0, ApplyBucket: 1}
    order = [places.get(type(item), 2) for item in outcome.decisions]
    assert order == sorted(order)
    if not simulation.rules.streaming:
        assert not buckets or isinstance(outcome.close, Commit)
        assert not simulation.aggregator.has_applied


@on_random_schedules
def test_contributors_are_those_whose_push_is_complete_or_torn(simulation: Simulation, outcome: Outcome) -> None:
    """Torn pushes are of streamed steps only, and brought something."""
    step = outcome.step
    if isinstance(outcome.close, Commit):
        assert outcome.close.partial_contributors == tuple(sorted(step.torn))
        assert outcome.close.contributors == tuple(sorted(step.torn | (step.ended - step.skipped)))


@on_random_schedules
def test_no_step_is_committed_without_a_contributor(simulation: Simulation, outcome: Outcome) -> None:
    """And none that has one is skipped."""
    if isinstance(outcome.close, Commit):
        assert outcome.close.contributors
    if isinstance(outcome.close, Skip):
        assert outcome.step.ended == outcome.step.skipped
        assert not outcome.step.torn
        assert outcome.buckets == []
        assert outcome.close.step == simulation.commits
        assert outcome.close.pushes == tuple(sorted(outcome.step.skipped))


@on_random_schedules
def test_who_skips_is_no_contributor_of_the_step_or_of_any_bucket(simulation: Simulation, outcome: Outcome) -> None:
    """Whenever the bucket is applied: a mean is not divided by it."""
    skipped = outcome.step.skipped
    for item in outcome.step.applied:
        assert skipped.isdisjoint(item.contributors)
        assert item.contributors
    if isinstance(outcome.close, Commit):
        assert skipped.isdisjoint(outcome.close.contributors)
        assert outcome.close.skipped == tuple(sorted(skipped))


@on_random_schedules
def test_what_is_discarded_are_the_pushes_that_no_longer_count(simulation: Simulation, outcome: Outcome) -> None:
    """Nobody else's, once each, and all that they had brought."""
    discards = [item for item in outcome.decisions if isinstance(item, Discard)]
    assert Counter(item.worker for item in discards) == Counter(outcome.out)
    buckets = Counter(bucket for item in discards for bucket in item.buckets)
    assert not buckets.keys() & {item.bucket_id for item in outcome.step.applied if item.shares.keys() & outcome.out}


@on_random_schedules
def test_a_step_with_backups_is_made_of_the_first_complete_pushes(simulation: Simulation, outcome: Outcome) -> None:
    """As many as it needs, where there are as many workers; all others in it are named late."""
    step, rules = outcome.step, simulation.rules
    if isinstance(outcome.close, Commit | Skip):
        assert outcome.close.late == tuple(sorted((step.begun & simulation.live) - step.ended - step.torn))
        if not rules.backup_workers or rules.world_size is None:
            assert not outcome.close.late
        elif outcome.kind in {"end", "skip"}:
            assert len(step.ended) <= max(1, rules.world_size - rules.backup_workers)


# --- when a step ends


@on_random_schedules
def test_a_step_ends_when_it_is_complete_and_not_before(simulation: Simulation, outcome: Outcome) -> None:
    """With a commit or a skip."""
    if isinstance(outcome.close, Commit | Skip):
        assert outcome.is_complete
    if outcome.close is None and outcome.step.begun:
        assert not outcome.is_complete


@on_random_schedules
def test_a_step_is_abandoned_when_nobody_is_left_to_complete_it(simulation: Simulation, outcome: Outcome) -> None:
    """And nothing of it has been applied; else it is committed as it stands."""
    step = outcome.step
    nobody_here = not simulation.here and not outcome.applied_before
    over = bool(outcome.begun_before) and (not step.begun or nobody_here)
    if outcome.kind in {"leave", "lose", "join", "tick"}:
        assert isinstance(outcome.close, Abandon) == over
        if not simulation.here and outcome.begun_before:
            assert isinstance(outcome.close, Commit if outcome.applied_before else Abandon)
    if isinstance(outcome.close, Abandon):
        assert outcome.close.lost == tuple(sorted(outcome.begun_before))
        assert not outcome.buckets
        assert not outcome.applied_before


@on_random_schedules
def test_the_step_goes_up_by_one_with_each_commit(simulation: Simulation, outcome: Outcome) -> None:
    """And never otherwise. What ends a step is the last decision, and there is one such."""
    assert simulation.aggregator.step == simulation.commits
    if outcome.close is not None:
        assert outcome.decisions[-1] == outcome.close
    if isinstance(outcome.close, Commit):
        assert outcome.close.step == simulation.commits


@on_random_schedules
def test_every_push_is_answered_once(simulation: Simulation, outcome: Outcome) -> None:
    """By the end of its step, or by being discarded; only one that is lost amid its push may hear of it later."""
    discarded = [item.worker for item in outcome.decisions if isinstance(item, Discard)]
    assert {*discarded} <= outcome.begun_before
    match outcome.close:
        case Commit(contributors=contributors, skipped=skipped, late=late):
            answered = [*contributors, *skipped, *late]
        case Skip(pushes=pushes, late=late):
            answered = [*pushes, *late]
        case Abandon(lost=lost):
            answered = [worker for worker in lost if worker not in discarded]
        case TimeOut():
            answered = sorted(outcome.step.begun)
        case _:
            return
    assert len({*answered}) == len(answered)
    if outcome.kind != "retract":
        assert {*answered} <= outcome.step.unanswered
        assert outcome.step.unanswered - {*answered} <= simulation.absent
        assert outcome.step.ended <= {*answered}


# --- what the aggregator says of it


@on_random_schedules
def test_the_aggregator_knows_where_each_worker_stands(simulation: Simulation, outcome: Outcome) -> None:
    """In the open step, with what it has brought and what it owes."""
    aggregator, step = simulation.aggregator, simulation.step
    assert aggregator.live == simulation.live
    assert aggregator.is_open == bool(step.begun)
    assert aggregator.has_applied == bool(step.applied)
    assert aggregator.is_timed == bool(step.ended & simulation.live)
    for worker in WORKERS:
        assert aggregator.has_begun(worker) == (worker in step.begun - step.torn)
        assert aggregator.has_ended(worker) == (worker in step.ended)
        assert aggregator.owed(worker) == step.owed[worker]
        assert aggregator.may_join(worker) == simulation.may_join(worker)
        for bucket in BUCKETS:
            assert aggregator.holds(worker, bucket) == (worker in step.ended | step.pushed[bucket])


@on_random_schedules
def test_an_open_step_waits_for_somebody_and_says_for_whom(simulation: Simulation, outcome: Outcome) -> None:
    """For those that have not ended, but for those that were left behind."""
    missing = simulation.awaited - simulation.step.ended
    assert simulation.aggregator.missing() == tuple(sorted(missing))
    if simulation.step.begun:
        assert missing


@on_random_schedules
def test_only_pushes_that_are_at_hand_are_owed(simulation: Simulation, outcome: Outcome) -> None:
    """By workers that have a place and are not complete, of buckets that they have brought before."""
    for worker, owed in simulation.step.owed.items():
        if owed:
            assert not simulation.rules.separate
            assert worker in simulation.here
            assert not simulation.aggregator.has_ended(worker)
            assert simulation.aggregator.owed(worker) <= simulation.step.produced[worker]


@on_random_schedules
def test_a_job_is_formed_from_enough_workers_until_none_is_left(simulation: Simulation, outcome: Outcome) -> None:
    """Nobody begins a push outside of that."""
    assert simulation.aggregator.is_formed == simulation.formed
    if not simulation.formed:
        for worker in WORKERS:
            with pytest.raises(RuntimeError, match="cannot begin"):
                simulation.aggregator.begin(worker, simulation.aggregator.step)


@several
@given(schedule=schedules, rules=st.sampled_from(ALL_RULES))
def test_events_out_of_place_are_refused_and_leave_no_trace(schedule: list[int], rules: Rules) -> None:
    """The decisions that follow are those of an aggregator that never met them."""
    plain = Simulation(rules)
    choices = list(schedule)

    def refuses(simulation: Simulation, kind: str, worker: Worker, bucket: int) -> bool:
        step = simulation.step
        is_pushing = worker in (simulation.live & step.begun) - step.ended - step.torn
        match kind:
            case "join":
                return not simulation.may_join(worker)
            case "begin":
                return not simulation.formed or worker not in simulation.live - step.begun
            case "push":
                return not is_pushing or worker in step.pushed[bucket]
            case "end":
                return not is_pushing
            case _:
                return not is_pushing or worker in step.pushers()

    def check(simulation: Simulation, outcome: Outcome) -> None:
        assert outcome.decisions == plain.choose(choices.pop(0)).decisions
        for event in events(["join", "begin", "push", "end", "skip", "retract"]):
            if refuses(simulation, *event):
                with pytest.raises(RuntimeError, match=r"cannot|may not"):
                    simulation.attempt(*event)

    play(schedule, rules, check)


# --- that nobody waits for ever


@on_random_schedules
def test_time_decides_nothing_before_somebody_has_waited_for_long(simulation: Simulation, outcome: Outcome) -> None:
    """With a complete push, or for the step's end; and then it does, at the first look."""
    if outcome.kind == "tick":
        assert bool(outcome.decisions) == outcome.is_overdue


@on_random_schedules
def test_when_the_time_is_over_nobody_is_waited_for_but_those_that_push_again(
    simulation: Simulation, outcome: Outcome
) -> None:
    """Or else the step fails, and names all that it may not do without."""
    if outcome.is_overdue and simulation.rules.on_loss == "wait":
        assert outcome.decisions == [TimeOut(outcome.missing)]
    elif outcome.is_overdue and outcome.close is None:
        owing = {worker for worker, owed in outcome.step.owed.items() if owed}
        assert {*simulation.aggregator.missing()} <= owing


@settings(max_examples=400, deadline=None)
@given(schedule=schedules, rules=st.sampled_from(ALL_RULES), willing=st.sets(st.sampled_from(WORKERS), min_size=1))
def test_whoever_does_its_part_is_answered_in_time(schedule: list[int], rules: Rules, willing: set[Worker]) -> None:
    """Wherever a job stands: all others may be silent from then on, and the step ends once `timeout_s` is over.

    Where gradients are added up, silent workers may be asked to push again, one after the other; each has that long.
    """
    simulation = play(schedule, rules, lambda *_: None)
    open_step = simulation.step
    carry_on(simulation, willing)
    # Who has not a complete push to wait with either has no place or has to be told first where the job stands.
    assume(simulation.step is not open_step or open_step.ended & willing & simulation.live)
    push_again = not (rules.streaming or rules.separate or rules.on_loss == "wait")
    for _ in WORKERS if push_again else range(1):
        if simulation.step is open_step:
            simulation.play("tick", A, PAUSES_S.index(TIMEOUT_S))
            carry_on(simulation, willing)
    assert simulation.step is not open_step


@settings(max_examples=400, deadline=None)
@given(schedule=schedules, rules=st.sampled_from([rules for rules in ALL_RULES if rules.on_loss == "shrink"]))
def test_whoever_waits_for_the_end_of_a_step_that_it_is_not_in_sees_it_in_time(
    schedule: list[int], rules: Rules
) -> None:
    """Though all in it may be silent from then on. Those that are asked to push again meanwhile have as long, each."""
    simulation = play(schedule, rules, lambda *_: None)
    open_step = simulation.step
    assume(open_step.begun)
    if not simulation.has_newcomer:
        simulation.play("newcomer", A, 0)
    push_again = not (rules.streaming or rules.separate)
    for _ in WORKERS if push_again else range(1):
        if simulation.step is open_step:
            simulation.play("tick", A, PAUSES_S.index(TIMEOUT_S))
    assert simulation.step is not open_step


def carry_on(simulation: Simulation, willing: set[Worker]) -> None:
    """Lets live workers do all that they can do for the open step, until it ends or there is no more."""
    step, before = simulation.step, -1
    while simulation.step is step and len(simulation.script) != before:
        before = len(simulation.script)
        for worker in sorted(willing & simulation.live):
            todo = [("catch up", 0), ("begin", 0), *(("push", bucket) for bucket in sorted(step.owed[worker]))]
            for kind, bucket in (*todo, ("end", 0)):
                if simulation.step is step and simulation.is_legal(kind, worker, bucket):
                    simulation.play(kind, worker, bucket)
