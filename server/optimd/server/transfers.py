"""Copies between host and device that go on while something else is done.

On a CUDA device they go through page-locked buffers, which the device reads and writes by itself, on the current
stream: what is computed there afterwards sees them. On the CPU nothing is copied.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch

_SLOTS: Final = 4
"""How many copies may be under way. Each holds a page-locked buffer as large as the largest that it has had."""


class Transfers:
    """Copies of one thread at a time.

    Args:
        device: The device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._is_cuda = device.type == "cuda"
        self._buffers: list[torch.Tensor] = []
        self._events: list[torch.cuda.Event] = []
        self._next = 0

    def to_device(self, flat: torch.Tensor) -> torch.Tensor:
        """A flat CPU tensor on the device: complete for what the current stream does from now on. Does not wait.

        On the CPU it is the tensor itself.
        """
        if not self._is_cuda or not flat.numel():
            return flat.to(self._device)
        slot, pinned = self._slot(flat)
        pinned.copy_(flat)
        there = pinned.to(self._device, non_blocking=True)
        self._events[slot].record()
        return there

    def to_host(self, flat: torch.Tensor) -> Callable[[], torch.Tensor]:
        """Begins to copy a flat tensor of the device to the host. Does not wait.

        Returns:
            Waits, and gives the copy: to be read before `_SLOTS - 1` other copies are begun, and not to be written to.
        """
        if not self._is_cuda or not flat.numel():
            return flat.cpu
        slot, pinned = self._slot(flat)
        pinned.copy_(flat, non_blocking=True)
        event = self._events[slot]
        event.record()

        def finish() -> torch.Tensor:
            event.synchronize()
            return pinned

        return finish

    def _slot(self, flat: torch.Tensor) -> tuple[int, torch.Tensor]:
        """A buffer of the tensor's type and length that no copy is using any more."""
        if len(self._buffers) < _SLOTS:
            self._buffers.append(torch.empty(0, dtype=torch.uint8, pin_memory=True))
            self._events.append(torch.cuda.Event())  # type: ignore[no-untyped-call]  # torch's
        slot = self._next % len(self._buffers) if len(self._buffers) == _SLOTS else len(self._buffers) - 1
        self._next = slot + 1
        self._events[slot].synchronize()
        nbytes = flat.numel() * flat.element_size()
        if self._buffers[slot].numel() < nbytes:
            self._buffers[slot] = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
        return slot, self._buffers[slot][:nbytes].view(flat.dtype)
