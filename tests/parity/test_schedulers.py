"""Every scheduler of torch's drives a remote optimizer to torch's numbers, bit for bit."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from typing import Any, Final

import pytest
import torch
from torch import nn
from torch.optim import Optimizer, lr_scheduler, swa_utils

from optimd.server import Server
from tests.parity.programs import (
    KERNELS,
    Library,
    all_parameters,
    assert_same,
    give_gradients,
    parameters,
    state_of,
    step,
    values,
)

STEPS: Final = 20

Build = Callable[[Optimizer], Any]


def warmup_then_cosine(optimizer: Optimizer) -> Any:
    warmup = lr_scheduler.LinearLR(optimizer, start_factor=0.01, total_iters=5)
    cosine = lr_scheduler.CosineAnnealingLR(optimizer, T_max=15)
    return lr_scheduler.SequentialLR(optimizer, [warmup, cosine], milestones=[5])


def three_in_sequence(optimizer: Optimizer) -> Any:
    return lr_scheduler.SequentialLR(
        optimizer,
        [
            lr_scheduler.ConstantLR(optimizer, factor=0.1, total_iters=4),
            lr_scheduler.ExponentialLR(optimizer, gamma=0.9),
            lr_scheduler.StepLR(optimizer, step_size=2),
        ],
        milestones=[4, 11],
    )


def chained(optimizer: Optimizer) -> Any:
    return lr_scheduler.ChainedScheduler(
        [
            lr_scheduler.ConstantLR(optimizer, factor=0.1, total_iters=4),
            lr_scheduler.ExponentialLR(optimizer, gamma=0.9),
            lr_scheduler.MultiStepLR(optimizer, [6, 12], gamma=0.5),
        ],
        optimizer=optimizer,
    )


def transformer_warmup(optimizer: Optimizer) -> Any:
    """The schedule of "Attention is all you need", as it is usually written."""
    return lr_scheduler.LambdaLR(optimizer, lambda step: min((step + 1) ** -0.5, (step + 1) * 6**-1.5))


CASES: Final[dict[str, tuple[type, Build]]] = {
    "LambdaLR": (lr_scheduler.LambdaLR, lambda o: lr_scheduler.LambdaLR(o, [lambda n: 0.9**n, lambda n: 1 / (n + 1)])),
    "LambdaLR, zero at first": (lr_scheduler.LambdaLR, lambda o: lr_scheduler.LambdaLR(o, lambda n: n / 10)),
    "LambdaLR, transformer": (lr_scheduler.LambdaLR, transformer_warmup),
    "MultiplicativeLR": (
        lr_scheduler.MultiplicativeLR,
        lambda o: lr_scheduler.MultiplicativeLR(o, [lambda _: 0.95, lambda n: 1 - 0.01 * n]),
    ),
    "StepLR": (lr_scheduler.StepLR, lambda o: lr_scheduler.StepLR(o, step_size=3, gamma=0.5)),
    "MultiStepLR": (lr_scheduler.MultiStepLR, lambda o: lr_scheduler.MultiStepLR(o, [2, 7, 7, 15], gamma=0.3)),
    "ConstantLR": (lr_scheduler.ConstantLR, lambda o: lr_scheduler.ConstantLR(o, factor=0.25, total_iters=7)),
    "LinearLR": (lr_scheduler.LinearLR, lambda o: lr_scheduler.LinearLR(o, 0.1, 0.7, total_iters=12)),
    "ExponentialLR": (lr_scheduler.ExponentialLR, lambda o: lr_scheduler.ExponentialLR(o, gamma=0.9)),
    "PolynomialLR": (lr_scheduler.PolynomialLR, lambda o: lr_scheduler.PolynomialLR(o, total_iters=15, power=2.0)),
    "CosineAnnealingLR": (
        lr_scheduler.CosineAnnealingLR,
        lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=8, eta_min=1e-4),
    ),
    "CosineAnnealingWarmRestarts": (
        lr_scheduler.CosineAnnealingWarmRestarts,
        lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=3, T_mult=2, eta_min=1e-5),
    ),
    "CyclicLR": (
        lr_scheduler.CyclicLR,
        lambda o: lr_scheduler.CyclicLR(o, [1e-4, 1e-3], [1e-2, 3e-2], step_size_up=3, step_size_down=4),
    ),
    "CyclicLR, exp_range, betas left alone": (
        lr_scheduler.CyclicLR,
        lambda o: lr_scheduler.CyclicLR(
            o, 1e-4, 1e-2, step_size_up=3, mode="exp_range", gamma=0.9, cycle_momentum=False
        ),
    ),
    "OneCycleLR": (lr_scheduler.OneCycleLR, lambda o: lr_scheduler.OneCycleLR(o, max_lr=[0.1, 0.02], total_steps=21)),
    "OneCycleLR, three phases": (
        lr_scheduler.OneCycleLR,
        lambda o: lr_scheduler.OneCycleLR(
            o, max_lr=0.1, epochs=7, steps_per_epoch=3, anneal_strategy="linear", three_phase=True
        ),
    ),
    "ReduceLROnPlateau": (
        lr_scheduler.ReduceLROnPlateau,
        lambda o: lr_scheduler.ReduceLROnPlateau(o, factor=0.5, patience=1, cooldown=1, min_lr=[1e-4, 1e-5]),
    ),
    "SequentialLR": (lr_scheduler.SequentialLR, three_in_sequence),
    "SequentialLR, warmup then cosine": (lr_scheduler.SequentialLR, warmup_then_cosine),
    "ChainedScheduler": (lr_scheduler.ChainedScheduler, chained),
    "SWALR": (
        swa_utils.SWALR,
        lambda o: swa_utils.SWALR(o, swa_lr=[0.05, 1e-4], anneal_epochs=6, anneal_strategy="cos"),
    ),
}

KINDS: Final = [("fused", False), ("foreach", False), ("loop", False), ("fused", True), ("loop", True)]
"""Kernel, and whether the learning rates are tensors: torch's foreach kernel does not have those."""


def test_every_scheduler_class_of_torch_has_a_case() -> None:
    """A class that a new torch brings fails here until it has one."""
    classes = {
        thing
        for module in (lr_scheduler, swa_utils)
        for thing in vars(module).values()
        if inspect.isclass(thing) and issubclass(thing, lr_scheduler.LRScheduler)
    }
    assert {kind for kind, _ in CASES.values()} == classes - {lr_scheduler.LRScheduler, lr_scheduler._LRScheduler}
    assert all(isinstance(build(two_groups(Library("torch", {}))), kind) for kind, build in CASES.values())


def two_groups(
    library: Library, start: Sequence[torch.Tensor] | None = None, *, tensor_lr: bool = False, **arguments: Any
) -> Optimizer:
    first, *rest = parameters() if start is None else [nn.Parameter(value.clone()) for value in start]
    lr, other = (torch.tensor(0.02), torch.tensor(0.005)) if tensor_lr else (0.02, 0.005)
    return library.adam([{"params": [first]}, {"params": rest, "lr": other, "betas": (0.8, 0.95)}], lr=lr, **arguments)


def advance(scheduler: Any, number: int) -> None:
    if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
        scheduler.step(1.0 if number > 2 else 2.0 - number)
    else:
        scheduler.step()


def seen_of(optimizer: Optimizer, scheduler: Any) -> list[Any]:
    """What a training loop would log."""
    groups = [(copy.deepcopy(group["lr"]), group["betas"]) for group in optimizer.param_groups]
    return [groups, copy.deepcopy(scheduler.get_last_lr())]


@pytest.mark.parametrize(
    ("kernel", "tensor_lr"), KINDS, ids=[f"{kernel}-{'tensor' if tensor else 'float'} lr" for kernel, tensor in KINDS]
)
@pytest.mark.parametrize("case", CASES)
def test_20_steps_under_a_scheduler_equal_torchs(server: Server, case: str, kernel: str, *, tensor_lr: bool) -> None:
    """Parameters and state after each step, and what the schedule says; float lr, and tensors changed in place."""

    def program(library: Library) -> Any:
        optimizer = two_groups(library, tensor_lr=tensor_lr, **KERNELS[kernel])
        tensors = [group["lr"] for group in optimizer.param_groups]
        scheduler = CASES[case][1](optimizer)
        seen = []
        for number in range(STEPS):
            seen.append([step(optimizer, number), seen_of(optimizer, scheduler)])
            advance(scheduler, number)
        same_tensors = [group["lr"] is lr for group, lr in zip(optimizer.param_groups, tensors, strict=True)]
        return [seen, same_tensors if tensor_lr else None, state_of(optimizer), scheduler.state_dict().get("_last_lr")]

    assert_same(server, program)


@pytest.mark.parametrize("tensor_lr", [False, True], ids=["float lr", "tensor lr"])
@pytest.mark.parametrize("case", CASES)
def test_a_scheduler_and_optimizer_saved_halfway_go_on_as_torchs_do(
    server: Server, case: str, *, tensor_lr: bool
) -> None:
    """Both are built anew, as a restarted script builds them, and loaded."""
    build = CASES[case][1]

    def program(library: Library) -> Any:
        optimizer = two_groups(library, tensor_lr=tensor_lr, fused=True)
        scheduler = build(optimizer)
        for number in range(STEPS // 2):
            step(optimizer, number)
            advance(scheduler, number)
        saved = [state_of(optimizer), copy.deepcopy(scheduler.state_dict())]
        halfway = values(all_parameters(optimizer))

        optimizer = two_groups(library, halfway, tensor_lr=tensor_lr, fused=True)
        scheduler = build(optimizer)
        optimizer.load_state_dict(saved[0])
        scheduler.load_state_dict(saved[1])
        seen = []
        for number in range(STEPS // 2, STEPS):
            seen.append([step(optimizer, number), seen_of(optimizer, scheduler)])
            advance(scheduler, number)
        return [seen, state_of(optimizer)]

    assert_same(server, program)


def test_a_scheduler_resumed_with_last_epoch_reads_the_groups_initial_lr(server: Server) -> None:
    """`last_epoch` other than -1 takes `initial_lr` out of param_groups, where a load has put it."""

    def program(library: Library) -> Any:
        optimizer = two_groups(library, fused=True)
        lr_scheduler.StepLR(optimizer, 2)
        saved = state_of(optimizer)
        optimizer = two_groups(library, fused=True)
        optimizer.load_state_dict(saved)
        scheduler = lr_scheduler.StepLR(optimizer, 2, last_epoch=4)
        seen = []
        for number in range(6):
            seen.append([step(optimizer, number), seen_of(optimizer, scheduler)])
            scheduler.step()
        return [seen, state_of(optimizer)]

    assert_same(server, program)


def test_a_scheduler_stepped_before_the_optimizer_warns_as_with_torch(server: Server) -> None:
    """And one that is stepped after it does not: torch counts the calls of the optimizer's `step`."""

    def program(library: Library) -> Any:
        optimizer = two_groups(library, fused=True)
        scheduler = lr_scheduler.StepLR(optimizer, 2)
        with pytest.warns(UserWarning, match="before `optimizer.step"):
            scheduler.step()
        optimizer = two_groups(library, fused=True)
        scheduler = lr_scheduler.StepLR(optimizer, 2)
        give_gradients(all_parameters(optimizer), 0)
        optimizer.step()
        scheduler.step()
        return [values(all_parameters(optimizer)), state_of(optimizer)]

    assert_same(server, program)


def test_a_tensor_lr_changed_in_place_by_hand_holds_from_the_next_step(server: Server) -> None:
    """Without a scheduler; one tensor for two groups changes both."""

    def program(library: Library) -> Any:
        lr = torch.tensor(0.01)
        first, *rest = parameters()
        optimizer = library.adam([{"params": [first]}, {"params": rest}], lr=lr, fused=True)
        seen = []
        for number in range(6):
            seen.append(step(optimizer, number))
            if number == 1:
                lr.fill_(0.5)
            if number == 3:
                lr.mul_(0)
        return [seen, state_of(optimizer), [group["lr"] is lr for group in optimizer.param_groups]]

    assert_same(server, program)


def test_a_group_added_under_a_scheduler_is_stepped_as_torch_steps_it(server: Server) -> None:
    """A scheduler of torch's knows the groups that there were; the new group needs an `initial_lr` and has its say."""

    def program(library: Library) -> Any:
        optimizer = two_groups(library, fused=True)
        scheduler = lr_scheduler.LambdaLR(optimizer, lambda n: 0.9**n)
        seen = [step(optimizer, 0)]
        scheduler.step()
        (extra,) = parameters(shapes=[(5,)])
        optimizer.add_param_group({"params": [extra], "lr": 0.1, "initial_lr": 0.1})
        scheduler.base_lrs.append(0.1)
        scheduler.lr_lambdas.append(lambda n: 0.5**n)
        for number in range(1, 5):
            seen.append(step(optimizer, number))
            scheduler.step()
        return [seen, state_of(optimizer)]

    assert_same(server, program)
