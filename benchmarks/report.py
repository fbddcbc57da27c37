"""What was measured, as tables for people and as JSON for programs."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import grpc
import torch

from benchmarks.journal import MARKS, OFF, SNAPSHOT_STEPS, STEPS, WARMUP_STEPS, JournalTimes
from benchmarks.memory import ALLOWANCE_BYTES, MB, SERVER_MARK, WORKER_MARK, MemoryUse
from benchmarks.step_time import LOCAL, TRANSPORTS, StepTimes, echo_over, optimd_over


@dataclass(frozen=True, slots=True)
class Table:
    """A titled table. The first column is text, the others are numbers."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""


def environment() -> dict[str, Any]:
    """What the figures depend on."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "grpcio": grpc.__version__,
        "cores": len(os.sched_getaffinity(0)),
        "load_average": round(os.getloadavg()[0], 2),
    }


def step_time_table(measured: StepTimes) -> Table:
    """One model's step times."""
    echo_of = {optimd_over(transport): echo_over(transport) for transport in TRANSPORTS}
    local = measured.times[LOCAL].median_s
    rows = []
    for name, times in measured.times.items():
        echo = echo_of.get(name)
        rows.append(
            (
                name,
                f"{times.median_s * 1e3:.3f}",
                f"{times.lower_quartile_s * 1e3:.3f} - {times.upper_quartile_s * 1e3:.3f}",
                f"{times.median_s / local:.2f}",
                f"{times.median_s / measured.times[echo].median_s:.2f}" if echo else "",
            )
        )
    runs = measured.times[LOCAL].runs
    outcome = "are bit-equal" if measured.bit_equal else "DIFFER: the optimizers did not do the same work"
    return Table(
        f"Step time, {measured.model}: {measured.parameters:,} parameters in {measured.tensors} tensors",
        ("", "median ms", "quartiles ms", "/ local", "/ raw echo"),
        rows,
        f"{runs} rounds, one thread in each process. Final parameters {outcome}.",
    )


def memory_table(measured: MemoryUse) -> Table:
    """The peaks of one run."""
    rows = [
        (
            peak.role,
            f"{peak.bytes / MB:,.1f}",
            f"{peak.bytes / peak.parameters:.2f}",
            f"{(peak.bytes - peak.tensor_bytes) / MB:,.1f}",
            "" if peak.mark_bytes is None else f"{peak.mark_bytes / MB:,.1f}",
            {True: "yes", False: "NO", None: ""}[peak.holds],
        )
        for peak in measured.peaks
    ]
    workers = "1 worker" if measured.workers == 1 else f"{measured.workers} synchronous workers"
    allowance = f"{ALLOWANCE_BYTES / MB:.0f} MB"
    return Table(
        f"Peak memory, {measured.model}: {measured.parameters:,} parameters, {workers}",
        ("", "MB", "bytes/parameter", "MB beside tensors", "mark MB", "holds"),
        rows,
        f"Upload and {measured.steps} steps, above the {measured.baseline_bytes / MB:.0f} MB of a process that has "
        f"imported torch and grpc.\nMarks: server {SERVER_MARK} bytes/parameter + {allowance} (1 worker), worker "
        f"{WORKER_MARK} bytes/parameter + {allowance}.",
    )


def journal_table(measured: JournalTimes) -> Table:
    """Steps by how the job is kept, and what limits them."""
    off = measured.times[OFF].median_s
    rows = []
    for name, times in (*measured.times.items(), *measured.raw.items()):
        cpu, snapshot = measured.server_cpu_s.get(name), measured.snapshot_s.get(name)
        rows.append(
            (
                name,
                f"{times.median_s * 1e3:.1f}",
                f"{times.lower_quartile_s * 1e3:.1f} - {times.upper_quartile_s * 1e3:.1f}",
                f"{times.median_s / off:.2f}",
                f"{MARKS[name]:.2f}" if name in MARKS else "",
                {True: "yes", False: "NO", None: ""}[measured.holds(name) if name in MARKS else None],
                "" if cpu is None else f"{cpu * 1e3:.0f}",
                "" if snapshot is None else f"{snapshot * 1e3:,.0f}",
            )
        )
    outcome = "are bit-equal" if measured.bit_equal else "DIFFER: the jobs did not do the same work"
    new = sum(measured.new_files.values())
    return Table(
        f"Keeping a job on disk, {measured.model}: {measured.step_bytes / MB:,.0f} MB of gradients a step, on "
        f"{measured.filesystem or 'an unknown file system'}",
        ("", "median ms", "quartiles ms", "/ off", "at most", "holds", "server CPU ms", "snapshot ms"),
        rows,
        f"{measured.times[OFF].runs} turns of {STEPS} steps in a row, by one worker over TCP loopback, one thread in "
        f"each process, behind {WARMUP_STEPS} steps that do not count. Servers take snapshots every {SNAPSHOT_STEPS} "
        "steps, between turns: from then on the journal is written over files that no snapshot needs any more "
        f"({new} new files in what was timed). Below the modes: what one step's bytes take by themselves, bucket by "
        f"bucket. Final parameters {outcome}.",
    )


def as_json(
    steps: Iterable[StepTimes], memory: Iterable[MemoryUse], journals: Iterable[JournalTimes]
) -> dict[str, Any]:
    """All of it as plain values."""
    return {
        "environment": environment(),
        "step_time": [asdict(measured) for measured in steps],
        "memory": [
            asdict(measured) | {"peaks": [asdict(peak) | {"holds": peak.holds} for peak in measured.peaks]}
            for measured in memory
        ],
        "journal": [
            asdict(measured)
            | {
                "modes": {
                    mode: {"ratio": measured.ratio(mode), "mark": MARKS.get(mode), "holds": measured.holds(mode)}
                    for mode in measured.times
                }
            }
            for measured in journals
        ],
    }


def show(table: Table) -> None:
    """Prints a table: with rich where it is installed, else in plain columns."""
    try:
        from rich import box  # noqa: PLC0415  # a worker's install has no rich
        from rich.console import Console  # noqa: PLC0415
        from rich.table import Table as RichTable  # noqa: PLC0415
    except ImportError:
        _show_plainly(table)
        return
    drawn = RichTable(
        title=table.title,
        caption=table.caption,
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
    )
    for index, column in enumerate(table.columns):
        drawn.add_column(column, justify="right" if index else "left", no_wrap=True)
    for row in table.rows:
        drawn.add_row(*row)
    # Where nobody looks on, a file say, lines may be longer than rich would guess.
    Console(width=None if sys.stdout.isatty() else 120).print(drawn)


def _show_plainly(table: Table) -> None:
    lines = [table.columns, *table.rows]
    widths = [max(len(line[index]) for line in lines) for index in range(len(table.columns))]
    print(table.title)
    for line in lines:
        first, *numbers = line
        cells = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(numbers, widths[1:], strict=True))]
        print("  " + "  ".join(cells))
    print(table.caption, end="\n\n")
