"""Opening a job: who creates it, who may join, and what is said to those who may not."""

from __future__ import annotations

import logging
import socket
import tempfile
import threading
import time
from concurrent import futures
from typing import Any

import grpc
import pytest
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc
from torch import nn

from optimd.client import (
    Adam,
    ConfigurationError,
    JobExistsError,
    JobMismatchError,
    LimitExceededError,
    ProtocolError,
    ProxyOptions,
    ServerUnavailableError,
    Sync,
    UnknownJobError,
    WorkerInUseError,
)
from optimd.client.options import WireDtypes
from optimd.server import Server
from optimd.wire.limits import DEFAULT_BUCKET_BYTES, MAX_BUCKET_BYTES
from tests.support import in_threads, running_server


def weights(*shapes: tuple[int, ...], value: float = 0.0, dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    return [nn.Parameter(torch.full(shape, value, dtype=dtype)) for shape in shapes]


def step(optimizer: Adam) -> None:
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.ones_like(p)
    optimizer.step()


def test_a_later_worker_receives_the_jobs_values_and_hyperparameters_in_place(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    """Values, learning rate, what the scheduler left in the group; and the resumption is logged."""
    with Adam(weights((70, 3), (5,), value=1.0), lr=0.25, server=server.address, job="shared") as first:
        torch.optim.lr_scheduler.StepLR(first, 10)
        step(first)
        step(first)
        expected = [p.clone() for p in first.param_groups[0]["params"]]
    params = weights((70, 3), (5,), value=9.0)
    pointers = [p.data_ptr() for p in params]
    with (
        caplog.at_level(logging.WARNING, "optimd.client"),
        Adam(params, lr=123.0, server=server.address, job="shared") as second,
    ):
        assert all(torch.equal(p, e) for p, e in zip(params, expected, strict=True))
        assert [p.data_ptr() for p in params] == pointers
        assert second.param_groups[0]["lr"] == 0.25
        assert second.param_groups[0]["initial_lr"] == 0.25
        assert (second.job_step, second.next_sequence, second.resumed) == (2, 2, True)
    assert "resuming shared at step 2" in caplog.text


def test_a_joiner_with_another_memory_order_gets_the_right_elements(server: Server) -> None:
    """The creator's parameter is channels-last, the joiner's is not."""
    start = torch.arange(2 * 3 * 4 * 5.0).view(2, 3, 4, 5)
    last = nn.Parameter(start.to(memory_format=torch.channels_last, copy=True))
    with Adam([last], server=server.address, job="order") as first:
        step(first)
    first_order = nn.Parameter(torch.zeros(2, 3, 4, 5))
    with Adam([first_order], server=server.address, job="order") as second:
        assert torch.equal(first_order, last)
        first_order.grad = start.clone()
        last.grad = start.clone()
        second.step()
    twin = nn.Parameter(start.clone())
    local = torch.optim.Adam([twin], fused=True)
    for grad in (torch.ones_like(twin), start):
        twin.grad = grad.clone()
        local.step()
    assert torch.allclose(first_order, twin, rtol=1e-6)  # elements meet vectors and tails in another order


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (lambda: weights((4, 4), (3,)), r"parameter 1: the job's shape is \[2\], the worker's \[3\]"),
        (lambda: weights((4, 4), (2,), dtype=torch.float64), r"parameter 0: the job's dtype is torch.float32"),
        (lambda: weights((4, 4)), r"parameter 1 of shape \[2\] is only the job's"),
        (lambda: weights((4, 4), (2,), (7,)), r"parameter 2 of shape \[7\] is only the worker's"),
        (
            lambda: [{"params": weights((4, 4))}, {"params": weights((2,))}],
            "param group 0 has 2 parameters in the job, 1 in the worker",
        ),
    ],
    ids=["shape", "dtype", "fewer", "more", "groups"],
)
def test_a_worker_that_does_not_match_is_told_the_first_difference(server: Server, params: Any, message: str) -> None:
    """And the job goes on as if nothing had happened."""
    with Adam(weights((4, 4), (2,)), server=server.address, job="matching") as first:
        step(first)
        with pytest.raises(JobMismatchError, match=message):
            Adam(params(), server=server.address, job="matching", options=ProxyOptions(worker_id="other"))
        step(first)
        assert first.job_step == 2


def test_named_parameters_are_named_in_the_mismatch(server: Server) -> None:
    """torch's param_names reach the message."""
    with (
        Adam([("body.weight", weights((2,))[0])], server=server.address, job="named"),
        pytest.raises(JobMismatchError, match=r"parameter 0 \(body.weight\): the job's shape is \[2\]"),
    ):
        Adam(
            [("body.weight", weights((3,))[0])],
            server=server.address,
            job="named",
            options=ProxyOptions(worker_id="other"),
        )


def test_settings_of_the_job_are_the_same_for_all_its_workers(server: Server) -> None:
    """The setting that differs is named."""
    with (
        Adam(weights((2,)), server=server.address, job="settings"),
        pytest.raises(JobMismatchError, match="has reduction mean, rank 0 asks for sum"),
    ):
        Adam(
            weights((2,)),
            server=server.address,
            job="settings",
            options=ProxyOptions(worker_id="other", aggregation=Sync(reduction="sum")),
        )


def test_on_existing_says_what_happens_to_a_job_that_is_there(server: Server) -> None:
    """Fail, replace, resume: each from a job with one step behind it and nobody in it."""

    def open_as(on_existing: Any, value: float = 5.0) -> Adam:
        return Adam(
            weights((2,), value=value),
            server=server.address,
            job="there",
            options=ProxyOptions(on_existing=on_existing),
        )

    with open_as("fail") as first:
        step(first)
    with pytest.raises(JobExistsError, match="at step 1"):
        open_as("fail")
    with open_as("resume") as second:
        assert second.job_step == 1
    with open_as("replace", value=7.0) as third:
        assert third.job_step == 0
        assert third.param_groups[0]["params"][0][0] == 7.0


def test_two_live_workers_cannot_have_one_name_or_one_rank(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both remedies are named."""
    # Within one process a second optimizer of one name would get a number.
    monkeypatch.setattr("optimd.client.placement.names.take", lambda job, _worker_id: job)
    sync = {"world_size": 3}
    open_with = {"server": server.address, "job": "names"}
    with Adam(weights((2,)), **open_with, options=ProxyOptions(worker_id="a", rank=0, **sync)):
        with pytest.raises(WorkerInUseError, match="worker_id 'a' is in job 'names' already"):
            Adam(weights((2,)), **open_with, options=ProxyOptions(worker_id="a", rank=1, **sync))
        with pytest.raises(WorkerInUseError, match="rank 0 is in job 'names' already, as worker_id 'a'"):
            Adam(weights((2,)), **open_with, options=ProxyOptions(worker_id="b", rank=0, **sync))


def test_optimizers_of_one_name_in_one_process_get_numbers(server: Server) -> None:
    """As a GAN's two optimizers do; a name that is free again is used again."""
    with (
        Adam(weights((2,)), server=server.address, job="gan") as first,
        Adam(weights((3,)), server=server.address, job="gan") as second,
    ):
        assert (first.job, second.job) == ("gan", "gan/2")
    with Adam(weights((2,)), server=server.address, job="gan") as again:
        assert again.job == "gan"


def test_a_private_job_is_dropped_with_its_worker_and_a_named_one_stays(server: Server) -> None:
    """Named jobs are there to be resumed."""
    with (
        Adam(weights((2,)), server=server.address) as private,
        Adam(weights((2,)), server=server.address, job="kept"),
    ):
        assert sorted(job.name for job in server.registry.all()) == sorted([private.job, "kept"])
    assert [job.name for job in server.registry.all()] == ["kept"]


def test_an_unreachable_server_is_named_after_retry_timeout_s() -> None:
    """Address and remedy are in the message; the wait is about as long as was asked for."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        started = time.monotonic()
        with pytest.raises(ServerUnavailableError, match=f"no optimd server answered at {address} within 0.5 s"):
            Adam(weights((2,)), server=address, options=ProxyOptions(retry_timeout_s=0.5))
        assert time.monotonic() - started >= 0.5


def test_a_server_that_comes_up_within_the_timeout_is_found() -> None:
    """Workers may be started before their server."""
    address = f"unix://{tempfile.mkdtemp(prefix='t-')}/s.sock"
    opened: list[Adam] = []

    def open_early() -> None:
        opened.append(Adam(weights((2,)), server=address, options=ProxyOptions(retry_timeout_s=60)))

    worker = threading.Thread(target=open_early)
    worker.start()
    with running_server(address=address):
        worker.join(60)
        assert opened[0].job_step == 0
        opened[0].close()


def test_something_else_that_speaks_grpc_is_not_taken_for_a_server() -> None:
    """A gRPC server without the service."""
    other = grpc.server(futures.ThreadPoolExecutor(1))
    port = other.add_insecure_port("127.0.0.1:0")
    other.start()
    try:
        with pytest.raises(ProtocolError, match="not an optimd server"):
            Adam(weights((2,)), server=f"127.0.0.1:{port}", options=ProxyOptions(retry_timeout_s=10))
    finally:
        other.stop(None).wait()


@pytest.mark.parametrize("address", ["nonsense", "host:", ":1", "host:99999"])
def test_an_address_that_is_none_is_refused_at_once(address: str) -> None:
    """With the form that it should have."""
    with pytest.raises(ConfigurationError, match="host:port"):
        Adam(weights((2,)), server=address)


def test_workers_beyond_the_limit_are_refused_at_once_while_others_go_on() -> None:
    """The message names the flag. Health and reads answer while every stream is taken."""
    with running_server(max_workers=2, health=True) as server, grpc.insecure_channel(server.address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        held = [Adam(weights((2,)), server=server.address) for _ in range(2)]
        with pytest.raises(LimitExceededError, match="--max-workers"):
            Adam(weights((2,)), server=server.address)
        answer = health.Check(health_pb2.HealthCheckRequest(), timeout=10)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
        for optimizer in held:
            step(optimizer)
            assert optimizer.state_dict()["state"][0]["step"] == 1
        held.pop().close()
        with Adam(weights((2,)), server=server.address) as late:
            step(late)
        held.pop().close()


def test_jobs_and_bytes_beyond_the_limits_are_refused_by_flag() -> None:
    """Before memory is taken: the second claim is for four terabytes."""
    with (
        running_server(max_jobs=1, max_job_bytes=10_000) as server,
        Adam(weights((2,)), server=server.address) as first,
    ):
        with pytest.raises(LimitExceededError, match="--max-jobs"):
            Adam(weights((2,)), server=server.address)
        with pytest.raises(LimitExceededError, match="--max-job-bytes"):
            Adam(weights((1000,)), server=server.address)
        with pytest.raises(LimitExceededError, match="--max-job-bytes"):
            Adam([nn.Parameter(torch.zeros(1).expand(1_000_000_000_000))], server=server.address)
        step(first)


def test_workers_that_open_a_job_at_once_agree_on_one_creator(server: Server) -> None:
    """All end up with the same values, whoever came first."""

    def work(rank: int) -> torch.Tensor:
        params = weights((1000,), value=float(rank))
        options = ProxyOptions(rank=rank, world_size=4)
        with Adam(params, server=server.address, job="race", options=options) as optimizer:
            step(optimizer)
            return params[0].detach()

    results = in_threads(work, 4)
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"options": ProxyOptions(rank=2, world_size=2)}, "rank 2 does not fit world_size 2"),
        ({"options": ProxyOptions(world_size=2), "server": None}, "need a server that all of them can reach"),
        ({"options": ProxyOptions(world_size=2)}, "need a common name"),
        ({"options": ProxyOptions(world_size=2, aggregation=Sync(world_size=3)), "job": "j"}, "differ"),
    ],
)
def test_settings_that_contradict_each_other_are_refused_with_the_remedy(
    arguments: dict[str, Any], message: str
) -> None:
    """Before anything is connected."""
    with pytest.raises(ConfigurationError, match=message):
        Adam(weights((2,)), **{"server": "127.0.0.1:1", **arguments})


@pytest.mark.parametrize(
    "build",
    [
        lambda: ProxyOptions(rank=-1),
        lambda: ProxyOptions(world_size=0),
        lambda: ProxyOptions(bucket_bytes=10),
        lambda: ProxyOptions(retry_timeout_s=0),
        lambda: ProxyOptions(on_existing="maybe"),
        lambda: ProxyOptions(apply="now"),
        lambda: Sync(reduction="median"),
        lambda: Sync(timeout_s=-1),
        lambda: Sync(world_size=0),
    ],
)
def test_options_out_of_range_are_refused_when_they_are_made(build: Any) -> None:
    """Where the mistake is, not where it hurts."""
    with pytest.raises(ConfigurationError):
        build()


def test_thousands_of_long_names_travel_in_pages(server: Server) -> None:
    """2 MB of names, up with the creator and down with the joiner."""

    def named() -> list[tuple[str, nn.Parameter]]:
        return [(f"{index:04}" + "n" * 996, nn.Parameter(torch.ones(1))) for index in range(2000)]

    with Adam(named(), server=server.address, job="paged") as first:
        assert first.job_step == 0
    mistaken = named()
    mistaken[1999] = ("0" * 1000, mistaken[1999][1])
    with pytest.raises(JobMismatchError, match="parameter 1999"):
        Adam(mistaken, server=server.address, job="paged")
    with Adam(named(), server=server.address, job="paged") as second:
        step(second)


def test_reading_from_a_job_that_was_deleted_is_an_unknown_job(server: Server) -> None:
    """By its name."""
    with Adam(weights((2,)), server=server.address, job="gone") as optimizer:
        step(optimizer)
        server.registry.delete("gone", force=True)
        with pytest.raises(UnknownJobError, match="there is no job 'gone'"):
            optimizer.state_dict()


@pytest.mark.parametrize(
    ("more", "bucket_bytes"),
    [
        ({"transport": "grpc"}, DEFAULT_BUCKET_BYTES),
        ({"transport": "shm"}, MAX_BUCKET_BYTES),
        ({"transport": "grpc", "wire_dtype": torch.bfloat16}, MAX_BUCKET_BYTES),
        ({"transport": "grpc", "wire_dtype": WireDtypes(gradients=torch.bfloat16)}, DEFAULT_BUCKET_BYTES),
        ({"transport": "shm", "bucket_bytes": 5000}, 5000),
    ],
)
def test_buckets_are_as_large_as_messages_allow_where_these_are_short(
    server: Server, more: dict[str, Any], bucket_bytes: int
) -> None:
    """In shared memory, and where both ways are narrowed. Who asks for a size gets it."""
    with Adam([nn.Parameter(torch.zeros(3))], server=server.address, job="j", options=ProxyOptions(**more)):
        assert server.registry.get("j").settings.bucket_bytes == bucket_bytes
