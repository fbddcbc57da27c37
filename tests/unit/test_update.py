"""Adam's update of a list of tensors, and what is known of its kernels."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import pytest
import torch

from optimd.server import update
from optimd.v1 import param_group_pb2

CPU: Final = torch.device("cpu")
CUDA: Final = torch.device("cuda")
REAL: Final = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
COMPLEX: Final = (torch.complex64, torch.complex128)
LOOP: Final[dict[str, Any]] = {"foreach": False, "fused": False}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Lets small updates not wait for a second thread, which on a busy machine takes longer than they do."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def options(**changes: Any) -> dict[str, Any]:
    """torch's defaults with changes, not validated."""
    return {**torch.optim.Adam([torch.zeros(1)]).defaults, **changes}


def random_tensors(seed: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Tensors of three sizes, always the same for a seed."""
    dice = torch.Generator().manual_seed(seed)
    return [torch.randn(size, dtype=dtype, generator=dice) for size in (1, 129, 1000)]


def zero_state(like: list[torch.Tensor], chosen: dict[str, Any]) -> dict[str, list[torch.Tensor]]:
    """The state before the first update."""
    return {name: [torch.zeros_like(item) for item in like] for name in update.state_names(chosen)}


def zero_steps(like: list[torch.Tensor]) -> list[torch.Tensor]:
    """The counters before the first update."""
    return [torch.zeros(()) for _ in like]


def test_the_rule_is_one_of_the_schema() -> None:
    """Its name is the field that holds its options."""
    fields = param_group_pb2.ParamGroup.DESCRIPTOR.oneofs_by_name["options"].fields
    assert update.RULE in [field.name for field in fields]


def test_the_state_has_torch_s_names() -> None:
    """As in torch's state_dict, without the step."""
    for amsgrad in (False, True):
        value = torch.nn.Parameter(torch.zeros(1))
        adam = torch.optim.Adam([value], amsgrad=amsgrad)
        value.grad = torch.zeros(1)
        adam.step()
        assert {"step", *update.state_names(options(amsgrad=amsgrad))} == set(adam.state[value])


@pytest.mark.parametrize(
    ("foreach", "fused", "real", "complex_"),
    [
        (None, None, True, False),
        (None, False, False, False),
        (None, True, True, True),
        (False, None, False, False),
        (True, None, False, False),
        (False, False, False, False),
        (True, False, False, False),
        (False, True, True, True),
    ],
)
def test_the_fused_kernel_is_taken_where_it_is_asked_for_or_left_to_the_server(
    foreach: bool | None, fused: bool | None, real: bool, complex_: bool
) -> None:
    """Left to the server it is taken wherever torch has it, which is for real numbers."""
    chosen = options(foreach=foreach, fused=fused)
    assert {update.uses_fused(chosen, dtype) for dtype in REAL} == {real}
    assert {update.uses_fused(chosen, dtype) for dtype in COMPLEX} == {complex_}


@pytest.mark.parametrize("dtype", [*REAL, *COMPLEX])
def test_only_half_precision_without_the_fused_kernel_depends_on_the_split(dtype: torch.dtype) -> None:
    """Every other update may be made slice by slice."""
    half = dtype in (torch.bfloat16, torch.float16)
    assert update.is_split_invariant(options(), dtype)
    assert update.is_split_invariant(options(fused=True), dtype)
    assert update.is_split_invariant(options(foreach=True), dtype) is not half
    assert update.is_split_invariant(options(fused=False), dtype) is not half
    assert update.is_split_invariant(options(**LOOP), dtype) is not half


def test_a_differentiable_step_is_refused() -> None:
    """On every device: the graph is the worker's."""
    for device in (CPU, CUDA):
        assert "autograd graph" in (update.refusal(options(differentiable=True), torch.float32, device) or "")


def test_a_capturable_step_is_refused_on_a_cpu_only() -> None:
    """As torch refuses it there."""
    assert "CUDA" in (update.refusal(options(capturable=True), torch.float32, CPU) or "")
    assert update.refusal(options(capturable=True), torch.float32, CUDA) is None


@pytest.mark.parametrize(
    "changes", [{}, {"amsgrad": True, "maximize": True}, {"lr": -1.0}, {"fused": True}, {"foreach": True}], ids=str
)
def test_everything_else_is_not_refused(changes: dict[str, Any]) -> None:
    """A scheduler may set odd values."""
    assert update.refusal(options(**changes), torch.float32, CPU) is None
    assert update.refusal(options(**changes), torch.float32, CUDA) is None


@pytest.mark.parametrize("kernel", [{"fused": True}, {"foreach": True}, LOOP], ids=["fused", "foreach", "loop"])
@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("dtype", REAL)
def test_an_update_is_torch_s_step(kernel: dict[str, Any], amsgrad: bool, dtype: torch.dtype) -> None:
    """Values, state and counters after three steps are those of torch.optim.Adam, bit for bit."""
    ours = random_tensors(0, dtype)
    theirs = [torch.nn.Parameter(item.clone()) for item in ours]
    adam = torch.optim.Adam(theirs, lr=0.1, eps=1e-4, weight_decay=0.01, amsgrad=amsgrad, **kernel)
    chosen = adam.param_groups[0]
    state, steps = zero_state(ours, chosen), zero_steps(ours)
    for step in range(3):
        grads = random_tensors(1 + step, dtype)
        for item, grad in zip(theirs, grads, strict=True):
            item.grad = grad.clone()
        adam.step()
        update.update(ours, grads, state, steps, chosen)
    for index, item in enumerate(theirs):
        assert torch.equal(ours[index], item)
        assert torch.equal(steps[index], adam.state[item]["step"])
        for name, tensors in state.items():
            assert torch.equal(tensors[index], adam.state[item][name])


@pytest.mark.parametrize("dtype", COMPLEX)
def test_complex_numbers_left_to_the_server_step_as_left_to_torch(dtype: torch.dtype) -> None:
    """There is no fused kernel for them, so that torch's own choice is taken."""
    ours = random_tensors(2, dtype)
    theirs = [torch.nn.Parameter(item.clone()) for item in ours]
    adam = torch.optim.Adam(theirs)
    grads = random_tensors(3, dtype)
    for item, grad in zip(theirs, grads, strict=True):
        item.grad = grad.clone()
    adam.step()
    update.update(ours, grads, zero_state(ours, options()), zero_steps(ours), options())
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", REAL)
def test_real_numbers_left_to_the_server_step_with_the_fused_kernel(dtype: torch.dtype) -> None:
    """Asking for it and leaving it open give the same bits."""
    results = []
    for chosen in (options(), options(fused=True)):
        values = random_tensors(4, dtype)
        update.update(values, random_tensors(5, dtype), zero_state(values, chosen), zero_steps(values), chosen)
        results.append(torch.cat(values))
    assert torch.equal(*results)


@pytest.mark.parametrize("kernel", [{"fused": True}, {"foreach": True}, LOOP], ids=["fused", "foreach", "loop"])
def test_gradients_are_not_written_to(kernel: dict[str, Any]) -> None:
    """They may lie in a received message."""
    values, grads = random_tensors(6, torch.float32), random_tensors(7, torch.float32)
    chosen = options(**kernel, weight_decay=0.1, maximize=True, amsgrad=True)
    update.update(values, grads, zero_state(values, chosen), zero_steps(values), chosen)
    assert torch.equal(torch.cat(grads), torch.cat(random_tensors(7, torch.float32)))


def test_an_update_of_nothing_is_none() -> None:
    """A bucket of which no slice has a gradient."""
    update.update([], [], zero_state([], options()), [], options())


def test_an_update_is_no_part_of_an_autograd_graph() -> None:
    """Whatever the caller's mode is."""
    values = [torch.ones(3)]
    grads = [torch.ones(3, requires_grad=True)]
    with torch.enable_grad():
        update.update(values, grads, zero_state(values, options()), zero_steps(values), options())
    assert not values[0].requires_grad


def test_integers_for_numbers_are_taken() -> None:
    """`lr=1` and `weight_decay=0` are what torch's own defaults look like."""
    results = []
    for chosen in (options(lr=1, weight_decay=0, eps=0), options(lr=1.0, weight_decay=0.0, eps=0.0)):
        values = [torch.ones(3)]
        update.update(values, [torch.ones(3)], zero_state(values, chosen), zero_steps(values), chosen)
        results.append(values[0])
    assert torch.equal(*results)


@pytest.mark.parametrize(
    ("changes", "dtype"),
    [
        pytest.param({"fused": True}, torch.complex64, id="fused complex"),
        pytest.param({**LOOP, "betas": (0.9, 1.5)}, torch.float32, id="loop, root of a negative number"),
        pytest.param({"foreach": True, "betas": (0.9, 1.5)}, torch.float32, id="foreach, root of a negative number"),
        pytest.param({**LOOP, "betas": (1.0, 0.9)}, torch.float32, id="loop, division by zero"),
        pytest.param({"foreach": True, "betas": (1.0, 0.9)}, torch.float32, id="foreach, division by zero"),
    ],
)
def test_what_torch_cannot_compute_is_a_runtime_error(changes: dict[str, Any], dtype: torch.dtype) -> None:
    """The one exception that callers turn into a refusal, whatever torch itself raised; the values are untouched."""
    values, chosen = [torch.ones(3, dtype=dtype)], options(**changes)
    with pytest.raises(RuntimeError):
        update.update(values, [torch.ones(3, dtype=dtype)], zero_state(values, chosen), zero_steps(values), chosen)
    assert torch.equal(values[0], torch.ones(3, dtype=dtype))


@pytest.mark.parametrize(("chosen", "beside"), [(options(), True), (options(**LOOP), False)])
def test_a_step_counter_starts_at_zero_where_the_kernel_reads_it(chosen: dict[str, Any], beside: bool) -> None:
    """Beside the parameters for the fused kernel, else on the CPU, as torch keeps it."""
    device = torch.device("meta")
    assert update.new_step(chosen, torch.float32, device).device.type == ("meta" if beside else "cpu")
    step = update.new_step(chosen, torch.float32, CPU)
    assert (step.item(), step.dtype, step.shape) == (0.0, torch.float32, ())
