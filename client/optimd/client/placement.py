"""Where an optimizer's job is and what it is called: arguments first, then the environment, then defaults."""

from __future__ import annotations

import os
import threading
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch

from optimd.client.embedded import embedded_server
from optimd.client.environment import WorkerEnvironment
from optimd.client.exceptions import ConfigurationError
from optimd.client.jobsettings import APPLY, NONFINITE, ON_EXISTING, encode_aggregation
from optimd.client.layoutexchange import JobRequest
from optimd.client.narrowing import WireEncodings
from optimd.client.options import Async, ProxyOptions, WireDtypes
from optimd.wire.encodings import narrowing_to

# What the workers of one torchrun call their job on the server that only they can reach.
_GROUP_JOB: Final = "torchrun"


class NameRegistry:
    """The names under which this process's optimizers are in their jobs. Thread-safe."""

    def __init__(self) -> None:
        # Reentrant: names are given back by finalizers, which the garbage collector may run in the middle of `take`.
        self._lock = threading.RLock()
        self._taken: set[tuple[str, str]] = set()  # guarded by self._lock

    def take(self, job: str, worker_id: str) -> str:
        """`job`, or `job/k` for the k-th optimizer that this worker has under that name at once."""
        with self._lock:
            number, free = 1, job
            while (free, worker_id) in self._taken:
                number += 1
                free = f"{job}/{number}"
            self._taken.add((free, worker_id))
            return free

    def give_back(self, job: str, worker_id: str) -> None:
        """The optimizer of that name is gone."""
        with self._lock:
            self._taken.discard((job, worker_id))


names: Final = NameRegistry()


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Where a job is and how to ask for it."""

    find_server: Callable[[], str]
    """The server's address. Starts the embedded server where that is meant; blocks meanwhile."""
    request: JobRequest
    world_size: int | None
    """How many workers train; None where they come and go."""
    is_embedded: bool
    """Whether the server is one that nobody starts again."""


def place(
    server: str | None,
    job: str | None,
    options: ProxyOptions,
    environment: WorkerEnvironment,
    *,
    rule: str,
    private: bool = False,
) -> Placement:
    """Decides where a new optimizer's job is. Takes its name: `names.give_back` it.

    Args:
        server: The constructor's argument.
        job: The constructor's argument.
        options: The constructor's argument.
        environment: What the environment says.
        rule: The update rule, by the schema's name.
        private: Whether the job is to be this optimizer's own, whatever the environment calls the others'.

    Raises:
        ConfigurationError: arguments and environment do not say where, or contradict each other.
    """
    world_size = _world_size(options, environment)
    # What this process knows of how many there are, elastic or not.
    count = environment.world_size if world_size is None else world_size
    rank = environment.rank if options.rank is None else options.rank
    if rank is None and world_size is not None:
        rank = 0
    if rank is not None and world_size is not None and rank >= world_size:
        raise ConfigurationError(
            f"rank {rank} does not fit world_size {world_size}: set both in ProxyOptions, or start the workers "
            "with torchrun"
        )
    aggregation = encode_aggregation(options.aggregation, world_size)
    address = server or environment.server
    if address is not None:
        _check_address(address)
    elif count > environment.local_world_size or (count > 1 and environment.host_group is None):
        raise ConfigurationError(
            f"{count} workers that no torchrun has started together on this host need a server that all of "
            'them can reach: start one with `optimd serve` and pass server="host:port" (or set OPTIMD_SERVER)'
        )
    name = None if private else job or environment.job or environment.run_id
    # One that no torchrun has numbered and that names no job is alone, whatever its policy.
    private = name is None and count == 1 and (private or world_size == 1 or environment.host_group is None)
    if private:
        name = f"private-{uuid.uuid4()}"
    elif name is None:
        if address is not None:
            raise ConfigurationError(
                "several workers of one job need a common name for it: pass job=..., set OPTIMD_JOB, or give torchrun "
                "a --rdzv-id"
            )
        name = _GROUP_JOB
    group = environment.host_group if count > 1 else None
    encodings = _encodings(options.wire_dtype)
    worker_id = options.worker_id or _default_worker_id(options, environment, rank)
    return Placement(
        world_size=world_size,
        is_embedded=address is None,
        find_server=(lambda: address) if address is not None else (lambda: embedded_server(group).address),
        request=JobRequest(
            job=names.take(name, worker_id),
            private=private,
            worker_id=worker_id,
            rank=rank,
            rule=rule,
            on_existing=ON_EXISTING[options.on_existing],
            aggregation=aggregation,
            apply=APPLY[options.apply],
            bucket_bytes=options.bucket_bytes or 0,
            max_grad_norm=options.max_grad_norm,
            nonfinite=NONFINITE[options.nonfinite],
            follows_rewind=options.on_rewind == "follow",
            encodings=encodings,
        ),
    )


def _encodings(wire_dtype: torch.dtype | WireDtypes | None) -> WireEncodings:
    asked = (
        wire_dtype if isinstance(wire_dtype, WireDtypes) else WireDtypes(gradients=wire_dtype, parameters=wire_dtype)
    )
    return WireEncodings(gradients=narrowing_to(asked.gradients), parameters=narrowing_to(asked.parameters))


def _default_worker_id(options: ProxyOptions, environment: WorkerEnvironment, rank: int | None) -> str:
    if rank is None:
        # Nobody has numbered the workers: any number of them may be on this host.
        return f"{environment.host}-{os.getpid()}"
    return environment.default_worker_id if options.rank is None else f"{environment.host}-{rank}"


def _world_size(options: ProxyOptions, environment: WorkerEnvironment) -> int | None:
    """How many workers train; None where they come and go as they like."""
    asked = {options.world_size} - {None}
    if isinstance(options.aggregation, Async):
        return None
    asked |= {options.aggregation.world_size} - {None}
    if len(asked) > 1:
        raise ConfigurationError(
            f"ProxyOptions(world_size={options.world_size}) and Sync(world_size={options.aggregation.world_size}) "
            "differ"
        )
    size = asked.pop() if asked else environment.world_size
    return size if isinstance(size, int) else None


def _check_address(address: str) -> None:
    if address.startswith("unix://"):
        return
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ConfigurationError(f'{address!r} is not a server\'s address; write "host:port" or "unix:///path"')
