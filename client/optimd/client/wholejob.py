"""All of a job: read from its server by who is none of its workers, or created anew from what was read."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch

from optimd.client.beginnings import Beginnings
from optimd.client.buffers import BufferReceiver
from optimd.client.connection import Connection
from optimd.client.credentials import INSECURE, Credentials
from optimd.client.environment import WorkerEnvironment
from optimd.client.exceptions import JobExistsError, ProtocolError
from optimd.client.joblayout import JobLayout
from optimd.client.jobline import JobLine
from optimd.client.jobsettings import decode_aggregation, decode_apply, decode_nonfinite
from optimd.client.options import ProxyOptions
from optimd.client.placement import names, place
from optimd.client.statetransfer import RemoteEntry, StateReceiver, refusing_what_does_not_fit
from optimd.client.torchform import RULE, STATE_TENSORS
from optimd.v1 import reading_pb2, state_dict_pb2, tensor_pb2
from optimd.wire.buffers import Buffer, BufferValues, decode_buffer
from optimd.wire.kinds import PARAMETER, decode_kind, encode_kind
from optimd.wire.layout import Parameter, decode_parameter
from optimd.wire.param_groups import decode_group, encode_group

_KINDS: Final = (PARAMETER, *STATE_TENSORS)


@dataclass(frozen=True, slots=True, kw_only=True)
class WholeJob:
    """A job, as it stands between two steps. All tensors are on the CPU."""

    step: int
    """How many steps it has committed."""
    options: ProxyOptions
    """Its settings: `aggregation` with its world_size, `apply`, `bucket_bytes`, `max_grad_norm` and `nonfinite`. What a
    job keeps in a master dtype, its parameters say."""
    groups: Sequence[Mapping[str, Any]]
    """The options of its param_groups, schedulers' values included."""
    sizes: Sequence[int]
    """How many parameters each of them has."""
    parameters: Sequence[Parameter]
    values: Mapping[int, torch.Tensor]
    """By parameter index, in the parameters' own dtypes, shapes and memory orders."""
    entries: Mapping[int, RemoteEntry]
    """The state of the parameters that have one, by index, in the dtypes that the server keeps."""
    buffers: Mapping[str, torch.Tensor]
    """By name, row-major."""


def read_job(connection: Connection, job: str, *, on_progress: Callable[[int, int], object]) -> WholeJob:
    """Reads all of a job, in one call, so that it is of one step. Blocks.

    Args:
        connection: The line to the server.
        job: The job's name.
        on_progress: Called now and then with the bytes of tensors that have come, and with how many are to come as far
            as that is known.

    Raises:
        OptimdError: the job cannot be read.
    """
    request = reading_pb2.ReadStateRequest(
        job=job, tensors=[encode_kind(kind) for kind in _KINDS], description=True, buffers=True
    )
    reading = _Reading(connection.address, on_progress)
    for message, frame in connection.read_state(request):
        with refusing_what_does_not_fit(connection):
            reading.take(message, frame.payload)
    with refusing_what_does_not_fit(connection):
        return reading.finish()


def create_job(
    server: str,
    job: str,
    whole: WholeJob,
    *,
    worker_id: str,
    retry_timeout_s: float,
    credentials: Credentials = INSECURE,
) -> None:
    """Creates a job with all that `whole` has, but for its steps: it begins at step 0. Blocks.

    It is there with all of it or not at all, whenever this is interrupted. Workers that open it join it.

    Args:
        server: The server's address.
        job: The job's name.
        whole: What it is to have.
        worker_id: As whom to create it.
        retry_timeout_s: How long to wait for the server to answer, in seconds.
        credentials: What the line is opened with.

    Raises:
        ConfigurationError: its settings contradict each other.
        JobExistsError: there is a job of that name.
        OptimdError: the job cannot be created.
    """
    options = dataclasses.replace(whole.options, rank=0, worker_id=worker_id, on_existing="fail")
    request = place(server, job, options, WorkerEnvironment(), rule=RULE).request
    groups = [dict(group, params=[None] * size) for group, size in zip(whole.groups, whole.sizes, strict=True)]
    tensors = [whole.values[index] for index in range(len(whole.parameters))]
    beginnings = Beginnings(
        groups=[encode_group(index, RULE, group) for index, group in enumerate(whole.groups)],
        entries=whole.entries,
        buffers=_buffer_values(whole.buffers) if whole.buffers else None,
    )
    connection = Connection(server, credentials=credentials)
    try:
        connection.probe(retry_timeout_s)
        line = JobLine(connection, request, retry_timeout_s=0, local=_Values(tensors))
        adopted = line.open(groups, tensors, whole.parameters, beginnings)
        line.leave()
        if adopted is not None:
            # One that is being formed is joined, whatever was asked for.
            raise JobExistsError(f"job {job!r} exists: workers are forming it just now")
    finally:
        names.give_back(request.job, request.worker_id)
        connection.close()


def _buffer_values(buffers: Mapping[str, torch.Tensor]) -> BufferValues:
    values = BufferValues([Buffer(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in buffers.items()])
    for name, tensor in buffers.items():
        values.tensors[name].copy_(tensor)
    return values


class _Values:
    """The parameters of a job that this process creates and leaves.

    Args:
        tensors: Their values, in order.
    """

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self._tensors = tensors

    def tensors(self) -> Sequence[torch.Tensor]:
        """The parameters."""
        return self._tensors

    def written(self) -> Collection[int]:
        """None: nothing is trained here."""
        return ()

    def received(self, kept: Collection[int]) -> None:
        """They are the server's values."""

    def rewound(self, step: int) -> None:
        """Never: a job that is being created has no steps."""


class _Reading:
    """What has come so far of a job that is read."""

    def __init__(self, address: str, on_progress: Callable[[int, int], object]) -> None:
        self._address = address
        self._on_progress = on_progress
        self._done = 0
        self._total = 0
        self._description: reading_pb2.JobDescription | None = None
        self._layout = JobLayout()
        self._parameters: list[Parameter] = []
        self._table: list[tensor_pb2.BucketSpec] = []
        self._receiver: StateReceiver | None = None
        self._groups: list[dict[str, Any]] = []
        self._sizes: list[int] = []
        self._specs: list[Buffer] = []
        self._buffers: BufferReceiver | None = None

    def take(self, message: reading_pb2.ReadStateResponse, payload: memoryview) -> None:
        """The next part of the answer.

        Raises:
            ProtocolError: the server does not describe its jobs.
            ValueError: it does not fit what has come before.
        """
        kind = message.WhichOneof("message")
        if self._description is None and kind != "description":
            raise ProtocolError(f"the server at {self._address} is an older one: it does not say what its jobs are")
        match kind:
            case "description":
                self._description = message.description
            case "layout":
                self._parameters += [decode_parameter(spec) for spec in message.layout.parameters]
            case "bucket_table":
                self._table += message.bucket_table.buckets
                if message.bucket_table.last:
                    self._take_layout()
            case "state_dict":
                self._take_page(message.state_dict)
            case "bucket":
                self._tensors().take_bucket(message.bucket, payload)
                self._advance(payload.nbytes)
            case "buffers":
                self._specs += [decode_buffer(spec) for spec in message.buffers.buffers]
                if message.buffers.last:
                    self._buffers = BufferReceiver(self._specs)
                    self._total += self._buffers.values.nbytes
            case "buffer_chunk" if self._buffers is not None:
                self._buffers.take(message.buffer_chunk, payload)
                self._advance(payload.nbytes)
            case _:
                raise ValueError(f"{kind} has no place here")

    def finish(self) -> WholeJob:
        """All of it has come.

        Raises:
            ValueError: it has not.
        """
        entries, values = self._tensors().finish()
        described = self._description
        complete = self._done == self._total and len(values) == len(self._parameters) == sum(self._sizes)
        if described is None or self._buffers is None or not complete:
            raise ValueError("a part of the job is missing")
        return WholeJob(
            step=described.step,
            options=ProxyOptions(
                aggregation=decode_aggregation(described.aggregation),
                apply=decode_apply(described.apply),
                bucket_bytes=described.bucket_bytes,
                max_grad_norm=described.max_grad_norm if described.HasField("max_grad_norm") else None,
                nonfinite=decode_nonfinite(described.nonfinite),
            ),
            groups=self._groups,
            sizes=self._sizes,
            parameters=self._parameters,
            values=values,
            entries=entries,
            buffers=self._buffers.values.tensors,
        )

    def _take_layout(self) -> None:
        self._layout.grow(self._parameters, self._table, count=len(self._table))
        self._receiver = StateReceiver(self._layout, _KINDS)
        self._total += sum(bucket.nbytes for bucket in self._layout.buckets)

    def _take_page(self, page: state_dict_pb2.StateDictPage) -> None:
        self._groups += [decode_group(group) for group in page.param_groups]
        self._sizes += [group.parameter_count for group in page.param_groups]
        self._tensors().take_entries(page)
        for entry in page.state:
            if entry.parameter >= len(self._parameters):
                raise ValueError(f"there is no parameter {entry.parameter}")
            parameter = self._parameters[entry.parameter]
            kinds = [decode_kind(number) for number in entry.tensors]
            self._total += sum(parameter.numel * parameter.dtype_of(kind).itemsize for kind in kinds)

    def _tensors(self) -> StateReceiver:
        if self._receiver is None:
            raise ValueError("the bucket table is missing")
        return self._receiver

    def _advance(self, nbytes: int) -> None:
        self._done += nbytes
        self._on_progress(self._done, self._total)
