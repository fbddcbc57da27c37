"""A module's buffers on their way to a job and from it."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence

import torch

from optimd.client.connection import TrainStream
from optimd.client.exceptions import JobMismatchError, OptimdError, ProtocolError
from optimd.client.progress import Progress
from optimd.client.translation import exception_of
from optimd.v1 import tensor_pb2, training_pb2
from optimd.wire.buffers import Buffer, BufferValues, encode_buffer, first_buffer_difference
from optimd.wire.codec import encode
from optimd.wire.limits import MAX_NAME_BYTES
from optimd.wire.paging import paginate


class AttachedBuffers:
    """The persistent buffers of a module, as they are whenever they are looked at.

    Args:
        module: Whose. Not kept alive: it often owns the optimizer.

    Raises:
        ValueError: a buffer cannot be carried; it is named.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        self._module = weakref.ref(module)
        # Asked once: the state_dict of a sharded module can be a collective of all ranks.
        saved = module.state_dict(keep_vars=True).keys()
        self.buffers = [_describe(name, tensor) for name, tensor in module.named_buffers() if name in saved]

    def read(self) -> BufferValues | None:
        """A copy of their values, on the CPU; None where the module is gone.

        Raises:
            JobMismatchError: they are not what was attached any more; the first that differs is named.
        """
        tensors = self._tensors()
        if tensors is None:
            return None
        values = BufferValues(self.buffers)
        for name, tensor in tensors.items():
            values.tensors[name].copy_(tensor.detach())
        return values

    def write(self, values: BufferValues) -> None:
        """Sets them in place.

        Raises:
            JobMismatchError: as of `read`.
        """
        with torch.no_grad():
            for name, tensor in (self._tensors() or {}).items():
                tensor.copy_(values.tensors[name])

    def _tensors(self) -> dict[str, torch.Tensor] | None:
        module = self._module()
        if module is None:
            return None
        # Looked up anew each time: `module.to()` and plain assignment put other tensors in their place.
        names = {buffer.name for buffer in self.buffers}
        tensors = {name: tensor for name, tensor in module.named_buffers() if name in names}
        difference = first_buffer_difference(
            self.buffers, [Buffer(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
        )
        if difference is not None:
            raise JobMismatchError(f"the attached module has changed: {difference}")
        return tensors


def attach(stream: TrainStream, attached: AttachedBuffers, here: BufferValues, chunk_bytes: int) -> OptimdError | None:
    """The exchange that attaches buffers: uploads their values, or receives the job's, in place. Blocks.

    Args:
        stream: The worker's.
        attached: The buffers. They are set when all values have come.
        here: Their values in this worker.
        chunk_bytes: The largest payload of a message.

    Returns:
        Why the server does not take them, on a stream that goes on; None where it does.

    Raises:
        OptimdError: the stream has ended, or nobody can go on with it.
    """
    stream.send(announcement(attached.buffers))
    kind, message, _ = stream.expect("buffers_accepted", "refused")
    if kind == "refused":
        return exception_of(message.refused)
    if message.buffers_accepted.send_values:
        stream.send(chunks(here, chunk_bytes))
        stream.expect("buffers_held")
    else:
        values = _receive(stream, attached)
        stream.expect("buffers_held")
        attached.write(values)
    return None


def push(stream: TrainStream, values: BufferValues, chunk_bytes: int) -> None:
    """Sends values anew, once a receipt has asked for them. Blocks.

    Raises:
        OptimdError: the stream has ended.
    """
    stream.send([encode(training_pb2.TrainRequest(push_buffers=training_pb2.PushBuffers()))])
    stream.send(chunks(values, chunk_bytes))
    stream.expect("buffers_held")


def announcement(buffers: Sequence[Buffer]) -> Iterator[bytes]:
    """What announces buffers: the first message, and the pages that say what they are."""
    yield encode(training_pb2.TrainRequest(attach_buffers=training_pb2.AttachBuffers()))
    for page, last in paginate(encode_buffer(buffer) for buffer in buffers):
        yield encode(training_pb2.TrainRequest(buffers=training_pb2.BuffersPage(buffers=page, last=last)))


def chunks(values: BufferValues, chunk_bytes: int) -> Iterator[bytes]:
    """The bytes of buffers, in messages."""
    progress = Progress("uploading buffers", values.nbytes)
    for offset, parts in values.chunks(chunk_bytes):
        yield encode(training_pb2.TrainRequest(buffer_chunk=tensor_pb2.BufferChunk(offset=offset)), parts)
        progress.advance(sum(part.nbytes for part in parts))


class BufferReceiver:
    """Puts buffers together from chunks, which come in order and without gaps.

    Args:
        buffers: What they are.
    """

    def __init__(self, buffers: Sequence[Buffer]) -> None:
        self.values = BufferValues(buffers)
        """As far as they have come."""
        self._received = 0

    @property
    def is_complete(self) -> bool:
        """Whether all has come."""
        return self._received >= self.values.nbytes

    def take(self, header: tensor_pb2.BufferChunk, payload: memoryview) -> None:
        """The next chunk.

        Raises:
            ValueError: it is not the next, or does not fit.
        """
        if header.offset != self._received or not payload.nbytes:
            raise ValueError(
                f"{payload.nbytes} bytes of buffers from byte {header.offset} on, where byte {self._received} was due"
            )
        self.values.write(self._received, payload)
        self._received += payload.nbytes


def _receive(stream: TrainStream, attached: AttachedBuffers) -> BufferValues:
    receiver = BufferReceiver(attached.buffers)
    progress = Progress("receiving buffers", receiver.values.nbytes)
    while not receiver.is_complete:
        _, message, frame = stream.expect("buffer_chunk")
        try:
            receiver.take(message.buffer_chunk, frame.payload)
        except ValueError as error:
            raise ProtocolError(f"the server sent buffers that do not fit: {error}") from error
        progress.advance(frame.payload.nbytes)
    return receiver.values


def _describe(name: str, tensor: torch.Tensor) -> Buffer:
    if torch.nn.parameter.is_lazy(tensor):
        raise ValueError(f"buffer {name!r} is not initialized yet; run the module once before")
    if tensor.is_meta or tensor.layout is not torch.strided:
        raise ValueError(f"buffer {name!r} is on the meta device or not strided; it has no values to be carried")
    if not 0 < len(name.encode()) <= MAX_NAME_BYTES:
        raise ValueError(
            f"buffer {name!r}: a name of {len(name.encode())} bytes; at most {MAX_NAME_BYTES} are possible"
        )
    buffer = Buffer(name, tensor.dtype, tuple(tensor.shape))
    try:
        encode_buffer(buffer)
    except ValueError as error:
        raise ValueError(f"buffer {name!r}: {error}") from error
    return buffer
