"""gRPC's errors become optimd's here and nowhere else."""

from __future__ import annotations

from typing import Final

import grpc
from google.protobuf.message import DecodeError

from optimd.client import exceptions
from optimd.v1 import errors_pb2
from optimd.wire.reasons import ERROR_TRAILER, decode_reason

EXCEPTION_OF_REASON: Final[dict[str, type[exceptions.OptimdError]]] = {
    "INTERNAL": exceptions.InternalServerError,
    "INVALID_FIELD": exceptions.ProtocolError,
    "OUT_OF_ORDER": exceptions.ProtocolError,
    "JOB_MISMATCH": exceptions.JobMismatchError,
    "UNKNOWN_JOB": exceptions.UnknownJobError,
    "JOB_EXISTS": exceptions.JobExistsError,
    "JOB_IN_USE": exceptions.WorkerInUseError,
    "WORKER_IN_USE": exceptions.WorkerInUseError,
    "LIMIT_EXCEEDED": exceptions.LimitExceededError,
    "STEP_TIMEOUT": exceptions.StepTimeoutError,
    "LOAD_NEEDS_FORCE": exceptions.LoadNeedsForceError,
    "SHUTTING_DOWN": exceptions.ConnectionLostError,
    "UNSUPPORTED": exceptions.UnsupportedError,
    "UPDATE_REFUSED": exceptions.UpdateRefusedError,
    "JOB_DELETED": exceptions.JobDeletedError,
    "ACCUMULATION_LOST": exceptions.AccumulationLostError,
    "NONFINITE_GRADIENT": exceptions.NonFiniteGradientError,
    "SUPERSEDED": exceptions.SupersededError,
    "LEASE_ENDED": exceptions.ConnectionLostError,
    "JOB_REWOUND": exceptions.JobRewoundError,
    "STORAGE_FAILED": exceptions.ConnectionLostError,
    "NOT_DURABLE": exceptions.NotDurableError,
    "UNAUTHENTICATED": exceptions.AuthenticationError,
    "PERMISSION_DENIED": exceptions.AuthorizationError,
    "EVICTED": exceptions.EvictedError,
    "UNKNOWN_WORKER": exceptions.OptimdError,
}
"""The exception that each reason is raised as."""

_NO_SERVER: Final = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)


def translate(error: grpc.RpcError, address: str) -> exceptions.OptimdError:
    """The exception to raise from `error`, which a call to the server at `address` ended with."""
    call = error if isinstance(error, grpc.Call) else None
    detail = _detail(call)
    if detail is not None:
        return exception_of(detail)
    code = call.code() if call is not None else None
    text = (call.details() if call is not None else None) or str(error)
    if code is grpc.StatusCode.UNIMPLEMENTED:
        return exceptions.ProtocolError(f"what answers at {address} is not an optimd server of this version: {text}")
    if code in _NO_SERVER:
        return exceptions.ConnectionLostError(f"the line to the server at {address} broke: {text}")
    return exceptions.ProtocolError(f"the server at {address} answered {code}: {text}")


def exception_of(detail: errors_pb2.ErrorDetail) -> exceptions.OptimdError:
    """The exception that `detail` is raised as."""
    return EXCEPTION_OF_REASON[decode_reason(detail.reason)](detail.message)


def _detail(call: grpc.Call | None) -> errors_pb2.ErrorDetail | None:
    trailers = call.trailing_metadata() if call is not None else None
    for key, value in trailers or ():
        if key == ERROR_TRAILER:
            try:
                return errors_pb2.ErrorDetail.FromString(value if isinstance(value, bytes) else value.encode())
            except DecodeError:
                return None
    return None
