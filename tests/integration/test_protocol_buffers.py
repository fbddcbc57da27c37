"""Buffers and watching on the wire, spoken without optimd's client: in order, wrong, and cut off."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from optimd.server import Server
from optimd.v1 import errors_pb2, tensor_pb2, training_pb2
from tests.integration.test_protocol import PlainWorker, begin, end, gradient, leave
from tests.integration.test_protocol import bystander as bystander  # noqa: PLC0414  # a fixture
from tests.support import eventually, running_server

Request = training_pb2.TrainRequest
BOOLS, FLOATS = tensor_pb2.DTYPE_BOOL, tensor_pb2.DTYPE_FLOAT32
FLAGS = tensor_pb2.BufferSpec(name="flags", dtype=BOOLS, shape=[3])
TABLE = tensor_pb2.BufferSpec(name="table", dtype=FLOATS, shape=[300])


def announce(*specs: tensor_pb2.BufferSpec, last: bool = True) -> list[training_pb2.TrainRequest]:
    return [Request(attach_buffers=training_pb2.AttachBuffers()), page(*specs, last=last)]


def page(*specs: tensor_pb2.BufferSpec, last: bool = True) -> training_pb2.TrainRequest:
    return Request(buffers=training_pb2.BuffersPage(buffers=specs, last=last))


def chunk(offset: int, payload: bytes) -> training_pb2.TrainRequest:
    return Request(buffer_chunk=tensor_pb2.BufferChunk(offset=offset), payload=payload)


def push() -> training_pb2.TrainRequest:
    return Request(push_buffers=training_pb2.PushBuffers())


def whole(value: int = 0) -> list[training_pb2.TrainRequest]:
    """All of FLAGS and TABLE, cut in the middle of an element."""
    content = bytes([1, 0, 1]) + bytes([value]) * 1200
    return [chunk(0, content[:1000]), chunk(1000, content[1000:])]


def test_a_plain_protobuf_client_brings_receives_and_refreshes_buffers(server: Server) -> None:
    """Chunks may be of any size up to bucket_bytes; a receipt that asks is answered or passed over."""
    with PlainWorker(server).opened() as worker:
        worker.send(*announce(FLAGS, last=False), page(TABLE))
        assert worker.receive().buffers_accepted.send_values
        worker.send(*whole(1))
        assert worker.receive().WhichOneof("message") == "buffers_held"
        refresh = server.registry.get("plain").buffers._refresh
        for sequence in range(3):
            refresh._updated_s -= 100
            worker.send(begin(sequence=sequence, base_step=sequence), gradient(0, 256), gradient(1, 44), end(2))
            assert worker.until("receipt")[-1].receipt.wants_buffers
            # Asked anew after each step until it answers; whoever goes on with the next step has declined.
            if sequence == 1:
                worker.send(push(), *whole(2))
                assert worker.receive().WhichOneof("message") == "buffers_held"
        worker.send(leave())
        with pytest.raises(StopIteration):
            worker.receive()
    held = server.registry.get("plain").buffers.tensors()
    assert held["flags"].tolist() == [True, False, True]
    assert torch.equal(held["table"], torch.frombuffer(bytearray([2] * 1200), dtype=torch.float32))
    with PlainWorker(server) as again:
        again.send(again.open_job(), again.layout())
        again.until("ready")
        again.send(*announce(FLAGS, TABLE))
        *_, accepted = again.until("buffers_accepted")
        assert not accepted.buffers_accepted.send_values
        *chunks, _ = again.until("buffers_held")
        assert [part.buffer_chunk.offset for part in chunks] == [0, 1024]
        assert b"".join(part.payload for part in chunks) == bytes([1, 0, 1]) + bytes([2]) * 1200


ANNOUNCED = announce(FLAGS, TABLE)


@pytest.mark.parametrize(
    ("requests", "reason", "text"),
    [
        ([page(FLAGS)], "OUT_OF_ORDER", "buffers came between two steps"),
        ([chunk(0, b"xxx")], "OUT_OF_ORDER", "buffer_chunk came between two steps"),
        ([ANNOUNCED[0], begin()], "OUT_OF_ORDER", "step_begin came where buffers was due"),
        ([ANNOUNCED[0], ANNOUNCED[0]], "OUT_OF_ORDER", "attach_buffers came where buffers was due"),
        ([*ANNOUNCED, begin()], "OUT_OF_ORDER", "step_begin came where buffer_chunk was due"),
        ([*ANNOUNCED, *whole(), *ANNOUNCED], "OUT_OF_ORDER", "has attached its buffers already"),
        ([push()], "OUT_OF_ORDER", "has not been asked for its buffers"),
        ([*ANNOUNCED, *whole(), push()], "OUT_OF_ORDER", "has not been asked for its buffers"),
        ([begin(), *ANNOUNCED], "OUT_OF_ORDER", "attach_buffers came where bucket or step_end was due"),
        (announce(tensor_pb2.BufferSpec(dtype=BOOLS)), "INVALID_FIELD", "BuffersPage.buffers[0]: a name of 0 bytes"),
        (
            announce(FLAGS, tensor_pb2.BufferSpec(name="x" * 1025, dtype=BOOLS)),
            "INVALID_FIELD",
            "BuffersPage.buffers[1]: a name of 1025 bytes",
        ),
        (announce(FLAGS, FLAGS), "INVALID_FIELD", "BuffersPage.buffers[1]: 'flags' is there twice"),
        (announce(tensor_pb2.BufferSpec(name="x", shape=[1])), "INVALID_FIELD", "unknown dtype 0"),
        (announce(tensor_pb2.BufferSpec(name="x", dtype=99)), "INVALID_FIELD", "unknown dtype 99"),
        (announce(tensor_pb2.BufferSpec(name="x", dtype=BOOLS, shape=[1] * 65)), "INVALID_FIELD", "65 dimensions"),
        (
            announce(tensor_pb2.BufferSpec(name="x", dtype=FLOATS, shape=[0, 2**40, 2**40])),
            "INVALID_FIELD",
            "is no tensor's",
        ),
        (announce(tensor_pb2.BufferSpec(name="x", dtype=FLOATS, shape=[2**64 - 1])), "INVALID_FIELD", "is no tensor's"),
        ([*ANNOUNCED, chunk(0, b"")], "INVALID_FIELD", "TrainRequest.payload: 0 bytes; a chunk has 1 to 1024"),
        ([*ANNOUNCED, chunk(0, bytes(1025))], "INVALID_FIELD", "1025 bytes; a chunk has 1 to 1024"),
        ([*ANNOUNCED, chunk(1, b"x")], "INVALID_FIELD", "BufferChunk.offset: 1; 0 is due"),
        ([*ANNOUNCED, chunk(0, bytes(10)), chunk(0, bytes(10))], "INVALID_FIELD", "BufferChunk.offset: 0; 10 is due"),
        ([*ANNOUNCED, chunk(0, bytes([1, 2, 0]))], "INVALID_FIELD", "buffer 'flags' is of bools"),
        ([*ANNOUNCED, whole()[0], chunk(1000, bytes(204))], "INVALID_FIELD", "it ends at byte 1204, the buffers have"),
        (
            [Request(attach_buffers=training_pb2.AttachBuffers(), payload=b"x")],
            "INVALID_FIELD",
            "attach_buffers has none",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_wrong_buffers_get_a_clean_answer_and_disturb_nobody(
    server: Server,
    bystander: Callable[[], None],
    requests: list[training_pb2.TrainRequest],
    reason: str,
    text: str,
) -> None:
    """Reason, field and text; nothing is held of what was not complete; the job can be opened again."""
    with PlainWorker(server).opened() as worker:
        worker.send(*requests)
        worker.fails_with(reason, text)
    bystander()
    complete = requests[: len(ANNOUNCED) + 2] == [*ANNOUNCED, *whole()]
    with PlainWorker(server) as again:
        again.send(again.open_job(), again.layout())
        again.until("ready")
        assert bool(server.registry.get("plain").buffers.tensors()) is complete
        again.send(*ANNOUNCED)
        assert again.until("buffers_accepted")[-1].buffers_accepted.send_values is not complete


@pytest.mark.parametrize(
    "specs",
    [
        [tensor_pb2.BufferSpec(name="huge", dtype=FLOATS, shape=[2**40])],
        [tensor_pb2.BufferSpec(name=f"huge{i}", dtype=FLOATS, shape=[2**17]) for i in range(9)],
        [tensor_pb2.BufferSpec(name=f"empty{i}", dtype=FLOATS, shape=[0]) for i in range(3000)],
    ],
    ids=["one", "together", "descriptions"],
)
def test_a_claim_of_too_much_is_refused_before_memory_is_taken_and_the_stream_goes_on(
    monkeypatch: pytest.MonkeyPatch, specs: Any
) -> None:
    """Nothing is allocated for it, its pages are read to the last, and the next message is understood."""

    def forbidden(*_: object) -> None:
        raise AssertionError("memory was taken")

    with running_server(max_job_bytes=4_000_000) as small, PlainWorker(small).opened() as worker:
        with monkeypatch.context() as patched:
            patched.setattr("optimd.server.bufferexchange.BufferValues", forbidden)
            half = len(specs) // 2
            worker.send(*announce(*specs[:half], last=False), page(*specs[half:]))
            refused = worker.receive().refused
        assert refused.reason == errors_pb2.ERROR_REASON_LIMIT_EXCEEDED
        assert "--max-job-bytes" in refused.message
        worker.send(*ANNOUNCED, *whole())
        worker.until("buffers_held")


def test_a_worker_that_is_lost_in_the_middle_of_its_upload_leaves_it_to_the_next(server: Server) -> None:
    """Who waits for it is the one to bring them, then; and a refresh that breaks off leaves the old values."""
    first, second = PlainWorker(server), PlainWorker(server)
    with first, second:
        for rank, worker in enumerate((first, second)):
            request = worker.open_job(worker={"worker_id": f"plain-{rank}", "rank": rank})
            request.open.aggregation.sync.world_size = 2
            worker.send(request, worker.layout())
            if rank == 0:
                table = worker.until("bucket_table")[-1].bucket_table.buckets
                for bucket in table:
                    header = tensor_pb2.TensorBucket(bucket_id=bucket.bucket_id, kind=tensor_pb2.TENSOR_KIND_PARAMETER)
                    worker.send(Request(bucket=header, payload=bytes(4 * bucket.slices[0].length)))
            worker.until("ready")
        first.send(*ANNOUNCED, whole()[0])
        first.until("buffers_accepted")
        second.send(*ANNOUNCED)
        first._responses.cancel()
        assert second.until("buffers_accepted")[-1].buffers_accepted.send_values
        second.send(*whole(7))
        second.until("buffers_held")
        job = server.registry.get("plain")
        job.buffers._refresh._updated_s -= 100
        second.send(begin(), gradient(0, 256), gradient(1, 44), end(2))
        assert second.until("receipt")[-1].receipt.wants_buffers
        second.send(push(), whole(8)[0])
        second._responses.cancel()
        assert eventually(lambda: job.worker_count == 0)
        assert job.buffers.tensors()["table"].view(torch.uint8).tolist() == [7] * 1200
        assert job.buffers._refresh.asked is None
