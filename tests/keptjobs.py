"""A job on disk compared with torch: what it was at each moment, and what a server brings back of it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from optimd.client import Adam, ProxyOptions
from optimd.server.datadir import DataDir
from optimd.server.files import Files
from optimd.server.job import Job
from optimd.server.registry import JobRegistry
from optimd.server.storage import Storage, StorageSettings
from optimd.wire.layout import Bucket

SIZES: Final = (300, 7, 1, 130)
"""With buckets of 1 KiB: one parameter in two buckets, and a bucket of several parameters."""

_CPU: Final = torch.device("cpu")


def parameters(seed: int = 7, sizes: Sequence[int] = SIZES, dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(size, generator=generator).to(dtype)) for size in sizes]


def gradients(seed: int, params: Sequence[nn.Parameter]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1000 + seed)
    return [torch.randn(param.numel(), generator=generator).to(param.dtype).view_as(param) for param in params]


@dataclass(frozen=True)
class Point:
    """What a job is at one moment."""

    step: int
    values: list[torch.Tensor]
    states: list[dict[str, torch.Tensor]]
    written: list[torch.Tensor]
    """The values, as they are to be when the next step begins."""
    micro: int = 0
    held: list[torch.Tensor | None] = field(default_factory=list)


class Mirror:
    """A worker's optimizer and torch's own, driven alike. Where gradients travel narrowed, torch's are rounded by hand.

    torch's is ahead while ours is under way: `points[acknowledged]` is what the job has to be at least, and the point
    behind that, if there is one, what it may be already.

    Args:
        server: The server's address.
        job: The job's name.
        params: Their first parameters.
        options: Of the connection.
        adam: Adam's arguments.
    """

    def __init__(
        self,
        server: str,
        job: str = "job",
        *,
        params: Sequence[nn.Parameter] | None = None,
        options: ProxyOptions | None = None,
        **adam: Any,
    ) -> None:
        self.job = job
        options = options or ProxyOptions(bucket_bytes=1024)
        assert options.wire_dtype is None or isinstance(options.wire_dtype, torch.dtype)
        self._wire = options.wire_dtype
        self.params = list(params) if params is not None else parameters()
        self.local = [nn.Parameter(param.detach().clone()) for param in self.params]
        adam = {"lr": 0.1, "fused": True, **adam}
        self.theirs = torch.optim.Adam(self.local, **adam)
        self.steps = 0
        self.micro = 0
        # As the server has them: what is written it hears of with the next step.
        self._values = self._written()
        self.points = [self._point()]
        self.acknowledged = 0
        self.on_acknowledged: Callable[[], object] = lambda: None
        """Called when the server has answered, behind each point but the first."""
        self.ours = Adam(self.params, server=server, job=job, options=options, **adam)

    def close(self) -> None:
        self.ours.close()

    def step(self, seed: int, *, without: Sequence[int] = ()) -> None:
        """One step. The parameters `without` have no gradient."""
        grads = gradients(seed, self.local)
        for index, (param, local, grad) in enumerate(zip(self.params, self.local, grads, strict=True)):
            param.grad = None if index in without else grad.clone()
            if index not in without:
                arrives = self._narrowed(grad)
                local.grad = arrives.clone() if local.grad is None else local.grad + arrives
        self.theirs.step()
        for local in self.local:
            local.grad = None
        self.steps += 1
        self.micro = 0
        self._values = self._written()
        self.points.append(self._point())
        self.ours.step()
        self._acknowledge()
        self.assert_in_step()

    def give(self, seed: int) -> None:
        """Gives ours gradients, and torch's none."""
        for param, grad in zip(self.params, gradients(seed, self.params), strict=True):
            param.grad = grad

    def accumulate(self, seed: int) -> None:
        grads = gradients(seed, self.local)
        for param, local, grad in zip(self.params, self.local, grads, strict=True):
            param.grad = grad.clone()
            arrives = self._narrowed(grad)
            local.grad = arrives.clone() if local.grad is None else local.grad + arrives
        self.micro += 1
        self.points.append(self._point())
        self.ours.accumulate()
        self._acknowledge()

    def write(self) -> None:
        """As somebody who clips weights between two steps. The server hears of it with the next one."""
        with torch.no_grad():
            # Every other element: the rest keeps what bits it has on the server.
            self.params[0][::2] *= 0.5
            self.local[0][::2] = self.params[0][::2]
        self.points[-1] = self._point()

    def add_group(self, seed: int, sizes: Sequence[int] = (70, 3)) -> None:
        added = parameters(seed, sizes)
        local = [nn.Parameter(param.detach().clone()) for param in added]
        self.theirs.add_param_group({"params": local, "lr": 0.03})
        self.local += local
        self._values = self._values + [param.detach().clone() for param in local]
        self.points.append(self._point())
        self.ours.add_param_group({"params": added, "lr": 0.03})
        self.params += added
        self._acknowledge()

    def load(self) -> None:
        """A state_dict with other moments, another step counter and other options."""
        state = copy.deepcopy(self.theirs.state_dict())
        for entry in state["state"].values():
            entry["exp_avg"].mul_(0.5)
            entry["step"].add_(3)
        state["param_groups"][0]["lr"] *= 0.9
        self.theirs.load_state_dict(copy.deepcopy(state))
        self.points.append(self._point())
        self.ours.load_state_dict(state)
        self._acknowledge()

    def assert_in_step(self) -> None:
        for index, (param, local) in enumerate(zip(self.params, self.local, strict=True)):
            # What no step has changed has not been narrowed either.
            same = torch.equal(param, local) or torch.equal(param, self._narrowed(local.detach()))
            assert same, f"parameter {index} at step {self.steps}"

    def allowed(self) -> list[Point]:
        """What the job may be now."""
        return self.points[self.acknowledged : self.acknowledged + 2]

    def _narrowed(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor if self._wire is None else tensor.to(self._wire).to(tensor.dtype)

    def _acknowledge(self) -> None:
        self.acknowledged += 1
        assert self.acknowledged == len(self.points) - 1
        self.on_acknowledged()

    def _written(self) -> list[torch.Tensor]:
        return [local.detach().clone() for local in self.local]

    def _point(self) -> Point:
        return Point(
            step=self.steps,
            values=self._values,
            states=[
                {name: tensor.detach().clone() for name, tensor in self.theirs.state.get(local, {}).items()}
                for local in self.local
            ],
            written=self._written(),
            micro=self.micro,
            held=[None if local.grad is None else local.grad.detach().clone() for local in self.local],
        )


@contextmanager
def recovered(data_dir: Path, *, files: Files | None = None, **settings: Any) -> Iterator[dict[str, Job]]:
    """The jobs of a data dir, brought back as a server does when it starts, without serving them."""
    data = DataDir(data_dir, files)
    registry = JobRegistry(
        _CPU,
        max_jobs=1000,
        max_job_bytes=1 << 30,
        max_job_workers=10,
        lease_s=60,
        storage=Storage(data, StorageSettings(**settings), _CPU),
    )
    try:
        registry.recover()
        yield {job.name: job for job in registry.all()}
    finally:
        for job in registry.all():
            job.journal.close()
        data.close()


def contents(job: Job) -> list[tuple[torch.Tensor, list[float], dict[str, torch.Tensor]]]:
    """Of each parameter of a job its value, the step counters of its slices, and its state."""
    store = job.store
    return [
        (
            store._values[index].clone(),
            store.steps_of(index),
            {name: tensor.clone() for name, tensor in sorted(store._state[index].tensors.items())},
        )
        for index in range(len(store.parameters))
    ]


def assert_is_one_of(job: Job, points: Sequence[Point], worker_id: str | None = None) -> int:
    """A job is what it was at one of some moments, bit for bit, or on its way from one to the next.

    Args:
        job: The job.
        points: The moments, in order.
        worker_id: Who pushes to it, if there is not just one.

    Returns:
        Which, or which it has left.
    """
    rounds = [*job.parts.journal.rounds.values()]
    assert len(rounds) <= 1
    if rounds:
        assert len(points) == 2, "a step is open though none is under way"
        before, behind = points
        _assert_between(job, before, behind, {applied.bucket_id for applied in rounds[0].applied})
        place = 0
    else:
        faults = [_difference(job, points[place:]) for place in range(len(points))]
        assert None in faults, faults
        place = faults.index(None)
    (record,) = [
        record for name, record in job.parts.company.records().items() if worker_id is None or name == worker_id
    ]
    assert record.next_sequence == points[place].step
    assert (record.receipt is not None) == (record.next_sequence > 0)
    if record.receipt is not None:
        assert record.receipt.step == points[place].step
    return place


def _difference(job: Job, points: Sequence[Point]) -> str | None:
    """How a job differs from the first of some points. It may be on its way to the next."""
    point = points[0]
    if job.step != point.step:
        return f"step {job.step}, not {point.step}"
    store = job.store
    if len(store.parameters) != len(point.values):
        return f"{len(store.parameters)} parameters, not {len(point.values)}"
    for index, (value, state) in enumerate(zip(point.values, point.states, strict=True)):
        # A step that has not applied anything when the server died is begun anew, on what the worker has written.
        possible = (value, point.written[index]) if len(points) > 1 else (value,)
        if not any(torch.equal(store._values[index], each.reshape(-1)) for each in possible):
            return f"parameter {index} differs"
        expected = {name: tensor for name, tensor in state.items() if name != "step"}
        tensors = store._state[index].tensors
        if tensors.keys() != expected.keys():
            return f"parameter {index} has {sorted(tensors)}, not {sorted(expected)}"
        for name, tensor in expected.items():
            if not torch.equal(tensors[name], tensor.reshape(-1)):
                return f"{name} of parameter {index} differs"
        steps = set(store.steps_of(index))
        if steps != {float(state.get("step", 0.0))}:
            return f"parameter {index} stands at steps {steps}"
    return _held_difference(job, points)


def _held_difference(job: Job, points: Sequence[Point]) -> str | None:
    point = points[0]
    for member in job.parts.company.members.values():
        if member.held.micro != point.micro:
            return f"{member.held.micro} accumulations are held, not {point.micro}"
        if not point.micro:
            continue
        for bucket in job.store.buckets:
            held = member.held._sums.get(bucket.bucket_id)
            present = [False] * len(bucket.slices) if held is None else held.present
            sums = [_sum(bucket, each) for each in points if each.micro >= point.micro]
            if not any(present == here and (held is None or torch.equal(held.packed(), sum_)) for here, sum_ in sums):
                return f"what is held of bucket {bucket.bucket_id} differs"
    return None


def _sum(bucket: Bucket, point: Point) -> tuple[list[bool], torch.Tensor]:
    """What is held of a bucket: of which slices, and their elements."""
    grads = [point.held[piece.parameter] for piece in bucket.slices]
    parts = [torch.empty(0)] + [
        grad.reshape(-1)[piece.offset : piece.end]
        for piece, grad in zip(bucket.slices, grads, strict=True)
        if grad is not None
    ]
    return [grad is not None for grad in grads], torch.cat(parts)


def _assert_between(job: Job, before: Point, behind: Point, applied: set[int]) -> None:
    """A streamed step is open: each of its buckets is as it was or as it will be, and which, is known."""
    assert job.step == before.step == behind.step - 1
    store = job.store
    for bucket in store.buckets:
        at, is_applied = f"bucket {bucket.bucket_id}", bucket.bucket_id in applied
        point = behind if is_applied else before
        for piece, step in zip(bucket.slices, store.steps_in(bucket), strict=True):
            span = slice(piece.offset, piece.end)
            value = store._values[piece.parameter][span]
            # What the worker has written is in place from the first update on.
            values = (point.values,) if is_applied else (point.values, point.written)
            assert any(torch.equal(value, each[piece.parameter].reshape(-1)[span]) for each in values), at
            state = point.states[piece.parameter]
            assert step == float(state.get("step", 0.0)), at
            for name, tensor in store._state[piece.parameter].tensors.items():
                expected = state[name].reshape(-1)[span] if name in state else torch.zeros_like(value)
                assert torch.equal(tensor[span], expected), f"{name} in {at}"
