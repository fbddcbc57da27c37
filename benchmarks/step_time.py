"""How long a step takes: a local Adam, the daemon over two transports, and a bare echo of the same bytes."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import torch

from benchmarks import models
from benchmarks.echo import EchoStream, messages_of
from benchmarks.processes import echo_server, loopback_address, optimd_server, unix_address
from benchmarks.timing import Contender, Times, take_turns
from optimd.client import Adam

LOCAL: Final = "torch.optim.Adam(fused=True)"
TRANSPORTS: Final = ("Unix socket", "TCP loopback")


@dataclass(frozen=True, slots=True, kw_only=True)
class Rounds:
    """How often a model is stepped."""

    model: str
    warmups: int
    rounds: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTimes:
    """The times of one model."""

    model: str
    parameters: int
    tensors: int
    times: dict[str, Times]
    bit_equal: bool
    """Whether all optimizers ended with the same parameters, as they must after equal gradients."""


FULL: Final = (
    Rounds(model="perceptron-10k", warmups=20, rounds=400),
    Rounds(model="resnet50-26m", warmups=3, rounds=30),
)
QUICK: Final = (
    Rounds(model="perceptron-10k", warmups=10, rounds=150),
    Rounds(model="resnet50-26m", warmups=2, rounds=8),
)


@dataclass(frozen=True, slots=True)
class _Servers:
    optimd: dict[str, str]
    """Addresses by transport."""
    echo: dict[str, str]


def optimd_over(transport: str) -> str:
    """The name of the contender that steps on the daemon over `transport`."""
    return f"optimd, {transport}"


def echo_over(transport: str) -> str:
    """The name of the contender that echoes bytes over `transport`."""
    return f"raw grpcio echo, {transport}"


def measure(plan: tuple[Rounds, ...]) -> list[StepTimes]:
    """Times the steps of each model of `plan` with one worker and one torch thread in every process. Blocks."""
    torch.set_num_threads(1)
    with _serving() as servers:
        return [_measure_model(rounds, servers) for rounds in plan]


@contextmanager
def _serving() -> Iterator[_Servers]:
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="optimd-bench-")))
        optimd = (unix_address(folder, "optimd"), loopback_address())
        for address in optimd:
            stack.enter_context(optimd_server(address))
        echo = (unix_address(folder, "echo"), loopback_address())
        stack.enter_context(echo_server(*echo))
        yield _Servers(dict(zip(TRANSPORTS, optimd, strict=True)), dict(zip(TRANSPORTS, echo, strict=True)))


def _measure_model(rounds: Rounds, servers: _Servers) -> StepTimes:
    with ExitStack() as stack:
        trained = [models.build(rounds.model) for _ in range(1 + len(TRANSPORTS))]
        count = models.parameter_count(trained[0])
        contenders = [_stepping(LOCAL, trained[0], torch.optim.Adam(trained[0].parameters(), fused=True))]
        messages = messages_of(count * torch.float32.itemsize)
        for transport, model in zip(TRANSPORTS, trained[1:], strict=True):
            remote = stack.enter_context(Adam(model.parameters(), server=servers.optimd[transport]))
            contenders.append(_stepping(optimd_over(transport), model, remote))
            stream = EchoStream(servers.echo[transport])
            stack.callback(stream.close)
            contenders.append(Contender(echo_over(transport), partial(stream.exchange, messages)))
        times = take_turns(contenders, warmups=rounds.warmups, rounds=rounds.rounds)
        return StepTimes(
            model=rounds.model,
            parameters=count,
            tensors=len(list(trained[0].parameters())),
            times=times,
            bit_equal=all(models.bit_equal(trained[0], other) for other in trained[1:]),
        )


def _stepping(name: str, model: models.Model, optimizer: torch.optim.Adam) -> Contender:
    def prepare(number: int) -> None:
        optimizer.zero_grad(set_to_none=True)
        models.compute_gradients(model, number)

    return Contender(name, optimizer.step, prepare)
