"""One contender's processes: its server, where it has one, and its workers, which step when they are told to.

They are forked off a process that has imported everything and done nothing yet, since starting dozens of interpreters
would take longer than what is measured. Each has one torch thread.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final

import torch

from benchmarks.peers import Optimd, Peer, Setting
from benchmarks.processes import optimd_server
from benchmarks.venues import Side, Transport, Venue

_FORKS: Final = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["benchmarks.crew"])
_CLONE_NEWNET: Final = 0x40000000
_NAMESPACES: Final = Path("/run/netns")
_TIMEOUT_S: Final = 180.0
_LEAVE_TIMEOUT_S: Final = 10.0


class PeerError(RuntimeError):
    """A process of a contender failed, or said nothing for minutes."""


class _Child:
    """A forked process, and a pipe to it.

    Args:
        name: Whose, for messages.
        side: Where it runs.
        function: What it does: gets its end of the pipe, and `arguments`.
        arguments: They travel pickled.
    """

    def __init__(self, name: str, side: Side, function: Callable[..., None], *arguments: object) -> None:
        self._name = name
        self._pipe, theirs = _FORKS.Pipe()
        self._process = _FORKS.Process(target=_run, args=(side, theirs, function, arguments), daemon=True)
        self._process.start()
        theirs.close()

    def tell(self, command: str, argument: object = None) -> None:
        """Sends a command. Does not wait."""
        self._pipe.send((command, argument))

    def hear(self) -> Any:
        """Waits for the answer to the last command, or to the start.

        Raises:
            PeerError: there was none.
        """
        if not self._pipe.poll(_TIMEOUT_S):
            raise PeerError(f"{self._name}: no answer within {_TIMEOUT_S:g} s")
        try:
            done, answer = self._pipe.recv()
        except EOFError:
            raise PeerError(f"{self._name}: its process ended") from None
        if not done:
            raise PeerError(f"{self._name}:\n{answer}")
        return answer

    def leave(self) -> None:
        """Has it end by itself, if it does so in time. Blocks."""
        with contextlib.suppress(OSError):
            self.tell("close")
        self._process.join(_LEAVE_TIMEOUT_S)

    def kill(self) -> None:
        """Ends it. Does not wait; may be called more than once."""
        self._process.kill()

    def release(self) -> None:
        """Waits until it has ended, and lets go of it."""
        self._process.join()
        self._pipe.close()


class Crew:
    """A contender's processes. Whoever makes one calls `stop`.

    Args:
        peer: The contender.
        setting: What all of them are told.
        venue: Where they run.
    """

    def __init__(self, peer: Peer, setting: Setting, venue: Venue) -> None:
        self.peer = peer
        self._server: _Child | None = None
        self._workers: list[_Child] = []
        self._setting = setting
        self._venue = venue

    def start_server(self) -> None:
        """Starts the server, where it has one that is forked. Does not wait."""
        if self.peer.has_server:
            self._server = _Child(self.peer.name, self._venue.servers, _serve, self.peer, self._setting)

    def start_workers(self) -> None:
        """Waits for the server, then starts the workers, for which it does not wait."""
        if self._server is not None:
            self._server.hear()
        self._workers = [
            _Child(self.peer.name, self._venue.workers, _work, self.peer, self._setting, rank)
            for rank in range(self.peer.size or self._setting.workers)
        ]

    def await_workers(self) -> None:
        """Waits until all workers can step."""
        self._answers()

    def prepare(self, step: int) -> None:
        """Has every worker compute its gradients. Blocks."""
        self._all("prepare", step)

    def step(self) -> float:
        """Has all workers step at once. Blocks.

        Returns:
            What the slowest took, in seconds.
        """
        seconds: list[float] = self._all("step")
        return max(seconds)

    def digests(self) -> list[str | None]:
        """The checksums of the workers' parameters. Blocks."""
        return self._all("digest")

    def stop(self) -> None:
        """Ends all of it. Blocks."""
        processes = [*self._workers] if self._server is None else [self._server, *self._workers]
        if isinstance(self.peer, Optimd):
            for process in processes:
                process.leave()
        # The others would only report that their partners are gone.
        for process in processes:
            process.kill()
        for process in processes:
            process.release()
        self._server, self._workers = None, []

    def _all(self, command: str, argument: object = None) -> list[Any]:
        for worker in self._workers:
            worker.tell(command, argument)
        return self._answers()

    def _answers(self) -> list[Any]:
        return [worker.hear() for worker in self._workers]


@contextlib.contextmanager
def crews(
    peers: Sequence[Peer], model: str, workers: int, venue: Venue, *, multiplications: int = 0
) -> Iterator[list[Crew]]:
    """All contenders, ready to step; stopped in the end.

    Args:
        peers: The contenders, by distinct names.
        model: What they train.
        workers: How many step together.
        venue: Where.
        multiplications: What the backward computes besides, see `models.Model`.

    Raises:
        PeerError: one of them did not start.
        ServerStartError: a daemon did not.
    """
    with contextlib.ExitStack() as stack:
        daemons = stack.enter_context(_daemons(peers, venue))
        started: list[Crew] = []
        for peer in peers:
            if isinstance(peer, Optimd):
                address = daemons[peer.listens]
            else:
                address = "" if peer.listens is None else venue.address(peer.listens)
            setting = Setting(
                model=model,
                workers=workers,
                address=address,
                multiplications=multiplications,
                device=venue.device,
            )
            crew = Crew(peer, setting, venue)
            stack.callback(crew.stop)
            crew.start_server()
            started.append(crew)
        for crew in started:
            crew.start_workers()
        for crew in started:
            crew.await_workers()
        yield started


@contextlib.contextmanager
def _daemons(peers: Sequence[Peer], venue: Venue) -> Iterator[dict[Transport, str]]:
    """Addresses of the daemons that contenders need: one a transport, since they take turns."""
    transports = sorted({peer.listens for peer in peers if isinstance(peer, Optimd)})
    addresses = {transport: venue.address(transport) for transport in transports}
    with contextlib.ExitStack() as stack, ThreadPoolExecutor() as pool:

        def start(address: str) -> None:
            stack.enter_context(
                optimd_server(address, "--insecure", namespace=venue.servers.namespace, device=venue.device)
            )

        for started in [pool.submit(start, address) for address in addresses.values()]:
            started.result()
        yield addresses


def _run(side: Side, pipe: Connection, function: Callable[..., None], arguments: Sequence[object]) -> None:
    # Ctrl-C ends the benchmark, which then stops its children.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    status = 1
    try:
        if side.namespace is not None:
            _enter(side.namespace)
        os.environ["GLOO_SOCKET_IFNAME"] = os.environ["TP_SOCKET_IFNAME"] = side.interface
        torch.set_num_threads(1)
        function(pipe, *arguments)
        status = 0
    except EOFError:
        # The benchmark is gone.
        pass
    except BaseException:  # noqa: BLE001  # whatever it is, the benchmark reports it
        with contextlib.suppress(OSError):
            pipe.send((False, traceback.format_exc()))
    # What process groups would do on the way out, they would do with partners that are gone.
    os._exit(status)


def _enter(namespace: str) -> None:
    """Moves this thread, and those that it starts, into a network namespace."""
    libc = ctypes.CDLL(None, use_errno=True)
    with (_NAMESPACES / namespace).open() as file:
        if libc.setns(file.fileno(), _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"cannot enter the network namespace {namespace}")


def _serve(pipe: Connection, peer: Peer, setting: Setting) -> None:
    def await_end() -> None:
        # Nothing is sent here: the pipe ends with the benchmark.
        with contextlib.suppress(EOFError, OSError):
            pipe.recv()
        os._exit(0)

    threading.Thread(target=await_end, daemon=True).start()
    peer.serve(setting, lambda: pipe.send((True, None)))


def _work(pipe: Connection, peer: Peer, setting: Setting, rank: int) -> None:
    worker = peer.work(setting, rank)
    pipe.send((True, None))
    while True:
        command, argument = pipe.recv()
        if command == "close":
            worker.close()
            return
        answer: object = None
        if command == "prepare":
            worker.prepare(argument)
        else:
            answer = worker.step() if command == "step" else worker.digest()
        pipe.send((True, answer))
