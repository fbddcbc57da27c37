from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ErrorReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ERROR_REASON_UNSPECIFIED: _ClassVar[ErrorReason]
    ERROR_REASON_INTERNAL: _ClassVar[ErrorReason]
    ERROR_REASON_INVALID_FIELD: _ClassVar[ErrorReason]
    ERROR_REASON_OUT_OF_ORDER: _ClassVar[ErrorReason]
    ERROR_REASON_JOB_MISMATCH: _ClassVar[ErrorReason]
    ERROR_REASON_UNKNOWN_JOB: _ClassVar[ErrorReason]
    ERROR_REASON_JOB_EXISTS: _ClassVar[ErrorReason]
    ERROR_REASON_JOB_IN_USE: _ClassVar[ErrorReason]
    ERROR_REASON_WORKER_IN_USE: _ClassVar[ErrorReason]
    ERROR_REASON_LIMIT_EXCEEDED: _ClassVar[ErrorReason]
    ERROR_REASON_STEP_TIMEOUT: _ClassVar[ErrorReason]
    ERROR_REASON_LOAD_NEEDS_FORCE: _ClassVar[ErrorReason]
    ERROR_REASON_SHUTTING_DOWN: _ClassVar[ErrorReason]
    ERROR_REASON_UNSUPPORTED: _ClassVar[ErrorReason]
    ERROR_REASON_UPDATE_REFUSED: _ClassVar[ErrorReason]
    ERROR_REASON_JOB_DELETED: _ClassVar[ErrorReason]
    ERROR_REASON_ACCUMULATION_LOST: _ClassVar[ErrorReason]
    ERROR_REASON_NONFINITE_GRADIENT: _ClassVar[ErrorReason]
    ERROR_REASON_SUPERSEDED: _ClassVar[ErrorReason]
    ERROR_REASON_LEASE_ENDED: _ClassVar[ErrorReason]
    ERROR_REASON_JOB_REWOUND: _ClassVar[ErrorReason]
    ERROR_REASON_STORAGE_FAILED: _ClassVar[ErrorReason]
    ERROR_REASON_NOT_DURABLE: _ClassVar[ErrorReason]
    ERROR_REASON_UNAUTHENTICATED: _ClassVar[ErrorReason]
    ERROR_REASON_PERMISSION_DENIED: _ClassVar[ErrorReason]
    ERROR_REASON_EVICTED: _ClassVar[ErrorReason]
    ERROR_REASON_UNKNOWN_WORKER: _ClassVar[ErrorReason]
ERROR_REASON_UNSPECIFIED: ErrorReason
ERROR_REASON_INTERNAL: ErrorReason
ERROR_REASON_INVALID_FIELD: ErrorReason
ERROR_REASON_OUT_OF_ORDER: ErrorReason
ERROR_REASON_JOB_MISMATCH: ErrorReason
ERROR_REASON_UNKNOWN_JOB: ErrorReason
ERROR_REASON_JOB_EXISTS: ErrorReason
ERROR_REASON_JOB_IN_USE: ErrorReason
ERROR_REASON_WORKER_IN_USE: ErrorReason
ERROR_REASON_LIMIT_EXCEEDED: ErrorReason
ERROR_REASON_STEP_TIMEOUT: ErrorReason
ERROR_REASON_LOAD_NEEDS_FORCE: ErrorReason
ERROR_REASON_SHUTTING_DOWN: ErrorReason
ERROR_REASON_UNSUPPORTED: ErrorReason
ERROR_REASON_UPDATE_REFUSED: ErrorReason
ERROR_REASON_JOB_DELETED: ErrorReason
ERROR_REASON_ACCUMULATION_LOST: ErrorReason
ERROR_REASON_NONFINITE_GRADIENT: ErrorReason
ERROR_REASON_SUPERSEDED: ErrorReason
ERROR_REASON_LEASE_ENDED: ErrorReason
ERROR_REASON_JOB_REWOUND: ErrorReason
ERROR_REASON_STORAGE_FAILED: ErrorReason
ERROR_REASON_NOT_DURABLE: ErrorReason
ERROR_REASON_UNAUTHENTICATED: ErrorReason
ERROR_REASON_PERMISSION_DENIED: ErrorReason
ERROR_REASON_EVICTED: ErrorReason
ERROR_REASON_UNKNOWN_WORKER: ErrorReason

class ErrorDetail(_message.Message):
    __slots__ = ("reason", "message", "field", "incident_id")
    REASON_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    FIELD_FIELD_NUMBER: _ClassVar[int]
    INCIDENT_ID_FIELD_NUMBER: _ClassVar[int]
    reason: ErrorReason
    message: str
    field: str
    incident_id: str
    def __init__(self, reason: _Optional[_Union[ErrorReason, str]] = ..., message: _Optional[str] = ..., field: _Optional[str] = ..., incident_id: _Optional[str] = ...) -> None: ...
