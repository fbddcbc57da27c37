"""Parameters' values on their way from and to a server, and what they do to a process that comes back to its job."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Protocol

import torch

from optimd.client.connection import TrainStream
from optimd.client.exceptions import ProtocolError
from optimd.client.joblayout import JobLayout
from optimd.client.narrowing import NarrowedValues
from optimd.client.parameters import FlatReader, FlatWriter
from optimd.client.progress import Progress
from optimd.client.samehost import ServerValues
from optimd.client.statetransfer import bucket_message
from optimd.v1 import job_pb2, tensor_pb2
from optimd.wire.encodings import encoding_for
from optimd.wire.kinds import PARAMETER, encode_kind
from optimd.wire.layout import Bucket, Parameter, unpack_present


class LocalValues(Protocol):
    """The parameters of this process, as far as a line has to know them when it is taken up again."""

    def tensors(self) -> Sequence[torch.Tensor]:
        """The parameters as they are now, in order."""

    def written(self) -> Collection[int]:
        """Those, by index, that the program has written to since it was given the server's values."""

    def received(self, kept: Collection[int]) -> None:
        """They have the server's values now, but for those that were kept."""

    def rewound(self, step: int) -> None:
        """So they have, and the job was set back to `step`: what was known of what came behind that is gone."""


class ReturnedValues:
    """The values that a process is sent when it comes back to its job: where they go, and which of them hold.

    What the program has written to is received aside, until it is known whether that is still to be pushed.

    Args:
        local: The parameters of this process.
        layout: What it knows of the job.
        written: Those that the program has written to, by index.
        narrowed: Those whose values came narrowed.
    """

    def __init__(
        self, local: LocalValues, layout: JobLayout, written: Collection[int], narrowed: NarrowedValues
    ) -> None:
        self._local = local
        self._layout = layout
        self._narrowed = narrowed
        self._written = frozenset(written)
        self._tensors = local.tensors()
        self.into = {
            index: self._tensors[index]
            if index not in self._written and self._is_here(index, parameter)
            else torch.empty(parameter.shape, dtype=parameter.dtype)
            for index, parameter in enumerate(layout.parameters)
        }
        """Where they are received, by index."""
        self.changed = set[int]()
        """Those, by index, that have come as something else than was there."""
        self._aside = [
            index
            for index, parameter in enumerate(layout.parameters)
            if index in self._written and self._is_here(index, parameter)
        ]

    def keep_written(self) -> None:
        """What the program has written is left alone."""
        self._round(self._written)
        self._local.received(self._written)

    @torch.no_grad()
    def overwrite(self) -> bool:
        """The server's values hold for all. Returns whether the program had written to any."""
        for index in self._aside:
            self._tensors[index].detach().copy_(self.into[index])
        self._round(())
        self._local.received(())
        return bool(self._aside)

    def _round(self, kept: Collection[int]) -> None:
        """What came narrowed before, or has changed since, is as it would have come in the steps that were missed."""
        here = {index for index, parameter in enumerate(self._layout.parameters) if self._is_here(index, parameter)}
        self._narrowed.round((self._narrowed.indices | self.changed) & here - set(kept), self._tensors, self._layout)

    def _is_here(self, index: int, parameter: Parameter) -> bool:
        """Whether this process has a tensor for a parameter: its own may be another one by now, or gone."""
        if index >= len(self._tensors):
            return False
        tensor = self._tensors[index]
        return tuple(tensor.shape) == parameter.shape and tensor.dtype == parameter.dtype and not tensor.is_meta


def value_messages(
    layout: JobLayout, buckets: Sequence[Bucket], tensors: Mapping[int, torch.Tensor], progress: Progress
) -> Iterator[bytes]:
    """The values of whole buckets, in order."""
    reader = FlatReader(tensors, layout.parameters)
    for bucket in buckets:
        present = [True] * len(bucket.slices)
        yield bucket_message(PARAMETER, bucket, present, reader)
        progress.advance(bucket.nbytes)


def receive_values(
    stream: TrainStream,
    layout: JobLayout,
    tensors: Mapping[int, torch.Tensor] | None,
    progress: Progress,
    changed: set[int] | None = None,
) -> job_pb2.JobReady:
    """Buckets of values, of which some may come again, up to JobReady. Blocks.

    Args:
        stream: The line.
        layout: What the worker knows of the job.
        tensors: The parameters, written to in place; None: they are of no use any more.
        progress: Is told of them.
        changed: If given, has those added to it, by index, that come as something else than is there.
    """
    writer = FlatWriter(tensors or {}, layout.parameters, compares=changed is not None)
    while True:
        kind, message, frame = stream.expect("bucket", "ready")
        if kind == "ready":
            writer.flush()
            if changed is not None:
                changed.update(writer.changed)
            return message.ready
        if tensors is not None:
            write_values(writer, layout, message.bucket, frame.payload, stream.address)
        progress.advance(frame.payload.nbytes)


def write_values(
    writer: FlatWriter,
    layout: JobLayout,
    header: tensor_pb2.TensorBucket,
    payload: memoryview,
    address: str,
    server_values: ServerValues | None = None,
) -> None:
    """Writes a bucket of values that the server at `address` sent, or left where it can be read.

    Raises:
        ProtocolError: it is none, or does not fit.
    """
    if header.kind != encode_kind(PARAMETER):
        raise ProtocolError(f"the server at {address} sent tensor kind {header.kind} where values were due")
    spans = server_values.spans if server_values is not None else {}
    try:
        bucket = layout.bucket(header.bucket_id)
        present = unpack_present(header.present, len(bucket.slices))
        if header.in_place and bucket.slices[0].parameter in spans:
            writer.copy(bucket, present, spans)
        else:
            writer.write(PARAMETER, bucket, present, payload, encoding_for(header.encoding, bucket.dtype))
    except ValueError as error:
        raise ProtocolError(f"the server at {address} sent a bucket that does not fit: {error}") from error
