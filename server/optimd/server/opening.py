"""What a worker brings when it opens a job or adds a param group, checked."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from optimd.server import update
from optimd.server.errors import InvalidFieldError, LimitExceededError, UnsupportedError
from optimd.server.settings import PARAMETER_OVERHEAD_BYTES, JobSettings
from optimd.v1 import job_pb2
from optimd.wire.layout import Parameter, decode_parameter
from optimd.wire.limits import DEFAULT_BUCKET_BYTES, MAX_BUCKET_BYTES, MAX_NAME_BYTES, MIN_BUCKET_BYTES
from optimd.wire.param_groups import decode_group, rule_of

NONFINITE: Final[dict[int, Literal["allow", "skip", "error"]]] = {
    job_pb2.NON_FINITE_UNSPECIFIED: "allow",
    job_pb2.NON_FINITE_ALLOW: "allow",
    job_pb2.NON_FINITE_SKIP: "skip",
    job_pb2.NON_FINITE_ERROR: "error",
}
"""What the schema's values mean."""

_ON_LOSS: Final[dict[int, Literal["shrink", "wait"]]] = {
    job_pb2.ON_LOSS_UNSPECIFIED: "shrink",
    job_pb2.ON_LOSS_SHRINK: "shrink",
    job_pb2.ON_LOSS_WAIT: "wait",
}


@dataclass(slots=True)
class WorkerLayout:
    """Param groups and their parameters, in order of index."""

    groups: list[dict[str, Any]] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    """How many parameters each group has."""
    parameters: list[Parameter] = field(default_factory=list)
    carried: list[tuple[int, int]] = field(default_factory=list)
    """Of a replacement: which parameters keep the state of which of the job's, by index."""
    page_bytes: int = 0
    """What the pages that it came in took."""

    @property
    def nbytes(self) -> int:
        """What it takes on a server once every parameter has had an update, with what keeps account of it."""
        total = self.page_bytes + PARAMETER_OVERHEAD_BYTES * len(self.parameters)
        start = 0
        for group, size in zip(self.groups, self.sizes, strict=True):
            copies = 1 + len(update.state_names(group))
            total += copies * sum(parameter.nbytes for parameter in self.parameters[start : start + size])
            start += size
        return total


@dataclass(frozen=True, slots=True, kw_only=True)
class Opening:
    """What `OpenJob` says."""

    job: str
    worker_id: str
    rank: int | None
    """None where the server is to choose it."""
    incarnation: int
    on_existing: job_pb2.OnExisting
    settings: JobSettings
    returns_at_step: int | None = None
    """Of a process that has been in the job: the job step that its parameters are of."""
    returns_with_sequence: int = 0
    """Of such a process: the number of its next push, as it has been told."""
    follows_rewind: bool = False
    """Whether such a process takes the job as it is, though it may not be as far as that."""


def check_names(message: job_pb2.OpenJob) -> None:
    """Checks what an `OpenJob` is told apart from others by, before anything else is done with it.

    Raises:
        InvalidFieldError: a name is missing, too long, or has what no name may have.
    """
    _name("OpenJob.job", message.job)
    _name("WorkerIdentity.worker_id", message.worker.worker_id)


def read_opening(message: job_pb2.OpenJob, *, payloads_are_short: bool = False) -> Opening:
    """Checks an `OpenJob`.

    Args:
        message: The message.
        payloads_are_short: Whether little of a bucket travels in messages: it goes through shared memory, or narrowed
            both ways.

    Raises:
        InvalidFieldError: a field is missing or out of range; it is named.
        UnsupportedError: the aggregation policy is not one of this server's.
    """
    job = _name("OpenJob.job", message.job)
    worker_id = _name("WorkerIdentity.worker_id", message.worker.worker_id)
    rank = message.worker.rank if message.worker.HasField("rank") else None
    policy = read_policy(message.aggregation, rank)
    if message.on_existing not in (
        job_pb2.ON_EXISTING_RESUME,
        job_pb2.ON_EXISTING_FAIL,
        job_pb2.ON_EXISTING_REPLACE,
    ):
        raise InvalidFieldError("OpenJob.on_existing", "must be resume, fail or replace")
    if message.apply not in (
        job_pb2.APPLY_MODE_AUTO,
        job_pb2.APPLY_MODE_STREAMING,
        job_pb2.APPLY_MODE_ATOMIC,
    ):
        raise InvalidFieldError("OpenJob.apply", "must be auto, streaming or atomic")
    max_grad_norm = message.max_grad_norm if message.HasField("max_grad_norm") else None
    if max_grad_norm is not None and not max_grad_norm > 0:
        raise InvalidFieldError("OpenJob.max_grad_norm", f"{max_grad_norm} is not a positive number")
    nonfinite = NONFINITE.get(message.nonfinite)
    if nonfinite is None:
        raise InvalidFieldError("OpenJob.nonfinite", "must be allow, skip or error")
    whole = "max_grad_norm or nonfinite" if max_grad_norm is not None or nonfinite != "allow" else policy.whole
    if whole and message.apply == job_pb2.APPLY_MODE_STREAMING:
        raise InvalidFieldError("OpenJob.apply", f"must not be streaming where {whole} looks at a whole step")
    # What a bucket costs hardly depends on its size, but messages take memory in proportion to it, a dozen times in
    # each process: as much as a message can carry only where these are short.
    default_bytes = MAX_BUCKET_BYTES if payloads_are_short else DEFAULT_BUCKET_BYTES
    bucket_bytes = message.bucket_bytes or default_bytes
    if not MIN_BUCKET_BYTES <= bucket_bytes <= MAX_BUCKET_BYTES:
        raise InvalidFieldError(
            "OpenJob.bucket_bytes", f"{bucket_bytes} is not between {MIN_BUCKET_BYTES} and {MAX_BUCKET_BYTES}"
        )
    streams = message.apply == job_pb2.APPLY_MODE_STREAMING or (
        message.apply == job_pb2.APPLY_MODE_AUTO and not whole and (policy.is_async or policy.world_size == 1)
    )
    return Opening(
        job=job,
        worker_id=worker_id,
        rank=rank,
        incarnation=message.worker.incarnation,
        on_existing=message.on_existing,
        settings=JobSettings(
            **policy.settings,
            apply="streaming" if streams else "atomic",
            bucket_bytes=bucket_bytes,
            private=message.private,
            max_grad_norm=max_grad_norm,
            nonfinite=nonfinite,
        ),
        returns_at_step=message.returns_at_step if message.HasField("returns_at_step") else None,
        returns_with_sequence=message.returns_with_sequence,
        follows_rewind=message.follows_rewind,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """An aggregation policy."""

    settings: dict[str, Any]
    """What `JobSettings` is told of it."""
    whole: str = ""
    """What of it looks at a whole step before anything is applied."""

    @property
    def is_async(self) -> bool:
        """Whether each push is a step of its own."""
        return bool(self.settings["aggregation"] == "async")

    @property
    def world_size(self) -> int | None:
        """How many workers the first step waits for; None for whoever is there."""
        size: int | None = self.settings["world_size"]
        return size


def read_policy(message: job_pb2.Aggregation, rank: int | None = None) -> Policy:
    """Checks a policy.

    Args:
        message: The policy.
        rank: The rank of the worker that asks for it, if it has one.

    Raises:
        InvalidFieldError: a field is out of range; it is named.
        UnsupportedError: this server has no such policy.
    """
    match message.WhichOneof("policy"):
        case "sync":
            return _read_sync(message.sync, rank)
        case "asynchronous":
            return _read_async(message.asynchronous)
        case _:
            raise UnsupportedError("the aggregation policy is not one that this server has: sync or asynchronous")


def _read_sync(sync: job_pb2.SyncAggregation, rank: int | None) -> Policy:
    world_size = sync.world_size or None
    if world_size is not None and rank is not None and rank >= world_size:
        raise InvalidFieldError("WorkerIdentity.rank", f"{rank} is not below world_size {world_size}")
    _check_times("SyncAggregation", sync)
    if sync.reduction not in (job_pb2.REDUCTION_MEAN, job_pb2.REDUCTION_SUM):
        raise InvalidFieldError("SyncAggregation.reduction", "must be mean or sum")
    if sync.backup_workers and (world_size is None or sync.backup_workers >= world_size):
        raise InvalidFieldError(
            "SyncAggregation.backup_workers", f"{sync.backup_workers} is not below world_size {sync.world_size}"
        )
    on_loss = _ON_LOSS.get(sync.on_loss)
    if on_loss is None:
        raise InvalidFieldError("SyncAggregation.on_loss", "must be shrink or wait")
    return Policy(
        settings={
            "aggregation": "sync",
            "world_size": world_size,
            "reduction": "mean" if sync.reduction == job_pb2.REDUCTION_MEAN else "sum",
            "backup_workers": sync.backup_workers,
            "deterministic": sync.deterministic,
            "on_loss": on_loss,
            "timeout_s": sync.timeout_s,
            "join_timeout_s": sync.join_timeout_s,
        },
        whole="backup_workers" if sync.backup_workers else "on_loss" if on_loss == "wait" else "",
    )


def _read_async(message: job_pb2.AsyncAggregation) -> Policy:
    _check_times("AsyncAggregation", message)
    return Policy(
        settings={
            "aggregation": "async",
            "world_size": None,
            "max_staleness": message.max_staleness if message.HasField("max_staleness") else None,
            "timeout_s": message.timeout_s,
            "join_timeout_s": message.join_timeout_s,
        }
    )


def encode_aggregation(settings: JobSettings) -> job_pb2.Aggregation:
    """A job's policy as the schema has it."""
    if settings.is_async:
        return job_pb2.Aggregation(
            asynchronous=job_pb2.AsyncAggregation(
                max_staleness=settings.max_staleness,
                timeout_s=settings.timeout_s,
                join_timeout_s=settings.join_timeout_s,
            )
        )
    return job_pb2.Aggregation(
        sync=job_pb2.SyncAggregation(
            world_size=settings.world_size or 0,
            reduction=job_pb2.REDUCTION_MEAN if settings.reduction == "mean" else job_pb2.REDUCTION_SUM,
            timeout_s=settings.timeout_s,
            join_timeout_s=settings.join_timeout_s,
            backup_workers=settings.backup_workers,
            deterministic=settings.deterministic,
            on_loss=job_pb2.ON_LOSS_WAIT if settings.on_loss == "wait" else job_pb2.ON_LOSS_SHRINK,
        )
    )


def encode_apply(settings: JobSettings) -> job_pb2.ApplyMode:
    """When a job applies pushes, as the schema has it."""
    return job_pb2.APPLY_MODE_STREAMING if settings.apply == "streaming" else job_pb2.APPLY_MODE_ATOMIC


def encode_nonfinite(settings: JobSettings) -> job_pb2.NonFinite:
    """What a job does about gradients that are not finite, as the schema has it."""
    if settings.nonfinite == "allow":
        return job_pb2.NON_FINITE_ALLOW
    return job_pb2.NON_FINITE_SKIP if settings.nonfinite == "skip" else job_pb2.NON_FINITE_ERROR


def _check_times(kind: str, message: job_pb2.SyncAggregation | job_pb2.AsyncAggregation) -> None:
    for name in ("timeout_s", "join_timeout_s"):
        if not 0 < getattr(message, name) <= threading.TIMEOUT_MAX:
            raise InvalidFieldError(f"{kind}.{name}", "must be a positive number of seconds")


def read_layout(pages: Iterable[job_pb2.LayoutPage], *, max_bytes: int, first_group: int = 0) -> WorkerLayout:
    """Checks a layout, page by page, before memory is taken for what it describes.

    Args:
        pages: The pages, up to and including the last.
        max_bytes: The most that values and state of the layout may take.
        first_group: The index that the first group is to have.

    Raises:
        InvalidFieldError: a group or a parameter is malformed; it is named.
        LimitExceededError: the layout is larger than `max_bytes`.
        UnsupportedError: a group has options of an update rule that this server does not have.
    """
    layout = WorkerLayout()
    claimed = 0
    for page in pages:
        layout.page_bytes += page.ByteSize()
        claimed += page.ByteSize() + PARAMETER_OVERHEAD_BYTES * len(page.parameters)
        layout.carried += [(carried.parameter, carried.carried_from) for carried in page.carried]
        for group in page.groups:
            if rule_of(group) != update.RULE:
                raise UnsupportedError(
                    f"param group {group.index} has options of rule {rule_of(group)}; this server has {update.RULE}"
                )
            if group.index != first_group + len(layout.groups):
                raise InvalidFieldError("ParamGroup.index", f"{group.index} is not the next")
            try:
                layout.groups.append(decode_group(group))
            except ValueError as error:
                raise InvalidFieldError("ParamGroup", str(error)) from error
            layout.sizes.append(group.parameter_count)
        for spec in page.parameters:
            try:
                parameter = decode_parameter(spec)
            except ValueError as error:
                raise InvalidFieldError(f"LayoutPage.parameters[{len(layout.parameters)}]", str(error)) from error
            layout.parameters.append(parameter)
            claimed += parameter.nbytes
        if claimed > max_bytes:
            raise _too_large(claimed, max_bytes)
    if not layout.groups:
        raise InvalidFieldError("LayoutPage.groups", "there are none")
    if sum(layout.sizes) != len(layout.parameters):
        raise InvalidFieldError(
            "LayoutPage.parameters", f"there are {len(layout.parameters)}, the groups count {sum(layout.sizes)}"
        )
    if layout.nbytes > max_bytes:
        raise _too_large(layout.nbytes, max_bytes)
    return layout


def _too_large(nbytes: int, max_bytes: int) -> LimitExceededError:
    return LimitExceededError(
        f"the parameters and their state would take at least {nbytes} bytes; this server lets a job take "
        f"{max_bytes} (--max-job-bytes)"
    )


def _name(field_name: str, name: str) -> str:
    if not name or len(name.encode()) > MAX_NAME_BYTES or not name.isprintable() or name != name.strip():
        raise InvalidFieldError(
            field_name, f"must be 1 to {MAX_NAME_BYTES} bytes of printable text without spaces around it"
        )
    return name
