"""The wire, spoken without optimd's client: a plain protobuf client trains, a wrong one gets a clean answer."""

from __future__ import annotations

import itertools
import queue
from collections.abc import Callable, Iterator
from typing import Any, Self

import grpc
import pytest
import torch
from torch import nn

from optimd.client import Adam
from optimd.server import Server
from optimd.v1 import errors_pb2, job_pb2, param_group_pb2, reading_pb2, state_dict_pb2, tensor_pb2, training_pb2
from optimd.v1.optimizer_service_pb2_grpc import OptimizerServiceStub
from optimd.wire.reasons import STATUS_OF_REASON

Request = training_pb2.TrainRequest


class PlainWorker:
    """A worker made of nothing but generated code: one float32 parameter of 300 elements in three buckets."""

    _incarnations = itertools.count(7)

    def __init__(self, server: Server, **changes: Any) -> None:
        self.incarnation = next(self._incarnations)
        self._requests: queue.SimpleQueue[training_pb2.TrainRequest | None] = queue.SimpleQueue()
        self._channel = grpc.insecure_channel(server.address)
        self.stub = OptimizerServiceStub(self._channel)
        self._responses = self.stub.Train(iter(self._requests.get, None), timeout=20)
        self.changes = changes

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._requests.put(None)
        self._channel.close()

    def send(self, *requests: training_pb2.TrainRequest) -> None:
        for request in requests:
            self._requests.put(request)

    def receive(self) -> training_pb2.TrainResponse:
        return next(self._responses)

    def until(self, kind: str) -> list[training_pb2.TrainResponse]:
        received = [self.receive()]
        while received[-1].WhichOneof("message") != kind:
            received.append(self.receive())
        return received

    def fails(self) -> tuple[grpc.StatusCode, errors_pb2.ErrorDetail]:
        """Reads to the end of the stream: its status and detail."""
        with pytest.raises(grpc.RpcError) as caught:
            while True:
                self.receive()
        error: Any = caught.value
        trailers = dict(error.trailing_metadata())
        detail = errors_pb2.ErrorDetail.FromString(trailers["optimd-error-bin"])
        assert detail.message == error.details()
        return error.code(), detail

    def fails_with(self, reason: str, text: str) -> None:
        """Asserts that the stream ends with this reason, its status, and a message that has `text` in it."""
        status, detail = self.fails()
        assert detail.reason == errors_pb2.ErrorReason.Value(f"ERROR_REASON_{reason}"), detail
        assert text in detail.message
        assert status.name == STATUS_OF_REASON[reason]

    def open_job(self, **changes: Any) -> training_pb2.TrainRequest:
        message = job_pb2.OpenJob(
            job="plain",
            worker=job_pb2.WorkerIdentity(worker_id="plain-0", rank=0, incarnation=self.incarnation),
            on_existing=job_pb2.ON_EXISTING_RESUME,
            aggregation=job_pb2.Aggregation(
                sync=job_pb2.SyncAggregation(
                    world_size=1, reduction=job_pb2.REDUCTION_MEAN, timeout_s=10, join_timeout_s=10
                )
            ),
            apply=job_pb2.APPLY_MODE_AUTO,
            bucket_bytes=1024,
        )
        for field, value in changes.items():
            if isinstance(value, dict):
                target = getattr(message, field)
                for key, inner in value.items():
                    setattr(target, key, inner)
            else:
                setattr(message, field, value)
        return Request(open=message)

    def layout(self, **changes: Any) -> training_pb2.TrainRequest:
        page = {
            "groups": [
                param_group_pb2.ParamGroup(
                    parameter_count=1,
                    adam=param_group_pb2.AdamOptions(
                        lr=0.1, betas=param_group_pb2.Betas(beta1=0.9, beta2=0.999), eps=1e-8
                    ),
                )
            ],
            "parameters": [tensor_pb2.ParameterSpec(dtype=tensor_pb2.DTYPE_FLOAT32, shape=[300])],
            "last": True,
            **changes,
        }
        return Request(layout=job_pb2.LayoutPage(**page))

    def opened(self) -> Self:
        self.send(self.open_job(), self.layout())
        table = self.until("bucket_table")[-1].bucket_table.buckets
        for bucket in table:
            self.send(values(bucket.bucket_id, tensor_pb2.TENSOR_KIND_PARAMETER, bucket.slices[0].length, 1.0))
        self.until("ready")
        return self


def values(bucket_id: int, kind: Any, count: int, value: float, **more: Any) -> training_pb2.TrainRequest:
    payload = bytes(memoryview(torch.full((count,), value).numpy())) if count else b""
    header = tensor_pb2.TensorBucket(bucket_id=bucket_id, kind=kind, **more)
    return Request(bucket=header, payload=payload)


def gradient(bucket_id: int, count: int, **more: Any) -> training_pb2.TrainRequest:
    return values(bucket_id, tensor_pb2.TENSOR_KIND_GRADIENT, count, 1.0, **more)


def begin(**changes: Any) -> training_pb2.TrainRequest:
    return Request(
        step_begin=training_pb2.StepBegin(
            **{"sequence": 0, "base_step": 0, "group_count": 1, "load_count": 0, **changes}
        )
    )


def end(count: int) -> training_pb2.TrainRequest:
    return Request(step_end=training_pb2.StepEnd(bucket_count=count))


def leave() -> training_pb2.TrainRequest:
    return Request(leave=training_pb2.Leave())


@pytest.fixture
def bystander(server: Server) -> Iterator[Callable[[], None]]:
    """Another job on the same server; called, it checks that it still trains as torch does."""
    ours, theirs = nn.Parameter(torch.ones(500)), nn.Parameter(torch.ones(500))
    local = torch.optim.Adam([theirs], fused=True)
    with Adam([ours], server=server.address, job="bystander") as remote:

        def check() -> None:
            for p, optimizer in ((ours, remote), (theirs, local)):
                p.grad = torch.ones(500)
                optimizer.step()
            assert torch.equal(ours, theirs)

        check()
        yield check
        check()


def test_a_plain_protobuf_client_trains_to_torchs_bits(server: Server) -> None:
    """Three buckets cut at multiples of 64, one with a slice left out, changed options, a read, and a leave."""
    twin = nn.Parameter(torch.ones(300))
    local = torch.optim.Adam([twin], lr=0.1, fused=True)
    with PlainWorker(server).opened() as worker:
        assert worker.stub.GetCapabilities(reading_pb2.GetCapabilitiesRequest()).rules == ["adam"]
        for step in range(3):
            twin.grad = torch.ones(300)
            pages = []
            if step == 2:
                local.param_groups[0]["lr"] = 0.5
                group = worker.layout().layout.groups[0]
                group.adam.lr = 0.5
                pages = [Request(param_groups=param_group_pb2.ParamGroupsPage(groups=[group]))]
            local.step()
            worker.send(begin(sequence=step, base_step=step, param_group_pages=len(pages)), *pages)
            worker.send(gradient(0, 256), gradient(1, 44), end(2))
            *buckets, receipt = worker.until("receipt")
            assert receipt.receipt == training_pb2.StepReceipt(
                sequence=step, step=step + 1, outcome=training_pb2.STEP_OUTCOME_APPLIED, contributors=[0]
            )
            flat = torch.cat([torch.frombuffer(bytearray(b.payload), dtype=torch.float32) for b in buckets])
            assert torch.equal(flat, twin)
        read = list(
            worker.stub.ReadState(
                reading_pb2.ReadStateRequest(job="plain", tensors=[tensor_pb2.TENSOR_KIND_EXP_AVG]), timeout=10
            )
        )
        assert [entry.step for part in read for entry in part.state_dict.state] == [3]
        moments = torch.cat(
            [torch.frombuffer(bytearray(part.payload), dtype=torch.float32) for part in read if part.payload]
        )
        assert torch.equal(moments, local.state[twin]["exp_avg"])
        worker.send(leave())
        with pytest.raises(StopIteration):
            worker.receive()


@pytest.mark.parametrize(
    ("requests", "reason", "text"),
    [
        ([begin(), gradient(0, 255)], "INVALID_FIELD", "1020 bytes; the gradient of bucket 0 takes 1024"),
        ([begin(), gradient(0, 0)], "INVALID_FIELD", "0 bytes"),
        ([begin(), gradient(9, 256)], "INVALID_FIELD", "bucket_id: 9 is unknown; the job has 2 buckets"),
        ([begin(), gradient(0, 256), gradient(0, 256)], "INVALID_FIELD", "came a second time"),
        ([begin(), gradient(0, 256), end(2)], "INVALID_FIELD", "2, but 1 have come"),
        ([begin(), gradient(0, 256, present=b"\0\0")], "INVALID_FIELD", "bitmap of 2 bytes"),
        ([begin(), gradient(0, 0, present=b"\0")], "INVALID_FIELD", "without any slice"),
        (
            [begin(), values(0, tensor_pb2.TENSOR_KIND_EXP_AVG, 256, 0.0)],
            "INVALID_FIELD",
            "exp_avg of bucket 0 has no place here",
        ),
        ([begin(), values(0, 99, 256, 0.0)], "INVALID_FIELD", "unknown tensor kind 99"),
        ([begin(sequence=5)], "OUT_OF_ORDER", "sequence is 5; 0 is due"),
        ([begin(base_step=3)], "OUT_OF_ORDER", "base_step is 3; the job stands at 0"),
        ([begin(group_count=2)], "JOB_MISMATCH", "has 2 param groups, the job has 1"),
        ([begin(load_count=1)], "JOB_MISMATCH", "has loaded 1 state_dicts, the job 0"),
        ([end(0)], "OUT_OF_ORDER", "step_end came between two steps"),
        ([gradient(0, 256)], "OUT_OF_ORDER", "bucket came between two steps"),
        ([begin(), begin()], "OUT_OF_ORDER", "step_begin came where bucket or step_end was due"),
        ([Request()], "INVALID_FIELD", "TrainRequest.message: is not set"),
        ([Request(leave=training_pb2.Leave(), payload=b"x")], "INVALID_FIELD", "a leave has none"),
        (
            [begin(param_group_pages=1), Request(param_groups=param_group_pb2.ParamGroupsPage()), begin()],
            "OUT_OF_ORDER",
            "step_begin came",
        ),
        (
            [
                begin(param_group_pages=1),
                Request(param_groups=param_group_pb2.ParamGroupsPage(groups=[param_group_pb2.ParamGroup()])),
            ],
            "INVALID_FIELD",
            "without options",
        ),
        (
            [
                begin(param_group_pages=1),
                Request(
                    param_groups=param_group_pb2.ParamGroupsPage(
                        groups=[param_group_pb2.ParamGroup(index=4, adam=param_group_pb2.AdamOptions())]
                    )
                ),
            ],
            "INVALID_FIELD",
            "4 is not one of 1 groups",
        ),
        (
            [begin(), gradient(0, 256), end(1)],
            "INVALID_FIELD",
            "parameter 0 has a gradient in 1 of its 2 slices; all or none is due",
        ),
        (
            [
                begin(param_group_pages=1),
                Request(
                    param_groups=param_group_pb2.ParamGroupsPage(
                        groups=[
                            param_group_pb2.ParamGroup(
                                adam=param_group_pb2.AdamOptions(),
                                extra={"lr": param_group_pb2.ExtraValue(string_value="x")},
                            )
                        ]
                    )
                ),
            ],
            "INVALID_FIELD",
            "extra must not have 'lr'",
        ),
        ([Request(add_param_group=training_pb2.AddParamGroup(group=5))], "OUT_OF_ORDER", "stream ended"),
        (
            [
                Request(load_state=training_pb2.LoadState(digest=b"d", load_count=1)),
                Request(state_dict=state_dict_pb2.StateDictPage(last=True)),
            ],
            "INVALID_FIELD",
            "StateDictPage.param_groups: there are 0, the job has 1",
        ),
        (
            [
                Request(load_state=training_pb2.LoadState(digest=b"d", load_count=1)),
                Request(
                    state_dict=state_dict_pb2.StateDictPage(
                        state=[state_dict_pb2.ParameterState(parameter=8)], last=True
                    )
                ),
            ],
            "INVALID_FIELD",
            "ParameterState.parameter: 8 is unknown",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_a_wrong_message_gets_a_clean_answer_and_disturbs_nobody(
    server: Server,
    bystander: Callable[[], None],
    requests: list[training_pb2.TrainRequest],
    reason: str,
    text: str,
) -> None:
    """Reason, field and text; the job can be opened again, and the other job trains on."""
    with PlainWorker(server).opened() as worker:
        worker.send(*requests)
        if "stream ended" in text:
            worker._requests.put(None)
        worker.fails_with(reason, text)
    bystander()
    with PlainWorker(server) as again:
        again.send(again.open_job(), again.layout())
        assert not again.until("ready")[0].layout_accepted.send_values


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"job": ""}, "OpenJob.job"),
        ({"job": " padded "}, "OpenJob.job"),
        ({"job": "line\nbreak"}, "OpenJob.job"),
        ({"job": "x" * 1025}, "OpenJob.job"),
        ({"worker": {"worker_id": ""}}, "WorkerIdentity.worker_id"),
        ({"worker": {"rank": 1}}, "WorkerIdentity.rank"),
        ({"on_existing": 0}, "OpenJob.on_existing"),
        ({"apply": 0}, "OpenJob.apply"),
        ({"bucket_bytes": 1}, "OpenJob.bucket_bytes"),
        ({"bucket_bytes": 2**31}, "OpenJob.bucket_bytes"),
        ({"max_grad_norm": 0.0}, "OpenJob.max_grad_norm"),
        ({"max_grad_norm": -1.0}, "OpenJob.max_grad_norm"),
        ({"max_grad_norm": float("nan")}, "OpenJob.max_grad_norm"),
        ({"nonfinite": 77}, "OpenJob.nonfinite"),
        ({"max_grad_norm": 1.0, "apply": job_pb2.APPLY_MODE_STREAMING}, "OpenJob.apply"),
        ({"nonfinite": job_pb2.NON_FINITE_SKIP, "apply": job_pb2.APPLY_MODE_STREAMING}, "OpenJob.apply"),
    ],
    ids=str,
)
def test_a_wrong_opening_is_refused_by_the_name_of_its_field(server: Server, change: dict[str, Any], text: str) -> None:
    """Before anything is created."""
    with PlainWorker(server) as worker:
        worker.send(worker.open_job(**change), worker.layout())
        status, detail = worker.fails()
    assert status is grpc.StatusCode.INVALID_ARGUMENT
    assert detail.message.startswith(text)
    assert server.registry.all() == []


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"parameters": []}, "there are 0, the groups count 1"),
        ({"groups": [], "parameters": []}, "LayoutPage.groups"),
        ({"parameters": [tensor_pb2.ParameterSpec(shape=[3])]}, "unknown dtype 0"),
        (
            {"parameters": [tensor_pb2.ParameterSpec(dtype=tensor_pb2.DTYPE_FLOAT32, shape=[1] * 65)]},
            "65 dimensions",
        ),
        (
            {
                "parameters": [
                    tensor_pb2.ParameterSpec(dtype=tensor_pb2.DTYPE_FLOAT32, shape=[3, 3], memory_order=[0, 0])
                ]
            },
            "not a permutation",
        ),
        (
            {
                "parameters": [
                    tensor_pb2.ParameterSpec(
                        dtype=tensor_pb2.DTYPE_FLOAT32, shape=[3], master_dtype=tensor_pb2.DTYPE_BFLOAT16
                    )
                ]
            },
            "not a wider real floating-point type",
        ),
    ],
    ids=["missing", "none", "dtype", "dims", "order", "master"],
)
def test_a_wrong_layout_is_refused_by_the_name_of_its_field(server: Server, change: dict[str, Any], text: str) -> None:
    """Before memory is taken."""
    with PlainWorker(server) as worker:
        worker.send(worker.open_job(), worker.layout(**change))
        status, detail = worker.fails()
    assert status is grpc.StatusCode.INVALID_ARGUMENT
    assert text in detail.message
    assert server.registry.all() == []


@pytest.mark.parametrize(
    "setting", [{}, {"max_grad_norm": 1.0}, {"nonfinite": job_pb2.NON_FINITE_SKIP}, {"nonfinite": 0}], ids=str
)
def test_a_sole_worker_is_told_that_its_steps_are_atomic_where_they_have_to_be(
    server: Server, setting: dict[str, Any]
) -> None:
    """And are streaming else."""
    with PlainWorker(server) as worker:
        worker.send(worker.open_job(**setting), worker.layout())
        accepted = worker.until("layout_accepted")[-1].layout_accepted
    atomic = any(setting.values())
    assert accepted.apply == (job_pb2.APPLY_MODE_ATOMIC if atomic else job_pb2.APPLY_MODE_STREAMING)


def test_a_rule_or_a_policy_that_the_server_does_not_have_is_unsupported(server: Server) -> None:
    """As a newer client would ask for."""
    with PlainWorker(server) as worker:
        worker.send(worker.open_job(), worker.layout(groups=[param_group_pb2.ParamGroup(parameter_count=1)]))
        assert worker.fails()[0] is grpc.StatusCode.UNIMPLEMENTED
    with PlainWorker(server) as worker:
        request = worker.open_job()
        request.open.aggregation.Clear()
        worker.send(request, worker.layout())
        assert worker.fails()[0] is grpc.StatusCode.UNIMPLEMENTED


def test_bytes_that_are_no_message_are_refused(server: Server) -> None:
    """On both calls that take bytes as they come."""
    with grpc.insecure_channel(server.address) as channel:
        garbage = b"\x0a\xff\xff"
        train: Any = channel.stream_stream("/optimd.v1.OptimizerService/Train")
        read: Any = channel.unary_stream("/optimd.v1.OptimizerService/ReadState")
        for call in (train(iter([garbage]), timeout=10), read(garbage, timeout=10)):
            with pytest.raises(grpc.RpcError) as caught:
                list(call)
            error: Any = caught.value
            assert error.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_reading_what_is_not_there_is_refused(server: Server) -> None:
    """An unknown job, an unknown parameter, gradients."""
    with PlainWorker(server).opened() as worker:
        for request, status, text in (
            ({"job": "none"}, grpc.StatusCode.NOT_FOUND, "there is no job 'none'"),
            ({"job": "plain", "parameters": [1]}, grpc.StatusCode.INVALID_ARGUMENT, "1 is unknown"),
            (
                {"job": "plain", "tensors": [tensor_pb2.TENSOR_KIND_GRADIENT]},
                grpc.StatusCode.INVALID_ARGUMENT,
                "gradients are not kept",
            ),
        ):
            with pytest.raises(grpc.RpcError) as caught:
                list(worker.stub.ReadState(reading_pb2.ReadStateRequest(**request), timeout=10))
            error: Any = caught.value
            assert error.code() is status
            assert text in error.details()


def test_a_defect_of_the_server_is_an_incident_that_others_do_not_feel(
    server: Server, bystander: Callable[[], None], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """INTERNAL with an id under which the log has the traceback."""
    with PlainWorker(server).opened() as worker:
        with monkeypatch.context() as patched:
            patched.setattr("optimd.server.pushes.read_bucket", lambda *_: 1 / 0)
            worker.send(begin(), gradient(0, 256))
            status, detail = worker.fails()
        assert status is grpc.StatusCode.INTERNAL
        assert f"incident {detail.incident_id}" in detail.message
    record = next(record for record in caplog.records if detail.incident_id in record.getMessage())
    assert record.exc_info is not None
    assert record.exc_info[0] is ZeroDivisionError
    bystander()
