"""Memory that a worker shares with a server on its host: asked about, taken, offered; and the server's, to be read."""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Iterable, Sequence
from typing import Final, Literal

from optimd.client.exceptions import ConfigurationError
from optimd.v1 import job_pb2, reading_pb2
from optimd.wire.layout import Parameter
from optimd.wire.rings import RingReader, RingWriter
from optimd.wire.sharedmemory import FOLDER, RING_BYTES, Mapping, NotSharedError, Segment, is_full
from optimd.wire.sharedvalues import MappedValues
from optimd.wire.tensors import Span, span_of

_log = logging.getLogger("optimd.client")

Transport = Literal["auto", "grpc", "shm"]

_REMEDY: Final = (
    "give the container more (docker run --shm-size, an emptyDir of medium Memory at /dev/shm), or choose "
    'ProxyOptions(transport="grpc")'
)


class Offer:
    """One stream's memory, from the question whether the server finds it to the server's answer.

    Not thread-safe, but for `close`. Whoever makes one closes it.

    Args:
        segment: The memory.
        is_insisted_on: Whether the worker will have nothing else.
    """

    def __init__(self, segment: Segment, *, is_insisted_on: bool = False) -> None:
        self.is_insisted_on = is_insisted_on
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


class ServerValues:
    """The server's own values, where this process can read them. Not thread-safe."""

    def __init__(self) -> None:
        self._files: dict[str, MappedValues] = {}
        self.spans: dict[int, Span] = {}
        """Where the values of the parameters are, by index. Must not be written to: that ends the process."""

    @property
    def are_mapped(self) -> bool:
        """Whether there are any."""
        return bool(self._files)

    def map(self, said: Iterable[job_pb2.SharedValues], parameters: Sequence[Parameter]) -> None:
        """Maps what the server has said, all of it or nothing.

        Args:
            said: `LayoutAccepted.values`.
            parameters: The job's.
        """
        files, spans = dict[str, MappedValues](), dict[int, Span]()
        try:
            for each in said:
                first, end = each.first_parameter, each.first_parameter + each.parameter_count
                if end > len(parameters):
                    # Of a group that this worker has not added yet.
                    continue
                known = self._files.get(each.name)
                files[each.name] = file = known or MappedValues(each.name, each.token, parameters[first:end])
                spans.update((index, span_of(flat)) for index, flat in enumerate(file.flats, first))
        except NotSharedError as error:
            _log.debug("the server's values are not read where they are: %s", error)
            files, spans = {}, {}
        self._files, self.spans = files, spans

    def are_of(self, version: int) -> bool:
        """Whether all that has been read until now is as it was with the `version`th change."""
        return all(file.version == version for file in self._files.values())


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
            return Offer(Segment.create(), is_insisted_on=self._transport == "shm")
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
