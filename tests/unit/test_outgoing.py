"""What a server sends: in the order in which it was put, however long values are on their way from a device."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from optimd.server.outgoing import Outgoing
from optimd.v1 import training_pb2
from optimd.wire.bundles import unbundle
from optimd.wire.layout import Bucket, Slice

BUCKETS = [Bucket(number, 0, torch.float32, (Slice(number, 0, 2),)) for number in range(6)]


def content(messages: Iterator[bytes]) -> list[str]:
    """What messages are: a bucket's id, or their kind."""
    found = []
    for data in messages:
        for each in unbundle(data):
            message = training_pb2.TrainResponse.FromString(each)
            kind = message.WhichOneof("message")
            found.append(str(message.bucket.bucket_id) if kind == "bucket" else str(kind))
    return found


def values(asked: list[int], number: int) -> Callable[[], list[memoryview]]:
    def finish() -> list[memoryview]:
        asked.append(number)
        return [memoryview(bytes(8))]

    return finish


def receipt() -> bytes:
    return training_pb2.TrainResponse(receipt=training_pb2.StepReceipt(step=1)).SerializeToString()


@pytest.mark.parametrize("takes_bundles", [False, True])
def test_values_of_a_gpu_are_waited_for_when_more_are_on_their_way(takes_bundles: bool) -> None:
    outgoing, asked = Outgoing(torch.device("cuda:0")), list[int]()
    outgoing.takes_bundles = takes_bundles
    sent = []
    for number, bucket in enumerate(BUCKETS):
        sent += content(outgoing.put_values(bucket, [True], values(asked, number)))
        assert asked == list(range(max(0, number - 1)))
    sent += content(outgoing.put(receipt()))
    sent += content(outgoing.flush())
    assert sent == ["0", "1", "2", "3", "4", "5", "receipt"]


def test_a_flush_waits_for_all_of_them() -> None:
    """The worker goes on only when it has them."""
    outgoing, asked = Outgoing(torch.device("cuda:0")), list[int]()
    outgoing.takes_bundles = True
    sent = [*content(outgoing.put_values(BUCKETS[0], [True], values(asked, 0)))]
    assert not sent
    assert content(outgoing.flush()) == ["0"]
    assert not content(outgoing.flush())


def test_values_in_the_hosts_memory_are_not_held_back() -> None:
    outgoing, asked = Outgoing(torch.device("cpu")), list[int]()
    assert content(outgoing.put_values(BUCKETS[0], [True], values(asked, 0))) == ["0"]
    assert asked == [0]
