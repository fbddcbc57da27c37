"""Fixtures, and a guard on what is tested."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import optimd.client
from optimd.server import Server
from tests.support import ROOT, running_server


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--against-wheel", action="store_true", help="fail unless optimd is imported from an installed wheel"
    )


def pytest_configure(config: pytest.Config) -> None:
    # Tests run several processes on few cores; torch's threads would wait for each other there. Children inherit it.
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    source = Path(optimd.client.__file__)
    if config.getoption("--against-wheel") and ROOT / "client" in source.parents:
        raise pytest.UsageError(f"optimd comes from the source tree: {source}")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine's own environment must not decide what a test connects to."""
    for name in [*os.environ]:
        if name.startswith(("OPTIMD_", "TORCHELASTIC_", "MASTER_", "LOCAL_", "GROUP_")) or name in {
            "RANK",
            "WORLD_SIZE",
        }:
            monkeypatch.delenv(name)


@pytest.fixture
def quick_server() -> Iterator[Server]:
    """As `server`, but leases end after a second."""
    with running_server(lease_s=1.0) as running:
        yield running


@pytest.fixture
def server() -> Iterator[Server]:
    """A server in this process. Tests that kill one start a process: `server_process`."""
    # Some leave it in the middle of a step: that is not waited for when it is over.
    with running_server(drain_timeout_s=1.0) as running:
        yield running
