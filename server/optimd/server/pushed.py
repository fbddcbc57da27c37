"""What workers changed outside of a step: values and states to be put in place before the next one is applied."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from optimd.server.aggregation import Worker
from optimd.server.store import StagedState
from optimd.wire.encodings import EXACT


class PushedContent:
    """What the workers of one step pushed besides their gradients. Guarded by its job's lock.

    Workers usually push the same, all having loaded one checkpoint, say: what equals another worker's is held once.
    """

    def __init__(self) -> None:
        self._by_worker: dict[Worker, StagedState] = {}
        self.differing: set[int] = set()
        """The parameters for which workers pushed different values or states."""

    def __bool__(self) -> bool:
        return bool(self._by_worker)

    def bring(self, worker: Worker, staged: StagedState) -> None:
        """Takes one worker's complete content."""
        for other in self._by_worker.values():
            for index, value in staged.values.items():
                if index in other.values:
                    if _same(value, other.values[index]):
                        staged.values[index] = other.values[index]
                    else:
                        self.differing.add(index)
            for index, tensors in staged.tensors.items():
                if index in other.tensors:
                    if staged.steps[index] == other.steps[index] and _all_same(tensors, other.tensors[index]):
                        staged.tensors[index] = other.tensors[index]
                    else:
                        self.differing.add(index)
        self._by_worker[worker] = staged

    def forget(self, worker: Worker) -> None:
        """A worker's push leaves no trace: nor does its content."""
        self._by_worker.pop(worker, None)

    def merged(self) -> tuple[StagedState, dict[int, Worker]]:
        """What is to be put in place: of what several workers pushed, the lowest rank's.

        Returns:
            The content; and by index the parameters whose values are in it, and whose they are.
        """
        merged = StagedState()
        owners: dict[int, Worker] = {}
        for worker in sorted(self._by_worker):
            staged = self._by_worker[worker]
            for index in staged.values.keys() - merged.values.keys():
                merged.values[index] = staged.values[index]
                merged.received_as[index] = staged.received_as.get(index, EXACT)
                owners[index] = worker
            for index in staged.tensors.keys() - merged.tensors.keys():
                merged.steps[index], merged.tensors[index] = staged.steps[index], staged.tensors[index]
        return merged, owners


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two flat tensors have the same bits. A NaN is not equal to itself; its bits are."""
    return torch.equal(one.view(torch.uint8), other.view(torch.uint8))


def _all_same(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(_same(tensor, other[name]) for name, tensor in one.items())
