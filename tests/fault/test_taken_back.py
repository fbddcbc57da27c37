"""A streamed step that all of its workers are lost from is taken back where the server has a data dir."""

from __future__ import annotations

import shutil
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest
import torch
from torch import nn

from optimd.client import Adam, ProxyOptions
from optimd.server import Server
from tests.support import eventually, running_server

ELEMENTS = 2048
OPTIONS = ProxyOptions(worker_id="mortal", bucket_bytes=1024)


def gradient(number: int) -> torch.Tensor:
    return torch.randn(ELEMENTS, generator=torch.Generator().manual_seed(number))


def expected(steps: int) -> nn.Parameter:
    p = nn.Parameter(torch.zeros(ELEMENTS))
    local = torch.optim.Adam([p], lr=0.1, fused=True)
    for number in range(steps):
        p.grad = gradient(number)
        local.step()
    return p


def dying_worker(server: Server, folder: Path, *, whole_steps: int) -> subprocess.Popen[str]:
    """Makes some steps, then pushes three buckets of one and stops."""
    path = folder / "worker.py"
    path.write_text(
        textwrap.dedent(
            f"""
            import torch
            from optimd.client import Adam, ProxyOptions, statetransfer
            from optimd.wire import bundles
            original = statetransfer.bucket_message
            sent = []

            def stalling(kind, bucket, *rest):
                if kind == "gradient" and optimizer.next_sequence == {whole_steps}:
                    if len(sent) == 3:
                        print("stalled", flush=True)
                        input()
                    sent.append(bucket)
                return original(kind, bucket, *rest)

            statetransfer.bucket_message = stalling
            bundles.BUNDLE_BYTES = 0
            p = torch.nn.Parameter(torch.zeros({ELEMENTS}))
            options = ProxyOptions(worker_id="mortal", bucket_bytes=1024)
            optimizer = Adam([p], lr=0.1, fused=True, server="{server.address}", job="torn", options=options)
            for number in range({whole_steps} + 1):
                p.grad = torch.randn({ELEMENTS}, generator=torch.Generator().manual_seed(number))
                optimizer.step()
            """
        )
    )
    process = subprocess.Popen([sys.executable, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline().strip() == "stalled"
    # Asserts that the fault is where it is meant to be: in mid-step, with buckets applied.
    job = server.registry.get("torn")
    assert eventually(lambda: len([r for r in job.journal.rounds.values() if len(r.applied) == 3]) == 1)
    assert job.step == whole_steps
    return process


def kill(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate(timeout=10)


def assert_goes_on(server: Server, *, steps: int) -> None:
    """A successor finds the job at its last commit, and comes to the weights of an undisturbed run."""
    p = nn.Parameter(torch.ones(ELEMENTS))
    with Adam([p], lr=0.1, fused=True, server=server.address, job="torn", options=OPTIONS) as optimizer:
        assert (optimizer.job_step, optimizer.next_sequence, optimizer.resumed) == (steps, steps, steps > 0)
        assert torch.equal(p, expected(steps))
        p.grad = gradient(steps)
        optimizer.step()
        assert torch.equal(p, expected(steps + 1))
        assert optimizer.last_receipt is not None
        assert optimizer.last_receipt.partial_contributors == ()


@pytest.mark.parametrize("whole_steps", [0, 2])
def test_a_successor_of_a_worker_killed_in_mid_step_finds_the_job_at_its_last_commit(
    tmp_path: Path, whole_steps: int, caplog: pytest.LogCaptureFixture
) -> None:
    """With or without a snapshot: here without."""
    with running_server(data_dir=str(tmp_path / "data"), lease_s=60.0, drain_timeout_s=0.5) as server:
        process = dying_worker(server, tmp_path, whole_steps=whole_steps)
        kill(process)
        assert_goes_on(server, steps=whole_steps)
        assert f"the job is back at step {whole_steps}, bit for bit" in caplog.text
    # And so does the journal, with what was taken back in the middle of it.
    shutil.rmtree(tmp_path / "data" / "jobs" / next(iter((tmp_path / "data" / "jobs").iterdir())) / "snapshots")
    with running_server(data_dir=str(tmp_path / "data")) as server:
        p = nn.Parameter(torch.ones(ELEMENTS))
        with Adam([p], lr=0.1, fused=True, server=server.address, job="torn", options=OPTIONS) as optimizer:
            assert optimizer.job_step == whole_steps + 1
            assert torch.equal(p, expected(whole_steps + 1))


def test_a_snapshot_waits_for_an_open_step_and_has_nothing_of_it_when_it_is_taken_back(tmp_path: Path) -> None:
    """The one that was begun in the middle of the step is begun anew."""
    with running_server(data_dir=str(tmp_path / "data"), lease_s=60.0, drain_timeout_s=0.5) as server:
        process = dying_worker(server, tmp_path, whole_steps=2)
        taken: list[int] = []
        thread = threading.Thread(target=lambda: taken.append(server.registry.snapshot("torn").step))
        thread.start()
        assert eventually(lambda: bool([*(tmp_path / "data").glob("jobs/*/snapshots/making/manifest")]))
        assert not taken
        kill(process)
        assert_goes_on(server, steps=2)
        thread.join(20)
        assert taken
        shutil.copytree(tmp_path / "data", tmp_path / "copy")
    with running_server(data_dir=str(tmp_path / "copy")) as server:
        p = nn.Parameter(torch.ones(ELEMENTS))
        with Adam([p], lr=0.1, fused=True, server=server.address, job="torn", options=OPTIONS) as optimizer:
            assert optimizer.job_step == 3
            assert torch.equal(p, expected(3))


def test_a_step_that_was_open_when_the_server_died_is_taken_back_when_its_worker_does_not_come_back(
    tmp_path: Path,
) -> None:
    """Worker and server die; the successor finds the last commit."""
    with running_server(data_dir=str(tmp_path / "data"), lease_s=60.0, drain_timeout_s=0.5) as server:
        process = dying_worker(server, tmp_path, whole_steps=2)
        shutil.copytree(tmp_path / "data", tmp_path / "copy")
        kill(process)
    with running_server(data_dir=str(tmp_path / "copy"), lease_s=60.0, drain_timeout_s=0.5) as server:
        assert server.registry.get("torn").is_in_mid_step
        assert_goes_on(server, steps=2)
