"""A worker's side of a job: opening, pushing and pulling, state. Knows tensors and options, no optimizer."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from optimd.client import buffers
from optimd.client.connection import Connection, StepStream, TrainStream
from optimd.client.exceptions import (
    AccumulationLostError,
    ConnectionLostError,
    OptimdError,
    OptimizerClosedError,
    ProtocolError,
)
from optimd.client.joblayout import JobLayout
from optimd.client.layoutexchange import JobRequest, layout_messages, opening_messages, receive_layout, receive_table
from optimd.client.parameters import FlatReader, FlatWriter
from optimd.client.progress import Progress
from optimd.client.pushes import Push, accumulation_messages, push_messages, pushed_entries
from optimd.client.receipts import StepReceipt, decode_receipt
from optimd.client.statetransfer import RemoteEntry, bucket_message, read_state, state_messages
from optimd.client.translation import exception_of
from optimd.v1 import param_group_pb2, tensor_pb2, training_pb2
from optimd.wire.codec import encode
from optimd.wire.kinds import PARAMETER, encode_kind
from optimd.wire.layout import Bucket, Parameter, unpack_present
from optimd.wire.paging import paginate
from optimd.wire.param_groups import encode_group

_log = logging.getLogger("optimd.client")


class Session:
    """One worker in one job, from opening to leaving.

    All calls block until the server has answered. Not thread-safe, but for `abandon` and `end_watch`. After a call that
    failed halfway the line is closed, and further calls raise `ConnectionLostError`.

    Args:
        connection: The line to the server. The session closes it.
        request: Which job to open.
    """

    def __init__(self, connection: Connection, request: JobRequest) -> None:
        self._connection = connection
        self._request = request
        self._stream: TrainStream | None = None
        self._broken: str | None = None
        self._layout = JobLayout()
        # Of each group the options that the server knows this worker to have, serialised.
        self._sent_groups: list[bytes] = []
        self._load_count = 0
        self._layout_count = 0
        self._group_sizes: list[int] = []
        # How often gradients were accumulated, or those held discarded, since the last step.
        self._micro = 0
        self.holds_gradients = False
        """Whether the server holds gradients for the next step."""
        self._bucket_bytes = 0
        self.wants_buffers = False
        """Whether the last step's receipt asks for fresh buffers."""
        self.job_step = 0
        self.next_sequence = 0
        self.resumed = False

    @property
    def address(self) -> str:
        """Where the server is."""
        return self._connection.address

    @property
    def is_own(self) -> bool:
        """Whether this process opened it."""
        return self._connection.is_own

    @property
    def job(self) -> str:
        """The job's name."""
        return self._request.job

    @property
    def worker_id(self) -> str:
        """This worker's name in the job."""
        return self._request.worker_id

    @property
    def parameters(self) -> Sequence[Parameter]:
        """The job's parameters."""
        return self._layout.parameters

    @property
    def group_sizes(self) -> Sequence[int]:
        """How many parameters each of the job's groups has."""
        return self._group_sizes

    def check(self) -> None:
        """Whether it can be used.

        Raises:
            OptimdError: it cannot: it is closed, the line is, or this process is a child of the one that opened it.
        """
        self._usable()

    @property
    def world_size(self) -> int:
        """How many workers the job has been opened for."""
        return self._request.aggregation.sync.world_size

    def acknowledge(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """The worker's param_groups are the job's: only what changes from here on is sent.

        They may be other numbers than the server's, where the worker holds one in a narrower dtype.
        """
        self._sent_groups = [_serialised(message) for message in self._encoded(groups)]

    # --- opening and growing

    def open(
        self, groups: Sequence[Mapping[str, Any]], tensors: Sequence[torch.Tensor], parameters: Sequence[Parameter]
    ) -> list[dict[str, Any]] | None:
        """Opens the job: creates it with these values, or joins it and receives its values in place.

        Args:
            groups: torch's param_groups.
            tensors: Their parameters, in order.
            parameters: What describes these.

        Returns:
            The job's param_groups where it was joined; None where it was created.

        Raises:
            OptimdError: the job cannot be opened.
        """
        self._stream = self._connection.open_stream()
        with self._failing_for_good():
            self._stream.send(opening_messages(self._request, groups, parameters))
            return self._exchange_values(groups, tensors, parameters)

    def add_group(
        self, group: Mapping[str, Any], tensors: Sequence[torch.Tensor], parameters: Sequence[Parameter]
    ) -> dict[str, Any] | None:
        """Adds a param group to the job, or learns that another worker has done so.

        Returns:
            The job's options of the group where another worker brought it; None where this one did.

        Raises:
            OptimdError: it cannot be added.
        """
        stream = self._usable()
        index = len(self._sent_groups)
        # Here, not where it is sent: what cannot be encoded must not cost the stream.
        messages = [
            encode(training_pb2.TrainRequest(add_param_group=training_pb2.AddParamGroup(group=index))),
            *layout_messages(self._request.rule, index, [group], parameters),
        ]
        with self._failing_for_good():
            stream.send(messages)
            adopted = self._exchange_values([group], tensors, parameters)
            return None if adopted is None else adopted[0]

    def replace_layout(
        self,
        groups: Sequence[Mapping[str, Any]],
        tensors: Sequence[torch.Tensor],
        parameters: Sequence[Parameter],
        carried: Mapping[int, int],
    ) -> None:
        """Replaces the job's parameters and uploads their values, or receives them where another worker has done so.

        Steps and sequence numbers go on; what was accumulated is lost.

        Args:
            groups: torch's param_groups.
            tensors: Their parameters, in order.
            parameters: What describes these.
            carried: Which of them, by index, keep the state of which of the job's.

        Raises:
            OptimdError: the job does not take them.
        """
        stream = self._usable()
        number = self._layout_count + 1
        announcement = training_pb2.ReplaceLayout(layout_count=number)
        messages = [
            encode(training_pb2.TrainRequest(replace_layout=announcement)),
            *layout_messages(self._request.rule, 0, groups, parameters, carried),
        ]
        with self._failing_for_good():
            stream.send(messages)
            self._exchange_values(groups, tensors, parameters, replaces=True)
            self._nothing_held()

    def _exchange_values(
        self,
        groups: Sequence[Mapping[str, Any]],
        tensors: Sequence[torch.Tensor],
        parameters: Sequence[Parameter],
        *,
        replaces: bool = False,
    ) -> list[dict[str, Any]] | None:
        """From LayoutAccepted to JobReady. `replaces` says whether the parameters come in the place of the job's."""
        stream = self._usable()
        kind, message, _ = stream.expect("layout_accepted", "refused")
        if kind == "refused":
            raise _Refused(exception_of(message.refused))
        accepted = message.layout_accepted
        if replaces:
            self._layout = JobLayout()
            self._sent_groups = []
            self._group_sizes = []
        self._bucket_bytes = accepted.bucket_bytes
        first_group = len(self._sent_groups)
        table = receive_table(stream)
        adopted: list[dict[str, Any]] | None = None
        agreed = list(parameters)
        if not accepted.send_values:
            adopted, agreed = receive_layout(stream)
        try:
            new_buckets = self._layout.grow(agreed, table, count=accepted.bucket_count)
        except ValueError as error:
            raise ProtocolError(f"the server at {self.address} sent a wrong bucket table: {error}") from error
        in_force = groups if adopted is None else adopted
        self._sent_groups += [_serialised(message) for message in self._encoded(in_force, first_group)]
        self._group_sizes += [len(group["params"]) for group in groups]
        first = len(self._layout.parameters) - len(agreed)
        at = {first + offset: tensor for offset, tensor in enumerate(tensors)}
        _finish_on_devices(tensors)
        total = sum(bucket.nbytes for bucket in new_buckets)
        if adopted is None:
            stream.send(self._values(new_buckets, at, Progress("uploading parameters", total)))
        else:
            self._receive_values(len(new_buckets), at, Progress("receiving parameters", total))
        _, message, _ = stream.expect("ready")
        self.job_step = message.ready.job_step
        self.next_sequence = message.ready.next_sequence
        self._load_count = message.ready.load_count
        self._layout_count = message.ready.layout_count
        if accepted.resumed:
            self.resumed = True
            _log.warning("resuming %s at step %d", self.job, self.job_step)
        return adopted

    def _values(
        self, buckets: Sequence[Bucket], tensors: Mapping[int, torch.Tensor], progress: Progress
    ) -> Iterator[bytes]:
        reader = FlatReader(tensors, self._layout.parameters)
        for bucket in buckets:
            present = [True] * len(bucket.slices)
            yield bucket_message(PARAMETER, bucket, present, reader)
            progress.advance(bucket.nbytes)

    def _receive_values(self, count: int, tensors: Mapping[int, torch.Tensor], progress: Progress) -> None:
        writer = FlatWriter(tensors, self._layout.parameters)
        for _ in range(count):
            _, message, frame = self._usable().expect("bucket")
            self._write(writer, message.bucket, frame.payload)
            progress.advance(frame.payload.nbytes)
        writer.flush()

    # --- a step

    def step(self, push: Push, tensors: Sequence[torch.Tensor]) -> StepReceipt:
        """Pushes gradients, changed hyperparameters, values and states; receives the updated parameters in place.

        Args:
            push: What the worker brings.
            tensors: The parameters, in order, written to.

        Returns:
            What became of the push.

        Raises:
            OptimdError: the step failed.
        """
        stream = self._usable()
        _finish_on_devices([*push.grads, *push.values.values()])
        # Here, not where they are sent: what cannot be encoded must not cost the stream.
        group_pages = [page for page, _ in paginate(self._changed_groups(push.groups)) if page]
        pushed_pages = pushed_entries(push)
        begin = training_pb2.StepBegin(
            sequence=self.next_sequence,
            base_step=self.job_step,
            group_count=len(push.groups),
            load_count=self._load_count,
            layout_count=self._layout_count,
            param_group_pages=len(group_pages),
            pushed_pages=len(pushed_pages),
            micro=self._micro,
            grad_scale=push.grad_scale,
            skipped=push.skipped,
            without_gradients=not self.holds_gradients and all(grad is None for grad in push.grads),
        )
        sent, received = stream.bytes_sent, stream.bytes_received
        with self._failing_for_good():
            stream.send(push_messages(self._layout, push, begin, group_pages, pushed_pages))
            writer = FlatWriter(tensors, self._layout.parameters)
            while True:
                kind, message, frame = stream.expect("bucket", "receipt", "refused")
                if kind != "bucket":
                    break
                self._write(writer, message.bucket, frame.payload)
            writer.flush()
            if kind == "refused":
                # The server may know some of the changed options and not others: all are sent again.
                self._sent_groups = [b""] * len(self._sent_groups)
            else:
                self.job_step = message.receipt.step
                self.next_sequence = message.receipt.sequence + 1
                self._nothing_held()
                self.wants_buffers = message.receipt.wants_buffers
        self._raise_refusal(kind, message)
        return decode_receipt(
            message.receipt, bytes_sent=stream.bytes_sent - sent, bytes_received=stream.bytes_received - received
        )

    def accumulate(self, group_count: int, grads: Sequence[torch.Tensor | None]) -> None:
        """Has the server add gradients to what it holds for this worker's next push. Returns when they are held.

        Args:
            group_count: How many param_groups the worker has.
            grads: As in `Push`.

        Raises:
            OptimdError: they are not held.
        """
        stream = self._usable()
        _finish_on_devices(grads)
        begin = training_pb2.Accumulate(
            sequence=self.next_sequence, micro=self._micro, group_count=group_count, layout_count=self._layout_count
        )
        with self._failing_for_good():
            stream.send(accumulation_messages(self._layout, grads, begin))
            kind, message, _ = stream.expect("accumulated", "refused")
        self._raise_refusal(kind, message)
        self._micro = message.accumulated.micro
        self.holds_gradients = True

    def discard_accumulated(self) -> None:
        """Has the server forget what it holds for this worker's next push. Without that, does not reach the server.

        Raises:
            OptimdError: the line is down.
        """
        if not self.holds_gradients:
            return
        stream = self._usable()
        request = training_pb2.DiscardAccumulated(sequence=self.next_sequence, micro=self._micro)
        with self._failing_for_good():
            stream.send([encode(training_pb2.TrainRequest(discard_accumulated=request))])
            _, message, _ = stream.expect("accumulated")
            self._micro = message.accumulated.micro
            self.holds_gradients = False

    def _changed_groups(self, groups: Sequence[Mapping[str, Any]]) -> list[param_group_pb2.ParamGroup]:
        messages = self._encoded(groups)
        encoded = [_serialised(message) for message in messages]
        changed = [
            message for message, new, old in zip(messages, encoded, self._sent_groups, strict=True) if new != old
        ]
        self._sent_groups = encoded
        return changed

    def _encoded(self, groups: Sequence[Mapping[str, Any]], first: int = 0) -> list[param_group_pb2.ParamGroup]:
        return [encode_group(index, self._request.rule, group) for index, group in enumerate(groups, first)]

    # --- state

    def read(
        self, kinds: Sequence[str], indices: Sequence[int] = ()
    ) -> tuple[dict[int, RemoteEntry], dict[int, torch.Tensor]]:
        """Reads state, values or both.

        Args:
            kinds: Keys of torch's state, and `PARAMETER` for values. With none, only the steps are read.
            indices: The parameters wanted; none means all.

        Returns:
            The state of those that have one, and the values that were asked for, by parameter index.

        Raises:
            OptimdError: the server cannot be read.
        """
        self._usable()
        return read_state(self._connection, self.job, self._layout, kinds, indices)

    def pull(self, tensors: Sequence[torch.Tensor]) -> None:
        """Receives the job's values in place.

        Raises:
            OptimdError: the server cannot be read; some tensors may have been written to.
        """
        self._usable()
        read_state(self._connection, self.job, self._layout, (PARAMETER,), into=dict(enumerate(tensors)))

    def load(self, groups: Sequence[Mapping[str, Any]], entries: Mapping[int, RemoteEntry], *, force: bool) -> None:
        """Replaces the job's whole state and its param_groups.

        Args:
            groups: torch's param_groups.
            entries: The state of the parameters that have one, tensors in the parameters' shapes.
            force: Whether to replace the state of a job that has steps behind it and other workers.

        Raises:
            OptimdError: the job cannot take it.
        """
        stream = self._usable()
        encoded = self._encoded(groups)
        # Here, not where it is sent: what cannot be read must not cost the stream.
        digest = hashlib.sha256()
        for part in state_messages(self._layout, encoded, entries):
            digest.update(part)
        with self._failing_for_good():
            announcement = training_pb2.LoadState(digest=digest.digest(), load_count=self._load_count + 1, force=force)
            stream.send([encode(training_pb2.TrainRequest(load_state=announcement))])
            kind, message, _ = stream.expect("load_state_accepted", "refused")
            if kind != "refused":
                if message.load_state_accepted.send_state:
                    stream.send(state_messages(self._layout, encoded, entries))
                kind, message, _ = stream.expect("state_loaded", "refused")
        self._raise_refusal(kind, message)
        self._load_count = message.state_loaded.load_count
        self._sent_groups = [_serialised(group) for group in encoded]

    # --- buffers

    def attach_buffers(self, attached: buffers.AttachedBuffers) -> None:
        """Brings a module's buffers to the job, or receives the job's in place.

        Raises:
            ValueError: the module is gone.
            OptimdError: the job does not take them.
        """
        stream = self._usable()
        # Here, not where they are sent: what cannot be read must not cost the stream.
        values = attached.read()
        if values is None:
            raise ValueError("the module whose buffers are to be attached is gone")
        with self._failing_for_good():
            refusal = buffers.attach(stream, attached, values, self._bucket_bytes)
        if refusal is not None:
            raise refusal

    def push_buffers(self, attached: buffers.AttachedBuffers) -> None:
        """Sends the buffers that the last step's receipt asks for.

        Raises:
            JobMismatchError: they are not what was attached any more. The stream goes on.
            OptimdError: they cannot be sent.
        """
        self.wants_buffers = False
        stream = self._usable()
        values = attached.read()
        if values is not None:
            with self._failing_for_good():
                buffers.push(stream, values, self._bucket_bytes)

    # --- watching

    def watch_steps(self) -> StepStream:
        """Opens a stream of the job's steps, from the next one that this worker has not heard of. Does not wait.

        Raises:
            OptimdError: the line cannot be used.
        """
        self._usable()
        return self._connection.watch_steps(self.job, self.worker_id, after_step=self.job_step)

    def end_watch(self, stream: StepStream) -> None:
        """Ends such a stream. May be called from any thread, and more than once."""
        self._connection.end_watch(stream)

    # --- leaving

    def leave(self) -> None:
        """Leaves the job in good order. May be called more than once."""
        self._nothing_held()
        stream, self._stream = self._stream, None
        if stream is not None and self._broken is None and self._connection.is_own:
            stream.send([encode(training_pb2.TrainRequest(leave=training_pb2.Leave()))])
            stream.finish()
        self._connection.close()

    def abandon(self) -> None:
        """Drops the line without a word; the server sees the worker off. May be called from any thread."""
        self._connection.close()

    # --- all of the above

    def _write(self, writer: FlatWriter, header: tensor_pb2.TensorBucket, payload: memoryview) -> None:
        if header.kind != encode_kind(PARAMETER):
            raise ProtocolError(f"the server at {self.address} sent tensor kind {header.kind} where values were due")
        try:
            bucket = self._layout.bucket(header.bucket_id)
            writer.write(PARAMETER, bucket, unpack_present(header.present, len(bucket.slices)), payload)
        except ValueError as error:
            raise ProtocolError(f"the server at {self.address} sent a bucket that does not fit: {error}") from error

    def _usable(self) -> TrainStream:
        self._connection.check()
        if self._broken is not None:
            raise ConnectionLostError(f"the line to the server at {self.address} is closed since {self._broken}")
        if self._stream is None:
            raise OptimizerClosedError("this optimizer is closed")
        return self._stream

    def _raise_refusal(self, kind: str, message: training_pb2.TrainResponse) -> None:
        if kind == "refused":
            error = exception_of(message.refused)
            if isinstance(error, AccumulationLostError):
                self._nothing_held()
            raise error

    def _nothing_held(self) -> None:
        self._micro = 0
        self.holds_gradients = False

    @contextmanager
    def _failing_for_good(self) -> Iterator[None]:
        """What fails or is interrupted in the middle of an exchange leaves a stream that nobody can go on with."""
        try:
            yield
        except _Refused as refused:
            # Said on a stream that goes on: the caller may ask for something else.
            raise refused.reason from None
        except BaseException as error:
            self._broken = f"an earlier call failed ({type(error).__name__}: {error})"
            if self._stream is not None and self._connection.is_own:
                self._stream.cancel()
            raise


class _Refused(Exception):  # noqa: N818  # carries an error, and never leaves this module
    """The server has declined what was asked for, on a stream that goes on."""

    def __init__(self, reason: OptimdError) -> None:
        super().__init__(reason)
        self.reason = reason


def _serialised(group: param_group_pb2.ParamGroup) -> bytes:
    return group.SerializeToString(deterministic=True)


def _finish_on_devices(grads: Sequence[torch.Tensor | None]) -> None:
    """Waits for gradients that are still being computed: another thread, with another current stream, reads them."""
    for device in {grad.device for grad in grads if grad is not None and grad.is_cuda}:
        torch.cuda.current_stream(device).synchronize()
