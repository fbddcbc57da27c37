"""A job's steps without a wire: what is left of workers that leave, and of steps that torch refuses."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

from optimd.server.aggregation import Worker
from optimd.server.errors import StepTimeoutError, UpdateRefusedError
from optimd.server.job import Job
from optimd.server.member import Member
from optimd.server.pushing import OpenPush
from optimd.server.receipts import Outcome
from optimd.server.settings import JobSettings
from optimd.wire.layout import Parameter

OPTIONS = {
    "lr": 0.1,
    "betas": (0.9, 0.999),
    "eps": 1e-8,
    "weight_decay": 0.0,
    "amsgrad": False,
    "maximize": False,
    "foreach": None,
    "capturable": False,
    "differentiable": False,
    "fused": None,
    "decoupled_weight_decay": False,
}
ELEMENTS = 256


class Team:
    """A job with one 512-element parameter in two buckets, and its workers by rank."""

    def __init__(self, workers: int, **settings: Any) -> None:
        self.job = Job(
            "job",
            JobSettings(
                **{
                    "world_size": workers,
                    "reduction": "sum",
                    "apply": "streaming",
                    "bucket_bytes": 4 * ELEMENTS,
                    "timeout_s": 5.0,
                    "join_timeout_s": 5.0,
                    "private": False,
                    **settings,
                }
            ),
            torch.device("cpu"),
        )
        self.members: dict[int, Member] = {}
        self.pushes: dict[int, OpenPush] = {}
        self.join(0, creates=True)
        buckets = self.job.bringing.grow(
            self.members[0], [OPTIONS], [1], [Parameter("table", torch.float32, (2 * ELEMENTS,), (0,))]
        )
        for bucket in buckets:
            self.job.store.write_values(bucket, torch.zeros(ELEMENTS))
        self.job.bringing.grown(self.members[0])
        for rank in range(1, workers):
            self.join(rank)

    def join(self, rank: int, *, creates: bool = False) -> None:
        self.members[rank] = Member(Worker(rank, f"worker-{rank}"), incarnation=rank)
        self.job.admit(self.members[rank], creates=creates, check=lambda: None)
        self.job.welcome(self.members[rank], step=self.job.step)

    def begin(self, rank: int, *, micro: int = 0) -> None:
        self.pushes[rank] = self.job.pushing.begin(
            self.members[rank],
            sequence=self.job.record(f"worker-{rank}").next_sequence,
            base_step=self.job.step,
            group_count=1,
            load_count=0,
            layout_count=0,
            micro=micro,
        )

    def push(self, rank: int, bucket: int, value: float) -> None:
        payload = torch.full((ELEMENTS,), value)
        self.job.pushing.push(self.pushes[rank], self.job.store.buckets[bucket], [True], payload)

    def end(self, rank: int) -> None:
        self.job.pushing.end(self.pushes[rank])

    def step_together(self) -> None:
        """Each of the workers pushes 1.0 to the first bucket, one after the other."""
        for rank in self.members:
            self.begin(rank)
            self.push(rank, 0, 1.0)
            self.end(rank)

    def leave(self, *ranks: int) -> None:
        for rank in ranks:
            self.job.leave(self.members[rank])

    def moment(self, bucket: int) -> float:
        (part,) = self.job.store.read("exp_avg", self.job.store.buckets[bucket], [True])
        return torch.frombuffer(bytearray(part), dtype=torch.float32)[0].item()


def test_gradients_of_a_closed_step_do_not_leak_into_the_next() -> None:
    """One bucket was applied, the other only pushed, when the last worker left: both are in the step that closes."""
    team = Team(2)
    for rank in (0, 1):
        team.begin(rank)
    team.push(0, 0, 100.0)
    team.leave(0)
    team.push(1, 1, 1.0)
    team.leave(1)
    assert team.job.step == 1
    assert [team.job.record(f"worker-{rank}").next_sequence for rank in (0, 1)] == [1, 1]
    assert team.moment(0) == pytest.approx(10.0)
    assert team.moment(1) == pytest.approx(0.1)
    for rank in (0, 1):
        team.join(rank)
    team.step_together()
    assert team.job.step == 2
    assert team.moment(0) == pytest.approx(0.9 * 10.0 + 0.1 * 2.0)


def test_a_parameter_that_only_a_lost_worker_pushed_a_part_of_is_brought_to_one_step(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Where steps are streamed; the log names it."""
    team = Team(2)
    for rank in (0, 1):
        team.begin(rank)
    team.push(0, 0, 1.0)
    team.leave(0)
    team.end(1)
    assert team.job.step == 1
    assert team.job.store.steps_of(0) == [1.0, 1.0]
    assert "partly stepped: parameter 0 (table)" in caplog.text


def test_nothing_of_an_unfinished_push_is_in_an_atomic_step() -> None:
    """Its worker is lost after the other one has pushed the same bucket, which has to push it again."""
    team = Team(2, apply="atomic")
    for rank in (0, 1):
        team.begin(rank)
        team.push(rank, 0, 1.0 + rank)
    team.push(1, 1, 7.0)
    team.end(1)
    team.leave(0)
    assert team.job.step == 0
    assert team.job.pulling.await_progress(team.pushes[1]) == ([], frozenset({0}))
    team.push(1, 0, 2.0)
    team.end(1)
    assert team.job.step == 1
    assert [team.moment(0), team.moment(1)] == pytest.approx([0.2, 0.7])
    receipt = team.job.record("worker-1").receipt
    assert receipt is not None
    assert (receipt.contributors, receipt.partial_contributors) == ((1,), ())


def test_gradients_that_are_held_are_pushed_again_by_the_server() -> None:
    """The worker has not got them any more: it has handed them over."""
    team = Team(2, apply="atomic")
    accumulating, member = team.job.accumulating, team.members[1]
    assert accumulating.begin(member, sequence=0, micro=0, group_count=1, layout_count=0)
    for bucket in team.job.store.buckets:
        accumulating.add(member, bucket, [True], torch.full((ELEMENTS,), 3.0))
    accumulating.end(member)
    team.begin(0)
    team.begin(1, micro=1)
    team.push(0, 0, 50.0)
    team.push(0, 1, 50.0)
    team.push(1, 0, 2.0)
    team.end(1)
    team.leave(0)
    assert team.job.pulling.await_progress(team.pushes[1])[1] == frozenset()
    assert team.job.step == 1
    assert [team.moment(0), team.moment(1)] == pytest.approx([0.5, 0.3])


def test_an_atomic_step_that_all_its_workers_left_is_discarded(caplog: pytest.LogCaptureFixture) -> None:
    """Nothing of it is in the next one."""
    team = Team(2, apply="atomic")
    for rank in (0, 1):
        team.begin(rank)
        team.push(rank, 0, 50.0)
    team.leave(0, 1)
    assert team.job.step == 0
    assert caplog.text.count("did not complete its push: nothing of it is in the step") == 1
    for rank in (0, 1):
        team.join(rank)
    team.step_together()
    assert team.moment(0) == pytest.approx(0.2)


@pytest.mark.parametrize("apply", ["streaming", "atomic"])
def test_a_step_that_torch_refuses_fails_for_all_its_workers_and_commits_nothing(
    apply: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who waits is told at once, who pushes next is told then; the job can go on."""
    team = Team(2, apply=apply)
    for rank in (0, 1):
        team.begin(rank)
    team.push(0, 0, 1.0)
    team.end(0)
    waiting: list[str] = []

    def wait() -> None:
        with pytest.raises(UpdateRefusedError, match="no such kernel") as caught:
            team.job.pulling.await_progress(team.pushes[0])
        waiting.append(str(caught.value))

    waiter = threading.Thread(target=wait)
    waiter.start()
    with monkeypatch.context() as patched:

        def refuse(*_: object, **__: object) -> None:
            raise RuntimeError("no such kernel")

        patched.setattr("optimd.server.update.update", refuse)
        with pytest.raises(UpdateRefusedError, match="no such kernel"):
            team.push(1, 0, 1.0)
            team.end(1)
    waiter.join(10)
    assert len(waiting) == 1
    assert team.job.step == 0
    with pytest.raises(UpdateRefusedError, match="no such kernel"):
        team.end(1)
    team.leave(0, 1)
    for rank in (0, 1):
        team.join(rank)
    team.step_together()
    assert team.job.step == 1
    assert team.moment(0) == pytest.approx(0.2)


def test_options_that_torch_would_refuse_are_refused_before_the_step() -> None:
    """Where the push begins, and with nothing changed."""
    team = Team(1)
    team.job.pushing.set_hyperparameters(team.members[0], 0, {**OPTIONS, "foreach": True, "betas": (1.0, 0.9)})
    with pytest.raises(UpdateRefusedError, match="divide by zero"):
        team.begin(0)
    team.job.pushing.set_hyperparameters(team.members[0], 0, OPTIONS)
    team.begin(0)
    team.push(0, 0, 1.0)
    team.end(0)
    assert team.job.step == 1


def test_a_reader_holds_a_step_up_and_one_that_takes_nothing_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """The step waits while the reader reads, and not for ever."""
    team = Team(1)
    team.begin(0)
    with team.job.reading() as hold:
        worker = threading.Thread(target=team.push, args=(0, 0, 1.0))
        worker.start()
        worker.join(0.2)
        assert worker.is_alive()
        hold.touch()
    worker.join(10)
    assert team.moment(0) == pytest.approx(0.1)
    team.end(0)
    monkeypatch.setattr("optimd.server.readers.READER_TIMEOUT_S", 0.2)
    with team.job.reading() as hold:
        team.begin(0)
        team.push(0, 0, 1.0)
        with pytest.raises(StepTimeoutError, match="read again"):
            hold.touch()


def test_agreeing_workers_with_a_nan_do_not_disagree() -> None:
    """A schedule may arrive at NaN; it is not equal to itself."""
    from optimd.server.member import disagree

    workers = [Worker(rank, str(rank)) for rank in (0, 1)]
    members = {worker: Member(worker, 0, [{"lr": float("nan"), "x": 1}], speaks=True) for worker in workers}
    assert not disagree(members, tuple(workers))
    members[workers[1]].groups[0]["lr"] = 1.0
    assert disagree(members, tuple(workers))


def test_a_group_whose_worker_is_lost_in_its_upload_is_taken_back() -> None:
    """The job is as it was, and the same group can be added again."""
    team = Team(1)
    parameters = [Parameter("", torch.float32, (100,), (0,))]
    assert not team.job.bringing.await_growth(team.members[0], 1, parameters)
    team.job.bringing.grow(team.members[0], [OPTIONS], [1], parameters)
    assert len(team.job.store.buckets) == 3
    team.leave(0)
    assert (len(team.job.groups), team.job.group_sizes) == (1, [1])
    assert (len(team.job.store.parameters), len(team.job.store.buckets)) == (1, 2)
    team.join(0)
    assert not team.job.bringing.await_growth(team.members[0], 1, parameters)
    (bucket,) = team.job.bringing.grow(team.members[0], [OPTIONS], [1], parameters)
    team.job.store.write_values(bucket, torch.ones(100))
    team.job.bringing.grown(team.members[0])
    assert bucket.bucket_id == 2


def test_a_worker_that_began_and_left_without_a_gradient_leaves_no_open_step() -> None:
    """The survivor can load, and the one that left can come back."""
    team = Team(2)
    team.begin(1)
    team.leave(1)
    assert team.job.bringing.begin_load(team.members[0], digest=b"d", load_count=1, force=False)
    team.leave(0)


@pytest.mark.parametrize("error", [ZeroDivisionError("defect"), MemoryError("defect")])
def test_a_step_that_a_defect_ends_fails_for_all_and_the_job_goes_on(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither counted nor left open, and the survivors do not wait for their time to run out."""
    from optimd.server.errors import RequestError

    team = Team(2, apply="atomic")
    for rank in (0, 1):
        team.begin(rank)
        team.push(rank, 0, 1.0)
    team.end(0)
    with monkeypatch.context() as patched:

        def fail(*_: object, **__: object) -> None:
            raise error

        patched.setattr(team.job.store, "apply", fail)
        with pytest.raises(type(error)):
            team.end(1)
    with pytest.raises(RequestError, match="the step failed on the server"):
        team.job.pulling.await_progress(team.pushes[0])
    assert team.job.step == 0
    team.step_together()
    assert team.job.step == 1
    assert team.moment(0) == pytest.approx(0.2)


def test_a_draining_job_begins_no_more_steps() -> None:
    """What a worker's tight loop would otherwise do while the server stops."""
    from optimd.server.errors import ShuttingDownError

    team = Team(1)
    assert team.job.drain(1.0)
    with pytest.raises(ShuttingDownError):
        team.begin(0)


def test_a_step_that_ends_with_a_loss_is_skipped_if_it_is_not_finite() -> None:
    """Who waits is answered, the sequence of both is used up, and the next step has nothing of it."""
    team = Team(3, apply="atomic", nonfinite="skip")
    for rank in (0, 1, 2):
        team.begin(rank)
    team.push(1, 0, float("inf"))
    team.push(0, 0, 1.0)
    team.end(0)
    team.end(1)
    team.leave(2)
    assert team.job.pulling.await_progress(team.pushes[0]) == ([], frozenset())
    for rank in (0, 1):
        receipt = team.job.record(f"worker-{rank}").receipt
        assert receipt is not None
        assert (receipt.step, receipt.outcome, receipt.contributors) == (0, Outcome.SKIPPED_NONFINITE, ())
    assert team.job.step == 0
    assert [team.job.record(f"worker-{rank}").next_sequence for rank in (0, 1)] == [1, 1]
    assert [team.job.record(f"worker-{rank}").pushes for rank in (0, 1)] == [0, 0]
    assert team.job.store.steps_of(0) == [0.0, 0.0]
    team.join(2)
    team.step_together()
    assert team.job.step == 1
    assert team.moment(0) == pytest.approx(0.3)


def test_a_step_that_ends_with_a_loss_is_refused_if_it_is_not_finite() -> None:
    """Whoever is left hears of it, and no sequence is used up."""
    from optimd.server.errors import NonFiniteGradientError

    team = Team(3, apply="atomic", nonfinite="error")
    for rank in (0, 1, 2):
        team.begin(rank)
    team.push(1, 1, float("nan"))
    team.end(0)
    team.end(1)
    team.leave(2)
    with pytest.raises(NonFiniteGradientError, match=r"parameter 0 \(table\) for step 1"):
        team.job.pulling.await_progress(team.pushes[0])
    assert team.job.step == 0
    assert [team.job.record(f"worker-{rank}").next_sequence for rank in (0, 1)] == [0, 0]
    team.join(2)
    team.step_together()
    assert team.moment(0) == pytest.approx(0.3)


def test_a_newcomer_is_let_in_between_a_skipped_step_and_the_next() -> None:
    """A skipped step is over like any other."""
    team = Team(2, apply="atomic", nonfinite="skip", world_size=1)
    for rank in (0, 1):
        team.begin(rank)
        team.push(rank, 0, float("nan"))
    newcomer = threading.Thread(target=team.join, args=(2,))
    newcomer.start()
    team.end(0)
    team.end(1)
    newcomer.join(10)
    assert team.job.worker_count == 3
    team.step_together()
    assert team.moment(0) == pytest.approx(0.3)


def test_the_gradient_of_a_worker_that_is_lost_once_it_is_complete_is_clipped_with_the_rest() -> None:
    """The elements that nobody pushed count as zero: 256 sums of 3 have norm 48."""
    team = Team(2, apply="atomic", max_grad_norm=4.8)
    for rank in (0, 1):
        team.begin(rank)
    team.push(0, 0, 1.0)
    team.end(0)
    team.leave(0)
    team.push(1, 0, 2.0)
    team.end(1)
    receipt = team.job.record("worker-1").receipt
    assert receipt is not None
    assert receipt.grad_norm == pytest.approx(48.0)
    assert team.moment(0) == pytest.approx(0.03)
