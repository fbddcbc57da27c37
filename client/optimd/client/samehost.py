"""Memory that a worker shares with a server on its host: asked about, taken, offered."""

from __future__ import annotations

import logging
import threading
import warnings
from typing import Final, Literal

from optimd.client.exceptions import ConfigurationError
from optimd.v1 import job_pb2, reading_pb2
from optimd.wire.rings import RingReader, RingWriter
from optimd.wire.sharedmemory import FOLDER, RING_BYTES, Mapping, Segment, is_full

_log = logging.getLogger("optimd.client")

Transport = Literal["auto", "grpc", "shm"]

_REMEDY: Final = (
    "give the container more (docker run --shm-size, an emptyDir of medium Memory at /dev/shm), or choose "
    'ProxyOptions(transport="grpc")'
)


class Offer:
    """One stream's memory, from the question whether the server finds it to the server's answer.

    Not thread-safe, but for `close`. Whoever makes one closes it.
    """

    def __init__(self, segment: Segment) -> None:
        self._segment = segment
        self._mapping: Mapping | None = None

    def question(self) -> job_pb2.SharedMemory:
        """Asks a server whether it finds the file."""
        return job_pb2.SharedMemory(name=self._segment.name, token=self._segment.token)

    def reserve(self) -> None:
        """Takes the memory.

        Raises:
            OSError: there is not as much.
        """
        self._mapping = self._segment.reserve()

    def message(self) -> job_pb2.SharedMemory:
        """What a stream begins with."""
        message = self.question()
        message.up_bytes = message.down_bytes = RING_BYTES
        return message

    def accept(self) -> tuple[RingWriter, RingReader] | None:
        """The server has mapped it: where to write and to read. None where that has been said before."""
        mapping, self._mapping = self._mapping, None
        self.close()
        return None if mapping is None else mapping.worker_side()

    def close(self) -> None:
        """Removes the file, which nobody needs any more. May be called more than once, and from any thread."""
        self._segment.close()


class SameHost:
    """Finds out, before each stream, whether it can have memory that it shares with the server. Not thread-safe.

    Args:
        transport: What the worker wants: "auto" takes what is there, "shm" insists, "grpc" shares none.
    """

    _warned = threading.Event()
    """Set once this process has been told that there is too little shared memory."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def make_offer(self) -> Offer | None:
        """Something for a server to find; None where none is wanted or possible.

        Raises:
            ConfigurationError: it is insisted on, and impossible.
        """
        if self._transport == "grpc":
            return None
        try:
            return Offer(Segment.create())
        except OSError as error:
            self._fail(error)
            return None

    def settle(self, offer: Offer | None, answer: reading_pb2.GetCapabilitiesResponse) -> Offer | None:
        """The server has answered whether it finds an offer: the offer, with memory, if it does.

        Raises:
            ConfigurationError: the worker insists on sharing memory, and cannot.
        """
        if offer is None:
            return None
        try:
            if answer.shares_memory:
                offer.reserve()
                return offer
        except OSError as error:
            offer.close()
            self._fail(error)
            return None
        offer.close()
        reason = answer.not_shared_because or "the server does not know how to"
        if self._transport == "shm":
            raise ConfigurationError(
                f'ProxyOptions(transport="shm"): {reason}. Run both on one host, as one user and with one /dev/shm, or '
                'choose "auto" or "grpc"'
            )
        _log.debug("payloads go through gRPC: %s", reason)
        return None

    def _fail(self, error: OSError) -> None:
        reason = f"there is too little memory in {FOLDER}" if is_full(error) else f"{FOLDER}: {error.strerror}"
        if self._transport == "shm":
            raise ConfigurationError(f'ProxyOptions(transport="shm"): {reason}; {_REMEDY}') from error
        if is_full(error) and not self._warned.is_set():
            self._warned.set()
            warnings.warn(f"payloads go through gRPC, although the server is near: {reason}; {_REMEDY}", stacklevel=2)
        else:
            _log.debug("payloads go through gRPC: %s", reason)
