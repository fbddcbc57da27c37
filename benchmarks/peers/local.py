"""The baseline: torch's own fused Adam, in the worker's process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Final

import torch

from benchmarks.peers.peer import ModelWorker, Setting

LOCAL: Final = "torch.optim.Adam(fused=True)"


@dataclass(frozen=True)
class Local:
    """No server and no line. For several workers, one process that has the mean of their gradients."""

    listens: ClassVar[None] = None
    name: str = LOCAL
    bits: bool = True
    has_server: bool = False
    size: int | None = 1

    def serve(self, setting: Setting, ready: Callable[[], None]) -> None:
        """There is no server."""
        raise NotImplementedError

    def work(self, setting: Setting, rank: int) -> _LocalWorker:
        """The one worker."""
        assert rank == 0
        return _LocalWorker(setting)


class _LocalWorker(ModelWorker):
    def __init__(self, setting: Setting) -> None:
        super().__init__(setting, *range(setting.workers))
        self._optimizer = torch.optim.Adam(self.parameters, fused=True)

    def exchange(self) -> None:
        self._optimizer.step()
