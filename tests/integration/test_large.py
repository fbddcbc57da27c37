"""A model of 400 MB, with gRPC's default limits untouched."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from optimd.client import Adam, ProxyOptions, connection
from optimd.wire.codec import decode
from optimd.wire.limits import MAX_MESSAGE_BYTES
from tests.support import ROOT, server_process

ELEMENTS = 100_000_000


def test_a_400_mb_model_trains_in_messages_under_4_mib(monkeypatch: pytest.MonkeyPatch) -> None:
    """One tensor, larger than any message; each message of both directions is measured."""
    sizes: list[int] = []
    original_drain = connection._drain

    def measuring_drain(*arguments: object) -> object:
        for message in original_drain(*arguments):
            sizes.append(len(message))
            yield message

    def measuring_decode(message_type: type, data: bytes) -> object:
        sizes.append(len(data))
        return decode(message_type, data)

    monkeypatch.setattr(connection, "_drain", measuring_drain)
    monkeypatch.setattr("optimd.client.connection.decode", measuring_decode)
    p = nn.Parameter(torch.zeros(ELEMENTS))
    options = ProxyOptions(transport="grpc")
    with server_process() as (_, address), Adam([p], lr=0.5, server=address, options=options) as optimizer:
        p.grad = torch.ones(ELEMENTS)
        optimizer.step()
        receipt = optimizer.last_receipt
        assert receipt is not None
        assert receipt.bytes_sent > 4 * ELEMENTS
        assert receipt.bytes_received > 4 * ELEMENTS
        moments = optimizer.state_dict()["state"][0]["exp_avg"]
        assert torch.equal(moments, torch.full_like(moments, moments[0].item()))
    assert torch.equal(p, torch.full_like(p, p[0].item()))
    assert p[0].item() == pytest.approx(-0.5)
    assert sum(sizes) > 5 * 4 * ELEMENTS  # up in the opening, up and down in the step, down twice in the state_dict
    assert max(sizes) < MAX_MESSAGE_BYTES


def test_no_limit_of_grpcs_is_raised_anywhere() -> None:
    """Neither side names the options that would."""
    sources = [
        path
        for root in ("client", "server")
        for path in (ROOT / root).rglob("*.py")
        if "max_receive_message_length" in path.read_text() or "max_send_message_length" in path.read_text()
    ]
    assert list((ROOT / "client").rglob("*.py"))
    assert sources == list[Path]()
