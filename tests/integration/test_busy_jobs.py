"""What meets in a job: exchanges of several workers, readers, and workers that are lost in the middle."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import nn

from optimd.client import Adam, LimitExceededError, ProxyOptions
from optimd.server import Server
from optimd.server.aggregation import Worker
from optimd.server.company import JobPhase
from optimd.server.errors import OutOfOrderError, StepTimeoutError
from optimd.server.job import Job
from optimd.server.member import Member
from optimd.server.settings import JobSettings
from optimd.wire.layout import Parameter
from tests.support import eventually, in_threads, running_server

ELEMENTS = 256
OPTIONS = {
    **torch.optim.Adam([nn.Parameter(torch.ones(1))]).defaults,
    "fused": True,
}
PARAMETERS = [Parameter("p", torch.float32, (2 * ELEMENTS,), (0,))]


class Pair:
    """A job of two workers with one parameter in two buckets, without a wire."""

    def __init__(self) -> None:
        settings = JobSettings(
            world_size=2,
            reduction="sum",
            apply="atomic",
            bucket_bytes=4 * ELEMENTS,
            timeout_s=5.0,
            join_timeout_s=5.0,
            private=False,
        )
        self.job = Job("pair", settings, torch.device("cpu"))
        self.members = [Member(Worker(rank, f"worker-{rank}"), incarnation=rank) for rank in range(2)]
        self.job.admit(self.members[0], creates=True, check=lambda: None)
        for bucket in self.job.bringing.grow(self.members[0], [OPTIONS], [1], PARAMETERS):
            self.job.store.write_values(bucket, torch.zeros(ELEMENTS))
        self.job.bringing.grown(self.members[0])
        self.job.welcome(self.members[0], step=0)
        self.job.admit(self.members[1], creates=False, check=lambda: None)
        self.job.bringing.adopt(self.members[1], 0)
        self.job.welcome(self.members[1], step=0)


def test_parameters_are_not_replaced_while_another_worker_accumulates() -> None:
    """Half of its sum would be of the old ones. It waits, and the sum is forgotten with them."""
    pair = Pair()
    job, (first, second) = pair.job, pair.members
    assert job.accumulating.begin(second, sequence=0, micro=0, group_count=1, layout_count=0)
    job.accumulating.add(second, job.store.buckets[0], [True], torch.ones(ELEMENTS))
    known: list[bool] = []

    def replace() -> None:
        known.append(job.bringing.await_replacement(first, layout_count=1, sizes=[1], parameters=PARAMETERS))

    waiting = threading.Thread(target=replace)
    waiting.start()
    waiting.join(0.2)
    assert waiting.is_alive()
    job.accumulating.add(second, job.store.buckets[1], [True], torch.ones(ELEMENTS))
    job.accumulating.end(second)
    job.pushing.finished(second)
    waiting.join(5)
    assert known == [False]
    store = job.bringing.replace([OPTIONS], [1], PARAMETERS, [])
    for bucket in store.buckets:
        store.write_values(bucket, torch.zeros(ELEMENTS))
    job.bringing.grown(first)
    assert second.held.nbytes == 0
    assert job.bringing.await_replacement(second, layout_count=1, sizes=[1], parameters=PARAMETERS)
    assert second.held.micro == 0


def test_parameters_are_not_replaced_while_another_worker_receives_its_step() -> None:
    """It would be sent others' values in the place of its own."""
    pair = Pair()
    job, (first, second) = pair.job, pair.members
    for member in pair.members:
        push = job.pushing.begin(member, sequence=0, base_step=0, group_count=1, load_count=0, layout_count=0, micro=0)
        job.pushing.end(push)
    job.pushing.finished(first)
    results: list[Any] = []
    waiting = threading.Thread(
        target=lambda: results.append(
            job.bringing.await_replacement(first, layout_count=1, sizes=[1], parameters=PARAMETERS)
        )
    )
    waiting.start()
    waiting.join(0.2)
    assert waiting.is_alive()
    job.pushing.finished(second)
    waiting.join(5)
    assert results == [False]


def test_a_worker_that_left_does_not_make_a_job_ready() -> None:
    """What it brought was taken back: nobody could join what is left."""
    pair = Pair()
    settings = pair.job.settings
    job = Job("unborn", settings, torch.device("cpu"))
    creator = Member(Worker(0, "worker-0"), incarnation=1)
    job.admit(creator, creates=True, check=lambda: None)
    job.bringing.grow(creator, [OPTIONS], [1], PARAMETERS)
    job.leave(creator)
    with pytest.raises(OutOfOrderError):
        job.bringing.grown(creator)
    assert job.phase is JobPhase.CREATING


def test_a_worker_may_be_told_twice_at_once_that_it_has_left_while_somebody_reads() -> None:
    """Its stream and its call end in two threads; the job counts it out once."""
    pair = Pair()
    job, (first, second) = pair.job, pair.members
    errors: list[BaseException] = []

    def leave() -> None:
        try:
            job.leave(second)
        except BaseException as error:  # noqa: BLE001  # told to the test
            errors.append(error)

    with job.reading():
        threads = [threading.Thread(target=leave) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(0.2)
    for thread in threads:
        thread.join(5)
    assert errors == []
    assert job.members() == [first]


def test_a_reader_whose_line_goes_down_does_not_wait_on() -> None:
    """Its thread is free for others, however long the step takes."""
    pair = Pair()
    job = pair.job
    job.bringing.grow(pair.members[0], [OPTIONS], [1], PARAMETERS)
    holds: list[Any] = []
    ended = threading.Event()

    def read() -> None:
        with pytest.raises(StepTimeoutError), job.reading(holds.append):
            pass
        ended.set()

    threading.Thread(target=read).start()
    assert eventually(lambda: bool(holds))
    assert not ended.wait(0.2)
    job.release(holds[0])
    assert ended.wait(5)


def test_values_of_a_worker_that_is_lost_before_its_gradients_are_not_put_in_place(server: Server) -> None:
    """The survivor would go on from others than the server has."""
    results: list[Any] = []
    ready = threading.Event()

    def doomed() -> None:
        p = nn.Parameter(torch.ones(4))
        lost = Adam([p], server=server.address, job="two", options=ProxyOptions(rank=0, world_size=2))
        ready.wait(10)
        with torch.no_grad():
            p.fill_(5.0)
        session = lost._session
        assert session is not None
        push = lost._push(session, [p])
        stream = session._line.usable()
        from optimd.client.pushes import push_messages, pushed_entries
        from optimd.v1 import training_pb2

        pages = pushed_entries(push)
        begin = training_pb2.StepBegin(sequence=0, base_step=0, group_count=1, pushed_pages=len(pages))
        messages = list(push_messages(session._line.layout, push, begin, [], pages))
        stream.send(messages[:-1])
        (job,) = server.registry.all()
        stepper = job.pushing._steppers[None]
        assert eventually(lambda: stepper._round is not None and bool(stepper._round.pushed))
        session.abandon()

    def survivor() -> None:
        p = nn.Parameter(torch.ones(4))
        with Adam([p], server=server.address, job="two", options=ProxyOptions(rank=1, world_size=2)) as remote:
            ready.set()
            (job,) = server.registry.all()
            assert eventually(lambda: job.worker_count == 1)
            remote.step()
            bucket = job.store.buckets[0]
            kept = torch.frombuffer(bytearray(job.store.read("parameter", bucket, [True])[0]), dtype=torch.float32)
            results.extend([p.detach().clone(), kept])

    in_threads(lambda rank: (doomed if rank == 0 else survivor)(), 2)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], torch.ones(4))


def test_two_groups_in_a_row_are_added_by_workers_at_different_paces(server: Server) -> None:
    """One may have added both before the other adds its first."""
    both_added = threading.Event()

    def work(rank: int) -> list[torch.Tensor]:
        p, q, r = (nn.Parameter(torch.full((3,), value)) for value in (1.0, 2.0, 3.0))
        options = ProxyOptions(rank=rank, world_size=2)
        with Adam([p], fused=True, server=server.address, job="grown", options=options) as remote:
            if rank:
                assert both_added.wait(20)
            remote.add_param_group({"params": [q], "lr": 0.5})
            remote.add_param_group({"params": [r], "lr": 0.25})
            both_added.set()
            for parameter in (p, q, r):
                parameter.grad = torch.ones(3)
            remote.step()
            assert [group["lr"] for group in remote.param_groups] == [1e-3, 0.5, 0.25]
        return [p.detach(), q.detach(), r.detach()]

    first, second = in_threads(work, 2)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert torch.allclose(first[1], torch.full((3,), 1.5))


def test_what_is_held_and_what_is_on_its_way_counts_against_the_job_s_limit() -> None:
    """Refused before memory is taken; the optimizer goes on with what it has."""
    p = nn.Parameter(torch.ones(100_000))
    with running_server(max_job_bytes=1_400_000) as small, Adam([p], fused=True, server=small.address) as remote:
        p.grad = torch.ones(100_000)
        remote.step()
        p.grad = torch.ones(100_000)
        with pytest.raises(LimitExceededError, match="gradients that are to be held"):
            remote.accumulate()
        assert p.grad is not None
        with pytest.raises(LimitExceededError, match="what the worker brings"):
            remote.load_state_dict(remote.state_dict())
        remote.push_parameters()
        with pytest.raises(LimitExceededError, match="what the worker brings"):
            remote.step()
        remote.pull_parameters()
        remote.param_groups[0]["amsgrad"] = True
        with pytest.raises(LimitExceededError, match="the state with the worker's options"):
            remote.step()
        remote.param_groups[0]["amsgrad"] = False
        remote.step()
        assert remote.job_step == 2
        assert remote.state[p]["step"] == 2
