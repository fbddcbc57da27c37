"""A job's journal: what the job does, written down before it is done.

The methods say what happens in the words of the job, and are called with its lock held. How records get to the disk,
and what happens where they do not, is `recordwriter.py`'s.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import torch

from optimd.server import update
from optimd.server.aggregation import Commit, Skip, Worker
from optimd.server.content import Brought
from optimd.server.files import Part
from optimd.server.log import Log
from optimd.server.member import Member
from optimd.server.receipts import Receipt, encode_receipt
from optimd.server.recordwriter import RecordWriter
from optimd.server.store import StagedState, Store
from optimd.v1 import job_pb2, journal_pb2, state_dict_pb2
from optimd.wire.buffers import BufferValues, encode_buffer
from optimd.wire.encodings import EXACT
from optimd.wire.kinds import PARAMETER, encode_kind
from optimd.wire.layout import Bucket, encode_bucket, encode_parameter, pack_present
from optimd.wire.param_groups import encode_group
from optimd.wire.tensors import bytes_of

_BUFFER_CHUNK_BYTES: Final = 1 << 20


@dataclass(slots=True)
class OpenRound:
    """What the journal has of a round that is not over: a snapshot has to have it too."""

    settled: journal_pb2.RoundSettled
    position: int
    """Where its first record stands."""
    applied: list[journal_pb2.BucketApplied] = field(default_factory=list)


class JobJournal(RecordWriter):
    """What a job says to its records, in its own words. Without a log all of it costs nothing.

    Args:
        job: As in `RecordWriter`.
        log: Likewise.
        syncs: Likewise.
        stopping: Likewise.
    """

    def __init__(
        self,
        job: str,
        log: Log | None = None,
        *,
        syncs: bool = False,
        stopping: threading.Event | None = None,
    ) -> None:
        super().__init__(job, log, syncs=syncs, stopping=stopping)
        self._load_last_commit: Callable[[int], Store | None] = lambda _: None
        self._contribution: Callable[[Worker], tuple[int, int, bool]] = lambda _: (0, 0, False)
        # All below: guarded by the job's lock.
        self.numbers: dict[Worker, int] = {}
        """The number of each worker's last process."""
        self.last_number = 0
        self.last_round = 0
        self.rounds: dict[int, OpenRound] = {}
        """Those that are not over, by number."""
        self.held_from: dict[int, int] = {}
        """Where the first record stands of what is held for a worker's next push, by the worker's number."""
        self.content_changes = 0
        """How often the content has changed otherwise than bucket by bucket."""
        self.takings_back = 0
        """How often a round has been taken back."""

    def describe_contributions(self, tell: Callable[[Worker], tuple[int, int, bool]]) -> None:
        """Has `tell` give sequence number and staleness of a worker's open push, and whether its options count."""
        self._contribution = tell

    def restore_with(self, load_last_commit: Callable[[int], Store | None]) -> None:
        """Has `load_last_commit` do what the method of that name says."""
        self._load_last_commit = load_last_commit

    def load_last_commit(self, round_number: int) -> Store | None:
        """Values and state as they were before an open round was settled, from disk; None where they are not there."""
        return self._load_last_commit(round_number)

    # --- what the job is

    def layout_brought(self, brought: Brought) -> None:
        """The job is about to have parameters, whose values are in `brought.store`."""
        if brought.replaces:
            # What is held is of the others, and goes with them.
            self.held_from.clear()
        if not self.is_kept:
            return
        groups = enumerate(zip(brought.groups, brought.sizes, strict=True), brought.first_group)
        self._append(
            journal_pb2.JournalRecord(
                layout_brought=journal_pb2.LayoutBrought(
                    replaces=brought.replaces,
                    groups=[encode_group(i, update.RULE, group, parameter_count=size) for i, (group, size) in groups],
                    parameters=[encode_parameter(parameter) for parameter in brought.parameters],
                    buckets=[encode_bucket(bucket) for bucket in brought.buckets],
                    carried=[job_pb2.CarriedState(parameter=new, carried_from=old) for new, old in brought.carried],
                    tensor_count=len(brought.buckets),
                )
            )
        )
        for bucket in brought.buckets:
            present = [True] * len(bucket.slices)
            self._put(PARAMETER, bucket, present, brought.store.read(PARAMETER, bucket, present))
        self.content_changes += 1

    def state_brought(
        self, staged: StagedState, groups: Sequence[Mapping[str, Any]], digest: bytes, store: Store
    ) -> None:
        """The job is about to have another state, and other options."""
        if not self.is_kept:
            return
        tensors = list(staged.buckets_of(store))
        self._append(
            journal_pb2.JournalRecord(
                state_brought=journal_pb2.StateBrought(
                    groups=[encode_group(index, update.RULE, group) for index, group in enumerate(groups)],
                    entries=[_entry(index, staged) for index in sorted(staged.steps)],
                    digest=digest,
                    tensor_count=len(tensors),
                )
            )
        )
        for kind, bucket, present in tensors:
            self._put(kind, bucket, present, staged.read(kind, bucket, present))
        self.content_changes += 1

    def content_brought(self, round_number: int, staged: StagedState, store: Store) -> None:
        """What workers changed outside of steps is about to be put in place, in a round that has been settled."""
        if not self.is_kept:
            return
        tensors = list(staged.buckets_of(store))
        self._append(
            journal_pb2.JournalRecord(
                content_brought=journal_pb2.ContentBrought(
                    round=round_number,
                    entries=[
                        state_dict_pb2.PushedEntry(
                            parameter=index,
                            has_value=index in staged.values,
                            state=_entry(index, staged) if index in staged.steps else None,
                            received_as=staged.received_as.get(index, EXACT).number,
                        )
                        for index in sorted(staged.values.keys() | staged.steps.keys())
                    ],
                    tensor_count=len(tensors),
                )
            )
        )
        for kind, bucket, present in tensors:
            self._put(kind, bucket, present, staged.read(kind, bucket, present))
        self.content_changes += 1

    def buffers_brought(self, values: BufferValues) -> None:
        """The job is about to have these buffers."""
        if not self.is_kept:
            return
        chunks = list(values.chunks(_BUFFER_CHUNK_BYTES))
        self._append(
            journal_pb2.JournalRecord(
                buffers_brought=journal_pb2.BuffersBrought(
                    buffers=[encode_buffer(buffer) for buffer in values.buffers], chunk_count=len(chunks)
                )
            )
        )
        for offset, parts in chunks:
            self._append(journal_pb2.JournalRecord(put_buffers=journal_pb2.PutBuffers(offset=offset)), parts)

    def buffers_attached(self, worker: Worker) -> None:
        """A worker has the job's buffers."""
        if self.is_kept:
            attached = journal_pb2.BuffersAttached(number=self.numbers[worker])
            self._append(journal_pb2.JournalRecord(buffers_attached=attached))

    # --- who is in it

    def worker_joined(self, worker: Worker, incarnation: int, *, speaks: bool) -> None:
        """A process is in the job from now on."""
        self.last_number += 1
        self.numbers[worker] = self.last_number
        if self.is_kept:
            identity = job_pb2.WorkerIdentity(worker_id=worker.worker_id, rank=worker.rank, incarnation=incarnation)
            joined = journal_pb2.WorkerJoined(number=self.last_number, worker=identity, speaks=speaks)
            self._append(journal_pb2.JournalRecord(worker_joined=joined))

    def worker_left(self, worker: Worker, *, place_kept: bool) -> None:
        """A process is not in the job any more."""
        number = self.numbers[worker]
        self.held_from.pop(number, None)
        if self.is_kept:
            left = journal_pb2.WorkerLeft(number=number, lost=place_kept)
            self._append(journal_pb2.JournalRecord(worker_left=left))

    # --- rounds

    def round_settled(
        self,
        groups: Sequence[Mapping[str, Any]],
        *,
        atomic: bool,
        spoken: bool,
        owner: Worker | None,
    ) -> int:
        """A round is about to be applied.

        Args:
            groups: Its options.
            atomic: Whether it counts only if it is committed.
            spoken: Whether the options hold for the job from its end on.
            owner: Of an asynchronous job: whose push it is.

        Returns:
            Its number.
        """
        self.last_round += 1
        if self.is_kept:
            settled = journal_pb2.RoundSettled(
                round=self.last_round,
                atomic=atomic,
                owner=0 if owner is None else self.numbers[owner],
                groups=[encode_group(index, update.RULE, group) for index, group in enumerate(groups)],
                spoken=spoken,
            )
            position = self.position
            self._append(journal_pb2.JournalRecord(round_settled=settled))
            self.rounds[self.last_round] = OpenRound(settled, position)
        return self.last_round

    def bucket_applied(
        self,
        round_number: int,
        bucket: Bucket,
        present: Sequence[bool],
        contributors: Sequence[Worker],
        gradient: Callable[[], torch.Tensor],
        *,
        grad_scale: float | None = None,
        reduced: bool = False,
    ) -> int:
        """A bucket of a round is about to be applied.

        Args:
            round_number: The round.
            bucket: The bucket.
            present: For each of its slices whether there is a gradient.
            contributors: Whose gradients are in it.
            gradient: Gives the gradient of the present slices, flat, on the CPU. Not kept, and not written to.
            grad_scale: What it was multiplied by, where it still is.
            reduced: Whether it is in the dtype that the server keeps, rather than in the one that travels.

        Returns:
            Where the record stands.
        """
        position = self.position
        if self.is_kept:
            applied = journal_pb2.BucketApplied(
                round=round_number,
                bucket_id=bucket.bucket_id,
                present=pack_present(present),
                contributors=self._contributions(contributors),
                grad_scale=grad_scale,
                in_server_dtype=reduced,
            )
            position = self._append(journal_pb2.JournalRecord(bucket_applied=applied), [bytes_of(gradient())])
            self.rounds[round_number].applied.append(applied)
        return position

    def round_committed(
        self,
        round_number: int,
        commit: Commit,
        *,
        disagreed: bool,
        grad_norm: float | None,
        pushed_differently: Sequence[int],
    ) -> None:
        """A round has become a step, whose receipts may be given once this is durable."""
        self._close_round(round_number, (*commit.contributors, *commit.skipped))
        if self.is_kept:
            committed = journal_pb2.RoundCommitted(
                round=round_number,
                step=commit.step,
                contributors=self._contributions(commit.contributors),
                partial_contributors=[self.numbers[worker] for worker in commit.partial_contributors],
                skipped=self._contributions(commit.skipped),
                hyperparameters_disagreed=disagreed,
                grad_norm=grad_norm,
                pushed_differently=pushed_differently,
            )
            self._append(journal_pb2.JournalRecord(round_committed=committed))

    def round_skipped(
        self, round_number: int, skip: Skip, *, disagreed: bool, pushed_differently: Sequence[int]
    ) -> None:
        """A round has become no step, and its pushes are about to be answered."""
        self._close_round(round_number, skip.pushes)
        if self.is_kept:
            skipped = journal_pb2.RoundSkipped(
                round=round_number,
                step=skip.step,
                pushes=self._contributions(skip.pushes),
                hyperparameters_disagreed=disagreed,
                pushed_differently=pushed_differently,
            )
            self._append(journal_pb2.JournalRecord(round_skipped=skipped))

    def round_ended(self, round_number: int, *, unapplied: int | None = None) -> None:
        """A round is over without an answer.

        Args:
            round_number: The round.
            unapplied: Where the record of its last bucket stands, if that could not be applied.
        """
        if self.rounds.pop(round_number, None) is not None:
            ended = journal_pb2.RoundEnded(round=round_number, unapplied=unapplied)
            self._append(journal_pb2.JournalRecord(round_ended=ended))

    def round_taken_back(self, round_number: int) -> None:
        """Nothing of a round counts: none of it is in the job."""
        self.rounds.pop(round_number, None)
        if self.is_kept:
            taken_back = journal_pb2.RoundTakenBack(round=round_number)
            self._append(journal_pb2.JournalRecord(round_taken_back=taken_back))
            self.content_changes += 1
            self.takings_back += 1

    def buckets_belong_together(self) -> None:
        """Buckets are updated by their parameters: copies that were made of some of them do not fit the others."""
        self.content_changes += 1

    def steps_levelled(self) -> None:
        """Parameters whose slices stood at several steps have been brought to one."""
        if self.is_kept:
            self._append(journal_pb2.JournalRecord(steps_levelled=journal_pb2.StepsLevelled()))
            self.content_changes += 1

    def push_answered(self, worker: Worker, receipt: Receipt) -> None:
        """A push that is in no round is about to be answered."""
        number = self.numbers[worker]
        self.held_from.pop(number, None)
        if self.is_kept:
            answered = journal_pb2.PushAnswered(number=number, receipt=encode_receipt(receipt))
            self._append(journal_pb2.JournalRecord(push_answered=answered))

    # --- what is held

    def gradients_held(
        self,
        worker: Worker,
        *,
        sequence: int,
        micro: int,
        bucket: Bucket,
        present: Sequence[bool],
        payload: torch.Tensor,
    ) -> None:
        """Gradients are about to be added to what is held for a worker's next push."""
        if self.is_kept:
            number = self.numbers[worker]
            self.held_from.setdefault(number, self.position)
            held = journal_pb2.GradientsHeld(
                number=number,
                sequence=sequence,
                micro=micro,
                bucket_id=bucket.bucket_id,
                present=pack_present(present),
            )
            self._append(journal_pb2.JournalRecord(gradients_held=held), [bytes_of(payload)])

    def accumulation_ended(self, worker: Worker, micro: int, *, discards: bool = False) -> None:
        """A worker's accumulation is complete, or what is held is discarded; `micro` is the next one's number."""
        if self.is_kept:
            number = self.numbers[worker]
            self.held_from.setdefault(number, self.position)
            ended = journal_pb2.AccumulationEnded(number=number, micro=micro, discards=discards)
            self._append(journal_pb2.JournalRecord(accumulation_ended=ended))

    # --- all of it once more

    def write_again(
        self, members: Iterable[tuple[Member, int]], deferred: Iterable[tuple[int, int, torch.Tensor]], store: Store
    ) -> int:
        """Writes down anew, in segments of its own, what no snapshot has: the records before are of no use any more.

        Args:
            members: Workers, with the sequence numbers of their next pushes. What others have held is lost to a server
                that dies.
            deferred: Of buckets that are complete, and wait for the others of their parameters: the round, the bucket's
                id, and its gradient.
            store: The job's tensors.

        Returns:
            Where it begins.
        """
        start = self.position
        if self._log is None:
            return start
        self._log.leave_segment()
        gradients = {(number, bucket_id): gradient for number, bucket_id, gradient in deferred}
        for number, round_ in self.rounds.items():
            round_.position = self.position
            self._append(journal_pb2.JournalRecord(round_settled=round_.settled))
            for applied in round_.applied:
                gradient = gradients.get((number, applied.bucket_id))
                if gradient is not None:
                    self._append(journal_pb2.JournalRecord(bucket_applied=applied), [bytes_of(gradient.cpu())])
        self.held_from.clear()
        for member, sequence in members:
            self._write_held_again(member, sequence, store.buckets)
        return start

    # --- inside

    def _write_held_again(self, member: Member, sequence: int, buckets: Sequence[Bucket]) -> None:
        if not member.held.micro and not member.held.nbytes:
            return
        self.accumulation_ended(member.worker, 0, discards=True)
        complete, begun = member.held.sums()
        for part, micro in ((complete, max(member.held.micro - 1, 0)), (begun, member.held.micro)):
            for bucket_id, present, gradient in part:
                # In the dtype that sums are held in: see `Replay`.
                self.gradients_held(
                    member.worker,
                    sequence=sequence,
                    micro=micro,
                    bucket=buckets[bucket_id],
                    present=present,
                    payload=gradient.cpu(),
                )
            if part is complete:
                self.accumulation_ended(member.worker, member.held.micro)

    def _contributions(self, workers: Sequence[Worker]) -> list[journal_pb2.Contribution]:
        contributions = []
        for worker in workers:
            sequence, staleness, speaks = self._contribution(worker)
            contributions.append(
                journal_pb2.Contribution(
                    number=self.numbers[worker], sequence=sequence, staleness=staleness, speaks=speaks
                )
            )
        return contributions

    def _close_round(self, round_number: int, answered: Sequence[Worker]) -> None:
        self.rounds.pop(round_number, None)
        for worker in answered:
            self.held_from.pop(self.numbers[worker], None)

    def _put(self, kind: str, bucket: Bucket, present: Sequence[bool], parts: Sequence[Part]) -> None:
        put = journal_pb2.PutTensors(bucket_id=bucket.bucket_id, kind=encode_kind(kind), present=pack_present(present))
        self._append(journal_pb2.JournalRecord(put_tensors=put), parts)


def _entry(index: int, staged: StagedState) -> state_dict_pb2.ParameterState:
    names = staged.tensors.get(index, {})
    return state_dict_pb2.ParameterState(
        parameter=index, step=staged.steps[index], tensors=[encode_kind(name) for name in names]
    )
