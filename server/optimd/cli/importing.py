"""`optimd import`."""

from __future__ import annotations

import dataclasses
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Final, Literal

import typer

from optimd.cli.admin import Admin
from optimd.cli.checkpointfiles import read_checkpoint
from optimd.cli.errors import CommandError
from optimd.cli.target import Target, at_server
from optimd.client import Async, ProxyOptions, Sync
from optimd.client.wholejob import create_job

_WORKER_ID: Final = "optimd-import"
_ANSWER_TIMEOUT_S: Final = 10.0


class Policy(StrEnum):
    """How pushes become steps."""

    SYNC = "sync"
    ASYNC = "async"


class Apply(StrEnum):
    """When a push is applied."""

    AUTO = "auto"
    STREAMING = "streaming"
    ATOMIC = "atomic"


@at_server
def import_job(
    file: Annotated[Path, typer.Argument(help="What `optimd export` has written: a .pt or .safetensors file.")],
    job: Annotated[
        str | None, typer.Option(help="The new job's name. Default: the name of the one in the file.")
    ] = None,
    *,
    target: Target,
    world_size: Annotated[
        str | None, typer.Option(help='How many workers are to train synchronously, or "elastic". Default: as it was.')
    ] = None,
    aggregation: Annotated[Policy | None, typer.Option(help="How pushes become steps. Default: as it was.")] = None,
    max_staleness: Annotated[
        int | None, typer.Option(min=0, help="How far asynchronous workers may be ahead. Default: as it was.")
    ] = None,
    apply: Annotated[
        Apply | None,
        typer.Option(help="When a push is applied. Default: as it was, or auto if the options above say otherwise."),
    ] = None,
) -> None:
    """Create a job from a checkpoint file, for workers to join.

    It has the file's parameters, Adam's state, hyperparameters and buffers, and the settings of the job that the file
    is of, but for what the options say otherwise. Workers that open it (Adam(..., job=NAME)) with parameters of the
    same shapes and dtypes, and with these settings, are given all of it and go on. Start them when this has ended.

    The new job begins at step 0: opt.job_step and opt.next_sequence count from there, and opt.resumed is False. The
    parameters keep step counters of their own, which Adam's bias correction reads: these are the file's.

    The job is there with all of it, or not at all if this is interrupted.
    """
    admin = Admin(target)
    present = {summary.job for summary in admin.jobs()}
    name, whole = read_checkpoint(file)
    name = job or name
    if name in present:
        raise CommandError(
            f"job {name} exists on {target.address}: choose another name with --job, or drop it with `optimd jobs "
            "delete`"
        )
    options = _override(whole.options, world_size, aggregation, max_staleness, apply)
    create_job(
        target.address,
        name,
        dataclasses.replace(whole, options=options),
        worker_id=_WORKER_ID,
        retry_timeout_s=_ANSWER_TIMEOUT_S,
        credentials=target.credentials,
    )
    state = f"the state of {len(whole.entries)}" if whole.entries else "no state"
    typer.echo(
        f"job {name} begins with {len(whole.parameters)} parameters, {state}, and {len(whole.buffers)} buffers of "
        f"step {whole.step}; {_awaited(options)}"
    )


def _override(
    recorded: ProxyOptions,
    world_size: str | None,
    aggregation: Policy | None,
    max_staleness: int | None,
    apply: Apply | None,
) -> ProxyOptions:
    """The settings of the file with what the command line says otherwise.

    Raises:
        CommandError: the command line contradicts itself, or a number is none.
        ConfigurationError: so many workers do not go with the rest.
    """
    policy = recorded.aggregation
    is_async = aggregation is Policy.ASYNC if aggregation is not None else isinstance(policy, Async)
    timeout_s, join_timeout_s = policy.timeout_s, policy.join_timeout_s
    changed: Sync | Async
    if is_async:
        if world_size is not None:
            raise CommandError("an asynchronous job waits for no number of workers: leave out --world-size")
        changed = policy if isinstance(policy, Async) else Async(timeout_s=timeout_s, join_timeout_s=join_timeout_s)
        if max_staleness is not None:
            changed = dataclasses.replace(changed, max_staleness=max_staleness)
    else:
        if max_staleness is not None:
            raise CommandError("--max-staleness is of an asynchronous job: add --aggregation async, or leave it out")
        alone = Sync(world_size=1, timeout_s=timeout_s, join_timeout_s=join_timeout_s)
        changed = policy if isinstance(policy, Sync) else alone
        if world_size is not None:
            changed = dataclasses.replace(changed, world_size=_count(world_size))
    if apply is None:
        # What was right for one policy need not be for another.
        mode: Literal["auto", "streaming", "atomic"] = recorded.apply if changed == policy else "auto"
    else:
        mode = apply.value
    return dataclasses.replace(recorded, aggregation=changed, apply=mode)


def _count(text: str) -> int | Literal["elastic"]:
    if text == "elastic":
        return "elastic"
    if not text.isdecimal() or not 0 < int(text) < 2**32:
        raise CommandError(f'--world-size {text}: a number of workers is needed, or "elastic"')
    return int(text)


def _awaited(options: ProxyOptions) -> str:
    """What the job's steps wait for."""
    policy = options.aggregation
    if isinstance(policy, Async):
        return "its workers are asynchronous"
    if policy.world_size == "elastic":
        return "its workers come and go"
    return f"it waits for {policy.world_size} worker{'' if policy.world_size == 1 else 's'}"
