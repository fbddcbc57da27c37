"""Jobs that stand at an earlier point than their workers were told: `ProxyOptions.on_rewind`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

from optimd.client import (
    AccumulationLostError,
    Adam,
    Async,
    ConfigurationError,
    JobMismatchError,
    JobRewoundError,
    ProxyOptions,
    StepReceipt,
)
from optimd.client.caretaker import caretaker
from optimd.client.connection import StepStream
from optimd.server import Server
from tests.cuts import PushFaults
from tests.disk import Disk, lines_down
from tests.relay import Relay
from tests.support import eventually, in_threads

SIZE = 2500
"""Elements of a parameter of ten buckets of 1024 bytes."""
BUCKETS = 10


def options(rank: int = 0, world_size: int = 1, **more: Any) -> ProxyOptions:
    asked = {"on_rewind": "follow", "retry_timeout_s": 20, **more}
    return ProxyOptions(rank=rank, world_size=world_size, bucket_bytes=1024, **asked)


def of_mode(mode: str, **more: Any) -> ProxyOptions:
    if mode == "async":
        return options(worker_id="w0", world_size=None, aggregation=Async(), **more)
    return options(apply=mode, **more)


def gradient(step: int, size: int = SIZE, rank: int = 0) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(1000 * rank + step))


def receipt_of(optimizer: Adam) -> StepReceipt:
    assert optimizer.last_receipt is not None
    return optimizer.last_receipt


@pytest.fixture
def relay(server: Server) -> Iterator[Relay]:
    with Relay(server.address) as running:
        yield running


@pytest.fixture
def faults(monkeypatch: pytest.MonkeyPatch) -> PushFaults:
    return PushFaults(monkeypatch)


class Run:
    """One worker that has made three steps, in a job that is on disk as it was after the first."""

    def __init__(self, server: Server, relay: Relay, asked: ProxyOptions, faults: PushFaults | None = None) -> None:
        self.relay = relay
        self.p = nn.Parameter(torch.zeros(SIZE))
        self.optimizer = Adam([self.p], lr=0.1, fused=True, server=relay.address, job="r", options=asked)
        self.job = server.registry.get("r")
        if faults is not None:
            faults.of(self.optimizer)
        self.step(0)
        self.disk = Disk(self.job)
        self.at_first = self.p.detach().clone()
        self.step(1)
        self.step(2)
        assert (self.optimizer.job_step, self.optimizer.next_sequence) == (3, 3)

    def step(self, number: int) -> None:
        self.p.grad = gradient(number)
        self.optimizer.step()

    def set_back(self) -> None:
        self.disk.restart(self.relay)
        assert self.job.step == 1

    def assert_goes_on_as_torch(self, *numbers: int) -> None:
        """From the first step on, with these gradients."""
        twin = nn.Parameter(torch.zeros(SIZE))
        local = torch.optim.Adam([twin], lr=0.1, fused=True)
        twin.grad = gradient(0)
        local.step()
        for number in numbers:
            self.step(number)
            twin.grad = gradient(number)
            local.step()
        assert receipt_of(self.optimizer).outcome == "applied"
        assert self.optimizer.job_step == 1 + len(numbers)
        assert torch.equal(self.p, twin)
        self.optimizer.pull_parameters()
        assert torch.equal(self.p, twin)


CALLS: dict[str, Callable[[Run], object]] = {
    "step": lambda run: run.step(3),
    "accumulate": lambda run: run.optimizer.accumulate(),
    "load_state_dict": lambda run: run.optimizer.load_state_dict(run.optimizer.state_dict()),
    "add_param_group": lambda run: run.optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3))]}),
    "attach_buffers": lambda run: run.optimizer.attach_buffers(nn.BatchNorm1d(2)),
}


# --- on_rewind="error"


def test_what_to_do_about_a_rewind_is_checked() -> None:
    """A word that is none of the two is refused in the constructor."""
    assert ProxyOptions().on_rewind == "error"
    with pytest.raises(ConfigurationError, match='"error" or "follow" is needed'):
        ProxyOptions(on_rewind="go on")


@pytest.mark.parametrize("call", CALLS)
def test_the_call_that_meets_a_rewind_raises_it_and_so_does_every_later_one(
    server: Server, relay: Relay, call: str
) -> None:
    """With both points and the remedy. The worker keeps its parameters, and the job is not touched."""
    run = Run(server, relay, options(on_rewind="error"))
    run.set_back()
    before = run.p.detach().clone()
    run.p.grad = gradient(3)
    with pytest.raises(
        JobRewoundError,
        match=r"'r' stands at step 1, with push 1 of rank 0 to come; the worker was told of step 3 and push 3.*"
        r'on_rewind="follow"',
    ):
        CALLS[call](run)
    for later in CALLS.values():
        with pytest.raises(JobRewoundError, match="stands at step 1"):
            later(run)
    assert torch.equal(run.p, before)
    assert (run.job.step, run.job.group_sizes) == (1, [1])
    run.optimizer.close()


@pytest.mark.parametrize("mode", ["streaming", "atomic", "async"])
def test_a_rewind_in_the_middle_of_a_step_is_raised_from_it(
    server: Server, relay: Relay, faults: PushFaults, mode: str
) -> None:
    """Nothing of that step is in the job."""
    run = Run(server, relay, of_mode(mode, on_rewind="error"), faults)
    faults.before_sending(5, run.set_back)
    with pytest.raises(JobRewoundError):
        run.step(3)
    assert faults.fired == 1
    assert run.job.step == 1
    assert torch.equal(run.job.store._values[0], run.at_first)
    run.optimizer.close()


def test_a_worker_whose_place_is_free_is_told_of_the_rewind_too(quick_server: Server) -> None:
    """It comes after its lease has ended, and after the others have taken the job past its point by another way."""
    with Relay(quick_server.address) as relay, Relay(quick_server.address) as other:
        parameters = [nn.Parameter(torch.zeros(4)) for _ in range(2)]
        optimizers = [
            Adam([parameters[rank]], server=(relay, other)[rank].address, job="r", options=asked)
            for rank, asked in enumerate((options(0, 2, on_rewind="error"), options(1, 2)))
        ]

        def step(rank: int) -> None:
            parameters[rank].grad = torch.ones(4)
            optimizers[rank].step()

        in_threads(step, 2)
        job = quick_server.registry.get("r")
        disk = Disk(job)
        in_threads(step, 2)
        caretaker.forget(optimizers[0]._open_session()._line)
        relay.hold()
        relay.cut()
        disk.restart(other)
        with pytest.warns(UserWarning, match="set back from step 2 to step 1"):
            step(1)
        assert eventually(lambda: job.worker_count == 1)
        for _ in range(3):
            step(1)
        assert job.step == 4
        relay.pass_on()
        with pytest.raises(
            JobRewoundError, match=r"stands at step 4, with push 1 of rank 0.*told of step 2 and push 2"
        ):
            step(0)
        for optimizer in optimizers:
            optimizer.close()


# --- on_rewind="follow"


@pytest.mark.parametrize("mode", ["streaming", "atomic", "async"])
def test_a_worker_follows_a_rewind_that_it_meets_between_two_steps(server: Server, relay: Relay, mode: str) -> None:
    """The gradients are of parameters that are gone: they are dropped, and the run goes on from the earlier point."""
    run = Run(server, relay, of_mode(mode))
    run.set_back()
    with pytest.warns(UserWarning, match="job r was set back from step 3 to step 1") as warned:
        run.step(3)
    assert len(warned) == 1
    receipt = receipt_of(run.optimizer)
    assert (receipt.outcome, receipt.step, receipt.sequence, receipt.resumed) == ("dropped_late", 1, 3, True)
    assert (receipt.contributors, receipt.staleness) == ((), 0)
    assert (run.optimizer.job_step, run.optimizer.next_sequence) == (1, 1)
    assert torch.equal(run.p, run.at_first)
    assert run.job.step == 1
    run.assert_goes_on_as_torch(1, 2, 3)
    run.optimizer.close()


@pytest.mark.parametrize("number", [0, 1, 6, 11])
@pytest.mark.parametrize("mode", ["streaming", "atomic", "async"])
def test_a_worker_follows_a_rewind_that_it_meets_in_the_middle_of_a_step(
    server: Server, relay: Relay, faults: PushFaults, mode: str, number: int
) -> None:
    """Whatever of the step had been applied by the server that is gone."""
    run = Run(server, relay, of_mode(mode), faults)
    faults.before_sending(number, run.set_back)
    with pytest.warns(UserWarning, match="set back from step 3 to step 1"):
        run.step(3)
    assert faults.fired == 1
    receipt = receipt_of(run.optimizer)
    assert (receipt.outcome, receipt.step, receipt.sequence, receipt.resumed) == ("dropped_late", 1, 3, True)
    assert torch.equal(run.p, run.at_first)
    run.assert_goes_on_as_torch(1, 2)
    run.optimizer.close()


def test_a_step_that_was_committed_and_is_lost_with_its_answer_is_a_rewind_of_those_before_it(
    server: Server, relay: Relay, faults: PushFaults
) -> None:
    """A job that only lacks what no worker was told of is where its worker was: the step is made again."""
    run = Run(server, relay, options(on_rewind="error"), faults)
    disk = Disk(run.job)
    faults.before_reading(4, lambda: disk.restart(relay), done=BUCKETS + 2)
    run.step(3)
    assert faults.fired == 1
    assert (receipt_of(run.optimizer).outcome, receipt_of(run.optimizer).step) == ("applied", 4)
    assert torch.equal(run.p, run.job.store._values[0])
    run.optimizer.close()


def test_a_push_that_was_answered_without_a_step_is_missed_in_a_job_that_has_lost_it(
    server: Server, relay: Relay
) -> None:
    """The job's step is the same. What was pushed with it besides gradients is gone."""
    run = Run(server, relay, options())
    disk, scaled = Disk(run.job), run.optimizer
    before = run.p.detach().clone()
    with torch.no_grad():
        run.p.fill_(9.0)
    skipping: Any = scaled
    skipping.grad_scale, skipping.found_inf = torch.tensor(8.0), torch.tensor(1.0)
    run.step(3)
    assert receipt_of(scaled).outcome == "skipped_nonfinite"
    del skipping.grad_scale, skipping.found_inf
    disk.restart(relay)
    with pytest.warns(UserWarning, match="set back from step 3 to step 3"):
        run.step(4)
    assert receipt_of(scaled).outcome == "dropped_late"
    assert scaled.next_sequence == 3
    assert torch.equal(run.p, before)
    scaled.close()


def test_two_synchronous_workers_follow_a_rewind_together(server: Server, relay: Relay) -> None:
    """Each drops its gradients, and the next step is made of both again."""
    parameters = [nn.Parameter(torch.zeros(SIZE)) for _ in range(2)]
    optimizers = [
        Adam([parameters[rank]], lr=0.1, fused=True, server=relay.address, job="r", options=options(rank, 2))
        for rank in range(2)
    ]
    job = server.registry.get("r")

    def step(rank: int) -> str:
        parameters[rank].grad = gradient(job.step, rank=rank)
        optimizers[rank].step()
        return receipt_of(optimizers[rank]).outcome

    in_threads(step, 2)
    disk = Disk(job)
    for _ in range(2):
        in_threads(step, 2)
    disk.restart(relay)
    with pytest.warns(UserWarning, match="set back from step 3 to step 1"):
        assert in_threads(step, 2) == ["dropped_late"] * 2
    assert in_threads(step, 2) == ["merged"] * 2
    assert job.step == 2
    twin = nn.Parameter(torch.zeros(SIZE))
    local = torch.optim.Adam([twin], lr=0.1, fused=True)
    for number in range(2):
        twin.grad = (gradient(number) + gradient(number, rank=1)) / 2
        local.step()
    for parameter in parameters:
        assert torch.equal(parameter, twin)
    for optimizer in optimizers:
        optimizer.close()


def test_a_push_that_a_recovered_job_holds_open_is_completed_by_a_worker_that_follows(
    server: Server, relay: Relay, faults: PushFaults
) -> None:
    """What was applied of it stays, the rest is what the worker brings now; each bucket counts once."""
    run = Run(server, relay, options(), faults)
    record = run.job.record(run.job.members()[0].worker.worker_id)

    def tell_the_worker_of_more() -> None:
        line = run.optimizer._open_session()._line
        line.job_step, line.next_sequence = 5, 5
        relay.cut()

    faults.before_sending(4, tell_the_worker_of_more)
    with pytest.warns(UserWarning, match="set back from step 5 to step 3"):
        run.step(3)
    assert faults.fired == 1
    assert run.job._aggregator.is_open
    assert (record.next_sequence, run.optimizer.next_sequence, run.job.step) == (3, 3, 3)
    run.step(7)
    assert (receipt_of(run.optimizer).outcome, receipt_of(run.optimizer).step) == ("applied", 4)
    twin = nn.Parameter(torch.zeros(SIZE))
    local = torch.optim.Adam([twin], lr=0.1, fused=True)
    for number in range(4):
        twin.grad = gradient(number)
        if number == 3:
            start = sum(piece.length for bucket in run.job.store.buckets[:3] for piece in bucket.slices)
            twin.grad[start:] = gradient(7)[start:]
        local.step()
    assert torch.equal(run.p, twin)
    run.optimizer.close()


# --- what else a worker has


@pytest.mark.parametrize("mode", ["streaming", "atomic", "async"])
def test_written_values_belong_to_the_future_that_is_gone(
    server: Server, relay: Relay, faults: PushFaults, mode: str
) -> None:
    """Before a step and in the middle of one; and so do edits of the state."""
    run = Run(server, relay, of_mode(mode), faults)
    for fault in (run.set_back, lambda: faults.before_sending(4, run.set_back)):
        with torch.no_grad():
            run.p.fill_(7.0)
        run.optimizer.state[run.p]["exp_avg"].fill_(5.0)
        fault()
        with pytest.warns(UserWarning, match="set back") as warned:
            run.step(3)
        assert len(warned) == 1
        assert torch.equal(run.p, run.at_first)
        assert torch.allclose(run.optimizer.state[run.p]["exp_avg"], 0.1 * gradient(0))
        assert run.optimizer.state[run.p]["step"] == 1
        run.assert_goes_on_as_torch(1, 2)
    assert faults.fired == 1
    run.optimizer.close()


@pytest.mark.parametrize("is_held", [False, True])
def test_accumulated_gradients_are_gone_with_the_parameters_that_they_were_of(
    server: Server, relay: Relay, is_held: bool
) -> None:
    """Those that are being handed over and those that were: also where the server that came back has some of them."""
    run = Run(server, relay, options())
    run.p.grad = gradient(3)
    run.optimizer.accumulate()
    (member,) = run.job.members()
    held = member.held
    run.set_back()
    if is_held:
        member.held = held
    run.p.grad = gradient(3)
    with pytest.warns(UserWarning, match="set back"), pytest.raises(AccumulationLostError, match="set back to step 1"):
        run.optimizer.accumulate()
    assert run.p.grad is not None
    run.assert_goes_on_as_torch(1)
    run.p.grad = gradient(2)
    run.optimizer.accumulate()
    run.set_back()
    with pytest.warns(UserWarning, match="set back"):
        run.step(2)
    assert receipt_of(run.optimizer).outcome == "dropped_late"
    run.assert_goes_on_as_torch(1, 2)
    run.p.grad = gradient(3)
    run.optimizer.accumulate()
    run.set_back()
    with pytest.warns(UserWarning, match="set back"):
        run.optimizer.zero_grad()
    run.assert_goes_on_as_torch(1, 2)
    run.optimizer.close()


def test_the_workers_hyperparameters_hold_after_a_rewind(server: Server, relay: Relay) -> None:
    """They are the program's, and not the job's: a scheduler has gone on, and is not set back."""
    p, twin = nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(4))
    optimizer = Adam([p], lr=0.5, fused=True, server=relay.address, job="r", options=options())
    local = torch.optim.Adam([twin], lr=0.5, fused=True)
    job = server.registry.get("r")
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)

    def step() -> None:
        p.grad = torch.ones(4)
        optimizer.step()

    step()
    disk = Disk(job)
    twin.grad = torch.ones(4)
    local.step()
    for _ in range(2):
        scheduler.step()
        step()
    disk.restart(relay)
    assert job.groups[0]["lr"] == 0.5
    with pytest.warns(UserWarning, match="set back"):
        step()
    step()
    assert job.groups[0]["lr"] == 0.125
    local.param_groups[0]["lr"] = 0.125
    local.step()
    assert torch.equal(p, twin)
    optimizer.close()


@pytest.mark.parametrize("call", ["load_state_dict", "add_param_group", "attach_buffers"])
def test_calls_that_meet_a_rewind_go_on_in_the_job_as_it_is(server: Server, relay: Relay, call: str) -> None:
    """Their numbers are the job's."""
    run = Run(server, relay, options())
    state = run.optimizer.state_dict()
    run.optimizer.load_state_dict(state)
    run.set_back()
    made = {**CALLS, "load_state_dict": lambda run: run.optimizer.load_state_dict(state)}[call]
    with pytest.warns(UserWarning, match="set back from step 3 to step 1") as warned:
        made(run)
    assert len(warned) == 1
    assert torch.equal(run.p, run.at_first)
    if call == "load_state_dict":
        assert run.optimizer.state[run.p]["step"] == 3
        run.step(1)
        assert run.optimizer.state[run.p]["step"] == 4
    else:
        run.assert_goes_on_as_torch(1, 2)
    run.optimizer.close()


@pytest.mark.parametrize("follows", [False, True])
def test_a_state_that_was_loaded_and_is_lost_is_noticed_though_no_step_is(
    server: Server, relay: Relay, follows: bool
) -> None:
    """The job stands at the step that the worker was at, and is not what it was told that it is."""
    run = Run(server, relay, options(on_rewind="follow" if follows else "error"))
    disk = Disk(run.job)
    state = run.optimizer.state_dict()
    state["state"][0]["exp_avg"].fill_(5.0)
    run.optimizer.load_state_dict(state)
    disk.restart(relay)
    if follows:
        with pytest.warns(UserWarning, match="set back from step 3 to step 3"):
            run.step(3)
        assert receipt_of(run.optimizer).outcome == "dropped_late"
        assert torch.allclose(run.optimizer.state[run.p]["exp_avg"], run.job.store._state[0].tensors["exp_avg"])
        run.step(3)
        assert receipt_of(run.optimizer).outcome == "applied"
    else:
        with pytest.raises(JobRewoundError, match="stands at step 3 without a state_dict"):
            run.step(3)
    run.optimizer.close()


@pytest.mark.parametrize("follows", [False, True])
def test_a_param_group_that_is_lost_is_a_mismatch_that_is_named(server: Server, relay: Relay, follows: bool) -> None:
    """Whether the worker follows or not: the job is another one than the program has."""
    run = Run(server, relay, options(on_rewind="follow" if follows else "error"))
    run.optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3))]})
    with lines_down(relay, run.job), run.job._changed:
        content = run.job._content
        del content.groups[1:], content.sizes[1:]
        content.store.truncate(1, BUCKETS)
    with pytest.raises(JobMismatchError, match="only the worker's"):
        run.step(3)
    run.optimizer.close()


def test_steps_that_are_made_in_the_worker_go_on_from_the_jobs_state(server: Server, relay: Relay) -> None:
    """`differentiable=True` keeps the state here: that too is of a future that is gone."""
    p, twin = torch.zeros(40), torch.zeros(40)
    asked = {"lr": 0.1, "differentiable": True}
    optimizer = Adam([p], server=relay.address, job="r", options=options(), **asked)
    local = torch.optim.Adam([twin], **asked)
    job = server.registry.get("r")

    def step(number: int, *which: Any) -> None:
        for each in which:
            (tensor,) = each.param_groups[0]["params"]
            tensor.grad = gradient(number, 40)
            each.step()

    step(0, optimizer, local)
    disk = Disk(job)
    step(1, optimizer)
    step(2, optimizer)
    disk.restart(relay)
    with pytest.warns(UserWarning, match="set back from step 3 to step 1"):
        step(3, optimizer)
    assert receipt_of(optimizer).outcome == "dropped_late"
    assert torch.equal(p, twin)
    for number in (1, 2):
        step(number, optimizer, local)
    assert torch.equal(p, twin)
    assert job.step == 3
    optimizer.close()


# --- server step hooks


@pytest.mark.parametrize("first", ["the optimizer", "the hooks"])
def test_hooks_go_on_where_the_job_does(
    server: Server, relay: Relay, caplog: pytest.LogCaptureFixture, first: str
) -> None:
    """Whoever finds the rewind first. They are told of the steps that have those numbers now, once each, in order."""
    told: dict[str, list[int]] = {"early": [], "late": []}
    run = Run(server, relay, options())
    optimizer = run.optimizer
    optimizer.register_server_step_hook(lambda _, receipt: told["early"].append(receipt.step))
    run.step(3)
    run.step(4)
    optimizer.register_server_step_hook(lambda _, receipt: told["late"].append(receipt.step))
    run.step(5)
    run.set_back()
    if first == "the hooks":
        assert eventually(lambda: "hooks go on from there" in caplog.text)
    with pytest.warns(UserWarning, match="set back from step 6 to step 1"):
        run.step(6)
    run.assert_goes_on_as_torch(1, 2, 3, 4, 5, 6)
    assert told == {"early": [4, 5, 6, 2, 3, 4, 5, 6, 7], "late": [6, 2, 3, 4, 5, 6, 7]}
    optimizer.close()


def test_hooks_that_are_registered_before_the_optimizer_finds_out_are_told_of_what_comes(
    server: Server, relay: Relay
) -> None:
    """The optimizer still takes the job to be where it was."""
    told: list[int] = []
    run = Run(server, relay, options())
    run.set_back()
    assert run.optimizer.job_step == 3
    run.optimizer.register_server_step_hook(lambda _, receipt: told.append(receipt.step))
    with pytest.warns(UserWarning, match="set back from step 3 to step 1"):
        run.step(3)
    run.assert_goes_on_as_torch(1, 2)
    assert told == [2, 3]
    run.optimizer.close()


def test_hooks_are_not_told_of_a_step_that_is_gone_by_the_time_that_they_may_run(
    server: Server, relay: Relay, faults: PushFaults, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server had told of it, and the step that they would have been called in was still under way."""
    told, heard, original = list[int](), list[int](), StepStream.receive

    def receive(stream: StepStream) -> StepReceipt:
        receipt = original(stream)
        heard.append(receipt.step)
        return receipt

    monkeypatch.setattr(StepStream, "receive", receive)
    run = Run(server, relay, options(), faults)
    run.optimizer.register_server_step_hook(lambda _, receipt: told.append(receipt.step))
    run.step(3)

    def set_back() -> None:
        assert eventually(lambda: heard == [4, 5])
        run.set_back()

    faults.before_reading(4, set_back, done=BUCKETS + 2)
    with pytest.warns(UserWarning, match="set back from step 4 to step 1"):
        run.step(4)
    assert faults.fired == 1
    run.assert_goes_on_as_torch(1, 2, 3, 4, 5)
    assert told == [4, 2, 3, 4, 5, 6]
    run.optimizer.close()
