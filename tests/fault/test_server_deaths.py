"""The server is killed over and over, and nothing of the training changes, to the last bit.

`make soak` runs the long form, in tests/soak.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.immortality import MODES, train_through_all_deaths, train_through_deaths

pytestmark = pytest.mark.timeout(150)


@pytest.mark.parametrize("mode", MODES)
def test_weights_and_state_are_those_of_an_undisturbed_run_whenever_the_server_is_killed(
    mode: str, tmp_path: Path
) -> None:
    """Four kills each. Asserts that they happened, and that the servers after them recovered the job."""
    deaths = train_through_deaths(mode, tmp_path, steps=60, kills=4, seed=sum(map(ord, mode)))
    assert deaths.kills == 4
    assert deaths.recoveries == 4


def test_weights_are_those_of_an_undisturbed_run_whenever_workers_are_killed_as_well(tmp_path: Path) -> None:
    """Two workers, atomic, each awaited: server, worker or both die four times."""
    deaths, killed = train_through_all_deaths(tmp_path, steps=60, kills=4, seed=11)
    assert deaths.kills == deaths.recoveries
    assert deaths.kills >= 1
    assert killed >= 1
