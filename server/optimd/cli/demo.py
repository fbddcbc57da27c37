"""`optimd demo`."""

from __future__ import annotations

import os
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import nn

from optimd.cli.admin import Admin
from optimd.cli.digits import BATCH, LEARNING_RATE, Digits, Trained, load_digits, train
from optimd.cli.errors import CommandError
from optimd.cli.figures import megabytes
from optimd.cli.target import Target
from optimd.client import Adam, ProxyOptions
from optimd.client.environment import read_environment
from optimd.v1 import admin_pb2


@dataclass(frozen=True, slots=True)
class _Remote:
    """What is known of the training whose optimizer was on the server."""

    trained: Trained[Adam]
    bytes_sent: int
    bytes_received: int
    job: admin_pb2.JobSummary
    server_pid: int | None


def demo(
    epochs: Annotated[int, typer.Option(min=1, help="How often each image is seen.")] = 15,
    server: Annotated[
        str | None, typer.Option(help="Train with this server, host:port or unix:///path, instead of starting one.")
    ] = None,
) -> None:
    """Train handwritten digits with Adam on a server, then with torch's own Adam, and compare.

    The status is 0 if both reach the same weights, bit for bit, else 1.
    """
    console = Console()
    digits = load_digits()
    # A net this small gains nothing from more, and beside a busy neighbour torch's threads wait for each other.
    torch.set_num_threads(1)
    with _server(server) as (address, pid):
        where = f"process {pid}, " if pid is not None else ""
        console.print(f"The optimizer lives in {where}at {address}; this is process {os.getpid()}.")
        remote = _train_remotely(console, digits, epochs, address, pid)
    local = _train_locally(console, digits, epochs)
    equal = all(
        torch.equal(theirs, ours)
        for theirs, ours in zip(remote.trained.model.parameters(), local.model.parameters(), strict=True)
    )
    console.print(_table(remote, local, equal=equal))
    if not equal:
        raise typer.Exit(1)


@contextmanager
def _server(address: str | None) -> Iterator[tuple[str, int | None]]:
    """The server to train with, and its process where this starts it: a child that listens on a free loopback port."""
    if address is not None:
        yield address, None
        return
    ready, ready_of_child = os.pipe()
    with os.fdopen(ready) as announcement:
        process = subprocess.Popen(  # noqa: S603  # this interpreter, this package
            [
                sys.executable,
                "-m",
                "optimd.server",
                "--address=127.0.0.1:0",
                "--no-health",
                "--log-level=warning",
                f"--ready-fd={ready_of_child}",
            ],
            pass_fds=(ready_of_child,),
        )
        os.close(ready_of_child)
        try:
            bound = announcement.readline().strip()
            if not bound:
                raise CommandError(f"the server did not start (exit status {process.wait()})")
            yield bound, process.pid
        finally:
            process.terminate()
            process.wait()


def _train_remotely(console: Console, digits: Digits, epochs: int, address: str, pid: int | None) -> _Remote:
    name = f"digits-demo-{uuid.uuid4()}"

    def make_optimizer(model: nn.Module) -> Adam:
        options = ProxyOptions(rank=0, world_size=1)
        return Adam(model.parameters(), lr=LEARNING_RATE, server=address, job=name, options=options)

    with _progress(console, "optimd.client.Adam", digits, epochs) as on_step:
        trained = train(digits, epochs, make_optimizer, on_step)
    receipt = trained.optimizer.last_receipt
    if receipt is None:
        raise CommandError("no step was made: there are too few images for a batch")
    # As the optimizer, which finds in the environment what it is let in with.
    told = read_environment()
    admin = Admin(
        Target(address=address, tls=told.tls, token=told.token, token_file=told.token_file, insecure=told.insecure)
    )
    summary = admin.job(name).summary
    trained.optimizer.close()
    admin.delete(name, force=False)
    return _Remote(trained, receipt.bytes_sent, receipt.bytes_received, summary, pid)


def _train_locally(console: Console, digits: Digits, epochs: int) -> Trained[torch.optim.Adam]:
    def make_optimizer(model: nn.Module) -> torch.optim.Adam:
        return torch.optim.Adam(model.parameters(), lr=LEARNING_RATE, fused=True)

    with _progress(console, "torch.optim.Adam", digits, epochs) as on_step:
        return train(digits, epochs, make_optimizer, on_step)


@contextmanager
def _progress(console: Console, title: str, digits: Digits, epochs: int) -> Iterator[Callable[[float], None]]:
    """A progress bar with the loss; gives what to call after each step."""
    columns = (
        TextColumn("{task.description:20}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.4f}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(title, total=epochs * (len(digits.y_train) // BATCH), loss=float("nan"))
        yield lambda loss: bar.update(task, advance=1, loss=loss)


def _table(remote: _Remote, local: Trained[torch.optim.Adam], *, equal: bool) -> Table:
    table = Table("", "optimd.client.Adam", "torch.optim.Adam, fused", title="Handwritten digits")
    table.add_row("test accuracy", f"{remote.trained.accuracy:.2%}", f"{local.accuracy:.2%}")
    table.add_row("final weights", "bit-equal" if equal else "DIFFERENT", "")
    table.add_row(
        "steps a second",
        f"{remote.trained.steps / remote.trained.seconds:,.0f}",
        f"{local.steps / local.seconds:,.0f}",
    )
    table.add_row("bytes sent a step", f"{remote.bytes_sent:,}", "0")
    table.add_row("bytes received a step", f"{remote.bytes_received:,}", "0")
    state = sum(
        tensor.nbytes for entry in local.optimizer.state.values() for name, tensor in entry.items() if name != "step"
    )
    home = f"server process {remote.server_pid}" if remote.server_pid is not None else "the server"
    table.add_row("optimizer state lived in", f"{home}, {remote.job.device}", "this process, cpu")
    table.add_row("its size", megabytes(remote.job.state_bytes), megabytes(state))
    return table
