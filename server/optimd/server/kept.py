"""A job as its data dir keeps it, but for its tensors: described for a snapshot, and made again from that.

What is described is taken with the job's lock held, in one moment. What is made again is a job all of whose workers'
lines have just broken: each of them has its place for the length of a lease, and comes back to its push.
"""

from __future__ import annotations

import time
from typing import Literal

import torch

from optimd.server import update
from optimd.server.aggregation import SyncAggregator, Worker
from optimd.server.company import JobPhase
from optimd.server.journal import OpenRound
from optimd.server.member import Member, WorkerRecord
from optimd.server.opening import NONFINITE, encode_aggregation, encode_apply, encode_nonfinite, read_policy
from optimd.server.parts import JobParts
from optimd.server.receipts import decode_receipt, encode_receipt
from optimd.server.settings import JobSettings
from optimd.server.watching import CommittedStep, Contribution
from optimd.v1 import job_pb2, journal_pb2, snapshot_pb2
from optimd.wire.kinds import encode_kind
from optimd.wire.layout import encode_bucket, encode_parameter
from optimd.wire.param_groups import decode_group, encode_group


def describe_environment(device: torch.device) -> journal_pb2.Environment:
    """Where this process computes."""
    name = f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)
    return journal_pb2.Environment(
        torch_version=torch.__version__,
        cpu_capability=torch.backends.cpu.get_cpu_capability(),
        device=name,
        threads=torch.get_num_threads(),
    )


def describe_job(name: str, uid: str, settings: JobSettings) -> journal_pb2.KeptJob:
    """What a job was created with."""
    return journal_pb2.KeptJob(
        job=name,
        uid=uid,
        aggregation=encode_aggregation(settings),
        apply=encode_apply(settings),
        bucket_bytes=settings.bucket_bytes,
        private=settings.private,
        max_grad_norm=settings.max_grad_norm,
        nonfinite=encode_nonfinite(settings),
    )


def settings_of(kept: journal_pb2.KeptJob) -> JobSettings:
    """The inverse.

    Raises:
        RequestError: it is not what a job can be created with.
    """
    apply: Literal["streaming", "atomic"] = "streaming" if kept.apply == job_pb2.APPLY_MODE_STREAMING else "atomic"
    return JobSettings(
        **read_policy(kept.aggregation).settings,
        apply=apply,
        bucket_bytes=kept.bucket_bytes,
        private=kept.private,
        max_grad_norm=kept.max_grad_norm if kept.HasField("max_grad_norm") else None,
        nonfinite=NONFINITE[kept.nonfinite],
    )


def describe_locked(parts: JobParts, kinds: list[str]) -> snapshot_pb2.SnapshotManifest:
    """All of a job that is not in its tensors or its settings, at this moment. With the job's lock held."""
    content, company, aggregator, journal = parts.content, parts.company, parts.aggregator, parts.journal
    manifest = snapshot_pb2.SnapshotManifest(
        position=journal.position,
        step=aggregator.step,
        load_count=content.load_count,
        load_digest=content.load_digest,
        layout_count=content.layout_count,
        groups=[
            encode_group(index, update.RULE, group, parameter_count=size)
            for index, (group, size) in enumerate(zip(content.groups, content.sizes, strict=True))
        ],
        parameters=[encode_parameter(parameter) for parameter in content.store.parameters],
        buckets=[encode_bucket(bucket) for bucket in content.store.buckets],
        kinds=[encode_kind(kind) for kind in kinds],
        formed=aggregator.is_formed,
        rounds=[
            snapshot_pb2.KeptRound(settled=round_.settled, applied=round_.applied) for round_ in journal.rounds.values()
        ],
        last_round=journal.last_round,
        numbers=[
            snapshot_pb2.KeptNumber(number=number, rank=worker.rank, worker_id=worker.worker_id)
            for worker, number in journal.numbers.items()
        ],
        history=[_describe_step(step) for step in parts.history.last()],
    )
    incarnations = company.membership.incarnations
    for worker_id, record in company.records().items():
        manifest.workers.append(
            snapshot_pb2.KeptWorker(
                worker_id=worker_id,
                rank=record.rank,
                next_sequence=record.next_sequence,
                pushes=record.pushes,
                dropped=record.dropped,
                receipt=encode_receipt(record.receipt) if record.receipt is not None else None,
                incarnation=incarnations.get(worker_id),
            )
        )
    for worker, member in company.members.items():
        identity = job_pb2.WorkerIdentity(worker_id=worker.worker_id, rank=worker.rank, incarnation=member.incarnation)
        manifest.members.append(
            snapshot_pb2.KeptMember(
                number=journal.numbers[worker],
                worker=identity,
                speaks=member.speaks,
                own_steps=member.own_steps,
                buffers_attached=parts.buffers.has_attached_locked(worker),
            )
        )
    if isinstance(aggregator, SyncAggregator):
        for worker in sorted(aggregator.absent):
            identity = job_pb2.WorkerIdentity(worker_id=worker.worker_id, rank=worker.rank)
            manifest.members.append(
                snapshot_pb2.KeptMember(number=journal.numbers[worker], worker=identity, absent=True)
            )
    else:
        manifest.floor = aggregator.floor
        clocks = aggregator.clocks
        for kept in manifest.members:
            kept.clock = clocks.get(_worker_of(kept), 0)
    return manifest


def restore(manifest: snapshot_pb2.SnapshotManifest, parts: JobParts) -> None:
    """Makes a job, of which nothing is there yet but its parameters, what a manifest says."""
    content, company, aggregator, journal = parts.content, parts.company, parts.aggregator, parts.journal
    content.load_count, content.load_digest = manifest.load_count, manifest.load_digest
    content.layout_count = manifest.layout_count
    content.groups = [decode_group(group) for group in manifest.groups]
    content.sizes = [group.parameter_count for group in manifest.groups]
    for record in manifest.workers:
        company.records()[record.worker_id] = WorkerRecord(
            next_sequence=record.next_sequence,
            pushes=record.pushes,
            dropped=record.dropped,
            receipt=decode_receipt(record.receipt) if record.HasField("receipt") else None,
            rank=record.rank if record.HasField("rank") else None,
        )
        if record.HasField("incarnation"):
            company.membership.remember(record.worker_id, record.incarnation)
    for number in manifest.numbers:
        journal.numbers[Worker(number.rank, number.worker_id)] = number.number
    journal.last_number = max(journal.numbers.values(), default=0)
    journal.last_round = manifest.last_round
    for round_ in manifest.rounds:
        journal.rounds[round_.settled.round] = OpenRound(round_.settled, manifest.replay_from, list(round_.applied))
    live = {_worker_of(kept): kept for kept in manifest.members if not kept.absent}
    for worker, kept in live.items():
        restore_member(parts, worker, kept.worker.incarnation, speaks=kept.speaks, own_steps=kept.own_steps)
        if kept.buffers_attached:
            parts.buffers.restore_attached(worker)
    if isinstance(aggregator, SyncAggregator):
        absent = [_worker_of(kept) for kept in manifest.members if kept.absent]
        aggregator.restore(step=manifest.step, live=live, absent=absent, formed=manifest.formed)
    else:
        clocks = {worker: kept.clock for worker, kept in live.items()}
        aggregator.restore(step=manifest.step, clocks=clocks, floor=manifest.floor)
    for step in manifest.history:
        parts.history.add(_step_of(step))
    company.phase = JobPhase.READY


def restore_member(parts: JobParts, worker: Worker, incarnation: int, *, speaks: bool, own_steps: int = 0) -> Member:
    """A process was in the job: it has its place, and its line is down."""
    member = Member(
        worker,
        incarnation,
        speaks=speaks,
        own_steps=own_steps,
        alive=False,
        ready=True,
        holds_place=True,
        recovered=True,
    )
    member.give(parts.content.groups)
    parts.company.record(worker.worker_id).rank = worker.rank
    parts.company.members[worker] = member
    member.place = parts.company.membership.enter(worker, incarnation, now=time.monotonic())
    parts.company.membership.disconnect(worker)
    return member


def _worker_of(kept: snapshot_pb2.KeptMember) -> Worker:
    return Worker(kept.worker.rank, kept.worker.worker_id)


def _describe_step(step: CommittedStep) -> snapshot_pb2.KeptStep:
    return snapshot_pb2.KeptStep(
        step=step.step,
        contributors=[
            snapshot_pb2.KeptContribution(rank=part.rank, worker_id=part.worker_id, sequence=part.sequence)
            for part in step.contributors
        ],
        partial_contributors=step.partial_contributors,
        hyperparameters_disagreed=step.hyperparameters_disagreed,
        grad_norm=step.grad_norm,
        pushed_differently=step.pushed_differently,
    )


def _step_of(kept: snapshot_pb2.KeptStep) -> CommittedStep:
    return CommittedStep(
        step=kept.step,
        contributors=tuple(Contribution(part.rank, part.worker_id, part.sequence) for part in kept.contributors),
        partial_contributors=tuple(kept.partial_contributors),
        hyperparameters_disagreed=kept.hyperparameters_disagreed,
        grad_norm=kept.grad_norm if kept.HasField("grad_norm") else None,
        pushed_differently=tuple(kept.pushed_differently),
    )
