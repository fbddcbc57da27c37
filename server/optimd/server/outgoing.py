"""The messages of a training stream as the server sends them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from optimd.v1 import tensor_pb2, training_pb2
from optimd.wire.bundles import Bundler
from optimd.wire.codec import encode
from optimd.wire.encodings import EXACT, Encoding, Part
from optimd.wire.kinds import PARAMETER, encode_kind
from optimd.wire.layout import Bucket, pack_present
from optimd.wire.placement import place
from optimd.wire.rings import RingWriter


class Outgoing:
    """Sends one stream's answers. Belongs to one thread.

    Small ones go together, where the worker reads them so: what is given to `put` may be held back until `flush`, which
    is due before anything is waited for that the worker does only when it has that.
    """

    def __init__(self) -> None:
        self.takes_bundles = False
        """Whether the worker reads bundles, as it has said."""
        self._bundler = Bundler()
        self.encoding = EXACT
        """What parameters go out in, in the course of steps."""
        self.placed_bytes = 0
        """How many bytes have gone through shared memory."""

    def share(self, ring: RingWriter) -> None:
        """Payloads may go through shared memory from now on."""
        self._bundler.ring = ring

    def put(self, message: bytes) -> Iterator[bytes]:
        """What is to be sent now that `message` is to follow what was put before."""
        if self.takes_bundles:
            yield from self._bundler.put(message)
        else:
            yield message

    def flush(self) -> Iterator[bytes]:
        """What was held back."""
        yield from self._bundler.flush()

    def values(
        self, bucket: Bucket, present: Sequence[bool], parts: Sequence[Part], encoding: Encoding = EXACT
    ) -> bytes:
        """The message with the values of a bucket's present slices, which are read now. May wait for shared memory.

        Args:
            bucket: The bucket.
            present: Which of its slices there are.
            parts: Their values.
            encoding: What these are encoded in.
        """
        header = tensor_pb2.TensorBucket(
            bucket_id=bucket.bucket_id,
            kind=encode_kind(PARAMETER),
            present=pack_present(present),
            encoding=encoding.number,
        )
        nbytes = sum(part.nbytes for part in parts)
        carried = place(header, parts, nbytes, self._bundler.ring)
        if header.HasField("placement"):
            self.placed_bytes += nbytes
        return encode(training_pb2.TrainResponse(bucket=header), carried)
