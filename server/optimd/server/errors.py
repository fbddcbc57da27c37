"""What can go wrong on the server, as domain code raises it.

    ServerError
    ├── ConfigurationError        the server cannot start as it was asked to
    │   └── DataDirError          what is in its data dir cannot be used
    └── RequestError              a call cannot be served; has a reason
        ├── InvalidFieldError     INVALID_FIELD     malformed, or contradicts the job's layout
        ├── OutOfOrderError       OUT_OF_ORDER      the protocol has no place for the message
        ├── JobMismatchError      JOB_MISMATCH      not what the job is
        ├── UnknownJobError       UNKNOWN_JOB
        ├── JobExistsError        JOB_EXISTS
        ├── JobInUseError         JOB_IN_USE
        ├── JobDeletedError       JOB_DELETED
        ├── WorkerInUseError      WORKER_IN_USE     a live worker has that id or rank
        ├── SupersededError       SUPERSEDED        another process has that id since
        ├── LeaseEndedError       LEASE_ENDED       nothing was heard of the worker for too long
        ├── LimitExceededError    LIMIT_EXCEEDED
        ├── StepTimeoutError      STEP_TIMEOUT      others did not come in time
        ├── LoadNeedsForceError   LOAD_NEEDS_FORCE
        ├── ShuttingDownError     SHUTTING_DOWN
        ├── UnsupportedError      UNSUPPORTED
        ├── UpdateRefusedError    UPDATE_REFUSED    torch refused the update
        ├── AccumulationLostError ACCUMULATION_LOST
        ├── NonFiniteGradientError  NONFINITE_GRADIENT
        ├── JobRewoundError       JOB_REWOUND       the worker was told of more than the job has on disk
        ├── StorageFailedError    STORAGE_FAILED    the data dir cannot be written to
        ├── NotDurableError       NOT_DURABLE       the server keeps nothing on disk, and was asked to
        ├── EvictedError          EVICTED           an operator has taken the worker out
        ├── UnknownWorkerError    UNKNOWN_WORKER
        ├── UnauthenticatedError  UNAUTHENTICATED   no token was brought, or one that is not known
        └── PermissionDeniedError  PERMISSION_DENIED  the token is not good for that

Domain code never sees gRPC: `interceptor.py` translates, by the table in `optimd.wire.reasons`.
"""

from __future__ import annotations

from typing import ClassVar


class ServerError(Exception):
    """The root."""


class ConfigurationError(ServerError):
    """The server cannot start as it was asked to. The message is one sentence with the remedy."""


class DataDirError(ConfigurationError):
    """What is in the data dir cannot be used: another server has it, it is of another version, or it is damaged."""


class RequestError(ServerError):
    """A call cannot be served.

    Args:
        message: One sentence for a person at the other end.
        field: The field at fault, where one is.
    """

    reason: ClassVar[str] = "INTERNAL"

    def __init__(self, message: str, *, field: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.field = field


class InvalidFieldError(RequestError):
    """A field is malformed or contradicts the job's layout."""

    reason = "INVALID_FIELD"

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}", field=field)


class OutOfOrderError(RequestError):
    """A message came where the protocol has no place for it."""

    reason = "OUT_OF_ORDER"


class JobMismatchError(RequestError):
    """The worker's parameters, groups, settings or loads are not the job's."""

    reason = "JOB_MISMATCH"


class UnknownJobError(RequestError):
    """No job of that name."""

    reason = "UNKNOWN_JOB"


class JobExistsError(RequestError):
    """The job exists and the worker asked for a new one."""

    reason = "JOB_EXISTS"


class JobInUseError(RequestError):
    """The job has live workers."""

    reason = "JOB_IN_USE"


class JobDeletedError(RequestError):
    """The job was deleted while the call was under way."""

    reason = "JOB_DELETED"


class WorkerInUseError(RequestError):
    """A live worker of the job has that worker_id or that rank."""

    reason = "WORKER_IN_USE"


class SupersededError(RequestError):
    """Another process has taken the worker's id."""

    reason = "SUPERSEDED"


class LeaseEndedError(RequestError):
    """Nothing was heard of the worker for as long as its lease. It may come back."""

    reason = "LEASE_ENDED"


class LimitExceededError(RequestError):
    """One of the server's limits is reached."""

    reason = "LIMIT_EXCEEDED"


class StepTimeoutError(RequestError):
    """Others did not join, contribute or read in time."""

    reason = "STEP_TIMEOUT"


class LoadNeedsForceError(RequestError):
    """A load over a job with steps and other live workers."""

    reason = "LOAD_NEEDS_FORCE"


class ShuttingDownError(RequestError):
    """The server is shutting down."""

    reason = "SHUTTING_DOWN"


class UnsupportedError(RequestError):
    """The server does not do what was asked for."""

    reason = "UNSUPPORTED"


class UpdateRefusedError(RequestError):
    """torch refused the update with the job's hyperparameters."""

    reason = "UPDATE_REFUSED"


class AccumulationLostError(RequestError):
    """The server does not hold what the worker had accumulated."""

    reason = "ACCUMULATION_LOST"


class NonFiniteGradientError(RequestError):
    """A gradient of the step is not finite, and the job was opened to refuse that."""

    reason = "NONFINITE_GRADIENT"


class JobRewoundError(RequestError):
    """The worker was told of more than the job has: its server was started again from what was on disk."""

    reason = "JOB_REWOUND"


class StorageFailedError(RequestError):
    """The data dir cannot be written to. Nothing is applied or acknowledged that has to be there first."""

    reason = "STORAGE_FAILED"


class NotDurableError(RequestError):
    """The server keeps nothing on disk, and was asked to."""

    reason = "NOT_DURABLE"


class UnauthenticatedError(RequestError):
    """The caller has brought no token, or one that is not known."""

    reason = "UNAUTHENTICATED"


class PermissionDeniedError(RequestError):
    """The caller's token is not good for what it asks for."""

    reason = "PERMISSION_DENIED"


class EvictedError(RequestError):
    """An operator has taken the worker's process out of the job."""

    reason = "EVICTED"


class UnknownWorkerError(RequestError):
    """The job has no worker of that worker_id."""

    reason = "UNKNOWN_WORKER"
