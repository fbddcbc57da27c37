"""A job's settings: as `ProxyOptions` has them, and as the schema does."""

from __future__ import annotations

from typing import Final, Literal

from optimd.client.exceptions import ConfigurationError
from optimd.client.options import Async, Sync
from optimd.v1 import job_pb2

ON_EXISTING: Final = {
    "resume": job_pb2.ON_EXISTING_RESUME,
    "fail": job_pb2.ON_EXISTING_FAIL,
    "replace": job_pb2.ON_EXISTING_REPLACE,
}
APPLY: Final = {
    "auto": job_pb2.APPLY_MODE_AUTO,
    "streaming": job_pb2.APPLY_MODE_STREAMING,
    "atomic": job_pb2.APPLY_MODE_ATOMIC,
}
NONFINITE: Final = {
    "allow": job_pb2.NON_FINITE_ALLOW,
    "skip": job_pb2.NON_FINITE_SKIP,
    "error": job_pb2.NON_FINITE_ERROR,
}
_REDUCTION: Final = {"mean": job_pb2.REDUCTION_MEAN, "sum": job_pb2.REDUCTION_SUM}
_ON_LOSS: Final = {"shrink": job_pb2.ON_LOSS_SHRINK, "wait": job_pb2.ON_LOSS_WAIT}


def encode_aggregation(aggregation: Sync | Async, world_size: int | None) -> job_pb2.Aggregation:
    """A policy as the schema has it.

    Args:
        aggregation: The policy.
        world_size: How many workers train, if it is synchronous; None where they come and go.

    Raises:
        ConfigurationError: so many workers are too few for it.
    """
    if isinstance(aggregation, Async):
        return job_pb2.Aggregation(
            asynchronous=job_pb2.AsyncAggregation(
                max_staleness=aggregation.max_staleness,
                timeout_s=aggregation.timeout_s,
                join_timeout_s=aggregation.join_timeout_s,
            )
        )
    if aggregation.backup_workers and (world_size is None or aggregation.backup_workers >= world_size):
        raise ConfigurationError(
            f"Sync(backup_workers={aggregation.backup_workers}) leaves no worker of "
            f"{'an elastic job' if world_size is None else world_size} that a step can rely on: it must be less than "
            "world_size, and that a number"
        )
    return job_pb2.Aggregation(
        sync=job_pb2.SyncAggregation(
            world_size=world_size or 0,
            reduction=_REDUCTION[aggregation.reduction],
            timeout_s=aggregation.timeout_s,
            join_timeout_s=aggregation.join_timeout_s,
            backup_workers=aggregation.backup_workers,
            deterministic=aggregation.deterministic,
            on_loss=_ON_LOSS[aggregation.on_loss],
        )
    )


def decode_aggregation(message: job_pb2.Aggregation) -> Sync | Async:
    """The policy that a job has.

    Raises:
        ValueError: this version knows no such policy.
    """
    match message.WhichOneof("policy"):
        case "asynchronous":
            bound = message.asynchronous
            return Async(
                max_staleness=bound.max_staleness if bound.HasField("max_staleness") else None,
                timeout_s=bound.timeout_s,
                join_timeout_s=bound.join_timeout_s,
            )
        case "sync":
            sync = message.sync
            return Sync(
                world_size=sync.world_size or "elastic",
                reduction="sum" if sync.reduction == job_pb2.REDUCTION_SUM else "mean",
                backup_workers=sync.backup_workers,
                deterministic=sync.deterministic,
                on_loss="wait" if sync.on_loss == job_pb2.ON_LOSS_WAIT else "shrink",
                timeout_s=sync.timeout_s,
                join_timeout_s=sync.join_timeout_s,
            )
        case _:
            raise ValueError("it has an aggregation policy that this version does not know")


def decode_apply(number: int) -> Literal["streaming", "atomic"]:
    """When a job applies pushes."""
    return "streaming" if number == job_pb2.APPLY_MODE_STREAMING else "atomic"


def decode_nonfinite(number: int) -> Literal["allow", "skip", "error"]:
    """What a job does about gradients that are not finite."""
    if number == job_pb2.NON_FINITE_SKIP:
        return "skip"
    return "error" if number == job_pb2.NON_FINITE_ERROR else "allow"
