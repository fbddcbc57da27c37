"""Faults at an exact message of a worker's push, with the server at an exact message of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from optimd.client import Adam, ConnectionLostError, pushes, session
from optimd.client.connection import TrainStream
from optimd.client.jobline import JobLine
from optimd.server.incoming import Incoming
from optimd.wire import bundles
from tests.support import eventually


class PushFaults:
    """Has something happen once in a push of one worker. Both of its ends are in this process.

    Made before the worker is, which is told by `of`.

    Args:
        monkeypatch: Takes it all back.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._line: JobLine | None = None
        self._before_sending: tuple[int, Callable[[], object]] | None = None
        self._before_reading: tuple[int, int, Callable[[], object]] | None = None
        self._incoming: Incoming | None = None
        self._read = 0
        self.done = 0
        """How many messages of the push the server is done with."""
        self.fired = 0
        # So that each message is one that the line can be cut at.
        monkeypatch.setattr(bundles, "BUNDLE_BYTES", 0)
        self._patch_server(monkeypatch)
        self._patch_client(monkeypatch)

    def of(self, optimizer: Adam) -> None:
        """The worker is this one."""
        self._line = optimizer._open_session()._line

    def before_sending(self, number: int, act: Callable[[], object]) -> None:
        """Acts before the push's message `number`, from 0, goes out, when the server is done with those before it."""
        self._before_sending = number, act

    def before_reading(self, number: int, act: Callable[[], object], *, done: int) -> None:
        """Acts, and the line is lost, before answer `number` is read, when the server is done with `done` messages."""
        self._before_reading = number, done, act

    @property
    def is_over(self) -> bool:
        """Whether all has happened that was asked for."""
        return self._before_sending is None and self._before_reading is None

    def _act(self, done: int, act: Callable[[], object]) -> None:
        assert eventually(lambda: self.done >= done), f"the server has not come to message {done} of the push"
        self.fired += 1
        act()

    def _is_of_worker(self, incoming: Incoming) -> bool:
        served: Any = getattr(incoming._on_message, "__self__", None)
        return self._line is not None and served._member.worker.worker_id == self._line.request.worker_id

    def _patch_server(self, monkeypatch: pytest.MonkeyPatch) -> None:
        original = Incoming.receive

        def receive(incoming: Incoming) -> Any:
            # What came before is done with: the next message is asked for.
            if incoming is self._incoming:
                self.done += 1
            received = original(incoming)
            if received is not None and received[0] == "step_begin" and self._is_of_worker(incoming):
                self.done, self._incoming = 0, incoming
            return received

        monkeypatch.setattr(Incoming, "receive", receive)

    def _patch_client(self, monkeypatch: pytest.MonkeyPatch) -> None:
        original, receive = pushes.push_messages, TrainStream.receive

        def sending(layout: Any, *args: Any) -> Iterator[bytes]:
            messages = original(layout, *args)
            if self._line is None or layout is not self._line.layout:
                return messages
            self._incoming, self.done, self._read = None, 0, 0
            return stopping(messages)

        def stopping(messages: Iterator[bytes]) -> Iterator[bytes]:
            for number, message in enumerate(messages):
                if self._before_sending is not None and self._before_sending[0] == number:
                    act, self._before_sending = self._before_sending[1], None
                    self._act(number, act)
                yield message

        def reading(stream: TrainStream) -> Any:
            if self._line is None or stream is not self._line._stream:
                return receive(stream)
            fault = self._before_reading
            if fault is not None and self._read == fault[0]:
                self._before_reading = None
                self._act(fault[1], fault[2])
                raise ConnectionLostError("the line was cut")
            received = receive(stream)
            self._read += 1
            return received

        monkeypatch.setattr(session, "push_messages", sending)
        monkeypatch.setattr(TrainStream, "receive", reading)
