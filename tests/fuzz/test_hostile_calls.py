"""Whatever comes over the line: every answer is a clean status, memory stays flat, and others train on bit-equal.

Short in `make test`; `make fuzz` tries for longer ($OPTIMD_FUZZ_EXAMPLES).
"""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import grpc
import psutil
import pytest
import torch
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from optimd.client import Adam, ProxyOptions, connection
from optimd.v1 import admin_pb2, errors_pb2, reading_pb2, training_pb2
from optimd.v1.admin_service_pb2_grpc import AdminServiceStub
from optimd.wire.bundles import unbundle
from optimd.wire.reasons import ERROR_TRAILER, STATUS_OF_REASON, decode_reason
from tests.support import eventually, running_server, server_process

EXAMPLES = int(os.environ.get("OPTIMD_FUZZ_EXAMPLES", "40"))
MEMORY_MB = 96
"""How much more the process may take at the end: what allocators keep, and what jobs of one example may take."""

fuzzing = settings(
    max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), derandomize=EXAMPLES <= 100
)

CLEAN = {
    *(getattr(grpc.StatusCode, status) for status in STATUS_OF_REASON.values()),
    grpc.StatusCode.OK,
    # The stream's end met the server in the middle of something, or this test hung up.
    grpc.StatusCode.CANCELLED,
} - {grpc.StatusCode.INTERNAL}

# --- hostile messages

_INTEGERS = st.one_of(
    st.sampled_from([0, 1, 2, 3, 63, 64, 255, 4096, 2**20, 2**31 - 1, 2**31, 2**32 - 1, 2**53, 2**63 - 1]),
    st.integers(0, 9),
)
_BYTES = st.one_of(
    st.binary(max_size=40), st.sampled_from([b"\x00" * 4096, b"\xff" * 70_000, b"\x00\x00\xc0\x7f" * 64])
)
_TEXT = st.one_of(
    st.sampled_from(["", "j", "lr", "../../etc/passwd", "optimd-x", "job/x", "\x00", "ä" * 300, "x" * 5000]),
    st.text(max_size=8),
)
_FLOATS = st.one_of(st.floats(width=32), st.sampled_from([0.0, -1.0, 1e-300, 1e300, float("nan"), float("inf")]))


def _value(field: Any, depth: int) -> st.SearchStrategy[Any]:
    if field.type == FieldDescriptor.TYPE_MESSAGE:
        return messages(field.message_type, depth - 1)
    if field.type == FieldDescriptor.TYPE_ENUM:
        return st.one_of(st.sampled_from([value.number for value in field.enum_type.values]), st.integers(0, 1000))
    if field.type == FieldDescriptor.TYPE_STRING:
        return _TEXT
    if field.type == FieldDescriptor.TYPE_BYTES:
        return _BYTES
    if field.type == FieldDescriptor.TYPE_BOOL:
        return st.booleans()
    if field.type in (FieldDescriptor.TYPE_DOUBLE, FieldDescriptor.TYPE_FLOAT):
        return _FLOATS
    top = 2**32 - 1 if field.type in (FieldDescriptor.TYPE_UINT32, FieldDescriptor.TYPE_FIXED32) else 2**63 - 1
    return _INTEGERS.map(lambda number: min(number, top))


def _name(field: Any) -> str:
    return str(field.name)


@st.composite
def messages(draw: st.DrawFn, descriptor: Any, depth: int = 4) -> Message:
    """A message of a type, with any of its fields set to anything that has the type."""
    message: Message = descriptor._concrete_class()  # the class that was generated for it
    fields = [field for field in descriptor.fields if depth > 0 or field.type != FieldDescriptor.TYPE_MESSAGE]
    if not fields:
        return message
    for field in draw(st.lists(st.sampled_from(fields), max_size=5, unique_by=_name)):
        is_map = field.type == FieldDescriptor.TYPE_MESSAGE and field.message_type.GetOptions().map_entry
        if is_map:
            continue
        if field.is_repeated:
            values = draw(st.lists(_value(field, depth), max_size=3))
            getattr(message, field.name).extend(values)
        elif field.type == FieldDescriptor.TYPE_MESSAGE:
            getattr(message, field.name).CopyFrom(draw(_value(field, depth)))
        else:
            setattr(message, field.name, draw(_value(field, depth)))
    return message


def train_requests() -> st.SearchStrategy[bytes]:
    """Requests of a training stream: well-formed, with nonsense in them."""
    descriptor = training_pb2.TrainRequest.DESCRIPTOR
    kinds = descriptor.oneofs_by_name["message"].fields

    @st.composite
    def request(draw: st.DrawFn) -> bytes:
        field: Any = draw(st.sampled_from(list(kinds)))
        message = training_pb2.TrainRequest()
        getattr(message, field.name).CopyFrom(draw(messages(field.message_type)))
        data = message.SerializeToString()
        # A payload behind it, as the ones of buckets have.
        return data + draw(st.sampled_from([b"", b"\x7a\x04abcd", b"\x7a\xff\xff\xff\xff\x0f", b"\x7a\x00"]))

    return request()


# --- what a real worker sends, to be spoilt


@pytest.fixture(scope="module")
def recorded() -> list[bytes]:
    """The messages of a worker that opens a private job, steps, accumulates, adds a group, loads and leaves."""
    sent: list[bytes] = []
    drain = connection._drain

    def recording(*arguments: Any) -> Iterator[bytes]:
        for message in drain(*arguments):
            sent.append(bytes(message))
            yield message

    with pytest.MonkeyPatch.context() as patch, running_server() as server:
        patch.setattr(connection, "_drain", recording)
        p, q = nn.Parameter(torch.ones(3000)), nn.Parameter(torch.ones(5))
        options = ProxyOptions(rank=0, world_size=1, transport="grpc", bucket_bytes=4096)
        with Adam([p], server=server.address, options=options) as optimizer:
            for value in (1.0, 2.0):
                p.grad = torch.full((3000,), value)
                optimizer.step()
            p.grad = torch.ones(3000)
            optimizer.accumulate()
            optimizer.zero_grad()
            optimizer.add_param_group({"params": [q], "lr": 0.5})
            q.grad = torch.ones(5)
            optimizer.param_groups[0]["lr"] = 0.25
            with torch.no_grad():
                p.mul_(2)
            optimizer.step()
            optimizer.load_state_dict(optimizer.state_dict())
            optimizer.step()
    assert len(sent) > 8
    return sent


@dataclass(frozen=True)
class Spoil:
    """What is done to a recorded stream."""

    kind: str
    at: int
    where: float
    other: bytes


def spoils() -> st.SearchStrategy[Spoil]:
    return st.builds(
        Spoil,
        kind=st.sampled_from(["flip", "cut", "drop", "twice", "swap", "insert", "replace", "end", "grow", "as it is"]),
        at=st.integers(0, 40),
        where=st.floats(0, 0.999),
        other=st.one_of(train_requests(), st.binary(max_size=200)),
    )


def spoilt(stream: list[bytes], spoil: Spoil) -> list[bytes]:
    """A copy of a stream with one thing wrong in it."""
    done, at = list(stream), spoil.at % len(stream)
    message = done[at]
    place = int(spoil.where * len(message))
    match spoil.kind:
        case "flip" if message:
            done[at] = message[:place] + bytes([message[place] ^ (1 << place % 8)]) + message[place + 1 :]
        case "cut":
            done[at] = message[:place]
        case "grow":
            done[at] = message[:place] + spoil.other + message[place:]
        case "drop":
            del done[at]
        case "twice":
            done.insert(at, message)
        case "swap":
            done[at], done[at - 1] = done[at - 1], done[at]
        case "insert":
            done.insert(at, spoil.other)
        case "replace":
            done[at] = spoil.other
        case "end":
            del done[at:]
    return done


# --- the server under attack, and the job beside it


class Witness:
    """A job that trains while others attack. Each of its steps is compared with torch's own."""

    def __init__(self, address: str) -> None:
        self._stop = threading.Event()
        self.steps = 0
        self.failure: BaseException | None = None
        self._thread = threading.Thread(target=self._train, args=(address,))
        self._thread.start()

    def _train(self, address: str) -> None:
        try:
            generator = torch.Generator().manual_seed(0)
            ours = nn.Parameter(torch.ones(20_000))
            theirs = nn.Parameter(ours.detach().clone())
            local = torch.optim.Adam([theirs], fused=True)
            options = ProxyOptions(rank=0, world_size=1, worker_id="witness")
            with Adam([ours], server=address, job="witness", options=options) as remote:
                while not self._stop.is_set():
                    grad = torch.randn(20_000, generator=generator)
                    ours.grad, theirs.grad = grad, grad.clone()
                    remote.step()
                    local.step()
                    assert torch.equal(ours, theirs)
                    assert remote.last_receipt is not None
                    assert not remote.last_receipt.resumed
                    self.steps += 1
        except BaseException as error:  # noqa: BLE001  # whatever it is, the test fails with it
            self.failure = error

    def end(self) -> None:
        """It trains on still, and is told to stop."""
        before = self.steps
        assert eventually(lambda: self.steps > before + 1 or self.failure is not None, 60), "it makes no more steps"
        self._stop.set()
        self._thread.join(60)
        assert not self._thread.is_alive()
        assert self.failure is None, self.failure


@dataclass(frozen=True)
class Attacked:
    """A server with a job that has to train on, and a line to attack it by."""

    server: psutil.Process
    channel: grpc.Channel

    @property
    def resident_mb(self) -> float:
        """The memory that it has."""
        return float(self.server.memory_info().rss / 1e6)


@pytest.fixture(scope="module")
def attacked(recorded: list[bytes]) -> Iterator[Attacked]:
    # Only now, lest the witness's own messages be among those.
    assert recorded
    limits = ("--max-job-bytes=33554432", "--max-jobs=20", "--max-workers=16", "--lease-s=1", "--log-level=error")
    with server_process(*limits) as (process, address), grpc.insecure_channel(address) as channel:
        # gRPC logs a traceback for each message that is none: a pipe that nobody reads would have the server wait.
        threading.Thread(target=_read_out, args=(process.stderr,), daemon=True).start()
        witness = Witness(address)
        attacked = Attacked(psutil.Process(process.pid), channel)
        # What is kept for calls of this kind once there has been one.
        for _ in range(3):
            _stream(channel, [b"\xff"])
        before = attacked.resident_mb
        yield attacked
        grown = attacked.resident_mb - before
        witness.end()
        _assert_in_order(channel, address)
        assert process.poll() is None
        assert grown < MEMORY_MB, f"{grown:.0f} MB more"


def _read_out(lines: Iterable[str] | None) -> None:
    with suppress(ValueError):  # closed, at the end
        for _ in lines or ():
            pass


def _assert_in_order(channel: grpc.Channel, address: str) -> None:
    """Of all that came nothing is left that is in somebody's way: no worker is in a job, and a new one trains."""
    admin = AdminServiceStub(channel)
    assert eventually(lambda: admin.GetStatus(admin_pb2.GetStatusRequest(), timeout=20).worker_count == 0, 60)
    for job in admin.ListJobs(admin_pb2.ListJobsRequest(), timeout=20).jobs:
        admin.DeleteJob(admin_pb2.DeleteJobRequest(job=job.job), timeout=20)
    p = nn.Parameter(torch.ones(10))
    options = ProxyOptions(rank=0, world_size=1, worker_id="afterwards")
    with Adam([p], server=address, job="afterwards", options=options) as optimizer:
        p.grad = torch.ones(10)
        optimizer.step()
        assert optimizer.job_step == 1


def _ended(call: grpc.Call) -> None:
    """A call has ended: with a status that says something, and not with a defect."""
    code = call.code()
    assert code in CLEAN, (code, call.details())
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        # The server's own, not that of the call, which nobody has answered then.
        assert any(key == ERROR_TRAILER for key, _ in call.trailing_metadata() or ()), "not answered"
    for key, value in call.trailing_metadata() or ():
        if key == ERROR_TRAILER:
            detail = errors_pb2.ErrorDetail.FromString(value if isinstance(value, bytes) else value.encode())
            assert decode_reason(detail.reason) != "INTERNAL", detail
            assert detail.message


def _stream(channel: grpc.Channel, requests: list[bytes]) -> None:
    method: grpc.StreamStreamMultiCallable[bytes, bytes] = channel.stream_stream("/optimd.v1.OptimizerService/Train")
    call = method(iter(requests), timeout=20)
    try:
        for answer in call:
            for part in unbundle(answer):
                training_pb2.TrainResponse.FromString(part)
    except grpc.RpcError:
        pass
    _ended(call)


@fuzzing
@given(spoil=spoils(), second=spoils())
def test_a_workers_stream_with_something_wrong_in_it(
    attacked: Attacked, recorded: list[bytes], spoil: Spoil, second: Spoil
) -> None:
    """Bits flipped, messages cut, left out, twice, swapped, in the wrong place, or others in their place."""
    channel = attacked.channel
    once = spoilt(recorded, spoil)
    _stream(channel, spoilt(once, second) if once else once)


@fuzzing
@given(requests=st.lists(st.one_of(train_requests(), st.binary(max_size=100)), max_size=6), opened=st.integers(0, 8))
def test_well_formed_nonsense(attacked: Attacked, recorded: list[bytes], requests: list[bytes], opened: int) -> None:
    """From the start, or once a job is open."""
    channel = attacked.channel
    _stream(channel, [*recorded[:opened], *requests])


_METHODS: dict[str, tuple[str, type[Message]]] = {
    "GetCapabilities": ("OptimizerService", reading_pb2.GetCapabilitiesRequest),
    "Heartbeat": ("OptimizerService", reading_pb2.HeartbeatRequest),
    "ReadState": ("OptimizerService", reading_pb2.ReadStateRequest),
    "Snapshot": ("OptimizerService", reading_pb2.SnapshotRequest),
    "ListJobs": ("AdminService", admin_pb2.ListJobsRequest),
    "GetJob": ("AdminService", admin_pb2.GetJobRequest),
    "GetStatus": ("AdminService", admin_pb2.GetStatusRequest),
    "EvictWorker": ("AdminService", admin_pb2.EvictWorkerRequest),
}


@fuzzing
@given(data=st.data(), name=st.sampled_from(sorted(_METHODS)))
def test_other_calls(attacked: Attacked, data: st.DataObject, name: str) -> None:
    """Whatever they ask for, and where what they bring is none."""
    channel = attacked.channel
    service, kind = _METHODS[name]
    request = data.draw(
        st.one_of(messages(kind.DESCRIPTOR).map(lambda message: message.SerializeToString()), st.binary(max_size=100))
    )
    method: grpc.UnaryStreamMultiCallable[bytes, bytes] = channel.unary_stream(f"/optimd.v1.{service}/{name}")
    call = method(request, timeout=20)
    try:
        for _ in itertools.islice(call, 1000):
            pass
    except grpc.RpcError:
        pass
    code = call.code()
    # gRPC itself answers what it cannot deserialise.
    is_grpcs = code is grpc.StatusCode.INTERNAL and "deserializing" in (call.details() or "")
    if not is_grpcs:
        _ended(call)


def _claiming(recorded: list[bytes], **fields: Any) -> list[bytes]:
    """The recorded opening with other things said of its parameter."""
    stream = []
    for message in recorded[:4]:
        for part in unbundle(message):
            request = training_pb2.TrainRequest()
            request.ParseFromString(part)
            for parameter in request.layout.parameters:
                for name, value in fields.items():
                    if isinstance(value, list):
                        del getattr(parameter, name)[:]
                        getattr(parameter, name).extend(value)
                    else:
                        setattr(parameter, name, value)
            stream.append(request.SerializeToString())
    return stream


@pytest.mark.parametrize(
    "fields",
    [
        {"shape": [2**31, 2**31]},
        {"shape": [2**63, 2**63, 2**63]},
        {"shape": [2**40]},
        {"shape": [20_000_000]},
        {"shape": [1] * 100_000},
        {"shape": [0] * 64 + [2**62]},
        {"shape": [3000], "memory_order": [5]},
        {"shape": [3000], "memory_order": [0] * 1000},
        {"dtype": 999},
        {"master_dtype": 999},
        {"name": "x" * 100_000},
    ],
    ids=lambda fields: f"{next(iter(fields))}-{str(next(iter(fields.values())))[:30]}",
)
def test_huge_claims_take_no_memory(attacked: Attacked, recorded: list[bytes], fields: dict[str, Any]) -> None:
    """They are refused before anything is taken for them."""
    channel = attacked.channel
    before = attacked.resident_mb
    method: grpc.StreamStreamMultiCallable[bytes, bytes] = channel.stream_stream("/optimd.v1.OptimizerService/Train")
    call = method(iter(_claiming(recorded, **fields)), timeout=20)
    with pytest.raises(grpc.RpcError):
        for _ in call:
            pass
    assert call.code() in (
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        grpc.StatusCode.UNIMPLEMENTED,
    )
    _ended(call)
    assert attacked.resident_mb - before < 50
