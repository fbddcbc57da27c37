"""What programs do with an optimizer besides stepping it: common idioms, each against torch."""

from __future__ import annotations

import copy
import warnings
from collections import defaultdict
from collections.abc import Callable
from typing import Any, Final

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

import optimd.client
from optimd.server import Server
from tests.parity.programs import (
    KERNELS,
    Library,
    all_parameters,
    assert_same,
    loss_of,
    net,
    parameters,
    state_of,
    step,
    values,
)


def backward(model: nn.Module, optimizer: Optimizer, number: int) -> None:
    optimizer.zero_grad()
    loss_of(model, number).backward()


def clamp_weights(model: nn.Module) -> None:
    """A Wasserstein critic."""
    for p in model.parameters():
        p.data.clamp_(-0.05, 0.05)


def normalize_rows(model: nn.Module) -> None:
    with torch.no_grad():
        model[0].weight.div_(model[0].weight.norm(dim=1, keepdim=True))


def evaluate_with_half_the_weights(model: nn.Module) -> None:
    """Weights are swapped for others and put back, as averages are for an evaluation."""
    backup = [p.data for p in model.parameters()]
    for p in model.parameters():
        p.data = p.data * 0.5
    loss_of(model, 99)
    for p, data in zip(model.parameters(), backup, strict=True):
        p.data = data


def copy_other_weights_and_back(model: nn.Module) -> None:
    """The same, in place."""
    backup = [p.clone() for p in model.parameters()]
    for p in model.parameters():
        p.data.copy_(p.data * 0.5)
    for p, data in zip(model.parameters(), backup, strict=True):
        p.data.copy_(data.data)


def move_half_way_back(model: nn.Module) -> None:
    """Reptile: the task's weights are interpolated with the start's, through a state_dict."""
    start = net().state_dict()
    model.load_state_dict({name: (start[name] + value) / 2 for name, value in model.state_dict().items()})


def start_a_layer_anew(model: nn.Module) -> None:
    torch.manual_seed(5)
    model[0].reset_parameters()


def move_the_data_elsewhere(model: nn.Module) -> None:
    for p in model.parameters():
        p.data = p.data.clone()


AFTER_STEPS: Final[list[Callable[[nn.Module], None]]] = [
    clamp_weights,
    normalize_rows,
    evaluate_with_half_the_weights,
    copy_other_weights_and_back,
    move_half_way_back,
    start_a_layer_anew,
    move_the_data_elsewhere,
]


@pytest.mark.parametrize("change", AFTER_STEPS)
def test_what_is_done_to_the_weights_after_each_step_counts(
    server: Server, change: Callable[[nn.Module], None]
) -> None:
    """In place, through `.data`, by assignment and through a state_dict."""

    def program(library: Library) -> Any:
        model, seen = net(), []
        optimizer = library.adam(model.parameters(), lr=0.01, fused=True)
        for number in range(5):
            backward(model, optimizer, number)
            optimizer.step()
            change(model)
            seen.append(values(model.parameters()))
        return [seen, state_of(optimizer)]

    assert_same(server, program)


def test_weights_perturbed_between_two_backward_passes_are_put_back(server: Server) -> None:
    """Sharpness-aware minimization."""

    def program(library: Library) -> Any:
        model = net()
        optimizer = library.adam(model.parameters(), lr=0.01, fused=True)
        for number in range(4):
            backward(model, optimizer, number)
            before = [p.data.clone() for p in model.parameters()]
            with torch.no_grad():
                for p in model.parameters():
                    p.add_(p.grad * 0.05)
            backward(model, optimizer, number)
            for p, data in zip(model.parameters(), before, strict=True):
                p.data = data
            optimizer.step()
        return [values(model.parameters()), state_of(optimizer)]

    assert_same(server, program)


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("kernel", KERNELS)
def test_layers_frozen_and_thawed_in_mid_training_are_stepped_as_by_torch(
    server: Server, kernel: str, *, set_to_none: bool
) -> None:
    """With gradients left at zero a frozen layer still decays; with None it does not."""

    def program(library: Library) -> Any:
        model, seen = net(), []
        optimizer = library.adam(model.parameters(), lr=0.01, weight_decay=0.1, **KERNELS[kernel])
        for number in range(7):
            if number in {2, 5}:
                model[0].requires_grad_(number == 5)
            optimizer.zero_grad(set_to_none=set_to_none)
            if number != 3:
                loss_of(model, number).backward()
            optimizer.step()
            seen.append(values(model.parameters()))
        return [seen, state_of(optimizer)]

    assert_same(server, program)


def test_layers_are_thawed_one_after_the_other_as_groups_are_added(server: Server) -> None:
    """Fine-tuning from the head down."""

    def program(library: Library) -> Any:
        model = net()
        model[0].requires_grad_(False)
        optimizer = library.adam(filter(lambda p: p.requires_grad, model.parameters()), lr=0.01, fused=True)
        for number in range(5):
            if number == 2:
                model[0].requires_grad_(True)
                optimizer.add_param_group({"params": model[0].parameters(), "lr": 0.001})
            backward(model, optimizer, number)
            optimizer.step()
        return [values(model.parameters()), state_of(optimizer)]

    assert_same(server, program)


def test_points_are_added_pruned_and_reset_with_their_state(server: Server) -> None:
    """As scenes of points are trained: each group's one parameter gives way to one of another length."""

    def program(library: Library) -> Any:
        generator = torch.Generator().manual_seed(0)
        sizes = {"place": 3, "color": 4, "opacity": 1}
        groups = [
            {"params": [nn.Parameter(torch.randn(50, size, generator=generator))], "lr": 0.01 * size, "name": name}
            for name, size in sizes.items()
        ]
        optimizer = library.adam(groups, lr=0.0, eps=1e-15, fused=True)

        def train(steps: int) -> None:
            for _ in range(steps):
                optimizer.zero_grad()
                place, color, opacity = all_parameters(optimizer)
                (place.square().sum() + (color * opacity.sigmoid()).square().sum()).backward()
                optimizer.step()

        def replace(
            change: Callable[[torch.Tensor], torch.Tensor], fill: Callable[[torch.Tensor], torch.Tensor]
        ) -> None:
            for group in optimizer.param_groups:
                (old,) = group["params"]
                new = nn.Parameter(change(old.detach()))
                state = optimizer.state.get(old)
                if state is not None:
                    del optimizer.state[old]
                    state["exp_avg"], state["exp_avg_sq"] = fill(state["exp_avg"]), fill(state["exp_avg_sq"])
                    optimizer.state[new] = state
                group["params"][0] = new

        def prune(tensor: torch.Tensor) -> torch.Tensor:
            return tensor[torch.arange(len(tensor)) % 4 != 0]

        replace(prune, prune)  # before there is any state
        seen = []
        for _ in range(3):
            train(2)
            replace(
                lambda value: torch.cat([value, value[: len(value) // 3] * 1.01]),
                lambda moment: torch.cat([moment, torch.zeros_like(moment[: len(moment) // 3])]),
            )
            train(1)
            replace(prune, prune)
            replace(lambda value: value.clamp(max=1.0), torch.zeros_like)
            train(1)
            seen.append([values(all_parameters(optimizer)), state_of(optimizer)])
        return seen

    assert_same(server, program)


def reset_all(optimizer: Optimizer) -> None:
    optimizer.state = defaultdict(dict)


def clear(optimizer: Optimizer) -> None:
    optimizer.state.clear()


def reset_one(optimizer: Optimizer) -> None:
    optimizer.state[all_parameters(optimizer)[0]] = {}


def pop_one(optimizer: Optimizer) -> None:
    assert "exp_avg" in optimizer.state.pop(all_parameters(optimizer)[0])


def move_to_a_device(optimizer: Optimizer) -> None:
    for entry in optimizer.state.values():
        for key, value in entry.items():
            if torch.is_tensor(value):
                entry[key] = value.to("cpu", copy=True)


def halve(optimizer: Optimizer) -> None:
    for entry in optimizer.state.values():
        entry["exp_avg"].mul_(0.5)
        entry["exp_avg_sq"].data.mul_(0.5)


def count_anew(optimizer: Optimizer) -> None:
    for p in all_parameters(optimizer):
        optimizer.state[p]["step"] = torch.tensor(0.0)


def make_by_hand(optimizer: Optimizer) -> None:
    """As asynchronous actor-critics share it between processes."""
    for p in all_parameters(optimizer):
        optimizer.state[p] = {
            "step": torch.zeros(()),
            "exp_avg": torch.zeros_like(p.data),
            "exp_avg_sq": torch.full_like(p.data, 0.1),
        }


@pytest.mark.parametrize("steps", [0, 2], ids=["before the first step", "after two"])
@pytest.mark.parametrize("change", [reset_all, clear, reset_one, move_to_a_device, halve, make_by_hand])
def test_what_is_done_to_the_state_counts(server: Server, change: Callable[[Optimizer], None], steps: int) -> None:
    """Resets, moves, edits."""

    def program(library: Library) -> Any:
        optimizer = library.adam(parameters(), lr=0.01, fused=True)
        seen = [step(optimizer, number) for number in range(steps)]
        change(optimizer)
        seen.extend(step(optimizer, number) for number in range(steps, steps + 3))
        return [seen, state_of(optimizer)]

    assert_same(server, program)


@pytest.mark.parametrize("change", [pop_one, count_anew])
def test_what_is_done_to_state_that_there_is_counts(server: Server, change: Callable[[Optimizer], None]) -> None:
    """Where the idiom needs a step before it."""

    def program(library: Library) -> Any:
        optimizer = library.adam(parameters(), lr=0.01, fused=True)
        seen = [step(optimizer, 0)]
        change(optimizer)
        return [seen, step(optimizer, 1), state_of(optimizer)]

    assert_same(server, program)


def test_keys_of_the_state_that_are_no_parameters_are_kept_and_saved(server: Server) -> None:
    """torch's own tests put texts there, from hooks of a save and of a load."""

    def program(library: Library) -> Any:
        optimizer = library.adam(parameters(), lr=0.01, fused=True)
        optimizer.register_state_dict_pre_hook(lambda o: o.state.__setitem__("saved", 1))
        step(optimizer, 0)
        saved = state_of(optimizer)
        names = [key for key in saved["state"] if isinstance(key, str)]
        optimizer = library.adam(parameters(), lr=0.01, fused=True)
        optimizer.register_load_state_dict_post_hook(lambda o: o.state.__setitem__("loaded", True))
        optimizer.load_state_dict(saved)
        return [names, optimizer.state["saved"], optimizer.state["loaded"], len(optimizer.state), step(optimizer, 1)]

    assert_same(server, program)


def test_a_subclass_that_keeps_an_average_in_the_state_saves_and_loads_it(server: Server) -> None:
    """A key beside Adam's own."""

    def program(library: Library) -> Any:
        parent = type(library.adam(parameters()))

        class Averaging(parent):  # type: ignore[misc, valid-type]
            def step(self, closure: Any = None) -> Any:
                result = super().step(closure)
                for p in all_parameters(self):
                    average = self.state[p].setdefault("average", p.detach().clone())
                    average.mul_(0.9).add_(p.detach(), alpha=0.1)
                return result

        optimizer = library.keep(Averaging(parameters(), lr=0.1, fused=True, **library.settings))
        seen = [step(optimizer, number) for number in range(3)]
        saved = state_of(optimizer)
        optimizer = library.keep(Averaging(parameters(), lr=0.1, fused=True, **library.settings))
        optimizer.load_state_dict(copy.deepcopy(saved))
        return [seen, saved, step(optimizer, 3), state_of(optimizer)]

    assert_same(server, program)


def append(optimizer: Optimizer, more: list[nn.Parameter]) -> None:
    optimizer.param_groups[0]["params"].extend(more)


def append_group(optimizer: Optimizer, more: list[nn.Parameter]) -> None:
    optimizer.param_groups.append({**optimizer.param_groups[0], "params": more, "lr": 0.1})


def drop_first(optimizer: Optimizer, _: list[nn.Parameter]) -> None:
    optimizer.param_groups[0]["params"] = optimizer.param_groups[0]["params"][1:]


def reverse(optimizer: Optimizer, _: list[nn.Parameter]) -> None:
    optimizer.param_groups[0]["params"].reverse()


def swap_one(optimizer: Optimizer, more: list[nn.Parameter]) -> None:
    """Of the same shape, and without the old one's state."""
    optimizer.param_groups[0]["params"][0] = more[0]


@pytest.mark.parametrize("change", [append, append_group, drop_first, reverse, swap_one])
def test_parameters_may_be_put_into_groups_and_taken_out_by_hand(
    server: Server, change: Callable[[Optimizer, list[nn.Parameter]], None]
) -> None:
    """Without add_param_group."""

    def program(library: Library) -> Any:
        params = parameters()
        optimizer = library.adam(params, lr=0.01, fused=True)
        seen = [step(optimizer, 0)]
        change(optimizer, [nn.Parameter(torch.ones(p.shape)) for p in params])
        seen.extend(step(optimizer, number) for number in range(1, 4))
        return [seen, values(params)]

    assert_same(server, program)


def test_groups_without_parameters_are_no_trouble(server: Server) -> None:
    """Everything decays, and the group of what does not is empty; later it fills."""

    def program(library: Library) -> Any:
        first, *rest = parameters()
        optimizer = library.adam([{"params": [first], "weight_decay": 0.1}, {"params": []}], lr=0.01, fused=True)
        seen = [step(optimizer, 0), state_of(optimizer)]
        optimizer.param_groups[1]["params"].extend(rest)
        return [*seen, step(optimizer, 1), state_of(optimizer)]

    assert_same(server, program)


def test_an_optimizer_for_each_parameter_steps_within_the_backward_pass(server: Server) -> None:
    """Which frees each gradient as soon as it is there."""

    def program(library: Library) -> Any:
        model = net()
        optimizers = {p: library.adam([p], lr=0.01, fused=True) for p in model.parameters()}

        def step_now(p: torch.Tensor) -> None:
            optimizers[p].step()
            optimizers[p].zero_grad()

        for p in model.parameters():
            p.register_post_accumulate_grad_hook(step_now)
        for number in range(4):
            loss_of(model, number).backward()
        return [values(model.parameters()), [p.grad for p in model.parameters()]]

    assert_same(server, program)


def test_a_learning_rate_search_puts_everything_back(server: Server) -> None:
    """Model and optimizer are restored from copies of their state_dicts after rates that ruin both."""

    def program(library: Library) -> Any:
        model = net()
        optimizer = library.adam(model.parameters(), lr=1e-7, fused=True)
        before = copy.deepcopy([model.state_dict(), optimizer.state_dict()])
        for number in range(8):
            optimizer.param_groups[0]["lr"] *= 10
            backward(model, optimizer, number)
            optimizer.step()
        model.load_state_dict(before[0])
        optimizer.load_state_dict(before[1])
        backward(model, optimizer, 9)
        optimizer.step()
        return [values(model.parameters()), state_of(optimizer)]

    assert_same(server, program)


def test_a_wrapper_that_shares_the_groups_steps_the_wrapped(server: Server) -> None:
    """Lookahead: slow weights follow the fast ones; a scheduler drives the wrapper."""

    def program(library: Library) -> Any:
        model = net()
        inner = library.adam(model.parameters(), lr=0.01, fused=True)

        class Lookahead(Optimizer):
            def __init__(self) -> None:
                super().__init__(inner.param_groups, inner.defaults)
                self.param_groups = inner.param_groups
                self.slow = values(all_parameters(inner))
                self.count = 0

            def step(self, closure: Any = None) -> Any:
                result = inner.step(closure)
                self.count += 1
                if self.count % 2 == 0:
                    for p, slow in zip(all_parameters(inner), self.slow, strict=True):
                        slow.add_(p.data - slow, alpha=0.5)
                        p.data.copy_(slow)
                return result

        outer = Lookahead()
        scheduler = torch.optim.lr_scheduler.ExponentialLR(outer, 0.8)
        for number in range(6):
            backward(model, outer, number)
            outer.step()
            scheduler.step()
        return [values(model.parameters()), state_of(inner)]

    assert_same(server, program)


def test_a_class_made_of_the_optimizers_own_at_run_time_steps_it(server: Server) -> None:
    """As distributed wrappers do: the optimizer's groups go to a subclass of its class that was made just now."""

    def program(library: Library) -> Any:
        model = net()
        optimizer = library.adam(model.parameters(), lr=0.01, fused=True)

        def init(self: Any, params: Any) -> None:
            super(type(self), self).__init__(params, **library.settings)

        kind = type("Distributed", (type(optimizer),), {"__init__": init})
        wrapped = library.keep(kind(optimizer.param_groups))
        for number in range(3):
            backward(model, wrapped, number)
            wrapped.step()
        return [values(model.parameters()), state_of(wrapped)]

    assert_same(server, program)


def test_two_optimizers_take_turns_on_the_same_parameters(server: Server) -> None:
    """Each sees what the other one did to them."""

    def program(library: Library) -> Any:
        model = net()
        pair = [library.adam(model.parameters(), lr=lr, fused=True) for lr in (0.01, 0.02)]
        for number in range(6):
            backward(model, pair[number % 2], number)
            pair[number % 2].step()
        return [values(model.parameters()), *(state_of(optimizer) for optimizer in pair)]

    assert_same(server, program)


def test_a_module_that_owns_its_optimizer_is_copied_whole(server: Server) -> None:
    """The copy's optimizer steps the copy's parameters."""

    def program(library: Library) -> Any:
        class Trainer(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.net = net()
                self.optimizer = library.adam(self.net.parameters(), lr=0.01, fused=True)

        trainer = Trainer()
        backward(trainer.net, trainer.optimizer, 0)
        trainer.optimizer.step()
        twin = copy.deepcopy(trainer)
        library.keep(twin.optimizer)
        backward(twin.net, twin.optimizer, 1)
        twin.optimizer.step()
        return [values(trainer.parameters()), values(twin.parameters()), state_of(twin.optimizer)]

    assert_same(server, program)


def test_parameters_in_one_flat_buffer_stay_in_it(server: Server) -> None:
    """What is written into the buffer reaches them, and what is stepped reaches the buffer."""

    def program(library: Library) -> Any:
        model = net()
        flat = torch.cat([p.data.reshape(-1) for p in model.parameters()])
        offset = 0
        for p in model.parameters():
            p.data = flat[offset : offset + p.numel()].view_as(p)
            offset += p.numel()
        optimizer = library.adam(model.parameters(), lr=0.01, fused=True)
        for number in range(4):
            backward(model, optimizer, number)
            optimizer.step()
            flat.mul_(0.9)
        return [flat, values(model.parameters()), state_of(optimizer)]

    assert_same(server, program)


def test_an_ensemble_of_stacked_parameters_is_trained_through_vmap(server: Server) -> None:
    """torch.func: the parameters belong to no module."""

    def program(library: Library) -> Any:
        members = [net() for _ in range(3)]
        stacked, _ = torch.func.stack_module_state(members)
        optimizer = library.adam(stacked.values(), lr=0.01, fused=True)

        def call(weights: Any, x: torch.Tensor) -> Any:
            return torch.func.functional_call(members[0], weights, (x,))

        for number in range(3):
            optimizer.zero_grad()
            x = torch.randn(4, 6, generator=torch.Generator().manual_seed(number))
            torch.vmap(call, in_dims=(0, None))(stacked, x).square().sum().backward()
            optimizer.step()
        return [values(stacked.values()), state_of(optimizer)]

    assert_same(server, program)


def test_torchs_own_name_may_be_rebound_to_optimds_class(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """The shortest way to swap optimizers in code that one does not own."""
    expected = step(torch.optim.Adam(parameters(), fused=True), 0), step(torch.optim.AdamW(parameters(), fused=True), 0)
    monkeypatch.setattr(torch.optim, "Adam", optimd.client.Adam)
    monkeypatch.setattr(torch.optim, "AdamW", optimd.client.AdamW)
    with torch.optim.Adam(parameters(), fused=True, server=server.address) as remote:  # type: ignore[call-arg, attr-defined]
        assert all(map(torch.equal, step(remote, 0), expected[0]))
    with torch.optim.AdamW(parameters(), fused=True, server=server.address) as remote:  # type: ignore[call-arg, attr-defined]
        assert all(map(torch.equal, step(remote, 0), expected[1]))


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("shapes", [((9, 7), (13,), ()), ((5,),)], ids=["same shapes", "another shape"])
def test_groups_emptied_and_filled_anew_start_without_state(server: Server, shapes: Any, *, reset: bool) -> None:
    """New parameters are new, whatever shape the old ones in their places had."""

    def program(library: Library) -> Any:
        optimizer = library.adam(parameters(), lr=0.1, fused=True)
        step(optimizer, 0)
        optimizer.param_groups = []
        if reset:
            optimizer.state = defaultdict(dict)
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(shape)) for shape in shapes]})
        return [step(optimizer, number) for number in range(1, 4)]

    assert_same(server, program)


def test_the_state_of_a_parameter_that_is_away_for_a_while_is_kept(server: Server) -> None:
    """torch keeps it under the parameter until somebody deletes it."""

    def program(library: Library) -> Any:
        optimizer = library.adam(parameters(), lr=0.1, fused=True)
        seen = [step(optimizer, 0)]
        away = optimizer.param_groups[0]["params"].pop()
        seen.append(step(optimizer, 1))
        optimizer.add_param_group({"params": [away]})
        return [*seen, step(optimizer, 2), state_of(optimizer)]

    assert_same(server, program)


def test_popping_state_that_is_not_there_gives_the_default(server: Server) -> None:
    """As any mapping does."""

    def program(library: Library) -> Any:
        optimizer = library.adam(parameters(), lr=0.1, fused=True)
        return [optimizer.state.pop(p, None) for p in all_parameters(optimizer)]

    assert_same(server, program)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int64, torch.bool, torch.float8_e4m3fn], ids=str)
def test_frozen_parameters_may_have_any_dtype(server: Server, dtype: torch.dtype) -> None:
    """Quantized weights, and buffers that were given along: torch never looks at what has no gradient."""

    def program(library: Library) -> Any:
        frozen = nn.Parameter(torch.ones(4).to(dtype), requires_grad=False)
        optimizer = library.adam([frozen, *parameters()], lr=0.1, fused=True)
        for p in parameters():
            p.grad = torch.ones_like(p)
        for p in all_parameters(optimizer)[1:]:
            p.grad = torch.ones_like(p)
        optimizer.step()
        return [values(all_parameters(optimizer)[1:]), state_of(optimizer)]

    assert_same(server, program)


def test_a_hundred_optimizers_live_beside_each_other(server: Server) -> None:
    """One for each parameter of a model of moderate depth, as stepping within the backward pass has it."""

    def program(library: Library) -> Any:
        optimizers = [library.adam([nn.Parameter(torch.ones(3))], lr=0.1, fused=True) for _ in range(100)]
        return [step(optimizer, 0) for optimizer in optimizers]

    assert_same(server, program)


def test_an_optimizer_made_in_inference_mode_steps_outside_of_it(server: Server) -> None:
    """torch's constructor makes no tensors."""

    def program(library: Library) -> Any:
        with torch.inference_mode():
            optimizer = library.adam(params, lr=0.1, **KERNELS["loop"])
        return step(optimizer, 0)

    params: Any = None

    def fresh(library: Library) -> Any:
        nonlocal params
        params = parameters()
        return program(library)

    assert_same(server, fresh)


def test_setstate_of_defaults_alone_changes_nothing_else(server: Server) -> None:
    """torch updates what it is given."""

    def program(library: Library) -> Any:
        optimizer = library.adam(parameters(), lr=0.1, fused=True)
        step(optimizer, 0)
        optimizer.__setstate__({"defaults": optimizer.defaults})
        return [step(optimizer, 1), state_of(optimizer)]

    assert_same(server, program)


def test_a_lazy_module_is_initialized_by_its_first_pass_after_the_optimizer_was_made(server: Server) -> None:
    """torch asks for the shape with the first gradient."""

    def program(library: Library) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module = nn.LazyLinear(4)
        optimizer = library.adam(module.parameters(), lr=0.1, fused=True)
        torch.manual_seed(0)
        module(torch.ones(2, 6)).sum().backward()
        optimizer.step()
        return [values(module.parameters()), state_of(optimizer)]

    assert_same(server, program)


def test_rows_written_through_data_count_in_a_large_table(server: Server) -> None:
    """DESIGN 3.4 excepts these where sampling misses them. They are common: embeddings and codebooks are edited so."""

    def program(library: Library) -> Any:
        table = nn.Parameter(torch.zeros(3000, 40))
        optimizer = library.adam([table], lr=0.1, fused=True)
        seen = []
        for number in range(3):
            table.grad = torch.ones_like(table)
            optimizer.step()
            table.data[7 * number + 1] = 5.0
            seen.append(values([table]))
        table.grad = torch.ones_like(table)
        optimizer.step()
        return [seen, values([table])]

    assert_same(server, program)
