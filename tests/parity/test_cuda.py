"""The same code on a GPU. Skipped where there is none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from optimd.client import Adam, ProxyOptions
from tests.support import running_server


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
