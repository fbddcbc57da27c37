"""What is left when a process is killed. Each test asserts that its victim was where it was meant to be."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import nn

from optimd.client import Adam, ConnectionLostError, ProxyOptions, statetransfer
from optimd.server import Server
from optimd.server.aggregation import SyncAggregator
from optimd.wire.layout import Bucket
from tests.support import eventually, server_process


def start_worker(script: str, folder: Path) -> subprocess.Popen[str]:
    path = folder / "worker.py"
    path.write_text(textwrap.dedent(script))
    return subprocess.Popen([sys.executable, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def line_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def kill(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=10)
    assert process.returncode == -signal.SIGKILL


def test_survivors_go_on_when_a_synchronous_worker_is_killed(quick_server: Server, tmp_path: Path) -> None:
    """Rank 1 dies between two steps; rank 0's open step is completed without it when its lease has ended."""
    server = quick_server
    process = start_worker(
        f"""
        import torch
        from optimd.client import Adam, ProxyOptions
        p = torch.nn.Parameter(torch.zeros(1000))
        optimizer = Adam([p], server="{server.address}", job="two", options=ProxyOptions(rank=1, world_size=2))
        p.grad = torch.full((1000,), 3.0)
        optimizer.step()
        print("stepped", flush=True)
        input()
        """,
        tmp_path,
    )
    p = nn.Parameter(torch.zeros(1000))
    with Adam([p], server=server.address, job="two", options=ProxyOptions(rank=0, world_size=2)) as optimizer:
        p.grad = torch.ones(1000)
        optimizer.step()
        assert optimizer.last_receipt is not None
        assert optimizer.last_receipt.contributors == (0, 1)
        assert line_of(process) == "stepped"
        kill(process)
        started = time.monotonic()
        optimizer.step()
        assert time.monotonic() - started < 30
        receipt = optimizer.last_receipt
        assert (receipt.step, receipt.contributors) == (2, (0,))


@pytest.mark.parametrize("apply", ["atomic", "streaming"])
def test_a_worker_killed_in_the_middle_of_its_push_is_in_no_atomic_step_and_in_a_part_of_a_streamed_one(
    quick_server: Server, tmp_path: Path, apply: Literal["atomic", "streaming"]
) -> None:
    """It had pushed one of two buckets. Where steps are streamed, that one is averaged over two, the other over one."""
    server = quick_server
    process = start_worker(
        f"""
        import torch
        from optimd.client import Adam, ProxyOptions
        from optimd.client import statetransfer
        from optimd.wire import bundles

        # One bucket goes out, then the push stops where a slow worker's would.
        original = statetransfer.bucket_message
        sent = []

        def stalling(kind, bucket, *rest):
            if kind == "gradient" and sent:
                print("stalled", flush=True)
                input()
            if kind == "gradient":
                sent.append(bucket)
            return original(kind, bucket, *rest)

        statetransfer.bucket_message = stalling
        bundles.BUNDLE_BYTES = 0
        p = torch.nn.Parameter(torch.zeros(512))
        options = ProxyOptions(rank=1, world_size=2, bucket_bytes=1024, apply="{apply}")
        optimizer = Adam([p], lr=1.0, server="{server.address}", job="partial", options=options)
        p.grad = torch.full((512,), 3.0)
        optimizer.step()
        """,
        tmp_path,
    )
    p = nn.Parameter(torch.zeros(512))
    options = ProxyOptions(rank=0, world_size=2, bucket_bytes=1024, apply=apply)
    with Adam([p], lr=1.0, server=server.address, job="partial", options=options) as optimizer:
        assert line_of(process) == "stalled"
        job = server.registry.get("partial")
        # Asserts that the fault is where it is meant to be: the victim's first bucket is in, its push is not over.
        aggregator = job._aggregator
        assert isinstance(aggregator, SyncAggregator)
        assert eventually(lambda: bool(aggregator._pushed))
        assert list(aggregator._pushed) == [0]
        assert job.step == 0
        kill(process)
        assert eventually(lambda: len(job.members()) == 1)
        p.grad = torch.ones(512)
        optimizer.step()
        receipt = optimizer.last_receipt
        assert receipt is not None
        streams = apply == "streaming"
        assert (receipt.step, receipt.outcome) == (1, "merged" if streams else "applied")
        assert (receipt.contributors, receipt.partial_contributors) == (((0, 1), (1,)) if streams else ((0,), ()))
        moments = optimizer.state[p]["exp_avg"]
        assert torch.allclose(moments[:256], torch.full((256,), 0.1 * (2.0 if streams else 1.0)))
        assert torch.allclose(moments[256:], torch.full((256,), 0.1))


def test_a_lone_streaming_worker_killed_in_mid_push_leaves_a_job_that_can_be_resumed(
    quick_server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The step is closed as it stands, and the log names the parameter that is partly stepped."""
    server = quick_server
    process = start_worker(
        f"""
        import torch
        from optimd.client import Adam, ProxyOptions
        from optimd.client import statetransfer
        from optimd.wire import bundles
        original = statetransfer.bucket_message
        sent = []

        def stalling(kind, bucket, *rest):
            if kind == "gradient" and sent:
                input()
            if kind == "gradient":
                sent.append(bucket)
            return original(kind, bucket, *rest)

        statetransfer.bucket_message = stalling
        bundles.BUNDLE_BYTES = 0
        p = torch.nn.Parameter(torch.zeros(512))
        options = ProxyOptions(bucket_bytes=1024)
        optimizer = Adam([("table", p)], lr=1.0, server="{server.address}", job="torn", options=options)
        print("opened", flush=True)
        p.grad = torch.full((512,), 3.0)
        optimizer.step()
        """,
        tmp_path,
    )
    assert line_of(process) == "opened"
    job = server.registry.get("torn")
    assert eventually(lambda: job._aggregator.has_applied)
    kill(process)
    assert eventually(lambda: not job.members())
    assert "partly stepped: parameter 0 (table)" in caplog.text
    p = nn.Parameter(torch.ones(512))
    with Adam([("table", p)], lr=1.0, server=server.address, job="torn") as optimizer:
        assert (optimizer.job_step, optimizer.next_sequence, optimizer.resumed) == (1, 1, True)
        assert torch.allclose(p[:256], torch.tensor(-1.0))
        assert not p[256:].any()
        assert optimizer.state_dict()["state"][0]["step"] == 1
        p.grad = torch.ones(512)
        optimizer.step()
        assert optimizer.job_step == 2


def test_a_creator_killed_while_it_uploads_leaves_nothing_and_the_next_one_creates(
    server: Server, tmp_path: Path
) -> None:
    """A worker that waited for it takes its place."""
    process = start_worker(
        f"""
        import torch
        from optimd.client import Adam, ProxyOptions
        from optimd.client import valuetransfer

        def stalling(*_):
            print("uploading", flush=True)
            input()

        valuetransfer.bucket_message = stalling
        p = torch.nn.Parameter(torch.zeros(512))
        Adam([p], server="{server.address}", job="unborn", options=ProxyOptions(rank=1, world_size=2))
        """,
        tmp_path,
    )
    assert line_of(process) == "uploading"
    assert server.registry._jobs["unborn"].phase.name == "CREATING"
    kill(process)
    p = nn.Parameter(torch.full((512,), 4.0))
    options = ProxyOptions(rank=0, world_size=2)
    with Adam([p], server=server.address, job="unborn", options=options) as optimizer:
        assert not optimizer.resumed
        assert torch.equal(p, torch.full((512,), 4.0))


def test_a_killed_server_ends_a_step_that_waits_for_it_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """No hang: a ConnectionLostError with the address; the gradients are still there."""
    with server_process() as (process, address):
        p = nn.Parameter(torch.ones(2_000_000))
        options = ProxyOptions(retry_timeout_s=0.5, bucket_bytes=1 << 20)
        optimizer = Adam([p], server=address, options=options)
        p.grad = torch.ones(2_000_000)
        optimizer.step()
        original, sent = statetransfer.bucket_message, list[int]()

        def killing(kind: str, bucket: Bucket, *rest: Any) -> bytes:
            sent.append(bucket.bucket_id)
            if len(sent) == 4:
                process.kill()
                process.wait(10)
            return original(kind, bucket, *rest)

        monkeypatch.setattr(statetransfer, "bucket_message", killing)
        with pytest.raises(ConnectionLostError, match=address):
            optimizer.step()
        assert process.wait(10) == -signal.SIGKILL
        assert 4 <= len(sent) < 8  # it was in the middle of the push when the server died
        assert torch.equal(p.grad, torch.ones(2_000_000))
        optimizer.close()
