"""The steps that a job remembers, and who waits for them."""

from __future__ import annotations

import threading

import pytest

from optimd.server.errors import JobDeletedError, LimitExceededError
from optimd.server.watching import REMEMBERED_STEPS, CommittedStep, Contribution, StepHistory, StepWatch, encode_step


def history(count: int) -> StepHistory:
    past = StepHistory("job")
    for number in range(1, count + 1):
        past.add(CommittedStep(step=number, contributors=(Contribution(0, "worker", number - 1),)))
    return past


def take(watch: StepWatch, count: int) -> list[int]:
    steps = iter(watch)
    return [next(steps).step for _ in range(count)]


def test_a_watcher_is_given_every_step_behind_the_one_it_names() -> None:
    """From the past, from now on, and from a step that is yet to come."""
    past = history(5)
    assert take(past.watch(2), 3) == [3, 4, 5]
    found: dict[int, list[int]] = {}

    def wait(after: int, count: int) -> None:
        found[after] = take(past.watch(after), count)

    waiting = [threading.Thread(target=wait, args=(after, 7 - after)) for after in (4, 5, 6)]
    for thread in waiting:
        thread.start()
    for number in (6, 7):
        past.add(CommittedStep(step=number, contributors=()))
    for thread in waiting:
        thread.join(10)
    assert found == {4: [5, 6, 7], 5: [6, 7], 6: [7]}


def test_only_the_last_steps_are_remembered_and_who_falls_behind_is_told() -> None:
    """The oldest that is there is still given."""
    past = history(REMEMBERED_STEPS + 10)
    assert take(past.watch(10), 2) == [11, 12]
    with pytest.raises(
        LimitExceededError, match="step 10 of job 'job' is no longer remembered: the last 1024 are, from 11"
    ):
        take(past.watch(9), 1)


def test_the_end_of_the_job_is_said_behind_its_last_step() -> None:
    """To who waits, and to who comes later."""
    past = history(2)
    steps = iter(past.watch(0))
    outcome: list[object] = []

    def wait() -> None:
        outcome.extend([next(steps).step, next(steps).step])
        try:
            next(steps)
        except JobDeletedError as error:
            outcome.append(error)

    waiting = threading.Thread(target=wait)
    waiting.start()
    past.end()
    waiting.join(10)
    assert outcome[:2] == [1, 2]
    assert isinstance(outcome[2], JobDeletedError)
    with pytest.raises(JobDeletedError):
        take(past.watch(2), 1)


def test_a_watch_that_is_ended_ends_its_iteration_and_no_other() -> None:
    """At once, though it waits; the history goes on."""
    past = history(1)
    watch, other = past.watch(1), past.watch(0)
    seen: list[list[CommittedStep]] = []
    waiting = threading.Thread(target=lambda: seen.append(list(watch)))
    waiting.start()
    watch.end()
    watch.end()
    waiting.join(10)
    assert seen == [[]]
    assert take(other, 1) == [1]


def test_a_step_is_told_to_each_worker_with_its_own_sequence() -> None:
    """To a stranger without one; with the norm where there is one."""
    step = CommittedStep(
        step=9,
        contributors=(Contribution(0, "a", 4), Contribution(3, "b", 7)),
        partial_contributors=(3,),
        hyperparameters_disagreed=True,
        grad_norm=0.5,
    )
    told = encode_step(step, "b")
    assert told.contributed
    assert (told.receipt.sequence, told.receipt.step, told.receipt.grad_norm) == (7, 9, 0.5)
    assert (list(told.receipt.contributors), list(told.receipt.partial_contributors)) == ([0, 3], [3])
    assert told.receipt.hyperparameters_disagreed
    stranger = encode_step(CommittedStep(step=9, contributors=step.contributors), "c")
    assert not stranger.contributed
    assert not stranger.receipt.HasField("grad_norm")
