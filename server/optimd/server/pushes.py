"""What a worker pushes: gradients with a step, gradients to be held for one, and what it changed besides.

The functions here serve one exchange of a training stream each, in the stream's own thread.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from optimd.server.answers import decode_options, receipt, refusal, values
from optimd.server.errors import (
    AccumulationLostError,
    InvalidFieldError,
    LimitExceededError,
    NonFiniteGradientError,
    UpdateRefusedError,
)
from optimd.server.incoming import Incoming, SplitParameters, read_bucket
from optimd.server.job import Job
from optimd.server.membership import Member
from optimd.server.staging import read_entries, receive_staged, staged_bytes
from optimd.server.stepping import Round
from optimd.v1 import training_pb2
from optimd.wire.codec import encode
from optimd.wire.kinds import GRADIENT
from optimd.wire.layout import Bucket


def serve_step(incoming: Incoming, job: Job, member: Member, begin: training_pb2.StepBegin) -> Iterator[bytes]:
    """A push, from StepBegin on.

    Raises:
        RequestError: the stream cannot go on.
    """
    for _ in range(begin.param_group_pages):
        _, message, _ = incoming.expect("param_groups")
        for group in message.param_groups.groups:
            job.set_hyperparameters(member, group.index, decode_options(group))
    try:
        round_ = job.begin(
            member,
            sequence=begin.sequence,
            base_step=begin.base_step,
            group_count=begin.group_count,
            load_count=begin.load_count,
            layout_count=begin.layout_count,
            micro=begin.micro,
            grad_scale=begin.grad_scale if begin.HasField("grad_scale") else None,
            steppable=not begin.without_gradients,
        )
    except (UpdateRefusedError, AccumulationLostError, LimitExceededError) as error:
        # Nothing has begun yet: the push is read to its end, and the stream goes on.
        incoming.skip_to("step_end", "pushed", "bucket")
        yield refusal(error)
        return
    try:
        yield from _serve_begun(incoming, job, member, begin, round_)
    finally:
        job.finished(member)


def _serve_begun(
    incoming: Incoming, job: Job, member: Member, begin: training_pb2.StepBegin, round_: Round
) -> Iterator[bytes]:
    if begin.pushed_pages:
        try:
            _receive_pushed(incoming, job, member, round_, begin.pushed_pages)
        except LimitExceededError as error:
            job.retract(member)
            incoming.skip_to("step_end", "pushed", "bucket")
            yield refusal(error)
            return
    sent = 0

    def push(bucket: Bucket, present: list[bool], payload: torch.Tensor) -> None:
        if begin.skipped or begin.without_gradients:
            raise InvalidFieldError("StepBegin", "a push that is to bring no gradients has brought some")
        job.push(member, round_, bucket, present, payload)

    for _ in _gradients(incoming, job, "step_end", push):
        for applied, slices in round_.applied[sent:]:
            yield values(job, job.store.buckets[applied], slices)
            sent += 1
    try:
        job.end(member, round_, skipped=begin.skipped)
        while True:
            count = job.await_progress(member, round_, sent)
            for applied, slices in round_.applied[sent:count]:
                yield values(job, job.store.buckets[applied], slices)
            sent = count
            if round_.is_answered and sent == len(round_.applied):
                break
    except NonFiniteGradientError as error:
        # Found out before anything was applied: a push of the same number is due again.
        yield refusal(error)
        return
    yield receipt(begin.sequence, round_, skipped=begin.skipped, wants_buffers=job.buffers.is_asked(member))


def serve_accumulate(incoming: Incoming, job: Job, member: Member, message: training_pb2.Accumulate) -> Iterator[bytes]:
    """Gradients to be held for the worker's next push.

    Raises:
        RequestError: the stream cannot go on.
    """
    try:
        new = job.begin_accumulation(
            member,
            sequence=message.sequence,
            micro=message.micro,
            group_count=message.group_count,
            layout_count=message.layout_count,
        )
    except LimitExceededError as error:
        incoming.skip_to("accumulate_end", "bucket")
        yield refusal(error)
        return

    def hold(bucket: Bucket, present: list[bool], payload: torch.Tensor) -> None:
        if new:
            job.accumulate(member, bucket, present, payload)

    try:
        for _ in _gradients(incoming, job, "accumulate_end", hold):
            pass
        if new:
            job.end_accumulation(member)
    finally:
        job.finished(member)
    yield _accumulated(message.micro)


def serve_discard(job: Job, member: Member, message: training_pb2.DiscardAccumulated) -> Iterator[bytes]:
    """The worker does not want what is held of its gradients.

    Raises:
        RequestError: the stream cannot go on.
    """
    job.discard_accumulated(member, sequence=message.sequence, micro=message.micro)
    yield _accumulated(message.micro)


def _accumulated(micro: int) -> bytes:
    return encode(training_pb2.TrainResponse(accumulated=training_pb2.Accumulated(micro=micro + 1)))


def _gradients(
    incoming: Incoming, job: Job, end: str, take: Callable[[Bucket, list[bool], torch.Tensor], None]
) -> Iterator[None]:
    """Receives gradients up to the message `end`. Yields after each bucket that `take` has been given."""
    pushed: set[int] = set()
    split = SplitParameters(job.store)
    while True:
        kind, message, frame = incoming.expect("bucket", end)
        if kind == end:
            count = getattr(message, end).bucket_count
            if count != len(pushed):
                raise InvalidFieldError(f"{end}.bucket_count", f"{count}, but {len(pushed)} have come")
            split.check()
            return
        what, bucket, present, payload = read_bucket(message.bucket, frame, job.store.buckets)
        if what != GRADIENT or bucket.bucket_id in pushed:
            raise InvalidFieldError(
                "TensorBucket", f"{what} of bucket {bucket.bucket_id} has no place here, or came a second time"
            )
        pushed.add(bucket.bucket_id)
        split.see(bucket, present)
        take(bucket, present, payload)
        # Nothing may hold the received bytes while this thread waits for the next ones.
        del message, frame, payload
        yield


def _receive_pushed(incoming: Incoming, job: Job, member: Member, round_: Round, pages: int) -> None:
    """What the worker changed outside of steps: all of it, before its first gradient."""
    valued: set[int] = set()
    stated: set[int] = set()
    states: list[tuple[int, float, list[str]]] = []
    for _ in range(pages):
        _, message, _ = incoming.expect("pushed")
        for entry in message.pushed.entries:
            if entry.parameter >= len(job.store.parameters):
                raise InvalidFieldError("PushedEntry.parameter", f"{entry.parameter} is unknown")
            if entry.has_value:
                valued.add(entry.parameter)
            if entry.HasField("state"):
                if entry.state.parameter != entry.parameter:
                    raise InvalidFieldError("PushedEntry.state.parameter", "is another than the entry's")
                states += read_entries(job.store, [entry.state], seen=stated)
    job.bringing.reserve(member, staged_bytes(job.store, states, valued))
    staged = job.store.stage(states, values=valued)
    receive_staged(incoming, job.store, staged)
    job.bring(member, round_, staged)
