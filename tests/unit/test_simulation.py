"""Jobs of several workers that come, stall, die and return, on random schedules through the pure state machines.

`SimulatedJob` and `Simulation` check after each event that what workers are told is what becomes of their gradients,
and that nobody waits for too long; at the end, that the parameters are what torch makes of the gradients that the
job's steps name. A schedule that goes wrong is printed as a script for `replay`.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Final

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from optimd.server.aggregation import SyncAggregator
from optimd.server.membership import Membership
from optimd.server.staleness import AsyncAggregator
from tests.unit.schedules import ImpossibleError, play, replay
from tests.unit.simulated_parts import Policy

SHARED: Final = Policy(world_size=3, buckets=3)
WAITING: Final = Policy(on_loss="wait", workers="abcd")
STREAMED: Final = Policy(world_size=2, streaming=True)
UNBOUNDED: Final = Policy(asynchronous=True, world_size=None)

POLICIES: Final = {
    "one accumulator": SHARED,
    "one accumulator, fractions": Policy(whole_numbers=False),
    "deterministic": Policy(world_size=3, separate=True, whole_numbers=False),
    "backup worker": Policy(world_size=3, backup_workers=1, whole_numbers=False),
    "waiting for the lost": WAITING,
    "waiting for the lost, deterministic": replace(WAITING, separate=True, whole_numbers=False),
    "elastic": Policy(world_size=None),
    "streamed, one worker": Policy(world_size=1, streaming=True, workers="a", buckets=3),
    "streamed": STREAMED,
    "streamed, deterministic": Policy(world_size=3, streaming=True, separate=True, whole_numbers=False),
    "asynchronous": UNBOUNDED,
    "asynchronous, streamed": replace(UNBOUNDED, streaming=True, whole_numbers=False),
    "staleness 0": replace(UNBOUNDED, max_staleness=0),
    "staleness 0, streamed": replace(UNBOUNDED, max_staleness=0, streaming=True),
    "staleness 1, streamed": replace(UNBOUNDED, max_staleness=1, streaming=True),
    "staleness 2": replace(UNBOUNDED, max_staleness=2, whole_numbers=False),
    "staleness 3, streamed": replace(UNBOUNDED, max_staleness=3, streaming=True),
}
LARGEST_CHOICE: Final = 2**16 - 1


@pytest.mark.parametrize("name", POLICIES)
@given(
    # Two bytes for each event: far quicker than a list of numbers.
    choices=st.binary(min_size=120, max_size=200),
    lease_s=st.sampled_from([2.0, 3.0, 5.0]),
    timeout_s=st.sampled_from([3.0, 4.0]),
)
# It is made shorter by `play`, which knows what an event is.
@settings(max_examples=100, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate])
def test_random_schedules_lose_nothing_count_nothing_twice_and_leave_nobody_waiting(
    name: str, choices: bytes, lease_s: float, timeout_s: float
) -> None:
    """Joins, pushes, broken lines, stalls, deaths and returns in any order, in every mode."""
    numbers = [int.from_bytes(choices[at : at + 2]) for at in range(0, len(choices), 2)]
    play(replace(POLICIES[name], lease_s=lease_s, timeout_s=timeout_s), numbers)


def seen_in_random_schedules(policy: Policy, count: int) -> Counter[str]:
    """What happens in some schedules that are always the same."""
    dice = random.Random(0)
    seen: Counter[str] = Counter()
    for _ in range(count):
        seen += play(policy, [dice.randint(0, LARGEST_CHOICE) for _ in range(80)]).seen
    return seen


ANYWHERE: Final = (
    "joined",
    "lost",
    "lost since it took nothing",
    "displaced",
    "IN_USE",
    "SUPERSEDED",
    "waited for a place",
    "returned within its lease",
    "returned after its lease",
    "resumed a push",
    "resent a bucket that is held",
    "gone in the middle of its push",
    "the receipt was lost, and had after coming back",
    "refused",
    "timed out",
    "Abandon",
    "Skip",
    "APPLIED",
    "SKIPPED_NONFINITE",
)
SYNCHRONOUS: Final = (
    *ANYWHERE,
    "MERGED",
    "pushed in vain",
    "gone after its push",
    "Discard",
    "waited for the step's end to join",
)
SHRINKING: Final = (*SYNCHRONOUS, "DROPPED_LATE", "began too late", "timed out for who waited at the boundary")
BOUNDED: Final = (*ANYWHERE, "waited for slower workers", "waited for slower workers after coming back")


@pytest.mark.parametrize(
    ("policy", "kinds"),
    [
        (SHARED, (*SHRINKING, "asked to push again")),
        (POLICIES["deterministic"], SHRINKING),
        (POLICIES["backup worker"], SHRINKING),
        (POLICIES["elastic"], SHRINKING),
        (WAITING, (*SYNCHRONOUS, "TimeOut", "joined in the middle of a step", "asked to push again", "TOO_LONG")),
        (STREAMED, (*SHRINKING, "partial")),
        (POLICIES["staleness 0, streamed"], (*BOUNDED, "partial", "caught up after it had been left behind")),
        (POLICIES["staleness 2"], (*BOUNDED, *(f"released at lag {lag}" for lag in range(3)))),
    ],
)
def test_random_schedules_reach_every_kind_of_event_and_outcome(policy: Policy, kinds: tuple[str, ...]) -> None:
    """What is checked on them is checked on things that happen."""
    seen = seen_in_random_schedules(policy, 60)
    assert [kind for kind in kinds if not seen[kind]] == []


# --- scripts


def test_who_has_a_lost_worker_s_gradients_in_its_sum_pushes_again() -> None:
    """Where gradients are added up, a lost worker's cannot be taken out of the sum: the others' go with them."""
    simulation = replay(
        SHARED,
        [
            "start a0",
            "start b0",
            "start c0",
            "begin a0 012",
            "rush a0",
            "begin b0 12",
            "rush b0",
            "begin c0 01",
            "push c0 1",
            "die c0",
            "wait 4",
            "push a0 1",
            "rush a0",
            "rush b0",
        ],
    )
    assert simulation.seen["asked to push again"] == 2
    (step,) = simulation.job.ledger.history
    assert step.contributors == (("a", 0), ("b", 0))


def test_a_worker_that_stalls_in_its_push_past_its_lease_comes_too_late_when_it_wakes() -> None:
    """The others have gone on; it is told so, and is in the next step."""
    simulation = replay(
        Policy(),
        [
            "start a0",
            "start b0",
            "begin b0 01",
            "push b0 0",
            "stall b0",
            "begin a0 01",
            "rush a0",
            "wait 4",
            "rush a0",
            "wait 1",
            "wake b0",
            "return b0",
            "rush b0",
            "begin b0 01",
            "begin a0 01",
            "rush b0",
            "rush a0",
        ],
    )
    assert simulation.seen["DROPPED_LATE"] == 1
    assert [step.contributors for step in simulation.job.ledger.history] == [(("a", 0),), (("a", 1), ("b", 1))]


def test_a_receipt_that_a_broken_line_has_lost_is_had_after_coming_back() -> None:
    """The push is in the step that the others completed meanwhile, and is not pushed again."""
    simulation = replay(
        Policy(),
        [
            "start a0",
            "start b0",
            "begin a0 01",
            "rush a0",
            "cut a0",
            "begin b0 1",
            "rush b0",
            "return a0",
        ],
    )
    assert simulation.seen["the receipt was lost, and had after coming back"] == 1
    (step,) = simulation.job.ledger.history
    assert step.contributors == (("a", 0), ("b", 0))


def test_who_comes_too_late_for_a_streamed_step_is_given_parameters_though_nobody_ends_that() -> None:
    """It waits at the step's end, which time brings: the step closes as it stands."""
    simulation = replay(
        STREAMED,
        [
            "start a0",
            "start b0",
            "begin a0 01",
            "rush a0",
            "wait 5",
            "begin a0 01",
            "push a0 0",
            "begin b0 01",
            "rush b0",
            "wait 5",
            "rush a0",
        ],
    )
    assert simulation.seen["waited for the step's end to be given parameters"] >= 1
    assert simulation.seen["timed out for who waited at the boundary"] == 1
    assert [(step.contributors, step.partial) for step in simulation.job.ledger.history] == [
        ((("a", 0),), ()),
        ((("a", 1),), (("a", 1),)),
    ]


@pytest.mark.parametrize("policy", [SHARED, STREAMED])
def test_a_newcomer_is_let_in_though_nobody_in_the_step_ends_it(policy: Policy) -> None:
    """The workers in it are alive, and busy with something else."""
    simulation = replay(
        replace(policy, world_size=2),
        [
            "start a0",
            "start b0",
            "begin a0 01",
            "push a0 0",
            "start c0",
            "wait 5",
            "begin c0 01",
            "rush c0",
        ],
    )
    assert simulation.seen["timed out for who waited at the boundary"] == 1
    assert simulation.job.ledger.history[-1].contributors == (("c", 0),)


def test_who_comes_back_while_it_waits_for_slower_workers_waits_on() -> None:
    """Else it would have parameters before it is released."""
    simulation = replay(
        POLICIES["staleness 0"],
        [
            "start a0",
            "start b0",
            "begin a0 01",
            "rush a0",
            "break a0",
            "return a0",
            "serve a0",
            "begin b0 01",
            "rush b0",
            "serve a0",
            "begin a0 01",
            "rush a0",
        ],
    )
    assert simulation.seen["waited for slower workers after coming back"] >= 1
    assert simulation.seen["the receipt was lost, and had after coming back"] == 1


def test_another_worker_takes_a_lost_one_s_place_in_the_middle_of_a_step_that_waits_for_it() -> None:
    """`d` has the rank of `a`, whose line is broken."""
    simulation = replay(
        WAITING,
        [
            "start a0",
            "start b0",
            "begin a0 01",
            "push a0 0",
            "begin b0 01",
            "rush b0",
            "die a0",
            "start d0",
            "begin d0 01",
            "rush d0",
            "wait 1",
            "rush b0",
        ],
    )
    assert simulation.seen["joined in the middle of a step"] == 1
    (step,) = simulation.job.ledger.history
    assert step.contributors == (("d", 0), ("b", 0))


def test_an_event_that_cannot_happen_is_not_played() -> None:
    """A script that does not fit the state machines any more must not pass for one that goes well."""
    with pytest.raises(ImpossibleError, match="end a0"):
        replay(Policy(), ["start a0", "end a0"])


# --- what the simulation is worth

FAULTS: Final[dict[str, tuple[Policy, type, str, Callable[..., Any]]]] = {
    "nobody is asked to push again": (SHARED, SyncAggregator, "owed", lambda *_: frozenset()),
    "what is held already is taken once more": (SHARED, SyncAggregator, "holds", lambda *_: False),
    "silent workers are waited for": (Policy(), SyncAggregator, "tick", lambda *_, **__: []),
    "newcomers come in at any time": (Policy(), SyncAggregator, "may_join", lambda *_: True),
    "slower workers are not waited for": (
        replace(UNBOUNDED, max_staleness=1),
        AsyncAggregator,
        "lag",
        lambda *_: 0,
    ),
    "leases do not end": (Policy(), Membership, "lapsed", lambda *_: []),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_random_schedules_find_a_fault_and_tell_it_as_a_short_script(
    fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a method that does its work no more, some schedule goes wrong soon; its script does, too."""
    policy, machine, method, broken = FAULTS[fault]
    monkeypatch.setattr(machine, method, broken)
    with pytest.raises((AssertionError, RuntimeError)) as caught:
        seen_in_random_schedules(policy, 100)
    (note,) = caught.value.__notes__
    script = eval(note.removeprefix("replay"), {"Policy": Policy})
    assert script[0] == policy
    assert len(script[1]) < 40
    with pytest.raises((AssertionError, RuntimeError)):
        replay(*script)
    monkeypatch.undo()
    replay(*script)
