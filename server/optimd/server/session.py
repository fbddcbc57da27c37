"""One worker's training stream: the protocol, without gRPC and without tensor maths."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any, Final

from optimd.server import logcontext, update
from optimd.server.aggregation import Worker
from optimd.server.ahead import AheadGradients
from optimd.server.answers import DECLINED, decode_options, refusal
from optimd.server.bringing import AdoptedGroups, LoadedState
from optimd.server.bufferexchange import attach_buffers, push_buffers, receive_first_buffers
from optimd.server.errors import (
    InvalidFieldError,
    LeaseEndedError,
    LimitExceededError,
    OutOfOrderError,
    RequestError,
    ShuttingDownError,
    StorageFailedError,
)
from optimd.server.incoming import Incoming, read_bucket
from optimd.server.job import Job
from optimd.server.member import Member
from optimd.server.opening import check_names, encode_apply, read_layout, read_opening
from optimd.server.outgoing import Outgoing
from optimd.server.pulling import CatchUp
from optimd.server.pushes import serve_accumulate, serve_discard, serve_step, unseen_values
from optimd.server.receipts import encode_receipt
from optimd.server.registry import JobRegistry
from optimd.server.staging import read_entries, receive_staged, staged_bytes
from optimd.server.store import StagedState, Store
from optimd.server.widening import agreed
from optimd.v1 import job_pb2, tensor_pb2, training_pb2
from optimd.wire.buffers import BufferValues
from optimd.wire.codec import Frame, encode
from optimd.wire.kinds import PARAMETER
from optimd.wire.layout import Bucket, encode_bucket, encode_parameter, pack_bucket_ids
from optimd.wire.paging import paginate
from optimd.wire.param_groups import encode_group
from optimd.wire.sharedmemory import NotSharedError, attach

_log = logging.getLogger(__name__)

_PASSING: Final = (ShuttingDownError, StorageFailedError, LeaseEndedError)
"""What ends a stream whose worker then takes its place up again on another."""


class TrainSession:
    """Serves one stream, from `OpenJob` to its end.

    `responses` runs in the stream's own thread and does everything in it: it reads requests, applies what they
    complete, and hands out what is to be sent. Nothing is queued; a slow worker is held up by gRPC's flow control.
    Only `end` may be called from another thread.

    Args:
        registry: The server's jobs.
        requests: The serialised requests, as they come.
        is_active: Whether the call is still under way.
        cancel: Ends it. May be called from any thread, and more than once.
        shares_memory: Whether payloads may go through memory that worker and server share.
        authorize: Raises if the caller may not use the job of this name. Called before anything else is looked at.
        proofs: What the caller has shown to be let in, for the log.
    """

    def __init__(
        self,
        registry: JobRegistry,
        requests: Iterator[bytes],
        *,
        is_active: Callable[[], bool] = lambda: True,
        cancel: Callable[[], object] = lambda: None,
        shares_memory: bool = True,
        authorize: Callable[[str], None] = lambda _job: None,
        proofs: str = "",
    ) -> None:
        self._registry = registry
        self._shares_memory = shares_memory
        self._authorize = authorize
        self._proofs = proofs
        self._incoming = Incoming(requests, self._hear)
        self._outgoing = Outgoing(registry.device)
        self._ahead = AheadGradients()
        self._is_active = is_active
        self._cancel = cancel
        self._job: Job | None = None
        self._member: Member | None = None
        self._ended = False
        self._leaves = False
        self._bytes_sent = 0
        self._on_opened: Callable[[], None] = lambda: None

    def end(self) -> None:
        """The call is over: what waits on the worker's behalf stops waiting. Waits for the job.

        Unless it has left, the worker stays in its job until its lease ends.
        """
        self._ended = True
        job, member = self._job, self._member
        if member is not None:
            member.alive = False
        if job is not None and member is not None:
            self._registry.disconnect(job, member)

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
                if self._member is None:
                    yield response
                    continue
                self._bytes_sent += len(response)
                self._count_bytes(self._member)
                # gRPC comes back for the next one when it has got rid of this one.
                self._member.place.sending_since_s = time.monotonic()
                yield response
                self._member.place.sending_since_s = None
        except RequestError as error:
            # It is told so, and will not come back to this place. Unless the line was the reason, or it is to come.
            self._leaves = not self._incoming.has_ended and self._is_active() and not isinstance(error, _PASSING)
            raise
        finally:
            # Not when the cycle collector comes: it is memory of the host's, and a file that is open.
            self._incoming.share(None)
            self._outgoing.share(None)
            if self._job is not None and self._member is not None:
                if self._leaves:
                    self._registry.leave(self._job, self._member)
                else:
                    self._registry.disconnect(self._job, self._member)

    def _count_bytes(self, member: Member) -> None:
        sent, received = self._bytes_sent + self._outgoing.placed_bytes, self._incoming.bytes_received
        if self._job is not None:
            self._job.measures.transferred(received=received - member.bytes_received, sent=sent - member.bytes_sent)
        member.bytes_sent, member.bytes_received = sent, received

    def _hear(self) -> None:
        if self._member is not None:
            self._member.place.heard_s = time.monotonic()

    def _attach(self, job: Job) -> None:
        self._job = job

    def _serve(self) -> Iterator[bytes]:
        job, member = yield from self._open()
        while True:
            received = self._incoming.receive()
            if received is None:
                return
            kind, message, _ = received
            # It reads an answer to its end before it asks for more.
            job.pulling.confirm(member)
            if kind != "push_buffers":
                job.buffers.decline(member)
            match kind:
                case "step_begin":
                    yield from serve_step(self._incoming, self._outgoing, job, member, message.step_begin, self._ahead)
                case "push_ahead":
                    self._ahead.receive(self._incoming, job, member, message.push_ahead)
                case "accumulate":
                    yield from serve_accumulate(self._incoming, job, member, message.accumulate)
                case "discard_accumulated":
                    yield from serve_discard(job, member, message.discard_accumulated)
                case "add_param_group":
                    yield from self._add_param_group(job, member, message.add_param_group)
                case "replace_layout":
                    yield from self._replace_layout(job, member, message.replace_layout)
                case "load_state":
                    yield from self._load_state(job, member, message.load_state)
                case "attach_buffers":
                    yield from self._attach_buffers(job, member)
                case "push_buffers":
                    yield from push_buffers(self._incoming, job, member)
                case "leave":
                    self._leaves = True
                    _log.info("job %s: rank %d left", job.name, member.worker.rank)
                    return
                case _:
                    raise OutOfOrderError(f"{kind} came between two steps")

    # --- opening and growing

    def _share_memory(self, message: job_pb2.OpenJob) -> None:
        """Maps the worker's memory, if it has brought any that is to be had here."""
        offer = message.shared_memory
        if not self._shares_memory or not message.HasField("shared_memory"):
            return
        try:
            mapping = attach(offer.name, offer.token, offer.up_bytes, offer.down_bytes)
        except NotSharedError as error:
            _log.warning("worker %s of job %s: no shared memory: %s", message.worker.worker_id, message.job, error)
            return
        writer, reader = mapping.server_side()
        self._outgoing.share(writer)
        self._incoming.share(reader)

    def _open(self) -> Generator[bytes, None, tuple[Job, Member]]:
        _, message, _ = self._incoming.expect("open")
        self._authorize(message.open.job)
        self._outgoing.takes_bundles = message.open.takes_bundles
        check_names(message.open)
        self._share_memory(message.open)
        self._incoming.widener.encoding = gradients = agreed(message.open.gradients)
        self._outgoing.encoding = parameters = agreed(message.open.parameters)
        is_narrow = not gradients.is_exact and not parameters.is_exact
        opening = read_opening(message.open, payloads_are_short=is_narrow or self._incoming.shares_memory)
        layout = read_layout(self._incoming.layout_pages(), max_bytes=self._registry.max_job_bytes)
        self._on_opened()
        member = Member(Worker(opening.rank or 0, opening.worker_id), opening.incarnation, cancel=self._cancel)
        self._member = member
        if self._ended:
            member.alive = False
        returns = opening.returns_at_step is not None
        if returns:
            # Good where the job does not know better.
            member.groups = layout.groups
        logcontext.bind(job=opening.job, worker=opening.worker_id, rank=opening.rank)
        entry = self._registry.enter(opening, layout, member, on_job=self._attach)
        job = entry.job
        logcontext.bind(job=job.name, step=lambda: job.step, worker=member.worker.worker_id, rank=member.worker.rank)
        if self._incoming.shares_memory:
            job.share_values()
        if returns:
            # What it was bringing when its line broke, it does not know to be there.
            del member.groups[len(layout.groups) :]
        _log.info(
            "job %s: rank %d (%s, optimd %s%s) %s at step %d",
            job.name,
            member.worker.rank,
            member.worker.worker_id,
            message.open.client_version or "of another make",
            f", {self._proofs}" if self._proofs else "",
            "created it" if entry.creates else "returned" if returns else "joined",
            job.step,
        )
        if entry.is_current:
            accepted = self._accepted(job, job.store, creates=False, resumed=False, count=0)
            accepted.current = True
            yield encode(training_pb2.TrainResponse(layout_accepted=accepted))
            yield from self._ready(job, member, step=job.step, tells=True)
            return job, member
        if entry.creates:
            buckets = job.bringing.grow(member, layout.groups, layout.sizes, layout.parameters)
        else:
            buckets = [bucket for bucket in job.store.buckets if bucket.group < len(layout.groups)]
        resumed = not entry.creates and not returns and job.step > 0
        yield from self._exchange_values(
            job,
            member,
            buckets,
            creates=entry.creates,
            resumed=resumed,
            group_count=len(layout.groups),
            joins=True,
            tells=returns,
        )
        return job, member

    def _add_param_group(self, job: Job, member: Member, message: training_pb2.AddParamGroup) -> Iterator[bytes]:
        pages = self._incoming.layout_pages()
        try:
            layout = read_layout(pages, max_bytes=job.bytes_left, first_group=message.group)
            if len(layout.groups) != 1:
                raise InvalidFieldError("LayoutPage.groups", "an added layout has exactly one group")
            known = job.bringing.await_growth(member, message.group, layout.parameters)
            buckets = (
                [bucket for bucket in job.store.buckets if bucket.group == message.group]
                if known
                else job.bringing.grow(member, layout.groups, layout.sizes, layout.parameters)
            )
        except DECLINED as error:
            yield _declined(job, member, pages, error)
            return
        yield from self._exchange_values(
            job, member, buckets, creates=not known, resumed=False, first_group=message.group, group_count=1
        )

    def _replace_layout(self, job: Job, member: Member, message: training_pb2.ReplaceLayout) -> Iterator[bytes]:
        pages = self._incoming.layout_pages()
        try:
            layout = read_layout(pages, max_bytes=self._registry.max_job_bytes - job.buffers_bytes)
            known = job.bringing.await_replacement(
                member, layout_count=message.layout_count, sizes=layout.sizes, parameters=layout.parameters
            )
            store = (
                job.store
                if known
                else job.bringing.replace(layout.groups, layout.sizes, layout.parameters, layout.carried)
            )
        except DECLINED as error:
            yield _declined(job, member, pages, error)
            return
        yield from self._exchange_values(job, member, store.buckets, store=store, creates=not known, resumed=False)

    def _exchange_values(
        self,
        job: Job,
        member: Member,
        buckets: Sequence[Bucket],
        *,
        creates: bool,
        resumed: bool,
        first_group: int = 0,
        group_count: int | None = None,
        store: Store | None = None,
        joins: bool = False,
        tells: bool = False,
    ) -> Iterator[bytes]:
        """From LayoutAccepted to JobReady.

        Args:
            job: The job.
            member: The worker.
            buckets: Those of the new parameters.
            creates: Whether the worker has to upload values, or is given the job's.
            resumed: Whether it was given a job that has steps behind it.
            first_group: The first of the new groups.
            group_count: How many they are, if not all of the rest.
            store: Where the values go, if not to the job's own store.
            joins: Whether the worker comes into the job with this.
            tells: Whether it is told what became of its last push.
        """
        accepted = self._accepted(job, store or job.store, creates=creates, resumed=resumed, count=len(buckets))
        yield encode(training_pb2.TrainResponse(layout_accepted=accepted))
        for page, last in paginate(encode_bucket(bucket) for bucket in buckets):
            table = tensor_pb2.BucketTablePage(buckets=page, last=last)
            yield encode(training_pb2.TrainResponse(bucket_table=table))
        if creates:
            begins = ("load_state", "attach_buffers") if joins else ()
            state, attached = self._receive_values(job, member, store or job.store, buckets, besides=begins)
            job.bringing.grown(member, state, attached)
            yield from self._ready(job, member, step=job.step, brought=buckets, tells=tells)
            return
        adopted = job.bringing.adopt(member, first_group, group_count, keeps=tells)
        for layout in _layout_pages(adopted, first_group):
            yield encode(training_pb2.TrainResponse(layout=layout))
        for bucket in buckets:
            present = [True] * len(bucket.slices)
            finish = job.pulling.begin_read(member, bucket, present, self._outgoing.transfers, unmoved=False)
            yield from self._outgoing.put_values(bucket, present, finish)
        step = job.step
        if joins:
            # What has changed meanwhile, as it does where the job does not wait for this worker.
            catch_up = CatchUp()
            yield from unseen_values(self._outgoing, job, member, catch_up)
            step = catch_up.step
        yield from self._outgoing.flush()
        yield from self._ready(job, member, step=step, tells=tells)

    def _accepted(self, job: Job, store: Store, *, creates: bool, resumed: bool, count: int) -> job_pb2.LayoutAccepted:
        shared = store.shared.items() if self._incoming.shares_memory else ()
        return job_pb2.LayoutAccepted(
            send_values=creates,
            resumed=resumed,
            bucket_bytes=job.settings.bucket_bytes,
            bucket_count=count,
            apply=encode_apply(job.settings),
            takes_bundles=True,
            takes_ahead=True,
            shared_memory=self._incoming.shares_memory,
            values=[
                job_pb2.SharedValues(
                    name=file.name, token=file.token, first_parameter=first, parameter_count=len(file.flats)
                )
                for first, file in shared
            ],
            gradients=self._incoming.widener.encoding.number,
            parameters=self._outgoing.encoding.number,
        )

    def _ready(
        self, job: Job, member: Member, *, step: int, brought: Sequence[Bucket] = (), tells: bool = False
    ) -> Iterator[bytes]:
        standing = job.welcome(member, step=step, brought=brought, returns=tells)
        job.journal.await_durable()
        receipt = standing.receipt if tells else None
        ready = job_pb2.JobReady(
            job_step=standing.job_step,
            next_sequence=standing.next_sequence,
            load_count=standing.load_count,
            layout_count=standing.layout_count,
            rank=member.worker.rank,
            lease_s=job.lease_s,
            receipt_follows=receipt is not None,
            held_buckets=pack_bucket_ids(standing.held),
            rewound=tells and member.rewound,
        )
        yield encode(training_pb2.TrainResponse(ready=ready))
        if receipt is not None:
            yield encode(training_pb2.TrainResponse(receipt=encode_receipt(receipt)))

    def _receive_values(
        self, job: Job, member: Member, store: Store, buckets: Sequence[Bucket], *, besides: Sequence[str]
    ) -> tuple[LoadedState | None, BufferValues | None]:
        """The values of new buckets and, ahead of the last of them, what a job may begin with besides.

        Args:
            job: The job.
            member: The worker.
            store: Where the values go.
            buckets: The new buckets.
            besides: What announces the rest, by kind of message: each may come once.

        Returns:
            A state_dict and buffers, where they have come.
        """
        awaited = {bucket.bucket_id for bucket in buckets}
        possible = ["bucket", *besides]
        state, attached = None, None
        while awaited:
            kind, message, frame = self._incoming.expect(*possible)
            if kind == "bucket":
                _write_values(message.bucket, frame, store, awaited)
                continue
            possible.remove(kind)
            if kind == "load_state":
                groups, staged = self._receive_state(job, member, is_first=True)
                state = LoadedState(staged, groups, message.load_state.digest)
            else:
                attached = receive_first_buffers(self._incoming, job, member, max_bytes=self._registry.max_job_bytes)
        return state, attached

    # --- buffers

    def _attach_buffers(self, job: Job, member: Member) -> Iterator[bytes]:
        try:
            yield from attach_buffers(self._incoming, job, member, max_bytes=self._registry.max_job_bytes)
        except DECLINED as error:
            yield refusal(error)

    # --- a state_dict

    def _load_state(self, job: Job, member: Member, message: training_pb2.LoadState) -> Iterator[bytes]:
        try:
            needed = job.bringing.begin_load(
                member, digest=message.digest, load_count=message.load_count, force=message.force
            )
            yield encode(
                training_pb2.TrainResponse(load_state_accepted=training_pb2.LoadStateAccepted(send_state=needed))
            )
            load_count = message.load_count
            if needed:
                groups, staged = self._receive_state(job, member)
                load_count = job.bringing.finish_load(member, staged, groups, digest=message.digest)
        except DECLINED as error:
            job.bringing.give_up(member)
            yield refusal(error)
            return
        job.journal.await_durable()
        yield encode(training_pb2.TrainResponse(state_loaded=training_pb2.StateLoaded(load_count=load_count)))

    def _receive_state(
        self, job: Job, member: Member, *, is_first: bool = False
    ) -> tuple[list[dict[str, Any]], StagedState]:
        groups: list[dict[str, Any]] = []
        entries: list[tuple[int, float, list[str]]] = []
        seen: set[int] = set()
        for page in self._incoming.state_dict_pages():
            groups += [decode_options(group) for group in page.param_groups]
            entries += read_entries(job.store, page.state, seen=seen)
            if len(groups) > len(job.groups):
                break
        if len(groups) != len(job.groups):
            raise InvalidFieldError(
                "StateDictPage.param_groups", f"there are {len(groups)}, the job has {len(job.groups)}"
            )
        try:
            job.bringing.reserve(member, staged_bytes(job.store, entries), is_first=is_first)
        except LimitExceededError:
            self._incoming.skip_to("load_state_end", "bucket")
            raise
        staged = job.store.stage(entries)
        received = receive_staged(self._incoming, job.store, staged)
        _, message, _ = self._incoming.expect("load_state_end")
        if message.load_state_end.bucket_count != received:
            raise InvalidFieldError(
                "LoadStateEnd.bucket_count", f"{message.load_state_end.bucket_count}, but {received} have come"
            )
        return groups, staged


def _write_values(header: tensor_pb2.TensorBucket, frame: Frame, store: Store, awaited: set[int]) -> None:
    """Puts a received bucket in place, one of those that are `awaited`."""
    kind, bucket, present, payload = read_bucket(header, frame, store.buckets)
    if kind != PARAMETER or not all(present) or bucket.bucket_id not in awaited:
        raise InvalidFieldError(
            "TensorBucket", f"{kind} of bucket {bucket.bucket_id} came where the values of new buckets were due"
        )
    awaited.discard(bucket.bucket_id)
    store.write_values(bucket, payload)


def _declined(job: Job, member: Member, pages: Iterator[job_pb2.LayoutPage], error: RequestError) -> bytes:
    """Reads the rest of a layout that is not taken, and gives the answer to it."""
    for _ in pages:
        pass
    job.bringing.give_up(member)
    return refusal(error)


def _layout_pages(adopted: AdoptedGroups, first_group: int) -> Iterator[job_pb2.LayoutPage]:
    messages = (
        encode_group(index, update.RULE, group, parameter_count=size)
        for index, (group, size) in enumerate(zip(adopted.groups, adopted.sizes, strict=True), first_group)
    )
    for group_page, _ in paginate(messages):
        yield job_pb2.LayoutPage(groups=group_page)
    specs = (encode_parameter(parameter) for parameter in adopted.parameters)
    for spec_page, last in paginate(specs):
        yield job_pb2.LayoutPage(parameters=spec_page, last=last)
