"""What becomes of gradients in a simulated job: its store, its history, its receipts, and an account of its own.

The account knows whose gradients are held, complete, applied and answered without asking the aggregator, whose
decisions it compares with that. What contradicts it is an `AssertionError`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from optimd.server.aggregation import (
    Abandon,
    ApplyBucket,
    Commit,
    Decision,
    Discard,
    Release,
    Skip,
    SyncAggregator,
    TimeOut,
    Worker,
)
from optimd.server.receipts import Outcome, Receipt
from optimd.server.staleness import AsyncAggregator
from tests.unit.simulated_parts import Application, Lead, Policy, Record, Round, Step, Store, mean


class Ledger:
    """Carries decisions out and keeps account."""

    def __init__(self, policy: Policy, aggregator: SyncAggregator | AsyncAggregator) -> None:
        self.policy = policy
        self.aggregator = aggregator
        # As in a job, where nothing is lost by it.
        self.separate = policy.separate or policy.backup_workers > 0
        self.records: dict[str, Record] = {}
        self.answers: dict[tuple[str, int], Receipt] = {}
        self.history: list[Step] = []
        self.applications: list[Application] = []
        self.store = Store(policy.buckets)
        self.seen: Counter[str] = Counter()
        self.lead = Lead()
        self._rounds: dict[Worker | None, Round] = {}

    def record(self, worker_id: str) -> Record:
        return self.records.setdefault(worker_id, Record())

    def open_round(self, worker: Worker) -> Round:
        """The open step that a worker's push is in."""
        return self._rounds.setdefault(worker if self.policy.asynchronous else None, Round())

    def settle(self, decisions: Sequence[Decision], worker: Worker | None) -> None:
        for decision in decisions:
            self.seen[type(decision).__name__] += 1
            if isinstance(decision, Release):
                for released in decision.workers:
                    self._check_release(released)
        key = worker if self.policy.asynchronous else None
        round_ = self._rounds.get(key)
        if round_ is None:
            assert all(isinstance(decision, Release) for decision in decisions), f"{decisions} of no step"
            return
        for decision in decisions:
            if isinstance(decision, Discard):
                self._discard(round_, decision)
        for decision in decisions:
            match decision:
                case ApplyBucket(bucket_id=bucket, contributors=contributors):
                    self._apply(round_, bucket, contributors)
                case Commit() | Skip() | Abandon() | TimeOut():
                    assert round_.ends is None, f"a step ended twice: {round_.ends}, {decision}"
                    round_.ends = decision
        if round_.ends is not None:
            del self._rounds[key]
            self._close(round_, round_.ends)

    def _discard(self, round_: Round, decision: Discard) -> None:
        round_.ended.discard(decision.worker)
        round_.attempts.pop(decision.worker, None)
        for bucket in decision.buckets:
            holders = round_.held.pop(bucket)
            assert decision.worker in holders
            if self.separate:
                round_.held[bucket] = {w: attempt for w, attempt in holders.items() if w != decision.worker}
            else:
                round_.ended -= holders.keys()

    def _apply(self, round_: Round, bucket: int, contributors: tuple[Worker, ...]) -> None:
        assert contributors == tuple(sorted(set(contributors)))
        assert all(applied.bucket != bucket for applied in round_.applications), f"bucket {bucket} is applied twice"
        held = round_.held.pop(bucket, {})
        givers = [worker for worker in contributors if worker in held] if self.separate else list(held)
        assert set(givers) <= set(contributors), f"bucket {bucket} has gradients of others than {contributors}"
        assert givers, f"nobody has given anything of bucket {bucket}"
        for worker in set(contributors) - set(givers):
            nothing_to_give = bucket not in round_.attempts[worker].grads and worker in round_.ended
            assert nothing_to_give, f"bucket {bucket} is applied without {round_.attempts[worker]}"
        attempts = tuple(held[worker] for worker in givers)
        for attempt in attempts:
            attempt.applied[bucket] += 1
            assert attempt.applied[bucket] == 1, f"bucket {bucket} of {attempt} counts twice"
        application = Application(bucket, attempts, len(contributors))
        round_.applications.append(application)
        self.applications.append(application)
        self.store.apply(bucket, mean(application))

    def _close(self, round_: Round, ends: Commit | Skip | Abandon | TimeOut) -> None:
        if not isinstance(ends, Commit):
            assert not round_.applications, f"{ends}, and some of the step is applied"
        match ends:
            case Commit():
                self._check_commit(round_, ends)
                self.history.append(
                    Step(
                        self._named(ends.contributors),
                        self._named(ends.partial_contributors),
                        tuple(round_.applications),
                    )
                )
                assert len(self.history) == ends.step == self.aggregator.step
                outcome = Outcome.APPLIED if len(ends.contributors) == 1 else Outcome.MERGED
                for worker in ends.contributors:
                    self.answer(worker, self._receipt(worker, ends, outcome))
                for worker in ends.skipped:
                    self.answer(worker, self._receipt(worker, ends, Outcome.SKIPPED_NONFINITE))
            case Skip(pushes=pushes):
                for worker in pushes:
                    assert round_.attempts[worker].skips
                    self.answer(worker, self._receipt(worker, ends, Outcome.SKIPPED_NONFINITE))

    def _check_commit(self, round_: Round, commit: Commit) -> None:
        """It names those whose gradients are in it, and all of theirs, by this job's own account."""
        gave = {worker for worker, attempt in round_.attempts.items() if attempt.applied}
        whole = {worker for worker in round_.ended if not round_.attempts[worker].skips}
        partial = gave - whole
        assert set(commit.contributors) == gave | whole, f"{commit}: {gave} gave, {whole} are complete"
        assert set(commit.partial_contributors) == partial, f"{commit}: {partial} are partial"
        for worker in whole:
            attempt = round_.attempts[worker]
            assert attempt.applied.keys() == attempt.grads.keys(), f"{commit} has not all of {attempt}"
        assert set(commit.skipped) == round_.ended - whole
        if not self.separate:
            assert not any(round_.held.values()), f"gradients of {round_.held} are left for the next step"

    def _named(self, workers: Iterable[Worker]) -> tuple[tuple[str, int], ...]:
        return tuple((worker.worker_id, self.record(worker.worker_id).next_sequence) for worker in workers)

    def _receipt(self, worker: Worker, ends: Commit | Skip, outcome: Outcome) -> Receipt:
        return Receipt(
            sequence=self.record(worker.worker_id).next_sequence,
            step=ends.step,
            outcome=outcome,
            contributors=tuple(w.rank for w in ends.contributors) if isinstance(ends, Commit) else (),
            partial_contributors=tuple(w.rank for w in ends.partial_contributors) if isinstance(ends, Commit) else (),
        )

    def answer(self, worker: Worker, receipt: Receipt) -> None:
        record = self.record(worker.worker_id)
        name = f"push {receipt.sequence} of {worker.worker_id}"
        assert (worker.worker_id, receipt.sequence) not in self.answers, f"{name} is answered twice"
        assert receipt.sequence == record.next_sequence
        self.answers[worker.worker_id, receipt.sequence] = receipt
        self.seen[receipt.outcome.name] += 1
        self.seen["partial"] += worker.rank in receipt.partial_contributors
        record.next_sequence, record.receipt = receipt.sequence + 1, receipt

    # --- how far ahead workers are

    def _check_release(self, worker: Worker) -> None:
        aggregator, bound = self.aggregator, self.policy.max_staleness
        assert isinstance(aggregator, AsyncAggregator)
        self.check_lag(worker, aggregator.lag(worker))
        lead = self.lead.of(worker)
        assert bound is None or lead <= bound, f"{worker} is given parameters {lead} pushes ahead of another"
        self.seen[f"released at lag {aggregator.lag(worker)}"] += 1

    def check_lag(self, worker: Worker, lag: int) -> None:
        bound = self.policy.max_staleness
        assert bound is None or lag <= bound, f"{worker} is given parameters at a lag of {lag}"
