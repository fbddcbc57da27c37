"""Several messages in one: what a call of gRPC costs does not show beside a megabyte, and is most of a small message.

A bundle is plain protobuf: a message with nothing but its `bundled` field (number 31), which holds others serialised.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Final

from optimd.wire.codec import MalformedMessageError, read_varint, varint
from optimd.wire.rings import RingWriter

BUNDLE_BYTES: Final = 128 * 1024
"""What a bundle holds at most. A message as large as that travels by itself."""

_MOST_BYTES: Final = 2 * BUNDLE_BYTES
"""With what each message in it takes besides: what can be made of larger ones is a million messages at once."""

_FIELD: Final = 31
_LENGTH_DELIMITED: Final = 2
_TAG: Final = varint(_FIELD << 3 | _LENGTH_DELIMITED)


class Bundler:
    """Puts messages that follow each other into bundles. Belongs to one thread.

    Args:
        ring: Where payloads are placed that the messages tell of: so much that the reader should hear of it ends a
            bundle.
    """

    def __init__(self, ring: RingWriter | None = None) -> None:
        self.ring = ring
        self._held: list[bytes] = []
        self._nbytes = 0

    def put(self, message: bytes) -> Iterator[bytes]:
        """What is to be sent now that `message` is to follow what was put before. The rest is held until `flush`."""
        if self._nbytes + len(message) > BUNDLE_BYTES:
            yield from self.flush()
        self._held.append(message)
        self._nbytes += len(message)
        if self._nbytes > BUNDLE_BYTES or (self.ring is not None and self.ring.is_due):
            yield from self.flush()

    def flush(self) -> Iterator[bytes]:
        """What is held."""
        if self._held:
            held, self._held, self._nbytes = self._held, [], 0
            if self.ring is not None:
                self.ring.announced()
            yield bundle(held)


def bundled(messages: Iterable[bytes], ring: RingWriter | None = None) -> Iterator[bytes]:
    """Messages, serialised, with small ones that follow each other bundled. `ring` is as in `Bundler`."""
    bundler = Bundler(ring)
    for message in messages:
        yield from bundler.put(message)
    yield from bundler.flush()


def bundle(messages: Sequence[bytes]) -> bytes:
    """One message that stands for `messages`, serialised, in their order. A single one is given back as it is."""
    if len(messages) == 1:
        return messages[0]
    return b"".join(part for message in messages for part in (_TAG, varint(len(message)), message))


def unbundle(data: bytes) -> list[bytes]:
    """The messages that a received one stands for: itself, where it is no bundle.

    Raises:
        MalformedMessageError: it begins as a bundle, and has something else in it, or more than one may have.
    """
    if not data.startswith(_TAG):
        return [data]
    if len(data) > _MOST_BYTES:
        raise MalformedMessageError(f"a bundle of {len(data)} bytes, of which it may have {_MOST_BYTES}")
    messages, position = [], 0
    while position < len(data):
        parsed = read_varint(data, position + len(_TAG)) if data.startswith(_TAG, position) else None
        if parsed is None or parsed[0] + parsed[1] > len(data):
            raise MalformedMessageError("a bundle has something else in it")
        length, start = parsed
        position = start + length
        messages.append(data[start:position])
    return messages
