"""A worker's line to its job: opened, kept alive, taken up again where it breaks."""

from __future__ import annotations

import contextlib
import itertools
import logging
import random
import secrets
import threading
import time
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import torch

from optimd.client.beginnings import Beginnings
from optimd.client.caretaker import caretaker
from optimd.client.connection import LEAVE_TIMEOUT_S, Connection, TrainStream
from optimd.client.exceptions import (
    ConnectionLostError,
    EvictedError,
    JobDeletedError,
    JobRewoundError,
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
from optimd.client.narrowing import NarrowedValues
from optimd.client.progress import Progress
from optimd.client.retry import Retry
from optimd.client.samehost import ServerValues
from optimd.client.toldgroups import ToldGroups
from optimd.client.translation import exception_of
from optimd.client.valuetransfer import LocalValues, ReturnedValues, receive_values, value_messages
from optimd.v1 import job_pb2, param_group_pb2, reading_pb2, training_pb2
from optimd.wire.codec import encode
from optimd.wire.layout import Parameter, unpack_bucket_ids

_log = logging.getLogger("optimd.client")

T = TypeVar("T")

_SHORTEST_OPENING_S: Final = 5.0
_BEATS_A_LEASE: Final = 5
_LONGEST_BEAT_S: Final = 30.0

_FOR_GOOD: Final = (EvictedError, SupersededError, JobDeletedError, JobRewoundError)
"""What a worker is told whatever it tries, and however often."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Return:
    """What a worker has come back to."""

    receipt: training_pb2.StepReceipt | None
    """What became of its last push, where it has made any and that is over."""
    rewound_from: int | None
    """The job step that it was at, if the job was set back."""
    is_overwritten: bool
    """Whether the job's values have replaced what the program had written."""


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
        self._is_leaving = False
        self._retry = Retry(retry_timeout_s)
        self._lost: ConnectionLostError | None = None
        self._lease_s = _LONGEST_BEAT_S * _BEATS_A_LEASE
        self.layout = JobLayout()
        self.groups = ToldGroups(request.rule)
        """The job's groups, with the options that the server knows this worker to have."""
        self.bucket_bytes = 0
        self.load_count = 0
        self.layout_count = 0
        self.job_step = 0
        self.next_sequence = 0
        self.held_buckets: frozenset[int] = frozenset()
        """When the worker came back: the buckets of its open push that the server had."""
        self.server_values = ServerValues()
        """The server's own values, where they can be read."""
        self.narrowed = NarrowedValues(request.encodings.parameters)
        """The parameters whose values came narrowed."""
        self.micro = 0
        """How often gradients were accumulated, or those held discarded, since the last step."""
        self.holds_gradients = False
        """Whether the server holds gradients for the next step."""
        self.rewinds = 0
        """How often the job was set back to an earlier point, and this worker followed."""
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
        """Opens the job, as `Session.open` says. Where it is created, it has what else it is to begin with.

        Begins anew where the line breaks: nothing is there yet that the server would know this process by.
        """
        messages = group_messages(self.request.rule, 0, groups)
        while True:
            self._stream = self.connection.open_stream()
            try:
                with self.failing_for_good():
                    self._stream.send(
                        itertools.chain(
                            opening_messages(self.request, self._incarnation, self._stream.offer),
                            layout_messages(messages, parameters),
                        )
                    )
                    adopted = self._exchange_values(messages, tensors, parameters, beginnings=beginnings)
                break
            except ConnectionLostError as error:
                self._await_another_try(error)
        self._retry.answered()
        self._is_cared_for = True
        caretaker.add(self)
        return adopted

    def _await_another_try(self, cause: ConnectionLostError) -> None:
        """The line broke while the job was being opened: waits until a server answers again.

        Raises:
            ConnectionLostError: none did in time; or it would find the job that it has created itself, and refuse it.
        """
        while True:
            pause_s = self._retry.next_pause(time.monotonic()) if self.retry_timeout_s else None
            if pause_s is None or self.request.on_existing == job_pb2.ON_EXISTING_FAIL:
                raise cause
            _log.warning("%s; opening job %s anew", cause, self.request.job)
            self._lost = None
            time.sleep(pause_s * random.uniform(0.5, 1.0))  # noqa: S311  # spreads workers out
            try:
                self.connection.reach(max(0.1, self._retry.left(time.monotonic())))
            except ConnectionLostError as error:
                # The line that is breaking took this question with it.
                cause = error
            else:
                return

    def grow(
        self,
        announcement: Callable[[], training_pb2.TrainRequest],
        groups: Sequence[Mapping[str, Any]],
        tensors: Sequence[torch.Tensor],
        parameters: Sequence[Parameter],
        *,
        carried: Mapping[int, int] | None = None,
        replaces: bool = False,
    ) -> list[dict[str, Any]] | None:
        """Brings more parameters to the job, or others, or receives their values where another worker has brought them.

        Args:
            announcement: Tells what it is called.
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
        messages = list(layout_messages(described, parameters, carried))

        def exchange() -> list[dict[str, Any]] | None:
            self.stream().send([encode(announcement()), *messages])
            return self._exchange_values(described, tensors, parameters, replaces=replaces)

        return self.exchanging(exchange)

    def counting(self, count: Callable[[], int]) -> Callable[[], int]:
        """Tells the number of the next of what is counted: the same one where the line breaks meanwhile.

        What was brought by then is found to be there. It is another one where the job is set back meanwhile.
        """
        number, rewinds = count() + 1, self.rewinds

        def current() -> int:
            nonlocal number, rewinds
            if self.rewinds != rewinds:
                number, rewinds = count() + 1, self.rewinds
            return number

        return current

    def forget_held(self) -> None:
        """The server holds no gradients for the next step, and counting starts anew."""
        self.micro = 0
        self.holds_gradients = False

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
        self.request.encodings.check(accepted, self.connection.address)
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
            stream.send(value_messages(layout, new_buckets, at, Progress("uploading parameters", total)))
            _, message, _ = stream.expect("ready")
            ready = message.ready
        else:
            ready = receive_values(stream, layout, at, Progress("receiving parameters", total))
        self._take(ready)
        if replaces:
            self.narrowed.came_whole()
        self.layout = layout
        self.server_values.map(accepted.values, layout.parameters)
        self.groups.bring(groups, replaces=replaces)
        if accepted.resumed:
            self.resumed = True
            _log.warning("resuming %s at step %d", self.request.job, self.job_step)
        return adopted

    def _take(self, ready: job_pb2.JobReady) -> None:
        self.job_step = ready.job_step
        self.next_sequence = ready.next_sequence
        self.held_buckets = self._held_buckets(ready.held_buckets)
        self.load_count = ready.load_count
        self.layout_count = ready.layout_count
        self.rank = ready.rank
        self._lease_s = ready.lease_s

    def _held_buckets(self, bitmap: bytes) -> frozenset[int]:
        try:
            return unpack_bucket_ids(bitmap, len(self.layout.buckets))
        except ValueError as error:
            raise ProtocolError(f"the server at {self.connection.address} holds what is not there: {error}") from error

    # --- using it

    def usable(self, *, written: Collection[int] | None = None) -> TrainStream:
        """The stream. Takes the job up again where the line has broken since the last call; may block for that.

        Args:
            written: As in `take_up_again`.

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
            self.take_up_again(self._lost, written=written)
        return self.stream()

    def stream(self) -> TrainStream:
        """The stream as it is, be it up or broken. Raises as `usable` does, but for what that meets on its way back."""
        self.connection.check()
        if isinstance(self._broken, _FOR_GOOD):
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

    def exchanging(self, exchange: Callable[[], T]) -> T:
        """Makes an exchange, anew on a new stream where the line breaks in the middle of it.

        Args:
            exchange: Sends and receives. What it has sent before is taken back by the server where the line breaks, or
                is found to be there already.

        Raises:
            OptimdError: it has failed; with what the server said.
        """
        self.usable()
        while True:
            try:
                with self.failing_for_good():
                    result = exchange()
            except ConnectionLostError as error:
                self.take_up_again(error)
            else:
                self.answered()
                return result

    def answered(self) -> None:
        """The server has answered what was asked: the next break has all of the time for retries."""
        self._retry.answered()

    def take_up_again(
        self, cause: ConnectionLostError, *, written: Collection[int] | None = None
    ) -> training_pb2.StepReceipt | None:
        """Opens the job again on a new stream, after the last one has broken. Blocks.

        Tries for `retry_timeout_s` since the first break that the server has not answered anything after. Values that
        are new to this worker are received in place. Those that the program has written are left alone, and are still
        to be pushed, if the job is where the worker was, or asynchronous. If it has gone on, or was set back, the job's
        replace them.

        Args:
            cause: What broke it.
            written: The parameters, by index, that the program has written to. None: those that `LocalValues` says; in
                the middle of a step, those that the step brings.

        Returns:
            What became of the worker's last push, where it has made any and that is over.

        Raises:
            ConnectionLostError: no server has answered in time, or none what was asked.
            SupersededError: another process has taken the worker's place.
            JobDeletedError: the job is gone.
            JobRewoundError: the job was set back, and the worker is not to follow it.
            OptimdError: the job cannot be taken up again; with what the server said.
        """
        if not self.retry_timeout_s:
            self._break(cause)
            raise cause
        level = logging.DEBUG if self._retry.is_under_way else logging.WARNING
        job = self.request.job
        _log.log(level, "%s; trying for %g s to take up job %s again", cause, self.retry_timeout_s, job)
        # Once: what a try receives before it breaks too is not the program's.
        kept = frozenset(self._local.written() if written is None else written)
        failure: OptimdError | None = None
        while True:
            pause_s = self._retry.next_pause(time.monotonic())
            if pause_s is None:
                self._break(cause)
                what = "was not answered" if failure is None else "was not to be had again"
                raise ConnectionLostError(f"{cause}, and {what}{f': {failure}' if failure else ''}") from cause
            # Spreads workers out.
            time.sleep(pause_s * random.uniform(0.5, 1.0))  # noqa: S311  # hides nothing
            left = self._retry.left(time.monotonic())
            try:
                self.connection.reach(max(0.1, left))
                back = self._reopen(max(_SHORTEST_OPENING_S, left), kept)
            except (ServerUnavailableError, LimitExceededError) as error:
                # A server that is full may count this worker's old stream still.
                failure = error
            except BaseException as error:
                self._break(error)
                raise
            else:
                self._lost = None
                _log.log(level, "back in job %s at step %d", job, self.job_step)
                self._tell(back, in_step=written is not None)
                return back.receipt

    def _tell(self, back: _Return, *, in_step: bool) -> None:
        """Tells this process, and the program, of what it has not done itself."""
        if back.rewound_from is not None:
            self.rewinds += 1
            self.forget_held()
            self._local.rewound(self.job_step)
            warnings.warn(
                f"job {self.request.job} was set back from step {back.rewound_from} to step {self.job_step}: its "
                "server was started again from what it had on disk. This worker follows: it has the job's parameters "
                f"now, and goes on with push {self.next_sequence}",
                stacklevel=2,
            )
        elif back.is_overwritten and not in_step:
            warnings.warn(
                f"job {self.request.job} had gone on to step {self.job_step} without this worker: its values have "
                "replaced those that were written since the worker's last step",
                stacklevel=2,
            )

    def _reopen(self, timeout_s: float, written: Collection[int]) -> _Return:
        self._stream = self.connection.open_stream()
        # A server that takes the call and then says nothing more.
        silence = threading.Timer(timeout_s, self._stream.cancel)
        silence.daemon = True
        silence.start()
        try:
            opening = opening_messages(
                self.request,
                self._incarnation,
                self._stream.offer,
                returns_at_step=self.job_step,
                returns_with_sequence=self.next_sequence,
                follows_rewind=self._follows_rewind,
            )
            self._stream.send(itertools.chain(opening, layout_messages(self.groups.opening(), self.layout.parameters)))
            return self._return(silence, written)
        finally:
            silence.cancel()

    @property
    def _follows_rewind(self) -> bool:
        # One that only comes back to leave has nothing to lose.
        return self.request.follows_rewind or self._is_leaving

    def _return(self, silence: threading.Timer, written: Collection[int]) -> _Return:
        """From LayoutAccepted to JobReady, and the receipt behind it."""
        stream, values = self.stream(), None
        _, message, _ = stream.expect("layout_accepted")
        silence.cancel()
        self.request.encodings.check(message.layout_accepted, self.connection.address)
        self.server_values.map(message.layout_accepted.values, self.layout.parameters)
        if message.layout_accepted.current:
            _, message, _ = stream.expect("ready")
            ready = message.ready
        else:
            receive_table(stream)
            receive_layout(stream)
            if not self._is_leaving:
                values = ReturnedValues(self._local, self.layout, written, self.narrowed)
            total = sum(bucket.nbytes for bucket in self.layout.buckets)
            into, changed = (None, None) if values is None else (values.into, values.changed)
            ready = receive_values(stream, self.layout, into, Progress("receiving parameters", total), changed)
        receipt = stream.expect("receipt")[1].receipt if ready.receipt_follows else None
        step, sequence = self.job_step, self.next_sequence
        is_rewound = ready.rewound or self._has_lost(ready)
        if is_rewound and not self._follows_rewind:
            # By its steps the job is as far as this worker: the server cannot tell.
            raise JobRewoundError(
                f"job {self.request.job} stands at step {step} without a state_dict or parameters that were brought to "
                "it there: its server was started again from what it had on disk, and that was less. Go back to a "
                "checkpoint of that step and start the worker again, or have it take the job as it is: "
                'ProxyOptions(on_rewind="follow")'
            )
        self._take(ready)
        is_overwritten = False
        if values is not None:
            # A push that is answered has brought what was written.
            stands = self.next_sequence == sequence and (self.request.is_async or self.job_step == step)
            if stands and not is_rewound:
                values.keep_written()
            else:
                is_overwritten = values.overwrite()
        return _Return(
            receipt=receipt,
            rewound_from=step if is_rewound and not self._is_leaving else None,
            is_overwritten=is_overwritten,
        )

    def _has_lost(self, ready: job_pb2.JobReady) -> bool:
        return ready.load_count < self.load_count or ready.layout_count < self.layout_count

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
            self._is_leaving = True
            self._retry.limit(time.monotonic() + LEAVE_TIMEOUT_S)
            with contextlib.suppress(OptimdError):
                self.take_up_again(self._lost or ConnectionLostError("the line broke"))


class _Refused(Exception):  # noqa: N818  # carries an error, and never leaves this module
    """The server has declined what was asked for, on a stream that goes on."""

    def __init__(self, reason: OptimdError) -> None:
        super().__init__(reason)
        self.reason = reason


def finish_on_devices(tensors: Sequence[torch.Tensor | None]) -> None:
    """Waits for tensors that are still being computed: another thread, with another current stream, reads them."""
    for device in {tensor.device for tensor in tensors if tensor is not None and tensor.is_cuda}:
        torch.cuda.current_stream(device).synchronize()
