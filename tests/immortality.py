"""Training runs through deaths of the server, compared bit for bit with undisturbed ones."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from optimd.client import Adam, ProxyOptions, Sync
from tests.deaths import Deaths, MortalServer, haunt
from tests.fault.worker import ELEMENTS, gradient
from tests.support import ROOT, assert_equal_states, eventually

SIZES: Final = (40_000, 17, 25_000, 1, 8_000)
BUCKET_BYTES: Final = 8192
LR: Final = 0.01

MODES: Final = ("streaming", "atomic", "bf16-loop", "two-deterministic", "streaming-narrow", "two-narrow")


def parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(7)
    return [nn.Parameter(torch.randn(size, generator=generator).to(dtype)) for size in SIZES]


def gradients(rank: int, sequence: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor | None]:
    """A function of worker and step alone. Now and then a parameter has none."""
    generator = torch.Generator().manual_seed(1_000_003 * (rank + 1) + sequence)
    drawn = [torch.randn(size, generator=generator).to(dtype) for size in SIZES]
    return [None if (sequence + index) % 11 == 3 else grad for index, grad in enumerate(drawn)]


def rate(sequence: int) -> float:
    return LR * (1.0 + 0.25 * (sequence % 4))


def run(optimizer: Adam, params: list[nn.Parameter], rank: int, steps: int, dtype: torch.dtype) -> None:
    """Trains to job step `steps`; each step's gradients and learning rate follow from its number."""
    while optimizer.job_step < steps:
        sequence = optimizer.next_sequence
        for param, grad in zip(params, gradients(rank, sequence, dtype), strict=True):
            param.grad = grad
        optimizer.param_groups[0]["lr"] = rate(sequence)
        if sequence % 13 == 5:
            # A write between two steps, as by somebody who clips weights.
            with torch.no_grad():
                params[1].fill_(0.1)
        optimizer.step()
        receipt = optimizer.last_receipt
        assert receipt is not None
        assert (receipt.sequence, receipt.step) == (sequence, sequence + 1)


def undisturbed(
    world_size: int, steps: int, dtype: torch.dtype, wire: torch.dtype, **options: Any
) -> tuple[list[nn.Parameter], Any]:
    """What torch alone comes to, with gradients that are rounded to what they travel in."""
    params = parameters(dtype)
    optimizer = torch.optim.Adam(params, lr=LR, **options)
    for sequence in range(steps):
        drawn = [gradients(rank, sequence, dtype) for rank in range(world_size)]
        for index, param in enumerate(params):
            parts = [None if (grad := grads[index]) is None else grad.to(wire).to(dtype) for grads in drawn]
            total: torch.Tensor | None = None
            for part in parts:
                if part is not None:
                    total = part if total is None else total + part
            param.grad = None if total is None else total / world_size if world_size > 1 else total
        optimizer.param_groups[0]["lr"] = rate(sequence)
        if sequence % 13 == 5:
            with torch.no_grad():
                params[1].fill_(0.1)
        optimizer.step()
    return params, optimizer


def train_through_deaths(mode: str, folder: Path, *, steps: int, kills: int, seed: int) -> Deaths:
    """Trains while a server with a data dir in `folder` is killed `kills` times; compares with an undisturbed run."""
    print(f"mode {mode}, seed {seed}")
    world_size = 2 if mode.startswith("two") else 1
    dtype = torch.bfloat16 if mode.startswith("bf16") else torch.float32
    wire = torch.bfloat16 if mode.endswith("narrow") else None
    kernel: dict[str, Any] = {"fused": False, "foreach": False} if mode.endswith("loop") else {"fused": True}
    aggregation = Sync(world_size=world_size, deterministic=world_size > 1, timeout_s=60)
    server = MortalServer(folder / "data", "--fsync=never", "--snapshot-steps=7", "--journal-max-bytes=3000000")
    made = [0]
    results: list[tuple[list[nn.Parameter], Any]] = []

    def work(rank: int) -> None:
        params = parameters(dtype)
        options = ProxyOptions(
            rank=rank,
            world_size=world_size,
            worker_id=f"worker-{rank}",
            aggregation=aggregation,
            apply="streaming" if mode.startswith("streaming") else "atomic",
            bucket_bytes=BUCKET_BYTES,
            wire_dtype=wire,
        )
        with Adam(params, lr=LR, server=server.address, job="immortal", options=options, **kernel) as optimizer:
            for step in range(1, steps + 1):
                run(optimizer, params, rank, step, dtype)
                made[0] = step
            if rank == 0:
                results.append((params, optimizer.state_dict()))

    with server.running(), ThreadPoolExecutor(world_size) as pool:
        workers = [pool.submit(work, rank) for rank in range(world_size)]
        haunt(server, lambda: made[0], steps=steps, kills=kills, seed=seed)
        for worker in workers:
            worker.result(timeout=300)
    expected, optimizer = undisturbed(world_size, steps, dtype, wire or dtype, **kernel)
    params, state = results[0]
    for index, (mine, other) in enumerate(zip(params, expected, strict=True)):
        assert torch.equal(mine, other.detach().to(wire or dtype).to(dtype)), f"parameter {index}"

    class Loaded:
        def state_dict(self) -> Any:
            return state

    assert_equal_states(Loaded(), optimizer)  # type: ignore[arg-type]  # what it looks at
    return server.deaths


def train_through_all_deaths(folder: Path, *, steps: int, kills: int, seed: int) -> tuple[Deaths, int]:
    """As `train_through_deaths`, with two workers that are killed as well and start again at `opt.next_sequence`.

    Returns:
        What the servers' log says; and how many workers were killed.
    """
    print(f"seed {seed}")
    dice = random.Random(seed)
    server = MortalServer(folder / "data", "--fsync=never", "--snapshot-steps=7", "--lease-s=2")
    workers: list[subprocess.Popen[str]] = []
    starts = [0, 0]
    killed = 0

    def start(rank: int) -> subprocess.Popen[str]:
        starts[rank] += 1
        return subprocess.Popen(
            [
                sys.executable,
                str(ROOT / "tests" / "fault" / "worker.py"),
                f"--server={server.address}",
                "--job=immortal",
                f"--folder={folder}",
                f"--rank={rank}",
                "--world-size=2",
                f"--steps={steps}",
                "--deterministic",
                "--on-loss=wait",
                "--pause-s=0.005",
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            text=True,
        )

    def has_made(due: int) -> bool:
        pushes = [int(path.stem.split("-")[2]) for path in folder.glob("push-0-*.pt")]
        return max(pushes, default=0) >= due

    with server.running():
        try:
            workers = [start(rank) for rank in range(2)]
            for number in range(kills):
                due = max(1, int(0.9 * steps * (number + dice.random()) / kills))
                assert eventually(partial(has_made, due), 120), server.deaths.log[-20:]
                time.sleep(dice.uniform(0, 0.02))
                victims = dice.choice(["server", "worker", "both"])
                if victims != "server":
                    rank = dice.randrange(2)
                    if workers[rank].poll() is None:
                        workers[rank].kill()
                        killed += 1
                    workers[rank].wait(10)
                    workers[rank] = start(rank)
                if victims != "worker":
                    server.kill()
                    server.start()
            for worker in workers:
                assert worker.wait(180) == 0, server.deaths.log[-20:]
        finally:
            for worker in workers:
                if worker.poll() is None:
                    worker.kill()
                    worker.wait(10)
    param = nn.Parameter(torch.zeros(ELEMENTS))
    local = torch.optim.Adam([param], lr=0.05, fused=True)
    for sequence in range(steps):
        param.grad = (gradient(0, sequence) + gradient(1, sequence)) / 2
        local.step()
    for rank in range(2):
        assert torch.equal(torch.load(folder / f"final-{rank}.pt"), param.detach()), f"rank {rank}"
    return server.deaths, killed
