"""Synchronous aggregation, by example. On random schedules it is in `test_aggregation_schedules.py`."""

from __future__ import annotations

from typing import Any

import pytest

from optimd.server.aggregation import (
    Abandon,
    ApplyBucket,
    Commit,
    Discard,
    Skip,
    SyncAggregator,
    TakeBack,
    TimeOut,
    Worker,
)

A, B, C, D = (Worker(rank, f"host-{rank}") for rank in range(4))


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
    assert not aggregator.has_begun(B)
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


def test_a_streaming_step_that_all_leave_midway_is_taken_back_where_that_is_possible() -> None:
    """A push that was complete goes with it: nobody was told of it. The next step begins as if nothing had been."""
    aggregator = begun(A, B, streaming=True)
    aggregator.takes_back = True
    aggregator.push(A, 0)
    assert aggregator.push(B, 0) == [ApplyBucket(0, (A, B))]
    aggregator.end(A)
    assert aggregator.leave(A) == []
    assert aggregator.leave(B) == [TakeBack((A, B))]
    assert not aggregator.is_open
    assert aggregator.step == 0
    aggregator.join(A)
    aggregator.join(B)
    assert aggregator.begin(A, 0)
    assert not aggregator.holds(A, 0)


def test_a_step_that_somebody_is_left_of_is_not_taken_back() -> None:
    """It is completed with what the lost one gave."""
    aggregator = begun(A, B, streaming=True)
    aggregator.takes_back = True
    aggregator.push(A, 0)
    aggregator.push(B, 0)
    assert aggregator.leave(B) == []
    assert aggregator.end(A) == [Commit(1, (A, B), (B,))]


def test_a_streamed_step_that_was_applied_in_part_goes_on_after_a_restart() -> None:
    """What is there is passed over, the rest is pushed; a contributor that is gone stays a partial one."""
    aggregator = SyncAggregator(world_size=3, streaming=True)
    aggregator.restore(step=7, live=[A, B], absent=[], formed=True)
    aggregator.restore_step({0: [A, B, C], 2: [A, B, C]})
    assert aggregator.has_applied
    assert aggregator.has_begun(A)
    assert not aggregator.has_begun(C)
    assert aggregator.holds(A, 0)
    assert not aggregator.holds(A, 1)
    assert aggregator.push(A, 1) == []
    assert aggregator.push(B, 1) == [ApplyBucket(1, (A, B))]
    assert aggregator.end(A) == []
    assert aggregator.end(B) == [Commit(8, (A, B, C), (C,))]


def test_who_was_not_awaited_in_a_streamed_step_comes_too_late_after_a_restart_too() -> None:
    """What was applied without its gradients is not applied again with them, and nobody waits for it."""
    aggregator = SyncAggregator(world_size=2, streaming=True)
    aggregator.restore(step=7, live=[A, B], absent=[], formed=True)
    aggregator.restore_step({0: [A]})
    assert not aggregator.begin(B, 7)
    assert aggregator.push(A, 1) == [ApplyBucket(1, (A,))]
    assert aggregator.end(A) == [Commit(8, (A,))]
    assert aggregator.begin(A, 8)
    assert aggregator.begin(B, 8)
    assert aggregator.push(A, 0) == []


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


def test_a_push_is_discarded_once() -> None:
    """Also where those of two that have left share buckets with each other and with the lost one's."""
    aggregator = begun(A, B, C, D, streaming=False)
    for worker, bucket in ((A, 0), (B, 0), (C, 0), (A, 1), (C, 1)):
        aggregator.push(worker, bucket)
    for worker in (A, C):
        aggregator.end(worker)
        aggregator.leave(worker)
    discards = [decision for decision in aggregator.lose(B) if isinstance(decision, Discard)]
    assert sorted(discard.worker for discard in discards) == [A, B, C]
    assert sorted(bucket for discard in discards for bucket in discard.buckets) == [0, 1]
    assert aggregator.missing() == (D,)


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


def test_an_absent_worker_owes_like_any_other() -> None:
    """It has a place, so it will push again."""
    successor = Worker(1, "other")
    aggregator = begun(A, B, C, streaming=False, on_loss="wait")
    for worker, bucket in ((A, 0), (A, 1), (B, 0)):
        aggregator.push(worker, bucket)
    aggregator.end(A)
    for worker in (A, B):
        aggregator.lose(worker)
    assert aggregator.join(successor) == [Discard(B, (0,))]
    aggregator.join(A)
    assert aggregator.owed(A) == {0}
    assert aggregator.holds(A, 1)


def test_a_step_outlives_the_leave_of_the_last_that_was_not_absent() -> None:
    """The job stays formed, and the absent come back to their pushes."""
    aggregator = begun(A, B, streaming=False, on_loss="wait")
    aggregator.push(A, 0)
    aggregator.lose(A)
    assert aggregator.leave(B) == [Discard(B, ())]
    assert aggregator.is_formed
    aggregator.join(A)
    assert aggregator.end(A) == [ApplyBucket(0, (A,)), Commit(1, (A,))]


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


def test_an_absent_worker_hears_that_it_is_late_when_it_comes_back() -> None:
    """Its push is not in the step, nor in the next one."""
    aggregator = begun(A, B, C, streaming=False, backup_workers=1, on_loss="wait")
    aggregator.push(B, 0)
    aggregator.lose(B)
    aggregator.end(A)
    assert aggregator.end(C) == [Commit(1, (A, C))]
    aggregator.join(B)
    assert not aggregator.has_begun(B)


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


def test_a_step_with_backups_is_not_closed_without_the_only_live_worker() -> None:
    """A complete push of one that has left is one of those that it needs, and not all of them."""
    aggregator = begun(A, B, C, streaming=False, backup_workers=1)
    aggregator.push(C, 0)
    aggregator.end(A)
    assert aggregator.leave(A) == []
    assert aggregator.leave(B) == [Discard(B, ())]
    assert aggregator.end(C) == [ApplyBucket(0, (A, C)), Commit(1, (A, C))]


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


def test_a_worker_left_behind_does_not_come_into_a_streamed_step_of_which_buckets_are_applied() -> None:
    """Though its parameters were those of the step: what is applied would have to wait for it."""
    aggregator = formed(A, B, streaming=True, timeout_s=10.0)
    aggregator.begin(A, 0)
    aggregator.end(A, skipped=True)
    aggregator.tick(0.0)
    assert aggregator.tick(10.0) == [Skip(0, (A,))]
    aggregator.begin(A, 0)
    assert aggregator.push(A, 0) == [ApplyBucket(0, (A,))]
    assert not aggregator.begin(B, 0)
    assert aggregator.missing() == (A,)
    assert aggregator.end(A) == [Commit(1, (A,))]


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


def test_time_starts_anew_when_no_push_is_complete_any_more() -> None:
    """Those that push again have not waited meanwhile."""
    aggregator = begun(A, B, C, streaming=False, timeout_s=10.0)
    for worker in (A, B):
        aggregator.push(worker, 0)
    aggregator.end(A)
    aggregator.tick(0.0)
    aggregator.lose(B)
    aggregator.tick(5.0)
    aggregator.push(A, 0)
    aggregator.end(A)
    for now in (6.0, 15.9):
        assert aggregator.tick(now) == []
    assert aggregator.tick(16.0) == [Discard(C, ()), ApplyBucket(0, (A,)), Commit(1, (A,))]


def test_time_counts_from_the_complete_push_that_waits_now() -> None:
    """Nobody tells of time while none does."""
    aggregator = begun(A, B, C, streaming=False, timeout_s=10.0)
    for worker in (A, B, C):
        aggregator.push(worker, 0)
    aggregator.end(A)
    aggregator.tick(0.0)
    aggregator.lose(B)
    assert not aggregator.is_timed
    aggregator.push(A, 0)
    aggregator.end(A)
    assert aggregator.tick(100.0) == []
    assert aggregator.missing() == (C,)


def test_a_push_whose_worker_has_left_times_nobody_out() -> None:
    """Nobody waits."""
    aggregator = begun(A, B, streaming=False, timeout_s=10.0)
    for worker in (A, B):
        aggregator.push(worker, 0)
    aggregator.end(A)
    aggregator.leave(A)
    assert not aggregator.is_timed
    for now in (0.0, 10.0):
        assert aggregator.tick(now) == []
    assert aggregator.end(B) == [ApplyBucket(0, (A, B)), Commit(1, (A, B))]


def test_those_that_push_again_have_as_long_as_the_worker_that_was_left_behind_had() -> None:
    """Or else they are left behind too."""
    aggregator = begun(A, B, C, streaming=False, timeout_s=10.0)
    for worker in (A, B):
        aggregator.push(worker, 0)
    for worker in (A, C):
        aggregator.end(worker)
    aggregator.tick(0.0)
    assert aggregator.tick(10.0) == [Discard(B, (0,))]
    for now in (11.0, 20.9):
        assert aggregator.tick(now) == []
    assert aggregator.missing() == (A,)
    assert aggregator.tick(21.0) == [Discard(A, ()), Commit(1, (C,))]


def test_nothing_is_owed_in_a_step_that_is_begun_again() -> None:
    """The one that failed is forgotten."""
    aggregator = begun(A, B, C, streaming=False, on_loss="wait", timeout_s=10.0)
    for worker in (A, B):
        aggregator.push(worker, 0)
    aggregator.end(C)
    aggregator.leave(B)
    assert aggregator.owed(A) == {0}
    aggregator.tick(0.0)
    assert aggregator.tick(10.0) == [TimeOut((A,))]
    assert aggregator.owed(A) == frozenset()
    for worker in (A, C):
        aggregator.begin(worker, 0)
        decisions = aggregator.end(worker)
    assert decisions == [Commit(1, (A, C))]


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


# --- time, while somebody waits for the end of a step that it is not in


@pytest.mark.parametrize("separate", [True, False])
def test_an_atomic_step_that_nobody_completes_is_abandoned_for_those_that_wait_outside(*, separate: bool) -> None:
    """All that are missing are left behind."""
    aggregator = begun(A, B, streaming=False, separate=separate, timeout_s=10.0)
    aggregator.push(A, 0)
    assert not aggregator.is_timed
    assert aggregator.tick(0.0, waited_for=True) == []
    assert aggregator.tick(9.9, waited_for=True) == []
    assert aggregator.tick(10.0, waited_for=True) == [Discard(A, (0,)), Discard(B, ()), Abandon((A, B))]
    assert aggregator.may_join(C)
    assert aggregator.missing() == ()


def test_a_streamed_step_that_nobody_completes_closes_as_it_stands_for_those_that_wait_outside() -> None:
    """Whoever has brought something is a partial contributor."""
    aggregator = begun(A, B, streaming=True, timeout_s=10.0)
    for worker, bucket in ((A, 0), (B, 0), (A, 1)):
        aggregator.push(worker, bucket)
    aggregator.tick(0.0, waited_for=True)
    assert aggregator.tick(10.0, waited_for=True) == [ApplyBucket(1, (A,)), Commit(1, (A, B), (A, B))]
    assert aggregator.may_join(C)


def test_time_counts_only_while_somebody_waits_outside() -> None:
    """Whoever comes next waits as long."""
    aggregator = begun(A, B, streaming=True, timeout_s=10.0)
    aggregator.tick(0.0, waited_for=True)
    aggregator.tick(5.0)
    assert aggregator.tick(10.0, waited_for=True) == []
    assert aggregator.tick(19.9, waited_for=True) == []
    assert aggregator.tick(20.0, waited_for=True) == [Discard(A, ()), Discard(B, ()), Abandon((A, B))]


def test_nobody_is_left_behind_for_those_that_wait_outside_where_lost_workers_are_waited_for() -> None:
    """Nor is a step timed that nobody has begun."""
    aggregator = begun(A, B, streaming=False, on_loss="wait", timeout_s=10.0)
    for now in (0.0, 10.0, 100.0):
        assert aggregator.tick(now, waited_for=True) == []
    aggregator = formed(A, B, streaming=False, timeout_s=10.0)
    for now in (0.0, 10.0, 100.0):
        assert aggregator.tick(now, waited_for=True) == []
    assert aggregator.missing() == (A, B)


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


def test_a_push_that_is_taken_back_owes_nothing() -> None:
    """What it had to push again is not asked of the next one."""
    aggregator = begun(A, B, C, streaming=False)
    for worker in (A, B):
        aggregator.push(worker, 0)
    aggregator.lose(B)
    assert aggregator.owed(A) == {0}
    assert aggregator.retract(A) == []
    assert aggregator.owed(A) == frozenset()
    aggregator.begin(A, 0)
    aggregator.end(A)
    assert aggregator.end(C) == [Commit(1, (A, C))]


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
