"""What a simulated job is made of."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Final, Literal

import torch

from optimd.server.aggregation import Abandon, Commit, Skip, SyncAggregator, TimeOut, Worker
from optimd.server.membership import Place
from optimd.server.receipts import Receipt
from optimd.server.staleness import AsyncAggregator

PERIOD_S: Final = 1.0
"""How often a job is told of time."""


@dataclass(frozen=True, kw_only=True)
class Policy:
    """What the workers of a simulated job agree on."""

    asynchronous: bool = False
    streaming: bool = False
    world_size: int | None = 2
    separate: bool = False
    backup_workers: int = 0
    on_loss: Literal["shrink", "wait"] = "shrink"
    max_staleness: int | None = None
    workers: str = "abc"
    """Their ids: a letter each."""
    buckets: int = 2
    whole_numbers: bool = True
    """Whether gradients are whole numbers, whose sum is the same in any order."""
    timeout_s: float = 4 * PERIOD_S
    lease_s: float = 3 * PERIOD_S

    def aggregator(self) -> SyncAggregator | AsyncAggregator:
        """What decides in such a job."""
        if self.asynchronous:
            return AsyncAggregator(max_staleness=self.max_staleness, streaming=self.streaming, timeout_s=self.timeout_s)
        return SyncAggregator(
            world_size=self.world_size,
            streaming=self.streaming,
            backup_workers=self.backup_workers,
            separate=self.separate,
            on_loss=self.on_loss,
            timeout_s=self.timeout_s,
        )


@dataclass(eq=False)
class Attempt:
    """The gradients that a process has computed for one step, and pushes until it is told what became of them."""

    process: str
    worker_id: str
    sequence: int
    base_step: int
    grads: dict[int, torch.Tensor]
    skips: bool = False
    """Whether they are not finite, so that none is pushed."""
    applied: Counter[int] = field(default_factory=Counter)
    """How often each bucket of it was part of an update."""
    fate: str = ""
    """What its process was told."""

    def __repr__(self) -> str:
        return f"push {self.sequence} of {self.process}"


@dataclass(frozen=True)
class Application:
    """One update of one bucket: whose gradients, as they were added up, and what their sum was divided by."""

    bucket: int
    attempts: tuple[Attempt, ...]
    divisor: int


@dataclass(eq=False)
class Round:
    """An open step: of all workers, or in an asynchronous job of one."""

    attempts: dict[Worker, Attempt] = field(default_factory=dict)
    held: dict[int, dict[Worker, Attempt]] = field(default_factory=dict)
    """What has been added up or is held apart, by bucket, in order of arrival."""
    ended: set[Worker] = field(default_factory=set)
    applications: list[Application] = field(default_factory=list)
    ends: Commit | Skip | Abandon | TimeOut | None = None

    def has_all_of(self, worker: Worker) -> bool:
        """Whether all that a worker has gradients for is held, or applied."""
        attempt = self.attempts[worker]
        return attempt.skips or all(
            bucket in attempt.applied or worker in self.held.get(bucket, ()) for bucket in attempt.grads
        )


@dataclass(frozen=True)
class Step:
    """A commit, as the job's history has it: contributors as worker_id and sequence, in order of rank."""

    contributors: tuple[tuple[str, int], ...]
    partial: tuple[tuple[str, int], ...]
    applications: tuple[Application, ...]


class Stage(Enum):
    """Where a stream's thread stands on the server."""

    ASKING = auto()
    ENTERED = auto()
    BETWEEN = auto()
    BEGINNING = auto()
    TAKING = auto()
    WAITING = auto()
    OVER = auto()
    CAUGHT_UP = auto()


@dataclass(eq=False)
class Push:
    """One push on one stream."""

    attempt: Attempt
    round: Round | None = None


@dataclass(frozen=True)
class Message:
    """What a process is sent: `ready`, `again`, `refused`, `receipt`, or why it is turned away."""

    kind: str
    receipt: Receipt | None = None
    buckets: frozenset[int] = frozenset()
    next_sequence: int = 0
    job_step: int = 0


@dataclass(eq=False)
class Stream:
    """A process's line to the job, and the thread that serves it."""

    process: str
    worker: Worker
    incarnation: int
    returns: bool
    since: float
    stage: Stage = Stage.ASKING
    alive: bool = True
    ready: bool = False
    newcomer: bool = False
    """Whether it waits for the end of a step that its process is not in, to be let in or to be given parameters."""
    clogged: bool = False
    sending: bool = False
    """Whether it is being sent what it does not take."""
    place: Place = field(default_factory=lambda: Place(0, 0.0))
    """Its process's place in the job, once it is in it."""
    push: Push | None = None
    waits_since: float = 0.0
    inbox: list[Message] = field(default_factory=list)


@dataclass(eq=False)
class Process:
    """A worker process."""

    name: str
    worker: Worker
    incarnation: int
    alive: bool = True
    stalled: bool = False
    cut_off: bool = False
    """Whether nothing of it reaches the server."""
    joined: bool = False
    stream: Stream | None = None
    attempt: Attempt | None = None
    to_send: list[int] | None = None
    """The buckets that it is about to push; None where it is not pushing."""
    next_sequence: int = 0
    job_step: int = 0

    @property
    def acts(self) -> bool:
        return self.alive and not self.stalled

    @property
    def line_is_down(self) -> bool:
        return self.stream is None or not self.stream.alive

    @property
    def may_begin(self) -> bool:
        between = self.stream is not None and self.stream.stage is Stage.BETWEEN
        return self.acts and not self.line_is_down and between and self.attempt is None and not self.inbox

    @property
    def is_sending(self) -> bool:
        taking = self.stream is not None and self.stream.stage is Stage.TAKING
        return self.acts and not self.line_is_down and taking and not self.inbox

    @property
    def inbox(self) -> list[Message]:
        return [] if self.stream is None else self.stream.inbox


@dataclass
class Record:
    """What the job remembers of a worker_id."""

    next_sequence: int = 0
    receipt: Receipt | None = None


class Store:
    """Parameters of two elements, a bucket each, and torch's Adam for each."""

    def __init__(self, buckets: int) -> None:
        self.values = [torch.full((2,), float(bucket), dtype=torch.float64) for bucket in range(buckets)]
        self._adams = [torch.optim.Adam([value], lr=0.1, foreach=False, fused=False) for value in self.values]

    def apply(self, bucket: int, grad: torch.Tensor) -> None:
        self.values[bucket].grad = grad
        self._adams[bucket].step()


class Lead:
    """How many pushes workers are ahead of those that came later, by count: the aggregator's clocks apart."""

    def __init__(self) -> None:
        self._pushes: Counter[Worker] = Counter()
        # In order of coming: what everybody had pushed by then.
        self._joined: dict[Worker, Counter[Worker]] = {}

    def join(self, worker: Worker) -> None:
        self._joined[worker] = Counter(self._pushes)

    def leave(self, worker: Worker) -> None:
        self._joined.pop(worker, None)

    def forget(self, left_behind: Iterable[Worker]) -> None:
        """Nobody waits for these, and they are given other clocks when they show themselves: they are not counted."""
        for worker in left_behind:
            self._joined.pop(worker, None)

    def count(self, worker: Worker) -> None:
        self._pushes[worker] += 1

    def of(self, worker: Worker) -> int:
        """How many more pushes it has completed than any that came after it, since that came."""
        order = list(self._joined)
        if worker not in self._joined:
            return 0
        later = order[order.index(worker) + 1 :]
        since = [(other, self._joined[other]) for other in later]
        ahead = [self._pushes[worker] - then[worker] - self._pushes[other] + then[other] for other, then in since]
        return max(ahead, default=0)


def mean(application: Application) -> torch.Tensor:
    """What a bucket is updated with."""
    first, *others = (attempt.grads[application.bucket] for attempt in application.attempts)
    total = first.clone()
    for grad in others:
        total += grad
    return total.div_(application.divisor)
