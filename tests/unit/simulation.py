"""Simulated workers of a `SimulatedJob`: what they may do, and what has to be true whatever they do.

An event is a line of text: `push a0 1` has process `a0`, the first of worker `a`, push bucket 1.

Time passes with each event, and the job is told of it once a period. While it passes, threads of the server that may go
on do so, and workers that are neither stalled nor dead say that they are alive; they do nothing else by themselves.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Final

import torch

from optimd.server.aggregation import Worker
from optimd.server.receipts import Outcome, Receipt
from tests.unit.simulated_job import SimulatedJob
from tests.unit.simulated_parts import PERIOD_S, Application, Attempt, Policy, Process, Stage, Stream, mean

EVENT_S: Final = PERIOD_S / 16
_MOST_PROCESSES: Final = 4
_RANKS: Final = {"a": 0, "b": 1, "c": 2, "d": 0}
"""`d` is another worker in the place of `a`."""

_WAITING_STAGES: Final = frozenset(Stage) - {Stage.BETWEEN, Stage.TAKING}


class Simulation:
    """Workers and their job."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.job = SimulatedJob(policy)
        self.seen = self.job.seen
        self.processes: dict[str, Process] = {}
        self.script: list[str] = []
        # What processes have begun to push, in that order, by worker_id and sequence.
        self._produced: dict[tuple[str, int], list[Attempt]] = {}
        self._count = 0
        # Since something else has happened.
        self._in_vain: set[str] = set()

    # --- events

    def happen(self, event: str) -> None:
        """Has a possible event happen.

        Raises:
            AssertionError: what it leads to is wrong.
        """
        self.script.append(event)
        kind, *rest = event.split()
        name, *arguments = rest
        if kind == "wait":
            self._pass(int(name) * PERIOD_S)
            return
        getattr(self, f"_{kind}")(name, *arguments)
        process = self.processes[name]
        if process.acts and not process.cut_off:
            self.job.hear(process.worker, process.incarnation)
        moved = self._go_on(process)
        self._in_vain = self._in_vain | {event} if kind == "serve" and not moved else set()
        self._pass(EVENT_S)

    def options(self, kind: str) -> list[str]:
        """The events of a kind that can happen now."""
        processes = self.processes.values()
        if kind == "wait":
            timeout, lease = (round(seconds / PERIOD_S) for seconds in (self.policy.timeout_s, self.policy.lease_s))
            return ["wait 1", "wait 2", f"wait {timeout}", f"wait {timeout + lease}"]
        if kind in {"start", "claim"}:
            return self._starts(claims=kind == "claim")
        if kind == "begin":
            return [f"begin {p.name} {what}" for p in processes if p.may_begin for what in self._contents(p)]
        if kind == "push":
            return [f"push {p.name} {bucket}" for p in processes if p.is_sending for bucket in p.to_send or ()]
        may: dict[str, Callable[[Process], bool]] = {
            "end": lambda p: p.is_sending and not p.to_send,
            "rush": lambda p: p.is_sending,
            "serve": lambda p: p.stream is not None and p.stream.alive and p.stream.stage in _WAITING_STAGES,
            "break": lambda p: p.acts and not p.line_is_down,
            "cut": lambda p: p.acts and not p.cut_off,
            "die": lambda p: p.alive,
            "stall": lambda p: p.acts,
            "wake": lambda p: p.alive and p.stalled,
            "return": lambda p: p.acts and p.line_is_down,
            "leave": lambda p: p.acts and not p.line_is_down,
            "take_back": lambda p: p.is_sending and self._has_brought_nothing(p),
            "clog": lambda p: p.alive and not p.line_is_down and p.stream is not None and not p.stream.clogged,
            "unclog": lambda p: p.alive and not p.line_is_down and p.stream is not None and p.stream.clogged,
        }
        options = [f"{kind} {process.name}" for process in processes if may[kind](process)]
        return [option for option in options if option not in self._in_vain]

    def is_possible(self, event: str) -> bool:
        """Whether an event can happen now."""
        kind = event.split(maxsplit=1)[0]
        return kind == "wait" or event in self.options(kind) or (kind == "start" and event in self.options("claim"))

    def _starts(self, *, claims: bool) -> list[str]:
        """The next processes of workers that have none that is well; or of those that have."""
        starts = []
        for worker_id in self.policy.workers:
            earlier = [process for process in self.processes.values() if process.worker.worker_id == worker_id]
            is_well = any(process.acts and not process.line_is_down for process in earlier)
            if len(earlier) < _MOST_PROCESSES and is_well == claims:
                starts.append(f"start {worker_id}{len(earlier)}")
        return starts

    def _contents(self, process: Process) -> list[str]:
        """What a push may consist of: which buckets; none; or gradients that are not finite."""
        again = self._again(process)
        if again is not None:
            return ["nan" if again.skips else "".join(map(str, again.grads)) or "-"]
        every = "".join(map(str, range(self.policy.buckets)))
        return [every, every, every, every[:-1], every[1:], "-", "nan"]

    def _again(self, process: Process) -> Attempt | None:
        """A process in whose place a lost one is awaited computes the same gradients as that, from the same data."""
        produced = self._produced.get((process.worker.worker_id, process.next_sequence))
        return produced[-1] if produced and self.policy.on_loss == "wait" else None

    def _has_brought_nothing(self, process: Process) -> bool:
        attempt = process.attempt
        if attempt is None or self.job.aggregator.has_ended(process.worker):
            return False
        if process.stream is None or not self.job.takes(process.stream):
            return False
        holds = any(self.job.aggregator.holds(process.worker, bucket) for bucket in attempt.grads)
        return process.to_send == list(attempt.grads) and not holds

    def _start(self, name: str) -> None:
        number = int(name[1:])
        rank = _RANKS[name[0]] + (number % 2 if name[0] == "c" else 0)
        self._count += 1
        self.processes[name] = Process(name, Worker(rank, name[0]), self._count)
        self._open(self.processes[name])

    def _open(self, process: Process) -> None:
        process.cut_off = False
        process.to_send = None
        process.stream = Stream(
            process.name, process.worker, process.incarnation, returns=process.joined, since=self.job.now
        )
        self.job.open(process.stream)

    def _return(self, name: str) -> None:
        self._open(self.processes[name])

    def _begin(self, name: str, what: str) -> None:
        process = self.processes[name]
        attempt = self._again(process) or self._compute(process, what)
        if self.policy.on_loss == "wait":
            attempt.base_step, attempt.process = process.job_step, process.name
        process.attempt = attempt
        self._push_attempt(process)

    def _compute(self, process: Process, what: str) -> Attempt:
        key = process.worker.worker_id, process.next_sequence
        earlier = self._produced.setdefault(key, [])
        dice = random.Random(f"{process.name} {process.next_sequence} {len(earlier)}")
        number = (lambda: float(dice.randint(-4, 4))) if self.policy.whole_numbers else (lambda: dice.gauss(0.0, 1.0))
        buckets = [int(digit) for digit in what] if what.isdigit() else []
        grads = {bucket: torch.tensor([number(), number()], dtype=torch.float64) for bucket in buckets}
        attempt = Attempt(process.name, *key, process.job_step, grads, skips=what == "nan")
        earlier.append(attempt)
        return attempt

    def _push_attempt(self, process: Process) -> None:
        attempt, stream = process.attempt, process.stream
        assert attempt is not None
        assert stream is not None
        late = process.job_step != attempt.base_step and not self.policy.asynchronous
        # The job has gone on without it: it is only to be answered.
        process.to_send = [] if late else list(attempt.grads)
        self.job.begin(stream, attempt)

    def _push(self, name: str, bucket: str) -> None:
        process = self.processes[name]
        assert process.to_send is not None
        assert process.stream is not None
        process.to_send.remove(int(bucket))
        self.job.push(process.stream, int(bucket))

    def _end(self, name: str) -> None:
        process = self.processes[name]
        assert process.stream is not None
        process.to_send = None
        self.job.end(process.stream)

    def _rush(self, name: str) -> None:
        """Pushes all that is left, and ends."""
        for bucket in list(self.processes[name].to_send or ()):
            self._push(name, str(bucket))
        self._end(name)

    def _take_back(self, name: str) -> None:
        stream = self.processes[name].stream
        assert stream is not None
        self.job.take_back(stream)

    def _serve(self, _name: str) -> None:
        """The process's thread on the server goes on, as after every event of the process."""

    def _break(self, name: str) -> None:
        stream = self.processes[name].stream
        assert stream is not None
        self.job.disconnect(stream)

    def _cut(self, name: str) -> None:
        process = self.processes[name]
        process.cut_off = True
        if process.stream is not None and process.stream.alive:
            self.job.disconnect(process.stream)

    def _die(self, name: str) -> None:
        process = self.processes[name]
        process.alive = False
        if process.stream is not None and process.stream.alive and not process.stalled:
            self.job.disconnect(process.stream)

    def _stall(self, name: str) -> None:
        self.processes[name].stalled = True

    def _wake(self, name: str) -> None:
        self.processes[name].stalled = False

    def _clog(self, name: str) -> None:
        """From here on it takes nothing of what it is sent."""
        stream = self.processes[name].stream
        assert stream is not None
        self.job.clog(stream, clogged=True)

    def _unclog(self, name: str) -> None:
        stream = self.processes[name].stream
        assert stream is not None
        self.job.clog(stream, clogged=False)

    def _leave(self, name: str) -> None:
        process = self.processes[name]
        assert process.stream is not None
        process.alive = False
        self.job.leave(process.stream)

    # --- between events

    def _go_on(self, process: Process) -> bool:
        """A process's thread on the server goes on as far as it may, and the process takes what it is sent."""
        moved = False
        while (process.stream is not None and self.job.serve(process.stream)) or self._take(process):
            moved = True
        return moved

    def _everybody_goes_on(self) -> None:
        moved = [True]
        while any(moved):
            moved = [self._go_on(process) for process in self.processes.values() if process.stream is not None]

    def _pass(self, seconds: float) -> None:
        """Time passes. Once a period, all that can go on does, and the job is told of the time."""
        end = self.job.now + seconds
        while (due := (self.job.now // PERIOD_S + 1) * PERIOD_S) <= end:
            self.job.now = due
            for process in self.processes.values():
                if process.acts and not process.cut_off:
                    self.job.hear(process.worker, process.incarnation)
            self._everybody_goes_on()
            self.job.tick()
            self._everybody_goes_on()
            self._check_waits()
        self.job.now = end

    def _check_waits(self) -> None:
        """Nobody who has pushed all it had, or waits for others to end their step, does so for too long.

        Whatever others do. Only where lost workers are waited for, newcomers wait as long as these may stay away.
        """
        most = max(self.policy.lease_s, self.policy.timeout_s) + PERIOD_S
        for stream in self.job.streams:
            in_it = self.job.members.get(stream.worker) is stream
            waits = in_it and stream.stage in {Stage.ENTERED, Stage.WAITING, Stage.OVER}
            waits = waits or (stream.newcomer and self.policy.on_loss == "shrink")
            if stream.alive and waits:
                waited = self.job.now - stream.waits_since
                assert waited <= most, f"{stream.process} has waited for {waited} s"

    def _take(self, process: Process) -> bool:
        """A process reads what it is sent. Returns whether there was anything."""
        stream = process.stream
        if not process.acts or process.cut_off or stream is None or not stream.inbox:
            return False
        message = stream.inbox.pop(0)
        match message.kind:
            case "ready":
                process.joined = True
                process.next_sequence, process.job_step = message.next_sequence, message.job_step
                attempt, receipt = process.attempt, message.receipt
                if attempt is not None and receipt is not None and receipt.sequence == attempt.sequence:
                    self.seen["the receipt was lost, and had after coming back"] += 1
                    self._acknowledge(process, receipt)
                elif attempt is not None:
                    self._push_attempt(process)
            case "again":
                process.to_send = sorted(message.buckets)
            case "receipt":
                assert message.receipt is not None
                self._acknowledge(process, message.receipt)
            case "refused":
                self.seen["refused"] += 1
                assert process.attempt is not None
                # Unless a process in its place has pushed the same gradients since.
                refused = process.attempt.process == process.name
                assert not (refused and process.attempt.applied), f"{process.attempt} was refused, and is in a step"
                process.attempt = None
            case turned_away:
                self.seen[turned_away] += 1
                process.alive = False
        return True

    # --- what has to be true

    def _acknowledge(self, process: Process, receipt: Receipt) -> None:
        """What a process is told is what became of its gradients."""
        attempt = process.attempt
        assert attempt is not None
        assert receipt.sequence == attempt.sequence
        process.job_step, process.next_sequence = receipt.step, receipt.sequence + 1
        process.attempt = process.to_send = None
        assert not attempt.fate, f"{attempt} is over for the second time"
        attempt.fate = receipt.outcome.name
        if receipt.outcome in {Outcome.DROPPED_LATE, Outcome.SKIPPED_NONFINITE}:
            assert not attempt.applied, f"{attempt} is in a step, and its worker was told: {attempt.fate}"
            assert attempt.skips or receipt.outcome is Outcome.DROPPED_LATE
            return
        step = self.job.ledger.history[receipt.step - 1]
        assert (attempt.worker_id, attempt.sequence) in step.contributors
        assert len(receipt.contributors) == len(step.contributors)
        assert (receipt.outcome is Outcome.MERGED) == (len(receipt.contributors) > 1)
        within = {application.bucket for application in step.applications if attempt in application.attempts}
        assert within == attempt.applied.keys(), f"some of {attempt} is in another step than {receipt.step}"
        if process.worker.rank not in receipt.partial_contributors:
            assert within == attempt.grads.keys(), f"some of {attempt} is lost"

    def finish(self) -> None:
        """Has everybody who can finish its push, then the stalled ones too, and looks at what has become of it all."""
        patience = round((self.policy.lease_s + self.policy.timeout_s) / PERIOD_S) + 2
        for process in self.processes.values():
            if process.stream is not None:
                self.job.clog(process.stream, clogged=False)
        for wakes in (False, True):
            for process in self.processes.values():
                process.stalled = process.stalled and not wakes
            for _ in range(patience * len(self.processes)):
                unfinished = [self._finish_push(process) for process in self.processes.values()]
                if not any(unfinished):
                    break
                self._pass(PERIOD_S)
            self._check_answered()
        self._pass(self.policy.lease_s + self.policy.timeout_s + 2 * PERIOD_S)
        # What the lost have left of a step may go on waiting for those that have not begun, but nobody alive does.
        assert not self.job.aggregator.is_timed
        self._check_parameters()

    def _finish_push(self, process: Process) -> bool:
        """Has a process do the next thing towards the end of its push. Returns whether it is not over."""
        if not process.acts:
            return False
        if process.line_is_down:
            self._open(process)
        elif process.is_sending:
            self._rush(process.name)
        self._go_on(process)
        return process.attempt is not None or not process.joined

    def _check_answered(self) -> None:
        for process in self.processes.values():
            if not process.acts or process.attempt is None or process.stream is None:
                continue
            # Too few have joined: after join_timeout_s it would be told so.
            unformed = process.stream.stage is Stage.BEGINNING and not self.job.aggregator.is_formed
            assert unformed, f"{process.attempt} is never answered"
        for worker_id, record in self.job.ledger.records.items():
            answered = [sequence for worker, sequence in self.job.ledger.answers if worker == worker_id]
            assert answered == list(range(record.next_sequence))

    def _check_parameters(self) -> None:
        """They are what torch makes of the gradients that the job's steps name."""
        replayed = [torch.full((2,), float(b), dtype=torch.float64) for b in range(self.policy.buckets)]
        adam = torch.optim.Adam(replayed, lr=0.1, foreach=False, fused=False)
        for applications in self._named_updates():
            for application in applications:
                replayed[application.bucket].grad = mean(application)
            adam.step()
            adam.zero_grad()
        exact = self.policy.whole_numbers or self.policy.asynchronous or self.job.ledger.separate
        for ours, theirs in zip(self.job.ledger.store.values, replayed, strict=True):
            same = torch.equal(ours, theirs) if exact else torch.allclose(ours, theirs, rtol=1e-9, atol=1e-9)
            assert same, f"{ours} is not {theirs}, which the steps' contributors make of it"

    def _named_updates(self) -> Iterator[Sequence[Application]]:
        """The updates of each step, as its contributors' gradients make them.

        Where a contributor is partial its receipt does not tell which buckets are in, and where asynchronous pushes
        overlap the receipts do not tell in which order: there it is as the job has applied them.
        """
        if self.policy.asynchronous and self.policy.streaming:
            yield from ([application] for application in self.job.ledger.applications)
            return
        for step in self.job.ledger.history:
            if step.partial:
                yield step.applications
                continue
            attempts = [self._produced[name][-1] for name in step.contributors]
            yield [
                Application(bucket, givers, len(attempts))
                for bucket in range(self.policy.buckets)
                if (givers := tuple(attempt for attempt in attempts if bucket in attempt.grads))
            ]
