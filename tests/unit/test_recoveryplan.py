"""What a recovery would come to, told from records alone. tests/integration/test_verify.py compares with real ones."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from optimd.server.log import LogDamageError
from optimd.server.records import Record
from optimd.server.recoveryplan import Prospect, RecoveryPlan, choose
from optimd.v1 import journal_pb2, snapshot_pb2, tensor_pb2

RECORD_BYTES = 8


def saw(plan: RecoveryPlan, *messages: journal_pb2.JournalRecord, first: int = 0) -> RecoveryPlan:
    """The plan, when it has seen these records and no more."""
    for number, message in enumerate(messages):
        position = first + RECORD_BYTES * number
        plan.see(Record(position, position + RECORD_BYTES, 0, message.SerializeToString(), memoryview(b"")), message)
    plan.end()
    return plan


def started() -> journal_pb2.JournalRecord:
    kept = journal_pb2.KeptJob(job="job", uid="0")
    return journal_pb2.JournalRecord(segment_started=journal_pb2.SegmentStarted(format_version=1, job=kept))


def brought(*, buckets: int, tensors: int, replaces: bool = False) -> list[journal_pb2.JournalRecord]:
    """A layout, and as many of its tensors as have come."""
    layout = journal_pb2.LayoutBrought(
        replaces=replaces, buckets=[tensor_pb2.BucketSpec()] * buckets, tensor_count=buckets
    )
    put = journal_pb2.JournalRecord(put_tensors=journal_pb2.PutTensors())
    return [journal_pb2.JournalRecord(layout_brought=layout), *[put] * tensors]


def left() -> journal_pb2.JournalRecord:
    return journal_pb2.JournalRecord(worker_left=journal_pb2.WorkerLeft(number=1))


def settled(number: int, *, atomic: bool = False) -> journal_pb2.JournalRecord:
    return journal_pb2.JournalRecord(round_settled=journal_pb2.RoundSettled(round=number, atomic=atomic))


def applied(number: int, bucket_id: int) -> journal_pb2.JournalRecord:
    return journal_pb2.JournalRecord(bucket_applied=journal_pb2.BucketApplied(round=number, bucket_id=bucket_id))


def committed(number: int, step: int) -> journal_pb2.JournalRecord:
    return journal_pb2.JournalRecord(round_committed=journal_pb2.RoundCommitted(round=number, step=step))


def taken_back(number: int) -> journal_pb2.JournalRecord:
    return journal_pb2.JournalRecord(round_taken_back=journal_pb2.RoundTakenBack(round=number))


def snapshot(
    *, position: int, replay_from: int, at: Sequence[int], step: int = 7, open_round: int | None = None
) -> RecoveryPlan:
    """A snapshot whose buckets are as of the positions `at`, and of which a bucket of `open_round` was applied."""
    settled = journal_pb2.RoundSettled(round=open_round or 0)
    manifest = snapshot_pb2.SnapshotManifest(
        position=position,
        replay_from=replay_from,
        step=step,
        buckets=[tensor_pb2.BucketSpec()] * len(at),
        contents=[snapshot_pb2.KeptBucket(position=each) for each in at],
        rounds=[]
        if open_round is None
        else [snapshot_pb2.KeptRound(settled=settled, applied=[journal_pb2.BucketApplied(round=open_round)])],
    )
    return RecoveryPlan("00000001-step-7", manifest)


def test_steps_and_open_rounds_are_those_that_records_say() -> None:
    """A round is open from its first record to whatever ends it."""
    plan = saw(
        RecoveryPlan(),
        started(),
        *brought(buckets=3, tensors=3),
        settled(1),
        applied(1, 0),
        committed(1, 1),
        settled(2),
        applied(2, 2),
        applied(2, 0),
        applied(2, 2),
        settled(3, atomic=True),
        applied(3, 1),
    )
    assert (plan.has_job, plan.step) == (True, 1)
    assert plan.open_steps == [(2, 3)]
    assert plan.discarded_rounds == [3]


@pytest.mark.parametrize(
    ("records", "has_job", "count"),
    [
        (brought(buckets=3, tensors=2), False, 0),
        ([*brought(buckets=3, tensors=2), left(), *brought(buckets=2, tensors=2)], True, 2),
        ([*brought(buckets=3, tensors=2), left(), brought(buckets=1, tensors=1)[-1]], False, 0),
        ([*brought(buckets=3, tensors=2), started(), brought(buckets=1, tensors=1)[-1]], True, 3),
        ([*brought(buckets=3, tensors=3), *brought(buckets=2, tensors=2)], True, 5),
        ([*brought(buckets=3, tensors=3), *brought(buckets=2, tensors=1)], True, 3),
        ([*brought(buckets=3, tensors=3), *brought(buckets=2, tensors=2, replaces=True)], True, 2),
        (brought(buckets=0, tensors=0), True, 0),
    ],
)
def test_parameters_are_the_jobs_with_the_last_of_their_values(
    records: list[journal_pb2.JournalRecord], has_job: bool, count: int
) -> None:
    """Those that were not all brought never count. Between them a new segment may begin."""
    plan = saw(RecoveryPlan(), started(), *records, settled(1), settled(2), applied(1, 0))
    assert plan.has_job is has_job
    # One of which nothing is applied begins anew.
    assert plan.open_steps == [(1, count)]


def test_records_that_a_snapshot_has_change_nothing_of_it() -> None:
    """But for the rounds that were open when it was taken, of which it says what was applied."""
    plan = snapshot(position=32, replay_from=8, at=[16, 16])
    records = [committed(8, 6), settled(9), applied(9, 0), committed(9, 7), committed(10, 8)]
    saw(plan, *records)
    assert (plan.snapshot_step, plan.step, plan.survey.records) == (7, 8, 4)
    assert not plan.is_short
    assert not plan.holds_taken_back


def test_a_snapshot_that_needs_more_of_the_journal_than_there_is_is_short() -> None:
    """One that needs nothing of it never is."""
    assert saw(snapshot(position=100, replay_from=8, at=[16]), settled(1), settled(2)).is_short
    assert not saw(snapshot(position=100, replay_from=100, at=[16]), settled(1)).is_short


def test_a_snapshot_with_a_part_of_a_round_that_was_taken_back_is_passed_over() -> None:
    """Where the bucket was copied before the round reached it, none of it is in the snapshot."""
    records = [settled(9), applied(9, 1), settled(10), settled(11), taken_back(9)]
    holds = saw(snapshot(position=32, replay_from=0, at=[0, 16]), *records)
    lacks = saw(snapshot(position=32, replay_from=0, at=[16, 8]), *records)
    assert (holds.holds_taken_back, lacks.holds_taken_back) == (True, False)
    assert saw(snapshot(position=32, replay_from=32, at=[32], open_round=9), taken_back(9), first=32).holds_taken_back
    alone = saw(RecoveryPlan(), *records)
    assert choose([holds, lacks, alone], skipped=False, begins=0, accept_loss=False) == Prospect(lacks)


def test_a_round_that_a_snapshot_has_goes_on_behind_it() -> None:
    """Its first record may be written once more."""
    plan = saw(snapshot(position=32, replay_from=32, at=[0, 0, 0], open_round=9), settled(9), applied(9, 2), first=32)
    assert plan.open_steps == [(2, 3)]


def test_what_is_read_behind_its_end_is_not_looked_at() -> None:
    """A server would stop there."""
    plan = RecoveryPlan()
    damage = LogDamageError(Path("x.journal"), 16, "the record is damaged")
    plan.see(Record(0, 8, 0, b"", memoryview(b"")), started())
    plan.end(damage)
    plan.end()
    saw(plan, committed(1, 1), first=8)
    assert (plan.step, plan.damage) == (0, damage)
    prospect = choose([plan], skipped=False, begins=0, accept_loss=False)
    assert (prospect.plan, prospect.is_hopeless) == (None, False)
    assert "x.journal, position 16" in prospect.refusal
