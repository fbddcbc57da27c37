"""What a job begins with besides values, brought on the wire by its creator, without optimd's client."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest
import torch
from torch import nn

from optimd.client import Adam, ProxyOptions
from optimd.server import Server
from optimd.v1 import param_group_pb2, reading_pb2, state_dict_pb2, tensor_pb2, training_pb2
from tests.integration.test_protocol import PlainWorker, begin, end, gradient, leave, values
from tests.integration.test_protocol import bystander as bystander  # noqa: PLC0414  # a fixture
from tests.integration.test_protocol_buffers import FLAGS, TABLE, announce, whole
from tests.support import eventually

Request = training_pb2.TrainRequest
KINDS = (tensor_pb2.TENSOR_KIND_EXP_AVG, tensor_pb2.TENSOR_KIND_EXP_AVG_SQ)


def load(step: float = 5.0, *, load_count: int = 1) -> list[training_pb2.TrainRequest]:
    """A state_dict for the plain worker's parameter: its exp_avg is 2, its exp_avg_sq 3."""
    group = param_group_pb2.ParamGroup(
        adam=param_group_pb2.AdamOptions(
            lr=0.25, betas=param_group_pb2.Betas(beta1=0.9, beta2=0.999), eps=1e-8, fused=True
        ),
        extra={"initial_lr": param_group_pb2.ExtraValue(double_value=0.5)},
    )
    entry = state_dict_pb2.ParameterState(step=step, tensors=KINDS)
    return [
        Request(load_state=training_pb2.LoadState(load_count=load_count)),
        Request(state_dict=state_dict_pb2.StateDictPage(param_groups=[group], state=[entry], last=True)),
        *(
            values(bucket, kind, count, value)
            for kind, value in zip(KINDS, (2.0, 3.0), strict=True)
            for bucket, count in ((0, 256), (1, 44))
        ),
        Request(load_state_end=training_pb2.LoadStateEnd(bucket_count=4)),
    ]


BUFFERS = [*announce(FLAGS, TABLE), *whole(1)]
VALUES = [values(0, tensor_pb2.TENSOR_KIND_PARAMETER, 256, 1.0), values(1, tensor_pb2.TENSOR_KIND_PARAMETER, 44, 1.0)]


@pytest.mark.parametrize(
    "messages",
    [[*load(), *BUFFERS, *VALUES], [*BUFFERS, VALUES[1], *load(), VALUES[0]]],
    ids=["ahead", "in between"],
)
def test_a_creator_brings_a_state_and_buffers_that_the_job_then_begins_with(
    server: Server, messages: list[training_pb2.TrainRequest]
) -> None:
    """None of it is answered; who joins is told of the load, and steps on from it as torch does."""
    with PlainWorker(server) as creator:
        creator.send(creator.open_job(), creator.layout(), *messages)
        *before, ready = creator.until("ready")
        assert [part.WhichOneof("message") for part in before] == ["layout_accepted", "bucket_table"]
        assert (ready.ready.job_step, ready.ready.load_count) == (0, 1)
        creator.send(leave())
        with pytest.raises(StopIteration):
            creator.receive()
    held = server.registry.get("plain").buffers.tensors()
    assert held["flags"].tolist() == [True, False, True]
    twin = nn.Parameter(torch.ones(300))
    local = torch.optim.Adam([twin], lr=0.25, fused=True)
    local.state[twin] = {
        "step": torch.tensor(5.0), "exp_avg": torch.full((300,), 2.0), "exp_avg_sq": torch.full((300,), 3.0)
    }  # fmt: skip
    with PlainWorker(server) as worker:
        worker.send(worker.open_job(), worker.layout())
        received = worker.until("ready")
        (group,) = (group for part in received for group in part.layout.groups)
        assert (group.adam.lr, group.extra["initial_lr"].double_value) == (0.25, 0.5)
        assert received[-1].ready.load_count == 1
        worker.send(begin(load_count=1), gradient(0, 256), gradient(1, 44), end(2))
        *buckets, _ = worker.until("receipt")
    twin.grad = torch.ones(300)
    local.step()
    flat = torch.cat([torch.frombuffer(bytearray(part.payload), dtype=torch.float32) for part in buckets])
    assert torch.equal(flat, twin)


def test_nobody_sees_a_job_before_all_of_it_is_there(server: Server) -> None:
    """A reader finds none, a worker waits; the last bucket of values makes all of it the job's at once."""
    started = threading.Event()

    def join() -> tuple[float, dict[str, Any]]:
        p = nn.Parameter(torch.zeros(300))
        started.set()
        options = ProxyOptions(rank=1, world_size=2, bucket_bytes=1024)
        with Adam([p], fused=True, server=server.address, job="plain", options=options) as optimizer:
            return optimizer.param_groups[0]["lr"], optimizer.state_dict()["state"][0]

    with PlainWorker(server) as creator, ThreadPoolExecutor(1) as pool:
        opening = creator.open_job()
        opening.open.aggregation.sync.world_size = 2
        opening.open.aggregation.sync.timeout_s = opening.open.aggregation.sync.join_timeout_s = 300
        creator.send(opening, creator.layout(), *load(), VALUES[0])
        creator.until("bucket_table")
        joined = pool.submit(join)
        assert started.wait(30)
        with pytest.raises(grpc.RpcError, match="there is no job"):
            list(creator.stub.ReadState(reading_pb2.ReadStateRequest(job="plain"), timeout=10))
        assert not joined.done()
        creator.send(VALUES[1])
        creator.until("ready")
        lr, state = joined.result(timeout=30)
    assert lr == 0.25
    assert (state["step"], state["exp_avg"][0]) == (5.0, 2.0)


@pytest.mark.parametrize(
    ("messages", "reason", "text"),
    [
        ([*load(), *load()], "OUT_OF_ORDER", "load_state came where bucket or attach_buffers was due"),
        ([*BUFFERS, *BUFFERS], "OUT_OF_ORDER", "attach_buffers came where bucket or load_state was due"),
        ([begin()], "OUT_OF_ORDER", "step_begin came where bucket or load_state or attach_buffers was due"),
        ([*load()[:2], VALUES[0]], "INVALID_FIELD", "parameter of bucket 0 is not what the entries announced"),
        ([*load()[:-1], VALUES[0]], "OUT_OF_ORDER", "bucket came where load_state_end was due"),
        ([*load(float("nan"))[:2]], "INVALID_FIELD", "not a number that a counter can hold"),
        ([load()[2]], "INVALID_FIELD", "exp_avg of bucket 0 came where the values of new buckets were due"),
        ([*BUFFERS[:2], *VALUES], "OUT_OF_ORDER", "bucket came where buffer_chunk was due"),
        ([*VALUES, *load()[1:]], "OUT_OF_ORDER", "state_dict came between two steps"),
    ],
    ids=range(9),
)
def test_a_creator_that_brings_something_wrong_is_told_what(
    server: Server, bystander: Any, messages: list[training_pb2.TrainRequest], reason: str, text: str
) -> None:
    """By the message or the field; others do not feel it."""
    with PlainWorker(server) as worker:
        worker.send(worker.open_job(), worker.layout(), *messages)
        worker.fails_with(reason, text)
    bystander()


@pytest.mark.parametrize("count", range(len(load()) + len(BUFFERS) + 1))
def test_a_creator_that_is_lost_before_the_end_leaves_no_job(server: Server, count: int) -> None:
    """After any number of its messages: the next one of that name starts anew, and has the worker's own values."""
    with PlainWorker(server) as creator:
        creator.send(creator.open_job(), creator.layout(), VALUES[0], *[*load(), *BUFFERS][:count])
        creator.until("bucket_table")
        assert "plain" in server.registry._jobs
    assert eventually(lambda: "plain" not in server.registry._jobs)
    with PlainWorker(server).opened() as worker:
        worker.send(begin(), gradient(0, 256), gradient(1, 44), end(2))
        worker.until("receipt")
    job = server.registry.get("plain")
    assert (job.store.step_of(0), job.buffers.values()) == (1.0, None)


def test_an_added_group_brings_values_alone(server: Server) -> None:
    """A state_dict is loaded between two steps, as ever, once the job is there."""
    with PlainWorker(server).opened() as worker:
        layout = worker.layout()
        layout.layout.groups[0].index = 1
        worker.send(Request(add_param_group=training_pb2.AddParamGroup(group=1)), layout, *load())
        worker.fails_with("OUT_OF_ORDER", "load_state came where bucket was due")
