"""The messages of a training stream as the server sends them."""

from __future__ import annotations

from collections.abc import Iterator

from optimd.wire import codec


class Outgoing:
    """Sends one stream's answers, small ones together where its worker reads them so. Belongs to one thread.

    What is given to `put` may be held back until `flush`, which is due before anything is waited for that the worker
    does only when it has that.
    """

    def __init__(self) -> None:
        self.takes_bundles = False
        """Whether the worker reads bundles, as it has said."""
        self._held: list[bytes] = []
        self._held_bytes = 0

    def put(self, message: bytes) -> Iterator[bytes]:
        """What is to be sent now that `message` is to follow what was put before."""
        if not self.takes_bundles:
            yield message
            return
        if self._held_bytes + len(message) > codec.BUNDLE_BYTES:
            yield from self.flush()
        if len(message) > codec.BUNDLE_BYTES:
            yield message
            return
        self._held.append(message)
        self._held_bytes += len(message)

    def flush(self) -> Iterator[bytes]:
        """What was held back."""
        if self._held:
            held, self._held, self._held_bytes = self._held, [], 0
            yield codec.bundle(held)
