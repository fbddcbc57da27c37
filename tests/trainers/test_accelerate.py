"""A loop written for Hugging Face accelerate drives a remote Adam as it drives torch's, to the last bit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState, GradientState
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from optimd.client import Adam
from optimd.server import Server
from tests.support import assert_equal_parameters, assert_equal_states
from tests.trainers.factories import OptimizerFactory, after_unscaling, fused, torchs_fused

BATCHES = 9  # odd, so that the last step of each epoch has one batch and the others two
EPOCHS = 4
STEPS = EPOCHS * 5
CLIP = 0.5


@pytest.fixture(autouse=True)
def accelerates_own_singletons() -> Iterator[None]:
    """accelerate keeps its settings for the life of a process, and a test is a process to it."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@dataclass
class Run:
    """What a training script has in its hands, and what its steps saw."""

    accelerator: Accelerator
    model: nn.Module
    optimizer: Any
    loader: Any
    scheduler: Any
    seen: list[tuple[float, float]]
    """For each step lr and the gradients' norm before they are clipped."""


def prepared(adam: OptimizerFactory, seed: int = 0, **settings: Any) -> Run:
    """The lines before the loop, as the user's guide has them."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 50), nn.LayerNorm(50), nn.Tanh(), nn.Linear(50, 3))
    optimizer = adam(model.parameters(), lr=3e-2)
    x = torch.randn(BATCHES * 8, 6, generator=torch.Generator().manual_seed(1))
    y = torch.stack([x.sum(1), x.square().sum(1), x.prod(1)], 1)
    loader = DataLoader(TensorDataset(x, y), batch_size=8)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2, **settings)
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
    return Run(accelerator, model, optimizer, loader, scheduler, [])


def train(run: Run, batches: Any = None) -> None:
    """One epoch."""
    accelerator = run.accelerator
    for x, y in run.loader if batches is None else batches:
        with accelerator.accumulate(run.model):
            loss = nn.functional.mse_loss(run.model(x), y)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                norm = accelerator.clip_grad_norm_(run.model.parameters(), CLIP)
                run.seen.append((run.scheduler.get_last_lr()[0], norm.item()))
            run.optimizer.step()
            run.scheduler.step()
            run.optimizer.zero_grad()


def assert_equal_runs(ours: Run, theirs: Run) -> None:
    """Weights, optimizer state and options, and what the steps saw, bit for bit."""
    assert isinstance(ours.optimizer.optimizer, Adam)
    assert type(theirs.optimizer.optimizer) is torch.optim.Adam
    assert ours.seen == theirs.seen
    assert_equal_parameters(ours.model, theirs.model)
    assert_equal_states(ours.optimizer, theirs.optimizer)
    assert ours.optimizer.state_dict()["param_groups"] == theirs.optimizer.state_dict()["param_groups"]


@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
def test_a_loop_with_clipping_accumulation_and_a_schedule_ends_as_with_torchs(
    server: Server, mixed_precision: str
) -> None:
    """accelerate wraps optimizer and schedule, and skips both while it accumulates."""
    ours, theirs = (prepared(adam, mixed_precision=mixed_precision) for adam in (fused(server), torchs_fused))
    for run in (ours, theirs):
        for _ in range(EPOCHS):
            train(run)
    assert_equal_runs(ours, theirs)
    assert len({lr for lr, _ in ours.seen}) == STEPS
    assert max(norm for _, norm in ours.seen) > CLIP
    assert ours.optimizer.optimizer.job_step == STEPS


@pytest.mark.parametrize(("before", "after"), [("optimd", "optimd"), ("optimd", "torch"), ("torch", "optimd")])
def test_a_loop_resumed_from_a_saved_state_ends_as_if_never_interrupted(
    server: Server, tmp_path: Path, before: str, after: str
) -> None:
    """load_state writes the model's weights after the optimizer was made; then the optimizer's state is loaded."""
    adam = {"optimd": fused(server), "torch": torchs_fused}
    first = prepared(adam[before])
    for _ in range(EPOCHS // 2):
        train(first)
    first.accelerator.save_state(str(tmp_path))

    resumed = prepared(adam[after], seed=1)
    resumed.accelerator.load_state(str(tmp_path))
    assert_equal_parameters(resumed.model, first.model)
    whole = prepared(torchs_fused)
    for _ in range(EPOCHS // 2):
        train(resumed)
    for _ in range(EPOCHS):
        train(whole)

    assert resumed.seen == whole.seen[STEPS // 2 :]
    assert_equal_parameters(resumed.model, whole.model)
    assert_equal_states(resumed.optimizer, whole.optimizer)


def test_a_run_that_goes_back_to_its_own_saved_state_repeats_itself(server: Server, tmp_path: Path) -> None:
    """load_state into the optimizer that saved it, which has gone on since: in mid-epoch, as after a loss spike."""
    ours, theirs = (prepared(adam) for adam in (fused(server), torchs_fused))
    for name, run in (("ours", ours), ("theirs", theirs)):
        train(run)
        run.accelerator.save_state(str(tmp_path / name))
        train(run)
        run.accelerator.load_state(str(tmp_path / name))
        train(run, run.accelerator.skip_first_batches(run.loader, 2))
    assert_equal_runs(ours, theirs)


def test_float16_with_a_scaler_ends_as_with_torchs(server: Server) -> None:
    """accelerate makes a scaler on a GPU alone; its wrapper takes one for the CPU, and says which steps it left out."""

    def train_scaled(adam: OptimizerFactory) -> tuple[nn.Module, Any, list[bool]]:
        run = prepared(adam)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20)
        optimizer = AcceleratedOptimizer(run.optimizer.optimizer, scaler=scaler)
        skipped = []
        for x, y in run.loader:
            with torch.autocast("cpu", torch.float16):
                loss = nn.functional.mse_loss(run.model(x), y)
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer.optimizer)
            nn.utils.clip_grad_norm_(run.model.parameters(), CLIP)
            optimizer.step()
            skipped.append(optimizer.step_was_skipped)
            optimizer.zero_grad()
        return run.model, optimizer, skipped

    ours, theirs = train_scaled(after_unscaling(fused(server))), train_scaled(after_unscaling(torchs_fused))
    assert ours[2] == theirs[2]
    assert 0 < sum(ours[2]) < BATCHES
    assert_equal_parameters(ours[0], theirs[0])
    assert_equal_states(ours[1], theirs[1])
