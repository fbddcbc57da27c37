"""What was measured, as tables for people and as JSON for programs."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import grpc
import torch

from benchmarks.journal import MARKS, OFF, SNAPSHOT_STEPS, STEPS, WARMUP_STEPS, JournalTimes
from benchmarks.link import RAW, LinkTimes, OverlapTimes
from benchmarks.marks import Mark
from benchmarks.memory import MB, MemoryUse
from benchmarks.peers import LOCAL, Optimd
from benchmarks.peers.backward import ALONE
from benchmarks.step_time import StepTimes


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
    """One suite's step times."""
    echo_of = {Optimd(transport=transport).name: measured.best_echo(transport) for transport in ("unix", "tcp")}
    rows = []
    for name, times in measured.times.items():
        echo = echo_of.get(name)
        rows.append(
            (
                name,
                f"{times.median_s * 1e3:.2f}",
                f"{times.lower_quartile_s * 1e3:.2f} - {times.upper_quartile_s * 1e3:.2f}",
                _number(measured.ratio(name, LOCAL)),
                _number(measured.ratio(name, echo)) if echo else "",
            )
        )
    runs = next(iter(measured.times.values())).runs
    return Table(
        f"Step time, {_of_model(measured)}, {_workers(measured.workers)}",
        ("", "median ms", "quartiles ms", "/ local", "/ best echo"),
        rows,
        f"{runs} rounds, one thread in each process. {_bits(measured)}",
    )


def link_table(measured: LinkTimes) -> Table:
    """Steps across the slow line."""
    steps = measured.steps
    rows = [
        ("the line's rate, one direction", f"{measured.arithmetic_s * 1e3:.1f}", "", ""),
        *(
            (
                name,
                f"{times.median_s * 1e3:.1f}",
                f"{times.lower_quartile_s * 1e3:.1f} - {times.upper_quartile_s * 1e3:.1f}",
                _number(steps.ratio(name, RAW)),
            )
            for name, times in steps.times.items()
        ),
    ]
    runs = next(iter(steps.times.values())).runs
    return Table(
        f"A line of 1 Gbit/s, {_of_model(steps)}, {_workers(steps.workers)}",
        ("", "median ms", "quartiles ms", "/ one direction"),
        rows,
        f"{runs} rounds. {_bits(steps)}",
    )


def overlap_table(measured: OverlapTimes) -> Table:
    """What overlap saves."""
    alone = measured.times[ALONE].median_s
    rows = [
        (name, f"{times.median_s * 1e3:.1f}", "" if name == ALONE else f"{(times.median_s - alone) * 1e3:.1f}")
        for name, times in measured.times.items()
    ]
    ratio = measured.ratio
    caption = "This optimd has no overlap." if ratio is None else f"With overlap {ratio:.0%} of that without."
    return Table(
        f"A backward about as long as the upload ({measured.upload_s * 1e3:.0f} ms) and a step, 1 Gbit/s",
        ("", "median ms", "beyond the backward"),
        rows,
        caption,
    )


def memory_table(uses: Sequence[MemoryUse]) -> Table:
    """Peaks of all runs."""
    rows = []
    for use in uses:
        for peak in use.peaks:
            where = f"{use.model}, {_workers(use.workers)}, {use.transport}: {peak.role}"
            if peak is use.local:
                where = f"{use.model}: {peak.role}"
            rows.append(
                (
                    where,
                    f"{peak.bytes / MB:,.1f}",
                    f"{peak.bytes / peak.parameters:.2f}",
                    f"{(peak.bytes - peak.tensor_bytes) / MB:,.1f}",
                )
            )
    baseline = uses[0].baseline_bytes / MB
    return Table(
        "Peak memory",
        ("", "MB", "bytes/parameter", "MB beside tensors"),
        rows,
        f"Upload and {uses[0].steps} steps, above the {baseline:.0f} MB of a process that has imported torch and grpc.",
    )


def marks_table(all_marks: Sequence[Mark]) -> Table:
    """What must hold, and whether it does."""
    rows: list[Sequence[str]] = []
    for mark in all_marks:
        digits = 2 if mark.unit == "x" else 0
        unit = "" if mark.unit == "x" else f" {mark.unit}"
        if mark.value is None:
            rows.append((mark.figure, "-", "", "", "not measured"))
            continue
        verdict = "NO" if not mark.holds else "aim" if mark.aimed else "yes"
        limits = (f"{limit:,.{digits}f}{unit}" for limit in (mark.must, mark.aim))
        rows.append((mark.figure, f"{mark.value:,.{digits}f}{unit}", *limits, verdict))
    return Table("Marks", ("", "measured", "must", "aim", "holds"), rows, "Ratios within this run, of medians.")


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _workers(count: int) -> str:
    return "1 worker" if count == 1 else f"{count} workers"


def _of_model(measured: StepTimes) -> str:
    return f"{measured.model} ({measured.parameters:,} parameters in {measured.tensors} tensors)"


def _bits(measured: StepTimes) -> str:
    if measured.differing:
        return f"PARAMETERS DIFFER from the local Adam's: {', '.join(measured.differing)}."
    return "Parameters of all with fp32 on the wire end bit-equal."


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
    steps: Iterable[StepTimes],
    link: LinkTimes | None,
    memory: Iterable[MemoryUse],
    journals: Iterable[JournalTimes],
    all_marks: Iterable[Mark],
) -> dict[str, Any]:
    """All of it as plain values."""
    return {
        "environment": environment(),
        "step_time": [
            asdict(measured) | {"ratio_to_local": {name: measured.ratio(name, LOCAL) for name in measured.times}}
            for measured in steps
        ],
        "link": None if link is None else asdict(link) | {"overlap_ratio": link.overlap.ratio},
        "memory": [asdict(measured) for measured in memory],
        "marks": [asdict(mark) | {"holds": mark.holds, "aimed": mark.aimed} for mark in all_marks],
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


BEGIN: Final = "<!-- figures: what `make bench BENCH_ARGS='--into PATH'` writes -->"
END: Final = "<!-- end of figures -->"


def write_into(path: Path, tables: Iterable[Table]) -> None:
    """Puts tables between the two lines of a Markdown page that say where, in the place of what is there.

    Raises:
        ValueError: there are no such lines.
    """
    page = path.read_text(encoding="utf-8")
    before, begin, rest = page.partition(BEGIN)
    _, end, behind = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{path} has no place for figures: a line {BEGIN} and a line {END}")
    machine = ", ".join(f"{name} {value}" for name, value in environment().items())
    parts = [f"{machine}.", *(_as_markdown(table) for table in tables)]
    path.write_text("\n\n".join([before + begin, *parts, end + behind]), encoding="utf-8")


def _as_markdown(table: Table) -> str:
    lines = [table.columns, ["---", *("---:" for _ in table.columns[1:])], *table.rows]
    drawn = ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join([f"**{table.title}**", "", *drawn, "", table.caption])


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
