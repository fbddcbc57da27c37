"""Hooks that are called for every step a job commits, whoever contributes to it."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import textwrap
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import grpc
import psutil
import pytest
import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from optimd.client import (
    Adam,
    JobDeletedError,
    LimitExceededError,
    OptimizerClosedError,
    ProxyOptions,
    StepReceipt,
    StepTimeoutError,
)
from optimd.client.caretaker import caretaker
from optimd.server import Server
from optimd.v1 import errors_pb2, reading_pb2
from optimd.v1.optimizer_service_pb2_grpc import OptimizerServiceStub
from tests.support import eventually, in_threads, running_server


def options(rank: int, world_size: int, **more: Any) -> ProxyOptions:
    return ProxyOptions(rank=rank, world_size=world_size, bucket_bytes=1024, **more)


def step(optimizer: Adam, count: int = 1) -> None:
    for _ in range(count):
        for parameter in optimizer.param_groups[0]["params"]:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()


def hook_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "optimd-hooks"]


@pytest.fixture(autouse=True)
def no_hook_thread_outlives_its_test() -> Iterator[None]:
    """Whatever a test does: no thread of it is left."""
    yield
    assert eventually(lambda: not hook_threads())


@pytest.fixture
def optimizer(server: Server) -> Iterator[Adam]:
    """One worker with one parameter, alone in a private job."""
    with Adam([nn.Parameter(torch.zeros(300))], lr=0.1, server=server.address) as opened:
        yield opened


def test_hooks_are_called_for_the_steps_of_two_workers_once_each_and_in_order(server: Server) -> None:
    """Before `step()` returns, in a thread of their own, with the receipt that `step()` got, less its bytes."""

    def work(rank: int) -> list[StepReceipt]:
        heard: list[StepReceipt] = []
        p = nn.Parameter(torch.zeros(500))
        with Adam([p], server=server.address, job="watched", options=options(rank, 2)) as optimizer:

            def hook(given: Adam, receipt: StepReceipt) -> None:
                assert given is optimizer
                assert threading.current_thread().name == "optimd-hooks"
                assert given.job_step == receipt.step
                heard.append(receipt)

            optimizer.register_server_step_hook(hook)
            for count in range(1, 21):
                step(optimizer)
                assert len(heard) == count
                last = optimizer.last_receipt
                assert last is not None
                assert (heard[-1].step, heard[-1].sequence) == (last.step, last.sequence)
        return heard

    for heard in in_threads(work, 2):
        assert [receipt.step for receipt in heard] == list(range(1, 21))
        assert [receipt.sequence for receipt in heard] == list(range(20))
        assert all(receipt.contributors == (0, 1) and receipt.outcome == "merged" for receipt in heard)
        assert all(receipt.bytes_sent == receipt.bytes_received == 0 for receipt in heard)


def test_a_worker_hears_of_steps_that_others_made_without_it(quick_server: Server) -> None:
    """It stands outside the job's steps: its receipts have no sequence. A stream that names it, as its own would."""
    server = quick_server
    optimizers = [
        Adam([nn.Parameter(torch.zeros(4))], server=server.address, job="others", options=options(rank, 2))
        for rank in range(2)
    ]
    heard: list[StepReceipt] = []
    told = threading.Event()

    def hook(_: Adam, receipt: StepReceipt) -> None:
        heard.append(receipt)
        if receipt.step == 2:
            told.set()

    optimizers[1].register_server_step_hook(hook)
    in_threads(lambda rank: step(optimizers[rank]), 2)
    # Rank 1 loses its training stream, and with it its place, but not the stream that tells it of steps.
    session = optimizers[1]._session
    assert session is not None
    caretaker.forget(session._line)
    session._line.usable().cancel()
    assert eventually(lambda: server.registry.get("others").worker_count == 1)
    step(optimizers[0])
    assert told.wait(20)
    assert [(receipt.step, receipt.sequence, receipt.contributors) for receipt in heard] == [
        (1, 0, (0, 1)),
        (2, None, (0,)),
    ]
    for optimizer in optimizers:
        optimizer.close()


def test_a_hook_sees_the_new_parameters_and_may_read_the_state(optimizer: Adam) -> None:
    """The step that it is told of is in place, and `state_dict()` does not wait for the `step()` that waits for it."""
    (p,) = optimizer.param_groups[0]["params"]
    seen: list[tuple[float, float, float]] = []

    def hook(given: Adam, receipt: StepReceipt) -> None:
        assert given.last_receipt is not None
        assert given.last_receipt.step == receipt.step
        values = p.detach()
        seen.append((float(values[0]), float(values[-1]), float(given.state_dict()["state"][0]["step"])))

    optimizer.register_server_step_hook(hook)
    expected = []
    for count in range(1, 6):
        step(optimizer)
        expected.append((float(p.detach()[0]), float(p.detach()[-1]), float(count)))
    assert seen == expected
    assert len(set(seen)) == 5


def test_hooks_are_called_from_their_registration_on_in_its_order_until_they_are_removed(optimizer: Adam) -> None:
    """As torch's: a handle removes one, once; a with block does so too."""
    heard: list[tuple[str, int]] = []
    step(optimizer)
    first = optimizer.register_server_step_hook(lambda _, receipt: heard.append(("first", receipt.step)))
    assert isinstance(first, RemovableHandle)
    step(optimizer)
    with optimizer.register_server_step_hook(lambda _, receipt: heard.append(("second", receipt.step))):
        step(optimizer)
        first.remove()
        first.remove()
        step(optimizer)
        assert len(hook_threads()) == 1
    step(optimizer)
    assert heard == [("first", 2), ("first", 3), ("second", 3), ("second", 4)]


def test_the_last_hooks_removal_ends_thread_and_stream_and_the_next_one_begins_anew(
    server: Server, optimizer: Adam
) -> None:
    """On the server, too: with room for one watcher, each of many finds it."""
    with running_server(max_workers=1) as small, Adam([nn.Parameter(torch.ones(3))], server=small.address) as other:
        heard: list[int] = []
        for _ in range(5):
            handle = other.register_server_step_hook(lambda _, receipt: heard.append(receipt.step))
            (thread,) = hook_threads()
            step(other)
            handle.remove()
            thread.join(20)
            assert not thread.is_alive()
            step(other)
            assert eventually(lambda: small._service._watchers._value == 1)
        assert heard == [1, 3, 5, 7, 9]
    # And removed by the hook itself, in its thread.
    handles: list[RemovableHandle] = []
    handles.append(optimizer.register_server_step_hook(lambda *_: handles[0].remove()))
    step(optimizer, 2)
    assert eventually(lambda: not hook_threads())


def test_what_a_hook_raises_step_raises_and_later_steps_go_on(optimizer: Adam) -> None:
    """The step is made, the other hook is called, the hook is called again."""
    heard: list[int] = []

    def hook(_: Adam, receipt: StepReceipt) -> None:
        if receipt.step % 2:
            raise KeyError(f"step {receipt.step}")

    optimizer.register_server_step_hook(hook)
    optimizer.register_server_step_hook(lambda _, receipt: heard.append(receipt.step))
    with pytest.raises(KeyError, match="step 1"):
        step(optimizer)
    step(optimizer)
    with pytest.raises(KeyError, match="step 3") as caught:
        step(optimizer)
    assert caught.traceback[-1].name == "hook"
    assert heard == [1, 2, 3]
    assert optimizer.job_step == 3


def test_two_hooks_that_raise_for_one_step_are_both_heard_of(optimizer: Adam, caplog: pytest.LogCaptureFixture) -> None:
    """The first is raised, the second logged; SystemExit is one like any other."""

    def first(*_: object) -> None:
        raise SystemExit(3)

    def second(*_: object) -> None:
        raise ValueError("the second")

    handles = [optimizer.register_server_step_hook(hook) for hook in (first, second)]
    with pytest.raises(SystemExit):
        step(optimizer)
    (record,) = [record for record in caplog.records if "a server step hook raised for step 1" in record.getMessage()]
    assert record.exc_info is not None
    assert str(record.exc_info[1]) == "the second"
    for handle in handles:
        handle.remove()
    step(optimizer)


@pytest.mark.parametrize("call", ["step", "add_param_group", "load_state_dict", "attach_buffers"])
def test_a_hook_that_would_step_is_refused_instead_of_waiting_for_itself(optimizer: Adam, call: str) -> None:
    """So is what else would use the stream that a step may be using."""
    attempts = {
        "step": optimizer.step,
        "add_param_group": lambda: optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]}),
        "load_state_dict": lambda: optimizer.load_state_dict(
            torch.optim.Adam([nn.Parameter(torch.ones(300))]).state_dict()
        ),
        "attach_buffers": lambda: optimizer.attach_buffers(nn.BatchNorm1d(2)),
    }
    handle = optimizer.register_server_step_hook(lambda *_: attempts[call]())
    with pytest.raises(RuntimeError, match=rf"{call}\(\) was called in a server step hook"):
        step(optimizer)
    handle.remove()
    step(optimizer)
    assert optimizer.job_step == 2
    assert len(optimizer.param_groups) == 1


def test_a_hook_may_close_the_optimizer(server: Server, optimizer: Adam) -> None:
    """`step()` returns; nothing is left."""
    optimizer.register_server_step_hook(lambda given, _: given.close())
    step(optimizer)
    assert eventually(lambda: not server.registry.all())
    with pytest.raises(OptimizerClosedError):
        step(optimizer)


def test_step_waits_for_a_hook_no_longer_than_it_tries_to_reach_a_server(server: Server) -> None:
    """And says what it waited for. The next step finds the hook done, and waits for its own."""
    go_on = threading.Event()
    heard: list[int] = []

    def hook(_: Adam, receipt: StepReceipt) -> None:
        go_on.wait(30)
        heard.append(receipt.step)

    asked = ProxyOptions(retry_timeout_s=0.5)
    with Adam([nn.Parameter(torch.ones(3))], server=server.address, options=asked) as optimizer:
        optimizer.register_server_step_hook(hook)
        with pytest.raises(StepTimeoutError, match=r"step 1 is committed, but after 0.5 s a server step hook still"):
            step(optimizer)
        go_on.set()
        step(optimizer)
        assert heard == [1, 2]


def test_the_deletion_of_the_job_is_said_to_who_watches_it(server: Server) -> None:
    """The stream ends with JOB_DELETED, the thread with it; registering anew is refused."""
    heard: list[int] = []
    with Adam([nn.Parameter(torch.ones(3))], server=server.address, job="deleted") as optimizer:
        optimizer.register_server_step_hook(lambda _, receipt: heard.append(receipt.step))
        step(optimizer)
        server.registry.delete("deleted", force=True)
        assert eventually(lambda: not hook_threads())
        hooks = optimizer._server_step_hooks
        assert hooks is not None
        with pytest.raises(
            JobDeletedError, match="server step hooks are not told of steps any more: job 'deleted' was"
        ):
            hooks.settle(2)
        with pytest.raises(JobDeletedError):
            step(optimizer)
        assert heard == [1]


def test_a_stream_that_breaks_is_said_by_the_next_step_and_can_be_begun_anew(optimizer: Adam) -> None:
    """Once there is no time left to take it up again. The step is made; the steps that hooks missed are lost."""
    heard: list[int] = []
    optimizer.register_server_step_hook(lambda _, receipt: heard.append(receipt.step))
    step(optimizer)
    hooks = optimizer._server_step_hooks
    assert hooks is not None
    assert hooks._delivery is not None
    hooks._delivery._retry_timeout_s = 0
    hooks._delivery.stream.cancel()
    with pytest.raises(Exception, match="server step hooks are not told of steps any more"):
        step(optimizer)
    assert optimizer.job_step == 2
    second = optimizer.register_server_step_hook(lambda *_: None)
    step(optimizer)
    second.remove()
    assert heard == [1, 3]


def test_there_is_room_for_as_many_watchers_as_workers(server: Server) -> None:
    """One more is refused at once; training goes on, and health and reads have their threads."""
    with running_server(max_workers=2) as small, grpc.insecure_channel(small.address) as channel:
        optimizers = [Adam([nn.Parameter(torch.ones(3))], server=small.address) for _ in range(2)]
        for optimizer in optimizers:
            optimizer.register_server_step_hook(lambda *_: None)
        call = OptimizerServiceStub(channel).WatchSteps(reading_pb2.WatchStepsRequest(job=optimizers[0].job))
        with pytest.raises(grpc.RpcError) as caught:
            next(call)
        error: Any = caught.value
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "2 watchers at once" in error.details()
        for optimizer in optimizers:
            step(optimizer, 3)
            assert optimizer.state_dict()["state"][0]["step"] == 3
            optimizer.close()


def test_a_registration_that_the_server_refuses_raises_and_leaves_nothing(server: Server) -> None:
    """No hook, no thread: the next step does not wait for what never came."""
    with running_server(max_workers=1) as small, Adam([nn.Parameter(torch.ones(3))], server=small.address) as optimizer:
        small._service._watchers.acquire()
        with pytest.raises(LimitExceededError, match="max-workers"):
            optimizer.register_server_step_hook(lambda *_: None)
        assert eventually(lambda: not hook_threads())
        step(optimizer)
        small._service._watchers.release()
        heard: list[int] = []
        optimizer.register_server_step_hook(lambda _, receipt: heard.append(receipt.step))
        step(optimizer)
        assert heard == [2]


def test_a_watcher_is_told_of_what_it_missed_and_of_what_it_missed_too_long_ago(server: Server) -> None:
    """A plain client: from a step in the past, of an unknown job, and behind what the server remembers."""
    from optimd.server.watching import REMEMBERED_STEPS

    with (
        grpc.insecure_channel(server.address) as channel,
        Adam([nn.Parameter(torch.ones(1))], server=server.address, job="past") as optimizer,
    ):
        stub = OptimizerServiceStub(channel)
        step(optimizer, 3)
        worker_id = server.registry.get("past").members()[0].worker.worker_id
        call = stub.WatchSteps(reading_pb2.WatchStepsRequest(job="past", worker_id=worker_id, after_step=1), timeout=20)
        told = [next(call), next(call)]
        assert [(part.receipt.step, part.receipt.sequence, part.contributed) for part in told] == [
            (2, 1, True),
            (3, 2, True),
        ]
        call.cancel()
        stranger = stub.WatchSteps(reading_pb2.WatchStepsRequest(job="past", after_step=2), timeout=20)
        assert not next(stranger).contributed
        stranger.cancel()
        step(optimizer, REMEMBERED_STEPS)
        for request, reason in (
            ({"job": "nobody's"}, errors_pb2.ERROR_REASON_UNKNOWN_JOB),
            ({"job": "past", "after_step": 2}, errors_pb2.ERROR_REASON_LIMIT_EXCEEDED),
        ):
            with pytest.raises(grpc.RpcError) as caught:
                next(stub.WatchSteps(reading_pb2.WatchStepsRequest(**request), timeout=20))
            error: Any = caught.value
            assert (
                errors_pb2.ErrorDetail.FromString(dict(error.trailing_metadata())["optimd-error-bin"]).reason == reason
            )
        assert (
            next(stub.WatchSteps(reading_pb2.WatchStepsRequest(job="past", after_step=3), timeout=20)).receipt.step == 4
        )


def test_dropped_optimizers_with_hooks_leave_nothing_behind(server: Server, request: pytest.FixtureRequest) -> None:
    """No thread, no job, no watcher, no reference, though nobody called close() and no collector ran."""
    references: list[weakref.ref[Any]] = []

    def make_and_drop() -> None:
        optimizer = Adam([nn.Parameter(torch.ones(3))], server=server.address)
        optimizer.register_server_step_hook(lambda given, _: given.state_dict())
        step(optimizer)
        assert hook_threads()
        hooks = optimizer._server_step_hooks
        assert hooks is not None
        assert hooks._delivery is not None
        references.extend(map(weakref.ref, (optimizer, hooks, hooks._delivery, hooks._delivery.stream._call)))

    gc.collect()
    gc.disable()
    request.addfinalizer(gc.enable)
    for _ in range(3):
        make_and_drop()
    process = psutil.Process()
    assert eventually(lambda: not server.registry.all() and not hook_threads())
    files, threads = process.num_fds(), process.num_threads()
    for _ in range(30):
        make_and_drop()
    assert eventually(lambda: not server.registry.all() and not hook_threads())
    assert eventually(lambda: process.num_fds() <= files + 3), process.num_fds()
    assert eventually(lambda: process.num_threads() <= threads + 5), process.num_threads()
    assert eventually(lambda: server._service._watchers._value == server._service._limits.max_workers)
    assert eventually(lambda: all(reference() is None for reference in references))


def test_a_stopping_server_does_not_wait_for_watchers() -> None:
    """It ends their streams; the worker is told by its next step."""
    with running_server() as stopping:
        options = ProxyOptions(retry_timeout_s=0.5)
        optimizer = Adam([nn.Parameter(torch.ones(3))], server=stopping.address, options=options)
        optimizer.register_server_step_hook(lambda *_: None)
        step(optimizer)
        ended = threading.Thread(target=stopping.stop)
        ended.start()
        ended.join(10)
        assert not ended.is_alive()
        assert eventually(lambda: not hook_threads())
    optimizer.close()


def test_a_forked_child_leaves_the_hooks_alone_and_a_process_may_end_with_them(tmp_path: Any) -> None:
    """The child neither hangs nor ends the parent's stream; the parent exits without closing anything."""
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(
            """
            import os, sys, torch
            from optimd.client import Adam, ForkedProcessError

            def step():
                optimizer.param_groups[0]["params"][0].grad = torch.ones(3)
                optimizer.step()

            torch.set_num_threads(1)
            heard = []
            optimizer = Adam([torch.nn.Parameter(torch.ones(3))])
            handle = optimizer.register_server_step_hook(lambda given, receipt: heard.append(receipt.step))
            step()
            child = os.fork()
            if child == 0:
                for refused in (step, lambda: optimizer.register_server_step_hook(print)):
                    try:
                        refused()
                    except ForkedProcessError:
                        print("refused", flush=True)
                handle.remove()
                optimizer.close()
                del optimizer
                sys.exit(7)
            print("status:", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
            step()
            print("parent:", heard)
            """
        )
    )
    process = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", str(script)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )
    assert process.stdout.splitlines() == ["refused", "refused", "status: 7", "parent: [1, 2]"], process.stderr
    assert (process.returncode, process.stderr) == (0, "")
