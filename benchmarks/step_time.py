"""How long a step takes: optimd, its peers and a bare echo of the same bytes, in turns."""

from __future__ import annotations

from dataclasses import dataclass, field

from benchmarks import models
from benchmarks.crew import crews
from benchmarks.peers import (
    LOCAL,
    MESSAGE_BYTES,
    Ddp,
    Echo,
    GlooServer,
    Local,
    Naive,
    Optimd,
    Peer,
    RpcServer,
    echo_over,
)
from benchmarks.timing import Contender, Times, take_turns
from benchmarks.venues import Transport, Venue


@dataclass(frozen=True, slots=True, kw_only=True)
class Suite:
    """Who steps what, and how often."""

    model: str
    workers: int
    warmups: int
    rounds: int
    in_a_row: int = 1
    """How many steps are a turn."""
    peers: tuple[Peer, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTimes:
    """The times of one suite, by contender."""

    model: str
    parameters: int
    tensors: int
    workers: int
    times: dict[str, Times]
    """Of the slowest worker in each round."""
    differing: list[str] = field(default_factory=list)
    """Whose parameters did not end as those of the local Adam did, to the last bit, where they should have."""

    def ratio(self, name: str, base: str) -> float | None:
        """What one takes in another's steps; None where one of them was not measured."""
        if name not in self.times or base not in self.times:
            return None
        return self.times[name].median_s / self.times[base].median_s

    def best_echo(self, transport: Transport) -> str | None:
        """The name of the fastest echo over `transport`; None where there was none."""
        names = [name for name in self.times if name.startswith(echo_over(transport))]
        return min(names, key=lambda name: self.times[name].median_s, default=None)


def measure(suite: Suite, venue: Venue) -> StepTimes:
    """Times the steps of a suite. Blocks.

    Raises:
        PeerError: a contender failed.
        ServerStartError: a daemon did not start.
    """
    model = models.build(suite.model)
    parameters, tensors = models.parameter_count(model), len(list(model.parameters()))
    del model
    with crews(suite.peers, suite.model, suite.workers, venue) as started:
        contenders = [Contender(crew.peer.name, crew.step, crew.prepare) for crew in started]
        times = take_turns(contenders, warmups=suite.warmups, rounds=suite.rounds, in_a_row=suite.in_a_row)
        digests = {crew.peer.name: crew.digests() for crew in started if crew.peer.bits}
    expected = digests.get(LOCAL, [None])[0]
    return StepTimes(
        model=suite.model,
        parameters=parameters,
        tensors=tensors,
        workers=suite.workers,
        times=times,
        differing=[name for name, found in digests.items() if expected is not None and set(found) != {expected}],
    )


ONE_WORKER = ", 1 worker"
"""What the name of a contender of several workers that has one nevertheless ends with."""

_UNIX = (Optimd(transport="unix"), Optimd(transport="unix", wire="bf16"))
_TCP = (Optimd(transport="tcp"), Optimd(transport="tcp", wire="bf16"))
_SHM = (Optimd(transport="shm"), Optimd(transport="shm", wire="bf16"))
_SERVERS = (GlooServer(), RpcServer(), Naive())


def _echoes(transport: Transport) -> tuple[Echo, ...]:
    return tuple(Echo(transport, size) for size in MESSAGE_BYTES)


def everything(model: str, *, warmups: int, rounds: int) -> Suite:
    """One worker, and every contender there is for one."""
    echoes = (*_echoes("unix"), *_echoes("tcp"))
    return Suite(
        model=model,
        workers=1,
        warmups=warmups,
        rounds=rounds,
        peers=(Local(), *_SHM, *_UNIX, *_TCP, *echoes, *_SERVERS),
    )


def together(model: str, workers: int, *, warmups: int, rounds: int, in_a_row: int = 1) -> Suite:
    """Several workers in lockstep; one of optimd's beside them."""
    alone = Optimd(transport="tcp", size=1, label=ONE_WORKER)
    ddp = (Ddp(),) if workers == 2 else ()
    return Suite(
        model=model,
        workers=workers,
        warmups=warmups,
        rounds=rounds,
        in_a_row=in_a_row,
        peers=(Local(), _SHM[0], _UNIX[0], *_TCP, alone, *_SERVERS, *ddp),
    )


_SMALL_IN_A_ROW = 40

SMALL = "perceptron-10k"
MIDDLE = "resnet50-26m"
LARGE = "decoder-100m"
QUICK_MIDDLE = "decoder-10m"


def _small(rounds: int) -> Suite:
    # Its gradients fit into one message of any size.
    echoes = (Echo("unix", MESSAGE_BYTES[0]), Echo("tcp", MESSAGE_BYTES[0]))
    return Suite(
        model=SMALL,
        workers=1,
        warmups=1,
        rounds=rounds,
        in_a_row=_SMALL_IN_A_ROW,
        peers=(Local(), *_SHM, *_UNIX, *_TCP, *echoes, *_SERVERS),
    )


_LARGE = Suite(
    model=LARGE,
    workers=1,
    warmups=1,
    rounds=4,
    peers=(Local(), *_SHM, *_TCP, Echo("tcp", MESSAGE_BYTES[1]), GlooServer(), RpcServer()),
)

ON_DEVICE = (
    Suite(model=SMALL, workers=1, warmups=1, rounds=9, in_a_row=_SMALL_IN_A_ROW, peers=(Local(), *_SHM, *_UNIX, *_TCP)),
    Suite(model=MIDDLE, workers=1, warmups=2, rounds=12, peers=(Local(), *_SHM, *_UNIX, *_TCP)),
    Suite(model=MIDDLE, workers=2, warmups=1, rounds=7, peers=(Local(), _SHM[0], *_TCP)),
    Suite(model=LARGE, workers=1, warmups=1, rounds=5, peers=(Local(), *_SHM, *_TCP)),
)
"""optimd alone, beside the local optimizer: the peers are servers on the CPU."""

FULL = (
    _small(15),
    together(SMALL, 2, warmups=1, rounds=8, in_a_row=_SMALL_IN_A_ROW),
    together(SMALL, 4, warmups=1, rounds=5, in_a_row=_SMALL_IN_A_ROW),
    everything(MIDDLE, warmups=2, rounds=12),
    together(MIDDLE, 2, warmups=1, rounds=7),
    together(MIDDLE, 4, warmups=1, rounds=5),
    _LARGE,
)
QUICK = (
    _small(5),
    everything(QUICK_MIDDLE, warmups=1, rounds=5),
    together(QUICK_MIDDLE, 2, warmups=1, rounds=3),
)
