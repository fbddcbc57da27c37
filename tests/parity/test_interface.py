"""What a program sees of the optimizer besides its numbers."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
import threading
import warnings
from typing import Any

import pytest
import torch
from torch import nn

from optimd.client import (
    Adam,
    AdamW,
    ConfigurationError,
    JobMismatchError,
    LimitExceededError,
    OptimizerClosedError,
    ProxyOptions,
)
from optimd.server import Server
from tests.support import assert_equal_parameters, assert_equal_states, running_server


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 50), nn.Tanh(), nn.Linear(50, 3))


def backward(model: nn.Module, step: int) -> None:
    model.zero_grad()
    model(torch.randn(4, 6, generator=torch.Generator().manual_seed(step))).square().sum().backward()


@pytest.mark.parametrize(("ours", "theirs"), [(Adam, torch.optim.Adam), (AdamW, torch.optim.AdamW)])
def test_the_constructor_is_torchs_and_three_more(ours: type, theirs: type) -> None:
    """Every argument of torch's has its name, kind and default; ours are keyword-only and default to None."""
    mine = inspect.signature(ours.__init__).parameters  # type: ignore[misc]
    other = inspect.signature(theirs.__init__).parameters  # type: ignore[misc]
    assert [*mine] == [*other, "server", "job", "options"]
    for name, parameter in other.items():
        assert (mine[name].kind, mine[name].default) == (parameter.kind, parameter.default), name
    assert all(mine[name].default is None for name in ("server", "job", "options"))


@pytest.mark.parametrize(
    "arguments",
    [
        {"lr": -1.0},
        {"eps": -1e-8},
        {"betas": (1.5, 0.9)},
        {"weight_decay": -1},
        {"fused": True, "foreach": True},
        {"lr": torch.tensor(0.1), "foreach": True},
    ],
    ids=str,
)
def test_wrong_arguments_raise_torchs_own_errors(arguments: dict[str, Any]) -> None:
    """The same type and the same text, and no server is asked for it."""
    with pytest.raises((ValueError, RuntimeError)) as theirs:
        torch.optim.Adam(net().parameters(), **arguments)
    with pytest.raises(theirs.type) as ours:
        Adam(net().parameters(), **arguments, server="127.0.0.1:1")
    assert str(ours.value) == str(theirs.value)


def test_it_is_an_instance_of_torchs_class(server: Server) -> None:
    """Code that asks finds what it looks for; the repr is torch's and says where it lives."""
    with Adam(net().parameters(), server=server.address, job="digits") as remote:
        assert isinstance(remote, torch.optim.Adam)
        theirs = repr(torch.optim.Adam(net().parameters()))
        assert repr(remote) == f"{theirs} on {server.address}, job digits, step 0"


def test_a_closure_runs_once_with_gradients_and_its_loss_is_returned(server: Server) -> None:
    """step(closure) as in torch."""
    ours, theirs = net(), net()
    calls = []

    def closure_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> Any:
        def closure() -> float:
            calls.append(torch.is_grad_enabled())
            optimizer.zero_grad()
            loss = model(torch.ones(4, 6)).square().sum()
            loss.backward()
            return loss.item()

        return closure

    with Adam(ours.parameters(), fused=True, server=server.address) as remote:
        local = torch.optim.Adam(theirs.parameters(), fused=True)
        for _ in range(3):
            assert remote.step(closure_of(ours, remote)) == local.step(closure_of(theirs, local))
        assert calls == [True] * 6
        assert_equal_parameters(ours, theirs)
        assert remote.step() is None


def test_hooks_fire_once_in_torchs_order(server: Server) -> None:
    """Step hooks, state_dict hooks and load hooks, each once."""
    seen: list[str] = []
    model = net()
    with Adam(model.parameters(), server=server.address) as remote:
        remote.register_step_pre_hook(lambda *_: seen.append("step pre"))
        remote.register_step_post_hook(lambda *_: seen.append("step post"))
        remote.register_state_dict_pre_hook(lambda *_: seen.append("save pre"))
        remote.register_state_dict_post_hook(lambda *_: seen.append("save post"))
        remote.register_load_state_dict_pre_hook(lambda *_: seen.append("load pre"))
        remote.register_load_state_dict_post_hook(lambda *_: seen.append("load post"))
        backward(model, 0)
        remote.step()
        remote.load_state_dict(remote.state_dict())
    assert seen == ["step pre", "step post", "save pre", "save post", "load pre", "load post"]


def test_zero_grad_does_what_torchs_does(server: Server) -> None:
    """Gone, or zero."""
    model = net()
    with Adam(model.parameters(), server=server.address) as remote:
        backward(model, 0)
        remote.zero_grad(set_to_none=False)
        assert all(p.grad is not None and not p.grad.any() for p in model.parameters())
        remote.zero_grad()
        assert all(p.grad is None for p in model.parameters())


def test_zero_gradients_decay_the_moments_and_none_does_not(server: Server) -> None:
    """A None gradient skips the parameter; a zero one is a step."""
    ours, theirs = net(), net()
    with Adam(ours.parameters(), fused=True, server=server.address) as remote:
        local = torch.optim.Adam(theirs.parameters(), fused=True)
        for step in range(6):
            for model, optimizer in ((ours, remote), (theirs, local)):
                backward(model, step)
                if step % 2:
                    model[0].bias.grad = None
                    model[2].bias.grad.zero_()
                optimizer.step()
        assert_equal_parameters(ours, theirs)
        assert_equal_states(remote, local)
        assert remote.state[ours[0].bias]["step"] == 3


@pytest.mark.parametrize("amsgrad", [False, True])
def test_state_dicts_go_both_ways_and_training_goes_on_identically(server: Server, *, amsgrad: bool) -> None:
    """torch's into ours, ours into torch's, through torch.save and a weights-only load."""
    ours, theirs = net(), net()
    arguments: dict[str, Any] = {"lr": 1e-2, "fused": True, "amsgrad": amsgrad}
    with Adam(ours.parameters(), **arguments, server=server.address) as remote:
        local = torch.optim.Adam(theirs.parameters(), **arguments)
        for step in range(5):
            backward(ours, step)
            remote.step()
        file = io.BytesIO()
        torch.save(remote.state_dict(), file)
        file.seek(0)
        local.load_state_dict(torch.load(file, weights_only=True))
        theirs.load_state_dict(ours.state_dict())
        for step in range(5, 10):
            for model, optimizer in ((ours, remote), (theirs, local)):
                backward(model, step)
                optimizer.step()
        assert_equal_parameters(ours, theirs)
        assert_equal_states(remote, local)

    fresh = net()
    fresh.load_state_dict(theirs.state_dict())
    with Adam(fresh.parameters(), lr=1.0, server=server.address) as remote:
        remote.load_state_dict(local.state_dict())
        assert remote.param_groups[0]["lr"] == 1e-2
        for step in range(10, 15):
            for model, optimizer in ((fresh, remote), (theirs, local)):
                backward(model, step)
                optimizer.step()
        assert_equal_parameters(fresh, theirs)
        assert_equal_states(remote, local)


def test_a_state_dict_that_does_not_fit_raises_torchs_error_and_changes_nothing(server: Server) -> None:
    """Groups and state are as they were."""
    model = net()
    with Adam(model.parameters(), server=server.address) as remote:
        backward(model, 0)
        remote.step()
        before = remote.state_dict()
        other = torch.optim.Adam([nn.Parameter(torch.ones(2))]).state_dict()
        with pytest.raises(ValueError, match="doesn't match the size of optimizer's group"):
            remote.load_state_dict(other)
        wrong = copy.deepcopy(before)
        wrong["state"][0]["exp_avg"] = torch.ones(3)
        with pytest.raises(ValueError, match="exp_avg of parameter 0 has shape \\[3\\]"):
            remote.load_state_dict(wrong)
        after = remote.state_dict()
        assert after["param_groups"] == before["param_groups"]
        assert all(torch.equal(after["state"][i]["exp_avg"], before["state"][i]["exp_avg"]) for i in range(4))


@pytest.mark.parametrize("bucket_bytes", [None, 1024])
def test_a_param_group_added_in_mid_training_is_stepped_like_torchs(server: Server, bucket_bytes: int | None) -> None:
    """With options of its own, and named like torch names it."""
    from optimd.client import ProxyOptions

    ours, theirs, more, other_more = net(), net(), net(1), net(1)
    with Adam(
        ours.parameters(), fused=True, server=server.address, options=ProxyOptions(bucket_bytes=bucket_bytes)
    ) as remote:
        local = torch.optim.Adam(theirs.parameters(), fused=True)
        for step in range(6):
            if step == 3:
                remote.add_param_group({"params": list(more.parameters()), "lr": 0.1})
                local.add_param_group({"params": list(other_more.parameters()), "lr": 0.1})
            for models, optimizer in (((ours, more), remote), ((theirs, other_more), local)):
                for model in models:
                    backward(model, step)
                optimizer.step()
        assert_equal_parameters(ours, theirs)
        assert_equal_parameters(more, other_more)
        assert_equal_states(remote, local)
        assert remote.state_dict()["param_groups"] == local.state_dict()["param_groups"]


@pytest.mark.parametrize("how", [copy.deepcopy, lambda optimizer: pickle.loads(pickle.dumps(optimizer))])
def test_a_copy_is_a_job_of_its_own_with_the_same_state(server: Server, how: Any) -> None:
    """It steps its own copies of the parameters and leaves the original alone."""
    model = net()
    with Adam(model.parameters(), lr=1e-2, server=server.address) as remote:
        backward(model, 0)
        remote.step()
        with how(remote) as twin:
            assert twin.job != remote.job
            assert_equal_states(twin, remote)
            before = model[0].weight.clone()
            for group in twin.param_groups:
                for p in group["params"]:
                    p.grad = torch.ones_like(p)
            twin.step()
            assert twin.job_step == 1
            assert remote.state[model[0].weight]["step"] == 1
            assert torch.equal(model[0].weight, before)
            assert not torch.equal(twin.param_groups[0]["params"][0], before)


def test_schedulers_change_the_lr_that_the_server_uses(server: Server) -> None:
    """Among them one that changes betas, and a learning rate that is a tensor changed in place."""
    for build in (
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=20),
        lambda o: torch.optim.lr_scheduler.StepLR(o, 3, 0.5),
    ):
        ours, theirs = net(), net()
        with Adam(ours.parameters(), fused=True, server=server.address) as remote:
            local = torch.optim.Adam(theirs.parameters(), fused=True)
            schedulers = [build(remote), build(local)]
            for step in range(15):
                for model, optimizer in ((ours, remote), (theirs, local)):
                    backward(model, step)
                    optimizer.step()
                for scheduler in schedulers:
                    scheduler.step()
            assert_equal_parameters(ours, theirs)


def test_sparse_gradients_raise_torchs_error(server: Server) -> None:
    """And nothing is lost: the next dense step works."""
    table = nn.Embedding(10, 3, sparse=True)
    with Adam(table.parameters(), server=server.address) as remote:
        table(torch.tensor([1, 2])).sum().backward()
        with pytest.raises(RuntimeError, match="does not support sparse gradients, please consider SparseAdam"):
            remote.step()
        table.weight.grad = torch.ones_like(table.weight)
        remote.step()
        assert remote.job_step == 1


def test_duplicate_and_overlapping_parameters_are_refused_by_name() -> None:
    """Twice in one group, in two groups, and two views of one memory. No server is asked."""
    p, q = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))
    with pytest.warns(UserWarning, match="duplicate parameters"), pytest.raises(ValueError, match="same tensor"):
        Adam([p, q, p], server="127.0.0.1:1")
    with pytest.raises(ValueError, match="more than one parameter group"):
        Adam([{"params": [p]}, {"params": [p]}], server="127.0.0.1:1")
    memory = torch.zeros(10)
    with pytest.raises(ValueError, match=r"parameter 0 \(left\) and parameter 1 \(right\) share memory"):
        Adam(
            [("left", nn.Parameter(memory[:6])), ("right", nn.Parameter(memory[5:]))],
            server="127.0.0.1:1",
        )


def test_interleaved_views_of_one_memory_are_distinct_parameters(server: Server) -> None:
    """Even and odd columns share a storage but no element."""
    memory = torch.zeros(6, 4)
    even, odd = nn.Parameter(memory[:, ::2]), nn.Parameter(memory[:, 1::2])
    with Adam([even, odd], lr=0.5, server=server.address) as remote:
        even.grad, odd.grad = torch.ones(6, 2), -torch.ones(6, 2)
        remote.step()
    assert torch.allclose(memory[:, 0], torch.tensor(-0.5))
    assert torch.allclose(memory[:, 1], torch.tensor(0.5))


def test_what_a_server_cannot_do_is_refused_in_the_constructor() -> None:
    """Differentiable steps of several workers, and parameters that are not strided."""
    with running_server() as server, pytest.raises(ConfigurationError, match="differentiable"):
        Adam(
            net().parameters(),
            differentiable=True,
            server=server.address,
            job="maml",
            options=ProxyOptions(world_size=2, rank=0),
        )
    with pytest.raises(ValueError, match=r"parameter 0: its layout is torch\.sparse_coo"):
        Adam([nn.Parameter(torch.eye(2).to_sparse())], server="127.0.0.1:1")


def test_a_closed_optimizer_says_so(server: Server) -> None:
    """close() may be called twice; a step afterwards is an error."""
    model = net()
    remote = Adam(model.parameters(), server=server.address)
    remote.close()
    remote.close()
    backward(model, 0)
    with pytest.raises(OptimizerClosedError):
        remote.step()
    assert server.registry.all() == []


def test_grad_scaler_trains_as_with_torchs(server: Server) -> None:
    """The scale is taken out in the worker; a step with infinite gradients changes nothing."""
    ours, theirs = net(), net()
    with Adam(ours.parameters(), fused=True, server=server.address) as remote:
        local = torch.optim.Adam(theirs.parameters())
        for group in local.param_groups:
            group["fused"] = True
        scalers = [torch.amp.GradScaler("cpu", init_scale=8.0) for _ in range(2)]
        for step in range(4):
            for model, optimizer, scaler in ((ours, remote, scalers[0]), (theirs, local, scalers[1])):
                model.zero_grad()
                loss = model(torch.randn(4, 6, generator=torch.Generator().manual_seed(step))).square().sum()
                scaler.scale(loss).backward()
                if step == 2:
                    model[0].weight.grad[0, 0] = torch.inf
                scaler.step(optimizer)
                scaler.update()
        assert remote.job_step == 3
        assert_equal_parameters(ours, theirs)


def test_refused_groups_loads_and_values_leave_the_optimizer_as_it_was(server: Server) -> None:
    """A private job, whose state would go with its stream: after each refusal it steps as torch does."""
    ours, theirs = net(), net()

    with Adam(ours.parameters(), fused=True, server=server.address) as remote:
        local = torch.optim.Adam(theirs.parameters(), fused=True)

        def step(number: int) -> None:
            for model, optimizer in ((ours, remote), (theirs, local)):
                backward(model, number)
                optimizer.step()
            assert_equal_parameters(ours, theirs)

        step(0)
        with pytest.raises(ValueError, match="can't optimize a non-leaf"):
            remote.add_param_group({"params": [torch.ones(3, requires_grad=True) * 2]})
        step(1)
        with pytest.raises(LimitExceededError, match="--max-job-bytes"):
            huge = nn.Parameter(torch.ones(1).expand(1_000_000_000_000))
            remote.add_param_group({"params": [huge]})
        step(2)
        q = nn.Parameter(torch.ones(3))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(UserWarning, match="duplicate"):
                remote.add_param_group({"params": [q, q]})
        step(3)
        short = remote.state_dict()
        short["state"][0]["exp_avg"] = torch.zeros(3)
        with pytest.raises(JobMismatchError, match="exp_avg of parameter 0"):
            remote.load_state_dict(short)
        assert_equal_states(remote, local)
        step(4)
        remote.param_groups[0]["lr"] = "0.1"
        backward(ours, 5)
        with pytest.raises(TypeError):
            remote.step()
        remote.param_groups[0]["lr"] = 1e-3
        step(5)
        assert len(remote.param_groups) == 1
        assert_equal_states(remote, local)


def test_a_gradient_of_another_dtype_or_shape_is_refused_by_name(server: Server) -> None:
    """Where torch lets a user set one; its bytes would be taken for others."""
    p = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    with Adam([("weight", p)], server=server.address) as remote:
        p.grad = torch.ones(4, dtype=torch.bfloat16)
        remote.step()
        if hasattr(p, "grad_dtype"):
            p.grad = None
            p.grad_dtype = torch.float32
            p.grad = torch.ones(4)
            with pytest.raises(
                RuntimeError, match=r"parameter 0 \(weight\) is torch.bfloat16 .* its gradient torch.float32"
            ):
                remote.step()
            p.grad = None
            p.grad_dtype = torch.bfloat16
        p.grad = torch.ones(4, dtype=torch.bfloat16)
        remote.step()
        assert remote.job_step == 2


def test_hooks_of_a_load_see_what_is_being_loaded(server: Server) -> None:
    """The server does not have it yet; they may look all the same."""
    model, seen = net(), []
    with Adam(model.parameters(), server=server.address) as remote:
        backward(model, 0)
        remote.step()
        saved = remote.state_dict()
        remote.step()
        remote.register_load_state_dict_post_hook(lambda o: seen.append(o.state_dict()["state"][0]["step"].item()))
        remote.load_state_dict(saved)
        assert seen == [1.0]
        assert remote.state[model[0].weight]["step"] == 1


def test_a_copy_is_private_whatever_the_environment_calls_the_original(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It neither joins the original's job nor stays on the server."""
    monkeypatch.setenv("OPTIMD_JOB", "exp1")
    model = net()
    with Adam(model.parameters(), server=server.address) as remote:
        backward(model, 0)
        remote.step()
        pickled = pickle.dumps(remote)
    with pickle.loads(pickled) as twin:
        assert twin.job.startswith("private-")
        assert twin.job_step == 0
    (job,) = server.registry.all()
    assert (job.name, job.step) == ("exp1", 1)


def test_tensors_larger_than_the_default_bucket_have_torchs_bits(server: Server) -> None:
    """3.2 MB in two buckets, the second shared with what follows."""
    start = [torch.randn(800_001), torch.randn(77)]
    ours, theirs = ([nn.Parameter(value.clone()) for value in start] for _ in range(2))
    with Adam(ours, fused=True, server=server.address) as remote:
        assert len(server.registry.all()[0].store.buckets) == 2
        local = torch.optim.Adam(theirs, fused=True)
        for step in range(5):
            for params, optimizer in ((ours, remote), (theirs, local)):
                for p in params:
                    p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step))
                optimizer.step()
        assert all(torch.equal(mine, other) for mine, other in zip(ours, theirs, strict=True))
        assert_equal_states(remote, local)


def test_a_closed_optimizer_may_still_clear_its_gradients(server: Server) -> None:
    """Nothing is held for it any more, whatever it had accumulated."""
    model = net()
    remote = Adam(model.parameters(), server=server.address)
    backward(model, 0)
    remote.accumulate()
    remote.close()
    backward(model, 1)
    remote.zero_grad()
    assert all(p.grad is None for p in model.parameters())


def test_a_thread_may_save_while_another_one_edits_the_state(server: Server) -> None:
    """As a server step hook may; what torch packs in one thread is not what the other one sees."""
    p = nn.Parameter(torch.ones(4))
    with Adam([p], server=server.address) as remote:
        p.grad = torch.ones(4)
        remote.step()
        inside, edited = threading.Event(), threading.Event()

        def wait(_: Any) -> None:
            inside.set()
            assert edited.wait(10)

        remote.register_state_dict_pre_hook(wait)
        saving = threading.Thread(target=remote.state_dict)
        saving.start()
        assert inside.wait(10)
        remote.state[p]["exp_avg"].zero_()
        edited.set()
        saving.join(10)
        assert not remote.state[p]["exp_avg"].any()
        remote.step()
        assert torch.allclose(remote.state[p]["exp_avg"], torch.full((4,), 0.1))
