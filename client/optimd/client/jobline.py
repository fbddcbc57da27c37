"""A worker's line to its job: opened, kept alive, taken up again where it breaks."""

from __future__ import annotations

import contextlib
import logging
import random
import secrets
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final, Protocol, TypeVar

import torch

from optimd.client.beginnings import Beginnings
from optimd.client.caretaker import caretaker
from optimd.client.connection import LEAVE_TIMEOUT_S, Connection, TrainStream
from optimd.client.exceptions import (
    ConnectionLostError,
    JobDeletedError,
    LimitExceededError,
    OptimdError,
    OptimizerClosedError,
    ProtocolError,
    ServerUnavailableError,
    SupersededError,
)
from optimd.client.joblayout import JobLayout
from optimd.client.layoutexchange import (
    JobRequest,
    group_messages,
    layout_messages,
    opening_messages,
    receive_layout,
    receive_table,
)
from optimd.client.parameters import FlatReader, FlatWriter
from optimd.client.progress import Progress
from optimd.client.statetransfer import bucket_message
from optimd.client.translation import exception_of
from optimd.v1 import job_pb2, param_group_pb2, reading_pb2, tensor_pb2, training_pb2
from optimd.wire.codec import encode
from optimd.wire.kinds import PARAMETER, encode_kind
from optimd.wire.layout import Bucket, Parameter, unpack_present

_log = logging.getLogger("optimd.client")

T = TypeVar("T")

_FIRST_PAUSE_S: Final = 0.1
_LONGEST_PAUSE_S: Final = 5.0
_SHORTEST_OPENING_S: Final = 5.0
_BEATS_A_LEASE: Final = 5
_LONGEST_BEAT_S: Final = 30.0


class LocalValues(Protocol):
    """The parameters of this process, as far as a line has to know them when it is taken up again."""

    def tensors(self) -> Sequence[torch.Tensor]:
        """The parameters as they are now, in order."""

    def written(self) -> Collection[int]:
        """Those, by index, that the program has written to since it was given the server's values."""

    def received(self, kept: Collection[int]) -> None:
        """They have the server's values now, but for those that were kept."""


class JobLine:
    """One worker's place in one job, whatever becomes of the streams that it goes over.

    Calls block until the server has answered. Belongs to one thread, but for what the caretaker calls.

    Args:
        connection: The line to the server. This closes it.
        request: Which job to open.
        retry_timeout_s: How long to try again where the line breaks, in seconds; 0 for a server that nobody would start
            again.
        local: The parameters of this process: values are received into them.
    """

    def __init__(
        self,
        connection: Connection,
        request: JobRequest,
        *,
        retry_timeout_s: float,
        local: LocalValues,
    ) -> None:
        self.connection = connection
        self.request = request
        self.retry_timeout_s = retry_timeout_s
        """How long to try again where the line breaks, in seconds."""
        self._local = local
        self._incarnation = secrets.randbits(64)
        self._stream: TrainStream | None = None
        self._broken: BaseException | None = None
        self._is_cared_for = False
        # Until when to try, and how long to pause: of all breaks since the server has last answered.
        self._retry_until_s: float | None = None
        self._pause_s = _FIRST_PAUSE_S
        self._lost: ConnectionLostError | None = None
        self._lease_s = _LONGEST_BEAT_S * _BEATS_A_LEASE
        self.layout = JobLayout()
        self.groups: list[bytes] = []
        """Of each group the options that the server knows this worker to have, serialised."""
        self.group_sizes: list[int] = []
        """How many parameters each of the job's groups has."""
        self.bucket_bytes = 0
        self.load_count = 0
        self.layout_count = 0
        self.job_step = 0
        self.next_sequence = 0
        self.rank = request.rank or 0
        self.resumed = False

    # --- opening and growing

    def open(
        self,
        groups: Sequence[Mapping[str, Any]],
        tensors: Sequence[torch.Tensor],
        parameters: Sequence[Parameter],
        beginnings: Beginnings | None = None,
    ) -> list[dict[str, Any]] | None:
        """Opens the job, as `Session.open` says. Where it is created, it has what else it is to begin with."""
        self._stream = self.connection.open_stream()
        messages = group_messages(self.request.rule, 0, groups)
        with self.failing_for_good():
            self._stream.send(self._opening(messages, parameters))
            adopted = self._exchange_values(messages, tensors, parameters, beginnings=beginnings)
        self._is_cared_for = True
        caretaker.add(self)
        return adopted

    def grow(
        self,
        announcement: training_pb2.TrainRequest,
        groups: Sequence[Mapping[str, Any]],
        tensors: Sequence[torch.Tensor],
        parameters: Sequence[Parameter],
        *,
        carried: Mapping[int, int] | None = None,
        replaces: bool = False,
    ) -> list[dict[str, Any]] | None:
        """Brings more parameters to the job, or others, or receives their values where another worker has brought them.

        Args:
            announcement: What it is called.
            groups: torch's param_groups.
            tensors: Their parameters, in order.
            parameters: What describes these.
            carried: Which of them keep the state of which of the job's.
            replaces: Whether the parameters come in the place of the job's.

        Returns:
            The job's param_groups where another worker brought them; None where this one did.

        Raises:
            OptimdError: the job does not take them.
        """
        # Here, not where it is sent: what cannot be encoded must not cost the stream.
        described = group_messages(self.request.rule, 0 if replaces else len(self.groups), groups)
        messages = [encode(announcement), *layout_messages(described, parameters, carried)]

        def exchange() -> list[dict[str, Any]] | None:
            self.stream().send(messages)
            return self._exchange_values(described, tensors, parameters, replaces=replaces)

        return self.exchanging(exchange)

    def _opening(
        self,
        groups: Sequence[param_group_pb2.ParamGroup],
        parameters: Sequence[Parameter],
        *,
        returns_at_step: int | None = None,
    ) -> Iterator[bytes]:
        yield from opening_messages(self.request, self._incarnation, returns_at_step=returns_at_step)
        yield from layout_messages(groups, parameters)

    def _exchange_values(
        self,
        groups: Sequence[param_group_pb2.ParamGroup],
        tensors: Sequence[torch.Tensor],
        parameters: Sequence[Parameter],
        *,
        replaces: bool = False,
        beginnings: Beginnings | None = None,
    ) -> list[dict[str, Any]] | None:
        """From LayoutAccepted to JobReady."""
        stream = self.stream()
        kind, message, _ = stream.expect("layout_accepted", "refused")
        if kind == "refused":
            raise _Refused(exception_of(message.refused))
        accepted = message.layout_accepted
        before = JobLayout() if replaces else self.layout
        # Aside, and in force once all of it is there: the line may break before that.
        layout = JobLayout(list(before.parameters), list(before.buckets))
        self.bucket_bytes = accepted.bucket_bytes
        table = receive_table(stream)
        adopted: list[dict[str, Any]] | None = None
        agreed = list(parameters)
        if not accepted.send_values:
            adopted, agreed = receive_layout(stream)
        try:
            new_buckets = layout.grow(agreed, table, count=accepted.bucket_count)
        except ValueError as error:
            raise ProtocolError(
                f"the server at {self.connection.address} sent a wrong bucket table: {error}"
            ) from error
        first = len(layout.parameters) - len(agreed)
        at = {first + offset: tensor for offset, tensor in enumerate(tensors)}
        finish_on_devices(tensors)
        total = sum(bucket.nbytes for bucket in new_buckets)
        if adopted is None:
            if beginnings is not None:
                stream.send(beginnings.messages(layout, self.bucket_bytes))
            stream.send(_values(layout, new_buckets, at, Progress("uploading parameters", total)))
            _, message, _ = stream.expect("ready")
            ready = message.ready
        else:
            ready = self._receive_values(layout, at, Progress("receiving parameters", total))
        self._take(ready)
        self.layout = layout
        self.groups = [*(() if replaces else self.groups), *(serialised(group) for group in groups)]
        self.group_sizes = [*(() if replaces else self.group_sizes), *(group.parameter_count for group in groups)]
        if accepted.resumed:
            self.resumed = True
            _log.warning("resuming %s at step %d", self.request.job, self.job_step)
        return adopted

    def _receive_values(
        self, layout: JobLayout, tensors: Mapping[int, torch.Tensor], progress: Progress
    ) -> job_pb2.JobReady:
        """Buckets, of which some may come again, up to JobReady."""
        writer = FlatWriter(tensors, layout.parameters)
        while True:
            kind, message, frame = self.stream().expect("bucket", "ready")
            if kind == "ready":
                writer.flush()
                return message.ready
            self.write(writer, layout, message.bucket, frame.payload)
            progress.advance(frame.payload.nbytes)

    def _take(self, ready: job_pb2.JobReady) -> None:
        self.job_step = ready.job_step
        self.next_sequence = ready.next_sequence
        self.load_count = ready.load_count
        self.layout_count = ready.layout_count
        self.rank = ready.rank
        self._lease_s = ready.lease_s

    def write(
        self,
        writer: FlatWriter,
        layout: JobLayout,
        header: tensor_pb2.TensorBucket,
        payload: memoryview,
    ) -> None:
        """Writes a received bucket of values.

        Raises:
            ProtocolError: it is none, or does not fit.
        """
        address = self.connection.address
        if header.kind != encode_kind(PARAMETER):
            raise ProtocolError(f"the server at {address} sent tensor kind {header.kind} where values were due")
        try:
            bucket = layout.bucket(header.bucket_id)
            writer.write(PARAMETER, bucket, unpack_present(header.present, len(bucket.slices)), payload)
        except ValueError as error:
            raise ProtocolError(f"the server at {address} sent a bucket that does not fit: {error}") from error

    # --- using it

    def usable(self, *, keeps: bool = True) -> TrainStream:
        """The stream. Takes the job up again where the line has broken since the last call; may block for that.

        Args:
            keeps: As in `take_up_again`.

        Raises:
            ForkedProcessError: this process is a child of the one that opened it.
            OptimizerClosedError: it is closed.
            ConnectionLostError: the line is down for good.
            OptimdError: the job cannot be taken up again; with what the server said.
        """
        stream = self.stream()
        if self._lost is None and stream.has_ended:
            # While nobody listened: the server has said why, or the line broke.
            with contextlib.suppress(ConnectionLostError), self.failing_for_good():
                stream.expect()
        if self._lost is not None:
            self.take_up_again(self._lost, keeps=keeps)
        return self.stream()

    def stream(self) -> TrainStream:
        """The stream as it is, be it up or broken. Raises as `usable` does, but for what that meets on its way back."""
        self.connection.check()
        if isinstance(self._broken, (SupersededError, JobDeletedError)):
            # Whatever is tried, and however often.
            raise type(self._broken)(str(self._broken)) from None
        if self._broken is not None:
            raise ConnectionLostError(
                f"the line to the server at {self.connection.address} is closed since an earlier call failed "
                f"({type(self._broken).__name__}: {self._broken})"
            )
        if self._stream is None:
            raise OptimizerClosedError("this optimizer is closed")
        return self._stream

    @contextmanager
    def failing_for_good(self) -> Iterator[None]:
        """What fails or is interrupted in the middle of an exchange leaves a stream that nobody can go on with.

        If that is because the line broke, the job can be taken up again on another one.
        """
        try:
            yield
        except _Refused as refused:
            # Said on a stream that goes on: the caller may ask for something else.
            raise refused.reason from None
        except ConnectionLostError as error:
            self._lost = error
            raise
        except BaseException as error:
            self._break(error)
            raise

    def _break(self, error: BaseException) -> None:
        # Another of its kind: the error itself leads, by its traceback, to the caller's frames.
        self._broken = type(error)(str(error)) if isinstance(error, OptimdError) else ConnectionLostError(repr(error))
        if self._stream is not None and self.connection.is_own:
            self._stream.cancel()

    # --- taking it up again

    def exchanging(self, exchange: Callable[[], T], *, keeps: bool = True) -> T:
        """Makes an exchange, anew on a new stream where the line breaks in the middle of it.

        Args:
            exchange: Sends and receives. What it has sent before is taken back by the server where the line breaks, or
                is found to be there already.
            keeps: As in `take_up_again`.

        Raises:
            OptimdError: it has failed; with what the server said.
        """
        self.usable(keeps=keeps)
        while True:
            try:
                with self.failing_for_good():
                    result = exchange()
            except ConnectionLostError as error:
                self.take_up_again(error, keeps=keeps)
            else:
                self.answered()
                return result

    def answered(self) -> None:
        """The server has answered what was asked: the next break has all of the time for retries."""
        self._retry_until_s, self._pause_s = None, _FIRST_PAUSE_S

    def take_up_again(self, cause: ConnectionLostError, *, keeps: bool = True) -> training_pb2.StepReceipt | None:
        """Opens the job again on a new stream, after the last one has broken. Blocks.

        Tries for `retry_timeout_s` since the first break that the server has not answered anything after. Values that
        are new to this worker are received in place.

        Args:
            cause: What broke it.
            keeps: Whether values that the program has written are left alone. They are still to be pushed.

        Returns:
            What became of the worker's last push, where it has made any and that is over.

        Raises:
            ConnectionLostError: no server has answered in time.
            SupersededError: another process has taken the worker's place.
            JobDeletedError: the job is gone.
            OptimdError: the job cannot be taken up again; with what the server said.
        """
        if not self.retry_timeout_s:
            self._break(cause)
            raise cause
        is_first = self._retry_until_s is None
        if self._retry_until_s is None:
            self._retry_until_s = time.monotonic() + self.retry_timeout_s
        level = logging.WARNING if is_first else logging.DEBUG
        job = self.request.job
        _log.log(level, "%s; trying for %g s to take up job %s again", cause, self.retry_timeout_s, job)
        while True:
            if not is_first:
                time.sleep(self._pause_s * random.uniform(0.5, 1.5))  # noqa: S311  # spreads workers out, hides nothing
                self._pause_s = min(2 * self._pause_s, _LONGEST_PAUSE_S)
            is_first = False
            left = self._retry_until_s - time.monotonic()
            try:
                self.connection.probe(max(0.1, left))
                receipt = self._reopen(max(_SHORTEST_OPENING_S, left), keeps=keeps)
            except (ServerUnavailableError, LimitExceededError) as error:
                # A server that is full may count this worker's old stream still.
                if time.monotonic() >= self._retry_until_s:
                    self._break(cause)
                    raise ConnectionLostError(f"{cause}, and was not to be had again: {error}") from cause
            except BaseException as error:
                self._break(error)
                raise
            else:
                self._lost = None
                _log.log(level, "back in job %s at step %d", job, self.job_step)
                return receipt

    def _reopen(self, timeout_s: float, *, keeps: bool) -> training_pb2.StepReceipt | None:
        self._stream = self.connection.open_stream()
        # A server that takes the call and then says nothing more.
        silence = threading.Timer(timeout_s, self._stream.cancel)
        silence.daemon = True
        silence.start()
        try:
            messages = self._opening(self._known_groups(), self.layout.parameters, returns_at_step=self.job_step)
            self._stream.send(messages)
            return self._return(silence, keeps=keeps)
        finally:
            silence.cancel()

    def _known_groups(self) -> list[param_group_pb2.ParamGroup]:
        groups = [param_group_pb2.ParamGroup.FromString(group) for group in self.groups]
        for group, size in zip(groups, self.group_sizes, strict=True):
            group.parameter_count = size
        return groups

    def _return(self, silence: threading.Timer, *, keeps: bool) -> training_pb2.StepReceipt | None:
        """From LayoutAccepted to JobReady, and the receipt behind it."""
        stream = self.stream()
        _, message, _ = stream.expect("layout_accepted")
        silence.cancel()
        if message.layout_accepted.current:
            _, message, _ = stream.expect("ready")
            ready = message.ready
        else:
            receive_table(stream)
            receive_layout(stream)
            tensors, kept = self._local.tensors(), set(self._local.written() if keeps else ())
            at = {
                index: tensors[index]
                if index < len(tensors) and index not in kept and _fits(tensors[index], parameter)
                else torch.empty(parameter.shape, dtype=parameter.dtype)
                for index, parameter in enumerate(self.layout.parameters)
            }
            total = sum(bucket.nbytes for bucket in self.layout.buckets)
            ready = self._receive_values(self.layout, at, Progress("receiving parameters", total))
            self._local.received(kept)
        self._take(ready)
        if not ready.receipt_follows:
            return None
        _, message, _ = stream.expect("receipt")
        return message.receipt

    # --- for the caretaker

    @property
    def heartbeat_s(self) -> float:
        """How often to say that the worker is alive, in seconds."""
        return min(_LONGEST_BEAT_S, self._lease_s / _BEATS_A_LEASE)

    def beat(self) -> None:
        """Says that the worker is alive, unless it is not in the job for good. Does not wait."""
        if self._broken is not None:
            return
        self.connection.beat(
            reading_pb2.HeartbeatRequest(
                job=self.request.job, worker_id=self.request.worker_id, incarnation=self._incarnation
            ),
            timeout_s=2 * self.heartbeat_s,
        )

    def say_goodbye(self, *, failed: bool = False) -> None:
        """Tells the server that the worker leaves, if the line is up. Does not wait.

        Not of one that `failed` in a job that is to wait for lost workers: its successor takes its place.
        """
        stream = self._stream
        if failed and self.request.aggregation.sync.on_loss == job_pb2.ON_LOSS_WAIT:
            if stream is not None and self.connection.is_own:
                stream.cancel()
        elif stream is not None and self._broken is None and self.connection.is_own:
            stream.send([encode(training_pb2.TrainRequest(leave=training_pb2.Leave()))])
            stream.close_side()

    def has_left(self) -> bool:
        """Whether the server has answered that."""
        stream = self._stream
        return stream is None or self._broken is not None or stream.has_ended

    def drop(self) -> None:
        """Closes the line without a word. May be called from any thread."""
        self.connection.close()

    # --- leaving

    def leave(self, *, failed: bool = False) -> None:
        """Leaves the job in good order, as `say_goodbye` does. May be called more than once."""
        if self.connection.is_own and self._is_cared_for:
            self._is_cared_for = False
            caretaker.forget(self)
        self._come_back_to_leave(failed=failed)
        self.say_goodbye(failed=failed)
        stream, self._stream = self._stream, None
        if stream is not None and self._broken is None and self.connection.is_own:
            stream.finish()
        self.connection.close()

    def _come_back_to_leave(self, *, failed: bool) -> None:
        """Where the line has broken, and others may be waiting for this worker: comes back, if that is quick."""
        stream = self._stream
        if failed or self.request.private or self._broken is not None or not self.retry_timeout_s:
            return
        if stream is not None and self.connection.is_own and (self._lost is not None or stream.has_ended):
            self._retry_until_s = time.monotonic() + LEAVE_TIMEOUT_S
            with contextlib.suppress(OptimdError):
                self.take_up_again(self._lost or ConnectionLostError("the line broke"))


class _Refused(Exception):  # noqa: N818  # carries an error, and never leaves this module
    """The server has declined what was asked for, on a stream that goes on."""

    def __init__(self, reason: OptimdError) -> None:
        super().__init__(reason)
        self.reason = reason


def serialised(group: param_group_pb2.ParamGroup) -> bytes:
    """A group's options as bytes that are equal where they are."""
    options = param_group_pb2.ParamGroup()
    options.CopyFrom(group)
    options.ClearField("parameter_count")
    return options.SerializeToString(deterministic=True)


def finish_on_devices(tensors: Sequence[torch.Tensor | None]) -> None:
    """Waits for tensors that are still being computed: another thread, with another current stream, reads them."""
    for device in {tensor.device for tensor in tensors if tensor is not None and tensor.is_cuda}:
        torch.cuda.current_stream(device).synchronize()


def _fits(tensor: torch.Tensor, parameter: Parameter) -> bool:
    return tuple(tensor.shape) == parameter.shape and tensor.dtype == parameter.dtype and not tensor.is_meta


def _values(
    layout: JobLayout, buckets: Sequence[Bucket], tensors: Mapping[int, torch.Tensor], progress: Progress
) -> Iterator[bytes]:
    reader = FlatReader(tensors, layout.parameters)
    for bucket in buckets:
        present = [True] * len(bucket.slices)
        yield bucket_message(PARAMETER, bucket, present, reader)
        progress.advance(bucket.nbytes)
