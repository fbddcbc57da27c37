"""A job is opened over a line that breaks in the middle of that."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from optimd.client import Adam, ConnectionLostError, ProxyOptions
from optimd.client.connection import TrainStream
from optimd.server import Server
from tests.relay import Relay

SIZE = 700


def cut_once(monkeypatch: pytest.MonkeyPatch, relay: Relay, number: int) -> list[int]:
    """Breaks the line before the message `number` from the server is read. Gives how many were to be read."""
    read: list[int] = []
    original = TrainStream.receive

    def receive(stream: TrainStream) -> Any:
        read.append(number)
        if len(read) == number + 1:
            relay.cut()
        return original(stream)

    monkeypatch.setattr(TrainStream, "receive", receive)
    return read


@pytest.mark.parametrize("joins", [False, True])
@pytest.mark.parametrize("number", range(8))
def test_a_line_that_breaks_while_a_job_is_opened_is_opened_anew(
    server: Server, monkeypatch: pytest.MonkeyPatch, joins: bool, number: int
) -> None:
    """At each message of the server in turn: who creates the job and who joins it has the right values and steps."""
    start = torch.arange(float(SIZE))
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    local = torch.optim.Adam([theirs], lr=0.1, fused=True)
    options = ProxyOptions(bucket_bytes=1024, retry_timeout_s=20)
    if joins:
        Adam([nn.Parameter(start.clone())], fused=True, lr=0.1, server=server.address, job="j", options=options).close()
        ours.data.zero_()
    with Relay(server.address) as relay:
        read = cut_once(monkeypatch, relay, number)
        with Adam([ours], fused=True, lr=0.1, server=relay.address, job="j", options=options) as optimizer:
            # Of a creator's opening the last ones do not come: then the cut is in the first step.
            assert torch.equal(ours, theirs)
            for step in range(3):
                ours.grad = theirs.grad = torch.full((SIZE,), float(step + 1))
                optimizer.step()
                local.step()
            assert (optimizer.job_step, optimizer.next_sequence) == (3, 3)
            assert torch.equal(ours, theirs)
        assert len(read) > number
        assert relay.cuts


def test_a_job_that_must_be_new_is_not_opened_anew(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """It might find the one that it has made itself."""
    with Relay(server.address) as relay:
        cut_once(monkeypatch, relay, 0)
        with pytest.raises(ConnectionLostError):
            Adam(
                [nn.Parameter(torch.ones(3))],
                server=relay.address,
                job="new",
                options=ProxyOptions(on_existing="fail", retry_timeout_s=20),
            )
        assert relay.cuts
