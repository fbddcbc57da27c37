"""A module's buffers: brought by the first worker, given to the others, refreshed inside `step()`."""

from __future__ import annotations

import gc
import threading
import weakref
from typing import Any

import pytest
import torch
from torch import nn

from optimd.client import Adam, JobMismatchError, LimitExceededError, ProxyOptions
from optimd.server import Server
from optimd.server.buffers import REFRESH_INTERVAL_S
from optimd.server.settings import PARAMETER_OVERHEAD_BYTES
from tests.support import eventually, in_threads, running_server


class Net(nn.Module):
    """BatchNorm's three buffers, and of every dtype that is carried one of its own."""

    DTYPES = (
        torch.float64,
        torch.float32,
        torch.bfloat16,
        torch.float16,
        torch.complex64,
        torch.complex128,
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
        torch.bool,
    )

    def __init__(self, seed: int = 0, width: int = 3) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(width)
        for dtype in self.DTYPES:
            # Odd sizes, so that a buffer starts at any byte of the run that they travel as.
            self.register_buffer(str(dtype).replace("torch.", "a_"), torch.zeros(3, 7, dtype=dtype))
        self.register_buffer("empty", torch.zeros(0, 4))
        self.register_buffer("scalar", torch.tensor(seed))
        self.register_buffer("cache", torch.full((5,), float(seed)), persistent=False)
        self.fill(seed)

    def fill(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for _, buffer in self.named_buffers():
                noise = torch.randint(0, 2 if buffer.dtype is torch.bool else 100, buffer.shape, generator=generator)
                buffer.copy_(noise)


def saved(model: nn.Module) -> dict[str, torch.Tensor]:
    parameters = dict(model.named_parameters())
    return {name: value.clone() for name, value in model.state_dict().items() if name not in parameters}


def equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    assert list(ours) == list(theirs)
    return all(value.dtype == theirs[name].dtype and torch.equal(value, theirs[name]) for name, value in ours.items())


def options(rank: int, world_size: int, **more: Any) -> ProxyOptions:
    return ProxyOptions(rank=rank, world_size=world_size, bucket_bytes=1024, **more)


def step(optimizer: Adam) -> None:
    for parameter in optimizer.param_groups[0]["params"]:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()


def grow_old(server: Server, job: str) -> None:
    server.registry.get(job).buffers._refresh._updated_s -= REFRESH_INTERVAL_S + 1


def test_the_first_worker_brings_the_buffers_and_the_other_receives_them_in_place(server: Server) -> None:
    """All dtypes, in chunks, by name; what is not persistent stays each worker's own."""
    attached = threading.Event()
    models = [Net(seed=1, width=700), Net(seed=2, width=700)]
    first = saved(models[0])
    cache = models[1].cache.clone()

    def work(rank: int) -> None:
        model = models[rank]
        places = {name: buffer.data_ptr() for name, buffer in model.named_buffers()}
        with Adam(model.parameters(), server=server.address, job="both", options=options(rank, 2)) as optimizer:
            if rank == 1:
                attached.wait(30)
            optimizer.attach_buffers(model)
            attached.set()
            for _ in range(3):
                step(optimizer)
        assert {name: buffer.data_ptr() for name, buffer in model.named_buffers()} == places

    in_threads(work, 2)
    assert equal(saved(models[0]), first)
    assert equal(saved(models[1]), first)
    assert torch.equal(models[1].cache, cache)
    assert not torch.equal(models[1].cache, models[0].cache)
    held = server.registry.get("both").buffers.tensors()
    assert equal(held, first)
    assert [value.shape for value in held.values()] == [value.shape for value in first.values()]


def test_workers_that_attach_at_once_end_up_with_one_of_theirs(server: Server) -> None:
    """One brings them, the other waits for it, whichever is first."""
    models = [Net(seed=1), Net(seed=2)]
    both = [saved(model) for model in models]
    barrier = threading.Barrier(2)

    def work(rank: int) -> None:
        model = models[rank]
        with Adam(model.parameters(), server=server.address, job="race", options=options(rank, 2)) as optimizer:
            barrier.wait(30)
            optimizer.attach_buffers(model)
            step(optimizer)

    in_threads(work, 2)
    assert equal(saved(models[0]), saved(models[1]))
    assert any(equal(saved(models[0]), values) for values in both)


def test_buffers_outlive_the_last_worker_and_are_given_to_who_resumes(server: Server) -> None:
    """A restarted script starts with the statistics that the job has."""
    model, again = Net(seed=1), Net(seed=9)
    first = saved(model)
    with Adam(model.parameters(), server=server.address, job="resumed") as optimizer:
        optimizer.attach_buffers(model)
        step(optimizer)
    assert server.registry.get("resumed").worker_count == 0
    with Adam(again.parameters(), server=server.address, job="resumed") as optimizer:
        assert optimizer.resumed
        optimizer.attach_buffers(again)
        assert equal(saved(again), first)


def test_a_copy_that_has_grown_old_is_refreshed_by_the_lowest_rank_inside_step(server: Server) -> None:
    """Neither before, nor by the other worker, nor twice."""
    models = [Net(seed=1), Net(seed=2)]
    barrier = threading.Barrier(2)
    held: list[dict[str, torch.Tensor]] = []

    def work(rank: int) -> None:
        model = models[rank]
        with Adam(model.parameters(), server=server.address, job="old", options=options(rank, 2)) as optimizer:
            if rank == 1:
                barrier.wait(30)
            optimizer.attach_buffers(model)
            if rank == 0:
                barrier.wait(30)
            for turn in range(4):
                model.fill(10 * turn + rank)
                barrier.wait(30)
                if turn == 2 and rank == 0:
                    grow_old(server, "old")
                barrier.wait(30)
                step(optimizer)
                if rank == 0:
                    held.append(server.registry.get("old").buffers.tensors())

    started = saved(models[0])
    in_threads(work, 2)
    refreshed = Net()
    refreshed.fill(20)
    for copy, values in zip(held, (started, started, saved(refreshed), saved(refreshed)), strict=True):
        assert equal(copy, values)


def test_a_worker_that_waits_to_join_gets_buffers_as_fresh_as_its_parameters(server: Server) -> None:
    """It came in the middle of a step; the copy is young, and yet the one of before that step would be too old."""
    model, late = Net(seed=1), Net(seed=2)
    job = "late"
    optimizers = [
        Adam([nn.Parameter(torch.zeros(4))], server=server.address, job=job, options=options(rank, 3))
        for rank in range(3)
    ]
    optimizers[0].attach_buffers(model)
    optimizers[2].close()  # the world has formed; its place is taken again below

    def others(rank: int) -> None:
        step(optimizers[rank])

    model.fill(77)
    newest = saved(model)
    joined: list[Adam] = []

    def join() -> None:
        joined.append(Adam([nn.Parameter(torch.ones(4))], server=server.address, job=job, options=options(2, 3)))
        joined[0].attach_buffers(late)

    first = threading.Thread(target=others, args=(0,))
    first.start()
    assert eventually(lambda: server.registry.get(job)._aggregator.is_open)
    newcomer = threading.Thread(target=join)
    newcomer.start()
    assert eventually(lambda: server.registry.get(job).buffers._newcomers == 1)
    others(1)
    for thread in (first, newcomer):
        thread.join(30)
        assert not thread.is_alive()
    assert equal(saved(late), newest)
    for optimizer in (*optimizers, *joined):
        optimizer.close()


def test_a_worker_that_joins_waits_for_the_refresh_that_is_under_way_but_not_for_one_that_never_comes(
    server: Server,
) -> None:
    """The asked worker's module is gone: its next step says so, and what the server has is given."""
    model, late = Net(seed=1), Net(seed=2)
    first = saved(model)
    asked = Adam([nn.Parameter(torch.zeros(4))], server=server.address, job="gone", options=options(0, 2))
    other = Adam([nn.Parameter(torch.zeros(4))], server=server.address, job="gone", options=options(1, 2))
    asked.attach_buffers(model)
    grow_old(server, "gone")
    del model
    gc.collect()
    in_threads(lambda rank: step((asked, other)[rank]), 2)
    refresh = server.registry.get("gone").buffers._refresh
    assert refresh.asked is not None
    attaching = threading.Thread(target=other.attach_buffers, args=(late,))
    attaching.start()
    asked.close()
    attaching.join(30)
    assert not attaching.is_alive()
    assert equal(saved(late), first)
    other.close()


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            lambda model: model.norm.register_buffer("more", torch.ones(2)),
            "'norm.more' of shape [2] is only the worker's",
        ),
        (lambda model: model.__delattr__("a_bool"), "'a_bool': the worker's is named 'empty'"),
        (
            lambda model: model.register_buffer("a_int8", torch.zeros(3, 8, dtype=torch.int8)),
            "[3, 7], the worker's [3, 8]",
        ),
        (lambda model: model.register_buffer("a_int8", torch.zeros(3, 7)), "torch.int8, the worker's torch.float32"),
        (
            lambda model: model.norm.__delattr__("num_batches_tracked"),
            "'norm.num_batches_tracked' of shape [] is only the job's",
        ),
    ],
    ids=["more", "other", "shape", "dtype", "fewer"],
)
def test_other_buffers_than_the_jobs_are_refused_by_the_name_of_the_first(
    server: Server, change: Any, text: str
) -> None:
    """The worker keeps its own, trains on, and may attach the right ones."""
    model, other = Net(seed=1), Net(seed=2)
    with Adam(model.parameters(), server=server.address, job="mismatch") as optimizer:
        optimizer.attach_buffers(model)
    change(other)
    own = saved(other)
    with Adam(other.parameters(), server=server.address, job="mismatch") as optimizer:
        with pytest.raises(JobMismatchError) as caught:
            optimizer.attach_buffers(other)
        assert text in str(caught.value)
        assert equal(saved(other), own)
        step(optimizer)
        right = Net(seed=3)
        optimizer.attach_buffers(right)
        assert equal(saved(right), saved(model))
        with pytest.raises(RuntimeError, match="attached to this optimizer already"):
            optimizer.attach_buffers(right)
        step(optimizer)


def test_buffers_count_against_the_jobs_limit_and_are_refused_before_memory_is_taken() -> None:
    """With the copy that replaces them. The job trains on, and has room for smaller ones."""
    with running_server(max_job_bytes=2_000_000) as small:
        model = nn.Module()
        model.register_buffer("table", torch.zeros(100_000))
        many = nn.Module()
        for index in range(1100):
            many.register_buffer(f"b{index}", torch.zeros(0))
        with Adam([nn.Parameter(torch.ones(1000))], server=small.address, job="limit") as optimizer:
            with pytest.raises(LimitExceededError, match="descriptions of the buffers alone"):
                optimizer.attach_buffers(many)
            optimizer.attach_buffers(model)
            step(optimizer)
            taken = small.registry.get("limit").full_bytes
            assert taken == 3 * 4000 + 2 * 400_000 + PARAMETER_OVERHEAD_BYTES
            with pytest.raises(LimitExceededError):
                optimizer.add_param_group({"params": [nn.Parameter(torch.ones(100_000))]})
        model.register_buffer("more", torch.zeros(200_000))
        with Adam([nn.Parameter(torch.ones(1000))], server=small.address, job="limit too") as optimizer:
            with pytest.raises(LimitExceededError, match="would take 2400000 bytes; this server has 1985952 left"):
                optimizer.attach_buffers(model)
            step(optimizer)
            assert small.registry.get("limit too").buffers.tensors() == {}


def test_what_cannot_be_carried_is_refused_by_name_before_anything_is_sent(server: Server) -> None:
    """The job goes on as if nobody had asked."""
    with Adam([nn.Parameter(torch.ones(3))], server=server.address) as optimizer:
        for tensor, text in (
            (torch.zeros(2, dtype=torch.uint16), r"buffer 'odd': torch.uint16 is not carried"),
            (torch.zeros(2, device="meta"), r"buffer 'odd' is on the meta device"),
            (torch.zeros(2).to_sparse(), r"buffer 'odd' is on the meta device or not strided"),
        ):
            module = nn.Module()
            module.register_buffer("odd", tensor)
            with pytest.raises(ValueError, match=text):
                optimizer.attach_buffers(module)
        with pytest.raises(ValueError, match="not initialized yet"):
            optimizer.attach_buffers(nn.LazyBatchNorm1d())
        optimizer.attach_buffers(nn.Linear(2, 2))
        step(optimizer)


def test_a_module_that_changes_its_buffers_is_told_when_they_are_wanted(server: Server) -> None:
    """By name, on a stream that goes on; another tensor of the same kind in a buffer's place is no change."""
    model = nn.BatchNorm1d(4)
    with Adam(model.parameters(), server=server.address, job="changing") as optimizer:
        optimizer.attach_buffers(model)
        model.running_mean = torch.full((4,), 5.0)
        grow_old(server, "changing")
        step(optimizer)
        held = server.registry.get("changing").buffers
        assert torch.equal(held.tensors()["running_mean"], torch.full((4,), 5.0))
        model.running_mean = torch.zeros(4, dtype=torch.float64)
        grow_old(server, "changing")
        with pytest.warns(UserWarning, match="not refreshed: the attached module has changed: buffer 'running_mean'"):
            step(optimizer)
        assert optimizer.job_step == 2
        model.running_mean = torch.full((4,), 6.0)
        step(optimizer)
        assert torch.equal(held.tensors()["running_mean"], torch.full((4,), 6.0))


def test_attaching_keeps_neither_the_module_nor_the_optimizer_alive(
    server: Server, request: pytest.FixtureRequest
) -> None:
    """A module that owns its optimizer and attaches itself is gone when it is dropped, and so is the job."""
    gc.collect()
    gc.disable()
    request.addfinalizer(gc.enable)
    model = nn.BatchNorm1d(3)
    optimizer = Adam([nn.Parameter(torch.ones(3))], server=server.address)
    optimizer.attach_buffers(model)
    model.__dict__["optimizer"] = optimizer
    references = [weakref.ref(model), weakref.ref(optimizer)]
    del optimizer, model
    assert [reference() for reference in references] == [None, None]
    assert eventually(lambda: not server.registry.all())
