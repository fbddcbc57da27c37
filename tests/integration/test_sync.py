"""Several workers, synchronous: one step is one contribution of each."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import nn

from optimd.client import (
    Adam,
    JobMismatchError,
    LoadNeedsForceError,
    ProxyOptions,
    StepReceipt,
    StepTimeoutError,
    Sync,
)
from optimd.server import Server
from tests.support import in_threads


def gradient(rank: int, step: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1000 * rank + step))


def options(rank: int, world_size: int, **more: Any) -> ProxyOptions:
    return ProxyOptions(rank=rank, world_size=world_size, bucket_bytes=1024, **more)


@pytest.mark.parametrize("apply", ["auto", "streaming"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_two_workers_equal_one_torch_adam_on_the_reduced_gradient(server: Server, reduction: Any, apply: Any) -> None:
    """Bit for bit: the sum of two floats does not depend on their order, and halving is exact."""
    start = torch.randn(33, 40)

    def work(rank: int) -> torch.Tensor:
        p = nn.Parameter(start.clone())
        asked = options(rank, 2, apply=apply, aggregation=Sync(reduction=reduction))
        with Adam([p], lr=0.01, server=server.address, job="two", options=asked) as optimizer:
            for step in range(20):
                p.grad = gradient(rank, step, 33, 40)
                optimizer.step()
                receipt = optimizer.last_receipt
                assert receipt is not None
                assert (receipt.step, receipt.contributors, receipt.partial_contributors) == (step + 1, (0, 1), ())
        return p.detach()

    results = in_threads(work, 2)
    twin = nn.Parameter(start.clone())
    local = torch.optim.Adam([twin], lr=0.01, fused=True)
    for step in range(20):
        total = gradient(0, step, 33, 40) + gradient(1, step, 33, 40)
        twin.grad = total / 2 if reduction == "mean" else total
        local.step()
    assert all(torch.equal(result, twin) for result in results)


def test_a_missing_gradient_counts_as_zero_if_another_worker_has_one(server: Server) -> None:
    """And a parameter that nobody has a gradient for is skipped."""

    def work(rank: int) -> list[torch.Tensor]:
        params = [nn.Parameter(torch.ones(300)) for _ in range(3)]
        with Adam(params, lr=0.1, server=server.address, job="missing", options=options(rank, 2)) as optimizer:
            for step in range(4):
                params[0].grad = gradient(rank, step, 300)
                params[1].grad = gradient(rank, step, 300) if rank == 1 else None
                params[2].grad = None
                optimizer.step()
            assert 2 not in optimizer.state_dict()["state"]
        return [p.detach() for p in params]

    results = in_threads(work, 2)
    twins = [nn.Parameter(torch.ones(300)) for _ in range(3)]
    local = torch.optim.Adam(twins, lr=0.1, fused=True)
    for step in range(4):
        twins[0].grad = (gradient(0, step, 300) + gradient(1, step, 300)) / 2
        twins[1].grad = gradient(1, step, 300) / 2
        local.step()
    for result in results:
        assert all(torch.equal(mine, twin) for mine, twin in zip(result, twins, strict=True))


def test_the_lowest_ranks_hyperparameters_hold_and_disagreement_is_warned_of_once(server: Server) -> None:
    """Rank 1 sets another learning rate; both learn of it in the receipt."""
    warned: list[int] = []

    def work(rank: int) -> torch.Tensor:
        p = nn.Parameter(torch.zeros(10))
        with Adam([p], lr=0.1, server=server.address, job="rates", options=options(rank, 2)) as optimizer:
            if rank == 1:
                optimizer.param_groups[0]["lr"] = 77.0
            else:
                optimizer.param_groups[0]["lr"] = 0.5
            for _ in range(2):
                p.grad = torch.ones(10)
                optimizer.step()
                assert optimizer.last_receipt is not None
                warned.append(optimizer.last_receipt.hyperparameters_disagreed)
        return p.detach()

    with pytest.warns(UserWarning, match="param_groups differ"):
        results = in_threads(work, 2)
    assert warned == [True] * 4
    assert torch.allclose(results[0], torch.full((10,), -1.0))


def test_a_newcomer_does_not_reset_the_learning_rate_that_the_job_runs_with(server: Server) -> None:
    """Rank 0 leaves and comes back with its constructor's lr; rank 1 has moved on with its schedule."""
    barrier = threading.Barrier(2)

    def work(rank: int) -> float:
        p = nn.Parameter(torch.zeros(4))
        optimizer = Adam([p], lr=1.0, server=server.address, job="newcomer", options=options(rank, 2))
        optimizer.param_groups[0]["lr"] = 0.25
        p.grad = torch.ones(4)
        optimizer.step()
        if rank == 0:
            optimizer.close()
            optimizer = Adam([p], lr=1.0, server=server.address, job="newcomer", options=options(rank, 2))
            assert optimizer.resumed
            assert optimizer.param_groups[0]["lr"] == 0.25
        barrier.wait(30)
        if rank == 1:
            optimizer.param_groups[0]["lr"] = 0.125
        p.grad = torch.ones(4)
        before = p.detach().clone()
        optimizer.step()
        optimizer.close()
        return float((before - p.detach())[0])

    assert all(abs(moved - 0.125) < 1e-3 for moved in in_threads(work, 2))


def test_nobody_steps_before_the_world_has_formed(server: Server) -> None:
    """The first step waits for the second worker, and is one step of both."""
    first_is_in = threading.Event()

    def work(rank: int) -> int:
        if rank == 1:
            first_is_in.wait(30)
        p = nn.Parameter(torch.zeros(4))
        with Adam([p], server=server.address, job="forming", options=options(rank, 2)) as optimizer:
            first_is_in.set()
            p.grad = torch.ones(4)
            optimizer.step()
            assert optimizer.last_receipt is not None
            return len(optimizer.last_receipt.contributors)

    assert in_threads(work, 2) == [2, 2]


def test_waiting_for_workers_that_never_join_ends_with_the_remedy(server: Server) -> None:
    """After join_timeout_s."""
    p = nn.Parameter(torch.zeros(4))
    asked = options(0, 2, aggregation=Sync(join_timeout_s=0.3))
    optimizer = Adam([p], server=server.address, job="lonely", options=asked)
    p.grad = torch.ones(4)
    with pytest.raises(StepTimeoutError, match="1 of 2 workers have joined"):
        optimizer.step()
    optimizer.close()


def test_a_step_is_made_without_a_worker_that_is_silent_for_timeout_s(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    """Rank 1 is there but does not step. When it does, its gradient is too late, and then it is awaited again."""
    asked = {"aggregation": Sync(timeout_s=0.5)}
    parameters = [nn.Parameter(torch.zeros(4)) for _ in range(2)]
    first, second = (
        Adam([parameter], server=server.address, job="silent", options=options(rank, 2, **asked))
        for rank, parameter in enumerate(parameters)
    )

    def step(optimizer: Adam, parameter: nn.Parameter) -> StepReceipt:
        parameter.grad = torch.ones(4)
        optimizer.step()
        assert optimizer.last_receipt is not None
        return optimizer.last_receipt

    receipt = step(first, parameters[0])
    assert (receipt.outcome, receipt.step, receipt.contributors) == ("applied", 1, (0,))
    assert "rank 1 did not come in time" in caplog.text
    receipt = step(first, parameters[0])
    assert receipt.step == 2
    late = step(second, parameters[1])
    assert (late.outcome, late.step, late.contributors, late.staleness) == ("dropped_late", 2, (), 2)
    assert torch.equal(*parameters)
    results = in_threads(lambda rank: step((first, second)[rank], parameters[rank]), 2)
    assert {(receipt.outcome, receipt.step, receipt.contributors) for receipt in results} == {("merged", 3, (0, 1))}
    assert torch.equal(*parameters)
    first.close()
    second.close()


def test_where_lost_workers_are_awaited_a_silent_one_fails_the_step_which_can_be_made_again(server: Server) -> None:
    """Nothing was applied, and the same push is due."""
    asked = {"aggregation": Sync(timeout_s=0.5, on_loss="wait")}
    parameters = [nn.Parameter(torch.zeros(4)) for _ in range(2)]
    optimizers = [
        Adam([parameter], server=server.address, job="patient", options=options(rank, 2, **asked))
        for rank, parameter in enumerate(parameters)
    ]
    for parameter in parameters:
        parameter.grad = torch.ones(4)
    with pytest.raises(StepTimeoutError, match=r"rank 1 did not come in time"):
        optimizers[0].step()
    assert (optimizers[0].job_step, optimizers[0].next_sequence) == (0, 0)
    in_threads(lambda rank: optimizers[rank].step(), 2)
    assert optimizers[0].last_receipt is not None
    assert optimizers[0].last_receipt.contributors == (0, 1)
    assert torch.equal(*parameters)
    for optimizer in optimizers:
        optimizer.close()


def test_a_worker_that_leaves_lowers_the_count_at_once(server: Server) -> None:
    """The other one goes on alone, with a mean over one."""

    def work(rank: int) -> list[int]:
        p = nn.Parameter(torch.zeros(4))
        counts = []
        with Adam([p], server=server.address, job="leaving", options=options(rank, 2)) as optimizer:
            for _ in range(3 if rank == 0 else 1):
                p.grad = torch.ones(4)
                optimizer.step()
                assert optimizer.last_receipt is not None
                counts.append(len(optimizer.last_receipt.contributors))
        return counts

    assert in_threads(work, 2)[0] == [2, 1, 1]


def test_a_newcomer_gets_one_consistent_copy_and_counts_from_the_next_step(server: Server) -> None:
    """The third worker of three comes back when the others have gone on."""
    rejoined = threading.Event()
    left = threading.Event()

    def work(rank: int) -> torch.Tensor:
        p = nn.Parameter(torch.zeros(500))
        optimizer = Adam([p], lr=0.1, server=server.address, job="again", options=options(rank, 3))
        for step in range(8):
            if step == 2 and rank == 2:
                optimizer.close()
                left.set()
                p = nn.Parameter(torch.full((500,), 9.0))
                optimizer = Adam([p], lr=0.1, server=server.address, job="again", options=options(rank, 3))
                rejoined.set()
                break
            if step == 6:
                rejoined.wait(30)
            p.grad = gradient(rank, step, 500)
            optimizer.step()
        if rank == 2:
            while optimizer.job_step < 8:
                p.grad = gradient(rank, optimizer.job_step, 500)
                optimizer.step()
        result = p.detach().clone()
        optimizer.close()
        return result

    results = in_threads(work, 3)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_adding_a_group_is_collective_between_two_steps(server: Server) -> None:
    """Both bring it; the second gets the first one's values. One that forgets it is told."""

    def work(rank: int) -> torch.Tensor:
        p, q = nn.Parameter(torch.zeros(4)), nn.Parameter(torch.full((400,), float(rank)))
        with Adam([p], server=server.address, job="growing", options=options(rank, 2)) as optimizer:
            p.grad = torch.ones(4)
            optimizer.step()
            optimizer.add_param_group({"params": [q], "lr": 0.5})
            q.grad = torch.ones(400)
            optimizer.step()
            return q.detach()

    results = in_threads(work, 2)
    assert torch.equal(results[0], results[1])

    def forget(rank: int) -> str:
        p, q = nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(4))
        with Adam([p], server=server.address, job="forgetting", options=options(rank, 2)) as optimizer:
            p.grad = torch.ones(4)
            optimizer.step()
            if rank == 0:
                optimizer.add_param_group({"params": [q]})
            added.wait(30)
            if rank == 1:
                with pytest.raises(JobMismatchError, match="rank 1 has 1 param groups, the job has 2"):
                    optimizer.step()
        return "ok"

    added = threading.Barrier(2)
    assert in_threads(forget, 2) == ["ok", "ok"]


def test_loading_is_collective_and_needs_force_over_others_progress(server: Server) -> None:
    """Equal content is loaded once; other content is refused; the stream survives both refusals."""
    source = nn.Parameter(torch.zeros(300))
    local = torch.optim.Adam([source], lr=0.3)
    source.grad = torch.ones(300)
    local.step()
    saved = local.state_dict()
    barrier = threading.Barrier(2)

    def work(rank: int) -> torch.Tensor:
        p = nn.Parameter(torch.zeros(300))
        with Adam([p], server=server.address, job="loading", options=options(rank, 2)) as optimizer:
            p.grad = torch.ones(300)
            optimizer.step()
            with pytest.raises(LoadNeedsForceError, match="force=True"):
                optimizer.load_state_dict(saved)
            barrier.wait(30)
            optimizer.load_state_dict(saved, force=True)
            assert optimizer.param_groups[0]["lr"] == 0.3
            barrier.wait(30)
            if rank == 1:
                other = {**saved, "param_groups": [{**saved["param_groups"][0], "lr": 0.7}]}
                # The job has had one load; a second, unequal one with the same number is refused.
                optimizer._session._line.load_count -= 1
                with pytest.raises(JobMismatchError, match="another state_dict"):
                    optimizer.load_state_dict(other, force=True)
                optimizer._session._line.load_count += 1
                assert optimizer.param_groups[0]["lr"] == 0.3
            p.grad = torch.ones(300)
            optimizer.step()
            assert optimizer.state[p]["step"] == 2
        return p.detach()

    results = in_threads(work, 2)
    assert torch.equal(results[0], results[1])


def test_reading_state_between_steps_does_not_wait_for_the_others_open_step(server: Server) -> None:
    """Rank 1 is already in the next step when rank 0 saves a checkpoint: no deadlock."""

    def work(rank: int) -> float:
        p = nn.Parameter(torch.zeros(300))
        with Adam([p], server=server.address, job="reading", options=options(rank, 2)) as optimizer:
            saved = 0.0
            for _ in range(10):
                p.grad = torch.ones(300)
                optimizer.step()
                if rank == 0:
                    saved = float(optimizer.state_dict()["state"][0]["step"])
            return saved

    assert in_threads(work, 2)[0] == 10


@pytest.mark.parametrize("what", ["load", "grow"])
def test_what_every_worker_does_first_works_whoever_comes_first(server: Server, what: str) -> None:
    """A resume from a checkpoint: rank 1 opens when rank 0 has long been ready to load, or to add a group."""
    source = nn.Parameter(torch.zeros(30))
    local = torch.optim.Adam([source], lr=0.3, fused=True)
    source.grad = torch.ones(30)
    local.step()
    saved = local.state_dict()
    first_is_in = threading.Event()

    def work(rank: int) -> list[torch.Tensor]:
        if rank == 1:
            first_is_in.wait(30)
        p, q = nn.Parameter(torch.zeros(30)), nn.Parameter(torch.full((30,), float(rank)))
        with Adam([p], lr=0.1, server=server.address, job="first", options=options(rank, 2)) as optimizer:
            first_is_in.set()
            if what == "load":
                optimizer.load_state_dict(saved)
            else:
                optimizer.add_param_group({"params": [q], "lr": 0.5})
            for _ in range(3):
                p.grad, q.grad = torch.ones(30), torch.ones(30)
                optimizer.step()
            assert optimizer.job_step == 3
            assert optimizer.state[p]["step"] == (4 if what == "load" else 3)
        return [p.detach(), q.detach()]

    results = in_threads(work, 2)
    assert torch.equal(results[0][0], results[1][0])
    if what == "grow":
        assert torch.equal(results[0][1], results[1][1])


def test_hyperparameters_that_cannot_be_stepped_with_raise_torchs_error_and_nothing_is_lost(server: Server) -> None:
    """Corrected, they work: the same stream, the same private job, the same state."""
    p, twin = nn.Parameter(torch.zeros(300)), nn.Parameter(torch.zeros(300))
    local = torch.optim.Adam([twin], fused=True)
    with Adam([p], server=server.address, options=ProxyOptions(bucket_bytes=1024)) as optimizer:
        for step in range(4):
            p.grad = twin.grad = torch.ones(300)
            if step == 2:
                optimizer.param_groups[0]["capturable"] = True
                for _ in range(2):
                    with pytest.raises(AssertionError, match="If capturable=True, params and state_steps must be on"):
                        optimizer.step()
                optimizer.param_groups[0]["capturable"] = False
            optimizer.step()
            local.step()
        assert optimizer.job_step == 4
        assert torch.equal(p, twin)


def test_a_joining_worker_s_tensors_are_filled_in_place_and_send_nothing_by_themselves(server: Server) -> None:
    """Narrower than the job's numbers, they are not taken for changes of them."""
    lr, betas = torch.tensor(0.5), (torch.tensor(0.5), torch.tensor(0.5))
    p, q = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    with Adam([p], lr=0.1, server=server.address, job="joined") as first:
        p.grad = torch.ones(3)
        first.step()
    with Adam([q], lr=lr, betas=betas, server=server.address, job="joined") as second:
        assert second.param_groups[0]["lr"] is lr
        assert lr.item() == torch.tensor(0.1).item()
        q.grad = torch.ones(3)
        second.step()
        (job,) = server.registry.all()
        assert job.groups[0]["lr"] == 0.1
