"""A job as `ReadState` describes it on the wire, to a reader that is none of its workers."""

from __future__ import annotations

from typing import Any

import grpc
import pytest
import torch
from torch import nn

from optimd.client import Adam, ProxyOptions
from optimd.server import Server
from optimd.v1 import job_pb2, reading_pb2, tensor_pb2
from optimd.v1.optimizer_service_pb2_grpc import OptimizerServiceStub
from optimd.wire.limits import MAX_MESSAGE_BYTES

KINDS = (tensor_pb2.TENSOR_KIND_EXP_AVG, tensor_pb2.TENSOR_KIND_EXP_AVG_SQ)


def parts_of(server: Server, **request: Any) -> list[reading_pb2.ReadStateResponse]:
    """The answer to a `ReadState`, each part of which stays under the limit on messages."""
    with grpc.insecure_channel(server.address) as channel:
        parts = list(OptimizerServiceStub(channel).ReadState(reading_pb2.ReadStateRequest(**request), timeout=30))
    assert all(part.ByteSize() < MAX_MESSAGE_BYTES for part in parts)
    return parts


def kinds_of(parts: list[reading_pb2.ReadStateResponse]) -> list[str]:
    """Which kinds of parts there are, in order, each run of one kind once."""
    kinds = [part.WhichOneof("message") or "" for part in parts]
    return [kind for place, kind in enumerate(kinds) if place == 0 or kinds[place - 1] != kind]


def test_a_reader_that_is_no_worker_is_told_what_the_job_is(server: Server) -> None:
    """Its settings, its parameters, its table, then what there is to read, then its buffers, in this order."""
    model = nn.Sequential(nn.Linear(30, 20), nn.BatchNorm1d(20))
    options = ProxyOptions(bucket_bytes=1024, max_grad_norm=2.0, nonfinite="skip", rank=0, world_size=1)
    with Adam(model.named_parameters(), server=server.address, job="told", options=options) as optimizer:
        optimizer.attach_buffers(model)
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
        parts = parts_of(server, job="told", tensors=KINDS, description=True, buffers=True)
    assert kinds_of(parts) == [
        "description", "layout", "bucket_table", "state_dict", "bucket", "buffers", "buffer_chunk"
    ]  # fmt: skip
    described = parts[0].description
    assert (described.step, described.apply, described.bucket_bytes) == (1, job_pb2.APPLY_MODE_ATOMIC, 1024)
    assert (described.max_grad_norm, described.nonfinite) == (2.0, job_pb2.NON_FINITE_SKIP)
    assert described.aggregation.sync.world_size == 1
    (layout,) = (part.layout for part in parts if part.HasField("layout"))
    assert not layout.groups
    assert layout.last
    named = list(model.named_parameters())
    assert [(spec.name, tuple(spec.shape)) for spec in layout.parameters] == [(n, tuple(p.shape)) for n, p in named]
    (table,) = (part.bucket_table for part in parts if part.HasField("bucket_table"))
    assert sum(piece.length for bucket in table.buckets for piece in bucket.slices) == 660
    (group,) = (group for part in parts for group in part.state_dict.param_groups)
    assert group.parameter_count == 4
    run = b"".join(part.payload for part in parts if part.HasField("buffer_chunk"))
    assert run[:80] == bytes(memoryview(model[1].running_mean.numpy()))
    assert [part.buffer_chunk.offset for part in parts if part.HasField("buffer_chunk")] == [0]


def test_a_job_without_buffers_or_steps_says_so(server: Server) -> None:
    """One empty last page; what is optional is not set; what is not asked for is not there."""
    options = ProxyOptions(rank=0, world_size="elastic")
    Adam([nn.Parameter(torch.ones(3))], server=server.address, job="bare", options=options).close()
    parts = parts_of(server, job="bare", description=True, buffers=True)
    assert kinds_of(parts) == ["description", "layout", "bucket_table", "state_dict", "buffers"]
    assert parts[0].description.aggregation.sync.world_size == 0
    assert not parts[0].description.HasField("max_grad_norm")
    assert parts[0].description.nonfinite == job_pb2.NON_FINITE_ALLOW
    assert (len(parts[-1].buffers.buffers), parts[-1].buffers.last) == (0, True)
    assert kinds_of(parts_of(server, job="bare")) == ["state_dict"]
    assert kinds_of(parts_of(server, job="bare", buffers=True)) == ["state_dict", "buffers"]


def test_a_long_description_comes_in_pages(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last of each list says that it is."""
    monkeypatch.setattr("optimd.wire.paging.paginate.__defaults__", (1024,))
    params = [(f"layer.{index}.{'x' * 200}", nn.Parameter(torch.ones(64))) for index in range(300)]
    model = nn.Module()
    for index in range(300):
        model.register_buffer("y" * 200 + str(index), torch.full((2,), float(index)))
    with Adam(params, server=server.address, job="long", options=ProxyOptions(bucket_bytes=1024)) as optimizer:
        optimizer.attach_buffers(model)
        parts = parts_of(server, job="long", description=True, buffers=True)
    for kind, count in (("layout", 300), ("bucket_table", 75), ("buffers", 300)):
        pages = [getattr(part, kind) for part in parts if part.HasField(kind)]
        assert len(pages) > 1, kind
        assert [page.last for page in pages] == [False] * (len(pages) - 1) + [True]
        items = [item for page in pages for item in getattr(page, "parameters" if kind == "layout" else "buffers", ())]
        if kind == "bucket_table":
            items = [bucket for page in pages for bucket in page.buckets]
        assert len(items) == count
