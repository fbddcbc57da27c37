"""The optimizers that the trainers are handed: ours, and torch's with the same kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch

from optimd.client import Adam
from optimd.server import Server

OptimizerFactory: TypeAlias = Callable[..., torch.optim.Optimizer]


def fused(server: Server) -> OptimizerFactory:
    """Makes ours, on `server`."""
    return lambda *args, **kwargs: Adam(*args, **kwargs, fused=True, server=server.address)


def embedded_fused(*args: Any, **kwargs: Any) -> torch.optim.Optimizer:
    """Ours, with no server named: a child of this process serves it."""
    return Adam(*args, **kwargs, fused=True)


def torchs_fused(*args: Any, **kwargs: Any) -> torch.optim.Optimizer:
    """torch's."""
    return torch.optim.Adam(*args, **kwargs, fused=True)


def after_unscaling(adam: OptimizerFactory) -> OptimizerFactory:
    """Makes one for mixed precision that is given unscaled gradients though its kernel is the fused one.

    Left to itself it unscales inside of its kernel, torch's as ours: then Lightning refuses to clip, even in bfloat16,
    and accelerate does not see which steps a scaler left out.
    """

    def make(*args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        optimizer = adam(*args, **kwargs)
        optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]  # torch sets it in the constructor
        return optimizer

    return make
