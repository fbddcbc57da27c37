"""optimd itself, over each of its transports."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Final, Literal

import torch

from benchmarks import models
from benchmarks.peers.peer import ModelWorker, Setting
from benchmarks.venues import Transport
from optimd.client import Adam, ProxyOptions

_TRANSPORTS: Final = {"shm": "shm", "unix": "Unix socket", "tcp": "TCP"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optimd:
    """A daemon with one torch thread, on the CPU, and workers with torch's fused Adam in its place."""

    transport: Literal["shm", "unix", "tcp"]
    wire: Literal["fp32", "bf16"] = "fp32"
    size: int | None = None
    """How many workers it has, however many the others have."""
    options: tuple[tuple[str, Any], ...] = ()
    """More of `ProxyOptions`."""
    label: str = ""
    """What to call it besides."""
    has_server: bool = False
    """It is a program of its own."""

    @property
    def name(self) -> str:
        """With what it uses."""
        return f"optimd, {_TRANSPORTS[self.transport]}, {self.wire}{self.label}"

    @property
    def bits(self) -> bool:
        """With bf16 on the wire, parameters come back rounded."""
        return self.wire == "fp32" and self.size is None

    @property
    def listens(self) -> Transport:
        """Shared memory's control stream takes the Unix socket."""
        return "tcp" if self.transport == "tcp" else "unix"

    def serve(self, setting: Setting, ready: Callable[[], None]) -> None:
        """It has a program for that."""
        raise NotImplementedError

    def work(self, setting: Setting, rank: int) -> DaemonWorker:
        """A worker of a job that is called as this is."""
        return DaemonWorker(setting, rank, self.name, self.proxy_options(setting, rank))

    def proxy_options(self, setting: Setting, rank: int) -> ProxyOptions:
        """How a worker is connected."""
        more = dict(self.options)
        if self.wire == "bf16":
            more["wire_dtype"] = torch.bfloat16
        return ProxyOptions(
            rank=rank,
            world_size=self.size or setting.workers,
            worker_id=f"worker-{rank}",
            transport="shm" if self.transport == "shm" else "grpc",
            **more,
        )


class DaemonWorker(ModelWorker):
    """A worker of one of the daemon's jobs.

    Args:
        setting: What is trained.
        rank: Its rank.
        job: The job's name.
        options: How it is connected.
    """

    def __init__(self, setting: Setting, rank: int, job: str, options: ProxyOptions) -> None:
        super().__init__(setting, rank)
        self.optimizer = Adam(self.parameters, server=setting.address, job=job, options=options, fused=True)

    def prepare(self, step: int) -> None:
        """Takes the gradients away and computes new ones."""
        self.optimizer.zero_grad(set_to_none=True)
        models.compute_gradients(self.model, step, self._ranks)

    def exchange(self) -> None:
        """A step of the daemon's."""
        self.optimizer.step()

    def close(self) -> None:
        """Leaves the job."""
        self.optimizer.close()
