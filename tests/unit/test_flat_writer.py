"""Received slices on their way into parameters: where they go, and who is told when one is whole."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from optimd.client.parameters import FlatWriter, describe
from optimd.wire.encodings import BFLOAT16, EXACT
from optimd.wire.kinds import PARAMETER
from optimd.wire.layout import Bucket, Parameter, cut_buckets
from optimd.wire.tensors import bytes_of, flatten, span_of


def cut(tensors: list[torch.Tensor]) -> tuple[list[Parameter], list[Bucket]]:
    parameters = [describe(tensor, "") for tensor in tensors]
    buckets = cut_buckets(list(enumerate(parameters)), group=0, first_id=0, bucket_bytes=1024)
    return parameters, buckets


TENSORS = {
    "dense": lambda: torch.zeros(30, 40),
    "transposed": lambda: torch.zeros(40, 30).t(),
    "gaps": lambda: torch.zeros(30, 50)[:, :40],
    "strided": lambda: torch.zeros(30, 80)[:, ::2],
    "scalar": lambda: torch.zeros(()),
}


@pytest.mark.parametrize("how", ["written", "copied", "narrowed"])
@pytest.mark.parametrize("kind", TENSORS)
def test_a_tensor_is_whole_when_its_last_slice_is_written(kind: str, how: str) -> None:
    """Whoever asks is told then, and of one that had to be written aside not before it is in place."""
    target, other = nn.Parameter(TENSORS[kind]()), nn.Parameter(torch.zeros(100))
    tensors: list[torch.Tensor] = [target, other]
    parameters, buckets = cut(tensors)
    values = [torch.arange(tensor.numel()).float() + 1 for tensor in tensors]
    told: list[int] = []
    writer = FlatWriter(tensors, parameters, on_written=lambda index, _: told.append(index))
    versions = [tensor._version for tensor in tensors]
    for bucket in buckets:
        present = [True] * len(bucket.slices)
        if how == "copied":
            writer.copy(bucket, present, {index: span_of(value) for index, value in enumerate(values)})
            continue
        encoding = BFLOAT16 if how == "narrowed" else EXACT
        pieces = [values[p.parameter][p.offset : p.end] for p in bucket.slices]
        sent = torch.cat(pieces).to(torch.bfloat16 if how == "narrowed" else torch.float32)
        writer.write(PARAMETER, bucket, present, bytes_of(sent), encoding)
    assert told == ([1] if kind == "gaps" else [0, 1])
    writer.flush()
    for index, (tensor, value) in enumerate(zip(tensors, values, strict=True)):
        expected = value.to(torch.bfloat16).float() if how == "narrowed" else value
        assert torch.equal(flatten(tensor.detach(), parameters[index].memory_order).contiguous(), expected)
        # As torch's own writes do.
        assert tensor._version > versions[index]


def test_what_is_looked_at_and_not_written_keeps_its_version() -> None:
    """A step that is refused leaves no trace."""
    tensor = nn.Parameter(torch.zeros(50))
    parameters, _ = cut([tensor])
    version = tensor._version
    FlatWriter([tensor], parameters).prepare([0])
    assert tensor._version == version
