"""A worker's side of a job: opening, pushing and pulling, state. Knows tensors and options, no optimizer."""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final, TypeVar

import torch

from optimd.client import buffers
from optimd.client.caretaker import caretaker
from optimd.client.connection import StepStream, TrainStream
from optimd.client.exceptions import AccumulationLostError, ConnectionLostError
from optimd.client.jobline import JobLine, finish_on_devices, serialised
from optimd.client.parameters import FlatWriter
from optimd.client.pushes import Push, accumulation_messages, push_messages, pushed_entries, repeated_messages
from optimd.client.receipts import StepReceipt, decode_receipt
from optimd.client.statetransfer import RemoteEntry, read_state, state_messages
from optimd.client.translation import exception_of
from optimd.v1 import param_group_pb2, training_pb2
from optimd.wire.codec import encode
from optimd.wire.kinds import PARAMETER
from optimd.wire.layout import Parameter
from optimd.wire.paging import paginate
from optimd.wire.param_groups import encode_group

T = TypeVar("T")

_READING_PAUSE_S: Final = 0.2


class Session:
    """One worker in one job, from opening to leaving.

    All calls block until the server has answered. Not thread-safe, but for `abandon` and `end_watch`. Where the line
    breaks the job is taken up again, in the middle of a step too. After a call that failed halfway for another reason
    the line is closed, and further calls raise `ConnectionLostError`.

    Args:
        line: The line to the job, not opened yet. The session closes it.
    """

    def __init__(self, line: JobLine) -> None:
        self._line = line
        self._sends_all_groups = False
        # What the server knows of this worker's groups for sure: what was sent with the last push that was answered.
        self._known_groups: list[bytes] = []
        # How often gradients were accumulated, or those held discarded, since the last step.
        self._micro = 0
        self.holds_gradients = False
        """Whether the server holds gradients for the next step."""
        self.wants_buffers = False
        """Whether the last step's receipt asks for fresh buffers."""

    @property
    def address(self) -> str:
        """Where the server is."""
        return self._line.connection.address

    @property
    def retry_timeout_s(self) -> float:
        """How long to try again where the line breaks, in seconds."""
        return self._line.retry_timeout_s

    @property
    def is_own(self) -> bool:
        """Whether this process opened it."""
        return self._line.connection.is_own

    @property
    def job(self) -> str:
        """The job's name."""
        return self._line.request.job

    @property
    def worker_id(self) -> str:
        """This worker's name in the job."""
        return self._line.request.worker_id

    @property
    def rank(self) -> int:
        """This worker's rank."""
        return self._line.rank

    @property
    def job_step(self) -> int:
        """The job step that this worker's parameters are of."""
        return self._line.job_step

    @property
    def next_sequence(self) -> int:
        """The number of this worker's next push."""
        return self._line.next_sequence

    @property
    def resumed(self) -> bool:
        """Whether the job had steps behind it when this process opened it."""
        return self._line.resumed

    @property
    def parameters(self) -> Sequence[Parameter]:
        """The job's parameters."""
        return self._line.layout.parameters

    @property
    def group_sizes(self) -> Sequence[int]:
        """How many parameters each of the job's groups has."""
        return self._line.group_sizes

    def check(self) -> None:
        """Whether it can be used.

        Raises:
            OptimdError: it cannot: it is closed, the line is down for good, or this process is a child of the one that
                opened it.
        """
        self._line.stream()

    @property
    def is_alone(self) -> bool:
        """Whether the job has been opened for this worker alone."""
        aggregation = self._line.request.aggregation
        return not self._is_async and bool(aggregation.sync.world_size == 1)

    @property
    def _is_async(self) -> bool:
        return bool(self._line.request.aggregation.WhichOneof("policy") == "asynchronous")

    def acknowledge(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """The worker's param_groups are the job's: only what changes from here on is sent.

        They may be other numbers than the server's, where the worker holds one in a narrower dtype.
        """
        self._line.groups = [serialised(message) for message in self._encoded(groups)]
        self._known_groups = self._line.groups

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
        return self._line.open(groups, tensors, parameters)

    def add_group(
        self, group: Mapping[str, Any], tensors: Sequence[torch.Tensor], parameters: Sequence[Parameter]
    ) -> dict[str, Any] | None:
        """Adds a param group to the job, or learns that another worker has done so.

        Returns:
            The job's options of the group where another worker brought it; None where this one did.

        Raises:
            OptimdError: it cannot be added.
        """
        announcement = training_pb2.AddParamGroup(group=len(self._line.groups))
        adopted = self._line.grow(training_pb2.TrainRequest(add_param_group=announcement), [group], tensors, parameters)
        self._known_groups = self._line.groups
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
        # Here, since it may take the job up again, and then have another number.
        self._line.usable()
        announcement = training_pb2.ReplaceLayout(layout_count=self._line.layout_count + 1)
        self._line.grow(
            training_pb2.TrainRequest(replace_layout=announcement),
            groups,
            tensors,
            parameters,
            carried=carried,
            replaces=True,
        )
        self._known_groups = self._line.groups
        self._nothing_held()

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
        finish_on_devices([*push.grads, *push.values.values()])
        # In a synchronous job what was written is pushed with this step or, if that is late, dropped with it.
        keeps = self._is_async
        # Before the line is looked at: the gradients are not of the parameters that may come with a new one.
        sequence, base_step = self.next_sequence, self.job_step
        self._line.usable(keeps=keeps)
        traffic = _Traffic()
        resumed = False
        while True:
            if self.job_step != base_step and not self._is_async:
                # The job has gone on: the push is too late, and is only to be answered.
                push = dataclasses.replace(push, grads=[None] * len(push.grads), values={}, states={})
            try:
                receipt = self._attempt(push, tensors, base_step, traffic)
                break
            except ConnectionLostError as error:
                missed = self._line.take_up_again(error, keeps=keeps)
            resumed = True
            self._line.groups = self._known_groups
            if missed is not None and missed.sequence == sequence:
                # It had been answered, and only the answer was lost. Its values came with the line, but for those kept.
                job_step = self.job_step
                self._settle(missed)
                self._line.job_step = job_step
                if keeps and push.values:
                    self.pull(tensors, push.values)
                receipt = missed
                break
        return decode_receipt(receipt, resumed=resumed, bytes_sent=traffic.sent, bytes_received=traffic.received)

    def _attempt(
        self, push: Push, tensors: Sequence[torch.Tensor], base_step: int, traffic: _Traffic
    ) -> training_pb2.StepReceipt:
        """Pushes once, on the stream as it is.

        Raises:
            ConnectionLostError: the line broke.
            OptimdError: the push is refused, or has failed for good.
        """
        stream = self._line.stream()
        # Here, not where they are sent: what cannot be encoded must not cost the stream.
        group_pages = [page for page, _ in paginate(self._changed_groups(push.groups)) if page]
        pushed_pages = pushed_entries(push)
        begin = training_pb2.StepBegin(
            sequence=self.next_sequence,
            base_step=base_step,
            group_count=len(push.groups),
            load_count=self._line.load_count,
            layout_count=self._line.layout_count,
            param_group_pages=len(group_pages),
            pushed_pages=len(pushed_pages),
            micro=self._micro,
            grad_scale=push.grad_scale,
            skipped=push.skipped,
            without_gradients=not self.holds_gradients and all(grad is None for grad in push.grads),
        )
        with self._line.failing_for_good(), traffic.of(stream):
            stream.send(push_messages(self._line.layout, push, begin, group_pages, pushed_pages))
            writer = FlatWriter(tensors, self.parameters)
            while True:
                kind, message, frame = stream.expect("bucket", "receipt", "refused", "push_again")
                if kind == "push_again":
                    stream.send(repeated_messages(self._line.layout, push, set(message.push_again.buckets)))
                elif kind == "bucket":
                    self._line.write(writer, self._line.layout, message.bucket, frame.payload)
                else:
                    break
            writer.flush()
            if kind == "refused":
                # The server may know some of the changed options and not others: all are sent again.
                self._sends_all_groups = True
            else:
                self._settle(message.receipt)
        self._raise_refusal(kind, message)
        return message.receipt

    def _settle(self, receipt: training_pb2.StepReceipt) -> None:
        """A push is answered."""
        self._line.job_step = receipt.step
        self._line.next_sequence = receipt.sequence + 1
        self._line.answered()
        self._sends_all_groups = False
        self._known_groups = self._line.groups
        self._nothing_held()
        self.wants_buffers = receipt.wants_buffers

    def accumulate(self, group_count: int, grads: Sequence[torch.Tensor | None]) -> None:
        """Has the server add gradients to what it holds for this worker's next push. Returns when they are held.

        Args:
            group_count: How many param_groups the worker has.
            grads: As in `Push`.

        Raises:
            OptimdError: they are not held.
        """
        finish_on_devices(grads)
        base_step = self.job_step

        def exchange() -> tuple[str, training_pb2.TrainResponse] | None:
            if self.job_step != base_step and not self._is_async:
                return None
            begin = training_pb2.Accumulate(
                sequence=self.next_sequence,
                micro=self._micro,
                group_count=group_count,
                layout_count=self._line.layout_count,
            )
            stream = self._line.stream()
            stream.send(accumulation_messages(self._line.layout, grads, begin))
            kind, message, _ = stream.expect("accumulated", "refused")
            return kind, message

        answer = self._line.exchanging(exchange)
        if answer is None:
            self._nothing_held()
            raise AccumulationLostError(
                f"the job went on to step {self.job_step} while the line was down: the gradients are of the parameters "
                f"of step {base_step}. This worker has the job's parameters now; compute the gradients again"
            )
        kind, message = answer
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

        def exchange() -> training_pb2.TrainResponse:
            request = training_pb2.DiscardAccumulated(sequence=self.next_sequence, micro=self._micro)
            stream = self._line.stream()
            stream.send([encode(training_pb2.TrainRequest(discard_accumulated=request))])
            return stream.expect("accumulated")[1]

        message = self._line.exchanging(exchange)
        self._micro = message.accumulated.micro
        self.holds_gradients = False

    def _changed_groups(self, groups: Sequence[Mapping[str, Any]]) -> list[param_group_pb2.ParamGroup]:
        messages = self._encoded(groups)
        encoded = [serialised(message) for message in messages]
        changed = [
            message
            for message, new, old in zip(messages, encoded, self._line.groups, strict=True)
            if new != old or self._sends_all_groups
        ]
        self._line.groups = encoded
        return changed

    def _encoded(self, groups: Sequence[Mapping[str, Any]]) -> list[param_group_pb2.ParamGroup]:
        return [encode_group(index, self._line.request.rule, group) for index, group in enumerate(groups)]

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
        return self._reading(lambda: read_state(self._line.connection, self.job, self._line.layout, kinds, indices))

    def pull(self, tensors: Sequence[torch.Tensor], indices: Collection[int] = ()) -> None:
        """Receives the job's values in place.

        Args:
            tensors: The parameters, in order.
            indices: Those wanted; none means all.

        Raises:
            OptimdError: the server cannot be read; some tensors may have been written to.
        """
        wanted = sorted(indices)
        into = {index: tensors[index] for index in wanted or range(len(tensors))}
        kinds = (PARAMETER,)
        self._reading(lambda: read_state(self._line.connection, self.job, self._line.layout, kinds, wanted, into=into))

    def _reading(self, read: Callable[[], T]) -> T:
        """Reads, again where the line breaks: for up to `retry_timeout_s`."""
        deadline = time.monotonic() + self.retry_timeout_s
        while True:
            self._line.stream()
            try:
                return read()
            except ConnectionLostError:
                left = deadline - time.monotonic()
                if left <= 0:
                    raise
                time.sleep(min(left, _READING_PAUSE_S))
                self._line.connection.probe(max(0.1, left))

    def load(self, groups: Sequence[Mapping[str, Any]], entries: Mapping[int, RemoteEntry], *, force: bool) -> None:
        """Replaces the job's whole state and its param_groups.

        Args:
            groups: torch's param_groups.
            entries: The state of the parameters that have one, tensors in the parameters' shapes.
            force: Whether to replace the state of a job that has steps behind it and other workers.

        Raises:
            OptimdError: the job cannot take it.
        """
        self._line.usable()
        encoded = self._encoded(groups)
        # Here, not where it is sent: what cannot be read must not cost the stream.
        digest = hashlib.sha256()
        for part in state_messages(self._line.layout, encoded, entries):
            digest.update(part)
        load_count = self._line.load_count + 1

        def exchange() -> tuple[str, training_pb2.TrainResponse]:
            stream = self._line.stream()
            # The same number, also where the line broke: what was loaded by then is found to be there.
            announcement = training_pb2.LoadState(digest=digest.digest(), load_count=load_count, force=force)
            stream.send([encode(training_pb2.TrainRequest(load_state=announcement))])
            kind, message, _ = stream.expect("load_state_accepted", "refused")
            if kind != "refused":
                if message.load_state_accepted.send_state:
                    stream.send(state_messages(self._line.layout, encoded, entries))
                kind, message, _ = stream.expect("state_loaded", "refused")
            return kind, message

        kind, message = self._line.exchanging(exchange)
        self._raise_refusal(kind, message)
        self._line.load_count = message.state_loaded.load_count
        self._line.groups = self._known_groups = [serialised(group) for group in encoded]

    # --- buffers

    def attach_buffers(self, attached: buffers.AttachedBuffers) -> None:
        """Brings a module's buffers to the job, or receives the job's in place.

        Raises:
            ValueError: the module is gone.
            OptimdError: the job does not take them.
        """
        self._line.usable()
        # Here, not where they are sent: what cannot be read must not cost the stream.
        values = attached.read()
        if values is None:
            raise ValueError("the module whose buffers are to be attached is gone")
        refusal = self._line.exchanging(
            lambda: buffers.attach(self._line.stream(), attached, values, self._line.bucket_bytes)
        )
        if refusal is not None:
            raise refusal

    def push_buffers(self, attached: buffers.AttachedBuffers) -> None:
        """Sends the buffers that the last step's receipt asks for.

        Raises:
            JobMismatchError: they are not what was attached any more. The stream goes on.
            OptimdError: they cannot be sent.
        """
        self.wants_buffers = False
        stream = self._line.usable()
        values = attached.read()
        if values is not None:
            with self._line.failing_for_good():
                buffers.push(stream, values, self._line.bucket_bytes)

    # --- watching

    def watch_steps(self, after_step: int) -> StepStream:
        """Opens a stream of the job's steps behind `after_step`. Does not wait. May be called from any thread.

        Raises:
            OptimdError: the line cannot be used.
        """
        self._line.stream()
        return self._line.connection.watch_steps(self.job, self.worker_id, after_step=after_step)

    def end_watch(self, stream: StepStream) -> None:
        """Ends such a stream. May be called from any thread, and more than once."""
        self._line.connection.end_watch(stream)

    # --- leaving

    def leave(self, *, failed: bool = False) -> None:
        """Leaves the job in good order. May be called more than once.

        Args:
            failed: Whether the worker ends before its time: a job with `on_loss="wait"` keeps its place then.
        """
        self._nothing_held()
        self._line.leave(failed=failed)

    def abandon(self) -> None:
        """Has the worker leave without waiting for it. May be called from any thread, a finalizer's too."""
        if self._line.connection.is_own:
            caretaker.see_off(self._line)

    # --- all of the above

    def _raise_refusal(self, kind: str, message: training_pb2.TrainResponse) -> None:
        if kind == "refused":
            error = exception_of(message.refused)
            if isinstance(error, AccumulationLostError):
                self._nothing_held()
            raise error

    def _nothing_held(self) -> None:
        self._micro = 0
        self.holds_gradients = False


class _Traffic:
    """The bytes of one step's messages, over all streams that it took."""

    def __init__(self) -> None:
        self.sent = 0
        self.received = 0

    @contextmanager
    def of(self, stream: TrainStream) -> Iterator[None]:
        """Counts what goes over a stream in the block."""
        sent, received = stream.bytes_sent, stream.bytes_received
        try:
            yield
        finally:
            self.sent += stream.bytes_sent - sent
            self.received += stream.bytes_received - received
