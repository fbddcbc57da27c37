"""A server dies with several workers in a job: nobody's push is lost or counted twice, and places are kept."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from optimd.client import Adam, Async, ProxyOptions, StepReceipt, Sync
from optimd.server.aggregation import SyncAggregator
from optimd.server.job import Job
from tests.keptjobs import contents, gradients, parameters, recovered
from tests.lives import Lives
from tests.support import assert_alike, eventually, in_threads

STEPS = 12


def opened(lives: Lives, rank: int, aggregation: Sync | Async, **options: Any) -> tuple[Adam, list[nn.Parameter]]:
    params = parameters()
    connection = ProxyOptions(
        rank=rank,
        worker_id=f"worker-{rank}",
        aggregation=aggregation,
        world_size=None if isinstance(aggregation, Async) else aggregation.world_size,
        bucket_bytes=1024,
        **options,
    )
    return Adam(params, lr=0.1, fused=True, server=lives.address, job="job", options=connection), params


def give(params: Sequence[nn.Parameter], rank: int, sequence: int) -> None:
    for param, grad in zip(params, gradients(1000 * rank + sequence, params), strict=True):
        param.grad = grad


def haunt(
    lives: Lives, progress: Callable[[], int], dues: Sequence[int], work: Callable[[int], object], count: int
) -> None:
    """Runs `work` for some ranks, and lets the server die each time that a number of steps has been made."""

    def is_due(due: int) -> bool:
        return progress() >= due or any(worker.done() for worker in workers)

    with ThreadPoolExecutor(count) as pool:
        workers = [pool.submit(work, rank) for rank in range(count)]
        for due in dues:
            assert eventually(partial(is_due, due), 60)
            lives.die_and_resume()
        for worker in workers:
            worker.result(60)


def pushes_of(job: Job) -> list[tuple[int, int]]:
    """Whose pushes the steps of a job are made of: ranks and sequence numbers."""
    return [(part.rank, part.sequence) for step in job.history.last() for part in step.contributors]


def replayed(job: Job) -> list[torch.Tensor]:
    """What torch comes to with the pushes that a job says its steps are made of."""
    local = parameters()
    theirs = torch.optim.Adam(local, lr=0.1, fused=True)
    for step in job.history.last():
        parts = [gradients(1000 * part.rank + part.sequence, local) for part in step.contributors]
        for param, *grads in zip(local, *parts, strict=True):
            total = grads[0].clone()
            for grad in grads[1:]:
                total += grad
            param.grad = total / len(grads)
        theirs.step()
    return [param.detach().clone() for param in local]


def test_asynchronous_pushes_are_applied_once_each_whenever_the_server_dies(tmp_path: Path) -> None:
    """What the next server has is to the bit what the one before it had, however the pushes were interleaved."""
    made = [0, 0]

    with Lives(tmp_path, fsync="never", journal_segment_bytes=20_000) as lives:

        def work(rank: int) -> None:
            optimizer, params = opened(lives, rank, Async())
            for sequence in range(STEPS):
                give(params, rank, sequence)
                optimizer.step()
                assert optimizer.last_receipt is not None
                assert optimizer.last_receipt.sequence == sequence
                made[rank] = sequence + 1
            # Both stay until the end: their numbers are compared.
            assert eventually(lambda: made == [STEPS, STEPS])
            optimizer.close()

        haunt(lives, lambda: sum(made), (3, 9, 15), work, 2)
        job = lives.server.registry.get("job")
        assert job.step == 2 * STEPS
        assert sorted(pushes_of(job)) == [(rank, sequence) for rank in range(2) for sequence in range(STEPS)]
        assert {step for index in range(4) for step in job.store.steps_of(index)} == {2.0 * STEPS}
        before = contents(job)
        lives.die()
        with recovered(lives.data_dir, fsync="never") as jobs:
            assert_alike(contents(jobs["job"]), before)
            assert pushes_of(jobs["job"]) == pushes_of(job)


@pytest.mark.parametrize(
    ("aggregation", "options"),
    [
        (Sync(world_size=3, deterministic=True), {}),
        (Sync(world_size=3, backup_workers=1), {}),
        (Sync(world_size=3, backup_workers=1), {"max_grad_norm": 1e6}),
        (Sync(world_size=3, deterministic=True, on_loss="wait"), {}),
    ],
    ids=["all", "backup", "backup-examined", "wait"],
)
def test_synchronous_steps_are_made_of_what_they_say_whenever_the_server_dies(
    tmp_path: Path, aggregation: Sync, options: dict[str, Any]
) -> None:
    """To the bit, a push that came too late not among it; and each is answered once."""
    receipts: dict[int, list[StepReceipt]] = {rank: [] for rank in range(3)}
    with Lives(tmp_path, fsync="never", journal_segment_bytes=20_000) as lives:

        def work(rank: int) -> None:
            optimizer, params = opened(lives, rank, aggregation, **options)
            for sequence in range(STEPS):
                give(params, rank, sequence)
                optimizer.step()
                assert optimizer.last_receipt is not None
                receipts[rank].append(optimizer.last_receipt)
            # Those of whose pushes some came too late go on without it.
            optimizer.close()

        haunt(lives, lambda: min(map(len, receipts.values())), (2, 5, 8), work, 3)
        job = lives.server.registry.get("job")
        assert len(set(pushes_of(job))) == len(pushes_of(job))
        for rank, told in receipts.items():
            assert [receipt.sequence for receipt in told] == [*range(STEPS)]
            applied = {receipt.sequence for receipt in told if receipt.outcome != "dropped_late"}
            assert applied == {sequence for worker, sequence in pushes_of(job) if worker == rank}
        if not aggregation.backup_workers:
            assert job.step == STEPS
        assert_alike([value for value, *_ in contents(job)], replayed(job))


def test_a_place_that_is_kept_for_a_lost_worker_is_kept_in_the_next_life(tmp_path: Path) -> None:
    """The step waits for it, is made when it is back, and of both."""
    aggregation = Sync(world_size=2, deterministic=True, on_loss="wait")
    with Lives(tmp_path, lease_s=0.5) as lives:
        (first, params), (second, others) = in_threads(lambda rank: opened(lives, rank, aggregation), 2)
        give(params, 0, 0)
        give(others, 1, 0)
        in_threads(lambda rank: (first, second)[rank].step(), 2)
        # As a script that ends with an error.
        second._leave(failed=True)
        aggregator = lives.server.registry.get("job").parts.aggregator
        assert isinstance(aggregator, SyncAggregator)
        assert eventually(lambda: len(aggregator.absent) == 1)
        for snapshot in (False, True):
            if snapshot:
                lives.server.registry.snapshot("job")
            lives.die_and_resume()
            aggregator = lives.server.registry.get("job").parts.aggregator
            assert isinstance(aggregator, SyncAggregator)
            assert [worker.worker_id for worker in aggregator.absent] == ["worker-1"]
        give(params, 0, 1)
        stepping = threading.Thread(target=first.step)
        stepping.start()
        assert eventually(lambda: aggregator.is_open)
        again, others = opened(lives, 1, aggregation)
        assert (again.next_sequence, again.resumed) == (1, True)
        give(others, 1, 1)
        again.step()
        stepping.join(20)
        assert not stepping.is_alive()
        assert again.last_receipt is not None
        assert again.last_receipt.contributors == (0, 1)
        assert_alike([param.detach().clone() for param in params], replayed(lives.server.registry.get("job")))
        first.close()
        again.close()


def test_server_step_hooks_are_told_of_each_step_once_whenever_the_server_dies(tmp_path: Path) -> None:
    """Of those of other workers too, in order, with what their receipts say."""
    heard: dict[int, list[tuple[int, tuple[int, ...], int | None]]] = {0: [], 1: []}
    told: dict[int, list[tuple[int, tuple[int, ...], int | None]]] = {0: [], 1: []}
    with Lives(tmp_path, fsync="never") as lives:

        def work(rank: int) -> None:
            optimizer, params = opened(lives, rank, Sync(world_size=2, deterministic=True))
            optimizer.register_server_step_hook(
                lambda _, receipt: heard[rank].append((receipt.step, receipt.contributors, receipt.sequence))
            )
            for sequence in range(STEPS):
                give(params, rank, sequence)
                optimizer.step()
                receipt = optimizer.last_receipt
                assert receipt is not None
                told[rank].append((receipt.step, receipt.contributors, receipt.sequence))
            optimizer.close()

        haunt(lives, lambda: min(map(len, told.values())), (1, 4, 5, 9), work, 2)
    assert told[0] == [(step + 1, (0, 1), step) for step in range(STEPS)]
    assert heard == told
