"""What every way to train offers: a server where it has one, and workers whose steps are timed."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from benchmarks import models
from benchmarks.venues import Transport


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What all processes of one contender are told."""

    model: str
    """One of `models.NAMES`."""
    workers: int
    """How many step together."""
    address: str = ""
    """Where its server listens, or where its processes meet."""
    multiplications: int = 0
    """What the model's backward computes besides, see `models.Model`."""
    device: str = "cpu"
    """The torch device that the model is on."""


class Worker(Protocol):
    """One worker of a contender, in a process of its own."""

    def prepare(self, step: int) -> None:
        """What comes before a step, untimed: gradients, from a real backward."""

    def step(self) -> float:
        """One step: gradients over, update, parameters back into the model. Blocks; gives what it took in seconds."""

    def digest(self) -> str | None:
        """A checksum of the model's parameters; None where there is nothing to compare."""

    def close(self) -> None:
        """Leaves, where leaving is more than the end of the process."""


class Peer(Protocol):
    """A way to train, as a value that travels to its processes."""

    @property
    def listens(self) -> Transport | None:
        """How its server is reached, or its processes meet; None where it needs neither."""

    @property
    def name(self) -> str:
        """What it is called in tables."""

    @property
    def bits(self) -> bool:
        """Whether its parameters must end as those of a local fused Adam do, to the last bit."""

    @property
    def has_server(self) -> bool:
        """Whether it has a server to be forked, by `serve`."""

    @property
    def size(self) -> int | None:
        """How many processes step; None for as many as there are workers."""

    def serve(self, setting: Setting, ready: Callable[[], None]) -> None:
        """Serves, in a process of its own, until that is killed; calls `ready` once calls are taken.

        Where workers wait for the server themselves, that may be at once.
        """

    def work(self, setting: Setting, rank: int) -> Worker:
        """A worker, in this process. Waits until it can step."""


class ModelWorker:
    """What workers have in common: a model, and gradients for it.

    Args:
        setting: What is trained.
        ranks: Whose gradients it computes.
    """

    def __init__(self, setting: Setting, *ranks: int) -> None:
        self.model = models.build(setting.model, setting.multiplications).to(setting.device)
        self.parameters = list(self.model.parameters())
        self._ranks = ranks

    def prepare(self, step: int) -> None:
        """Takes the gradients away and computes new ones."""
        self.model.zero_grad(set_to_none=True)
        models.compute_gradients(self.model, step, self._ranks)

    def gradients(self) -> list[torch.Tensor]:
        """The gradients, by parameter."""
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        assert len(gradients) == len(self.parameters)
        return gradients

    def step(self) -> float:
        """Times `exchange`, what it leaves to a GPU included."""
        self._finish()
        start = time.perf_counter()
        self.exchange()
        self._finish()
        return time.perf_counter() - start

    def _finish(self) -> None:
        if self.parameters[0].is_cuda:
            torch.cuda.synchronize(self.parameters[0].device)

    def exchange(self) -> None:
        """What a step is."""
        raise NotImplementedError

    def digest(self) -> str | None:
        """Of the model."""
        return models.digest(self.model)

    def close(self) -> None:
        """Nothing: the process ends."""
