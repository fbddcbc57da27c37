"""Who is in a job: places, leases, lines that break, and processes that take each other's place."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from optimd.client import (
    AccumulationLostError,
    Adam,
    Async,
    ConfigurationError,
    JobDeletedError,
    LimitExceededError,
    NonFiniteGradientError,
    ProxyOptions,
    StepReceipt,
    SupersededError,
    Sync,
    WorkerInUseError,
)
from optimd.client.caretaker import caretaker
from optimd.server import Server
from tests.relay import Relay
from tests.support import assert_equal_parameters, eventually, in_threads, running_server


def options(rank: int, world_size: int = 2, **more: Any) -> ProxyOptions:
    return ProxyOptions(rank=rank, world_size=world_size, bucket_bytes=1024, retry_timeout_s=20, **more)


def gradient(rank: int, step: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1000 * rank + step))


def receipt_of(optimizer: Adam) -> StepReceipt:
    assert optimizer.last_receipt is not None
    return optimizer.last_receipt


@pytest.fixture
def relay(quick_server: Server) -> Iterator[Relay]:
    with Relay(quick_server.address) as running:
        yield running


# --- lines that break


def test_a_line_that_breaks_between_two_steps_is_taken_up_again(quick_server: Server, relay: Relay) -> None:
    """The private job is still there, nothing is sent that the worker has, and the bits are torch's."""
    ours, theirs = nn.Linear(30, 20), nn.Linear(30, 20)
    theirs.load_state_dict(ours.state_dict())
    local = torch.optim.Adam(theirs.parameters(), fused=True)
    with Adam(ours.parameters(), fused=True, server=relay.address, options=ProxyOptions(retry_timeout_s=20)) as remote:
        for step in range(6):
            for module, optimizer in ((ours, remote), (theirs, local)):
                optimizer.zero_grad()
                module(gradient(0, step, 8, 30)).square().sum().backward()
                optimizer.step()
            # Broken before the third and the fifth step.
            assert (receipt_of(remote).sequence, receipt_of(remote).outcome) == (step, "applied")
            if step in (1, 3):
                relay.cut()
        assert relay.cuts >= 2
        assert_equal_parameters(ours, theirs)
    assert eventually(lambda: not quick_server.registry.all())


@pytest.mark.parametrize("apply", ["streaming", "atomic"])
def test_a_push_in_whose_middle_the_line_breaks_is_taken_up_where_it_was(
    quick_server: Server, relay: Relay, monkeypatch: pytest.MonkeyPatch, apply: Any
) -> None:
    """What the server has of it is applied once, the rest is sent again, and the receipt says that it was resumed."""
    from optimd.client import statetransfer
    from optimd.wire import bundles

    # So that the server has each message before the next one is made.
    monkeypatch.setattr(bundles, "BUNDLE_BYTES", 0)
    original, pushed = statetransfer.bucket_message, list[int]()

    def cutting(kind: str, bucket: Any, *rest: Any) -> bytes:
        if kind == "gradient":
            pushed.append(bucket.bucket_id)
            if len(pushed) in (5, 21):
                job = quick_server.registry.get("cut")
                # Asserts that the fault is where it is meant to be: a part of the push is in.
                assert eventually(lambda: any(job._aggregator.holds(worker, 1) for worker in job._aggregator.live))
                relay.cut()
        return original(kind, bucket, *rest)

    p, twin = nn.Parameter(torch.zeros(2500)), nn.Parameter(torch.zeros(2500))
    local = torch.optim.Adam([twin], lr=0.1, fused=True)
    resumed = []
    asked = options(0, 1, apply=apply)
    with Adam([p], lr=0.1, fused=True, server=relay.address, job="cut", options=asked) as remote:
        monkeypatch.setattr(statetransfer, "bucket_message", cutting)
        for step in range(4):
            p.grad = gradient(0, step, 2500)
            twin.grad = p.grad.clone()
            remote.step()
            local.step()
            resumed.append(receipt_of(remote).resumed)
            assert (receipt_of(remote).step, receipt_of(remote).sequence) == (step + 1, step)
        assert torch.equal(p, twin)
    assert relay.cuts >= 2
    assert resumed.count(True) == 2


def test_a_push_whose_receipt_is_lost_is_applied_once_and_gets_that_receipt(quick_server: Server, relay: Relay) -> None:
    """The server had committed it; the worker is told what became of it then, and has the parameters."""
    parameters = [nn.Parameter(torch.zeros(700)) for _ in range(2)]
    far = Adam([parameters[0]], lr=0.1, server=relay.address, job="lost", options=options(0))
    near = Adam([parameters[1]], lr=0.1, server=quick_server.address, job="lost", options=options(1))
    job = quick_server.registry.get("lost")

    def step(rank: int) -> None:
        parameters[rank].grad = gradient(rank, 0, 700)
        (far, near)[rank].step()

    relay.hold(up=False)
    runner = threading.Thread(target=step, args=(0,))
    runner.start()
    step(1)
    assert job.step == 1
    relay.cut()
    relay.pass_on()
    runner.join(20)
    assert not runner.is_alive()
    receipt = receipt_of(far)
    assert (receipt.step, receipt.outcome, receipt.contributors, receipt.resumed) == (1, "merged", (0, 1), True)
    assert (far.job_step, far.next_sequence) == (1, 1)
    assert torch.equal(*parameters)
    in_threads(step, 2)
    assert job.step == 2
    assert torch.equal(*parameters)
    far.close()
    near.close()


def test_gradients_that_are_held_survive_a_broken_line_and_are_added_once(quick_server: Server, relay: Relay) -> None:
    """`accumulate()` takes the line up again too."""
    p, twin = nn.Parameter(torch.zeros(700)), nn.Parameter(torch.zeros(700))
    local = torch.optim.Adam([twin], lr=0.1, fused=True)
    with Adam([p], lr=0.1, fused=True, server=relay.address, options=ProxyOptions(retry_timeout_s=20)) as remote:
        total = torch.zeros(700)
        for micro in range(3):
            p.grad = gradient(0, micro, 700)
            total = total + p.grad
            remote.accumulate()
            relay.cut()
        p.grad = None
        remote.step()
        twin.grad = total
        local.step()
        assert torch.equal(p, twin)
        assert receipt_of(remote).sequence == 0
    assert relay.cuts >= 3


def test_values_that_were_written_before_the_line_broke_are_pushed_all_the_same(
    quick_server: Server, relay: Relay
) -> None:
    """In an asynchronous job, where others have gone on meanwhile: the last writer wins."""
    p, q = nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(4))
    asked = [ProxyOptions(rank=rank, worker_id=f"w{rank}", aggregation=Async()) for rank in range(2)]
    with (
        Adam([p], lr=1.0, server=relay.address, job="written", options=asked[0]) as first,
        Adam([q], lr=1.0, server=quick_server.address, job="written", options=asked[1]) as second,
    ):
        p.grad = torch.ones(4)
        first.step()
        with torch.no_grad():
            p.fill_(50.0)
        relay.cut()
        q.grad = torch.ones(4)
        second.step()
        p.grad = torch.zeros(4)
        first.step()
        assert (p > 40).all()
        second.pull_parameters()
        assert torch.equal(p, q)


def test_a_worker_of_which_nothing_is_heard_is_left_out_and_learns_where_it_stands(
    quick_server: Server, relay: Relay, caplog: pytest.LogCaptureFixture
) -> None:
    """Its bytes and its heartbeats stand still for longer than its lease, in the middle of its step."""
    parameters = [nn.Parameter(torch.zeros(700)) for _ in range(2)]
    far = Adam([parameters[0]], lr=0.1, server=relay.address, job="still", options=options(0))
    near = Adam([parameters[1]], lr=0.1, server=quick_server.address, job="still", options=options(1))
    job = quick_server.registry.get("still")

    def step(rank: int) -> None:
        parameters[rank].grad = gradient(rank, 0, 700)
        (far, near)[rank].step()

    in_threads(step, 2)
    relay.hold()
    runner = threading.Thread(target=step, args=(0,))
    runner.start()
    for _ in range(3):
        step(1)
    assert "rank 0" in caplog.text
    assert "its lease has ended" in caplog.text
    assert job.step == 4
    assert receipt_of(near).contributors == (1,)
    relay.pass_on()
    runner.join(20)
    late = receipt_of(far)
    assert (late.outcome, late.step, late.staleness, late.resumed) == ("dropped_late", 4, 3, True)
    assert torch.equal(*parameters)
    in_threads(step, 2)
    assert (receipt_of(far).outcome, receipt_of(far).contributors) == ("merged", (0, 1))
    assert torch.equal(*parameters)
    far.close()
    near.close()


def test_a_worker_that_comes_back_says_what_it_said(quick_server: Server, relay: Relay) -> None:
    """Its learning rate holds though its lease had ended: it is no newcomer."""
    parameters = [nn.Parameter(torch.zeros(4)) for _ in range(2)]
    far = Adam([parameters[0]], lr=1.0, server=relay.address, job="said", options=options(0))
    near = Adam([parameters[1]], lr=1.0, server=quick_server.address, job="said", options=options(1))

    def step(rank: int) -> None:
        parameters[rank].grad = torch.ones(4)
        (far, near)[rank].step()

    far.param_groups[0]["lr"] = 0.5
    near.param_groups[0]["lr"] = 0.5
    in_threads(step, 2)
    caretaker.forget(far._open_session()._line)
    relay.cut()
    assert eventually(lambda: quick_server.registry.get("said").worker_count == 1)
    near.param_groups[0]["lr"] = 0.125
    step(1)
    assert torch.allclose(parameters[1], torch.full((4,), -0.625))
    step(0)
    assert receipt_of(far).outcome == "dropped_late"
    with pytest.warns(UserWarning, match="param_groups differ"):
        in_threads(step, 2)
    assert torch.allclose(parameters[0], torch.full((4,), -1.125))
    assert receipt_of(far).hyperparameters_disagreed
    far.close()
    near.close()


def test_a_job_that_is_gone_is_not_made_anew_by_a_worker_that_comes_back(quick_server: Server, relay: Relay) -> None:
    """It would start from the worker's parameters and an empty state, without a word."""
    p = nn.Parameter(torch.zeros(4))
    optimizer = Adam([p], server=relay.address, job="gone", options=options(0, 1))
    p.grad = torch.ones(4)
    optimizer.step()
    relay.cut()
    quick_server.registry.delete("gone", force=True)
    with pytest.raises(JobDeletedError, match="not on this server any more"):
        optimizer.step()
    with Adam([nn.Parameter(torch.zeros(4))], server=quick_server.address, job="gone", options=options(0, 1)) as other:
        assert not other.resumed
    optimizer.close()


# --- one process in another's place


def test_a_second_process_that_claims_a_live_workers_id_is_refused_when_that_is_heard_of(quick_server: Server) -> None:
    """And so is one that claims its rank. The first one is not disturbed."""
    p = nn.Parameter(torch.zeros(4))
    with Adam([p], server=quick_server.address, job="mine", options=options(0, worker_id="me")) as optimizer:
        with pytest.raises(WorkerInUseError, match="worker_id 'me' is in job 'mine' already"):
            Adam([nn.Parameter(torch.zeros(4))], server=quick_server.address, job="mine", options=claim("me", 1))
        with pytest.raises(WorkerInUseError, match="rank 0 is in job 'mine' already, as worker_id 'me'"):
            Adam([nn.Parameter(torch.zeros(4))], server=quick_server.address, job="mine", options=claim("you", 0))
        with Adam([nn.Parameter(torch.zeros(4))], server=quick_server.address, job="mine", options=claim("you", 1)):
            pass
        p.grad = torch.ones(4)
        optimizer.step()
        assert optimizer.job_step == 1


def claim(worker_id: str, rank: int) -> ProxyOptions:
    # Names are this process's own business: another one would have the same.
    from optimd.client.placement import names

    names.give_back("mine", worker_id)
    return options(rank, worker_id=worker_id)


def test_a_process_whose_line_is_broken_is_replaced_at_once_and_fenced_for_ever(
    server: Server,
) -> None:
    """Its successor goes on at its next sequence number; whatever it still tries, it is told that it was replaced."""
    from optimd.client.placement import names

    with Relay(server.address) as relay:
        parameters = [nn.Parameter(torch.zeros(4)) for _ in range(3)]
        old = Adam([parameters[0]], server=relay.address, job="one", options=options(0, worker_id="w"))
        other = Adam([parameters[1]], server=server.address, job="one", options=options(1))
        optimizers = [old, other]

        def step(rank: int) -> None:
            (parameter,) = optimizers[rank].param_groups[0]["params"]
            parameter.grad = torch.ones(4)
            optimizers[rank].step()

        in_threads(step, 2)
        relay.cut()
        assert eventually(lambda: not all(member.alive for member in server.registry.get("one").members()))
        names.give_back("one", "w")
        started = time.monotonic()
        new = Adam([parameters[2]], server=server.address, job="one", options=options(0, worker_id="w"))
        assert time.monotonic() - started < server.registry.get("one").lease_s
        assert (new.next_sequence, new.job_step, new.resumed) == (1, 1, True)
        for _ in range(2):
            with pytest.raises((SupersededError, ConnectionError), match="another process has taken worker_id 'w'"):
                old.step()
        optimizers[0] = new
        in_threads(step, 2)
        assert receipt_of(new).contributors == (0, 1)
        assert torch.equal(parameters[1], parameters[2])
        for optimizer in (old, new, other):
            optimizer.close()


def test_a_stopped_process_is_replaced_when_its_lease_has_ended_and_learns_of_it(
    quick_server: Server, relay: Relay
) -> None:
    """Its line is up as far as anybody knows: its successor waits for as long as it might still answer."""
    from optimd.client.placement import names

    p, q = nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(4))
    old = Adam([p], server=relay.address, job="slow", options=options(0, 1, worker_id="w"))
    p.grad = torch.ones(4)
    old.step()
    relay.hold()
    names.give_back("slow", "w")
    new = Adam([q], server=quick_server.address, job="slow", options=options(0, 1, worker_id="w"))
    q.grad = torch.ones(4)
    new.step()
    assert (new.job_step, receipt_of(new).sequence) == (2, 1)
    relay.pass_on()
    with pytest.raises(SupersededError, match="another process has taken worker_id 'w'"):
        old.step()
    new.close()
    old.close()


@pytest.mark.parametrize("deterministic", [False, True])
def test_with_on_loss_wait_a_dead_workers_push_is_completed_by_its_successor(
    quick_server: Server, relay: Relay, deterministic: bool
) -> None:
    """Bit for bit as if nothing had been: its part of the buckets that had come is kept, the rest is computed again."""
    from optimd.client.placement import names
    from optimd.client.pushes import push_messages
    from optimd.v1 import training_pb2

    asked = {"aggregation": Sync(on_loss="wait", deterministic=deterministic)}
    parameters = [nn.Parameter(torch.zeros(2500)) for _ in range(3)]
    doomed = Adam([parameters[0]], lr=0.1, server=relay.address, job="w", options=options(0, worker_id="d", **asked))
    other = Adam([parameters[1]], lr=0.1, server=quick_server.address, job="w", options=options(1, **asked))
    job = quick_server.registry.get("w")
    optimizers = [doomed, other]

    def step(rank: int, number: int) -> None:
        (parameter,) = optimizers[rank].param_groups[0]["params"]
        parameter.grad = gradient(rank, number, 2500)
        optimizers[rank].step()

    in_threads(lambda rank: step(rank, 0), 2)
    # Half of the push goes out, then the process is as good as dead: its line breaks, and it never comes back.
    session = doomed._open_session()
    parameters[0].grad = gradient(0, 1, 2500)
    push = doomed._push(session, [parameters[0]])
    begin = training_pb2.StepBegin(sequence=1, base_step=1, group_count=1)
    messages = list(push_messages(session._line.layout, push, begin, [], []))
    session._line.usable().send(messages[:4])
    assert eventually(lambda: sum(job._aggregator.holds(w, 2) for w in job._aggregator.live) == 1)
    caretaker.forget(session._line)
    relay.cut()
    runner = threading.Thread(target=step, args=(1, 1))
    runner.start()
    assert eventually(lambda: job.worker_count == 1)
    runner.join(0.3)
    assert runner.is_alive()
    names.give_back("w", "d")
    mine = options(0, worker_id="d", **asked)
    successor = Adam([parameters[2]], lr=0.1, server=quick_server.address, job="w", options=mine)
    assert (successor.next_sequence, successor.job_step) == (1, 1)
    optimizers[0] = successor
    step(0, 1)
    runner.join(20)
    in_threads(lambda rank: step(rank, 2), 2)
    assert receipt_of(successor).contributors == (0, 1)
    twin = nn.Parameter(torch.zeros(2500))
    local = torch.optim.Adam([twin], lr=0.1, fused=True)
    for number in range(3):
        twin.grad = (gradient(0, number, 2500) + gradient(1, number, 2500)) / 2
        local.step()
    assert torch.equal(parameters[1], twin)
    assert torch.equal(parameters[2], twin)
    for optimizer in (doomed, successor, other):
        optimizer.close()


# --- coming and going


def test_elastic_workers_come_and_go_and_are_numbered_by_the_server(server: Server) -> None:
    """The first one does not wait, each that comes is in the next step, and a rank that is free is given again."""

    def join(name: str, parameter: nn.Parameter) -> Adam:
        asked = ProxyOptions(world_size="elastic", worker_id=name)
        return Adam([parameter], server=server.address, job="elastic", options=asked)

    def step(optimizer: Adam) -> tuple[int, ...]:
        (parameter,) = optimizer.param_groups[0]["params"]
        parameter.grad = torch.ones(4)
        optimizer.step()
        return receipt_of(optimizer).contributors

    parameters = [nn.Parameter(torch.zeros(4)) for _ in range(4)]
    first = join("a", parameters[0])
    assert (first.rank, step(first)) == (0, (0,))
    second, third = join("b", parameters[1]), join("c", parameters[2])
    assert (second.rank, third.rank, second.job_step) == (1, 2, 1)
    three = [first, second, third]
    assert in_threads(lambda rank: step(three[rank]), 3) == [(0, 1, 2)] * 3
    second.close()
    two = [first, third]
    assert in_threads(lambda rank: step(two[rank]), 2) == [(0, 2)] * 2
    fourth = join("d", parameters[3])
    assert fourth.rank == 1
    three = [first, fourth, third]
    assert in_threads(lambda rank: step(three[rank]), 3) == [(0, 1, 2)] * 3
    assert torch.equal(parameters[0], parameters[3])
    for optimizer in three:
        optimizer.close()
    again = join("c", parameters[2])
    assert again.rank == 2
    again.close()


def test_a_job_takes_no_more_workers_than_the_server_lets_it(server: Server) -> None:
    """The message names the flag. Other jobs have a limit of their own."""
    with running_server(max_job_workers=1) as small:
        asked = ProxyOptions(world_size="elastic", worker_id="a")
        with Adam([nn.Parameter(torch.zeros(4))], server=small.address, job="full", options=asked):
            more = ProxyOptions(world_size="elastic", worker_id="b")
            with pytest.raises(LimitExceededError, match="--max-job-workers"):
                Adam([nn.Parameter(torch.zeros(4))], server=small.address, job="full", options=more)
            with Adam([nn.Parameter(torch.zeros(4))], server=small.address, job="other", options=more) as other:
                assert other.rank == 0


@pytest.mark.parametrize(
    ("asked", "text"),
    [
        ({"aggregation": Sync(backup_workers=2), "rank": 0, "world_size": 2}, "must be less than world_size"),
        ({"aggregation": Sync(backup_workers=1), "world_size": "elastic"}, "must be less than world_size"),
        ({"rank": 0, "world_size": 2}, "need a common name"),
        ({"world_size": "elastic", "aggregation": Sync(world_size=2)}, "differ"),
    ],
)
def test_settings_that_contradict_each_other_are_refused_by_name(
    server: Server, asked: dict[str, Any], text: str
) -> None:
    """Before anything is opened."""
    with pytest.raises(ConfigurationError, match=text):
        Adam([nn.Parameter(torch.zeros(4))], server=server.address, options=ProxyOptions(**asked))


def test_server_step_hooks_are_told_of_every_step_across_a_broken_line(quick_server: Server, relay: Relay) -> None:
    """Once each, in order: the stream of steps is taken up again behind the last one that was told of."""
    p = nn.Parameter(torch.zeros(40))
    told: list[int] = []
    with Adam([p], server=relay.address, options=ProxyOptions(retry_timeout_s=20)) as optimizer:
        optimizer.register_server_step_hook(lambda _, receipt: told.append(receipt.step))
        for step in range(6):
            p.grad = gradient(0, step, 40)
            optimizer.step()
            if step in (1, 3):
                relay.cut()
    assert relay.cuts >= 2
    assert told == [1, 2, 3, 4, 5, 6]


# --- what a broken line must not do to what the worker has


def asynchronous(name: str) -> ProxyOptions:
    return ProxyOptions(rank=int(name[-1]), worker_id=name, aggregation=Async(), retry_timeout_s=20)


def test_values_that_come_with_a_new_line_are_not_pushed_back_as_the_programs(
    quick_server: Server, relay: Relay
) -> None:
    """Whichever call took the line up again: the others' progress would be undone. What the program wrote is kept."""
    p, q = (nn.Parameter(torch.zeros(40)) for _ in range(2))
    far = Adam([p], lr=0.5, server=relay.address, job="kept", options=asynchronous("w0"))
    near = Adam([q], lr=0.5, server=quick_server.address, job="kept", options=asynchronous("w1"))

    def others_go_on(steps: int) -> None:
        for _ in range(steps):
            q.grad = torch.ones(40)
            near.step()

    relay.cut()
    others_go_on(5)
    p.grad = torch.ones(40)
    far.accumulate()
    assert relay.cuts >= 1
    assert (p < -2).all()
    others_go_on(5)
    far.step()
    near.pull_parameters()
    assert (q < -4.5).all()
    assert torch.equal(p, q)
    with torch.no_grad():
        p.fill_(777.0)
    relay.cut()
    others_go_on(1)
    p.grad = torch.ones(40)
    far.accumulate()
    assert (p == 777).all()
    far.step()
    assert (p > 770).all()
    far.close()
    near.close()


def test_gradients_of_a_step_that_the_job_has_left_are_not_held_for_a_later_one(
    quick_server: Server, relay: Relay
) -> None:
    """A synchronous push of them would be dropped as late; so are they, by name."""
    parameters = [nn.Parameter(torch.zeros(4)) for _ in range(2)]
    far = Adam([parameters[0]], server=relay.address, job="old", options=options(0))
    near = Adam([parameters[1]], server=quick_server.address, job="old", options=options(1))

    def step(rank: int) -> None:
        parameters[rank].grad = torch.ones(4)
        (far, near)[rank].step()

    in_threads(step, 2)
    relay.hold()
    step(1)
    relay.cut()
    relay.pass_on()
    parameters[0].grad = torch.ones(4)
    with pytest.raises(AccumulationLostError, match="the job went on to step 2"):
        far.accumulate()
    assert torch.equal(*parameters)
    in_threads(step, 2)
    assert receipt_of(far).contributors == (0, 1)
    far.close()
    near.close()


def test_a_refused_step_and_then_a_broken_line_leave_a_worker_that_goes_on(relay: Relay) -> None:
    """What it has told of its options is known to it still."""
    p = nn.Parameter(torch.zeros(4))
    asked = ProxyOptions(nonfinite="error", retry_timeout_s=20)
    with Adam([p], lr=0.5, server=relay.address, options=asked) as optimizer:
        p.grad = torch.full((4,), float("nan"))
        with pytest.raises(NonFiniteGradientError):
            optimizer.step()
        relay.cut()
        optimizer.param_groups[0]["lr"] = 0.25
        p.grad = torch.ones(4)
        optimizer.step()
        assert torch.allclose(p, torch.full((4,), -0.25))


@pytest.mark.parametrize("messages", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("call", ["add", "load", "replace", "attach", "read"])
def test_a_line_that_breaks_in_the_middle_of_any_call_leaves_that_call_done(
    quick_server: Server, relay: Relay, monkeypatch: pytest.MonkeyPatch, call: str, messages: int
) -> None:
    """After as many messages of the server's. What was begun is taken back or found to be there, and made anew."""
    from optimd.client.connection import TrainStream

    p, q = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.ones(5))
    module = nn.BatchNorm1d(2)
    with Adam([p], lr=0.5, server=relay.address, options=ProxyOptions(retry_timeout_s=20)) as optimizer:
        p.grad = torch.ones(3)
        optimizer.step()
        state = optimizer.state_dict()
        state["param_groups"][0]["lr"] = 0.25
        received, original = [0], TrainStream.receive

        def cutting(stream: TrainStream) -> Any:
            message = original(stream)
            received[0] += 1
            if received[0] == messages:
                relay.cut()
            return message

        with monkeypatch.context() as patched:
            patched.setattr(TrainStream, "receive", cutting)
            match call:
                case "add":
                    optimizer.add_param_group({"params": [q], "lr": 0.125})
                case "load":
                    optimizer.load_state_dict(state)
                case "replace":
                    optimizer.param_groups[0]["params"] = [q]
                    q.grad = torch.ones(5)
                    optimizer.step()
                case "attach":
                    optimizer.attach_buffers(module)
                case "read":
                    relay.cut()
                    assert optimizer.state_dict()["state"][0]["step"] == 1
        for parameter in (p, q):
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        assert optimizer.param_groups[0]["lr"] == (0.25 if call == "load" else 0.5)
        if call == "load":
            assert torch.allclose(p, torch.full((3,), -0.75))
        if call == "add":
            assert torch.allclose(q, torch.full((5,), 0.875))
        if call == "replace":
            assert torch.allclose(q, torch.zeros(5), atol=1e-6)


def test_a_successor_in_a_half_push_has_its_gradients_unscaled(quick_server: Server) -> None:
    """It is another process: what its predecessor's were multiplied by went with that."""
    from optimd.client.placement import names

    asked = {"aggregation": Sync(on_loss="wait")}
    parameters = [nn.Parameter(torch.zeros(700)) for _ in range(3)]
    with Relay(quick_server.address) as relay:
        mine = options(0, worker_id="d", **asked)
        doomed = Adam([parameters[0]], fused=True, server=relay.address, job="s", options=mine)
        theirs = options(1, **asked)
        other = Adam([parameters[1]], fused=True, server=quick_server.address, job="s", options=theirs)
        caretaker.forget(doomed._open_session()._line)
        relay.cut()
        names.give_back("s", "d")
        successor: Any = Adam([parameters[2]], fused=True, server=quick_server.address, job="s", options=mine)

        def step(rank: int) -> None:
            if rank == 1:
                parameters[1].grad = torch.ones(700)
                other.step()
                return
            # As a GradScaler does.
            parameters[2].grad = torch.full((700,), 1024.0)
            successor.grad_scale, successor.found_inf = torch.tensor(1024.0), torch.tensor(0.0)
            successor.step()
            del successor.grad_scale, successor.found_inf

        in_threads(step, 2)
        assert torch.allclose(other.state[parameters[1]]["exp_avg"], torch.full((700,), 0.1))
        for optimizer in (doomed, other, successor):
            optimizer.close()
