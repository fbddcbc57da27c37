"""Timing several ways to do one thing against each other.

On a shared machine absolute times drift by a third within minutes. So all ways are measured in one run, in turns, and
what is reported are medians and their ratios.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Contender:
    """One of the ways."""

    name: str
    run: Callable[[], float | None]
    """What is timed. Where it times itself, it gives the seconds."""
    prepare: Callable[[int], object] = lambda _round: None
    """What comes before it, untimed; gets the number of the round."""
    settle: Callable[[], object] = lambda: None
    """What comes behind it, untimed: what it has left undone would disturb the next one."""


@dataclass(frozen=True, slots=True)
class Times:
    """What one contender took, in seconds."""

    runs: int
    median_s: float
    lower_quartile_s: float
    upper_quartile_s: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Times:
        """Summarises at least two measurements."""
        lower, median, upper = statistics.quantiles(seconds, n=4, method="inclusive")
        return cls(len(seconds), median, lower, upper)

    def split(self, count: int) -> Times:
        """Of one thing, where `count` of them were done in a row and measured as one."""
        return Times(self.runs, self.median_s / count, self.lower_quartile_s / count, self.upper_quartile_s / count)


def take_turns(contenders: Sequence[Contender], *, warmups: int, rounds: int, in_a_row: int = 1) -> dict[str, Times]:
    """Gives each contender a turn a round.

    The order changes from round to round, the same way in every run: nobody always comes after the same neighbour.

    Args:
        contenders: The ways, names distinct.
        warmups: How many rounds come first and do not count.
        rounds: How many count; at least 2.
        in_a_row: How often a contender runs in its turn, of which the median counts. What takes a fraction of a
            millisecond is measured so: run once, it would meet the caches as the others have left them.
    """
    order = list(contenders)
    shuffler = random.Random(0)
    seconds: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    for number in range(warmups + rounds):
        shuffler.shuffle(order)
        for contender in order:
            taken = statistics.median(_run(contender, number * in_a_row + again) for again in range(in_a_row))
            if number >= warmups:
                seconds[contender.name].append(taken)
    return {name: Times.of(taken) for name, taken in seconds.items()}


def _run(contender: Contender, number: int) -> float:
    contender.prepare(number)
    start = time.perf_counter()
    taken = contender.run()
    if taken is None:
        taken = time.perf_counter() - start
    contender.settle()
    return taken
