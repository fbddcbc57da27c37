"""The demo's training: handwritten digits, a small convolutional net, a schedule. Ordinary PyTorch."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import nn

from optimd.cli.errors import CommandError

SEED = 0
BATCH = 64
LEARNING_RATE = 3e-3

Opt = TypeVar("Opt", bound=torch.optim.Optimizer)


@dataclass(frozen=True, slots=True)
class Digits:
    """scikit-learn's bundled digits: 8x8 images, `x` of shape (N, 1, 8, 8) in 0..1, `y` of shape (N,) in 0..9."""

    x_train: torch.Tensor
    y_train: torch.Tensor
    x_test: torch.Tensor
    y_test: torch.Tensor


@dataclass(frozen=True, slots=True)
class Trained(Generic[Opt]):
    """A finished training."""

    model: nn.Module
    optimizer: Opt
    accuracy: float
    """On the test images, 0 to 1."""
    steps: int
    seconds: float


def load_digits() -> Digits:
    """Loads the data set and keeps a fifth of it, the same every time, for the test.

    Raises:
        CommandError: scikit-learn is not installed.
    """
    try:
        from sklearn import datasets  # noqa: PLC0415  # only `optimd[demo]` has it
    except ModuleNotFoundError as error:
        raise CommandError("the demo needs scikit-learn: pip install 'optimd[server,demo]'") from error
    bundle = datasets.load_digits()
    x = torch.tensor(bundle.images, dtype=torch.float32).div(16).unsqueeze(1)
    y = torch.tensor(bundle.target)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(SEED))
    test, train = order[: len(y) // 5], order[len(y) // 5 :]
    return Digits(x[train], y[train], x[test], y[test])


def build_model() -> nn.Module:
    """The net, with the same initial weights every time."""
    torch.manual_seed(SEED)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * 4 * 4, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )


def train(
    digits: Digits,
    epochs: int,
    make_optimizer: Callable[[nn.Module], Opt],
    on_step: Callable[[float], None],
) -> Trained[Opt]:
    """Trains the net; the same numbers every time that the optimizer computes the same.

    Args:
        digits: The data.
        epochs: How often each image is seen.
        make_optimizer: Builds the optimizer for the net.
        on_step: Called after every step with its loss.
    """
    model = build_model()
    optimizer = make_optimizer(model)
    batches = len(digits.y_train) // BATCH
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=epochs * batches)
    order = torch.Generator().manual_seed(SEED)
    started = time.perf_counter()
    for _ in range(epochs):
        permutation = torch.randperm(len(digits.y_train), generator=order)
        for batch in torch.split(permutation[: batches * BATCH], BATCH):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(digits.x_train[batch]), digits.y_train[batch])
            torch.autograd.backward(loss)
            optimizer.step()
            scheduler.step()
            on_step(loss.item())
    seconds = time.perf_counter() - started
    with torch.no_grad():
        accuracy = (model(digits.x_test).argmax(1) == digits.y_test).float().mean().item()
    return Trained(model, optimizer, accuracy, epochs * batches, seconds)
