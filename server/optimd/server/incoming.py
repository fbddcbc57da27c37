"""The messages of a training stream as the server receives them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence

import torch

from optimd.server.errors import InvalidFieldError, OutOfOrderError
from optimd.server.store import Store
from optimd.server.widening import Widener
from optimd.v1 import job_pb2, state_dict_pb2, tensor_pb2, training_pb2
from optimd.wire.bundles import unbundle
from optimd.wire.codec import Frame, MalformedMessageError, decode
from optimd.wire.encodings import EXACT, Encoding
from optimd.wire.kinds import decode_kind
from optimd.wire.layout import Bucket, unpack_present
from optimd.wire.placement import placed
from optimd.wire.rings import RingReader
from optimd.wire.tensors import tensor_over


class Incoming:
    """Reads one stream's requests. Belongs to one thread.

    Args:
        requests: The serialised messages; blocks until there is one, ends where the worker closes its side.
        on_message: Called with each.
    """

    def __init__(self, requests: Iterator[bytes], on_message: Callable[[], None] = lambda: None) -> None:
        self._requests = requests
        self._on_message = on_message
        # What has come in one bundle and has not been read yet.
        self._here: deque[bytes] = deque()
        self._ring: RingReader | None = None
        self.has_ended = False
        """Whether nothing more will come: the worker has closed its side, or its line is down."""
        self.bytes_received = 0
        self.widener = Widener()
        """Widens the gradients that come narrowed."""

    def share(self, ring: RingReader | None) -> None:
        """Payloads may come through shared memory from now on; with None, no more."""
        self._ring = ring

    @property
    def shares_memory(self) -> bool:
        """Whether they may."""
        return self._ring is not None

    @property
    def has_next(self) -> bool:
        """Whether the next message is here already: `receive` does not wait."""
        return bool(self._here)

    def receive(self) -> tuple[str, training_pb2.TrainRequest, Frame] | None:
        """The next message and the name of its kind; None where the worker has closed its side.

        The payload of the one before may be gone with this: it lies where the worker goes on writing.

        Raises:
            InvalidFieldError: it is malformed.
        """
        if self._ring is not None:
            self._ring.release()
        try:
            if not self._here:
                data = next(self._requests, None)
                if data is None:
                    self.has_ended = True
                    return None
                self.bytes_received += len(data)
                self._on_message()
                self._here.extend(unbundle(data))
                # Nothing may hold a message that its reader is done with.
                del data
            message, frame = decode(training_pb2.TrainRequest, self._here.popleft())
        except MalformedMessageError as error:
            raise InvalidFieldError("TrainRequest", str(error)) from error
        if message.bundled:
            # It began with something else.
            raise InvalidFieldError("TrainRequest.bundled", "a bundle has no other field")
        kind = message.WhichOneof("message")
        if kind is None:
            raise InvalidFieldError("TrainRequest.message", "is not set")
        if kind == "bucket":
            frame = self._with_payload(message.bucket, frame)
        elif frame.payload.nbytes and kind != "buffer_chunk":
            raise InvalidFieldError("TrainRequest.payload", f"a {kind} has none")
        return kind, message, frame

    def _with_payload(self, header: tensor_pb2.TensorBucket, frame: Frame) -> Frame:
        try:
            found = placed(header, frame, self._ring)
        except ValueError as error:
            raise InvalidFieldError("TensorBucket.placement", str(error)) from error
        if found is not frame:
            self.bytes_received += found.payload.nbytes
        return found

    def expect(self, *kinds: str) -> tuple[str, training_pb2.TrainRequest, Frame]:
        """The next message, which must be of one of `kinds`.

        Raises:
            OutOfOrderError: it is of another kind, or the worker has closed its side.
            InvalidFieldError: it is malformed.
        """
        received = self.receive()
        wanted = " or ".join(kinds)
        if received is None:
            raise OutOfOrderError(f"the stream ended where {wanted} was due")
        if received[0] not in kinds:
            raise OutOfOrderError(f"{received[0]} came where {wanted} was due")
        return received

    def skip_to(self, end: str, *kinds: str) -> None:
        """Reads messages of `kinds` away, up to one of kind `end`. Raises what `expect` does."""
        while self.expect(*kinds, end)[0] != end:
            pass

    def layout_pages(self) -> Iterator[job_pb2.LayoutPage]:
        """The pages of a layout, up to the last. Raises what `expect` does."""
        while True:
            _, message, _ = self.expect("layout")
            yield message.layout
            if message.layout.last:
                return

    def state_dict_pages(self) -> Iterator[state_dict_pb2.StateDictPage]:
        """The pages of a state_dict, up to the last. Raises what `expect` does."""
        while True:
            _, message, _ = self.expect("state_dict")
            yield message.state_dict
            if message.state_dict.last:
                return


def read_bucket(
    header: tensor_pb2.TensorBucket, frame: Frame, buckets: Sequence[Bucket], widener: Widener | None = None
) -> tuple[str, Bucket, list[bool], torch.Tensor]:
    """Checks a bucket against the job's table.

    Args:
        header: The message's.
        frame: The message, with its payload.
        buckets: The job's table.
        widener: Widens what comes narrowed. None: nothing may.

    Returns:
        The kind of tensor, the bucket, which of its slices are present, and their elements, flat: a view of the
        received message, or the widener's memory. They must not be written to.

    Raises:
        InvalidFieldError: the bucket is unknown, or bitmap, encoding or payload do not fit it.
    """
    if header.bucket_id >= len(buckets):
        raise InvalidFieldError(
            "TensorBucket.bucket_id", f"{header.bucket_id} is unknown; the job has {len(buckets)} buckets"
        )
    bucket = buckets[header.bucket_id]
    try:
        kind = decode_kind(header.kind)
        present = unpack_present(header.present, len(bucket.slices))
    except ValueError as error:
        raise InvalidFieldError("TensorBucket", str(error)) from error
    encoding = widener.encoding_of(header, kind, bucket) if widener is not None else _exactly(header)
    due = bucket.payload_bytes(kind, present, encoding)
    if frame.payload.nbytes != due:
        raise InvalidFieldError(
            "TrainRequest.payload",
            f"{frame.payload.nbytes} bytes; the {kind} of bucket {bucket.bucket_id} takes {due}",
        )
    if widener is None or encoding.is_exact:
        return kind, bucket, present, tensor_over(frame.payload, bucket.dtype_of(kind))
    return kind, bucket, present, widener.widened(encoding, bucket, present, frame.payload)


def _exactly(header: tensor_pb2.TensorBucket) -> Encoding:
    if header.encoding:
        raise InvalidFieldError("TensorBucket.encoding", "is for gradients")
    return EXACT


class SplitParameters:
    """Checks that a push has a gradient for all slices of a parameter or for none, where buckets share it.

    Args:
        store: The job's.
        elsewhere: Buckets that have come before, by id: of parameters with a part in them nothing can be said.
    """

    def __init__(self, store: Store, *, elsewhere: Collection[int] = ()) -> None:
        self._store = store
        self._elsewhere = elsewhere
        self._seen: dict[int, int] = {}

    def see(self, bucket: Bucket, present: Sequence[bool]) -> None:
        """Counts a pushed bucket. Only its first and its last slice can be parts of a larger parameter."""
        for position in {0, len(bucket.slices) - 1}:
            piece = bucket.slices[position]
            if present[position] and piece.length < self._store.parameters[piece.parameter].numel:
                self._seen[piece.parameter] = self._seen.get(piece.parameter, 0) + 1

    def check(self) -> None:
        """At the end of the push.

        Raises:
            InvalidFieldError: a parameter has a gradient in some of its slices only.
        """
        for index, count in self._seen.items():
            places = self._store.places(index)
            if any(bucket_id in self._elsewhere for bucket_id, _ in places):
                continue
            slices = len(places)
            if count != slices:
                title = self._store.parameters[index].title(index)
                raise InvalidFieldError(
                    "TensorBucket.present",
                    f"{title} has a gradient in {count} of its {slices} slices; all or none is due",
                )
