"""What a worker brings when it opens a job or adds a param group, checked."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from optimd.server import update
from optimd.server.aggregation import Worker
from optimd.server.errors import InvalidFieldError, LimitExceededError, UnsupportedError
from optimd.server.settings import PARAMETER_OVERHEAD_BYTES, JobSettings
from optimd.v1 import job_pb2
from optimd.wire.layout import Parameter, decode_parameter
from optimd.wire.limits import DEFAULT_BUCKET_BYTES, MAX_BUCKET_BYTES, MAX_NAME_BYTES, MIN_BUCKET_BYTES
from optimd.wire.param_groups import decode_group, rule_of

_NONFINITE: Final[dict[int, Literal["allow", "skip", "error"]]] = {
    job_pb2.NON_FINITE_UNSPECIFIED: "allow",
    job_pb2.NON_FINITE_ALLOW: "allow",
    job_pb2.NON_FINITE_SKIP: "skip",
    job_pb2.NON_FINITE_ERROR: "error",
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
    worker: Worker
    incarnation: int
    on_existing: job_pb2.OnExisting
    settings: JobSettings


def read_opening(message: job_pb2.OpenJob) -> Opening:
    """Checks an `OpenJob`.

    Raises:
        InvalidFieldError: a field is missing or out of range; it is named.
        UnsupportedError: the aggregation policy is not one of this server's.
    """
    job = _name("OpenJob.job", message.job)
    worker_id = _name("WorkerIdentity.worker_id", message.worker.worker_id)
    if message.aggregation.WhichOneof("policy") != "sync":
        raise UnsupportedError("the aggregation policy is not one that this server has; it has sync")
    sync = message.aggregation.sync
    if sync.world_size < 1:
        raise InvalidFieldError("SyncAggregation.world_size", "must be at least 1")
    if message.worker.rank >= sync.world_size:
        raise InvalidFieldError(
            "WorkerIdentity.rank", f"{message.worker.rank} is not below world_size {sync.world_size}"
        )
    for name in ("timeout_s", "join_timeout_s"):
        if not 0 < getattr(sync, name) <= threading.TIMEOUT_MAX:
            raise InvalidFieldError(f"SyncAggregation.{name}", "must be a positive number of seconds")
    if sync.reduction not in (job_pb2.REDUCTION_MEAN, job_pb2.REDUCTION_SUM):
        raise InvalidFieldError("SyncAggregation.reduction", "must be mean or sum")
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
    nonfinite = _NONFINITE.get(message.nonfinite)
    if nonfinite is None:
        raise InvalidFieldError("OpenJob.nonfinite", "must be allow, skip or error")
    whole = max_grad_norm is not None or nonfinite != "allow"
    if whole and message.apply == job_pb2.APPLY_MODE_STREAMING:
        raise InvalidFieldError(
            "OpenJob.apply", "must not be streaming where max_grad_norm or nonfinite looks at a whole step"
        )
    bucket_bytes = message.bucket_bytes or DEFAULT_BUCKET_BYTES
    if not MIN_BUCKET_BYTES <= bucket_bytes <= MAX_BUCKET_BYTES:
        raise InvalidFieldError(
            "OpenJob.bucket_bytes", f"{bucket_bytes} is not between {MIN_BUCKET_BYTES} and {MAX_BUCKET_BYTES}"
        )
    automatic = message.apply == job_pb2.APPLY_MODE_AUTO and not whole
    return Opening(
        job=job,
        worker=Worker(message.worker.rank, worker_id),
        incarnation=message.worker.incarnation,
        on_existing=message.on_existing,
        settings=JobSettings(
            world_size=sync.world_size,
            reduction="mean" if sync.reduction == job_pb2.REDUCTION_MEAN else "sum",
            apply="streaming"
            if message.apply == job_pb2.APPLY_MODE_STREAMING or (automatic and sync.world_size == 1)
            else "atomic",
            bucket_bytes=bucket_bytes,
            timeout_s=sync.timeout_s,
            join_timeout_s=sync.join_timeout_s,
            private=message.private,
            max_grad_norm=max_grad_norm,
            nonfinite=nonfinite,
        ),
    )


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
