"""What a job can begin with besides its parameters and their values: a state, and buffers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from optimd.client.buffers import announcement, chunks
from optimd.client.joblayout import JobLayout
from optimd.client.progress import Progress
from optimd.client.statetransfer import RemoteEntry, state_messages
from optimd.v1 import param_group_pb2, training_pb2
from optimd.wire.buffers import BufferValues
from optimd.wire.codec import encode


@dataclass(frozen=True, slots=True, kw_only=True)
class Beginnings:
    """What the creator of a job brings to it ahead of the values. Nobody ever sees the job without it."""

    groups: Sequence[param_group_pb2.ParamGroup]
    """All param_groups, complete."""
    entries: Mapping[int, RemoteEntry]
    """The state of the parameters that have one, by index."""
    buffers: BufferValues | None
    """Their values, all written; None where there are none."""

    def messages(self, layout: JobLayout, chunk_bytes: int) -> Iterator[bytes]:
        """What is to be sent.

        Args:
            layout: The job's.
            chunk_bytes: The largest payload of a message.
        """
        if self.entries:
            # The job's first load. Without a digest: who joins later is told of it, and has none to compare.
            yield encode(training_pb2.TrainRequest(load_state=training_pb2.LoadState(load_count=1)))
            total = sum(tensor.nbytes for entry in self.entries.values() for tensor in entry.tensors.values())
            progress = Progress("uploading state", total)
            for message in state_messages(layout, self.groups, self.entries):
                yield message
                progress.advance(len(message))
        if self.buffers is not None:
            yield from announcement(self.buffers.buffers)
            yield from chunks(self.buffers, chunk_bytes)
