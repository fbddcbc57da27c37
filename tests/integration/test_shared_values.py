"""A server's values, read by workers where they are: torch's bits, and never two steps' at once."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from optimd.client import Adam, Async, ProxyOptions, StepReceipt, Sync
from optimd.client.parameters import FlatWriter
from optimd.client.samehost import ServerValues
from optimd.server import Server
from optimd.server.outgoing import Outgoing
from optimd.wire.sharedmemory import FOLDER, NotSharedError, sweep
from optimd.wire.sharedvalues import MappedValues, ValuesFile
from tests.support import eventually, in_threads, running_server, server_process

SIZE = 4096
BUCKET_BYTES = 4096
BUCKETS = 4 * SIZE // BUCKET_BYTES


class InPlace:
    """How many buckets a server in this process has left where they were, and how many it has sent."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.left = self.sent = 0
        self._lock = threading.Lock()
        left, sent = Outgoing.put_in_place, Outgoing.put_values

        def put_in_place(outgoing: Outgoing, *args: Any) -> Iterator[bytes]:
            with self._lock:
                self.left += 1
            return left(outgoing, *args)

        def put_values(outgoing: Outgoing, *args: Any) -> Iterator[bytes]:
            with self._lock:
                self.sent += 1
            return sent(outgoing, *args)

        monkeypatch.setattr(Outgoing, "put_in_place", put_in_place)
        monkeypatch.setattr(Outgoing, "put_values", put_values)


@pytest.fixture
def in_place(monkeypatch: pytest.MonkeyPatch) -> InPlace:
    return InPlace(monkeypatch)


def options(**more: Any) -> ProxyOptions:
    return ProxyOptions(**{"transport": "shm", "bucket_bytes": BUCKET_BYTES, **more})


def gradient(step: int, shape: Any = SIZE, rank: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1000 * rank + step))


def receipt_of(optimizer: Adam) -> StepReceipt:
    assert optimizer.last_receipt is not None
    return optimizer.last_receipt


# --- torch's bits


@pytest.mark.parametrize("apply", ["streaming", "atomic"])
def test_every_bucket_of_a_step_is_read_in_place(server: Server, in_place: InPlace, apply: Any) -> None:
    """Of tensors of any form: dense, transposed, with gaps, a scalar, one without elements, in float32 and bfloat16."""

    def tensors() -> list[nn.Parameter]:
        generator = torch.Generator().manual_seed(7)
        gaps = torch.randn(40, 60, generator=generator)[:, ::2]
        return [
            nn.Parameter(torch.randn(50, 70, generator=generator)),
            nn.Parameter(torch.randn(30, 40, generator=generator).t()),
            nn.Parameter(gaps),
            nn.Parameter(torch.randn((), generator=generator)),
            nn.Parameter(torch.empty(0)),
            nn.Parameter(torch.randn(700, generator=generator, dtype=torch.bfloat16)),
        ]

    ours = tensors()
    # torch's fused kernel takes none with gaps, and none that lie otherwise than their gradients.
    theirs = [nn.Parameter(p.detach().clone(memory_format=torch.contiguous_format)) for p in ours]
    local = torch.optim.Adam(theirs, lr=0.1, fused=True)
    with Adam(ours, lr=0.1, fused=True, server=server.address, options=options(apply=apply)) as optimizer:
        for step in range(4):
            for group in (ours, theirs):
                for index, p in enumerate(group):
                    # One is left out now and then.
                    p.grad = None if (index, step) == (1, 2) else gradient(step, p.shape).to(p.dtype)
            optimizer.step()
            local.step()
            assert all(torch.equal(mine, other) for mine, other in zip(ours, theirs, strict=True)), step
        assert in_place.left > 4
        assert not in_place.sent


def test_workers_of_one_job_read_the_same_values(server: Server, in_place: InPlace) -> None:
    """Three, whose gradients differ, with the mean applied as a whole."""
    finals: dict[int, torch.Tensor] = {}

    def train(rank: int) -> None:
        p = nn.Parameter(torch.zeros(SIZE))
        how = options(rank=rank, world_size=3, aggregation=Sync(world_size=3, deterministic=True))
        with Adam([p], lr=0.1, fused=True, server=server.address, job="j", options=how) as optimizer:
            for step in range(6):
                p.grad = gradient(step, rank=rank)
                optimizer.step()
        finals[rank] = p.detach()

    in_threads(train, 3)
    twin = nn.Parameter(torch.zeros(SIZE))
    local = torch.optim.Adam([twin], lr=0.1, fused=True)
    for step in range(6):
        twin.grad = (gradient(step) + gradient(step, rank=1) + gradient(step, rank=2)).div_(3)
        local.step()
    assert all(torch.equal(final, twin) for final in finals.values())
    assert in_place.left == 3 * 6 * BUCKETS


def test_added_and_replaced_parameters_are_read_in_place_too(server: Server, in_place: InPlace) -> None:
    """A group that is added, a module that becomes double, and one that shrinks."""
    ours, theirs = ([nn.Parameter(torch.zeros(SIZE))] for _ in range(2))
    local = torch.optim.Adam(theirs, lr=0.1, fused=True)

    def step_both(optimizer: Adam, step: int) -> None:
        for p in (*ours, *theirs):
            p.grad = gradient(step, p.shape).to(p.dtype)
        optimizer.step()
        local.step()
        assert all(torch.equal(mine, other) for mine, other in zip(ours, theirs, strict=True)), step

    with Adam(ours, lr=0.1, fused=True, server=server.address, options=options()) as optimizer:
        step_both(optimizer, 0)
        for group, each in ((ours, optimizer), (theirs, local)):
            group.append(nn.Parameter(torch.zeros(300)))
            each.add_param_group({"params": [group[-1]], "lr": 0.5})
        step_both(optimizer, 1)
        for p in (*ours, *theirs):
            p.data = p.data[:250].clone()
        for each in (optimizer, local):
            each.state.clear()
        step_both(optimizer, 2)
        assert in_place.left == BUCKETS + (BUCKETS + 1) + 2
        assert not in_place.sent


def test_a_worker_that_comes_later_reads_what_a_distant_one_has_brought(server: Server, in_place: InPlace) -> None:
    """The values are moved to where it can read them, in the course of the job."""
    parameters = [nn.Parameter(torch.full((SIZE,), 1.0)) for _ in range(2)]
    sync = Sync(world_size="elastic")
    near = [options(transport=transport, rank=rank, aggregation=sync) for rank, transport in enumerate(("grpc", "shm"))]
    with Adam([parameters[0]], lr=0.1, server=server.address, job="j", options=near[0]) as distant:
        parameters[0].grad = gradient(0)
        distant.step()
        assert not in_place.left
        with Adam([parameters[1]], lr=0.1, server=server.address, job="j", options=near[1]) as close:
            assert torch.equal(*parameters)

            def step(rank: int) -> None:
                for number in range(1, 4):
                    parameters[rank].grad = gradient(number, rank=rank)
                    (distant, close)[rank].step()

            in_threads(step, 2)
            assert torch.equal(*parameters)
    assert in_place.left == 3 * BUCKETS


# --- where it cannot be


@pytest.mark.parametrize(
    "more",
    [
        pytest.param({"aggregation": Async()}, id="async"),
        pytest.param({"aggregation": Sync(world_size=2, backup_workers=1)}, id="backup workers"),
        pytest.param({"aggregation": Sync(world_size=2), "apply": "streaming"}, id="streaming with two"),
        pytest.param({"wire_dtype": torch.bfloat16}, id="narrowed"),
    ],
)
def test_what_may_change_or_travels_rounded_is_sent(server: Server, in_place: InPlace, more: dict[str, Any]) -> None:
    def train(rank: int) -> None:
        p = nn.Parameter(torch.zeros(SIZE))
        with Adam([p], server=server.address, job="j", options=options(rank=rank, **more)) as optimizer:
            p.grad = gradient(0)
            optimizer.step()

    in_threads(train, 1 if "wire_dtype" in more else 2)
    assert in_place.sent
    assert not in_place.left


def test_master_weights_are_sent_rounded(server: Server, in_place: InPlace) -> None:
    p = nn.Parameter(torch.zeros(SIZE, dtype=torch.bfloat16))
    with Adam([p], server=server.address, options=options(master_dtype=torch.float32)) as optimizer:
        p.grad = gradient(0).to(torch.bfloat16)
        optimizer.step()
    assert in_place.sent
    assert not in_place.left


@pytest.mark.parametrize("side", ["server", "worker"])
def test_where_there_is_no_memory_for_it_values_are_sent(
    server: Server, in_place: InPlace, monkeypatch: pytest.MonkeyPatch, side: str
) -> None:
    """The server's has none left, or the worker may not map it."""

    def none(*_: Any) -> Any:
        raise OSError(28, "No space left on device") if side == "server" else NotSharedError("it is not there")

    if side == "server":
        monkeypatch.setattr(ValuesFile, "create", none)
    else:
        monkeypatch.setattr(MappedValues, "__init__", none)
    p, twin = nn.Parameter(torch.zeros(SIZE)), nn.Parameter(torch.zeros(SIZE))
    with Adam([p], lr=0.1, fused=True, server=server.address, options=options()) as optimizer:
        p.grad, twin.grad = gradient(0), gradient(0)
        optimizer.step()
    torch.optim.Adam([twin], lr=0.1, fused=True).step()
    assert torch.equal(p, twin)
    assert in_place.sent == BUCKETS
    assert not in_place.left


def test_half_of_dev_shm_is_left_to_others(server: Server, in_place: InPlace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers' rings are to be there, and DataLoaders of other programs."""
    real = os.statvfs(FOLDER)
    few = os.statvfs_result((real.f_bsize, 1, 7, 7, 7, *real[5:]))
    monkeypatch.setattr(os, "statvfs", lambda _: few)
    p = nn.Parameter(torch.zeros(SIZE))
    with Adam([p], server=server.address, options=options()) as optimizer:
        p.grad = gradient(0)
        optimizer.step()
    assert in_place.sent
    assert not in_place.left


# --- never two steps' at once


def test_a_worker_that_reads_while_others_go_on_without_it_comes_back_to_one_steps_values(
    in_place: InPlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It stops in the middle of its reading until its lease is over and the other has stepped: what it reads is torn.

    It finds that out, and is given what became of its step, and the job's parameters.
    """
    reading, go_on = threading.Event(), threading.Event()
    checked: list[bool] = []
    copy, are_of = FlatWriter.copy, ServerValues.are_of

    def stopping(writer: FlatWriter, bucket: Any, *rest: Any) -> None:
        if threading.current_thread().name == "slow" and bucket.bucket_id == BUCKETS // 2 and not reading.is_set():
            reading.set()
            assert go_on.wait(60)
        copy(writer, bucket, *rest)

    def checking(values: ServerValues, version: int) -> bool:
        checked.append(are_of(values, version))
        return checked[-1]

    monkeypatch.setattr(FlatWriter, "copy", stopping)
    monkeypatch.setattr(ServerValues, "are_of", checking)
    parameters = [nn.Parameter(torch.zeros(SIZE)) for _ in range(2)]
    with running_server(lease_s=1.0) as server:
        opened = [
            Adam(
                [p],
                lr=0.1,
                fused=True,
                server=server.address,
                job="j",
                options=options(rank=rank, aggregation=Sync(world_size="elastic")),
            )
            for rank, p in enumerate(parameters)
        ]
        slow, quick = opened
        job = server.registry.get("j")
        for rank, p in enumerate(parameters):
            p.grad = gradient(0, rank=rank)
        stopped = threading.Thread(target=slow.step, name="slow")
        stopped.start()
        quick.step()
        assert reading.wait(60)
        # Nothing is heard of it any more: neither heartbeats nor answers.
        monkeypatch.setattr(slow._session._line, "beat", lambda: None)
        assert eventually(lambda: len(job.members()) == 1)
        for step in range(1, 3):
            parameters[1].grad = gradient(step, rank=1)
            quick.step()
        assert job.step == 3
        go_on.set()
        stopped.join(60)
        assert not stopped.is_alive()
        assert False in checked
        receipt = receipt_of(slow)
        assert (receipt.sequence, receipt.step, receipt.contributors) == (0, 1, (0, 1))
        assert receipt.resumed
        # It stands where the job stands, with parameters of one step.
        assert slow.job_step == 3
        assert torch.equal(*parameters)
        for optimizer in opened:
            optimizer.close()
    assert in_place.left


@pytest.mark.parametrize("transport", ["shm", "grpc"])
def test_a_worker_that_is_waited_for_no_longer_while_it_reads_ends_with_one_steps_values(
    server: Server, monkeypatch: pytest.MonkeyPatch, transport: Any
) -> None:
    """It is alive, and slow: `timeout_s` is over when it has read half, and the other one steps without it.

    In shared memory the worker itself reads; over gRPC the server does, at the worker's pace.
    """
    reading, go_on, slow_is_under_way = threading.Event(), threading.Event(), threading.Event()
    copy, put_values = FlatWriter.copy, Outgoing.put_values
    threads: set[str] = set()

    def hold(bucket: Any) -> None:
        if bucket.bucket_id == BUCKETS // 2 and slow_is_under_way.is_set() and not reading.is_set():
            threads.add(threading.current_thread().name)
            reading.set()
            assert go_on.wait(60)

    def copying(writer: FlatWriter, bucket: Any, *rest: Any) -> None:
        hold(bucket)
        copy(writer, bucket, *rest)

    def putting(outgoing: Outgoing, bucket: Any, *rest: Any) -> Iterator[bytes]:
        hold(bucket)
        return put_values(outgoing, bucket, *rest)

    monkeypatch.setattr(FlatWriter, "copy", copying)
    monkeypatch.setattr(Outgoing, "put_values", putting)
    parameters = [nn.Parameter(torch.zeros(SIZE)) for _ in range(2)]
    opened = [
        Adam(
            [p],
            lr=0.1,
            fused=True,
            server=server.address,
            job="j",
            options=options(transport=transport, rank=rank, aggregation=Sync(world_size="elastic", timeout_s=1)),
        )
        for rank, p in enumerate(parameters)
    ]
    job = server.registry.get("j")
    for rank, p in enumerate(parameters):
        p.grad = gradient(0, rank=rank)
    slow_is_under_way.set()
    steps = [threading.Thread(target=optimizer.step, name=str(rank)) for rank, optimizer in enumerate(opened)]
    for each in steps:
        each.start()
    assert reading.wait(60)
    assert eventually(lambda: sum(each.is_alive() for each in steps) == 1)
    slow = 0 if steps[0].is_alive() else 1
    for step in range(1, 3):
        parameters[1 - slow].grad = gradient(step)
        opened[1 - slow].step()
    assert job.step == 3
    go_on.set()
    steps[slow].join(60)
    assert not steps[slow].is_alive()
    assert receipt_of(opened[slow]).contributors == (0, 1)
    assert torch.equal(*parameters)
    assert threads
    if transport == "shm":
        assert threads == {str(slow)}
    for optimizer in opened:
        optimizer.close()


# --- nothing is left behind


def files_of(optimizer: Adam) -> list[Path]:
    """Where a worker reads its server's values."""
    return [FOLDER / name for name in optimizer._open_session()._line.server_values._files]


def test_a_jobs_file_goes_with_it(server: Server) -> None:
    p = nn.Parameter(torch.zeros(SIZE))
    with Adam([p], server=server.address, options=options()) as optimizer:
        (file,) = files_of(optimizer)
        assert file.exists()
    assert eventually(lambda: not file.exists())


def test_a_killed_servers_file_is_removed_by_the_next_one(tmp_path: Path) -> None:
    """Its values come back from the disk, to where the worker reads them."""
    ours, theirs = nn.Parameter(torch.zeros(SIZE)), nn.Parameter(torch.zeros(SIZE))
    local = torch.optim.Adam([theirs], lr=0.1, fused=True)
    flags = (f"--address=unix://{tmp_path}/socket", f"--data-dir={tmp_path}/data", "--fsync=never")
    with server_process(*flags) as (first, where):
        optimizer = Adam([ours], lr=0.1, fused=True, server=where, job="j", options=options(retry_timeout_s=60))
        files: list[Path] = []
        for step in range(2):
            ours.grad, theirs.grad = gradient(step), gradient(step)
            optimizer.step()
            local.step()
            files += files_of(optimizer)
        first.send_signal(signal.SIGKILL)
        first.wait()
        with server_process(*flags):
            for step in range(2, 4):
                ours.grad, theirs.grad = gradient(step), gradient(step)
                optimizer.step()
                local.step()
                files += files_of(optimizer)
            assert torch.equal(ours, theirs)
            optimizer.close()
    assert len(files) == 4
    assert files[0] == files[1] != files[2] == files[3]
    # The second one has been killed too: whoever comes next removes what they have left.
    sweep()
    assert not any(file.exists() for file in files)
