"""Gradients on their way to a server before their push, as messages."""

from __future__ import annotations

import contextlib
import queue
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch

from optimd.client.connection import TrainStream
from optimd.client.joblayout import JobLayout
from optimd.client.parameters import FlatReader
from optimd.client.statetransfer import bucket_message
from optimd.v1 import training_pb2
from optimd.wire.bundles import Bundler
from optimd.wire.codec import encode
from optimd.wire.encodings import Encoding
from optimd.wire.kinds import GRADIENT
from optimd.wire.layout import Bucket


class _Ready(NamedTuple):
    """A bucket all of whose gradients are computed, or about to be on their devices."""

    bucket: Bucket
    present: Sequence[bool]
    grads: Mapping[int, torch.Tensor]
    computed: Sequence[torch.cuda.Event]


class AheadPush:
    """The gradients of one push, sent over one stream while others are still computed.

    Whoever computes gives buckets; the stream's sending thread reads them, and makes the messages. Methods do not wait,
    and may be called from any thread, one at a time.

    Args:
        stream: The stream.
        layout: The job's.
        sequence: The number of the push.
        encoding: What gradients are encoded in.
    """

    def __init__(self, stream: TrainStream, layout: JobLayout, sequence: int, encoding: Encoding) -> None:
        self.stream = stream
        self.sequence = sequence
        self.sent_before: int | None = None
        """What had been sent over the stream before, in bytes; None until the first of this is sent."""
        self.is_complete = False
        """Whether all of the push's gradients have been given."""
        self._layout = layout
        self._encoding = encoding
        self._is_over = self._is_abandoned = False
        # Ended by None. Bounded by the number of buckets.
        self._ready: queue.SimpleQueue[_Ready | None] = queue.SimpleQueue()
        stream.send_until(self._messages(), self.abandon)

    @property
    def is_open(self) -> bool:
        """Whether gradients may be given still."""
        return not self._is_over and not self.stream.has_ended

    def put(
        self,
        bucket: Bucket,
        present: Sequence[bool],
        grads: Mapping[int, torch.Tensor],
        computed: Sequence[torch.cuda.Event] = (),
    ) -> None:
        """Gives a bucket, once. Its gradients are read until the push is over, and must not change.

        Args:
            bucket: The bucket.
            present: Which of its slices have a gradient.
            grads: These, by parameter index. On a GPU they may be being computed still.
            computed: What says that they are, besides what the current stream has been given.
        """
        devices = {grad.device for grad in grads.values() if grad.is_cuda}
        here = [torch.cuda.current_stream(device).record_event() for device in devices]
        self._ready.put(_Ready(bucket, present, grads, [*computed, *here]))

    def complete(self) -> None:
        """All of the push's gradients have been given."""
        if not self._is_over:
            self._is_over = self.is_complete = True
            self._ready.put(None)

    def abandon(self) -> None:
        """What was given is not to be stepped with, and what of it has not been sent is not.

        May be called more than once, and after `complete`, when it does nothing.
        """
        if not self._is_over:
            self._is_over = self._is_abandoned = True
            with contextlib.suppress(queue.Empty):
                while True:
                    self._ready.get_nowait()
            self._ready.put(None)

    def _messages(self) -> Iterator[bytes]:
        self.sent_before = self.stream.bytes_sent
        begin = training_pb2.PushAhead(sequence=self.sequence)
        count, bundler = 0, Bundler(self.stream.ring)
        yield from bundler.put(encode(training_pb2.TrainRequest(push_ahead=begin)))
        while True:
            if self._ready.empty():
                # Nothing is held back while more is computed.
                yield from bundler.flush()
            ready = self._ready.get()
            if ready is None or self._is_abandoned:
                break
            for event in ready.computed:
                event.synchronize()
            reader = FlatReader(ready.grads, self._layout.parameters, self._encoding)
            message = bucket_message(GRADIENT, ready.bucket, ready.present, reader, self.stream.ring)
            # While this waits for the next ones, nothing may hold these.
            del ready, reader
            yield from bundler.put(message)
            count += 1
        end = training_pb2.PushAheadEnd(bucket_count=count, complete=self.is_complete)
        yield from bundler.put(encode(training_pb2.TrainRequest(push_ahead_end=end)))
        yield from bundler.flush()
