"""How buffers travel on a worker's training stream: the protocol, without gRPC."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

from optimd.server.errors import InvalidFieldError, LimitExceededError
from optimd.server.incoming import Incoming
from optimd.server.job import Job
from optimd.server.member import Member
from optimd.v1 import tensor_pb2, training_pb2
from optimd.wire.buffers import Buffer, BufferValues, decode_buffer
from optimd.wire.codec import encode

_BUFFER_OVERHEAD_BYTES: Final = 2048
"""What a buffer takes besides its elements, about."""


def attach_buffers(incoming: Incoming, job: Job, member: Member, *, max_bytes: int) -> Iterator[bytes]:
    """Serves an `AttachBuffers`, from its first page on. Waits as `JobBuffers.attach` does.

    Args:
        incoming: The worker's stream.
        job: Its job.
        member: The worker.
        max_bytes: The most that the job may take in all.

    Yields:
        What is to be sent.

    Raises:
        InvalidFieldError: a buffer or a chunk is malformed; the field is named.
        LimitExceededError: the buffers are too large. Nothing has changed; all pages have been read.
        JobMismatchError: they are not the job's. Likewise.
        RequestError: what `Incoming.expect` and `JobBuffers.attach` raise besides.
    """
    buffers = _read_pages(incoming, max_bytes=max_bytes - job.full_bytes)
    held = job.buffers.attach(member, buffers, bytes_left=lambda: max_bytes - job.full_bytes)
    accepted = training_pb2.BuffersAccepted(send_values=held is None)
    yield encode(training_pb2.TrainResponse(buffers_accepted=accepted))
    if held is None:
        job.buffers.hold(member, _receive(incoming, buffers, job.settings.bucket_bytes))
    else:
        for offset, parts in held.chunks(job.settings.bucket_bytes):
            chunk = tensor_pb2.BufferChunk(offset=offset)
            yield encode(training_pb2.TrainResponse(buffer_chunk=chunk), parts)
    job.journal.await_durable()
    yield encode(training_pb2.TrainResponse(buffers_held=training_pb2.BuffersHeld()))


def receive_first_buffers(incoming: Incoming, job: Job, member: Member, *, max_bytes: int) -> BufferValues:
    """Receives what the creator of a job attaches while it creates it: pages and chunks in one go, without an answer.

    Args:
        incoming: The worker's stream, behind its `AttachBuffers`.
        job: Its job, which has no buffers yet.
        member: The worker.
        max_bytes: The most that the job may take in all.

    Returns:
        The values. The job has them once they are held (`JobBuffers.hold`).

    Raises:
        RequestError: as of `attach_buffers`.
    """
    buffers = _read_pages(incoming, max_bytes=max_bytes - job.full_bytes)
    job.buffers.attach(member, buffers, bytes_left=lambda: max_bytes - job.full_bytes)
    return _receive(incoming, buffers, job.settings.bucket_bytes)


def push_buffers(incoming: Incoming, job: Job, member: Member) -> Iterator[bytes]:
    """Serves a `PushBuffers`. Until all has come, the values from before are held.

    Yields:
        What is to be sent.

    Raises:
        InvalidFieldError: a chunk is malformed; the field is named.
        OutOfOrderError: the worker has not been asked, or sends something else.
    """
    buffers = job.buffers.check_asked(member)
    job.buffers.hold(member, _receive(incoming, buffers, job.settings.bucket_bytes))
    job.journal.await_durable()
    yield encode(training_pb2.TrainResponse(buffers_held=training_pb2.BuffersHeld()))


def _read_pages(incoming: Incoming, *, max_bytes: int) -> list[Buffer]:
    """The buffers. `max_bytes` is the most that their descriptions may take; their values take nothing yet."""
    buffers: list[Buffer] = []
    names: set[str] = set()
    claimed = 0
    while True:
        _, message, _ = incoming.expect("buffers")
        page = message.buffers
        claimed += page.ByteSize() + _BUFFER_OVERHEAD_BYTES * len(page.buffers)
        # Where it is too much already, the rest is only read: the stream goes on behind it.
        for spec in page.buffers if claimed <= max_bytes else ():
            place = f"BuffersPage.buffers[{len(buffers)}]"
            try:
                buffer = decode_buffer(spec)
            except ValueError as error:
                raise InvalidFieldError(place, str(error)) from error
            if buffer.name in names:
                raise InvalidFieldError(place, f"{buffer.name!r} is there twice")
            names.add(buffer.name)
            buffers.append(buffer)
        if page.last:
            break
    if claimed > max_bytes:
        raise LimitExceededError(
            f"the descriptions of the buffers alone would take {claimed} bytes; this server has {max(max_bytes, 0)} "
            "left for this job (--max-job-bytes)"
        )
    return buffers


def _receive(incoming: Incoming, buffers: Sequence[Buffer], chunk_bytes: int) -> BufferValues:
    """All chunks of all buffers, in order."""
    values = BufferValues(buffers)
    received = 0
    while received < values.nbytes:
        _, message, frame = incoming.expect("buffer_chunk")
        offset, length = message.buffer_chunk.offset, frame.payload.nbytes
        if offset != received:
            raise InvalidFieldError("BufferChunk.offset", f"{offset}; {received} is due")
        if not 0 < length <= chunk_bytes:
            raise InvalidFieldError("TrainRequest.payload", f"{length} bytes; a chunk has 1 to {chunk_bytes}")
        try:
            values.write(offset, frame.payload)
        except ValueError as error:
            raise InvalidFieldError("TrainRequest.payload", str(error)) from error
        received += length
    return values
