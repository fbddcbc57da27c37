"""Callers that open calls and say nothing: everybody else is served all the same."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from optimd.server import Server, admission
from optimd.v1 import reading_pb2
from optimd.v1.optimizer_service_pb2_grpc import OptimizerServiceStub
from tests.support import eventually, running_server

TOKEN = "a-secret-of-somebody"
BRINGS_IT = (("authorization", f"Bearer {TOKEN}"),)
CALLS = 60
"""More than there are threads in these servers."""


@pytest.fixture
def guarded(tmp_path: Path) -> Iterator[Server]:
    tokens = tmp_path / "tokens.toml"
    tokens.write_text(f'[[token]]\nname = "t"\nsecret = "{TOKEN}"\n')
    with running_server(tokens=str(tokens), max_workers=4, health=True) as server:
        yield server


def line(server: Server) -> grpc.Channel:
    """A connection of its own."""
    return grpc.insecure_channel(server.address, options=[("grpc.use_local_subchannel_pool", 1)])


@contextmanager
def silent_calls(channel: grpc.Channel, method: str, metadata: tuple[tuple[str, str], ...] = ()) -> Iterator[list[Any]]:
    """Calls that have been opened, and bring no message."""
    over = threading.Event()

    def nothing() -> Iterator[bytes]:
        over.wait()
        yield from ()

    calls: list[Any] = [channel.stream_unary(method).future(nothing(), metadata=metadata) for _ in range(CALLS)]
    try:
        yield calls
    finally:
        over.set()
        for call in calls:
            call.cancel()


def assert_served(server: Server) -> None:
    """Somebody else's calls: health's, and one with a token."""
    with line(server) as other:
        assert health_pb2_grpc.HealthStub(other).Check(health_pb2.HealthCheckRequest(), timeout=5).status == 1
        OptimizerServiceStub(other).GetCapabilities(reading_pb2.GetCapabilitiesRequest(), timeout=5, metadata=BRINGS_IT)


def codes(calls: list[Any]) -> set[grpc.StatusCode]:
    return {call.code() for call in calls if call.done()}


def test_without_a_token_no_call_is_waited_for(guarded: Server) -> None:
    """They are refused before their message is there, all of them."""
    with line(guarded) as channel, silent_calls(channel, "/optimd.v1.OptimizerService/GetCapabilities") as calls:
        assert eventually(lambda: all(call.done() for call in calls))
        assert codes(calls) == {grpc.StatusCode.UNAUTHENTICATED}
        assert_served(guarded)


@pytest.mark.parametrize(
    ("method", "metadata"),
    [("/optimd.v1.OptimizerService/GetCapabilities", BRINGS_IT), ("/grpc.health.v1.Health/Check", ())],
)
def test_of_one_connection_only_some_calls_are_waited_for(
    guarded: Server, method: str, metadata: tuple[tuple[str, str], ...]
) -> None:
    """The others of it are refused, and there are threads for everybody else."""
    with line(guarded) as channel, silent_calls(channel, method, metadata) as calls:
        assert eventually(lambda: sum(call.done() for call in calls) >= CALLS - 4)
        assert grpc.StatusCode.RESOURCE_EXHAUSTED in codes(calls)
        assert not all(call.done() for call in calls)
        assert_served(guarded)


def test_nor_is_any_waited_for_for_ever(guarded: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """A call that brings no message in time is ended."""
    monkeypatch.setattr(admission, "_SILENCE_S", 0.5)
    with line(guarded) as channel, silent_calls(channel, "/optimd.v1.AdminService/ListJobs", BRINGS_IT) as calls:
        assert eventually(lambda: all(call.done() for call in calls))
        assert codes(calls) == {grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.CANCELLED}


def test_a_call_that_ends_without_a_message_is_told_so(guarded: Server) -> None:
    """By a sentence, as anything else that is wrong."""
    with line(guarded) as channel, pytest.raises(grpc.RpcError, match="ended without one") as raised:
        channel.stream_unary("/optimd.v1.OptimizerService/Heartbeat")(iter(()), timeout=5, metadata=BRINGS_IT)
    assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT
