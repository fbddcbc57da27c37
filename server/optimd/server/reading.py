"""Reading what a job is, its values, its state and its buffers."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence

from optimd.server import update
from optimd.server.errors import InvalidFieldError
from optimd.server.job import Job
from optimd.server.opening import encode_aggregation, encode_apply, encode_nonfinite
from optimd.server.readers import ReadHold
from optimd.v1 import job_pb2, reading_pb2, state_dict_pb2, tensor_pb2, training_pb2
from optimd.wire.buffers import encode_buffer
from optimd.wire.codec import encode
from optimd.wire.kinds import GRADIENT, PARAMETER, decode_kind, encode_kind
from optimd.wire.layout import encode_bucket, encode_parameter, pack_present
from optimd.wire.paging import paginate
from optimd.wire.param_groups import encode_group


def read_state(
    job: Job, request: reading_pb2.ReadStateRequest, *, on_hold: Callable[[ReadHold], None]
) -> Iterator[bytes]:
    """The serialised answer to a `ReadStateRequest`.

    It is consistent: nothing is applied between its first part and its last.

    Args:
        job: The job.
        request: What is wanted of it.
        on_hold: Called, before anything waits, with the claim that is to hold the job still: to be released when the
            reader's line goes down.

    Raises:
        InvalidFieldError: a parameter or a kind that the job does not have.
        StepTimeoutError: the reader took nothing for too long while a step waited, or the open step took too long.
        JobDeletedError: the job is gone.
    """
    try:
        kinds = [decode_kind(number) for number in request.tensors]
    except ValueError as error:
        raise InvalidFieldError("ReadStateRequest.tensors", str(error)) from error
    if GRADIENT in kinds:
        raise InvalidFieldError("ReadStateRequest.tensors", "gradients are not kept")
    with job.reading(on_hold) as hold:
        # From here on the parameters are these.
        count = len(job.store.parameters)
        for index in request.parameters:
            if index >= count:
                raise InvalidFieldError("ReadStateRequest.parameters", f"{index} is unknown; the job has {count}")
        wanted = set(request.parameters) or set(range(count))
        for part in _parts(job, request, kinds, wanted):
            # Behind what it has read: a part that was read while a step was let through is not sent.
            hold.touch()
            yield part


def _parts(
    job: Job, request: reading_pb2.ReadStateRequest, kinds: Sequence[str], wanted: Collection[int]
) -> Iterator[bytes]:
    if request.description:
        yield from _description(job)
    for page in _pages(job, wanted):
        yield encode(reading_pb2.ReadStateResponse(state_dict=page))
    for kind in kinds:
        yield from _buckets(job, kind, wanted)
    if request.buffers:
        yield from _buffers(job)


def _description(job: Job) -> Iterator[bytes]:
    settings = job.settings
    description = reading_pb2.JobDescription(
        step=job.step,
        aggregation=encode_aggregation(settings),
        apply=encode_apply(settings),
        bucket_bytes=settings.bucket_bytes,
        max_grad_norm=settings.max_grad_norm,
        nonfinite=encode_nonfinite(settings),
    )
    yield encode(reading_pb2.ReadStateResponse(description=description))
    for specs, last in paginate(encode_parameter(parameter) for parameter in job.store.parameters):
        layout = job_pb2.LayoutPage(parameters=specs, last=last)
        yield encode(reading_pb2.ReadStateResponse(layout=layout))
    for buckets, last in paginate(encode_bucket(bucket) for bucket in job.store.buckets):
        table = tensor_pb2.BucketTablePage(buckets=buckets, last=last)
        yield encode(reading_pb2.ReadStateResponse(bucket_table=table))


def _pages(job: Job, wanted: Collection[int]) -> Iterator[state_dict_pb2.StateDictPage]:
    groups = (
        encode_group(index, update.RULE, group, parameter_count=job.group_sizes[index])
        for index, group in enumerate(job.groups)
    )
    for group_page, _ in paginate(groups):
        yield state_dict_pb2.StateDictPage(param_groups=group_page)
    entries = (
        state_dict_pb2.ParameterState(
            parameter=index,
            step=job.store.step_of(index),
            tensors=[encode_kind(name) for name in job.store.state_names_of(index)],
        )
        for index in sorted(wanted)
        if job.store.state_names_of(index)
    )
    for entry_page, last in paginate(entries):
        yield state_dict_pb2.StateDictPage(state=entry_page, last=last)


def _buckets(job: Job, kind: str, wanted: Collection[int]) -> Iterator[bytes]:
    for bucket in job.store.buckets:
        present = [
            piece.parameter in wanted and (kind == PARAMETER or kind in job.store.state_names_of(piece.parameter))
            for piece in bucket.slices
        ]
        if any(present):
            header = tensor_pb2.TensorBucket(
                bucket_id=bucket.bucket_id, kind=encode_kind(kind), present=pack_present(present)
            )
            yield encode(reading_pb2.ReadStateResponse(bucket=header), job.store.read(kind, bucket, present))


def _buffers(job: Job) -> Iterator[bytes]:
    values = job.buffers.values()
    for specs, last in paginate(encode_buffer(buffer) for buffer in (values.buffers if values is not None else ())):
        page = training_pb2.BuffersPage(buffers=specs, last=last)
        yield encode(reading_pb2.ReadStateResponse(buffers=page))
    for offset, parts in values.chunks(job.settings.bucket_bytes) if values is not None else ():
        chunk = tensor_pb2.BufferChunk(offset=offset)
        yield encode(reading_pb2.ReadStateResponse(buffer_chunk=chunk), parts)
