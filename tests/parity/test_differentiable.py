"""Steps that autograd goes through are torch's own, made in the worker; the server is given what they led to."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from optimd.client import Adam, AdamW, ConfigurationError, ProxyOptions
from optimd.server import Server
from tests.support import assert_equal_states, in_threads

OPTIONS: list[dict[str, Any]] = [
    {},
    {"weight_decay": 0.1, "eps": 1e-3},  # torch cannot go back through several steps with amsgrad
    {"maximize": True, "decoupled_weight_decay": True, "weight_decay": 0.1},
]


def meta_gradient(optimizer_class: Any, steps: int, **arguments: Any) -> tuple[torch.Tensor, torch.Tensor, Any]:
    """The gradient of an outer loss through an inner loop, the inner parameters, and the inner optimizer."""
    torch.manual_seed(0)
    start = torch.randn(5, dtype=torch.float64, requires_grad=True)
    x = torch.randn(7, 5, dtype=torch.float64)
    inner = start.clone()
    optimizer = optimizer_class([inner], lr=0.1, differentiable=True, **arguments)
    for _ in range(steps):
        (inner.grad,) = torch.autograd.grad((x @ inner).square().mean(), inner, create_graph=True)
        optimizer.step()
    (gradient,) = torch.autograd.grad((x @ inner).pow(4).sum(), start)
    return gradient, inner.detach().clone(), optimizer


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_an_inner_loop_has_torchs_meta_gradient(server: Server, options: dict[str, Any]) -> None:
    """The state keeps its graph between steps."""
    ours, values, remote = meta_gradient(Adam, 4, server=server.address, **options)
    theirs, other_values, local = meta_gradient(torch.optim.Adam, 4, **options)
    assert torch.equal(ours, theirs)
    assert torch.equal(values, other_values)
    assert_equal_states(remote, local)
    remote.close()


def test_the_server_has_what_the_steps_led_to(server: Server) -> None:
    """Values, moments and counters are committed with each step."""
    _, values, remote = meta_gradient(Adam, 3, server=server.address, job="inner")
    (job,) = server.registry.all()
    assert job.step == remote.job_step == 3
    (bucket,) = job.store.buckets
    stored = torch.frombuffer(bytearray(job.store.read("parameter", bucket, [True])[0]), dtype=torch.float64)
    assert torch.equal(stored, values)
    moment = torch.frombuffer(bytearray(job.store.read("exp_avg", bucket, [True])[0]), dtype=torch.float64)
    assert torch.equal(moment, remote.state[remote.param_groups[0]["params"][0]]["exp_avg"].detach())
    assert job.store.step_of(0) == 3
    remote.close()


@pytest.mark.parametrize("optimizer_class", [Adam, AdamW])
def test_gradients_through_a_step_are_right_for_parameter_gradient_and_state(
    server: Server, optimizer_class: Any
) -> None:
    """Checked numerically, with a state put in by hand."""

    def one_step(p: torch.Tensor, grad: torch.Tensor, *state: torch.Tensor) -> tuple[torch.Tensor, ...]:
        parameter = p.clone()
        parameter.grad = grad
        with optimizer_class([parameter], lr=0.1, differentiable=True, server=server.address) as remote:
            names = ("exp_avg", "exp_avg_sq")
            entry = {name: tensor.clone() for name, tensor in zip(names, state, strict=True)}
            remote.state[parameter].update({"step": torch.tensor(10.0, dtype=torch.float64), **entry})
            remote.step()
            return (parameter, *(remote.state[parameter][name] for name in names))

    inputs = [torch.rand(4, dtype=torch.float64, requires_grad=True) for _ in range(4)]
    assert torch.autograd.gradcheck(one_step, inputs)


def test_state_dicts_of_differentiable_optimizers_go_both_ways(server: Server) -> None:
    """And a job that was left is taken up where it stands."""
    _, _, remote = meta_gradient(Adam, 2, server=server.address, job="inner")
    _, _, local = meta_gradient(torch.optim.Adam, 2)
    remote.load_state_dict(local.state_dict())
    local.load_state_dict(remote.state_dict())
    assert_equal_states(remote, local)
    remote.close()
    _, _, resumed = meta_gradient(Adam, 0, server=server.address, job="inner")
    assert resumed.resumed
    assert_equal_states(resumed, local)
    resumed.close()


def test_an_optimizer_may_become_differentiable_and_back(server: Server) -> None:
    """The state moves with it: into the worker, and to the server again."""
    start = torch.randn(9)
    pair = [start.clone().requires_grad_() for _ in range(2)]
    with Adam([pair[0]], foreach=False, fused=False, server=server.address) as remote:
        local = torch.optim.Adam([pair[1]], foreach=False, fused=False)
        for step in range(6):
            for p, optimizer in zip(pair, (remote, local), strict=True):
                optimizer.param_groups[0]["differentiable"] = 2 <= step < 4
                p.grad = torch.full_like(p, step + 1.0)
                optimizer.step()
        assert torch.equal(pair[0], pair[1])
        assert_equal_states(remote, local)
        assert remote.job_step == 6


def test_gradients_are_not_left_to_a_server_that_cannot_differentiate(server: Server) -> None:
    """accumulate() would; several workers would each make another step."""
    _, _, remote = meta_gradient(Adam, 1, server=server.address)
    with pytest.raises(ConfigurationError, match="accumulate"):
        remote.accumulate()
    remote.close()
    with pytest.raises(ConfigurationError, match="use one worker"):
        meta_gradient(Adam, 1, server=server.address, job="two", options=ProxyOptions(rank=0, world_size=2))


def test_the_errors_of_differentiable_are_torchs(server: Server) -> None:
    """With the fused kernel, and for a leaf that requires grad."""
    p = torch.ones(3, requires_grad=True)
    with pytest.raises(RuntimeError) as theirs:
        torch.optim.Adam([p], differentiable=True, fused=True)
    with pytest.raises(RuntimeError) as ours:
        Adam([p], differentiable=True, fused=True, server=server.address)
    assert str(ours.value) == str(theirs.value)
    p.grad = torch.ones(3)
    with Adam([p], differentiable=True, server=server.address) as remote:
        local = torch.optim.Adam([p], differentiable=True)
        with pytest.raises(RuntimeError) as theirs:
            local.step()
        with pytest.raises(RuntimeError) as ours:
            remote.step()
        assert str(ours.value) == str(theirs.value)


@pytest.mark.parametrize(
    "options",
    [{"max_grad_norm": 1.0}, {"nonfinite": "skip"}, {"nonfinite": "error"}, {"master_dtype": torch.float64}],
    ids=str,
)
def test_what_a_server_would_do_to_gradients_is_refused(server: Server, options: dict[str, Any]) -> None:
    """It sees none of them: silently doing nothing would be worse."""
    with pytest.raises(ConfigurationError, match="differentiable=True has the step made in the worker"):
        meta_gradient(Adam, 1, server=server.address, options=ProxyOptions(**options))


def test_workers_that_become_differentiable_are_refused_by_the_next_step(server: Server) -> None:
    """Not only in the constructor; nothing has changed."""

    def work(rank: int) -> torch.Tensor:
        p = torch.nn.Parameter(torch.ones(3))
        options = ProxyOptions(rank=rank, world_size=2)
        with Adam([p], server=server.address, job="two", options=options) as remote:
            p.grad = torch.ones(3)
            remote.param_groups[0]["differentiable"] = True
            with pytest.raises(ConfigurationError, match="several workers would make different ones"):
                remote.step()
            remote.param_groups[0]["differentiable"] = False
            remote.step()
            assert remote.job_step == 1
        return p.detach()

    first, second = in_threads(work, 2)
    assert torch.equal(first, second)
