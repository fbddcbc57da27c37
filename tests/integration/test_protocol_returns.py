"""Coming back to a job, spoken without optimd's client."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from optimd.server import Server
from optimd.v1 import job_pb2, reading_pb2
from tests.integration.test_protocol import PlainWorker, begin, end, gradient
from tests.integration.test_protocol import bystander as bystander  # noqa: PLC0414  # a fixture
from tests.support import eventually


def back(server: Server, incarnation: int, **changes: Any) -> PlainWorker:
    """The worker of that process, with a new stream on which it has said that it returns."""
    worker = PlainWorker(server)
    worker.incarnation = incarnation
    opening = {"returns_at_step": 0, "returns_with_sequence": 0, **changes}
    worker.send(worker.open_job(**opening), worker.layout())
    return worker


def ready(worker: PlainWorker) -> job_pb2.JobReady:
    return worker.until("ready")[-1].ready


def half_pushed(server: Server) -> int:
    """A worker has brought the first of two buckets when its line breaks. Gives its incarnation."""
    with PlainWorker(server).opened() as worker:
        worker.send(begin(), gradient(0, 256))
        worker.until("bucket")
    job = server.registry.get("plain")
    assert eventually(lambda: not any(member.alive for member in job.members()))
    return worker.incarnation


def test_a_push_is_resumed_without_the_buckets_that_are_there(server: Server) -> None:
    """A parameter may have one slice among them and another one not."""
    twin = nn.Parameter(torch.ones(300))
    twin.grad = torch.ones(300)
    torch.optim.Adam([twin], lr=0.1, fused=True).step()
    with back(server, half_pushed(server)) as worker:
        told = ready(worker)
        assert (told.held_buckets, told.next_sequence, told.job_step) == (b"\x01", 0, 0)
        assert not told.rewound
        worker.send(begin(resumed=True), gradient(1, 44), end(1))
        *buckets, receipt = worker.until("receipt")
        assert (receipt.receipt.step, receipt.receipt.sequence) == (1, 0)
        values = {part.bucket.bucket_id: part.payload for part in buckets}
        flat = torch.cat([torch.frombuffer(bytearray(values[number]), dtype=torch.float32) for number in range(2)])
        assert torch.equal(flat, twin)
        # The next one is not resumed: a slice is missing again.
        worker.send(begin(sequence=1, base_step=1, resumed=True), gradient(1, 44), end(1))
        worker.fails_with("INVALID_FIELD", "has a gradient in 1 of its 2 slices")


def test_buckets_that_are_there_may_be_sent_all_the_same(server: Server) -> None:
    """They are passed over."""
    with back(server, half_pushed(server)) as worker:
        ready(worker)
        worker.send(begin(resumed=True), gradient(0, 256), gradient(1, 44), end(2))
        assert worker.until("receipt")[-1].receipt.step == 1
        parts = worker.stub.ReadState(reading_pb2.ReadStateRequest(job="plain"), timeout=10)
        assert [entry.step for part in parts for entry in part.state_dict.state] == [1]


def test_a_push_that_leaves_out_what_nobody_has_promised_is_refused(
    server: Server, bystander: Callable[[], None]
) -> None:
    """Whether it says that it is resumed or not."""
    for resumed in (False, True):
        with PlainWorker(server).opened() as worker:
            worker.send(begin(resumed=resumed), gradient(1, 44), end(1))
            worker.fails_with("INVALID_FIELD", "has a gradient in 1 of its 2 slices")
        server.registry.delete("plain", force=True)
        bystander()


@pytest.mark.parametrize("ahead", [{"returns_at_step": 1}, {"returns_with_sequence": 1}])
def test_a_worker_that_was_told_of_more_than_the_job_has_is_refused_unless_it_follows(
    server: Server, bystander: Callable[[], None], ahead: dict[str, int]
) -> None:
    """By a step or by a push. The job is as it was, and whoever follows is sent all of it."""
    incarnation = half_pushed(server)
    with back(server, incarnation, **ahead) as worker:
        worker.fails_with("JOB_REWOUND", "stands at step 0, with push 0 of rank 0 to come")
    bystander()
    with back(server, incarnation, **ahead, follows_rewind=True) as worker:
        *parts, last = worker.until("ready")
        assert not any(part.layout_accepted.current for part in parts)
        assert sum(part.WhichOneof("message") == "bucket" for part in parts) >= 2
        assert (last.ready.rewound, last.ready.job_step, last.ready.next_sequence) == (True, 0, 0)
        worker.send(begin(), gradient(0, 256), gradient(1, 44), end(2))
        assert worker.until("receipt")[-1].receipt.step == 1
    # Who is not ahead has nothing to follow.
    with back(server, incarnation, returns_at_step=1, returns_with_sequence=1, follows_rewind=True) as worker:
        assert not ready(worker).rewound


def test_a_snapshot_of_a_server_without_a_disk_is_refused(server: Server) -> None:
    """With the reason that the schema has for it, and the one for an unknown job."""
    import grpc

    from optimd.v1 import errors_pb2

    with PlainWorker(server).opened() as worker:
        for job, reason in (
            ("plain", errors_pb2.ERROR_REASON_NOT_DURABLE),
            ("nobody's", errors_pb2.ERROR_REASON_UNKNOWN_JOB),
        ):
            with pytest.raises(grpc.RpcError) as caught:
                worker.stub.Snapshot(reading_pb2.SnapshotRequest(job=job), timeout=10)
            error: Any = caught.value
            detail = errors_pb2.ErrorDetail.FromString(dict(error.trailing_metadata())["optimd-error-bin"])
            assert detail.reason == reason
