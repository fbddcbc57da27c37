"""A server that keeps snapshots alone goes back to the last one, and says so to whoever was told of more."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import nn

from optimd.client import Adam, JobRewoundError, ProxyOptions
from optimd.server import Server
from tests.relay import Relay
from tests.support import running_server

SIZE = 500


def gradient(number: int) -> torch.Tensor:
    return torch.randn(SIZE, generator=torch.Generator().manual_seed(number))


@contextmanager
def relayed(folder: Path) -> Iterator[tuple[Server, Relay]]:
    """A server with a data dir below `folder`, and a line to it that can be led to another one."""
    with (
        running_server(data_dir=str(folder / "data"), durability="snapshot") as server,
        Relay(server.address) as relay,
    ):
        yield server, relay


@contextmanager
def successor(folder: Path, relay: Relay, **settings: Any) -> Iterator[Server]:
    """The server dies, as far as workers can tell, and one on what is on its disk now answers in its place."""
    shutil.copytree(folder / "data", folder / "copy")
    with running_server(data_dir=str(folder / "copy"), **{"durability": "snapshot", **settings}) as server:
        relay.lead_to(server.address)
        yield server


def options(on_rewind: Literal["error", "follow"], **more: Any) -> ProxyOptions:
    return ProxyOptions(worker_id="one", bucket_bytes=1024, on_rewind=on_rewind, retry_timeout_s=20, **more)


def step(optimizer: torch.optim.Optimizer, p: nn.Parameter, number: int) -> None:
    p.grad = gradient(number)
    optimizer.step()


@pytest.mark.parametrize("joins_late", [False, True])
def test_a_worker_that_was_told_of_more_is_told_that_it_is_lost(tmp_path: Path, joins_late: bool) -> None:
    """Also one of whose coming the snapshot knows nothing. Whatever it tries afterwards."""
    p = nn.Parameter(torch.zeros(SIZE))
    with relayed(tmp_path) as (server, relay):
        if joins_late:
            with Adam([nn.Parameter(torch.zeros(SIZE))], server=server.address, job="j", options=options("error")):
                server.registry.snapshot("j")
        optimizer = Adam([p], server=relay.address, job="j", options=options("error"))
        if not joins_late:
            assert optimizer.snapshot() == 0
        step(optimizer, p, 0)
        step(optimizer, p, 1)
        with successor(tmp_path, relay) as other:
            assert other.registry.get("j").step == 0
            for _ in range(2):
                with pytest.raises(JobRewoundError, match=r"stands at step 0.*on_rewind"):
                    step(optimizer, p, 2)
        optimizer.close()
    assert relay.cuts


@pytest.mark.parametrize("joins_late", [False, True])
def test_a_worker_that_follows_goes_on_from_the_snapshot(tmp_path: Path, joins_late: bool) -> None:
    """Its gradient of the step that it had come to is dropped, and the receipt says so."""
    p, q = nn.Parameter(torch.zeros(SIZE)), nn.Parameter(torch.zeros(SIZE))
    local = torch.optim.Adam([q], lr=0.1, fused=True)
    with relayed(tmp_path) as (server, relay):
        if joins_late:
            first = nn.Parameter(torch.zeros(SIZE))
            with Adam([first], lr=0.1, fused=True, server=server.address, job="j", options=options("error")) as early:
                step(early, first, 0)
                server.registry.snapshot("j")
        with Adam([p], lr=0.1, fused=True, server=relay.address, job="j", options=options("follow")) as optimizer:
            if not joins_late:
                step(optimizer, p, 0)
                assert optimizer.snapshot() == 1
            for number in (1, 2):
                step(optimizer, p, number)
            assert optimizer.job_step == 3
            with successor(tmp_path, relay):
                with pytest.warns(UserWarning, match="step 1"):
                    step(optimizer, p, 3)
                receipt = optimizer.last_receipt
                assert receipt is not None
                assert (receipt.outcome, receipt.step, optimizer.job_step) == ("dropped_late", 1, 1)
                for number in (4, 5):
                    step(optimizer, p, number)
                assert optimizer.job_step == 3
                optimizer.close()
    for number in (0, 4, 5):
        step(local, q, number)
    assert torch.equal(p, q)
    assert relay.cuts


def test_three_ways_to_resume(tmp_path: Path) -> None:
    """Uninterrupted and resumed from a snapshot are the same to the bit; resumed cold, the values alone, is not."""
    p, q = nn.Parameter(torch.zeros(SIZE)), nn.Parameter(torch.zeros(SIZE))
    local = torch.optim.Adam([q], lr=0.1, fused=True)
    with (
        running_server(data_dir=str(tmp_path / "data"), durability="snapshot") as server,
        Adam([p], lr=0.1, fused=True, server=server.address, job="j", options=options("error")) as optimizer,
    ):
        for number in range(4):
            step(optimizer, p, number)
    # In good order: the server has taken a last snapshot.
    cold = nn.Parameter(p.detach().clone())
    with running_server(data_dir=str(tmp_path / "data"), durability="snapshot") as server:
        with Adam([p], lr=0.1, fused=True, server=server.address, job="j", options=options("error")) as optimizer:
            assert (optimizer.job_step, optimizer.next_sequence) == (4, 4)
            for number in range(4, 8):
                step(optimizer, p, number)
        with Adam([cold], lr=0.1, fused=True, server=server.address, job="cold", options=options("error")) as optimizer:
            for number in range(4, 8):
                step(optimizer, cold, number)
    for number in range(8):
        step(local, q, number)
    assert torch.equal(p, q)
    assert not torch.equal(cold, q)
