"""Reasons of failure and their gRPC statuses: the one table that both sides read.

The server raises exceptions that carry a reason; one interceptor turns them into a status with an `ErrorDetail` in the
trailing metadata. The client maps the reason back to an exception in one place.
"""

from __future__ import annotations

from typing import Final, cast

from optimd.v1 import errors_pb2

ERROR_TRAILER: Final = "optimd-error-bin"
"""The trailing metadata key under which an `ErrorDetail` travels."""

STATUS_OF_REASON: Final[dict[str, str]] = {
    "INTERNAL": "INTERNAL",
    "INVALID_FIELD": "INVALID_ARGUMENT",
    "OUT_OF_ORDER": "FAILED_PRECONDITION",
    "JOB_MISMATCH": "FAILED_PRECONDITION",
    "UNKNOWN_JOB": "NOT_FOUND",
    "JOB_EXISTS": "ALREADY_EXISTS",
    "JOB_IN_USE": "FAILED_PRECONDITION",
    "WORKER_IN_USE": "ALREADY_EXISTS",
    "LIMIT_EXCEEDED": "RESOURCE_EXHAUSTED",
    "STEP_TIMEOUT": "DEADLINE_EXCEEDED",
    "LOAD_NEEDS_FORCE": "FAILED_PRECONDITION",
    "SHUTTING_DOWN": "UNAVAILABLE",
    "UNSUPPORTED": "UNIMPLEMENTED",
    "UPDATE_REFUSED": "INVALID_ARGUMENT",
    "JOB_DELETED": "ABORTED",
    "ACCUMULATION_LOST": "FAILED_PRECONDITION",
    "NONFINITE_GRADIENT": "INVALID_ARGUMENT",
    "SUPERSEDED": "ABORTED",
    "LEASE_ENDED": "UNAVAILABLE",
    "JOB_REWOUND": "ABORTED",
    "STORAGE_FAILED": "UNAVAILABLE",
    "NOT_DURABLE": "FAILED_PRECONDITION",
    "UNAUTHENTICATED": "UNAUTHENTICATED",
    "PERMISSION_DENIED": "PERMISSION_DENIED",
    "EVICTED": "ABORTED",
    "UNKNOWN_WORKER": "NOT_FOUND",
}
"""The gRPC status of each reason, by the schema's names without their prefix."""

_PREFIX: Final = "ERROR_REASON_"


def encode_reason(reason: str) -> errors_pb2.ErrorReason:
    """The schema's number for `reason`, one of the keys of `STATUS_OF_REASON`."""
    return cast("errors_pb2.ErrorReason", errors_pb2.ErrorReason.Value(_PREFIX + reason))


def decode_reason(number: int) -> str:
    """The reason that `number` stands for; "INTERNAL" where it is not known, as from a newer server."""
    try:
        name = errors_pb2.ErrorReason.Name(number)
    except ValueError:
        return "INTERNAL"
    reason = name.removeprefix(_PREFIX)
    return reason if reason in STATUS_OF_REASON else "INTERNAL"
