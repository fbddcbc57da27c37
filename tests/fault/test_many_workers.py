"""Several worker processes on one server process: killed, stopped, joining late, and all at once.

Each test asserts that its fault fired, and compares the weights with a replay, through plain torch, of the gradients
that the workers themselves wrote to disk and that the receipts name.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthStub
from torch import nn

from optimd.client import Adam, ProxyOptions
from optimd.v1 import admin_pb2, reading_pb2
from optimd.v1.admin_service_pb2_grpc import AdminServiceStub
from optimd.v1.optimizer_service_pb2_grpc import OptimizerServiceStub
from tests.support import ROOT, eventually, server_process

pytestmark = pytest.mark.timeout(120)

LEASE_S = 1.5


class WorkerProcess:
    """A process that runs `tests/fault/worker.py`, and the lines that it has written."""

    def __init__(self, address: str, folder: Path, rank: int, *flags: str) -> None:
        self.rank = rank
        self.process = subprocess.Popen(
            [
                sys.executable,
                str(ROOT / "tests" / "fault" / "worker.py"),
                f"--server={address}",
                "--job=many",
                f"--folder={folder}",
                f"--rank={rank}",
                *flags,
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.lines: list[dict[str, Any]] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(json.loads(line))

    @property
    def receipts(self) -> list[dict[str, Any]]:
        return [line for line in self.lines if "outcome" in line]

    @property
    def opened(self) -> dict[str, Any]:
        return next(line for line in self.lines if "opened" in line)

    def go_on(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def has_said(self, key: str) -> bool:
        return any(key in line for line in list(self.lines))

    def at_step(self, step: int) -> bool:
        receipts = self.receipts
        return bool(receipts) and receipts[-1]["step"] >= step

    def send_signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)
        assert self.process.wait(10) == -signal.SIGKILL
        self._reader.join(10)

    def close(self) -> None:
        self._reader.join(10)
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()

    def finish(self, timeout_s: float = 60) -> None:
        assert self.process.wait(timeout_s) == 0
        self._reader.join(10)


@pytest.fixture
def server() -> Iterator[str]:
    with server_process(f"--lease-s={LEASE_S}") as (_, address):
        yield address


@pytest.fixture
def workers() -> Iterator[list[WorkerProcess]]:
    started: list[WorkerProcess] = []
    yield started
    for worker in started:
        if worker.process.poll() is None:
            worker.send_signal(signal.SIGCONT)
            worker.process.kill()
            worker.process.wait(10)
        worker.close()


def start(
    workers: list[WorkerProcess], address: str, folder: Path, ranks: range | list[int], *flags: str, **each: str
) -> list[WorkerProcess]:
    new = [WorkerProcess(address, folder, rank, *flags, *each.get(f"rank_{rank}", "").split()) for rank in ranks]
    workers.extend(new)
    return new


def steps_of(address: str, workers: list[WorkerProcess]) -> list[tuple[int, dict[int, int]]]:
    """What the job has committed: of each step the number, and of each contributor the sequence number of its push.

    As the server tells it to whoever watches: of a push whose worker did not live to hear of it, nobody else knows.
    What workers were told themselves has to agree with that.
    """
    last = max(receipt["step"] for worker in workers for receipt in worker.receipts)
    steps: dict[int, dict[int, int]] = {step: {} for step in range(1, last + 1)}
    with grpc.insecure_channel(address) as channel:
        stub = OptimizerServiceStub(channel)
        for rank in sorted({worker.rank for worker in workers}):
            watch = stub.WatchSteps(reading_pb2.WatchStepsRequest(job="many", worker_id=f"worker-{rank}"), timeout=20)
            for told in watch:
                assert not told.receipt.partial_contributors
                assert (rank in told.receipt.contributors) == told.contributed
                if told.contributed:
                    steps[told.receipt.step][rank] = told.receipt.sequence
                if told.receipt.step == last:
                    watch.cancel()
                    break
    for worker in workers:
        for receipt in worker.receipts:
            if receipt["outcome"] in ("applied", "merged"):
                assert sorted(steps[receipt["step"]]) == receipt["contributors"]
                assert steps[receipt["step"]][worker.rank] == receipt["sequence"]
            else:
                assert all(pushes.get(worker.rank) != receipt["sequence"] for pushes in steps.values())
    return sorted(steps.items())


def replay(address: str, folder: Path, workers: list[WorkerProcess]) -> torch.Tensor:
    """The weights that plain torch comes to with the gradients on disk: those of each step's contributors, averaged."""
    p = nn.Parameter(torch.zeros(2000))
    local = torch.optim.Adam([p], lr=0.05, fused=True)
    used: set[tuple[int, int]] = set()
    for _, pushes in steps_of(address, workers):
        assert used.isdisjoint(pushes.items())
        used.update(pushes.items())
        total: torch.Tensor | None = None
        for rank in sorted(pushes):
            part = torch.load(folder / f"push-{rank}-{pushes[rank]}.pt")
            total = part if total is None else total + part
        assert total is not None
        p.grad = total / len(pushes)
        local.step()
    return p.detach()


@pytest.mark.parametrize("deterministic", [True, False])
def test_survivors_finish_when_one_of_four_is_killed_in_mid_push(
    server: str, workers: list[WorkerProcess], tmp_path: Path, deterministic: bool
) -> None:
    """Nothing of its unfinished push is in any step: the weights are those of the receipts' gradients."""
    flags = ["--world-size=4", "--steps=30", *(["--deterministic"] if deterministic else [])]
    team = start(workers, server, tmp_path, range(4), *flags, rank_2="--stall-at=10")
    assert eventually(lambda: team[2].has_said("stalled"), 60)
    # Asserts that the fault is where it is meant to be: three buckets of its push for step 11 are out.
    assert len(team[2].receipts) == 10
    team[2].kill()
    survivors = [team[rank] for rank in (0, 1, 3)]
    for survivor in survivors:
        survivor.finish()
    assert [receipt["contributors"] for receipt in team[0].receipts] == [[0, 1, 2, 3]] * 10 + [[0, 1, 3]] * 20
    finals = [torch.load(tmp_path / f"final-{rank}.pt") for rank in (0, 1, 3)]
    expected = replay(server, tmp_path, team)
    assert all(torch.equal(finals[0], final) for final in finals[1:])
    if deterministic:
        assert torch.equal(finals[0], expected)
    else:
        assert torch.allclose(finals[0], expected, atol=1e-5)


def test_a_stopped_worker_learns_where_it_stands_and_goes_on(
    server: str, workers: list[WorkerProcess], tmp_path: Path
) -> None:
    """SIGSTOP for longer than its lease: the other goes on alone. SIGCONT: it is late once, and then in again."""
    flags = ["--world-size=2", "--steps=150", "--pause-s=0.05", "--deterministic"]
    team = start(workers, server, tmp_path, range(2), *flags)
    assert eventually(lambda: team[1].at_step(20), 60)
    team[1].send_signal(signal.SIGSTOP)
    stopped_at = team[1].receipts[-1]["step"]
    assert eventually(lambda: team[0].receipts[-1]["contributors"] == [0], 30)
    alone_at = team[0].receipts[-1]["step"]
    # Asserts that the fault fired: it was in the steps, and then it was not.
    assert alone_at <= stopped_at + 3
    assert eventually(lambda: team[0].at_step(alone_at + 10), 30)
    team[1].send_signal(signal.SIGCONT)
    for worker in team:
        worker.finish()
    outcomes = [receipt["outcome"] for receipt in team[1].receipts]
    assert outcomes.count("dropped_late") <= 1
    late = [receipt for receipt in team[1].receipts if receipt["outcome"] == "dropped_late"]
    resumed = [receipt for receipt in team[1].receipts if receipt["resumed"]]
    assert late or resumed
    assert team[1].receipts[-1]["contributors"] == [0, 1]
    together = sum(receipt["contributors"] == [0, 1] for receipt in team[0].receipts)
    assert together >= 40
    finals = [torch.load(tmp_path / f"final-{rank}.pt") for rank in (0, 1)]
    assert torch.equal(*finals)
    assert torch.equal(finals[0], replay(server, tmp_path, team))


def test_a_worker_that_joins_at_step_50_of_100_counts_from_the_next_step(
    server: str, workers: list[WorkerProcess], tmp_path: Path
) -> None:
    """It receives the weights that the others have, and all end with the same."""
    flags = ["--steps=100", "--pause-s=0.05", "--deterministic"]
    (late,) = start(workers, server, tmp_path, [2], *flags, "--wait")
    assert eventually(lambda: late.has_said("waits"), 60)
    team = start(workers, server, tmp_path, range(2), *flags)
    assert eventually(lambda: team[0].at_step(50), 60)
    late.go_on()
    for worker in (*team, late):
        worker.finish()
    joined_at = late.opened["opened"]
    assert 50 <= joined_at < 100
    assert late.opened["next_sequence"] == 0
    assert late.receipts[0]["step"] == joined_at + 1
    assert [receipt["step"] for receipt in late.receipts] == list(range(joined_at + 1, 101))
    assert all(receipt["contributors"][-1] == 2 for receipt in late.receipts)
    finals = [torch.load(tmp_path / f"final-{rank}.pt") for rank in range(3)]
    assert all(torch.equal(finals[0], final) for final in finals)
    assert torch.equal(finals[0], replay(server, tmp_path, [*team, late]))


def test_all_workers_die_and_new_ones_resume_the_job(server: str, workers: list[WorkerProcess], tmp_path: Path) -> None:
    """The job waits for them with its weights and its state, and they go on at their next sequence numbers."""
    flags = ["--world-size=2", "--steps=40", "--pause-s=0.02", "--deterministic"]
    first = start(workers, server, tmp_path, range(2), *flags)
    assert eventually(lambda: all(worker.at_step(15) for worker in first), 60)
    for worker in first:
        worker.kill()
    assert all(worker.receipts[-1]["step"] < 40 for worker in first)
    second = start(workers, server, tmp_path, range(2), *flags)
    for worker in second:
        worker.finish()
        assert worker.opened["opened"] >= 15
        assert worker.opened["next_sequence"] >= 15
    finals = [torch.load(tmp_path / f"final-{rank}.pt") for rank in (0, 1)]
    assert torch.equal(*finals)
    assert torch.equal(finals[0], replay(server, tmp_path, first + second))


def test_where_lost_workers_are_awaited_a_run_in_which_they_are_killed_has_the_weights_of_one_in_which_none_was(
    server: str, workers: list[WorkerProcess], tmp_path: Path
) -> None:
    """Bit for bit: each is killed in the middle of a push and started again."""
    flags = ["--world-size=2", "--steps=24", "--on-loss=wait"]
    (one,) = start(workers, server, tmp_path, [0], *flags, rank_0="--stall-at=7")
    (two,) = start(workers, server, tmp_path, [1], *flags, rank_1="--stall-at=15")
    assert eventually(lambda: one.has_said("stalled"), 60)
    one.kill()
    (again,) = start(workers, server, tmp_path, [0], *flags)
    assert eventually(lambda: two.has_said("stalled"), 60)
    two.kill()
    (other,) = start(workers, server, tmp_path, [1], *flags)
    again.finish()
    other.finish()
    assert (len(one.receipts), len(two.receipts)) == (7, 15)
    assert all(receipt["contributors"] == [0, 1] for worker in (one, two, again, other) for receipt in worker.receipts)
    finals = [torch.load(tmp_path / f"final-{rank}.pt") for rank in (0, 1)]
    p = nn.Parameter(torch.zeros(2000))
    local = torch.optim.Adam([p], lr=0.05, fused=True)
    for number in range(24):
        parts = [torch.load(tmp_path / f"push-{rank}-{number}.pt") for rank in (0, 1)]
        p.grad = (parts[0] + parts[1]) / 2
        local.step()
    assert all(torch.equal(final, p) for final in finals)


def resident_mb(process: int) -> float:
    (line,) = [line for line in Path(f"/proc/{process}/status").read_text().splitlines() if line.startswith("VmRSS")]
    return int(line.split()[1]) / 1024


def test_sixteen_workers_make_200_steps_and_nothing_starves() -> None:
    """Each is in every step, health checks and operators are answered meanwhile, and the server's memory is flat."""
    finals: dict[int, torch.Tensor] = {}
    memory: list[float] = []
    waits: list[float] = []
    reached = threading.Event()

    def work(rank: int) -> None:
        p = nn.Parameter(torch.zeros(20_000))
        options = ProxyOptions(rank=rank, world_size=16, worker_id=f"worker-{rank}")
        with Adam([p], lr=0.05, server=address, job="many", options=options) as optimizer:
            for step in range(200):
                p.grad = torch.randn(20_000, generator=torch.Generator().manual_seed(1000 * rank + step))
                optimizer.step()
                assert optimizer.last_receipt is not None
                assert optimizer.last_receipt.contributors == tuple(range(16))
                if step == 20:
                    reached.set()
        finals[rank] = p.detach()

    with server_process("--threads=1", "--health") as (process, address), grpc.insecure_channel(address) as channel:
        admin, health = AdminServiceStub(channel), HealthStub(channel)
        with ThreadPoolExecutor(16) as pool:
            team = [pool.submit(work, rank) for rank in range(16)]
            while not all(worker.done() for worker in team):
                started = time.monotonic()
                answer = health.Check(HealthCheckRequest(), timeout=20)
                assert answer.status == HealthCheckResponse.SERVING
                admin.ListJobs(admin_pb2.ListJobsRequest(), timeout=20)
                waits.append(time.monotonic() - started)
                if reached.is_set():
                    memory.append(resident_mb(process.pid))
                threading.Event().wait(0.1)
            for worker in team:
                worker.result()
    assert all(torch.equal(finals[0], final) for final in finals.values())
    assert len(memory) > 5
    assert max(memory) - memory[0] < 16
    # Not a figure: a call that starved would wait for the steps of all workers.
    assert max(waits) < 5
    print(f"16 workers: the slowest of {len(waits)} health checks took {max(waits):.3f} s")
