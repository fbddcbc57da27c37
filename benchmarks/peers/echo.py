"""What the line alone costs: bytes that are sent back as they came, over grpcio and over a bare socket.

Channel and server of the grpcio echo take optimd's own options (private names, since a copy would drift), so that the
difference between the two is what optimd adds: framing, copies into and out of tensors, the update, and bookkeeping.
"""

from __future__ import annotations

import queue
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import ClassVar, Final

import grpc
import torch

from benchmarks import models
from benchmarks.peers.peer import Setting
from benchmarks.venues import Transport
from optimd.client.connection import _CHANNEL_OPTIONS as _CLIENT_OPTIONS
from optimd.server.app import _CHANNEL_OPTIONS as _SERVER_OPTIONS

MIB: Final = 1024 * 1024
MESSAGE_BYTES: Final = (MIB, 2 * MIB, 4 * MIB - 1024)
"""The sizes of messages, of which the best counts. The largest stays under gRPC's limit."""

_SERVICE: Final = "benchmarks.Echo"
_METHOD: Final = "Exchange"
_THREADS: Final = 8
_TIMEOUT_S: Final = 120.0


def echo_over(transport: Transport) -> str:
    """The name of the best echo over `transport`."""
    return f"raw grpcio echo, {'Unix socket' if transport == 'unix' else 'TCP'}"


@dataclass(frozen=True)
class Echo:
    """As many bytes as a step has gradients go up a bidirectional stream, and come back meanwhile."""

    listens: Transport
    message_bytes: int
    bits: bool = False
    has_server: bool = True
    size: int | None = 1

    @property
    def name(self) -> str:
        """With the size of a message."""
        return f"{echo_over(self.listens)}, {round(self.message_bytes / MIB)} MiB"

    def serve(self, setting: Setting, ready: Callable[[], None]) -> None:
        """Serves until the process is killed."""
        server = grpc.server(ThreadPoolExecutor(_THREADS), options=_SERVER_OPTIONS)
        handler: grpc.RpcMethodHandler[bytes, bytes] = grpc.stream_stream_rpc_method_handler(_echo)
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(_SERVICE, {_METHOD: handler}),))
        server.add_insecure_port(setting.address)
        server.start()
        ready()
        server.wait_for_termination()

    def work(self, setting: Setting, rank: int) -> _EchoWorker:
        """The one worker."""
        assert rank == 0
        return _EchoWorker(setting, self.message_bytes)


def _echo(requests: Iterator[bytes], _context: grpc.ServicerContext) -> Iterator[bytes]:
    yield from requests


class _EchoWorker:
    """A stream: opened once and kept, as a training stream is."""

    def __init__(self, setting: Setting, message_bytes: int) -> None:
        whole, rest = divmod(step_bytes(setting), message_bytes)
        # Copies of their own: one message sent again and again would stay in the processor's cache.
        sizes = [message_bytes] * whole + [rest] * bool(rest)
        self._messages = [bytes(bytearray(size)) for size in sizes]
        self._channel = grpc.insecure_channel(setting.address, options=_CLIENT_OPTIONS)
        self._outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        method: grpc.StreamStreamMultiCallable[bytes, bytes] = self._channel.stream_stream(f"/{_SERVICE}/{_METHOD}")
        self._call = method(iter(self._outbox.get, None), wait_for_ready=True)

    def prepare(self, step: int) -> None:
        """There is nothing to prepare."""

    def step(self) -> float:
        """Sends all messages and receives as many, both at once."""
        start = time.perf_counter()
        for message in self._messages:
            self._outbox.put(message)
        for _ in self._messages:
            next(self._call)
        return time.perf_counter() - start

    def digest(self) -> None:
        """Nothing is trained."""

    def close(self) -> None:
        """Ends the stream."""
        self._outbox.put(None)
        self._channel.close()


@dataclass(frozen=True)
class OneWay:
    """As many bytes as a step has gradients go over a bare TCP connection, in one direction, and one comes back."""

    listens: ClassVar[Transport] = "tcp"
    name: str = "raw TCP, one direction"
    bits: bool = False
    has_server: bool = True
    size: int | None = 1

    def serve(self, setting: Setting, ready: Callable[[], None]) -> None:
        """Serves one worker until the process is killed."""
        host, port = setting.address.rsplit(":", 1)
        with socket.create_server((host, int(port))) as listening:
            ready()
            connection, _ = listening.accept()
        buffer = bytearray(MIB)
        while True:
            left = step_bytes(setting)
            while left:
                received = connection.recv_into(buffer, min(left, len(buffer)))
                if not received:
                    return
                left -= received
            connection.sendall(b"\0")

    def work(self, setting: Setting, rank: int) -> _OneWayWorker:
        """The one worker."""
        assert rank == 0
        return _OneWayWorker(setting)


class _OneWayWorker:
    def __init__(self, setting: Setting) -> None:
        host, port = setting.address.rsplit(":", 1)
        self._connection = socket.create_connection((host, int(port)), timeout=_TIMEOUT_S)
        self._payload = bytes(bytearray(step_bytes(setting)))

    def prepare(self, step: int) -> None:
        """There is nothing to prepare."""

    def step(self) -> float:
        """Sends, and waits until all of it is there."""
        start = time.perf_counter()
        self._connection.sendall(self._payload)
        self._connection.recv(1)
        return time.perf_counter() - start

    def digest(self) -> None:
        """Nothing is trained."""

    def close(self) -> None:
        """Ends the connection."""
        self._connection.close()


def step_bytes(setting: Setting) -> int:
    """What a step's gradients take, in bytes."""
    return models.parameter_count(models.build(setting.model)) * torch.float32.itemsize
