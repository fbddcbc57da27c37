"""Parameters replaced on the wire, spoken without optimd's client: in order, out of turn, wrong, cut off."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

import pytest
import torch

from optimd.server import Server
from optimd.v1 import errors_pb2, job_pb2, training_pb2
from tests.integration.test_protocol import PlainWorker, begin, end, gradient, values
from tests.integration.test_protocol import bystander as bystander  # noqa: PLC0414  # a fixture
from tests.integration.test_protocol_pushes import (
    EXP_AVG,
    PARAMETER,
    Twin,
    gets_a_clean_answer,
    goes_on_as_if_nothing_had_been,
    grads,
    is_refused,
    job_content,
    layout_of,
    whole,
)
from tests.support import eventually, running_server

Request = training_pb2.TrainRequest


@pytest.fixture
def server() -> Iterator[Server]:
    """One that is soon done with a worker whose line is down."""
    with running_server(lease_s=4.0, drain_timeout_s=1.0) as running:
        yield running


def replace(layout_count: int = 1) -> training_pb2.TrainRequest:
    return Request(replace_layout=training_pb2.ReplaceLayout(layout_count=layout_count))


@contextmanager
def two_workers(server: Server) -> Iterator[tuple[PlainWorker, PlainWorker]]:
    """Both in the job, which has not been stepped."""
    with PlainWorker(server) as first, PlainWorker(server) as second:
        for rank, worker in enumerate((first, second)):
            request = worker.open_job(worker={"worker_id": f"plain-{rank}", "rank": rank})
            request.open.aggregation.sync.world_size = 2
            worker.send(request, worker.layout())
            if rank == 0:
                worker.until("bucket_table")
                worker.send(*whole(PARAMETER, 1.0))
            worker.until("ready")
        yield first, second


def bring(worker: PlainWorker, value: float, *, layout_count: int = 1) -> list[int]:
    """Answers LayoutAccepted with values, up to JobReady. Gives the lengths of the new buckets."""
    received = worker.until("bucket_table")
    assert received[0].layout_accepted.send_values
    lengths = [sum(piece.length for piece in bucket.slices) for bucket in received[-1].bucket_table.buckets]
    for bucket_id, length in enumerate(lengths):
        worker.send(values(bucket_id, PARAMETER, length, value))
    assert worker.until("ready")[-1].ready.layout_count == layout_count
    return lengths


def test_replaced_parameters_keep_the_states_that_are_carried_and_no_others(server: Server) -> None:
    """Steps and sequences go on; what is carried is by index, and what is not starts anew."""
    with PlainWorker(server).opened() as worker:
        worker.send(begin(), *grads(), end(2))
        worker.until("receipt")
        worker.send(replace(), layout_of([10], [300], carried=[(1, 0)]))
        lengths = bring(worker, 3.0)
        first, _ = job_content(worker, EXP_AVG)
        assert first[EXP_AVG] == pytest.approx([0.1] * 300)
        assert job_content(worker, PARAMETER) == ({PARAMETER: [3.0] * 310}, [1.0])
        worker.send(begin(sequence=1, base_step=1, layout_count=1))
        worker.send(*(gradient(bucket_id, length) for bucket_id, length in enumerate(lengths)), end(len(lengths)))
        receipt = worker.until("receipt")[-1].receipt
        assert (receipt.sequence, receipt.step) == (1, 2)
        moments, steps = job_content(worker, EXP_AVG)
        assert steps == [1.0, 2.0]
        assert moments[EXP_AVG] == pytest.approx([0.1] * 10 + [0.19] * 300)
        worker.send(replace(2), layout_of([300]))
        bring(worker, 4.0, layout_count=2)
        assert job_content(worker, PARAMETER, EXP_AVG) == ({PARAMETER: [4.0] * 300, EXP_AVG: []}, [])


@pytest.mark.parametrize("layout_count", [0, 2, 2**63])
def test_a_replacement_out_of_turn_is_refused_and_the_stream_goes_on(
    server: Server, bystander: Callable[[], None], layout_count: int
) -> None:
    """All of its pages are read, and the job is as it was."""
    twin = Twin()
    with PlainWorker(server).opened() as worker:
        pages = layout_of([5], [6])
        pages.layout.last = False
        worker.send(replace(layout_count), pages, Request(layout=job_pb2.LayoutPage(last=True)))
        is_refused(worker, "JOB_MISMATCH", f"this would be replacement {layout_count} of the parameters")
        worker.send(begin(), *grads(), end(2))
        assert worker.until("receipt")[-1].receipt.step == 1
        twin.step(1.0)
        assert twin.equals(worker)
        worker.send(replace(1), layout_of([300], carried=[(0, 0)]))
        bring(worker, 1.0)
    bystander()


@pytest.mark.parametrize("shapes", [[[2**40]], [[2**17]] * 9, [[0]] * 3000], ids=["one", "together", "descriptions"])
def test_a_replacement_that_is_too_large_is_refused_before_memory_is_taken_and_the_stream_goes_on(
    monkeypatch: pytest.MonkeyPatch, shapes: list[list[int]]
) -> None:
    """Its pages are read to the last."""

    def forbidden(*_: object) -> None:
        raise AssertionError("memory was taken")

    twin = Twin()
    with running_server(max_job_bytes=4_000_000) as small, PlainWorker(small).opened() as worker:
        with monkeypatch.context() as patched:
            patched.setattr("optimd.server.store.Store.add", forbidden)
            pages = layout_of(*shapes)
            pages.layout.last = False
            worker.send(replace(), pages, Request(layout=job_pb2.LayoutPage(last=True)))
            is_refused(worker, "LIMIT_EXCEEDED", "--max-job-bytes")
        worker.send(begin(), *grads(), end(2))
        worker.until("receipt")
        twin.step(1.0)
        assert twin.equals(worker)


WRONG_REPLACEMENT: Final[list[tuple[str, list[training_pb2.TrainRequest], str, str]]] = [
    (
        "carried from nowhere",
        [replace(), layout_of([300], carried=[(0, 1)])],
        "INVALID_FIELD",
        "CarriedState: there are no parameters 0 and 1",
    ),
    (
        "carried to nowhere",
        [replace(), layout_of([300], carried=[(1, 0)])],
        "INVALID_FIELD",
        "CarriedState: there are no parameters 1 and 0",
    ),
    (
        "carried twice to one",
        [replace(), layout_of([300], [300], carried=[(0, 0), (0, 0)])],
        "INVALID_FIELD",
        "CarriedState: a parameter is named twice",
    ),
    (
        "carried twice from one",
        [replace(), layout_of([300], [300], carried=[(0, 0), (1, 0)])],
        "INVALID_FIELD",
        "CarriedState: a parameter is named twice",
    ),
    ("no pages", [replace(), begin()], "OUT_OF_ORDER", "step_begin came where layout was due"),
    ("twice", [replace(), replace()], "OUT_OF_ORDER", "replace_layout came where layout was due"),
    ("gradient", [replace(), layout_of([300]), gradient(0, 256)], "INVALID_FIELD", "gradient of bucket 0 came where"),
    (
        "value twice",
        [replace(), layout_of([300]), *whole(PARAMETER, 5.0)[:1] * 2],
        "INVALID_FIELD",
        "parameter of bucket 0 came where the values of new buckets were due",
    ),
    ("value missing", [replace(), layout_of([300]), *whole(PARAMETER, 5.0)[:1], begin()], "OUT_OF_ORDER", "step_begin"),
    ("value of another size", [replace(), layout_of([300]), values(0, PARAMETER, 9, 5.0)], "INVALID_FIELD", "36 bytes"),
    ("in a push", [begin(), replace()], "OUT_OF_ORDER", "replace_layout came where bucket or step_end was due"),
]


@pytest.mark.parametrize(
    ("requests", "reason", "text"),
    [case[1:] for case in WRONG_REPLACEMENT],
    ids=[case[0] for case in WRONG_REPLACEMENT],
)
def test_a_wrong_replacement_gets_a_clean_answer_and_leaves_the_job_as_it_was(
    server: Server, bystander: Callable[[], None], requests: list[training_pb2.TrainRequest], reason: str, text: str
) -> None:
    """It is put in force when all of its values are there, or never."""
    gets_a_clean_answer(server, bystander, requests, reason, text)


@pytest.mark.parametrize("shape", [[299], [30, 10]])
def test_state_that_does_not_fit_is_refused_and_the_stream_goes_on(server: Server, shape: list[int]) -> None:
    """Of another shape, or as many elements of another rank."""
    twin = Twin()
    with PlainWorker(server).opened() as worker:
        worker.send(replace(), layout_of(shape, carried=[(0, 0)]))
        is_refused(worker, "JOB_MISMATCH", "parameter 0 cannot keep the state of 0")
        worker.send(begin(), *grads(), end(2))
        assert worker.until("receipt")[-1].receipt.step == 1
        twin.step(1.0)
        assert twin.equals(worker)


@pytest.mark.parametrize("brought", [0, 1])
def test_a_replacement_whose_stream_breaks_leaves_the_job_as_it_was(
    server: Server, bystander: Callable[[], None], brought: int
) -> None:
    """Before its first value and behind it."""
    with PlainWorker(server).opened() as worker:
        worker.send(replace(), layout_of([300], [7]))
        worker.until("bucket_table")
        worker.send(*whole(PARAMETER, 5.0)[:brought])
        worker._responses.cancel()
        assert eventually(lambda: server.registry.get("plain").worker_count == 0)
    bystander()
    goes_on_as_if_nothing_had_been(server)


def test_a_replacement_that_one_worker_breaks_off_is_the_next_one_s_to_bring(server: Server) -> None:
    """Who waits for it is asked for the values, then."""
    with two_workers(server) as (first, second):
        first.send(replace(), layout_of([20]))
        assert first.until("layout_accepted")[-1].layout_accepted.send_values
        second.send(replace(), layout_of([20]))
        first._responses.cancel()
        bring(second, 2.0)
        assert job_content(second, PARAMETER)[0][PARAMETER] == [2.0] * 20


def test_a_replacement_that_another_worker_has_brought_is_received(server: Server) -> None:
    """Equal parameters: the values come from the server; others: a refusal, after which the equal ones may come."""
    with two_workers(server) as (first, second):
        first.send(replace(), layout_of([20]))
        bring(first, 2.0)
        second.send(replace(), layout_of([21]))
        is_refused(second, "JOB_MISMATCH", "parameter 0: the job's shape is [20], the worker's [21]")
        second.send(replace(), layout_of([20]))
        received = second.until("ready")
        assert not received[0].layout_accepted.send_values
        payloads = b"".join(part.payload for part in received)
        assert torch.frombuffer(bytearray(payloads), dtype=torch.float32).tolist() == [2.0] * 20
        assert received[-1].ready.layout_count == 1
        second.send(begin())
        assert second.fails()[1].reason == errors_pb2.ERROR_REASON_JOB_MISMATCH


def test_a_replacement_that_was_broken_off_does_not_come_with_what_is_brought_next(server: Server) -> None:
    """A group that is added goes beside the parameters as they were."""
    with PlainWorker(server).opened() as worker:
        worker.send(replace(), layout_of([20]))
        worker.until("bucket_table")
        worker._responses.cancel()
        assert eventually(lambda: server.registry.get("plain").worker_count == 0)
    with PlainWorker(server) as again:
        again.send(again.open_job(), again.layout())
        again.until("ready")
        page = layout_of([7])
        page.layout.groups[0].index = 1
        again.send(Request(add_param_group=training_pb2.AddParamGroup(group=1)), page)
        assert again.until("layout_accepted")[-1].layout_accepted.send_values
        again.send(values(2, PARAMETER, 7, 2.0))
        assert again.until("ready")[-1].ready.layout_count == 0
        assert job_content(again, PARAMETER)[0][PARAMETER] == [1.0] * 300 + [2.0] * 7
