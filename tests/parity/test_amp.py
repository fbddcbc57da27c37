"""torch.amp.GradScaler by both of its paths: the plain one, and the one that leaves the scale to the fused kernel."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from optimd.client import Adam, AdamW, ProxyOptions
from optimd.server import Server
from tests.support import assert_equal_parameters, assert_equal_states, in_threads

SCALE = 1000.0
"""No power of two: dividing by it rounds."""


def scaled(optimizer: Any, scale: float, *, found_inf: bool = False) -> None:
    """A step as a scaler makes it with optimizers that take a scale."""
    optimizer.grad_scale = torch.tensor(scale)
    optimizer.found_inf = torch.tensor(float(found_inf))
    optimizer.step()


def net(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 50), nn.Tanh(), nn.Linear(50, 3)).to(dtype)


def loss_of(model: nn.Module, step: int) -> torch.Tensor:
    dtype = next(model.parameters()).dtype
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(step)).to(dtype)
    return model(x).square().float().mean()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, *, steps: int = 8, clip: bool = False) -> list[Any]:
    """Some steps with a scaler, two of them with infinite gradients, the first one included."""
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE, growth_interval=3)
    told: list[Any] = []
    for step in range(steps):
        optimizer.zero_grad()
        scaler.scale(loss_of(model, step)).backward()
        if step in {0, 4}:
            next(model.parameters()).grad.view(-1)[0] = torch.inf
        if clip:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        scaler.step(optimizer)
        grads = [p.grad.clone() for p in model.parameters()]
        scaler.update()
        told.append((scaler.get_scale(), grads))
    return told


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("apply", ["streaming", "atomic"])
@pytest.mark.parametrize("arguments", [{"fused": True}, {"foreach": False, "fused": False}, {"foreach": True}], ids=str)
@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler")
def test_a_scaler_trains_as_with_torchs(server: Server, arguments: dict[str, Any], apply: Any, clip: bool) -> None:
    """Parameters, state, scales and the gradients that are left; steps with infinite gradients change nothing."""
    ours, theirs = net(), net()
    options = ProxyOptions(apply=apply, bucket_bytes=1024)
    with Adam(ours.parameters(), server=server.address, options=options, **arguments) as remote:
        local = torch.optim.Adam(theirs.parameters(), **arguments)
        fused = bool(arguments.get("fused"))
        assert getattr(remote, "_step_supports_amp_scaling", False) is fused
        mine, other = train(ours, remote, clip=clip), train(theirs, local, clip=clip)
        assert_equal_parameters(ours, theirs)
        assert_equal_states(remote, local)
        assert remote.job_step == 6
        for (scale, grads), (other_scale, other_grads) in zip(mine, other, strict=True):
            assert scale == other_scale
            assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(grads, other_grads, strict=True))
        assert not hasattr(remote, "grad_scale")
        assert not hasattr(remote, "found_inf")


def test_a_skipped_step_says_so(server: Server) -> None:
    """In its receipt, of the last committed step; the worker's own count goes on."""
    model = net()
    with Adam(model.parameters(), fused=True, server=server.address) as remote:
        train(model, remote, steps=5)
        receipt = remote.last_receipt
        assert (receipt.outcome, receipt.step, receipt.sequence) == ("skipped_nonfinite", 3, 4)
        assert receipt.contributors == ()
        assert remote.next_sequence == 5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_gradients_are_divided_by_the_fused_kernel_before_they_are_rounded(
    server: Server, dtype: torch.dtype
) -> None:
    """Their quotients would underflow in the worker's dtype; torch's fused kernel keeps them."""
    start = torch.linspace(-1, 1, 300).to(dtype)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    with Adam([ours], fused=True, server=server.address) as remote:
        local = torch.optim.Adam([theirs], fused=True)
        for step in range(5):
            for p, optimizer in ((ours, remote), (theirs, local)):
                p.grad = torch.full_like(p, 2e-3 * (step + 1))
                scaled(optimizer, 65536.0)
            assert torch.equal(ours.grad, theirs.grad)
        assert torch.equal(ours, theirs)
        assert_equal_states(remote, local)


def test_master_weights_are_given_the_wide_quotients(server: Server) -> None:
    """As a float32 optimizer would be, that is fed with widened gradients and the same scale."""
    start = torch.linspace(-1, 1, 300).to(torch.float16)
    ours, master = nn.Parameter(start.clone()), nn.Parameter(start.float())
    options = ProxyOptions(master_dtype=torch.float32)
    with AdamW([ours], fused=True, server=server.address, options=options) as remote:
        local = torch.optim.AdamW([master], fused=True)
        for step in range(5):
            ours.grad = torch.full_like(ours, 2e-3 * (step + 1))
            master.grad = ours.grad.float()
            for optimizer in (remote, local):
                scaled(optimizer, SCALE)
        assert torch.equal(ours, master.to(torch.float16))


def test_kernels_that_take_no_scale_refuse_it_as_torchs_do(server: Server) -> None:
    """The same error; nothing has changed."""
    ours, theirs = net(), net()
    with Adam(ours.parameters(), foreach=False, fused=False, server=server.address) as remote:
        local = torch.optim.Adam(theirs.parameters(), foreach=False, fused=False)
        errors = []
        for model, optimizer in ((ours, remote), (theirs, local)):
            loss_of(model, 0).backward()
            with pytest.raises(AssertionError) as caught:
                scaled(optimizer, SCALE)
            errors.append(str(caught.value))
        assert errors[0] == errors[1]
        assert remote.job_step == 0


@pytest.mark.parametrize("apply", ["streaming", "atomic"])
def test_a_worker_without_finite_gradients_leaves_the_step_to_the_others(server: Server, apply: Any) -> None:
    """It counts for nothing, receives the step, and is in the next one; where all are without, there is no step."""

    def work(rank: int) -> tuple[list[torch.Tensor], list[Any]]:
        p = nn.Parameter(torch.linspace(-1, 1, 700))
        options = ProxyOptions(rank=rank, world_size=2, apply=apply, bucket_bytes=1024)
        told = []
        with Adam([p], lr=0.1, fused=True, server=server.address, job="two", options=options) as remote:
            for step in range(4):
                p.grad = torch.full_like(p, SCALE * (1.0 + rank + step))
                # Nobody in step 0, rank 1 alone in step 1, both from then on.
                scaled(remote, SCALE, found_inf=step == 0 or (step == 1 and rank == 0))
                receipt = remote.last_receipt
                told.append((receipt.outcome, receipt.step, receipt.contributors))
        return [p.detach()], told

    (first, told), (second, others_told) = in_threads(work, 2)
    assert torch.equal(first[0], second[0])
    skipped, applied, merged = "skipped_nonfinite", "applied", "merged"
    assert told == [(skipped, 0, ()), (skipped, 1, (1,)), (merged, 2, (0, 1)), (merged, 3, (0, 1))]
    assert others_told == [(skipped, 0, ()), (applied, 1, (1,)), (merged, 2, (0, 1)), (merged, 3, (0, 1))]
    p = nn.Parameter(torch.linspace(-1, 1, 700))
    local = torch.optim.Adam([p], lr=0.1, fused=True)
    for grads in ([2.0 + 1], [1.0 + 2, 2.0 + 2], [1.0 + 3, 2.0 + 3]):
        p.grad = torch.full_like(p, sum(grads) / len(grads))
        local.step()
    assert torch.equal(first[0], p.detach())


def test_accumulated_gradients_are_unscaled_with_the_step_that_takes_them(server: Server) -> None:
    """None are left in the worker then, and the scaler's step goes through all the same."""
    ours, theirs = net(), net()
    with Adam(ours.parameters(), fused=True, server=server.address) as remote:
        local = torch.optim.Adam(theirs.parameters(), fused=True)
        for step in range(3):
            for micro in range(2):
                (loss_of(ours, 10 * step + micro) * SCALE).backward()
                (loss_of(theirs, 10 * step + micro) * SCALE).backward()
                remote.accumulate()
            for optimizer in (remote, local):
                scaled(optimizer, SCALE)
                optimizer.zero_grad()
        assert remote.job_step == 3
        assert_equal_parameters(ours, theirs)
        assert_equal_states(remote, local)
