"""What must hold, what is aimed at, and what was measured.

Marks are ratios within one run: of what takes turns, so that a machine's moods are in both. In a `--quick` run they are
those of a smaller model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

from benchmarks.link import RAW, LinkTimes
from benchmarks.memory import MB, MemoryUse
from benchmarks.peers import LOCAL, GlooServer, Optimd, RpcServer
from benchmarks.step_time import MIDDLE, ONE_WORKER, QUICK_MIDDLE, SMALL, StepTimes

_SHM: Final = Optimd(transport="shm").name
_UNIX: Final = Optimd(transport="unix").name
_TCP: Final = Optimd(transport="tcp").name
_TCP_BF16: Final = Optimd(transport="tcp", wire="bf16").name
_MODELS: Final = (MIDDLE, QUICK_MIDDLE)
_MANY: Final = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """One figure: the smaller, the better."""

    figure: str
    must: float
    aim: float
    value: float | None
    """What was measured; None where it was not."""
    unit: Literal["x", "MB"] = "x"

    @property
    def holds(self) -> bool | None:
        """Whether it is at most what it must be; None where it was not measured."""
        return None if self.value is None else self.value <= self.must

    @property
    def aimed(self) -> bool | None:
        """Whether it is at most what is aimed at; None where it was not measured."""
        return None if self.value is None else self.value <= self.aim


def marks(steps: Sequence[StepTimes], link: LinkTimes | None, memory: Sequence[MemoryUse]) -> list[Mark]:
    """All marks.

    Args:
        steps: Step times on one host.
        link: Those across a slow line; None where there were none.
        memory: Peaks.
    """
    alone = _find(steps, _MODELS, 1)
    echo = None if alone is None else alone.best_echo("tcp")
    return [
        _ratio("shm step / local fused Adam step", 2.0, 1.3, alone, _SHM, LOCAL),
        _ratio("shm step / gloo parameter server", 0.5, 0.3, alone, _SHM, GlooServer().name),
        _ratio("TCP fp32 step / raw grpcio echo", 1.5, 1.2, alone, _TCP, echo),
        _ratio("TCP bf16 step / torch RPC server over TCP, fp32", 1.5, 1.0, alone, _TCP_BF16, RpcServer().name),
        _ratio("TCP bf16 step / TCP fp32 step", 0.85, 0.65, alone, _TCP_BF16, _TCP),
        _small(_find(steps, (SMALL,), 1)),
        *_line(link),
        *(_server_memory(memory, workers, transport) for workers in (1, _MANY) for transport in ("grpc", "shm")),
        _worker_memory(memory),
        _per_byte(_find(steps, _MODELS, _MANY)),
    ]


def _ratio(figure: str, must: float, aim: float, times: StepTimes | None, name: str, base: str | None) -> Mark:
    value = None if times is None or base is None else times.ratio(name, base)
    return Mark(figure=figure, must=must, aim=aim, value=value)


def _find(steps: Sequence[StepTimes], models: Sequence[str], workers: int) -> StepTimes | None:
    return next((times for times in steps if times.model in models and times.workers == workers), None)


def _small(times: StepTimes | None) -> Mark:
    echo = None if times is None else times.best_echo("unix")
    return _ratio("1e4 parameters, Unix socket: step / raw round trip", 2.0, 1.5, times, _UNIX, echo)


def _line(link: LinkTimes | None) -> list[Mark]:
    steps = None if link is None else link.steps
    overlap = None if link is None else link.overlap.ratio
    return [
        _ratio("1 Gbit/s, fp32: step / larger direction on the line", 1.15, 1.05, steps, _TCP, RAW),
        Mark(figure="1 Gbit/s: beyond the backward, overlap / without", must=0.65, aim=0.55, value=overlap),
    ]


def _server_memory(memory: Sequence[MemoryUse], workers: int, transport: str) -> Mark:
    must, allowed, aim, aimed = (13, 100 * MB, 12.5, 64 * MB) if workers == 1 else (17, 150 * MB, 16.5, 64 * MB)
    use = _peaks(memory, workers, transport)
    parameters = 0 if use is None else use.parameters
    return Mark(
        figure=f"server memory, {workers} worker{'s' * (workers > 1)}, {transport}",
        must=(must * parameters + allowed) / MB,
        aim=(aim * parameters + aimed) / MB,
        value=None if use is None else use.server.bytes / MB,
        unit="MB",
    )


def _worker_memory(memory: Sequence[MemoryUse]) -> Mark:
    use = _peaks(memory, 1, "grpc")
    beyond = None if use is None else max(peak.bytes - peak.tensor_bytes for peak in use.workers_peaks) / MB
    return Mark(figure="worker memory beyond its tensors, grpc", must=64, aim=48, value=beyond, unit="MB")


def _peaks(memory: Sequence[MemoryUse], workers: int, transport: str) -> MemoryUse | None:
    found = [use for use in memory if use.workers == workers and use.transport == transport and use.model in _MODELS]
    return found[0] if found else None


def _per_byte(times: StepTimes | None) -> Mark:
    """Each worker moves as many bytes: four of them move four times what one does."""
    ratio = None if times is None else times.ratio(_TCP, f"{_TCP}{ONE_WORKER}")
    value = None if ratio is None else ratio / _MANY
    return Mark(figure="4 workers against 1, TCP: step time per byte", must=1.2, aim=1.0, value=value)
