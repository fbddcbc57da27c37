"""Parameters and gradients that do not lie in memory as most do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from optimd.client import Adam
from optimd.server import Server

LOOP: dict[str, Any] = {"foreach": False, "fused": False}


def stepped(server: Server, make: Callable[[], nn.Parameter], gradient: Callable[[int], torch.Tensor]) -> None:
    """Some steps with torch's loop and with a remote one, bit for bit."""
    ours, theirs = make(), make()
    with Adam([ours], lr=0.1, server=server.address, **LOOP) as remote:
        local = torch.optim.Adam([theirs], lr=0.1, **LOOP)
        for step in range(5):
            ours.grad, theirs.grad = gradient(step), gradient(step)
            remote.step()
            local.step()
        assert torch.equal(ours, theirs)
        assert ours.stride() == theirs.stride()
        for name in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(remote.state[ours][name], local.state[theirs][name])


def seeded(step: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(step))


@pytest.mark.parametrize(
    "gradient",
    [
        pytest.param(lambda step: seeded(step, 1, 30).expand(40, 30), id="expanded"),
        pytest.param(lambda step: seeded(step, 30, 40).t(), id="transposed"),
        pytest.param(lambda step: seeded(step, 40, 90)[:, ::3], id="strided"),
        pytest.param(lambda step: seeded(step, 2400)[600:1800].view(40, 30), id="offset"),
        pytest.param(lambda step: seeded(step, 40, 30).flip(0), id="flipped"),
    ],
)
@pytest.mark.parametrize("order", ["rows", "columns", "holes"])
def test_gradients_of_any_strides_step_parameters_of_any_layout(
    server: Server, order: str, gradient: Callable[[int], torch.Tensor]
) -> None:
    """torch's loop is the measure: its fused kernel is silently wrong where strides differ."""

    def make() -> nn.Parameter:
        values = torch.linspace(-1, 1, 1200).view(40, 30)
        if order == "columns":
            return nn.Parameter(values.t().contiguous().t())
        if order == "holes":
            backing = torch.zeros(40, 60)
            backing[:, ::2] = values
            return nn.Parameter(backing[:, ::2])
        return nn.Parameter(values.clone())

    stepped(server, make, gradient)


def test_conjugated_gradients_are_resolved(server: Server) -> None:
    """What torch marks and does not compute yet must not travel as it lies in memory. (torch's loop refuses it.)"""
    ours, theirs = (nn.Parameter(torch.linspace(-1, 1, 50).to(torch.complex64)) for _ in range(2))
    with Adam([ours], server=server.address, **LOOP) as remote:
        local = torch.optim.Adam([theirs], **LOOP)
        for step in range(5):
            ours.grad = torch.complex(seeded(step, 50), seeded(step + 100, 50)).conj()
            assert ours.grad.is_conj()
            theirs.grad = ours.grad.resolve_conj()
            remote.step()
            local.step()
        assert torch.equal(ours, theirs)


def test_a_parameter_whose_elements_share_memory_raises_torchs_error(server: Server) -> None:
    """Before anything is sent; without a gradient it is left alone, as torch leaves it."""
    ours, theirs = (nn.Parameter(torch.ones(1).expand(4)) for _ in range(2))
    other = nn.Parameter(torch.ones(2))
    with Adam([other, ours], server=server.address, **LOOP) as remote:
        local = torch.optim.Adam([theirs], **LOOP)
        other.grad = torch.ones(2)
        remote.step()
        ours.grad, theirs.grad = torch.ones(4), torch.ones(4)
        with pytest.raises(RuntimeError) as expected:
            local.step()
        with pytest.raises(RuntimeError) as caught:
            remote.step()
        assert str(caught.value) == str(expected.value)
        assert remote.job_step == 1
        ours.grad = None
        remote.step()
        assert remote.state[other]["step"] == 2


def test_parameters_on_the_meta_device_have_nothing_to_be_stepped(server: Server) -> None:
    """They may be there, with gradients or without; their neighbours are stepped as ever."""
    ours, theirs = (nn.Parameter(torch.ones(3)) for _ in range(2))
    meta = nn.Parameter(torch.empty(5, 2, device="meta"))
    with Adam([meta, ours], server=server.address, **LOOP) as remote:
        local = torch.optim.Adam([theirs], **LOOP)
        for step in range(3):
            ours.grad, theirs.grad = torch.ones(3), torch.ones(3)
            meta.grad = torch.empty(5, 2, device="meta") if step else None
            remote.step()
            local.step()
        assert torch.equal(ours, theirs)
        assert meta not in remote.state


def test_a_step_inside_a_cuda_graph_s_capture_is_refused(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph would replay neither the call nor what the server sends."""
    p = nn.Parameter(torch.ones(3))
    with Adam([p], server=server.address) as remote:
        p.grad = torch.ones(3)
        with monkeypatch.context() as capturing:
            capturing.setattr(torch.cuda, "is_available", lambda: True)
            capturing.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
            with pytest.raises(RuntimeError, match="cannot be captured in a CUDA graph"):
                remote.step()
        assert remote.job_step == 0
        remote.step()
        assert remote.job_step == 1


def test_a_dtensor_is_refused_by_name() -> None:
    """Its elements lie on other ranks; what torch would step is a shard. No server is asked."""

    class Sharded(torch.Tensor):
        def __tensor_flatten__(self) -> Any:
            raise NotImplementedError

    tensor = torch.ones(3).as_subclass(Sharded)
    with pytest.raises(ValueError, match=r"parameter 0: it is a Sharded, whose elements lie in other tensors"):
        Adam([tensor.requires_grad_()], server="127.0.0.1:1")
