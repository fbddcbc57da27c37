"""What a worker pushes, as messages."""

from __future__ import annotations

from collections.abc import Collection, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from optimd.client.joblayout import JobLayout
from optimd.client.statetransfer import RemoteEntry, state_buckets, state_header, tensor_buckets
from optimd.v1 import param_group_pb2, state_dict_pb2, training_pb2
from optimd.wire.codec import encode
from optimd.wire.encodings import EXACT, Encoding
from optimd.wire.kinds import GRADIENT, PARAMETER
from optimd.wire.paging import paginate
from optimd.wire.rings import RingWriter


@dataclass(frozen=True, slots=True, kw_only=True)
class Push:
    """One worker's part of a step. What it refers to does not change while it is under way."""

    groups: Sequence[Mapping[str, Any]]
    """torch's param_groups as they are now."""
    grads: Sequence[torch.Tensor | None]
    """By parameter, dense, of its shape and dtype; None where it has none."""
    values: Mapping[int, torch.Tensor] = field(default_factory=dict)
    """The parameters that somebody has written to since the last step."""
    states: Mapping[int, RemoteEntry] = field(default_factory=dict)
    """The states that were changed by hand; one without tensors takes the parameter's away."""
    grad_scale: float | None = None
    """What the gradients were multiplied by."""
    skipped: bool = False
    """Whether the gradients are not finite and stay out of the step."""


def push_messages(
    layout: JobLayout,
    push: Push,
    begin: training_pb2.StepBegin,
    group_pages: Sequence[Sequence[param_group_pb2.ParamGroup]],
    pushed_pages: Sequence[Sequence[state_dict_pb2.PushedEntry]],
    held: Collection[int] = (),
    ring: RingWriter | None = None,
    encoding: Encoding = EXACT,
) -> Iterator[bytes]:
    """The messages of a push, in order, without the buckets that the server holds of its gradients.

    These go through `ring`, where there is one, and in `encoding`; so they do in the messages below.
    """
    yield encode(training_pb2.TrainRequest(step_begin=begin))
    for groups in group_pages:
        message = param_group_pb2.ParamGroupsPage(groups=groups)
        yield encode(training_pb2.TrainRequest(param_groups=message))
    for entries in pushed_pages:
        yield encode(training_pb2.TrainRequest(pushed=state_dict_pb2.PushedPage(entries=entries)))
    yield from tensor_buckets(layout, PARAMETER, push.values)
    yield from state_buckets(layout, push.states)
    wanted = {bucket.bucket_id for bucket in layout.buckets}.difference(held) if held else None
    count = yield from gradient_messages(layout, () if push.skipped else push.grads, wanted, ring, encoding)
    yield encode(training_pb2.TrainRequest(step_end=training_pb2.StepEnd(bucket_count=count)))


def repeated_messages(
    layout: JobLayout,
    push: Push,
    buckets: Collection[int],
    ring: RingWriter | None = None,
    encoding: Encoding = EXACT,
) -> Iterator[bytes]:
    """The messages that push some buckets again, in order."""
    count = yield from gradient_messages(layout, push.grads, buckets, ring, encoding)
    yield encode(training_pb2.TrainRequest(step_end=training_pb2.StepEnd(bucket_count=count)))


def accumulation_messages(
    layout: JobLayout,
    grads: Sequence[torch.Tensor | None],
    begin: training_pb2.Accumulate,
    ring: RingWriter | None = None,
    encoding: Encoding = EXACT,
) -> Iterator[bytes]:
    """The messages that have gradients held for the next push, in order."""
    yield encode(training_pb2.TrainRequest(accumulate=begin))
    count = yield from gradient_messages(layout, grads, ring=ring, encoding=encoding)
    yield encode(training_pb2.TrainRequest(accumulate_end=training_pb2.AccumulateEnd(bucket_count=count)))


def gradient_messages(
    layout: JobLayout,
    grads: Sequence[torch.Tensor | None],
    wanted: Collection[int] | None = None,
    ring: RingWriter | None = None,
    encoding: Encoding = EXACT,
) -> Generator[bytes, None, int]:
    """The buckets that have any gradient, or of these the `wanted` ones, by id. Returns how many there were."""
    present = {index: grad for index, grad in enumerate(grads) if grad is not None}
    count = 0
    for bucket in tensor_buckets(layout, GRADIENT, present, wanted, ring, encoding):
        yield bucket
        count += 1
    return count


def pushed_entries(
    push: Push, narrowed: Collection[int] = (), encoding: Encoding = EXACT
) -> list[list[state_dict_pb2.PushedEntry]]:
    """What announces a push's values and states, in pages; without any, none.

    Args:
        push: The push.
        narrowed: The parameters, by index, whose values came narrowed before they were changed.
        encoding: What they came in, where that takes their dtype.
    """
    entries = [
        state_dict_pb2.PushedEntry(
            parameter=index,
            has_value=index in push.values,
            state=state_header(index, push.states[index]) if index in push.states else None,
            received_as=encoding.number if index in push.values and index in narrowed else EXACT.number,
        )
        for index in sorted(push.values.keys() | push.states.keys())
    ]
    return [page for page, _ in paginate(entries)] if entries else []
