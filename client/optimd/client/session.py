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
from optimd.client.aheadpush import AheadPush
from optimd.client.caretaker import caretaker
from optimd.client.connection import StepStream, TrainStream
from optimd.client.exceptions import AccumulationLostError, ConnectionLostError, OptimdError
from optimd.client.joblayout import JobLayout
from optimd.client.jobline import JobLine, finish_on_devices
from optimd.client.parameters import FlatWriter
from optimd.client.pushes import Push, accumulation_messages, push_messages, pushed_entries, repeated_messages
from optimd.client.receipts import StepReceipt, decode_receipt
from optimd.client.statetransfer import RemoteEntry, read_state, state_messages
from optimd.client.translation import exception_of
from optimd.client.valuetransfer import write_values
from optimd.v1 import training_pb2
from optimd.wire.codec import encode
from optimd.wire.kinds import PARAMETER
from optimd.wire.layout import Parameter
from optimd.wire.paging import paginate

T = TypeVar("T")

_READING_PAUSE_S: Final = 0.2

_STEPPED: Final = (training_pb2.STEP_OUTCOME_APPLIED, training_pb2.STEP_OUTCOME_MERGED)
"""What became of a push whose gradients are in a step."""


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
        return self._line.groups.sizes

    @property
    def holds_gradients(self) -> bool:
        """Whether the server holds gradients for the next step."""
        return self._line.holds_gradients

    @property
    def rewinds(self) -> int:
        """How often the job was set back to an earlier point, and this worker followed."""
        return self._line.rewinds

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
        request = self._line.request
        return not request.is_async and bool(request.aggregation.sync.world_size == 1)

    def acknowledge(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """The worker's param_groups are the job's: only what changes from here on is sent.

        They may be other numbers than the server's, where the worker holds one in a narrower dtype.
        """
        self._line.groups.acknowledge(self._line.groups.encoded(groups))

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
        announcement = training_pb2.TrainRequest(
            add_param_group=training_pb2.AddParamGroup(group=len(self._line.groups))
        )
        adopted = self._line.grow(lambda: announcement, [group], tensors, parameters)
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
        number = self._line.counting(lambda: self._line.layout_count)
        self._line.grow(
            lambda: training_pb2.TrainRequest(replace_layout=training_pb2.ReplaceLayout(layout_count=number())),
            groups,
            tensors,
            parameters,
            carried=carried,
            replaces=True,
        )
        self._line.forget_held()

    # --- a step

    @property
    def layout(self) -> JobLayout:
        """The job's parameters and buckets."""
        return self._line.layout

    def begin_ahead(self) -> AheadPush | None:
        """Begins to send gradients before their push. Does not wait, and may be called from any thread.

        Returns:
            What to give them to; None where they have to wait for their push: the server does not take them, or the
            line is down, which the push will see to.
        """
        try:
            stream = self._line.stream()
        except OptimdError:
            return None
        if not stream.takes_ahead or stream.has_ended or self.holds_gradients:
            return None
        return AheadPush(stream, self._line.layout, self.next_sequence, self._line.request.encodings.gradients)

    def step(
        self,
        push: Push,
        tensors: Sequence[torch.Tensor],
        *,
        rewinds: int,
        on_received: Callable[[int, torch.Tensor], object],
        ahead: AheadPush | None = None,
    ) -> StepReceipt:
        """Pushes gradients, changed hyperparameters, values and states; receives the updated parameters in place.

        Where the job is set back on the way, nothing is pushed: the receipt says "dropped_late", and the tensors have
        the job's values.

        Args:
            push: What the worker brings.
            tensors: The parameters, in order, written to.
            rewinds: What `rewinds` was when the gradients were computed.
            on_received: Called with each tensor, and its index, that has been received, while others still come.
            ahead: What the gradients have been sent with, if they have. Those that the server does not have then are
                pushed in full.

        Returns:
            What became of the push.

        Raises:
            OptimdError: the step failed.
        """
        finish_on_devices([*push.grads, *push.values.values()])
        # Before the line is looked at: the gradients are not of the parameters that may come with a new one.
        opened = _OpenStep(push, base_step=self.job_step, narrowed=self._line.narrowed.indices, ahead=ahead)
        sequence, resumed = self.next_sequence, False
        missed: training_pb2.StepReceipt | None = None
        if self._line.rewinds == rewinds:
            self._line.usable(written=push.values)
        else:
            # Steps that are made in this process have gone on from there.
            self.pull(tensors)
        while self._line.rewinds == rewinds:
            if self.job_step != opened.base_step and not self._line.request.is_async:
                # The job has gone on: the push is too late, and is only to be answered.
                opened.empty()
            try:
                receipt = self._attempt(opened, tensors, on_received)
                break
            except AccumulationLostError:
                if opened.ahead is None:
                    raise
                # The server had no room for them, say.
                opened.ahead = None
                continue
            except ConnectionLostError as error:
                missed = self._line.take_up_again(error, written=push.values)
            resumed = True
            opened.held = self._line.held_buckets
            if missed is not None and missed.sequence == sequence:
                # It had been answered, and only the answer was lost. Its values came with the line.
                self._line.answered()
                self._line.forget_held()
                if missed.outcome in _STEPPED:
                    stepped = {index for index, grad in enumerate(push.grads) if grad is not None}
                    self._line.narrowed.round(stepped, tensors, self._line.layout)
                receipt = missed
                break
        else:
            self._line.answered()
            resumed = True
            receipt = training_pb2.StepReceipt(
                sequence=sequence, step=self.job_step, outcome=training_pb2.STEP_OUTCOME_DROPPED_LATE
            )
        kept = resumed and receipt is not missed and self._line.rewinds == rewinds
        if kept and push.values and self._line.request.is_async:
            # They may have been in place on the server before the line broke, and others have gone on from them.
            self.pull(tensors, push.values)
        return decode_receipt(receipt, resumed=resumed, bytes_sent=opened.sent, bytes_received=opened.received)

    def _attempt(
        self, opened: _OpenStep, tensors: Sequence[torch.Tensor], on_received: Callable[[int, torch.Tensor], object]
    ) -> training_pb2.StepReceipt:
        """Pushes once, on the stream as it is.

        Raises:
            ConnectionLostError: the line broke.
            OptimdError: the push is refused, or has failed for good.
        """
        stream, push = self._line.stream(), opened.push
        ahead = opened.sent_ahead(stream, self.next_sequence)
        everything = range(len(self._line.layout.buckets))
        # Here, not where they are sent: what cannot be encoded must not cost the stream.
        group_pages = [page for page, _ in paginate(self._line.groups.tell(push.groups)) if page]
        encodings = self._line.request.encodings
        pushed_pages = pushed_entries(push, opened.narrowed, encodings.parameters)
        begin = training_pb2.StepBegin(
            sequence=self.next_sequence,
            base_step=opened.base_step,
            group_count=len(push.groups),
            load_count=self._line.load_count,
            layout_count=self._line.layout_count,
            param_group_pages=len(group_pages),
            pushed_pages=len(pushed_pages),
            micro=self._line.micro,
            grad_scale=push.grad_scale,
            skipped=push.skipped,
            without_gradients=not self.holds_gradients and all(grad is None for grad in push.grads),
            resumed=bool(opened.held),
            maps_values=self._line.server_values.are_mapped,
            ahead=ahead is not None,
        )
        with self._line.failing_for_good(), opened.counting(stream, ahead):
            stream.send(
                push_messages(
                    self._line.layout,
                    push,
                    begin,
                    group_pages,
                    pushed_pages,
                    opened.held if ahead is None else everything,
                    stream.ring,
                    encodings.gradients,
                ),
            )
            writer = FlatWriter(tensors, self.parameters, narrowed=self._line.narrowed.indices, on_written=on_received)
            writer.prepare(index for index, grad in enumerate(push.grads) if grad is not None)
            in_place = False
            while True:
                kind, message, frame = stream.expect("bucket", "receipt", "refused", "push_again")
                if kind == "push_again":
                    again = set(message.push_again.buckets)
                    stream.send(repeated_messages(self._line.layout, push, again, stream.ring, encodings.gradients))
                elif kind == "bucket":
                    opened.keep_values()
                    write_values(
                        writer,
                        self._line.layout,
                        message.bucket,
                        frame.payload,
                        stream.address,
                        self._line.server_values,
                    )
                    in_place = in_place or message.bucket.in_place
                else:
                    break
            writer.flush()
            if kind == "receipt":
                if in_place and not self._line.server_values.are_of(message.receipt.values_version):
                    # What was read may be of two steps. The server has what it was, and what became of the push.
                    raise ConnectionLostError("the job has gone on without this worker while it read its parameters")
                self._settle(message.receipt)
        self._raise_refusal(kind, message)
        return message.receipt

    def _settle(self, receipt: training_pb2.StepReceipt) -> None:
        """A push is answered."""
        self._line.job_step = receipt.step
        self._line.next_sequence = receipt.sequence + 1
        self._line.answered()
        self._line.groups.answered()
        self._line.forget_held()
        self.wants_buffers = receipt.wants_buffers

    def accumulate(self, group_count: int, grads: Sequence[torch.Tensor | None], *, rewinds: int) -> None:
        """Has the server add gradients to what it holds for this worker's next push. Returns when they are held.

        Args:
            group_count: How many param_groups the worker has.
            grads: As in `Push`.
            rewinds: As in `step`.

        Raises:
            OptimdError: they are not held.
        """
        finish_on_devices(grads)
        base_step = self.job_step

        def exchange() -> tuple[str, training_pb2.TrainResponse] | None:
            has_gone_on = self.job_step != base_step and not self._line.request.is_async
            if has_gone_on or self._line.rewinds != rewinds:
                return None
            begin = training_pb2.Accumulate(
                sequence=self.next_sequence,
                micro=self._line.micro,
                group_count=group_count,
                layout_count=self._line.layout_count,
            )
            stream = self._line.stream()
            encoding = self._line.request.encodings.gradients
            stream.send(accumulation_messages(self._line.layout, grads, begin, stream.ring, encoding))
            kind, message, _ = stream.expect("accumulated", "refused")
            return kind, message

        answer = self._line.exchanging(exchange)
        if answer is None:
            self._line.forget_held()
            what = "went on" if self._line.rewinds == rewinds else "was set back"
            raise AccumulationLostError(
                f"the job {what} to step {self.job_step} while the line was down: the gradients are of the parameters "
                f"of step {base_step}. This worker has the job's parameters now; compute the gradients again"
            )
        kind, message = answer
        self._raise_refusal(kind, message)
        self._line.micro = message.accumulated.micro
        self._line.holds_gradients = True

    def discard_accumulated(self) -> None:
        """Has the server forget what it holds for this worker's next push. Without that, does not reach the server.

        Raises:
            OptimdError: the line is down.
        """

        def exchange() -> training_pb2.TrainResponse | None:
            if not self.holds_gradients:
                # Any more: it went with the line.
                return None
            request = training_pb2.DiscardAccumulated(sequence=self.next_sequence, micro=self._line.micro)
            stream = self._line.stream()
            stream.send([encode(training_pb2.TrainRequest(discard_accumulated=request))])
            return stream.expect("accumulated")[1]

        message = self._line.exchanging(exchange) if self.holds_gradients else None
        if message is not None:
            self._line.micro = message.accumulated.micro
            self._line.holds_gradients = False

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
        self._line.narrowed.came_whole(wanted)

    def snapshot(self) -> int:
        """Has the server write a snapshot of the job. Returns the job step that it is of, once it is on disk.

        Raises:
            OptimdError: it could not be written, or the server cannot be reached.
        """
        return self._reading(lambda: self._line.connection.snapshot(self.job).step)

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
        encoded = self._line.groups.encoded(groups)
        # Here, not where it is sent: what cannot be read must not cost the stream.
        digest = hashlib.sha256()
        for part in state_messages(self._line.layout, encoded, entries):
            digest.update(part)
        number = self._line.counting(lambda: self._line.load_count)

        def exchange() -> tuple[str, training_pb2.TrainResponse, bool]:
            stream = self._line.stream()
            announcement = training_pb2.LoadState(digest=digest.digest(), load_count=number(), force=force)
            stream.send([encode(training_pb2.TrainRequest(load_state=announcement))])
            kind, message, _ = stream.expect("load_state_accepted", "refused")
            brings = kind != "refused" and message.load_state_accepted.send_state
            if brings:
                stream.send(state_messages(self._line.layout, encoded, entries))
            if kind != "refused":
                kind, message, _ = stream.expect("state_loaded", "refused")
            return kind, message, brings

        kind, message, brings = self._line.exchanging(exchange)
        self._raise_refusal(kind, message)
        self._line.load_count = message.state_loaded.load_count
        if brings:
            # Else it was there, and the server may have this worker's options from before: it was started again since.
            self._line.groups.acknowledge(encoded)

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
        self._line.forget_held()
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
                self._line.forget_held()
            raise error


class _OpenStep:
    """One step, over all streams that it takes.

    Args:
        push: What the worker brings.
        base_step: The job step that its gradients are of the parameters of.
        narrowed: The parameters whose values came narrowed.
        ahead: As in `Session.step`.
    """

    def __init__(
        self, push: Push, *, base_step: int, narrowed: Collection[int] = (), ahead: AheadPush | None = None
    ) -> None:
        self.push = push
        self.ahead = ahead
        """What its gradients have been sent with, on the stream that they were sent on."""
        self.base_step = base_step
        self.narrowed = frozenset(narrowed).intersection(push.values)
        """Those of the values of the push that came narrowed before they were changed."""
        self.held: frozenset[int] = frozenset()
        """The buckets of the push that the server has."""
        self.sent = 0
        """Bytes of its messages."""
        self.received = 0
        self._keeps_values = False

    def empty(self) -> None:
        """Nothing is to be pushed any more."""
        self.push = dataclasses.replace(self.push, grads=[None] * len(self.push.grads), values={}, states={})
        self.held = frozenset()
        self.ahead = None

    def sent_ahead(self, stream: TrainStream, sequence: int) -> AheadPush | None:
        """What the gradients have been sent with, if that was on this stream, and for the push that is due."""
        ahead = self.ahead
        if ahead is None or ahead.stream is not stream or ahead.sequence != sequence or not ahead.is_complete:
            self.ahead = None
        return self.ahead

    def keep_values(self) -> None:
        """Parameters are about to be received into the tensors whose values the push has brought.

        Where the line breaks before it is answered, it may have to bring them again.
        """
        if not self._keeps_values:
            self._keeps_values = True
            values = {index: tensor.detach().clone() for index, tensor in self.push.values.items()}
            finish_on_devices([*values.values()])
            self.push = dataclasses.replace(self.push, values=values)

    @contextmanager
    def counting(self, stream: TrainStream, ahead: AheadPush | None = None) -> Iterator[None]:
        """Counts what goes over a stream in the block, and what was sent `ahead` of it."""
        sent, received = stream.bytes_sent, stream.bytes_received
        try:
            yield
        finally:
            if ahead is not None and ahead.sent_before is not None:
                sent = ahead.sent_before
            self.sent += stream.bytes_sent - sent
            self.received += stream.bytes_received - received
