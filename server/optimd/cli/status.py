"""`optimd status`."""

from __future__ import annotations

from typing import Annotated

import typer
from google.protobuf.json_format import MessageToJson

from optimd.cli.admin import Admin
from optimd.cli.figures import duration, megabytes
from optimd.cli.target import Target, at_server


@at_server
def show_status(
    *,
    target: Target,
    as_json: Annotated[bool, typer.Option("--json", help="Write JSON, for a program to read.")] = False,
) -> None:
    """Show how a server is: since when it runs, what it holds, what it takes.

    The status is 0 if it answers, else 2.
    """
    status = Admin(target).status()
    if as_json:
        text = MessageToJson(status, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)
        typer.echo(text)
        return
    kept = "kept on disk" if status.keeps_jobs else "in memory alone"
    typer.echo(
        f"optimd {status.server_version} at {target.address}, torch {status.torch_version}, device {status.device}\n"
        f"{'stopping' if status.draining else 'up'} for {duration(status.uptime_s)}, "
        f"{megabytes(status.resident_bytes)}, {status.cpu_s:,.0f} s of processor time\n"
        f"{status.job_count} of at most {status.max_jobs} jobs, {kept}; "
        f"{status.worker_count} of at most {status.max_workers} workers"
    )
