"""Asynchronous jobs: each push is a step of its own, and how far ahead of the others a worker may get."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from optimd.client import Adam, Async, JobMismatchError, ProxyOptions, StepReceipt
from optimd.server import Server
from tests.support import eventually, in_threads


def options(rank: int, max_staleness: int | None = None, **more: Any) -> ProxyOptions:
    timeout_s = more.pop("timeout_s", 60.0)
    aggregation = Async(max_staleness=max_staleness, timeout_s=timeout_s)
    return ProxyOptions(rank=rank, worker_id=f"worker-{rank}", aggregation=aggregation, bucket_bytes=1024, **more)


def gradient(rank: int, sequence: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1000 * rank + sequence))


def receipt_of(optimizer: Adam) -> StepReceipt:
    assert optimizer.last_receipt is not None
    return optimizer.last_receipt


@pytest.mark.parametrize("max_staleness", [None, 2])
def test_with_atomic_steps_the_job_is_a_replay_of_its_workers_gradients_in_the_order_of_their_receipts(
    server: Server, max_staleness: int | None
) -> None:
    """Bit for bit. Where buckets are applied as they come, two workers' may be in another order in each bucket."""

    def work(rank: int) -> list[tuple[int, int, int]]:
        p = nn.Parameter(torch.zeros(700))
        done = []
        asked = options(rank, max_staleness, apply="atomic")
        with Adam([p], lr=0.05, server=server.address, job="replayed", options=asked) as optimizer:
            for sequence in range(15):
                p.grad = gradient(rank, sequence, 700)
                optimizer.step()
                receipt = receipt_of(optimizer)
                assert (receipt.outcome, receipt.contributors, receipt.sequence) == ("applied", (rank,), sequence)
                if max_staleness is not None:
                    assert receipt.lag <= max_staleness
                done.append((receipt.step, rank, sequence))
        return done

    named = sorted(entry for done in in_threads(work, 3) for entry in done)
    assert [step for step, _, _ in named] == list(range(1, 46))
    twin = nn.Parameter(torch.zeros(700))
    local = torch.optim.Adam([twin], lr=0.05, fused=True)
    for _, rank, sequence in named:
        twin.grad = gradient(rank, sequence, 700)
        local.step()
    final = nn.Parameter(torch.zeros(700))
    asked = options(0, max_staleness, apply="atomic")
    with Adam([final], lr=0.05, server=server.address, job="replayed", options=asked):
        assert torch.equal(final, twin)


def test_buckets_that_are_applied_as_they_come_are_each_applied_once_for_each_push(server: Server) -> None:
    """Whatever comes between them: all slices of a parameter end at one step, the number of pushes."""

    def work(rank: int) -> int:
        p = nn.Parameter(torch.zeros(5000))
        with Adam([p], lr=0.05, server=server.address, job="streamed", options=options(rank)) as optimizer:
            for sequence in range(20):
                p.grad = gradient(rank, sequence, 5000)
                optimizer.step()
            return optimizer.job_step

    assert max(in_threads(work, 3)) == 60
    job = server.registry.get("streamed")
    assert set(job.store.steps_of(0)) == {60.0}


def test_a_ring_of_workers_that_keep_step_sees_all_others_between_its_pull_and_its_push(server: Server) -> None:
    """With a bound of 0: who pushes first in a round is not stale at all, who pushes last by all the others, W - 1."""
    workers, rounds = 4, 6
    parameters = [nn.Parameter(torch.zeros(700)) for _ in range(workers)]
    ring = [Adam([p], server=server.address, job="ring", options=options(rank, 0)) for rank, p in enumerate(parameters)]
    seen: list[list[int]] = []

    def has_made(steps: int) -> bool:
        return server.registry.get("ring").step == steps

    with ThreadPoolExecutor(workers) as pool:
        for number in range(rounds):
            steps = []
            for rank, (optimizer, p) in enumerate(zip(ring, parameters, strict=True)):
                p.grad = gradient(rank, number, 700)
                steps.append(pool.submit(optimizer.step))
                # The next one pushes when this push is in: a step of its own, whoever waits to be given parameters.
                due = number * workers + rank + 1
                assert eventually(partial(has_made, due))
            for step in steps:
                step.result(timeout=30)
            receipts = [receipt_of(optimizer) for optimizer in ring]
            assert [receipt.lag for receipt in receipts] == [0] * workers
            seen.append([receipt.staleness for receipt in receipts])
    assert seen[1:] == [[0, 1, 2, 3]] * (rounds - 1)
    assert all(torch.equal(parameters[0], other) for other in parameters[1:])
    for optimizer in ring:
        optimizer.close()


def test_a_worker_that_is_too_far_ahead_waits_until_a_slower_one_has_pushed_or_left(server: Server) -> None:
    """With a bound of 1: its second push is in at once, and its step returns when the other's first is."""
    parameters = [nn.Parameter(torch.zeros(10)) for _ in range(2)]
    fast, slow = (
        Adam([p], server=server.address, job="bounded", options=options(rank, 1)) for rank, p in enumerate(parameters)
    )
    job = server.registry.get("bounded")
    returned = threading.Event()

    def hurry() -> None:
        for number in range(3):
            parameters[0].grad = gradient(0, number, 10)
            fast.step()
            assert receipt_of(fast).lag <= 1
        returned.set()

    runner = threading.Thread(target=hurry)
    runner.start()
    assert eventually(lambda: job.step == 2)
    assert not returned.wait(0.3)
    assert job.step == 2
    parameters[1].grad = gradient(1, 0, 10)
    slow.step()
    assert eventually(lambda: job.step == 4)
    assert not returned.wait(0.3)
    slow.close()
    assert returned.wait(20)
    runner.join(20)
    fast.close()


def test_a_silent_worker_is_not_waited_for_any_longer_than_timeout_s(server: Server) -> None:
    """Nor again, until it pushes: then it starts as one of the slowest."""
    parameters = [nn.Parameter(torch.zeros(10)) for _ in range(2)]
    fast, silent = (
        Adam([p], server=server.address, job="silent", options=options(rank, 0, timeout_s=0.5))
        for rank, p in enumerate(parameters)
    )
    for number in range(20):
        parameters[0].grad = gradient(0, number, 10)
        fast.step()
        assert receipt_of(fast).lag == 0
    assert fast.job_step == 20
    parameters[1].grad = gradient(1, 0, 10)
    silent.step()
    assert receipt_of(silent).staleness == 20
    assert receipt_of(silent).lag == 0
    parameters[0].grad = gradient(0, 20, 10)
    fast.step()
    assert receipt_of(fast).lag == 0
    fast.close()
    silent.close()


def test_a_newcomer_starts_at_the_slowest_ones_clock(server: Server) -> None:
    """It neither holds the others up for what they did before it came, nor is it held up."""
    p, q = nn.Parameter(torch.zeros(10)), nn.Parameter(torch.zeros(10))
    with Adam([p], server=server.address, job="late", options=options(0, 1)) as first:
        for number in range(5):
            p.grad = gradient(0, number, 10)
            first.step()
        with Adam([q], server=server.address, job="late", options=options(1, 1)) as second:
            assert (second.job_step, second.next_sequence, second.resumed) == (5, 0, True)
            assert torch.equal(p, q)
            q.grad = gradient(1, 0, 10)
            second.step()
            assert (receipt_of(second).step, receipt_of(second).lag, receipt_of(second).staleness) == (6, 1, 0)


def test_a_worker_is_sent_what_others_changed_and_it_has_no_gradient_for(server: Server) -> None:
    """A pull brings everything that is new to the worker."""
    pairs = [[nn.Parameter(torch.zeros(300)) for _ in range(2)] for _ in range(2)]
    first, second = (
        Adam(pair, server=server.address, job="pulled", options=options(rank)) for rank, pair in enumerate(pairs)
    )
    pairs[0][0].grad = torch.ones(300)
    first.step()
    pairs[1][1].grad = torch.ones(300)
    second.step()
    assert torch.equal(pairs[0][0], pairs[1][0])
    assert pairs[1][0].any()
    assert not pairs[0][1].any()
    pairs[0][0].grad = torch.ones(300)
    first.step()
    assert torch.equal(pairs[0][1], pairs[1][1])
    first.close()
    second.close()


def test_each_push_is_applied_with_its_own_workers_hyperparameters(server: Server) -> None:
    """A newcomer's do not count until it changes them: until then the job's hold, as whoever changed them last set."""
    p, q = nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(4))
    with Adam([p], lr=0.5, server=server.address, job="rates", options=options(0)) as first:
        p.grad = torch.ones(4)
        first.step()
        first.param_groups[0]["lr"] = 0.25
        p.grad = torch.ones(4)
        first.step()
        with Adam([q], lr=7.0, server=server.address, job="rates", options=options(1)) as second:
            assert second.param_groups[0]["lr"] == 0.25
            q.grad = torch.ones(4)
            second.step()
            assert torch.allclose(q, torch.full((4,), -1.0))
            second.param_groups[0]["lr"] = 1.0
            q.grad = torch.ones(4)
            second.step()
            assert torch.allclose(q, torch.full((4,), -2.0))
            p.grad = torch.ones(4)
            first.step()
            assert torch.allclose(p, torch.full((4,), -2.25))


def test_workers_add_groups_and_load_when_they_come_to_it(server: Server) -> None:
    """Who has not added a group yet pushes and is sent what it knows; the last load holds."""
    old = [nn.Parameter(torch.zeros(5)) for _ in range(2)]
    new = [nn.Parameter(torch.zeros(6)) for _ in range(2)]
    first, second = (
        Adam([p], lr=0.1, server=server.address, job="grown", options=options(rank)) for rank, p in enumerate(old)
    )
    first.add_param_group({"params": [new[0]], "lr": 0.5})
    old[0].grad, new[0].grad = torch.ones(5), torch.ones(6)
    first.step()
    old[1].grad = torch.ones(5)
    second.step()
    assert torch.allclose(old[1], torch.full((5,), -0.2))
    second.add_param_group({"params": [new[1]], "lr": 9.0})
    assert second.param_groups[1]["lr"] == 0.5
    assert torch.equal(*new)
    state = first.state_dict()
    old[1].grad = torch.ones(5)
    second.step()
    first.load_state_dict(state, force=True)
    old[1].grad = torch.ones(5)
    second.step()
    assert second.state[old[1]]["step"] == 3
    first.close()
    second.close()


def test_parameters_cannot_be_replaced_under_another_worker(server: Server) -> None:
    """It would push gradients of others: it is told so, and what to do."""
    p, q = nn.Parameter(torch.zeros(5)), nn.Parameter(torch.zeros(5))
    first = Adam([p], server=server.address, job="replaced", options=options(0))
    second = Adam([q], server=server.address, job="replaced", options=options(1))
    first.param_groups[0]["params"][0] = other = nn.Parameter(torch.zeros(7))
    other.grad = torch.ones(7)
    first.step()
    q.grad = torch.ones(5)
    with pytest.raises(JobMismatchError, match="the job's were replaced 1 times"):
        second.step()
    first.close()
    second.close()


def test_a_state_can_be_read_while_workers_never_pause(server: Server) -> None:
    """All of it stands at one step, though there is always a push under way."""
    stop = threading.Event()

    def work(rank: int) -> list[float]:
        p = nn.Parameter(torch.zeros(5000))
        seen = []
        with Adam([p], server=server.address, job="busy", options=options(rank)) as optimizer:
            if rank == 2:
                for _ in range(8):
                    steps = optimizer.state_dict()["state"]
                    seen.append(float(steps[0]["step"]) if steps else 0.0)
                stop.set()
            number = 0
            while not stop.is_set():
                p.grad = gradient(rank, number, 5000)
                optimizer.step()
                number += 1
        return seen

    seen = in_threads(work, 3)[2]
    assert len(seen) == 8
    assert seen == sorted(seen)
    assert seen[-1] > 0


def test_infinite_gradients_are_skipped_or_refused_one_push_at_a_time(server: Server) -> None:
    """The others' steps are none of its business, and numbers of steps have no gap."""
    p, q = nn.Parameter(torch.zeros(300)), nn.Parameter(torch.zeros(300))
    with (
        Adam([p], server=server.address, job="skipping", options=options(0, 0, nonfinite="skip")) as first,
        Adam([q], server=server.address, job="skipping", options=options(1, 0, nonfinite="skip")) as second,
    ):

        def work(rank: int) -> list[tuple[str, int]]:
            optimizer, parameter = ((first, p), (second, q))[rank]
            outcomes = []
            for number in range(4):
                parameter.grad = gradient(rank, number, 300)
                if rank == 0 and number in (1, 2):
                    parameter.grad[7] = float("inf")
                optimizer.step()
                receipt = receipt_of(optimizer)
                outcomes.append((receipt.outcome, receipt.lag))
            return outcomes

        skipping, applying = in_threads(work, 2)
        assert [outcome for outcome, _ in skipping] == [
            "applied",
            "skipped_nonfinite",
            "skipped_nonfinite",
            "applied",
        ]
        assert {outcome for outcome, _ in applying} == {"applied"}
        assert all(lag == 0 for _, lag in skipping + applying)
        assert server.registry.get("skipping").step == 6
