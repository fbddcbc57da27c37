"""What torch builds on optimizers, and what programs do around them, finds nothing changed."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any, Final

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint import state_dict as checkpoints
from torch.nn.utils import (
    clip_grad_norm_,
    clip_grad_value_,
    parameters_to_vector,
    parametrizations,
    vector_to_parameters,
)
from torch.optim import Optimizer, lr_scheduler, swa_utils
from torch.utils.checkpoint import checkpoint

import optimd.client
from optimd.server import Server
from tests.parity.programs import (
    KERNELS,
    Library,
    all_parameters,
    assert_same,
    give_gradients,
    loss_of,
    net,
    parameters,
    state_of,
    step,
    values,
)


def train(
    model: nn.Module, optimizer: Optimizer, numbers: range, between: Callable[[], Any] = lambda: None
) -> list[Any]:
    """Steps on the loss of each number's data, with something between the backward pass and the step."""
    seen: list[Any] = []
    for number in numbers:
        optimizer.zero_grad()
        loss = loss_of(model, number)
        loss.backward()
        seen.append([loss.item(), between()])
        optimizer.step()
    return seen


def outcome(model: nn.Module, optimizer: Optimizer) -> list[Any]:
    return [copy.deepcopy(model.state_dict()), state_of(optimizer)]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    "clip",
    [
        lambda params: clip_grad_norm_(params, 0.5),
        lambda params: clip_grad_norm_(params, 0.5, norm_type=float("inf"), foreach=False),
        lambda params: clip_grad_value_(params, 0.1),
    ],
    ids=["norm", "largest", "value"],
)
def test_clipped_gradients_are_what_is_stepped_with(server: Server, clip: Callable[[Any], Any], kernel: str) -> None:
    """The norm that is returned too."""

    def program(library: Library) -> Any:
        model = net()
        optimizer = library.adam(model.parameters(), lr=0.01, **KERNELS[kernel])
        return [train(model, optimizer, range(10), lambda: clip([*model.parameters()])), outcome(model, optimizer)]

    assert_same(server, program)


def test_gradients_accumulated_locally_are_stepped_once(server: Server) -> None:
    """Three backward passes a step."""

    def program(library: Library) -> Any:
        model = net()
        optimizer = library.adam(model.parameters(), lr=0.01, fused=True)
        for number in range(12):
            (loss_of(model, number) / 3).backward()
            if number % 3 == 2:
                optimizer.step()
                optimizer.zero_grad()
        return outcome(model, optimizer)

    assert_same(server, program)


@pytest.mark.parametrize("average", ["swa", "ema"])
def test_averaged_models_follow_the_trained_one(server: Server, average: str) -> None:
    """swa_utils: AveragedModel, its EMA, update_bn, and SWALR."""

    def program(library: Library) -> Any:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 20), nn.BatchNorm1d(20), nn.Tanh(), nn.Linear(20, 3))
        optimizer = library.adam(model.parameters(), lr=0.01, fused=True)
        arguments = {} if average == "swa" else {"multi_avg_fn": swa_utils.get_ema_multi_avg_fn(0.9)}
        averaged = swa_utils.AveragedModel(model, **arguments)
        scheduler = swa_utils.SWALR(optimizer, swa_lr=0.05, anneal_epochs=3)
        for number in range(12):
            train(model, optimizer, range(number, number + 1))
            if number >= 4:
                averaged.update_parameters(model)
                scheduler.step()
        swa_utils.update_bn([torch.randn(8, 6, generator=torch.Generator().manual_seed(0))], averaged)
        return [outcome(model, optimizer), copy.deepcopy(averaged.state_dict())]

    assert_same(server, program)


def orthogonal(layer: nn.Module) -> nn.Module:
    return parametrizations.orthogonal(layer, use_trivialization=False)


@pytest.mark.parametrize("parametrize", [parametrizations.weight_norm, orthogonal, parametrizations.spectral_norm])
def test_parametrized_weights_are_trained_through_their_originals(
    server: Server, parametrize: Callable[[nn.Module], nn.Module]
) -> None:
    """torch.nn.utils.parametrizations: weight_norm, orthogonal, spectral_norm."""

    def program(library: Library) -> Any:
        torch.manual_seed(0)
        model = nn.Sequential(parametrize(nn.Linear(6, 6)), nn.Tanh(), parametrize(nn.Linear(6, 3)))
        optimizer = library.adam(model.parameters(), lr=0.01, fused=True)
        return [train(model, optimizer, range(10)), outcome(model, optimizer)]

    assert_same(server, program)


def test_a_compiled_model_is_trained_as_with_torch(server: Server) -> None:
    """The graph is compiled once: what a step writes into parameters reaches it."""
    torch._dynamo.reset()

    def program(library: Library) -> Any:
        model = net()
        optimizer = library.adam(model.parameters(), lr=0.01, fused=True)
        compiled = torch.compile(model, backend="aot_eager")
        return [train(compiled, optimizer, range(8)), outcome(model, optimizer)]

    assert_same(server, program)


def test_activation_checkpointing_changes_nothing(server: Server) -> None:
    """torch.utils.checkpoint runs the forward pass again in the backward pass."""

    def program(library: Library) -> Any:
        torch.manual_seed(0)
        block, head = nn.Sequential(nn.Linear(6, 20), nn.Tanh()), nn.Linear(20, 3)
        optimizer = library.adam([*block.parameters(), *head.parameters()], lr=0.01, fused=True)
        for number in range(6):
            optimizer.zero_grad()
            x = torch.randn(4, 6, generator=torch.Generator().manual_seed(number), requires_grad=True)
            head(checkpoint(block, x, use_reentrant=False)).square().sum().backward()
            optimizer.step()
        return [values(all_parameters(optimizer)), state_of(optimizer)]

    assert_same(server, program)


@pytest.mark.parametrize("kernel", ["foreach", "loop"])
def test_a_grad_scaler_unscales_clips_and_skips_as_with_torch(server: Server, kernel: str) -> None:
    """unscale_ before the clipping; the step with an infinite gradient changes nothing; the scale grows again."""

    def program(library: Library) -> Any:
        model = net()
        optimizer = library.adam(model.parameters(), lr=0.01, **KERNELS[kernel])
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=2)
        seen: list[Any] = []
        for number in range(8):
            optimizer.zero_grad()
            scaler.scale(loss_of(model, number)).backward()
            if number == 3:
                next(model.parameters()).grad.fill_(torch.inf)
            scaler.unscale_(optimizer)
            norm = clip_grad_norm_(model.parameters(), 0.5)
            scaler.step(optimizer)
            scaler.update()
            seen.append([norm, scaler.get_scale(), outcome(model, optimizer)])
        return seen

    assert_same(server, program)


@pytest.mark.parametrize("kernel", ["foreach", "loop"])
def test_autocast_trains_as_with_torch(server: Server, kernel: str) -> None:
    """bfloat16 in the forward pass, float32 parameters."""

    def program(library: Library) -> Any:
        model = net()
        optimizer = library.adam(model.parameters(), lr=0.01, **KERNELS[kernel])
        for number in range(6):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = loss_of(model, number)
            loss.backward()
            optimizer.step()
        return outcome(model, optimizer)

    assert_same(server, program)


def test_a_vector_written_over_the_parameters_before_the_first_step_is_where_training_starts(server: Server) -> None:
    """parameters_to_vector and vector_to_parameters, which assigns `.data`."""

    def program(library: Library) -> Any:
        model = net()
        optimizer = library.adam(model.parameters(), lr=0.01, fused=True)
        vector_to_parameters(parameters_to_vector(model.parameters()) * 2, model.parameters())
        return [train(model, optimizer, range(5)), outcome(model, optimizer)]

    assert_same(server, program)


def test_a_closure_that_is_called_as_lbfgs_calls_it_works(server: Server) -> None:
    """One training loop for every optimizer: the loss comes back, a tensor as it is."""

    def program(library: Library) -> Any:
        model = net()
        optimizer = library.adam(model.parameters(), lr=0.01, fused=True)
        losses: list[Any] = []
        for number in range(6):

            def closure(number: int = number) -> torch.Tensor:
                optimizer.zero_grad()
                loss = loss_of(model, number)
                loss.backward()
                return loss

            losses.append(optimizer.step(closure))
        return [[loss.requires_grad for loss in losses], [loss.item() for loss in losses], outcome(model, optimizer)]

    assert_same(server, program)


# --- saving and loading


def as_old_torch_saved_it(saved: dict[str, Any], *missing: str) -> dict[str, Any]:
    """Counters as numbers, and groups without the options that came later."""
    old = copy.deepcopy(saved)
    for group in old["param_groups"]:
        for name in missing:
            del group[name]
    for entry in old["state"].values():
        entry["step"] = int(entry["step"])
    return old


@pytest.mark.parametrize(
    "missing",
    [
        (),
        ("decoupled_weight_decay",),
        ("foreach", "maximize", "capturable", "differentiable", "fused", "decoupled_weight_decay"),
        ("amsgrad", "foreach", "maximize", "capturable", "differentiable", "fused", "decoupled_weight_decay"),
    ],
    ids=["numbers for counters", "2.5", "1.11", "0.4"],
)
def test_dicts_that_older_torch_saved_load_as_into_torch(server: Server, missing: tuple[str, ...]) -> None:
    """The options they lack get torch's defaults; left open kernels are set by hand, since defaults differ."""

    def program(library: Library) -> Any:
        optimizer = library.adam(parameters(), lr=0.01, **KERNELS["loop"])
        step(optimizer, 0)
        old = as_old_torch_saved_it(optimizer.state_dict(), *missing)
        optimizer = library.adam(parameters(), **KERNELS["loop"])
        optimizer.load_state_dict(old)
        seen = state_of(optimizer)
        optimizer.param_groups[0].update(KERNELS["loop"])
        return [seen, step(optimizer, 1), state_of(optimizer)]

    assert_same(server, program)


@pytest.mark.parametrize("arguments", [{"fused": True}, {"foreach": True, "amsgrad": True}], ids=str)
def test_a_state_dict_survives_a_file(server: Server, arguments: dict[str, Any]) -> None:
    """torch.save and torch.load(weights_only=True), with groups that are named and parameters that are."""

    def program(library: Library) -> Any:
        model = net()
        optimizer = library.adam([*model.named_parameters()], lr=0.01, **arguments)
        optimizer.param_groups[0]["name"] = "all"
        train(model, optimizer, range(3))
        file = io.BytesIO()
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
        file.seek(0)
        saved = torch.load(file, weights_only=True)
        model = net()
        model.load_state_dict(saved["model"])
        optimizer = library.adam([*model.named_parameters()], **arguments)
        optimizer.load_state_dict(saved["optimizer"])
        return [copy.deepcopy(saved), train(model, optimizer, range(3, 6)), outcome(model, optimizer)]

    assert_same(server, program)


@pytest.mark.parametrize("rule", ["Adam", "AdamW"])
def test_a_job_is_saved_by_one_library_and_continued_by_the_other(server: Server, rule: Any) -> None:
    """Either way, and there and back, nothing is lost."""

    def train_through(makers: list[type]) -> Any:
        model: nn.Module = net()
        saved: dict[str, Any] | None = None
        for turn, maker in enumerate(makers):
            where = {"server": server.address} if issubclass(maker, optimd.client.OptimizerProxy) else {}
            model = copy.deepcopy(model)
            optimizer = maker(model.parameters(), lr=0.01, weight_decay=0.1, amsgrad=True, fused=True, **where)
            if saved is not None:
                optimizer.load_state_dict(saved)
            train(model, optimizer, range(3 * turn, 3 * turn + 3))
            saved = state_of(optimizer)
            if where:
                optimizer.close()
        return [copy.deepcopy(model.state_dict()), saved]

    ours, theirs = getattr(optimd.client, rule), getattr(torch.optim, rule)
    expected = train_through([theirs, theirs, theirs])

    def program(library: Library) -> Any:
        return (
            [expected] * 3
            if library.name == "torch"
            else [
                train_through(makers) for makers in ([theirs, ours, theirs], [ours, theirs, ours], [ours, ours, theirs])
            ]
        )

    assert_same(server, program)


@pytest.mark.parametrize(
    "how", [copy.deepcopy, lambda thing: pickle.loads(pickle.dumps(thing))], ids=["deepcopy", "pickle"]
)
def test_a_copy_made_in_mid_training_goes_on_as_torchs_does(server: Server, how: Callable[[Any], Any]) -> None:
    """Model and optimizer are copied together, so that the copy steps the copied parameters; the original goes on."""

    def program(library: Library) -> Any:
        model = net()
        optimizer = library.adam(model.parameters(), lr=0.01, fused=True)
        train(model, optimizer, range(3))
        twin_model, twin = how((model, optimizer))
        library.keep(twin)
        train(twin_model, twin, range(3, 6))
        train(model, optimizer, range(10, 13))
        return [outcome(twin_model, twin), outcome(model, optimizer)]

    assert_same(server, program)


@pytest.mark.filterwarnings("ignore:Seems like .optimizer.step")  # torch warns of copies
def test_a_copied_scheduler_drives_the_copied_optimizer(server: Server) -> None:
    """Pickled together with it, as a trainer is."""

    def program(library: Library) -> Any:
        model = net()
        optimizer = library.adam(model.parameters(), lr=0.01, fused=True)
        scheduler = lr_scheduler.StepLR(optimizer, 2)
        train(model, optimizer, range(3), scheduler.state_dict)
        model, optimizer, scheduler = copy.deepcopy((model, optimizer, scheduler))
        library.keep(optimizer)
        for number in range(4):
            train(model, optimizer, range(number, number + 1))
            scheduler.step()
        return [outcome(model, optimizer), scheduler.get_last_lr()]

    assert_same(server, program)


FORMS: Final[dict[str, dict[str, bool]]] = {
    "as it is": {},
    "flat": {"flatten_optimizer_state_dict": True},
    "complete, on the CPU": {"full_state_dict": True, "cpu_offload": True},
}


def options_of(form: str) -> checkpoints.StateDictOptions:
    return checkpoints.StateDictOptions(**FORMS[form])


@pytest.mark.parametrize("form", FORMS)
def test_distributed_checkpoint_sees_torchs_state(server: Server, form: str) -> None:
    """get_optimizer_state_dict and get_state_dict, before the first step and after a few."""

    def program(library: Library) -> Any:
        model = net()
        optimizer = library.adam(model.parameters(), lr=0.01, fused=True)
        fresh = copy.deepcopy(checkpoints.get_optimizer_state_dict(model, optimizer, options=options_of(form)))
        seen = train(model, optimizer, range(3))
        return [
            fresh,
            seen,
            copy.deepcopy(checkpoints.get_optimizer_state_dict(model, optimizer, options=options_of(form))),
            copy.deepcopy([*checkpoints.get_state_dict(model, optimizer, options=options_of(form))]),
            outcome(model, optimizer),
        ]

    assert_same(server, program)


@pytest.mark.parametrize("both", [False, True], ids=["optimizer", "model and optimizer"])
@pytest.mark.parametrize("form", FORMS)
def test_distributed_checkpoint_restores_what_it_saved(server: Server, form: str, *, both: bool) -> None:
    """set_optimizer_state_dict and set_state_dict, into an optimizer that has never stepped."""

    def program(library: Library) -> Any:
        model = net()
        optimizer = library.adam(model.parameters(), lr=0.01, fused=True)
        train(model, optimizer, range(3))
        saved = copy.deepcopy([*checkpoints.get_state_dict(model, optimizer, options=options_of(form))])
        fresh = net()
        if not both:
            fresh.load_state_dict(saved[0])
        optimizer = library.adam(fresh.parameters(), lr=0.5, fused=True)
        if both:
            checkpoints.set_state_dict(
                fresh,
                optimizer,
                model_state_dict=saved[0],
                optim_state_dict=saved[1],
                options=options_of(form),
            )
        else:
            checkpoints.set_optimizer_state_dict(fresh, optimizer, saved[1], options=options_of(form))
        return [outcome(fresh, optimizer), train(fresh, optimizer, range(3, 6)), outcome(fresh, optimizer)]

    assert_same(server, program)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("saver", ["torch", "optimd"])
def test_a_distributed_checkpoint_of_one_library_loads_into_the_other(server: Server, form: str, saver: str) -> None:
    """In both directions."""

    def program(library: Library) -> Any:
        first = library if library.name == saver else None
        model = net()
        arguments: dict[str, Any] = {"lr": 0.01, "fused": True}

        def make(here: Library | None, params: Any) -> Optimizer:
            return torch.optim.Adam(params, **arguments) if here is None else here.adam(params, **arguments)

        optimizer = make(first, model.parameters())
        train(model, optimizer, range(3))
        saved = copy.deepcopy(checkpoints.get_optimizer_state_dict(model, optimizer, options=options_of(form)))
        model = copy.deepcopy(model)
        optimizer = make(library if first is None else None, model.parameters())
        checkpoints.set_optimizer_state_dict(model, optimizer, saved, options=options_of(form))
        return [train(model, optimizer, range(3, 6)), outcome(model, optimizer)]

    assert_same(server, program)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # a single process
def test_a_distributed_checkpoint_on_disk_restores_training(server: Server, tmp_path: Any) -> None:
    """torch.distributed.checkpoint's save and load of one process."""
    from torch.distributed.checkpoint.state_dict_loader import load
    from torch.distributed.checkpoint.state_dict_saver import save

    def program(library: Library) -> Any:
        model = net()
        optimizer = library.adam(model.parameters(), lr=0.01, fused=True)
        train(model, optimizer, range(3))
        weights, states = checkpoints.get_state_dict(model, optimizer)
        save({"model": weights, "optimizer": states}, checkpoint_id=tmp_path / library.name, no_dist=True)
        model = net()
        optimizer = library.adam(model.parameters(), lr=0.01, fused=True)
        weights, states = checkpoints.get_state_dict(model, optimizer)
        load({"model": weights, "optimizer": states}, checkpoint_id=tmp_path / library.name, no_dist=True)
        checkpoints.set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=states)
        return [train(model, optimizer, range(3, 6)), outcome(model, optimizer)]

    assert_same(server, program)


def test_gradients_set_by_hand_are_stepped_with(server: Server) -> None:
    """A model that no backward pass ever saw, as evolution strategies have it."""

    def program(library: Library) -> Any:
        optimizer = library.adam(parameters(), lr=0.01, fused=True)
        for number in range(3):
            give_gradients(all_parameters(optimizer), number)
            for p in all_parameters(optimizer):
                p.grad.mul_(0.5)
            optimizer.step()
        return [values(all_parameters(optimizer)), state_of(optimizer)]

    assert_same(server, program)
