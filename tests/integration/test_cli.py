"""The `optimd` command, as its user types it."""

from __future__ import annotations

import json
import logging
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path
from typing import Any, Self

import grpc
import pytest
import torch
import typer
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from torch import nn

from optimd.cli.app import app
from optimd.client import Adam, ProxyOptions
from optimd.server import Server, ServerConfig
from optimd.v1 import admin_pb2, errors_pb2, reading_pb2
from optimd.wire.reasons import ERROR_TRAILER
from tests.command import optimd
from tests.support import in_threads, running_server

OPTIMD = Path(sys.executable).parent / "optimd"


def stepped(server: Server, name: str) -> Adam:
    p = nn.Parameter(torch.ones(1000))
    optimizer = Adam([p], server=server.address, job=name)
    p.grad = torch.ones(1000)
    optimizer.step()
    return optimizer


def test_the_demo_trains_both_ways_to_equal_weights() -> None:
    """Through the installed command; the table says where the state was and how much it took."""
    ended = subprocess.run(
        [str(OPTIMD), "demo", "--epochs=15"], capture_output=True, text=True, timeout=150, check=False
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "bit-equal" in ended.stdout
    accuracies = [float(text) for text in re.findall(r"(\d+\.\d+)%", ended.stdout)]
    assert len(accuracies) == 2
    assert accuracies[0] == accuracies[1] >= 97
    assert "server process" in ended.stdout
    assert "330/330" in ended.stdout


def test_the_demo_can_use_a_running_server_and_leaves_it_as_it_was(server: Server) -> None:
    """One epoch; its job is gone afterwards."""
    status, output = optimd("demo", "--epochs=1", "--server", server.address)
    assert status == 0, output
    assert "bit-equal" in output
    assert server.registry.all() == []


def test_jobs_are_listed_shown_and_deleted(server: Server) -> None:
    """For a person and as JSON."""
    at = ("--server", server.address)
    assert "no jobs" in optimd("jobs", "list", *at)[1]
    with stepped(server, "alpha"):
        status, output = optimd("jobs", "list", *at)
        assert status == 0
        assert re.search(r"alpha\D+1\D+1\D+1,000", output), output
        summary = json.loads(optimd("jobs", "list", *at, "--json")[1])["jobs"][0]
        assert (summary["job"], summary["step"], summary["state_bytes"]) == ("alpha", "1", "8000")
        assert "streaming apply" in optimd("jobs", "show", "alpha", *at)[1]
        shown = json.loads(optimd("jobs", "show", "alpha", *at, "--json")[1])
        assert shown["workers"][0]["pushes"] == "1"
        assert int(shown["workers"][0]["bytes_received"]) > 4000
        assert shown["param_groups"][0]["adam"]["betas"] == {"beta1": 0.9, "beta2": 0.999}
        status, output = optimd("jobs", "delete", "alpha", *at)
        assert (status, "has 1 workers in it; force ends them" in output) == (2, True)
    assert optimd("jobs", "delete", "alpha", *at)[0] == 0
    status, output = optimd("jobs", "show", "alpha", *at)
    assert (status, output.strip()) == (2, "optimd: there is no job 'alpha' on this server")


def test_a_deleted_job_ends_its_workers_steps_with_the_reason(server: Server) -> None:
    """A worker that waits for another is told at once."""
    from optimd.client import JobDeletedError

    stepped_once = threading.Barrier(2, timeout=30)

    def work(rank: int) -> str:
        options = ProxyOptions(rank=rank, world_size=2)
        p = nn.Parameter(torch.ones(4))
        with Adam([p], server=server.address, job="doomed", options=options) as optimizer:
            p.grad = torch.ones(4)
            optimizer.step()
            # Else the other one may not have been told of its first step yet.
            stepped_once.wait()
            if rank == 1:
                assert optimd("jobs", "delete", "doomed", "--force", "--server", server.address)[0] == 0
            with pytest.raises(JobDeletedError, match="'doomed' was deleted"):
                optimizer.step()
        return "told"

    assert in_threads(work, 2) == ["told", "told"]


def test_more_jobs_than_a_page_are_all_listed(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command asks until there is no next page."""
    monkeypatch.setattr("optimd.server.adminservice._MAX_PAGE", 2)
    optimizers = [stepped(server, f"job-{number}") for number in range(5)]
    names = [job["job"] for job in json.loads(optimd("jobs", "list", "--server", server.address, "--json")[1])["jobs"]]
    assert names == [f"job-{number}" for number in range(5)]
    for optimizer in optimizers:
        optimizer.close()


class SnapshotService:
    """A server that has one job, of which it gives `answer` for a snapshot. Without one it has no such call."""

    def __init__(self, answer: Callable[[reading_pb2.SnapshotRequest, grpc.ServicerContext], Any] | None) -> None:
        self._server = grpc.server(ThreadPoolExecutor(2))
        self._server.add_generic_rpc_handlers((_handler("AdminService", "GetJob", admin_pb2.GetJobRequest, _known),))
        if answer is not None:
            self._server.add_generic_rpc_handlers(
                (_handler("OptimizerService", "Snapshot", reading_pb2.SnapshotRequest, answer),)
            )
        self.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"

    def __enter__(self) -> Self:
        self._server.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.stop(None).wait()


def _handler(service: str, method: str, request: Any, work: Callable[..., Any]) -> grpc.GenericRpcHandler:
    handler: grpc.RpcMethodHandler[Any, Any] = grpc.unary_unary_rpc_method_handler(
        work, request_deserializer=request.FromString, response_serializer=lambda answer: answer.SerializeToString()
    )
    return grpc.method_handlers_generic_handler(f"optimd.v1.{service}", {method: handler})


def _known(request: admin_pb2.GetJobRequest, context: grpc.ServicerContext) -> admin_pb2.GetJobResponse:
    if request.job != "alpha":
        context.abort(grpc.StatusCode.NOT_FOUND, f"there is no job {request.job!r} on this server")
    return admin_pb2.GetJobResponse()


def test_a_snapshot_says_where_it_is() -> None:
    """Its step, its folder, its size; or that there is no such job."""
    response = reading_pb2.SnapshotResponse(step=12, path="jobs/alpha/snapshots/12", nbytes=3_400_000)
    asked: list[str] = []

    def answer(request: reading_pb2.SnapshotRequest, _: grpc.ServicerContext) -> reading_pb2.SnapshotResponse:
        asked.append(request.job)
        return response

    with SnapshotService(answer) as service:
        status, output = optimd("jobs", "snapshot", "alpha", "--server", service.address)
        assert (status, output) == (0, "job alpha at step 12 is in jobs/alpha/snapshots/12: 3.4 MB\n")
        status, output = optimd("jobs", "snapshot", "beta", "--server", service.address)
        assert (status, output) == (2, "optimd: there is no job 'beta' on this server\n")
    assert asked == ["alpha"]


def test_a_snapshot_that_is_not_made_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    """An older server, a full disk, one that takes too long, none at all: each is told apart from the others."""

    def full(_: Any, context: grpc.ServicerContext) -> None:
        detail = errors_pb2.ErrorDetail(reason=errors_pb2.ERROR_REASON_STORAGE_FAILED, message="the disk is full")
        context.set_trailing_metadata(((ERROR_TRAILER, detail.SerializeToString()),))
        context.abort(grpc.StatusCode.UNAVAILABLE, detail.message)

    released = threading.Event()

    def slow(*_: Any) -> reading_pb2.SnapshotResponse:
        released.wait(60)
        return reading_pb2.SnapshotResponse()

    for answer, sentence in (
        (None, "the server at {} is an older one, and does not do that"),
        (full, "the disk is full"),
        (slow, "no snapshot of job alpha was complete in 0.5 s; it may still come"),
    ):
        monkeypatch.setattr("optimd.cli.admin._SNAPSHOT_TIMEOUT_S", 0.5 if answer is slow else 60)
        with SnapshotService(answer) as service:
            status, output = optimd("jobs", "snapshot", "alpha", "--server", service.address)
            if answer is slow:
                released.set()
        assert (status, output) == (2, f"optimd: {sentence.format(service.address)}\n")
    status, output = optimd("jobs", "snapshot", "alpha", "--server", "127.0.0.1:1")
    assert (status, "no optimd server answers" in output) == (2, True)


def test_no_server_is_one_sentence_and_status_2() -> None:
    """With the remedy."""
    status, output = optimd("jobs", "list", "--server", "127.0.0.1:1")
    assert status == 2
    assert output.strip() == (
        "optimd: no optimd server answers at 127.0.0.1:1; start one with `optimd serve`, or name it with --server"
    )


def test_serve_that_cannot_start_is_one_sentence_and_status_2() -> None:
    """The settings are checked before anything is started."""
    status, output = optimd("serve", "--address", "0.0.0.0:1")
    assert (status, "pass --insecure" in output, output.count("\n")) == (2, True, 1)


def test_both_ways_to_start_a_server_have_the_same_settings() -> None:
    """`optimd serve` and `python -m optimd.server` take every field of ServerConfig, and show its help."""
    from optimd.server.__main__ import _parser

    command = typer.main.get_command(app).commands["serve"]  # type: ignore[attr-defined]
    typed = {option.name for option in command.params}
    plain = {action.dest for action in _parser()._actions}
    settings = {setting.name for setting in fields(ServerConfig)}
    assert typed == settings | {"log_level", "log_format", "config", "print_config", "as_json"}
    assert settings <= plain
    helps = {option.name: option.help for option in command.params}
    assert all(helps[name] == ServerConfig.help_of(name) for name in settings)


def test_version_says_what_is_installed() -> None:
    """Three versions on a line."""
    assert re.fullmatch(r"optimd [\d.]+\S*, torch \S+, grpcio [\d.]+\n", optimd("version")[1])


def test_health_and_reflection_answer_for_both_services() -> None:
    """What orchestrators and grpcurl ask."""
    with running_server(health=True) as server, grpc.insecure_channel(server.address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for service in ("", "optimd.v1.OptimizerService", "optimd.v1.AdminService"):
            answer = health.Check(health_pb2.HealthCheckRequest(service=service), timeout=10)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        reflection = reflection_pb2_grpc.ServerReflectionStub(channel)
        requests = iter([reflection_pb2.ServerReflectionRequest(list_services="")])
        listed = next(reflection.ServerReflectionInfo(requests, timeout=10)).list_services_response.service
        assert {"optimd.v1.OptimizerService", "optimd.v1.AdminService"} <= {service.name for service in listed}


@pytest.mark.parametrize("log_format", ["json", "console"])
def test_the_log_is_json_on_request(log_format: str, capsys: pytest.CaptureFixture[str]) -> None:
    """One object a line, with the level and, for errors, the traceback."""
    from optimd.cli.logs import LogFormat, LogLevel, configure

    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    try:
        configure(LogFormat(log_format), LogLevel.INFO)
        error = ZeroDivisionError()
        logging.getLogger("optimd.server.test").error("job %s: failed", "x", exc_info=error)
    finally:
        for handler in root.handlers[:]:
            root.removeHandler(handler)
        for handler in before:
            root.addHandler(handler)
        root.setLevel(level)
    output = capsys.readouterr().err
    assert "ZeroDivisionError" in output
    if log_format == "json":
        record = json.loads(output)
        assert (record["event"], record["level"]) == ("job x: failed", "error")
    else:
        assert "job x: failed" in output


def test_names_that_look_like_markup_are_shown_as_they_are(server: Server) -> None:
    """One job's name must not keep the others from being listed."""
    with stepped(server, "runs[/3]"), stepped(server, "sweep[bold]"):
        status, output = optimd("jobs", "list", "--server", server.address)
        assert status == 0
        assert "runs[/3]" in output
        assert "sweep[bold]" in output
        assert "runs[/3]" in optimd("jobs", "show", "runs[/3]", "--server", server.address)[1]


def test_calls_that_nobody_reads_do_not_take_the_servers_threads() -> None:
    """Health watches have their own; reads beyond the limit are refused at once, and training goes on."""
    from optimd.v1 import tensor_pb2
    from optimd.v1.optimizer_service_pb2_grpc import OptimizerServiceStub

    with running_server(max_workers=2, health=True) as server, grpc.insecure_channel(server.address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        watches = [health.Watch(health_pb2.HealthCheckRequest(), timeout=60) for _ in range(20)]
        assert all(next(watch).status == health_pb2.HealthCheckResponse.SERVING for watch in watches)
        p = nn.Parameter(torch.ones(4_000_000))
        with Adam([p], server=server.address, job="large") as optimizer:
            request = reading_pb2.ReadStateRequest(job="large", tensors=[tensor_pb2.TENSOR_KIND_PARAMETER])
            stub = OptimizerServiceStub(channel)
            reads = [stub.ReadState(request, timeout=60) for _ in range(2)]
            for read in reads:
                next(read)
            with pytest.raises(grpc.RpcError, match="reads at once and is busy"):
                list(stub.ReadState(request, timeout=10))
            assert health.Check(health_pb2.HealthCheckRequest(), timeout=10).status
            for read in reads:
                read.cancel()
            p.grad = torch.ones(4_000_000)
            optimizer.step()
        for watch in watches:
            watch.cancel()
