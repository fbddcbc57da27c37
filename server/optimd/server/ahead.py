"""Gradients that a worker sends before its push, while it still computes others."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import torch

from optimd.server.errors import AccumulationLostError, InvalidFieldError, LimitExceededError
from optimd.server.incoming import Incoming, read_bucket
from optimd.server.job import Job
from optimd.server.member import Member
from optimd.server.store import Store
from optimd.v1 import training_pb2
from optimd.wire.kinds import GRADIENT
from optimd.wire.layout import Bucket

_log = logging.getLogger(__name__)


class AheadGradients:
    """What has come ahead of the next push of one stream. Belongs to the stream's thread.

    It is kept apart from all that the job is made of: no step has begun, nobody waits for it, nothing of it is written
    down. What the worker does not step with is forgotten, and what a broken line takes with it the worker pushes.
    Takes the memory of the gradients with the first of them, and keeps it for the steps that follow.
    """

    def __init__(self) -> None:
        self._memory: dict[int, torch.Tensor] = {}
        # In the order in which they came: buckets, which of their slices there are, and their elements.
        self._come: dict[int, tuple[Bucket, list[bool], torch.Tensor]] = {}
        # Whose memory that is: the job's table, which is another one once its parameters are.
        self._buckets: list[Bucket] | None = None
        self._store: Store | None = None
        self._sequence: int | None = None

    def receive(self, incoming: Incoming, job: Job, member: Member, message: training_pb2.PushAhead) -> None:
        """Takes gradients, up to PushAheadEnd. Waits for the worker.

        Raises:
            RequestError: the stream cannot go on.
        """
        self.forget()
        store, count = job.store, 0
        if store.buckets is not self._buckets:
            # Of parameters that are gone.
            self._memory.clear()
            self._buckets = store.buckets
        try:
            job.take_ahead(member)
            has_room = True
        except LimitExceededError as error:
            _log.debug("job %s: gradients that come ahead are not kept: %s", job.name, error)
            has_room = False
        while True:
            kind, request, frame = incoming.expect("bucket", "push_ahead_end")
            if kind == "push_ahead_end":
                break
            what, bucket, present, payload = read_bucket(request.bucket, frame, store.buckets, incoming.widener)
            if what != GRADIENT or bucket.bucket_id in self._come:
                raise InvalidFieldError(
                    "TensorBucket", f"{what} of bucket {bucket.bucket_id} has no place here, or came a second time"
                )
            count += 1
            if has_room:
                self._come[bucket.bucket_id] = (bucket, present, self._copy(bucket, payload))
            del request, frame, payload
        if request.push_ahead_end.bucket_count != count:
            raise InvalidFieldError(
                "PushAheadEnd.bucket_count", f"{request.push_ahead_end.bucket_count}, but {count} have come"
            )
        if has_room and request.push_ahead_end.complete:
            self._store, self._sequence = store, message.sequence
        else:
            self.forget()

    def forget(self) -> None:
        """Nothing has come, but the memory that it takes."""
        self._come.clear()
        self._store = self._sequence = None

    def check(self, sequence: int, store: Store) -> None:
        """Whether the gradients of a push are here.

        Raises:
            AccumulationLostError: they are not: what came was of another push, or incomplete, or not taken.
        """
        if self._sequence != sequence or self._store is not store:
            raise AccumulationLostError(
                f"the gradients of push {sequence} did not come ahead of it, or were not kept: push them"
            )

    def take(self) -> Iterator[tuple[Bucket, list[bool], torch.Tensor]]:
        """The gradients of the push, bucket by bucket: which of its slices there are, and their elements, flat."""
        yield from self._come.values()
        self.forget()

    def _copy(self, bucket: Bucket, payload: torch.Tensor) -> torch.Tensor:
        memory = self._memory.get(bucket.bucket_id)
        if memory is None or memory.dtype is not payload.dtype or len(memory) < len(payload):
            length = sum(piece.length for piece in bucket.slices)
            memory = self._memory[bucket.bucket_id] = torch.empty(length, dtype=payload.dtype)
        return memory[: len(payload)].copy_(payload)
