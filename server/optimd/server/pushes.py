"""What a worker pushes: gradients with a step, gradients to be held for one, and what it changed besides.

The functions here serve one exchange of a training stream each, in the stream's own thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator

import torch

from optimd.server.ahead import AheadGradients
from optimd.server.answers import decode_options, refusal
from optimd.server.errors import (
    AccumulationLostError,
    InvalidFieldError,
    LimitExceededError,
    StepTimeoutError,
    UpdateRefusedError,
)
from optimd.server.incoming import Incoming, SplitParameters, read_bucket
from optimd.server.job import Job
from optimd.server.member import Member
from optimd.server.outgoing import Outgoing
from optimd.server.pulling import CatchUp
from optimd.server.pushing import ANSWERABLE, OpenPush
from optimd.server.receipts import encode_receipt
from optimd.server.staging import read_entries, receive_staged, staged_bytes
from optimd.server.store import Store
from optimd.v1 import state_dict_pb2, training_pb2
from optimd.wire.codec import encode
from optimd.wire.encodings import EXACT, Encoding, known_encoding
from optimd.wire.kinds import GRADIENT
from optimd.wire.layout import Bucket


def serve_step(
    incoming: Incoming,
    outgoing: Outgoing,
    job: Job,
    member: Member,
    begin: training_pb2.StepBegin,
    ahead: AheadGradients,
) -> Iterator[bytes]:
    """A push, from StepBegin on. Uses up what has come `ahead` of it.

    Raises:
        RequestError: the stream cannot go on.
    """
    try:
        began = time.perf_counter()
        for _ in range(begin.param_group_pages):
            _, message, _ = incoming.expect("param_groups")
            for group in message.param_groups.groups:
                job.pushing.set_hyperparameters(member, group.index, decode_options(group))
        try:
            if begin.ahead:
                ahead.check(begin.sequence, job.store)
            push = job.pushing.begin(
                member,
                sequence=begin.sequence,
                base_step=begin.base_step,
                group_count=begin.group_count,
                load_count=begin.load_count,
                layout_count=begin.layout_count,
                micro=begin.micro,
                grad_scale=begin.grad_scale if begin.HasField("grad_scale") else None,
                steppable=not begin.without_gradients,
                resumed=begin.resumed,
            )
        except (UpdateRefusedError, AccumulationLostError, LimitExceededError, StepTimeoutError) as error:
            # Nothing has begun yet: the push is read to its end, and the stream goes on.
            incoming.skip_to("step_end", "pushed", "bucket")
            # What it is told is lost must not be there again.
            job.journal.await_durable()
            yield refusal(error)
            return
        try:
            yield from _serve_begun(incoming, outgoing, job, push, begin, ahead if begin.ahead else None)
            yield from outgoing.flush()
            job.measures.step_seconds.observe(time.perf_counter() - began)
        finally:
            job.pushing.finished(member)
    finally:
        # Whatever became of it: what the worker does not step with now it does not step with.
        ahead.forget()


def _serve_begun(
    incoming: Incoming,
    outgoing: Outgoing,
    job: Job,
    push: OpenPush,
    begin: training_pb2.StepBegin,
    ahead: AheadGradients | None,
) -> Iterator[bytes]:
    if begin.pushed_pages:
        try:
            _receive_pushed(incoming, job, push, begin.pushed_pages)
        except LimitExceededError as error:
            job.pushing.retract(push)
            incoming.skip_to("step_end", "pushed", "bucket")
            yield from outgoing.put(refusal(error))
            return
    owed: frozenset[int] | None = None
    # Whether what is taken came ahead of the push, which then brings no more of its own accord.
    came_ahead = False

    def take(bucket: Bucket, present: list[bool], payload: torch.Tensor) -> None:
        if begin.skipped or begin.without_gradients:
            raise InvalidFieldError("StepBegin", "a push that is to bring no gradients has brought some")
        if ahead is not None and owed is None and not came_ahead:
            raise InvalidFieldError("StepBegin.ahead", "the push has brought gradients again that came ahead of it")
        if owed is not None and bucket.bucket_id not in owed:
            raise InvalidFieldError("TensorBucket.bucket_id", f"{bucket.bucket_id} was not to be pushed again")
        began = time.perf_counter()
        job.pushing.push(push, bucket, present, payload)
        job.measures.bucket_seconds.observe(time.perf_counter() - began)

    try:
        while True:
            split = SplitParameters(push.store, elsewhere=push.left_out) if owed is None else None
            if ahead is not None and split is not None:
                came_ahead = True
                for bucket, present, payload in ahead.take():
                    split.see(bucket, present)
                    take(bucket, present, payload)
                    yield from _applied_values(outgoing, job, push, job.pulling.ready(push), begin)
                    yield from outgoing.flush()
                came_ahead = False
            for _ in _gradients(incoming, push.store, "step_end", take, split):
                yield from _applied_values(outgoing, job, push, job.pulling.ready(push), begin)
                if not incoming.has_next:
                    yield from outgoing.flush()
            owed = frozenset() if begin.skipped else job.pushing.missing(push)
            if not owed:
                job.pushing.end(push, skipped=begin.skipped)
                owed = yield from _serve_waiting(outgoing, job, push, begin)
            if not owed:
                break
            again = training_pb2.PushAgain(buckets=sorted(owed))
            yield from outgoing.put(encode(training_pb2.TrainResponse(push_again=again)))
            yield from outgoing.flush()
    except ANSWERABLE as error:
        # Found out before anything was applied: a push of the same number is due again.
        job.pushing.refuse(push.member, keeps=isinstance(error, StepTimeoutError))
        yield from outgoing.put(refusal(error))
        return
    receipt = None
    while receipt is None:
        catch_up = job.pulling.catch_up_of(push)
        if catch_up is not None:
            yield from unseen_values(outgoing, job, push.member, catch_up, outgoing.encoding)
        receipt = job.pulling.settle(push, catch_up)
    job.journal.await_durable()
    wants_buffers = job.buffers.is_asked(push.member)
    answer = training_pb2.TrainResponse(receipt=encode_receipt(receipt, wants_buffers=wants_buffers))
    if begin.maps_values:
        answer.receipt.values_version = push.values_version
    yield from outgoing.put(encode(answer))


def _serve_waiting(
    outgoing: Outgoing, job: Job, push: OpenPush, begin: training_pb2.StepBegin
) -> Generator[bytes, None, frozenset[int]]:
    """Hands out what is applied until the push is over, or buckets have to be pushed again; gives their ids."""
    while True:
        if push.round is not None and not push.round.is_over:
            # Others are waited for: the worker may use the time.
            yield from outgoing.flush()
        applied, owed = job.pulling.await_progress(push)
        if not applied:
            return owed
        yield from _applied_values(outgoing, job, push, applied, begin)


def _applied_values(
    outgoing: Outgoing,
    job: Job,
    push: OpenPush,
    applied: list[tuple[int, list[bool]]],
    begin: training_pb2.StepBegin,
) -> Iterator[bytes]:
    for bucket_id, present in applied:
        bucket = push.store.buckets[bucket_id]
        encoding = outgoing.encoding.of(bucket.dtype)
        if begin.maps_values and job.pulling.may_leave_in_place(push, bucket, encoding):
            yield from outgoing.put_in_place(bucket, present)
            continue
        finish = job.pulling.begin_read(
            push.member, bucket, present, outgoing.transfers, unmoved=True, encoding=encoding
        )
        yield from outgoing.put_values(bucket, present, finish, encoding)


def unseen_values(
    outgoing: Outgoing, job: Job, member: Member, catch_up: CatchUp, asked: Encoding = EXACT
) -> Iterator[bytes]:
    """The buckets that are new to a worker, in the encoding that is asked for where that takes their dtype."""
    while (bucket_id := job.pulling.next_unseen(member, catch_up)) is not None:
        bucket = job.store.buckets[bucket_id]
        present = [True] * len(bucket.slices)
        encoding = asked.of(bucket.dtype)
        finish = job.pulling.begin_read(member, bucket, present, outgoing.transfers, unmoved=False, encoding=encoding)
        yield from outgoing.put_values(bucket, present, finish, encoding)


def serve_accumulate(incoming: Incoming, job: Job, member: Member, message: training_pb2.Accumulate) -> Iterator[bytes]:
    """Gradients to be held for the worker's next push.

    Raises:
        RequestError: the stream cannot go on.
    """
    try:
        new = job.accumulating.begin(
            member,
            sequence=message.sequence,
            micro=message.micro,
            group_count=message.group_count,
            layout_count=message.layout_count,
        )
    except (LimitExceededError, AccumulationLostError) as error:
        incoming.skip_to("accumulate_end", "bucket")
        job.journal.await_durable()
        yield refusal(error)
        return

    def hold(bucket: Bucket, present: list[bool], payload: torch.Tensor) -> None:
        if new:
            job.accumulating.add(member, bucket, present, payload)

    try:
        for _ in _gradients(incoming, job.store, "accumulate_end", hold, SplitParameters(job.store)):
            pass
        if new:
            job.accumulating.end(member)
    finally:
        job.pushing.finished(member)
    job.journal.await_durable()
    yield _accumulated(message.micro + 1)


def serve_discard(job: Job, member: Member, message: training_pb2.DiscardAccumulated) -> Iterator[bytes]:
    """The worker does not want what is held of its gradients.

    Raises:
        RequestError: the stream cannot go on.
    """
    micro = job.accumulating.discard(member, sequence=message.sequence, micro=message.micro)
    job.journal.await_durable()
    yield _accumulated(micro)


def _accumulated(micro: int) -> bytes:
    return encode(training_pb2.TrainResponse(accumulated=training_pb2.Accumulated(micro=micro)))


def _gradients(
    incoming: Incoming,
    store: Store,
    end: str,
    take: Callable[[Bucket, list[bool], torch.Tensor], None],
    split: SplitParameters | None,
) -> Iterator[None]:
    """Receives gradients up to the message `end`. Yields after each bucket that `take` has been given.

    Args:
        incoming: The worker's stream.
        store: The job's tensors.
        end: The kind of the message that ends them.
        take: What is done with each.
        split: Checks that no parameter has some of its own only; None where they are not all that there are.
    """
    pushed: set[int] = set()
    while True:
        kind, message, frame = incoming.expect("bucket", end)
        if kind == end:
            count = getattr(message, end).bucket_count
            if count != len(pushed):
                raise InvalidFieldError(f"{end}.bucket_count", f"{count}, but {len(pushed)} have come")
            if split is not None:
                split.check()
            return
        what, bucket, present, payload = read_bucket(message.bucket, frame, store.buckets, incoming.widener)
        if what != GRADIENT or bucket.bucket_id in pushed:
            raise InvalidFieldError(
                "TensorBucket", f"{what} of bucket {bucket.bucket_id} has no place here, or came a second time"
            )
        pushed.add(bucket.bucket_id)
        if split is not None:
            split.see(bucket, present)
        take(bucket, present, payload)
        # Nothing may hold the received bytes while this thread waits for the next ones.
        del message, frame, payload
        yield


def _received_as(entry: state_dict_pb2.PushedEntry) -> Encoding:
    encoding = known_encoding(entry.received_as)
    if encoding is None:
        raise InvalidFieldError("PushedEntry.received_as", f"{entry.received_as} is unknown")
    return encoding


def _receive_pushed(incoming: Incoming, job: Job, push: OpenPush, pages: int) -> None:
    """What the worker changed outside of steps: all of it, before its first gradient."""
    valued: dict[int, Encoding] = {}
    stated: set[int] = set()
    states: list[tuple[int, float, list[str]]] = []
    for _ in range(pages):
        _, message, _ = incoming.expect("pushed")
        for entry in message.pushed.entries:
            if entry.parameter >= len(job.store.parameters):
                raise InvalidFieldError("PushedEntry.parameter", f"{entry.parameter} is unknown")
            if entry.has_value:
                valued[entry.parameter] = _received_as(entry)
            if entry.HasField("state"):
                if entry.state.parameter != entry.parameter:
                    raise InvalidFieldError("PushedEntry.state.parameter", "is another than the entry's")
                states += read_entries(job.store, [entry.state], seen=stated)
    job.bringing.reserve(push.member, staged_bytes(job.store, states, valued))
    staged = job.store.stage(states, values=valued, received_as=valued)
    receive_staged(incoming, job.store, staged)
    job.pushing.bring(push, staged)
