"""A sync fails while something is under way that no snapshot has: held gradients, or a step that is open."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import nn

from optimd.client import AccumulationLostError, Adam, OptimdError, ProxyOptions, Sync, statetransfer
from optimd.server import recordwriter
from optimd.server.snapshotfile import SnapshotWriter
from optimd.wire import bundles
from optimd.wire.layout import Bucket
from tests.faultfiles import FailingFiles
from tests.keptjobs import gradients, parameters, recovered
from tests.lives import Lives
from tests.support import assert_alike, eventually, in_threads, running_server

SIZES = (1500, 5, 300)
OPTIONS = ProxyOptions(bucket_bytes=1024, apply="streaming")


@pytest.fixture(autouse=True)
def impatience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recordwriter, "_RETRY_S", 0.002)


class Stall:
    """Holds up the next push in the middle, once so many of its buckets are out."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
        self._left = count
        self._original = statetransfer.bucket_message
        self.stalls = threading.Event()
        self.go_on = threading.Event()
        monkeypatch.setattr(statetransfer, "bucket_message", self._send)
        # So that each bucket that is out has been sent.
        monkeypatch.setattr(bundles, "BUNDLE_BYTES", 0)

    def _send(self, kind: str, *rest: Any) -> bytes:
        if kind == "gradient" and not self.stalls.is_set():
            if self._left == 0:
                self.stalls.set()
                assert self.go_on.wait(30)
            self._left -= 1
        return self._original(kind, *rest)


def give(params: Sequence[nn.Parameter], seed: int) -> None:
    for param, grad in zip(params, gradients(seed, params), strict=True):
        param.grad = grad


def undisturbed(folder: Path, dtype: torch.dtype, options: ProxyOptions, steps: int, **adam: Any) -> Any:
    """The state_dict and the values after some steps, and two accumulations before the last."""
    with Lives(folder) as lives:
        params = parameters(sizes=SIZES, dtype=dtype)
        with Adam(params, lr=0.1, server=lives.address, job="job", options=options, **adam) as optimizer:
            for seed in range(steps):
                if seed == steps - 1:
                    for micro in (10, 11):
                        give(params, micro)
                        optimizer.accumulate()
                give(params, seed)
                optimizer.step()
            return optimizer.state_dict(), [param.detach().clone() for param in params]


@pytest.mark.parametrize(
    ("dtype", "adam"),
    [(torch.float32, {"fused": True}), (torch.bfloat16, {"fused": False, "foreach": False})],
    ids=["fused", "bf16-loop"],
)
def test_a_step_that_is_open_when_a_sync_fails_is_open_in_the_next_life(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, adam: dict[str, Any]
) -> None:
    """With the buckets that were applied, and those that wait for the rest of their parameters."""
    with Lives(tmp_path, volatile=True) as lives:
        params = parameters(sizes=SIZES, dtype=dtype)
        optimizer = Adam(params, lr=0.1, server=lives.address, job="job", options=OPTIONS, **adam)
        give(params, 0)
        optimizer.step()
        stall = Stall(monkeypatch, 2)
        give(params, 1)
        stepping = threading.Thread(target=optimizer.step)
        stepping.start()
        assert stall.stalls.wait(20)
        job = lives.server.registry.get("job")
        assert eventually(lambda: sum(len(each.applied) for each in job.journal.rounds.values()) == 2)
        fault = lives.files.fail("sync", below="/journal/")
        job.journal.await_durable()
        assert fault.fired == 1
        (snapshot,) = lives.data_dir.glob("jobs/*/snapshots/*")
        assert snapshot.name == "00000001-step-1"
        lives.die()
        stall.go_on.set()
        lives.resume()
        stepping.join(30)
        assert not stepping.is_alive()
        give(params, 2)
        optimizer.step()
        state, values = optimizer.state_dict(), [param.detach().clone() for param in params]
        optimizer.close()
    local = parameters(sizes=SIZES, dtype=dtype)
    theirs = torch.optim.Adam(local, lr=0.1, **adam)
    for seed in range(3):
        give(local, seed)
        theirs.step()
    assert_alike(values, [param.detach() for param in local])
    assert_alike(state["state"], theirs.state_dict()["state"])


def test_a_snapshot_that_is_taken_in_the_step_in_which_a_sync_failed_can_be_replayed_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step goes on, and is over, between the copies of two buckets."""
    with Lives(tmp_path, volatile=True) as lives:
        params = parameters(sizes=SIZES)
        optimizer = Adam(params, lr=0.1, server=lives.address, job="job", options=OPTIONS, fused=True)
        give(params, 0)
        optimizer.step()
        stall = Stall(monkeypatch, 2)
        give(params, 1)
        stepping = threading.Thread(target=optimizer.step)
        stepping.start()
        assert stall.stalls.wait(20)
        job = lives.server.registry.get("job")
        assert eventually(lambda: sum(len(each.applied) for each in job.journal.rounds.values()) == 2)
        fault = lives.files.fail("sync", below="/journal/")
        job.journal.await_durable()
        assert fault.fired == 1
        copied: list[int] = []
        original = SnapshotWriter.write_bucket

        def write_bucket(writer: SnapshotWriter, bucket: Bucket, copies: Any) -> int:
            copied.append(bucket.bucket_id)
            if len(copied) == 3:
                stall.go_on.set()
                stepping.join(30)
            return original(writer, bucket, copies)

        with monkeypatch.context() as patched:
            patched.setattr(SnapshotWriter, "write_bucket", write_bucket)
            info = lives.server.registry.snapshot("job")
        assert (info.step, len(copied)) == (2, len(job.store.buckets))
        lives.die_and_resume()
        give(params, 2)
        optimizer.step()
        values = [param.detach().clone() for param in params]
        optimizer.close()
    local = parameters(sizes=SIZES)
    theirs = torch.optim.Adam(local, lr=0.1, fused=True)
    for seed in range(3):
        give(local, seed)
        theirs.step()
    assert_alike(values, [param.detach() for param in local])


@pytest.mark.parametrize("master_dtype", [None, torch.float32], ids=["own", "master"])
@pytest.mark.parametrize("micro", [1, 2])
def test_what_is_held_when_a_sync_fails_is_held_in_the_next_life(
    tmp_path: Path, master_dtype: torch.dtype | None, micro: int
) -> None:
    """To the bit, in the dtype that sums are held in."""
    options = ProxyOptions(bucket_bytes=1024, master_dtype=master_dtype)
    (tmp_path / "undisturbed").mkdir()
    expected = undisturbed(tmp_path / "undisturbed", torch.bfloat16, options, 3)
    with Lives(tmp_path, volatile=True) as lives:
        params = parameters(sizes=SIZES, dtype=torch.bfloat16)
        optimizer = Adam(params, lr=0.1, server=lives.address, job="job", options=options)
        for seed in range(2):
            give(params, seed)
            optimizer.step()
        for number in (1, 2):
            if number == micro:
                fault = lives.files.fail("sync", below="/journal/")
            give(params, 9 + number)
            optimizer.accumulate()
        assert fault.fired == 1
        lives.die_and_resume()
        give(params, 2)
        optimizer.step()
        state, values = optimizer.state_dict(), [param.detach().clone() for param in params]
        optimizer.close()
    assert_alike((state, values), expected)


@pytest.mark.parametrize("apply", ["atomic", "streaming"])
def test_a_sum_that_the_open_push_has_been_added_to_is_lost_rather_than_added_to_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, apply: Literal["atomic", "streaming"]
) -> None:
    """Its worker is told, and computes it again. Nothing has been applied yet: all of the push comes again."""
    with Lives(tmp_path, volatile=True) as lives:

        def opened(rank: int) -> tuple[Adam, list[nn.Parameter]]:
            options = ProxyOptions(
                rank=rank,
                world_size=2,
                bucket_bytes=1024,
                aggregation=Sync(world_size=2, deterministic=True),
                apply=apply,
            )
            params = parameters(sizes=SIZES)
            return Adam(params, lr=0.1, fused=True, server=lives.address, job="job", options=options), params

        (first, params), (second, others) = in_threads(opened, 2)
        give(params, 0)
        first.accumulate()
        stall = Stall(monkeypatch, 2)
        give(params, 1)
        raised: list[str] = []

        def work() -> None:
            with pytest.raises(AccumulationLostError) as caught:
                first.step()
            raised.append(str(caught.value))

        stepping = threading.Thread(target=work)
        stepping.start()
        assert stall.stalls.wait(20)
        job = lives.server.registry.get("job")
        assert eventually(lambda: any(member.held.has_given for member in job.members()))
        fault = lives.files.fail("sync", below="/journal/")
        give(others, 2)
        second.accumulate()
        assert fault.fired == 1
        lives.die()
        stall.go_on.set()
        lives.resume()
        stepping.join(30)
        assert "the server holds 0: compute the gradients again" in raised[0]
        for param, before in zip(params, gradients(0, params), strict=True):
            param.grad = before + param.grad
        give(others, 3)
        in_threads(lambda rank: (first, second)[rank].step(), 2)
        values = [param.detach().clone() for param in params]
        first.close()
        second.close()
    local = parameters(sizes=SIZES)
    theirs = torch.optim.Adam(local, lr=0.1, fused=True)
    for param, *grads in zip(local, *(gradients(seed, local) for seed in range(4)), strict=True):
        param.grad = ((grads[0] + grads[1]) + (grads[2] + grads[3])) / 2
    theirs.step()
    assert_alike(values, [param.detach() for param in local])


def test_a_snapshot_that_waits_for_an_open_step_does_not_keep_a_failed_sync_from_being_stood_in_for(
    tmp_path: Path,
) -> None:
    """Its worker may be waiting for that, to go on with the step."""
    files = FailingFiles()
    with (
        running_server(files=files, data_dir=str(tmp_path / "data"), drain_timeout_s=0.2) as server,
        Adam(
            parameters(), lr=0.1, server=server.address, job="job", options=ProxyOptions(bucket_bytes=1024)
        ) as optimizer,
        ThreadPoolExecutor(2) as pool,
    ):
        job = server.registry.get("job")
        (member,) = job.members()
        pushed = job.pushing.begin(
            member, sequence=0, base_step=0, group_count=1, load_count=0, layout_count=0, micro=0
        )
        bucket = job.store.buckets[0]
        job.pushing.push(pushed, bucket, [True], torch.ones(bucket.slices[0].length))
        snapshot = pool.submit(server.registry.snapshot, "job")
        assert eventually(lambda: bool([*(tmp_path / "data").glob("jobs/*/snapshots/making/manifest")]))
        fault = files.fail("sync", below="/journal/")
        pool.submit(job.journal.await_durable).result(30)
        assert fault.fired == 1
        assert snapshot.result(30).step == 0
        shutil.copytree(tmp_path / "data", tmp_path / "copy")
        with recovered(tmp_path / "copy") as jobs:
            assert [len(opened.applied) for opened in jobs["job"].journal.rounds.values()] == [1]
        server.registry.delete("job", force=True)
        with suppress(OptimdError):
            optimizer.close()
