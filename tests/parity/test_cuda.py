"""The same code on a GPU. Skipped where there is none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from optimd.client import Adam, Async, ProxyOptions, Sync
from tests.support import in_threads, running_server


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{"fused": True}, {"foreach": True}, {"fused": True, "capturable": True}], ids=str)
@pytest.mark.parametrize("worker", ["cpu", "cuda"])
def test_a_server_on_a_gpu_has_the_bits_of_torch_on_a_gpu(worker: str, options: dict[str, Any]) -> None:
    """Whether the worker's parameters are on the GPU too or not."""
    start = [torch.randn(300, 70), torch.randn(7), torch.randn(())]
    ours = [nn.Parameter(value.to(worker)) for value in start]
    theirs = [nn.Parameter(value.cuda()) for value in start]
    with (
        running_server(device="cuda:0") as server,
        Adam(ours, server=server.address, options=ProxyOptions(bucket_bytes=4096), **options) as remote,
    ):
        assert str(server.device) == "cuda:0"
        local = torch.optim.Adam(theirs, **options)
        for step in range(20):
            generator = torch.Generator().manual_seed(step)
            for mine, other in zip(ours, theirs, strict=True):
                grad = torch.randn(mine.shape, generator=generator)
                mine.grad, other.grad = grad.to(worker), grad.cuda()
            remote.step()
            local.step()
        assert all(torch.equal(mine.cpu(), other.cpu()) for mine, other in zip(ours, theirs, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("transport", ["grpc", "shm"])
def test_gradients_that_a_gpu_computes_leave_while_backward_runs(transport: Any) -> None:
    """They wait for their kernels, not for the whole of backward; with torch's bits."""

    def net() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(*(layer for _ in range(6) for layer in (nn.Linear(300, 300), nn.Tanh()))).cuda()

    ours, theirs = net(), net()
    asked = ProxyOptions(overlap=True, transport=transport, bucket_bytes=65536)
    with (
        running_server(device="cuda:0") as server,
        Adam(ours.parameters(), fused=True, server=server.address, options=asked) as remote,
    ):
        local = torch.optim.Adam(theirs.parameters(), fused=True)
        for step in range(10):
            x = torch.randn(64, 300, generator=torch.Generator().manual_seed(step)).cuda()
            for model, optimizer in ((ours, remote), (theirs, local)):
                optimizer.zero_grad()
                model(x).square().sum().backward()
            assert remote._overlap is not None
            assert remote._overlap._sent
            remote.step()
            local.step()
        assert all(torch.equal(p, q) for p, q in zip(ours.parameters(), theirs.parameters(), strict=True))


@pytest.mark.gpu
def test_a_server_on_a_gpu_clips_masters_with_the_bits_of_torch_on_a_gpu() -> None:
    """Also where slices lie in memory as no tensor of torch's would."""
    start = [torch.randn(shape).bfloat16() for shape in ((7,), (300, 70), (), (1001,))]
    ours = [nn.Parameter(value) for value in start]
    theirs = [nn.Parameter(value.float().cuda()) for value in start]
    asked = ProxyOptions(bucket_bytes=4096, max_grad_norm=1.0, nonfinite="skip", master_dtype=torch.float32)
    with (
        running_server(device="cuda:0") as server,
        Adam(ours, fused=True, server=server.address, options=asked) as remote,
    ):
        local = torch.optim.Adam(theirs, fused=True)
        for step in range(10):
            generator = torch.Generator().manual_seed(step)
            for mine, other in zip(ours, theirs, strict=True):
                mine.grad = torch.randn(mine.shape, generator=generator).bfloat16()
                other.grad = mine.grad.float().cuda()
            norm = torch.nn.utils.clip_grad_norm_(theirs, 1.0)
            remote.step()
            local.step()
            assert remote.last_receipt is not None
            assert remote.last_receipt.grad_norm == norm.item()
        assert all(torch.equal(mine, other.bfloat16().cpu()) for mine, other in zip(ours, theirs, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("transport", ["grpc", "shm"])
@pytest.mark.parametrize(
    "more",
    [
        pytest.param({}, id="streaming"),
        pytest.param({"apply": "atomic"}, id="atomic"),
        pytest.param({"aggregation": Async()}, id="async"),
        pytest.param({"aggregation": Sync(deterministic=True)}, id="deterministic"),
        pytest.param({"wire_dtype": torch.bfloat16}, id="bfloat16 on the wire"),
    ],
)
def test_copies_both_ways_and_updates_at_once_have_the_bits_of_torch_on_a_gpu(
    transport: Any, more: dict[str, Any]
) -> None:
    """Many buckets of many sizes, so that each buffer is used again and again while the device is busy."""
    sizes = (700_000, 3, 120_000, 64, 64, 65_000, 1_000_000, 5)
    ours = [nn.Parameter(torch.randn(size)) for size in sizes]
    theirs = [nn.Parameter(p.detach().cuda()) for p in ours]
    asked = ProxyOptions(bucket_bytes=256 * 1024, transport=transport, **more)
    narrowed = more.get("wire_dtype", torch.float32)
    with (
        running_server(device="cuda:0") as server,
        Adam(ours, lr=0.1, fused=True, server=server.address, options=asked) as remote,
    ):
        local = torch.optim.Adam(theirs, lr=0.1, fused=True)
        for step in range(15):
            generator = torch.Generator().manual_seed(step)
            for mine, other in zip(ours, theirs, strict=True):
                mine.grad = torch.randn(mine.shape, generator=generator)
                other.grad = mine.grad.to(narrowed).float().cuda()
            remote.step()
            local.step()
            for mine, other in zip(ours, theirs, strict=True):
                assert torch.equal(mine, other.to(narrowed).float().cpu()), step


@pytest.mark.gpu
def test_workers_of_a_server_on_a_gpu_have_equal_parameters_after_each_step() -> None:
    """Three of them, whose values are read while others wait for theirs."""
    size, workers = 1_500_000, 3

    def train(rank: int) -> torch.Tensor:
        p = nn.Parameter(torch.zeros(size))
        asked = ProxyOptions(rank=rank, world_size=workers, aggregation=Sync(deterministic=True))
        with Adam([p], lr=0.1, fused=True, server=server.address, job="b", options=asked) as optimizer:
            for step in range(10):
                p.grad = torch.randn(size, generator=torch.Generator().manual_seed(10 * step + rank))
                optimizer.step()
        return p.detach()

    with running_server(device="cuda:0") as server:
        first, *others = in_threads(train, workers)
    assert all(torch.equal(first, other) for other in others)
    twin = nn.Parameter(torch.zeros(size).cuda())
    local = torch.optim.Adam([twin], lr=0.1, fused=True)
    for step in range(10):
        grads = [
            torch.randn(size, generator=torch.Generator().manual_seed(10 * step + rank)) for rank in range(workers)
        ]
        twin.grad = (grads[0].cuda() + grads[1].cuda() + grads[2].cuda()).div_(workers)
        local.step()
    assert torch.equal(first, twin.cpu())
