"""How much memory server and workers take at their peak, each in a process of its own."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final

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

SERVER_MARK: Final = 13
"""The server's mark in bytes a parameter, for one worker."""
WORKER_MARK: Final = 8
"""The worker's mark in bytes a parameter."""
ALLOWANCE_BYTES: Final = 100 * MB
"""What both marks allow beside what grows with the model: messages under way, code, bookkeeping."""

FULL: Final = "decoder-100m"
QUICK: Final = "decoder-10m"
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
    mark_bytes: int | None
    """What it should stay under; None where nothing is asked of it."""

    @property
    def holds(self) -> bool | None:
        """Whether it stays under the mark; None where there is none."""
        return None if self.mark_bytes is None else self.bytes < self.mark_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryUse:
    """The peaks of one run."""

    model: str
    parameters: int
    workers: int
    steps: int
    baseline_bytes: int
    """The peak of a process that has imported torch and grpc and does nothing."""
    peaks: list[Peak]


def measure(model: str, workers: int) -> MemoryUse:
    """Trains `model` with `workers` synchronous workers for `STEPS` steps; with one, with torch's own Adam too. Blocks.

    Args:
        model: One of `models.NAMES`.
        workers: How many; with several, the server holds a sum of gradients besides and has no mark.

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
        reports = _run_workers(server.addresses[0], model, workers)
        server_bytes = peak_bytes(server.pid)
    count = reports[0]["parameters"]

    def peak(role: str, bytes_taken: int, tensors: int, mark: int | None) -> Peak:
        return Peak(
            role=role,
            bytes=bytes_taken - baseline,
            parameters=count,
            tensor_bytes=tensors * count,
            mark_bytes=None if mark is None else mark * count + ALLOWANCE_BYTES,
        )

    if workers == 1:
        local = json.loads(run_program("-m", "benchmarks.worker", *_arguments(model), timeout_s=_TIMEOUT_S))
        peaks = [
            peak("server", server_bytes, _SERVER_TENSORS, SERVER_MARK),
            peak("worker", reports[0]["peak_bytes"], _WORKER_TENSORS, WORKER_MARK),
            peak("torch.optim.Adam, no server", local["peak_bytes"], _LOCAL_TENSORS, None),
        ]
    else:
        peaks = [peak("server", server_bytes, _SERVER_TENSORS + _SERVER_SUM, None)]
        for rank, report in enumerate(reports):
            peaks.append(peak(f"worker {rank}", report["peak_bytes"], _WORKER_TENSORS, WORKER_MARK))
    return MemoryUse(model=model, parameters=count, workers=workers, steps=STEPS, baseline_bytes=baseline, peaks=peaks)


def _arguments(model: str) -> list[str]:
    return [f"--model={model}", f"--steps={STEPS}"]


def _run_workers(address: str, model: str, count: int) -> list[dict[str, int]]:
    """Runs a job's workers side by side. Returns what they report, by rank."""
    options = [*_arguments(model), f"--server={address}", f"--world-size={count}"]
    with ExitStack() as stack:
        processes = [start_program("-m", "benchmarks.worker", *options, f"--rank={rank}") for rank in range(count)]
        for process in processes:
            # If one fails, the others wait for it in vain.
            stack.callback(process.kill)
        return [json.loads(finish(process, timeout_s=_TIMEOUT_S)) for process in processes]


def missed(uses: Sequence[MemoryUse]) -> Iterator[Peak]:
    """The peaks that do not stay under their marks."""
    return (peak for use in uses for peak in use.peaks if peak.holds is False)
