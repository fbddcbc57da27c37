"""Copies between host and device that go on while something else is done.

On a CUDA device they go through page-locked buffers, which the device reads and writes by itself, and on two streams of
their own, one for each direction: so what comes in, what is computed and what goes out are under way at once, and
events, not the host, make the one wait for the other. What is computed is on the current stream. On the CPU nothing is
copied.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Final

import torch

_SLOTS: Final = 4
"""How many copies of each direction may be under way. Each holds a page-locked buffer as large as its largest copy."""


class Transfers:
    """Copies of one thread at a time.

    Args:
        device: The device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._is_cuda = device.type == "cuda"
        self._up, self._down = _Buffers(), _Buffers()

    def to_device(self, flat: torch.Tensor) -> torch.Tensor:
        """A flat CPU tensor on the device: complete for what the current stream does from now on. Does not wait.

        On the CPU it is the tensor itself.
        """
        if not self._is_cuda or not flat.numel():
            return flat.to(self._device)
        stream, _ = _streams(self._device)
        pinned, event = self._up.next(flat)
        pinned.copy_(flat)
        with torch.cuda.stream(stream):
            there = pinned.to(self._device, non_blocking=True)
            event.record(stream)
        computing = torch.cuda.current_stream(self._device)
        computing.wait_event(event)
        # The memory is the copying stream's: not to be used again while the other one reads it.
        there.record_stream(computing)
        return there

    def to_host(self, flat: torch.Tensor) -> Callable[[], torch.Tensor]:
        """Begins to copy a flat tensor of the device to the host, as the current stream leaves it. Does not wait.

        Returns:
            Waits, and gives the copy: to be read before `_SLOTS - 1` other copies are begun, and not to be written to.
            Until it has been called the tensor must not be written to.
        """
        if not self._is_cuda or not flat.numel():
            return flat.cpu
        _, stream = _streams(self._device)
        pinned, event = self._down.next(flat)
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            pinned.copy_(flat, non_blocking=True)
            event.record(stream)
        flat.record_stream(stream)

        def finish() -> torch.Tensor:
            event.synchronize()
            return pinned

        return finish


class _Buffers:
    """Page-locked buffers, used in turn."""

    def __init__(self) -> None:
        self._slots: list[tuple[torch.Tensor, torch.cuda.Event]] = []
        self._next = 0

    def next(self, flat: torch.Tensor) -> tuple[torch.Tensor, torch.cuda.Event]:
        """A buffer of a tensor's type and length that no copy is using any more, and the event that will say so."""
        nbytes = flat.numel() * flat.element_size()
        if len(self._slots) < _SLOTS:
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch's
            self._slots.append((_pinned(nbytes), event))
            buffer = self._slots[-1][0]
        else:
            buffer, event = self._slots[self._next]
            event.synchronize()
            if buffer.numel() < nbytes:
                buffer = _pinned(nbytes)
                self._slots[self._next] = buffer, event
            self._next = (self._next + 1) % _SLOTS
        return buffer[:nbytes].view(flat.dtype), event


def _pinned(nbytes: int) -> torch.Tensor:
    return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)


@functools.lru_cache
def _streams(device: torch.device) -> tuple[torch.cuda.Stream, torch.cuda.Stream]:
    """The streams of a device that copy to it and from it: one of each for the whole process."""
    return torch.cuda.Stream(device), torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch's
