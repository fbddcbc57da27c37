"""The line to a server: a channel, the training stream, and reads."""

from __future__ import annotations

import logging
import os
import queue
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Final

import grpc

from optimd.client import forks
from optimd.client.credentials import INSECURE, Credentials
from optimd.client.exceptions import (
    CertificateError,
    ConfigurationError,
    ConnectionLostError,
    ForkedProcessError,
    OptimizerClosedError,
    ProtocolError,
    ServerUnavailableError,
)
from optimd.client.receipts import StepReceipt, decode_receipt
from optimd.client.samehost import Offer, SameHost, Transport
from optimd.client.translation import translate
from optimd.v1 import job_pb2, reading_pb2, training_pb2
from optimd.v1.optimizer_service_pb2_grpc import OptimizerServiceStub
from optimd.wire.bundles import bundled, unbundle
from optimd.wire.codec import Frame, MalformedMessageError, decode
from optimd.wire.methods import READ_STATE, TRAIN, WATCHING_HEADER
from optimd.wire.placement import placed
from optimd.wire.rings import RingReader, RingWriter

_log = logging.getLogger(__name__)

_CHANNEL_OPTIONS: Final = (
    # A server that is started again is found soon; the core would wait for up to two minutes.
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    # A server whose machine is gone is noticed within a minute, and so is one that is stopped.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.max_frame_size", 4 * 1024 * 1024),
    ("grpc.http2.lookahead_bytes", 8 * 1024 * 1024),
    # A server that has come back under another address, as a pod does, is not looked for under its old one for long.
    ("grpc.dns_min_time_between_resolutions_ms", 1_000),
    # One connection for each optimizer: two of them do not wait for each other's flow control.
    ("grpc.use_local_subchannel_pool", 1),
)

_FIRST_PATIENCE_S: Final = 3.0
"""How long a server is waited for before it is looked at whether TLS is the problem, in seconds."""

Metadata = tuple[tuple[str, str], ...]

LEAVE_TIMEOUT_S: Final = 5.0
"""How long `close()` waits for the server to see the worker off, in seconds."""


class TrainStream:
    """A training stream: opened once and kept.

    gRPC drains `send`'s iterators in a thread of its own, message by message, as flow control lets it; `receive`
    reads in the calling thread. So both directions of the line are used at once, and at most two messages are held.
    Belongs to one thread, but for `cancel`.

    Args:
        channel: The line.
        address: The server's address, for messages.
        metadata: What goes with the call.
        offer: Memory that the server is to be offered. The stream closes it.
    """

    def __init__(
        self, channel: grpc.Channel, address: str, metadata: Metadata = (), offer: Offer | None = None
    ) -> None:
        self.address = address
        self.offer = offer
        self.ring: RingWriter | None = None
        """Where gradients may be placed, once the server has taken the offer."""
        self._ring: RingReader | None = None
        # Bounded by its use: one iterator is sent at a time, the next only when it is answered, and what is sent ahead
        # of a push ends when the next is given.
        self._outbox: queue.SimpleQueue[Iterable[bytes] | None] = queue.SimpleQueue()
        self._counter = _Counter()
        method: grpc.StreamStreamMultiCallable[bytes, bytes] = channel.stream_stream(TRAIN)
        self._call = method(_drain(self._outbox, self._counter), metadata=metadata)
        # What has come in one bundle and has not been read yet.
        self._here: deque[bytes] = deque()
        self.takes_bundles = False
        """Whether the server reads bundles, as it has said."""
        self.takes_ahead = False
        """Whether it takes gradients ahead of their push."""
        self._finish: Callable[[], object] | None = None
        self.bytes_received = 0

    @property
    def has_ended(self) -> bool:
        """Whether nothing more will come, as far as this side knows yet."""
        return not self._call.is_active()

    @property
    def bytes_sent(self) -> int:
        """Bytes of the messages sent so far."""
        return self._counter.nbytes

    def send(self, messages: Iterable[bytes]) -> None:
        """Sends serialised messages, in order, while the caller goes on. What they read must not change meanwhile."""
        self._end_ahead()
        self._outbox.put(bundled(messages, self.ring) if self.takes_bundles else messages)

    def _end_ahead(self) -> None:
        """What is being sent comes to its end. Whoever gave it is not kept: it refers to this stream."""
        finish, self._finish = self._finish, None
        if finish is not None:
            finish()

    def send_until(self, messages: Iterable[bytes], finish: Callable[[], object]) -> None:
        """Sends serialised messages, bundled by whoever makes them, as they are made. Does not wait.

        Args:
            messages: The messages. They come to their end once `finish` has been called.
            finish: Called before anything else is sent, and when the stream ends. May be called more than once, and
                from any thread.
        """
        self._finish = finish
        self._outbox.put(messages)

    def receive(self) -> tuple[str, training_pb2.TrainResponse, Frame]:
        """The next message and the name of its kind. Blocks.

        The payload of the one before may be gone with this: it lies where the server goes on writing.

        Raises:
            OptimdError: the stream has ended; with what the server said.
        """
        if self._ring is not None:
            self._ring.release()
        data = None if self._here else self._next()
        try:
            if data is not None:
                self._here.extend(unbundle(data))
                # Nothing may hold a message that its reader is done with.
                del data
            message, frame = decode(training_pb2.TrainResponse, self._here.popleft())
            kind = message.WhichOneof("message") or ""
            if kind == "bucket":
                frame = placed(message.bucket, frame, self._ring)
        except ValueError as error:
            raise ProtocolError(f"the server at {self.address} sent what cannot be read: {error}") from error
        if kind == "layout_accepted":
            self._take(message.layout_accepted)
        return kind, message, frame

    def _take(self, accepted: job_pb2.LayoutAccepted) -> None:
        """The server has said what it knows how to do."""
        self.takes_bundles = accepted.takes_bundles
        self.takes_ahead = accepted.takes_ahead
        if self.offer is None:
            return
        if self.offer.is_insisted_on and not accepted.shared_memory:
            self.offer.close()
            raise ConfigurationError(
                'ProxyOptions(transport="shm"): the server found this worker\'s memory, and could not map it; its log '
                'says why. Choose "auto" or "grpc" to do without'
            )
        rings = self.offer.accept() if accepted.shared_memory else None
        if rings is not None:
            self.ring, self._ring = rings
        self.offer.close()

    def _next(self) -> bytes:
        try:
            data = next(self._call)
        except StopIteration:
            raise ConnectionLostError(f"the server at {self.address} ended the stream") from None
        except grpc.RpcError as error:
            if self._counter.failure is not None:
                raise self._counter.failure from None
            raise translate(error, self.address) from error
        self.bytes_received += len(data)
        return data

    def expect(self, *kinds: str) -> tuple[str, training_pb2.TrainResponse, Frame]:
        """The next message, which must be of one of `kinds`. Blocks.

        Raises:
            ProtocolError: it is not.
            OptimdError: the stream has ended.
        """
        received = self.receive()
        if received[0] not in kinds:
            raise ProtocolError(f"the server at {self.address} sent {received[0]!r} where {' or '.join(kinds)} was due")
        return received

    def close_side(self) -> None:
        """Closes the worker's side, behind all that was sent. Does not wait; any thread may call it, more than once."""
        self._end_ahead()
        self._outbox.put(None)

    def finish(self) -> None:
        """Closes the worker's side and waits, up to `LEAVE_TIMEOUT_S`, until the server has closed its own."""
        self.close_side()
        waited = queue.SimpleQueue[None]()
        if self._call.add_callback(lambda: waited.put(None)):
            try:
                waited.get(timeout=LEAVE_TIMEOUT_S)
            except queue.Empty:
                self._call.cancel()

    def cancel(self) -> None:
        """Ends the stream at once, without a word. May be called from any thread, and more than once."""
        self._end_ahead()
        self._outbox.put(None)
        self._call.cancel()
        if self.offer is not None:
            self.offer.close()


class StepStream:
    """A `WatchSteps` call: a job's steps, as the server commits them. Belongs to one thread, but for `cancel`."""

    def __init__(
        self, channel: grpc.Channel, address: str, request: reading_pb2.WatchStepsRequest, metadata: Metadata = ()
    ) -> None:
        self._address = address
        self._call = OptimizerServiceStub(channel).WatchSteps(request, metadata=metadata)

    def await_begin(self) -> int:
        """Waits until the server has taken the call, from when on no step is missed. Gives the job's step then.

        Raises:
            OptimdError: it has not; with what it said.
        """
        for key, step in self._call.initial_metadata() or ():
            if key == WATCHING_HEADER:
                return int(step)
        self.receive()
        raise ProtocolError(f"the server at {self._address} tells of steps without a header")

    def receive(self) -> StepReceipt:
        """The receipt of the next step. Blocks.

        Raises:
            OptimdError: the stream has ended; with what the server said.
        """
        try:
            message = next(self._call)
        except StopIteration:
            raise ConnectionLostError(f"the server at {self._address} ended the stream of steps") from None
        except grpc.RpcError as error:
            failure = translate(error, self._address)
            # gRPC raises the call itself, which with a traceback would hold itself until the cycle collector comes.
            error.__traceback__ = None
            raise failure from None
        return decode_receipt(message.receipt, contributed=message.contributed)

    def cancel(self) -> None:
        """Ends the stream at once. May be called from any thread, and more than once."""
        self._call.cancel()


def _code_of(error: grpc.RpcError) -> grpc.StatusCode | None:
    return error.code() if isinstance(error, grpc.Call) else None


class _Counter:
    """What the sending thread tells the receiving one."""

    def __init__(self) -> None:
        self.nbytes = 0
        self.failure: BaseException | None = None


def _drain(outbox: queue.SimpleQueue[Iterable[bytes] | None], counter: _Counter) -> Iterator[bytes]:
    """What gRPC's sending thread iterates. Knows no stream, so that a dropped one is not kept alive by its thread."""
    while (messages := outbox.get()) is not None:
        try:
            for message in messages:
                counter.nbytes += len(message)
                yield message
        except Exception as error:
            # gRPC would report a cancelled call: keep what really happened.
            counter.failure = error
            raise
        # Between two pushes nothing may hold the last one's gradients.
        del messages


class Connection:
    """A channel to one server.

    Args:
        address: "host:port" or "unix:///path".
        transport: How the payloads of training streams travel, as `ProxyOptions.transport` says.
        credentials: What it is opened with.

    Raises:
        ConfigurationError: the credentials cannot be used.
    """

    def __init__(self, address: str, transport: Transport = "grpc", credentials: Credentials = INSECURE) -> None:
        self.address = address
        self._credentials = credentials
        self._stamp = credentials.stamp()
        self._same_host = SameHost(transport)
        self._offer: Offer | None = None
        self._channel: grpc.Channel | None = credentials.channel(address, _CHANNEL_OPTIONS)
        self._stream: TrainStream | None = None
        self._watch: StepStream | None = None
        self._beat: object = None
        self._pid = os.getpid()
        forks.watch(self)

    def forked(self) -> object:
        """In a child: leaves the parent's channel and streams alone for good."""
        kept = (self._channel, self._stream, self._watch, self._beat)
        self._channel = self._stream = self._watch = self._beat = None
        return kept

    @property
    def is_own(self) -> bool:
        """Whether this process opened it. In a forked child nothing of it may be touched."""
        return os.getpid() == self._pid

    def check(self) -> grpc.Channel:
        """The channel, if it can be used here.

        Raises:
            ForkedProcessError: this process is a child of the one that opened it.
            OptimizerClosedError: it is closed.
        """
        if not self.is_own:
            raise ForkedProcessError(
                f"this optimizer belongs to process {self._pid}; a forked child cannot use it. Create one in the "
                "child, or start the child with the spawn method"
            )
        if self._channel is None:
            raise OptimizerClosedError("this optimizer is closed")
        return self._channel

    def reach(self, timeout_s: float) -> None:
        """Waits for a server to answer, and has the next stream share memory with it where that can be.

        Raises:
            ServerUnavailableError: none did within `timeout_s` seconds.
            CertificateError: the two sides do not accept each other.
            ConfigurationError: memory is to be shared, and cannot be; or the credentials cannot be used.
            OptimdError: what answered is not an optimd server, or does not let this worker in.
        """
        self._drop_offer()
        self._take_new_certificates()
        offer = self._same_host.make_offer()
        try:
            answer = self.probe(timeout_s, None if offer is None else offer.question())
        except BaseException:
            if offer is not None:
                offer.close()
            raise
        self._offer = self._same_host.settle(offer, answer)

    def probe(
        self, timeout_s: float, question: job_pb2.SharedMemory | None = None
    ) -> reading_pb2.GetCapabilitiesResponse:
        """What the server is. Waits for one to answer.

        Args:
            timeout_s: How long, in seconds.
            question: Memory that the server may find.

        Raises:
            ServerUnavailableError: none did in time.
            CertificateError: the two sides do not accept each other.
            OptimdError: what answered is not an optimd server, or does not let this worker in.
        """
        deadline = time.monotonic() + timeout_s
        call = OptimizerServiceStub(self.check()).GetCapabilities
        request = reading_pb2.GetCapabilitiesRequest(shared_memory=question)
        metadata = self._credentials.metadata()
        try:
            return call(request, timeout=timeout_s, metadata=metadata)
        except grpc.RpcError as error:
            failure = translate(error, self.address)
            if (
                not isinstance(failure, ConnectionLostError)
                and _code_of(error) is not grpc.StatusCode.DEADLINE_EXCEEDED
            ):
                raise failure from error
        patience_s = _FIRST_PATIENCE_S
        while True:
            # Whenever something has begun to listen there, and files may be others by now.
            problem = self._credentials.problem(self.address)
            if problem is not None:
                raise CertificateError(problem)
            self._take_new_certificates()
            call = OptimizerServiceStub(self.check()).GetCapabilities
            left = max(0.1, deadline - time.monotonic())
            try:
                return call(
                    request,
                    timeout=min(left, patience_s),
                    wait_for_ready=True,
                    metadata=self._credentials.metadata(),
                )
            except grpc.RpcError as error:
                if _code_of(error) is not grpc.StatusCode.DEADLINE_EXCEEDED:
                    raise translate(error, self.address) from error
                if left <= patience_s:
                    raise ServerUnavailableError(
                        f"no optimd server answered at {self.address} within {timeout_s:g} s. Is it running (optimd "
                        "serve), and is the address right? ProxyOptions(retry_timeout_s=...) sets how long to try"
                    ) from error
            # A server that is slow to answer is given longer.
            patience_s *= 2

    def _take_new_certificates(self) -> None:
        """A line that is to be opened anew is opened with what the files have now."""
        stamp = self._credentials.stamp()
        if stamp == self._stamp:
            return
        old = self.check()
        try:
            self._channel = self._credentials.channel(self.address, _CHANNEL_OPTIONS)
        except ConfigurationError as error:
            # Half of them have been replaced, perhaps. They are looked at again with the next line.
            _log.warning("the certificates stay as they were: %s", error)
            return
        self._stamp = stamp
        old.close()

    def beat(self, request: reading_pb2.HeartbeatRequest, timeout_s: float) -> None:
        """Tells the server that a worker is alive, unless this is closed. Does not wait; any thread may call it."""
        channel = self._channel
        if channel is not None and self.is_own:
            try:
                # Kept, since gRPC cancels a call that nobody refers to.
                self._beat = OptimizerServiceStub(channel).Heartbeat.future(
                    request, timeout=timeout_s, metadata=self._credentials.metadata()
                )
            except ValueError:
                # Closed in another thread, just now; or the token's file is being replaced.
                return

    def open_stream(self) -> TrainStream:
        """Opens the training stream, in the place of one that has broken. Does not wait."""
        if self._stream is not None:
            self._stream.cancel()
        offer, self._offer = self._offer, None
        self._stream = TrainStream(self.check(), self.address, self._credentials.metadata(), offer)
        return self._stream

    def _drop_offer(self) -> None:
        offer, self._offer = self._offer, None
        if offer is not None:
            offer.close()

    def read_state(
        self, request: reading_pb2.ReadStateRequest
    ) -> Iterator[tuple[reading_pb2.ReadStateResponse, Frame]]:
        """The parts of a `ReadState` answer, as they come. Blocks.

        Raises:
            OptimdError: the call has failed; with what the server said.
        """
        method: grpc.UnaryStreamMultiCallable[bytes, bytes] = self.check().unary_stream(READ_STATE)
        call = method(request.SerializeToString(), metadata=self._credentials.metadata())
        try:
            for data in call:
                yield decode(reading_pb2.ReadStateResponse, data)
        except grpc.RpcError as error:
            raise translate(error, self.address) from error
        except MalformedMessageError as error:
            raise ProtocolError(f"the server at {self.address} sent what cannot be read: {error}") from error
        finally:
            call.cancel()

    def snapshot(self, job: str) -> reading_pb2.SnapshotResponse:
        """Has the server write a snapshot of a job. Blocks until it is on disk.

        Raises:
            OptimdError: the call has failed; with what the server said.
        """
        try:
            return OptimizerServiceStub(self.check()).Snapshot(
                reading_pb2.SnapshotRequest(job=job), metadata=self._credentials.metadata()
            )
        except grpc.RpcError as error:
            raise translate(error, self.address) from error

    def watch_steps(self, job: str, worker_id: str, *, after_step: int) -> StepStream:
        """Opens a stream of a job's steps behind `after_step`; at most one at a time. Does not wait.

        Raises:
            OptimdError: the connection cannot be used.
        """
        request = reading_pb2.WatchStepsRequest(job=job, worker_id=worker_id, after_step=after_step)
        self._watch = StepStream(self.check(), self.address, request, self._credentials.metadata())
        return self._watch

    def end_watch(self, stream: StepStream) -> None:
        """Ends such a stream. May be called from any thread, and more than once."""
        if not self.is_own:
            return
        stream.cancel()
        if self._watch is stream:
            self._watch = None

    def close(self) -> None:
        """Ends the streams and the channel at once. May be called from any thread, and more than once."""
        stream, watch, channel = self._stream, self._watch, self._channel
        self._stream = self._watch = self._channel = self._beat = None
        if not self.is_own:
            return
        self._drop_offer()
        if stream is not None:
            stream.cancel()
        if watch is not None:
            watch.cancel()
        if channel is not None:
            channel.close()
