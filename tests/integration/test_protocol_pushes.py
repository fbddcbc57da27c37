"""What a push may bring on the wire besides gradients, spoken without optimd's client: in order, wrong, cut off."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, Final

import pytest
import torch
from torch import nn

from optimd.server import Server
from optimd.v1 import errors_pb2, job_pb2, param_group_pb2, reading_pb2, state_dict_pb2, tensor_pb2, training_pb2
from tests.integration.test_protocol import PlainWorker, begin, end, gradient, values
from tests.integration.test_protocol import bystander as bystander  # noqa: PLC0414  # a fixture
from tests.support import eventually, in_threads

Request = training_pb2.TrainRequest
PARAMETER, GRADIENT = tensor_pb2.TENSOR_KIND_PARAMETER, tensor_pb2.TENSOR_KIND_GRADIENT
EXP_AVG, EXP_AVG_SQ = tensor_pb2.TENSOR_KIND_EXP_AVG, tensor_pb2.TENSOR_KIND_EXP_AVG_SQ
FLOATS: Final = tensor_pb2.DTYPE_FLOAT32
NAN: Final = float("nan")
LENGTHS: Final = {0: 256, 1: 44}


def whole(kind: Any, value: float) -> list[training_pb2.TrainRequest]:
    """One kind of tensor of the one parameter, every element of it `value`."""
    return [values(bucket_id, kind, length, value) for bucket_id, length in LENGTHS.items()]


def grads(value: float = 1.0) -> list[training_pb2.TrainRequest]:
    return whole(GRADIENT, value)


def page(*entries: state_dict_pb2.PushedEntry) -> training_pb2.TrainRequest:
    return Request(pushed=state_dict_pb2.PushedPage(entries=entries))


def value_of(parameter: int) -> state_dict_pb2.PushedEntry:
    return state_dict_pb2.PushedEntry(parameter=parameter, has_value=True)


def state_of(parameter: int, step: float, *kinds: Any, of: int | None = None) -> state_dict_pb2.PushedEntry:
    """An entry with a state, which says that it is of parameter `of`."""
    state = state_dict_pb2.ParameterState(parameter=parameter if of is None else of, step=step, tensors=kinds)
    return state_dict_pb2.PushedEntry(parameter=parameter, state=state)


def accumulate(**changes: Any) -> training_pb2.TrainRequest:
    return Request(accumulate=training_pb2.Accumulate(**{"group_count": 1, **changes}))


def accumulate_end(count: int) -> training_pb2.TrainRequest:
    return Request(accumulate_end=training_pb2.AccumulateEnd(bucket_count=count))


def accumulation(value: float = 1.0, **changes: Any) -> list[training_pb2.TrainRequest]:
    return [accumulate(**changes), *grads(value), accumulate_end(2)]


def discard(**changes: Any) -> training_pb2.TrainRequest:
    return Request(discard_accumulated=training_pb2.DiscardAccumulated(**changes))


def layout_of(*shapes: Sequence[int], carried: Sequence[tuple[int, int]] = (), **adam: Any) -> Any:
    """A LayoutPage of one group of float32 parameters."""
    options = {"lr": 0.1, "betas": param_group_pb2.Betas(beta1=0.9, beta2=0.999), "eps": 1e-8, **adam}
    group = param_group_pb2.ParamGroup(parameter_count=len(shapes), adam=param_group_pb2.AdamOptions(**options))
    pairs = [job_pb2.CarriedState(parameter=index, carried_from=origin) for index, origin in carried]
    parameters = [tensor_pb2.ParameterSpec(dtype=FLOATS, shape=shape) for shape in shapes]
    return Request(layout=job_pb2.LayoutPage(groups=[group], parameters=parameters, last=True, carried=pairs))


def options_page(**adam: Any) -> training_pb2.TrainRequest:
    groups = list(layout_of([300], **adam).layout.groups)
    return Request(param_groups=param_group_pb2.ParamGroupsPage(groups=groups))


def is_refused(worker: PlainWorker, reason: str, text: str) -> None:
    """Its answer is a refusal, on a stream that goes on."""
    refused = worker.until("refused")[-1].refused
    assert refused.reason == errors_pb2.ErrorReason.Value(f"ERROR_REASON_{reason}"), refused
    assert text in refused.message


def job_content(worker: PlainWorker, *kinds: Any) -> tuple[dict[Any, list[float]], list[float]]:
    """All elements of the job's tensors by kind, in order, and the steps of the parameters that have a state."""
    tensors: dict[Any, list[float]] = {kind: [] for kind in kinds}
    steps = []
    request = reading_pb2.ReadStateRequest(job="plain", tensors=kinds)
    for part in worker.stub.ReadState(request, timeout=10):
        steps += [entry.step for entry in part.state_dict.state]
        if part.payload:
            elements = torch.frombuffer(bytearray(part.payload), dtype=torch.float32).tolist()
            tensors[part.bucket.kind] += elements
    return tensors, steps


class Twin:
    """What torch makes of the same steps."""

    def __init__(self, *numels: int) -> None:
        self.parameters = [nn.Parameter(torch.ones(numel)) for numel in numels or (300,)]
        self.adam = torch.optim.Adam(self.parameters, lr=0.1, fused=True)

    def step(self, *values: float) -> None:
        for parameter, value in zip(self.parameters, values, strict=True):
            parameter.grad = torch.full_like(parameter, value)
        self.adam.step()

    def state(self, index: int = 0) -> Any:
        return self.adam.state[self.parameters[index]]

    def equals(self, worker: PlainWorker) -> bool:
        """Whether the job has the same values, moments and steps, bit for bit."""
        tensors, steps = job_content(worker, PARAMETER, EXP_AVG, EXP_AVG_SQ)
        stepped = [parameter for parameter in self.parameters if parameter in self.adam.state]
        return (
            tensors[PARAMETER] == [x for parameter in self.parameters for x in parameter.tolist()]
            and tensors[EXP_AVG] == [x for parameter in stepped for x in self.adam.state[parameter]["exp_avg"].tolist()]
            and tensors[EXP_AVG_SQ]
            == [x for parameter in stepped for x in self.adam.state[parameter]["exp_avg_sq"].tolist()]
            and steps == [self.adam.state[parameter]["step"].item() for parameter in stepped]
        )


def goes_on_as_if_nothing_had_been(server: Server) -> None:
    """The job can be opened again, holds what it held after its creation, and makes its first step as torch would."""
    twin = Twin()
    with PlainWorker(server) as again:
        again.send(again.open_job(), again.layout())
        *_, ready = again.until("ready")
        assert ready.ready == job_pb2.JobReady(lease_s=server.registry.get("plain").lease_s)
        assert twin.equals(again)
        again.send(begin(), *grads(), end(2))
        assert again.until("receipt")[-1].receipt.step == 1
        twin.step(1.0)
        assert twin.equals(again)


def gets_a_clean_answer(
    server: Server, bystander: Callable[[], None], requests: list[training_pb2.TrainRequest], reason: str, text: str
) -> None:
    with PlainWorker(server).opened() as worker:
        worker.send(*requests)
        worker.fails_with(reason, text)
    bystander()
    goes_on_as_if_nothing_had_been(server)


# --- values and states


def test_values_and_states_that_are_pushed_are_what_the_step_starts_from(server: Server) -> None:
    """In one page or in several, of one parameter; the buckets of all kinds in any order, then the gradients."""
    twin = Twin()
    with PlainWorker(server).opened() as worker:
        worker.send(begin(), *grads(), end(2))
        worker.until("receipt")
        twin.step(1.0)
        pages = [page(value_of(0)), page(), page(state_of(0, 10.0, EXP_AVG, EXP_AVG_SQ))]
        worker.send(begin(sequence=1, base_step=1, pushed_pages=3), *pages)
        content = [*whole(EXP_AVG_SQ, 0.25), *whole(PARAMETER, 2.0), *whole(EXP_AVG, 0.5)]
        worker.send(*reversed(content), *grads(), end(2))
        receipt = worker.until("receipt")[-1].receipt
        assert (receipt.step, list(receipt.contributors), list(receipt.pushed_differently)) == (2, [0], [])
        twin.parameters[0].data.fill_(2.0)
        twin.state()["step"].fill_(10)
        twin.state()["exp_avg"].fill_(0.5)
        twin.state()["exp_avg_sq"].fill_(0.25)
        twin.step(1.0)
        assert twin.equals(worker)
        worker.send(begin(sequence=2, base_step=2, pushed_pages=1), page(state_of(0, 0.0)), *grads(), end(2))
        worker.until("receipt")
        del twin.adam.state[twin.parameters[0]]
        twin.step(1.0)
        assert twin.equals(worker)


def test_content_that_is_pushed_without_gradients_is_put_in_place(server: Server) -> None:
    """By a step that has none, and by one that is skipped."""
    with PlainWorker(server).opened() as worker:
        worker.send(begin(pushed_pages=1), page(value_of(0)), *whole(PARAMETER, 7.0), end(0))
        assert worker.until("receipt")[-1].receipt.outcome == training_pb2.STEP_OUTCOME_APPLIED
        assert job_content(worker, PARAMETER)[0][PARAMETER] == [7.0] * 300
        request = begin(sequence=1, base_step=1, pushed_pages=1, skipped=True)
        worker.send(request, page(value_of(0)), *whole(PARAMETER, 8.0), end(0))
        assert worker.until("receipt")[-1].receipt == training_pb2.StepReceipt(
            sequence=1, step=1, outcome=training_pb2.STEP_OUTCOME_SKIPPED_NONFINITE
        )
        assert job_content(worker, PARAMETER) == ({PARAMETER: [8.0] * 300}, [])


VALUE: Final = [begin(pushed_pages=1), page(value_of(0))]
WRONG_CONTENT: Final[list[tuple[str, list[training_pb2.TrainRequest], str, str]]] = [
    ("unknown", [*VALUE[:1], page(value_of(5))], "INVALID_FIELD", "PushedEntry.parameter: 5 is unknown"),
    ("unknown state", [*VALUE[:1], page(state_of(1, 1.0))], "INVALID_FIELD", "PushedEntry.parameter: 1 is unknown"),
    (
        "state of another",
        [*VALUE[:1], page(state_of(0, 1.0, of=1))],
        "INVALID_FIELD",
        "PushedEntry.state.parameter: is another than the entry's",
    ),
    ("nan step", [*VALUE[:1], page(state_of(0, NAN))], "INVALID_FIELD", "ParameterState.step: nan is not a number"),
    ("kind", [*VALUE[:1], page(state_of(0, 1.0, 99))], "INVALID_FIELD", "ParameterState.tensors: unknown tensor kind"),
    ("value as state", [*VALUE[:1], page(state_of(0, 1.0, PARAMETER))], "INVALID_FIELD", "are not state"),
    ("gradient as state", [*VALUE[:1], page(state_of(0, 1.0, GRADIENT))], "INVALID_FIELD", "are not state"),
    ("no page", [*VALUE[:1], *whole(PARAMETER, 5.0)], "OUT_OF_ORDER", "bucket came where pushed was due"),
    ("page missing", [begin(pushed_pages=2), VALUE[1], end(0)], "OUT_OF_ORDER", "step_end came where pushed was due"),
    ("page too many", [*VALUE, VALUE[1]], "OUT_OF_ORDER", "pushed came where bucket was due"),
    ("page unannounced", [begin(), VALUE[1]], "OUT_OF_ORDER", "pushed came where bucket or step_end was due"),
    ("buckets missing", [*VALUE, end(0)], "OUT_OF_ORDER", "step_end came where bucket was due"),
    ("bucket missing", [*VALUE, *whole(PARAMETER, 5.0)[:1], end(0)], "OUT_OF_ORDER", "step_end came where bucket"),
    (
        "bucket twice",
        [*VALUE, *whole(PARAMETER, 5.0)[:1] * 2],
        "INVALID_FIELD",
        "parameter of bucket 0 is not what the entries announced",
    ),
    (
        "bucket too many",
        [*VALUE, *whole(PARAMETER, 5.0), *whole(PARAMETER, 6.0)],
        "INVALID_FIELD",
        "parameter of bucket 0 has no place here",
    ),
    (
        "bucket of another kind",
        [*VALUE, *whole(EXP_AVG, 5.0)],
        "INVALID_FIELD",
        "exp_avg of bucket 0 is not what the entries announced",
    ),
    ("bucket unannounced", [begin(), *whole(PARAMETER, 5.0)], "INVALID_FIELD", "parameter of bucket 0 has no place"),
    (
        "gradient early",
        [*VALUE, *whole(PARAMETER, 5.0)[:1], *grads()],
        "INVALID_FIELD",
        "gradient of bucket 0 is not what the entries announced",
    ),
    ("payload", [*VALUE, values(0, PARAMETER, 255, 5.0)], "INVALID_FIELD", "the parameter of bucket 0 takes 1024"),
    ("unknown bucket", [*VALUE, values(2, PARAMETER, 256, 5.0)], "INVALID_FIELD", "bucket_id: 2 is unknown"),
    (
        "skipped",
        [begin(skipped=True), *grads()],
        "INVALID_FIELD",
        "StepBegin: a push that is to bring no gradients has brought",
    ),
    (
        "skipped with content",
        [begin(skipped=True, pushed_pages=1), page(value_of(0)), *whole(PARAMETER, 5.0), *grads()],
        "INVALID_FIELD",
        "StepBegin: a push that is to bring no gradients has brought",
    ),
    (
        "without gradients",
        [begin(without_gradients=True), *grads()],
        "INVALID_FIELD",
        "StepBegin: a push that is to bring no gradients has brought",
    ),
    ("skipped count", [begin(skipped=True), end(2)], "INVALID_FIELD", "step_end.bucket_count: 2, but 0 have come"),
    ("layout count", [begin(layout_count=1)], "JOB_MISMATCH", "has replaced its parameters 1 times, the job's were"),
]


@pytest.mark.parametrize(
    ("requests", "reason", "text"), [case[1:] for case in WRONG_CONTENT], ids=[case[0] for case in WRONG_CONTENT]
)
def test_wrong_content_gets_a_clean_answer_and_changes_nothing(
    server: Server, bystander: Callable[[], None], requests: list[training_pb2.TrainRequest], reason: str, text: str
) -> None:
    """Reason, field and text; nothing is put in place of what was not complete."""
    gets_a_clean_answer(server, bystander, requests, reason, text)


@pytest.mark.parametrize(
    ("present", "count", "text"),
    [
        (b"\2", 20, "parameter of bucket 0 is not what the entries announced"),
        (b"\3", 30, "parameter of bucket 0 is not what the entries announced"),
        (b"", 30, "parameter of bucket 0 is not what the entries announced"),
        (b"\0", 0, "without any slice"),
        (b"\1\0", 10, "a bitmap of 2 bytes does not fit 2 slices"),
        (b"\1", 20, "80 bytes; the parameter of bucket 0 takes 40"),
    ],
)
def test_content_of_other_slices_than_were_announced_is_refused(
    server: Server, bystander: Callable[[], None], present: bytes, count: int, text: str
) -> None:
    """Of two parameters in one bucket, the first of which was announced."""
    with PlainWorker(server) as worker:
        worker.send(worker.open_job(), layout_of([10], [20]))
        worker.until("bucket_table")
        worker.send(values(0, PARAMETER, 30, 1.0))
        worker.until("ready")
        worker.send(begin(pushed_pages=1), page(value_of(0)), values(0, PARAMETER, count, 5.0, present=present))
        _, detail = worker.fails()
        assert detail.reason == errors_pb2.ERROR_REASON_INVALID_FIELD
        assert text in detail.message
    bystander()
    with PlainWorker(server) as again:
        again.send(again.open_job(), layout_of([10], [20]))
        again.until("ready")
        request = begin(pushed_pages=1), page(value_of(0)), values(0, PARAMETER, 10, 5.0, present=b"\1"), end(0)
        again.send(*request)
        again.until("receipt")
        assert job_content(again, PARAMETER)[0][PARAMETER] == [5.0] * 10 + [1.0] * 20


@pytest.mark.parametrize("complete", [False, True])
def test_a_worker_lost_with_its_content_leaves_the_job_as_it_was(
    server: Server, bystander: Callable[[], None], monkeypatch: pytest.MonkeyPatch, complete: bool
) -> None:
    """Whether all of its buckets had come or not: the step was not complete."""
    from optimd.server.incoming import read_bucket
    from optimd.server.pushing import Pushing

    arrived = threading.Event()

    def announcing(function: Callable[..., Any]) -> Callable[..., Any]:
        def announced(*arguments: Any) -> Any:
            result = function(*arguments)
            arrived.set()
            return result

        return announced

    with PlainWorker(server).opened() as worker, monkeypatch.context() as patched:
        if complete:
            patched.setattr(Pushing, "bring", announcing(Pushing.bring))
        else:
            patched.setattr("optimd.server.staging.read_bucket", announcing(read_bucket))
        worker.send(*VALUE, *whole(PARAMETER, 5.0)[: 2 if complete else 1])
        assert arrived.wait(10)
        worker._responses.cancel()
        assert eventually(lambda: not server.registry.get("plain").has_connected_workers)
    bystander()
    goes_on_as_if_nothing_had_been(server)


# --- gradients that are held


def accumulated(worker: PlainWorker) -> int:
    """The next micro, by the server's answer."""
    return worker.until("accumulated")[-1].accumulated.micro


def test_gradients_that_were_accumulated_are_in_the_next_step_and_in_no_other(server: Server) -> None:
    """A number that comes again is answered and not added, whatever gradients it brings."""
    twin = Twin()
    with PlainWorker(server).opened() as worker:
        for value, micro in ((1.0, 0), (5.0, 0), (2.0, 1), (9.0, 0)):
            worker.send(*accumulation(value, micro=micro))
            assert accumulated(worker) == micro + 1
        worker.send(begin(micro=2), *grads(4.0), end(2))
        worker.until("receipt")
        twin.step(7.0)
        assert twin.equals(worker)
        worker.send(begin(sequence=1, base_step=1), *grads(), end(2))
        worker.until("receipt")
        twin.step(1.0)
        assert twin.equals(worker)


def test_accumulated_gradients_make_a_step_of_a_push_that_brings_none(server: Server) -> None:
    """As after the last of several backward passes has had no gradient for anything."""
    twin = Twin()
    with PlainWorker(server).opened() as worker:
        worker.send(*accumulation(3.0), begin(micro=1), end(0))
        *buckets, receipt = worker.until("receipt")
        assert receipt.receipt.contributors == [0]
        twin.step(3.0)
        assert twin.equals(worker)
        payloads = b"".join(part.payload for part in buckets)
        assert torch.equal(torch.frombuffer(bytearray(payloads), dtype=torch.float32), twin.parameters[0])


def test_an_accumulation_without_gradients_counts(server: Server) -> None:
    """It has a number like any other."""
    twin = Twin()
    with PlainWorker(server).opened() as worker:
        worker.send(accumulate(), accumulate_end(0))
        assert accumulated(worker) == 1
        worker.send(begin(micro=1), *grads(), end(2))
        worker.until("receipt")
        twin.step(1.0)
        assert twin.equals(worker)


def test_what_is_discarded_is_not_in_the_step(server: Server) -> None:
    """A discard has a number of its own, and one that comes again takes nothing away."""
    twin = Twin()
    with PlainWorker(server).opened() as worker:
        for requests, micro in (
            (accumulation(5.0), 1),
            ([discard(micro=1)], 2),
            (accumulation(2.0, micro=2), 3),
            ([discard(micro=1)], 2),
        ):
            worker.send(*requests)
            assert accumulated(worker) == micro
        worker.send(begin(micro=3), *grads(), end(2))
        worker.until("receipt")
        twin.step(3.0)
        assert twin.equals(worker)


def test_a_skipped_push_takes_what_was_accumulated_with_it(server: Server) -> None:
    """The next one starts from nothing."""
    twin = Twin()
    with PlainWorker(server).opened() as worker:
        worker.send(*accumulation(5.0), begin(micro=1, skipped=True), end(0))
        receipt = worker.until("receipt")[-1].receipt
        assert (receipt.step, receipt.outcome) == (0, training_pb2.STEP_OUTCOME_SKIPPED_NONFINITE)
        assert twin.equals(worker)
        worker.send(begin(sequence=1), *grads(), end(2))
        worker.until("receipt")
        twin.step(1.0)
        assert twin.equals(worker)


@pytest.mark.parametrize("claimed", [0, 2])
def test_a_push_that_counts_on_other_accumulations_is_refused_and_the_stream_goes_on(
    server: Server, bystander: Callable[[], None], claimed: int
) -> None:
    """It is read to its end, with all that it brings; its number is due again, and counting starts anew."""
    twin = Twin()
    with PlainWorker(server).opened() as worker:
        worker.send(*accumulation(5.0))
        assert accumulated(worker) == 1
        worker.send(begin(micro=claimed, pushed_pages=1), page(value_of(0)), *whole(PARAMETER, 9.0), *grads(), end(2))
        is_refused(worker, "ACCUMULATION_LOST", f"has accumulated {claimed} times for this step, the server holds 1")
        assert twin.equals(worker)
        worker.send(*accumulation(2.0))
        assert accumulated(worker) == 1
        worker.send(begin(micro=1), *grads(), end(2))
        assert worker.until("receipt")[-1].receipt.step == 1
        twin.step(3.0)
        assert twin.equals(worker)
    bystander()


def test_what_was_accumulated_on_a_stream_that_broke_is_lost_and_it_is_said(server: Server) -> None:
    """The next process of the worker starts from nothing, and can go on."""
    with PlainWorker(server).opened() as worker:
        worker.send(*accumulation(5.0), accumulate(micro=1), *grads()[:1])
        assert accumulated(worker) == 1
        worker._responses.cancel()
        assert eventually(lambda: not server.registry.get("plain").has_connected_workers)
    with PlainWorker(server) as again:
        again.send(again.open_job(), again.layout())
        again.until("ready")
        again.send(begin(micro=1), *grads(), end(2))
        is_refused(again, "ACCUMULATION_LOST", "the server holds 0")
    goes_on_as_if_nothing_had_been(server)


WRONG_ACCUMULATION: Final[list[tuple[str, list[training_pb2.TrainRequest], str, str]]] = [
    ("sequence", [accumulate(sequence=3)], "OUT_OF_ORDER", "Accumulate.sequence is 3; 0 is due"),
    ("groups", [accumulate(group_count=2)], "JOB_MISMATCH", "has 2 param groups, the job has 1"),
    ("layout", [accumulate(layout_count=1)], "JOB_MISMATCH", "has replaced its parameters 1 times"),
    (
        "count",
        [accumulate(), *grads(5.0), accumulate_end(3)],
        "INVALID_FIELD",
        "accumulate_end.bucket_count: 3, but 2 have come",
    ),
    ("no count", [accumulate(), *grads(5.0), accumulate_end(0)], "INVALID_FIELD", "0, but 2 have come"),
    (
        "part",
        [accumulate(), *grads(5.0)[:1], accumulate_end(1)],
        "INVALID_FIELD",
        "parameter 0 has a gradient in 1 of its 2 slices",
    ),
    ("twice", [accumulate(), *grads(5.0)[:1] * 2], "INVALID_FIELD", "gradient of bucket 0 has no place here"),
    ("kind", [accumulate(), *whole(EXP_AVG, 5.0)], "INVALID_FIELD", "exp_avg of bucket 0 has no place here"),
    ("bucket", [accumulate(), gradient(7, 256)], "INVALID_FIELD", "bucket_id: 7 is unknown"),
    ("content", [accumulate(), VALUE[1]], "OUT_OF_ORDER", "pushed came where bucket or accumulate_end was due"),
    ("other end", [accumulate(), end(0)], "OUT_OF_ORDER", "step_end came where bucket or accumulate_end was due"),
    ("within", [accumulate(), begin()], "OUT_OF_ORDER", "step_begin came where bucket or accumulate_end was due"),
    ("in a push", [begin(), accumulate()], "OUT_OF_ORDER", "accumulate came where bucket or step_end was due"),
    ("end of a push", [begin(), accumulate_end(0)], "OUT_OF_ORDER", "accumulate_end came where bucket or step_end"),
    ("end alone", [accumulate_end(0)], "OUT_OF_ORDER", "accumulate_end came between two steps"),
    ("discard sequence", [discard(sequence=1)], "OUT_OF_ORDER", "DiscardAccumulated.sequence is 1; 0 is due"),
    ("discard within", [accumulate(), discard()], "OUT_OF_ORDER", "discard_accumulated came where bucket or"),
]


@pytest.mark.parametrize(
    ("requests", "reason", "text"),
    [case[1:] for case in WRONG_ACCUMULATION],
    ids=[case[0] for case in WRONG_ACCUMULATION],
)
def test_a_wrong_accumulation_gets_a_clean_answer_and_leaves_nothing(
    server: Server, bystander: Callable[[], None], requests: list[training_pb2.TrainRequest], reason: str, text: str
) -> None:
    """What was held of the worker is gone with its stream, and not in the next step."""
    gets_a_clean_answer(server, bystander, requests, reason, text)


@pytest.mark.parametrize("claimed", [1, 3])
def test_an_accumulation_that_others_are_missing_before_is_refused_and_counting_starts_anew(
    server: Server, claimed: int
) -> None:
    """Where they went with a line that broke, say."""
    twin = Twin()
    with PlainWorker(server).opened() as worker:
        if claimed == 3:
            worker.send(*accumulation(5.0))
            assert accumulated(worker) == 1
        worker.send(accumulate(micro=claimed), *grads(5.0), accumulate_end(2))
        is_refused(worker, "ACCUMULATION_LOST", f"has accumulated {claimed} times for its next step")
        worker.send(*accumulation(2.0))
        assert accumulated(worker) == 1
        worker.send(begin(micro=1), *grads(), end(2))
        assert worker.until("receipt")[-1].receipt.step == 1
        twin.step(3.0)
        assert twin.equals(worker)


def test_what_is_not_held_any_more_can_be_discarded(server: Server) -> None:
    """That is what the worker wants, and it is told what is due."""
    with PlainWorker(server).opened() as worker:
        worker.send(discard(micro=1))
        assert accumulated(worker) == 0
    goes_on_as_if_nothing_had_been(server)


# --- refusals


def test_options_that_the_server_cannot_step_with_are_refused_and_the_stream_goes_on(
    server: Server, bystander: Callable[[], None]
) -> None:
    """The push is read to its end and changes nothing; what was accumulated for it is still held."""
    twin = Twin()
    with PlainWorker(server).opened() as worker:
        worker.send(*accumulation(2.0))
        assert accumulated(worker) == 1
        worker.send(begin(micro=1, param_group_pages=1, pushed_pages=1), options_page(capturable=True))
        worker.send(page(value_of(0)), *whole(PARAMETER, 9.0), *grads(), end(2))
        is_refused(worker, "UPDATE_REFUSED", "capturable=True needs parameters on a CUDA device")
        assert twin.equals(worker)
        worker.send(begin(micro=1), *grads(), end(2))
        is_refused(worker, "UPDATE_REFUSED", "capturable=True needs parameters on a CUDA device")
        worker.send(begin(micro=1, param_group_pages=1), options_page(), *grads(), end(2))
        assert worker.until("receipt")[-1].receipt.step == 1
        twin.step(3.0)
        assert twin.equals(worker)
    bystander()


def test_what_does_not_belong_to_a_refused_push_ends_the_stream(server: Server, bystander: Callable[[], None]) -> None:
    """It is not read over to whatever end may come."""
    gets_a_clean_answer(
        server,
        bystander,
        [begin(param_group_pages=1), options_page(capturable=True), accumulate()],
        "OUT_OF_ORDER",
        "accumulate came where pushed or bucket or step_end was due",
    )


def test_a_gradient_that_is_not_finite_takes_what_was_accumulated_with_it(server: Server) -> None:
    """The refused push cannot be made again with it, and is told so; counting starts anew after that."""
    twin = Twin()
    with PlainWorker(server) as worker:
        worker.send(worker.open_job(nonfinite=job_pb2.NON_FINITE_ERROR), worker.layout())
        worker.until("bucket_table")
        worker.send(*whole(PARAMETER, 1.0))
        worker.until("ready")
        worker.send(*accumulation(2.0), begin(micro=1), *grads(NAN), end(2))
        is_refused(worker, "NONFINITE_GRADIENT", "the gradient of parameter 0 for step 1")
        worker.send(begin(micro=1), *grads(), end(2))
        is_refused(worker, "ACCUMULATION_LOST", "the server holds 0")
        worker.send(begin(), *grads(), end(2))
        assert worker.until("receipt")[-1].receipt.step == 1
        twin.step(1.0)
        assert twin.equals(worker)


# --- scaled and skipped gradients


def test_gradients_are_divided_by_their_scale(server: Server) -> None:
    """Those that were accumulated too, in the step that says so and in no other."""
    twin = Twin()
    with PlainWorker(server).opened() as worker:
        worker.send(begin(grad_scale=4.0), *grads(4.0), end(2))
        worker.until("receipt")
        twin.step(1.0)
        assert twin.equals(worker)
        worker.send(*accumulation(4.0, sequence=1), begin(sequence=1, base_step=1, micro=1, grad_scale=8.0))
        worker.send(*grads(4.0), end(2))
        worker.until("receipt")
        twin.step(1.0)
        assert twin.equals(worker)
        worker.send(begin(sequence=2, base_step=2), *grads(3.0), end(2))
        worker.until("receipt")
        twin.step(3.0)
        assert twin.equals(worker)


@pytest.mark.parametrize("scale", [0.0, NAN, float("inf"), 1e300, -1.0, 5e-324])
def test_a_scale_that_is_of_no_use_makes_gradients_that_the_job_is_asked_about(server: Server, scale: float) -> None:
    """What is infinite then, or NaN, is skipped where the job skips it; what is finite is a gradient like any other."""
    twin = Twin()
    with PlainWorker(server) as worker:
        worker.send(worker.open_job(nonfinite=job_pb2.NON_FINITE_SKIP), worker.layout())
        worker.until("bucket_table")
        worker.send(*whole(PARAMETER, 1.0))
        worker.until("ready")
        worker.send(begin(grad_scale=scale), *grads(), end(2))
        receipt = worker.until("receipt")[-1].receipt
        quotient = (torch.ones(()) / torch.tensor(scale)).item()
        finite = quotient in (0.0, -1.0)
        assert receipt.outcome == (
            training_pb2.STEP_OUTCOME_APPLIED if finite else training_pb2.STEP_OUTCOME_SKIPPED_NONFINITE
        )
        if finite:
            twin.step(quotient)
        assert twin.equals(worker)


def test_a_skipped_push_is_answered_with_the_step_of_the_others(server: Server) -> None:
    """Its worker is no contributor, hears of every value, and has the next number due."""
    twin = Twin()

    def work(rank: int) -> None:
        with PlainWorker(server) as worker:
            request = worker.open_job(worker={"worker_id": f"plain-{rank}", "rank": rank})
            request.open.aggregation.sync.world_size = 2
            worker.send(request, worker.layout())
            if worker.until("layout_accepted")[-1].layout_accepted.send_values:
                worker.send(*whole(PARAMETER, 1.0))
            worker.until("ready")
            if rank == 0:
                worker.send(begin(skipped=True), end(0))
            else:
                worker.send(begin(), *grads(3.0), end(2))
            *buckets, receipt = worker.until("receipt")
            payloads = b"".join(part.payload for part in buckets)
            assert len(payloads) == 1200
            outcome = training_pb2.STEP_OUTCOME_APPLIED if rank else training_pb2.STEP_OUTCOME_SKIPPED_NONFINITE
            assert receipt.receipt == training_pb2.StepReceipt(step=1, outcome=outcome, contributors=[1])
            worker.send(begin(sequence=1, base_step=1), *grads(float(rank)), end(2))
            receipt = worker.until("receipt")[-1]
            assert (receipt.receipt.sequence, list(receipt.receipt.contributors)) == (1, [0, 1])

    in_threads(work, 2)
    twin.step(3.0)
    twin.step(0.5)
    with PlainWorker(server) as reader:
        assert twin.equals(reader)


@pytest.mark.parametrize("step", [1e300, -1e300])
def test_a_pushed_step_that_no_counter_can_hold_gets_a_clean_answer(
    server: Server, bystander: Callable[[], None], step: float
) -> None:
    """Counters are float32."""
    gets_a_clean_answer(
        server,
        bystander,
        [begin(pushed_pages=1), page(value_of(0), state_of(0, step)), *whole(PARAMETER, 5.0), *grads(), end(2)],
        "INVALID_FIELD",
        "ParameterState.step",
    )


def test_a_loaded_step_that_no_counter_can_hold_gets_a_clean_answer(
    server: Server, bystander: Callable[[], None]
) -> None:
    """Before anything of the load is in place."""
    state = state_dict_pb2.StateDictPage(
        param_groups=list(layout_of([300]).layout.groups),
        state=[state_dict_pb2.ParameterState(parameter=0, step=1e300)],
        last=True,
    )
    gets_a_clean_answer(
        server,
        bystander,
        [
            Request(load_state=training_pb2.LoadState(digest=b"d", load_count=1)),
            Request(state_dict=state),
            Request(load_state_end=training_pb2.LoadStateEnd()),
        ],
        "INVALID_FIELD",
        "ParameterState.step",
    )
