"""PyTorch Lightning's Trainer drives a remote Adam as it drives torch's, to the last bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.plugins import MixedPrecision
from pytorch_lightning.tuner import Tuner
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from optimd.client import Adam
from optimd.server import Server
from tests.support import assert_equal_parameters, assert_equal_states
from tests.trainers.factories import OptimizerFactory, after_unscaling, embedded_fused, fused, torchs_fused

BATCHES = 9  # odd, so that the last step of each epoch has one batch and the others two
EPOCHS = 4
STEPS = EPOCHS * 5
CLIP = 0.5

pytestmark = [
    # Lightning's own use of what torch has deprecated, as it is imported and as it walks through its loaders.
    pytest.mark.filterwarnings("ignore:`isinstance\\(treespec, LeafSpec\\)` is deprecated"),
    # Lightning's advice: a handful of samples needs no worker processes and no logger.
    pytest.mark.filterwarnings("ignore:.*does not have many workers which may be a bottleneck"),
]


class Regressor(pl.LightningModule):
    """Learns a fixed function. Notes what a step saw."""

    def __init__(self, adam: OptimizerFactory, *, workers: int = 0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(6, 50), nn.LayerNorm(50), nn.Tanh(), nn.Linear(50, 3))
        self.adam = adam
        self.workers = workers
        self.lr = 1e-2
        self.seen: list[tuple[float, float, float]] = []
        """For each step lr, beta1, and the gradients' norm before they are clipped."""

    def train_dataloader(self) -> Any:
        x = torch.randn(BATCHES * 8, 6, generator=torch.Generator().manual_seed(1))
        y = torch.stack([x.sum(1), x.square().sum(1), x.prod(1)], 1)
        return DataLoader(TensorDataset(x, y), batch_size=8, num_workers=self.workers)

    def training_step(self, batch: list[torch.Tensor]) -> torch.Tensor:
        x, y = batch
        return nn.functional.mse_loss(self.net(x.to(self.dtype)), y.to(self.dtype))

    def configure_optimizers(self) -> Any:
        optimizer = self.adam(self.parameters(), lr=self.lr)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3 * self.lr, total_steps=STEPS)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        group = optimizer.param_groups[0]
        norm = torch.linalg.vector_norm(torch.cat([p.grad.float().flatten() for p in self.parameters()]))
        self.seen.append((group["lr"], group["betas"][0], norm.item()))


class Gan(pl.LightningModule):
    """Two networks against each other, each with an optimizer and a schedule, stepped by hand."""

    def __init__(self, adam: OptimizerFactory) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.generator = nn.Sequential(nn.Linear(4, 20), nn.ReLU(), nn.Linear(20, 2))
        self.critic = nn.Sequential(nn.Linear(2, 20), nn.ReLU(), nn.Linear(20, 1))
        self.adam = adam
        self.automatic_optimization = False

    def train_dataloader(self) -> Any:
        real = torch.randn(40, 2, generator=torch.Generator().manual_seed(1)) + 2
        noise = torch.randn(40, 4, generator=torch.Generator().manual_seed(2))
        return DataLoader(TensorDataset(real, noise), batch_size=8)

    def training_step(self, batch: list[torch.Tensor]) -> None:
        real, noise = batch
        making, judging = self.optimizers()

        self.toggle_optimizer(judging)
        fake = self.generator(noise).detach()
        loss = nn.functional.softplus(self.critic(fake)).mean() + nn.functional.softplus(-self.critic(real)).mean()
        judging.zero_grad()
        self.manual_backward(loss)
        self.clip_gradients(judging, gradient_clip_val=CLIP, gradient_clip_algorithm="norm")
        judging.step()
        self.untoggle_optimizer(judging)

        def closure() -> torch.Tensor:
            loss = nn.functional.softplus(-self.critic(self.generator(noise))).mean()
            making.zero_grad()
            self.manual_backward(loss)
            return loss

        with making.toggle_model():
            making.step(closure=closure)
        for scheduler in self.lr_schedulers():
            scheduler.step()

    def configure_optimizers(self) -> Any:
        optimizers = [
            self.adam(self.generator.parameters(), lr=1e-2, betas=(0.5, 0.9)),
            self.adam(self.critic.parameters(), lr=3e-2, betas=(0.5, 0.9)),
        ]
        return optimizers, [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9) for optimizer in optimizers]


def trainer_of(*callbacks: pl.Callback, **settings: Any) -> pl.Trainer:
    return pl.Trainer(
        **{
            "accelerator": "cpu",
            "max_epochs": EPOCHS,
            "accumulate_grad_batches": 2,
            "gradient_clip_val": CLIP,
            "callbacks": [*callbacks],
            "enable_checkpointing": bool(callbacks),
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "logger": False,
            **settings,
        }
    )


def fitted(module: pl.LightningModule, trainer: pl.Trainer, checkpoint: str | None = None) -> pl.Trainer:
    trainer.fit(module, ckpt_path=checkpoint)
    return trainer


def assert_equal_runs(ours: pl.Trainer, theirs: pl.Trainer) -> None:
    """Weights, optimizer states and options, bit for bit."""
    assert ours.global_step == theirs.global_step
    assert_equal_parameters(ours.lightning_module, theirs.lightning_module)
    for mine, other in zip(ours.optimizers, theirs.optimizers, strict=True):
        assert isinstance(mine, Adam)
        assert type(other) is torch.optim.Adam
        assert_equal_states(mine, other)
        assert mine.state_dict()["param_groups"] == other.state_dict()["param_groups"]
    for mine, other in zip(ours.lr_scheduler_configs, theirs.lr_scheduler_configs, strict=True):
        assert mine.scheduler.get_last_lr() == other.scheduler.get_last_lr()


@pytest.mark.parametrize("precision", ["32-true", "64-true", "bf16-true", "bf16-mixed"])
def test_a_fit_with_clipping_accumulation_and_a_schedule_ends_as_with_torchs(server: Server, precision: str) -> None:
    """Lightning runs the backward pass inside of step(closure) and clips there; a cycle changes lr and betas."""
    ours, theirs = Regressor(after_unscaling(fused(server))), Regressor(after_unscaling(torchs_fused))
    assert_equal_runs(
        fitted(ours, trainer_of(precision=precision)),
        fitted(theirs, trainer_of(precision=precision)),
    )
    assert ours.seen == theirs.seen
    assert len({(lr, beta) for lr, beta, _ in ours.seen}) == STEPS
    assert max(norm for _, _, norm in ours.seen) > CLIP
    assert ours.trainer.optimizers[0].job_step == STEPS


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")  # torch's, of a first step that is left out
def test_float16_with_a_scaler_ends_as_with_torchs(server: Server) -> None:
    """Lightning unscales before it clips, and leaves out a step whose gradients overflow."""

    def mixed() -> MixedPrecision:
        # Half of the steps' gradients overflow at the first scales.
        return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**20))

    ours, theirs = Regressor(after_unscaling(fused(server))), Regressor(after_unscaling(torchs_fused))
    assert_equal_runs(fitted(ours, trainer_of(plugins=[mixed()])), fitted(theirs, trainer_of(plugins=[mixed()])))
    assert 0 < ours.trainer.optimizers[0].job_step < STEPS


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")  # it is there to be resumed from
@pytest.mark.parametrize(("before", "after"), [("optimd", "optimd"), ("optimd", "torch"), ("torch", "optimd")])
def test_a_fit_resumed_from_a_checkpoint_ends_as_if_never_interrupted(
    server: Server, tmp_path: Path, before: str, after: str
) -> None:
    """Two epochs, a checkpoint, two more in a new Trainer with a new optimizer: of either kind, from either kind."""
    adam = {"optimd": fused(server), "torch": torchs_fused}
    saved = ModelCheckpoint(tmp_path, save_top_k=-1)
    fitted(Regressor(adam[before]), trainer_of(saved, max_epochs=EPOCHS // 2))

    resumed = Regressor(adam[after])
    with torch.no_grad():
        for p in resumed.parameters():
            p.zero_()
    goes_on = fitted(resumed, trainer_of(ModelCheckpoint(tmp_path, save_top_k=-1)), saved.best_model_path)
    whole = fitted(Regressor(torchs_fused), trainer_of())

    assert len(resumed.seen) == STEPS // 2
    assert resumed.seen == whole.lightning_module.seen[STEPS // 2 :]
    if after == "optimd":
        assert goes_on.optimizers[0].job_step == STEPS // 2
        assert_equal_runs(goes_on, whole)
    else:
        assert_equal_parameters(resumed, whole.lightning_module)
        assert_equal_states(goes_on.optimizers[0], whole.optimizers[0])


def test_a_checkpoint_holds_what_it_holds_with_torchs(server: Server, tmp_path: Path) -> None:
    """Readable without unpickling code; nothing of ours inside."""
    files = []
    for name, adam in (("ours", fused(server)), ("theirs", torchs_fused)):
        trainer = fitted(Regressor(adam), trainer_of(max_epochs=1))
        files.append(tmp_path / f"{name}.ckpt")
        trainer.save_checkpoint(files[-1])
    ours, theirs = (torch.load(file, weights_only=True) for file in files)
    assert ours.keys() == theirs.keys()
    (mine,), (other,) = ours["optimizer_states"], theirs["optimizer_states"]
    assert mine["param_groups"] == other["param_groups"]
    assert mine["state"].keys() == other["state"].keys()
    for index, entry in other["state"].items():
        assert mine["state"][index].keys() == entry.keys()
        assert all(torch.equal(mine["state"][index][key], value) for key, value in entry.items())
    assert ours["lr_schedulers"] == theirs["lr_schedulers"]


def test_manual_optimization_with_two_optimizers_ends_as_with_torchs(server: Server) -> None:
    """Turn by turn, the other's parameters frozen meanwhile; one steps with a closure, one without."""
    ours, theirs = (
        fitted(Gan(adam), trainer_of(accumulate_grad_batches=1, gradient_clip_val=None))
        for adam in (fused(server), torchs_fused)
    )
    assert len(ours.optimizers) == 2
    assert_equal_runs(ours, theirs)


def test_the_optimizer_that_a_module_is_handed_is_the_remote_one(server: Server) -> None:
    """Lightning wraps it in an object of a subclass without our attributes: what it is asked for is still there."""
    module = Regressor(fused(server))
    trainer = fitted(module, trainer_of(max_epochs=1))
    handed, own = module.optimizers(), trainer.optimizers[0]
    assert handed is not own
    assert isinstance(handed, Adam)
    assert handed.last_receipt is own.last_receipt is not None
    assert (handed.server, handed.job, handed.job_step) == (own.server, own.job, 5)
    assert_equal_states(handed, own)
    assert handed.state[module.net[0].weight]["step"] == 5


def test_the_learning_rate_finder_finds_the_same_and_leaves_no_trace(server: Server, tmp_path: Path) -> None:
    """It trains with rising rates and puts everything back, from a checkpoint of its own."""
    found = []
    for adam in (fused(server), torchs_fused):
        module = Regressor(adam)
        before = {name: value.clone() for name, value in module.state_dict().items()}
        tuner = Tuner(trainer_of(default_root_dir=tmp_path))
        finder = tuner.lr_find(module, num_training=15, early_stop_threshold=None, update_attr=False)
        assert len(module.seen) == 15
        found.append(finder.results)
        assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert found[0] == found[1]


def test_loader_processes_forked_in_mid_training_leave_the_optimizers_line_alone() -> None:
    """With no server named, and so with a child that serves; each epoch forks anew and drops its forks."""
    ours, theirs = (Regressor(adam, workers=2) for adam in (embedded_fused, torchs_fused))
    assert_equal_runs(fitted(ours, trainer_of(max_epochs=2)), fitted(theirs, trainer_of(max_epochs=2)))
    for optimizer in ours.trainer.optimizers:
        optimizer.close()
