"""What a program changes between steps, in parameters and in `opt.state`, counts as it does with torch's own."""

from __future__ import annotations

import copy
import gc
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from optimd.client import AccumulationLostError, Adam, JobMismatchError, ProxyOptions
from optimd.server import Server
from tests.support import assert_equal_parameters, assert_equal_states, in_threads

Change = Callable[[nn.Sequential, torch.optim.Optimizer], None]

KERNEL: dict[str, Any] = {"fused": True}


def net(seed: int = 0) -> nn.Sequential:
    """One parameter of it is large enough to be sampled rather than compared whole."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 50), nn.Tanh(), nn.Linear(50, 300), nn.Tanh(), nn.Linear(300, 3))


def backward(model: nn.Module, step: int) -> None:
    model.zero_grad()
    dtype = next(model.parameters()).dtype
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(step)).to(dtype)
    model(x).square().sum().backward()


def changed_midway(server: Server, change: Change, *, steps: int = 5, at: int = 2, **kernel: Any) -> None:
    """Trains with torch's optimizer and with the remote one, both changed between two steps, and compares."""
    ours, theirs = net(), net()
    kernel = kernel or KERNEL
    with Adam(ours.parameters(), lr=1e-2, server=server.address, **kernel) as remote:
        local = torch.optim.Adam(theirs.parameters(), lr=1e-2, **kernel)
        for step in range(steps):
            for model, optimizer in ((ours, remote), (theirs, local)):
                backward(model, step)
                if step == at:
                    change(model, optimizer)
                optimizer.step()
        assert_equal_parameters(ours, theirs)
        assert_equal_states(remote, local)


def scale(model: nn.Sequential, _: torch.optim.Optimizer) -> None:
    with torch.no_grad():
        model[0].weight.mul_(0.5)


def clamp(model: nn.Sequential, _: torch.optim.Optimizer) -> None:
    for p in model.parameters():
        p.data.clamp_(-0.05, 0.05)


def assign_data(model: nn.Sequential, _: torch.optim.Optimizer) -> None:
    model[2].weight.data = torch.ones_like(model[2].weight)


def assign_data_of_another_layout(model: nn.Sequential, _: torch.optim.Optimizer) -> None:
    model[2].weight.data = model[2].weight.detach().t().contiguous().t() * 2


# Made here, not in the threads of two workers, which share torch's generator.
LOADED = net(5).state_dict()


def load(model: nn.Sequential, _: torch.optim.Optimizer) -> None:
    model.load_state_dict(LOADED)


def from_vector(model: nn.Sequential, _: torch.optim.Optimizer) -> None:
    vector = nn.utils.parameters_to_vector(model.parameters()).detach()
    nn.utils.vector_to_parameters(vector * 0.9, model.parameters())


def swap_data(model: nn.Sequential, _: torch.optim.Optimizer) -> None:
    """As averaging utilities do for an evaluation, and back."""
    kept = [p.data for p in model.parameters()]
    for p in model.parameters():
        p.data = torch.zeros_like(p)
    for p, data in zip(model.parameters(), kept, strict=True):
        p.data = data


def write_elements(model: nn.Sequential, _: torch.optim.Optimizer) -> None:
    model[0].bias.data[3] = 7.0
    model[0].bias.data[4] = -0.0


@pytest.mark.parametrize("change", [scale, clamp, assign_data, load, from_vector, swap_data, write_elements])
def test_values_that_a_program_writes_are_what_the_next_step_starts_from(server: Server, change: Change) -> None:
    """By version, by data pointer, or by content."""
    changed_midway(server, change)


def test_values_that_come_in_another_memory_order_are_taken(server: Server) -> None:
    """torch's loop is the measure: its fused kernel is silently wrong where parameter and state lie differently."""
    changed_midway(server, assign_data_of_another_layout, foreach=False, fused=False)


def test_values_that_are_written_after_every_step_count_every_time(server: Server) -> None:
    """As a critic's weights are clamped."""
    ours, theirs = net(), net()
    with Adam(ours.parameters(), lr=5e-2, server=server.address, **KERNEL) as remote:
        local = torch.optim.Adam(theirs.parameters(), lr=5e-2, **KERNEL)
        for step in range(20):
            for model, optimizer in ((ours, remote), (theirs, local)):
                backward(model, step)
                optimizer.step()
                clamp(model, optimizer)
        assert_equal_parameters(ours, theirs)
        assert_equal_states(remote, local)


def test_what_nobody_changed_is_not_pushed(server: Server) -> None:
    """Steps without changes carry gradients alone; a pushed value costs its bytes."""
    model = net()
    with Adam(model.parameters(), server=server.address) as remote:
        sizes = []
        for step in range(4):
            backward(model, step)
            if step == 2:
                scale(model, remote)
            remote.step()
            sizes.append(remote.last_receipt.bytes_sent)
    weight = model[0].weight.nbytes
    assert sizes[1] == sizes[3]
    assert weight < sizes[2] - sizes[1] < weight + 200


def test_a_sparse_write_through_data_is_pushed_when_asked_for(server: Server) -> None:
    """Sampling may miss one element of many; push_parameters() does not."""
    ours, theirs = (nn.Parameter(torch.zeros(1_000_000)) for _ in range(2))
    with Adam([ours], lr=0.5, server=server.address, **KERNEL) as remote:
        local = torch.optim.Adam([theirs], lr=0.5, **KERNEL)
        for step in range(3):
            for p, optimizer in ((ours, remote), (theirs, local)):
                p.grad = torch.ones_like(p)
                if step == 1:
                    p.data[543_217] = 9.0
                    if optimizer is remote:
                        remote.push_parameters()
                optimizer.step()
        assert torch.equal(ours, theirs)


def test_pull_parameters_brings_back_what_the_job_has(server: Server) -> None:
    """What was written meanwhile is gone, and is not pushed either."""
    ours, theirs = net(), net()
    with Adam(ours.parameters(), server=server.address, **KERNEL) as remote:
        local = torch.optim.Adam(theirs.parameters(), **KERNEL)
        for step in range(3):
            for model, optimizer in ((ours, remote), (theirs, local)):
                backward(model, step)
                optimizer.step()
            with torch.no_grad():
                ours[0].weight.fill_(3.0)
            remote.pull_parameters()
            assert_equal_parameters(ours, theirs)


def test_values_changed_before_a_group_is_added_are_still_pushed(server: Server) -> None:
    """Adding a group must not take the changed values for the server's."""

    def add(model: nn.Sequential, optimizer: torch.optim.Optimizer) -> None:
        scale(model, optimizer)
        extra = nn.Parameter(torch.ones(3))
        model.register_parameter("extra", extra)
        extra.grad = torch.ones(3)
        optimizer.add_param_group({"params": [extra], "lr": 0.1})

    changed_midway(server, add, steps=3)


# --- opt.state


def edit_in_place(model: nn.Sequential, optimizer: torch.optim.Optimizer) -> None:
    optimizer.state[model[0].weight]["exp_avg"].mul_(0.5)
    optimizer.state[model[2].weight]["exp_avg_sq"].data.add_(1.0)


def edit_by_key(model: nn.Sequential, optimizer: torch.optim.Optimizer) -> None:
    optimizer.state[model[0].weight]["exp_avg"] = torch.full_like(model[0].weight, 0.25)
    optimizer.state[model[0].weight]["step"].fill_(100)


def replace_entry(model: nn.Sequential, optimizer: torch.optim.Optimizer) -> None:
    w = model[0].weight
    optimizer.state[w] = {"step": torch.tensor(7.0), "exp_avg": torch.ones_like(w), "exp_avg_sq": torch.ones_like(w)}


def take_one_away(model: nn.Sequential, optimizer: torch.optim.Optimizer) -> None:
    del optimizer.state[model[0].weight]
    optimizer.state.pop(model[0].bias)


def clear_state(_: nn.Sequential, optimizer: torch.optim.Optimizer) -> None:
    optimizer.state.clear()


def reset_state(_: nn.Sequential, optimizer: torch.optim.Optimizer) -> None:
    optimizer.state = defaultdict(dict)


def move_to_device(_: nn.Sequential, optimizer: torch.optim.Optimizer) -> None:
    for entry in optimizer.state.values():
        for key, value in entry.items():
            if torch.is_tensor(value):
                entry[key] = value.clone()


def edit_and_write(model: nn.Sequential, optimizer: torch.optim.Optimizer) -> None:
    edit_in_place(model, optimizer)
    scale(model, optimizer)


@pytest.mark.parametrize(
    "change",
    [
        *(edit_in_place, edit_by_key, replace_entry, take_one_away, clear_state, reset_state, move_to_device),
        edit_and_write,
    ],
)
def test_state_that_a_program_edits_is_what_the_next_step_starts_from(server: Server, change: Change) -> None:
    """Edits reach the server with the next step."""
    changed_midway(server, change)


def replace_parameter(model: nn.Sequential, optimizer: torch.optim.Optimizer, *, keep: bool) -> None:
    old: Any = model[0].weight
    new = nn.Parameter(old.detach() * 2)
    entry = optimizer.state.pop(old)
    model[0].weight = new
    optimizer.param_groups[0]["params"][0] = new
    new.grad = old.grad
    if keep:
        optimizer.state[new] = entry


@pytest.mark.parametrize("keep", [True, False])
def test_a_replaced_parameter_takes_the_state_that_it_is_given(server: Server, keep: bool) -> None:
    """Moved state goes on; without it the parameter starts anew."""
    changed_midway(server, lambda model, optimizer: replace_parameter(model, optimizer, keep=keep))


def grow_layer(model: nn.Sequential, optimizer: torch.optim.Optimizer) -> None:
    """Adds rows to a parameter and to its state, as methods that densify a scene do."""
    params = optimizer.param_groups[0]["params"]
    for index, old in enumerate(params):
        if old is not model[4].weight and old is not model[4].bias:
            continue
        rows = torch.ones(2, *old.shape[1:])
        entry = optimizer.state.get(old)
        for name in ("exp_avg", "exp_avg_sq"):
            entry[name] = torch.cat([entry[name], torch.zeros_like(rows)])
        del optimizer.state[old]
        new = nn.Parameter(torch.cat([old.detach(), rows]))
        new.grad = torch.cat([old.grad, rows])  # type: ignore[list-item]
        params[index] = new
        optimizer.state[new] = entry
        setattr(model[4], "weight" if old.dim() == 2 else "bias", new)


def prune_layer(model: nn.Sequential, optimizer: torch.optim.Optimizer) -> None:
    """Takes rows away, without touching the gradient: the parameter is skipped once."""
    params = optimizer.param_groups[0]["params"]
    for index, old in enumerate(params):
        if old is model[4].weight or old is model[4].bias:
            entry = optimizer.state.get(old)
            entry["exp_avg"], entry["exp_avg_sq"] = entry["exp_avg"][:2], entry["exp_avg_sq"][:2]
            del optimizer.state[old]
            new = nn.Parameter(old.detach()[:2].clone())
            params[index] = new
            optimizer.state[new] = entry
            setattr(model[4], "weight" if old.dim() == 2 else "bias", new)


def append_parameter(model: nn.Sequential, optimizer: torch.optim.Optimizer) -> None:
    extra = nn.Parameter(torch.ones(3))
    model.register_parameter("extra", extra)
    extra.grad = torch.ones(3)
    optimizer.param_groups[0]["params"].append(extra)


def take_group_apart(model: nn.Sequential, optimizer: torch.optim.Optimizer) -> None:
    """By hand: the last layer goes into a group of its own, with another rate."""
    (group,) = optimizer.param_groups
    last = group["params"][-2:]
    del group["params"][-2:]
    optimizer.param_groups.append({**group, "params": last, "lr": 0.5})


def reverse_parameters(_: nn.Sequential, optimizer: torch.optim.Optimizer) -> None:
    optimizer.param_groups[0]["params"].reverse()


@pytest.mark.parametrize("change", [grow_layer, prune_layer, append_parameter, take_group_apart, reverse_parameters])
def test_parameters_may_become_others_by_hand(server: Server, change: Change) -> None:
    """More, fewer, of other shapes, or elsewhere: the job follows, and keeps the state of those that are the same."""
    changed_midway(server, change)


def test_parameters_of_another_dtype_before_the_first_step_are_the_job_s(server: Server) -> None:
    """module.double() between the constructor and the first step, as torch allows."""
    ours, theirs = net(), net()
    with Adam(ours.parameters(), server=server.address, **KERNEL) as remote:
        local = torch.optim.Adam(theirs.parameters(), **KERNEL)
        ours.double()
        theirs.double()
        for step in range(3):
            for model, optimizer in ((ours, remote), (theirs, local)):
                backward(model, step)
                optimizer.step()
        assert_equal_parameters(ours, theirs)
        assert_equal_states(remote, local)


def test_parameters_of_another_dtype_than_their_state_raise_torch_s_error(server: Server) -> None:
    """torch cannot step them either; once their state is converted too, both can."""
    ours, theirs = net(), net()
    with Adam(ours.parameters(), server=server.address, **KERNEL) as remote:
        local = torch.optim.Adam(theirs.parameters(), **KERNEL)
        pairs = ((ours, remote), (theirs, local))
        for model, optimizer in pairs:
            backward(model, 0)
            optimizer.step()
            model.double()
            backward(model, 1)
        with pytest.raises(RuntimeError) as mine:
            remote.step()
        with pytest.raises(RuntimeError) as other:
            local.step()
        assert str(mine.value) == str(other.value)
        for _, optimizer in pairs:
            for entry in optimizer.state.values():
                entry["step"].fill_(1)  # torch had already counted the step that failed
                entry["exp_avg"], entry["exp_avg_sq"] = entry["exp_avg"].double(), entry["exp_avg_sq"].double()
            optimizer.step()
        assert_equal_parameters(ours, theirs)
        assert_equal_states(remote, local)


def test_a_state_of_a_wrong_shape_raises_and_changes_nothing(server: Server) -> None:
    """torch's error where torch has one; corrected, training goes on."""
    ours, theirs = net(), net()
    with Adam(ours.parameters(), server=server.address, foreach=False, fused=False) as remote:
        local = torch.optim.Adam(theirs.parameters(), foreach=False, fused=False)
        for model, optimizer in ((ours, remote), (theirs, local)):
            backward(model, 0)
            optimizer.step()
            backward(model, 1)
        kept = remote.state[ours[0].bias]["exp_avg"]
        remote.state[ours[0].bias]["exp_avg"] = torch.zeros(7)
        with pytest.raises(RuntimeError, match="size"):
            remote.step()
        remote.state[ours[0].bias]["exp_avg"] = kept
        remote.step()
        local.step()
        assert_equal_parameters(ours, theirs)


# --- the mapping


def test_opt_state_reads_like_torch_s(server: Server) -> None:
    """Length, membership, iteration, get, items and an empty entry for what has none."""
    ours, theirs = net(), net()
    ours[0].bias.requires_grad_(False)
    theirs[0].bias.requires_grad_(False)
    with Adam(ours.parameters(), server=server.address, **KERNEL) as remote:
        local = torch.optim.Adam(theirs.parameters(), **KERNEL)
        seen = []
        for model, optimizer in ((ours, remote), (theirs, local)):
            state = optimizer.state
            facts: list[Any] = [len(state), bool(state), model[0].weight in state, state.get(model[0].weight)]
            backward(model, 0)
            optimizer.step()
            state = optimizer.state
            facts += [
                len(state),
                model[0].weight in state,
                model[0].bias in state,
                [[p is own for own in model.parameters()].index(True) for p in state],
                sorted(state[model[0].weight]),
                [int(entry["step"]) for entry in state.values()],
                state.get(model[0].bias, "none"),
                dict(state[model[0].bias]),
                len(copy.deepcopy(state)),
            ]
            seen.append(facts)
        assert seen[0] == seen[1]
        (entry, other) = remote.state[ours[0].weight], local.state[theirs[0].weight]
        backward(ours, 1)
        backward(theirs, 1)
        remote.step()
        local.step()
        # An entry that was taken before the step shows what is there now, as torch's does.
        assert entry["step"] == other["step"] == 2
        assert torch.equal(entry["exp_avg"], other["exp_avg"])


def test_keys_that_are_not_adam_s_own_stay_with_the_worker(server: Server) -> None:
    """Of a parameter, and besides the parameters: through steps, state_dict, load and copies."""
    model = net()
    with Adam(model.parameters(), server=server.address) as remote:
        remote.state[model[0].weight]["mine"] = torch.ones(2)
        remote.state["global"] = {"epoch": 3}
        for step in range(2):
            backward(model, step)
            remote.step()
        assert torch.equal(remote.state[model[0].weight]["mine"], torch.ones(2))
        saved = remote.state_dict()
        assert torch.equal(saved["state"][0]["mine"], torch.ones(2))
        assert saved["state"]["global"] == {"epoch": 3}
        with copy.deepcopy(remote) as twin:
            assert twin.state_dict()["state"]["global"] == {"epoch": 3}
        saved["state"][0]["mine"] = torch.zeros(1)
        remote.load_state_dict(saved)
        assert torch.equal(remote.state[model[0].weight]["mine"], torch.zeros(1))


def test_edits_are_seen_by_state_dict_before_they_reach_the_server(server: Server) -> None:
    """As torch's, which has but one state."""
    model = net()
    with Adam(model.parameters(), server=server.address) as remote:
        backward(model, 0)
        remote.step()
        remote.state[model[0].weight]["exp_avg"].fill_(5.0)
        del remote.state[model[0].bias]
        saved = remote.state_dict()["state"]
        assert torch.equal(saved[0]["exp_avg"], torch.full((50, 6), 5.0))
        assert 1 not in saved


def test_a_loaded_state_replaces_edits(server: Server) -> None:
    """The load is what counts, as with torch."""
    model = net()
    with Adam(model.parameters(), server=server.address) as remote:
        backward(model, 0)
        remote.step()
        saved = remote.state_dict()
        remote.state[model[0].weight]["exp_avg"].fill_(5.0)
        remote.load_state_dict(saved)
        assert torch.equal(remote.state[model[0].weight]["exp_avg"], saved["state"][0]["exp_avg"])


def replace_alike(model: nn.Sequential, optimizer: torch.optim.Optimizer) -> None:
    """Another parameter of the same form in the place of one, without its state."""
    old: Any = model[0].weight
    new = nn.Parameter(old.detach() + 1)
    new.grad = old.grad
    del optimizer.state[old]
    optimizer.param_groups[0]["params"][0] = new
    model[0].weight = new


def replace_and_add_a_group(model: nn.Sequential, optimizer: torch.optim.Optimizer) -> None:
    replace_alike(model, optimizer)
    extra = nn.Parameter(torch.ones(3))
    extra.grad = torch.ones(3)
    model.register_parameter("extra", extra)
    optimizer.add_param_group({"params": [extra]})


def replace_and_load(model: nn.Sequential, optimizer: torch.optim.Optimizer) -> None:
    saved = copy.deepcopy(optimizer.state_dict())
    replace_alike(model, optimizer)
    optimizer.load_state_dict(saved)


def assign_state_to_itself(_: nn.Sequential, optimizer: torch.optim.Optimizer) -> None:
    optimizer.state = optimizer.state


@pytest.mark.parametrize("change", [replace_and_add_a_group, replace_and_load, assign_state_to_itself])
def test_a_replaced_parameter_stays_replaced_whatever_comes_before_the_next_step(
    server: Server, change: Change
) -> None:
    """Its values are pushed, and its state is what it was given."""
    changed_midway(server, change)


def test_a_parameter_whose_memory_was_freed_is_left_alone_until_it_is_back(server: Server) -> None:
    """As sharding libraries do with what is not needed for a while; torch does not look at it without a gradient."""
    sizes = (1000, 50_000, 1_000_000)
    ours, theirs = ([nn.Parameter(torch.ones(size)) for size in sizes] for _ in range(2))
    with Adam(ours, lr=0.1, server=server.address, **KERNEL) as remote:
        local = torch.optim.Adam(theirs, lr=0.1, **KERNEL)
        for step in range(4):
            for parameters, optimizer in ((ours, remote), (theirs, local)):
                for p in parameters:
                    if step in {1, 2}:
                        p.grad = None
                        p.untyped_storage().resize_(0)
                    elif step == 3:
                        p.untyped_storage().resize_(p.numel() * 4)
                        p.data.fill_(2.0)
                    if step in {0, 3}:
                        p.grad = torch.ones_like(p)
                optimizer.step()
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
        ours[0].grad = torch.ones(1000)
        ours[0].untyped_storage().resize_(0)
        with pytest.raises(RuntimeError, match="has been freed"):
            remote.step()


def test_watching_keeps_no_memory(server: Server) -> None:
    """What a program lets go, between two steps, is gone."""
    p = nn.Parameter(torch.ones(100_000))
    with Adam([p], server=server.address) as remote:
        p.grad = torch.ones_like(p)
        remote.step()
        memory = StorageWeakRef(p.untyped_storage())
        p.data = torch.ones(100_000)
        gc.collect()
        assert memory.expired()


def test_walking_through_the_state_takes_few_calls(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither one for each entry nor one for each question whether there is one."""
    parameters = [nn.Parameter(torch.ones(2)) for _ in range(300)]
    with Adam(parameters, server=server.address) as remote:
        for p in parameters:
            p.grad = torch.ones(2)
        remote.step()
        session = remote._session
        assert session is not None
        original, calls = session.read, list[Any]()

        def read(*args: Any) -> Any:
            calls.append(args)
            return original(*args)

        monkeypatch.setattr(session, "read", read)
        assert all(p in remote.state for p in parameters)
        assert all(remote.state[p]["step"] == 1 for p in parameters)
        assert len(calls) < 10


# --- several workers


def two(server: Server, work: Callable[[int, nn.Sequential, Any], Any]) -> list[Any]:
    # Here, not in the threads, which share torch's generator.
    models = [net(), net()]

    def run(rank: int) -> Any:
        model = models[rank]
        options = ProxyOptions(rank=rank, world_size=2)
        with Adam(model.parameters(), lr=1e-2, server=server.address, job="two", options=options, **KERNEL) as remote:
            return work(rank, model, remote)

    return in_threads(run, 2)


@pytest.mark.parametrize("who", [(0, 1), (0,), (1,)])
def test_values_that_workers_write_are_everybody_s(server: Server, who: tuple[int, ...]) -> None:
    """All of them having loaded the same, or one alone: nobody is left with other parameters."""

    def work(rank: int, model: nn.Sequential, remote: Any) -> list[torch.Tensor]:
        for step in range(3):
            backward(model, step)
            if step == 1 and rank in who:
                load(model, remote)
            if step == 1:
                # Only some parameters have a gradient: the others have to arrive all the same.
                model[4].weight.grad = None
            remote.step()
            assert remote.last_receipt.pushed_differently == ()
        return [p.detach().clone() for p in model.parameters()]

    first, second = two(server, work)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert torch.allclose(first[4], LOADED["4.weight"], atol=0.1)


def test_differing_values_of_two_workers_are_named_and_the_lowest_rank_s_hold(server: Server) -> None:
    """In the receipts of both."""

    def work(rank: int, model: nn.Sequential, remote: Any) -> list[torch.Tensor]:
        for p in model.parameters():
            p.grad = None
        with torch.no_grad():
            model[0].weight.fill_(rank + 1.0)
        remote.step()
        assert remote.last_receipt.pushed_differently == (0,)
        return [p.detach().clone() for p in model.parameters()]

    first, second = two(server, work)
    assert torch.equal(first[0], torch.ones(50, 6))
    assert torch.equal(second[0], torch.ones(50, 6))


def test_workers_replace_their_parameters_between_the_same_two_steps(server: Server) -> None:
    """The first brings them, the other receives; a third way is refused by name."""

    def work(rank: int, model: nn.Sequential, remote: Any) -> list[torch.Tensor]:
        for step in range(4):
            backward(model, step)
            if step == 2:
                grow_layer(model, remote)
            remote.step()
        return [p.detach().clone() for p in model.parameters()]

    first, second = two(server, work)
    assert first[4].shape == (5, 300)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    ours = net()
    local = torch.optim.Adam(ours.parameters(), lr=1e-2, **KERNEL)
    for step in range(4):
        backward(ours, step)
        if step == 2:
            grow_layer(ours, local)
        local.step()
    assert all(torch.equal(a, b) for a, b in zip(first, ours.parameters(), strict=True))


def test_a_worker_that_does_not_replace_its_parameters_is_told(server: Server) -> None:
    """Whoever comes second to the next step is refused; the other goes on alone."""

    def work(rank: int, model: nn.Sequential, remote: Any) -> str:
        backward(model, 0)
        remote.step()
        backward(model, 1)
        if rank == 0:
            grow_layer(model, remote)
        try:
            remote.step()
        except JobMismatchError as error:
            return str(error)
        assert remote.last_receipt.contributors == (rank,)
        return ""

    (went_on, refused) = sorted(two(server, work))
    assert not went_on
    assert "between the same two steps" in refused


# --- accumulated gradients


@pytest.mark.parametrize("apply", ["streaming", "atomic"])
def test_accumulated_micro_batches_equal_one_local_accumulation(server: Server, apply: Any) -> None:
    """Bit for bit, whether the last one is accumulated too or stays for the step."""
    ours, theirs = net(), net()
    options = ProxyOptions(apply=apply, bucket_bytes=4096)
    with Adam(ours.parameters(), server=server.address, options=options, **KERNEL) as remote:
        local = torch.optim.Adam(theirs.parameters(), **KERNEL)
        for step in range(4):
            for micro in range(3):
                # One micro-batch does not use the last layer's bias.
                unused = ours[4].bias if micro == 1 else None
                ours_sum, theirs_sum = (
                    model(torch.randn(4, 6, generator=torch.Generator().manual_seed(10 * step + micro))).square().sum()
                    for model in (ours, theirs)
                )
                theirs_sum.backward(
                    inputs=[p for name, p in theirs.named_parameters() if unused is None or name != "4.bias"]
                )
                ours_sum.backward(inputs=[p for p in ours.parameters() if p is not unused])
                if micro < 2 or step % 2:
                    remote.accumulate()
                    assert all(p.grad is None for p in ours.parameters())
            remote.step()
            local.step()
            remote.zero_grad()
            local.zero_grad()
        assert_equal_parameters(ours, theirs)
        assert_equal_states(remote, local)
        assert remote.job_step == 4


def test_zero_grad_discards_what_was_accumulated(server: Server) -> None:
    """And only then reaches the server."""
    ours, theirs = net(), net()
    with Adam(ours.parameters(), server=server.address, **KERNEL) as remote:
        local = torch.optim.Adam(theirs.parameters(), **KERNEL)
        for step in range(3):
            backward(ours, 100 + step)
            remote.accumulate()
            backward(ours, 200 + step)
            remote.zero_grad()
            assert all(p.grad is None for p in ours.parameters())
            for model, optimizer in ((ours, remote), (theirs, local)):
                backward(model, step)
                optimizer.step()
        assert_equal_parameters(ours, theirs)


def test_what_was_accumulated_survives_a_step_that_torch_refuses(server: Server) -> None:
    """The options are corrected, and the sum is still there."""
    ours, theirs = net(), net()
    with Adam(ours.parameters(), server=server.address, **KERNEL) as remote:
        local = torch.optim.Adam(theirs.parameters(), **KERNEL)
        backward(ours, 0)
        backward(theirs, 0)
        remote.accumulate()
        remote.param_groups[0]["lr"] = "fast"
        with pytest.raises((TypeError, RuntimeError)):
            remote.step()
        remote.param_groups[0]["lr"] = 1e-3
        remote.step()
        local.step()
        assert_equal_parameters(ours, theirs)


def test_workers_accumulate_each_for_themselves(server: Server) -> None:
    """The step's gradient is the mean of the workers' sums."""

    def work(rank: int, model: nn.Sequential, remote: Any) -> list[torch.Tensor]:
        for step in range(2):
            for micro in range(2):
                backward(model, 100 * rank + 10 * step + micro)
                remote.accumulate()
            remote.step()
        return [p.detach().clone() for p in model.parameters()]

    first, second = two(server, work)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    model = net()
    local = torch.optim.Adam(model.parameters(), lr=1e-2, **KERNEL)
    for step in range(2):
        sums = []
        for rank in range(2):
            grads = []
            for micro in range(2):
                backward(model, 100 * rank + 10 * step + micro)
                grads.append([p.grad.clone() for p in model.parameters()])
            sums.append([a + b for a, b in zip(*grads, strict=True)])
        for p, a, b in zip(model.parameters(), *sums, strict=True):
            p.grad = (a + b) / 2
        local.step()
    assert all(torch.equal(a, b) for a, b in zip(first, model.parameters(), strict=True))


def test_gradients_accumulated_for_other_parameters_are_lost_and_it_is_said(server: Server) -> None:
    """Replacing parameters would mix gradients of both."""
    model = net()
    with Adam(model.parameters(), server=server.address) as remote:
        backward(model, 0)
        remote.step()
        backward(model, 1)
        remote.accumulate()
        backward(model, 1)
        grow_layer(model, remote)
        with pytest.raises(AccumulationLostError, match="zero_grad"):
            remote.step()
        remote.zero_grad()
        assert model[4].weight.grad is None
        backward(model, 2)
        remote.step()
        assert remote.job_step == 2
