"""`python -m benchmarks`, from the repository's root: measures, prints tables, and writes what it is asked to."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import torch

from benchmarks import chart, journal, link, memory, report, step_time
from benchmarks.marks import marks
from benchmarks.namespaces import LinkUnavailableError
from benchmarks.venues import one_host

_PARTS: Final = ("step-time", "link", "memory", "journal")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Compare optimd with its peers.")
    parser.add_argument("--quick", action="store_true", help="fewer rounds and smaller models: about a minute")
    parser.add_argument(
        "--only", nargs="+", choices=_PARTS, default=_PARTS, help="leave out the rest, and the marks that need it"
    )
    parser.add_argument(
        "--device",
        default="cpu",
        help="where models and servers keep their tensors (default: cpu). On another one only optimd's step times are "
        "measured, beside a local optimizer's",
    )
    parser.add_argument(
        "--folder", type=Path, help="where to keep jobs on disk (default: the system's folder for temporary files)"
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the figures to a file, too")
    parser.add_argument("--chart", type=Path, metavar="PATH", help="draw step times into a PNG (needs matplotlib)")
    parser.add_argument("--into", type=Path, metavar="PATH", help="replace the figures of a Markdown page")
    parser.add_argument("--strict", action="store_true", help="exit with status 1 where a mark does not hold")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures. Returns the exit status: 0, or 1 where `--strict` was given and a mark does not hold."""
    parser = _parser()
    parsed = parser.parse_args(arguments)
    for path in (parsed.json, parsed.chart, parsed.into):
        if path is not None and not path.parent.is_dir():
            parser.error(f"{path}: there is no folder {path.parent}")
    if parsed.folder is not None and not parsed.folder.is_dir():
        parser.error(f"--folder {parsed.folder}: there is no such folder")
    if parsed.device != "cpu":
        parsed.only = ["step-time"]
    # An exception rather than death, so that the servers are stopped.
    signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))
    # For the children: with threads of their own for every process they would wait for each other, and torch's process
    # groups would warn of namespaces without names.
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"
    torch.set_num_threads(1)
    print(", ".join(f"{name} {value}" for name, value in report.environment().items()), end="\n\n")
    return _measure(parsed)


def _suites(parsed: argparse.Namespace) -> Sequence[step_time.Suite]:
    if parsed.device != "cpu":
        return step_time.ON_DEVICE
    return step_time.QUICK if parsed.quick else step_time.FULL


def _measure(parsed: argparse.Namespace) -> int:
    tables: list[report.Table] = []

    def show(table: report.Table) -> None:
        tables.append(table)
        report.show(table)

    steps: list[step_time.StepTimes] = []
    slow: link.LinkTimes | None = None
    peaks: list[memory.MemoryUse] = []
    journals: list[journal.JournalTimes] = []
    if "step-time" in parsed.only:
        with one_host(parsed.device) as venue:
            for suite in _suites(parsed):
                steps.append(step_time.measure(suite, venue))
                show(report.step_time_table(steps[-1]))
    if "link" in parsed.only:
        try:
            slow = link.run(link.QUICK if parsed.quick else link.FULL)
        except LinkUnavailableError as error:
            print(f"Left out: the line of 1 Gbit/s between two network namespaces. {error}.", end="\n\n")
        else:
            show(report.link_table(slow))
            show(report.overlap_table(slow.overlap))
    if "memory" in parsed.only:
        peaks = [memory.measure(crew) for crew in (memory.QUICK if parsed.quick else memory.FULL)]
        show(report.memory_table(peaks))
    if "journal" in parsed.only:
        journals.append(journal.measure(journal.QUICK if parsed.quick else journal.FULL, parsed.folder))
        show(report.journal_table(journals[-1]))
    all_marks = marks(steps, slow, peaks) if parsed.device == "cpu" else []
    if [*parsed.only] != ["journal"] and all_marks:
        show(report.marks_table(all_marks))
    if parsed.json is not None:
        figures = report.as_json(steps, slow, peaks, journals, all_marks)
        parsed.json.write_text(json.dumps(figures, indent=2) + "\n")
    if parsed.chart is not None:
        chart.draw(parsed.chart, steps)
    if parsed.into is not None:
        report.write_into(parsed.into, tables)
    differing = [name for measured in steps for name in measured.differing]
    if differing:
        print(f"Parameters differ from the local Adam's: {', '.join(differing)}.", file=sys.stderr)
    missed = (
        bool(differing)
        or any(mark.holds is False for mark in all_marks)
        or any(measured.missed for measured in journals)
    )
    return 1 if parsed.strict and missed else 0


if __name__ == "__main__":
    sys.exit(main())
