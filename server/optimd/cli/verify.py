"""`optimd jobs verify`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table

from optimd.cli.figures import megabytes
from optimd.server.verifying import DataDirReport, JobReport, JournalReport, RecoveryReport, SnapshotReport, verify


def verify_jobs(
    data_dir: Annotated[Path, typer.Argument(help="The data dir of a server that is stopped, or a copy of one.")],
    job: Annotated[str | None, typer.Argument(help="The one job to check; all without it.")] = None,
    *,
    as_json: Annotated[bool, typer.Option("--json", help="Write JSON, for a program to read.")] = False,
) -> None:
    """Check what a server keeps on disk, every byte of it, and tell what it would bring back. Changes nothing.

    The status is 0 where all is as it was written, 1 where something is damaged, and 2 where nothing could be checked:
    a server is using the data dir, or there is none.
    """
    report = _verify(data_dir, job)
    if as_json:
        typer.echo(json.dumps(_as_json(report), indent=2))
    else:
        _show(report)
    if not report.is_sound:
        raise typer.Exit(1)


def _verify(data_dir: Path, job: str | None) -> DataDirReport:
    """Shows on a terminal how far it is."""
    console = Console(stderr=True)
    columns = (
        TextColumn("checking"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=None)
        return verify(data_dir, job, on_progress=lambda done, total: progress.update(task, completed=done, total=total))


def _show(report: DataDirReport) -> None:
    console = Console()
    if not report.jobs:
        console.print("no jobs")
        return
    for job in report.jobs:
        _show_job(console, job)
    damaged = [job.job or job.folder for job in report.jobs if not job.is_sound]
    if damaged:
        console.print(f"[bold]damaged:[/bold] {escape(', '.join(damaged))}", soft_wrap=True)
    else:
        console.print("all is as it was written")


def _show_job(console: Console, job: JobReport) -> None:
    name = escape(job.job or job.folder)
    console.print(f"[bold]{name}[/bold] {job.uid}: {_outcome(job)}", soft_wrap=True, highlight=False)
    table = Table("", "steps", "size", "records", "state")
    for snapshot in job.snapshots:
        table.add_row(
            f"snapshot {escape(snapshot.name)}",
            "" if snapshot.step is None else str(snapshot.step),
            megabytes(snapshot.nbytes),
            "",
            _state_of_snapshot(snapshot),
        )
    if job.unfinished_snapshot:
        table.add_row("snapshot", "", "", "", "was being written: the next one takes its place")
    journal = job.journal
    if journal.segments:
        table.add_row(
            f"journal, {journal.segments} segments",
            "" if journal.first_step is None else f"{journal.first_step} - {journal.last_step}",
            megabytes(journal.nbytes),
            f"{journal.records:,}",
            _state_of_journal(journal),
        )
    if table.row_count:
        console.print(table)
    for problem in job.problems:
        console.print(f"[bold]damaged:[/bold] {escape(problem.what)}\n  {problem.remedy}", soft_wrap=True)


def _outcome(job: JobReport) -> str:
    if job.recovery is not None:
        return f"a server goes on from {_recovery(job.recovery)}"
    if not job.was_created:
        return "its creation was never completed: a server removes it"
    return "a server does not start"


def _recovery(recovery: RecoveryReport) -> str:
    source = f"snapshot {recovery.snapshot}" if recovery.snapshot else "the journal alone"
    text = (
        f"step {recovery.step}: {escape(source)} and {recovery.records:,} records ({megabytes(recovery.record_bytes)})"
    )
    for applied, count in recovery.open_steps:
        text += f"; a step is open, {applied} of {count} buckets applied"
    if recovery.discarded_rounds:
        text += f"; {recovery.discarded_rounds} that had not been committed is discarded"
    return text


def _state_of_snapshot(snapshot: SnapshotReport) -> str:
    return "damaged" if snapshot.damage else "not of this version" if snapshot.step is None else "good"


def _state_of_journal(journal: JournalReport) -> str:
    parts = ["damaged" if journal.damage else "good", f"ends at {journal.ends}"]
    if journal.torn_at is not None:
        parts.append(f"what never reached the disk, from {journal.torn_at} on, is cut")
    parts.append("its server stopped in good order" if journal.is_closed else "its server did not stop in good order")
    return ", ".join(parts)


def _as_json(report: DataDirReport) -> dict[str, object]:
    return {
        "data_dir": report.data_dir,
        "sound": report.is_sound,
        "jobs": [asdict(job) | {"sound": job.is_sound} for job in report.jobs],
    }
