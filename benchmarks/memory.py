"""How much memory server and workers take at their peak, each in a process of its own."""

from __future__ import annotations

import json
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from benchmarks.peers import LOCAL
from benchmarks.processes import (
    finish,
    optimd_server,
    parse_peak,
    peak_bytes,
    reset_peak,
    run_program,
    start_program,
    unix_address,
)

MB: Final = 1_000_000

# Bytes a parameter that no implementation can do without, in fp32.
_WORKER_TENSORS: Final = 8  # the parameter and its gradient
_SERVER_TENSORS: Final = 12  # the parameter and two moments
_SERVER_SUM: Final = 4  # the sum of several workers' gradients
_LOCAL_TENSORS: Final = 16  # all of the above in one process


@dataclass(frozen=True, slots=True)
class Crew:
    """Who trains what."""

    model: str
    workers: int
    transport: str
    """As `ProxyOptions.transport` says."""


FULL: Final = (
    Crew("resnet50-26m", 1, "grpc"),
    Crew("resnet50-26m", 1, "shm"),
    Crew("resnet50-26m", 4, "grpc"),
    Crew("resnet50-26m", 4, "shm"),
    Crew("decoder-100m", 1, "grpc"),
)
QUICK: Final = (Crew("decoder-10m", 1, "grpc"), Crew("decoder-10m", 1, "shm"))
STEPS: Final = 4
_TIMEOUT_S: Final = 300.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Peak:
    """The highest resident set of one process over the upload and some steps, less the baseline."""

    role: str
    bytes: int
    parameters: int
    tensor_bytes: int
    """What its tensors take."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryUse:
    """The peaks of one run."""

    model: str
    parameters: int
    workers: int
    transport: str
    steps: int
    baseline_bytes: int
    """The peak of a process that has imported torch and grpc and does nothing."""
    server: Peak
    workers_peaks: list[Peak]
    local: Peak | None
    """A process with torch's own Adam, where one worker was measured."""

    @property
    def peaks(self) -> list[Peak]:
        """All of them."""
        return [self.server, *self.workers_peaks, *([] if self.local is None else [self.local])]


def measure(crew: Crew) -> MemoryUse:
    """Trains with synchronous workers for `STEPS` steps over a Unix socket. Blocks.

    One alone is compared with torch's own Adam.

    Raises:
        subprocess.SubprocessError: a process failed; what it said is on stderr.
    """
    baseline = parse_peak(
        run_program("-c", "import grpc, torch; print(open('/proc/self/status').read())", timeout_s=_TIMEOUT_S)
    )
    with (
        tempfile.TemporaryDirectory(prefix="optimd-bench-") as folder,
        optimd_server(unix_address(Path(folder), "optimd")) as server,
    ):
        reset_peak(server.pid)
        reports = _run_workers(server.addresses[0], crew)
        server_bytes = peak_bytes(server.pid)
    count = reports[0]["parameters"]

    def peak(role: str, bytes_taken: int, tensors: int) -> Peak:
        return Peak(role=role, bytes=bytes_taken - baseline, parameters=count, tensor_bytes=tensors * count)

    local = None
    if crew.workers == 1:
        report = json.loads(run_program("-m", "benchmarks.worker", *_arguments(crew), timeout_s=_TIMEOUT_S))
        local = peak(LOCAL, report["peak_bytes"], _LOCAL_TENSORS)
    return MemoryUse(
        model=crew.model,
        parameters=count,
        workers=crew.workers,
        transport=crew.transport,
        steps=STEPS,
        baseline_bytes=baseline,
        server=peak("server", server_bytes, _SERVER_TENSORS + _SERVER_SUM * (crew.workers > 1)),
        workers_peaks=[
            peak(f"worker {rank}", report["peak_bytes"], _WORKER_TENSORS) for rank, report in enumerate(reports)
        ],
        local=local,
    )


def _arguments(crew: Crew) -> list[str]:
    return [f"--model={crew.model}", f"--steps={STEPS}"]


def _run_workers(address: str, crew: Crew) -> list[dict[str, int]]:
    """Runs a job's workers side by side. Returns what they report, by rank."""
    count = crew.workers
    options = [*_arguments(crew), f"--server={address}", f"--world-size={count}", f"--transport={crew.transport}"]
    with ExitStack() as stack:
        processes = [start_program("-m", "benchmarks.worker", *options, f"--rank={rank}") for rank in range(count)]
        for process in processes:
            # If one fails, the others wait for it in vain.
            stack.callback(process.kill)
        return [json.loads(finish(process, timeout_s=_TIMEOUT_S)) for process in processes]
