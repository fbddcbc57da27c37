"""A job in the small: what stands around the state machines, without threads, sockets or a clock.

It does what `Job`, `Pushing` and `Pulling` do around an aggregator and `Membership`, one stream's thread at a time and
where it is told to. What is wrong is an `AssertionError`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from optimd.server.aggregation import Decision, Discard, TimeOut, Worker
from optimd.server.membership import Membership, Verdict
from optimd.server.receipts import Outcome, Receipt
from optimd.server.staleness import AsyncAggregator
from tests.unit.simulated_ledger import Ledger
from tests.unit.simulated_parts import Attempt, Message, Policy, Push, Stage, Stream


class SimulatedJob:
    """A job. Events come with the streams that they concern; `serve` has a stream's thread go on if it may."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.aggregator = policy.aggregator()
        self.membership = Membership(policy.lease_s)
        self.now = 0.0
        self.streams: list[Stream] = []
        self.members: dict[Worker, Stream] = {}
        self.ledger = Ledger(policy, self.aggregator)
        self.seen = self.ledger.seen
        self._heard_s: dict[Worker, float] = {}

    @property
    def newcomers(self) -> int:
        """How many wait for the end of a step that they are not in, to be let in or to be given parameters."""
        return sum(stream.alive and stream.newcomer for stream in self.streams)

    # --- streams

    def open(self, stream: Stream) -> None:
        self.streams.append(stream)

    def disconnect(self, stream: Stream) -> None:
        """Its line is down."""
        stream.alive = False
        if self.members.get(stream.worker) is stream:
            if stream.ready:
                self.membership.disconnect(stream.worker)
            else:
                self._remove(stream.worker)

    def clog(self, stream: Stream, *, clogged: bool) -> None:
        """From here on its process takes nothing of what it is sent; or takes it again."""
        stream.clogged = clogged
        if not clogged and stream.sending:
            stream.sending = False
            stream.place.sending_since_s = None

    def leave(self, stream: Stream) -> None:
        """Its process has left for good."""
        stream.alive = False
        if self.members.get(stream.worker) is stream:
            self._remove(stream.worker)

    def hear(self, worker: Worker, incarnation: int) -> None:
        member = self.members.get(worker)
        if member is not None and member.incarnation == incarnation:
            self.membership.heard(worker, self.now)
            self._heard_s[worker] = self.now

    def begin(self, stream: Stream, attempt: Attempt) -> None:
        stream.push, stream.stage = Push(attempt), Stage.BEGINNING

    def push(self, stream: Stream, bucket: int) -> None:
        push, worker = _of(stream), stream.worker
        if not self.takes(stream):
            self.seen["pushed in vain"] += 1
        elif self.aggregator.holds(worker, bucket):
            self.seen["resent a bucket that is held"] += 1
        else:
            round_ = push.round
            assert round_ is not None
            decisions = self.aggregator.push(worker, bucket)
            holders = round_.held.setdefault(bucket, {})
            assert worker not in holders, f"bucket {bucket} of {push.attempt} is held already"
            holders[worker] = push.attempt
            self._settle(decisions, worker)

    def end(self, stream: Stream) -> None:
        push, worker = _of(stream), stream.worker
        stream.stage, stream.waits_since = Stage.WAITING, self.now
        if not self.takes(stream) or self.aggregator.has_ended(worker):
            return
        round_ = push.round
        assert round_ is not None
        complete = round_.has_all_of(worker)
        promised = isinstance(self.aggregator, AsyncAggregator) and self.aggregator.will_be_released(worker)
        left_behind = isinstance(self.aggregator, AsyncAggregator) and worker in self.aggregator._left_behind
        decisions = self.aggregator.end(worker, skipped=push.attempt.skips)
        assert complete == bool(decisions or self.aggregator.has_ended(worker)), (
            f"{push.attempt} is complete: {complete}"
        )
        if complete:
            round_.ended.add(worker)
        if isinstance(self.aggregator, AsyncAggregator):
            self.ledger.lead.count(worker)
            waits = self.aggregator.is_waiting(worker)
            self.seen["waited for slower workers"] += waits
            self.seen["caught up after it had been left behind"] += left_behind
            assert waits != promised, f"{push.attempt} waits, and parameters were promised for it"
        self._settle(decisions, worker)

    def take_back(self, stream: Stream) -> None:
        push, worker = _of(stream), stream.worker
        if push.round is not None and push.round.ends is None and self.aggregator.has_begun(worker):
            del push.round.attempts[worker]
            self._settle(self.aggregator.retract(worker), worker)
        self._refuse(stream)

    def tick(self) -> None:
        silent = {worker for worker in self.members if self.now - self._heard_s[worker] >= self.policy.lease_s}
        lapsed = set(self.membership.lapsed(self.now))
        clogged = {worker for worker in lapsed - silent if self.members[worker].sending}
        assert lapsed == silent | clogged, f"{lapsed} are lost, and {silent} are silent"
        self.seen["lost since it took nothing"] += len(clogged)
        for worker in sorted(lapsed):
            self.seen["lost"] += 1
            self._remove(worker, lost=True)
        waited_for = self.newcomers > 0
        if self.aggregator.is_timed or waited_for:
            timed = self.aggregator.is_timed
            decisions = self.aggregator.tick(self.now, waited_for=waited_for)
            self.seen["timed out"] += bool(decisions)
            self.seen["timed out for who waited at the boundary"] += bool(decisions) and not timed
            if isinstance(self.aggregator, AsyncAggregator):
                self.ledger.lead.forget(self.aggregator._left_behind)
            self._settle(decisions, None)

    # --- a stream's thread

    def serve(self, stream: Stream) -> bool:
        """Has a stream's thread go on from where it waits, if it may. Returns whether it has."""
        if not stream.alive:
            return False
        before = stream.stage, len(stream.inbox)
        match stream.stage:
            case Stage.ASKING:
                self._admit(stream)
            case Stage.ENTERED:
                self._welcome(stream)
            case Stage.BEGINNING:
                self._begin(stream)
            case Stage.WAITING:
                self._look(stream)
            case Stage.OVER:
                self._catch_up(stream)
            case Stage.CAUGHT_UP if stream.clogged:
                if not stream.sending:
                    stream.sending = True
                    stream.place.sending_since_s = self.now
            case Stage.CAUGHT_UP:
                self._answer_push(stream)
        return (stream.stage, len(stream.inbox)) != before

    def _admit(self, stream: Stream) -> None:
        worker = stream.worker
        claim = self.membership.claim(
            worker, stream.incarnation, now=self.now, since=stream.since, returns=stream.returns
        )
        displaced = claim.rivals
        match claim.verdict:
            case Verdict.RESUME if self.members[worker].ready:
                self._resume(stream)
                return
            case Verdict.WAIT:
                self.seen["waited for a place"] += 1
                return
            case Verdict.IN_USE | Verdict.SUPERSEDED as verdict:
                stream.alive = False
                stream.inbox.append(Message(verdict.name))
                return
            case Verdict.UNKNOWN:
                raise AssertionError(f"{stream.process} has been in the job")
        for rival in displaced:
            holder = self.members[rival]
            gone = not holder.alive or self.now >= holder.place.lapses_at(self.policy.lease_s)
            assert gone or holder.incarnation == stream.incarnation, f"{holder.process}, which is alive, is displaced"
            self.seen["displaced"] += 1
            self._remove(rival, lost=True)
        if self._await_boundary(stream, waits=not self.aggregator.may_join(worker)):
            self.seen["waited for the step's end to join"] += 1
            if self.now - stream.waits_since >= 2 * self.policy.timeout_s + self.policy.lease_s:
                stream.alive = False
                stream.inbox.append(Message("TOO_LONG"))
            return
        self.seen["returned after its lease" if stream.returns else "joined"] += 1
        if self.aggregator.is_open and not self.policy.asynchronous:
            self.seen["joined in the middle of a step"] += 1
            assert self.policy.on_loss == "wait", f"{stream.process} joins in the middle of a step"
        stream.stage = Stage.ENTERED
        self.members[worker] = stream
        stream.place = self.membership.enter(worker, stream.incarnation, now=self.now)
        self._heard_s[worker] = self.now
        decisions = self.aggregator.join(worker)
        self.ledger.lead.join(worker)
        self._settle(decisions, worker)

    def _resume(self, stream: Stream) -> None:
        worker, former = stream.worker, self.members[stream.worker]
        former.alive, stream.stage, stream.waits_since = False, Stage.ENTERED, self.now
        self.members[worker] = stream
        stream.place = self.membership.resume(worker, now=self.now)
        self._heard_s[worker] = self.now
        self.seen["returned within its lease"] += 1

    def _await_boundary(self, stream: Stream, *, waits: bool) -> bool:
        """Whether a stream's thread waits for the end of a step that its process is not in."""
        if waits and not stream.newcomer and stream.push is None:
            stream.waits_since = self.now
        stream.newcomer = waits
        return waits

    def _welcome(self, stream: Stream) -> None:
        if isinstance(self.aggregator, AsyncAggregator) and self.aggregator.is_waiting(stream.worker):
            # It is given nothing before it would have been on its old line.
            self.seen["waited for slower workers after coming back"] += 1
            return
        stream.ready, stream.stage = True, Stage.BETWEEN
        record = self.ledger.record(stream.worker.worker_id)
        stream.inbox.append(
            Message(
                "ready",
                receipt=record.receipt if stream.returns else None,
                next_sequence=record.next_sequence,
                job_step=self.aggregator.step,
            )
        )

    def _begin(self, stream: Stream) -> None:
        push, worker, aggregator = _of(stream), stream.worker, self.aggregator
        record, sequence = self.ledger.record(worker.worker_id), push.attempt.sequence
        if record.receipt is not None and record.receipt.sequence == sequence:
            # Its step was committed after its process had come back, and before it pushed again.
            self.seen["answered on its way back"] += 1
            stream.stage = Stage.TAKING
            return
        assert sequence == record.next_sequence, f"{push.attempt} comes when {record.next_sequence} is due"
        resumes = aggregator.has_begun(worker)
        if not resumes:
            unready = not self.policy.asynchronous and not all(member.ready for member in self.members.values())
            overtakes = self.newcomers > 0 and not aggregator.is_open
            if not aggregator.is_formed or unready or overtakes:
                return
        if resumes or aggregator.begin(worker, push.attempt.base_step):
            push.round = self.ledger.open_round(worker)
            push.round.attempts[worker] = push.attempt
            current = push.attempt.base_step == aggregator.step
            assert current or self.policy.asynchronous, f"{push.attempt} was computed with old parameters"
        else:
            self.seen["began too late"] += 1
        self.seen["resumed a push"] += resumes
        stream.stage = Stage.TAKING

    def _look(self, stream: Stream) -> None:
        push, worker, aggregator = _of(stream), stream.worker, self.aggregator
        if push.round is None:
            stream.stage = Stage.OVER
        elif isinstance(push.round.ends, TimeOut):
            self._refuse(stream)
        elif self.takes(stream):
            owed = aggregator.owed(worker)
            if owed:
                self.seen["asked to push again"] += 1
                stream.stage = Stage.TAKING
                stream.inbox.append(Message("again", buckets=owed))
        else:
            receipt = self.ledger.record(worker.worker_id).receipt
            answered = receipt is not None and receipt.sequence == push.attempt.sequence
            partial = answered and receipt is not None and worker.rank in receipt.partial_contributors
            whole = answered and not partial and not self.policy.asynchronous
            stream.stage = Stage.CAUGHT_UP if whole else Stage.OVER

    def _catch_up(self, stream: Stream) -> None:
        if isinstance(self.aggregator, AsyncAggregator):
            if self.aggregator.is_waiting(stream.worker):
                return
        elif self._await_boundary(stream, waits=self.aggregator.has_applied):
            self.seen["waited for the step's end to be given parameters"] += 1
            return
        self.aggregator.catch_up(stream.worker)
        stream.stage = Stage.CAUGHT_UP

    def _answer_push(self, stream: Stream) -> None:
        push, worker, aggregator = _of(stream), stream.worker, self.aggregator
        record = self.ledger.record(worker.worker_id)
        receipt = record.receipt
        if receipt is None or receipt.sequence != push.attempt.sequence:
            receipt = Receipt(sequence=push.attempt.sequence, step=aggregator.step, outcome=Outcome.DROPPED_LATE)
            self.ledger.answer(worker, receipt)
        elif isinstance(aggregator, AsyncAggregator):
            receipt = record.receipt = replace(receipt, lag=aggregator.lag(worker))
            self.ledger.check_lag(worker, receipt.lag)
        stream.inbox.append(Message("receipt", receipt=receipt))
        stream.push, stream.stage = None, Stage.BETWEEN

    def _refuse(self, stream: Stream) -> None:
        stream.inbox.append(Message("refused"))
        stream.push, stream.stage = None, Stage.BETWEEN

    # --- what follows from decisions

    def takes(self, stream: Stream) -> bool:
        round_ = _of(stream).round
        return round_ is not None and round_.ends is None and self.aggregator.has_begun(stream.worker)

    def _remove(self, worker: Worker, *, lost: bool = False) -> None:
        member = self.members[worker]
        member.alive = False
        stays = lost and member.ready and self.policy.on_loss == "wait"
        if self.aggregator.has_begun(worker):
            ended = self.aggregator.has_ended(worker)
            self.seen["gone after its push" if ended else "gone in the middle of its push"] += 1
        self.membership.leave(worker)
        decisions = self.aggregator.lose(worker) if stays else self.aggregator.leave(worker)
        self.ledger.lead.leave(worker)
        try:
            self._settle(decisions, worker)
        finally:
            del self.members[worker]

    def _settle(self, decisions: Sequence[Decision], worker: Worker | None) -> None:
        self.ledger.settle(decisions, worker)
        discarded = any(isinstance(decision, Discard) for decision in decisions)
        if discarded and any(self.aggregator.owed(member) for member in self.aggregator.live):
            # Some have to push again: that takes them as long as it took them at first.
            for stream in self.streams:
                stream.waits_since = self.now


def _of(stream: Stream) -> Push:
    assert stream.push is not None
    return stream.push
