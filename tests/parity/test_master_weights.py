"""Workers with narrow parameters and a server that keeps them wide, against torch's Adam on wide copies."""

from __future__ import annotations

import copy
import io
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn

from optimd.client import Adam, AdamW, ConfigurationError, JobMismatchError, LimitExceededError, ProxyOptions
from optimd.server import Server
from tests.support import assert_equal_states, in_threads, running_server

SHAPES = ((70, 33), (5,), (), (0, 3), (41, 20))


def parameters(dtype: torch.dtype, shapes: Sequence[tuple[int, ...]] = SHAPES) -> list[nn.Parameter]:
    """The same at each call; the last is transposed."""
    generator = torch.Generator().manual_seed(7)
    made = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    return [nn.Parameter(tensor) for tensor in (*made[:-1], made[-1].t())]


def masters(params: Sequence[nn.Parameter], dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    return [nn.Parameter(p.detach().to(dtype)) for p in params]


def gradients(params: Sequence[nn.Parameter], step: int, rank: int = 0) -> list[torch.Tensor | None]:
    """Every third step without one for the first parameter."""
    generator = torch.Generator().manual_seed(1000 * rank + step)
    made = [torch.empty_like(p).copy_(torch.randn(p.shape, generator=generator)) for p in params]
    return [None if index == 0 and step % 3 == 2 else grad for index, grad in enumerate(made)]


def give(params: Sequence[nn.Parameter], grads: Sequence[torch.Tensor | None]) -> None:
    for p, grad in zip(params, grads, strict=True):
        p.grad = None if grad is None else grad.to(p.dtype)


def train(
    ours: Sequence[nn.Parameter],
    remote: torch.optim.Optimizer,
    theirs: Sequence[nn.Parameter],
    local: torch.optim.Optimizer,
    steps: range,
) -> None:
    for step in steps:
        grads = gradients(ours, step)
        give(ours, grads)
        give(theirs, grads)
        remote.step()
        local.step()


def assert_rounded(ours: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor]) -> None:
    """The worker has the masters in its own dtype, bit for bit."""
    for mine, master in zip(ours, theirs, strict=True):
        assert torch.equal(mine, master.detach().to(mine.dtype))


def options(**more: Any) -> ProxyOptions:
    return ProxyOptions(**{"master_dtype": torch.float32, "bucket_bytes": 1024, **more})


@pytest.mark.parametrize("apply", ["streaming", "atomic"])
@pytest.mark.parametrize("bucket_bytes", [1024, 5000, None])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_steps_equal_torchs_fused_adam_on_fp32_masters(
    server: Server, dtype: torch.dtype, bucket_bytes: int | None, apply: Any
) -> None:
    """Parameters and state, whatever the size of the buckets."""
    ours = parameters(dtype)
    theirs = masters(ours)
    asked = options(apply=apply, bucket_bytes=bucket_bytes)
    with Adam(ours, lr=1e-2, fused=True, server=server.address, options=asked) as remote:
        local = torch.optim.Adam(theirs, lr=1e-2, fused=True)
        train(ours, remote, theirs, local, range(40))
        assert_rounded(ours, theirs)
        assert_equal_states(remote, local)
        assert any(not torch.equal(master, mine.float()) for mine, master in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("apply", ["streaming", "atomic"])
@pytest.mark.parametrize(
    "kernel",
    [
        {"fused": True, "amsgrad": True, "weight_decay": 0.1},
        {"foreach": True, "maximize": True},
        {"foreach": False, "fused": False, "weight_decay": 0.1},
        {"fused": False},
    ],
    ids=["fused-amsgrad", "foreach", "loop", "torchs-default"],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_each_kernel_runs_on_the_masters(
    server: Server, dtype: torch.dtype, kernel: dict[str, Any], apply: Any
) -> None:
    """In float32, where all of them can be split between buckets."""
    ours = parameters(dtype)
    theirs = masters(ours)
    with Adam(ours, lr=1e-2, server=server.address, options=options(apply=apply), **kernel) as remote:
        local = torch.optim.Adam(theirs, lr=1e-2, **kernel)
        train(ours, remote, theirs, local, range(15))
        assert_rounded(ours, theirs)
        assert_equal_states(remote, local)


def test_float32_workers_may_have_float64_masters(server: Server) -> None:
    """Any wider real floating type is one."""
    ours = parameters(torch.float32)
    theirs = masters(ours, torch.float64)
    with AdamW(ours, fused=True, server=server.address, options=options(master_dtype=torch.float64)) as remote:
        local = torch.optim.AdamW(theirs, fused=True)
        train(ours, remote, theirs, local, range(15))
        assert_rounded(ours, theirs)
        assert_equal_states(remote, local)


@pytest.mark.parametrize("apply", ["streaming", "atomic"])
@pytest.mark.parametrize("bucket_bytes", [1024, None])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_two_workers_gradients_are_averaged_in_fp32(
    server: Server, dtype: torch.dtype, bucket_bytes: int | None, apply: Any
) -> None:
    """Their sum is not rounded to the workers' dtype."""
    steps = 12

    def work(rank: int) -> list[torch.Tensor]:
        ours = parameters(dtype)
        asked = options(rank=rank, world_size=2, apply=apply, bucket_bytes=bucket_bytes)
        with Adam(ours, lr=1e-2, server=server.address, job="two", options=asked) as optimizer:
            for step in range(steps):
                give(ours, gradients(ours, step, rank))
                optimizer.step()
        return [p.detach() for p in ours]

    results = in_threads(work, 2)
    theirs = masters(parameters(dtype))
    local = torch.optim.Adam(theirs, lr=1e-2, fused=True)
    sums_lose_bits = False
    for step in range(steps):
        each = [gradients(parameters(dtype), step, rank) for rank in (0, 1)]
        for master, one, other in zip(theirs, *each, strict=True):
            master.grad = None if one is None or other is None else (one.float() + other.float()) / 2
            if one is not None and other is not None:
                sums_lose_bits |= not torch.equal((one + other).float(), one.float() + other.float())
        local.step()
    assert sums_lose_bits
    for result in results:
        assert_rounded(result, theirs)


def test_parameters_that_are_not_narrower_are_left_as_they_are(server: Server) -> None:
    """Side by side with one that is: each has its own dtype's bits."""
    made = [torch.randn(90, 3), torch.randn(90, 3, dtype=torch.float64), torch.randn(90, dtype=torch.complex64)]
    ours = [nn.Parameter(tensor.clone()) for tensor in (*made, torch.randn(90).bfloat16())]
    theirs = [*(nn.Parameter(tensor.clone()) for tensor in made), nn.Parameter(ours[-1].detach().float())]
    with Adam(ours, foreach=False, server=server.address, options=options()) as remote:
        local = torch.optim.Adam(theirs, foreach=False)
        train(ours, remote, theirs, local, range(10))
        assert_rounded(ours, theirs)
        assert_equal_states(remote, local)


def test_what_the_worker_reads_of_the_state_is_wide(server: Server) -> None:
    """`opt.state[p]` and state_dict alike."""
    (p,) = ours = parameters(torch.bfloat16, [(30, 30)])
    theirs = masters(ours)
    with Adam(ours, fused=True, server=server.address, options=options()) as remote:
        local = torch.optim.Adam(theirs, fused=True)
        train(ours, remote, theirs, local, range(2))
        for name in ("exp_avg", "exp_avg_sq"):
            read = remote.state[p][name]
            assert read.dtype is torch.float32
            assert torch.equal(read, local.state[theirs[0]][name])
            assert not torch.equal(read, read.bfloat16().float())


def saved(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """A state_dict that has been in a file."""
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_a_state_dict_keeps_its_low_bits_on_its_way_into_a_new_job(server: Server) -> None:
    """torch would round it to the parameters' dtype. A job made anew starts from the worker's own, rounded values."""
    ours = parameters(torch.bfloat16)
    with Adam(ours, lr=1e-2, fused=True, server=server.address, options=options()) as first:
        for step in range(5):
            give(ours, gradients(ours, step))
            first.step()
        file = saved(first)
    again = [nn.Parameter(p.detach().clone()) for p in ours]
    theirs = masters(again)
    with Adam(again, lr=1e-2, fused=True, server=server.address, options=options()) as second:
        second.load_state_dict(file)
        local = torch.optim.Adam(theirs, lr=1e-2, fused=True)
        local.load_state_dict(file)
        assert_equal_states(second, local)
        train(again, second, theirs, local, range(5, 15))
        assert_rounded(again, theirs)
        assert_equal_states(second, local)


def test_a_state_dict_moves_to_torch_and_back_without_a_change(server: Server) -> None:
    """Training goes on with torch's own class on the masters, then remotely again."""
    ours = parameters(torch.bfloat16)
    theirs = masters(ours)
    with Adam(ours, lr=1e-2, fused=True, server=server.address, options=options()) as remote:
        reference = torch.optim.Adam(masters(ours), lr=1e-2, fused=True)
        train(ours, remote, reference.param_groups[0]["params"], reference, range(3))
        local = torch.optim.Adam(theirs, lr=1e-2, fused=True)
        local.load_state_dict(remote.state_dict())
        assert_equal_states(local, reference)
        narrow = torch.optim.Adam(parameters(torch.bfloat16), lr=1e-2, fused=True)
        narrow.load_state_dict(remote.state_dict())
        assert narrow.state_dict()["state"][0]["exp_avg"].dtype is torch.bfloat16
        give(theirs, gradients(ours, 3))
        local.step()
        remote.load_state_dict(local.state_dict())
        assert_equal_states(remote, local)


def test_a_narrow_state_dict_is_loaded_into_wide_state(server: Server) -> None:
    """As one from before there were masters."""
    ours = parameters(torch.bfloat16)
    narrow = torch.optim.Adam(parameters(torch.bfloat16), fused=True)
    give(narrow.param_groups[0]["params"], gradients(ours, 0))
    narrow.step()
    with Adam(ours, fused=True, server=server.address, options=options()) as remote:
        remote.load_state_dict(narrow.state_dict())
        for index, entry in remote.state_dict()["state"].items():
            for name in ("exp_avg", "exp_avg_sq"):
                assert entry[name].dtype is torch.float32
                assert torch.equal(entry[name], narrow.state_dict()["state"][index][name].float())


def test_hooks_of_a_load_see_and_change_wide_state(server: Server) -> None:
    """What a pre-hook puts in the place of the state_dict is loaded, and a post-hook finds it unrounded."""
    (p,) = ours = parameters(torch.bfloat16, [(20, 20)])
    with Adam(ours, fused=True, server=server.address, options=options()) as remote:
        give(ours, gradients(ours, 0))
        remote.step()
        other = remote.state_dict()
        other["state"][0]["exp_avg"] = torch.full((20, 20), 1 / 3)
        remote.register_load_state_dict_pre_hook(lambda _, __: other)

        def add(optimizer: torch.optim.Optimizer) -> None:
            assert torch.equal(optimizer.state[p]["exp_avg"], torch.full((20, 20), 1 / 3))
            optimizer.state[p]["exp_avg_sq"].fill_(1 / 7)

        remote.register_load_state_dict_post_hook(add)
        remote.load_state_dict(remote.state_dict())
        assert torch.equal(remote.state[p]["exp_avg"], torch.full((20, 20), 1 / 3))
        assert torch.equal(remote.state[p]["exp_avg_sq"], torch.full((20, 20), 1 / 7))
        assert len(remote._optimizer_load_state_dict_pre_hooks) == 1


def test_a_copy_of_an_optimizer_has_the_wide_state(server: Server) -> None:
    """As a job of its own."""
    ours = parameters(torch.bfloat16)
    with Adam(ours, fused=True, server=server.address, options=options()) as remote:
        give(ours, gradients(ours, 0))
        remote.step()
        with copy.deepcopy(remote) as twin:
            assert_equal_states(twin, remote)
            assert twin.state_dict()["state"][0]["exp_avg"].dtype is torch.float32


def test_a_worker_that_comes_back_goes_on_from_the_masters(server: Server) -> None:
    """What its own rounded values have lost is still on the server."""
    ours = parameters(torch.bfloat16)
    theirs = masters(ours)
    local = torch.optim.Adam(theirs, lr=1e-4, fused=True)
    asked = options(worker_id="w")
    for steps in (range(6), range(6, 12)):
        ours = parameters(torch.bfloat16)
        with Adam(ours, lr=1e-4, fused=True, server=server.address, job="back", options=asked) as remote:
            train(ours, remote, theirs, local, steps)
            assert_rounded(ours, theirs)


def test_values_that_a_worker_writes_reach_the_masters_and_leave_the_others_their_low_bits(server: Server) -> None:
    """Only what was written is rounded to the worker's dtype."""
    (p,) = ours = parameters(torch.bfloat16, [(40, 40)])
    theirs = masters(ours)
    with Adam(ours, lr=1e-3, fused=True, server=server.address, options=options()) as remote:
        local = torch.optim.Adam(theirs, lr=1e-3, fused=True)
        train(ours, remote, theirs, local, range(3))
        with torch.no_grad():
            p[:3] = 0.5
            theirs[0][:3] = 0.5
        train(ours, remote, theirs, local, range(3, 12))
        assert_rounded(ours, theirs)
        assert_equal_states(remote, local)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_state_that_is_put_in_by_hand_reaches_the_server(server: Server, dtype: torch.dtype) -> None:
    """In the master dtype, or in the parameter's."""
    (p,) = ours = parameters(torch.bfloat16, [(40, 40)])
    theirs = masters(ours)
    with Adam(ours, lr=1e-3, fused=True, server=server.address, options=options()) as remote:
        local = torch.optim.Adam(theirs, lr=1e-3, fused=True)
        train(ours, remote, theirs, local, range(3))
        moment = torch.full_like(p, 1 / 3, dtype=dtype)
        remote.state[p]["exp_avg"] = moment.clone()
        local.state[theirs[0]]["exp_avg"] = moment.float()
        train(ours, remote, theirs, local, range(3, 6))
        assert_rounded(ours, theirs)
        assert_equal_states(remote, local)


def test_accumulated_gradients_are_added_up_in_the_masters_dtype(server: Server) -> None:
    """Where the sum of two narrow ones would be rounded."""
    (p,) = ours = parameters(torch.bfloat16, [(40, 40)])
    (master,) = theirs = masters(ours)
    with Adam(ours, lr=1e-3, fused=True, server=server.address, options=options()) as remote:
        local = torch.optim.Adam(theirs, lr=1e-3, fused=True)
        for step in range(5):
            one, other = gradients(ours, 3 * step)[0], gradients(ours, 3 * step + 1)[0]
            p.grad = one
            remote.accumulate()
            p.grad = other
            remote.step()
            master.grad = one.float() + other.float()
            local.step()
        assert_rounded(ours, theirs)
        assert_equal_states(remote, local)


def test_a_model_that_is_widened_keeps_its_state(server: Server) -> None:
    """What the server keeps is as wide as before; its values are the worker's."""
    (p,) = ours = parameters(torch.bfloat16, [(40, 40)])
    theirs = masters(ours)
    with Adam(ours, lr=1e-3, fused=True, server=server.address, options=options()) as remote:
        local = torch.optim.Adam(theirs, lr=1e-3, fused=True)
        train(ours, remote, theirs, local, range(3))
        p.grad = None
        p.data = p.data.float()
        with torch.no_grad():
            theirs[0].copy_(p)
        train(ours, remote, theirs, local, range(3, 6))
        assert torch.equal(p, theirs[0])
        assert_equal_states(remote, local)


def test_a_worker_that_asks_for_another_master_is_refused(server: Server) -> None:
    """The first parameter that differs is named, with both dtypes."""
    named = [("first", parameters(torch.float32, [(3, 3)])[0]), ("w", parameters(torch.bfloat16, [(3, 3)])[0])]
    asked = {"world_size": 2, "master_dtype": torch.float32}
    difference = r"parameter 1 \(w\): the job keeps .* in torch.float32, .* for torch.bfloat16"
    with (
        Adam(named, server=server.address, job="j", options=ProxyOptions(rank=0, **asked)),
        pytest.raises(JobMismatchError, match=difference),
    ):
        Adam(named, server=server.address, job="j", options=ProxyOptions(rank=1, world_size=2))


def test_an_added_group_has_masters_too(server: Server) -> None:
    """The option holds for all of the optimizer's life."""
    ours = parameters(torch.bfloat16)
    theirs = masters(ours)
    with Adam(ours[:1], fused=True, server=server.address, options=options()) as remote:
        local = torch.optim.Adam(theirs[:1], fused=True)
        remote.add_param_group({"params": ours[1:], "lr": 0.1})
        local.add_param_group({"params": theirs[1:], "lr": 0.1})
        train(ours, remote, theirs, local, range(5))
        assert_rounded(ours, theirs)
        assert_equal_states(remote, local)


def test_the_limit_on_a_jobs_bytes_counts_the_wide_tensors() -> None:
    """100,000 bf16 elements take 3 x 200 kB with Adam's state, and 3 x 400 kB with masters."""
    with running_server(max_job_bytes=900_000) as server:
        p = nn.Parameter(torch.zeros(100_000, dtype=torch.bfloat16))
        Adam([p], server=server.address).close()
        with pytest.raises(LimitExceededError, match="max-job-bytes"):
            Adam([p], server=server.address, options=options())


@pytest.mark.parametrize(
    "dtype",
    [torch.complex64, torch.int32, torch.float8_e4m3fn, "float32"],
    ids=["complex", "integer", "float8", "text"],
)
def test_a_master_has_to_be_a_real_floating_type_that_the_wire_carries(dtype: Any) -> None:
    """Said by the options, before anything is opened."""
    with pytest.raises(ConfigurationError, match="master_dtype"):
        ProxyOptions(master_dtype=dtype)
