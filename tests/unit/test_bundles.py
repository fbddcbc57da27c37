"""Small messages in one, against protobuf's own reading of them."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optimd.v1 import training_pb2
from optimd.wire import bundles
from optimd.wire.bundles import bundle, bundled, unbundle
from optimd.wire.codec import MalformedMessageError

many = settings(max_examples=100, deadline=None)
messages = st.lists(st.binary(min_size=1, max_size=300), min_size=2, max_size=8)


@many
@given(messages)
def test_a_bundle_is_what_protobuf_would_write(parts: list[bytes]) -> None:
    assert bundle(parts) == training_pb2.TrainRequest(bundled=parts).SerializeToString()
    assert training_pb2.TrainResponse.FromString(bundle(parts)).bundled == parts


@many
@given(messages)
def test_a_bundle_is_read_as_it_was_written(parts: list[bytes]) -> None:
    assert unbundle(bundle(parts)) == parts


@many
@given(st.lists(st.integers(1, 60_000), max_size=12))
def test_bundling_keeps_the_messages_and_their_order(sizes: list[int]) -> None:
    parts = [training_pb2.TrainRequest(payload=bytes(size)).SerializeToString() for size in sizes]
    sent = list(bundled(parts))
    assert [part for message in sent for part in unbundle(message)] == parts
    # The length of each of them stands beside it.
    assert all(len(message) <= bundles.BUNDLE_BYTES + 6 * len(parts) for message in sent)


def test_a_large_message_travels_by_itself() -> None:
    large = training_pb2.TrainRequest(payload=bytes(bundles.BUNDLE_BYTES)).SerializeToString()
    small = training_pb2.TrainRequest(step_end=training_pb2.StepEnd(bucket_count=1)).SerializeToString()
    assert list(bundled([small, small, large, small])) == [bundle([small, small]), large, small]


def test_a_single_message_is_no_bundle() -> None:
    message = training_pb2.TrainRequest(leave=training_pb2.Leave()).SerializeToString()
    assert bundle([message]) is message
    assert unbundle(message) == [message]


@pytest.mark.parametrize("cut", range(1, 7))
def test_a_bundle_that_is_cut_off_is_refused(cut: int) -> None:
    with pytest.raises(MalformedMessageError):
        unbundle(bundle([b"abcd", b"efgh"])[:-cut])


def test_a_bundle_with_another_field_in_it_is_refused() -> None:
    other = training_pb2.TrainRequest(payload=b"x").SerializeToString()
    with pytest.raises(MalformedMessageError):
        unbundle(bundle([b"abcd", b"efgh"]) + other)


def test_a_bundle_that_is_larger_than_one_may_be_is_refused() -> None:
    """Of a million messages in one each would be an object."""
    small = bundle([b""] * 2)
    with pytest.raises(MalformedMessageError, match="of which it may have"):
        unbundle(small * bundles.BUNDLE_BYTES)
