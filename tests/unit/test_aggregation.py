"""Synchronous aggregation: by example, and on random schedules of all that workers and time can do.

A schedule is a list of numbers, each of which picks one of the events that are legal at its time. `Simulation` keeps
its own account of who did what, against which the properties compare the aggregator's decisions, and carries these out
on gradients that are nothing but the names of those who computed them.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Final, Literal

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


def formed(*workers: Worker, streaming: bool, **options: Any) -> SyncAggregator:
    """An aggregator in which all its workers have joined."""
    aggregator = SyncAggregator(**{"world_size": len(workers), "streaming": streaming, **options})
    for worker in workers:
        aggregator.join(worker)
    return aggregator


def begun(*workers: Worker, streaming: bool, **options: Any) -> SyncAggregator:
    """An aggregator in which all its workers have begun a push."""
    aggregator = formed(*workers, streaming=streaming, **options)
    for worker in workers:
        aggregator.begin(worker, aggregator.step)
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
        aggregator.begin(A, aggregator.step)
        assert aggregator.end(A) == [Commit(step, (A,), ())]
        assert aggregator.step == step


def test_a_bucket_may_be_pushed_again_in_the_next_step() -> None:
    """A commit forgets what was pushed and applied."""
    aggregator = formed(A, streaming=True)
    for _ in range(2):
        aggregator.begin(A, aggregator.step)
        assert aggregator.push(A, 0) == [ApplyBucket(0, (A,))]
        aggregator.end(A)
        assert not aggregator.is_open
        assert not aggregator.has_applied


def test_streaming_keeps_a_worker_lost_in_its_push_in_the_step_as_a_partial_contributor() -> None:
    """Where steps are streamed: what it pushed is in already, and the commit says that it was lost."""
    aggregator = begun(A, B, streaming=True)
    aggregator.push(B, 0)
    assert aggregator.push(A, 0) == [ApplyBucket(0, (A, B))]
    aggregator.push(A, 1)
    assert aggregator.leave(B) == [ApplyBucket(1, (A,))]
    assert aggregator.end(A) == [Commit(1, (A, B), (B,))]


@pytest.mark.parametrize("streaming", [True, False])
def test_a_worker_lost_before_it_pushed_anything_is_no_contributor(*, streaming: bool) -> None:
    """It has begun, but nothing of it is in the step: nobody has to push anything again."""
    aggregator = begun(A, B, streaming=streaming)
    aggregator.push(A, 0)
    decisions = aggregator.lose(B)
    assert decisions[0] == Discard(B, ())
    assert aggregator.owed(A) == frozenset()
    decisions += aggregator.end(A)
    assert decisions[1:] == [ApplyBucket(0, (A,)), Commit(1, (A,), ())]


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
    assert aggregator.leave(B) == [Discard(B, ()), ApplyBucket(3, (A, C)), Commit(1, (A, C), ())]
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
    assert aggregator.leave(A) == ([] if streaming else [Discard(A, (0,))])
    # Of atomic steps a lost push is out already.
    assert aggregator.leave(B) == [Discard(B, ()), Abandon((A, B) if streaming else (B,))]
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
    aggregator.push(B, 0)
    aggregator.leave(A)
    assert aggregator.leave(B) == [Discard(B, ()), Abandon((B,))]
    assert aggregator.step == 0
    for worker in (A, B):
        aggregator.join(worker)
    for worker in (A, B):
        aggregator.begin(worker, aggregator.step)
    aggregator.push(B, 0)
    aggregator.end(A)
    assert aggregator.end(B) == [ApplyBucket(0, (A, B)), Commit(1, (A, B), ())]


def test_nobody_begins_before_all_have_joined() -> None:
    """The first step waits for `world_size` workers."""
    aggregator = SyncAggregator(world_size=2, streaming=True)
    aggregator.join(A)
    assert not aggregator.is_formed
    with pytest.raises(RuntimeError, match="cannot begin"):
        aggregator.begin(A, aggregator.step)
    aggregator.join(B)
    assert aggregator.is_formed
    aggregator.begin(A, aggregator.step)
    assert aggregator.is_open


def test_a_formed_job_goes_on_with_fewer() -> None:
    """A loss lowers the count of those waited for, in the steps that follow too."""
    aggregator = formed(A, B, C, streaming=False)
    aggregator.leave(B)
    assert aggregator.is_formed
    assert aggregator.live == {A, C}
    aggregator.begin(C, aggregator.step)
    aggregator.begin(A, aggregator.step)
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
        aggregator.begin(B, aggregator.step)
    aggregator.join(A)
    aggregator.begin(B, aggregator.step)
    assert aggregator.is_open


def test_nobody_joins_in_the_middle_of_a_step() -> None:
    """A newcomer counts from the next step on."""
    aggregator = formed(A, streaming=True)
    aggregator.begin(A, aggregator.step)
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
        aggregator.begin(worker, aggregator.step)
        decisions = aggregator.end(worker)
    assert decisions == [Commit(1, (A, B), ())]


@pytest.mark.parametrize("streaming", [True, False])
def test_a_skip_does_not_outlive_its_step(*, streaming: bool) -> None:
    """Whoever skipped one step contributes to the next."""
    aggregator = formed(A, B, streaming=streaming)
    for step, skipped in ((1, True), (2, False)):
        for worker in (A, B):
            aggregator.begin(worker, aggregator.step)
        aggregator.end(A, skipped=skipped)
        aggregator.push(B, 0)
        decisions = aggregator.end(B)
        contributors = (B,) if skipped else (A, B)
        assert decisions[-1] == Commit(step, contributors, (), (A,) if skipped else ())


def test_gradients_of_a_lost_worker_are_committed_though_all_others_skip() -> None:
    """Where steps are streamed they are in, as a partial contribution."""
    aggregator = begun(A, B, streaming=True)
    aggregator.push(B, 2)
    assert aggregator.leave(B) == []
    assert aggregator.end(A, skipped=True) == [ApplyBucket(2, (B,)), Commit(1, (B,), (B,), (A,))]


def test_a_step_is_skipped_whose_only_gradients_were_a_lost_worker_s() -> None:
    """Of an atomic step they are out, and all the others had none."""
    aggregator = begun(A, B, streaming=False)
    aggregator.push(B, 2)
    aggregator.end(A, skipped=True)
    assert aggregator.lose(B) == [Discard(B, (2,)), Skip(0, (A,))]


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
    assert aggregator.leave(B) == [Discard(B, ()), Skip(0, (A, C))]


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


# --- workers that are lost in the middle of an atomic push


def test_the_others_push_again_what_was_added_to_a_lost_worker_s() -> None:
    """Sums cannot be told apart: they owe the buckets that it had pushed too, and no others, and end again."""
    aggregator = begun(A, B, C, streaming=False)
    for worker, bucket in ((A, 0), (A, 1), (A, 2), (B, 0), (B, 2), (C, 2)):
        aggregator.push(worker, bucket)
    aggregator.end(A)
    assert aggregator.lose(B) == [Discard(B, (0, 2))]
    assert not aggregator.has_ended(A)
    assert [aggregator.owed(worker) for worker in (A, B, C)] == [{0, 2}, set(), {2}]
    assert [aggregator.holds(A, bucket) for bucket in (0, 1, 2)] == [False, True, False]
    for worker, bucket in ((A, 0), (A, 2), (C, 2)):
        assert aggregator.push(worker, bucket) == []
    assert aggregator.end(C) == []
    assert aggregator.end(A) == [
        ApplyBucket(0, (A, C)),
        ApplyBucket(1, (A, C)),
        ApplyBucket(2, (A, C)),
        Commit(1, (A, C)),
    ]


def test_a_push_is_not_complete_while_it_owes() -> None:
    """To end it does nothing until all that is owed has come."""
    aggregator = begun(A, B, streaming=False)
    for worker in (A, B):
        for bucket in (0, 1):
            aggregator.push(worker, bucket)
    assert aggregator.lose(B) == [Discard(B, (0, 1))]
    assert aggregator.end(A) == []
    aggregator.push(A, 1)
    assert aggregator.end(A) == []
    assert aggregator.missing() == (A,)
    aggregator.push(A, 0)
    assert aggregator.end(A) == [ApplyBucket(0, (A,)), ApplyBucket(1, (A,)), Commit(1, (A,))]


def test_a_worker_that_owes_may_end_without_gradients() -> None:
    """What it had is out: a process that computes them anew may find that they are not finite."""
    aggregator = begun(A, B, C, streaming=False)
    for worker in (A, B):
        aggregator.push(worker, 0)
    aggregator.lose(B)
    aggregator.end(A, skipped=True)
    assert aggregator.owed(A) == frozenset()
    assert aggregator.end(C) == [Commit(1, (C,), skipped=(A,))]


def test_nobody_pushes_again_where_gradients_are_held_apart() -> None:
    """The lost worker's are taken out, and the others' count as they are."""
    aggregator = begun(A, B, C, streaming=False, separate=True)
    for worker, bucket in ((A, 0), (B, 0), (B, 1), (C, 0)):
        aggregator.push(worker, bucket)
    for worker in (A, C):
        aggregator.end(worker)
    assert aggregator.lose(B) == [Discard(B, (0, 1)), ApplyBucket(0, (A, C)), Commit(1, (A, C))]


def test_a_complete_push_that_shares_a_bucket_with_a_lost_one_goes_if_its_worker_has_left() -> None:
    """Nobody can push it again, so all of it is taken out, and the others owe what it had a part in."""
    aggregator = begun(A, B, C, streaming=False)
    for worker, bucket in ((A, 0), (A, 1), (B, 0), (C, 1)):
        aggregator.push(worker, bucket)
    aggregator.end(A)
    assert aggregator.leave(A) == []
    assert aggregator.lose(B) == [Discard(B, (0,)), Discard(A, (1,))]
    assert aggregator.owed(C) == {1}
    aggregator.push(C, 1)
    assert aggregator.end(C) == [ApplyBucket(1, (C,)), Commit(1, (C,))]


def test_a_complete_push_that_shares_nothing_with_a_lost_one_counts_though_its_worker_has_left() -> None:
    """It was complete before."""
    aggregator = begun(A, B, C, streaming=False)
    for worker, bucket in ((A, 0), (B, 1)):
        aggregator.push(worker, bucket)
    aggregator.end(A)
    aggregator.leave(A)
    assert aggregator.lose(B) == [Discard(B, (1,))]
    assert aggregator.end(C) == [ApplyBucket(0, (A, C)), Commit(1, (A, C))]


def test_a_worker_that_owes_and_is_lost_takes_the_rest_of_its_push_with_it() -> None:
    """Then it is the others' turn to push that again."""
    aggregator = begun(A, B, C, streaming=False)
    for worker, bucket in ((A, 0), (A, 1), (B, 0), (C, 1)):
        aggregator.push(worker, bucket)
    aggregator.end(A)
    aggregator.end(C)
    assert aggregator.lose(B) == [Discard(B, (0,))]
    assert aggregator.lose(A) == [Discard(A, (1,))]
    assert aggregator.owed(C) == {1}
    aggregator.push(C, 1)
    assert aggregator.end(C) == [ApplyBucket(1, (C,)), Commit(1, (C,))]


@pytest.mark.parametrize("streaming", [True, False])
def test_losing_a_worker_is_as_if_it_left_where_nobody_waits_for_lost_ones(*, streaming: bool) -> None:
    """It is out of the job, and comes back at the end of the step like a newcomer."""
    aggregator = begun(A, B, streaming=streaming)
    assert aggregator.lose(B) == [Discard(B, ())]
    assert aggregator.live == {A}
    assert not aggregator.may_join(B)
    aggregator.end(A)
    aggregator.join(B)
    assert aggregator.missing() == (A, B)


# --- places that are kept: on_loss="wait"


def test_a_lost_worker_s_place_is_kept() -> None:
    """The step waits for it, and what it pushed stays in: nobody owes anything."""
    aggregator = begun(A, B, streaming=False, on_loss="wait")
    for worker in (A, B):
        aggregator.push(worker, 0)
    assert aggregator.lose(B) == []
    assert aggregator.live == {A}
    assert aggregator.end(A) == []
    assert aggregator.missing() == (B,)
    assert aggregator.holds(B, 0)


def test_a_lost_worker_comes_back_to_its_push_in_the_middle_of_the_step() -> None:
    """It pushes what is missing of it."""
    aggregator = begun(A, B, streaming=False, on_loss="wait")
    aggregator.push(B, 0)
    aggregator.lose(B)
    aggregator.end(A)
    with pytest.raises(RuntimeError, match="cannot push"):
        aggregator.push(B, 1)
    assert aggregator.may_join(B)
    assert aggregator.join(B) == []
    assert aggregator.has_begun(B)
    aggregator.push(B, 1)
    assert aggregator.end(B) == [ApplyBucket(0, (A, B)), ApplyBucket(1, (A, B)), Commit(1, (A, B))]


def test_a_lost_worker_whose_push_was_complete_comes_back_in_the_middle_of_the_step_too() -> None:
    """It has nothing to push, and its push counts once."""
    aggregator = begun(A, B, streaming=False, on_loss="wait")
    aggregator.push(B, 0)
    aggregator.end(B)
    aggregator.lose(B)
    assert aggregator.missing() == (A,)
    assert aggregator.join(B) == []
    assert aggregator.has_ended(B)
    assert aggregator.end(A) == [ApplyBucket(0, (A, B)), Commit(1, (A, B))]


@pytest.mark.parametrize("successor", [Worker(1, "other"), Worker(7, "host-1")])
def test_another_worker_takes_the_place_of_a_lost_one_by_its_rank_or_its_id(successor: Worker) -> None:
    """In the middle of the step, with a push of its own: the lost one's is taken out."""
    aggregator = begun(A, B, streaming=False, on_loss="wait")
    for worker, bucket in ((A, 0), (A, 1), (B, 0)):
        aggregator.push(worker, bucket)
    aggregator.end(A)
    aggregator.lose(B)
    assert aggregator.may_join(successor)
    assert aggregator.join(successor) == [Discard(B, (0,))]
    assert aggregator.owed(A) == {0}
    assert aggregator.missing() == (A, successor)
    aggregator.push(A, 0)
    assert aggregator.end(A) == []
    aggregator.begin(successor, 0)
    assert aggregator.end(successor) == [
        ApplyBucket(0, (A, successor)),
        ApplyBucket(1, (A, successor)),
        Commit(1, (A, successor)),
    ]


def test_nobody_takes_a_lost_worker_s_place_in_a_step_that_its_push_is_in() -> None:
    """Complete pushes count: the successor's first one is the next step's."""
    successor = Worker(1, "other")
    aggregator = begun(A, B, streaming=False, on_loss="wait")
    aggregator.end(B)
    aggregator.lose(B)
    assert not aggregator.may_join(successor)
    with pytest.raises(RuntimeError, match="may not join"):
        aggregator.join(successor)
    assert aggregator.end(A) == [Commit(1, (A, B))]
    assert aggregator.join(successor) == []
    assert aggregator.missing() == (A, successor)


def test_a_newcomer_that_takes_nobody_s_place_waits_for_the_end_of_the_step() -> None:
    """Whether somebody is absent or not."""
    aggregator = begun(A, B, streaming=False, on_loss="wait")
    aggregator.lose(B)
    assert not aggregator.may_join(C)


def test_a_step_that_only_a_replaced_worker_had_begun_is_abandoned() -> None:
    """Its successor begins a step of its own."""
    successor = Worker(0, "other")
    aggregator = formed(A, B, streaming=False, on_loss="wait")
    aggregator.begin(A, 0)
    aggregator.push(A, 0)
    aggregator.lose(A)
    assert aggregator.join(successor) == [Discard(A, (0,)), Abandon((A,))]
    assert not aggregator.is_open
    assert aggregator.missing() == (successor, B)


def test_an_orderly_leave_gives_up_the_place_though_lost_ones_are_waited_for() -> None:
    """Also where the worker was lost before."""
    aggregator = begun(A, B, C, streaming=False, on_loss="wait")
    aggregator.end(A)
    aggregator.lose(B)
    assert aggregator.leave(C) == [Discard(C, ())]
    assert aggregator.missing() == (B,)
    assert aggregator.leave(B) == [Discard(B, ()), Commit(1, (A,))]


def test_a_job_that_keeps_the_places_of_all_stays_formed() -> None:
    """The first to come back may begin, and the step waits for the others."""
    aggregator = formed(A, B, streaming=False, on_loss="wait")
    for worker in (A, B):
        aggregator.lose(worker)
    assert aggregator.is_formed
    assert aggregator.live == frozenset()
    aggregator.join(A)
    assert aggregator.begin(A, 0)
    assert aggregator.end(A) == []
    assert aggregator.missing() == (B,)


def test_an_open_step_outlives_the_absence_of_all_its_workers() -> None:
    """What they pushed is there when they come back."""
    aggregator = begun(A, B, streaming=False, on_loss="wait")
    for worker in (A, B):
        aggregator.push(worker, 0)
        assert aggregator.lose(worker) == []
    for worker in (A, B):
        aggregator.join(worker)
        decisions = aggregator.end(worker)
    assert decisions == [ApplyBucket(0, (A, B)), Commit(1, (A, B))]


# --- backup workers


def test_a_step_is_made_of_the_first_complete_pushes() -> None:
    """The one that the step does without is late, whatever it has pushed of it."""
    aggregator = begun(A, B, C, streaming=False, backup_workers=1)
    for worker, bucket in ((B, 0), (C, 0), (A, 0), (B, 1)):
        aggregator.push(worker, bucket)
    assert aggregator.end(C) == []
    assert aggregator.end(A) == [ApplyBucket(0, (A, C)), Commit(1, (A, C), late=(B,))]
    assert not aggregator.has_begun(B)


def test_a_bucket_that_only_late_pushes_have_is_not_applied() -> None:
    """Nobody whose push counts had a gradient for it."""
    aggregator = begun(A, B, streaming=False, backup_workers=1)
    aggregator.push(B, 5)
    assert aggregator.end(A) == [Commit(1, (A,), late=(B,))]


def test_a_worker_that_has_not_begun_is_not_named_late() -> None:
    """It will find out when it begins."""
    aggregator = formed(A, B, streaming=False, backup_workers=1)
    aggregator.begin(A, 0)
    assert aggregator.end(A) == [Commit(1, (A,))]
    assert not aggregator.begin(B, 0)


def test_a_late_worker_may_be_among_the_first_of_the_next_step() -> None:
    """It is waited for like any other, once it has the parameters."""
    aggregator = begun(A, B, streaming=False, backup_workers=1)
    assert aggregator.end(A) == [Commit(1, (A,), late=(B,))]
    assert aggregator.missing() == (A, B)
    aggregator.catch_up(B)
    assert aggregator.begin(B, 1)
    assert aggregator.end(B) == [Commit(2, (B,))]


def test_lost_workers_use_up_the_backups() -> None:
    """As many pushes are waited for as before, or as many as there are workers."""
    aggregator = begun(A, B, C, streaming=False, backup_workers=1)
    assert aggregator.lose(C) == [Discard(C, ())]
    assert aggregator.end(A) == []
    assert aggregator.lose(B) == [Discard(B, ()), Commit(1, (A,))]


def test_skipped_pushes_are_among_the_first() -> None:
    """They are complete, and bring nothing."""
    aggregator = begun(A, B, C, streaming=False, backup_workers=1)
    aggregator.push(C, 0)
    aggregator.end(A, skipped=True)
    assert aggregator.end(B) == [Commit(1, (B,), skipped=(A,), late=(C,))]
    for worker in (A, B, C):
        aggregator.begin(worker, 1)
    aggregator.end(A, skipped=True)
    assert aggregator.end(B, skipped=True) == [Skip(1, (A, B), late=(C,))]


# --- a world without a size


def test_an_elastic_job_is_formed_by_its_first_worker() -> None:
    """Whoever else is there when a step begins is in it."""
    aggregator = SyncAggregator(world_size=None, streaming=False)
    assert not aggregator.is_formed
    aggregator.join(A)
    assert aggregator.is_formed
    aggregator.join(B)
    aggregator.begin(A, 0)
    assert aggregator.end(A) == []
    assert aggregator.missing() == (B,)


def test_an_elastic_job_that_all_have_left_is_formed_by_whoever_comes() -> None:
    """One is enough again."""
    aggregator = formed(A, B, streaming=True, world_size=None)
    for worker in (A, B):
        aggregator.leave(worker)
    assert not aggregator.is_formed
    aggregator.join(C)
    assert aggregator.begin(C, 0)


# --- pushes that come too late


def test_a_push_with_parameters_of_an_earlier_step_is_late() -> None:
    """It is not in the open step, which goes on waiting for the worker."""
    aggregator = formed(A, B, streaming=False, step=7)
    assert not aggregator.begin(A, 6)
    assert not aggregator.has_begun(A)
    assert not aggregator.is_open
    with pytest.raises(RuntimeError, match="cannot push"):
        aggregator.push(A, 0)
    assert aggregator.begin(A, 7)
    assert aggregator.has_begun(A)


# --- time


def test_a_worker_that_does_not_come_in_time_is_left_behind() -> None:
    """Time counts from the first look at a complete push on."""
    aggregator = formed(A, B, streaming=False, timeout_s=10.0)
    aggregator.begin(A, 0)
    aggregator.push(A, 0)
    assert not aggregator.is_timed
    assert aggregator.tick(50.0) == []
    aggregator.end(A)
    assert aggregator.is_timed
    assert aggregator.tick(100.0) == []
    assert aggregator.tick(109.9) == []
    assert aggregator.tick(110.0) == [ApplyBucket(0, (A,)), Commit(1, (A,))]
    assert aggregator.live == {A, B}
    assert aggregator.missing() == (A,)


def test_time_passes_without_effect_where_no_push_is_complete() -> None:
    """Nobody waits for a worker that is slow with its own push."""
    aggregator = begun(A, B, streaming=False, timeout_s=10.0)
    for now in (0.0, 10.0, 1000.0):
        assert aggregator.tick(now) == []
    assert aggregator.end(A) == []
    assert aggregator.tick(1001.0) == []
    assert aggregator.end(B) == [Commit(1, (A, B))]


def test_each_step_has_its_own_time() -> None:
    """The wait of the one before does not count."""
    aggregator = formed(A, B, streaming=False, timeout_s=10.0)
    for start in (0.0, 9.0):
        for worker in (A, B):
            aggregator.begin(worker, aggregator.step)
        aggregator.end(A)
        assert aggregator.tick(start) == []
        assert aggregator.tick(start + 8.0) == []
        aggregator.end(B)


def test_a_step_does_not_wait_for_a_worker_left_behind_until_it_has_caught_up() -> None:
    """To begin late does not count: it has no parameters to step with yet."""
    aggregator = formed(A, B, streaming=False, timeout_s=10.0)
    aggregator.begin(A, 0)
    aggregator.end(A)
    for now in (0.0, 10.0):
        aggregator.tick(now)
    assert not aggregator.begin(B, 0)
    assert aggregator.missing() == (A,)
    aggregator.begin(A, 1)
    assert aggregator.end(A) == [Commit(2, (A,))]
    aggregator.catch_up(B)
    assert aggregator.missing() == (A, B)
    aggregator.begin(A, 2)
    assert aggregator.end(A) == []


def test_a_worker_left_behind_whose_parameters_still_hold_is_waited_for_from_its_begin_on() -> None:
    """A step that all others skip has not moved them."""
    aggregator = formed(A, B, streaming=False, timeout_s=10.0)
    aggregator.begin(A, 0)
    aggregator.end(A, skipped=True)
    aggregator.tick(0.0)
    assert aggregator.tick(10.0) == [Skip(0, (A,))]
    assert aggregator.begin(B, 0)
    assert aggregator.missing() == (A, B)


def test_a_worker_left_behind_in_its_push_is_out_of_an_atomic_step() -> None:
    """As if it were lost; the others push again what it had a part in, and the step goes without it."""
    aggregator = begun(A, B, streaming=False, timeout_s=10.0)
    for worker in (A, B):
        aggregator.push(worker, 0)
    aggregator.end(A)
    aggregator.tick(0.0)
    assert aggregator.tick(10.0) == [Discard(B, (0,))]
    assert not aggregator.has_begun(B)
    assert aggregator.owed(A) == {0}
    aggregator.push(A, 0)
    assert aggregator.end(A) == [ApplyBucket(0, (A,)), Commit(1, (A,))]


def test_a_worker_left_behind_in_its_push_is_out_at_once_where_gradients_are_held_apart() -> None:
    """The step is committed with what the others have."""
    aggregator = begun(A, B, streaming=False, separate=True, timeout_s=10.0)
    for worker in (A, B):
        aggregator.push(worker, 0)
    aggregator.end(A)
    aggregator.tick(0.0)
    assert aggregator.tick(10.0) == [Discard(B, (0,)), ApplyBucket(0, (A,)), Commit(1, (A,))]


def test_a_worker_left_behind_in_its_push_is_a_partial_contributor_of_a_streamed_step() -> None:
    """Like a lost one; what it still pushes of it is refused."""
    aggregator = begun(A, B, C, streaming=True, timeout_s=10.0)
    for worker in (A, B):
        aggregator.push(worker, 0)
    aggregator.end(A)
    aggregator.tick(0.0)
    assert aggregator.tick(10.0) == [Discard(C, ()), ApplyBucket(0, (A, B)), Commit(1, (A, B), (B,))]
    assert aggregator.live == {A, B, C}
    assert not aggregator.has_begun(B)
    with pytest.raises(RuntimeError, match="cannot push"):
        aggregator.push(B, 1)


def test_a_step_that_may_not_do_without_anybody_fails_when_its_time_is_over() -> None:
    """Nobody is left behind: all that have begun it may begin it again, and it waits again."""
    aggregator = begun(A, B, C, streaming=False, on_loss="wait", timeout_s=10.0)
    for worker in (A, B):
        aggregator.push(worker, 0)
    aggregator.end(A)
    aggregator.lose(C)
    aggregator.tick(0.0)
    assert aggregator.tick(10.0) == [TimeOut((B, C))]
    assert aggregator.step == 0
    assert not aggregator.is_open
    assert aggregator.missing() == (A, B, C)
    assert not aggregator.is_timed
    aggregator.join(C)
    for worker in (A, B, C):
        assert aggregator.begin(worker, 0)
        aggregator.push(worker, 0)
        decisions = aggregator.end(worker)
    assert decisions == [ApplyBucket(0, (A, B, C)), Commit(1, (A, B, C))]


def test_a_step_with_backup_workers_goes_with_fewer_when_its_time_is_over() -> None:
    """Those that have not come are left behind like any others."""
    aggregator = begun(A, B, C, streaming=False, backup_workers=1, timeout_s=10.0)
    aggregator.push(B, 0)
    aggregator.end(A)
    aggregator.tick(0.0)
    decisions = aggregator.tick(10.0)
    assert decisions == [Discard(B, (0,)), Discard(C, ()), Commit(1, (A,))]
    assert aggregator.missing() == (A,)


# --- pushes that are taken back


@pytest.mark.parametrize("streaming", [True, False])
def test_a_push_that_has_brought_nothing_may_be_taken_back(*, streaming: bool) -> None:
    """The step waits for the worker as if it had not begun."""
    aggregator = begun(A, B, streaming=streaming)
    aggregator.end(A)
    assert aggregator.retract(B) == []
    assert not aggregator.has_begun(B)
    assert aggregator.missing() == (B,)
    assert aggregator.begin(B, 0)
    assert aggregator.end(B) == [Commit(1, (A, B))]


@pytest.mark.parametrize("streaming", [True, False])
def test_a_step_that_is_taken_back_by_the_only_one_in_it_is_abandoned(*, streaming: bool) -> None:
    """It is as if nobody had begun it: others may join."""
    aggregator = formed(A, B, streaming=streaming)
    aggregator.begin(A, 0)
    assert aggregator.retract(A) == [Abandon((A,))]
    assert not aggregator.is_open
    assert aggregator.may_join(C)


def test_a_push_that_has_brought_a_bucket_cannot_be_taken_back() -> None:
    """Nor one that is complete, or that has not begun."""
    aggregator = begun(A, B, streaming=False)
    aggregator.push(A, 0)
    aggregator.end(B)
    for worker in (A, B, C):
        with pytest.raises(RuntimeError, match="cannot take back"):
            aggregator.retract(worker)
    assert aggregator.end(A) == [ApplyBucket(0, (A, B)), Commit(1, (A, B))]


@pytest.mark.parametrize("streaming", [True, False])
def test_a_step_that_could_not_be_applied_is_forgotten(*, streaming: bool) -> None:
    """Its workers may push the same buckets again, in a step of the same number."""
    aggregator = begun(A, B, streaming=streaming)
    for worker in (A, B):
        aggregator.push(worker, 0)
    aggregator.end(A)
    aggregator.end(B)
    assert aggregator.step == 1
    aggregator.forget_step(0)
    assert not aggregator.is_open
    for worker in (A, B):
        assert aggregator.begin(worker, 0)
        decisions = aggregator.push(worker, 0) + aggregator.end(worker)
    assert decisions == [ApplyBucket(0, (A, B)), Commit(1, (A, B))]


# --- on random schedules

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
    *(Rules(size, streaming=True) for size in (1, 2, 3, None)),
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
    """Whether that was a look at the time at which a complete push had waited for too long."""
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

    def is_legal(self, kind: str, worker: Worker, bucket: int) -> bool:
        """Whether the protocol allows the event now."""
        step = self.step
        is_pushing = worker in (self.live & step.begun) - step.ended - step.torn
        match kind:
            case "join":
                return not any(_same_place(worker, other) for other in self.live) and self.may_join(worker)
            case "begin":
                # A worker that has been left behind does not come into a step of which buckets are applied.
                is_shut = worker in self.left_behind and bool(step.applied)
                return self.formed and worker in self.live - step.begun - self.late and not is_shut
            case "push":
                return is_pushing and worker not in step.pushed[bucket]
            case "end":
                return is_pushing
            case "skip":
                return is_pushing and worker not in step.pushers()
            case "retract":
                return is_pushing and worker not in step.pushers() and not step.owed[worker]
            case "catch up":
                return worker in self.live & self.late and not step.applied
            case "tick":
                return True
            case _:
                return worker in self.live or (kind == "leave" and worker in self.absent)

    def may_join(self, worker: Worker) -> bool:
        """Whether a worker would not disturb the open step."""
        return not self.step.begun or any(
            _same_place(worker, other) and (worker == other or other not in self.step.ended) for other in self.absent
        )

    def _is_complete(self) -> bool:
        awaited, ended, rules = self.awaited, self.step.ended, self.rules
        if rules.backup_workers and rules.world_size is not None:
            return len(ended) >= max(1, min(rules.world_size - rules.backup_workers, len(awaited)))
        return awaited <= ended

    def _account(self, kind: str, worker: Worker, bucket: int) -> set[Worker]:
        """Notes an event. Returns whose pushes it takes out of the step."""
        step = self.step
        match kind:
            case "join":
                replaced = {other for other in self.absent if _same_place(worker, other)}
                self.absent -= replaced
                self.live.add(worker)
                self.base_steps[worker] = self.commits
                self.formed = self.formed or len(self.here) >= (self.rules.world_size or 1)
                return self._take_out(*(replaced & step.begun) - step.ended - {worker})
            case "begin" if self.base_steps[worker] == self.commits:
                step.begun.add(worker)
                step.unanswered.add(worker)
                self.left_behind.discard(worker)
            case "begin":
                self.late.add(worker)
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
                return self.aggregator.tick(self.now)
            case "leave":
                return self.aggregator.leave(worker)
            case _:
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
        begun_before = frozenset(step.begun)
        applied_before = frozenset(item.bucket_id for item in step.applied)
        self.now += PAUSES_S[bucket] if kind == "tick" else 0.0
        self.script.append(f"{kind} {worker.worker_id} {bucket}" if kind != "tick" else f"tick {self.now}")
        is_overdue = (
            kind == "tick"
            and bool(step.ended)
            and self.waited_since is not None
            and self.now >= self.waited_since + TIMEOUT_S
        )
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
            out=frozenset(out),
            decisions=self.attempt(kind, worker, bucket),
        )
        if kind == "retract":
            step.unanswered.discard(worker)
        self._carry_out(outcome)
        if not self.step.ended:
            self.waited_since = None
        elif self.waited_since is None:
            self.waited_since = self.now
        # The time is told whenever something has happened.
        assert self.aggregator.tick(self.now) == []
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
            self.step = Step()


def _same_place(one: Worker, other: Worker) -> bool:
    return one.rank == other.rank or one.worker_id == other.worker_id


def events(kinds: Iterable[str]) -> Iterable[tuple[str, Worker, int]]:
    """All events of `kinds`; the bucket counts for pushes only, and is how much time passes."""
    for kind in kinds:
        for worker in WORKERS[:1] if kind == "tick" else WORKERS:
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
    of_shrinking |= {"begun too late", "left behind in a push"}
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
    """Nobody else's, and all that they had brought."""
    discards = [item for item in outcome.decisions if isinstance(item, Discard)]
    assert {item.worker for item in discards} == outcome.out
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
    assert aggregator.is_timed == bool(step.ended)
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
def test_time_decides_nothing_before_a_complete_push_has_waited_for_long(
    simulation: Simulation, outcome: Outcome
) -> None:
    """And then it does, at the first look."""
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
    assume(simulation.step is not open_step or open_step.ended & willing)
    push_again = not (rules.streaming or rules.separate or rules.on_loss == "wait")
    for _ in WORKERS if push_again else range(1):
        if simulation.step is open_step:
            simulation.play("tick", A, PAUSES_S.index(TIMEOUT_S))
            carry_on(simulation, willing)
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
