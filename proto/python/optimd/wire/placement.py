"""Where a bucket's payload travels: in its message, or in memory that both sides share."""

from __future__ import annotations

from collections.abc import Iterable

from optimd.v1 import tensor_pb2
from optimd.wire.codec import Frame
from optimd.wire.encodings import Part
from optimd.wire.rings import RingReader, RingWriter


def place(
    header: tensor_pb2.TensorBucket, parts: Iterable[Part], nbytes: int, ring: RingWriter | None
) -> Iterable[Part]:
    """Places a payload in shared memory, where there is any and it has room, and says so in `header`.

    Args:
        header: The message's.
        parts: The payload.
        nbytes: How many bytes that is.
        ring: The shared memory.

    Returns:
        What the message has to carry: nothing, or the payload.
    """
    position = None if ring is None else ring.place(parts, nbytes)
    if position is None:
        return parts
    header.placement.position = position
    header.placement.nbytes = nbytes
    return ()


def placed(header: tensor_pb2.TensorBucket, frame: Frame, ring: RingReader | None) -> Frame:
    """A received message's frame with its payload, wherever that is.

    Raises:
        ValueError: it is said to be where it cannot be.
    """
    if not header.HasField("placement"):
        return frame
    if ring is None:
        raise ValueError("the payload is in shared memory, and there is none")
    if frame.payload.nbytes:
        raise ValueError("the payload is in two places")
    return Frame(frame.size, ring.read(header.placement.position, header.placement.nbytes))
