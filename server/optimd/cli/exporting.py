"""`optimd export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from optimd.cli.admin import Admin
from optimd.cli.checkpoint import to_checkpoint
from optimd.cli.checkpointfiles import check_target, write_checkpoint
from optimd.cli.figures import megabytes
from optimd.cli.progress import transfer
from optimd.cli.target import Target, at_server
from optimd.client.connection import Connection
from optimd.client.wholejob import WholeJob, read_job


@at_server
def export_job(
    job: Annotated[str, typer.Argument(help="The job's name.")],
    path: Annotated[Path, typer.Argument(help="The file to write: out.pt or out.safetensors. The name says its form.")],
    *,
    target: Target,
    force: Annotated[bool, typer.Option("--force", help="Replace the file if it is there.")] = False,
) -> None:
    """Write a job to a checkpoint file: its parameters, Adam's state, its hyperparameters and its buffers.

    It is the job as it stands between two steps: training waits while it is read, not while it is written. The file is
    there when all of it is on the disk.

    out.pt is a dict that torch.load(path, weights_only=True) reads. Its "optimizer" loads into torch.optim.Adam or
    AdamW (load_state_dict), which goes on from there as the job would; "parameters" and "buffers" have a module's names
    if the optimizer was made from model.named_parameters(), else parameters go by their indices; "step" and "settings"
    are the job's. out.safetensors has the same: tensors named parameters.NAME, optimizer.INDEX.KEY and buffers.NAME,
    all else as JSON in its metadata.

    A parameter is written in its own dtype. Where the job keeps it in a wider master dtype, that is the master weight
    rounded, and its state is in the master dtype.
    """
    check_target(path, force=force)
    # Says in one sentence that there is no such server or job.
    Admin(target).job(job)
    connection = Connection(target.address, credentials=target.credentials)
    try:
        with transfer(f"reading {job}") as on_progress:
            whole = read_job(connection, job, on_progress=on_progress)
    finally:
        connection.close()
    total, done = tensor_bytes(whole), 0
    with transfer(f"writing {path.name}") as on_progress:

        def on_bytes(nbytes: int) -> None:
            nonlocal done
            done += nbytes
            on_progress(done, max(done, total))

        write_checkpoint(to_checkpoint(job, whole), path, on_bytes=on_bytes)
    typer.echo(f"job {job} at step {whole.step} is in {path}: {len(whole.parameters)} parameters, {megabytes(total)}")


def tensor_bytes(whole: WholeJob) -> int:
    """What the tensors of a job take, in bytes."""
    states = (tensor for entry in whole.entries.values() for tensor in entry.tensors.values())
    return sum(tensor.nbytes for tensor in (*whole.values.values(), *states, *whole.buffers.values()))
