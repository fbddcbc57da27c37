"""What a worker has seen of a job's values, and what may have been lost on its way to it."""

from __future__ import annotations

from optimd.server.sight import Changes, Sight

BUCKETS = range(4)


def test_what_is_sent_is_seen_until_it_changes() -> None:
    """At first nothing is."""
    changes, sight = Changes(), Sight()
    assert sight.unseen(changes, BUCKETS) == [0, 1, 2, 3]
    for bucket_id in BUCKETS:
        sight.see(bucket_id, changes.clock, 0)
    assert sight.unseen(changes, BUCKETS) == []
    changes.mark(2)
    assert sight.unseen(changes, BUCKETS) == [2]
    sight.see_all(changes.clock, 0)
    assert sight.unseen(changes, BUCKETS) == []


def test_what_was_sent_since_the_worker_last_went_on_is_lost_with_its_line() -> None:
    """It has what it had before that, however often it was sent something since."""
    changes, sight = Changes(), Sight()
    sight.see(0, changes.clock, 5)
    sight.confirm()
    changes.mark(0)
    for _ in range(2):
        sight.see(0, changes.clock, 7)
        sight.see(1, changes.clock, 7)
    assert sight.unseen(changes, BUCKETS) == [2, 3]
    sight.lose()
    assert sight.unseen(changes, BUCKETS) == [0, 1, 2, 3]
    assert sight.steps_since(0, 9) == 4
    sight.lose()
    assert sight.unseen(changes, BUCKETS) == [0, 1, 2, 3]


def test_what_a_worker_has_gone_on_with_is_not_lost() -> None:
    """Nor what it was told that it stands at."""
    changes, sight = Changes(), Sight()
    sight.see(0, changes.clock, 0)
    sight.confirm()
    sight.lose()
    assert sight.unseen(changes, BUCKETS) == [1, 2, 3]
    sight.see(1, changes.clock, 0)
    sight.see_all(changes.clock, 0)
    sight.lose()
    assert sight.unseen(changes, BUCKETS) == []
