"""Values and states on their way in, checked."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

import torch

from optimd.server.errors import InvalidFieldError
from optimd.server.incoming import Incoming, read_bucket
from optimd.server.store import StagedState, Store
from optimd.v1 import state_dict_pb2
from optimd.wire.kinds import GRADIENT, PARAMETER, decode_kind

_LARGEST_STEP: Final = torch.finfo(torch.float32).max


def read_entries(
    store: Store, entries: Iterable[state_dict_pb2.ParameterState], *, seen: set[int]
) -> list[tuple[int, float, list[str]]]:
    """Checks entries of a state_dict.

    Args:
        store: The job's.
        entries: The entries of one page.
        seen: The parameters that have had one, which are added to: none has two.

    Returns:
        What `Store.stage` takes.

    Raises:
        InvalidFieldError: a parameter or a tensor is unknown, or a step is not what a counter can hold.
    """
    checked = []
    for entry in entries:
        if entry.parameter >= len(store.parameters):
            raise InvalidFieldError("ParameterState.parameter", f"{entry.parameter} is unknown")
        if entry.parameter in seen:
            raise InvalidFieldError("ParameterState.parameter", f"{entry.parameter} has come already")
        seen.add(entry.parameter)
        if not abs(entry.step) <= _LARGEST_STEP:
            raise InvalidFieldError("ParameterState.step", f"{entry.step} is not a number that a counter can hold")
        try:
            names = [decode_kind(number) for number in entry.tensors]
        except ValueError as error:
            raise InvalidFieldError("ParameterState.tensors", str(error)) from error
        if PARAMETER in names or GRADIENT in names:
            raise InvalidFieldError("ParameterState.tensors", "values and gradients are not state")
        checked.append((entry.parameter, entry.step, names))
    return checked


def staged_bytes(store: Store, entries: Iterable[tuple[int, float, Sequence[str]]], values: Iterable[int] = ()) -> int:
    """What `Store.stage` takes memory for."""
    state = sum(store.parameters[index].nbytes * len(names) for index, _, names in entries)
    return state + sum(store.parameters[index].nbytes for index in values)


def receive_staged(incoming: Incoming, store: Store, staged: StagedState) -> int:
    """Receives all buckets that `staged` is made of.

    Returns:
        How many there were.

    Raises:
        InvalidFieldError: one is malformed, was not announced, or came twice.
        OutOfOrderError: something else came before all were there.
    """
    kinds = staged.kinds
    awaited = {
        (kind, bucket.bucket_id) for bucket in store.buckets for kind in kinds if any(staged.expects(kind, bucket))
    }
    count = len(awaited)
    while awaited:
        _, message, frame = incoming.expect("bucket")
        what, bucket, present, payload = read_bucket(message.bucket, frame, store.buckets)
        if (what, bucket.bucket_id) not in awaited or present != staged.expects(what, bucket):
            raise InvalidFieldError(
                "TensorBucket", f"{what} of bucket {bucket.bucket_id} is not what the entries announced"
            )
        awaited.discard((what, bucket.bucket_id))
        staged.write(what, bucket, present, payload)
    return count
