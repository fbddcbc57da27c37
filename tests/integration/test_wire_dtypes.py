"""What travels narrowed is agreed on by each stream, and said by each message."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from optimd.client import Adam, ConfigurationError, ProxyOptions, UnsupportedError, WireDtypes
from optimd.server import Server
from optimd.v1 import state_dict_pb2, tensor_pb2, training_pb2
from optimd.wire.encodings import EXACT
from tests.integration.test_protocol import PlainWorker, begin, end, gradient, values
from tests.integration.test_protocol import bystander as bystander  # noqa: PLC0414  # a fixture
from tests.relay import Relay

BFLOAT16, FLOAT16 = tensor_pb2.PAYLOAD_ENCODING_BFLOAT16, tensor_pb2.PAYLOAD_ENCODING_FLOAT16
GRADIENT = tensor_pb2.TENSOR_KIND_GRADIENT
LENGTHS = (256, 44)


def opened(worker: PlainWorker, **asked: Any) -> tuple[int, int]:
    """Opens a plain job; gives what the server makes of `gradients` and `parameters`."""
    worker.send(worker.open_job(**asked), worker.layout())
    accepted, *_ = worker.until("bucket_table")
    for bucket_id, length in enumerate(LENGTHS):
        worker.send(values(bucket_id, tensor_pb2.TENSOR_KIND_PARAMETER, length, 1.0))
    worker.until("ready")
    return accepted.layout_accepted.gradients, accepted.layout_accepted.parameters


def narrow(bucket_id: int, value: float, dtype: torch.dtype, encoding: Any, **more: Any) -> training_pb2.TrainRequest:
    elements = torch.full((LENGTHS[bucket_id],), value, dtype=dtype)
    header = tensor_pb2.TensorBucket(bucket_id=bucket_id, encoding=encoding, **{"kind": GRADIENT, **more})
    return training_pb2.TrainRequest(bucket=header, payload=bytes(elements.view(torch.uint8).numpy()))


# --- what is asked for, and answered


@pytest.mark.parametrize("wire", [torch.float32, torch.float64, torch.int8, "bfloat16", 16])
def test_only_two_dtypes_can_be_narrowed_to(wire: Any) -> None:
    wanted = r"one of torch\.bfloat16, torch\.float16 is needed, or None"
    with pytest.raises(ConfigurationError, match=rf"ProxyOptions\(wire_dtype=.*{wanted}"):
        ProxyOptions(wire_dtype=wire)
    with pytest.raises(ConfigurationError, match=rf"WireDtypes\(gradients=.*{wanted}"):
        WireDtypes(gradients=wire)
    with pytest.raises(ConfigurationError, match=rf"WireDtypes\(parameters=.*{wanted}"):
        WireDtypes(parameters=wire)


@pytest.mark.parametrize(
    ("wire", "what"),
    [
        (torch.bfloat16, "gradients in bfloat16"),
        (WireDtypes(gradients=torch.float16), "gradients in float16"),
        (WireDtypes(parameters=torch.float16), "parameters in float16"),
    ],
)
def test_a_server_that_knows_of_no_encodings_is_named_with_the_remedy(
    server: Server, monkeypatch: pytest.MonkeyPatch, wire: Any, what: str
) -> None:
    """It leaves the fields unset. Nothing is trained meanwhile: the same worker can do without."""
    monkeypatch.setattr("optimd.server.session.agreed", lambda _: EXACT)
    remedy = "older than this worker's optimd. Bring it up to date, or leave wire_dtype of ProxyOptions at None"
    with pytest.raises(UnsupportedError, match=f"does not know {what}.*{remedy}"):
        Adam([nn.Parameter(torch.zeros(3))], server=server.address, job="j", options=ProxyOptions(wire_dtype=wire))
    p = nn.Parameter(torch.zeros(3))
    with Adam([p], server=server.address, job="k") as optimizer:
        p.grad = torch.ones(3)
        optimizer.step()
        assert optimizer.job_step == 1


def test_a_worker_that_comes_back_asks_again(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of another server in the place of the first, say."""
    p = nn.Parameter(torch.zeros(3))
    options = ProxyOptions(wire_dtype=torch.bfloat16, retry_timeout_s=20)
    with Relay(server.address) as relay, Adam([p], server=relay.address, job="j", options=options) as optimizer:
        p.grad = torch.ones(3)
        optimizer.step()
        relay.cut()
        optimizer.step()
        assert optimizer.job_step == 2
        monkeypatch.setattr("optimd.server.session.agreed", lambda _: EXACT)
        relay.cut()
        with pytest.raises(UnsupportedError, match="does not know gradients in bfloat16"):
            optimizer.step()


def test_a_server_answers_what_it_knows(server: Server) -> None:
    """Each way by itself; an encoding that a later version has is as if it had not been asked for."""
    with PlainWorker(server) as worker:
        assert opened(worker, job="a") == (0, 0)
    with PlainWorker(server) as worker:
        assert opened(worker, job="b", gradients=FLOAT16) == (FLOAT16, 0)
    with PlainWorker(server) as worker:
        assert opened(worker, job="c", gradients=99, parameters=BFLOAT16) == (0, BFLOAT16)


# --- what messages say


def test_a_plain_worker_may_narrow_some_messages_and_not_others(server: Server) -> None:
    """Each says how it is encoded, and so does each that the server sends."""
    p = nn.Parameter(torch.ones(300))
    p.grad = torch.cat([torch.full((256,), 0.3, dtype=torch.bfloat16).float(), torch.full((44,), 0.3)])
    torch.optim.Adam([p], lr=0.1, fused=True).step()
    with PlainWorker(server) as worker:
        opened(worker, gradients=BFLOAT16, parameters=FLOAT16)
        worker.send(begin(), narrow(0, 0.3, torch.bfloat16, BFLOAT16), values(1, GRADIENT, 44, 0.3), end(2))
        *buckets, _ = worker.until("receipt")
    received = b"".join(message.payload for message in buckets)
    assert [message.bucket.encoding for message in buckets] == [FLOAT16, FLOAT16]
    assert torch.equal(torch.frombuffer(bytearray(received), dtype=torch.float16), p.detach().to(torch.float16))


@pytest.mark.parametrize(
    ("requests", "text"),
    [
        ([narrow(0, 1.0, torch.float16, FLOAT16)], "TensorBucket.encoding: 2 is not what the stream was opened with"),
        ([narrow(0, 1.0, torch.float16, 99)], "TensorBucket.encoding: 99 is not what the stream was opened with"),
        ([narrow(0, 1.0, torch.float32, BFLOAT16)], "1024 bytes; the gradient of bucket 0 takes 512"),
        ([narrow(0, 1.0, torch.bfloat16, 0)], "512 bytes; the gradient of bucket 0 takes 1024"),
        (
            [narrow(0, 1.0, torch.bfloat16, BFLOAT16, kind=tensor_pb2.TENSOR_KIND_PARAMETER)],
            "TensorBucket.encoding: bfloat16 is not for parameter of torch.float32",
        ),
    ],
    ids=["another", "unknown", "not narrow", "not said", "a value"],
)
def test_what_was_not_agreed_on_gets_a_clean_answer(
    server: Server, bystander: Any, requests: list[training_pb2.TrainRequest], text: str
) -> None:
    with PlainWorker(server) as worker:
        opened(worker, gradients=BFLOAT16)
        worker.send(begin(), *requests, end(1))
        worker.fails_with("INVALID_FIELD", text)
    bystander()


def test_pushed_values_are_never_narrowed(server: Server, bystander: Any) -> None:
    entry = state_dict_pb2.PushedEntry(parameter=0, has_value=True)
    page = training_pb2.TrainRequest(pushed=state_dict_pb2.PushedPage(entries=[entry]))
    with PlainWorker(server) as worker:
        opened(worker, gradients=BFLOAT16, parameters=BFLOAT16)
        value = narrow(0, 1.0, torch.bfloat16, BFLOAT16, kind=tensor_pb2.TENSOR_KIND_PARAMETER)
        worker.send(begin(pushed_pages=1), page, value)
        worker.fails_with("INVALID_FIELD", "TensorBucket.encoding: is for gradients")
    bystander()


def test_a_value_must_have_been_received_in_something_that_there_is(server: Server, bystander: Any) -> None:
    entry = state_dict_pb2.PushedEntry(parameter=0, has_value=True, received_as=99)
    page = training_pb2.TrainRequest(pushed=state_dict_pb2.PushedPage(entries=[entry]))
    with PlainWorker(server) as worker:
        opened(worker)
        worker.send(begin(pushed_pages=1), page, gradient(0, 256))
        worker.fails_with("INVALID_FIELD", "PushedEntry.received_as: 99 is unknown")
    bystander()
