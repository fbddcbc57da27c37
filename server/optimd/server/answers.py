"""What a training stream answers, and what both its exchanges and its opening read alike."""

from __future__ import annotations

from typing import Any, Final

from optimd.server.errors import (
    InvalidFieldError,
    JobMismatchError,
    LimitExceededError,
    LoadNeedsForceError,
    RequestError,
    UpdateRefusedError,
)
from optimd.v1 import errors_pb2, param_group_pb2, training_pb2
from optimd.wire.codec import encode
from optimd.wire.param_groups import decode_group
from optimd.wire.reasons import encode_reason

DECLINED: Final = (UpdateRefusedError, JobMismatchError, LimitExceededError, LoadNeedsForceError)
"""What a worker can answer, by asking for something else: no reason to end its stream, and with it a private job."""


def refusal(error: RequestError) -> bytes:
    """Says that what the worker began is not taken, on a stream that goes on."""
    detail = errors_pb2.ErrorDetail(reason=encode_reason(error.reason), message=error.message)
    return encode(training_pb2.TrainResponse(refused=detail))


def decode_options(group: param_group_pb2.ParamGroup) -> dict[str, Any]:
    """The options of a group.

    Raises:
        InvalidFieldError: they are malformed.
    """
    try:
        return decode_group(group)
    except ValueError as error:
        raise InvalidFieldError("ParamGroup.options", str(error)) from error
