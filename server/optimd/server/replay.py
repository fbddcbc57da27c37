"""A job's journal, done again: what its records say happens to a job that nobody uses yet.

Records are redone in their order, whether their round was committed or not, on top of a snapshot or of nothing. Of a
snapshot that was taken while training went on, each bucket is as of a position of its own, and everything else as of
the snapshot's: a record changes only what does not have it yet. The buckets of an atomic round that nothing ended are
left out, and those of a streamed one stay: it is open still.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from optimd.server import update
from optimd.server.aggregation import SyncAggregator, Worker
from optimd.server.company import JobPhase
from optimd.server.journal import OpenRound
from optimd.server.kept import restore_member
from optimd.server.member import Member
from optimd.server.parts import JobParts
from optimd.server.pushing import Pushing
from optimd.server.receipts import Outcome, Receipt, decode_receipt
from optimd.server.records import Record
from optimd.server.stepping import Round
from optimd.server.store import StagedState, Store
from optimd.server.watching import CommittedStep, Contribution
from optimd.v1 import journal_pb2, state_dict_pb2
from optimd.wire.buffers import BufferValues, decode_buffer
from optimd.wire.encodings import Encoding, known_encoding
from optimd.wire.kinds import PARAMETER, decode_kind
from optimd.wire.layout import Bucket, decode_bucket, decode_parameter, unpack_present
from optimd.wire.param_groups import decode_group
from optimd.wire.tensors import tensor_over

_Held = dict[int, tuple[Sequence[bool], torch.Tensor]]


class ReplayError(Exception):
    """A record cannot be redone: it does not fit those before it."""


@dataclass(slots=True)
class Survey:
    """What is known of a journal once all of it has been read, before any of it is redone."""

    answered: set[int] = field(default_factory=set)
    """The rounds that were committed or skipped."""
    ended: set[int] = field(default_factory=set)
    """Those that ended without an answer."""
    taken_back: set[int] = field(default_factory=set)
    unapplied: set[int] = field(default_factory=set)
    """Where records stand of buckets that could not be applied."""
    environments: list[journal_pb2.Environment] = field(default_factory=list)
    job: journal_pb2.KeptJob | None = None
    records: int = 0
    nbytes: int = 0
    end: int = 0
    """Where the last record ends."""
    is_closed: bool = False
    """Whether the last record says that the server stopped in good order."""

    def see(self, record: Record, message: journal_pb2.JournalRecord) -> None:
        """The next record."""
        self.records += 1
        self.nbytes += record.end - record.position
        self.end = record.end
        kind = message.WhichOneof("record")
        self.is_closed = kind == "journal_closed"
        match kind:
            case "segment_started":
                self.job = message.segment_started.job
                if message.segment_started.environment not in self.environments:
                    self.environments.append(message.segment_started.environment)
            case "round_committed":
                self.answered.add(message.round_committed.round)
            case "round_skipped":
                self.answered.add(message.round_skipped.round)
            case "round_ended":
                self.ended.add(message.round_ended.round)
                if message.round_ended.HasField("unapplied"):
                    self.unapplied.add(message.round_ended.unapplied)
            case "round_taken_back":
                self.taken_back.add(message.round_taken_back.round)

    def counts(self, settled: journal_pb2.RoundSettled) -> bool:
        """Whether what was applied in a round is to be applied again."""
        if settled.atomic:
            return settled.round in self.answered or settled.round in self.ended
        return settled.round not in self.taken_back


@dataclass(slots=True)
class _Bringing:
    """Content of which some records are still to come."""

    left: int
    put: Callable[[journal_pb2.JournalRecord, memoryview], None]
    finish: Callable[[], None]
    give_up: Callable[[], None] = lambda: None


@dataclass(slots=True)
class _Round:
    """A round that is being redone."""

    record: OpenRound
    groups: list[dict[str, Any]]
    counts: bool
    deferred: _Held = field(default_factory=dict)
    """Complete buckets whose kernel needs whole parameters."""


class Replay:
    """Redoes records on a job's parts, whose lock the caller holds, or which nobody else has.

    Args:
        parts: The job's, as a snapshot left it, or new.
        pushing: Its pushes.
        survey: What is known of all of the journal.
        kept_at: For each bucket the position that it is as of.
        position: The position that all else is as of.
    """

    def __init__(
        self,
        parts: JobParts,
        pushing: Pushing,
        survey: Survey,
        *,
        kept_at: Sequence[int] = (),
        position: int = 0,
    ) -> None:
        self._parts = parts
        self._pushing = pushing
        self._survey = survey
        self._kept_at = list(kept_at)
        self._position = position
        self._rounds: dict[int, _Round] = {}
        for open_round in parts.journal.rounds.values():
            self._begin_round(open_round)
        self._workers: dict[int, Worker] = {number: worker for worker, number in parts.journal.numbers.items()}
        self._bringing: _Bringing | None = None
        self._is_old = False

    def redo(self, record: Record, message: journal_pb2.JournalRecord) -> None:
        """Redoes the next record.

        Raises:
            ReplayError: it does not fit those before it.
        """
        kind = message.WhichOneof("record") or ""
        self._is_old = record.position < self._position
        try:
            if kind in ("put_tensors", "put_buffers"):
                self._put(message, record.payload)
                return
            if kind == "segment_started":
                # It may stand anywhere, before tensors of what is being brought too.
                return
            self._give_up()
            handler = getattr(self, f"_{kind}", None)
            if handler is None:
                raise ReplayError(f"a record of kind {kind!r}")
            handler(getattr(message, kind), record)
        except (IndexError, KeyError, RuntimeError, ValueError) as error:
            raise ReplayError(f"position {record.position}, {kind}: {error}") from error

    def finish(self) -> list[int]:
        """All records have been redone: leaves the job as one whose lines have all just broken.

        Returns:
            The atomic rounds that nothing ended, which have to be said to be taken back.
        """
        self._give_up()
        aggregator, store = self._parts.aggregator, self._parts.content.store
        journal = self._parts.journal
        gone = [number for number, round_ in self._rounds.items() if not round_.counts]
        for number in gone:
            del self._rounds[number]
        journal.rounds = {number: round_.record for number, round_ in self._rounds.items()}
        for number, round_ in self._rounds.items():
            if not round_.record.applied:
                # What its worker had changed outside of steps may be missing: the push begins anew, and brings it.
                continue
            settled = round_.record.settled
            owner = self._workers[settled.owner] if settled.owner else None
            by_bucket: dict[int, set[Worker]] = {}
            told = []
            for applied in round_.record.applied:
                contributors = {self._workers[part.number] for part in applied.contributors}
                by_bucket.setdefault(applied.bucket_id, set()).update(contributors)
                if applied.bucket_id not in round_.deferred:
                    bucket = store.buckets[applied.bucket_id]
                    told.append((applied.bucket_id, unpack_present(applied.present, len(bucket.slices))))
            live = Round(number=number, groups=round_.groups, settled=True, spoken=settled.spoken, applied=told)
            self._pushing.restore_locked(live, owner, round_.deferred)
            if isinstance(aggregator, SyncAggregator):
                aggregator.restore_step(by_bucket)
            elif owner is not None:
                aggregator.restore_push(owner, by_bucket.keys())
        if not isinstance(aggregator, SyncAggregator):
            aggregator.await_slower()
        if not self._rounds:
            # Between two steps the slices of a parameter stand at one.
            store.settle_partial_steps()
        return gone

    # --- what the job is

    def _journal_closed(self, _message: journal_pb2.JournalClosed, _record: Record) -> None:
        pass

    def _layout_brought(self, message: journal_pb2.LayoutBrought, record: Record) -> None:
        if self._is_old:
            self._pass_over(message.tensor_count)
            return
        content = self._parts.content
        groups = [decode_group(group) for group in message.groups]
        sizes = [group.parameter_count for group in message.groups]
        parameters = [decode_parameter(spec) for spec in message.parameters]
        buckets = [decode_bucket(spec) for spec in message.buckets]
        carried = [(pair.parameter, pair.carried_from) for pair in message.carried]
        store: Store
        if message.replaces:
            store = content.replace(groups, sizes, parameters, carried, buckets)
        else:
            store = content.store
            content.grow(groups, sizes, parameters, buckets)

        def put(each: journal_pb2.JournalRecord, payload: memoryview) -> None:
            bucket = store.buckets[each.put_tensors.bucket_id]
            store.write_values(bucket, tensor_over(payload, bucket.dtype_of(PARAMETER)))

        def finish() -> None:
            if content.settle():
                self._kept_at = []
                self._parts.journal.held_from.clear()
                for member in self._parts.company.members.values():
                    member.held.forget()
            self._kept_at += [record.position] * len(buckets)
            self._give_groups()
            self._parts.company.phase = JobPhase.READY

        self._begin(_Bringing(message.tensor_count, put, finish, content.take_back))

    def _state_brought(self, message: journal_pb2.StateBrought, _record: Record) -> None:
        if self._is_old:
            self._pass_over(message.tensor_count)
            return
        content = self._parts.content
        staged = content.store.stage(_entries(message.entries))

        def finish() -> None:
            content.load(staged, [decode_group(group) for group in message.groups], message.digest)
            self._give_groups()

        self._begin(_Bringing(message.tensor_count, self._staging(staged), finish))

    def _content_brought(self, message: journal_pb2.ContentBrought, _record: Record) -> None:
        if self._is_old or not self._rounds[message.round].counts:
            self._pass_over(message.tensor_count)
            return
        store = self._parts.content.store
        staged = store.stage(
            _entries(entry.state for entry in message.entries if entry.HasField("state")),
            values=[entry.parameter for entry in message.entries if entry.has_value],
            received_as={entry.parameter: _encoding(entry.received_as) for entry in message.entries},
        )
        self._begin(_Bringing(message.tensor_count, self._staging(staged), lambda: store.install(staged)))

    def _buffers_brought(self, message: journal_pb2.BuffersBrought, _record: Record) -> None:
        if self._is_old:
            self._pass_over(message.chunk_count)
            return
        values = BufferValues([decode_buffer(spec) for spec in message.buffers])

        def put(each: journal_pb2.JournalRecord, payload: memoryview) -> None:
            values.write(each.put_buffers.offset, payload)

        self._begin(_Bringing(message.chunk_count, put, lambda: self._parts.buffers.restore(values)))

    def _buffers_attached(self, message: journal_pb2.BuffersAttached, _record: Record) -> None:
        member = self._member(message.number)
        if member is not None:
            self._parts.buffers.restore_attached(member.worker)

    # --- who is in it

    def _worker_joined(self, message: journal_pb2.WorkerJoined, _record: Record) -> None:
        worker = Worker(message.worker.rank, message.worker.worker_id)
        self._workers[message.number] = worker
        if not self._is_old:
            self._parts.journal.numbers[worker] = self._parts.journal.last_number = message.number
            self._parts.aggregator.join(worker)
            restore_member(self._parts, worker, message.worker.incarnation, speaks=message.speaks)

    def _worker_left(self, message: journal_pb2.WorkerLeft, _record: Record) -> None:
        if not self._is_old:
            worker = self._workers[message.number]
            (self._parts.aggregator.lose if message.lost else self._parts.aggregator.leave)(worker)
            self._parts.company.membership.leave(worker)
            member = self._parts.company.members.pop(worker, None)
            if member is not None:
                self._parts.buffers.leave_locked(member)
            self._parts.journal.held_from.pop(message.number, None)

    # --- rounds

    def _round_settled(self, message: journal_pb2.RoundSettled, record: Record) -> None:
        self._parts.journal.last_round = max(self._parts.journal.last_round, message.round)
        owner = self._member(message.owner) if message.spoken else None
        if owner is not None:
            owner.speaks = True
        self._begin_round(OpenRound(message, record.position))

    def _bucket_applied(self, message: journal_pb2.BucketApplied, record: Record) -> None:
        round_ = self._rounds.get(message.round)
        if round_ is None:
            if self._is_old:
                # Of a round that had ended when the snapshot was begun.
                return
            raise ReplayError(f"position {record.position}: a bucket of round {message.round}, which has not begun")
        if not round_.counts or record.position in self._survey.unapplied:
            return
        if not self._is_old:
            round_.record.applied.append(message)
        if message.bucket_id >= len(self._kept_at):
            return
        store = self._parts.content.store
        bucket = store.buckets[message.bucket_id]
        present = unpack_present(message.present, len(bucket.slices))
        dtype = bucket.server_dtype if message.in_server_dtype else bucket.dtype
        gradient = tensor_over(record.payload, dtype)
        options = round_.groups[bucket.group]
        if not update.is_split_invariant(options, bucket.server_dtype):
            round_.deferred[message.bucket_id] = (present, gradient)
        elif record.position >= self._kept_at[message.bucket_id]:
            lengths = [piece.length for piece, here in zip(bucket.slices, present, strict=True) if here]
            grad_scale = message.grad_scale if message.HasField("grad_scale") else None
            store.apply(bucket, present, torch.split(gradient, lengths), options, grad_scale=grad_scale)

    def _round_committed(self, message: journal_pb2.RoundCommitted, record: Record) -> None:
        round_ = self._rounds.pop(message.round, None)
        if round_ is not None:
            self._apply_deferred(round_, record.position)
        workers = [(self._workers.get(part.number), part) for part in (*message.contributors, *message.skipped)]
        self._forget_held(worker for worker, _ in workers)
        if self._is_old:
            return
        if round_ is None:
            raise ReplayError(f"a commit of round {message.round}, which has not begun")
        if message.step != self._parts.aggregator.step + 1:
            raise ReplayError(
                f"position {record.position}: step {message.step} does not follow step {self._parts.aggregator.step}"
            )
        self._take_groups(round_)
        contributors = [self._workers[part.number] for part in message.contributors]
        ranks = tuple(worker.rank for worker in contributors)
        partial = tuple(self._workers[number].rank for number in message.partial_contributors)
        company = self._parts.company
        told = {
            "contributors": ranks,
            "partial_contributors": partial,
            "hyperparameters_disagreed": message.hyperparameters_disagreed,
            "grad_norm": message.grad_norm if message.HasField("grad_norm") else None,
            "pushed_differently": tuple(message.pushed_differently),
        }
        outcome = Outcome.of_step(len(ranks))
        parts = []
        for worker, part in zip(contributors, message.contributors, strict=True):
            parts.append(Contribution(worker.rank, worker.worker_id, part.sequence))
            company.record(worker.worker_id).pushes += 1
            member = company.members.get(worker)
            if member is not None:
                member.own_steps += 1
                member.speaks = part.speaks
            self._answer(worker, part, message.step, outcome, told)
        for part in message.skipped:
            self._answer(self._workers[part.number], part, message.step, Outcome.SKIPPED_NONFINITE, told)
        self._parts.history.add(
            CommittedStep(
                step=message.step,
                contributors=tuple(parts),
                partial_contributors=partial,
                hyperparameters_disagreed=message.hyperparameters_disagreed,
                grad_norm=told["grad_norm"],  # type: ignore[arg-type]  # one of several things that are told
                pushed_differently=tuple(message.pushed_differently),
            )
        )
        self._count(round_, message.step)

    def _round_skipped(self, message: journal_pb2.RoundSkipped, _record: Record) -> None:
        round_ = self._rounds.pop(message.round, None)
        self._forget_held(self._workers.get(part.number) for part in message.pushes)
        if self._is_old:
            return
        if round_ is None:
            raise ReplayError(f"a skip of round {message.round}, which has not begun")
        self._take_groups(round_)
        told = {
            "hyperparameters_disagreed": message.hyperparameters_disagreed,
            "pushed_differently": tuple(message.pushed_differently),
        }
        for part in message.pushes:
            self._answer(self._workers[part.number], part, message.step, Outcome.SKIPPED_NONFINITE, told)
        self._count(round_, message.step)

    def _round_ended(self, message: journal_pb2.RoundEnded, _record: Record) -> None:
        self._rounds.pop(message.round, None)

    def _round_taken_back(self, message: journal_pb2.RoundTakenBack, _record: Record) -> None:
        self._rounds.pop(message.round, None)

    def _steps_levelled(self, _message: journal_pb2.StepsLevelled, _record: Record) -> None:
        if not self._is_old:
            self._parts.content.store.settle_partial_steps()

    def _push_answered(self, message: journal_pb2.PushAnswered, _record: Record) -> None:
        worker = self._workers.get(message.number)
        self._forget_held([worker])
        if not self._is_old and worker is not None:
            self._parts.company.record(worker.worker_id).dropped += 1
            self._parts.company.answer(worker, decode_receipt(message.receipt), replayed=True)

    # --- what is held

    def _gradients_held(self, message: journal_pb2.GradientsHeld, record: Record) -> None:
        member = self._member(message.number)
        if member is not None and message.bucket_id < len(self._kept_at):
            bucket = self._parts.content.store.buckets[message.bucket_id]
            present = unpack_present(message.present, len(bucket.slices))
            # Sums that were written again are in the dtype that they are held in, which is wider where it is another.
            elements = sum(piece.length for piece, here in zip(bucket.slices, present, strict=True) if here)
            arrived = elements * bucket.dtype.itemsize == record.payload.nbytes
            gradient = tensor_over(record.payload, bucket.dtype if arrived else bucket.server_dtype)
            self._parts.journal.held_from.setdefault(message.number, record.position)
            member.held.add(bucket, present, gradient, self._parts.content.store.device)

    def _accumulation_ended(self, message: journal_pb2.AccumulationEnded, record: Record) -> None:
        member = self._member(message.number)
        if member is None:
            return
        self._parts.journal.held_from.setdefault(message.number, record.position)
        if not message.discards:
            member.held.end_accumulation()
        elif message.micro:
            member.held.discard()
        else:
            member.held.forget()
        member.held.micro = message.micro

    # --- all of the above

    def _begin_round(self, open_round: OpenRound) -> None:
        settled = open_round.settled
        if settled.round not in self._rounds:
            groups = [decode_group(group) for group in settled.groups]
            self._rounds[settled.round] = _Round(open_round, groups, self._survey.counts(settled))

    def _take_groups(self, round_: _Round) -> None:
        if round_.record.settled.spoken:
            self._parts.content.groups = round_.groups
            self._give_groups()

    def _give_groups(self) -> None:
        """Every worker has the job's options, as far as anybody knows: it says what it has when it comes back."""
        for member in self._parts.company.members.values():
            member.give(self._parts.content.groups)

    def _count(self, round_: _Round, step: int) -> None:
        aggregator = self._parts.aggregator
        if isinstance(aggregator, SyncAggregator):
            aggregator.forget_step(step)
        else:
            aggregator.count_push(self._workers[round_.record.settled.owner], step)

    def _answer(
        self, worker: Worker, part: journal_pb2.Contribution, step: int, outcome: Outcome, told: dict[str, Any]
    ) -> None:
        receipt = Receipt(sequence=part.sequence, step=step, outcome=outcome, staleness=part.staleness, **told)
        self._parts.company.answer(worker, receipt, replayed=True)

    def _member(self, number: int) -> Member | None:
        worker = self._workers.get(number)
        if worker is None or self._parts.journal.numbers.get(worker) != number:
            return None
        return self._parts.company.members.get(worker)

    def _forget_held(self, workers: Iterable[Worker | None]) -> None:
        for worker in workers:
            if worker is not None:
                self._parts.journal.held_from.pop(self._parts.journal.numbers.get(worker, 0), None)
            member = self._parts.company.members.get(worker) if worker is not None else None
            if member is not None:
                member.held.forget()

    def _apply_deferred(self, round_: _Round, position: int) -> None:
        """As `Stepper` does at a commit: whole parameters, with the gradients of all of their slices."""
        store = self._parts.content.store
        gradients: dict[tuple[int, int], torch.Tensor] = {}
        indices = set()
        for bucket_id, (present, gradient) in round_.deferred.items():
            bucket = store.buckets[bucket_id]
            pieces = [(place, piece) for place, piece in enumerate(bucket.slices) if present[place]]
            parts = torch.split(gradient.to(bucket.server_dtype), [piece.length for _, piece in pieces])
            for (place, piece), part in zip(pieces, parts, strict=True):
                gradients[bucket_id, place] = part
                indices.add(piece.parameter)
        for index in sorted(indices):
            places = store.places(index)
            if position < self._kept_at[places[0][0]]:
                continue
            bucket = store.buckets[places[0][0]]
            grads = [
                gradients[place] if place in gradients else self._zeros(store.buckets[place[0]], place[1])
                for place in places
            ]
            store.apply_whole(index, grads, round_.groups[bucket.group])

    @staticmethod
    def _zeros(bucket: Bucket, place: int) -> torch.Tensor:
        return torch.zeros(bucket.slices[place].length, dtype=bucket.server_dtype)

    # --- content whose tensors follow

    def _begin(self, bringing: _Bringing) -> None:
        self._bringing = bringing
        self._finish_if_complete()

    def _pass_over(self, count: int) -> None:
        self._begin(_Bringing(count, lambda _message, _payload: None, lambda: None))

    def _put(self, message: journal_pb2.JournalRecord, payload: memoryview) -> None:
        bringing = self._bringing
        if bringing is None:
            if self._is_old:
                # What it belongs to lies before all that is read.
                return
            raise ReplayError("tensors that belong to nothing")
        bringing.put(message, payload)
        bringing.left -= 1
        self._finish_if_complete()

    def _finish_if_complete(self) -> None:
        bringing = self._bringing
        if bringing is not None and not bringing.left:
            self._bringing = None
            bringing.finish()

    def _give_up(self) -> None:
        """Something else follows where tensors were due, or nothing: who brought them was interrupted."""
        bringing, self._bringing = self._bringing, None
        if bringing is not None:
            bringing.give_up()

    def _staging(self, staged: StagedState) -> Callable[[journal_pb2.JournalRecord, memoryview], None]:
        def put(each: journal_pb2.JournalRecord, payload: memoryview) -> None:
            bucket = self._parts.content.store.buckets[each.put_tensors.bucket_id]
            kind = decode_kind(each.put_tensors.kind)
            present = unpack_present(each.put_tensors.present, len(bucket.slices))
            staged.write(kind, bucket, present, tensor_over(payload, bucket.dtype_of(kind)))

        return put


def _encoding(number: int) -> Encoding:
    encoding = known_encoding(number)
    if encoding is None:
        raise ReplayError(f"values that came in encoding {number}, which this version does not know")
    return encoding


def _entries(entries: Iterable[state_dict_pb2.ParameterState]) -> list[tuple[int, float, list[str]]]:
    return [(entry.parameter, entry.step, [decode_kind(number) for number in entry.tensors]) for entry in entries]
