"""What a recovery would come to, as far as records tell without being done again.

A plan follows `replay.py` without a job, a device or a tensor: for `recovery.py` before it makes a job, and for
somebody who wants to know before a server is started.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from optimd.server.log import LogDamageError
from optimd.server.records import Record
from optimd.server.replay import Survey
from optimd.v1 import journal_pb2, snapshot_pb2


@dataclass(slots=True)
class _Round:
    settled: journal_pb2.RoundSettled
    buckets: set[int] = field(default_factory=set)


@dataclass(slots=True)
class _Layout:
    """Buckets whose values are still to come."""

    left: int
    count: int
    replaces: bool


class RecoveryPlan:
    """A recovery on top of a snapshot, or of nothing, with the records behind it.

    Args:
        snapshot: The snapshot's name; empty for the journal alone.
        manifest: Its manifest; None for the journal alone.
        is_damaged: Whether its tensors cannot be used.
        taken_back: Rounds of which nothing is to count, besides those of which the journal says so.
    """

    def __init__(
        self,
        snapshot: str = "",
        manifest: snapshot_pb2.SnapshotManifest | None = None,
        *,
        is_damaged: bool = False,
        taken_back: Collection[int] = (),
    ) -> None:
        self.snapshot = snapshot
        self.is_damaged = is_damaged
        self.survey = Survey(taken_back=set(taken_back))
        """What the journal holds from `replay_from` on, up to where its reading ended."""
        self.damage: LogDamageError | None = None
        """What ended its reading, unless that was its end."""
        self.has_ended = False
        self.snapshot_step = manifest.step if manifest is not None else 0
        self.step = self.snapshot_step
        """How many steps the job would have."""
        self.position = 0
        """Where the journal stood when the snapshot was complete."""
        self.replay_from = 0
        self._manifest = manifest
        self._rounds: dict[int, _Round] = {}
        self._layout: _Layout | None = None
        self._bucket_count = 0
        self._is_given_parameters = manifest is not None
        # Of records that the snapshot may have already: rounds, buckets and positions.
        self._applied_before: list[tuple[int, int, int]] = []
        if manifest is not None:
            self.position, self.replay_from = manifest.position, manifest.replay_from
            self._bucket_count = len(manifest.buckets)
            for kept in manifest.rounds:
                buckets = {applied.bucket_id for applied in kept.applied}
                self._rounds[kept.settled.round] = _Round(kept.settled, buckets)

    def see(self, record: Record, message: journal_pb2.JournalRecord) -> None:
        """The next record. Those before `replay_from`, and behind the end, are not looked at."""
        if self.has_ended or record.position < self.replay_from:
            return
        self.survey.see(record, message)
        if record.position < self.position:
            if message.HasField("bucket_applied"):
                applied = message.bucket_applied
                self._applied_before.append((applied.round, applied.bucket_id, record.position))
            return
        self._see_layout(message)
        match message.WhichOneof("record"):
            case "round_settled":
                self._rounds.setdefault(message.round_settled.round, _Round(message.round_settled))
            case "bucket_applied":
                round_ = self._rounds.get(message.bucket_applied.round)
                if round_ is not None:
                    round_.buckets.add(message.bucket_applied.bucket_id)
            case "round_committed":
                self._rounds.pop(message.round_committed.round, None)
                self.step = message.round_committed.step
            case "round_skipped":
                self._rounds.pop(message.round_skipped.round, None)
                self.step = message.round_skipped.step
            case "round_ended":
                self._rounds.pop(message.round_ended.round, None)
            case "round_taken_back":
                self._rounds.pop(message.round_taken_back.round, None)

    def _see_layout(self, message: journal_pb2.JournalRecord) -> None:
        """Parameters are the job's with the last of their values."""
        kind = message.WhichOneof("record")
        if kind == "layout_brought":
            brought = message.layout_brought
            self._layout = _Layout(brought.tensor_count, len(brought.buckets), brought.replaces)
        elif kind == "put_tensors" and self._layout is not None:
            self._layout.left -= 1
        elif kind not in ("put_tensors", "segment_started"):
            # Whoever brought them was interrupted.
            self._layout = None
        if self._layout is not None and not self._layout.left:
            before = 0 if self._layout.replaces else self._bucket_count
            self._bucket_count = before + self._layout.count
            self._is_given_parameters = True
            self._layout = None

    def end(self, damage: LogDamageError | None = None) -> None:
        """There is no more to be read of the journal."""
        if not self.has_ended:
            self.has_ended, self.damage = True, damage

    @property
    def has_job(self) -> bool:
        """Whether there is a job that has been given its parameters."""
        return self._is_given_parameters and self.kept_job is not None

    @property
    def kept_job(self) -> journal_pb2.KeptJob | None:
        """What the job was created with; None where nothing says so."""
        return self._manifest.job if self._manifest is not None else self.survey.job

    @property
    def is_short(self) -> bool:
        """Whether the journal ends before the snapshot can do without it."""
        return self.survey.end < self.position and self.replay_from < self.position

    @property
    def holds_taken_back(self) -> bool:
        """Whether the snapshot holds a part of a round that was taken back: a recovery goes further back then."""
        if self._manifest is None:
            return False
        held = {kept.settled.round for kept in self._manifest.rounds if kept.applied}
        positions = dict(enumerate(content.position for content in self._manifest.contents))
        held.update(round_ for round_, bucket_id, at in self._applied_before if at < positions.get(bucket_id, 0))
        return bool(held & self.survey.taken_back)

    @property
    def open_steps(self) -> list[tuple[int, int]]:
        """Of each streamed round that is open how many buckets are applied, and how many there are."""
        return [
            (len(round_.buckets), self._bucket_count)
            for round_ in self._rounds.values()
            if round_.buckets and self.survey.counts(round_.settled)
        ]

    @property
    def discarded_rounds(self) -> list[int]:
        """The atomic rounds that nothing ended: nothing of them counts."""
        return [number for number, round_ in self._rounds.items() if not self.survey.counts(round_.settled)]


@dataclass(frozen=True, slots=True)
class Prospect:
    """What becomes of a job when a server is started."""

    plan: RecoveryPlan | None = None
    """How it is brought back; None where it is not."""
    refusal: str = ""
    """Why the server does not start; empty where it does."""
    is_hopeless: bool = False
    """Whether it does not start with --accept-loss either."""


def choose(plans: Sequence[RecoveryPlan], *, skipped: bool, begins: int, accept_loss: bool) -> Prospect:
    """As `recovery.recover` chooses.

    Args:
        plans: One for each snapshot whose manifest is whole, from the newest to the oldest, and one for the journal
            alone. All have ended.
        skipped: Whether there are other snapshots.
        begins: Where the journal begins.
        accept_loss: Whether the server is started with --accept-loss.

    Returns:
        How the job is brought back, or why the server refuses to start. Neither where the job's creation was never
        completed: the server removes it.
    """
    for plan in plans:
        if not plan.snapshot and begins:
            return Prospect(
                refusal=f"there is no snapshot that can be used, and the journal begins at position {begins}",
                is_hopeless=True,
            )
        if plan.damage is not None and not accept_loss:
            return Prospect(refusal=str(plan.damage))
        if not plan.snapshot:
            if plan.has_job:
                return Prospect(plan)
            if skipped:
                return Prospect(
                    refusal="there is no snapshot that can be used, and no journal that has the job's parameters",
                    is_hopeless=True,
                )
            return Prospect()
        if plan.is_short and not plan.holds_taken_back and not accept_loss:
            return Prospect(
                refusal=f"the journal ends at position {plan.survey.end}, and snapshot {plan.snapshot} needs it up to "
                f"{plan.position}"
            )
        if not (plan.is_short or plan.holds_taken_back or plan.is_damaged):
            return Prospect(plan)
        skipped = True
    raise ValueError("there is no plan for the journal alone")
