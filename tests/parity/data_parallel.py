"""Trains a net for a few steps on halves of batches, as a torchrun worker: with DDP and a local Adam, or with optimd.

torchrun --nproc-per-node 2 data_parallel.py ddp|optimd OUT
"""

from __future__ import annotations

import os
import sys

import torch
from torch import nn

STEPS = 20
BATCH = 32


def build() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 3))


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(BATCH, 20, generator=generator)
    return x, x[:, :3].sin()


def loss_of(model: nn.Module, step: int, part: slice = slice(None)) -> torch.Tensor:
    x, y = batch(step)
    return nn.functional.mse_loss(model(x[part]), y[part])


def half(rank: int) -> slice:
    return slice(rank * BATCH // 2, (rank + 1) * BATCH // 2)


def train(how: str) -> nn.Module:
    rank = int(os.environ["RANK"])
    model = build()
    if how == "ddp":
        torch.distributed.init_process_group("gloo")
        wrapped: nn.Module = nn.parallel.DistributedDataParallel(model)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01, fused=True)
    else:
        from optimd.client import Adam

        wrapped = model
        optimizer = Adam(model.parameters(), lr=0.01, fused=True)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(wrapped, step, half(rank)).backward()
        optimizer.step()
    if how == "ddp":
        # Else who is done first closes its lines under the other's last exchange.
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    return model


if __name__ == "__main__":
    trained = train(sys.argv[1])
    if os.environ["RANK"] == "0":
        torch.save(trained.state_dict(), sys.argv[2])
