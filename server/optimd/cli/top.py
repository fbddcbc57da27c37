"""`optimd top`."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Final

import typer
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from optimd.cli.admin import Admin
from optimd.cli.errors import CommandError
from optimd.cli.figures import duration, megabytes, short
from optimd.cli.target import Target, at_server
from optimd.v1 import admin_pb2

_WORKER_COLUMNS: Final = ("rank", "worker", "pushes", "/s", "lag", "stale", "waits", "heard", "in MB/s", "out MB/s")
_JOB_COLUMNS: Final = ("job", "step", "/s", "workers", "in MB/s", "out MB/s", "memory", "journal")
_MOST_JOBS: Final = 4
_NAME_WIDTH: Final = 16
_WIDTH: Final = 80
_HEIGHT: Final = 24


@dataclass(frozen=True, slots=True)
class Look:
    """A server at one moment."""

    at_s: float
    status: admin_pb2.GetStatusResponse
    jobs: list[admin_pb2.JobSummary]
    shown: admin_pb2.GetJobResponse | None
    """The job whose workers are shown."""


@at_server
def show_top(
    job: Annotated[
        str | None, typer.Argument(help="Whose workers to show. Default: those of the job with the most of them.")
    ] = None,
    *,
    target: Target,
    interval_s: Annotated[float, typer.Option(min=0.1, max=3600, help="How often to look, in seconds.")] = 2.0,
    once: Annotated[
        bool,
        typer.Option("--once", help="Look twice, show what came in between, and end, as where there is no terminal."),
    ] = False,
) -> None:
    """Watch a server's jobs and workers, until Ctrl-C.

    Rates are of the time since the last look. Of a worker: pushes in steps, how many it is ahead of the slowest (lag),
    how stale its gradients were (stale), what share of the time it waits for others (waits), and when it was heard of.
    The one that waits least is the one that the others wait for.
    """
    admin, console = Admin(target), Console()
    before = _look(admin, job)
    if once or not console.is_terminal:
        time.sleep(interval_s)
        # As a terminal would have it, whatever it is written to.
        plain = Console(width=max(_WIDTH, console.width if console.is_terminal else _WIDTH), highlight=False)
        plain.print(frame(target.address, before, _look(admin, job), height=_HEIGHT))
        return
    with Live(console=console, screen=True, auto_refresh=False) as live:
        live.update(frame(target.address, before, before, height=console.height), refresh=True)
        while True:
            try:
                time.sleep(interval_s)
                now = _look(admin, job)
            except KeyboardInterrupt:
                return
            except CommandError as error:
                # It may be being started again.
                live.update(Text(str(error)), refresh=True)
                continue
            live.update(frame(target.address, before, now, height=console.height), refresh=True)
            before = now


def _look(admin: Admin, job: str | None) -> Look:
    status, jobs = admin.status(), admin.jobs()
    name = job or max(jobs, key=lambda each: each.worker_count, default=admin_pb2.JobSummary()).job
    return Look(time.monotonic(), status, jobs, admin.job(name) if name else None)


def frame(address: str, before: Look, now: Look, *, height: int) -> RenderableType:
    """What is shown, in at most `height` lines.

    Args:
        address: The server's.
        before: The look before.
        now: The last look.
        height: How many lines there are.
    """
    seconds = max(now.at_s - before.at_s, 1e-9)
    status = now.status
    # Another process may be there by now.
    busy = max(0.0, status.cpu_s - before.status.cpu_s) / seconds
    head = (
        f"optimd {status.server_version} at {address}, {status.device}, "
        f"{'stopping' if status.draining else 'up'} {duration(status.uptime_s)}\n"
        f"{status.job_count} jobs, {status.worker_count}/{status.max_workers} workers, "
        f"{megabytes(status.resident_bytes)}, {busy:.1f} cores busy"
    )
    jobs = _jobs(before, now, seconds)
    parts: list[RenderableType] = [Text(head), jobs]
    if now.shown is not None:
        # The head's two lines, each table's heading, and a line for what is left out.
        room = height - 2 - 1 - jobs.row_count - 1 - 1
        parts += _workers(before, now.shown, seconds, room=max(1, room))
    return Group(*parts)


def _table(columns: Iterable[str]) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0), expand=False, header_style="bold")
    for column in columns:
        if column in ("job", "worker"):
            table.add_column(column, no_wrap=True, overflow="ellipsis", max_width=_NAME_WIDTH)
        else:
            table.add_column(column, justify="right", no_wrap=True)
    return table


def _jobs(before: Look, now: Look, seconds: float) -> Table:
    table = _table(_JOB_COLUMNS)
    known = {job.job: job for job in before.jobs}
    shown = "" if now.shown is None else now.shown.summary.job
    # The one whose workers are shown first, then the busiest.
    jobs = sorted(now.jobs, key=lambda job: (job.job != shown, -job.worker_count, job.job))
    for job in jobs[:_MOST_JOBS]:
        then = known.get(job.job, job)
        table.add_row(
            escape(job.job),
            str(job.step),
            short(max(0, job.step - then.step) / seconds),
            str(job.worker_count),
            _rate(job.bytes_received, then.bytes_received, seconds),
            _rate(job.bytes_sent, then.bytes_sent, seconds),
            f"{short(job.value_bytes + job.state_bytes)}B",
            f"{short(job.replay_bytes)}B",
        )
    if len(jobs) > _MOST_JOBS:
        table.add_row(f"{len(jobs) - _MOST_JOBS} more", *[""] * (len(_JOB_COLUMNS) - 1))
    return table


def _workers(before: Look, shown: admin_pb2.GetJobResponse, seconds: float, *, room: int) -> list[RenderableType]:
    table = _table(_WORKER_COLUMNS)
    known = (
        {worker.worker.worker_id: worker for worker in before.shown.workers}
        if before.shown is not None and before.shown.summary.job == shown.summary.job
        else {}
    )
    for worker in list(shown.workers)[:room]:
        then = known.get(worker.worker.worker_id, worker)
        if then.worker.incarnation != worker.worker.incarnation or then.waited_s > worker.waited_s:
            # Another process, or another line: it counts from the start.
            then = worker
        table.add_row(
            str(worker.worker.rank),
            escape(worker.worker.worker_id),
            str(worker.pushes),
            short(max(0, worker.pushes - then.pushes) / seconds),
            str(worker.lag),
            str(worker.staleness),
            f"{min(1.0, (worker.waited_s - then.waited_s) / seconds):.0%}",
            _heard(worker),
            _rate(worker.bytes_received, then.bytes_received, seconds),
            _rate(worker.bytes_sent, then.bytes_sent, seconds),
        )
    parts: list[RenderableType] = [table]
    if len(shown.workers) > room:
        parts.append(Text(f"{len(shown.workers) - room} more"))
    return parts


def _heard(worker: admin_pb2.WorkerStatus) -> str:
    if worker.lost:
        return "[red]lost[/red]"
    return f"{worker.silent_s:.1f} s" if worker.connected else "[red]broken[/red]"


def _rate(now: int, before: int, seconds: float) -> str:
    return short(max(0, now - before) / seconds / 1e6)
