"""Clipping on the server against `torch.nn.utils.clip_grad_norm_` before torch's own step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn

from optimd.client import Adam, ConfigurationError, JobMismatchError, ProxyOptions, StepReceipt, Sync
from optimd.server import Server
from tests.support import assert_equal_states, in_threads

SHAPES = ((70, 33), (5,), (), (0, 3), (3, 5, 7), (41, 20))


def parameters(*dtypes: torch.dtype) -> list[nn.Parameter]:
    """Of each shape one of each dtype, the same at each call; the last is transposed."""
    generator = torch.Generator().manual_seed(7)
    made = [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES for dtype in dtypes]
    return [nn.Parameter(tensor) for tensor in (*made[:-1], made[-1].t())]


def gradients(params: Sequence[nn.Parameter], step: int, rank: int = 0) -> list[torch.Tensor | None]:
    """Of another size at each step; every third step without one for the first parameter."""
    generator = torch.Generator().manual_seed(1000 * rank + step)
    scale = 10.0 ** (step % 5 - 3)
    made = [torch.empty_like(p).copy_(scale * torch.randn(p.shape, generator=generator)) for p in params]
    return [None if index == 0 and step % 3 == 2 else grad for index, grad in enumerate(made)]


def give(params: Sequence[nn.Parameter], grads: Sequence[torch.Tensor | None]) -> None:
    for p, grad in zip(params, grads, strict=True):
        p.grad = None if grad is None else grad.to(p.dtype)


def receipt_of(optimizer: Adam) -> StepReceipt:
    assert optimizer.last_receipt is not None
    return optimizer.last_receipt


def assert_equal(ours: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor]) -> None:
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.equal(mine, other)


def assert_clips_as_torch(
    server: Server, dtypes: Sequence[torch.dtype], options: dict[str, Any], *, max_grad_norm: float = 1.0, **more: Any
) -> None:
    """Ten steps, some of which are clipped and some not."""
    ours, theirs = parameters(*dtypes), parameters(*dtypes)
    asked = ProxyOptions(max_grad_norm=max_grad_norm, **more)
    clipped = []
    with Adam(ours, lr=1e-2, server=server.address, options=asked, **options) as remote:
        local = torch.optim.Adam(theirs, lr=1e-2, **options)
        for step in range(10):
            grads = gradients(ours, step)
            give(ours, grads)
            give(theirs, [None if grad is None else grad.clone() for grad in grads])
            norm = torch.nn.utils.clip_grad_norm_(theirs, max_grad_norm)
            remote.step()
            local.step()
            assert receipt_of(remote).grad_norm == norm.item()
            clipped.append(norm.item() > max_grad_norm)
            assert_equal(ours, theirs)
        assert_equal_states(remote, local)
    assert set(clipped) == {True, False}


@pytest.mark.parametrize("bucket_bytes", [1024, 5000, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_clipped_steps_equal_torchs(server: Server, dtype: torch.dtype, bucket_bytes: int | None) -> None:
    """Norms, parameters and state, whatever buckets the parameters are split between."""
    assert_clips_as_torch(server, [dtype], {"fused": True}, bucket_bytes=bucket_bytes)


@pytest.mark.parametrize("options", [{"foreach": True}, {"foreach": False, "amsgrad": True}], ids=["foreach", "loop"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64])
def test_gradients_of_kernels_that_are_not_fused_are_clipped_too(
    server: Server, dtype: torch.dtype, options: dict[str, Any]
) -> None:
    """bfloat16 runs there on whole parameters, put together behind the clipping."""
    assert_clips_as_torch(server, [dtype], options, bucket_bytes=1024)


@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.float16, torch.float64, torch.float32, torch.bfloat16),
    ],
    ids=["narrow-first", "wide-first", "four"],
)
def test_parameters_of_several_dtypes_are_clipped_together(server: Server, dtypes: Sequence[torch.dtype]) -> None:
    """In the order in which torch groups them; its rules of promotion differ for 0-dim ones."""
    assert_clips_as_torch(server, dtypes, {"fused": True}, bucket_bytes=1024)


def test_scalars_beside_wider_parameters_are_scaled_as_torch_scales_scalars(server: Server) -> None:
    """By a coefficient in the wider dtype: torch lets a 0-dim tensor promote another, and no larger one."""
    ours, theirs = (
        [nn.Parameter(torch.ones(3, dtype=torch.float64)), *(nn.Parameter(torch.ones(())) for _ in range(40))]
        for _ in range(2)
    )
    with Adam(ours, fused=True, server=server.address, options=ProxyOptions(max_grad_norm=0.3)) as remote:
        local = torch.optim.Adam(theirs, fused=True)
        grads = [torch.randn(p.shape, generator=torch.Generator().manual_seed(i)) for i, p in enumerate(ours)]
        give(ours, grads)
        give(theirs, [grad.clone() for grad in grads])
        torch.nn.utils.clip_grad_norm_(theirs, 0.3)
        remote.step()
        local.step()
        assert_equal_states(remote, local)


def test_a_clipped_step_with_masters_has_the_norm_of_the_wide_gradient(server: Server) -> None:
    """It equals torch's on the masters."""
    ours = parameters(torch.bfloat16)
    theirs = [nn.Parameter(p.detach().float()) for p in ours]
    asked = ProxyOptions(max_grad_norm=1.0, master_dtype=torch.float32, bucket_bytes=1024)
    with Adam(ours, lr=1e-2, fused=True, server=server.address, options=asked) as remote:
        local = torch.optim.Adam(theirs, lr=1e-2, fused=True)
        for step in range(10):
            grads = gradients(ours, step)
            give(ours, grads)
            give(theirs, grads)
            norm = torch.nn.utils.clip_grad_norm_(theirs, 1.0)
            remote.step()
            local.step()
            assert receipt_of(remote).grad_norm == norm.item()
        assert_equal(ours, [p.bfloat16() for p in theirs])
        assert_equal_states(remote, local)


@pytest.mark.parametrize("bucket_bytes", [1024, None])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_two_workers_reduced_gradient_is_clipped(server: Server, reduction: Any, bucket_bytes: int | None) -> None:
    """After the mean is taken; both receipts have the norm."""
    steps = 10

    def work(rank: int) -> tuple[list[torch.Tensor], list[float | None]]:
        ours = parameters(torch.float32)
        asked = ProxyOptions(
            rank=rank,
            world_size=2,
            max_grad_norm=1.0,
            bucket_bytes=bucket_bytes,
            aggregation=Sync(reduction=reduction),
        )
        norms = []
        with Adam(ours, lr=1e-2, server=server.address, job="two", options=asked) as optimizer:
            for step in range(steps):
                give(ours, gradients(ours, step, rank))
                optimizer.step()
                norms.append(receipt_of(optimizer).grad_norm)
        return [p.detach() for p in ours], norms

    results = in_threads(work, 2)
    theirs = parameters(torch.float32)
    local = torch.optim.Adam(theirs, lr=1e-2, fused=True)
    norms = []
    for step in range(steps):
        one, other = (gradients(theirs, step, rank) for rank in (0, 1))
        sums = [None if a is None or b is None else a + b for a, b in zip(one, other, strict=True)]
        give(theirs, [total if total is None or reduction == "sum" else total / 2 for total in sums])
        norms.append(torch.nn.utils.clip_grad_norm_(theirs, 1.0).item())
        local.step()
    for params, told in results:
        assert told == norms
        assert_equal(params, theirs)


def test_a_gradient_that_only_one_worker_has_is_in_the_norm(server: Server) -> None:
    """As zero for the other; a parameter that nobody has one for is not."""

    def work(rank: int) -> float | None:
        params = [nn.Parameter(torch.zeros(300)) for _ in range(3)]
        asked = ProxyOptions(rank=rank, world_size=2, max_grad_norm=1e9, bucket_bytes=1024)
        with Adam(params, server=server.address, job="some", options=asked) as optimizer:
            params[rank].grad = torch.full((300,), 2.0)
            optimizer.step()
            assert 2 not in optimizer.state_dict()["state"]
            return receipt_of(optimizer).grad_norm

    assert in_threads(work, 2) == [pytest.approx(600**0.5)] * 2


def test_a_step_without_a_gradient_has_norm_zero(server: Server) -> None:
    """As torch says of nothing."""
    p = nn.Parameter(torch.ones(3))
    with Adam([p], server=server.address, options=ProxyOptions(max_grad_norm=1.0)) as optimizer:
        optimizer.step()
        assert receipt_of(optimizer).grad_norm == 0.0
        assert optimizer.job_step == 1


def test_a_gradient_that_is_not_finite_becomes_what_torch_makes_of_it(server: Server) -> None:
    """Without `nonfinite`: an infinite norm, and a NaN where infinity is multiplied by zero."""
    ours, theirs = (nn.Parameter(torch.ones(200)) for _ in range(2))
    asked = ProxyOptions(max_grad_norm=1.0)
    with Adam([ours], fused=True, server=server.address, options=asked) as remote:
        local = torch.optim.Adam([theirs], fused=True)
        grad = torch.ones(200)
        grad[5] = torch.inf
        ours.grad, theirs.grad = grad.clone(), grad.clone()
        torch.nn.utils.clip_grad_norm_([theirs], 1.0)
        remote.step()
        local.step()
        assert receipt_of(remote).grad_norm == torch.inf
        assert torch.equal(ours.isnan(), theirs.isnan())
        assert ours.isnan().sum() == 1
        assert torch.equal(ours.nan_to_num(), theirs.nan_to_num())


def test_an_infinite_limit_only_measures(server: Server) -> None:
    """The norm is told, and the bits are those of an unclipped step."""
    ours, theirs = parameters(torch.float32), parameters(torch.float32)
    asked = ProxyOptions(max_grad_norm=torch.inf)
    with Adam(ours, fused=True, server=server.address, options=asked) as remote:
        local = torch.optim.Adam(theirs, fused=True)
        grads = gradients(ours, 3)
        give(ours, grads)
        give(theirs, grads)
        remote.step()
        local.step()
        assert (
            receipt_of(remote).grad_norm
            == torch.nn.utils.get_total_norm([p.grad for p in theirs if p.grad is not None]).item()
        )
        assert_equal(ours, theirs)


def test_without_a_limit_there_is_no_norm(server: Server) -> None:
    """Nothing is computed that nobody asked for."""
    p = nn.Parameter(torch.ones(3))
    with Adam([p], server=server.address) as optimizer:
        p.grad = torch.ones(3)
        optimizer.step()
        assert receipt_of(optimizer).grad_norm is None


def test_gradients_of_the_worker_are_left_as_they_are(server: Server) -> None:
    """What is clipped is what the server makes the step with."""
    p = nn.Parameter(torch.ones(300))
    with Adam([p], server=server.address, options=ProxyOptions(max_grad_norm=0.1)) as optimizer:
        p.grad = torch.ones(300)
        optimizer.step()
        assert torch.equal(p.grad, torch.ones(300))


@pytest.mark.parametrize("limit", [0.0, -1.0, float("nan")])
def test_a_limit_has_to_be_positive(limit: float) -> None:
    """torch would scale gradients by zero, or turn them round."""
    with pytest.raises(ConfigurationError, match="max_grad_norm"):
        ProxyOptions(max_grad_norm=limit)


def test_clipping_and_streaming_exclude_each_other() -> None:
    """The norm of the last bucket would come too late for the first."""
    with pytest.raises(ConfigurationError, match="streaming"):
        ProxyOptions(max_grad_norm=1.0, apply="streaming")


def test_workers_with_different_limits_do_not_match(server: Server) -> None:
    """The setting is named, with both values."""
    p = nn.Parameter(torch.ones(3))
    with (
        Adam([p], server=server.address, job="j", options=ProxyOptions(rank=0, world_size=2, max_grad_norm=1.0)),
        pytest.raises(JobMismatchError, match=r"max_grad_norm 1.0, rank 1 asks for 2.0"),
    ):
        Adam([p], server=server.address, job="j", options=ProxyOptions(rank=1, world_size=2, max_grad_norm=2.0))
