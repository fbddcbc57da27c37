"""When a worker tries again, and when it gives up."""

from __future__ import annotations

from optimd.client.retry import Retry


def test_the_first_try_is_made_at_once_and_pauses_grow_up_to_five_seconds() -> None:
    """From a tenth of a second on, doubled with each."""
    retry = Retry(60.0)
    assert not retry.is_under_way
    assert [retry.next_pause(0.0) for _ in range(9)] == [0.0, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0]
    assert retry.is_under_way


def test_time_runs_from_the_first_break_and_ends_however_well_tries_go() -> None:
    """Only an answer is one: a line that comes up and breaks again has not brought any."""
    retry = Retry(10.0)
    assert retry.left(5.0) == 10.0
    assert retry.next_pause(100.0) == 0.0
    assert retry.left(104.0) == 6.0
    assert retry.next_pause(109.9) is not None
    assert retry.next_pause(110.0) is None
    assert retry.next_pause(200.0) is None


def test_an_answer_gives_the_next_break_all_of_the_time() -> None:
    """And short pauses again."""
    retry = Retry(10.0)
    for _ in range(5):
        retry.next_pause(0.0)
    retry.answered()
    assert not retry.is_under_way
    assert [retry.next_pause(50.0) for _ in range(2)] == [0.0, 0.1]
    assert retry.left(50.0) == 10.0


def test_the_last_try_is_made_before_time_is_over() -> None:
    """A pause does not take it up."""
    retry = Retry(0.25)
    assert [retry.next_pause(0.0) for _ in range(5)] == [0.0, 0.1, 0.2, 0.25, 0.25]


def test_time_can_be_limited_before_anything_has_broken() -> None:
    """For who only comes back to leave."""
    retry = Retry(60.0)
    retry.limit(5.0)
    assert retry.left(1.0) == 4.0
    assert retry.next_pause(1.0) == 0.1
    assert retry.next_pause(5.0) is None
