"""The commands, put together."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from importlib.metadata import version
from typing import ParamSpec

import grpc
import torch
import typer

from optimd.cli import jobs
from optimd.cli.bench import bench
from optimd.cli.demo import demo
from optimd.cli.errors import CommandError
from optimd.cli.exporting import export_job
from optimd.cli.importing import import_job
from optimd.cli.serve import serve
from optimd.cli.status import show_status
from optimd.cli.top import show_top
from optimd.cli.verify import verify_jobs
from optimd.client import OptimdError
from optimd.server import ConfigurationError

P = ParamSpec("P")

app = typer.Typer(
    help="An optimizer daemon: torch.optim.Adam as a service. `optimd serve` starts it, `optimd demo` shows it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _in_one_sentence(command: Callable[P, None]) -> Callable[P, None]:
    """Ends with a sentence and status 2 where the user or the environment is at fault, without a traceback."""

    @wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except (CommandError, ConfigurationError, OptimdError) as error:
            typer.echo(f"optimd: {error}", err=True)
            sys.exit(2)

    return wrapped


@app.command(name="version")
def show_version() -> None:
    """Show the versions of optimd and of what it stands on."""
    typer.echo(f"optimd {version('optimd')}, torch {torch.__version__}, grpcio {grpc.__version__}")


app.command()(_in_one_sentence(serve))
app.command()(_in_one_sentence(demo))
app.command(name="status")(_in_one_sentence(show_status))
app.command(name="top")(_in_one_sentence(show_top))
app.command()(_in_one_sentence(bench))
app.command(name="export")(_in_one_sentence(export_job))
app.command(name="import")(_in_one_sentence(import_job))

_jobs = typer.Typer(
    help="Look at a server's jobs, have them written to disk, check what is there, and drop them.", no_args_is_help=True
)
_jobs.command(name="list")(_in_one_sentence(jobs.list_jobs))
_jobs.command(name="show")(_in_one_sentence(jobs.show_job))
_jobs.command(name="snapshot")(_in_one_sentence(jobs.snapshot_job))
_jobs.command(name="evict")(_in_one_sentence(jobs.evict_worker))
_jobs.command(name="verify")(_in_one_sentence(verify_jobs))
_jobs.command(name="delete")(_in_one_sentence(jobs.delete_job))
app.add_typer(_jobs, name="jobs")
