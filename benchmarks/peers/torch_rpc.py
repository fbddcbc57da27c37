"""A parameter server with torch.distributed.rpc (TensorPipe), as in PyTorch's tutorial on batched RPCs.

Workers hand their gradients over in one call each; tensors travel beside the pickled message, not in it. The call of
the last worker makes the step, and its result answers all (`async_execution`). Over TCP, as between hosts.
https://docs.pytorch.org/tutorials/intermediate/rpc_async_execution.html
"""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Final

import torch
from torch.distributed import rpc

from benchmarks import models
from benchmarks.peers.peer import ModelWorker, Setting
from benchmarks.venues import Transport

_SERVER: Final = "server"
_TIMEOUT_S: Final = 120.0


@dataclass(frozen=True)
class RpcServer:
    """The server and its workers."""

    listens: ClassVar[Transport] = "tcp"
    name: str = "torch.distributed.rpc server, TCP"
    bits: bool = True
    has_server: bool = True
    size: int | None = None

    def serve(self, setting: Setting, ready: Callable[[], None]) -> None:
        """Serves until the process is killed."""
        ready()
        _Parameters.only = _Parameters(setting)
        _join(setting, _SERVER, 0)
        while True:
            time.sleep(_TIMEOUT_S)

    def work(self, setting: Setting, rank: int) -> _RpcWorker:
        """A worker."""
        return _RpcWorker(setting, rank)


class _RpcWorker(ModelWorker):
    def __init__(self, setting: Setting, rank: int) -> None:
        super().__init__(setting, rank)
        _join(setting, f"worker{rank}", rank + 1)

    def exchange(self) -> None:
        values = rpc.rpc_sync(_SERVER, _Parameters.push, args=(self.gradients(),))
        with torch.no_grad():
            torch._foreach_copy_([*self.parameters], values)


class _Parameters:
    """What the server has."""

    only: ClassVar[_Parameters]

    def __init__(self, setting: Setting) -> None:
        self._workers = setting.workers
        self._parameters = list(models.build(setting.model).parameters())
        self._optimizer = torch.optim.Adam(self._parameters, fused=True)
        self._lock = threading.Lock()
        self._sum: list[torch.Tensor] = []  # guarded by self._lock
        self._count = 0  # guarded by self._lock
        self._answer = torch.futures.Future[list[torch.Tensor]]()  # guarded by self._lock

    @staticmethod
    @rpc.functions.async_execution  # type: ignore[untyped-decorator]  # torch has no types for it
    def push(gradients: list[torch.Tensor]) -> torch.futures.Future[list[torch.Tensor]]:
        """Adds one worker's gradients. The future has the new parameters, once all workers have pushed theirs."""
        return _Parameters.only.add(gradients)

    def add(self, gradients: list[torch.Tensor]) -> torch.futures.Future[list[torch.Tensor]]:
        """See `push`."""
        with self._lock:
            answer = self._answer
            if self._count:
                torch._foreach_add_(self._sum, gradients)
            else:
                self._sum = gradients
            self._count += 1
            if self._count < self._workers:
                return answer
            if self._workers > 1:
                torch._foreach_div_(self._sum, self._workers)
            for parameter, gradient in zip(self._parameters, self._sum, strict=True):
                parameter.grad = gradient
            self._optimizer.step()
            self._optimizer.zero_grad(set_to_none=True)
            self._sum, self._count, self._answer = [], 0, torch.futures.Future()
        # Nobody pushes again before all have this answer: the parameters may travel as they are.
        answer.set_result([parameter.detach() for parameter in self._parameters])
        return answer


def _join(setting: Setting, name: str, rank: int) -> None:
    """Waits for all processes of the group."""
    options = rpc.TensorPipeRpcBackendOptions(
        init_method=f"tcp://{setting.address}",
        rpc_timeout=_TIMEOUT_S,
        # What it chooses between hosts; on one it would take shared memory.
        _transports=["uv"],
        _channels=["mpt_uv", "basic"],
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rpc.init_rpc(  # type: ignore[no-untyped-call]  # as above
            name, rank=rank, world_size=setting.workers + 1, rpc_backend_options=options
        )
