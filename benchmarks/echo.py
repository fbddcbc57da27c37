"""The baseline of every figure over gRPC: a bidirectional stream that sends each message back, and nothing else.

Channel and server take optimd's own options (private names, since a copy would drift), so that the difference between
the two is what optimd adds: framing, copies into and out of tensors, the update, and its bookkeeping. Run as a
program, this is the server.
"""

from __future__ import annotations

import argparse
import os
import queue
import signal
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final

import grpc

from optimd.client.connection import _CHANNEL_OPTIONS as _CLIENT_OPTIONS
from optimd.server.app import _CHANNEL_OPTIONS as _SERVER_OPTIONS
from optimd.wire.limits import DEFAULT_BUCKET_BYTES

_SERVICE: Final = "benchmarks.Echo"
_METHOD: Final = "Exchange"
_THREADS: Final = 8


class EchoStream:
    """A stream to an echo server: opened once and kept, as a training stream is.

    Args:
        address: Where the server listens.
    """

    def __init__(self, address: str) -> None:
        self._channel = grpc.insecure_channel(address, options=_CLIENT_OPTIONS)
        self._outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        method: grpc.StreamStreamMultiCallable[bytes, bytes] = self._channel.stream_stream(f"/{_SERVICE}/{_METHOD}")
        self._call = method(iter(self._outbox.get, None))

    def exchange(self, messages: Sequence[bytes]) -> None:
        """Sends messages and receives as many, both at once. Blocks."""
        for message in messages:
            self._outbox.put(message)
        for _ in messages:
            next(self._call)

    def close(self) -> None:
        """Ends the stream."""
        self._outbox.put(None)
        self._channel.close()


def messages_of(nbytes: int) -> list[bytes]:
    """`nbytes` cut into messages of the size of a bucket."""
    message = bytes(DEFAULT_BUCKET_BYTES)
    whole, rest = divmod(nbytes, DEFAULT_BUCKET_BYTES)
    # Copies of their own: one message sent again and again would stay in the processor's cache.
    return [bytes(bytearray(message)) for _ in range(whole)] + ([bytes(rest)] if rest else [])


def _echo(requests: Iterator[bytes], _context: grpc.ServicerContext) -> Iterator[bytes]:
    yield from requests


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.echo", description="Send every message back.")
    parser.add_argument("addresses", nargs="+", help="where to listen: host:port or unix:///path")
    parser.add_argument("--ready-fd", type=int, required=True, help="a descriptor to write a line to, once ready")
    parsed = parser.parse_args()
    stopping = threading.Event()
    signal.signal(signal.SIGTERM, lambda _number, _frame: stopping.set())
    server = grpc.server(ThreadPoolExecutor(_THREADS), options=_SERVER_OPTIONS)
    handlers: dict[str, grpc.RpcMethodHandler[bytes, bytes]] = {_METHOD: grpc.stream_stream_rpc_method_handler(_echo)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(_SERVICE, handlers),))
    for address in parsed.addresses:
        server.add_insecure_port(address)
    server.start()
    os.write(parsed.ready_fd, b"ready\n")
    os.close(parsed.ready_fd)
    stopping.wait()
    server.stop(grace=0.2).wait()


if __name__ == "__main__":
    main()
