"""Every hyperparameter, in every combination and however it changes, means what it means to torch."""

from __future__ import annotations

import io
import itertools
import subprocess
import sys
from collections.abc import Callable
from typing import Any, Final

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

from optimd.server import Server
from tests.parity.programs import (
    KERNELS,
    Library,
    Rule,
    all_parameters,
    assert_same,
    attempt,
    give_gradients,
    parameters,
    state_of,
    step,
    values,
)

REAL: Final = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
COMPLEX: Final = [torch.complex64]
KERNELS_OF_DTYPES: Final = [
    *itertools.product(KERNELS, REAL),
    *itertools.product(("foreach", "loop"), COMPLEX),  # torch has no fused kernel for complex parameters
]
COMBINATIONS: Final = [
    {"amsgrad": amsgrad, "maximize": maximize, "weight_decay": weight_decay, "decoupled_weight_decay": decoupled}
    for amsgrad, maximize, weight_decay, decoupled in itertools.product(
        (False, True), (False, True), (0, 0.1), (False, True)
    )
]


def eps_of(dtype: torch.dtype) -> float:
    """torch's default is 0 in float16: the first division by it would leave nothing but NaN to compare."""
    return 1e-3 if dtype is torch.float16 else 1e-8


@pytest.mark.parametrize(("kernel", "dtype"), KERNELS_OF_DTYPES, ids=str)
def test_every_combination_of_the_switches_has_torchs_bits(server: Server, kernel: str, dtype: torch.dtype) -> None:
    """amsgrad, maximize, weight_decay, decoupled_weight_decay: an optimizer for each combination."""

    def program(library: Library) -> Any:
        seen: dict[str, Any] = {}
        for combination in COMBINATIONS:
            optimizer = library.adam(parameters(dtype), lr=0.01, eps=eps_of(dtype), **combination, **KERNELS[kernel])
            seen[str(combination)] = [[step(optimizer, number) for number in range(3)], state_of(optimizer)]
        return seen

    assert_same(server, program)


@pytest.mark.parametrize(("kernel", "dtype"), KERNELS_OF_DTYPES, ids=str)
def test_groups_of_one_optimizer_have_every_combination_at_once(
    server: Server, kernel: str, dtype: torch.dtype
) -> None:
    """And numbers of their own."""

    def program(library: Library) -> Any:
        groups = [
            {
                "params": parameters(dtype),
                "lr": 0.01 * (1 + index),
                "betas": (0.9 - index / 50, 0.99 - index / 100),
                "eps": eps_of(dtype) * (1 + index),
                **combination,
            }
            for index, combination in enumerate(COMBINATIONS)
        ]
        optimizer = library.adam(groups, **KERNELS[kernel])
        return [[step(optimizer, number) for number in range(5)], state_of(optimizer)]

    assert_same(server, program)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("arguments", [{}, {"weight_decay": 0.1}, {"amsgrad": True, "maximize": True}], ids=str)
def test_adamw_decouples_its_weight_decay_with_each_kernel(
    server: Server, kernel: str, arguments: dict[str, Any]
) -> None:
    """Its own default of 0.01 included."""

    def program(library: Library) -> Any:
        optimizer = library.make("AdamW", parameters(), **arguments, **KERNELS[kernel])
        return [[step(optimizer, number) for number in range(10)], state_of(optimizer)]

    assert_same(server, program)


def test_kernels_of_groups_may_differ(server: Server) -> None:
    """Of groups of one optimizer, each takes its own."""

    def program(library: Library) -> Any:
        groups = [{"params": parameters(dtype), **kernel} for dtype in REAL for kernel in KERNELS.values()]
        optimizer = library.adam(groups, lr=0.01, eps=1e-3)
        return [[step(optimizer, number) for number in range(5)], state_of(optimizer)]

    assert_same(server, program)


CHANGES: Final[dict[str, list[dict[str, Any]]]] = {
    "lr": [{"lr": 0.0}, {"lr": 0.3}, {"lr": 0}, {"lr": 1}, {"lr": 1e-30}, {"lr": -0.1}],
    "betas": [{"betas": (0.5, 0.9)}, {"betas": (0.0, 0.0)}, {"betas": [0.99, 0.5]}, {"betas": (0.9, 0.999)}],
    "eps": [{"eps": 1.0}, {"eps": 1e-15}, {"eps": 1}],
    "weight_decay": [{"weight_decay": 0.5}, {"weight_decay": 0}, {"weight_decay": 1}, {"weight_decay": 0.0}],
    "maximize": [{"maximize": True}, {"maximize": False}],
    "decoupled_weight_decay": [
        {"weight_decay": 0.1, "decoupled_weight_decay": True},
        {"decoupled_weight_decay": False},
    ],
    "amsgrad off": [{"amsgrad": False}],
    "everything": [
        {"lr": 0.1, "betas": (0.7, 0.8), "eps": 1e-4, "weight_decay": 0.2, "maximize": True},
        {"lr": 0.0, "betas": (0.9, 0.99), "weight_decay": 0.0},
    ],
}


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("what", CHANGES)
def test_what_is_changed_in_param_groups_by_hand_holds_from_the_next_step(
    server: Server, what: str, kernel: str
) -> None:
    """In one group of two, and in the other one with the change after next."""

    def program(library: Library) -> Any:
        first, *rest = parameters()
        arguments = {"amsgrad": what == "amsgrad off", **KERNELS[kernel]}
        optimizer = library.adam([{"params": [first]}, {"params": rest, "lr": 0.02}], lr=0.01, **arguments)
        seen = [step(optimizer, 0)]
        for number, change in enumerate([*CHANGES[what], {}, {}], 1):
            optimizer.param_groups[number % 2].update(change)
            seen.append(step(optimizer, number))
        return [seen, state_of(optimizer)]

    assert_same(server, program)


@pytest.mark.parametrize(("before", "after"), [*itertools.permutations(KERNELS, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_kernel_may_be_switched_between_steps(server: Server, before: str, after: str, dtype: torch.dtype) -> None:
    """By hand in param_groups, and back."""
    switches = [KERNELS[before], KERNELS[after], KERNELS[before]]

    def program(library: Library) -> Any:
        optimizer = library.adam(parameters(dtype), lr=0.01, **switches[0])
        seen: list[Any] = []
        for turn, switch in enumerate(switches):
            optimizer.param_groups[0].update({"foreach": None, "fused": None, **switch})
            seen.extend(step(optimizer, 10 * turn + number) for number in range(4))
        return [seen, state_of(optimizer)]

    assert_same(server, program)


def number_types() -> dict[str, Callable[[], Any]]:
    return {
        "int": lambda: 1,
        "bool": lambda: True,
        "0-dim tensor": lambda: torch.tensor(0.01),
        "1-element tensor": lambda: torch.tensor([0.01]),
        "1x1 tensor": lambda: torch.tensor([[0.01]]),
        "float64 tensor": lambda: torch.tensor(0.01, dtype=torch.float64),
        "bfloat16 tensor": lambda: torch.tensor(0.01, dtype=torch.bfloat16),
        "integer tensor": lambda: torch.tensor(1),
        "tensor that requires grad": lambda: torch.tensor(0.01, requires_grad=True),
    }


@pytest.mark.parametrize("kernel", ["fused", "loop"])
@pytest.mark.parametrize("decay", [{}, {"weight_decay": 0.1}, {"weight_decay": 0.1, "decoupled_weight_decay": True}])
@pytest.mark.parametrize("kind", number_types())
def test_lr_of_any_type_that_torch_takes_has_torchs_bits_or_torchs_error(
    server: Server, kind: str, decay: dict[str, Any], kernel: str
) -> None:
    """Numbers and one-element tensors, whose dtype decides how torch's loop computes with them."""

    def program(library: Library) -> Any:
        def run() -> Any:
            optimizer = library.adam(
                parameters(shapes=[(9, 7), (13,)]), lr=number_types()[kind](), **decay, **KERNELS[kernel]
            )
            return [[step(optimizer, number) for number in range(3)], state_of(optimizer)]

        return attempt(run)

    assert_same(server, program)


def test_numpys_floats_are_taken_wherever_torch_takes_them(server: Server) -> None:
    """What a search over hyperparameters hands out."""
    numpy = pytest.importorskip("numpy")

    def program(library: Library) -> Any:
        optimizer = library.adam(
            parameters(),
            lr=numpy.float64(0.01),
            betas=(numpy.float64(0.8), numpy.float64(0.9)),
            eps=numpy.float32(1e-6),
            weight_decay=numpy.float32(0.1),
            fused=True,
        )
        seen = [step(optimizer, 0)]
        optimizer.param_groups[0]["lr"] = numpy.float32(0.02)
        seen.append(step(optimizer, 1))
        optimizer.param_groups[0]["lr"] = numpy.linspace(0.1, 0.01, 4)[2]
        seen.append(step(optimizer, 2))
        return seen

    assert_same(server, program)


_CASES_OF_TORCHS_OWN_TESTS: Final = """
import io, sys, types, unittest
import torch
try:
    import expecttest
except ImportError:  # which the module asks for and the cases do not
    sys.modules["expecttest"] = types.ModuleType("expecttest")
    sys.modules["expecttest"].TestCase = unittest.TestCase
from torch.testing._internal import common_optimizers as cases
found = {}
for rule in ("Adam", "AdamW"):
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.complex64, torch.complex128):
        taken = getattr(cases, f"optim_inputs_func_{rule.lower()}")("cpu", dtype)
        found[rule, dtype] = [case.kwargs for case in taken]
    refused = getattr(cases, f"optim_error_inputs_func_{rule.lower()}")("cpu", torch.float32)
    found[rule, "refused"] = [
        (case.optimizer_error_input.desc, case.optimizer_error_input.params, case.optimizer_error_input.kwargs)
        for case in refused
        if case.error_type is not UserWarning
    ]
torch.save(found, sys.stdout.buffer)
"""


@pytest.fixture(scope="module")
def torchs_cases() -> Any:
    """The cases of torch's own tests, got by a process of its own: that module turns torch's global flags off."""
    found = subprocess.run([sys.executable, "-c", _CASES_OF_TORCHS_OWN_TESTS], stdout=subprocess.PIPE, check=True)
    return torch.load(io.BytesIO(found.stdout), weights_only=False)


def with_tensors(dtype: torch.dtype) -> list[dict[str, Any]]:
    """The cases that torch's tests keep for CUDA, and the CPU has too."""
    eps = {"eps": 0.1} if dtype is torch.float16 else {}
    tensors: list[dict[str, Any]] = [
        {"lr": torch.tensor(0.001)},
        {"lr": torch.tensor(0.001), "amsgrad": True},
        {"lr": torch.tensor(0.001), "weight_decay": 0.1, "maximize": True},
        {"betas": (torch.tensor(0.9), torch.tensor(0.99))},
        {"lr": torch.tensor(0.001), "betas": (torch.tensor([[[0.9]]]), torch.tensor([[0.99]])), "amsgrad": True},
        {"lr": torch.tensor(0.001), "betas": (torch.tensor(0.9), torch.tensor(0.99)), "amsgrad": False},
    ]
    return [{**case, **eps} for case in tensors]


@pytest.mark.parametrize("tensors", [False, True], ids=["numbers", "tensors"])
@pytest.mark.parametrize(
    ("rule", "kernel", "dtype"),
    [
        *(("Adam", kernel, dtype) for kernel, dtype in KERNELS_OF_DTYPES),
        *(("AdamW", kernel, torch.float32) for kernel in KERNELS),
    ],
    ids=str,
)
def test_10_steps_of_each_case_of_torchs_own_tests_equal_torchs(
    server: Server, torchs_cases: Any, rule: Rule, kernel: str, dtype: torch.dtype, *, tensors: bool
) -> None:
    """Tensor lr and Tensor betas among them; where torch refuses a case, with its error."""

    def run(library: Library, arguments: dict[str, Any]) -> Any:
        try:
            optimizer = library.make(rule, parameters(dtype), **arguments, **KERNELS[kernel])
            return [[step(optimizer, number) for number in range(10)], state_of(optimizer)]
        except Exception as error:  # noqa: BLE001  # torch's
            return error

    cases = with_tensors(dtype) if tensors else torchs_cases[rule, dtype]
    assert len(cases) >= 5
    assert_same(server, lambda library: {str(arguments): run(library, arguments) for arguments in cases})


@pytest.mark.parametrize("rule", ["Adam", "AdamW"])
def test_what_torchs_own_tests_have_refused_is_refused_in_the_same_words(
    server: Server, torchs_cases: Any, rule: Rule
) -> None:
    """All of them but repeated parameters, which torch warns of and optimd refuses: see test_interface."""
    refused = torchs_cases[rule, "refused"]
    assert len(refused) >= 10

    def run(library: Library, params: Any, arguments: dict[str, Any]) -> Any:
        error = attempt(lambda: library.make(rule, parameters() if params is None else params, **arguments))
        assert isinstance(error, Exception)
        return error

    assert_same(server, lambda library: {desc: run(library, params, arguments) for desc, params, arguments in refused})


INVALID: Final[dict[str, dict[str, Any]]] = {
    "no parameters": {"params": []},
    "not an iterable": {"params": 1},
    "a list of no tensors": {"params": [1, 2]},
    "not a leaf": {"params": [torch.ones(2, requires_grad=True) * 2]},
    "a set": {"params": [{"params": {nn.Parameter(torch.ones(2))}}]},
    "fused and foreach": {"fused": True, "foreach": True},
    "tensor lr and foreach": {"lr": torch.tensor(0.1), "foreach": True},
    "two learning rates": {"lr": torch.tensor([0.1, 0.1])},
    "negative lr": {"lr": -0.1},
    "NaN lr": {"lr": float("nan")},
    "negative tensor lr": {"lr": torch.tensor(-0.1)},
    "text lr": {"lr": "0.1"},
    "no lr": {"lr": None},
    "negative eps": {"eps": -1e-8},
    "negative weight decay": {"weight_decay": -0.1},
    "beta1 of 1": {"betas": (1.0, 0.9)},
    "beta2 of 1": {"betas": (0.9, 1.0)},
    "one beta": {"betas": (0.9,)},
    "beta as a number": {"betas": 0.9},
    "integer betas": {"betas": (0, 0)},
    "mixed betas": {"betas": (torch.tensor(0.9), 0.9)},
    "tensor betas and foreach": {"betas": (torch.tensor(0.9), torch.tensor(0.9)), "foreach": True},
    "an argument of nobody's": {"momentum": 0.9},
}


@pytest.mark.parametrize("rule", ["Adam", "AdamW"])
@pytest.mark.parametrize("what", INVALID)
def test_invalid_arguments_raise_torchs_error_of_the_same_type_and_text(server: Server, what: str, rule: Rule) -> None:
    """In the constructor."""

    def program(library: Library) -> Any:
        arguments = {"params": parameters(), **INVALID[what]}
        error = attempt(lambda: library.make(rule, arguments.pop("params"), **arguments))
        assert isinstance(error, Exception)
        return type(error)(str(error).replace("optimd.client.adam.", "").replace("torch.optim.", ""))

    assert_same(server, program)


def test_options_of_the_users_own_stay_in_param_groups(server: Server) -> None:
    """Names, nested lists, objects that no schema knows: torch keeps them, and saves them."""

    def program(library: Library) -> Any:
        groups = [
            {"params": [p], "name": name, "lr_scale": 0.5, "tags": ["a", ("b", None)], "limits": {"low": 1}}
            for name, p in zip("xyz", parameters(), strict=True)
        ]
        optimizer = library.adam(groups, lr=0.01, fused=True)
        seen = []
        for number in range(3):
            for group in optimizer.param_groups:
                group["lr"] *= group["lr_scale"]
                group["note"] = f"step {number}"
            seen.append(step(optimizer, number))
        return [seen, state_of(optimizer), optimizer.defaults]

    assert_same(server, program)


def test_defaults_changed_by_hand_count_for_groups_added_later(server: Server) -> None:
    """`optimizer.defaults` is torch's and is looked at when a group is added."""

    def program(library: Library) -> Any:
        optimizer = library.adam(parameters(), fused=True)
        optimizer.defaults["lr"] = 0.3
        optimizer.add_param_group({"params": parameters(shapes=[(5,)])})
        return [[step(optimizer, number) for number in range(3)], state_of(optimizer)]

    assert_same(server, program)


@pytest.mark.parametrize("kernel", ["foreach", "loop"])
def test_every_combination_of_the_switches_has_torchs_bits_in_complex128(server: Server, kernel: str) -> None:
    """SEGFAULTS the server's process: run it alone. Belongs in COMPLEX of the committed file."""

    def program(library: Library) -> Any:
        seen: dict[str, Any] = {}
        for combination in COMBINATIONS:
            optimizer = library.adam(parameters(torch.complex128), lr=0.01, **combination, **KERNELS[kernel])
            seen[str(combination)] = [[step(optimizer, number) for number in range(5)], state_of(optimizer)]
        return seen

    assert_same(server, program)


@pytest.mark.parametrize("decoupled", [False, True])
def test_a_float64_lr_and_a_0_dim_parameter_have_torchs_bits_in_the_loop(server: Server, *, decoupled: bool) -> None:
    """Between two 0-dim tensors torch computes in the wider dtype, which a flat slice of one element does not."""

    def program(library: Library) -> Any:
        lr = torch.tensor(0.01, dtype=torch.float64)
        optimizer = library.adam(
            parameters(), lr=lr, weight_decay=0.1, decoupled_weight_decay=decoupled, **KERNELS["loop"]
        )
        return [[step(optimizer, number) for number in range(3)], state_of(optimizer)]

    assert_same(server, program)


ODD_STEPS: Final[dict[str, Callable[[Library], Optimizer]]] = {
    "capturable on the CPU, loop": lambda o: o.adam(parameters(), capturable=True, foreach=False, fused=False),
    "capturable on the CPU, foreach": lambda o: o.adam(parameters(), capturable=True, foreach=True),
    "fused complex": lambda o: o.adam(parameters(torch.complex64), fused=True),
    "tensor lr put where foreach is": lambda o: with_option(o.adam(parameters(), foreach=True), lr=torch.tensor(0.1)),
    "fused put where foreach is": lambda o: with_option(o.adam(parameters(), foreach=True), fused=True),
    "no lr": lambda o: without_option(o.adam(parameters(), fused=True), "lr"),
}


def with_option(optimizer: Optimizer, **options: Any) -> Optimizer:
    optimizer.param_groups[0].update(options)
    return optimizer


def without_option(optimizer: Optimizer, option: str) -> Optimizer:
    del optimizer.param_groups[0][option]
    return optimizer


@pytest.mark.parametrize("what", ODD_STEPS)
def test_what_torch_first_sees_in_a_step_has_torchs_outcome(server: Server, what: str) -> None:
    """The constructor took it, as torch's does; the step has torch's error, or its values where it raises none."""

    def program(library: Library) -> Any:
        optimizer = ODD_STEPS[what](library)
        give_gradients(all_parameters(optimizer), 0)
        return [attempt(optimizer.step), values(all_parameters(optimizer))]

    assert_same(server, program)


def test_capturable_on_the_cpu_is_constructed_and_without_gradients_stepped_as_in_torch(server: Server) -> None:
    """torch looks at it with the first gradient."""

    def program(library: Library) -> Any:
        optimizer = library.adam(parameters(), capturable=True)
        optimizer.step()
        optimizer.add_param_group({"params": parameters(), "capturable": True})
        optimizer.step()
        return state_of(optimizer)

    assert_same(server, program)
