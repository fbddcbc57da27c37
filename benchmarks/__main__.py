"""`python -m benchmarks`, from the repository's root: measures, prints tables, and writes JSON if asked to."""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks import journal, memory, report, step_time


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Compare optimd with its baselines.")
    parser.add_argument("--quick", action="store_true", help="fewer rounds and smaller models: a minute or two")
    parser.add_argument("--only", choices=("step-time", "memory", "journal"), help="leave out the rest")
    parser.add_argument(
        "--folder", type=Path, help="where to keep jobs on disk (default: the system's folder for temporary files)"
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the figures to a file, too")
    parser.add_argument("--strict", action="store_true", help="exit with status 1 where a mark does not hold")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures. Returns the exit status: 0, or 1 where `--strict` was given and a mark does not hold."""
    parser = _parser()
    parsed = parser.parse_args(arguments)
    if parsed.json is not None and not parsed.json.parent.is_dir():
        parser.error(f"--json {parsed.json}: there is no folder {parsed.json.parent}")
    if parsed.folder is not None and not parsed.folder.is_dir():
        parser.error(f"--folder {parsed.folder}: there is no such folder")
    # An exception rather than death, so that the servers are stopped.
    signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))
    print(", ".join(f"{name} {value}" for name, value in report.environment().items()), end="\n\n")
    steps: list[step_time.StepTimes] = []
    peaks: list[memory.MemoryUse] = []
    journals: list[journal.JournalTimes] = []
    if parsed.only in (None, "step-time"):
        steps = step_time.measure(step_time.QUICK if parsed.quick else step_time.FULL)
        for times in steps:
            report.show(report.step_time_table(times))
    if parsed.only in (None, "memory"):
        model = memory.QUICK if parsed.quick else memory.FULL
        for workers in (1,) if parsed.quick else (1, 2):
            peaks.append(memory.measure(model, workers))
            report.show(report.memory_table(peaks[-1]))
    if parsed.only in (None, "journal"):
        journals.append(journal.measure(journal.QUICK if parsed.quick else journal.FULL, parsed.folder))
        report.show(report.journal_table(journals[-1]))
    if parsed.json is not None:
        parsed.json.write_text(json.dumps(report.as_json(steps, peaks, journals), indent=2) + "\n")
    missed = any(memory.missed(peaks)) or any(measured.missed for measured in journals)
    return 1 if parsed.strict and missed else 0


if __name__ == "__main__":
    sys.exit(main())
