"""A backward that takes time, and a step behind it: what overlapping the two saves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Final

import torch

from benchmarks.peers.daemon import DaemonWorker, Optimd
from benchmarks.peers.peer import ModelWorker, Setting

ALONE: Final = "the backward alone"


@dataclass(frozen=True)
class Backward:
    """Gradients, and nothing done with them."""

    listens: ClassVar[None] = None
    name: str = ALONE
    bits: bool = False
    has_server: bool = False
    size: int | None = 1

    def serve(self, setting: Setting, ready: Callable[[], None]) -> None:
        """There is no server."""
        raise NotImplementedError

    def work(self, setting: Setting, rank: int) -> _BackwardWorker:
        """The one worker."""
        return _BackwardWorker(setting, rank)


class _BackwardWorker(ModelWorker):
    _loss: torch.Tensor

    def prepare(self, step: int) -> None:
        self.model.zero_grad(set_to_none=True)
        self._loss = self.model(step)

    def exchange(self) -> None:
        torch.autograd.backward(self._loss)


@dataclass(frozen=True, kw_only=True)
class BackwardAndStep(Optimd):
    """optimd; what is timed is the backward and the step."""

    def work(self, setting: Setting, rank: int) -> _BackwardAndStepWorker:
        """A worker of a job that is called as this is."""
        return _BackwardAndStepWorker(setting, rank, self.name, self.proxy_options(setting, rank))


class _BackwardAndStepWorker(DaemonWorker):
    _loss: torch.Tensor

    def prepare(self, step: int) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        self._loss = self.model(step)

    def exchange(self) -> None:
        torch.autograd.backward(self._loss)
        self.optimizer.step()
