"""Hundreds of steps give torch's parameters and torch's state, bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from optimd.client import Adam, AdamW, ProxyOptions
from optimd.server import Server
from tests.support import assert_equal_parameters, assert_equal_states


class Awkward(nn.Module):
    """A little of everything: several groups, biases, LayerNorm, 0-dim, empty, frozen, and at times no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Linear(37, 301)
        self.norm = nn.LayerNorm(301)
        self.narrow = nn.Linear(301, 19)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.empty = nn.Parameter(torch.empty(0, 4))
        self.frozen = nn.Parameter(torch.randn(19), requires_grad=False)
        self.sometimes = nn.Parameter(torch.randn(19, 3))
        self.tiny = nn.ParameterList(nn.Parameter(torch.randn(1 + size % 5)) for size in range(120))

    def forward(self, x: torch.Tensor, *, use_sometimes: bool) -> torch.Tensor:
        y = self.narrow(torch.tanh(self.norm(self.wide(x)))) * self.scale + self.frozen
        if use_sometimes:
            y = y @ self.sometimes
        total = sum((tiny * tiny).sum() for tiny in self.tiny)
        return (y * y).mean() + self.empty.sum() + total * 0.01

    def groups(self) -> list[dict[str, Any]]:
        matrices = [self.wide.weight, self.narrow.weight, self.sometimes]
        rest = [p for p in self.parameters() if not any(p is matrix for matrix in matrices)]
        return [
            {"params": matrices, "weight_decay": 0.01, "lr": 3e-3},
            {"params": rest, "betas": (0.8, 0.99)},
        ]


def train_both(
    ours: tuple[Awkward, torch.optim.Optimizer], theirs: tuple[Awkward, torch.optim.Optimizer], steps: int
) -> None:
    """Trains two models on the same data, with a schedule, and one that is changed by hand."""
    dtype = ours[0].scale.dtype
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.995) for _, optimizer in (ours, theirs)]
    for step in range(steps):
        x = torch.randn(8, 37, generator=torch.Generator().manual_seed(step)).to(dtype)
        for model, optimizer in (ours, theirs):
            optimizer.zero_grad()
            model(x, use_sometimes=step % 3 != 1).backward()
            if step == 50:
                optimizer.param_groups[1]["betas"] = (0.9, 0.95)
            optimizer.step()
        for scheduler in schedulers:
            scheduler.step()


def awkward_pair(dtype: torch.dtype) -> tuple[Awkward, Awkward]:
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(Awkward().to(dtype))
    return models[0], models[1]


@pytest.mark.parametrize("bucket_bytes", [4 * 1024, 64 * 1024, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_300_steps_of_an_awkward_model_equal_torchs_fused_adam(
    server: Server, dtype: torch.dtype, bucket_bytes: int | None
) -> None:
    """Parameters and state_dict are torch's, whatever the size of the buckets."""
    ours, theirs = awkward_pair(dtype)
    options = ProxyOptions(bucket_bytes=bucket_bytes)
    with Adam(ours.groups(), lr=1e-2, fused=True, server=server.address, options=options) as remote:
        local = torch.optim.Adam(theirs.groups(), lr=1e-2, fused=True)
        train_both((ours, remote), (theirs, local), 300)
        assert_equal_parameters(ours, theirs)
        assert_equal_states(remote, local)
        assert remote.state_dict()["param_groups"] == local.state_dict()["param_groups"]
        frozen = [index for index, p in enumerate(remote.param_groups[1]["params"]) if p is ours.frozen]
        assert len(ours.groups()[0]["params"]) + frozen[0] not in remote.state_dict()["state"]


@pytest.mark.parametrize("apply", ["streaming", "atomic"])
@pytest.mark.parametrize(
    "options",
    [
        {"fused": True, "amsgrad": True},
        {"foreach": True, "maximize": True, "weight_decay": 0.1},
        {"foreach": False, "fused": False, "decoupled_weight_decay": True, "weight_decay": 0.1},
    ],
    ids=["fused-amsgrad", "foreach-maximize", "loop-decoupled"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_each_kernel_has_torchs_bits_in_both_apply_modes(
    server: Server, dtype: torch.dtype, options: dict[str, Any], apply: Any
) -> None:
    """The kernel that the user chose runs on the server; bfloat16 loops run on whole parameters there."""
    ours, theirs = awkward_pair(dtype)
    # bfloat16 loops depend on how torch splits a tensor between threads: all tests run with one.
    with Adam(
        ours.parameters(),
        lr=1e-2,
        server=server.address,
        options=ProxyOptions(apply=apply, bucket_bytes=4096),
        **options,
    ) as remote:
        local = torch.optim.Adam(theirs.parameters(), lr=1e-2, **options)
        train_both_flat((ours, remote), (theirs, local), 25)
        assert_equal_parameters(ours, theirs)
        assert_equal_states(remote, local)


def train_both_flat(
    ours: tuple[Awkward, torch.optim.Optimizer], theirs: tuple[Awkward, torch.optim.Optimizer], steps: int
) -> None:
    for step in range(steps):
        x = torch.randn(8, 37, generator=torch.Generator().manual_seed(step)).to(ours[0].scale.dtype)
        for model, optimizer in (ours, theirs):
            optimizer.zero_grad()
            model(x, use_sometimes=step % 3 != 1).backward()
            optimizer.step()


def test_adamw_equals_torchs(server: Server) -> None:
    """AdamW's own default of weight decay, and its decoupling."""
    ours, theirs = awkward_pair(torch.float32)
    with AdamW(ours.parameters(), fused=True, server=server.address) as remote:
        local = torch.optim.AdamW(theirs.parameters(), fused=True)
        train_both_flat((ours, remote), (theirs, local), 30)
        assert_equal_parameters(ours, theirs)
        assert_equal_states(remote, local)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float16])
def test_other_dtypes_have_torchs_bits(server: Server, dtype: torch.dtype) -> None:
    """Complex parameters take torch's default kernel, since the fused one does not have them."""
    start = torch.randn(70, 9, dtype=dtype)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    fused = True if dtype is torch.float16 else None
    with Adam([ours], server=server.address, fused=fused) as remote:
        local = torch.optim.Adam([theirs], fused=fused)
        for step in range(20):
            grad = torch.randn(70, 9, dtype=dtype, generator=torch.Generator().manual_seed(step))
            ours.grad, theirs.grad = grad.clone(), grad.clone()
            remote.step()
            local.step()
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("layout", ["transposed", "channels_last", "gradient_transposed"])
def test_dense_tensors_of_any_memory_order_have_torchs_bits(server: Server, layout: str) -> None:
    """Elements travel in memory order, so that each meets the kernel it would meet at home."""

    def build() -> nn.Parameter:
        torch.manual_seed(0)
        if layout == "channels_last":
            return nn.Parameter(torch.randn(5, 7, 3, 3).to(memory_format=torch.channels_last))
        if layout == "transposed":
            return nn.Parameter(torch.randn(41, 77).t())
        return nn.Parameter(torch.randn(77, 41))

    ours, theirs = build(), build()
    with Adam([ours], server=server.address, fused=True, options=ProxyOptions(bucket_bytes=1024)) as remote:
        local = torch.optim.Adam([theirs], fused=True)
        for step in range(10):
            grad = torch.randn(ours.shape, generator=torch.Generator().manual_seed(step))
            mine = torch.empty_like(ours).copy_(grad)
            if layout == "gradient_transposed":
                mine = grad.t().contiguous().t()
            ours.grad, theirs.grad = mine, torch.empty_like(theirs).copy_(grad)
            remote.step()
            local.step()
        assert torch.equal(ours, theirs)
        assert ours.stride() == theirs.stride()
        assert_equal_states(remote, local)
        assert remote.state[ours]["exp_avg"].stride() == local.state[theirs]["exp_avg"].stride()


def test_a_strided_parameter_is_stepped_as_a_dense_copy_of_it_would_be(server: Server) -> None:
    """torch's own fused kernel is silently wrong on these: what a dense parameter gets is the measure."""
    backing = torch.randn(30, 8)
    ours, theirs = nn.Parameter(backing[:, ::2]), nn.Parameter(backing[:, ::2].clone())
    holes = backing[:, 1::2].clone()
    with Adam([ours], server=server.address, fused=True) as remote:
        local = torch.optim.Adam([theirs], fused=True)
        for _ in range(5):
            ours.grad, theirs.grad = torch.ones(30, 4), torch.ones(30, 4)
            remote.step()
            local.step()
    assert torch.equal(ours, theirs)
    assert torch.equal(backing[:, 1::2], holes)
