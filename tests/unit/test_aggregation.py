"""Synchronous aggregation: by example, and on random schedules of joins, pushes, skipped ones and losses.

A schedule is a list of numbers, each of which picks one of the events that are legal at its time. `Simulation` keeps
its own account of who did what, against which the properties compare the aggregator's decisions.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Final

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optimd.server.aggregation import Abandon, ApplyBucket, Commit, Decision, Skip, SyncAggregator, Worker

A, B, C = (Worker(rank, f"host-{rank}") for rank in range(3))
BUCKETS: Final = (0, 1, 2)
KINDS: Final = ("join",) * 4 + ("begin",) * 4 + ("push",) * 7 + ("end",) * 2 + ("skip",) * 2 + ("leave",) * 3


def formed(*workers: Worker, streaming: bool, step: int = 0) -> SyncAggregator:
    """An aggregator in which all its workers have joined."""
    aggregator = SyncAggregator(world_size=len(workers), streaming=streaming, step=step)
    for worker in workers:
        aggregator.join(worker)
    return aggregator


def begun(*workers: Worker, streaming: bool) -> SyncAggregator:
    """An aggregator in which all its workers have begun a push."""
    aggregator = formed(*workers, streaming=streaming)
    for worker in workers:
        aggregator.begin(worker)
    return aggregator


# --- by example


def test_streaming_applies_a_bucket_with_its_last_push() -> None:
    """Each bucket on its own, whatever the order in which workers send them."""
    aggregator = begun(A, B, streaming=True)
    assert aggregator.push(A, 1) == []
    assert aggregator.push(B, 0) == []
    assert not aggregator.has_applied
    assert aggregator.push(B, 1) == [ApplyBucket(1, (A, B))]
    assert aggregator.has_applied
    assert aggregator.push(A, 0) == [ApplyBucket(0, (A, B))]
    assert aggregator.end(A) == []
    assert aggregator.end(B) == [Commit(1, (A, B), ())]


def test_streaming_applies_a_bucket_that_the_others_do_not_have_when_they_end() -> None:
    """A worker without a gradient for a bucket counts as zero, and is known to have none only at its end."""
    aggregator = begun(A, B, C, streaming=True)
    aggregator.push(B, 4)
    assert aggregator.end(A) == []
    assert aggregator.end(C) == [ApplyBucket(4, (A, B, C))]
    assert aggregator.end(B) == [Commit(1, (A, B, C), ())]


def test_a_sole_worker_s_buckets_are_applied_at_once() -> None:
    """With one worker nothing is ever waited for."""
    aggregator = begun(A, streaming=True)
    assert aggregator.push(A, 2) == [ApplyBucket(2, (A,))]
    assert aggregator.push(A, 0) == [ApplyBucket(0, (A,))]
    assert aggregator.end(A) == [Commit(1, (A,), ())]


def test_atomic_applies_everything_in_order_with_the_last_end() -> None:
    """Nothing before, and all buckets that anybody pushed, in order of id, then the commit."""
    aggregator = begun(A, B, streaming=False)
    for worker, bucket in ((A, 2), (B, 2), (A, 0), (B, 1)):
        assert aggregator.push(worker, bucket) == []
    assert aggregator.end(A) == []
    assert not aggregator.has_applied
    assert aggregator.end(B) == [
        ApplyBucket(0, (A, B)),
        ApplyBucket(1, (A, B)),
        ApplyBucket(2, (A, B)),
        Commit(1, (A, B), ()),
    ]


@pytest.mark.parametrize("streaming", [True, False])
def test_a_step_without_any_gradient_is_committed(*, streaming: bool) -> None:
    """As torch's step() with every .grad None is a step."""
    aggregator = begun(A, B, streaming=streaming)
    assert aggregator.end(B) == []
    assert aggregator.end(A) == [Commit(1, (A, B), ())]


@pytest.mark.parametrize("streaming", [True, False])
def test_steps_count_from_where_the_job_stands(*, streaming: bool) -> None:
    """A job that was loaded goes on with its count, one up with each commit."""
    aggregator = formed(A, streaming=streaming, step=41)
    for step in (42, 43, 44):
        aggregator.begin(A)
        assert aggregator.end(A) == [Commit(step, (A,), ())]
        assert aggregator.step == step


def test_a_bucket_may_be_pushed_again_in_the_next_step() -> None:
    """A commit forgets what was pushed and applied."""
    aggregator = formed(A, streaming=True)
    for _ in range(2):
        aggregator.begin(A)
        assert aggregator.push(A, 0) == [ApplyBucket(0, (A,))]
        aggregator.end(A)
        assert not aggregator.is_open
        assert not aggregator.has_applied


def test_a_worker_lost_in_its_push_stays_in_the_step_as_a_partial_contributor() -> None:
    """What it pushed counts, and the commit says that it was lost."""
    aggregator = begun(A, B, streaming=False)
    aggregator.push(B, 0)
    aggregator.push(A, 0)
    aggregator.push(A, 1)
    assert aggregator.leave(B) == []
    assert aggregator.end(A) == [ApplyBucket(0, (A, B)), ApplyBucket(1, (A,)), Commit(1, (A, B), (B,))]


def test_a_worker_lost_before_it_pushed_anything_is_no_contributor() -> None:
    """It has begun, but nothing of it is in the step."""
    aggregator = begun(A, B, streaming=False)
    aggregator.push(A, 0)
    assert aggregator.leave(B) == []
    assert aggregator.end(A) == [ApplyBucket(0, (A,)), Commit(1, (A,), ())]


def test_a_worker_that_leaves_after_its_end_is_a_full_contributor() -> None:
    """All that it had is in."""
    aggregator = begun(A, B, streaming=False)
    aggregator.push(B, 0)
    aggregator.end(B)
    assert aggregator.leave(B) == []
    assert aggregator.end(A) == [ApplyBucket(0, (A, B)), Commit(1, (A, B), ())]


@pytest.mark.parametrize("streaming", [True, False])
def test_the_others_go_on_at_once_when_the_one_they_wait_for_is_lost(*, streaming: bool) -> None:
    """The loss itself completes the step."""
    aggregator = begun(A, B, C, streaming=streaming)
    aggregator.push(A, 3)
    aggregator.end(A)
    aggregator.end(C)
    assert aggregator.missing() == (B,)
    assert aggregator.leave(B) == [ApplyBucket(3, (A, C)), Commit(1, (A, C), ())]
    assert aggregator.missing() == (A, C)


def test_a_loss_completes_the_buckets_that_waited_for_the_lost_worker() -> None:
    """In streaming mode those of all the others go out, though nobody has ended."""
    aggregator = begun(A, B, C, streaming=True)
    for worker, bucket in ((A, 0), (B, 0), (A, 1), (B, 2), (C, 2), (B, 5), (A, 5)):
        aggregator.push(worker, bucket)
    assert aggregator.leave(C) == [ApplyBucket(0, (A, B)), ApplyBucket(5, (A, B))]


@pytest.mark.parametrize("streaming", [True, False])
def test_a_step_that_all_leave_before_anything_is_applied_is_abandoned(*, streaming: bool) -> None:
    """Its gradients are forgotten, and the count does not move."""
    aggregator = begun(A, B, streaming=streaming)
    aggregator.push(A, 0)
    assert aggregator.leave(A) == []
    assert aggregator.leave(B) == [Abandon((A, B))]
    assert aggregator.step == 0
    assert not aggregator.is_open


def test_a_streaming_step_that_all_leave_midway_is_committed_as_it_stands() -> None:
    """What was applied cannot be taken back."""
    aggregator = begun(A, B, streaming=True)
    aggregator.push(A, 0)
    aggregator.push(A, 1)
    assert aggregator.push(B, 0) == [ApplyBucket(0, (A, B))]
    assert aggregator.leave(B) == [ApplyBucket(1, (A,))]
    assert aggregator.leave(A) == [Commit(1, (A, B), (A, B))]
    assert not aggregator.is_open


def test_a_step_closed_without_workers_names_only_those_whose_gradients_are_in() -> None:
    """A push of which nothing was applied is not in the step, whose ever it was."""
    aggregator = begun(A, B, streaming=True)
    aggregator.push(A, 0)
    decisions = aggregator.leave(A) + aggregator.push(B, 1) + aggregator.leave(B)
    applied = {worker for item in decisions if isinstance(item, ApplyBucket) for worker in item.contributors}
    (commit,) = (item for item in decisions if isinstance(item, Commit))
    assert set(commit.contributors) == applied


def test_a_step_closed_without_workers_has_no_full_contributor_whose_pushes_are_missing() -> None:
    """Who ended its push and left is named without a reserve only if all that it pushed is applied."""
    aggregator = begun(A, B, streaming=True)
    aggregator.push(A, 0)
    aggregator.end(A)
    decisions = aggregator.leave(A) + aggregator.push(B, 1) + aggregator.leave(B)
    applied = {item.bucket_id for item in decisions if isinstance(item, ApplyBucket)}
    (commit,) = (item for item in decisions if isinstance(item, Commit))
    assert 0 in applied or A in commit.partial_contributors or A not in commit.contributors


def test_an_abandoned_step_leaves_no_trace_in_the_next() -> None:
    """Workers that come back push the same buckets afresh."""
    aggregator = begun(A, B, streaming=False)
    aggregator.push(A, 0)
    aggregator.leave(A)
    assert aggregator.leave(B) == [Abandon((A, B))]
    assert aggregator.step == 0
    for worker in (A, B):
        aggregator.join(worker)
    for worker in (A, B):
        aggregator.begin(worker)
    aggregator.push(B, 0)
    aggregator.end(A)
    assert aggregator.end(B) == [ApplyBucket(0, (A, B)), Commit(1, (A, B), ())]


def test_nobody_begins_before_all_have_joined() -> None:
    """The first step waits for `world_size` workers."""
    aggregator = SyncAggregator(world_size=2, streaming=True)
    aggregator.join(A)
    assert not aggregator.is_formed
    with pytest.raises(RuntimeError, match="cannot begin"):
        aggregator.begin(A)
    aggregator.join(B)
    assert aggregator.is_formed
    aggregator.begin(A)
    assert aggregator.is_open


def test_a_formed_job_goes_on_with_fewer() -> None:
    """A loss lowers the count of those waited for, in the steps that follow too."""
    aggregator = formed(A, B, C, streaming=False)
    aggregator.leave(B)
    assert aggregator.is_formed
    assert aggregator.live == {A, C}
    aggregator.begin(C)
    aggregator.begin(A)
    aggregator.end(A)
    assert aggregator.end(C) == [Commit(1, (A, C), ())]


def test_when_all_have_left_the_next_step_waits_for_all_again() -> None:
    """A job that is started anew is formed anew."""
    aggregator = formed(A, B, streaming=True)
    assert aggregator.leave(A) == []
    assert aggregator.leave(B) == []
    assert not aggregator.is_formed
    aggregator.join(B)
    with pytest.raises(RuntimeError, match="cannot begin"):
        aggregator.begin(B)
    aggregator.join(A)
    aggregator.begin(B)
    assert aggregator.is_open


def test_nobody_joins_in_the_middle_of_a_step() -> None:
    """A newcomer counts from the next step on."""
    aggregator = formed(A, streaming=True)
    aggregator.begin(A)
    with pytest.raises(RuntimeError, match="may not join"):
        aggregator.join(B)
    assert aggregator.live == {A}
    aggregator.end(A)
    aggregator.join(B)
    assert aggregator.missing() == (A, B)


def test_a_worker_that_is_unknown_may_leave() -> None:
    """A stream that ends before it was admitted changes nothing."""
    aggregator = begun(A, streaming=True)
    assert aggregator.leave(B) == []
    assert aggregator.is_open
    assert aggregator.missing() == (A,)


def test_workers_are_named_in_order_of_rank() -> None:
    """Not in that of their arrival, nor of their ids."""
    first, second = Worker(0, "zebra"), Worker(1, "ant")
    aggregator = begun(second, first, streaming=False)
    assert aggregator.missing() == (first, second)
    aggregator.push(second, 0)
    aggregator.end(second)
    assert aggregator.end(first) == [ApplyBucket(0, (first, second)), Commit(1, (first, second), ())]


# --- skipped pushes


@pytest.mark.parametrize("streaming", [True, False])
def test_a_skipped_push_leaves_the_step_to_the_others(*, streaming: bool) -> None:
    """Its worker is waited for like any other, is no contributor, and is named beside them."""
    aggregator = begun(A, B, C, streaming=streaming)
    assert aggregator.end(B, skipped=True) == []
    aggregator.push(A, 0)
    aggregator.end(A)
    assert aggregator.missing() == (C,)
    assert aggregator.end(C) == [ApplyBucket(0, (A, C)), Commit(1, (A, C), (), (B,))]
    assert not aggregator.is_open


def test_streaming_does_not_wait_for_buckets_of_a_skipped_push() -> None:
    """A bucket that waited for it goes out with its end, and later ones at once."""
    aggregator = begun(A, B, streaming=True)
    assert aggregator.push(A, 3) == []
    assert aggregator.end(B, skipped=True) == [ApplyBucket(3, (A,))]
    assert aggregator.push(A, 1) == [ApplyBucket(1, (A,))]
    assert aggregator.end(A) == [Commit(1, (A,), (), (B,))]


def test_a_worker_without_gradients_that_does_not_skip_is_a_contributor() -> None:
    """It counts as zero in a mean; who skips does not count."""
    aggregator = begun(A, B, C, streaming=False)
    aggregator.push(A, 0)
    for worker, skipped in ((A, False), (B, False)):
        aggregator.end(worker, skipped=skipped)
    assert aggregator.end(C, skipped=True) == [ApplyBucket(0, (A, B)), Commit(1, (A, B), (), (C,))]


@pytest.mark.parametrize("streaming", [True, False])
def test_a_step_that_all_skip_is_answered_and_not_counted(*, streaming: bool) -> None:
    """There is nothing to commit; the next step has the same number."""
    aggregator = begun(A, B, streaming=streaming)
    assert aggregator.end(B, skipped=True) == []
    assert aggregator.end(A, skipped=True) == [Skip(0, (A, B))]
    assert aggregator.step == 0
    assert not aggregator.is_open
    for worker in (A, B):
        aggregator.begin(worker)
        decisions = aggregator.end(worker)
    assert decisions == [Commit(1, (A, B), ())]


@pytest.mark.parametrize("streaming", [True, False])
def test_a_skip_does_not_outlive_its_step(*, streaming: bool) -> None:
    """Whoever skipped one step contributes to the next."""
    aggregator = formed(A, B, streaming=streaming)
    for step, skipped in ((1, True), (2, False)):
        for worker in (A, B):
            aggregator.begin(worker)
        aggregator.end(A, skipped=skipped)
        aggregator.push(B, 0)
        decisions = aggregator.end(B)
        contributors = (B,) if skipped else (A, B)
        assert decisions[-1] == Commit(step, contributors, (), (A,) if skipped else ())


def test_gradients_of_a_lost_worker_are_committed_though_all_others_skip() -> None:
    """They are in the step, as a partial contribution."""
    aggregator = begun(A, B, streaming=False)
    aggregator.push(B, 2)
    assert aggregator.leave(B) == []
    assert aggregator.end(A, skipped=True) == [ApplyBucket(2, (B,)), Commit(1, (B,), (B,), (A,))]


def test_a_worker_that_skips_and_leaves_is_answered_with_the_step() -> None:
    """Its push is over, and its next one has the next number."""
    aggregator = begun(A, B, streaming=True)
    aggregator.end(A, skipped=True)
    assert aggregator.leave(A) == []
    assert aggregator.push(B, 0) == [ApplyBucket(0, (B,))]
    assert aggregator.end(B) == [Commit(1, (B,), (), (A,))]
    aggregator = begun(A, B, streaming=True)
    aggregator.end(A, skipped=True)
    aggregator.leave(A)
    assert aggregator.end(B, skipped=True) == [Skip(0, (A, B))]


@pytest.mark.parametrize("streaming", [True, False])
def test_a_loss_ends_a_step_that_all_others_skipped(*, streaming: bool) -> None:
    """Nobody waits for the one that had nothing yet."""
    aggregator = begun(A, B, C, streaming=streaming)
    aggregator.end(A, skipped=True)
    aggregator.end(C, skipped=True)
    assert aggregator.leave(B) == [Skip(0, (A, C))]


def test_a_push_that_has_brought_a_bucket_cannot_be_skipped() -> None:
    """What is applied cannot be taken back; the push goes on."""
    aggregator = begun(A, B, streaming=False)
    aggregator.push(A, 0)
    with pytest.raises(RuntimeError, match="cannot end"):
        aggregator.end(A, skipped=True)
    aggregator.push(A, 1)
    aggregator.end(B, skipped=True)
    with pytest.raises(RuntimeError, match="cannot push"):
        aggregator.push(B, 0)
    assert aggregator.end(A) == [ApplyBucket(0, (A,)), ApplyBucket(1, (A,)), Commit(1, (A,), (), (B,))]


# --- on random schedules


@dataclass
class Step:
    """What happened in one step, by the simulation's own account."""

    begun: set[Worker] = field(default_factory=set)
    ended: set[Worker] = field(default_factory=set)
    skipped: set[Worker] = field(default_factory=set)
    lost: set[Worker] = field(default_factory=set)
    pushed: dict[int, set[Worker]] = field(default_factory=dict)
    applied: list[ApplyBucket] = field(default_factory=list)

    def pushers(self, buckets: Iterable[int]) -> set[Worker]:
        """Who has pushed any of `buckets`."""
        return set().union(*(self.pushed[bucket] for bucket in buckets))


@dataclass(frozen=True)
class Outcome:
    """An event, the step that it belongs to as it stands after it, and what the aggregator decided."""

    kind: str
    worker: Worker
    bucket: int
    step: Step
    decisions: list[Decision]

    @property
    def close(self) -> Commit | Abandon | Skip | None:
        """The decision that ended the step, if one did."""
        return next((item for item in self.decisions if not isinstance(item, ApplyBucket)), None)


class Simulation:
    """Plays a schedule and keeps account."""

    def __init__(self, *, world_size: int, streaming: bool) -> None:
        self.world_size = world_size
        self.streaming = streaming
        self.aggregator = SyncAggregator(world_size=world_size, streaming=streaming)
        self.live: set[Worker] = set()
        self.formed = False
        self.step = Step()
        self.commits = 0

    def is_legal(self, kind: str, worker: Worker, bucket: int) -> bool:
        """Whether the protocol allows the event now."""
        in_push = worker in self.step.begun - self.step.ended - self.step.lost
        match kind:
            case "join":
                return worker not in self.live and not self.step.begun
            case "begin":
                return self.formed and worker in self.live - self.step.begun
            case "push":
                return in_push and worker not in self.step.pushed.get(bucket, ())
            case "end":
                return in_push
            case "skip":
                return in_push and worker not in self.step.pushers(self.step.pushed)
            case _:
                return worker in self.live

    def attempt(self, kind: str, worker: Worker, bucket: int) -> list[Decision]:
        """Hands the event to the aggregator, legal or not."""
        match kind:
            case "join":
                self.aggregator.join(worker)
                return []
            case "begin":
                self.aggregator.begin(worker)
                return []
            case "push":
                return self.aggregator.push(worker, bucket)
            case "end":
                return self.aggregator.end(worker)
            case "skip":
                return self.aggregator.end(worker, skipped=True)
            case _:
                return self.aggregator.leave(worker)

    def play(self, choice: int) -> Outcome | None:
        """Lets a legal event happen; None where there is none. The remainder of the choice by 22 picks the kind."""
        wanted = KINDS[choice % len(KINDS)]
        legal = [event for event in events([wanted]) if self.is_legal(*event)]
        legal = legal or [event for event in events(["join", "begin", "push", "end"]) if self.is_legal(*event)]
        if not legal:
            return None
        kind, worker, bucket = legal[choice // len(KINDS) % len(legal)]
        self._account(kind, worker, bucket)
        step = self.step
        decisions = self.attempt(kind, worker, bucket)
        step.applied += [item for item in decisions if isinstance(item, ApplyBucket)]
        outcome = Outcome(kind, worker, bucket, step, decisions)
        self.commits += isinstance(outcome.close, Commit)
        if outcome.close is not None:
            self.step = Step()
        return outcome

    def _account(self, kind: str, worker: Worker, bucket: int) -> None:
        match kind:
            case "join":
                self.live.add(worker)
                self.formed = self.formed or len(self.live) == self.world_size
            case "begin":
                self.step.begun.add(worker)
            case "push":
                self.step.pushed.setdefault(bucket, set()).add(worker)
            case "end":
                self.step.ended.add(worker)
            case "skip":
                self.step.ended.add(worker)
                self.step.skipped.add(worker)
            case _:
                self.live.discard(worker)
                self.formed = self.formed and bool(self.live)
                if worker in self.step.begun - self.step.ended:
                    self.step.lost.add(worker)


def events(kinds: Iterable[str]) -> Iterable[tuple[str, Worker, int]]:
    """All events of `kinds`; the bucket counts for pushes only."""
    for kind in kinds:
        for worker in (A, B, C):
            for bucket in BUCKETS if kind == "push" else BUCKETS[:1]:
                yield kind, worker, bucket


Check = Callable[[Simulation, Outcome], None]


def play(schedule: list[int], check: Check, *, world_size: int, streaming: bool) -> None:
    """Plays a schedule and checks what every event leads to."""
    simulation = Simulation(world_size=world_size, streaming=streaming)
    for choice in schedule:
        outcome = simulation.play(choice)
        if outcome is not None:
            check(simulation, outcome)


schedules = given(
    schedule=st.lists(st.integers(0, 395), min_size=20, max_size=60),
    world_size=st.integers(1, 3),
    streaming=st.booleans(),
)
several = settings(max_examples=100, deadline=None)


def test_random_schedules_reach_every_kind_of_end() -> None:
    """The properties below are about things that happen."""
    seen: Counter[tuple[bool, str]] = Counter()
    dice = random.Random(0)

    def count(simulation: Simulation, outcome: Outcome) -> None:
        survived = "with survivors" if simulation.live else "without workers"
        if isinstance(outcome.close, Commit):
            seen[simulation.streaming, f"commit {survived}"] += 1
            seen[simulation.streaming, "partial"] += bool(outcome.close.partial_contributors)
            seen[simulation.streaming, "commit with skipped pushes"] += bool(outcome.close.skipped)
        if isinstance(outcome.close, Skip):
            seen[simulation.streaming, f"skip by {outcome.kind}"] += 1
        if isinstance(outcome.close, Abandon):
            seen[simulation.streaming, "abandon"] += 1
        seen[simulation.streaming, "applied by a loss"] += outcome.kind == "leave" and bool(outcome.step.applied)

    for _ in range(400):
        schedule = [dice.randrange(396) for _ in range(60)]
        play(schedule, count, world_size=dice.randint(1, 3), streaming=dice.random() < 0.5)
    assert {event for event, times in seen.items() if times >= 5} == {
        (True, "commit with survivors"),
        (True, "commit without workers"),
        (True, "partial"),
        (True, "commit with skipped pushes"),
        (True, "skip by skip"),
        (True, "skip by leave"),
        (True, "abandon"),
        (True, "applied by a loss"),
        (False, "commit with survivors"),
        (False, "partial"),
        (False, "commit with skipped pushes"),
        (False, "skip by skip"),
        (False, "skip by leave"),
        (False, "abandon"),
        (False, "applied by a loss"),
    }


@several
@schedules
def test_a_bucket_is_applied_at_most_once_a_step(schedule: list[int], *, world_size: int, streaming: bool) -> None:
    """Whoever is lost when."""

    def check(_: Simulation, outcome: Outcome) -> None:
        times = Counter(item.bucket_id for item in outcome.step.applied)
        assert all(count == 1 for count in times.values())

    play(schedule, check, world_size=world_size, streaming=streaming)


@several
@schedules
def test_a_bucket_is_applied_only_when_it_is_complete(schedule: list[int], *, world_size: int, streaming: bool) -> None:
    """Every live worker has pushed it or has ended without it; in atomic mode every live worker has ended."""

    def check(simulation: Simulation, outcome: Outcome) -> None:
        for item in outcome.decisions:
            if isinstance(item, ApplyBucket):
                there = (
                    outcome.step.ended if not streaming else outcome.step.ended | outcome.step.pushed[item.bucket_id]
                )
                assert simulation.live <= there
                assert outcome.step.pushed[item.bucket_id]

    play(schedule, check, world_size=world_size, streaming=streaming)


@several
@schedules
def test_the_contributors_of_a_bucket_have_pushed_it_or_ended(
    schedule: list[int], *, world_size: int, streaming: bool
) -> None:
    """All of them, lost ones included, in order of rank: the mean divides by their number."""

    def check(_: Simulation, outcome: Outcome) -> None:
        for item in outcome.decisions:
            if isinstance(item, ApplyBucket):
                expected = (outcome.step.pushed[item.bucket_id] | outcome.step.ended) - outcome.step.skipped
                assert item.contributors == tuple(sorted(expected))

    play(schedule, check, world_size=world_size, streaming=streaming)


@several
@schedules
def test_no_complete_bucket_is_held_back_in_streaming_mode(
    schedule: list[int], *, world_size: int, streaming: bool
) -> None:
    """It is applied by the very event that completes it; in atomic mode by the one that commits the step."""

    def check(simulation: Simulation, outcome: Outcome) -> None:
        applied = {item.bucket_id for item in outcome.step.applied}
        if outcome.close is not None and simulation.live:
            assert applied == set(outcome.step.pushed)
        elif outcome.close is None and streaming:
            for bucket in set(outcome.step.pushed) - applied:
                assert not simulation.live <= outcome.step.pushed[bucket] | outcome.step.ended

    play(schedule, check, world_size=world_size, streaming=streaming)


@several
@schedules
def test_atomic_steps_are_applied_whole_or_not_at_all(schedule: list[int], *, world_size: int, streaming: bool) -> None:
    """Applications come right before the commit, in order of bucket id."""

    def check(simulation: Simulation, outcome: Outcome) -> None:
        buckets = [item.bucket_id for item in outcome.decisions if isinstance(item, ApplyBucket)]
        assert buckets == sorted(buckets)
        if not streaming:
            assert not buckets or isinstance(outcome.decisions[-1], Commit)
            assert not simulation.aggregator.has_applied

    play(schedule, check, world_size=world_size, streaming=streaming)


@several
@schedules
def test_the_step_goes_up_by_one_with_each_commit(schedule: list[int], *, world_size: int, streaming: bool) -> None:
    """And never otherwise. A commit is the last decision, and closes the step."""

    def check(simulation: Simulation, outcome: Outcome) -> None:
        assert simulation.aggregator.step == simulation.commits
        assert simulation.aggregator.is_open == bool(simulation.step.begun)
        assert simulation.aggregator.has_applied == bool(simulation.step.applied)
        if isinstance(outcome.close, Commit):
            assert outcome.decisions[-1] == outcome.close
            assert outcome.close.step == simulation.commits

    play(schedule, check, world_size=world_size, streaming=streaming)


@several
@schedules
def test_nobody_waits_when_all_live_workers_have_ended(
    schedule: list[int], *, world_size: int, streaming: bool
) -> None:
    """An open step waits for a live worker that has not ended, and says for which."""

    def check(simulation: Simulation, _: Outcome) -> None:
        waited_for = simulation.live - simulation.step.ended
        assert simulation.aggregator.missing() == tuple(sorted(waited_for))
        if simulation.step.begun:
            assert waited_for

    play(schedule, check, world_size=world_size, streaming=streaming)


@several
@schedules
def test_lost_workers_are_partial_contributors_if_they_had_pushed(
    schedule: list[int], *, world_size: int, streaming: bool
) -> None:
    """Where others complete the step: those lost with a push, and no one else; full ones are those that ended."""

    def check(simulation: Simulation, outcome: Outcome) -> None:
        if isinstance(outcome.close, Commit) and simulation.live:
            partial = outcome.step.lost & outcome.step.pushers(outcome.step.pushed)
            assert outcome.close.partial_contributors == tuple(sorted(partial))
            assert outcome.close.contributors == tuple(sorted(partial | (outcome.step.ended - outcome.step.skipped)))

    play(schedule, check, world_size=world_size, streaming=streaming)


@several
@schedules
def test_a_commit_names_exactly_those_whose_gradients_are_in(
    schedule: list[int], *, world_size: int, streaming: bool
) -> None:
    """Of a full contributor all that it pushed is applied, of a partial one something, of anybody else nothing."""

    def check(_: Simulation, outcome: Outcome) -> None:
        if isinstance(outcome.close, Commit):
            step = outcome.step
            applied = {item.bucket_id for item in step.applied}
            partial = set(outcome.close.partial_contributors)
            full = set(outcome.close.contributors) - partial
            assert partial <= set(outcome.close.contributors)
            assert step.pushers(applied) <= partial | full
            assert partial <= step.pushers(applied)
            assert not full & step.pushers(set(step.pushed) - applied)

    play(schedule, check, world_size=world_size, streaming=streaming)


@several
@schedules
def test_the_last_to_leave_closes_the_step(schedule: list[int], *, world_size: int, streaming: bool) -> None:
    """With a commit if anything was applied, else with an abandonment."""

    def check(simulation: Simulation, outcome: Outcome) -> None:
        if simulation.live:
            assert not isinstance(outcome.close, Abandon) or not any(outcome.step.pushed.values())
        elif not outcome.step.begun:
            assert outcome.decisions == []
        elif outcome.step.applied:
            assert isinstance(outcome.close, Commit)
        else:
            (abandon,) = outcome.decisions
            assert isinstance(abandon, Abandon)
            assert set(abandon.lost) <= outcome.step.begun

    play(schedule, check, world_size=world_size, streaming=streaming)


@several
@schedules
def test_a_job_is_formed_from_enough_workers_until_none_is_left(
    schedule: list[int], *, world_size: int, streaming: bool
) -> None:
    """Nobody begins a push outside of that."""

    def check(simulation: Simulation, _: Outcome) -> None:
        assert simulation.aggregator.is_formed == simulation.formed
        assert simulation.aggregator.live == simulation.live
        if not simulation.formed:
            for worker in (A, B, C):
                with pytest.raises(RuntimeError, match="cannot begin"):
                    simulation.aggregator.begin(worker)

    play(schedule, check, world_size=world_size, streaming=streaming)


@several
@schedules
def test_events_out_of_place_are_refused_and_leave_no_trace(
    schedule: list[int], *, world_size: int, streaming: bool
) -> None:
    """The decisions that follow are those of an aggregator that never met them."""
    plain = Simulation(world_size=world_size, streaming=streaming)

    def check(simulation: Simulation, outcome: Outcome) -> None:
        expected = plain.play(choices.pop(0))
        assert expected is not None
        assert outcome.decisions == expected.decisions
        for event in events(["begin", "push", "end", "skip"]):
            if not simulation.is_legal(*event):
                with pytest.raises(RuntimeError, match="cannot"):
                    simulation.attempt(*event)
        if simulation.step.begun:
            with pytest.raises(RuntimeError, match="may not join"):
                simulation.aggregator.join(C)

    choices = list(schedule)
    play(schedule, check, world_size=world_size, streaming=streaming)


@several
@schedules
def test_no_step_is_committed_without_a_contributor(schedule: list[int], *, world_size: int, streaming: bool) -> None:
    """And none that has one is skipped."""

    def check(simulation: Simulation, outcome: Outcome) -> None:
        step = outcome.step
        given = (step.ended - step.skipped) | (step.lost & step.pushers(step.pushed))
        if isinstance(outcome.close, Commit):
            assert outcome.close.contributors
        if isinstance(outcome.close, Skip):
            assert not given
            assert outcome.decisions == [outcome.close]
            assert outcome.close.step == simulation.commits

    play(schedule, check, world_size=world_size, streaming=streaming)


@several
@schedules
def test_who_skips_is_no_contributor_of_the_step_or_of_any_bucket(
    schedule: list[int], *, world_size: int, streaming: bool
) -> None:
    """Whenever the bucket is applied: a mean is not divided by it."""

    def check(_: Simulation, outcome: Outcome) -> None:
        skipped = outcome.step.skipped
        for item in outcome.step.applied:
            assert skipped.isdisjoint(item.contributors)
            assert item.contributors
        if isinstance(outcome.close, Commit):
            assert skipped.isdisjoint(outcome.close.contributors)
            assert outcome.close.skipped == tuple(sorted(skipped))

    play(schedule, check, world_size=world_size, streaming=streaming)


@several
@schedules
def test_every_push_that_ended_is_answered_by_the_end_of_its_step(
    schedule: list[int], *, world_size: int, streaming: bool
) -> None:
    """By its commit, its skip or its abandonment, once, whatever became of its worker."""

    def check(_: Simulation, outcome: Outcome) -> None:
        match outcome.close:
            case Commit(contributors=contributors, skipped=skipped):
                answered = [*contributors, *skipped]
            case Skip(pushes=pushes):
                answered = [*pushes]
            case Abandon(lost=lost):
                answered = [*lost]
            case _:
                return
        assert len(set(answered)) == len(answered)
        assert set(answered) <= outcome.step.begun
        assert outcome.step.ended <= set(answered)
        if isinstance(outcome.close, Skip):
            assert answered == sorted(outcome.step.ended)

    play(schedule, check, world_size=world_size, streaming=streaming)
