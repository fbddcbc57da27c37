"""`python -m benchmarks`, from the repository's root: measures, prints tables, and writes JSON if asked to."""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks import memory, report, step_time


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Compare optimd with its baselines.")
    parser.add_argument("--quick", action="store_true", help="fewer rounds and a smaller model: under one minute")
    parser.add_argument("--only", choices=("step-time", "memory"), help="leave out the rest")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the figures to a file, too")
    parser.add_argument("--strict", action="store_true", help="exit with status 1 where a memory mark does not hold")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures. Returns the exit status: 0, or 1 where `--strict` was given and a mark does not hold."""
    parser = _parser()
    parsed = parser.parse_args(arguments)
    if parsed.json is not None and not parsed.json.parent.is_dir():
        parser.error(f"--json {parsed.json}: there is no folder {parsed.json.parent}")
    # An exception rather than death, so that the servers are stopped.
    signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))
    print(", ".join(f"{name} {value}" for name, value in report.environment().items()), end="\n\n")
    steps: list[step_time.StepTimes] = []
    peaks: list[memory.MemoryUse] = []
    if parsed.only in (None, "step-time"):
        steps = step_time.measure(step_time.QUICK if parsed.quick else step_time.FULL)
        for times in steps:
            report.show(report.step_time_table(times))
    if parsed.only in (None, "memory"):
        model = memory.QUICK if parsed.quick else memory.FULL
        for workers in (1,) if parsed.quick else (1, 2):
            peaks.append(memory.measure(model, workers))
            report.show(report.memory_table(peaks[-1]))
    if parsed.json is not None:
        parsed.json.write_text(json.dumps(report.as_json(steps, peaks), indent=2) + "\n")
    return 1 if parsed.strict and any(memory.missed(peaks)) else 0


if __name__ == "__main__":
    sys.exit(main())
