"""What is counted of a job."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from optimd.server.measures import Histogram, JobMeasures
from optimd.server.receipts import Outcome, Receipt


@given(st.lists(st.floats(0, 10, allow_nan=False)))
def test_each_value_is_in_the_class_that_it_belongs_to(values: list[float]) -> None:
    """An upper end belongs to its class, as in Prometheus."""
    histogram = Histogram((0.5, 1.0, 5.0))
    for value in values:
        histogram.observe(value)
    counts, total = histogram.counts()
    ends = (-math.inf, 0.5, 1.0, 5.0, math.inf)
    assert counts == [sum(low < value <= high for value in values) for low, high in pairwise(ends)]
    assert total == pytest.approx(sum(values))


def test_nothing_is_lost_where_several_threads_count() -> None:
    """Counting is not one instruction."""
    histogram, measures = Histogram((1.0,)), JobMeasures()

    def count(_: int) -> None:
        for _ in range(2000):
            histogram.observe(0.5)
            measures.transferred(received=2, sent=1)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(count, range(4)))
    assert histogram.counts() == ([8000, 0], 4000.0)
    assert measures.bytes_transferred == (16_000, 8000)


def test_a_block_is_timed_even_if_it_fails() -> None:
    """A sync that fails took its time, too."""
    histogram = Histogram((60.0,))
    with pytest.raises(OSError, match="full"), histogram.timing():
        raise OSError("full")
    assert histogram.counts()[0] == [1, 0]


def test_only_gradients_that_are_in_a_step_were_stale() -> None:
    """Those that were dropped are counted as dropped."""
    measures = JobMeasures()
    for outcome, staleness in ((Outcome.MERGED, 3), (Outcome.APPLIED, 0), (Outcome.DROPPED_LATE, 7)):
        measures.answered(Receipt(sequence=1, step=1, outcome=outcome, staleness=staleness))
    assert [measures.outcomes[outcome] for outcome in Outcome] == [1, 1, 1, 0]
    counts, total = measures.staleness_steps.counts()
    assert (sum(counts), total) == (2, 3.0)
