"""A job that is brought back from its journal, with a snapshot or without, has torch's bits, on either device."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from optimd.client import Adam, ProxyOptions, Sync
from tests.support import in_threads, running_server

DEVICES = ["cpu", pytest.param("cuda:0", marks=pytest.mark.gpu)]
SHAPES = ((300, 70), (7,), (), (5000,))
STEPS = 6


def gradients(rank: int, step: int, dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(100 * rank + step)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]


def starting_values(dtype: torch.dtype) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(5)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("snapshot", [False, True], ids=["journal", "snapshot"])
@pytest.mark.parametrize(
    ("workers", "apply", "dtype", "kernel"),
    [
        (1, "streaming", torch.float32, {"fused": True}),
        (1, "atomic", torch.float32, {"foreach": True}),
        (1, "streaming", torch.bfloat16, {"foreach": False, "fused": False}),
        (2, "atomic", torch.float32, {"fused": True, "amsgrad": True}),
    ],
    ids=["streaming", "atomic", "bf16-loop", "two"],
)
def test_a_job_that_is_brought_back_has_the_bits_of_an_undisturbed_run(
    tmp_path: Path, device: str, snapshot: bool, workers: int, apply: Any, dtype: torch.dtype, kernel: dict[str, Any]
) -> None:
    """The server dies after some steps, and a copy of what was on its disk goes on."""
    options = {
        rank: ProxyOptions(
            rank=rank,
            worker_id=f"worker-{rank}",
            aggregation=Sync(world_size=workers, deterministic=workers > 1),
            apply=apply,
            bucket_bytes=4096,
        )
        for rank in range(workers)
    }
    trained: dict[int, list[nn.Parameter]] = {rank: starting_values(dtype) for rank in range(workers)}

    def train(rank: int, address: str, steps: int) -> dict[str, Any]:
        with Adam(trained[rank], lr=0.05, server=address, job="returns", options=options[rank], **kernel) as optimizer:
            while optimizer.job_step < steps:
                drawn = gradients(rank, optimizer.next_sequence, dtype)
                for param, grad in zip(trained[rank], drawn, strict=True):
                    param.grad = grad
                optimizer.step()
                if snapshot and rank == 0 and optimizer.job_step == 2:
                    assert optimizer_server.registry.snapshot("returns").step >= 2
            return optimizer.state_dict()

    settings = {"device": device, "fsync": "never"}
    with running_server(data_dir=str(tmp_path / "data"), **settings) as optimizer_server:
        in_threads(lambda rank: train(rank, optimizer_server.address, STEPS // 2), workers)
        shutil.copytree(tmp_path / "data", tmp_path / "copy")
    with running_server(data_dir=str(tmp_path / "copy"), lease_s=1.0, **settings) as optimizer_server:
        state = in_threads(lambda rank: train(rank, optimizer_server.address, STEPS), workers)[0]

    # Where the server computes, and with its slices: as its own tests show, these have torch's bits.
    local_params = [nn.Parameter(value.detach().to(device)) for value in starting_values(dtype)]
    local = torch.optim.Adam(local_params, lr=0.05, **kernel)
    for step in range(STEPS):
        drawn = [gradients(rank, step, dtype) for rank in range(workers)]
        for index, param in enumerate(local_params):
            total = drawn[0][index].to(device)
            for other in drawn[1:]:
                total = total + other[index].to(device)
            param.grad = total / workers if workers > 1 else total
        local.step()
    for rank in range(workers):
        for mine, expected in zip(trained[rank], local_params, strict=True):
            assert torch.equal(mine, expected.cpu())
    for index, entry in local.state_dict()["state"].items():
        for key, value in entry.items():
            assert torch.equal(state["state"][index][key].cpu(), value.cpu()), (index, key)
