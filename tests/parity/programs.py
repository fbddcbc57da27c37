"""One program, run with torch's optimizers and with optimd's: what it saw has to be the same, bit for bit."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import torch
from torch import nn
from torch.optim import Optimizer

import optimd.client
from optimd.server import Server

Rule = Literal["Adam", "AdamW"]

KERNELS: Final[dict[str, dict[str, Any]]] = {
    "fused": {"fused": True},
    "foreach": {"foreach": True},
    "loop": {"foreach": False, "fused": False},
}
"""torch's three implementations. Left open, optimd and torch choose differently, so that a parity test never does."""


@dataclass(slots=True)
class Library:
    """Whose optimizers a program uses."""

    name: Literal["torch", "optimd"]
    settings: dict[str, Any]
    opened: list[Optimizer] = field(default_factory=list)

    def make(self, rule: Rule, params: Any, **arguments: Any) -> Optimizer:
        """An optimizer, as `torch.optim.<rule>(params, **arguments)` makes one."""
        module = torch.optim if self.name == "torch" else optimd.client
        return self.keep(getattr(module, rule)(params, **arguments, **self.settings))

    def adam(self, params: Any, **arguments: Any) -> Optimizer:
        return self.make("Adam", params, **arguments)

    def keep(self, optimizer: Optimizer) -> Optimizer:
        """Has an optimizer that the program came by otherwise be closed with the others."""
        self.opened.append(optimizer)
        return optimizer


Program = Callable[[Library], Any]


@contextmanager
def _library(name: Literal["torch", "optimd"], **settings: Any) -> Iterator[Library]:
    library = Library(name, settings)
    try:
        yield library
    finally:
        for optimizer in library.opened:
            if isinstance(optimizer, optimd.client.OptimizerProxy):
                optimizer.close()


def assert_same(server: Server, program: Program) -> None:
    """Runs `program` with torch, then with optimd, and compares what it returned."""
    with _library("torch") as torchs:
        expected = program(torchs)
    with _library("optimd", server=server.address) as ours:
        seen = program(ours)
    assert_identical(seen, expected)


def assert_identical(ours: Any, theirs: Any, path: str = "") -> None:
    """Types, dtypes, the order of named keys, and every bit. Errors: text, and a type that torch's `except` catches."""
    match theirs:
        case torch.Tensor():
            assert isinstance(ours, torch.Tensor), f"{path}: optimd: {ours!r}, torch: a tensor"
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True, msg=lambda text: f"{path}: {text}")
        case Mapping():
            assert isinstance(ours, Mapping), f"{path}: optimd: {ours!r}, torch: a mapping"
            # A state_dict's `state` is in the order in which torch's dict happened to get its entries.
            in_order = sorted if all(isinstance(key, int) for key in theirs) else list
            assert in_order(ours) == in_order(theirs), path
            for key in theirs:
                assert_identical(ours[key], theirs[key], f"{path}[{key!r}]")
        case list() | tuple():
            assert type(ours) is type(theirs), f"{path}: optimd: {ours!r}, torch: a {type(theirs).__name__}"
            assert len(ours) == len(theirs), path
            for index, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
                assert_identical(mine, other, f"{path}[{index}]")
        case BaseException():
            assert isinstance(ours, type(theirs)), f"{path}: optimd: {ours!r}, torch: {theirs!r}"
            assert str(ours) == str(theirs), path
        case _:
            assert type(ours) is type(theirs), f"{path}: optimd: {ours!r}, torch: {theirs!r}"
            assert ours == theirs, path


def attempt(action: Callable[[], Any]) -> Any:
    """What `action` returns or raises."""
    try:
        return action()
    except Exception as error:  # noqa: BLE001  # whatever torch raises is what optimd has to raise
        return error


def parameters(dtype: torch.dtype = torch.float32, shapes: Iterable[tuple[int, ...]] = ((9, 7), (13,), ())) -> Any:
    """A few parameters, the same ones each time."""
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, dtype=dtype, generator=generator)) for shape in shapes]


def give_gradients(params: Iterable[torch.Tensor], step: int) -> None:
    """Gradients that depend on nothing but the step's number."""
    generator = torch.Generator().manual_seed(step)
    for p in params:
        p.grad = torch.randn(p.shape, dtype=p.dtype, generator=generator)


def all_parameters(optimizer: Optimizer) -> list[torch.Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def step(optimizer: Optimizer, number: int) -> list[torch.Tensor]:
    """A step with gradients of its own; gives copies of the parameters after it."""
    params = all_parameters(optimizer)
    give_gradients(params, number)
    optimizer.step()
    return values(params)


def values(params: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    return [p.detach().clone() for p in params]


def state_of(optimizer: Optimizer) -> dict[str, Any]:
    """A state_dict that no later step changes."""
    return copy.deepcopy(optimizer.state_dict())


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 20), nn.Tanh(), nn.Linear(20, 3))


def loss_of(model: nn.Module, number: int) -> torch.Tensor:
    """The loss on the step's own data."""
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(number))
    loss: torch.Tensor = model(x).square().sum()
    return loss
