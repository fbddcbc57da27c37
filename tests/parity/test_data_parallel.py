"""Two synchronous workers with half the batch each: what that is equal to, and how close to what else."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch import nn

from optimd.client import Adam, ProxyOptions
from optimd.server import Server
from tests.parity.data_parallel import STEPS, build, half, loss_of
from tests.support import assert_equal_parameters, in_threads

SCRIPT = Path(__file__).with_name("data_parallel.py")


def test_two_workers_equal_one_torch_adam_that_is_fed_the_mean_of_their_gradients(server: Server) -> None:
    """Bit for bit, each with a net of its own and a real backward of its half of each batch."""

    # Here, not in the threads: it seeds the one generator that they share.
    models = [build() for _ in range(2)]

    def work(rank: int) -> nn.Module:
        model = models[rank]
        options = ProxyOptions(rank=rank, world_size=2)
        with Adam(model.parameters(), lr=0.01, fused=True, server=server.address, job="halves", options=options) as opt:
            for step in range(STEPS):
                opt.zero_grad()
                loss_of(model, step, half(rank)).backward()
                opt.step()
        return model

    results = in_threads(work, 2)
    twins = [build() for _ in range(2)]
    local = torch.optim.Adam(twins[0].parameters(), lr=0.01, fused=True)
    for step in range(STEPS):
        for rank, twin in enumerate(twins):
            twin.zero_grad()
            loss_of(twin, step, half(rank)).backward()
        for mine, other in zip(twins[0].parameters(), twins[1].parameters(), strict=True):
            assert mine.grad is not None
            assert other.grad is not None
            mine.grad = (mine.grad + other.grad) / 2
        local.step()
        twins[1].load_state_dict(twins[0].state_dict())
    for result in results:
        assert_equal_parameters(result, twins[0])


def largest_difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def test_against_one_local_adam_on_the_whole_batch_they_agree_as_closely_as_ddp_with_gloo_does(tmp_path: Path) -> None:
    """Both add the same two halves up: what is left is how a backward of the whole batch rounds."""
    whole = build()
    local = torch.optim.Adam(whole.parameters(), lr=0.01, fused=True)
    for step in range(STEPS):
        local.zero_grad()
        loss_of(whole, step).backward()
        local.step()
    differences = {}
    for how in ("ddp", "optimd"):
        out = tmp_path / f"{how}.pt"
        ended = subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", SCRIPT, how, out],
            check=False,
            capture_output=True,
            text=True,
            timeout=150,
            env={"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", "TMPDIR": tempfile.mkdtemp(prefix="t-")},
        )
        assert ended.returncode == 0, ended.stderr
        differences[how] = largest_difference(torch.load(out), dict(whole.state_dict()))
    assert 0 < differences["ddp"] < 1e-3
    assert differences["optimd"] <= 2 * differences["ddp"]
