"""`optimd jobs`."""

from __future__ import annotations

from typing import Annotated

import typer
from google.protobuf.json_format import MessageToJson
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from optimd.cli.admin import Admin
from optimd.cli.figures import megabytes
from optimd.cli.target import Target, at_server
from optimd.v1 import admin_pb2, job_pb2

_Json = Annotated[bool, typer.Option("--json", help="Write JSON, for a program to read.")]
_Job = Annotated[str, typer.Argument(help="The job's name.")]


@at_server
def list_jobs(*, target: Target, as_json: _Json = False) -> None:
    """List the jobs that a server holds."""
    jobs = Admin(target).jobs()
    if as_json:
        typer.echo(_json(admin_pb2.ListJobsResponse(jobs=jobs)))
        return
    table = Table("job", "step", "workers", "parameters", "values", "state", "device")
    for job in jobs:
        table.add_row(
            escape(job.job),
            str(job.step),
            str(job.worker_count),
            f"{job.element_count:,}",
            megabytes(job.value_bytes),
            megabytes(job.state_bytes),
            job.device,
        )
    Console().print(table if jobs else "no jobs")


@at_server
def show_job(job: _Job, *, target: Target, as_json: _Json = False) -> None:
    """Show one job and the workers in it."""
    answer = Admin(target).job(job)
    if as_json:
        typer.echo(_json(answer))
        return
    summary = answer.summary
    console = Console()
    console.print(
        f"[bold]{escape(summary.job)}[/bold]: step {summary.step}, {summary.element_count:,} parameters in "
        f"{summary.parameter_count} tensors and {answer.bucket_count} buckets on {summary.device}; values "
        f"{megabytes(summary.value_bytes)}, state {megabytes(summary.state_bytes)}; "
        f"{job_pb2.ApplyMode.Name(answer.apply).removeprefix('APPLY_MODE_').lower()} apply, "
        f"{_policy(answer.aggregation)}"
    )
    table = Table("rank", "worker", "steps", "dropped", "lag", "heard", "received", "sent")
    for worker in answer.workers:
        table.add_row(
            str(worker.worker.rank),
            escape(worker.worker.worker_id),
            str(worker.pushes),
            str(worker.dropped),
            str(worker.lag),
            "lost, awaited"
            if worker.lost
            else f"{worker.silent_s:.1f} s ago" + ("" if worker.connected else ", line broken"),
            megabytes(worker.bytes_received),
            megabytes(worker.bytes_sent),
        )
    console.print(table if answer.workers else "no worker is in it")


@at_server
def snapshot_job(job: _Job, *, target: Target) -> None:
    """Have a server write a snapshot of a job to its data dir now. Training goes on meanwhile.

    It is there when this ends, and a server that is started again with that data dir goes on from it. For a file of
    your own, which torch reads, use `optimd export`.
    """
    snapshot = Admin(target).snapshot(job)
    typer.echo(f"job {job} at step {snapshot.step} is in {snapshot.path}: {megabytes(snapshot.nbytes)}")


@at_server
def delete_job(
    job: _Job,
    *,
    target: Target,
    force: Annotated[bool, typer.Option("--force", help="Although workers are in it: their steps fail.")] = False,
) -> None:
    """Drop a job, its parameters and its state. There is no way back."""
    Admin(target).delete(job, force=force)
    typer.echo(f"job {job} is deleted")


@at_server
def evict_worker(
    job: _Job,
    worker: Annotated[str, typer.Argument(help="The worker's worker_id, as `optimd jobs show` has it.")],
    *,
    target: Target,
) -> None:
    """Take a worker out of a job at once, whatever it is doing: the others do not wait for it any more.

    Its optimizer is told so and cannot come back, as long as this server runs. A script that opens another one can:
    stop it first where that is not wanted. What it has not pushed in full is in no step. One that is lost and awaited
    is awaited no more.
    """
    Admin(target).evict(job, worker)
    typer.echo(f"worker {worker} is out of job {job}")


def _policy(aggregation: job_pb2.Aggregation) -> str:
    if aggregation.WhichOneof("policy") == "asynchronous":
        bound = aggregation.asynchronous
        return "asynchronous" + (f", at most {bound.max_staleness} ahead" if bound.HasField("max_staleness") else "")
    sync = aggregation.sync
    return (
        (f"{sync.world_size} synchronous workers" if sync.world_size else "synchronous workers that come and go")
        + (f", {sync.backup_workers} of them backups" if sync.backup_workers else "")
        + (", in order of rank" if sync.deterministic else "")
        + (", lost ones awaited" if sync.on_loss == job_pb2.ON_LOSS_WAIT else "")
    )


def _json(message: admin_pb2.ListJobsResponse | admin_pb2.GetJobResponse) -> str:
    return MessageToJson(message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)
