"""What a server makes of what another one had on disk when it died, beyond values and state."""

from __future__ import annotations

import shutil
import threading
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from torch import nn

from optimd.client import Adam, Async, OptimdError, ProxyOptions
from optimd.server import Server, storage
from optimd.server.company import JobPhase
from optimd.server.errors import DataDirError, JobDeletedError, UpdateRefusedError
from optimd.server.files import Files
from optimd.server.job import Job
from optimd.server.member import Member
from optimd.server.pushing import OpenPush
from optimd.server.store import Store
from tests.keptjobs import recovered
from tests.lives import Lives
from tests.relay import Relay
from tests.support import eventually, running_server

SIZE = 700


def parameter() -> nn.Parameter:
    return nn.Parameter(torch.zeros(SIZE))


def step(optimizer: Adam, value: float = 1.0) -> None:
    for param in optimizer.param_groups[0]["params"]:
        param.grad = torch.full_like(param, value)
    optimizer.step()


class StallingFiles(Files):
    """Files that are slow to make what has a certain name.

    Args:
        name: The name.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self.stalls = threading.Event()
        self.go_on = threading.Event()

    def open(self, path: Path) -> int:
        self._stall(path)
        return super().open(path)

    def make_folder(self, folder: Path) -> None:
        self._stall(folder)
        super().make_folder(folder)

    def _stall(self, path: Path) -> None:
        if path.name == self._name:
            self.stalls.set()
            assert self.go_on.wait(30)


def options(worker_id: str, rank: int) -> ProxyOptions:
    return ProxyOptions(worker_id=worker_id, rank=rank, bucket_bytes=1024, aggregation=Async())


def begin(job: Job, member: Member) -> OpenPush:
    """As its stream does with StepBegin."""
    record = job.record(member.worker.worker_id)
    return job.pushing.begin(
        member,
        sequence=record.next_sequence,
        base_step=job.step,
        group_count=1,
        load_count=0,
        layout_count=0,
        micro=0,
    )


def push(job: Job, pushed: OpenPush, *bucket_ids: int) -> None:
    for bucket_id in bucket_ids:
        bucket = job.store.buckets[bucket_id]
        elements = sum(piece.length for piece in bucket.slices)
        job.pushing.push(pushed, bucket, [True] * len(bucket.slices), torch.ones(elements))


def assert_same(job: Job, other: Job) -> None:
    for index in range(len(job.store.parameters)):
        assert torch.equal(job.store._values[index], other.store._values[index])
        assert job.store.steps_of(index) == other.store.steps_of(index)
        ours, theirs = job.store._state[index].tensors, other.store._state[index].tensors
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_a_worker_that_had_left_is_not_asked_for_buffers_in_the_next_life(tmp_path: Path) -> None:
    """Nobody would answer, and who attaches them then would wait for that for ever."""
    with Lives(tmp_path) as lives:
        with Adam([parameter()], server=lives.address, job="j", options=options("a", 0)) as first:
            first.attach_buffers(nn.BatchNorm1d(3))
        with Adam([parameter()], server=lives.address, job="j", options=options("b", 1)) as second:
            second.attach_buffers(nn.BatchNorm1d(3))
            lives.die_and_resume()
            step(second)
            step(second)
            asked = lives.server.registry.get("j").buffers._refresh.asked
            assert asked is None or asked.worker_id == "b"
    assert lives.deaths == 1


def test_a_job_that_is_created_while_another_of_its_name_is_being_removed_is_kept(tmp_path: Path) -> None:
    """A snapshot of the one that goes is still being written: the new one's folder is not taken for its own."""
    files = StallingFiles("data.safetensors")
    with running_server(files=files, data_dir=str(tmp_path / "data")) as server:
        with Adam([parameter()], server=server.address, job="j") as optimizer:
            step(optimizer)
        old = server.registry.get("j")
        with ThreadPoolExecutor(3) as pool:
            snapshot = pool.submit(server.registry.snapshot, "j")
            assert files.stalls.wait(30)
            removal = pool.submit(server.registry.delete, "j", force=True)
            assert eventually(lambda: old.phase is JobPhase.DELETED)
            creation = pool.submit(Adam, [parameter()], server=server.address, job="j")
            # Where it does not wait for the other one's end, it is there long before.
            wait([creation], timeout=0.5)
            files.go_on.set()
            optimizer = creation.result(30)
            removal.result(30)
            assert isinstance(snapshot.exception(30), JobDeletedError)
        step(optimizer)
        step(optimizer)
        shutil.copytree(tmp_path / "data", tmp_path / "copy")
        optimizer.close()
    with recovered(tmp_path / "copy") as jobs:
        assert jobs["j"].step == 2


def test_workers_are_heard_of_while_the_folder_of_another_job_is_made(tmp_path: Path) -> None:
    """Their leases do not end for that."""
    files = StallingFiles("snapshots")
    with running_server(files=files, data_dir=str(tmp_path / "data")) as server, ThreadPoolExecutor(2) as pool:
        files.go_on.set()
        with Adam([parameter()], server=server.address, job="j") as optimizer:
            (member,) = server.registry.get("j").members()
            files.stalls.clear()
            files.go_on.clear()
            creation = pool.submit(Adam, [parameter()], server=server.address, job="another")
            assert files.stalls.wait(30)
            hearing = pool.submit(server.registry.hear, "j", member.worker.worker_id, member.incarnation)
            wait([hearing], timeout=10)
            was_heard = hearing.done()
            files.go_on.set()
            creation.result(30).close()
            assert was_heard
            assert hearing.result()
            step(optimizer)


def test_a_private_job_that_its_worker_has_left_does_not_come_back(tmp_path: Path) -> None:
    """The server died between the two: nobody would ever come to it again."""
    with (
        running_server(data_dir=str(tmp_path / "data")) as server,
        Adam([parameter()], server=server.address) as optimizer,
    ):
        step(optimizer)
        (job,) = server.registry.all()
        (member,) = job.members()
        assert job.settings.private
        job.leave(member)
        shutil.copytree(tmp_path / "data", tmp_path / "copy")
        (folder,) = (tmp_path / "copy" / "jobs").iterdir()
    with recovered(tmp_path / "copy") as jobs:
        assert not jobs
    assert not folder.exists()


def test_snapshots_of_a_server_without_a_journal_are_no_ground_for_a_later_journal_but_the_last(tmp_path: Path) -> None:
    """A damaged one is not replaced by the one before it: the steps between them are nowhere."""
    data, again = str(tmp_path / "data"), ProxyOptions(worker_id="w")
    with (
        running_server(data_dir=data, durability="snapshot") as server,
        Adam([parameter()], server=server.address, job="j", options=again) as optimizer,
    ):
        for value in (1.0, -3.0):
            step(optimizer, value)
            optimizer.snapshot()
    with (
        running_server(data_dir=data) as server,
        Adam([parameter()], server=server.address, job="j", options=again) as optimizer,
    ):
        step(optimizer, 2.0)
        shutil.copytree(data, tmp_path / "copy")
    newest = max((tmp_path / "copy" / "jobs").glob("*/snapshots/*"))
    content = bytearray((newest / "data.safetensors").read_bytes())
    content[-1] ^= 1
    (newest / "data.safetensors").write_bytes(content)
    with pytest.raises(DataDirError, match="the segments before this one are missing"), recovered(tmp_path / "copy"):
        pass


def test_what_a_lost_push_has_left_torn_is_levelled_when_the_last_push_of_before_is_over(tmp_path: Path) -> None:
    """An asynchronous job: two were under way, one was lost, and the server died before the end of the other."""
    with (
        running_server(data_dir=str(tmp_path / "data")) as server,
        Adam([parameter()], server=server.address, job="j", options=options("a", 0)),
        Adam([parameter()], server=server.address, job="j", options=options("b", 1)),
    ):
        job = server.registry.get("j")
        first, second = job.members()
        assert len(job.store.buckets) == 3
        push(job, begin(job, first), 0)
        push(job, begin(job, second), 1)
        job.leave(first)
        assert job.step == 1
        shutil.copytree(tmp_path / "data", tmp_path / "copy")
    with recovered(tmp_path / "copy") as jobs:
        job = jobs["j"]
        assert job.store.steps_of(0) == [1.0, 1.0, 0.0]
        (member,) = job.members()
        member.alive = True
        pushed = begin(job, member)
        push(job, pushed, 0, 2)
        job.pushing.end(pushed)
        assert job.step == 2
        assert job.store.steps_of(0) == [2.0, 2.0, 2.0]


def test_the_options_of_each_worker_hold_for_its_pushes_in_the_next_life(tmp_path: Path) -> None:
    """An asynchronous job, in which one that came later has a learning rate of its own."""
    with (
        Lives(tmp_path) as lives,
        Adam([parameter()], lr=0.1, server=lives.address, job="j", options=options("a", 0)) as first,
        Adam([parameter()], lr=0.1, server=lives.address, job="j", options=options("b", 1)) as second,
    ):
        second.param_groups[0]["lr"] = 0.5
        for optimizer in (second, first):
            step(optimizer)
        assert lives.server.registry.get("j").groups[0]["lr"] == 0.1
        lives.die_and_resume()
        step(second)
        assert lives.server.registry.get("j").groups[0]["lr"] == 0.5
    assert lives.deaths == 1


def test_a_bucket_that_could_not_be_applied_is_not_applied_in_the_next_life(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its record is the second of a segment, behind the one that says which that is."""

    def apply(*_: object, **__: object) -> None:
        raise RuntimeError("torch has had enough")

    with (
        running_server(data_dir=str(tmp_path / "data"), journal_segment_bytes=1) as server,
        Adam([parameter()], server=server.address, job="j") as optimizer,
    ):
        step(optimizer)
        job = server.registry.get("j")
        (member,) = job.members()
        with monkeypatch.context() as patched:
            patched.setattr(Store, "apply", apply)
            with pytest.raises(UpdateRefusedError, match="torch has had enough"):
                push(job, begin(job, member), 0)
        shutil.copytree(tmp_path / "data", tmp_path / "copy")
        with recovered(tmp_path / "copy") as jobs:
            assert_same(job, jobs["j"])


def test_a_step_that_cannot_be_taken_back_for_lack_of_memory_stays_as_far_as_it_was_applied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Both as one: the job as it was may not fit on the device beside the job as it is."""
    with running_server(data_dir=str(tmp_path / "data")) as server:

        def recover(*_: object, **__: object) -> None:
            raise torch.OutOfMemoryError("no room on the device")

        once = ProxyOptions(worker_id="one", bucket_bytes=1024)
        optimizer = Adam([parameter()], server=server.address, job="j", options=once)
        job = server.registry.get("j")
        (member,) = job.members()
        push(job, begin(job, member), 0)
        with monkeypatch.context() as patched:
            patched.setattr(storage, "recover", recover)
            job.leave(member)
        assert "stays as far as it was applied" in caplog.text
        with pytest.raises(OptimdError):
            step(optimizer)
        optimizer.close()
        with Adam([parameter()], server=server.address, job="j", options=once) as successor:
            step(successor)
            assert job.step == 1
            shutil.copytree(tmp_path / "data", tmp_path / "copy")
            with recovered(tmp_path / "copy") as jobs:
                assert not jobs["j"].journal.rounds
                assert_same(job, jobs["j"])


def test_what_was_held_of_gradients_before_a_rewind_is_gone_in_the_next_life_too(tmp_path: Path) -> None:
    """It is not added to what is held after it."""
    p, q = parameter(), parameter()
    local = torch.optim.Adam([q], lr=0.1, fused=True)
    settings = ProxyOptions(worker_id="one", bucket_bytes=1024, on_rewind="follow", retry_timeout_s=20)

    def give(value: float) -> None:
        p.grad = torch.linspace(0, value, SIZE)

    def successor(name: str) -> Server:
        server = stack.enter_context(running_server(data_dir=str(tmp_path / name)))
        relay.lead_to(server.address)
        return server

    with (
        ExitStack() as stack,
        running_server(data_dir=str(tmp_path / "data")) as server,
        Relay(server.address) as relay,
        Adam([p], lr=0.1, fused=True, server=relay.address, job="j", options=settings) as optimizer,
    ):
        give(5.0)
        optimizer.accumulate()
        shutil.copytree(tmp_path / "data", tmp_path / "early")
        give(1.0)
        optimizer.step()
        (held,) = successor("early").registry.get("j").members()
        assert held.held.micro == 1
        give(2.0)
        with pytest.warns(UserWarning, match="step 0"):
            optimizer.step()
        give(3.0)
        optimizer.accumulate()
        shutil.copytree(tmp_path / "early", tmp_path / "late")
        successor("late")
        give(4.0)
        optimizer.step()
        optimizer.close()
    q.grad = torch.linspace(0, 3.0, SIZE) + torch.linspace(0, 4.0, SIZE)
    local.step()
    assert relay.cuts
    assert torch.equal(p, q)


def test_buffers_that_a_worker_was_told_are_held_outlive_a_power_loss(tmp_path: Path) -> None:
    """Before any step."""
    with (
        Lives(tmp_path, volatile=True) as lives,
        Adam([parameter()], server=lives.address, job="j") as optimizer,
    ):
        norm = nn.BatchNorm1d(3)
        norm.get_buffer("running_mean").fill_(0.5)
        optimizer.attach_buffers(norm)
        lives.die_and_resume()
        held = lives.server.registry.get("j").buffers.tensors()
        assert torch.equal(held["running_mean"], torch.full((3,), 0.5))
    assert lives.deaths == 1


def test_a_worker_that_has_changed_an_option_has_a_say_in_the_next_life_too(tmp_path: Path) -> None:
    """It joined as a newcomer, whose options do not count before that."""

    def options(rank: int) -> ProxyOptions:
        return ProxyOptions(rank=rank, worker_id=f"w{rank}", world_size="elastic", bucket_bytes=1024)

    with (
        running_server(data_dir=str(tmp_path / "data"), fsync="never") as server,
        ThreadPoolExecutor(2) as pool,
        Adam([parameter()], server=server.address, job="j", options=options(0)) as first,
        Adam([parameter()], server=server.address, job="j", options=options(1)) as second,
    ):
        for changes in (False, True):
            if changes:
                first.param_groups[0]["lr"] = second.param_groups[0]["lr"] = 0.5
            list(pool.map(step, (first, second)))
            shutil.copytree(tmp_path / "data", tmp_path / f"copy-{changes}")
    for changes in (False, True):
        with recovered(tmp_path / f"copy-{changes}") as jobs:
            assert {member.worker.rank: member.speaks for member in jobs["j"].members()} == {0: True, 1: changes}
