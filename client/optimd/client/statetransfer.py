"""State on its way from and to a server."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from optimd.client.connection import Connection
from optimd.client.exceptions import ProtocolError
from optimd.client.joblayout import JobLayout
from optimd.client.parameters import FlatReader, FlatWriter
from optimd.v1 import param_group_pb2, reading_pb2, state_dict_pb2, tensor_pb2, training_pb2
from optimd.wire.codec import encode
from optimd.wire.encodings import EXACT, Encoding
from optimd.wire.kinds import PARAMETER, decode_kind, encode_kind
from optimd.wire.layout import Bucket, Parameter, pack_present, unpack_present
from optimd.wire.paging import paginate
from optimd.wire.placement import place
from optimd.wire.rings import RingWriter
from optimd.wire.tensors import unflatten


@dataclass(frozen=True, slots=True)
class RemoteEntry:
    """The state of one parameter: its step and its tensors, which have the parameter's shape."""

    step: float
    tensors: dict[str, torch.Tensor]


def bucket_message(
    kind: str, bucket: Bucket, present: Sequence[bool], reader: FlatReader, ring: RingWriter | None = None
) -> bytes:
    """A `TrainRequest` that carries one kind of tensor of a bucket's present slices. May wait for shared memory."""
    encoding = reader.encoding_of(kind, bucket)
    header = tensor_pb2.TensorBucket(
        bucket_id=bucket.bucket_id, kind=encode_kind(kind), present=pack_present(present), encoding=encoding.number
    )
    nbytes = bucket.payload_bytes(kind, present, encoding)
    parts = place(header, reader.parts(kind, bucket, present), nbytes, ring)
    return encode(training_pb2.TrainRequest(bucket=header), parts)


def tensor_buckets(
    layout: JobLayout,
    kind: str,
    tensors: Mapping[int, torch.Tensor],
    wanted: Collection[int] | None = None,
    ring: RingWriter | None = None,
    encoding: Encoding = EXACT,
) -> Iterator[bytes]:
    """The buckets that have any of these tensors, which are of one kind, by parameter index. Without any, none.

    Where only some buckets are `wanted`, by id, the others are left out. Their payloads go through `ring`, where there
    is one, and in `encoding`, where it takes their dtype.
    """
    if not tensors:
        return
    reader = FlatReader(tensors, layout.parameters, encoding)
    for bucket in layout.buckets:
        present = [piece.parameter in tensors for piece in bucket.slices]
        if any(present) and (wanted is None or bucket.bucket_id in wanted):
            yield bucket_message(kind, bucket, present, reader, ring)


def state_buckets(layout: JobLayout, entries: Mapping[int, RemoteEntry]) -> Iterator[bytes]:
    """The tensors of parameters' states, kind by kind, in an order that depends on nothing but the content."""
    for name in sorted({name for entry in entries.values() for name in entry.tensors}):
        tensors = {index: entry.tensors[name] for index, entry in entries.items() if name in entry.tensors}
        yield from tensor_buckets(layout, name, tensors)


def state_header(index: int, entry: RemoteEntry) -> state_dict_pb2.ParameterState:
    """What announces the state of a parameter: its step, and which tensors it has."""
    return state_dict_pb2.ParameterState(
        parameter=index, step=entry.step, tensors=[encode_kind(name) for name in entry.tensors]
    )


class StateReceiver:
    """Puts a job's values and state together from the parts of a `ReadState` answer.

    Args:
        layout: What is known of the job.
        kinds: What was asked for: keys of torch's state, and `PARAMETER` for values.
        into: Where values are written to, by parameter index. None: to new tensors.
    """

    def __init__(self, layout: JobLayout, kinds: Sequence[str], *, into: dict[int, torch.Tensor] | None = None) -> None:
        self._layout = layout
        self._entries: dict[int, RemoteEntry] = {}
        self._tensors: dict[str, dict[int, torch.Tensor]] = {kind: {} for kind in kinds}
        if into is not None:
            self._tensors[PARAMETER] = into
        self._writers = {kind: FlatWriter(self._tensors[kind], layout.parameters) for kind in kinds}

    def take_entries(self, page: state_dict_pb2.StateDictPage) -> None:
        """The next page of entries. What is in it of groups is not looked at."""
        for entry in page.state:
            self._entries[entry.parameter] = RemoteEntry(entry.step, {})

    def take_bucket(self, header: tensor_pb2.TensorBucket, payload: memoryview) -> None:
        """The next bucket.

        Raises:
            ValueError: it is none of the job's, was not asked for, or its payload does not fit.
        """
        kind, bucket = decode_kind(header.kind), self._layout.bucket(header.bucket_id)
        if kind not in self._tensors:
            raise ValueError(f"{kind} was not asked for")
        if header.encoding:
            raise ValueError(f"{kind} is encoded, which is for steps")
        tensors = self._tensors[kind]
        present = unpack_present(header.present, len(bucket.slices))
        for piece, here in zip(bucket.slices, present, strict=True):
            if here and piece.parameter not in tensors:
                tensors[piece.parameter] = _empty(self._layout.parameters[piece.parameter], kind)
        self._writers[kind].write(kind, bucket, present, payload)

    def finish(self) -> tuple[dict[int, RemoteEntry], dict[int, torch.Tensor]]:
        """All has come.

        Returns:
            The state of the parameters that have one, and the values, by parameter index.

        Raises:
            ValueError: a state has tensors and no entry.
        """
        for writer in self._writers.values():
            writer.flush()
        for kind, by_index in self._tensors.items():
            for index, tensor in by_index.items() if kind != PARAMETER else ():
                if index not in self._entries:
                    raise ValueError(f"{kind} of parameter {index}, which has no entry")
                self._entries[index].tensors[kind] = tensor
        return self._entries, self._tensors.get(PARAMETER, {})


@contextmanager
def refusing_what_does_not_fit(connection: Connection) -> Iterator[None]:
    """Raises `ProtocolError` where a part of a `ReadState` answer does not fit what is known of the job."""
    try:
        yield
    except ValueError as error:
        raise ProtocolError(f"the server at {connection.address} sent state that does not fit: {error}") from error


def read_state(
    connection: Connection,
    job: str,
    layout: JobLayout,
    kinds: Sequence[str],
    indices: Sequence[int] = (),
    *,
    into: dict[int, torch.Tensor] | None = None,
) -> tuple[dict[int, RemoteEntry], dict[int, torch.Tensor]]:
    """Reads a job's state, its values, or both. Blocks.

    Args:
        connection: The line to the server.
        job: The job's name.
        layout: What the worker knows of the job.
        kinds: Keys of torch's state, and `PARAMETER` for values. With none, only steps are read.
        indices: The parameters wanted; none means all.
        into: Where values are written to, by parameter index. None: to new tensors.

    Returns:
        The state of the wanted parameters that have one, and the values that were asked for, by parameter index: new
        tensors on the CPU, in the parameters' shapes and memory orders.

    Raises:
        OptimdError: the server cannot be read.
    """
    receiver = StateReceiver(layout, kinds, into=into)
    request = reading_pb2.ReadStateRequest(job=job, parameters=indices, tensors=[encode_kind(kind) for kind in kinds])
    for message, frame in connection.read_state(request):
        if message.WhichOneof("message") == "state_dict":
            receiver.take_entries(message.state_dict)
            continue
        with refusing_what_does_not_fit(connection):
            receiver.take_bucket(message.bucket, frame.payload)
    with refusing_what_does_not_fit(connection):
        return receiver.finish()


def _empty(parameter: Parameter, kind: str) -> torch.Tensor:
    flat = torch.empty(parameter.numel, dtype=parameter.dtype_of(kind))
    return unflatten(flat, torch.Size(parameter.shape), parameter.memory_order)


def state_messages(
    layout: JobLayout, groups: Sequence[param_group_pb2.ParamGroup], entries: Mapping[int, RemoteEntry]
) -> Iterator[bytes]:
    """The content of a `LoadState`: the same bytes for the same content.

    Args:
        layout: What the worker knows of the job.
        groups: All param_groups.
        entries: The state of the parameters that have one; it travels in the dtype that the server keeps.
    """
    for page, _ in paginate(groups):
        yield _page(state_dict_pb2.StateDictPage(param_groups=page))
    for state_page, last in paginate(state_header(index, entries[index]) for index in sorted(entries)):
        yield _page(state_dict_pb2.StateDictPage(state=state_page, last=last))
    count = 0
    for message in state_buckets(layout, entries):
        yield message
        count += 1
    yield encode(training_pb2.TrainRequest(load_state_end=training_pb2.LoadStateEnd(bucket_count=count)))


def _page(page: state_dict_pb2.StateDictPage) -> bytes:
    # Deterministic, so that workers that load the same content come to the same digest.
    return training_pb2.TrainRequest(state_dict=page).SerializeToString(deterministic=True)
