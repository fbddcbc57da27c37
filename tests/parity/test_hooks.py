"""Hooks run when torch runs them, in its order, with its arguments, and what they change counts."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from optimd.server import Server
from tests.parity.programs import (
    Library,
    all_parameters,
    assert_same,
    attempt,
    give_gradients,
    parameters,
    state_of,
    step,
    values,
)

REGISTRATIONS = [
    "register_step_pre_hook",
    "register_step_post_hook",
    "register_state_dict_pre_hook",
    "register_state_dict_post_hook",
    "register_load_state_dict_pre_hook",
    "register_load_state_dict_post_hook",
]
TAKE_PREPEND = REGISTRATIONS[2:]


def described(optimizer: Optimizer, value: Any) -> Any:
    """An argument of a hook, in a form that two runs can be compared in."""
    if value is optimizer:
        return "the optimizer"
    if callable(value):
        return "a callable"
    if isinstance(value, tuple):
        return tuple(described(optimizer, item) for item in value)
    if isinstance(value, dict):
        return {key: described(optimizer, item) for key, item in value.items()}
    return copy.deepcopy(value)


def recorder(trace: list[Any], name: str) -> Callable[..., None]:
    def hook(optimizer: Optimizer, *arguments: Any) -> None:
        trace.append([name, described(optimizer, arguments), values(all_parameters(optimizer))])

    return hook


def test_all_hooks_see_what_torchs_see_in_torchs_order(server: Server) -> None:
    """Two of each of the six, over steps, a save and a load: arguments and parameters at each call."""

    def program(library: Library) -> Any:
        optimizer = library.adam(parameters(), fused=True)
        trace: list[Any] = []
        for registration in REGISTRATIONS:
            for turn in ("first", "second"):
                getattr(optimizer, registration)(recorder(trace, f"{turn} {registration}"))
        step(optimizer, 0)
        saved = state_of(optimizer)
        step(optimizer, 1)
        optimizer.load_state_dict(saved)
        step(optimizer, 2)
        return [trace, state_of(optimizer)]

    assert_same(server, program)


def counters(optimizer: Optimizer) -> list[int]:
    return [int(entry["step"]) for entry in optimizer.state.values()]


def test_hooks_of_a_step_see_the_counters_of_their_moment(server: Server) -> None:
    """Through `optimizer.state`."""

    def program(library: Library) -> Any:
        optimizer = library.adam(parameters(), fused=True)
        trace: list[Any] = []
        optimizer.register_step_pre_hook(lambda o, *_: trace.append(counters(o)))
        optimizer.register_step_post_hook(lambda o, *_: trace.append(counters(o)))
        for number in range(3):
            step(optimizer, number)
        return trace

    assert_same(server, program)


@pytest.mark.parametrize("registration", TAKE_PREPEND)
def test_prepend_puts_a_hook_before_the_others(server: Server, registration: str) -> None:
    """Of those registrations that take it."""

    def program(library: Library) -> Any:
        optimizer = library.adam(parameters(), fused=True)
        order: list[str] = []
        for name, prepend in (("a", False), ("b", True), ("c", False), ("d", True)):
            getattr(optimizer, registration)(lambda *_, name=name: order.append(name), prepend=prepend)
        optimizer.load_state_dict(optimizer.state_dict())
        return order

    assert_same(server, program)


@pytest.mark.parametrize("registration", REGISTRATIONS)
def test_a_removed_hook_is_not_called_again(server: Server, registration: str) -> None:
    """By its handle, by `with`, and from within the hook itself."""

    def program(library: Library) -> Any:
        optimizer = library.adam(parameters(), fused=True)
        order: list[str] = []

        def go(number: int) -> None:
            order.append(f"round {number}")
            step(optimizer, number)
            optimizer.load_state_dict(optimizer.state_dict())

        register = getattr(optimizer, registration)
        handle = register(lambda *_: order.append("by hand"))
        with register(lambda *_: order.append("in a block")):
            go(0)
        go(1)
        handle.remove()
        handle.remove()
        go(2)
        return order

    assert_same(server, program)


def test_a_step_pre_hook_may_replace_the_arguments(server: Server) -> None:
    """Another closure, given by position or by name; the post hook and the next pre hook see the new ones."""

    def program(library: Library) -> Any:
        optimizer = library.adam(parameters(), fused=True)
        trace: list[Any] = []

        def closure(text: str) -> Callable[[], Any]:
            def run() -> Any:
                trace.append([text, torch.is_grad_enabled()])
                give_gradients(all_parameters(optimizer), len(trace))
                return text

            return run

        replacements: list[Any] = [
            None,
            ((optimizer, closure("by position")), {}),
            ((optimizer,), {"closure": closure("by name")}),
        ]
        optimizer.register_step_pre_hook(lambda *_: replacements.pop())
        optimizer.register_step_pre_hook(recorder(trace, "pre"))
        optimizer.register_step_post_hook(recorder(trace, "post"))
        results = [optimizer.step(closure("own")), optimizer.step(closure=closure("own")), optimizer.step()]
        return [trace, results, values(all_parameters(optimizer)), state_of(optimizer)]

    assert_same(server, program)


def test_a_step_pre_hook_that_returns_nonsense_raises_torchs_error(server: Server) -> None:
    """And nothing is stepped."""

    def program(library: Library) -> Any:
        optimizer = library.adam(parameters(), fused=True)
        optimizer.register_step_pre_hook(lambda *_: 1)
        give_gradients(all_parameters(optimizer), 0)
        error = attempt(optimizer.step)
        assert isinstance(error, RuntimeError)
        text = str(error)
        return [text[text.index(" must return") :], values(all_parameters(optimizer)), state_of(optimizer)]

    assert_same(server, program)


def test_a_step_pre_hook_may_change_gradients_and_groups(server: Server) -> None:
    """What it leaves is what is stepped with."""

    def program(library: Library) -> Any:
        optimizer = library.adam(parameters(), fused=True)

        def clip(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            for group in optimizer.param_groups:
                group["lr"] *= 0.5
                torch.nn.utils.clip_grad_norm_(group["params"], 0.1)
                group["params"][0].grad = None

        optimizer.register_step_pre_hook(clip)
        return [[step(optimizer, number) for number in range(4)], state_of(optimizer)]

    assert_same(server, program)


def test_a_hook_that_raises_leaves_what_torch_leaves(server: Server) -> None:
    """Before the step nothing has happened, after it everything has; training goes on either way."""

    def program(library: Library) -> Any:
        optimizer = library.adam(parameters(), fused=True)

        def fail(*_: Any) -> None:
            raise RuntimeError("a hook's own error")

        seen: list[Any] = [step(optimizer, 0)]
        for registration in ("register_step_pre_hook", "register_step_post_hook"):
            handle = getattr(optimizer, registration)(fail)
            seen.append([attempt(lambda: step(optimizer, 1)), values(all_parameters(optimizer)), state_of(optimizer)])
            handle.remove()
            seen.append(step(optimizer, 2))
        for registration in REGISTRATIONS[2:]:
            handle = getattr(optimizer, registration)(fail)
            seen.append(attempt(lambda: optimizer.load_state_dict(optimizer.state_dict())))
            handle.remove()
            seen.append([step(optimizer, 3), state_of(optimizer)])
        return seen

    assert_same(server, program)


def test_a_state_dict_post_hook_may_change_or_replace_what_is_saved(server: Server) -> None:
    """In place, or by returning another; the next hook gets it."""

    def program(library: Library) -> Any:
        optimizer = library.adam(parameters(), fused=True)
        step(optimizer, 0)

        def annotate(_: Optimizer, saved: dict[str, Any]) -> None:
            saved["note"] = "in place"

        def replace(_: Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
            return {"wrapped": saved}

        optimizer.register_state_dict_post_hook(annotate)
        optimizer.register_state_dict_post_hook(replace)
        seen = [state_of(optimizer)]
        step(optimizer, 1)
        return [*seen, state_of(optimizer)]

    assert_same(server, program)


def test_a_load_pre_hook_may_change_or_replace_what_is_loaded(server: Server) -> None:
    """Undoing what a save hook did, and without changing the caller's dict."""

    def program(library: Library) -> Any:
        optimizer = library.adam(parameters(), fused=True)
        step(optimizer, 0)
        saved = {"wrapped": state_of(optimizer)}
        step(optimizer, 1)

        def unwrap(_: Optimizer, given: dict[str, Any]) -> dict[str, Any]:
            return given["wrapped"]

        def slow_down(_: Optimizer, given: dict[str, Any]) -> None:
            given["param_groups"][0] = {**given["param_groups"][0], "lr": 1e-5}

        def forget_a_parameter(_: Optimizer, given: dict[str, Any]) -> dict[str, Any]:
            return {**given, "state": {key: entry for key, entry in given["state"].items() if key != 1}}

        for hook in (unwrap, slow_down, forget_a_parameter):
            optimizer.register_load_state_dict_pre_hook(hook)
        optimizer.load_state_dict(saved)
        return [state_of(optimizer), copy.deepcopy(saved), step(optimizer, 2), state_of(optimizer)]

    assert_same(server, program)


def test_a_load_post_hook_sees_and_may_change_what_was_loaded(server: Server) -> None:
    """Its changes of groups hold from the next step."""

    def program(library: Library) -> Any:
        optimizer = library.adam(parameters(), fused=True)
        step(optimizer, 0)
        saved = state_of(optimizer)
        step(optimizer, 1)
        seen = []

        def look(optimizer: Optimizer) -> None:
            seen.append([int(optimizer.state[p]["step"]) for p in all_parameters(optimizer)])
            optimizer.param_groups[0]["lr"] = 0.5

        optimizer.register_load_state_dict_post_hook(look)
        optimizer.load_state_dict(saved)
        return [seen, step(optimizer, 2), state_of(optimizer)]

    assert_same(server, program)


@contextmanager
def everywhere(pre: Callable[..., Any], post: Callable[..., Any]) -> Iterator[None]:
    """Hooks of every optimizer in the process."""
    handles = [register_optimizer_step_pre_hook(pre), register_optimizer_step_post_hook(post)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def test_global_hooks_run_around_the_optimizers_own_as_in_torch(server: Server) -> None:
    """Before its pre hooks and after its post hooks, for each optimizer there is, with the same arguments."""

    def program(library: Library) -> Any:
        trace: list[Any] = []
        with everywhere(recorder(trace, "everybody's pre"), recorder(trace, "everybody's post")):
            for _ in range(2):
                optimizer = library.adam(parameters(), fused=True)
                optimizer.register_step_pre_hook(recorder(trace, "own pre"))
                optimizer.register_step_post_hook(recorder(trace, "own post"))
                step(optimizer, 0)
                optimizer.step(lambda: 1.0)
        step(optimizer, 1)
        return trace

    assert_same(server, program)


def test_a_global_pre_hook_may_replace_the_arguments(server: Server) -> None:
    """As an optimizer's own may."""

    def program(library: Library) -> Any:
        optimizer = library.adam(parameters(), fused=True)
        calls: list[str] = []

        def closure(text: str) -> Callable[[], str]:
            return lambda: calls.append(text) or text  # type: ignore[func-returns-value]

        with everywhere(lambda optimizer, *_: ((optimizer, closure("other")), {}), lambda *_: None):
            result = optimizer.step(closure("own"))
        return [calls, result]

    assert_same(server, program)


def test_subclasses_of_users_call_step_through_the_same_hooks_as_with_torch(server: Server) -> None:
    """A subclass that overrides `step` has its hooks run for the outer call and for the inner one."""

    def program(library: Library) -> Any:
        parent = type(library.adam(parameters()))

        class Counting(parent):  # type: ignore[misc, valid-type]
            calls = 0

            def step(self, closure: Any = None) -> Any:
                self.calls += 1
                return super().step(closure)

        optimizer = library.keep(Counting(parameters(), fused=True, **library.settings))
        trace: list[Any] = []
        optimizer.register_step_pre_hook(lambda *_: trace.append("pre"))
        optimizer.register_step_post_hook(lambda *_: trace.append("post"))
        seen = [step(optimizer, number) for number in range(2)]
        return [seen, trace, optimizer.calls]  # type: ignore[attr-defined]

    assert_same(server, program)


def test_the_profiler_finds_the_steps_under_torchs_names(server: Server) -> None:
    """`Optimizer.step#Adam.step` and `Optimizer.zero_grad#Adam.zero_grad`."""

    def program(library: Library) -> Any:
        optimizer = library.adam(parameters(), fused=True)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            step(optimizer, 0)
            optimizer.zero_grad()
        return sorted({event.name for event in profile.events() if event.name.startswith("Optimizer.")})

    assert_same(server, program)


def test_hooks_of_a_load_see_the_old_state_before_it_and_the_new_one_after_it(server: Server) -> None:
    """Through `optimizer.state`, and through a state_dict that the hook takes."""

    def program(library: Library) -> Any:
        optimizer = library.adam(parameters(), fused=True)
        step(optimizer, 0)
        saved = state_of(optimizer)
        step(optimizer, 1)
        trace: list[Any] = []
        optimizer.register_load_state_dict_pre_hook(lambda o, _: trace.append([counters(o), state_of(o)]))
        optimizer.register_load_state_dict_post_hook(lambda o: trace.append([counters(o), state_of(o)]))
        optimizer.load_state_dict(saved)
        return trace

    assert_same(server, program)
