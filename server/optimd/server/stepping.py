"""Carrying out a step: adding gradients up, choosing hyperparameters, applying, committing.

The aggregator decides, the store computes; this stands between them. A `Stepper` belongs to one job and is only
called with the job's lock held.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from optimd.server import clipping, update
from optimd.server.accumulator import GradientAccumulator, SeparateGradients
from optimd.server.aggregation import Abandon, ApplyBucket, Commit, Decision, Discard, Skip, TakeBack, TimeOut, Worker
from optimd.server.errors import LimitExceededError, NonFiniteGradientError, StepTimeoutError, UpdateRefusedError
from optimd.server.journal import JobJournal
from optimd.server.member import Member, disagree, speaker
from optimd.server.pushed import PushedContent
from optimd.server.sight import Changes
from optimd.server.store import Store
from optimd.server.transfers import Transfers
from optimd.wire.layout import Bucket

_log = logging.getLogger(__name__)

_NAMED_IN_LOG = 10
_MOST_NAMED = 100


@dataclass(slots=True)
class Round:
    """One step of a job, from its first push to its end. Guarded by the job's lock.

    `applied` only grows, so that a stream may read it without the lock up to a length that it was told under it.
    """

    number: int = 0
    """Its number in the journal, once it is settled."""
    applying: int | None = None
    """Where the journal has the bucket that is being applied."""
    groups: list[dict[str, Any]] = field(default_factory=list)
    """The step's hyperparameters, from its first completed bucket on."""
    settled: bool = False
    spoken: bool = False
    """Whether they are a contributor's, and hold for the job from this step on."""
    pushed: PushedContent = field(default_factory=PushedContent)
    """What its workers changed outside of steps, in place from the first update on."""
    replaced: dict[int, Worker] = field(default_factory=dict)
    """The parameters whose values were put in place, and whose they are."""
    applied: list[tuple[int, list[bool]]] = field(default_factory=list)
    """The buckets of which a worker has to hear, and which of their slices. One may come twice."""
    clock: int = 0
    """The last change of values that is in it, once it is committed."""
    version: int = 0
    """The store's, then: as long as that stays, its values do."""
    commit: Commit | None = None
    skipped: Skip | None = None
    """Set where the round ended without a commit and its pushes are answered nevertheless."""
    grad_norm: float | None = None
    """The norm of the reduced gradient before it was clipped, where the job clips."""
    disagreed: bool = False
    abandoned: bool = False
    taken_back: bool = False
    """Whether it is abandoned though some of it has been applied, and the job is to go back to before it."""
    failure: Exception | None = None

    @property
    def pushed_differently(self) -> tuple[int, ...]:
        """The first of the parameters of which workers pushed different values or states."""
        return tuple(sorted(self.pushed.differing)[:_MOST_NAMED])

    @property
    def is_answered(self) -> bool:
        """Whether its pushes have become what their receipts say."""
        return self.commit is not None or self.skipped is not None

    @property
    def is_over(self) -> bool:
        """Whether nothing more will happen in it."""
        return self.is_answered or self.abandoned or self.failure is not None


class Stepper:
    """Turns decisions into updates: one round at a time.

    Args:
        job: The job's name, for the log.
        store: The job's tensors.
        members: The job's live workers: the job's own dict, of which this sees every change.
        groups: Gives the job's param_groups as they hold.
        changes: The job's account of what has changed.
        journal: The job's.
        atomic: Whether a round counts only if it is committed.
        owned: Whether a round is one worker's push.
        settle_torn: Brings parameters of which some slices have had an update and others have not to one step; gives
            their indices.
        mean: Whether contributions are averaged or summed.
        separate: Whether contributions are held apart until they are reduced.
        max_grad_norm: What norm a step's gradient is scaled down to. Needs atomic steps.
        nonfinite: What becomes of a step whose gradient is not finite. "skip" and "error" need atomic steps.
    """

    def __init__(
        self,
        job: str,
        store: Store,
        members: Mapping[Worker, Member],
        *,
        groups: Callable[[], Sequence[dict[str, Any]]],
        changes: Changes,
        journal: JobJournal,
        settle_torn: Callable[[], list[int]],
        mean: bool,
        atomic: bool = False,
        owned: bool = False,
        separate: bool = False,
        max_grad_norm: float | None = None,
        nonfinite: Literal["allow", "skip", "error"] = "allow",
    ) -> None:
        self._job = job
        self._store = store
        self._members = members
        self._groups = groups
        self._changes = changes
        self._journal = journal
        self._atomic = atomic
        self._owned = owned
        self._settle_torn = settle_torn
        self._mean = mean
        self._is_separate = separate
        self._max_grad_norm = max_grad_norm
        self._nonfinite = nonfinite
        self._round: Round | None = None
        self._accumulators: dict[int, GradientAccumulator] = {}
        # Where contributions are held apart, until a bucket of them is complete.
        self._separate: dict[int, SeparateGradients] = {}
        # Complete buckets whose kernel needs whole parameters: applied with the step's last push.
        self._deferred: set[int] = set()
        self._transfers = Transfers(store.device)
        # Of buckets that are about to be applied: their gradients on the host, once they are there.
        self._copies: dict[int, Callable[[], torch.Tensor]] = {}

    def restore(self, round_: Round, deferred: Mapping[int, tuple[Sequence[bool], torch.Tensor]]) -> None:
        """Goes on in a streamed round that has been applied in part.

        Args:
            round_: What it has come to.
            deferred: The buckets that are complete and wait for the others of their parameters, with which of their
                slices have a gradient, and these, reduced, flat.
        """
        self._round = round_
        for bucket_id, (present, gradient) in deferred.items():
            accumulator = self._accumulator(self._store.buckets[bucket_id])
            accumulator.add(gradient, present)
            accumulator.reduced(1)
            self._deferred.add(bucket_id)

    def deferred(self) -> Iterator[tuple[int, int, torch.Tensor]]:
        """The buckets that are complete and wait for the others of their parameters: round, id, reduced gradient."""
        if self._round is not None:
            for bucket_id in sorted(self._deferred):
                yield self._round.number, bucket_id, self._accumulators[bucket_id].packed()

    def open_round(self) -> Round:
        """The open step's round; a new one if no push has begun it yet."""
        if self._round is None:
            self._round = Round()
        return self._round

    def contribute(
        self,
        worker: Worker,
        bucket: Bucket,
        present: list[bool],
        payload: torch.Tensor,
        decisions: Sequence[Decision],
        *,
        grad_scale: float | None = None,
    ) -> None:
        """Takes one worker's gradients of a bucket and carries out what they led to.

        Args:
            worker: Whose they are.
            bucket: The bucket.
            present: For each of its slices whether there is a gradient.
            payload: The gradients, flat, on the CPU. Only read, and not kept.
            decisions: What the aggregator makes of them.
            grad_scale: What they were multiplied by, if by anything.

        Raises:
            UpdateRefusedError: torch refuses the update.
        """
        sole = any(isinstance(decision, ApplyBucket) and decision.contributors == (worker,) for decision in decisions)
        with self._failing_together():
            if sole and self._splits_freely(bucket, (worker,)):
                # Nothing to add up: the update reads the gradient where it was received.
                lengths = [piece.length for piece, here in zip(bucket.slices, present, strict=True) if here]
                round_ = self._settle((worker,))
                # It is on its way to the device while it is written down.
                there = self._transfers.to_device(payload)
                round_.applying = self._journal.bucket_applied(
                    round_.number, bucket, present, (worker,), lambda: payload, grad_scale=grad_scale
                )
                self._apply(round_, bucket, present, torch.split(there, lengths), grad_scale=grad_scale)
                return
            if grad_scale is not None:
                payload = _unscaled(payload, grad_scale)
            if self._is_separate:
                self._separated(bucket).add(worker, payload, present)
            else:
                self._accumulator(bucket).add(payload, present)
        self.carry_out(decisions)

    def carry_out(self, decisions: Sequence[Decision]) -> Round | None:
        """Carries out decisions in their order.

        Returns:
            The round that they ended, if they ended one.

        Raises:
            UpdateRefusedError: torch refuses an update; the round has failed for all its workers.
            NonFiniteGradientError: a gradient is not finite and the job refuses that; the round has failed likewise.
        """
        round_ = self._round
        if round_ is None or not decisions:
            return None
        with self._failing_together():
            # First, whatever the order: a step is looked at as a whole without what does not count.
            for decision in decisions:
                if isinstance(decision, Discard):
                    self._discard(decision.worker, decision.buckets)
            examined = self._examined(round_, decisions)
            for position, decision in enumerate(examined):
                match decision:
                    case ApplyBucket(bucket_id=bucket_id, contributors=contributors):
                        self._begin_copy(examined[position : position + 2])
                        self._apply_accumulated(self._store.buckets[bucket_id], contributors)
                    case Commit():
                        self._commit(round_, decision)
                    case Skip():
                        self._skip(round_, decision)
                    case Abandon(lost=lost):
                        self._abandon(round_, lost)
                    case TakeBack():
                        round_.abandoned = round_.taken_back = True
                        self._forget()
                    case TimeOut(missing=missing):
                        self._time_out(missing)
        return round_ if round_.is_over else None

    def _examined(self, round_: Round, decisions: Sequence[Decision]) -> Sequence[Decision]:
        """Looks at a complete step's whole gradient, if the job asks for that, before any of it is applied.

        Returns:
            The decisions, whose buckets are clipped now; or that the step is skipped, in their place.

        Raises:
            NonFiniteGradientError: the gradient is not finite and the job refuses that.
        """
        commits = [decision for decision in decisions if isinstance(decision, Commit)]
        if not commits or (self._max_grad_norm is None and self._nonfinite == "allow"):
            return decisions
        for decision in decisions:
            if isinstance(decision, ApplyBucket):
                self._reduced(self._store.buckets[decision.bucket_id], decision.contributors)
        grads = dict(self._whole_gradients())
        # One look at all of them, since it waits for the device; which one it is matters only then.
        if self._nonfinite != "allow" and not clipping.is_finite([piece for each in grads.values() for piece in each]):
            at_fault = next(index for index, pieces in grads.items() if not clipping.is_finite(pieces))
            return [self._refuse_nonfinite(commits[0], at_fault)]
        if self._max_grad_norm is not None:
            norm = clipping.total_norm(list(grads.values()))
            round_.grad_norm = float(norm)
            clipping.clip_(list(grads.values()), self._max_grad_norm, norm)
        return decisions

    def _whole_gradients(self) -> Iterator[tuple[int, list[torch.Tensor]]]:
        """The reduced gradients, as they lie in the accumulators: by parameter that has one its slices'."""
        for index, parameter in enumerate(self._store.parameters):
            places = [
                (self._accumulators.get(bucket_id), position) for bucket_id, position in self._store.places(index)
            ]
            if any(accumulator is not None and accumulator.present[position] for accumulator, position in places):
                pieces = [
                    self._accumulator(self._store.buckets[bucket_id]).slice(position)
                    for bucket_id, position in self._store.places(index)
                ]
                # torch scales a 0-dim tensor by rules of promotion of its own.
                yield index, pieces if parameter.shape else [pieces[0].view(())]

    def _refuse_nonfinite(self, commit: Commit, index: int) -> Skip:
        title = self._store.parameters[index].title(index)
        problem = f"the gradient of {title} for step {commit.step} has an infinite element or a NaN"
        if self._nonfinite == "error":
            raise NonFiniteGradientError(f"{problem}; nothing was applied")
        _log.warning("job %s: %s; the step is skipped", self._job, problem)
        return Skip(commit.step - 1, tuple(sorted((*commit.contributors, *commit.skipped))), commit.late)

    def _reduced(self, bucket: Bucket, contributors: tuple[Worker, ...]) -> list[torch.Tensor]:
        separate = self._separate.get(bucket.bucket_id)
        known = self._accumulators.get(bucket.bucket_id)
        # Once: what is left apart then is of workers that came too late.
        if separate is not None and not separate.is_empty and not (known is not None and known.is_reduced):
            self._accumulators[bucket.bucket_id] = separate.add_up(contributors)
        return self._accumulator(bucket).reduced(len(contributors) if self._mean else 1)

    def _apply_accumulated(self, bucket: Bucket, contributors: tuple[Worker, ...]) -> None:
        grads = self._reduced(bucket, contributors)
        accumulator = self._accumulator(bucket)
        round_ = self._settle(contributors)
        round_.applying = self._journal.bucket_applied(
            round_.number,
            bucket,
            accumulator.present,
            contributors,
            self._copies.pop(bucket.bucket_id, accumulator.packed),
            reduced=True,
        )
        if self._splits_freely(bucket, contributors):
            self._apply(round_, bucket, accumulator.present, grads)
            accumulator.clear()
        else:
            round_.applying = None
            self._journal.buckets_belong_together()
            self._deferred.add(bucket.bucket_id)

    def _begin_copy(self, decisions: Sequence[Decision]) -> None:
        """Has the gradients of buckets that are about to be applied copied to the host, to be written down there.

        The next one's too: it is copied while this one is written.
        """
        if not self._journal.is_kept:
            return
        for decision in decisions:
            if isinstance(decision, ApplyBucket) and decision.bucket_id not in self._copies:
                bucket = self._store.buckets[decision.bucket_id]
                self._reduced(bucket, decision.contributors)
                self._copies[bucket.bucket_id] = self._transfers.to_host(self._accumulator(bucket).packed())

    def _apply(
        self,
        round_: Round,
        bucket: Bucket,
        present: Sequence[bool],
        grads: Sequence[torch.Tensor],
        *,
        grad_scale: float | None = None,
    ) -> None:
        with _torchs_errors():
            self._store.apply(bucket, present, grads, round_.groups[bucket.group], grad_scale=grad_scale)
        round_.applying = None
        self._tell(round_, bucket.bucket_id, list(present))

    def _tell(self, round_: Round, bucket_id: int, present: list[bool]) -> None:
        """Workers have to hear of a bucket."""
        self._changes.mark(bucket_id)
        round_.applied.append((bucket_id, present))

    def _apply_deferred(self, round_: Round) -> None:
        """Steps whole parameters with the gradients in the accumulators of their buckets."""
        if self._deferred:
            self._journal.buckets_belong_together()
        indices = {piece.parameter for bucket_id in self._deferred for piece in self._store.buckets[bucket_id].slices}
        for index in sorted(indices):
            places = [
                (self._accumulator(self._store.buckets[bucket_id]), position)
                for bucket_id, position in self._store.places(index)
            ]
            if any(accumulator.present[position] for accumulator, position in places):
                grads = [accumulator.slice(position) for accumulator, position in places]
                group = self._store.buckets[self._store.places(index)[0][0]].group
                with _torchs_errors():
                    self._store.apply_whole(index, grads, round_.groups[group])
        for bucket_id in sorted(self._deferred):
            self._tell(round_, bucket_id, self._accumulators[bucket_id].present)
            self._accumulators[bucket_id].clear()
        self._deferred.clear()

    def _commit(self, round_: Round, commit: Commit) -> None:
        # A step without a single gradient has settled nothing yet.
        self._settle(commit.contributors)
        self._apply_deferred(round_)
        self._spread_replaced(round_)
        round_.disagreed = disagree(self._members, commit.contributors)
        if commit.partial_contributors:
            self._settle_torn_parameters(commit)
        # What is held of pushes that came too late.
        self._clear_separate()
        round_.commit = commit
        self._round = None

    def _skip(self, round_: Round, skip: Skip) -> None:
        # What workers changed outside of the step holds whatever becomes of its gradients.
        self._settle(skip.pushes)
        self._spread_replaced(round_)
        round_.skipped = skip
        self._forget()

    def _discard(self, worker: Worker, buckets: Sequence[int]) -> None:
        """Takes an unfinished push out of the step. Where gradients are added up, that takes out everybody's."""
        self.forget_content(worker)
        if buckets:
            _log.warning(
                "job %s: rank %d did not complete its push: nothing of it is in the step", self._job, worker.rank
            )
        for bucket_id in buckets:
            if self._is_separate:
                self._separate[bucket_id].discard(worker)
            else:
                self._accumulators[bucket_id].clear()

    def _time_out(self, missing: Sequence[Worker]) -> None:
        ranks = ", ".join(str(worker.rank) for worker in missing)
        self._fail(
            StepTimeoutError(
                f"job {self._job!r}: rank {ranks} did not come in time (timeout_s), and the job does not step without "
                "it; nothing was applied. Start it again, and call step() again to go on waiting"
            )
        )

    def _spread_replaced(self, round_: Round) -> None:
        """Has every worker hear of values that one of them pushed and that no update has sent on."""
        if self._members.keys() <= set(round_.replaced.values()) and len(self._members) == 1:
            # The only one there is has brought them.
            return
        sent = {
            (bucket_id, position)
            for bucket_id, present in round_.applied
            for position, here in enumerate(present)
            if here
        }
        left: dict[int, set[int]] = {}
        for index in round_.replaced:
            for place in self._store.places(index):
                if place not in sent:
                    left.setdefault(place[0], set()).add(place[1])
        for bucket_id in sorted(left):
            count = len(self._store.buckets[bucket_id].slices)
            self._tell(round_, bucket_id, [position in left[bucket_id] for position in range(count)])

    def _settle_torn_parameters(self, commit: Commit) -> None:
        """Brings parameters to one step of which a lost worker's push, and nobody else's, reached some slices only."""
        torn = self._settle_torn()
        if not torn:
            return
        names = [self._store.parameters[index].title(index) for index in torn[:_NAMED_IN_LOG]]
        if len(torn) > _NAMED_IN_LOG:
            names.append(f"{len(torn) - _NAMED_IN_LOG} more")
        _log.warning(
            "job %s: step %d was closed as it stood when rank %s was lost; partly stepped: %s",
            self._job,
            commit.step,
            ", ".join(str(worker.rank) for worker in commit.partial_contributors),
            ", ".join(names),
        )

    def _abandon(self, round_: Round, lost: tuple[Worker, ...]) -> None:
        held: list[GradientAccumulator | SeparateGradients] = [*self._accumulators.values(), *self._separate.values()]
        if round_.applied or not all(gradients.is_empty for gradients in held):
            _log.warning(
                "job %s: every worker of the open step was lost (rank %s); its gradients are discarded",
                self._job,
                ", ".join(str(worker.rank) for worker in lost),
            )
        round_.abandoned = True
        self._journal.round_ended(round_.number)
        self._forget()

    def forget_content(self, worker: Worker) -> None:
        """A worker is lost whose push is not complete: nothing of what it changed outside of steps is put in place."""
        if self._round is not None and not self._round.settled:
            self._round.pushed.forget(worker)

    @contextmanager
    def _failing_together(self) -> Iterator[None]:
        """What goes wrong in a round ends it for all its workers."""
        try:
            yield
        except Exception as error:
            self._fail(error)
            raise

    def _fail(self, error: Exception) -> None:
        """Ends the round for all its workers. Buckets that were applied before stay so."""
        if self._round is not None:
            self._round.failure = error
            self._journal.round_ended(self._round.number, unapplied=self._round.applying)
            self._settle_torn()
            self._forget()

    def _forget(self) -> None:
        for accumulator in self._accumulators.values():
            accumulator.clear()
        self._clear_separate()
        self._deferred.clear()
        self._copies.clear()
        self._round = None

    def _clear_separate(self) -> None:
        for separate in self._separate.values():
            separate.clear()

    def _settle(self, contributors: tuple[Worker, ...]) -> Round:
        """Settles the step's hyperparameters, and installs what was pushed besides gradients.

        The hyperparameters are those of the lowest rank in its first completed bucket.
        """
        round_ = self._round
        if round_ is None:
            raise RuntimeError("no push has begun a step")
        if not round_.settled:
            round_.settled = True
            voice = speaker(self._members, contributors)
            round_.spoken = voice is not None
            # An asynchronous job may have groups that this worker has not added yet.
            spoken = [] if voice is None else voice.groups
            round_.groups = [dict(group) for group in (*spoken, *self._groups()[len(spoken) :])]
            round_.number = self._journal.round_settled(
                round_.groups,
                atomic=self._atomic,
                spoken=round_.spoken,
                owner=contributors[0] if self._owned else None,
            )
            if round_.pushed:
                staged, round_.replaced = round_.pushed.merged()
                self._journal.content_brought(round_.number, staged, self._store)
                self._store.install(staged)
                for index in round_.replaced:
                    for bucket_id, _ in self._store.places(index):
                        self._changes.mark(bucket_id)
        return round_

    def _splits_freely(self, bucket: Bucket, contributors: tuple[Worker, ...]) -> bool:
        options = self._settle(contributors).groups[bucket.group]
        return update.is_split_invariant(options, bucket.server_dtype)

    def _separated(self, bucket: Bucket) -> SeparateGradients:
        separate = self._separate.get(bucket.bucket_id)
        if separate is None:
            separate = self._separate[bucket.bucket_id] = SeparateGradients(bucket, self._store.device)
        used = self._accumulators.get(bucket.bucket_id)
        if used is not None and used.is_empty:
            separate.take_back(self._accumulators.pop(bucket.bucket_id))
        return separate

    def _accumulator(self, bucket: Bucket) -> GradientAccumulator:
        accumulator = self._accumulators.get(bucket.bucket_id)
        if accumulator is None:
            accumulator = GradientAccumulator(bucket, self._store.device)
            self._accumulators[bucket.bucket_id] = accumulator
        return accumulator


def _unscaled(payload: torch.Tensor, grad_scale: float) -> torch.Tensor:
    """Gradients divided by what they were multiplied by, in float32 or wider: a narrower quotient could underflow."""
    wide = torch.promote_types(payload.dtype, torch.float32)
    return payload.to(wide) / torch.tensor(grad_scale, dtype=torch.float32)


@contextmanager
def _torchs_errors() -> Iterator[None]:
    """Tells a refusal, which is the worker's business, from a device that is full, which is the operator's."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise LimitExceededError(f"the server's device has no memory left: {error}") from error
    except RuntimeError as error:
        raise UpdateRefusedError(f"torch refused the update: {error}") from error
