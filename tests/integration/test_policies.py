"""What becomes of pushes under each policy: backups, fixed order, bounded memory, readers that take nothing."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import grpc
import pytest
import torch
from torch import nn

from optimd.client import Adam, JobDeletedError, ProxyOptions, StepReceipt, Sync
from optimd.server import Server
from optimd.server.aggregation import Worker
from optimd.server.job import Job
from optimd.v1 import job_pb2, tensor_pb2
from tests.integration.test_protocol import PlainWorker, begin, gradient
from tests.support import eventually, in_threads, running_server


def options(rank: int, world_size: int, **sync: Any) -> ProxyOptions:
    return ProxyOptions(rank=rank, world_size=world_size, bucket_bytes=1024, aggregation=Sync(**sync))


def random(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def receipt_of(optimizer: Adam) -> StepReceipt:
    assert optimizer.last_receipt is not None
    return optimizer.last_receipt


def test_a_step_is_made_of_the_first_pushes_and_the_backups_are_dropped(server: Server) -> None:
    """Three workers, one backup: whoever is last has the step's parameters, and its gradient in none."""
    parameters = [nn.Parameter(torch.zeros(700)) for _ in range(3)]
    team = [
        Adam([p], lr=0.1, server=server.address, job="backup", options=options(rank, 3, backup_workers=1))
        for rank, p in enumerate(parameters)
    ]

    def step(rank: int, number: int) -> StepReceipt:
        parameters[rank].grad = random(10 * number + rank, 700)
        team[rank].step()
        return receipt_of(team[rank])

    twin = nn.Parameter(torch.zeros(700))
    local = torch.optim.Adam([twin], lr=0.1, fused=True)
    for number in range(6):
        slow = number % 3
        fast = [rank for rank in range(3) if rank != slow]
        with ThreadPoolExecutor(2) as pool:
            receipts = list(pool.map(step, fast, [number] * 2))
        for receipt in receipts:
            assert (receipt.outcome, receipt.step, receipt.contributors) == ("merged", number + 1, tuple(fast))
        late = step(slow, number)
        assert (late.outcome, late.step, late.contributors, late.staleness) == ("dropped_late", number + 1, (), 1)
        twin.grad = (random(10 * number + fast[0], 700) + random(10 * number + fast[1], 700)) / 2
        local.step()
        assert all(torch.equal(p, twin) for p in parameters)
    for optimizer in team:
        optimizer.close()


def test_workers_that_race_with_backups_each_hear_of_every_push(server: Server) -> None:
    """Applied or dropped, never nothing; no step has more than its share; the weights are those of the receipts."""

    def work(rank: int) -> tuple[list[StepReceipt], torch.Tensor]:
        p = nn.Parameter(torch.zeros(3000))
        receipts = []
        asked = options(rank, 4, backup_workers=2)
        with Adam([p], lr=0.05, server=server.address, job="race", options=asked) as optimizer:
            for number in range(25):
                p.grad = random(100 * rank + number, 3000)
                optimizer.step()
                receipts.append(receipt_of(optimizer))
            optimizer.pull_parameters()
        return receipts, p.detach()

    results = in_threads(work, 4)
    pushes: dict[int, dict[int, int]] = {}
    for rank, (receipts, _) in enumerate(results):
        assert [receipt.sequence for receipt in receipts] == list(range(25))
        for receipt in receipts:
            assert receipt.outcome in ("applied", "merged", "dropped_late")
            if receipt.outcome != "dropped_late":
                assert receipt.sequence is not None
                pushes.setdefault(receipt.step, {})[rank] = receipt.sequence
                assert rank in receipt.contributors
    assert all(1 <= len(step) <= 2 for step in pushes.values())
    twin = nn.Parameter(torch.zeros(3000))
    local = torch.optim.Adam([twin], lr=0.05, fused=True)
    for step in sorted(pushes):
        parts = [random(100 * rank + pushes[step][rank], 3000) for rank in sorted(pushes[step])]
        twin.grad = sum(parts[1:], parts[0]) / len(parts)
        local.step()
    final = nn.Parameter(torch.zeros(3000))
    asked = options(3, 4, backup_workers=2)
    with Adam([final], lr=0.05, server=server.address, job="race", options=asked):
        assert torch.equal(final, twin)


@pytest.mark.parametrize("apply", ["atomic", "streaming"])
def test_a_deterministic_job_comes_to_the_same_bits_in_whatever_order_gradients_arrive(
    server: Server, apply: Any
) -> None:
    """Sums of three floats depend on their order: the runs would differ without it, as the control shows."""

    def has_arrived(job: Job, worker: Worker, step: int) -> bool:
        return job._aggregator.has_ended(worker) or job.step > step

    def run(job: str, order: list[int], *, deterministic: bool) -> torch.Tensor:
        parameters = [nn.Parameter(torch.zeros(3000)) for _ in range(3)]
        team = [
            Adam(
                [p],
                lr=0.1,
                server=server.address,
                job=job,
                options=ProxyOptions(
                    rank=rank, world_size=3, apply=apply, aggregation=Sync(deterministic=deterministic)
                ),
            )
            for rank, p in enumerate(parameters)
        ]
        held = server.registry.get(job)
        for number in range(3):
            threads = []
            for rank in order:
                parameters[rank].grad = random(10 * number + rank, 3000) * 10.0 ** (rank - 1)
                threads.append(threading.Thread(target=team[rank].step))
                threads[-1].start()
                worker = next(worker for worker in held._aggregator.live if worker.rank == rank)
                assert eventually(partial(has_arrived, held, worker, number))
            for thread in threads:
                thread.join(30)
        for optimizer in team:
            optimizer.close()
        return parameters[0].detach()

    fixed = [run(f"fixed-{n}", order, deterministic=True) for n, order in enumerate(([0, 1, 2], [2, 1, 0], [1, 2, 0]))]
    assert all(torch.equal(fixed[0], other) for other in fixed)
    free = [run(f"free-{n}", order, deterministic=False) for n, order in enumerate(([0, 1, 2], [2, 1, 0]))]
    assert not torch.equal(free[0], free[1])
    assert torch.allclose(free[0], free[1], atol=1e-5)


def accumulators(server: Server, job: str) -> int:
    """How many gradients of the job's size the server holds memory for."""
    held = server.registry.get(job)
    total = 0
    for stepper in held.pushing._steppers.values():
        found = list(stepper._accumulators.values())
        for separate in stepper._separate.values():
            found += [*separate._held.values(), *separate._spare]
        total += sum(accumulator.nbytes for accumulator in found)
    return round(total / held.store.value_bytes)


@pytest.mark.parametrize(
    ("sync", "most"),
    [({}, 1), ({"deterministic": True}, 6), ({"backup_workers": 1}, 6)],
    ids=["sum", "order", "backup"],
)
def test_a_synchronous_job_takes_memory_for_one_gradient_however_many_workers_there_are(
    server: Server, sync: dict[str, Any], most: int
) -> None:
    """One for each worker only where their order matters, or some may be dropped."""

    def work(rank: int) -> None:
        p = nn.Parameter(torch.zeros(20_000))
        with Adam([p], server=server.address, job="memory", options=options(rank, 6, **sync)) as optimizer:
            for number in range(4):
                p.grad = random(10 * number + rank, 20_000)
                optimizer.step()

    in_threads(work, 6)
    assert accumulators(server, "memory") == 1 if most == 1 else 1 < accumulators(server, "memory") <= most


def test_one_that_takes_nothing_of_what_it_is_sent_is_left_out_when_its_lease_has_ended(quick_server: Server) -> None:
    """Though it says that it is alive. The others go on, and the server does not grow by what it does not take."""
    server = quick_server
    element_count, world = 2_000_000, {"world_size": 2, "timeout_s": 60, "join_timeout_s": 20}
    p = nn.Parameter(torch.zeros(element_count))
    asked = ProxyOptions(rank=1, world_size=2, aggregation=Sync(timeout_s=60, join_timeout_s=20))

    class Lazy(PlainWorker):
        def layout(self, **changes: Any) -> Any:
            spec = tensor_pb2.ParameterSpec(dtype=tensor_pb2.DTYPE_FLOAT32, shape=[element_count])
            return super().layout(parameters=[spec], **changes)

    with Adam([p], lr=0.1, server=server.address, job="plain", options=asked) as optimizer, Lazy(server) as lazy:
        opening = lazy.open_job(bucket_bytes=0)
        opening.open.aggregation.CopyFrom(
            job_pb2.Aggregation(sync=job_pb2.SyncAggregation(reduction=job_pb2.REDUCTION_MEAN, **world))
        )
        lazy.send(opening, lazy.layout())
        # It opens the job, and reads nothing of its parameters: it is in, and everybody waits until it has them.
        job = server.registry.get("plain")
        assert eventually(lambda: job.worker_count == 2)
        beating = threading.Event()

        def beat() -> None:
            while not beating.wait(0.1):
                job.hear("plain-0", lazy.incarnation)

        heart = threading.Thread(target=beat)
        heart.start()
        try:
            p.grad = torch.ones(element_count)
            optimizer.step()
        finally:
            beating.set()
            heart.join(10)
        assert receipt_of(optimizer).contributors == (1,)
        assert job.worker_count == 1


def test_jobs_do_not_disturb_each_other(quick_server: Server) -> None:
    """One trains to torch's bits while another waits for a worker that never comes, and a third one's breaks off."""
    server = quick_server
    waiting = Adam(
        [nn.Parameter(torch.zeros(4))], server=server.address, job="waiting", options=options(0, 2, join_timeout_s=60)
    )
    waiting.param_groups[0]["params"][0].grad = torch.ones(4)

    def wait() -> None:
        with pytest.raises(JobDeletedError):
            waiting.step()

    blocked = threading.Thread(target=wait)
    blocked.start()
    with PlainWorker(server) as rude:
        rude.opened()
        rude.send(begin(), gradient(0, 256), gradient(0, 256))
        p, twin = nn.Parameter(torch.zeros(5000)), nn.Parameter(torch.zeros(5000))
        local = torch.optim.Adam([twin], lr=0.1, fused=True)
        with Adam([p], lr=0.1, fused=True, server=server.address, job="good") as optimizer:
            for number in range(30):
                p.grad = random(number, 5000)
                twin.grad = p.grad.clone()
                optimizer.step()
                local.step()
        assert torch.equal(p, twin)
        rude.fails_with("INVALID_FIELD", "came a second time")
    assert blocked.is_alive()
    server.registry.delete("waiting", force=True)
    blocked.join(20)
    assert not blocked.is_alive()
    waiting.close()


def test_a_worker_that_computes_for_many_leases_keeps_its_place_and_its_line() -> None:
    """Heartbeats come at their pace whatever the worker does: here as fast as a short lease has them come."""
    with running_server(lease_s=0.5) as strict:
        p = nn.Parameter(torch.zeros(4))
        with Adam([p], server=strict.address, job="slow", options=options(0, 1)) as optimizer:
            for _ in range(2):
                p.grad = torch.ones(4)
                optimizer.step()
                # Six leases without a message of its own: some thirty heartbeats.
                time.sleep(3)
                assert strict.registry.get("slow").worker_count == 1
            assert not receipt_of(optimizer).resumed
            with grpc.insecure_channel(strict.address) as channel:
                grpc.channel_ready_future(channel).result(timeout=10)
