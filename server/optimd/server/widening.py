"""Gradients that come narrowed, widened again."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from optimd.server.errors import InvalidFieldError
from optimd.v1 import tensor_pb2
from optimd.wire.encodings import EXACT, Encoding, decode_slices, known_encoding
from optimd.wire.kinds import GRADIENT
from optimd.wire.layout import Bucket


class Widener:
    """Widens one stream's gradients. Belongs to one thread.

    It has the memory of one bucket, for as long as anything comes narrowed: what is widened is still in the processor's
    cache when it is applied.
    """

    def __init__(self) -> None:
        self.encoding = EXACT
        """What gradients may come in, besides as they are."""
        self._memory = torch.empty(0, dtype=torch.uint8)

    def encoding_of(self, header: tensor_pb2.TensorBucket, kind: str, bucket: Bucket) -> Encoding:
        """What a bucket has come in.

        Raises:
            InvalidFieldError: that is not what the stream was opened with, or not for such tensors.
        """
        encoding = known_encoding(header.encoding)
        if encoding is EXACT:
            return EXACT
        if encoding is None or encoding is not self.encoding:
            raise InvalidFieldError(
                "TensorBucket.encoding",
                f"{header.encoding} is not what the stream was opened with: {self.encoding.name}",
            )
        if kind != GRADIENT or not encoding.takes(bucket.dtype):
            raise InvalidFieldError("TensorBucket.encoding", f"{encoding.name} is not for {kind} of {bucket.dtype}")
        return encoding

    def widened(self, encoding: Encoding, bucket: Bucket, present: Sequence[bool], payload: memoryview) -> torch.Tensor:
        """The elements of a payload, flat, in the bucket's dtype. Good until the next call.

        Args:
            encoding: What `encoding_of` gave.
            bucket: The bucket.
            present: Which of its slices there are.
            payload: Theirs, of the length that they take.
        """
        lengths = [piece.length for piece, here in zip(bucket.slices, present, strict=True) if here]
        nbytes = sum(lengths) * bucket.dtype.itemsize
        if self._memory.numel() < nbytes:
            self._memory = torch.empty(bucket.nbytes, dtype=torch.uint8)
        elements = self._memory[:nbytes].view(bucket.dtype)
        decode_slices(encoding, payload, lengths, bucket.dtype, elements)
        return elements


def agreed(asked: int) -> Encoding:
    """The encoding that holds where a worker asks for one: as elements are, if this server does not know it."""
    return known_encoding(asked) or EXACT
