"""Steps whose gradients and parameters travel narrowed, against torch's fused Adam on gradients rounded by hand."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, Literal

import pytest
import torch
from torch import nn

from optimd.client import Adam, Async, ProxyOptions, Sync, WireDtypes
from optimd.server import Server
from tests.support import assert_equal_states, in_threads

SHAPES = ((70, 33), (5,), (), (0, 3), (20_000,))
"""The last one is large enough for shared memory."""

NARROW = (torch.bfloat16, torch.float16)

Transport = Literal["grpc", "shm"]


@pytest.fixture(params=["grpc", "shm"])
def transport(request: pytest.FixtureRequest) -> Transport:
    asked: Transport = request.param
    return asked


def parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    """The same at each call; two are not row-major as they stand."""
    generator = torch.Generator().manual_seed(7)
    made = [torch.randn(shape, dtype=dtype, generator=generator) for shape in SHAPES]
    turned = torch.randn(41, 20, dtype=dtype, generator=generator).t()
    image = torch.randn(3, 4, 5, 6, dtype=dtype, generator=generator).contiguous(memory_format=torch.channels_last)
    return [nn.Parameter(tensor) for tensor in (*made, turned, image)]


def gradients(
    params: Sequence[torch.Tensor], step: int, rank: int = 0, scale: float = 1.0
) -> list[torch.Tensor | None]:
    """Every third step without one for the first parameter."""
    generator = torch.Generator().manual_seed(1000 * rank + step)
    made = [torch.empty_like(p).copy_(scale * torch.randn(p.shape, dtype=p.dtype, generator=generator)) for p in params]
    return [None if index == 0 and step % 3 == 2 else grad for index, grad in enumerate(made)]


def narrowed(tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    """What comes back of a tensor that travels narrowed: complex ones are not."""
    wide = tensor.dtype
    return tensor if dtype is None or not wide.is_floating_point else tensor.to(dtype).to(wide)


def give(
    params: Sequence[torch.Tensor], grads: Sequence[torch.Tensor | None], dtype: torch.dtype | None = None
) -> None:
    for p, grad in zip(params, grads, strict=True):
        p.grad = None if grad is None else narrowed(grad, dtype).clone()


def clones(params: Sequence[nn.Parameter]) -> list[nn.Parameter]:
    return [nn.Parameter(p.detach().clone()) for p in params]


def assert_rounded(ours: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor], dtype: torch.dtype | None) -> None:
    for index, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
        assert torch.equal(mine, narrowed(other.detach(), dtype)), index


def assert_server_has(remote: Adam, ours: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor]) -> None:
    """Values and state, with all of their bits."""
    remote.pull_parameters()
    for index, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
        assert torch.equal(mine, other), index


@pytest.mark.parametrize("apply", ["streaming", "atomic"])
@pytest.mark.parametrize("bucket_bytes", [1024, 5000, None])
@pytest.mark.parametrize("narrow", NARROW, ids=str)
def test_steps_equal_torchs_on_rounded_gradients(
    server: Server, transport: Transport, narrow: torch.dtype, bucket_bytes: int | None, apply: Any
) -> None:
    """The worker has the server's values rounded; the server has all of their bits, and those of the state."""
    ours = parameters()
    theirs = clones(ours)
    asked = ProxyOptions(wire_dtype=narrow, transport=transport, apply=apply, bucket_bytes=bucket_bytes)
    with Adam(ours, lr=1e-2, server=server.address, options=asked) as remote:
        local = torch.optim.Adam(theirs, lr=1e-2, fused=True)
        # What was opened with is not rounded, until a step changes it.
        assert_rounded(ours, theirs, None)
        for step in range(12):
            grads = gradients(ours, step)
            give(ours, grads)
            give(theirs, grads, narrow)
            remote.step()
            local.step()
            assert all(
                p.grad is grad or torch.equal(p.grad, grad)
                for p, grad in zip(ours, grads, strict=True)
                if grad is not None
            )
            assert_rounded(ours, theirs, narrow)
        assert_equal_states(remote, local)
        assert_server_has(remote, ours, theirs)


@pytest.mark.parametrize(
    ("wire", "up", "down"),
    [
        (WireDtypes(gradients=torch.bfloat16), torch.bfloat16, None),
        (WireDtypes(parameters=torch.float16), None, torch.float16),
        (WireDtypes(gradients=torch.float16, parameters=torch.bfloat16), torch.float16, torch.bfloat16),
        (WireDtypes(), None, None),
    ],
    ids=["gradients", "parameters", "both", "neither"],
)
def test_each_way_can_be_narrowed_by_itself(
    server: Server, transport: Transport, wire: WireDtypes, up: torch.dtype | None, down: torch.dtype | None
) -> None:
    ours = parameters()
    theirs = clones(ours)
    asked = ProxyOptions(wire_dtype=wire, transport=transport, bucket_bytes=4096)
    with Adam(ours, lr=1e-2, server=server.address, options=asked) as remote:
        local = torch.optim.Adam(theirs, lr=1e-2, fused=True)
        for step in range(6):
            grads = gradients(ours, step)
            give(ours, grads)
            give(theirs, grads, up)
            remote.step()
            local.step()
            assert_rounded(ours, theirs, down)
        assert_equal_states(remote, local)


@pytest.mark.parametrize("narrow", [*NARROW, None], ids=str)
def test_half_the_bytes_travel(server: Server, transport: Transport, narrow: torch.dtype | None) -> None:
    """In both directions, headers aside."""
    count = 250_000
    p = nn.Parameter(torch.zeros(count))
    asked = ProxyOptions(wire_dtype=narrow, transport=transport)
    with Adam([p], server=server.address, options=asked) as remote:
        p.grad = torch.ones(count)
        remote.step()
        receipt = remote.last_receipt
        assert receipt is not None
        width = 4 if narrow is None else 2
        if transport == "grpc":
            assert width * count < receipt.bytes_sent < width * count + 500
            assert width * count < receipt.bytes_received < width * count + 500


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64, torch.complex128, *NARROW], ids=str)
def test_only_wider_real_parameters_are_narrowed(server: Server, transport: Transport, dtype: torch.dtype) -> None:
    """Complex ones and those that are narrow already travel as they are."""
    kernel: dict[str, Any] = {"foreach": False, "fused": False} if dtype.is_complex else {"fused": True}
    ours = parameters(dtype)
    theirs = clones(ours)
    down = torch.bfloat16 if dtype is torch.float64 else None
    asked = ProxyOptions(wire_dtype=torch.bfloat16, transport=transport, bucket_bytes=4096)
    with Adam(ours, lr=1e-2, server=server.address, options=asked, **kernel) as remote:
        local = torch.optim.Adam(theirs, lr=1e-2, **kernel)
        for step in range(6):
            grads = gradients(ours, step)
            give(ours, grads)
            give(theirs, grads, down)
            remote.step()
            local.step()
            assert_rounded(ours, theirs, down)
        assert_equal_states(remote, local)


def test_parameters_of_several_dtypes_share_a_job(server: Server, transport: Transport) -> None:
    ours = [nn.Parameter(torch.randn(300, dtype=dtype)) for dtype in (torch.float32, torch.bfloat16, torch.float64)]
    theirs = clones(ours)
    asked = ProxyOptions(wire_dtype=torch.float16, transport=transport)
    with Adam(ours, lr=1e-2, server=server.address, options=asked) as remote:
        local = torch.optim.Adam(theirs, lr=1e-2, fused=True)
        for step in range(6):
            grads = gradients(ours, step)
            give(ours, grads)
            for p, grad in zip(theirs, grads, strict=True):
                wider = p.dtype is not torch.bfloat16
                p.grad = None if grad is None else narrowed(grad, torch.float16) if wider else grad.clone()
            remote.step()
            local.step()
        assert torch.equal(ours[0], narrowed(theirs[0].detach(), torch.float16))
        assert torch.equal(ours[1], theirs[1])
        assert torch.equal(ours[2], narrowed(theirs[2].detach(), torch.float16))
        assert_equal_states(remote, local)


@pytest.mark.parametrize("apply", ["streaming", "atomic"])
@pytest.mark.parametrize(
    ("own", "master", "narrows"),
    [(torch.float32, torch.float64, True), (torch.bfloat16, torch.float32, False)],
    ids=["fp32-in-fp64", "bf16-in-fp32"],
)
def test_a_server_with_master_weights_widens_to_them(
    server: Server, transport: Transport, own: torch.dtype, master: torch.dtype, narrows: bool, apply: Any
) -> None:
    """Parameters that are narrow already gain nothing, and lose nothing."""
    ours = parameters(own)
    theirs = [nn.Parameter(p.detach().to(master)) for p in ours]
    asked = ProxyOptions(
        wire_dtype=torch.bfloat16, master_dtype=master, transport=transport, apply=apply, bucket_bytes=4096
    )
    with Adam(ours, lr=1e-2, server=server.address, options=asked) as remote:
        local = torch.optim.Adam(theirs, lr=1e-2, fused=True)
        for step in range(6):
            grads = gradients(ours, step)
            give(ours, grads)
            for p, grad in zip(theirs, grads, strict=True):
                p.grad = None if grad is None else narrowed(grad, torch.bfloat16 if narrows else None).to(master)
            remote.step()
            local.step()
            for mine, other in zip(ours, theirs, strict=True):
                expected = other.detach().to(own)
                assert torch.equal(mine, narrowed(expected, torch.bfloat16) if narrows else expected)
        assert_equal_states(remote, local)


@pytest.mark.parametrize("apply", ["streaming", "atomic"])
@pytest.mark.parametrize(
    "wires", [(torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float16), (None, torch.bfloat16)]
)
@pytest.mark.parametrize("deterministic", [True, False])
def test_synchronous_workers_may_narrow_each_in_its_own_way(
    server: Server, transport: Transport, wires: tuple[Any, Any], apply: Any, deterministic: bool
) -> None:
    """What is reduced is wide: a sum of two, so that it does not depend on who comes first."""
    start = parameters()
    theirs = clones(start)

    def work(rank: int) -> list[nn.Parameter]:
        ours = clones(start)
        asked = ProxyOptions(
            rank=rank,
            world_size=2,
            apply=apply,
            aggregation=Sync(deterministic=deterministic),
            wire_dtype=wires[rank],
            transport=transport,
            bucket_bytes=4096,
        )
        with Adam(ours, lr=1e-2, server=server.address, job="two", options=asked) as remote:
            for step in range(6):
                give(ours, gradients(ours, step, rank))
                remote.step()
        return ours

    results = in_threads(work, 2)
    local = torch.optim.Adam(theirs, lr=1e-2, fused=True)
    for step in range(6):
        pairs = zip(gradients(theirs, step, 0), gradients(theirs, step, 1), strict=True)
        for p, (one, other) in zip(theirs, pairs, strict=True):
            assert (one is None) == (other is None)
            p.grad = None if one is None or other is None else (narrowed(one, wires[0]) + narrowed(other, wires[1])) / 2
        local.step()
    for wire, result in zip(wires, results, strict=True):
        assert_rounded(result, theirs, wire)


def test_asynchronous_workers_may_narrow_each_in_its_own_way(server: Server, transport: Transport) -> None:
    """They take turns, so that torch can do the same: each is given all that the other has changed, rounded."""
    theirs = parameters()
    wires = (torch.bfloat16, torch.float16)
    workers = [clones(theirs) for _ in wires]
    local = torch.optim.Adam(theirs, lr=1e-2, fused=True)
    opened = [
        Adam(
            ours,
            lr=1e-2,
            server=server.address,
            job="turns",
            options=ProxyOptions(
                aggregation=Async(), rank=rank, wire_dtype=wire, transport=transport, bucket_bytes=4096
            ),
        )
        for rank, (ours, wire) in enumerate(zip(workers, wires, strict=True))
    ]
    for step, rank in itertools.product(range(4), range(2)):
        grads = gradients(theirs, step, rank)
        give(workers[rank], grads)
        give(theirs, grads, wires[rank])
        opened[rank].step()
        local.step()
        changed = [index for index, grad in enumerate(grads) if grad is not None]
        for index in changed:
            assert torch.equal(workers[rank][index], narrowed(theirs[index].detach(), wires[rank])), index
    assert_equal_states(opened[0], local)
    for optimizer in opened:
        optimizer.close()


@pytest.mark.parametrize("apply", ["streaming", "atomic"])
def test_what_is_accumulated_is_narrowed_once_and_added_up_wide(
    server: Server, transport: Transport, apply: Any
) -> None:
    ours = parameters()
    theirs = clones(ours)
    asked = ProxyOptions(wire_dtype=torch.bfloat16, transport=transport, apply=apply, bucket_bytes=4096)
    with Adam(ours, lr=1e-2, server=server.address, options=asked) as remote:
        local = torch.optim.Adam(theirs, lr=1e-2, fused=True)
        for step in range(4):
            parts = [gradients(ours, 3 * step, rank) for rank in range(3)]
            for part in parts[:-1]:
                give(ours, part)
                remote.accumulate()
            give(ours, parts[-1])
            for index, p in enumerate(theirs):
                pieces = [narrowed(piece, torch.bfloat16) for part in parts if (piece := part[index]) is not None]
                p.grad = (pieces[0] + pieces[1]) + pieces[2]
            remote.step()
            local.step()
            assert_rounded(ours, theirs, torch.bfloat16)
        assert_equal_states(remote, local)


def test_the_norm_that_is_clipped_is_that_of_the_widened_gradient(server: Server, transport: Transport) -> None:
    ours = parameters()
    theirs = clones(ours)
    asked = ProxyOptions(wire_dtype=torch.bfloat16, max_grad_norm=0.5, transport=transport, bucket_bytes=4096)
    with Adam(ours, lr=1e-2, server=server.address, options=asked) as remote:
        local = torch.optim.Adam(theirs, lr=1e-2, fused=True)
        for step in range(6):
            grads = gradients(ours, step)
            give(ours, grads)
            give(theirs, grads, torch.bfloat16)
            norm = nn.utils.clip_grad_norm_(theirs, 0.5, foreach=False)
            remote.step()
            local.step()
            receipt = remote.last_receipt
            assert receipt is not None
            assert receipt.grad_norm == float(norm)
            assert_rounded(ours, theirs, torch.bfloat16)
        assert_equal_states(remote, local)


@pytest.mark.parametrize("apply", ["streaming", "atomic"])
@pytest.mark.parametrize("narrow", NARROW, ids=str)
def test_a_scalers_gradients_are_divided_once_they_are_wide(
    server: Server, transport: Transport, narrow: torch.dtype, apply: Any
) -> None:
    """So what float16 has no bits for survives: that is what the scale is there for."""
    ours = parameters()
    theirs = clones(ours)
    asked = ProxyOptions(wire_dtype=narrow, transport=transport, apply=apply, bucket_bytes=4096)
    scale = torch.tensor(1000.0)
    with Adam(ours, lr=1e-2, fused=True, server=server.address, options=asked) as remote:
        local = torch.optim.Adam(theirs, lr=1e-2, fused=True)
        for step in range(6):
            grads = gradients(ours, step, scale=1e-5)
            scaled = [None if grad is None else grad * scale for grad in grads]
            give(ours, scaled)
            give(theirs, scaled, narrow)
            optimizers: list[Any] = [remote, local]
            for optimizer in optimizers:
                optimizer.grad_scale = scale.clone()
                optimizer.found_inf = torch.tensor(float(step == 3))
                optimizer.step()
            assert_rounded(ours, theirs, narrow)
        assert_equal_states(remote, local)


def test_what_float16_makes_infinite_can_be_skipped(server: Server, transport: Transport) -> None:
    p = nn.Parameter(torch.ones(500))
    asked = ProxyOptions(wire_dtype=torch.float16, nonfinite="skip", transport=transport)
    with Adam([p], lr=1e-2, server=server.address, options=asked) as remote:
        for largest, outcome in ((65504.0, "applied"), (65520.0, "skipped_nonfinite"), (1.0, "applied")):
            before = p.detach().clone()
            p.grad = torch.full((500,), largest)
            remote.step()
            receipt = remote.last_receipt
            assert receipt is not None
            assert receipt.outcome == outcome
            assert torch.equal(p.detach(), before) == (outcome != "applied")
            assert p.grad.max() == largest


# --- values that the worker changes


@pytest.mark.parametrize("apply", ["streaming", "atomic"])
@pytest.mark.parametrize("master", [None, torch.float64], ids=["", "master"])
def test_elements_that_were_left_alone_keep_the_bits_that_the_worker_was_not_given(
    server: Server, transport: Transport, master: torch.dtype | None, apply: Any
) -> None:
    """A few are written to in place, of parameters that come rounded: by index, by slice and through `.data`."""
    ours = parameters()
    theirs = [nn.Parameter(p.detach().to(master or torch.float32, copy=True)) for p in ours]
    asked = ProxyOptions(
        wire_dtype=torch.bfloat16, master_dtype=master, transport=transport, apply=apply, bucket_bytes=4096
    )

    def write(params: Sequence[torch.Tensor]) -> None:
        with torch.no_grad():
            params[0][3, 4:9] = 1 / 3
            params[4].data[17_000] = -2 / 3
            params[5].data[5:7].fill_(0.7)

    with Adam(ours, lr=1e-2, server=server.address, options=asked) as remote:
        local = torch.optim.Adam(theirs, lr=1e-2, fused=True)
        for step in range(9):
            if step % 3 == 1:
                remote.push_parameters()
                write(ours)
                write(theirs)
                if master is not None:
                    with torch.no_grad():
                        for p in (theirs[0][3, 4:9], theirs[4][17_000:17_001], theirs[5][5:7]):
                            p.copy_(p.float())
            grads = gradients(ours, step)
            give(ours, grads)
            for p, grad in zip(theirs, grads, strict=True):
                p.grad = None if grad is None else narrowed(grad, torch.bfloat16).to(p.dtype)
            remote.step()
            local.step()
            for index, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
                written = step % 3 == 1 and grads[index] is None
                if not written:
                    assert torch.equal(mine, narrowed(other.detach().float(), torch.bfloat16)), (step, index)
        assert_equal_states(remote, local)
        assert_server_has(remote, ours, [other.float() for other in theirs])


def test_written_values_go_out_with_all_of_their_bits(server: Server, transport: Transport) -> None:
    """They are the truth of the job, and come back rounded only once a step has changed them."""
    p, q = nn.Parameter(torch.zeros(300)), nn.Parameter(torch.zeros(300))
    asked = ProxyOptions(wire_dtype=torch.bfloat16, transport=transport)
    with Adam([p, q], lr=1e-2, server=server.address, options=asked) as remote:
        q.grad = torch.ones(300)
        remote.step()
        third = torch.full((300,), 1 / 3)
        with torch.no_grad():
            p.copy_(third)
            q.copy_(third)
        q.grad = None
        remote.step()
        assert torch.equal(p, third)
        remote.pull_parameters()
        assert torch.equal(p, third)
        assert torch.equal(q, third)


def test_what_was_seen_with_all_of_its_bits_can_be_set_to_what_it_rounds_to(
    server: Server, transport: Transport
) -> None:
    """Behind `pull_parameters()`, an element that is the rounding of the server's is not one that was left alone."""
    p = nn.Parameter(torch.full((300,), 1 / 3))
    asked = ProxyOptions(wire_dtype=torch.bfloat16, transport=transport)
    with Adam([p], lr=1e-2, server=server.address, options=asked) as remote:
        p.grad = torch.ones(300)
        remote.step()
        remote.pull_parameters()
        seen = p.detach().clone()
        rounded = narrowed(seen, torch.bfloat16)
        assert not torch.equal(seen, rounded)
        with torch.no_grad():
            p.copy_(rounded)
        p.grad = None
        remote.step()
        remote.pull_parameters()
        assert torch.equal(p, rounded)


def test_a_worker_that_joins_is_given_all_bits_and_its_steps_are_narrowed(server: Server, transport: Transport) -> None:
    start = torch.randn(700)
    p = nn.Parameter(start.clone())
    plain = ProxyOptions(transport=transport, rank=0, world_size="elastic")
    narrow = ProxyOptions(transport=transport, rank=1, world_size="elastic", wire_dtype=torch.bfloat16)
    twin = nn.Parameter(start.clone())
    local = torch.optim.Adam([twin], lr=1e-2, fused=True)
    with Adam([p], lr=1e-2, server=server.address, job="joined", options=plain) as first:
        p.grad, twin.grad = torch.ones(700), torch.ones(700)
        first.step()
        local.step()
        later = nn.Parameter(torch.zeros(700))
        with Adam([later], lr=1e-2, server=server.address, job="joined", options=narrow):
            assert torch.equal(later, twin)


def test_state_dicts_do_not_show_what_the_wire_narrows(server: Server, transport: Transport) -> None:
    """One that is saved and loaded goes on as in torch."""
    ours, theirs = parameters(), parameters()
    asked = ProxyOptions(wire_dtype=torch.float16, transport=transport, bucket_bytes=4096)
    with Adam(ours, lr=1e-2, server=server.address, options=asked) as remote:
        local = torch.optim.Adam(theirs, lr=1e-2, fused=True)
        for step in range(6):
            if step == 3:
                remote.load_state_dict(remote.state_dict())
                local.load_state_dict(local.state_dict())
            grads = gradients(ours, step)
            give(ours, grads)
            give(theirs, grads, torch.float16)
            remote.step()
            local.step()
        assert_equal_states(remote, local)
        assert_rounded(ours, theirs, torch.float16)
