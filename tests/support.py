"""What several tests do: run a server, run workers, compare."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch

from optimd.server import Server, ServerConfig
from optimd.server.files import Files

T = TypeVar("T")

ROOT = Path(__file__).resolve().parent.parent


@contextmanager
def running_server(*, files: Files | None = None, **settings: Any) -> Iterator[Server]:
    """A server in this process, on a free loopback port, until the block ends. It keeps its jobs in `files`."""
    config = ServerConfig(**{"address": "127.0.0.1:0", "threads": 1, "health": False, **settings})
    threads = torch.get_num_threads()
    server = Server(config, files=files)
    server.start()
    try:
        yield server
    finally:
        server.stop()
        torch.set_num_threads(threads)


@contextmanager
def server_process(*flags: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server in a process of its own, and its address. Killed when the block ends, if it still runs."""
    ready, ready_of_child = os.pipe()
    with os.fdopen(ready) as announcement:
        process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "optimd.server",
                *(flags if any(flag.startswith("--address") for flag in flags) else ("--address=127.0.0.1:0", *flags)),
                *(() if "--health" in flags else ("--no-health",)),
                f"--ready-fd={ready_of_child}",
            ],
            pass_fds=(ready_of_child,),
            stderr=subprocess.PIPE,
            text=True,
        )
        os.close(ready_of_child)
        try:
            address = announcement.readline().strip()
            assert address, f"the server did not start: {process.communicate(timeout=10)[1]}"
            yield process, address
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
            process.communicate(timeout=10)


def in_threads(work: Callable[[int], T], count: int, *, timeout_s: float = 60) -> list[T]:
    """Runs `work(rank)` for `count` ranks at once. Gives their results, or raises the first error."""
    with ThreadPoolExecutor(count) as pool:
        futures = [pool.submit(work, rank) for rank in range(count)]
        return [future.result(timeout=timeout_s) for future in futures]


def assert_equal_parameters(ours: torch.nn.Module, theirs: torch.nn.Module) -> None:
    """Bit for bit."""
    for (name, mine), (_, other) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert torch.equal(mine, other), name


def assert_equal_states(ours: torch.optim.Optimizer, theirs: torch.optim.Optimizer) -> None:
    """The `state` of two state_dicts, bit for bit, in values, keys and dtypes."""
    mine, other = ours.state_dict()["state"], theirs.state_dict()["state"]
    assert mine.keys() == other.keys()
    for index, entry in other.items():
        assert list(mine[index]) == list(entry)
        for key, value in entry.items():
            assert mine[index][key].dtype == value.dtype, (index, key)
            assert mine[index][key].shape == value.shape, (index, key)
            assert torch.equal(mine[index][key], value), (index, key)


def assert_alike(ours: Any, theirs: Any, at: str = "") -> None:
    """Two nests of dicts, lists, tensors and plain values: to the bit, in types, dtypes, strides and keys."""
    assert type(ours) is type(theirs), at
    if isinstance(ours, torch.Tensor):
        assert (ours.dtype, ours.shape, ours.stride()) == (theirs.dtype, theirs.shape, theirs.stride()), at
        assert torch.equal(ours, theirs), at
    elif isinstance(ours, dict):
        assert ours.keys() == theirs.keys(), at
        for key, value in ours.items():
            assert_alike(value, theirs[key], f"{at}.{key}")
    elif isinstance(ours, list | tuple):
        assert len(ours) == len(theirs), at
        for place, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
            assert_alike(mine, other, f"{at}[{place}]")
    else:
        # By text: a NaN is not equal to itself.
        assert repr(ours) == repr(theirs), at


def eventually(condition: Callable[[], bool], timeout_s: float = 20) -> bool:
    """Whether `condition` comes true in time. For what other processes do, which nothing here can wait for."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if condition():
            return True
        threading.Event().wait(0.02)
    return condition()
