"""Asynchronous aggregation and bounded staleness: by example, and on random schedules.

`Simulation` keeps its own account of clocks, of who is waited for and of who waits, with which the properties compare
the aggregator's decisions.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optimd.server.aggregation import Abandon, ApplyBucket, Commit, Decision, Release, Skip, Worker
from optimd.server.staleness import AsyncAggregator

A, B, C = (Worker(rank, f"host-{rank}") for rank in range(3))


def joined(
    *workers: Worker, max_staleness: int | None = None, streaming: bool = False, timeout_s: float = math.inf
) -> AsyncAggregator:
    """An aggregator in which all its workers have joined."""
    aggregator = AsyncAggregator(max_staleness=max_staleness, streaming=streaming, timeout_s=timeout_s)
    for worker in workers:
        aggregator.join(worker)
    return aggregator


def push(aggregator: AsyncAggregator, worker: Worker, *, skipped: bool = False) -> list[Decision]:
    """A whole push without a bucket."""
    aggregator.begin(worker, aggregator.step)
    return aggregator.end(worker, skipped=skipped)


def released(decisions: list[Decision]) -> list[Worker]:
    """Whom decisions release."""
    return [worker for decision in decisions if isinstance(decision, Release) for worker in decision.workers]


# --- pushes


def test_each_push_is_a_step_of_its_own() -> None:
    """Committed when it is complete, in the order of the ends, and its worker is given parameters at once."""
    aggregator = joined(A, B)
    for worker in (A, B):
        assert aggregator.begin(worker, 0)
    assert aggregator.end(B) == [Commit(1, (B,)), Release((B,))]
    assert aggregator.is_open
    assert aggregator.end(A) == [Commit(2, (A,)), Release((A,))]
    assert not aggregator.is_open
    assert aggregator.step == 2


def test_steps_count_from_where_the_job_stands() -> None:
    """A job that was loaded goes on with its count."""
    aggregator = AsyncAggregator(max_staleness=None, streaming=False, step=41)
    aggregator.join(A)
    assert push(aggregator, A) == [Commit(42, (A,)), Release((A,))]


def test_streaming_applies_a_bucket_as_it_comes() -> None:
    """Whatever others are at."""
    aggregator = joined(A, B, streaming=True)
    for worker in (A, B):
        aggregator.begin(worker, 0)
    assert aggregator.push(A, 1) == [ApplyBucket(1, (A,))]
    assert aggregator.push(B, 1) == [ApplyBucket(1, (B,))]
    assert aggregator.push(A, 0) == [ApplyBucket(0, (A,))]
    assert aggregator.has_applied
    assert aggregator.end(A) == [Commit(1, (A,)), Release((A,))]
    assert aggregator.end(B) == [Commit(2, (B,)), Release((B,))]
    assert not aggregator.has_applied


def test_atomic_pushes_are_applied_with_their_end() -> None:
    """All of their buckets, in order of id, and nobody else's."""
    aggregator = joined(A, B)
    for worker in (A, B):
        aggregator.begin(worker, 0)
    for worker, bucket in ((A, 2), (B, 1), (A, 0)):
        assert aggregator.push(worker, bucket) == []
    assert not aggregator.has_applied
    assert aggregator.end(A) == [ApplyBucket(0, (A,)), ApplyBucket(2, (A,)), Commit(1, (A,)), Release((A,))]
    assert aggregator.end(B) == [ApplyBucket(1, (B,)), Commit(2, (B,)), Release((B,))]


def test_a_push_is_never_late() -> None:
    """Its parameters may come from any step that there has been."""
    aggregator = joined(A, B)
    for _ in range(3):
        push(aggregator, A)
    assert aggregator.begin(B, 0)
    assert aggregator.end(B) == [Commit(4, (B,)), Release((B,))]


def test_a_push_with_parameters_of_a_step_that_has_not_been_is_refused() -> None:
    """The worker is not in this job, or the job has lost what it had."""
    aggregator = joined(A)
    with pytest.raises(RuntimeError, match="step 1, and 0 are committed"):
        aggregator.begin(A, 1)


@pytest.mark.parametrize("streaming", [True, False])
def test_a_skipped_push_is_no_step(*, streaming: bool) -> None:
    """It is answered alone, and its worker goes on."""
    aggregator = joined(A, B, streaming=streaming)
    assert push(aggregator, A, skipped=True) == [Skip(0, (A,)), Release((A,))]
    assert aggregator.step == 0
    assert push(aggregator, B) == [Commit(1, (B,)), Release((B,))]


def test_a_push_that_has_brought_a_bucket_cannot_be_skipped() -> None:
    """What is applied cannot be taken back; the push goes on."""
    aggregator = joined(A, streaming=True)
    aggregator.begin(A, 0)
    aggregator.push(A, 0)
    with pytest.raises(RuntimeError, match="cannot end"):
        aggregator.end(A, skipped=True)
    assert aggregator.end(A) == [Commit(1, (A,)), Release((A,))]


@pytest.mark.parametrize("streaming", [True, False])
def test_a_bucket_is_pushed_once_in_a_push(*, streaming: bool) -> None:
    """It is there until the push ends; the next one may bring it again."""
    aggregator = joined(A, B, streaming=streaming)
    for _ in range(2):
        aggregator.begin(A, aggregator.step)
        assert not aggregator.holds(A, 0)
        aggregator.push(A, 0)
        assert aggregator.holds(A, 0)
        assert not aggregator.holds(B, 0)
        with pytest.raises(RuntimeError, match="cannot push bucket 0"):
            aggregator.push(A, 0)
        aggregator.end(A)


def test_events_out_of_place_are_refused() -> None:
    """Of workers that are unknown, have not begun, or have begun already."""
    aggregator = joined(A)
    for event in (
        lambda: aggregator.begin(B, 0),
        lambda: aggregator.push(A, 0),
        lambda: aggregator.end(A),
        lambda: aggregator.retract(A),
    ):
        with pytest.raises(RuntimeError, match="cannot"):
            event()
    aggregator.begin(A, 0)
    with pytest.raises(RuntimeError, match="cannot begin"):
        aggregator.begin(A, 0)
    assert aggregator.end(A) == [Commit(1, (A,)), Release((A,))]


def test_nobody_owes_anything_and_no_push_waits_for_another() -> None:
    """As synchronous ones do."""
    aggregator = joined(A, B)
    for worker in (A, B):
        aggregator.begin(worker, 0)
        aggregator.push(worker, 0)
    assert aggregator.has_begun(A)
    aggregator.lose(B)
    assert aggregator.owed(A) == frozenset()
    aggregator.end(A)
    assert not aggregator.has_begun(A)
    assert not aggregator.has_ended(A)


@pytest.mark.parametrize("streaming", [True, False])
def test_a_push_that_has_brought_nothing_may_be_taken_back(*, streaming: bool) -> None:
    """It was none: the clock does not count it."""
    aggregator = joined(A, B, max_staleness=0, streaming=streaming)
    aggregator.begin(A, 0)
    assert aggregator.retract(A) == [Abandon((A,))]
    assert not aggregator.has_begun(A)
    assert aggregator.lag(A) == 0
    aggregator.begin(A, 0)
    aggregator.push(A, 0)
    with pytest.raises(RuntimeError, match="cannot take back"):
        aggregator.retract(A)


# --- who is in it


def test_workers_come_and_go_at_any_time() -> None:
    """There is no first step to wait for, and no step that is everybody's."""
    aggregator = joined()
    assert not aggregator.is_formed
    aggregator.join(A)
    assert aggregator.is_formed
    aggregator.begin(A, 0)
    assert aggregator.may_join(B)
    aggregator.join(B)
    assert aggregator.live == {A, B}
    aggregator.leave(B)
    assert aggregator.live == {A}
    assert aggregator.end(A) == [Commit(1, (A,)), Release((A,))]


def test_what_is_applied_of_a_lost_worker_s_push_makes_a_step() -> None:
    """It cannot be taken back; the worker is its partial contributor."""
    aggregator = joined(A, B, streaming=True)
    aggregator.begin(A, 0)
    aggregator.push(A, 0)
    assert aggregator.lose(A) == [Commit(1, (A,), partial_contributors=(A,))]
    assert push(aggregator, B) == [Commit(2, (B,)), Release((B,))]


@pytest.mark.parametrize("streaming", [True, False])
def test_a_lost_worker_s_push_of_which_nothing_is_applied_is_forgotten(*, streaming: bool) -> None:
    """It makes no step."""
    aggregator = joined(A, B, streaming=streaming)
    aggregator.begin(A, 0)
    if not streaming:
        aggregator.push(A, 0)
    assert aggregator.leave(A) == [Abandon((A,))]
    assert aggregator.step == 0
    assert not aggregator.is_open
    aggregator.join(A)
    aggregator.begin(A, 0)
    assert not aggregator.holds(A, 0)


def test_a_worker_that_is_between_pushes_or_unknown_leaves_without_a_trace() -> None:
    """There is nothing to settle."""
    aggregator = joined(A)
    assert aggregator.leave(B) == []
    assert aggregator.leave(A) == []
    assert aggregator.lag(A) == 0


# --- clocks, lag and waiting


def test_lag_is_how_many_pushes_a_worker_is_ahead_of_the_slowest() -> None:
    """Without a bound it is counted all the same, and nobody waits."""
    aggregator = joined(A, B, C)
    for worker in (A, A, B, A):
        assert released(push(aggregator, worker)) == [worker]
    assert [aggregator.lag(worker) for worker in (A, B, C)] == [3, 1, 0]
    push(aggregator, C)
    assert [aggregator.lag(worker) for worker in (A, B, C)] == [2, 0, 0]
    assert not aggregator.is_timed


@pytest.mark.parametrize("bound", [0, 1, 2])
def test_a_worker_waits_as_soon_as_its_lag_is_larger_than_the_bound(bound: int) -> None:
    """Until the slowest has made it good."""
    aggregator = joined(A, B, max_staleness=bound)
    for _ in range(bound):
        assert aggregator.will_be_released(A)
        assert released(push(aggregator, A)) == [A]
    assert not aggregator.will_be_released(A)
    assert released(push(aggregator, A)) == []
    assert aggregator.is_waiting(A)
    assert aggregator.lag(A) == bound + 1
    assert aggregator.missing() == (B,)
    assert aggregator.will_be_released(B)
    assert released(push(aggregator, B)) == [A, B]
    assert not aggregator.is_waiting(A)
    assert aggregator.lag(A) == bound
    assert aggregator.missing() == ()


def test_a_worker_that_waits_cannot_begin() -> None:
    """It has no parameters to compute with."""
    aggregator = joined(A, B, max_staleness=0)
    push(aggregator, A)
    with pytest.raises(RuntimeError, match="cannot begin"):
        aggregator.begin(A, 1)


def test_all_that_waited_for_the_slowest_are_released_together_in_order_of_rank() -> None:
    """Those whose lag allows it, no others."""
    aggregator = joined(C, B, A, max_staleness=0)
    assert released(push(aggregator, C)) == []
    assert released(push(aggregator, A)) == []
    assert released(push(aggregator, B)) == [A, B, C]


def test_workers_that_are_equally_slow_are_all_missing() -> None:
    """Each of them is waited for."""
    aggregator = joined(A, B, C, max_staleness=0)
    assert aggregator.missing() == ()
    push(aggregator, B)
    assert aggregator.missing() == (A, C)


def test_a_skipped_push_counts_for_those_that_wait_for_it() -> None:
    """Its worker has come, whether it brought gradients or not."""
    aggregator = joined(A, B, max_staleness=0)
    push(aggregator, A)
    assert push(aggregator, B, skipped=True) == [Skip(1, (B,)), Release((A, B))]


def test_a_newcomer_starts_with_the_clock_of_the_slowest() -> None:
    """It holds nobody back for what it has not been there for, and is nobody's laggard."""
    aggregator = joined(A, B, max_staleness=1)
    for worker in (A, B, A, B, A):
        push(aggregator, worker)
    aggregator.join(C)
    assert [aggregator.lag(worker) for worker in (A, B, C)] == [1, 0, 0]
    assert released(push(aggregator, A)) == []
    assert released(push(aggregator, B)) == [B]
    assert released(push(aggregator, C)) == [A, C]


def test_a_worker_that_returns_is_a_newcomer() -> None:
    """Its clock of old is gone."""
    aggregator = joined(A, B, max_staleness=0)
    push(aggregator, A)
    push(aggregator, B)
    aggregator.lose(A)
    push(aggregator, B)
    aggregator.join(A)
    assert aggregator.lag(A) == 0
    assert released(push(aggregator, B)) == []


def test_those_that_waited_for_a_worker_go_on_when_it_is_lost() -> None:
    """Also where it was in the middle of a push, which is settled first."""
    aggregator = joined(A, B, max_staleness=0, streaming=True)
    push(aggregator, A)
    aggregator.begin(B, 0)
    aggregator.push(B, 0)
    assert aggregator.lose(B) == [Commit(2, (B,), partial_contributors=(B,)), Release((A,))]


def test_a_worker_that_is_lost_while_it_waits_is_not_released() -> None:
    """It is not there any more; and if it comes back it does not wait."""
    aggregator = joined(A, B, max_staleness=0)
    push(aggregator, A)
    assert aggregator.leave(A) == []
    assert not aggregator.is_waiting(A)
    assert released(push(aggregator, B)) == [B]
    aggregator.join(A)
    assert released(push(aggregator, A)) == []


def test_a_push_that_could_not_be_applied_is_forgotten_and_its_worker_waits_for_nobody() -> None:
    """Its clock has counted it, and whoever was released for it stays so."""
    aggregator = joined(A, B, max_staleness=1)
    push(aggregator, A)
    aggregator.begin(A, 1)
    aggregator.push(A, 0)
    assert released(aggregator.end(A)) == []
    aggregator.forget_push(A)
    aggregator.forget_step(1)
    assert aggregator.step == 1
    assert not aggregator.is_waiting(A)
    assert aggregator.lag(A) == 2
    aggregator.begin(A, 1)
    assert aggregator.push(A, 0) == []
    aggregator.forget_push(A)
    assert not aggregator.has_begun(A)
    assert aggregator.lag(A) == 2


# --- time


def test_a_silent_worker_is_left_behind_when_others_have_waited_for_long() -> None:
    """Time counts from the first look at who waits on."""
    aggregator = joined(A, B, max_staleness=0, timeout_s=10.0)
    assert not aggregator.is_timed
    push(aggregator, A)
    assert aggregator.is_timed
    assert aggregator.tick(100.0) == []
    assert aggregator.tick(109.9) == []
    assert aggregator.tick(110.0) == [Release((A,))]
    assert not aggregator.is_timed
    assert aggregator.live == {A, B}
    assert aggregator.lag(A) == 0
    for _ in range(3):
        assert released(push(aggregator, A)) == [A]


def test_only_workers_that_somebody_has_waited_for_are_left_behind() -> None:
    """Those that are slow, but not too slow for the one that waits, are still waited for."""
    aggregator = joined(A, B, C, max_staleness=1, timeout_s=10.0)
    for worker in (A, B, A):
        push(aggregator, worker)
    aggregator.tick(0.0)
    assert aggregator.missing() == (C,)
    assert released(aggregator.tick(10.0)) == [A]
    assert aggregator.lag(A) == 1
    assert released(push(aggregator, A)) == []
    assert aggregator.missing() == (B,)


def test_time_passes_without_effect_where_nobody_waits() -> None:
    """A slow worker that keeps nobody waiting is in nobody's way."""
    aggregator = joined(A, B, max_staleness=2, timeout_s=10.0)
    push(aggregator, A)
    push(aggregator, A)
    for now in (0.0, 100.0):
        assert aggregator.tick(now) == []
    assert released(push(aggregator, A)) == []
    assert aggregator.tick(101.0) == []
    assert aggregator.missing() == (B,)


def test_each_worker_s_wait_has_its_own_time() -> None:
    """One that comes later waits as long."""
    aggregator = joined(A, B, max_staleness=0, timeout_s=10.0)
    push(aggregator, A)
    aggregator.tick(0.0)
    push(aggregator, B)
    push(aggregator, A)
    assert aggregator.tick(5.0) == []
    assert aggregator.tick(14.0) == []
    assert released(aggregator.tick(15.0)) == [A]


def test_a_worker_left_behind_comes_back_with_the_clock_of_the_slowest() -> None:
    """From its next push on it is waited for again."""
    aggregator = joined(A, B, max_staleness=0, timeout_s=10.0)
    push(aggregator, A)
    for now in (0.0, 10.0):
        aggregator.tick(now)
    for _ in range(4):
        push(aggregator, A)
    assert aggregator.begin(B, 0)
    assert aggregator.lag(B) == 0
    assert released(push(aggregator, A)) == []
    assert aggregator.missing() == (B,)
    assert released(aggregator.end(B)) == [A, B]


def test_a_worker_left_behind_in_its_push_comes_back_with_its_end() -> None:
    """What it has pushed counts: nobody's gradients are dropped."""
    aggregator = joined(A, B, max_staleness=1, timeout_s=10.0)
    aggregator.begin(B, 0)
    aggregator.push(B, 0)
    for _ in range(2):
        push(aggregator, A)
    for now in (0.0, 10.0):
        aggregator.tick(now)
    assert aggregator.end(B) == [ApplyBucket(0, (B,)), Commit(3, (B,)), Release((B,))]
    assert aggregator.lag(B) == 1
    assert released(push(aggregator, A)) == [A]


def test_without_a_bound_time_decides_nothing() -> None:
    """Nobody waits."""
    aggregator = joined(A, B, timeout_s=10.0)
    push(aggregator, A)
    for now in (0.0, 10.0):
        assert aggregator.tick(now) == []
    assert aggregator.lag(A) == 1


def test_a_worker_that_leaves_and_comes_back_is_waited_for_though_it_was_left_behind() -> None:
    """It is a newcomer like any other."""
    aggregator = joined(A, B, max_staleness=0, timeout_s=10.0)
    push(aggregator, A)
    for now in (0.0, 10.0):
        aggregator.tick(now)
    aggregator.leave(B)
    aggregator.join(B)
    assert released(push(aggregator, A)) == []
    assert aggregator.missing() == (B,)


def test_a_worker_that_pushes_will_not_have_to_wait_for_those_left_behind() -> None:
    """They do not count, however slow they are."""
    aggregator = joined(A, B, max_staleness=0, timeout_s=10.0)
    push(aggregator, A)
    for now in (0.0, 10.0):
        aggregator.tick(now)
    aggregator.begin(A, 1)
    assert aggregator.will_be_released(A)


def test_the_slowest_clock_never_goes_back_though_only_workers_that_were_left_behind_remain() -> None:
    """A newcomer starts with it, and so do they when they show themselves."""
    aggregator = joined(A, B, max_staleness=0, timeout_s=10.0)
    push(aggregator, A)
    push(aggregator, B)
    push(aggregator, A)
    for now in (0.0, 10.0):
        aggregator.tick(now)
    aggregator.leave(A)
    aggregator.join(C)
    aggregator.begin(B, 2)
    assert [aggregator.lag(worker) for worker in (B, C)] == [0, 0]
    assert released(push(aggregator, C)) == []
    assert released(aggregator.end(B)) == [B, C]


def test_lag_does_not_count_from_a_worker_that_was_left_behind_though_only_such_remain() -> None:
    """They are all behind the slowest clock that there was."""
    aggregator = joined(A, B, C, max_staleness=1, timeout_s=10.0)
    push(aggregator, B)
    for start in (0.0, 10.0):
        while not aggregator.is_waiting(A):
            push(aggregator, A)
        for now in (start, start + 10.0):
            aggregator.tick(now)
    assert aggregator.lag(A) == 0
    aggregator.leave(A)
    assert [aggregator.lag(worker) for worker in (B, C)] == [0, 0]


@pytest.mark.parametrize("bound", [0, 1])
def test_a_worker_left_behind_knows_whether_it_will_have_to_wait(bound: int) -> None:
    """It is given the slowest clock with the end of its push, and is a push ahead of that then."""
    aggregator = joined(A, B, max_staleness=bound, streaming=True, timeout_s=10.0)
    aggregator.begin(B, 0)
    for _ in range(bound + 1):
        push(aggregator, A)
    for now in (0.0, 10.0):
        aggregator.tick(now)
    assert aggregator.lag(A) == 0
    assert aggregator.will_be_released(B) == (bound > 0)
    aggregator.end(B)
    assert aggregator.is_waiting(B) == (bound == 0)


def test_nobody_from_outside_waits_for_asynchronous_steps() -> None:
    """Time does nothing to pushes that are under way."""
    aggregator = joined(A, B, max_staleness=0, timeout_s=10.0)
    aggregator.begin(A, 0)
    for now in (0.0, 10.0, 100.0):
        assert aggregator.tick(now, waited_for=True) == []
    assert aggregator.has_begun(A)


# --- on random schedules

WORKERS: Final = (A, B, C, Worker(3, "host-3"))
TIMEOUT_S: Final = 10.0
KINDS: Final = (*("join", "bring", "leave", "lose"), *("begin",) * 4, *("end",) * 4, "skip", *("tick",) * 2)


@dataclass(frozen=True)
class Outcome:
    """An event, what it decided, and who waited before."""

    kind: str
    worker: Worker
    decisions: list[Decision]
    waited: frozenset[Worker]


class Simulation:
    """Plays a schedule and keeps account."""

    def __init__(self, bound: int | None, *, streaming: bool) -> None:
        self.bound = bound
        self.streaming = streaming
        self.aggregator = AsyncAggregator(max_staleness=bound, streaming=streaming, timeout_s=TIMEOUT_S)
        self.clocks: dict[Worker, int] = {}
        self.left_behind: set[Worker] = set()
        self.has_left_behind = False
        self.floor = 0
        self.open: dict[Worker, set[int]] = {}
        """The buckets that each push under way has brought."""
        self.waiting: dict[Worker, float] = {}
        self.now = 0.0
        self.steps = 0
        self.script: list[str] = []

    @property
    def slowest(self) -> int:
        """The clock that others are measured by: the last one, where all remaining workers are left behind."""
        return min((self.clocks[worker] for worker in self.clocks.keys() - self.left_behind), default=self.floor)

    def lag(self, worker: Worker) -> int:
        """How far a worker is ahead."""
        return max(0, self.clocks[worker] - self.slowest)

    def is_legal(self, kind: str, worker: Worker) -> bool:
        """Whether the protocol allows the event now."""
        match kind:
            case "join":
                return worker not in self.clocks
            case "begin":
                return worker in self.clocks.keys() - self.open.keys() - self.waiting.keys()
            case "bring":
                return worker in self.open and len(self.open[worker]) < 3
            case "end":
                return worker in self.open
            case "skip":
                return worker in self.open and not self.open[worker]
            case "tick":
                return True
            case _:
                return worker in self.clocks

    def choose(self, choice: int) -> Outcome:
        """Lets a legal event happen. The remainder of the choice by the number of kinds picks the kind."""
        wanted = KINDS[choice % len(KINDS)]
        for kind in (wanted, "end", "begin", "join", "tick"):
            legal = [worker for worker in WORKERS if self.is_legal(kind, worker)]
            if legal:
                return self.play(kind, legal[choice // len(KINDS) % len(legal)])
        raise AssertionError("time may always pass")

    def play(self, kind: str, worker: Worker) -> Outcome:
        """Lets an event happen."""
        self.script.append(f"{kind} {worker.worker_id}")
        waited = frozenset(self.waiting)
        decisions: list[Decision] = []
        match kind:
            case "join":
                self.clocks[worker] = self.slowest
                decisions = self.aggregator.join(worker)
            case "begin":
                self._show(worker)
                self.open[worker] = set()
                assert self.aggregator.begin(worker, 0)
            case "bring":
                bucket = len(self.open[worker])
                self.open[worker].add(bucket)
                decisions = self.aggregator.push(worker, bucket)
            case "end" | "skip":
                decisions = self.aggregator.end(worker, skipped=kind == "skip")
                self._show(worker)
                del self.open[worker]
                self.clocks[worker] += 1
                self.waiting[worker] = self.now
            case "tick":
                self.now += 4.0
                for waiter, since in self.waiting.items():
                    if self.bound is not None and self.now >= since + TIMEOUT_S:
                        due = self.clocks[waiter] - self.bound
                        self.left_behind |= {other for other, clock in self.clocks.items() if clock < due}
                self.has_left_behind = self.has_left_behind or bool(self.left_behind)
                decisions = self.aggregator.tick(self.now)
            case _:
                decisions = self.aggregator.leave(worker) if kind == "leave" else self.aggregator.lose(worker)
                for account in (self.clocks, self.open, self.waiting):
                    account.pop(worker, None)
                self.left_behind.discard(worker)
        self.steps += sum(isinstance(item, Commit) for item in decisions)
        for freed in released(decisions):
            del self.waiting[freed]
        assert self.slowest >= self.floor
        self.floor = self.slowest
        # The time is told whenever something has happened.
        assert self.aggregator.tick(self.now) == []
        return Outcome(kind, worker, decisions, waited)

    def _show(self, worker: Worker) -> None:
        if worker in self.left_behind:
            self.clocks[worker] = max(self.clocks[worker], self.slowest)
            self.left_behind.discard(worker)


Check = Callable[[Simulation, Outcome], None]
schedules = st.lists(st.integers(0, len(KINDS) * 12 - 1), min_size=10, max_size=80)
several = settings(max_examples=100, deadline=None)


def play(schedule: list[int], bound: int | None, check: Check, *, streaming: bool) -> Simulation:
    """Plays a schedule and checks what every event leads to. A schedule that fails is told event by event."""
    simulation = Simulation(bound, streaming=streaming)
    try:
        for choice in schedule:
            check(simulation, simulation.choose(choice))
    except AssertionError as error:
        error.add_note("\n".join([f"max_staleness {bound}, streaming {streaming}", *simulation.script]))
        raise
    return simulation


def on_random_schedules(check: Check) -> Callable[[], None]:
    """Makes a test of what holds after every event."""

    def test(schedule: list[int], bound: int | None, *, streaming: bool) -> None:
        play(schedule, bound, check, streaming=streaming)

    test.__name__, test.__doc__ = check.__name__, check.__doc__
    bounds = st.sampled_from((0, 1, 2, None))
    return several(given(schedule=schedules, bound=bounds, streaming=st.booleans())(test))


@on_random_schedules
def test_a_worker_is_released_exactly_when_its_lag_is_within_the_bound(
    simulation: Simulation, outcome: Outcome
) -> None:
    """Not before, and by the very event that makes it so; each one that waits, once."""
    freed = released(outcome.decisions)
    assert len({*freed}) == len(freed)
    assert {*freed} <= outcome.waited | ({outcome.worker} if outcome.kind in {"end", "skip"} else set())
    bound = math.inf if simulation.bound is None else simulation.bound
    assert all(simulation.lag(worker) <= bound for worker in freed)
    assert all(simulation.lag(worker) > bound for worker in simulation.waiting)


@on_random_schedules
def test_lag_never_exceeds_the_bound_where_nobody_was_left_behind(simulation: Simulation, outcome: Outcome) -> None:
    """Of whoever has parameters to compute with. Those that wait are one push beyond it, at most."""
    if simulation.bound is not None and not simulation.has_left_behind:
        for worker in simulation.clocks:
            assert simulation.lag(worker) <= simulation.bound + (worker in simulation.waiting)


@on_random_schedules
def test_the_aggregator_knows_where_each_worker_stands(simulation: Simulation, outcome: Outcome) -> None:
    """Its clock against the others', whether it waits, what it has brought."""
    aggregator = simulation.aggregator
    assert aggregator.live == simulation.clocks.keys()
    assert aggregator.is_open == bool(simulation.open)
    assert aggregator.is_timed == bool(simulation.waiting)
    assert aggregator.has_applied == (simulation.streaming and any(simulation.open.values()))
    for worker in WORKERS:
        assert aggregator.lag(worker) == (simulation.lag(worker) if worker in simulation.clocks else 0)
        assert aggregator.is_waiting(worker) == (worker in simulation.waiting)
        assert aggregator.has_begun(worker) == (worker in simulation.open)
        for bucket in range(3):
            assert aggregator.holds(worker, bucket) == (bucket in simulation.open.get(worker, ()))


@on_random_schedules
def test_those_that_are_missing_keep_somebody_waiting(simulation: Simulation, outcome: Outcome) -> None:
    """They are the slowest of those that are waited for, and wait for nobody themselves."""
    missing = simulation.aggregator.missing()
    assert bool(missing) == bool(simulation.waiting)
    for worker in missing:
        assert worker not in simulation.left_behind
        assert worker not in simulation.waiting
        assert simulation.clocks[worker] == simulation.slowest


@on_random_schedules
def test_every_complete_push_is_one_step_and_its_own(simulation: Simulation, outcome: Outcome) -> None:
    """Skipped ones are none, and lost ones only as far as they were applied."""
    assert simulation.aggregator.step == simulation.steps
    ends = [item for item in outcome.decisions if isinstance(item, Commit | Skip | Abandon)]
    match outcome.kind:
        case "end":
            assert ends == [Commit(simulation.steps, (outcome.worker,))]
        case "skip":
            assert ends == [Skip(simulation.steps, (outcome.worker,))]
        case "leave" | "lose":
            partial = Commit(simulation.steps, (outcome.worker,), partial_contributors=(outcome.worker,))
            assert ends in ([], [partial], [Abandon((outcome.worker,))])
        case _:
            assert ends == []


@several
@given(schedule=schedules, bound=st.sampled_from((0, 1, 2, None)), streaming=st.booleans())
def test_each_bucket_is_applied_once_for_the_push_that_brought_it(
    schedule: list[int], bound: int | None, *, streaming: bool
) -> None:
    """Those of abandoned pushes never are, those of partial ones are."""
    brought: dict[Worker, list[int]] = {}
    applied: dict[Worker, list[int]] = {}

    def check(simulation: Simulation, outcome: Outcome) -> None:
        worker = outcome.worker
        if outcome.kind == "begin":
            brought[worker], applied[worker] = [], []
        elif outcome.kind == "bring":
            brought[worker].append(max(simulation.open[worker]))
        for item in outcome.decisions:
            match item:
                case ApplyBucket(bucket_id=bucket, contributors=contributors):
                    assert contributors == (worker,)
                    applied[worker].append(bucket)
                case Commit():
                    assert applied[worker] == brought[worker]
                case Abandon():
                    assert applied[worker] == []

    play(schedule, bound, check, streaming=streaming)


@on_random_schedules
def test_nobody_waits_longer_than_the_timeout(simulation: Simulation, outcome: Outcome) -> None:
    """For whomever; and before that, time releases nobody."""
    for since in simulation.waiting.values():
        assert simulation.now < since + TIMEOUT_S
    if outcome.kind == "tick":
        assert bool(released(outcome.decisions)) == bool(outcome.waited - simulation.waiting.keys())


@several
@given(schedule=schedules, bound=st.integers(0, 2))
def test_whoever_does_its_part_is_released_without_any_help_of_time(schedule: list[int], bound: int) -> None:
    """Where all live workers go on pushing, nobody waits for ever."""
    simulation = play(schedule, bound, lambda *_: None, streaming=True)
    waiting = {*simulation.waiting}
    for _ in range(bound + 2):
        for worker in WORKERS:
            for kind in ("begin", "end"):
                if simulation.is_legal(kind, worker):
                    waiting -= {*released(simulation.play(kind, worker).decisions)}
    assert not waiting


@on_random_schedules
def test_a_worker_knows_whether_it_will_have_to_wait(simulation: Simulation, outcome: Outcome) -> None:
    """As things stand while it pushes. One that was left behind is given the slowest clock first."""
    for worker in simulation.open:
        clocks = {other: simulation.clocks[other] for other in simulation.clocks.keys() - simulation.left_behind}
        clocks[worker] = max(simulation.clocks[worker], simulation.slowest) + 1
        will = simulation.bound is None or clocks[worker] - min(clocks.values()) <= simulation.bound
        assert simulation.aggregator.will_be_released(worker) == will


@pytest.mark.parametrize("workers", [2, 3, 4])
@pytest.mark.parametrize("bound", [0, None])
def test_workers_that_take_turns_are_as_stale_as_there_are_others(workers: int, bound: int | None) -> None:
    """A push finds the others' steps between its parameters and itself; with a bound of 0, those of its own round."""
    ring = WORKERS[:workers]
    aggregator = joined(*ring, max_staleness=bound)
    base_steps = dict.fromkeys(ring, 0)
    stale = []
    for _ in range(3):
        for worker in ring:
            aggregator.begin(worker, base_steps[worker])
            stale.append(aggregator.step - base_steps[worker])
            for freed in released(aggregator.end(worker)):
                base_steps[freed] = aggregator.step
    first = [*range(workers)]
    assert stale == [*first, *(first if bound == 0 else [workers - 1] * workers) * 2]


def test_asynchronous_clocks_go_on_after_a_restart() -> None:
    """Who was too far ahead waits again, and a push that was applied in part is completed."""
    aggregator = AsyncAggregator(max_staleness=1, streaming=True)
    aggregator.restore(step=9, clocks={A: 5, B: 3}, floor=3)
    aggregator.restore_push(B, [0])
    aggregator.await_slower()
    assert (aggregator.lag(A), aggregator.lag(B)) == (2, 0)
    assert aggregator.is_waiting(A)
    assert not aggregator.is_waiting(B)
    assert aggregator.holds(B, 0)
    assert aggregator.push(B, 1) == [ApplyBucket(1, (B,))]
    assert aggregator.end(B) == [Commit(10, (B,)), Release((A, B))]
    assert aggregator.step == 10


def test_a_push_that_is_counted_from_a_journal_moves_its_workers_clock() -> None:
    """Of one that has left by then, only the step counts."""
    aggregator = AsyncAggregator(max_staleness=None, streaming=True)
    aggregator.restore(step=0, clocks={A: 0, B: 0}, floor=0)
    aggregator.count_push(A, 1)
    aggregator.count_push(C, 2)
    assert (aggregator.step, dict(aggregator.clocks), aggregator.floor) == (2, {A: 1, B: 0}, 0)
