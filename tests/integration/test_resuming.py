"""Exactly once, and nothing lost: pushes that are resumed, and servers that are started again where they were."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from optimd.client import (
    AccumulationLostError,
    Adam,
    Async,
    ConnectionLostError,
    JobDeletedError,
    NotDurableError,
    ProxyOptions,
    StepReceipt,
    Sync,
    UnknownJobError,
)
from optimd.client.caretaker import caretaker
from optimd.client.jobline import JobLine
from optimd.server import Server, incoming
from optimd.server import pushes as server_pushes
from optimd.server.errors import ShuttingDownError, StorageFailedError
from optimd.server.pushing import Pushing
from optimd.server.registry import JobRegistry
from optimd.server.snapshots import SnapshotInfo
from optimd.server.store import Store
from optimd.wire import rings
from tests.cuts import PushFaults
from tests.disk import Disk, restart_where_it_was
from tests.relay import Relay
from tests.support import eventually, in_threads, running_server, server_process

SIZE = 2500
"""Elements of a parameter of ten buckets of 1024 bytes."""
BUCKETS = 10
MESSAGES = BUCKETS + 2
"""Of a push: StepBegin, the buckets, StepEnd."""


def options(rank: int = 0, world_size: int = 1, **more: Any) -> ProxyOptions:
    return ProxyOptions(rank=rank, world_size=world_size, bucket_bytes=1024, **{"retry_timeout_s": 20, **more})


def asynchronous(rank: int = 0, **more: Any) -> ProxyOptions:
    return ProxyOptions(
        rank=rank, worker_id=f"w{rank}", aggregation=Async(), bucket_bytes=1024, retry_timeout_s=20, **more
    )


def of_mode(mode: str, **more: Any) -> ProxyOptions:
    return asynchronous(**more) if mode == "async" else options(apply=mode, **more)


def gradient(step: int, size: int = SIZE, rank: int = 0) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(1000 * rank + step))


def receipt_of(optimizer: Adam) -> StepReceipt:
    assert optimizer.last_receipt is not None
    return optimizer.last_receipt


class Twins:
    """A parameter that is stepped remotely, and its twin that torch's own Adam steps with the same gradients.

    Where these travel narrowed, torch's are rounded by hand, and the worker's parameter is torch's rounded.
    """

    def __init__(self, wire: torch.dtype | None = None) -> None:
        self.ours, self.theirs = nn.Parameter(torch.zeros(SIZE)), nn.Parameter(torch.zeros(SIZE))
        self.local = torch.optim.Adam([self.theirs], lr=0.1, fused=True)
        self.wire = wire or torch.float32

    def step(self, remote: Adam, number: int) -> None:
        self.ours.grad, self.theirs.grad = gradient(number), gradient(number).to(self.wire).float()
        remote.step()
        self.local.step()

    def assert_equal(self) -> None:
        assert torch.equal(self.ours, self.theirs.detach().to(self.wire).float())


@pytest.fixture(autouse=True, params=["in messages", "in shared memory"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How payloads travel: those of these tests are so small that all of them would be in messages."""
    if request.param == "in shared memory":
        monkeypatch.setattr(rings, "SMALLEST_BYTES", 1)
    else:
        monkeypatch.setattr(Store, "share", lambda _: None)
    return str(request.param)


def test_payloads_travel_as_the_tests_say(server: Server, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    placing: list[int | None] = []
    original = rings.RingWriter.place

    def place(ring: rings.RingWriter, parts: Any, nbytes: int) -> int | None:
        placing.append(original(ring, parts, nbytes))
        return placing[-1]

    monkeypatch.setattr(rings.RingWriter, "place", place)
    twins = Twins()
    with Adam([twins.ours], lr=0.1, fused=True, server=server.address, options=options()) as optimizer:
        twins.step(optimizer, 0)
    twins.assert_equal()
    if way == "in messages":
        assert placing == [None] * 2 * BUCKETS
    else:
        # What comes back is read where the server has it.
        assert len(placing) == BUCKETS
        assert None not in placing


@pytest.fixture
def relay(server: Server) -> Iterator[Relay]:
    with Relay(server.address) as running:
        yield running


@pytest.fixture
def faults(monkeypatch: pytest.MonkeyPatch) -> PushFaults:
    return PushFaults(monkeypatch)


@pytest.fixture
def pushed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The buckets of gradients that the server has been sent in pushes, in the order in which they came."""
    received: list[int] = []
    original = incoming.read_bucket

    def recording(*args: Any) -> Any:
        read = original(*args)
        if read[0] == "gradient":
            received.append(read[1].bucket_id)
        return read

    monkeypatch.setattr(server_pushes, "read_bucket", recording)
    return received


def after_return(monkeypatch: pytest.MonkeyPatch, optimizer: Adam, act: Callable[[], object]) -> None:
    """Has something happen once, when a worker has come back to its job and before it goes on with its push."""
    original, line = JobLine.take_up_again, optimizer._open_session()._line
    acts = [act]

    def returning(self: JobLine, *args: Any, **more: Any) -> Any:
        receipt = original(self, *args, **more)
        if self is line and acts:
            acts.pop()()
        return receipt

    monkeypatch.setattr(JobLine, "take_up_again", returning)


# --- at every boundary of a push


@pytest.mark.parametrize("wire", [None, torch.bfloat16], ids=["exact", "narrow"])
@pytest.mark.parametrize("recovers", [False, True])
@pytest.mark.parametrize("mode", ["streaming", "atomic", "async"])
def test_a_line_cut_before_any_message_of_a_push_costs_nothing_and_applies_nothing_twice(
    server: Server,
    relay: Relay,
    faults: PushFaults,
    pushed: list[int],
    mode: str,
    recovers: bool,
    wire: torch.dtype | None,
) -> None:
    """The server has what went before, and is sent the rest alone; also one that was started again meanwhile."""
    twins = Twins(wire)
    asked = of_mode(mode, wire_dtype=wire)
    with Adam([twins.ours], lr=0.1, fused=True, server=relay.address, job="b", options=asked) as optimizer:
        job = server.registry.get("b")
        faults.of(optimizer)
        for number in range(MESSAGES):
            faults.before_sending(number, lambda: restart_where_it_was(relay, job) if recovers else relay.cut())
            pushed.clear()
            twins.step(optimizer, number)
            receipt = receipt_of(optimizer)
            assert faults.is_over
            assert (receipt.sequence, receipt.step, receipt.outcome) == (number, number + 1, "applied")
            assert receipt.resumed
            twins.assert_equal()
            assert sorted(pushed) == list(range(BUCKETS))
        assert faults.fired == MESSAGES
        assert optimizer.state_dict()["state"][0]["step"] == job.step == MESSAGES


@pytest.mark.parametrize("wire", [None, torch.bfloat16], ids=["exact", "narrow"])
@pytest.mark.parametrize("recovers", [False, True])
@pytest.mark.parametrize("mode", ["streaming", "atomic", "async"])
def test_a_line_cut_before_any_answer_to_a_push_is_read_costs_nothing_and_applies_nothing_twice(
    server: Server,
    relay: Relay,
    faults: PushFaults,
    pushed: list[int],
    mode: str,
    recovers: bool,
    wire: torch.dtype | None,
) -> None:
    """The server has committed the step; the worker has read some of the new parameters, or all, but no receipt."""
    twins = Twins(wire)
    asked = of_mode(mode, wire_dtype=wire)
    with Adam([twins.ours], lr=0.1, fused=True, server=relay.address, job="b", options=asked) as optimizer:
        job = server.registry.get("b")
        faults.of(optimizer)
        for number in range(BUCKETS + 1):
            faults.before_reading(
                number, lambda: restart_where_it_was(relay, job) if recovers else relay.cut(), done=MESSAGES
            )
            pushed.clear()
            twins.step(optimizer, number)
            receipt = receipt_of(optimizer)
            assert faults.is_over
            assert (receipt.sequence, receipt.step, receipt.outcome) == (number, number + 1, "applied")
            assert receipt.resumed
            twins.assert_equal()
            assert sorted(pushed) == list(range(BUCKETS))
        assert faults.fired == BUCKETS + 1
        assert optimizer.state_dict()["state"][0]["step"] == job.step == BUCKETS + 1


def test_a_push_that_is_cut_again_and_again_sends_each_bucket_once(
    server: Server, relay: Relay, faults: PushFaults, pushed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it sends counts what the server has had before; its traffic is in the receipt, over all of its lines."""
    twins = Twins()
    with Adam([twins.ours], lr=0.1, fused=True, server=relay.address, job="b", options=options()) as optimizer:
        faults.of(optimizer)
        twins.step(optimizer, 0)
        undisturbed = receipt_of(optimizer).bytes_sent
        pushed.clear()

        def cut() -> None:
            relay.cut()
            if faults.fired < 4:
                faults.before_sending(3, cut)

        faults.before_sending(3, cut)
        twins.step(optimizer, 1)
        assert faults.fired == 4
        assert sorted(pushed) == list(range(BUCKETS))
        twins.assert_equal()
        # Of each attempt that was cut, StepBegin and the few messages that were on their way: not five whole pushes.
        assert undisturbed < receipt_of(optimizer).bytes_sent < 3 * undisturbed


# --- what is in a push besides


def test_a_resumed_push_takes_up_what_was_accumulated(
    server: Server, relay: Relay, faults: PushFaults, pushed: list[int]
) -> None:
    """Some buckets with their sums are there, the others' sums are held still."""
    p, twin = nn.Parameter(torch.zeros(SIZE)), nn.Parameter(torch.zeros(SIZE))
    local = torch.optim.Adam([twin], lr=0.1, fused=True)
    with Adam([p], lr=0.1, fused=True, server=relay.address, job="b", options=options(apply="atomic")) as optimizer:
        faults.of(optimizer)
        for step, number in enumerate((1, 6, MESSAGES - 1)):
            p.grad = gradient(2 * step)
            optimizer.accumulate()
            faults.before_sending(number, relay.cut)
            pushed.clear()
            p.grad = gradient(2 * step + 1)
            optimizer.step()
            twin.grad = gradient(2 * step) + gradient(2 * step + 1)
            local.step()
            assert torch.equal(p, twin)
            assert sorted(pushed) == list(range(BUCKETS))
        assert faults.fired == 3


@pytest.mark.parametrize("kind", ["skipped", "without gradients"])
@pytest.mark.parametrize("number", [1, 2])
def test_a_push_that_brings_no_gradients_is_resumed(
    server: Server, relay: Relay, faults: PushFaults, kind: str, number: int
) -> None:
    """Between StepBegin and StepEnd, and when it is answered and nobody has heard of it."""
    twins = Twins()
    with Adam([twins.ours], lr=0.1, fused=True, server=relay.address, job="b", options=options()) as optimizer:
        faults.of(optimizer)
        scaled: Any = optimizer
        twins.step(optimizer, 0)
        if number == 1:
            faults.before_sending(1, relay.cut)
        else:
            faults.before_reading(0, relay.cut, done=2)
        twins.ours.grad = gradient(1) if kind == "skipped" else None
        if kind == "skipped":
            scaled.grad_scale, scaled.found_inf = torch.tensor(8.0), torch.tensor(1.0)
        optimizer.step()
        receipt = receipt_of(optimizer)
        assert faults.fired == 1
        assert (receipt.sequence, receipt.resumed) == (1, True)
        assert (receipt.outcome, receipt.step) == (("skipped_nonfinite", 1) if kind == "skipped" else ("applied", 2))
        if kind == "skipped":
            del scaled.grad_scale, scaled.found_inf
        twins.step(optimizer, 2)
        twins.assert_equal()


# --- what is discarded while a worker comes back


@pytest.mark.parametrize("accumulated", [False, True])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_push_is_resumed_though_another_workers_loss_has_discarded_some_of_it(
    server: Server,
    relay: Relay,
    faults: PushFaults,
    pushed: list[int],
    monkeypatch: pytest.MonkeyPatch,
    when: str,
    accumulated: bool,
) -> None:
    """Before the worker was told what is there, or between that and its push, which then owes what it has left out."""
    p, q = nn.Parameter(torch.zeros(SIZE)), nn.Parameter(torch.zeros(SIZE))
    far = Adam([p], lr=0.1, fused=True, server=relay.address, job="two", options=options(0, 2))
    near = Adam([q], lr=0.1, fused=True, server=server.address, job="two", options=options(1, 2))
    job = server.registry.get("two")
    faults.of(far)
    mine, other = job.members()
    # Half of another worker's push is in, added to what the first one brings.
    push_a_part(near, gradient(0, rank=1), messages=4)
    assert eventually(lambda: job._aggregator.holds(other.worker, 2))
    owed: list[frozenset[int]] = []

    def lose_the_other() -> None:
        job.leave(other)
        owed.append(job._aggregator.owed(mine.worker))

    if accumulated:
        p.grad = gradient(1)
        far.accumulate()
    if when == "before":

        def cut() -> None:
            lose_the_other()
            relay.cut()

        faults.before_sending(6, cut)
    else:
        faults.before_sending(6, relay.cut)
        after_return(monkeypatch, far, lose_the_other)
    pushed.clear()
    p.grad = gradient(0)
    far.step()
    assert faults.fired == 1
    assert owed == [frozenset({0, 1, 2})]
    assert receipt_of(far).contributors == (0,)
    twin = nn.Parameter(torch.zeros(SIZE))
    twin.grad = gradient(1) + gradient(0) if accumulated else gradient(0)
    torch.optim.Adam([twin], lr=0.1, fused=True).step()
    assert torch.equal(p, twin)
    # What is held of accumulated gradients the server adds again by itself.
    again = [] if accumulated and when == "after" else [0, 1, 2]
    assert sorted(pushed) == sorted([*range(BUCKETS), *again])
    far.close()
    near.close()


def push_a_part(optimizer: Adam, grad: torch.Tensor, *, messages: int) -> None:
    """Has the first messages of a push go out, and no more."""
    from optimd.client.pushes import push_messages
    from optimd.v1 import training_pb2

    session = optimizer._open_session()
    (parameter,) = optimizer.param_groups[0]["params"]
    parameter.grad = grad
    push = optimizer._push(session, [parameter])
    begin = training_pb2.StepBegin(sequence=session.next_sequence, base_step=session.job_step, group_count=1)
    session._line.usable().send(list(push_messages(session._line.layout, push, begin, [], []))[:messages])


def test_a_push_is_resumed_though_its_step_was_given_up_meanwhile(
    server: Server, relay: Relay, faults: PushFaults, pushed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of it was there when the worker was told, and nothing is when it goes on: it is asked for all of it."""
    asked = {"aggregation": Sync(on_loss="wait", timeout_s=3.0)}
    p, q = nn.Parameter(torch.zeros(SIZE)), nn.Parameter(torch.zeros(SIZE))
    far = Adam([p], lr=0.1, fused=True, server=relay.address, job="two", options=options(0, 2, **asked))
    near = Adam([q], lr=0.1, fused=True, server=server.address, job="two", options=options(1, 2, **asked))
    job = server.registry.get("two")
    faults.of(far)
    mine = job.members()[0].worker

    def step_near() -> None:
        q.grad = gradient(0, rank=1)
        near.step()

    runner = threading.Thread(target=step_near)

    def give_up() -> None:
        assert job._aggregator.has_ended(mine)
        assert eventually(lambda: not job._aggregator.is_open)
        runner.start()

    faults.before_reading(0, relay.cut, done=MESSAGES - 1)
    after_return(monkeypatch, far, give_up)
    p.grad = gradient(0)
    far.step()
    runner.join(20)
    assert faults.fired == 1
    # Twice this worker's, and the other's.
    assert sorted(pushed) == sorted([*range(BUCKETS)] * 3)
    assert receipt_of(far).contributors == (0, 1)
    twin = nn.Parameter(torch.zeros(SIZE))
    twin.grad = (gradient(0) + gradient(0, rank=1)) / 2
    torch.optim.Adam([twin], lr=0.1, fused=True).step()
    assert torch.equal(p, twin)
    assert torch.equal(q, twin)
    far.close()
    near.close()


# --- values that the program has written


class Written:
    """Two parameters, of which the second never has a gradient, stepped remotely and by torch's own Adam."""

    def __init__(self) -> None:
        self.ours = [nn.Parameter(torch.zeros(SIZE)) for _ in range(2)]
        self.theirs = [nn.Parameter(torch.zeros(SIZE)) for _ in range(2)]
        self.local = torch.optim.Adam(self.theirs, lr=0.1, fused=True)

    def write(self, value: float) -> None:
        with torch.no_grad():
            for parameter in (*self.ours, *self.theirs):
                parameter.add_(value)

    def step(self, remote: Adam, number: int) -> None:
        self.ours[0].grad, self.theirs[0].grad = gradient(number), gradient(number)
        remote.step()
        self.local.step()

    def assert_equal(self, remote: Adam) -> None:
        """In the worker and on the server."""
        assert all(map(torch.equal, self.ours, self.theirs))
        remote.pull_parameters()
        assert all(map(torch.equal, self.ours, self.theirs))


@pytest.mark.parametrize("mode", ["streaming", "atomic", "async"])
def test_written_values_are_pushed_though_the_server_was_started_again_before_the_step(
    server: Server, relay: Relay, mode: str
) -> None:
    """It sends all values anew, and the job is where the worker was: what the program wrote is what counts."""
    pair = Written()
    with Adam(pair.ours, lr=0.1, fused=True, server=relay.address, job="w", options=of_mode(mode)) as optimizer:
        pair.step(optimizer, 0)
        pair.write(3.0)
        restart_where_it_was(relay, server.registry.get("w"))
        pair.step(optimizer, 1)
        assert receipt_of(optimizer).outcome == "applied"
        pair.assert_equal(optimizer)
        pair.write(5.0)
        restart_where_it_was(relay, server.registry.get("w"))
        # Another call meets the break.
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3))]})
        pair.step(optimizer, 2)
        pair.assert_equal(optimizer)


@pytest.mark.parametrize("recovers", [False, True])
@pytest.mark.parametrize("mode", ["streaming", "atomic", "async"])
def test_written_values_survive_a_break_at_any_message_of_the_step_that_brings_them(
    server: Server, relay: Relay, faults: PushFaults, mode: str, recovers: bool
) -> None:
    """While they are on their way, while the gradients are, and when some of the answer has been read."""
    pair = Written()
    with Adam(pair.ours, lr=0.1, fused=True, server=relay.address, job="w", options=of_mode(mode)) as optimizer:
        job = server.registry.get("w")
        faults.of(optimizer)
        # StepBegin, what is brought, its buckets, those of the gradients, StepEnd.
        messages = 2 + 2 * BUCKETS + BUCKETS + 1

        def act() -> None:
            if recovers:
                restart_where_it_was(relay, job)
            else:
                relay.cut()

        points: list[Callable[[], None]] = [
            *(
                lambda number=number: faults.before_sending(number, act)
                for number in (0, 1, 2, 15, 22, 25, messages - 1)
            ),
            *(lambda number=number: faults.before_reading(number, act, done=messages) for number in (0, 4, BUCKETS)),
        ]
        for number, fault in enumerate(points):
            fault()
            pair.write(2.0 + number)
            pair.step(optimizer, number)
            assert faults.is_over
            assert (receipt_of(optimizer).step, receipt_of(optimizer).resumed) == (number + 1, True)
            pair.assert_equal(optimizer)
        assert faults.fired == len(points)


def test_written_values_are_brought_again_to_a_server_that_has_gone_back_to_the_steps_beginning(
    server: Server, relay: Relay, faults: PushFaults
) -> None:
    """Some new parameters had been read into the very tensors. The job is where the worker was, and holds nothing."""
    pair = Written()
    with Adam(pair.ours, lr=0.1, fused=True, server=relay.address, job="w", options=options()) as optimizer:
        faults.of(optimizer)
        pair.step(optimizer, 0)
        disk = Disk(server.registry.get("w"))
        pair.write(3.0)
        faults.before_reading(4, lambda: disk.restart(relay), done=2 + 2 * BUCKETS + 6)
        pair.step(optimizer, 1)
        assert faults.fired == 1
        assert (receipt_of(optimizer).step, receipt_of(optimizer).outcome) == (2, "applied")
        pair.assert_equal(optimizer)


@pytest.mark.parametrize("call", ["step", "accumulate"])
def test_written_values_are_replaced_where_a_synchronous_job_has_gone_on_and_that_is_said(
    quick_server: Server, call: str
) -> None:
    """They were written over values that are old. Nothing of them reaches the job."""
    p, q = nn.Parameter(torch.zeros(SIZE)), nn.Parameter(torch.zeros(SIZE))
    with Relay(quick_server.address) as relay:
        far = Adam([p], lr=0.1, server=relay.address, job="late", options=options(0, 2))
        near = Adam([q], lr=0.1, server=quick_server.address, job="late", options=options(1, 2))
        p.grad, q.grad = gradient(0), gradient(0)
        in_threads(lambda rank: (far, near)[rank].step(), 2)
        caretaker.forget(far._open_session()._line)
        relay.cut()
        near.step()
        with torch.no_grad():
            p.fill_(7.0)
        if call == "step":
            with pytest.warns(UserWarning, match="had gone on to step 2 without this worker: values"):
                far.step()
            assert receipt_of(far).outcome == "dropped_late"
        else:
            with (
                pytest.warns(UserWarning, match="had gone on to step 2 without this worker: its values"),
                pytest.raises(AccumulationLostError, match="went on to step 2"),
            ):
                far.accumulate()
        assert torch.equal(p, q)
        p.grad, q.grad = gradient(1), gradient(1)
        in_threads(lambda rank: (far, near)[rank].step(), 2)
        assert receipt_of(far).outcome == "merged"
        assert torch.equal(p, q)
        assert (p < 6).all()
        far.close()
        near.close()


def test_a_worker_that_comes_back_to_leave_has_its_parameters_left_alone(quick_server: Server) -> None:
    """It leaves, so that nobody waits for it, and takes no values for that: the program is done with them."""
    p, q = nn.Parameter(torch.zeros(SIZE)), nn.Parameter(torch.zeros(SIZE))
    with Relay(quick_server.address) as relay:
        far = Adam([p], lr=0.1, server=relay.address, job="left", options=options(0, 2))
        near = Adam([q], lr=0.1, server=quick_server.address, job="left", options=options(1, 2))
        p.grad, q.grad = gradient(0), gradient(0)
        in_threads(lambda rank: (far, near)[rank].step(), 2)
        before = p.detach().clone()
        caretaker.forget(far._open_session()._line)
        relay.cut()
        near.step()
        assert not torch.equal(p, q)
        far.close()
        assert torch.equal(p, before)
        job = quick_server.registry.get("left")
        assert eventually(lambda: job.worker_count == 1)
        near.close()


def test_values_that_are_lost_on_the_way_to_a_worker_that_comes_back_are_sent_again(
    server: Server, relay: Relay, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another worker's push is half applied, so that the job stands at the step that the returner was at."""
    from optimd.client.connection import TrainStream

    p, q = nn.Parameter(torch.zeros(SIZE)), nn.Parameter(torch.zeros(SIZE))
    far = Adam([p], lr=0.1, server=relay.address, job="half", options=asynchronous(0))
    near = Adam([q], lr=0.1, server=server.address, job="half", options=asynchronous(1))
    job = server.registry.get("half")
    other = job.members()[1].worker
    far.pull_parameters()
    push_a_part(near, gradient(0), messages=1 + BUCKETS)
    assert eventually(lambda: job._aggregator.holds(other, BUCKETS - 1))
    relay.cut()
    # The values are all sent, and when one of them has been read the line breaks again.
    receive, received = TrainStream.receive, list[str]()

    def cutting(stream: TrainStream) -> Any:
        if received.count("bucket") == 1:
            received.clear()
            monkeypatch.setattr(TrainStream, "receive", receive)
            relay.cut()
            raise ConnectionLostError("the line was cut")
        message = receive(stream)
        if stream is far._open_session()._line._stream:
            received.append(message[0])
        return message

    monkeypatch.setattr(TrainStream, "receive", cutting)
    line = far._open_session()._line
    assert eventually(lambda: line._stream is None or line._stream.has_ended)
    line.usable()
    assert relay.cuts >= 2
    assert (far.job_step, job.step) == (0, 0)
    (value,) = job.store._values
    assert (value != 0).all()
    assert torch.equal(p, value)
    near._open_session()._line.usable().cancel()
    near.close()
    far.close()


# --- hyperparameters


@pytest.mark.parametrize("recovers", [False, True])
def test_a_scheduler_that_steps_around_breaks_has_its_learning_rates_hold(
    server: Server, relay: Relay, faults: PushFaults, recovers: bool
) -> None:
    """Between two steps, in the middle of one, and where only the answer is lost and the next rate is the old one."""
    twins = Twins()
    with Adam([twins.ours], lr=0.1, fused=True, server=relay.address, job="h", options=options()) as optimizer:
        job = server.registry.get("h")
        faults.of(optimizer)

        def break_off() -> None:
            if recovers:
                restart_where_it_was(relay, job)
            else:
                relay.cut()

        for number, lr in enumerate((0.1, 0.05, 0.02, 0.1, 0.07, 0.1, 0.03)):
            for each in (optimizer, twins.local):
                each.param_groups[0]["lr"] = lr
            match number:
                case 2:
                    break_off()
                case 3:
                    faults.before_sending(5, break_off)
                case 4 | 6:
                    faults.before_reading(2, break_off, done=MESSAGES)
            twins.step(optimizer, number)
            assert faults.is_over
            twins.assert_equal()
            assert job.groups[0]["lr"] == lr
        assert faults.fired == 3


def test_options_that_a_recovered_job_does_not_know_are_those_the_worker_says_it_had(
    server: Server, relay: Relay
) -> None:
    """Its last ones were told with a step that only another worker's options held for: they are on no disk."""
    parameters = [nn.Parameter(torch.zeros(4)) for _ in range(2)]
    optimizers = [
        Adam([parameters[rank]], lr=1.0, server=relay.address, job="o", options=options(rank, 2)) for rank in range(2)
    ]
    job = server.registry.get("o")

    def step(rank: int) -> None:
        parameters[rank].grad = torch.ones(4)
        optimizers[rank].step()

    optimizers[0].param_groups[0]["lr"] = 0.5
    optimizers[1].param_groups[0]["lr"] = 0.25
    with pytest.warns(UserWarning, match="param_groups differ"):
        in_threads(step, 2)
    assert job.groups[0]["lr"] == 0.5
    restart_where_it_was(relay, job)
    in_threads(step, 2)
    assert [member.groups[0]["lr"] for member in job.members()] == [0.5, 0.25]
    optimizers[0].close()
    assert eventually(lambda: job.worker_count == 1)
    step(1)
    assert job.groups[0]["lr"] == 0.25
    assert torch.allclose(parameters[1], torch.full((4,), -1.25))
    optimizers[1].close()


# --- servers that come back


def test_a_server_that_is_started_again_at_its_address_is_found_and_training_goes_on() -> None:
    """With the job as it was, as it would have it from disk: nothing of the run changes."""
    twins = Twins()
    with running_server() as first:
        optimizer = Adam([twins.ours], lr=0.1, fused=True, server=first.address, options=options())
        twins.step(optimizer, 0)
        (job,) = first.registry.all()
    assert first.registry.all() == [job]
    found = threading.Event()

    def step() -> None:
        twins.step(optimizer, 1)
        found.set()

    runner = threading.Thread(target=step)
    runner.start()
    # It tries while nobody listens, as where a server reads its journal first.
    assert not found.wait(0.5)
    with running_server(address=first.address) as second:
        job.pushing._draining = False
        second.registry._jobs[job.name] = job
        runner.join(20)
        assert found.is_set()
        assert receipt_of(optimizer).step == job.step == 2
        twins.assert_equal()
        optimizer.close()


def test_a_worker_is_told_that_the_server_has_come_back_without_its_job() -> None:
    """At once: nothing that it could wait for would bring it back."""
    p = nn.Parameter(torch.zeros(4))
    with server_process() as (process, address):
        optimizer = Adam([p], server=address, job="gone", options=options(retry_timeout_s=60))
        p.grad = torch.ones(4)
        optimizer.step()
        process.kill()
        process.wait(10)
        with server_process(f"--address={address}"):
            p.grad = torch.ones(4)
            for _ in range(2):
                with pytest.raises(JobDeletedError, match="the server was started again and has not kept it"):
                    optimizer.step()
            optimizer.close()


@pytest.mark.parametrize("error", [StorageFailedError, ShuttingDownError])
def test_a_push_that_the_server_cannot_take_just_now_is_made_again_until_it_can(
    server: Server, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    """The worker stays in its private job, and the job on the server."""
    twins, original, failures = Twins(), Pushing.end, [3]

    def failing(self: Pushing, *args: Any, **more: Any) -> None:
        if failures[0]:
            failures[0] -= 1
            raise error("there is no space left on the device")
        original(self, *args, **more)

    with Adam([twins.ours], lr=0.1, fused=True, server=server.address, options=options()) as optimizer:
        twins.step(optimizer, 0)
        monkeypatch.setattr(Pushing, "end", failing)
        twins.step(optimizer, 1)
        assert failures == [0]
        assert (receipt_of(optimizer).step, receipt_of(optimizer).resumed) == (2, True)
        twins.assert_equal()


def test_a_worker_whose_pushes_are_not_taken_gives_up_in_time_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    """Though it comes back to its job each time: that is no answer to what it asks."""
    p, tries = nn.Parameter(torch.zeros(4)), list[int]()

    def failing(*_: Any, **__: Any) -> None:
        tries.append(len(tries))
        raise StorageFailedError("there is no space left on the device")

    with running_server(drain_timeout_s=0.1) as server:
        optimizer = Adam([p], server=server.address, job="full", options=options(retry_timeout_s=1))
        monkeypatch.setattr(Pushing, "end", failing)
        p.grad = torch.ones(4)
        with pytest.raises(ConnectionLostError, match="there is no space left on the device, and was not answered"):
            optimizer.step()
        assert len(tries) > 2
        assert server.registry.get("full").step == 0
        optimizer.close()


# --- snapshots


def test_a_snapshot_is_refused_by_a_server_that_keeps_nothing_on_disk(server: Server) -> None:
    """By name, and training goes on."""
    p = nn.Parameter(torch.zeros(4))
    with Adam([p], server=server.address, job="s", options=options()) as optimizer:
        with pytest.raises(NotDurableError, match="start it with --data-dir"):
            optimizer.snapshot()
        p.grad = torch.ones(4)
        optimizer.step()
        server.registry.delete("s", force=True)
        with pytest.raises(UnknownJobError):
            optimizer.snapshot()


def test_a_snapshot_tells_its_step_and_is_asked_for_again_where_the_line_breaks(
    server: Server, relay: Relay, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or the server cannot write it just now."""
    p, asked = nn.Parameter(torch.zeros(4)), list[str]()

    def snapshot(_: JobRegistry, name: str) -> SnapshotInfo:
        asked.append(name)
        if len(asked) == 1:
            relay.cut()
        if len(asked) == 2:
            raise StorageFailedError("there is no space left on the device")
        return SnapshotInfo(folder=Path("s/snapshots/7"), step=7, position=0, replay_from=0, nbytes=1)

    monkeypatch.setattr(JobRegistry, "snapshot", snapshot)
    with Adam([p], server=relay.address, job="s", options=options()) as optimizer:
        assert optimizer.snapshot() == 7
        assert asked == ["s"] * 3
        with optimizer.register_server_step_hook(lambda given, _: given.snapshot()):
            p.grad = torch.ones(4)
            with pytest.raises(RuntimeError, match=r"snapshot\(\) was called in a server step hook"):
                optimizer.step()
    assert relay.cuts


# --- what travels narrowed


@pytest.mark.parametrize("wire", [torch.bfloat16, torch.float16], ids=str)
def test_a_worker_that_comes_back_has_the_values_that_steps_would_have_given_it(
    server: Server, relay: Relay, wire: torch.dtype
) -> None:
    """It is sent all of them with all of their bits: of what had come rounded, and has not changed since, as well.

    What no step has changed has all of its bits still, as if its line had held.
    """

    def pair() -> list[nn.Parameter]:
        generator = torch.Generator().manual_seed(3)
        return [nn.Parameter(torch.randn(SIZE, generator=generator)) for _ in range(3)]

    ours, others, twins = pair(), pair(), pair()
    local = torch.optim.Adam(twins, lr=0.1, fused=True)
    far = Adam(ours, lr=0.1, fused=True, server=relay.address, job="b", options=asynchronous(0, wire_dtype=wire))
    near = Adam(others, lr=0.1, fused=True, server=server.address, job="b", options=asynchronous(1))
    with far, near:

        def step(optimizer: Adam, params: list[nn.Parameter], number: int, changed: tuple[int, ...]) -> None:
            narrow = wire if optimizer is far else torch.float32
            for index, (p, twin) in enumerate(zip(params, twins, strict=True)):
                p.grad = gradient(3 * number + index) if index in changed else None
                twin.grad = None if p.grad is None else p.grad.to(narrow).float()
            optimizer.step()
            local.step()

        step(far, ours, 0, (0, 1))
        relay.cut()
        step(near, others, 1, (0,))
        step(far, ours, 2, (0,))
        for p, twin in zip(ours[:2], twins[:2], strict=True):
            assert torch.equal(p, twin.detach().to(wire).float())
        assert torch.equal(ours[2], twins[2])
        assert not torch.equal(twins[2], twins[2].detach().to(wire).float())


@pytest.mark.parametrize("answered", [False, True])
def test_what_a_worker_has_written_is_in_its_step_and_the_rest_keeps_its_bits_though_its_line_was_cut(
    server: Server, relay: Relay, faults: PushFaults, answered: bool
) -> None:
    """Before the push's last message, when it is begun anew with the values that it brought; and before its answer."""
    twins = Twins(torch.bfloat16)
    asked = options(wire_dtype=torch.bfloat16, apply="streaming")
    with Adam([twins.ours], lr=0.1, fused=True, server=relay.address, job="b", options=asked) as optimizer:
        faults.of(optimizer)
        for number in range(4):
            with torch.no_grad():
                twins.ours[7], twins.theirs[7] = 1 / 3, 1 / 3
            messages = MESSAGES + 1 + BUCKETS
            if answered:
                faults.before_reading(number, relay.cut, done=messages)
            else:
                faults.before_sending(messages - 1, relay.cut)
            twins.step(optimizer, number)
            assert faults.is_over
            twins.assert_equal()
        assert faults.fired == 4
        optimizer.pull_parameters()
        assert torch.equal(twins.ours, twins.theirs)
