"""Gradients that leave while backward still runs: torch's bits, nothing applied before `step()`, nothing lost."""

from __future__ import annotations

import gc
import os
import signal
import threading
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from optimd.client import Adam, Async, ConfigurationError, ProxyOptions, Sync, WireDtypes
from optimd.client.aheadpush import AheadPush
from optimd.client.connection import TrainStream
from optimd.server import Server
from optimd.server.ahead import AheadGradients
from optimd.server.errors import LimitExceededError
from optimd.server.job import Job
from optimd.v1 import errors_pb2, training_pb2
from optimd.wire.sharedmemory import NotSharedError
from tests.integration.test_protocol import PlainWorker, begin, end, gradient
from tests.relay import Relay
from tests.support import eventually, in_threads, server_process

BUCKET_BYTES = 4096
WIDTH = 48


class Gate(torch.autograd.Function):
    """Nothing on the way forward; on the way back it does something in the middle of backward."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, act: Callable[[], object]) -> torch.Tensor:
        ctx.act = act
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        ctx.act()
        return grads[0], None


class Net(nn.Module):
    """Three layers of some buckets each, and a gate before the first."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        for p in self.parameters():
            p.data = torch.randn(p.shape, generator=generator) / 7
        self.act: Callable[[], object] = lambda: None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.layers[0](x))
        x = Gate.apply(x, self.act)
        return self.layers[2](torch.tanh(self.layers[1](x)))


def loss_of(model: nn.Module, step: int, rank: int = 0) -> torch.Tensor:
    x = torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(100 * rank + step))
    output: torch.Tensor = model(x)
    return output.square().sum()


def options(**more: Any) -> ProxyOptions:
    return ProxyOptions(**{"overlap": True, "bucket_bytes": BUCKET_BYTES, **more})


def assert_equal(ours: nn.Module, theirs: nn.Module, note: object = None) -> None:
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(mine, other), note


class Twins:
    """A model that is stepped remotely with overlap, and its twin that torch's own Adam steps."""

    def __init__(self, make: Callable[[], nn.Module] = Net) -> None:
        self.ours, self.theirs = make(), make()
        self.local = torch.optim.Adam(self.theirs.parameters(), lr=0.05, fused=True)

    def open(self, address: str, **more: Any) -> Adam:
        return Adam(self.ours.parameters(), lr=0.05, fused=True, server=address, job="j", options=options(**more))

    def backward(self, remote: Adam, step: int) -> None:
        remote.zero_grad()
        loss_of(self.ours, step).backward()

    def step_local(self, step: int) -> None:
        self.local.zero_grad()
        loss_of(self.theirs, step).backward()
        self.local.step()

    def assert_equal(self, note: object = None) -> None:
        assert_equal(self.ours, self.theirs, note)


class Arrivals:
    """The buckets that servers in this process are given ahead of their pushes, and the pushes that took them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.come: list[int] = []
        self.taken = self.refused = 0
        copy, take, check = AheadGradients._copy, AheadGradients.take, AheadGradients.check

        def copying(gradients: AheadGradients, bucket: Any, *rest: Any) -> Any:
            self.come.append(bucket.bucket_id)
            return copy(gradients, bucket, *rest)

        def taking(gradients: AheadGradients) -> Any:
            self.taken += 1
            return take(gradients)

        def checking(gradients: AheadGradients, *args: Any) -> None:
            try:
                check(gradients, *args)
            except Exception:
                self.refused += 1
                raise

        monkeypatch.setattr(AheadGradients, "_copy", copying)
        monkeypatch.setattr(AheadGradients, "take", taking)
        monkeypatch.setattr(AheadGradients, "check", checking)

    def have_come_since(self, count: int) -> bool:
        """Whether more have come than those."""
        return len(self.come) > count


@pytest.fixture
def arrivals(monkeypatch: pytest.MonkeyPatch) -> Arrivals:
    return Arrivals(monkeypatch)


# --- while backward runs


@pytest.mark.parametrize("transport", ["grpc", "shm"])
@pytest.mark.parametrize("apply", ["streaming", "atomic"])
def test_the_last_layers_gradients_are_there_before_the_first_ones_are_computed(
    server: Server, arrivals: Arrivals, transport: Any, apply: Any
) -> None:
    """In the middle of backward, and nothing is applied until `step()`."""
    twins = Twins()
    with twins.open(server.address, transport=transport, apply=apply) as optimizer:
        job = server.registry.get("j")
        buckets = job.store.buckets
        first = {b.bucket_id for b in buckets if any(piece.parameter < 2 for piece in b.slices)}
        rest = {b.bucket_id for b in buckets} - first
        waits: list[bool] = []
        for step in range(4):
            version, before = job.store.version, [p.detach().clone() for p in twins.ours.parameters()]
            arrivals.come.clear()
            twins.ours.act = lambda: waits.append(eventually(lambda: set(arrivals.come) == rest))  # type: ignore[assignment]
            twins.backward(optimizer, step)
            assert eventually(lambda: set(arrivals.come) == rest | first)
            # The last layer's first.
            assert all(piece.parameter >= 4 for piece in buckets[arrivals.come[0]].slices)
            assert job.step == step
            assert job.store.version == version
            assert all(torch.equal(p, old) for p, old in zip(twins.ours.parameters(), before, strict=True))
            optimizer.step()
            twins.step_local(step)
            twins.assert_equal(step)
            assert job.step == step + 1
        assert waits == [True] * 4
        assert len(rest) > 3
        assert arrivals.taken == 4
        assert len(arrivals.come) == len(buckets)


@pytest.mark.parametrize("transport", ["grpc", "shm"])
@pytest.mark.parametrize(
    "more",
    [
        pytest.param({"max_grad_norm": 0.5}, id="clipped"),
        pytest.param({"nonfinite": "skip"}, id="nonfinite"),
        pytest.param({"wire_dtype": torch.bfloat16}, id="narrowed"),
        pytest.param({"wire_dtype": WireDtypes(gradients=torch.float16)}, id="gradients narrowed"),
        pytest.param({"aggregation": Async()}, id="async"),
        pytest.param({"master_dtype": torch.float64}, id="master weights"),
        pytest.param({"aggregation": Sync(deterministic=True)}, id="deterministic"),
    ],
)
def test_steps_have_the_bits_of_those_without_overlap(
    server: Server, arrivals: Arrivals, transport: Any, more: dict[str, Any]
) -> None:
    with_overlap, without = Net(), Net()
    opened = [
        Adam(
            model.parameters(),
            lr=0.05,
            fused=True,
            server=server.address,
            job=str(overlap),
            options=options(transport=transport, overlap=overlap, **more),
        )
        for model, overlap in ((with_overlap, True), (without, False))
    ]
    for step in range(4):
        for model, optimizer in zip((with_overlap, without), opened, strict=True):
            optimizer.zero_grad()
            loss_of(model, step).backward()
            if step == 2 and "nonfinite" in more:
                # Infinite from backward on.
                optimizer.zero_grad()
                (loss_of(model, step) * torch.inf).backward()
            optimizer.step()
        assert_equal(with_overlap, without, step)
        receipts = [optimizer.last_receipt for optimizer in opened]
        assert receipts[0] is not None
        assert receipts[1] is not None
        assert (receipts[0].outcome, receipts[0].grad_norm) == (receipts[1].outcome, receipts[1].grad_norm)
    assert arrivals.taken == 4
    for optimizer in opened:
        optimizer.close()


@pytest.mark.parametrize("apply", ["auto", "streaming"])
def test_several_workers_gradients_are_averaged(server: Server, arrivals: Arrivals, apply: Any) -> None:
    finals: dict[int, Net] = {}

    def train(rank: int) -> None:
        model = finals[rank] = Net()
        how = options(rank=rank, apply=apply, aggregation=Sync(world_size=2))
        with Adam(model.parameters(), lr=0.05, fused=True, server=server.address, job="j", options=how) as optimizer:
            for step in range(5):
                optimizer.zero_grad()
                loss_of(model, step, rank).backward()
                optimizer.step()

    in_threads(train, 2)
    theirs = Net()
    local = torch.optim.Adam(theirs.parameters(), lr=0.05, fused=True)
    for step in range(5):
        grads = []
        for rank in range(2):
            theirs.zero_grad()
            loss_of(theirs, step, rank).backward()
            grads.append([p.grad for p in theirs.parameters()])
        for p, one, other in zip(theirs.parameters(), *grads, strict=True):
            assert one is not None
            assert other is not None
            p.grad = (one + other) / 2
        local.step()
    for model in finals.values():
        assert_equal(model, theirs)
    assert arrivals.taken == 10


# --- models and loops of all kinds


class Tied(nn.Module):
    """One weight used twice, one never used, one frozen, one used now and then."""

    def __init__(self, *, segments: bool | None = None) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.tied = nn.Linear(WIDTH, WIDTH)
        self.unused = nn.Linear(WIDTH, 3)
        self.frozen = nn.Linear(WIDTH, WIDTH)
        self.last = nn.Linear(WIDTH, WIDTH)
        for p in self.parameters():
            p.data = torch.randn(p.shape, generator=generator) / 7
        self.frozen.requires_grad_(False)
        self.segments = segments
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        x = torch.tanh(self.tied(torch.tanh(self.tied(x))))
        if self.segments is not None:
            x = checkpoint(lambda y: torch.tanh(self.last(self.frozen(y))), x, use_reentrant=self.segments)
        elif self.calls % 2:
            x = self.last(x)
        return self.frozen(x)


@pytest.mark.parametrize("segments", [None, True, False], ids=["plain", "reentrant", "checkpointed"])
def test_tied_unused_frozen_and_checkpointed_parameters(
    server: Server, arrivals: Arrivals, segments: bool | None
) -> None:
    twins = Twins(lambda: Tied(segments=segments))
    with twins.open(server.address) as optimizer:
        for step in range(4):
            twins.backward(optimizer, step)
            optimizer.step()
            twins.step_local(step)
            twins.assert_equal(step)
            if step == 1 and not segments:
                # From now on it is trained. Both in a reentrant segment and elsewhere it could not be.
                for model in (twins.ours, twins.theirs):
                    model.get_submodule("frozen").requires_grad_()
        assert arrivals.taken == 4
    assert all(p.grad is None for p in twins.ours.get_submodule("unused").parameters())


def test_micro_batches_under_no_sync_are_added_up_here(server: Server, arrivals: Arrivals) -> None:
    """Three, of which the last one's backward has the sums leave."""
    twins = Twins()
    with twins.open(server.address) as optimizer:
        for step in range(3):
            optimizer.zero_grad()
            twins.local.zero_grad()
            with optimizer.no_sync():
                loss_of(twins.ours, 10 * step).backward()
                with optimizer.no_sync():
                    loss_of(twins.ours, 10 * step + 1).backward()
            assert not arrivals.come
            loss_of(twins.ours, 10 * step + 2).backward()
            optimizer.step()
            for micro in range(3):
                loss_of(twins.theirs, 10 * step + micro).backward()
            twins.local.step()
            twins.assert_equal(step)
            arrivals.come.clear()
        assert arrivals.taken == 3


def test_no_sync_without_overlap_does_nothing(server: Server) -> None:
    twins = Twins()
    with twins.open(server.address, overlap=False) as optimizer, optimizer.no_sync():
        twins.backward(optimizer, 0)
        optimizer.step()
        twins.step_local(0)
        twins.assert_equal()


def test_a_closure_runs_its_backward_in_the_step(server: Server, arrivals: Arrivals) -> None:
    twins = Twins()

    def closure() -> float:
        twins.backward(optimizer, 0)
        return 1.5

    with twins.open(server.address) as optimizer:
        assert optimizer.step(closure) == 1.5
        twins.step_local(0)
        twins.assert_equal()
        assert arrivals.taken == 1


@pytest.mark.parametrize("clear", ["zero_grad", "model's", "by hand", "to zeros"])
def test_a_backward_that_no_step_follows_is_discarded(server: Server, arrivals: Arrivals, clear: str) -> None:
    """By `zero_grad()`, or by the next backward where gradients were taken away by other means."""
    twins = Twins()
    with twins.open(server.address) as optimizer:
        for step in range(3):
            twins.backward(optimizer, 50 + step)
            if clear == "zero_grad":
                optimizer.zero_grad()
            elif clear == "model's":
                twins.ours.zero_grad()
            elif clear == "to zeros":
                optimizer.zero_grad(set_to_none=False)
            else:
                for p in twins.ours.parameters():
                    p.grad = None
            loss_of(twins.ours, step).backward()
            optimizer.step()
            twins.step_local(step)
            twins.assert_equal(step)
        assert arrivals.taken == 3


def test_gradients_that_are_gone_before_the_step_are_in_no_step(server: Server, arrivals: Arrivals) -> None:
    twins = Twins()
    with twins.open(server.address) as optimizer:
        twins.backward(optimizer, 0)
        first = next(iter(twins.ours.parameters()))
        first.grad = None
        optimizer.step()
        twins.local.zero_grad()
        loss_of(twins.theirs, 0).backward()
        next(iter(twins.theirs.parameters())).grad = None
        twins.local.step()
        twins.assert_equal()
        # They were pushed whole.
        assert not arrivals.taken


@pytest.mark.parametrize(
    "meanwhile",
    [
        pytest.param(lambda optimizer, _: optimizer.state_dict(), id="state_dict"),
        pytest.param(lambda optimizer, _: optimizer.load_state_dict(optimizer.state_dict()), id="load_state_dict"),
        pytest.param(lambda optimizer, model: optimizer.attach_buffers(model), id="buffers"),
        pytest.param(lambda optimizer, _: optimizer.pull_parameters(), id="pull"),
        pytest.param(
            lambda optimizer, _: optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3))]}), id="group"
        ),
    ],
)
def test_other_business_between_backward_and_step(
    server: Server, meanwhile: Callable[[Adam, nn.Module], object]
) -> None:
    """What goes over the same stream ends what is being sent ahead; the step pushes it whole."""
    twins = Twins()
    with twins.open(server.address) as optimizer:
        for step in range(3):
            twins.backward(optimizer, step)
            if step == 1:
                meanwhile(optimizer, twins.ours)
            optimizer.step()
            twins.step_local(step)
            twins.assert_equal(step)


def test_parameters_that_become_others_are_followed(server: Server, arrivals: Arrivals) -> None:
    """A module that becomes double, before a backward."""
    twins = Twins()
    with twins.open(server.address) as optimizer:
        twins.backward(optimizer, 0)
        optimizer.step()
        twins.step_local(0)
        for model, each in ((twins.ours, optimizer), (twins.theirs, twins.local)):
            each.zero_grad()
            for p in model.parameters():
                p.data = p.data * 2
                p.grad = None
        for step in range(1, 3):
            twins.backward(optimizer, step)
            optimizer.step()
            twins.step_local(step)
            twins.assert_equal(step)
        assert arrivals.taken == 3


# --- what is refused


def test_a_second_backward_is_refused_and_the_way_named(server: Server) -> None:
    """In `no_sync()` too; after `zero_grad()` the optimizer is as good as new."""
    twins = Twins()
    with twins.open(server.address) as optimizer:
        twins.backward(optimizer, 7)
        with pytest.raises(RuntimeError, match="no_sync"):
            loss_of(twins.ours, 8).backward()
        twins.backward(optimizer, 7)
        with optimizer.no_sync(), pytest.raises(RuntimeError, match="no_sync"):
            loss_of(twins.ours, 8).backward()
        assert optimizer.job_step == 0
        twins.backward(optimizer, 0)
        optimizer.step()
        twins.step_local(0)
        twins.assert_equal()


def test_reentrant_checkpoints_that_share_a_parameter_are_refused(server: Server) -> None:
    """As DDP refuses them: its hook is called twice in one backward."""
    layer = nn.Linear(WIDTH, WIDTH)
    with Adam(layer.parameters(), server=server.address, options=options()):
        x = torch.randn(4, WIDTH, requires_grad=True)
        for _ in range(2):
            x = checkpoint(layer, x, use_reentrant=True)
        with pytest.raises(RuntimeError, match="use_reentrant=False"):
            x.sum().backward()


def test_sparse_gradients_get_torchs_error(server: Server) -> None:
    """From `step()`, as without overlap; backward goes through."""
    table = nn.Embedding(10, 4, sparse=True)
    with Adam(table.parameters(), server=server.address, options=options()) as optimizer:
        table(torch.tensor([1, 2])).sum().backward()
        with pytest.raises(RuntimeError, match="does not support sparse gradients"):
            optimizer.step()


def _clip(model: nn.Module, _: Adam) -> None:
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01)


def _clip_behind_torchs_back(model: nn.Module, _: Adam) -> None:
    for p in model.parameters():
        assert p.grad is not None
        p.grad.data.mul_(0.5)


def _scale(model: nn.Module, _: Adam) -> None:
    for p in model.parameters():
        assert p.grad is not None
        p.grad = p.grad * 2


def _as_a_scaler(_: nn.Module, optimizer: Adam) -> None:
    # What GradScaler.step does with an optimizer that knows about scaling.
    optimizer.grad_scale = torch.tensor(8.0)  # type: ignore[attr-defined]
    optimizer.found_inf = torch.tensor(0.0)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("change", "remedy"),
    [
        (_clip, "max_grad_norm"),
        (_clip_behind_torchs_back, "max_grad_norm"),
        (_scale, "max_grad_norm"),
        (_as_a_scaler, "bfloat16"),
    ],
)
def test_gradients_that_are_changed_after_backward_are_refused_with_the_alternative(
    server: Server, change: Callable[[nn.Module, Adam], None], remedy: str
) -> None:
    """Before anything is applied; `zero_grad()` is the way on."""
    twins = Twins()
    with twins.open(server.address) as optimizer:
        twins.backward(optimizer, 9)
        change(twins.ours, optimizer)
        # What a GradScaler leaves on an optimizer is gone with its step: the next one is another's.
        for _ in range(1 if change is _as_a_scaler else 2):
            with pytest.raises(ConfigurationError, match=remedy):
                optimizer.step()
        assert server.registry.get("j").step == 0
        twins.backward(optimizer, 0)
        optimizer.step()
        twins.step_local(0)
        twins.assert_equal()


def test_accumulating_on_the_server_is_refused(server: Server) -> None:
    twins = Twins()
    with twins.open(server.address) as optimizer:
        twins.backward(optimizer, 0)
        with pytest.raises(ConfigurationError, match="no_sync"):
            optimizer.accumulate()


def test_steps_that_are_made_in_the_worker_have_nothing_to_overlap(server: Server) -> None:
    with pytest.raises(ConfigurationError, match="differentiable=True"):
        Adam([nn.Parameter(torch.ones(3))], differentiable=True, server=server.address, options=options())


# --- where the server does not have them


def test_what_the_server_has_no_room_for_is_pushed_whole(
    server: Server, arrivals: Arrivals, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room(*_: Any) -> None:
        raise LimitExceededError("the job would take too much")

    monkeypatch.setattr(Job, "take_ahead", no_room)
    twins = Twins()
    with twins.open(server.address) as optimizer:
        for step in range(3):
            twins.backward(optimizer, step)
            optimizer.step()
            twins.step_local(step)
            twins.assert_equal(step)
    assert arrivals.refused == 3
    assert not arrivals.come


def test_a_server_that_does_not_know_of_it_is_sent_nothing_ahead(
    server: Server, arrivals: Arrivals, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = TrainStream._take

    def take(stream: TrainStream, accepted: Any) -> None:
        original(stream, accepted)
        stream.takes_ahead = False

    monkeypatch.setattr(TrainStream, "_take", take)
    twins = Twins()
    with twins.open(server.address) as optimizer:
        twins.backward(optimizer, 0)
        optimizer.step()
        twins.step_local(0)
        twins.assert_equal()
    assert not arrivals.come


# --- faults


@pytest.fixture
def relay(server: Server) -> Iterator[Relay]:
    with Relay(server.address) as running:
        yield running


@pytest.mark.parametrize("apply", ["streaming", "atomic"])
@pytest.mark.parametrize("where", ["in backward", "behind it"])
def test_a_line_that_breaks_ahead_of_the_step_costs_nothing_but_the_overlap(
    relay: Relay, arrivals: Arrivals, where: str, apply: Any
) -> None:
    """The step comes back to the job, and pushes everything."""
    twins = Twins()
    with twins.open(relay.address, apply=apply) as optimizer:

        def cut() -> None:
            assert eventually(lambda: bool(arrivals.come))
            relay.cut()

        for step in range(6):
            arrivals.come.clear()
            twins.ours.act = cut if step % 2 and where == "in backward" else lambda: None  # type: ignore[assignment]
            twins.backward(optimizer, step)
            if step % 2 and where == "behind it":
                cut()
            optimizer.step()
            twins.step_local(step)
            twins.assert_equal(step)
            assert optimizer.last_receipt is not None
            assert (optimizer.last_receipt.sequence, optimizer.job_step) == (step, step + 1)
    assert relay.cuts >= 3
    assert arrivals.taken == 3


@pytest.mark.parametrize("apply", ["streaming", "atomic"])
def test_a_line_that_breaks_in_the_step_has_it_made_once(
    server: Server, relay: Relay, arrivals: Arrivals, monkeypatch: pytest.MonkeyPatch, apply: Any
) -> None:
    """When the server has begun to put what has come ahead into the step."""
    twins = Twins()
    cuts: list[int] = []
    taken = AheadGradients.take

    def cutting(gradients: AheadGradients) -> Iterator[Any]:
        for number, each in enumerate(taken(gradients)):
            if number == 4 and len(cuts) < 2 and server.registry.get("j").step % 2:
                cuts.append(each[0].bucket_id)
                relay.cut()
            yield each

    monkeypatch.setattr(AheadGradients, "take", cutting)
    with twins.open(relay.address, apply=apply) as optimizer:
        for step in range(6):
            twins.backward(optimizer, step)
            optimizer.step()
            twins.step_local(step)
            twins.assert_equal(step)
            assert (optimizer.next_sequence, optimizer.job_step) == (step + 1, step + 1)
    assert len(cuts) == 2


@pytest.mark.parametrize("where", ["in backward", "behind it"])
def test_a_server_that_dies_ahead_of_the_step_is_given_everything_when_it_is_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """From its disk it has the job as of the last step, and knows nothing of what had come ahead."""
    flags = (f"--address=unix://{tmp_path}/socket", f"--data-dir={tmp_path}/data", "--fsync=never")
    twins, given, killed = Twins(), list[int](), list[int]()
    put = AheadPush.put

    def putting(push: AheadPush, bucket: Any, *rest: Any) -> None:
        given.append(bucket.bucket_id)
        put(push, bucket, *rest)

    monkeypatch.setattr(AheadPush, "put", putting)
    with server_process(*flags) as (first, address), twins.open(address, retry_timeout_s=60) as optimizer:

        def kill() -> None:
            assert given
            first.send_signal(signal.SIGKILL)
            killed.append(first.wait())

        for step in range(4):
            given.clear()
            twins.ours.act = kill if step == 2 and where == "in backward" else lambda: None  # type: ignore[assignment]
            twins.backward(optimizer, step)
            if step == 2:
                if where == "behind it":
                    kill()
                with server_process(*flags):
                    for later in range(step, 5):
                        if later > step:
                            twins.ours.act = lambda: None  # type: ignore[assignment]
                            twins.backward(optimizer, later)
                        optimizer.step()
                        twins.step_local(later)
                        twins.assert_equal(later)
                    optimizer.close()
                break
            optimizer.step()
            twins.step_local(step)
    assert killed == [-signal.SIGKILL]


def test_a_worker_that_ends_in_the_middle_of_backward_leaves_the_others_alone(
    server: Server, arrivals: Arrivals
) -> None:
    """Nobody has to push anything again: nothing of it was in a sum."""
    steps, left = threading.Barrier(2), threading.Event()
    finals: dict[int, Net] = {}

    def train(rank: int) -> None:
        model = finals[rank] = Net()
        how = options(rank=rank, aggregation=Sync(world_size="elastic"))
        optimizer = Adam(model.parameters(), lr=0.05, fused=True, server=server.address, job="j", options=how)
        steps.wait()
        for step in range(4):
            if rank == 0 and step == 2:
                assert left.wait(20)
            optimizer.zero_grad()
            before = len(arrivals.come)
            loss_of(model, step, rank).backward()
            if rank == 1 and step == 2:
                # The other one sends nothing meanwhile: they are its own.
                assert eventually(partial(arrivals.have_come_since, before))
                optimizer.close()
                left.set()
                return
            optimizer.step()
        assert optimizer.job_step == 4
        optimizer.close()

    in_threads(train, 2)
    twin = Net()
    local = torch.optim.Adam(twin.parameters(), lr=0.05, fused=True)
    for step in range(4):
        gradients = []
        for rank in range(2 if step < 2 else 1):
            local.zero_grad()
            loss_of(twin, step, rank).backward()
            gradients.append([p.grad for p in twin.parameters()])
        for p, *parts in zip(twin.parameters(), *gradients, strict=True):
            p.grad = sum(parts[1:], start=parts[0]) / len(parts)
        local.step()
    assert_equal(finals[0], twin)


# --- nothing is left behind


def test_an_optimizer_that_is_closed_or_dropped_leaves_no_hooks(server: Server) -> None:
    model = Net()
    p = model.layers[0].weight
    with Adam(model.parameters(), server=server.address, options=options()) as optimizer:
        assert len(p._post_accumulate_grad_hooks) == 1
        loss_of(model, 0).backward()
    assert not p._post_accumulate_grad_hooks
    model.zero_grad()
    dropped = Adam(model.parameters(), server=server.address, options=options())
    loss_of(model, 0).backward()
    assert len(p._post_accumulate_grad_hooks) == 1
    del optimizer, dropped
    assert eventually(lambda: not server.registry.all())
    assert not p._post_accumulate_grad_hooks


# --- messages


def ahead(sequence: int = 0) -> training_pb2.TrainRequest:
    return training_pb2.TrainRequest(push_ahead=training_pb2.PushAhead(sequence=sequence))


def ahead_end(count: int, *, complete: bool = True) -> training_pb2.TrainRequest:
    end_of = training_pb2.PushAheadEnd(bucket_count=count, complete=complete)
    return training_pb2.TrainRequest(push_ahead_end=end_of)


def end_of_two_kinds() -> training_pb2.TrainRequest:
    """A message that begins as one kind, and has others bundled in it."""
    return training_pb2.TrainRequest(step_end=training_pb2.StepEnd(), bundled=[begin().SerializeToString()])


def test_a_plain_worker_may_send_gradients_ahead(server: Server) -> None:
    """Twice, of which the second holds; a push that does not want them forgets them."""
    p = nn.Parameter(torch.ones(300))
    local = torch.optim.Adam([p], lr=0.1, fused=True)
    p.grad = torch.ones(300)
    with PlainWorker(server).opened() as worker:
        worker.send(ahead(), gradient(1, 44), ahead_end(1))
        worker.send(ahead(), gradient(1, 44), gradient(0, 256), ahead_end(2))
        worker.send(begin(ahead=True), end(0))
        *buckets, _ = worker.until("receipt")
        local.step()
        received = {message.bucket.bucket_id: message.payload for message in buckets}
        assert received[0] + received[1] == bytes(memoryview(p.detach().numpy()))
        worker.send(ahead(1), gradient(0, 256), gradient(1, 44), ahead_end(2))
        worker.send(begin(sequence=1, base_step=1, without_gradients=True), end(0))
        assert [message.WhichOneof("message") for message in worker.until("receipt")] == ["receipt"]
        worker.send(begin(sequence=2, base_step=2, ahead=True), end(0))
        assert "did not come ahead" in worker.until("refused")[-1].refused.message


@pytest.mark.parametrize(
    "sent",
    [
        pytest.param([ahead(9), gradient(0, 256), gradient(1, 44), ahead_end(2)], id="of another push"),
        pytest.param([ahead(), gradient(0, 256), ahead_end(1, complete=False)], id="incomplete"),
        pytest.param([], id="none"),
    ],
)
def test_a_push_whose_gradients_are_not_there_is_refused_and_may_be_made_anew(server: Server, sent: list[Any]) -> None:
    with PlainWorker(server).opened() as worker:
        worker.send(*sent, begin(ahead=True), end(0))
        refused = worker.until("refused")[-1].refused
        assert refused.reason == errors_pb2.ERROR_REASON_ACCUMULATION_LOST
        worker.send(begin(), gradient(0, 256), gradient(1, 44), end(2))
        assert worker.until("receipt")[-1].receipt.step == 1


@pytest.mark.parametrize(
    ("messages", "text"),
    [
        ([ahead(), gradient(0, 256), ahead_end(2)], "2, but 1 have come"),
        ([ahead(), gradient(0, 256), gradient(0, 256)], "came a second time"),
        ([ahead(), begin()], "step_begin"),
        ([ahead_end(0)], "between two steps"),
        ([ahead(), gradient(0, 256), ahead_end(1), begin(ahead=True), end(0)], "all or none is due"),
        (
            [ahead(), gradient(0, 256), gradient(1, 44), ahead_end(2), begin(ahead=True), gradient(0, 256), end(1)],
            "again that came ahead",
        ),
        ([end_of_two_kinds()], "a bundle has no other field"),
    ],
)
def test_what_makes_no_sense_ends_the_stream(server: Server, messages: list[Any], text: str) -> None:
    with PlainWorker(server).opened() as worker:
        worker.send(*messages)
        _, detail = worker.fails()
        assert text in detail.message


def test_what_came_ahead_of_a_push_that_was_refused_is_forgotten(server: Server) -> None:
    """As the protocol says of whatever is not stepped with at once."""
    with PlainWorker(server).opened() as worker:
        worker.send(ahead(), gradient(0, 256), gradient(1, 44), ahead_end(2))
        worker.send(begin(micro=3), end(0))
        assert worker.until("refused")[-1].refused.reason == errors_pb2.ERROR_REASON_ACCUMULATION_LOST
        worker.send(begin(ahead=True), end(0))
        assert "did not come ahead" in worker.until("refused")[-1].refused.message


# --- programs that were found to go wrong


def test_gradients_of_parameters_that_are_frozen_in_turn(server: Server, arrivals: Arrivals) -> None:
    """Left-over ones leave with their bucket, and count as they are in the end: no step has half of them."""

    def run(twins: Twins, model: nn.Module, optimizer: Any, step: int) -> None:
        first, second = model.layers[0], model.layers[2]
        optimizer.zero_grad(set_to_none=False)
        for frozen, trained in ((first, second), (second, first)):
            frozen.requires_grad_(False)
            trained.requires_grad_(True)
            for middle in model.layers[1].parameters():
                middle.requires_grad_(trained is second)
            loss_of(model, step).backward()
        model.requires_grad_(True)
        optimizer.step()

    twins = Twins()
    with twins.open(server.address) as remote:
        for step in range(4):
            run(twins, twins.ours, remote, step)
            run(twins, twins.theirs, twins.local, step)
            twins.assert_equal(step)
    assert arrivals.come


def test_a_gradient_that_is_assigned_to_a_frozen_parameter_counts(server: Server, arrivals: Arrivals) -> None:
    """Whether or not the others of its bucket have left by then."""
    twins = Twins()
    with twins.open(server.address) as remote:
        for step in range(3):
            for model, optimizer in ((twins.ours, remote), (twins.theirs, twins.local)):
                weight = model.layers[1].weight
                weight.requires_grad_(False)
                optimizer.zero_grad()
                weight.grad = torch.ones_like(weight)
                loss_of(model, step).backward()
                weight.grad = torch.full_like(weight, 0.5)
                optimizer.step()
            twins.assert_equal(step)
    assert arrivals.come


def test_param_groups_may_be_edited_between_backward_and_step(server: Server) -> None:
    """Swapped, or parameters moved: what has left goes by other indices, and is pushed whole."""
    twins = Twins()

    def grouped(model: nn.Module) -> list[dict[str, Any]]:
        return [{"params": [layer.weight], "lr": 0.01 * (1 + number)} for number, layer in enumerate(model.layers)]

    local = torch.optim.Adam(grouped(twins.theirs), fused=True)
    with Adam(grouped(twins.ours), fused=True, server=server.address, job="j", options=options()) as remote:
        for step in range(4):
            for model, optimizer in ((twins.ours, remote), (twins.theirs, local)):
                optimizer.zero_grad()
                loss_of(model, step).backward()
                if step == 1:
                    optimizer.param_groups.reverse()
                optimizer.step()
            twins.assert_equal(step)


def test_gradients_that_are_views_of_one_buffer_are_pushed(server: Server) -> None:
    """They count each other's writes, and nobody has changed any."""
    twins = Twins()
    with twins.open(server.address) as remote:
        for model in (twins.ours, twins.theirs):
            flat, start = torch.zeros(sum(p.numel() for p in model.parameters())), 0
            for p in model.parameters():
                p.grad = flat[start : start + p.numel()].view_as(p)
                start += p.numel()
        for step in range(3):
            for model, optimizer in ((twins.ours, remote), (twins.theirs, twins.local)):
                optimizer.zero_grad(set_to_none=False)
                loss_of(model, step).backward()
                optimizer.step()
            twins.assert_equal(step)


@pytest.mark.parametrize("transport", ["grpc", "shm"])
def test_backwards_that_no_step_follows_cost_the_step_nothing(server: Server, transport: str) -> None:
    """What has not been sent of them is not; the receipt tells of what was sent for its own push."""
    twins = Twins()
    with twins.open(server.address, transport=transport) as remote:
        twins.backward(remote, 0)
        remote.step()
        alone = remote.last_receipt
        for step in range(30):
            twins.backward(remote, step)
        twins.backward(remote, 1)
        remote.step()
        twins.step_local(0)
        twins.step_local(1)
        twins.assert_equal()
        receipt = remote.last_receipt
    assert alone is not None
    assert receipt is not None
    assert receipt.bytes_sent <= alone.bytes_sent + 100


def test_an_optimizer_that_is_dropped_leaves_no_stream_to_the_cycle_collector(server: Server) -> None:
    """With memory for its rings: 24 MiB each."""
    gc.collect()
    gc.disable()
    try:
        twins = Twins()
        remote = twins.open(server.address)
        twins.backward(remote, 0)
        remote.step()
        stream = weakref.ref(remote._open_session()._line.stream())
        remote.close()
        del remote
        assert eventually(lambda: stream() is None)
    finally:
        gc.enable()


def test_a_child_process_may_run_backward(server: Server) -> None:
    """It has no line, and nothing leaves from it."""
    twins = Twins()
    with twins.open(server.address) as remote:
        twins.backward(remote, 0)
        pid = os.fork()
        if not pid:
            try:
                loss_of(twins.ours, 1).backward()
            except BaseException:  # noqa: BLE001  # its status tells
                os._exit(1)
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0
        remote.step()
        twins.step_local(0)
        twins.assert_equal()


def test_memory_that_is_insisted_on_is_had_or_an_error(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the server finds it and cannot map it, too."""

    def fail(*_: Any) -> Any:
        raise NotSharedError("no descriptors left")

    monkeypatch.setattr("optimd.server.session.attach", fail)
    p = nn.Parameter(torch.ones(10))
    with pytest.raises(ConfigurationError, match="could not map it"):
        Adam([p], server=server.address, job="insists", options=ProxyOptions(transport="shm"))
    with Adam([p], server=server.address, job="takes it", options=ProxyOptions(transport="auto")) as remote:
        p.grad = torch.ones(10)
        remote.step()
