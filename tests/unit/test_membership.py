"""Membership by lease: who may come in, who is displaced, who is fenced, and whose lease has ended."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optimd.server.aggregation import Worker
from optimd.server.membership import Claim, Membership, Verdict

LEASE_S: Final = 10.0
A, B = Worker(0, "a"), Worker(1, "b")
FIRST, SECOND, THIRD, OTHER = range(101, 105)


def entered(*workers: Worker, now: float = 0.0, while_broken: bool = False) -> Membership:
    """A membership in which all these are; A as the first process with its id."""
    membership = Membership(LEASE_S, while_broken=while_broken)
    for worker in workers:
        membership.enter(worker, FIRST if worker == A else OTHER, now=now)
    return membership


def claim(
    membership: Membership,
    worker: Worker,
    incarnation: int,
    now: float,
    *,
    since: float | None = None,
    returns: bool = False,
) -> Claim:
    """A claim that is made for the first time now, if nothing else is said."""
    since = now if since is None else since
    return membership.claim(worker, incarnation, now=now, since=since, returns=returns)


# --- coming in


def test_a_place_that_nobody_holds_is_free() -> None:
    """Whoever else is there, with another id and another rank."""
    assert claim(Membership(LEASE_S), A, FIRST, 0.0) == Claim(Verdict.ENTER)
    assert claim(entered(B), A, FIRST, 0.0) == Claim(Verdict.ENTER)


def test_a_place_whose_worker_has_left_is_free() -> None:
    """At once."""
    membership = entered(A)
    membership.leave(A)
    assert claim(membership, A, SECOND, 1.0) == Claim(Verdict.ENTER)
    assert claim(membership, Worker(0, "other"), FIRST, 1.0) == Claim(Verdict.ENTER)


def test_a_claim_changes_nothing() -> None:
    """Only to enter does."""
    membership = entered(A)
    membership.disconnect(A)
    for _ in range(2):
        assert claim(membership, A, SECOND, 1.0) == Claim(Verdict.ENTER, (A,))
    assert claim(membership, A, FIRST, 1.0, returns=True) == Claim(Verdict.RESUME, (A,))


# --- coming back


@pytest.mark.parametrize("returns", [True, False])
@pytest.mark.parametrize("connected", [True, False])
def test_a_process_whose_line_was_down_resumes_its_place(*, connected: bool, returns: bool) -> None:
    """Also where the server has not noticed yet, and where the process had not heard that it was let in."""
    membership = entered(A, B)
    if not connected:
        membership.disconnect(A)
    assert claim(membership, A, FIRST, 5.0, returns=returns) == Claim(Verdict.RESUME, (A,))


def test_a_process_whose_lease_is_over_resumes_if_nobody_has_looked() -> None:
    """Its place is still its own."""
    membership = entered(A)
    membership.disconnect(A)
    assert claim(membership, A, FIRST, 100.0, returns=True) == Claim(Verdict.RESUME, (A,))


def test_a_process_whose_lease_has_ended_enters_anew() -> None:
    """If nobody has taken its id since."""
    membership = entered(A)
    membership.leave(A)
    assert claim(membership, A, FIRST, 100.0, returns=True) == Claim(Verdict.ENTER)


def test_a_process_that_resumes_has_a_whole_lease_again() -> None:
    """It has been heard of, on a line that is up and has nothing to send yet."""
    membership = Membership(LEASE_S)
    place = membership.enter(A, FIRST, now=0.0)
    # Its old line may not be down yet.
    place.sending_since_s = 1.0
    assert membership.resume(A, now=8.0) is place
    assert membership.lapsed(17.9) == []
    assert membership.lapsed(18.0) == [A]
    assert claim(membership, A, SECOND, 9.0).verdict is Verdict.WAIT


def test_a_process_that_comes_back_with_another_rank_displaces_itself() -> None:
    """It is not in its own way."""
    membership = entered(A)
    moved = Worker(5, "a")
    assert claim(membership, moved, FIRST, 1.0, returns=True) == Claim(Verdict.ENTER, (A,))


def test_a_process_returns_to_a_job_that_knows_nothing_of_it() -> None:
    """The job is another one of that name, or has forgotten: the process may not think that it is its own."""
    membership = entered(B)
    assert claim(membership, A, FIRST, 0.0, returns=True) == Claim(Verdict.UNKNOWN)
    # Whoever has its rank.
    assert claim(membership, Worker(B.rank, "a"), FIRST, 0.0, returns=True) == Claim(Verdict.UNKNOWN)


# --- one process after another


def test_a_successor_displaces_a_process_whose_line_is_broken_at_once() -> None:
    """However recently it was heard of."""
    membership = entered(A)
    membership.heard(A, 5.0)
    membership.disconnect(A)
    assert claim(membership, A, SECOND, 5.0) == Claim(Verdict.ENTER, (A,))


def test_a_successor_waits_for_a_process_whose_line_is_up_until_its_lease_ends() -> None:
    """It may be dead: then nothing more is heard of it."""
    membership = entered(A)
    membership.heard(A, 3.0)
    for now in (4.0, 12.9):
        assert claim(membership, A, SECOND, now, since=4.0) == Claim(Verdict.WAIT, (A,))
    assert claim(membership, A, SECOND, 13.0, since=4.0) == Claim(Verdict.ENTER, (A,))


def test_an_id_is_in_use_once_its_process_has_been_heard_of() -> None:
    """Only what is heard after the claim counts: a process that died a moment ago was heard of before that."""
    membership = entered(A)
    membership.heard(A, 4.0)
    assert claim(membership, A, SECOND, 4.5, since=4.0) == Claim(Verdict.WAIT, (A,))
    membership.heard(A, 5.0)
    assert claim(membership, A, SECOND, 5.5, since=4.0) == Claim(Verdict.IN_USE, (A,))


def test_a_process_that_was_heard_of_and_then_dies_is_displaced_by_who_asks_later() -> None:
    """The lease counts from the last that was heard."""
    membership = entered(A)
    membership.heard(A, 5.0)
    assert claim(membership, A, SECOND, 14.9, since=14.0) == Claim(Verdict.WAIT, (A,))
    assert claim(membership, A, SECOND, 15.0, since=4.0) == Claim(Verdict.ENTER, (A,))


def test_a_line_that_breaks_while_a_successor_waits_lets_it_in() -> None:
    """It need not wait for the lease."""
    membership = entered(A)
    assert claim(membership, A, SECOND, 1.0).verdict is Verdict.WAIT
    membership.disconnect(A)
    assert claim(membership, A, SECOND, 1.5, since=1.0) == Claim(Verdict.ENTER, (A,))


# --- ranks


@pytest.mark.parametrize("incarnation", [FIRST, SECOND])
def test_a_rank_is_held_like_an_id(incarnation: int) -> None:
    """By whoever has it, against any other id: that is another process, whatever its incarnation."""
    membership = entered(A)
    rival = Worker(A.rank, "other")
    assert claim(membership, rival, incarnation, 1.0) == Claim(Verdict.WAIT, (A,))
    membership.heard(A, 2.0)
    assert claim(membership, rival, incarnation, 2.5, since=1.0) == Claim(Verdict.IN_USE, (A,))
    assert claim(membership, rival, incarnation, 12.0, since=1.0) == Claim(Verdict.ENTER, (A,))
    membership.disconnect(A)
    assert claim(membership, rival, incarnation, 2.5, since=1.0) == Claim(Verdict.ENTER, (A,))


def test_who_loses_its_rank_to_another_id_is_not_fenced() -> None:
    """Nobody has taken its id: it may come back with another rank, or once its rival is gone."""
    membership = entered(A)
    rival = Worker(A.rank, "other")
    membership.leave(A)
    membership.enter(rival, OTHER, now=1.0)
    assert claim(membership, A, FIRST, 2.0, returns=True) == Claim(Verdict.WAIT, (rival,))
    assert claim(membership, Worker(7, "a"), FIRST, 2.0, returns=True) == Claim(Verdict.ENTER)
    membership.leave(rival)
    assert claim(membership, A, FIRST, 3.0, returns=True) == Claim(Verdict.ENTER)


def test_an_id_and_a_rank_may_be_held_by_two_processes() -> None:
    """Both have to be out of the way, and both are displaced."""
    membership = entered(B, A)
    both = Worker(B.rank, A.worker_id)
    assert claim(membership, both, SECOND, 1.0) == Claim(Verdict.WAIT, (A, B))
    assert claim(membership, Worker(A.rank, B.worker_id), SECOND, 1.0).rivals == (A, B)
    # Who has it is whoever was heard of: the other may be dead.
    membership.heard(A, 2.0)
    assert claim(membership, both, SECOND, 2.5, since=1.0) == Claim(Verdict.IN_USE, (A,))
    membership.disconnect(A)
    assert claim(membership, both, SECOND, 1.0) == Claim(Verdict.WAIT, (B,))
    membership.heard(B, 2.0)
    assert claim(membership, both, SECOND, 2.5, since=1.0) == Claim(Verdict.IN_USE, (B,))
    membership.disconnect(B)
    assert claim(membership, both, SECOND, 3.0, since=1.0) == Claim(Verdict.ENTER, (A, B))


def test_a_live_holder_of_the_rank_keeps_a_process_from_its_own_place() -> None:
    """That it had another rank before does not help it."""
    membership = entered(A, B)
    moved = Worker(B.rank, A.worker_id)
    assert claim(membership, moved, FIRST, 1.0, returns=True) == Claim(Verdict.WAIT, (B,))


# --- fencing


def test_a_process_whose_id_was_taken_is_superseded_for_ever() -> None:
    """Wherever its successors are: in the job, off their lines, or gone."""
    membership = entered(A)
    membership.leave(A)
    membership.enter(A, SECOND, now=1.0)
    for event in (
        lambda: membership.heard(A, 2.0),
        lambda: membership.disconnect(A),
        lambda: membership.leave(A),
        lambda: membership.enter(A, THIRD, now=3.0),
        lambda: membership.leave(A),
    ):
        event()
        assert claim(membership, A, FIRST, 100.0, returns=True) == Claim(Verdict.SUPERSEDED)
        assert claim(membership, Worker(9, "a"), FIRST, 100.0, returns=True) == Claim(Verdict.SUPERSEDED)
    assert claim(membership, A, SECOND, 100.0, returns=True) == Claim(Verdict.SUPERSEDED)
    assert claim(membership, A, THIRD, 100.0, returns=True) == Claim(Verdict.ENTER)


def test_fences_are_of_one_id() -> None:
    """The same number under another id is another process."""
    membership = entered(A)
    membership.enter(B, FIRST, now=0.0)
    membership.leave(A)
    membership.enter(A, SECOND, now=1.0)
    assert claim(membership, B, FIRST, 2.0, returns=True) == Claim(Verdict.RESUME, (B,))


# --- leases


def test_a_lease_ends_when_nothing_is_heard() -> None:
    """Counted from the last that was heard, on a line that is up or broken."""
    membership = entered(A, B)
    membership.heard(A, 4.0)
    membership.disconnect(A)
    assert membership.lapsed(9.9) == []
    assert membership.lapsed(10.0) == [B]
    assert membership.lapsed(14.0) == [A, B]


def test_a_broken_line_does_not_end_a_lease() -> None:
    """A process that is alive comes back."""
    membership = entered(A)
    membership.disconnect(A)
    assert membership.lapsed(9.9) == []
    membership.heard(A, 9.9)
    assert membership.lapsed(19.8) == []


def test_lapsed_workers_are_named_until_they_leave() -> None:
    """In order of rank, not of when they came or lapsed."""
    low, high = Worker(0, "zebra"), Worker(1, "ant")
    membership = Membership(LEASE_S)
    membership.enter(high, FIRST, now=0.0)
    membership.enter(low, FIRST, now=1.0)
    for _ in range(2):
        assert membership.lapsed(11.0) == [low, high]
    membership.leave(low)
    assert membership.lapsed(11.0) == [high]


def test_a_reader_that_takes_nothing_lapses_though_it_is_heard_of() -> None:
    """Heartbeats come from another thread than the one that is stuck."""
    membership = Membership(LEASE_S)
    membership.enter(A, FIRST, now=0.0).sending_since_s = 2.0
    for now in (5.0, 11.0, 12.0):
        membership.heard(A, now)
    assert membership.lapsed(11.9) == []
    assert membership.lapsed(12.0) == [A]
    assert claim(membership, A, SECOND, 12.0) == Claim(Verdict.ENTER, (A,))


def test_a_reader_that_takes_something_has_the_lease_of_what_is_heard() -> None:
    """Nothing is being sent any more, or it has begun to take the next."""
    membership = Membership(LEASE_S)
    place = membership.enter(A, FIRST, now=0.0)
    place.sending_since_s = 2.0
    membership.heard(A, 11.0)
    place.sending_since_s = None
    assert membership.lapsed(20.9) == []
    place.sending_since_s = 12.0
    assert membership.lapsed(20.9) == []
    assert membership.lapsed(21.0) == [A]


def test_what_was_being_sent_on_a_broken_line_does_not_count() -> None:
    """Nobody can take it."""
    membership = Membership(LEASE_S)
    place = membership.enter(A, FIRST, now=0.0)
    membership.heard(A, 9.0)
    place.sending_since_s = 2.0
    membership.disconnect(A)
    assert membership.lapsed(18.9) == []
    assert membership.lapsed(19.0) == [A]


def test_where_nobody_waits_for_anybody_leases_end_on_broken_lines_only() -> None:
    """A process that has been stopped for a night finds its place on its line."""
    membership = entered(A, B, while_broken=True)
    membership.disconnect(B)
    assert membership.lapsed(9.9) == []
    assert membership.lapsed(1e6) == [B]
    membership.resume(B, now=1e6)
    assert membership.lapsed(2e6) == []
    # Unless another process wants that.
    assert claim(membership, B, SECOND, 2e6) == Claim(Verdict.ENTER, (B,))


def test_news_of_workers_that_are_not_there_changes_nothing() -> None:
    """It may come from threads that have not heard that they left."""
    membership = entered(A)
    membership.heard(B, 5.0)
    membership.leave(B)
    assert claim(membership, B, FIRST, 6.0, returns=True) == Claim(Verdict.UNKNOWN)
    assert membership.lapsed(100.0) == [A]


# --- on random schedules


@dataclass
class Process:
    """One of a simulation's processes, by its own account."""

    worker: Worker
    incarnation: int
    has_been_in: bool = False
    is_in: bool = False
    is_connected: bool = False
    is_fenced: bool = False
    heard_s: float = 0.0
    asking_since_s: float | None = None
    asked_since_s: float = 0.0
    """Since when it asked, when it was last told something."""

    def is_alive(self, now: float) -> bool:
        """Whether it has to be thought of as alive: its line is up, and it was heard of."""
        return self.is_in and self.is_connected and now < self.heard_s + LEASE_S


KINDS: Final = (*("ask",) * 4, *("hear",) * 2, "break", "leave", *("look",) * 2, *("pass",) * 3)


class Simulation:
    """Plays a schedule: processes that share ids and ranks ask to be let in, are heard of, break off and leave."""

    def __init__(self) -> None:
        self.membership = Membership(LEASE_S)
        places = [Worker(rank, worker_id) for worker_id in "ab" for rank in (0, 1)]
        # The same numbers with both ids: they tell the processes of one id apart.
        numbers = (0, 1, 0, 1, 2, 3, 2, 3, 4)
        self.processes = [Process(*each) for each in zip([*places, *places, places[0]], numbers, strict=True)]
        self.now = 0.0
        self.script: list[str] = []

    def rivals(self, process: Process) -> list[Process]:
        """Who is in its place."""
        return [
            other
            for other in self.processes
            if other is not process
            and other.is_in
            and (other.worker.rank == process.worker.rank or other.worker.worker_id == process.worker.worker_id)
        ]

    def choose(self, choice: int) -> tuple[str, Process, Claim | None]:
        """Lets an event happen. The remainder of the choice by the number of kinds picks the kind."""
        kind = KINDS[choice % len(KINDS)]
        process = self.processes[choice // len(KINDS) % len(self.processes)]
        if kind not in {"ask", "look", "pass"} and not process.is_in:
            # What is heard of those that are out, or did not come in, is for them alone.
            kind = "ask"
        self.script.append(f"{self.now:g} s: {kind} {process.worker} {process.incarnation}")
        membership, worker = self.membership, process.worker
        claim: Claim | None = None
        match kind:
            case "ask":
                claim = self.ask(process)
            case "hear":
                membership.heard(worker, self.now)
                process.heard_s = self.now
            case "break":
                membership.disconnect(worker)
                process.is_connected = False
            case "leave":
                membership.leave(worker)
                process.is_in = False
            case "look":
                for lapsed in membership.lapsed(self.now):
                    membership.leave(lapsed)
                    next(other for other in self.processes if other.is_in and other.worker == lapsed).is_in = False
            case _:
                self.now += (1.0, 4.0, LEASE_S)[choice % 3]
        return kind, process, claim

    def ask(self, process: Process) -> Claim:
        """A process asks, or goes on asking, and comes in if it may."""
        if process.asking_since_s is None:
            process.asking_since_s = self.now
        process.asked_since_s = process.asking_since_s
        membership, worker = self.membership, process.worker
        claim = membership.claim(
            worker,
            process.incarnation,
            now=self.now,
            since=process.asking_since_s,
            returns=process.has_been_in,
        )
        if claim.verdict is not Verdict.WAIT:
            process.asking_since_s = None
        if claim.verdict in {Verdict.ENTER, Verdict.RESUME}:
            if claim.verdict is Verdict.RESUME:
                membership.resume(worker, now=self.now)
            else:
                for rival in self.rivals(process):
                    assert rival.worker in claim.rivals
                    assert not rival.is_alive(self.now)
                    rival.is_in = False
                for displaced in claim.rivals:
                    membership.leave(displaced)
                membership.enter(worker, process.incarnation, now=self.now)
                for other in self.processes:
                    if other is not process and other.worker.worker_id == worker.worker_id and other.has_been_in:
                        other.is_fenced = True
            process.is_in = process.is_connected = process.has_been_in = True
            process.heard_s = self.now
        return claim


Check = Callable[[Simulation, str, Process, Claim | None], None]
schedules = st.lists(st.integers(0, len(KINDS) * 9 * 3 - 1), min_size=10, max_size=80)


def on_random_schedules(check: Check) -> Callable[[], None]:
    """Makes a test of what holds after every event. A schedule that fails is told event by event."""

    def test(schedule: list[int]) -> None:
        simulation = Simulation()
        try:
            for choice in schedule:
                check(simulation, *simulation.choose(choice))
        except AssertionError as error:
            error.add_note("\n".join(simulation.script))
            raise

    test.__name__, test.__doc__ = check.__name__, check.__doc__
    return settings(max_examples=200, deadline=None)(given(schedule=schedules)(test))


@on_random_schedules
def test_one_process_at_most_holds_an_id_or_a_rank(
    simulation: Simulation, kind: str, process: Process, claim: Claim | None
) -> None:
    """Whoever asks for it, returns to it, or wakes up after it was replaced."""
    inside = [other.worker for other in simulation.processes if other.is_in]
    assert len({worker.rank for worker in inside}) == len(inside)
    assert len({worker.worker_id for worker in inside}) == len(inside)


@on_random_schedules
def test_a_live_process_is_never_displaced(
    simulation: Simulation, kind: str, process: Process, claim: Claim | None
) -> None:
    """Whoever asks for its place waits, or is told that it is in use once the process was heard of since."""
    if claim is not None and claim.verdict in {Verdict.WAIT, Verdict.IN_USE}:
        alive = [rival for rival in simulation.rivals(process) if rival.is_alive(simulation.now)]
        heard = [rival for rival in alive if rival.heard_s > process.asked_since_s]
        assert claim.verdict is (Verdict.IN_USE if heard else Verdict.WAIT)
        assert claim.rivals == tuple(sorted(rival.worker for rival in heard or alive))
        assert claim.rivals


@on_random_schedules
def test_a_fenced_process_never_comes_in_again(
    simulation: Simulation, kind: str, process: Process, claim: Claim | None
) -> None:
    """And nobody else is turned away like one."""
    assert not any(other.is_fenced and other.is_in for other in simulation.processes)
    if claim is not None:
        assert (claim.verdict is Verdict.SUPERSEDED) == process.is_fenced
        assert claim.verdict is not Verdict.UNKNOWN


@on_random_schedules
def test_nobody_waits_for_a_place_for_longer_than_a_lease(
    simulation: Simulation, kind: str, process: Process, claim: Claim | None
) -> None:
    """By then the process in it has been heard of, or has lost it."""
    if claim is not None and claim.verdict is Verdict.WAIT:
        assert process.asking_since_s is not None
        assert simulation.now < process.asking_since_s + LEASE_S


@on_random_schedules
def test_leases_end_exactly_when_nothing_was_heard_for_as_long(
    simulation: Simulation, kind: str, process: Process, claim: Claim | None
) -> None:
    """Of those that are in the job."""
    lapsed = {
        other.worker for other in simulation.processes if other.is_in and simulation.now >= other.heard_s + LEASE_S
    }
    assert simulation.membership.lapsed(simulation.now) == sorted(lapsed)


def test_a_process_whose_coming_was_not_on_disk_is_let_back_into_a_restored_job() -> None:
    """Even over its predecessor's place, which nobody has come back to; but not over one that somebody has."""
    membership = Membership(10.0)
    membership.enter(A, 1, now=0.0)
    membership.disconnect(A)
    assert membership.claim(A, 2, now=1.0, since=1.0, returns=True).verdict is Verdict.SUPERSEDED
    membership.restored()
    assert membership.has_forgotten(A.worker_id, 2)
    assert not membership.has_forgotten(A.worker_id, 1)
    assert membership.claim(A, 2, now=1.0, since=1.0, returns=True) == Claim(Verdict.ENTER, (A,))
    assert membership.claim(B, 3, now=1.0, since=1.0, returns=True) == Claim(Verdict.ENTER)
    membership.resume(A, now=2.0)
    assert membership.claim(A, 2, now=2.0, since=2.0, returns=True).verdict is Verdict.SUPERSEDED
