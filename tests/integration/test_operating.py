"""What an operator looks at and does while workers train: status, top, evict, bench."""

from __future__ import annotations

import errno
import gc
import io
import json
import math
import os
import subprocess
import sys
import threading
import time
import urllib.request
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from rich.console import Console
from torch import nn

from optimd.cli.figures import duration, short
from optimd.cli.top import Look, frame
from optimd.client import Adam, EvictedError, OptimdError, ProxyOptions, Sync
from optimd.server import Server
from optimd.v1 import admin_pb2, job_pb2
from tests.command import optimd
from tests.faultfiles import FailingFiles
from tests.support import eventually, in_threads, running_server


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running_server() as running:
        yield running


def worker(server: Server, job: str, rank: int, world_size: int, **options: object) -> tuple[nn.Parameter, Adam]:
    p = nn.Parameter(torch.linspace(-1, 1, 1000))
    settings = ProxyOptions(rank=rank, world_size=world_size, worker_id=f"worker-{rank}", **options)
    return p, Adam([p], server=server.address, job=job, options=settings)


def step(p: nn.Parameter, optimizer: Adam, value: float) -> None:
    p.grad = torch.full((1000,), value)
    optimizer.step()


# --- status


def test_status_tells_what_a_server_is_and_holds(server: Server) -> None:
    """For a person in three lines, for a script as JSON."""
    p, optimizer = worker(server, "status", 0, 1)
    with optimizer:
        step(p, optimizer, 1.0)
        status, output = optimd("status", "--server", server.address)
        assert status == 0
        assert len(output.splitlines()) == 3
        assert f"optimd 0.1.0 at {server.address}, torch {torch.__version__}, device cpu" in output
        assert "in memory alone" in output
        status, output = optimd("status", "--server", server.address, "--json")
        told = json.loads(output)
        assert (told["job_count"], told["worker_count"], told["keeps_jobs"], told["draining"]) == (1, 1, False, False)
        assert 0 < told["uptime_s"] < 3600
        assert int(told["resident_bytes"]) > 50e6


def test_status_of_no_server_is_one_sentence_and_status_2() -> None:
    """So a script can wait for one."""
    status, output = optimd("status", "--server", "127.0.0.1:1")
    assert (status, "no optimd server answers" in output, output.count("\n")) == (2, True, 1)


# --- top


@contextmanager
def training(server: Server, job: str, count: int) -> Iterator[None]:
    """So many workers in lockstep, the last one slow, until the block ends."""
    stop = threading.Event()
    pairs = in_threads(lambda rank: worker(server, job, rank, count), count)

    def train(rank: int) -> None:
        p, optimizer = pairs[rank]
        with optimizer:
            while not stop.is_set():
                time.sleep(0.1 if rank == count - 1 else 0.01)
                try:
                    step(p, optimizer, 1.0)
                except OptimdError:
                    return

    threads = [threading.Thread(target=train, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join(60)


def test_top_shows_sixteen_workers_and_who_is_waited_for(server: Server) -> None:
    """In 80 columns and 24 lines; without a terminal it looks twice and ends."""
    with training(server, "sixteen", 16):
        assert eventually(lambda: server.registry.get("sixteen").step > 3)
        status, output = optimd("top", "--interval-s", "1", "--server", server.address)
    assert status == 0
    lines = output.rstrip("\n").split("\n")
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 80
    rows = [line.split() for line in lines if "worker-" in line]
    assert [row[1] for row in rows] == [f"worker-{rank}" for rank in range(16)]
    waits = [float(row[6].rstrip("%")) for row in rows]
    assert waits[15] < min(waits[:15])
    assert all(float(row[3]) > 0 for row in rows)


def look(at_s: float, workers: int, jobs: int = 1, step: int = 0) -> Look:
    """What a server with long names and large numbers would tell."""
    name = "a-job-with-a-long-name"
    summaries = [
        admin_pb2.JobSummary(job=f"{name}-{number}", step=step, worker_count=workers if not number else 0)
        for number in range(jobs)
    ]
    told = [
        admin_pb2.WorkerStatus(
            worker=job_pb2.WorkerIdentity(worker_id=f"[bold]gpu-{rank}.example.org-0", rank=rank, incarnation=1),
            pushes=10**9 + step,
            bytes_received=10**15 * step,
            bytes_sent=10**15 * step,
            connected=rank != 1,
            silent_s=123.4,
            waited_s=at_s,
            lag=10_000,
            staleness=10_000,
        )
        for rank in range(workers)
    ]
    shown = admin_pb2.GetJobResponse(summary=summaries[0], workers=told)
    return Look(at_s, admin_pb2.GetStatusResponse(server_version="10.20.30", device="cuda:0"), summaries, shown)


def shown(before: Look, now: Look, height: int) -> list[str]:
    """The lines of a frame on a terminal of 80 columns."""
    console = Console(width=80, file=io.StringIO(), color_system=None)
    with console.capture() as capture:
        console.print(frame("gpu-host.example.org:50551", before, now, height=height))
    return capture.get().rstrip("\n").split("\n")


@pytest.mark.parametrize(
    ("workers", "jobs", "height"), [(16, 1, 24), (16, 9, 24), (300, 2, 50), (0, 1, 24), (3, 5, 12)]
)
def test_a_frame_fits_its_terminal_whatever_there_is(workers: int, jobs: int, height: int) -> None:
    """What does not fit is counted. Names are cut, not read as markup."""
    lines = shown(look(1.0, workers, jobs), look(2.0, workers, jobs, 5), height)
    assert len(lines) <= height
    assert max(map(len, lines)) <= 80
    rows = [line for line in lines if "[bold]gpu" in line]
    left_out = int(lines[-1].split()[0]) if lines[-1].endswith(" more") and len(rows) < workers else 0
    assert len(rows) + left_out == workers
    assert any("broken" in row for row in rows) == (len(rows) > 1)
    assert any(line.startswith(f"{jobs - 4} more") for line in lines) == (jobs > 4)


def test_rates_of_a_worker_that_has_come_back_count_from_the_start() -> None:
    """Its line's counters began anew: nothing is negative."""
    before, now = look(100.0, 2, 1, 50), look(101.0, 2, 1, 51)
    assert now.shown is not None
    for each in now.shown.workers:
        each.waited_s, each.bytes_received, each.bytes_sent = 0.5, 1000, 1000
    rows = [line for line in shown(before, now, 24) if "[bold]gpu" in line]
    assert [row.split()[6] for row in rows] == ["0%", "0%"]
    assert all(row.split()[-2:] == ["0", "0"] for row in rows)


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"),
        (3.25, "3.2"),
        (120, "120"),
        (99.96, "100.0"),
        (4500, "4.5k"),
        (1.2e6, "1.2M"),
        (5e9, "5G"),
        (3e13, "30T"),
        (3e16, "3e+16"),
    ],
)
def test_numbers_are_short(number: float, text: str) -> None:
    """Five characters or so."""
    assert short(number) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0 s"), (59, "59 s"), (187, "3:07"), (3661, "1:01:01"), (90_061, "1 d 1:01:01")]
)
def test_durations_are_for_a_person(seconds: float, text: str) -> None:
    """Days and hours where there are some."""
    assert duration(seconds) == text


# --- evict


def test_an_evicted_worker_is_told_so_and_the_others_go_on(server: Server) -> None:
    """They were waiting for it; it cannot come back, another process can."""
    (p, first), (q, second) = in_threads(lambda rank: worker(server, "evict", rank, 2), 2)
    in_threads(lambda rank: step(*((p, first), (q, second))[rank], 1.0), 2)
    waiting = threading.Thread(target=step, args=(p, first, 2.0))
    waiting.start()
    assert eventually(lambda: server.registry.get("evict").parts.aggregator.is_open)
    assert optimd("jobs", "evict", "evict", "worker-1", "--server", server.address) == (
        0,
        "worker worker-1 is out of job evict\n",
    )
    waiting.join(30)
    assert not waiting.is_alive()
    assert first.last_receipt is not None
    assert first.last_receipt.contributors == (0,)
    for _ in range(2):
        with pytest.raises(EvictedError, match="an operator has taken worker 'worker-1'"):
            step(q, second, 2.0)
    assert server.registry.get("evict").worker_count == 1
    second.close()
    again, successor = worker(server, "evict", 1, 2)
    in_threads(lambda rank: step(*((p, first), (again, successor))[rank], 3.0), 2)
    assert successor.job_step == 3
    assert torch.equal(p.detach(), again.detach())
    first.close()
    successor.close()


def test_a_worker_that_is_waited_for_after_its_death_can_be_evicted(server: Server) -> None:
    """With on_loss="wait" its place is kept for ever else."""
    policy = Sync(on_loss="wait")
    (p, first), (q, second) = in_threads(lambda rank: worker(server, "kept", rank, 2, aggregation=policy), 2)
    in_threads(lambda rank: step(*((p, first), (q, second))[rank], 1.0), 2)
    waiting = threading.Thread(target=step, args=(p, first, 2.0))
    waiting.start()
    assert eventually(lambda: server.registry.get("kept").parts.aggregator.is_open)
    optimd("jobs", "evict", "kept", "worker-1", "--server", server.address)
    waiting.join(30)
    assert not waiting.is_alive()
    assert first.job_step == 2
    first.close()
    with pytest.raises(EvictedError):
        step(q, second, 2.0)
    second.close()


def test_a_lost_worker_whose_place_is_kept_is_listed_and_can_be_given_up(tmp_path: Path) -> None:
    """With `on_loss="wait"` its lease ends and the others wait on, also after a restart: until an operator says no."""
    policy = Sync(on_loss="wait", timeout_s=60)
    settings = {"data_dir": str(tmp_path), "lease_s": 1.0}
    with running_server(**settings) as server:
        p, optimizer = worker(server, "kept", 0, 2, aggregation=policy)
        other_p, other = worker(server, "kept", 1, 2, aggregation=policy)
        in_threads(lambda rank: step((p, other_p)[rank], (optimizer, other)[rank], 1.0), 2)
        # Dead, without a word.
        other._session._line.drop()
        server.registry.get("kept").members()[1].cancel()
        assert eventually(lambda: "lost, awaited" in optimd("jobs", "show", "kept", "--server", server.address)[1])
        waiting = threading.Thread(target=step, args=(p, optimizer, 1.0))
        waiting.start()
        waiting.join(0.5)
        assert waiting.is_alive()
        status, output = optimd("jobs", "evict", "kept", "worker-1", "--server", server.address)
        assert status == 0, output
        waiting.join(20)
        assert optimizer.last_receipt.contributors == (0,)
        optimizer.close()
    with running_server(**settings) as server:
        assert server.registry.get("kept").awaited_absent() == []


def test_who_waits_is_seen_to_wait_before_it_is_over(server: Server) -> None:
    """Not only afterwards: else nobody could be told apart from the one that all wait for."""
    p, optimizer = worker(server, "waits", 0, 2)
    _, other = worker(server, "waits", 1, 2)
    job = server.registry.get("waits")
    waiting = threading.Thread(target=step, args=(p, optimizer, 1.0))
    waiting.start()
    try:
        assert eventually(lambda: job.members()[0].waits.total_s > 0.3)
        assert job.members()[1].waits.total_s == 0
    finally:
        other.close()
        waiting.join(20)
        optimizer.close()


def test_a_job_that_waits_for_its_disk_can_be_looked_at(tmp_path: Path) -> None:
    """It holds its lock meanwhile. What an operator would change says that it is busy, and changes nothing later."""
    files = FailingFiles()
    with running_server(data_dir=str(tmp_path), metrics_address="127.0.0.1:0", files=files) as server:
        p, optimizer = worker(server, "full", 0, 1)
        step(p, optimizer, 1.0)
        full = files.fail("write_some", code=errno.ENOSPC, times=math.inf)
        waiting = threading.Thread(target=step, args=(p, optimizer, 1.0))
        waiting.start()
        assert full.fires.wait(10)
        page = urllib.request.urlopen(f"http://{server.metrics_address}/metrics", timeout=5).read().decode()
        assert 'optimd_journal_stuck{job_name="full"} 1.0' in page
        assert 'optimd_worker_silent_seconds{job_name="full"' in page
        shown = optimd("jobs", "show", "full", "--server", server.address)
        assert shown[0] == 0, shown[1]
        assert "worker-0" in shown[1]
        status, output = optimd("jobs", "evict", "full", "worker-0", "--server", server.address)
        assert status == 2
        assert "is busy, and the worker is still in it" in output
        full.stop()
        waiting.join(20)
        assert optimizer.last_receipt.step == 2
        optimizer.close()


def test_there_has_to_be_such_a_worker(server: Server) -> None:
    """And such a job."""
    p, optimizer = worker(server, "alone", 0, 1)
    with optimizer:
        at = ("--server", server.address)
        assert optimd("jobs", "evict", "alone", "nobody", *at) == (2, "optimd: job 'alone' has no worker 'nobody'\n")
        assert optimd("jobs", "evict", "none", "nobody", *at) == (2, "optimd: there is no job 'none' on this server\n")
        step(p, optimizer, 1.0)


# --- bench


def test_bench_times_both_and_leaves_nothing_behind(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """In no job that the environment names."""
    monkeypatch.setenv("OPTIMD_JOB", "status")
    before = [job.name for job in server.registry.all()]
    at = ("--server", server.address, "--steps", "2")
    status, output = optimd("bench", *at, "--parameters", "200000", "--json")
    assert status == 0, output
    told = json.loads(output)
    assert told["parameters"] == 200_000
    for times in (told["step_s"], told["local_step_s"]):
        assert 0 < times["fastest"] <= times["median"] <= times["slowest"]
    status, output = optimd("bench", *at, "--parameters", "1000", "--wire-dtype", "bfloat16", "--transport", "grpc")
    assert (status, "bfloat16 on the wire" in output) == (0, True)
    assert eventually(lambda: [job.name for job in server.registry.all()] == before)
    assert os.environ["OPTIMD_JOB"] == "status"


# --- health and logs


def health_of(address: str, service: str, token: str | None = None) -> Any:
    """The status, or the code that the question was refused with."""
    metadata = [("authorization", f"Bearer {token}")] if token is not None else []
    with grpc.insecure_channel(address) as channel:
        request = health_pb2.HealthCheckRequest(service=service)
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(request, timeout=10, metadata=metadata)
        except grpc.RpcError as error:
            return error.code() if isinstance(error, grpc.Call) else error
    return health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)


def test_a_job_is_healthy_unless_its_disk_is_not(tmp_path: Path) -> None:
    """An orchestrator can tell a job that is stuck from a server that is down."""
    disk = FailingFiles()
    with running_server(health=True, data_dir=str(tmp_path), files=disk) as server:
        p, optimizer = worker(server, "kept", 0, 1)
        with optimizer:
            step(p, optimizer, 1.0)
            assert health_of(server.address, "") == "SERVING"
            assert health_of(server.address, "job/kept") == "SERVING"
            assert health_of(server.address, "job/none") is grpc.StatusCode.NOT_FOUND
            fault = disk.fail("write_some", code=errno.ENOSPC, times=math.inf, below="/journal/")
            stuck = threading.Thread(target=step, args=(p, optimizer, 2.0))
            stuck.start()
            assert eventually(lambda: health_of(server.address, "job/kept") == "NOT_SERVING")
            assert health_of(server.address, "") == "SERVING"
            assert fault.fired
            fault.stop()
            stuck.join(30)
            assert not stuck.is_alive()
            assert optimizer.job_step == 2
            assert health_of(server.address, "job/kept") == "SERVING"


def test_a_jobs_health_is_told_to_who_may_use_it(tmp_path: Path) -> None:
    """The server's to everybody: a probe brings no token."""
    tokens = tmp_path / "tokens.toml"
    tokens.write_text('[[token]]\nname = "a"\nsecret = "a-secret-of-its-own"\njobs = ["a"]\n', encoding="utf-8")
    with running_server(health=True, tokens=str(tokens)) as server:
        assert health_of(server.address, "") == "SERVING"
        assert health_of(server.address, "job/b") is grpc.StatusCode.UNAUTHENTICATED
        assert health_of(server.address, "job/b", "a-secret-of-its-own") is grpc.StatusCode.PERMISSION_DENIED
        assert health_of(server.address, "job/a", "a-secret-of-its-own") is grpc.StatusCode.NOT_FOUND


def test_reflection_can_be_left_out() -> None:
    """Health stays."""
    with running_server(health=True, reflection=False) as server, grpc.insecure_channel(server.address) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        with pytest.raises(grpc.RpcError) as caught:
            next(
                stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")]), timeout=10)
            )
        assert isinstance(caught.value, grpc.Call)
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
        assert health_of(server.address, "") == "SERVING"


def test_records_of_the_log_say_which_job_step_and_worker_they_are_about(tmp_path: Path) -> None:
    """As fields of their own, for a collector; those of a thread's last caller are gone with it."""
    log = tmp_path / "log"
    with (
        log.open("wb") as written,
        subprocess.Popen(
            [str(Path(sys.executable).parent / "optimd"), "serve", "--address=127.0.0.1:0", "--log-format=json"],
            stdout=subprocess.PIPE,
            stderr=written,
            text=True,
        ) as process,
    ):
        assert process.stdout is not None
        address = process.stdout.readline().split("'")[1]
        p = nn.Parameter(torch.ones(10))
        options = ProxyOptions(rank=0, world_size=1, worker_id="worker-7")
        with Adam([p], server=address, job="logged", options=options) as optimizer:
            p.grad = torch.ones(10)
            optimizer.step()
        assert optimd("jobs", "show", "none", "--server", address)[0] == 2
        process.terminate()
        assert process.wait(30) == 0
    records = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    (left,) = [record for record in records if record["event"].endswith(" left")]
    assert (left["job"], left["worker"], left["rank"], left["step"]) == ("logged", "worker-7", 0, 1)
    (refused,) = [record for record in records if "UNKNOWN_JOB" in record["event"]]
    assert (refused["job"], refused.get("worker"), refused.get("step")) == ("none", None, None)


def test_a_deleted_job_is_not_kept_by_the_threads_that_served_it() -> None:
    """Of which there are many, and what the log tells of a call has the job."""
    with running_server() as server:
        p, optimizer = worker(server, "gone", 0, 1)
        with optimizer:
            step(p, optimizer, 1.0)
        job = weakref.ref(server.registry.get("gone"))
        server.registry.delete("gone", force=False)
        assert eventually(lambda: gc.collect() >= 0 and job() is None)
