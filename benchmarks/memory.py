"""How much memory server and workers take at their peak, each in a process of its own.

The peak is the kernel's: `VmHWM` of /proc/PID/status, less what a process takes that has only imported torch and grpc.
"""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from benchmarks.servers import ROOT, optimd_server, unix_address

MB: Final = 1_000_000
SERVER_BYTES_PER_PARAMETER: Final = 13
"""The server's mark: values and two moments in fp32 make 12."""
WORKER_BYTES_PER_PARAMETER: Final = 8
"""The worker's mark: parameters and gradients in fp32."""
ALLOWANCE_BYTES: Final = 100 * MB
"""What both marks allow beside what grows with the model: messages under way, code, bookkeeping."""

FULL: Final = "decoder-100m"
QUICK: Final = "decoder-10m"
STEPS: Final = 4
_WORKER_TIMEOUT_S: Final = 300.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Peak:
    """The highest resident set of one process over the upload and some steps, less the baseline."""

    role: str
    bytes: int
    parameters: int
    mark_bytes_per_parameter: int | None
    """None where there is no mark."""

    @property
    def mark_bytes(self) -> int | None:
        """What it should stay under."""
        if self.mark_bytes_per_parameter is None:
            return None
        return self.mark_bytes_per_parameter * self.parameters + ALLOWANCE_BYTES

    @property
    def holds(self) -> bool:
        """Whether it does."""
        return self.mark_bytes is None or self.bytes < self.mark_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryUse:
    """The peaks of one run."""

    model: str
    parameters: int
    workers: int
    steps: int
    baseline_bytes: int
    peaks: list[Peak]


def measure(model: str, workers: int) -> MemoryUse:
    """Trains `model` with `workers` synchronous workers for `STEPS` steps. Blocks.

    Args:
        model: One of `models.NAMES`.
        workers: How many; with one, the marks apply.

    Raises:
        RuntimeError: a worker failed; what it said is on stderr.
    """
    baseline = _baseline_bytes()
    with (
        tempfile.TemporaryDirectory(prefix="optimd-bench-") as folder,
        optimd_server(unix_address(Path(folder), "optimd")) as server,
    ):
        reset_peak(server.pid)
        reports = _run_workers(server.addresses[0], model, workers)
        server_bytes = peak_bytes(server.pid)
    count = reports[0]["parameters"]
    marked = workers == 1
    peaks = [
        Peak(
            role="server",
            bytes=server_bytes - baseline,
            parameters=count,
            mark_bytes_per_parameter=SERVER_BYTES_PER_PARAMETER if marked else None,
        ),
        *(
            Peak(
                role="worker" if marked else f"worker {rank}",
                bytes=report["peak_bytes"] - baseline,
                parameters=count,
                mark_bytes_per_parameter=WORKER_BYTES_PER_PARAMETER,
            )
            for rank, report in enumerate(reports)
        ),
    ]
    return MemoryUse(model=model, parameters=count, workers=workers, steps=STEPS, baseline_bytes=baseline, peaks=peaks)


def peak_bytes(pid: int | str) -> int:
    """The highest resident set of a process since its start, or since `reset_peak`.

    Args:
        pid: Its id, or "self".
    """
    return _parse_peak(Path(f"/proc/{pid}/status").read_text())


def reset_peak(pid: int | str) -> None:
    """Has the peak count from now on, where the system permits it; else it goes on counting from the start."""
    with contextlib.suppress(OSError):
        Path(f"/proc/{pid}/clear_refs").write_text("5")


def _parse_peak(status: str) -> int:
    found = re.search(r"^VmHWM:\s+(\d+) kB$", status, re.MULTILINE)
    if found is None:
        raise RuntimeError("the system does not say what a process took at its peak (no VmHWM in /proc/PID/status)")
    return int(found[1]) * 1024


def _baseline_bytes() -> int:
    """What a process takes that has imported torch and grpc and does nothing."""
    program = "import grpc, torch; print(open('/proc/self/status').read())"
    status = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout
    return _parse_peak(status)


def _run_workers(address: str, model: str, count: int) -> Sequence[dict[str, int]]:
    """Runs a job's workers side by side. Returns what they report, by rank."""
    processes = [
        subprocess.Popen(
            [
                sys.executable,
                "-m",
                "benchmarks.worker",
                f"--server={address}",
                f"--model={model}",
                f"--steps={STEPS}",
                f"--rank={rank}",
                f"--world-size={count}",
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        for rank in range(count)
    ]
    try:
        outputs = [process.communicate(timeout=_WORKER_TIMEOUT_S)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    failed = [rank for rank, process in enumerate(processes) if process.returncode]
    if failed:
        raise RuntimeError(f"rank {', '.join(map(str, failed))} failed")
    return [json.loads(output) for output in outputs]
