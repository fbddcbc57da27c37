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
from optimd.server.job import Job
from optimd.server.stepping import Round
from optimd.v1 import errors_pb2, param_group_pb2, tensor_pb2, training_pb2
from optimd.wire.codec import encode
from optimd.wire.kinds import PARAMETER, encode_kind
from optimd.wire.layout import Bucket, pack_present
from optimd.wire.param_groups import decode_group
from optimd.wire.reasons import encode_reason

DECLINED: Final = (UpdateRefusedError, JobMismatchError, LimitExceededError, LoadNeedsForceError)
"""What a worker can answer, by asking for something else: no reason to end its stream, and with it a private job."""


def refusal(error: RequestError) -> bytes:
    """Says that what the worker began is not taken, on a stream that goes on."""
    detail = errors_pb2.ErrorDetail(reason=encode_reason(error.reason), message=error.message)
    return encode(training_pb2.TrainResponse(refused=detail))


def values(job: Job, bucket: Bucket, present: list[bool]) -> bytes:
    """The values of a bucket's present slices."""
    header = tensor_pb2.TensorBucket(
        bucket_id=bucket.bucket_id, kind=encode_kind(PARAMETER), present=pack_present(present)
    )
    return encode(training_pb2.TrainResponse(bucket=header), job.store.read(PARAMETER, bucket, present))


def receipt(sequence: int, round_: Round, *, skipped: bool, wants_buffers: bool) -> bytes:
    """What became of a push in a round that is over.

    Args:
        sequence: The number of the push.
        round_: The round.
        skipped: Whether the push brought no gradients, because they were not finite.
        wants_buffers: Whether its worker is asked for its buffers.
    """
    message = training_pb2.StepReceipt(
        sequence=sequence, wants_buffers=wants_buffers, pushed_differently=round_.pushed_differently
    )
    if round_.skipped is not None:
        message.outcome = training_pb2.STEP_OUTCOME_SKIPPED_NONFINITE
        message.step = round_.skipped.step
    elif round_.commit is not None:
        message.outcome = training_pb2.STEP_OUTCOME_SKIPPED_NONFINITE if skipped else training_pb2.STEP_OUTCOME_APPLIED
        message.step = round_.commit.step
        message.contributors.extend(worker.rank for worker in round_.commit.contributors)
        message.partial_contributors.extend(worker.rank for worker in round_.commit.partial_contributors)
        message.hyperparameters_disagreed = round_.disagreed
        if round_.grad_norm is not None:
            message.grad_norm = round_.grad_norm
    else:
        raise RuntimeError("a step that was neither committed nor skipped has no receipt")
    return encode(training_pb2.TrainResponse(receipt=message))


def decode_options(group: param_group_pb2.ParamGroup) -> dict[str, Any]:
    """The options of a group.

    Raises:
        InvalidFieldError: they are malformed.
    """
    try:
        return decode_group(group)
    except ValueError as error:
        raise InvalidFieldError("ParamGroup.options", str(error)) from error
