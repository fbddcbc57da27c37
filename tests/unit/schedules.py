"""Schedules of simulated workers: scripts that are replayed, and random ones.

A script is a list of events, as `Simulation.happen` takes them. A random schedule that goes wrong is told as a script,
without the events that do not matter, to be pasted into a test.
"""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from typing import Final

from tests.unit.simulated_parts import Policy
from tests.unit.simulation import Simulation

# What random scripts are made of, the likelier the more often it is named.
_KINDS: Final = (
    *("start",) * 4,
    *("begin",) * 10,
    *("push",) * 16,
    *("end",) * 6,
    *("rush",) * 8,
    *("serve",) * 4,
    *("wait",) * 3,
    *("die", "leave", "cut", "stall") * 2,
    *("claim", "break", "clog", "unclog", "take_back"),
    *("return",) * 4,
    *("wake",) * 2,
)
_ONWARD: Final = ("rush", "begin", "return", "wake", "start", "serve", "wait")


class ImpossibleError(Exception):
    """An event cannot happen when it comes."""


def replay(policy: Policy, script: Sequence[str]) -> Simulation:
    """Plays a script to the end of all pushes in it.

    Raises:
        ImpossibleError: an event in it cannot happen when it comes.
        AssertionError: something is not as it has to be.
    """
    simulation = Simulation(policy)
    for event in script:
        if not simulation.is_possible(event):
            raise ImpossibleError(event)
        simulation.happen(event)
    simulation.finish()
    return simulation


def play(policy: Policy, choices: Sequence[int]) -> Simulation:
    """Plays events that are picked by numbers, each among those that are possible at its time.

    Raises:
        AssertionError: something is not as it has to be; with a script that shows it.
    """
    simulation = Simulation(policy)
    try:
        for choice in choices:
            simulation.happen(_pick(simulation, choice))
        simulation.finish()
    except Exception as error:
        script = shortened(policy, simulation.script, _place(error))
        lines = "".join(f"    {event!r},\n" for event in script)
        error.add_note(f"replay(\n  {policy},\n  [\n{lines}  ],\n)")
        raise
    return simulation


def _pick(simulation: Simulation, choice: int) -> str:
    kind, which = _KINDS[choice % len(_KINDS)], choice // len(_KINDS)
    for each in (kind, *_ONWARD):
        options = simulation.options(each)
        if options:
            return options[which % len(options)]
    raise AssertionError("time can always pass")


def shortened(policy: Policy, script: Sequence[str], place: str) -> list[str]:
    """A script without the events without which it goes wrong at the same place."""
    kept = list(script)
    for at in reversed(range(len(script))):
        shorter = _gone_wrong(policy, kept[:at] + kept[at + 1 :], place) if at < len(kept) else None
        kept = kept if shorter is None else shorter
    return kept if len(kept) == len(script) else shortened(policy, kept, place)


def _gone_wrong(policy: Policy, script: Sequence[str], place: str) -> list[str] | None:
    """What happens of a script up to where it goes wrong at that place, if it does."""
    simulation = Simulation(policy)
    try:
        for event in script:
            if simulation.is_possible(event):
                simulation.happen(event)
        simulation.finish()
    except Exception as error:  # noqa: BLE001  # whatever it is: it is what the script is for
        return simulation.script if _place(error) == place else None
    return None


def _place(error: Exception) -> str:
    return str(traceback.extract_tb(error.__traceback__)[-1])
