"""Steps across a line of 1 Gbit/s between two network namespaces, and what overlapping them with the backward saves."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from benchmarks.crew import crews
from benchmarks.namespaces import RATE_BITS_PER_S, slow_link
from benchmarks.peers import GlooServer, Local, OneWay, Optimd, RpcServer
from benchmarks.peers.backward import ALONE, Backward, BackwardAndStep
from benchmarks.step_time import MIDDLE, QUICK_MIDDLE, StepTimes, Suite, measure
from benchmarks.timing import Contender, Times, take_turns
from benchmarks.venues import Venue

RAW: Final = OneWay().name
_ETHERNET: Final = 1514 / 1448
"""What a frame takes on the line, in what it carries of a TCP stream."""

# In this order: the job's name is its contender's, and two jobs must not be one.
ATOMIC: Final = BackwardAndStep(transport="tcp", options=(("apply", "atomic"),), label=", atomic")
OVERLAPPED: Final = BackwardAndStep(
    transport="tcp", options=(("apply", "atomic"), ("overlap", True)), label=", atomic, overlap"
)
_CALIBRATION: Final = 1_000
"""How many multiplications a backward has whose time tells how many are needed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkPlan:
    """Who steps what across the line, and how often."""

    suite: Suite
    overlap_rounds: int


@dataclass(frozen=True, slots=True, kw_only=True)
class OverlapTimes:
    """What a backward and a step behind it take."""

    model: str
    multiplications: int
    upload_s: float
    """What the gradients take on the line, one way."""
    times: dict[str, Times]
    """Of the backward alone, and with a step, by contender."""

    @property
    def ratio(self) -> float | None:
        """What a step takes beyond the backward with overlap, in what it takes without; None without overlap."""
        if OVERLAPPED.name not in self.times:
            return None
        alone = self.times[ALONE].median_s
        without = self.times[ATOMIC.name].median_s - alone
        return (self.times[OVERLAPPED.name].median_s - alone) / without


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkTimes:
    """What was measured across the line."""

    steps: StepTimes
    arithmetic_s: float
    """What the gradients of a step take on the line, one way, by its rate and the headers."""
    overlap: OverlapTimes


def _suite(model: str, rounds: int) -> Suite:
    servers = (GlooServer(), RpcServer())
    daemons = (Optimd(transport="tcp"), Optimd(transport="tcp", wire="bf16"))
    return Suite(model=model, workers=1, warmups=1, rounds=rounds, peers=(Local(), OneWay(), *daemons, *servers))


FULL: Final = LinkPlan(suite=_suite(MIDDLE, 5), overlap_rounds=5)
QUICK: Final = LinkPlan(suite=_suite(QUICK_MIDDLE, 2), overlap_rounds=2)


def run(plan: LinkPlan) -> LinkTimes:
    """Measures. Blocks.

    Raises:
        LinkUnavailableError: there is no such line to be had here.
        PeerError: a contender failed.
        ServerStartError: a daemon did not start.
    """
    with _across() as venue:
        steps = measure(plan.suite, venue)
        upload_s = steps.times[RAW].median_s
        overlap = _overlap(plan.suite.model, plan.overlap_rounds, upload_s, venue)
    step_bits = steps.parameters * 4 * 8
    return LinkTimes(steps=steps, arithmetic_s=step_bits * _ETHERNET / RATE_BITS_PER_S, overlap=overlap)


@contextlib.contextmanager
def _across() -> Iterator[Venue]:
    with tempfile.TemporaryDirectory(prefix="optimd-bench-") as folder, slow_link() as (servers, workers):
        yield Venue(Path(folder), servers, workers)


def _overlap(model: str, rounds: int, upload_s: float, venue: Venue) -> OverlapTimes:
    multiplications = _multiplications_for(upload_s, model, venue)
    daemons = [ATOMIC, OVERLAPPED]
    with crews([Backward(), *daemons], model, 1, venue, multiplications=multiplications) as started:
        contenders = [Contender(crew.peer.name, crew.step, crew.prepare) for crew in started]
        times = take_turns(contenders, warmups=1, rounds=rounds)
    return OverlapTimes(model=model, multiplications=multiplications, upload_s=upload_s, times=times)


def _multiplications_for(seconds: float, model: str, venue: Venue) -> int:
    """With how many a backward takes as long as that."""
    without = _backward_s(0, model, venue)
    count = _CALIBRATION
    # Twice, since they are not done at the same rate when there are many.
    for _ in range(2):
        each = (_backward_s(count, model, venue) - without) / count
        count = max(1, round((seconds - without) / each))
    return count


def _backward_s(multiplications: int, model: str, venue: Venue) -> float:
    with crews([Backward()], model, 1, venue, multiplications=multiplications) as (crew,):
        return take_turns([Contender(ALONE, crew.step, crew.prepare)], warmups=1, rounds=4)[ALONE].median_s
