"""`optimd bench`."""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from typing import Annotated, Final

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn

from optimd.cli.figures import megabytes, short
from optimd.cli.target import Target, at_server
from optimd.client import Adam

_TENSOR_ELEMENTS: Final = 160_000
"""About what the tensors of a ResNet-50 have, on average."""

_WARMUPS: Final = 2
_ANSWER_TIMEOUT_S: Final = 10.0


class Wire(StrEnum):
    """What gradients and parameters travel in."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


class Transport(StrEnum):
    """How payloads travel."""

    AUTO = "auto"
    GRPC = "grpc"
    SHM = "shm"


@at_server
def bench(
    *,
    target: Target,
    parameters: Annotated[int, typer.Option(min=1, help="How many parameters the model has.")] = 25_000_000,
    steps: Annotated[int, typer.Option(min=1, help="How many steps are timed.")] = 10,
    wire_dtype: Annotated[Wire, typer.Option(help="What gradients and parameters travel in.")] = Wire.FLOAT32,
    transport: Annotated[Transport, typer.Option(help="How they travel.")] = Transport.AUTO,
    as_json: Annotated[bool, typer.Option("--json", help="Write JSON, for a program to read.")] = False,
) -> None:
    """Time a step of a server's Adam from this machine, and of torch's own here.

    In a private job, which is gone afterwards; what else the server does counts in. Gradients are there already: a step
    is theirs to the server, the update, and the parameters back.
    """
    options = target.options(
        rank=0,
        world_size=1,
        wire_dtype=None if wire_dtype is Wire.FLOAT32 else getattr(torch, wire_dtype.value),
        transport=transport.value,
        retry_timeout_s=_ANSWER_TIMEOUT_S,
    )
    model = _model(parameters)
    with (
        _without_job_of_its_own(),
        Adam(model, fused=True, server=target.address, options=options) as optimizer,
    ):
        remote = _times(optimizer.step, model, steps, "the server's Adam", quiet=as_json)
        receipt = optimizer.last_receipt
    local = _times(torch.optim.Adam(model, fused=True).step, model, steps, "torch's own", quiet=as_json)
    moved = 0 if receipt is None else receipt.bytes_sent + receipt.bytes_received
    if as_json:
        typer.echo(
            json.dumps(
                {
                    "parameters": parameters,
                    "wire_dtype": wire_dtype.value,
                    "steps": steps,
                    "step_s": {"median": statistics.median(remote), "fastest": min(remote), "slowest": max(remote)},
                    "local_step_s": {"median": statistics.median(local), "fastest": min(local), "slowest": max(local)},
                    "grpc_bytes_a_step": moved,
                },
                indent=2,
            )
        )
        return
    table = Table("", "median ms", "fastest", "slowest", "parameters/s")
    for name, times in ((f"Adam on {target.address}", remote), ("torch.optim.Adam here", local)):
        figures = (f"{1e3 * value:,.1f}" for value in (statistics.median(times), min(times), max(times)))
        table.add_row(name, *figures, short(parameters / statistics.median(times)))
    console = Console()
    console.print(table)
    ratio = statistics.median(remote) / statistics.median(local)
    console.print(
        f"{ratio:.1f} times a step here; {parameters:,} parameters, {wire_dtype.value} on the wire, "
        f"{megabytes(moved)} a step through gRPC"
    )


@contextmanager
def _without_job_of_its_own() -> Iterator[None]:
    """Has an optimizer without a job's name be private, whatever the environment calls this one's job."""
    name = os.environ.pop("OPTIMD_JOB", None)
    try:
        yield
    finally:
        if name is not None:
            os.environ["OPTIMD_JOB"] = name


def _model(parameters: int) -> list[nn.Parameter]:
    sizes = [_TENSOR_ELEMENTS] * (parameters // _TENSOR_ELEMENTS)
    rest = parameters - sum(sizes)
    return [nn.Parameter(torch.randn(size)) for size in (*sizes, *([rest] if rest else []))]


def _times(step: Callable[[], object], model: list[nn.Parameter], steps: int, name: str, *, quiet: bool) -> list[float]:
    times = []
    rounds = range(_WARMUPS + steps)
    for number in rounds if quiet else track(rounds, name, transient=True):
        for p in model:
            p.grad = torch.full_like(p, 1e-3)
        began = time.perf_counter()
        step()
        if number >= _WARMUPS:
            times.append(time.perf_counter() - began)
    return times
