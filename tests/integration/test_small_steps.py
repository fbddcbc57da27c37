"""A step of a small model: one message each way, and nothing else about it is different."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import grpc
import pytest
import torch
from torch import nn

from optimd.client import Adam, Async, ConnectionLostError, ProxyOptions, connection
from optimd.client.connection import TrainStream
from optimd.server import Server, incoming
from optimd.v1 import tensor_pb2, training_pb2
from optimd.wire.bundles import bundle
from optimd.wire.methods import TRAIN
from tests.integration.test_protocol import PlainWorker, begin, end, gradient
from tests.relay import Relay
from tests.support import in_threads

Request = training_pb2.TrainRequest


def counted(monkeypatch: pytest.MonkeyPatch, module: ModuleType) -> list[int]:
    """Of each message that `module` receives of gRPC, how many it stands for."""
    counts: list[int] = []
    original = module.unbundle

    def counting(data: bytes) -> list[bytes]:
        messages = original(data)
        counts.append(len(messages))
        return list(messages)

    monkeypatch.setattr(module, "unbundle", counting)
    return counts


def twins() -> tuple[nn.ParameterList, nn.ParameterList]:
    """Parameters of a small model, and as many for torch's own Adam."""
    torch.manual_seed(0)
    ours = nn.ParameterList(nn.Parameter(torch.randn(size)) for size in (64, 1000, 3))
    return ours, nn.ParameterList(nn.Parameter(p.detach().clone()) for p in ours)


def give_gradients(step: int, *models: nn.ParameterList) -> None:
    for model in models:
        generator = torch.Generator().manual_seed(step)
        for p in model:
            p.grad = torch.randn(p.shape, generator=generator)


@pytest.mark.parametrize("mode", ["streaming", "atomic", "async"])
def test_a_small_step_is_one_message_each_way(server: Server, monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    ours, theirs = twins()
    options = ProxyOptions(aggregation=Async()) if mode == "async" else ProxyOptions(apply=mode)
    local = torch.optim.Adam(theirs.parameters(), lr=0.1, fused=True)
    with Adam(ours.parameters(), lr=0.1, fused=True, server=server.address, job="b", options=options) as optimizer:
        up, down = counted(monkeypatch, incoming), counted(monkeypatch, connection)
        for step in range(3):
            give_gradients(step, ours, theirs)
            optimizer.step()
            local.step()
    assert up[:3] == [3, 3, 3], "StepBegin, one bucket, StepEnd"
    assert down == [2, 2, 2], "one bucket, the receipt"
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_workers_that_wait_for_each_other_bundle_too(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    up, down = counted(monkeypatch, incoming), counted(monkeypatch, connection)

    def train(rank: int) -> list[torch.Tensor]:
        ours, _ = twins()
        options = ProxyOptions(rank=rank, world_size=2)
        with Adam(ours.parameters(), lr=0.1, server=server.address, job="b", options=options) as optimizer:
            for step in range(5):
                give_gradients(step, ours)
                optimizer.step()
        return [p.detach() for p in ours]

    one, other = in_threads(train, 2)
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert up.count(3) == 10
    assert down.count(2) == 10


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("mode", ["streaming", "atomic", "async"])
def test_a_line_cut_beside_the_only_message_of_a_push_applies_it_once(
    server: Server, monkeypatch: pytest.MonkeyPatch, mode: str, when: str
) -> None:
    """Before it goes out, or behind it, when the answer is lost."""
    ours, theirs = twins()
    mode_of = {"aggregation": Async()} if mode == "async" else {"apply": mode}
    options = ProxyOptions(retry_timeout_s=20, **mode_of)
    local = torch.optim.Adam(theirs.parameters(), lr=0.1, fused=True)
    acts: list[Callable[[], object]] = []
    target, name = (TrainStream, "send") if when == "before" else (TrainStream, "_next")
    original = getattr(target, name)

    def acting(*args: Any) -> Any:
        if acts and when == "before":
            acts.pop()()
        result = original(*args)
        if acts:
            acts.pop()()
            raise ConnectionLostError("the line was cut")
        return result

    with Relay(server.address) as relay:
        optimizer = Adam(ours.parameters(), lr=0.1, fused=True, server=relay.address, job="b", options=options)
        monkeypatch.setattr(target, name, acting)
        with optimizer:
            for step in range(6):
                give_gradients(step, ours, theirs)
                if step % 2:
                    acts.append(relay.cut)
                optimizer.step()
                local.step()
                assert optimizer.last_receipt is not None
                assert (optimizer.last_receipt.step, optimizer.last_receipt.outcome) == (step + 1, "applied")
                assert optimizer.last_receipt.resumed == bool(step % 2)
        assert relay.cuts >= 3
    assert not acts
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_a_worker_that_does_not_read_bundles_is_sent_none(server: Server) -> None:
    """It may send them nevertheless: the server has said that it reads them."""
    with PlainWorker(server).opened() as worker:
        push = [begin(), gradient(0, 256), gradient(1, 44), end(2)]
        worker.send(Request(bundled=[message.SerializeToString() for message in push]))
        answers = worker.until("receipt")
        assert [answer.WhichOneof("message") for answer in answers] == ["bucket", "bucket", "receipt"]
        assert not any(answer.bundled for answer in answers)


def test_a_worker_that_reads_bundles_is_sent_its_step_in_one(server: Server) -> None:
    with PlainWorker(server) as worker:
        worker.send(worker.open_job(takes_bundles=True), worker.layout())
        assert worker.receive().layout_accepted.takes_bundles
        for bucket in worker.until("bucket_table")[-1].bucket_table.buckets:
            message = gradient(bucket.bucket_id, bucket.slices[0].length)
            message.bucket.kind = tensor_pb2.TENSOR_KIND_PARAMETER
            worker.send(message)
        worker.until("ready")
        for message in (begin(), gradient(0, 256), gradient(1, 44), end(2)):
            worker.send(message)
        received: list[bytes] = []
        while not received or not training_pb2.TrainResponse.FromString(received[-1]).HasField("receipt"):
            answer = worker.receive()
            received += answer.bundled or [answer.SerializeToString()]
        kinds = [training_pb2.TrainResponse.FromString(data).WhichOneof("message") for data in received]
        assert kinds == ["bucket", "bucket", "receipt"]


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"\xfa\x01\x05abc", id="cut off"),
        pytest.param(b"\xfa\x01\x00", id="of nothing"),
        pytest.param(b"\xfa\x01\x02\x5a\x00\x7a\x01x", id="with a payload beside it"),
        pytest.param(bundle([bundle([b"\x5a\x00", b"\x5a\x00"]), b"\x5a\x00"]), id="of bundles"),
    ],
)
def test_a_malformed_bundle_gets_a_clean_answer(server: Server, content: bytes) -> None:
    with grpc.insecure_channel(server.address) as channel:
        call: Any = channel.stream_stream(TRAIN)(iter([content]), timeout=20)
        with pytest.raises(grpc.RpcError):
            next(call)
        assert call.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "TrainRequest" in call.details()
