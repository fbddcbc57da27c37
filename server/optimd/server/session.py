"""One worker's training stream: the protocol, without gRPC and without tensor maths."""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

from optimd.server import update
from optimd.server.bufferexchange import attach_buffers, push_buffers
from optimd.server.errors import (
    InvalidFieldError,
    JobMismatchError,
    LimitExceededError,
    LoadNeedsForceError,
    OutOfOrderError,
    RequestError,
    UpdateRefusedError,
)
from optimd.server.incoming import Incoming, SplitParameters, read_bucket
from optimd.server.job import Job
from optimd.server.membership import Member
from optimd.server.opening import read_layout, read_opening
from optimd.server.registry import JobRegistry
from optimd.server.stepping import Round
from optimd.server.store import StagedState
from optimd.v1 import errors_pb2, job_pb2, param_group_pb2, tensor_pb2, training_pb2
from optimd.wire.codec import encode
from optimd.wire.kinds import GRADIENT, PARAMETER, decode_kind, encode_kind
from optimd.wire.layout import Bucket, encode_bucket, encode_parameter, pack_present
from optimd.wire.paging import paginate
from optimd.wire.param_groups import decode_group, encode_group
from optimd.wire.reasons import encode_reason

_log = logging.getLogger(__name__)

# What a worker can answer, by asking for something else: no reason to end its stream, and with it a private job.
_ANSWERED = (UpdateRefusedError, JobMismatchError, LimitExceededError, LoadNeedsForceError)

_APPLY = {"streaming": job_pb2.APPLY_MODE_STREAMING, "atomic": job_pb2.APPLY_MODE_ATOMIC}


class TrainSession:
    """Serves one stream, from `OpenJob` to its end.

    `responses` runs in the stream's own thread and does everything in it: it reads requests, applies what they
    complete, and hands out what is to be sent. Nothing is queued; a slow worker is held up by gRPC's flow control.
    Only `end` may be called from another thread.

    Args:
        registry: The server's jobs.
        requests: The serialised requests, as they come.
    """

    def __init__(self, registry: JobRegistry, requests: Iterator[bytes]) -> None:
        self._registry = registry
        self._incoming = Incoming(requests)
        self._job: Job | None = None
        self._member: Member | None = None
        self._ended = False
        self._on_opened: Callable[[], None] = lambda: None

    def end(self) -> None:
        """The call is over: the worker leaves its job, what waits on its behalf stops waiting. Waits for the job."""
        self._ended = True
        job, member = self._job, self._member
        if member is not None:
            member.alive = False
        if job is not None and member is not None:
            job.disconnect(member)
            self._registry.leave(job, member)

    def responses(self, *, on_opened: Callable[[], None] = lambda: None) -> Iterator[bytes]:
        """What is to be sent, serialised, in order.

        Args:
            on_opened: Called when the worker has said what it is and what it has.

        Raises:
            RequestError: the stream cannot go on.
        """
        self._on_opened = on_opened
        try:
            for response in self._serve():
                if self._member is not None:
                    self._member.bytes_sent += len(response)
                    self._member.bytes_received = self._incoming.bytes_received
                yield response
        finally:
            if self._job is not None and self._member is not None:
                self._registry.leave(self._job, self._member)

    def _attach(self, job: Job) -> None:
        self._job = job

    def _serve(self) -> Iterator[bytes]:
        job, member = yield from self._open()
        while True:
            received = self._incoming.receive()
            if received is None:
                break
            kind, message, _ = received
            if kind != "push_buffers":
                job.buffers.decline(member)
            match kind:
                case "step_begin":
                    yield from self._step(job, member, message.step_begin)
                case "add_param_group":
                    yield from self._add_param_group(job, member, message.add_param_group)
                case "load_state":
                    yield from self._load_state(job, member, message.load_state)
                case "attach_buffers":
                    yield from self._attach_buffers(job, member)
                case "push_buffers":
                    yield from push_buffers(self._incoming, job, member)
                case "leave":
                    break
                case _:
                    raise OutOfOrderError(f"{kind} came between two steps")
        _log.info("job %s: rank %d left", job.name, member.worker.rank)

    # --- opening and growing

    def _open(self) -> Generator[bytes, None, tuple[Job, Member]]:
        _, message, _ = self._incoming.expect("open")
        opening = read_opening(message.open)
        layout = read_layout(self._incoming.layout_pages(), max_bytes=self._registry.max_job_bytes)
        self._on_opened()
        member = Member(opening.worker, opening.incarnation)
        self._member = member
        if self._ended:
            member.alive = False
        job, creates = self._registry.enter(opening, layout, member, on_job=self._attach)
        resumed = not creates and job.step > 0
        _log.info(
            "job %s: rank %d (%s, optimd %s) %s at step %d",
            job.name,
            member.worker.rank,
            member.worker.worker_id,
            message.open.client_version or "of another make",
            "created it" if creates else "joined",
            job.step,
        )
        if creates:
            buckets = job.grow(member, layout.groups, layout.sizes, layout.parameters)
        else:
            buckets = list(job.store.buckets)
        yield from self._exchange_values(job, member, buckets, creates=creates, resumed=resumed, first_group=0)
        return job, member

    def _add_param_group(self, job: Job, member: Member, message: training_pb2.AddParamGroup) -> Iterator[bytes]:
        left = self._registry.max_job_bytes - job.full_bytes
        pages = self._incoming.layout_pages()
        try:
            layout = read_layout(pages, max_bytes=left, first_group=message.group)
            if len(layout.groups) != 1:
                raise InvalidFieldError("LayoutPage.groups", "an added layout has exactly one group")
            known = job.await_growth(member, message.group, layout.parameters)
            buckets = (
                [bucket for bucket in job.store.buckets if bucket.group == message.group]
                if known
                else job.grow(member, layout.groups, layout.sizes, layout.parameters)
            )
        except _ANSWERED as error:
            for _ in pages:
                pass
            job.give_up(member)
            yield _refusal(error)
            return
        yield from self._exchange_values(
            job, member, buckets, creates=not known, resumed=False, first_group=message.group
        )

    def _exchange_values(
        self,
        job: Job,
        member: Member,
        buckets: Sequence[Bucket],
        *,
        creates: bool,
        resumed: bool,
        first_group: int,
    ) -> Iterator[bytes]:
        """From LayoutAccepted to JobReady."""
        yield encode(
            training_pb2.TrainResponse(
                layout_accepted=job_pb2.LayoutAccepted(
                    send_values=creates,
                    resumed=resumed,
                    bucket_bytes=job.settings.bucket_bytes,
                    bucket_count=len(buckets),
                    apply=_APPLY[job.settings.apply],
                )
            )
        )
        for page, last in paginate(encode_bucket(bucket) for bucket in buckets):
            table = tensor_pb2.BucketTablePage(buckets=page, last=last)
            yield encode(training_pb2.TrainResponse(bucket_table=table))
        if creates:
            self._receive_values(job, buckets)
            job.grown(member)
        else:
            for layout in _layout_pages(job, job.adopt_groups(member, first_group), first_group):
                yield encode(training_pb2.TrainResponse(layout=layout))
            for bucket in buckets:
                yield _values(job, bucket, [True] * len(bucket.slices))
        step, sequence, load_count = job.welcome(member)
        ready = job_pb2.JobReady(job_step=step, next_sequence=sequence, load_count=load_count)
        yield encode(training_pb2.TrainResponse(ready=ready))

    def _receive_values(self, job: Job, buckets: Sequence[Bucket]) -> None:
        awaited = {bucket.bucket_id for bucket in buckets}
        while awaited:
            _, message, frame = self._incoming.expect("bucket")
            kind, bucket, present, payload = read_bucket(message.bucket, frame, job.store.buckets)
            if kind != PARAMETER or not all(present) or bucket.bucket_id not in awaited:
                raise InvalidFieldError(
                    "TensorBucket", f"{kind} of bucket {bucket.bucket_id} came where the values of new buckets were due"
                )
            awaited.discard(bucket.bucket_id)
            job.store.write_values(bucket, payload)

    # --- a step

    def _step(self, job: Job, member: Member, begin: training_pb2.StepBegin) -> Iterator[bytes]:
        try:
            for _ in range(begin.param_group_pages):
                _, message, _ = self._incoming.expect("param_groups")
                for group in message.param_groups.groups:
                    job.set_hyperparameters(member, group.index, _decode_group(group))
        except UpdateRefusedError as error:
            # Nothing has begun yet: the push is read to its end, and the stream goes on.
            while self._incoming.expect("param_groups", "bucket", "step_end")[0] != "step_end":
                pass
            yield _refusal(error)
            return
        round_ = job.begin(
            member,
            sequence=begin.sequence,
            base_step=begin.base_step,
            group_count=begin.group_count,
            load_count=begin.load_count,
        )
        pushed: set[int] = set()
        split = SplitParameters(job.store)
        sent = 0
        while True:
            kind, message, frame = self._incoming.expect("bucket", "step_end")
            if kind == "step_end":
                if message.step_end.bucket_count != len(pushed):
                    raise InvalidFieldError(
                        "StepEnd.bucket_count", f"{message.step_end.bucket_count}, but {len(pushed)} have come"
                    )
                split.check()
                break
            what, bucket, present, payload = read_bucket(message.bucket, frame, job.store.buckets)
            if what != GRADIENT or bucket.bucket_id in pushed:
                raise InvalidFieldError(
                    "TensorBucket", f"{what} of bucket {bucket.bucket_id} has no place here, or came a second time"
                )
            pushed.add(bucket.bucket_id)
            split.see(bucket, present)
            job.push(member, round_, bucket, present, payload)
            # Nothing may hold the received bytes while this thread waits for the next ones.
            del message, frame, payload
            for applied, slices in round_.applied[sent:]:
                yield _values(job, job.store.buckets[applied], slices)
                sent += 1
        job.end(member, round_)
        while True:
            count = job.await_progress(member, round_, sent)
            for applied, slices in round_.applied[sent:count]:
                yield _values(job, job.store.buckets[applied], slices)
            sent = count
            if round_.commit is not None and sent == len(round_.applied):
                break
        yield _receipt(begin.sequence, round_, wants_buffers=job.buffers.is_asked(member))

    # --- buffers

    def _attach_buffers(self, job: Job, member: Member) -> Iterator[bytes]:
        try:
            yield from attach_buffers(self._incoming, job, member, max_bytes=self._registry.max_job_bytes)
        except _ANSWERED as error:
            yield _refusal(error)

    # --- a state_dict

    def _load_state(self, job: Job, member: Member, message: training_pb2.LoadState) -> Iterator[bytes]:
        try:
            needed = job.begin_load(member, digest=message.digest, load_count=message.load_count, force=message.force)
            yield encode(
                training_pb2.TrainResponse(load_state_accepted=training_pb2.LoadStateAccepted(send_state=needed))
            )
            load_count = message.load_count
            if needed:
                groups, staged = self._receive_state(job)
                load_count = job.finish_load(member, staged, groups, digest=message.digest)
        except _ANSWERED as error:
            job.give_up(member)
            yield _refusal(error)
            return
        yield encode(training_pb2.TrainResponse(state_loaded=training_pb2.StateLoaded(load_count=load_count)))

    def _receive_state(self, job: Job) -> tuple[list[dict[str, Any]], StagedState]:
        groups: list[dict[str, Any]] = []
        entries = []
        for page in self._incoming.state_dict_pages():
            groups += [_decode_group(group) for group in page.param_groups]
            for entry in page.state:
                if entry.parameter >= len(job.store.parameters):
                    raise InvalidFieldError("ParameterState.parameter", f"{entry.parameter} is unknown")
                try:
                    names = [decode_kind(number) for number in entry.tensors]
                except ValueError as error:
                    raise InvalidFieldError("ParameterState.tensors", str(error)) from error
                if PARAMETER in names or GRADIENT in names:
                    raise InvalidFieldError("ParameterState.tensors", "values and gradients are not state")
                entries.append((entry.parameter, entry.step, names))
        if len(groups) != len(job.groups):
            raise InvalidFieldError(
                "StateDictPage.param_groups", f"there are {len(groups)}, the job has {len(job.groups)}"
            )
        staged = job.store.stage(entries)
        received = 0
        awaited = {
            (kind, bucket.bucket_id)
            for bucket in job.store.buckets
            for kind in {name for _, _, names in entries for name in names}
            if any(staged.expects(kind, bucket))
        }
        while True:
            kind, message, frame = self._incoming.expect("bucket", "load_state_end")
            if kind == "load_state_end":
                break
            what, bucket, present, payload = read_bucket(message.bucket, frame, job.store.buckets)
            if (what, bucket.bucket_id) not in awaited or present != staged.expects(what, bucket):
                raise InvalidFieldError(
                    "TensorBucket", f"{what} of bucket {bucket.bucket_id} is not what the entries announced"
                )
            awaited.discard((what, bucket.bucket_id))
            staged.write(what, bucket, present, payload)
            received += 1
        if message.load_state_end.bucket_count != received:
            raise InvalidFieldError(
                "LoadStateEnd.bucket_count", f"{message.load_state_end.bucket_count}, but {received} have come"
            )
        if awaited:
            raise InvalidFieldError("LoadStateEnd", f"{len(awaited)} buckets of state are missing")
        return groups, staged


def _layout_pages(job: Job, groups: Sequence[dict[str, Any]], first_group: int) -> Iterator[job_pb2.LayoutPage]:
    messages = (
        encode_group(index, update.RULE, group, parameter_count=job.group_sizes[index])
        for index, group in enumerate(groups, first_group)
    )
    for group_page, _ in paginate(messages):
        yield job_pb2.LayoutPage(groups=group_page)
    specs = (encode_parameter(parameter) for _, parameter in job.group_parameters(first_group))
    for spec_page, last in paginate(specs):
        yield job_pb2.LayoutPage(parameters=spec_page, last=last)


def _refusal(error: RequestError) -> bytes:
    detail = errors_pb2.ErrorDetail(reason=encode_reason(error.reason), message=error.message)
    return encode(training_pb2.TrainResponse(refused=detail))


def _values(job: Job, bucket: Bucket, present: list[bool]) -> bytes:
    header = tensor_pb2.TensorBucket(
        bucket_id=bucket.bucket_id, kind=encode_kind(PARAMETER), present=pack_present(present)
    )
    return encode(training_pb2.TrainResponse(bucket=header), job.store.read(PARAMETER, bucket, present))


def _receipt(sequence: int, round_: Round, *, wants_buffers: bool) -> bytes:
    commit = round_.commit
    if commit is None:
        raise RuntimeError("a step without a commit has no receipt")
    return encode(
        training_pb2.TrainResponse(
            receipt=training_pb2.StepReceipt(
                sequence=sequence,
                step=commit.step,
                outcome=training_pb2.STEP_OUTCOME_APPLIED,
                contributors=[worker.rank for worker in commit.contributors],
                partial_contributors=[worker.rank for worker in commit.partial_contributors],
                hyperparameters_disagreed=round_.disagreed,
                wants_buffers=wants_buffers,
            )
        )
    )


def _decode_group(group: param_group_pb2.ParamGroup) -> dict[str, Any]:
    try:
        return decode_group(group)
    except ValueError as error:
        raise InvalidFieldError("ParamGroup.options", str(error)) from error
