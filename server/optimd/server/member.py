"""What a job knows of one of its workers."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from optimd.server.accumulator import GradientAccumulator
from optimd.server.aggregation import Worker
from optimd.server.measures import Waits
from optimd.server.membership import Place
from optimd.server.receipts import Receipt
from optimd.server.sight import Sight
from optimd.wire.layout import Bucket


class HeldGradients:
    """What a worker has had accumulated for its next push. Guarded by its job's lock.

    The push uses it up, but it is kept until the push is over: the worker may be asked to push buckets again, and has
    not all of their gradients any more.
    """

    def __init__(self) -> None:
        self.micro = 0
        """How many accumulations and discards there have been since the last push."""
        self.spent = False
        """Whether a push has taken what was accumulated: if that push is refused, it is lost."""
        self._sums: dict[int, GradientAccumulator] = {}
        # The buckets of the accumulation that is under way, and those that the push has been given.
        self._added: set[int] = set()
        self._given: set[int] = set()

    @property
    def nbytes(self) -> int:
        """What the sums take."""
        # Whoever reads the metrics has not the lock.
        return sum(held.nbytes for held in tuple(self._sums.values()))

    @property
    def has_given(self) -> bool:
        """Whether a push is under way whose own gradients have been added to some of the sums."""
        return bool(self._given)

    def has_added(self, bucket_id: int) -> bool:
        """Whether the gradients of a bucket are there already in the accumulation that is under way."""
        return bucket_id in self._added

    def add(self, bucket: Bucket, present: Sequence[bool], payload: torch.Tensor, device: torch.device) -> None:
        """Adds the gradients of one bucket: once in an accumulation, however often they come."""
        if self.has_added(bucket.bucket_id):
            return
        self._added.add(bucket.bucket_id)
        held = self._sums.get(bucket.bucket_id)
        if held is None:
            held = self._sums[bucket.bucket_id] = GradientAccumulator(bucket, device)
        held.add(payload, present)

    def end_accumulation(self) -> None:
        """All gradients of one accumulation are added."""
        self.micro += 1
        self._added.clear()

    def take(self, bucket: Bucket, present: list[bool], payload: torch.Tensor) -> tuple[list[bool], torch.Tensor]:
        """What is held of a bucket and these gradients, added in this order. Good until something is added anew."""
        held = self._sums.get(bucket.bucket_id)
        if held is None or held.is_empty:
            return present, payload
        if bucket.bucket_id not in self._given:
            held.add(payload, present)
            self._given.add(bucket.bucket_id)
        return held.present, held.packed()

    def rest(self, is_pushed: Callable[[int], bool] | None = None) -> Iterator[tuple[int, list[bool], torch.Tensor]]:
        """What is held of buckets that are not pushed yet: id, slices and their gradients.

        Which are, `is_pushed` says; without it, those that `take` was asked for and those that this has given.
        """
        is_pushed = is_pushed or self._given.__contains__
        for bucket_id in sorted(self._sums):
            held = self._sums[bucket_id]
            if not is_pushed(bucket_id) and not held.is_empty:
                self._given.add(bucket_id)
                yield bucket_id, held.present, held.packed()

    def again(self, bucket_id: int) -> tuple[list[bool], torch.Tensor] | None:
        """What the push was given of a bucket, once more; None where nothing is held of it."""
        held = self._sums.get(bucket_id)
        return (held.present, held.packed()) if held is not None and bucket_id in self._given else None

    def sums(self) -> tuple[list[tuple[int, list[bool], torch.Tensor]], list[tuple[int, list[bool], torch.Tensor]]]:
        """What is held: of buckets that the accumulation under way has not reached yet, and of those that it has.

        Of each its id, which of its slices there are, and their sum, flat.
        """
        held = [(number, sums.present, sums.packed()) for number, sums in self._sums.items() if not sums.is_empty]
        return [each for each in held if each[0] not in self._added], [each for each in held if each[0] in self._added]

    def spend(self) -> None:
        """A push has taken all that was held."""
        self.spent = self.micro > 0

    def discard(self) -> None:
        """Forgets what is held."""
        self.spent = False
        self._added.clear()
        self._given.clear()
        for held in self._sums.values():
            held.clear()

    def keep(self) -> None:
        """The push is to be made again: what it was given is still held."""
        self.spent = False

    def settle(self) -> None:
        """A push is over: what it has used up is of no use any more, whatever became of it."""
        if self.spent or self._given:
            self._sums.clear()
            self._given.clear()

    def forget(self) -> None:
        """The push is over, or the buckets are others now: nothing is held, and counting starts anew."""
        self.micro = 0
        self.spent = False
        self._sums.clear()
        self._added.clear()
        self._given.clear()


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """Where a job and one of its workers stand between two steps."""

    job_step: int
    """How many steps are committed."""
    next_sequence: int
    """The number of the worker's next push."""
    load_count: int
    """How often a state_dict has been loaded."""
    layout_count: int
    """How often the parameters have been replaced."""
    receipt: Receipt | None
    """What became of the worker's last push."""
    held: frozenset[int] = frozenset()
    """The buckets of its open push that are there, of a worker that returns."""


@dataclass(slots=True, eq=False)
class Member:
    """One worker process on one stream. Guarded by its job's lock, but for the byte counts, which its stream owns."""

    worker: Worker
    incarnation: int
    groups: list[dict[str, Any]] = field(default_factory=list)
    """Its param_groups as far as the server knows: the job's when it joined, then what it sent. Of a process that
    returns, and is not in the job yet, what it says that it has told."""
    speaks: bool = False
    """Whether its hyperparameters count: the creator's do, a newcomer's from its first change on."""
    unchecked: bool = True
    """Whether its param_groups have changed since they were last checked."""
    steppable: bool = True
    """Whether they can be stepped with: else they do not count."""
    ready: bool = False
    """Whether it has its parameters: from JobReady on."""
    occupied: bool = False
    """Whether it is in the middle of a push or an accumulation, from its first message to the last answer."""
    reserved_bytes: int = 0
    """What it has on its way in, besides gradients."""
    alive: bool = True
    """Whether it may go on: its line is up, and nobody has taken its place."""
    superseded: bool = False
    """Whether another process has taken its `worker_id`."""
    lapsed: bool = False
    """Whether its lease has ended."""
    evicted: bool = False
    """Whether an operator has taken it out."""
    holds_place: bool = False
    """Whether it is awaited though its line may break: from its first JobReady on, or where it fills a kept place."""
    buffers_attached: bool = False
    bytes_received: int = 0
    bytes_sent: int = 0
    grad_scale: float | None = None
    """What the gradients of its open push were multiplied by."""
    staleness: int = 0
    """That of its open push, so far."""
    waits: Waits = field(default_factory=Waits)
    """How long it has waited, with a push of its own complete, for others and for what they made it wait for."""
    own_steps: int = 0
    """How many steps it has contributed to since it came."""
    sight: Sight = field(default_factory=Sight)
    """What it has seen of the job's values."""
    held: HeldGradients = field(default_factory=HeldGradients)
    """What it has had accumulated."""
    ahead_bytes: int = 0
    """What the gradients take that it sends ahead of its pushes, if it does."""
    place: Place = field(default_factory=lambda: Place(0, 0.0))
    """Its place in the job, once it is in it. Its stream notes there, without the lock, when it hears of it."""
    returned: Standing | None = None
    """Where it stood when it came back with everything, until it is told."""
    recovered: bool = False
    """Whether it was restored from disk: its options are those that it says it had when it returns."""
    rewound: bool = False
    """Whether it has returned to a job that is not as far as it had been told."""
    promised: frozenset[int] = frozenset()
    """The buckets of its open push that it was told are there, when it returned: it may leave them out."""
    cancel: Callable[[], object] = lambda: None
    """Ends its stream. May be called from any thread, and more than once."""

    @property
    def silent_s(self) -> float:
        """Since when nothing was heard of it, in seconds."""
        return max(0.0, time.monotonic() - self.place.heard_s)

    @property
    def held_bytes(self) -> int:
        """What is kept for it: gradients that it has had accumulated, or sends ahead of its pushes."""
        return self.held.nbytes + self.ahead_bytes

    @property
    def counts(self) -> bool:
        """Whether its hyperparameters have a say in a step that it contributes to."""
        return self.speaks and self.steppable

    def give(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """The worker has these param_groups from now on, whatever it had. They are copied."""
        self.groups = [dict(group) for group in groups]
        self.unchecked = True

    def take_over(self, former: Member) -> None:
        """The same process was `former` on a stream that broke: what it had given and seen is this one's."""
        self.worker = former.worker
        if not former.recovered:
            self.groups = former.groups
        self.speaks, self.unchecked = former.speaks, True
        self.holds_place, self.steppable = True, former.steppable
        self.grad_scale, self.staleness, self.own_steps = former.grad_scale, former.staleness, former.own_steps
        self.sight, self.held = former.sight, former.held
        self.sight.lose()
        former.alive = False


@dataclass(frozen=True, slots=True)
class Former:
    """What is kept of a process that was lost."""

    incarnation: int
    groups: list[dict[str, Any]]
    speaks: bool


@dataclass(slots=True)
class WorkerRecord:
    """What a job remembers of a worker_id across its processes. Guarded by the job's lock."""

    next_sequence: int = 0
    pushes: int = 0
    """How many have been committed."""
    dropped: int = 0
    """How many came too late."""
    receipt: Receipt | None = None
    """What became of its last push."""
    rank: int | None = None
    """The last that it had."""
    former: Former | None = None
    """Its last process, where that was lost: it may come back."""
    evicted: int | None = None
    """The incarnation of its last process that an operator has taken out: it may not."""


def speaker(members: Mapping[Worker, Member], contributors: tuple[Worker, ...]) -> Member | None:
    """The contributor whose hyperparameters hold for a step: the one of lowest rank that speaks, if any does."""
    for worker in contributors:
        member = members.get(worker)
        if member is not None and member.counts:
            return member
    return None


def disagree(members: Mapping[Worker, Member], contributors: tuple[Worker, ...]) -> bool:
    """Whether contributors that speak have different hyperparameters."""
    voices = [members[worker].groups for worker in contributors if worker in members and members[worker].counts]
    # A NaN, which a schedule may well arrive at, is not equal to itself; its text is.
    return any(groups != voices[0] and _text(groups) != _text(voices[0]) for groups in voices[1:])


def _text(groups: Sequence[Mapping[str, Any]]) -> str:
    return repr([sorted(group.items()) for group in groups])
