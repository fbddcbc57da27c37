"""`optimd serve`."""

from __future__ import annotations

from typing import Annotated

import typer

from optimd.cli.logs import LogFormat, LogLevel, configure
from optimd.server import Server, ServerConfig, run

_DEFAULTS = ServerConfig()


def serve(
    address: Annotated[str, typer.Option(help=ServerConfig.help_of("address"))] = _DEFAULTS.address,
    device: Annotated[str, typer.Option(help=ServerConfig.help_of("device"))] = _DEFAULTS.device,
    threads: Annotated[int, typer.Option(help=ServerConfig.help_of("threads"))] = _DEFAULTS.threads,
    max_workers: Annotated[int, typer.Option(help=ServerConfig.help_of("max_workers"))] = _DEFAULTS.max_workers,
    max_job_workers: Annotated[
        int, typer.Option(help=ServerConfig.help_of("max_job_workers"))
    ] = _DEFAULTS.max_job_workers,
    lease_s: Annotated[float, typer.Option(help=ServerConfig.help_of("lease_s"))] = _DEFAULTS.lease_s,
    max_jobs: Annotated[int, typer.Option(help=ServerConfig.help_of("max_jobs"))] = _DEFAULTS.max_jobs,
    max_job_bytes: Annotated[int, typer.Option(help=ServerConfig.help_of("max_job_bytes"))] = _DEFAULTS.max_job_bytes,
    insecure: Annotated[bool, typer.Option(help=ServerConfig.help_of("insecure"))] = _DEFAULTS.insecure,
    data_dir: Annotated[str, typer.Option(help=ServerConfig.help_of("data_dir"))] = _DEFAULTS.data_dir,
    durability: Annotated[str, typer.Option(help=ServerConfig.help_of("durability"))] = _DEFAULTS.durability,
    fsync: Annotated[str, typer.Option(help=ServerConfig.help_of("fsync"))] = _DEFAULTS.fsync,
    fsync_interval_s: Annotated[
        float, typer.Option(help=ServerConfig.help_of("fsync_interval_s"))
    ] = _DEFAULTS.fsync_interval_s,
    snapshot_steps: Annotated[
        int, typer.Option(help=ServerConfig.help_of("snapshot_steps"))
    ] = _DEFAULTS.snapshot_steps,
    snapshot_s: Annotated[float, typer.Option(help=ServerConfig.help_of("snapshot_s"))] = _DEFAULTS.snapshot_s,
    snapshots_kept: Annotated[
        int, typer.Option(help=ServerConfig.help_of("snapshots_kept"))
    ] = _DEFAULTS.snapshots_kept,
    journal_max_bytes: Annotated[
        int, typer.Option(help=ServerConfig.help_of("journal_max_bytes"))
    ] = _DEFAULTS.journal_max_bytes,
    journal_segment_bytes: Annotated[
        int, typer.Option(help=ServerConfig.help_of("journal_segment_bytes"))
    ] = _DEFAULTS.journal_segment_bytes,
    accept_loss: Annotated[bool, typer.Option(help=ServerConfig.help_of("accept_loss"))] = _DEFAULTS.accept_loss,
    drain_timeout_s: Annotated[
        float, typer.Option(help=ServerConfig.help_of("drain_timeout_s"))
    ] = _DEFAULTS.drain_timeout_s,
    shared_memory: Annotated[bool, typer.Option(help=ServerConfig.help_of("shared_memory"))] = _DEFAULTS.shared_memory,
    health: Annotated[bool, typer.Option(help=ServerConfig.help_of("health"))] = _DEFAULTS.health,
    log_level: Annotated[LogLevel, typer.Option(help="Log from this level on.")] = LogLevel.INFO,
    log_format: Annotated[
        LogFormat, typer.Option(help="Log lines for a person, or JSON for a collector.")
    ] = LogFormat.CONSOLE,
) -> None:
    """Hold training jobs' parameters and optimizer state, and step them, until SIGTERM or SIGINT.

    With --data-dir jobs outlive the server, whatever becomes of it; without, they end with it. A first signal waits for
    open steps, a second one does not.
    """
    config = ServerConfig(
        address=address,
        device=device,
        threads=threads,
        max_workers=max_workers,
        max_job_workers=max_job_workers,
        lease_s=lease_s,
        max_jobs=max_jobs,
        max_job_bytes=max_job_bytes,
        insecure=insecure,
        data_dir=data_dir,
        durability=durability,
        fsync=fsync,
        fsync_interval_s=fsync_interval_s,
        snapshot_steps=snapshot_steps,
        snapshot_s=snapshot_s,
        snapshots_kept=snapshots_kept,
        journal_max_bytes=journal_max_bytes,
        journal_segment_bytes=journal_segment_bytes,
        accept_loss=accept_loss,
        drain_timeout_s=drain_timeout_s,
        shared_memory=shared_memory,
        health=health,
    )
    configure(log_format, log_level)
    run(config, on_ready=_announce)


def _announce(server: Server) -> None:
    typer.echo(f"optimd is ready: pass server={server.address!r} to the optimizers of your workers")
