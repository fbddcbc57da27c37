"""Steps whose gradient is not finite: applied as torch would, skipped, or refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from optimd.client import (
    AccumulationLostError,
    Adam,
    ConfigurationError,
    JobMismatchError,
    NonFiniteGradientError,
    ProxyOptions,
    StepReceipt,
)
from optimd.server import Server
from tests.support import assert_equal_states, in_threads

BAD = (torch.inf, -torch.inf, torch.nan)


def options(nonfinite: str, **more: Any) -> ProxyOptions:
    return ProxyOptions(nonfinite=nonfinite, bucket_bytes=1024, **more)


def receipt_of(optimizer: Adam) -> StepReceipt:
    assert optimizer.last_receipt is not None
    return optimizer.last_receipt


def gradient(rank: int, step: int, *, bad: float | None = None) -> torch.Tensor:
    """500 elements; the last but one in the last of several buckets may be bad."""
    grad = torch.randn(500, generator=torch.Generator().manual_seed(1000 * rank + step))
    if bad is not None:
        grad[-2] = bad
    return grad


def state_of(optimizer: Adam, index: int) -> dict[str, Any]:
    return optimizer.state_dict()["state"][index]


def assert_same_state(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one.keys() == other.keys()
    for key, value in one.items():
        assert torch.equal(value, other[key]), key


@pytest.mark.parametrize("bad", BAD)
def test_by_default_a_step_is_applied_as_torch_applies_it(server: Server, bad: float) -> None:
    """NaNs and all."""
    ours, theirs = (nn.Parameter(torch.ones(500)) for _ in range(2))
    with Adam([ours], fused=True, server=server.address, options=options("allow")) as remote:
        local = torch.optim.Adam([theirs], fused=True)
        for step in range(3):
            ours.grad, theirs.grad = gradient(0, step, bad=bad), gradient(0, step, bad=bad)
            remote.step()
            local.step()
        assert remote.job_step == 3
        assert ours.isnan().sum() == 1
        assert torch.equal(ours.nan_to_num(), theirs.nan_to_num())


@pytest.mark.parametrize("kernel", [{"fused": True}, {"foreach": True}], ids=["fused", "foreach"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.complex64])
@pytest.mark.parametrize("bad", BAD)
def test_a_skipped_step_changes_nothing_and_the_next_goes_on(
    server: Server, bad: float, dtype: torch.dtype, kernel: dict[str, Any]
) -> None:
    """As if it had not been made, but for its sequence number. Nothing of it is left in what is added up."""
    if not dtype.is_floating_point and kernel.get("fused"):
        kernel = {}
    ours, theirs = (nn.Parameter(torch.ones(500, dtype=dtype)) for _ in range(2))
    with Adam([ours], server=server.address, options=options("skip"), **kernel) as remote:
        local = torch.optim.Adam([theirs], **kernel)
        for step in range(6):
            skipped = step in (0, 2, 3)
            ours.grad = gradient(0, step, bad=bad if skipped else None).to(dtype)
            before = ours.detach().clone()
            remote.step()
            receipt = receipt_of(remote)
            if skipped:
                assert torch.equal(ours, before)
                assert receipt.outcome == "skipped_nonfinite"
                assert receipt.contributors == ()
            else:
                theirs.grad = gradient(0, step).to(dtype)
                local.step()
                assert receipt.outcome == "applied"
            assert (receipt.sequence, remote.next_sequence) == (step, step + 1)
            assert receipt.step == remote.job_step == (0, 1, 1, 1, 2, 3)[step]
            assert torch.equal(ours, theirs)
        assert_equal_states(remote, local)


def test_a_finite_gradient_whose_norm_overflows_is_not_skipped(server: Server) -> None:
    """What counts is each element."""
    p = nn.Parameter(torch.ones(500))
    asked = options("skip", max_grad_norm=1.0)
    with Adam([p], server=server.address, options=asked) as optimizer:
        p.grad = torch.full((500,), 1e38)
        optimizer.step()
        assert receipt_of(optimizer).outcome == "applied"
        assert receipt_of(optimizer).grad_norm == torch.inf


def test_a_skipped_step_has_no_norm(server: Server) -> None:
    """Whether a step is skipped is decided before it is clipped."""
    p = nn.Parameter(torch.ones(500))
    asked = options("skip", max_grad_norm=1.0)
    with Adam([p], server=server.address, options=asked) as optimizer:
        p.grad = gradient(0, 0, bad=torch.inf)
        optimizer.step()
        assert receipt_of(optimizer).outcome == "skipped_nonfinite"
        assert receipt_of(optimizer).grad_norm is None
        p.grad = gradient(0, 1)
        optimizer.step()
        assert receipt_of(optimizer).grad_norm == gradient(0, 1).norm().item()


def test_hyperparameters_of_a_skipped_step_hold_for_the_next(server: Server) -> None:
    """They travel once; the job has them when it needs them."""
    ours, theirs = (nn.Parameter(torch.ones(500)) for _ in range(2))
    with Adam([ours], fused=True, server=server.address, options=options("skip")) as remote:
        local = torch.optim.Adam([theirs], lr=0.5, fused=True)
        remote.param_groups[0]["lr"] = 0.5
        ours.grad = gradient(0, 0, bad=torch.nan)
        remote.step()
        ours.grad, theirs.grad = gradient(0, 1), gradient(0, 1)
        remote.step()
        local.step()
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("reduction_overflows", [False, True])
def test_two_workers_skip_together_whoever_has_the_bad_gradient(server: Server, *, reduction_overflows: bool) -> None:
    """Both get a receipt with the job's unchanged step. What counts is the reduced gradient: it may overflow."""
    bad_steps = (1, 2, 4)

    def work(rank: int) -> tuple[torch.Tensor, list[tuple[int | None, int, str]]]:
        p = nn.Parameter(torch.ones(500))
        told = []
        asked = options("skip", rank=rank, world_size=2)
        with Adam([p], fused=True, server=server.address, job="two", options=asked) as optimizer:
            for step in range(6):
                if reduction_overflows:
                    p.grad = gradient(rank, step, bad=3e38 if step in bad_steps else None)
                else:
                    p.grad = gradient(rank, step, bad=torch.nan if step in bad_steps and rank == step % 2 else None)
                optimizer.step()
                receipt = receipt_of(optimizer)
                told.append((receipt.sequence, receipt.step, receipt.outcome))
        return p.detach(), told

    results = in_threads(work, 2)
    twin = nn.Parameter(torch.ones(500))
    local = torch.optim.Adam([twin], fused=True)
    expected, committed = [], 0
    for step in range(6):
        if step not in bad_steps:
            twin.grad = (gradient(0, step) + gradient(1, step)) / 2
            local.step()
            committed += 1
        expected.append((step, committed, "skipped_nonfinite" if step in bad_steps else "merged"))
    for params, told in results:
        assert told == expected
        assert torch.equal(params, twin)


@pytest.mark.parametrize("bad", BAD)
def test_a_refused_step_raises_and_can_be_made_again(server: Server, bad: float) -> None:
    """With parameters, state and sequence number as they were. The error names the parameter."""
    p, theirs = (nn.Parameter(torch.ones(500)) for _ in range(2))
    named = [("head", nn.Parameter(torch.ones(7))), ("body", p)]
    with Adam(named, fused=True, server=server.address, options=options("error")) as remote:
        local = torch.optim.Adam([theirs], fused=True)
        p.grad = theirs.grad = gradient(0, 0)
        remote.step()
        local.step()
        for _ in range(2):
            before = state_of(remote, 1)
            p.grad = gradient(0, 1, bad=bad)
            with pytest.raises(NonFiniteGradientError, match=r"parameter 1 \(body\)"):
                remote.step()
            assert (remote.job_step, remote.next_sequence) == (1, 1)
            assert torch.equal(p, theirs)
            assert_same_state(before, state_of(remote, 1))
        p.grad, theirs.grad = gradient(0, 2), gradient(0, 2)
        remote.step()
        local.step()
        assert receipt_of(remote).sequence == 1
        assert torch.equal(p, theirs)


def test_two_workers_are_refused_together(server: Server) -> None:
    """The one that waits as well as the one whose push ends the step, and their next step works."""

    def work(rank: int) -> torch.Tensor:
        p = nn.Parameter(torch.ones(500))
        asked = options("error", rank=rank, world_size=2)
        with Adam([p], fused=True, server=server.address, job="two", options=asked) as optimizer:
            for step in range(4):
                p.grad = gradient(rank, step, bad=torch.inf if rank == step % 2 else None)
                with pytest.raises(NonFiniteGradientError):
                    optimizer.step()
                assert (optimizer.job_step, optimizer.next_sequence) == (step, step)
                p.grad = gradient(rank, step)
                optimizer.step()
                assert receipt_of(optimizer).step == step + 1
                assert receipt_of(optimizer).contributors == (0, 1)
        return p.detach()

    results = in_threads(work, 2)
    twin = nn.Parameter(torch.ones(500))
    local = torch.optim.Adam([twin], fused=True)
    for step in range(4):
        twin.grad = (gradient(0, step) + gradient(1, step)) / 2
        local.step()
    assert all(torch.equal(result, twin) for result in results)


def test_masters_are_left_alone_by_a_skipped_step(server: Server) -> None:
    """Low bits included."""
    p = nn.Parameter(torch.ones(500, dtype=torch.bfloat16))
    master = nn.Parameter(torch.ones(500))
    asked = options("skip", master_dtype=torch.float32)
    with Adam([p], fused=True, server=server.address, options=asked) as remote:
        local = torch.optim.Adam([master], fused=True)
        for step in range(6):
            bad = torch.inf if step % 2 else None
            p.grad = gradient(0, step, bad=bad).bfloat16()
            remote.step()
            if bad is None:
                master.grad = p.grad.float()
                local.step()
        assert torch.equal(p, master.bfloat16())
        assert_equal_states(remote, local)


@pytest.mark.parametrize("world_size", [1, 2])
def test_what_was_changed_outside_of_a_skipped_step_holds(server: Server, world_size: int) -> None:
    """As in torch, where a step that is not made undoes nothing. Every worker has the new values at once."""

    def work(rank: int) -> torch.Tensor:
        p = nn.Parameter(torch.ones(500))
        asked = options("skip", rank=rank, world_size=world_size)
        with Adam([p], fused=True, server=server.address, job="pushed", options=asked) as optimizer:
            p.grad = gradient(0, 0)
            optimizer.step()
            with torch.no_grad():
                p.mul_(2.0 if rank == 0 else 1.0)
            doubled = p.detach().clone()
            p.grad = gradient(0, 1, bad=torch.nan)
            optimizer.step()
            assert receipt_of(optimizer).outcome == "skipped_nonfinite"
            if rank == 0:
                assert torch.equal(p, doubled)
            else:
                assert torch.equal(p, doubled * 2)
            p.grad = gradient(0, 2)
            optimizer.step()
        return p.detach()

    results = in_threads(work, world_size)
    twin = nn.Parameter(torch.ones(500))
    local = torch.optim.Adam([twin], fused=True)
    for step in (0, 2):
        twin.grad = gradient(0, step)
        local.step()
        if step == 0:
            with torch.no_grad():
                twin.mul_(2.0)
    assert all(torch.equal(result, twin) for result in results)


def test_what_was_changed_outside_of_a_refused_step_comes_with_the_next(server: Server) -> None:
    """Nothing of the refused one was taken."""
    p, twin = (nn.Parameter(torch.ones(500)) for _ in range(2))
    with Adam([p], fused=True, server=server.address, options=options("error")) as remote:
        local = torch.optim.Adam([twin], fused=True)
        with torch.no_grad():
            p.mul_(2.0)
            twin.mul_(2.0)
        p.grad = gradient(0, 0, bad=torch.nan)
        with pytest.raises(NonFiniteGradientError):
            remote.step()
        p.grad, twin.grad = gradient(0, 1), gradient(0, 1)
        remote.step()
        local.step()
        assert torch.equal(p, twin)


def test_accumulated_gradients_are_used_up_by_a_skipped_step(server: Server) -> None:
    """The next step has its own only."""
    p, twin = (nn.Parameter(torch.ones(500)) for _ in range(2))
    with Adam([p], fused=True, server=server.address, options=options("skip")) as remote:
        local = torch.optim.Adam([twin], fused=True)
        p.grad = gradient(0, 0, bad=torch.inf)
        remote.accumulate()
        p.grad = gradient(0, 1)
        remote.step()
        assert receipt_of(remote).outcome == "skipped_nonfinite"
        p.grad, twin.grad = gradient(0, 2), gradient(0, 2)
        remote.step()
        local.step()
        assert torch.equal(p, twin)


@pytest.mark.parametrize("cleared", [False, True])
def test_accumulated_gradients_are_lost_with_a_refused_step_and_that_is_said(server: Server, *, cleared: bool) -> None:
    """A step that would lack them is refused once, unless zero_grad() has let go of them."""
    p, twin = (nn.Parameter(torch.ones(500)) for _ in range(2))
    with Adam([p], fused=True, server=server.address, options=options("error")) as remote:
        local = torch.optim.Adam([twin], fused=True)
        p.grad = gradient(0, 0, bad=torch.inf)
        remote.accumulate()
        p.grad = gradient(0, 1)
        with pytest.raises(NonFiniteGradientError):
            remote.step()
        if cleared:
            remote.zero_grad()
        else:
            p.grad = gradient(0, 2)
            with pytest.raises(AccumulationLostError):
                remote.step()
        p.grad, twin.grad = gradient(0, 2), gradient(0, 2)
        remote.step()
        local.step()
        assert receipt_of(remote).sequence == 0
        assert torch.equal(p, twin)


def test_a_word_that_is_none_is_refused() -> None:
    """By the options, before anything is opened."""
    with pytest.raises(ConfigurationError, match='"allow", "skip" or "error"'):
        options("ignore")


@pytest.mark.parametrize("nonfinite", ["skip", "error"])
def test_what_looks_at_a_whole_step_excludes_streaming(nonfinite: str) -> None:
    """The first bucket would be applied before the last is seen."""
    with pytest.raises(ConfigurationError, match="streaming"):
        options(nonfinite, apply="streaming")


def test_workers_that_want_different_things_do_not_match(server: Server) -> None:
    """The setting is named, with both values."""
    p = nn.Parameter(torch.ones(3))
    with (
        Adam([p], server=server.address, job="j", options=options("skip", rank=0, world_size=2)),
        pytest.raises(JobMismatchError, match="nonfinite skip, rank 1 asks for error"),
    ):
        Adam([p], server=server.address, job="j", options=options("error", rank=1, world_size=2))
