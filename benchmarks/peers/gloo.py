"""What torch.distributed has on CPUs: a parameter server of sends and receives over gloo, and DDP.

Both as somebody who knows them would write them. The server keeps all parameters in one flat buffer, of which the
model's are views: what is received is where it belongs. It updates tensor by tensor, in one call of the fused kernel,
since neighbours that are fused into one tensor would end with other bits.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import ClassVar, Final

import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from benchmarks import models
from benchmarks.peers.peer import ModelWorker, Setting
from benchmarks.venues import Transport

_TIMEOUT: Final = timedelta(seconds=120)
_SERVER: Final = 0


@dataclass(frozen=True)
class GlooServer:
    """Rank 0 is the server: it receives from all at once, adds up, updates, and sends to all at once."""

    listens: ClassVar[Transport] = "tcp"
    name: str = "gloo send/recv server"
    bits: bool = True
    has_server: bool = True
    size: int | None = None

    def serve(self, setting: Setting, ready: Callable[[], None]) -> None:
        """Serves until the process is killed."""
        ready()
        _join(setting, _SERVER, setting.workers + 1)
        model = models.build(setting.model)
        parameters = list(model.parameters())
        flat = _flatten(parameters)
        received = [torch.empty_like(flat) for _ in range(setting.workers)]
        for parameter, gradient in zip(parameters, _views(received[0], parameters), strict=True):
            parameter.grad = gradient
        optimizer = torch.optim.Adam(parameters, fused=True)
        workers = range(1, setting.workers + 1)
        while True:
            arrivals = [distributed.irecv(buffer, worker) for buffer, worker in zip(received, workers, strict=True)]
            for arrival in arrivals:
                _wait(arrival)
            for other in received[1:]:
                received[0].add_(other)
            if setting.workers > 1:
                received[0].div_(setting.workers)
            optimizer.step()
            for departure in [distributed.isend(flat, worker) for worker in workers]:
                _wait(departure)

    def work(self, setting: Setting, rank: int) -> _GlooWorker:
        """A worker."""
        return _GlooWorker(setting, rank)


class _GlooWorker(ModelWorker):
    def __init__(self, setting: Setting, rank: int) -> None:
        super().__init__(setting, rank)
        _join(setting, rank + 1, setting.workers + 1)
        self._flat = _flatten(self.parameters)
        self._outgoing = torch.empty_like(self._flat)
        self._slots = _views(self._outgoing, self.parameters)

    def exchange(self) -> None:
        torch._foreach_copy_(self._slots, self.gradients())
        distributed.send(self._outgoing, _SERVER)
        distributed.recv(self._flat, _SERVER)


@dataclass(frozen=True)
class Ddp:
    """DistributedDataParallel and a fused Adam in every worker.

    It reduces gradients while the backward runs. Its step is what training takes with it beyond the same backward
    without it: the time of the backward and the update, less that of a backward alone, measured just before.
    """

    listens: ClassVar[Transport] = "tcp"
    name: str = "DDP gloo + local fused Adam"
    bits: bool = True
    has_server: bool = False
    size: int | None = None

    def serve(self, setting: Setting, ready: Callable[[], None]) -> None:
        """There is no server."""
        raise NotImplementedError

    def work(self, setting: Setting, rank: int) -> _DdpWorker:
        """A worker."""
        return _DdpWorker(setting, rank)


class _DdpWorker(ModelWorker):
    def __init__(self, setting: Setting, rank: int) -> None:
        super().__init__(setting, rank)
        _join(setting, rank, setting.workers)
        self._distributed = DistributedDataParallel(self.model, gradient_as_bucket_view=True)
        self._optimizer = torch.optim.Adam(self.parameters, fused=True)
        self._loss: torch.Tensor | None = None
        self._alone_s = 0.0

    def prepare(self, step: int) -> None:
        self.model.zero_grad(set_to_none=True)
        with self._distributed.no_sync():
            self._loss = self._distributed(step, self._ranks)
            start = time.perf_counter()
            torch.autograd.backward(self._loss)
            self._alone_s = time.perf_counter() - start
        self.model.zero_grad(set_to_none=True)
        self._loss = self._distributed(step, self._ranks)

    def step(self) -> float:
        return super().step() - self._alone_s

    def exchange(self) -> None:
        assert self._loss is not None
        torch.autograd.backward(self._loss)
        self._optimizer.step()


def _join(setting: Setting, rank: int, world_size: int) -> None:
    """Waits for all processes of the group."""
    distributed.init_process_group(
        "gloo", init_method=f"tcp://{setting.address}", rank=rank, world_size=world_size, timeout=_TIMEOUT
    )


def _wait(work: distributed.Work | None) -> None:
    assert work is not None
    work.wait()


def _flatten(parameters: Sequence[torch.nn.Parameter]) -> torch.Tensor:
    """One buffer of which the parameters are views from now on."""
    flat = torch.cat([parameter.detach().flatten() for parameter in parameters])
    for parameter, view in zip(parameters, _views(flat, parameters), strict=True):
        parameter.data = view
    return flat


def _views(flat: torch.Tensor, parameters: Sequence[torch.nn.Parameter]) -> list[torch.Tensor]:
    """Views of a flat buffer in the parameters' shapes."""
    parts = torch.split(flat, [parameter.numel() for parameter in parameters])
    return [part.view_as(parameter) for part, parameter in zip(parts, parameters, strict=True)]
