"""Layouts on their way: what a worker says it has, and what the server says the job has."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

from optimd.client.connection import TrainStream
from optimd.client.narrowing import WireEncodings
from optimd.client.samehost import Offer
from optimd.v1 import job_pb2, param_group_pb2, tensor_pb2, training_pb2
from optimd.wire.codec import encode
from optimd.wire.layout import Parameter, decode_parameter, encode_parameter
from optimd.wire.paging import paginate
from optimd.wire.param_groups import decode_group, encode_group


@dataclass(frozen=True, slots=True, kw_only=True)
class JobRequest:
    """Which job to open, as whom, and how. The fields are those of the schema's `OpenJob`."""

    job: str
    private: bool
    worker_id: str
    rank: int | None
    """None: the server chooses it."""
    rule: str
    on_existing: job_pb2.OnExisting
    aggregation: job_pb2.Aggregation
    apply: job_pb2.ApplyMode
    bucket_bytes: int
    max_grad_norm: float | None
    nonfinite: job_pb2.NonFinite
    follows_rewind: bool = False
    encodings: WireEncodings = field(default_factory=WireEncodings)
    """`gradients` and `parameters` of `OpenJob`."""

    @property
    def is_async(self) -> bool:
        """Whether the job is asynchronous."""
        return bool(self.aggregation.WhichOneof("policy") == "asynchronous")


def opening_messages(
    request: JobRequest,
    incarnation: int,
    offer: Offer | None,
    *,
    returns_at_step: int | None = None,
    returns_with_sequence: int = 0,
    follows_rewind: bool = False,
) -> Iterator[bytes]:
    """What opens a job: the pages of a layout follow.

    Args:
        request: Which job, and as whom.
        incarnation: Which process it is.
        offer: Memory that it would share.
        returns_at_step: The job step that its parameters are of, where it has been in the job.
        returns_with_sequence: The number of its next push, where it has.
        follows_rewind: Whether it takes the job as it is though that may not be as far.
    """
    yield encode(
        training_pb2.TrainRequest(
            open=job_pb2.OpenJob(
                job=request.job,
                worker=job_pb2.WorkerIdentity(worker_id=request.worker_id, rank=request.rank, incarnation=incarnation),
                on_existing=request.on_existing,
                aggregation=request.aggregation,
                apply=request.apply,
                bucket_bytes=request.bucket_bytes,
                private=request.private,
                client_version=version("optimd"),
                max_grad_norm=request.max_grad_norm,
                nonfinite=request.nonfinite,
                returns_at_step=returns_at_step,
                returns_with_sequence=returns_with_sequence,
                follows_rewind=follows_rewind,
                takes_bundles=True,
                gradients=request.encodings.gradients.number,
                parameters=request.encodings.parameters.number,
                shared_memory=None if offer is None else offer.message(),
            )
        )
    )


def group_messages(rule: str, first: int, groups: Sequence[Mapping[str, Any]]) -> list[param_group_pb2.ParamGroup]:
    """What describes the groups of a layout.

    Args:
        rule: The update rule, by the schema's name.
        first: The index of the first group.
        groups: torch's param_groups.
    """
    return [
        encode_group(index, rule, group, parameter_count=len(group["params"]))
        for index, group in enumerate(groups, first)
    ]


def layout_messages(
    groups: Sequence[param_group_pb2.ParamGroup],
    parameters: Sequence[Parameter],
    carried: Mapping[int, int] | None = None,
) -> Iterator[bytes]:
    """The pages of a layout.

    Args:
        groups: Its groups.
        parameters: What describes their parameters.
        carried: Which of these keep the state of which of the job's, where the layout replaces another.
    """
    for page, _ in paginate(groups):
        yield encode(training_pb2.TrainRequest(layout=job_pb2.LayoutPage(groups=page)))
    pairs = (job_pb2.CarriedState(parameter=new, carried_from=old) for new, old in (carried or {}).items())
    for carried_page, _ in paginate(pairs):
        yield encode(training_pb2.TrainRequest(layout=job_pb2.LayoutPage(carried=carried_page)))
    for specs, last in paginate(encode_parameter(parameter) for parameter in parameters):
        yield encode(training_pb2.TrainRequest(layout=job_pb2.LayoutPage(parameters=specs, last=last)))


def receive_table(stream: TrainStream) -> list[tensor_pb2.BucketSpec]:
    """The bucket table, to its last page. Blocks."""
    table: list[tensor_pb2.BucketSpec] = []
    while True:
        _, message, _ = stream.expect("bucket_table")
        table += message.bucket_table.buckets
        if message.bucket_table.last:
            return table


def receive_layout(stream: TrainStream) -> tuple[list[dict[str, Any]], list[Parameter]]:
    """The job's groups and parameters, to the last page. Blocks."""
    groups: list[dict[str, Any]] = []
    parameters: list[Parameter] = []
    while True:
        _, message, _ = stream.expect("layout")
        groups += [decode_group(group) for group in message.layout.groups]
        parameters += [decode_parameter(spec) for spec in message.layout.parameters]
        if message.layout.last:
            return groups, parameters
