"""The long form of `tests/fault/test_server_deaths.py`: `make soak`, a quarter of an hour.

`OPTIMD_SOAK_SEED` chooses the moments; without it each run draws others. The seed is printed.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.immortality import MODES, train_through_all_deaths, train_through_deaths
from tests.soak.conftest import seed_of_run

pytestmark = pytest.mark.timeout(1200)


@pytest.mark.parametrize("mode", MODES)
def test_twenty_four_deaths_of_the_server_change_nothing(mode: str, tmp_path: Path) -> None:
    """Weights and state_dict are bit-equal to an undisturbed run; the moments are counted from the recovery log."""
    deaths = train_through_deaths(
        mode, tmp_path, steps=400, kills=24, seed=random.Random(seed_of_run()).getrandbits(32)
    )
    print(deaths.kills, "kills,", deaths.in_open_step, "in an open step,", deaths.in_snapshot, "in a snapshot")
    assert deaths.kills == deaths.recoveries == 24
    assert deaths.in_open_step >= 8
    assert deaths.in_snapshot >= 2


def test_twenty_deaths_of_server_and_workers_change_nothing(tmp_path: Path) -> None:
    """`apply="atomic"` and `on_loss="wait"`: workers start again at `opt.next_sequence`, to the same bits."""
    deaths, killed = train_through_all_deaths(tmp_path, steps=400, kills=24, seed=seed_of_run())
    print(deaths.kills, "servers and", killed, "workers were killed")
    assert deaths.kills >= 8
    assert killed >= 8
