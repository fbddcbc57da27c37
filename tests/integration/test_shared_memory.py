"""Payloads in shared memory: the same steps to the last bit, no torn ones, and gRPC where it cannot be."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from optimd.client import (
    Adam,
    Async,
    ConfigurationError,
    JobExistsError,
    JobMismatchError,
    ProxyOptions,
    Sync,
    samehost,
)
from optimd.client.samehost import SameHost
from optimd.server import Server
from optimd.v1 import job_pb2, tensor_pb2, training_pb2
from optimd.wire import rings, sharedmemory
from optimd.wire.rings import RingWriter
from optimd.wire.sharedmemory import Segment
from tests.integration.test_protocol import PlainWorker, begin
from tests.support import ROOT, eventually, in_threads, running_server, server_process

SIZE = 65_536
"""Elements of a parameter of four buckets, each large enough to be placed."""
BUCKET_BYTES = 64 * 1024


class Placed:
    """How many payloads went through shared memory, and how many did not though there was some."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = self.missed = 0
        self._lock = threading.Lock()
        original = RingWriter.place

        def placing(ring: RingWriter, parts: Any, nbytes: int) -> int | None:
            position = original(ring, parts, nbytes)
            with self._lock:
                self.count += position is not None
                self.missed += position is None
            return position

        monkeypatch.setattr(RingWriter, "place", placing)

    def has_missed_more_than(self, count: int) -> bool:
        return self.missed > count


@pytest.fixture
def placed(monkeypatch: pytest.MonkeyPatch) -> Placed:
    return Placed(monkeypatch)


@pytest.fixture
def small_rings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rings that a step goes around in several times."""
    size, reserve = 2 * BUCKET_BYTES, Segment.reserve

    def reserving(segment: Segment) -> sharedmemory.Mapping:
        return reserve(segment, size)

    monkeypatch.setattr(samehost, "RING_BYTES", size)
    monkeypatch.setattr(Segment, "reserve", reserving)


def options(transport: Any = "shm", **more: Any) -> ProxyOptions:
    return ProxyOptions(transport=transport, bucket_bytes=BUCKET_BYTES, **more)


def gradient(step: int, rank: int = 0) -> torch.Tensor:
    return torch.randn(SIZE, generator=torch.Generator().manual_seed(1000 * rank + step))


@pytest.fixture
def left_behind(monkeypatch: pytest.MonkeyPatch) -> Callable[[], set[str]]:
    """Gives the files that workers of this test have made, and that are there still."""
    made: set[str] = set()
    original = Segment.create.__func__  # type: ignore[attr-defined]  # a classmethod's

    def create(cls: type[Segment]) -> Segment:
        segment: Segment = original(cls)
        made.add(segment.name)
        return segment

    monkeypatch.setattr(Segment, "create", classmethod(create))

    def still_there() -> set[str]:
        assert made
        return {name for name in made if (sharedmemory.FOLDER / name).exists()}

    return still_there


# --- the same steps


@pytest.mark.parametrize(
    "more",
    [
        pytest.param({"apply": "streaming"}, id="streaming"),
        pytest.param({"apply": "atomic"}, id="atomic"),
        pytest.param({"aggregation": Async()}, id="async"),
        pytest.param({"max_grad_norm": 0.5}, id="clipped"),
        pytest.param({"aggregation": Sync(deterministic=True)}, id="deterministic"),
    ],
)
def test_steps_through_shared_memory_have_torchs_bits(server: Server, placed: Placed, more: dict[str, Any]) -> None:
    ours, theirs = nn.Parameter(torch.zeros(SIZE)), nn.Parameter(torch.zeros(SIZE))
    local = torch.optim.Adam([theirs], lr=0.1, fused=True)
    with Adam([ours], lr=0.1, fused=True, server=server.address, options=options(**more)) as optimizer:
        for step in range(5):
            ours.grad, theirs.grad = gradient(step), gradient(step)
            optimizer.step()
            if "max_grad_norm" in more:
                torch.nn.utils.clip_grad_norm_([theirs], more["max_grad_norm"])
            local.step()
            assert torch.equal(ours, theirs), step
    buckets = -(-SIZE * 4 // BUCKET_BYTES)
    # Values that stand still are read where the server has them.
    ways = 2 if "aggregation" in more and isinstance(more["aggregation"], Async) else 1
    assert placed.count == ways * 5 * buckets
    assert not placed.missed


def test_accumulated_gradients_go_through_shared_memory_too(server: Server, placed: Placed) -> None:
    ours, theirs = nn.Parameter(torch.zeros(SIZE)), nn.Parameter(torch.zeros(SIZE))
    local = torch.optim.Adam([theirs], lr=0.1, fused=True)
    with Adam([ours], lr=0.1, fused=True, server=server.address, options=options()) as optimizer:
        ours.grad = gradient(0)
        optimizer.accumulate()
        before = placed.count
        ours.grad = gradient(1)
        optimizer.step()
    assert before > 0
    theirs.grad = gradient(0) + gradient(1)
    local.step()
    assert torch.equal(ours, theirs)


def test_auto_shares_memory_with_a_server_on_this_host(server: Server, placed: Placed) -> None:
    p = nn.Parameter(torch.zeros(SIZE))
    with Adam([p], server=server.address, options=options("auto")) as optimizer:
        p.grad = gradient(0)
        optimizer.step()
    assert placed.count
    assert optimizer.last_receipt is not None
    assert optimizer.last_receipt.bytes_sent < SIZE


def test_grpc_shares_none(server: Server, placed: Placed) -> None:
    p = nn.Parameter(torch.zeros(SIZE))
    with Adam([p], server=server.address, options=options("grpc")) as optimizer:
        p.grad = gradient(0)
        optimizer.step()
    assert not placed.count
    assert not placed.missed


def test_the_embedded_server_shares_memory(placed: Placed) -> None:
    p = nn.Parameter(torch.zeros(SIZE))
    with Adam([p], options=options()) as optimizer:
        p.grad = gradient(0)
        optimizer.step()
    assert placed.count


# --- where it cannot be


def test_a_server_may_share_none(placed: Placed) -> None:
    with running_server(shared_memory=False) as server:
        p = nn.Parameter(torch.zeros(SIZE))
        with Adam([p], server=server.address, options=options("auto")) as optimizer:
            p.grad = gradient(0)
            optimizer.step()
        with pytest.raises(ConfigurationError, match="--no-shared-memory"):
            Adam([p], server=server.address, options=options("shm"))
    assert not placed.count


@pytest.fixture
def too_little(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is room for a page in /dev/shm, and for no rings."""
    original = os.posix_fallocate

    def taking(descriptor: int, offset: int, length: int) -> None:
        if length > 4096:
            raise OSError(28, "No space left on device")
        original(descriptor, offset, length)

    monkeypatch.setattr(os, "posix_fallocate", taking)
    monkeypatch.setattr(SameHost, "_warned", threading.Event())


@pytest.mark.usefixtures("too_little")
def test_too_little_shared_memory_is_said_once_and_grpc_is_taken(
    server: Server, placed: Placed, left_behind: Callable[[], set[str]]
) -> None:
    p = nn.Parameter(torch.zeros(SIZE))
    with pytest.warns(UserWarning, match="--shm-size"):
        optimizer = Adam([p], server=server.address, options=options("auto"))
    with optimizer, warnings.catch_warnings():
        warnings.simplefilter("error")
        Adam([nn.Parameter(torch.zeros(SIZE))], server=server.address, options=options("auto")).close()
        p.grad = gradient(0)
        optimizer.step()
    assert not placed.count
    assert not left_behind()


@pytest.mark.usefixtures("too_little")
def test_whoever_insists_on_shared_memory_is_told_that_there_is_too_little(server: Server) -> None:
    with pytest.raises(ConfigurationError, match="too little memory in /dev/shm"):
        Adam([nn.Parameter(torch.zeros(SIZE))], server=server.address, options=options("shm"))
    assert not server.registry.all()


def test_without_dev_shm_grpc_is_taken(
    server: Server, placed: Placed, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sharedmemory, "FOLDER", tmp_path / "none")
    p = nn.Parameter(torch.zeros(SIZE))
    with Adam([p], server=server.address, options=options("auto")) as optimizer:
        p.grad = gradient(0)
        optimizer.step()
    assert not placed.count
    with pytest.raises(ConfigurationError, match="No such file"):
        Adam([p], server=server.address, options=options("shm"))


def test_an_unknown_transport_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="transport"):
        ProxyOptions(transport="carrier pigeon")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small /dev/shm")
@pytest.mark.parametrize(("mounted", "sharing"), [("64m", 2), ("12m", 0)])
def test_in_a_container_with_a_small_dev_shm_workers_share_what_there_is(
    mounted: str, sharing: int, tmp_path: Path
) -> None:
    """64 MB is what container engines give: rings for two workers, and gRPC for the others, without a signal."""
    script = tmp_path / "workers.py"
    script.write_text(
        "import warnings\n"
        "import torch\n"
        "from optimd.client import Adam, ProxyOptions\n"
        "from optimd.server import Server, ServerConfig\n"
        "server = Server(ServerConfig(address='127.0.0.1:0', threads=1, health=False))\n"
        "server.start()\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    params = [torch.nn.Parameter(torch.zeros(3_000_000)) for _ in range(4)]\n"
        "    optimizers = [Adam([p], server=server.address) for p in params]\n"
        "    for p in params:\n"
        "        p.grad = torch.ones_like(p)\n"
        "    for optimizer in optimizers:\n"
        "        optimizer.step()\n"
        "assert all(torch.equal(p, params[0]) and p[0] != 0 for p in params)\n"
        "shared = [optimizer._session._line.stream().ring is not None for optimizer in optimizers]\n"
        "print(sum(shared), sum('shm-size' in str(each.message) for each in caught))\n"
        "for optimizer in optimizers:\n"
        "    optimizer.close()\n"
        "server.stop()\n"
    )
    command = f"mount -t tmpfs -o size={mounted} tmpfs /dev/shm && exec {sys.executable} {script}"
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", command], check=False, capture_output=True, text=True, timeout=120, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(sharing), "1"]


def test_a_ring_that_stays_full_has_payloads_go_through_grpc(
    server: Server, placed: Placed, small_rings: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server is held up."""
    monkeypatch.setattr(rings, "PATIENCE_S", 0.0)
    ours, theirs = nn.Parameter(torch.zeros(SIZE)), nn.Parameter(torch.zeros(SIZE))
    local = torch.optim.Adam([theirs], lr=0.1, fused=True)
    with Adam([ours], lr=0.1, fused=True, server=server.address, options=options(), job="b") as optimizer:
        job = server.registry.get("b")
        for step in range(4):
            ours.grad, theirs.grad = gradient(step), gradient(step)
            missed = placed.missed
            stepping = threading.Thread(target=optimizer.step)
            with job._changed:
                stepping.start()
                assert eventually(partial(placed.has_missed_more_than, missed))
            stepping.join()
            local.step()
            assert torch.equal(ours, theirs)
    assert placed.count
    assert placed.missed


# --- hostile workers


class SharingWorker(PlainWorker):
    """A worker made of generated code that shares memory, and says of it what it likes."""

    def __init__(self, server: Server) -> None:
        super().__init__(server)
        self.segment = Segment.create()
        self.segment.reserve()
        self.answers = self.offered()

    def __exit__(self, *exception: object) -> None:
        super().__exit__(*exception)
        self.segment.close()

    def offered(self) -> Any:
        message = self.open_job()
        size = sharedmemory.RING_BYTES
        offer = job_pb2.SharedMemory(name=self.segment.name, token=self.segment.token, up_bytes=size, down_bytes=size)
        message.open.shared_memory.CopyFrom(offer)
        self.send(message, self.layout())
        accepted = self.receive().layout_accepted
        for bucket in self.until("bucket_table")[-1].bucket_table.buckets:
            header = tensor_pb2.TensorBucket(bucket_id=bucket.bucket_id, kind=tensor_pb2.TENSOR_KIND_PARAMETER)
            payload = bytes(4 * bucket.slices[0].length)
            self.send(training_pb2.TrainRequest(bucket=header, payload=payload))
        self.until("ready")
        return accepted


def placed_gradient(position: int, nbytes: int, payload: bytes = b"") -> training_pb2.TrainRequest:
    placement = tensor_pb2.Placement(position=position, nbytes=nbytes)
    header = tensor_pb2.TensorBucket(bucket_id=0, kind=tensor_pb2.TENSOR_KIND_GRADIENT, placement=placement)
    return training_pb2.TrainRequest(bucket=header, payload=payload)


@pytest.mark.parametrize(
    ("message", "text"),
    [
        pytest.param(placed_gradient(sharedmemory.RING_BYTES - 64, 1024), "no payload", id="beyond the ring"),
        pytest.param(placed_gradient(0, 2**32 - 1), "no payload", id="too large"),
        pytest.param(placed_gradient(0, 1000), "payload", id="of another length than the bucket"),
        pytest.param(placed_gradient(0, 1024, b"abcd"), "two places", id="in two places"),
    ],
)
def test_a_payload_where_it_cannot_be_gets_a_clean_answer(server: Server, message: Any, text: str) -> None:
    with SharingWorker(server) as worker:
        assert worker.answers.shared_memory
        worker.send(begin(), message)
        worker.fails_with("INVALID_FIELD", text)


def test_a_place_in_memory_that_is_not_shared_gets_a_clean_answer(server: Server) -> None:
    with PlainWorker(server).opened() as worker:
        worker.send(begin(), placed_gradient(0, 1024))
        worker.fails_with("INVALID_FIELD", "there is none")


def test_memory_that_is_not_there_is_not_taken_and_the_job_opens(server: Server) -> None:
    with PlainWorker(server) as worker:
        message = worker.open_job()
        message.open.shared_memory.CopyFrom(job_pb2.SharedMemory(name="optimd-" + "0" * 32, token=bytes(32)))
        worker.send(message, worker.layout())
        assert not worker.receive().layout_accepted.shared_memory


# --- torn reads


@pytest.mark.parametrize(
    ("workers", "aggregation", "more"),
    [
        pytest.param(1, Sync(), {"apply": "streaming"}, id="streaming"),
        pytest.param(1, Sync(), {"apply": "atomic"}, id="atomic"),
        pytest.param(3, Sync(), {}, id="sync"),
        pytest.param(3, Sync(), {"apply": "streaming"}, id="sync, streaming"),
        pytest.param(3, Sync(deterministic=True), {}, id="deterministic"),
        pytest.param(3, Sync(backup_workers=1), {}, id="backup workers"),
        pytest.param(3, Async(max_staleness=1), {}, id="bounded staleness"),
        pytest.param(3, Async(), {}, id="async"),
    ],
)
def test_no_bucket_is_ever_read_torn(
    server: Server, placed: Placed, small_rings: None, workers: int, aggregation: Any, more: dict[str, Any]
) -> None:
    """The elements of a bucket start from its own value and get equal gradients, those of the next one opposite ones.

    So a place that is written to before it has been read shows, on either side. Synchronous workers that bring the same
    gradients have, besides, the parameters that torch has.
    """
    is_async = isinstance(aggregation, Async)
    is_exact = not is_async and not aggregation.backup_workers
    per_bucket = BUCKET_BYTES // 4
    bases = torch.arange(SIZE // per_bucket).repeat_interleave(per_bucket) * 1000.0
    signs = torch.tensor([1.0, -1.0]).repeat_interleave(per_bucket).repeat(SIZE // per_bucket // 2)
    torn: list[str] = []

    def train(rank: int) -> None:
        p, twin = nn.Parameter(bases.clone()), nn.Parameter(bases.clone())
        local = torch.optim.Adam([twin], lr=0.1, fused=True)
        how = options(aggregation=aggregation, rank=rank, world_size=None if is_async else workers, **more)
        with Adam([p], lr=0.1, fused=True, server=server.address, job="b", options=how) as optimizer:
            for step in range(15):
                p.grad, twin.grad = signs * (-1) ** (step // 3), signs * (-1) ** (step // 3)
                optimizer.step()
                local.step()
                pieces = (p.detach() - bases).split(per_bucket)
                if any(piece.min() != piece.max() or piece.abs().max() > 100 for piece in pieces):
                    torn.append(f"rank {rank}, step {step}: a bucket is not of one piece")
                if is_exact and not torch.equal(p, twin):
                    torn.append(f"rank {rank}, step {step}: not what torch has")

    in_threads(train, workers)
    assert not torn
    assert placed.count > workers * 15


# --- nothing is left behind


def test_a_file_loses_its_name_when_the_server_has_it(server: Server, left_behind: Callable[[], set[str]]) -> None:
    p = nn.Parameter(torch.zeros(SIZE))
    with Adam([p], server=server.address, options=options()) as optimizer:
        assert optimizer._open_session()._line.stream().ring is not None
        assert not left_behind()


def test_a_worker_that_cannot_open_its_job_leaves_no_file(server: Server, left_behind: Callable[[], set[str]]) -> None:
    p = nn.Parameter(torch.zeros(SIZE))
    with Adam([p], server=server.address, job="b", options=options()) as optimizer:
        p.grad = gradient(0)
        optimizer.step()
    with pytest.raises(JobExistsError):
        Adam([p], server=server.address, job="b", options=options(on_existing="fail"))
    with pytest.raises(JobMismatchError):
        Adam([nn.Parameter(torch.zeros(3))], server=server.address, job="b", options=options())
    assert not left_behind()


def test_a_worker_whose_server_dies_in_a_step_goes_on_with_the_next_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left_behind: Callable[[], set[str]]
) -> None:
    """With memory that it shares with that one; of neither is anything left."""
    ours, theirs = nn.Parameter(torch.zeros(SIZE)), nn.Parameter(torch.zeros(SIZE))
    local = torch.optim.Adam([theirs], lr=0.1, fused=True)
    flags = (f"--address=unix://{tmp_path}/socket", f"--data-dir={tmp_path}/data", "--fsync=never")
    placing: list[int] = []
    kills: list[int] = []
    original = RingWriter.place
    with server_process(*flags) as (first, where):

        def place(ring: RingWriter, parts: Any, nbytes: int) -> int | None:
            placing.append(nbytes)
            if len(placing) == 2 * 4 + 3:
                # In the middle of the third push.
                first.send_signal(signal.SIGKILL)
                kills.append(first.wait())
            return original(ring, parts, nbytes)

        optimizer = Adam([ours], lr=0.1, fused=True, server=where, job="b", options=options(retry_timeout_s=60))
        monkeypatch.setattr(RingWriter, "place", place)
        rings_of: list[RingWriter | None] = []

        def train() -> None:
            for step in range(6):
                ours.grad, theirs.grad = gradient(step), gradient(step)
                rings_of.append(optimizer._open_session()._line.stream().ring)
                optimizer.step()
                local.step()
                assert torch.equal(ours, theirs), step

        with ThreadPoolExecutor(1) as pool:
            training = pool.submit(train)
            assert eventually(lambda: bool(kills))
            with server_process(*flags):
                training.result(timeout=60)
                optimizer.close()
    assert kills == [-signal.SIGKILL]
    assert len({id(ring) for ring in rings_of}) == 2
    assert None not in rings_of
    assert not left_behind()
