"""The messages of a training stream as the server sends them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Final, NamedTuple

import torch

from optimd.server.transfers import Transfers
from optimd.v1 import tensor_pb2, training_pb2
from optimd.wire.bundles import Bundler
from optimd.wire.codec import encode
from optimd.wire.encodings import EXACT, Encoding, Part
from optimd.wire.kinds import PARAMETER, encode_kind
from optimd.wire.layout import Bucket, pack_present
from optimd.wire.placement import place
from optimd.wire.rings import RingWriter

_LAG: Final = 2
"""How many buckets' values may be on their way from a device while the next ones are computed."""


class _Departing(NamedTuple):
    """Values that are to be sent when they are there."""

    bucket: Bucket
    present: Sequence[bool]
    finish: Callable[[], Sequence[Part]]
    encoding: Encoding


class Outgoing:
    """Sends one stream's answers. Belongs to one thread.

    Small ones go together, where the worker reads them so: what is given to `put` may be held back until `flush`, which
    is due before anything is waited for that the worker does only when it has that. Values that come from a GPU are
    sent when some more are on their way from there.

    Args:
        device: Where values are.
    """

    def __init__(self, device: torch.device) -> None:
        self.takes_bundles = False
        """Whether the worker reads bundles, as it has said."""
        self.transfers = Transfers(device)
        """What brings values from the device."""
        # On the CPU there is nothing to wait for.
        self._lag = 0 if device.type == "cpu" else _LAG
        self._departing: deque[_Departing] = deque()
        self._bundler = Bundler()
        self.encoding = EXACT
        """What parameters go out in, in the course of steps."""
        self.placed_bytes = 0
        """How many bytes have gone through shared memory."""

    def share(self, ring: RingWriter | None) -> None:
        """Payloads may go through shared memory from now on; with None, no more."""
        self._bundler.ring = ring

    def put(self, message: bytes) -> Iterator[bytes]:
        """What is to be sent now that `message` is to follow what was put before."""
        yield from self._depart()
        yield from self._send(message)

    def put_values(
        self, bucket: Bucket, present: Sequence[bool], finish: Callable[[], Sequence[Part]], encoding: Encoding = EXACT
    ) -> Iterator[bytes]:
        """What is to be sent now that the values of a bucket are to follow. May wait for shared memory.

        Args:
            bucket: The bucket.
            present: Which of its slices there are.
            finish: Gives their values; waits for them. Not called before they are sent.
            encoding: What these are encoded in.
        """
        self._departing.append(_Departing(bucket, present, finish, encoding))
        yield from self._depart(self._lag)

    def put_in_place(self, bucket: Bucket, present: Sequence[bool]) -> Iterator[bytes]:
        """What is to be sent now that the worker is to read the values of a bucket where they are."""
        header = tensor_pb2.TensorBucket(
            bucket_id=bucket.bucket_id, kind=encode_kind(PARAMETER), present=pack_present(present), in_place=True
        )
        self.placed_bytes += bucket.payload_bytes(PARAMETER, present, EXACT)
        return self.put(training_pb2.TrainResponse(bucket=header).SerializeToString())

    def _depart(self, left: int = 0) -> Iterator[bytes]:
        """Sends the values that wait to be sent, but for the last so many."""
        while len(self._departing) > left:
            yield from self._send(self._message(self._departing.popleft()))

    def _send(self, message: bytes) -> Iterator[bytes]:
        if self.takes_bundles:
            yield from self._bundler.put(message)
        else:
            yield message

    def flush(self) -> Iterator[bytes]:
        """What was held back."""
        yield from self._depart()
        yield from self._bundler.flush()

    def _message(self, values: _Departing) -> bytes:
        header = tensor_pb2.TensorBucket(
            bucket_id=values.bucket.bucket_id,
            kind=encode_kind(PARAMETER),
            present=pack_present(values.present),
            encoding=values.encoding.number,
        )
        parts = values.finish()
        nbytes = sum(part.nbytes for part in parts)
        carried = place(header, parts, nbytes, self._bundler.ring)
        if header.HasField("placement"):
            self.placed_bytes += nbytes
        return encode(training_pb2.TrainResponse(bucket=header), carried)
