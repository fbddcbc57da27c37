"""Whatever a job holds, the next server has it: each kind of content, between two calls and in the middle of one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import nn

from optimd.client import Adam, AdamW, OptimizerProxy, ProxyOptions
from tests.keptjobs import Mirror, gradients, parameters
from tests.lives import Lives
from tests.support import assert_alike, running_server

Between = Callable[[], None]


@dataclass
class Trainee:
    """A worker that a program trains.

    Args:
        server: The server's address.
        between: To be called between two calls of the optimizer: the server may die then.
    """

    server: str
    between: Between
    params: list[nn.Parameter] = field(default_factory=list)
    receipts: list[Any] = field(default_factory=list)

    def open(
        self,
        params: Sequence[nn.Parameter],
        groups: Sequence[dict[str, Any]] | None = None,
        *,
        rule: type[OptimizerProxy] = Adam,
        rank: int = 0,
        options: dict[str, Any] | None = None,
        **adam: Any,
    ) -> Any:
        self.params = list(params)
        return rule(
            list(groups) if groups is not None else self.params,
            **{"lr": 0.1, **adam},
            server=self.server,
            job="job",
            options=ProxyOptions(
                rank=rank,
                worker_id=f"worker-{rank}",
                **{"bucket_bytes": 1024, "retry_timeout_s": 30, **(options or {})},
            ),
        )

    def give(self, seed: int, *, without: Sequence[int] = ()) -> None:
        for index, (param, grad) in enumerate(zip(self.params, gradients(seed, self.params), strict=True)):
            param.grad = None if index in without else grad

    def step(self, optimizer: Any, *seeds: int) -> None:
        for seed in seeds:
            self.between()
            self.give(seed)
            optimizer.step()
            self.see(optimizer)

    def see(self, optimizer: Any) -> None:
        receipt = optimizer.last_receipt
        self.receipts.append(
            (
                receipt.sequence,
                receipt.step,
                receipt.outcome,
                receipt.contributors,
                receipt.grad_norm,
                receipt.staleness,
            )
        )

    def result(self, optimizer: Any) -> dict[str, Any]:
        self.between()
        result = {
            "values": [param.detach().clone() for param in self.params],
            "state": optimizer.state_dict(),
            "receipts": self.receipts,
            "step": (optimizer.job_step, optimizer.next_sequence),
        }
        optimizer.close()
        return result


# --- programs


def several_groups(trainee: Trainee) -> Any:
    params = parameters()
    groups = [
        {"params": params[:2], "lr": 0.03, "betas": (0.8, 0.95), "note": 1.5},
        {"params": params[2:], "weight_decay": 0.01, "amsgrad": True},
    ]
    optimizer = trainee.open(params, groups, rule=AdamW, eps=1e-5)
    trainee.step(optimizer, 1, 2)
    optimizer.param_groups[0]["lr"] = 0.02
    trainee.step(optimizer, 3)
    optimizer.param_groups[1]["betas"] = (0.7, 0.9)
    trainee.step(optimizer, 4, 5)
    return trainee.result(optimizer)


def whole_parameter_kernel(trainee: Trainee) -> Any:
    optimizer = trainee.open(
        parameters(sizes=(1500, 7, 1, 600), dtype=torch.bfloat16), fused=False, foreach=False, amsgrad=True
    )
    trainee.step(optimizer, 1, 2, 3, 4)
    return trainee.result(optimizer)


def master_weights(trainee: Trainee) -> Any:
    optimizer = trainee.open(parameters(dtype=torch.bfloat16), lr=1e-4, options={"master_dtype": torch.float32})
    trainee.step(optimizer, 1, 2, 3)
    with torch.no_grad():
        trainee.params[0][:70].mul_(0.5)
    trainee.step(optimizer, 4, 5)
    return trainee.result(optimizer)


def complex_parameters(trainee: Trainee) -> Any:
    optimizer = trainee.open([*parameters(sizes=(200, 3), dtype=torch.complex64), *parameters(sizes=(90,))])
    trainee.step(optimizer, 1, 2, 3, 4)
    return trainee.result(optimizer)


def clipped(trainee: Trainee) -> Any:
    optimizer = trainee.open(parameters(), options={"max_grad_norm": 0.5})
    trainee.step(optimizer, 1, 2, 3, 4)
    return trainee.result(optimizer)


def skipped(trainee: Trainee) -> Any:
    optimizer = trainee.open(parameters(), options={"nonfinite": "skip"})
    trainee.step(optimizer, 1, 2)
    for seed in (3, 4):
        trainee.between()
        trainee.give(seed)
        trainee.params[1].grad[0] = torch.inf
        if seed == 4:
            # What is written beside a skipped step holds.
            with torch.no_grad():
                trainee.params[0].mul_(0.5)
        optimizer.step()
        trainee.see(optimizer)
    trainee.step(optimizer, 5, 6)
    return trainee.result(optimizer)


def scaled(trainee: Trainee) -> Any:
    optimizer = trainee.open(parameters(), fused=True)
    for seed in range(1, 6):
        trainee.between()
        trainee.give(seed)
        optimizer.grad_scale = torch.tensor(1000.0 / seed)
        optimizer.found_inf = torch.tensor(float(seed == 3))
        optimizer.step()
        trainee.see(optimizer)
    return trainee.result(optimizer)


def accumulated(trainee: Trainee) -> Any:
    optimizer = trainee.open(parameters())
    for seed in range(4):
        for micro in range(3):
            trainee.between()
            trainee.give(10 * seed + micro, without=(micro,))
            optimizer.accumulate()
        if seed == 2:
            # What was held is not wanted after all.
            trainee.between()
            optimizer.zero_grad()
            trainee.between()
            trainee.give(99)
            optimizer.accumulate()
        trainee.step(optimizer, 10 * seed + 9)
    return trainee.result(optimizer)


def with_buffers(trainee: Trainee) -> Any:
    module = nn.BatchNorm1d(5)
    with torch.no_grad():
        module.running_mean.copy_(torch.arange(5.0))
        module.num_batches_tracked.fill_(7)
    optimizer = trainee.open(parameters())
    trainee.step(optimizer, 1)
    trainee.between()
    optimizer.attach_buffers(module)
    trainee.step(optimizer, 2, 3)
    result = trainee.result(optimizer)
    # As somebody who resumes the job later has them.
    other = nn.BatchNorm1d(5)
    again = trainee.open(parameters(1))
    again.attach_buffers(other)
    result["buffers"] = dict(other.named_buffers())
    again.close()
    return result


def growing(trainee: Trainee) -> Any:
    optimizer = trainee.open(parameters())
    trainee.step(optimizer, 1)
    for number in range(3):
        trainee.between()
        added = parameters(20 + number, (70, 3))
        optimizer.add_param_group({"params": added, "lr": 0.01 * (number + 1)})
        trainee.params += added
        trainee.step(optimizer, 2 + number)
    return trainee.result(optimizer)


def replacing(trainee: Trainee) -> Any:
    """Parameters of other shapes, when something has been held of those before them."""
    optimizer = trainee.open(parameters())
    trainee.step(optimizer, 1, 2)
    for number, size in enumerate((90, 400, 17)):
        trainee.between()
        trainee.give(30 + number)
        optimizer.accumulate()
        trainee.between()
        optimizer.zero_grad()
        new = parameters(40 + number, (size,))[0]
        del optimizer.state[trainee.params[number]]
        optimizer.param_groups[0]["params"][number] = trainee.params[number] = new
        trainee.step(optimizer, 3 + number)
    trainee.step(optimizer, 8)
    return trainee.result(optimizer)


def loading(trainee: Trainee) -> Any:
    optimizer = trainee.open(parameters())
    trainee.step(optimizer, 1, 2)
    for _ in range(2):
        trainee.between()
        state = optimizer.state_dict()
        for entry in state["state"].values():
            entry["exp_avg"].mul_(0.5)
            entry["step"].add_(5)
        del state["state"][1]
        state["param_groups"][0]["lr"] *= 0.5
        trainee.between()
        optimizer.load_state_dict(state)
        trainee.step(optimizer, 3, 4)
    return trainee.result(optimizer)


def made_in_the_worker(trainee: Trainee) -> Any:
    optimizer = trainee.open(parameters(), foreach=False, fused=False)
    for step in range(6):
        trainee.between()
        optimizer.param_groups[0]["differentiable"] = 2 <= step < 4
        trainee.give(step)
        optimizer.step()
        trainee.see(optimizer)
    return trainee.result(optimizer)


def edited_by_hand(trainee: Trainee) -> Any:
    optimizer = trainee.open(parameters())
    trainee.step(optimizer, 1, 2)
    trainee.between()
    optimizer.state[trainee.params[0]]["exp_avg"].mul_(0.25)
    optimizer.state[trainee.params[3]]["step"].add_(3)
    trainee.step(optimizer, 3)
    trainee.between()
    del optimizer.state[trainee.params[1]]
    trainee.step(optimizer, 4, 5)
    return trainee.result(optimizer)


PROGRAMS = [
    several_groups,
    whole_parameter_kernel,
    master_weights,
    complex_parameters,
    clipped,
    skipped,
    scaled,
    accumulated,
    with_buffers,
    growing,
    replacing,
    loading,
    made_in_the_worker,
    edited_by_hand,
]


def name_of(program: Callable[[Trainee], Any]) -> str:
    return program.__name__


def undisturbed(program: Callable[[Trainee], Any]) -> tuple[Any, int]:
    """What comes of a program whose server keeps nothing and lives, and how often it may die."""
    moments = [0]

    def between() -> None:
        moments[0] += 1

    with running_server() as server:
        return program(Trainee(server.address, between)), moments[0]


@pytest.mark.parametrize("snapshots", [False, True], ids=["journal", "snapshots"])
@pytest.mark.parametrize("program", PROGRAMS, ids=name_of)
def test_a_program_comes_to_the_same_whenever_its_server_dies_between_two_calls(
    tmp_path: Path, program: Callable[[Trainee], Any], snapshots: bool
) -> None:
    """Before some of its calls; with a snapshot before others, so that the journal behind it is replayed."""
    expected, moments = undisturbed(program)
    moment = [0]
    with Lives(tmp_path, fsync="never", journal_segment_bytes=4000) as lives:

        def between() -> None:
            moment[0] += 1
            if moment[0] == 1:
                return
            if snapshots and moment[0] % 3 == 2:
                lives.server.registry.snapshot("job")
            if moment[0] % 3 == 1 or moment[0] == moments:
                lives.die_and_resume()

        result = program(Trainee(lives.address, between))
        assert lives.deaths >= 2
    assert_alike(result, expected)


# Not `replacing`: a worker that has not been told yet that its new parameters are in force comes back with the old ones
# and is refused, whether the server has died or the line alone.
@pytest.mark.parametrize("program", [each for each in PROGRAMS if each is not replacing], ids=name_of)
def test_a_program_comes_to_the_same_whenever_its_server_dies_in_the_middle_of_a_call(
    tmp_path: Path, program: Callable[[Trainee], Any]
) -> None:
    """Behind one of the records that it writes meanwhile."""
    expected, moments = undisturbed(program)
    moment = [0]
    with Lives(tmp_path, fsync="never", journal_segment_bytes=4000) as lives:
        deaths = [lives.die_behind(1 << 30)]

        def between() -> None:
            moment[0] += 1
            deaths[-1].join()
            if moment[0] % 3 == 2 and moment[0] < moments:
                deaths.append(lives.die_behind(1 + moment[0] // 3 % 4))

        result = program(Trainee(lives.address, between))
        assert lives.deaths >= 1
    assert_alike(result, expected)


@pytest.mark.parametrize("calls", range(1, 8))
def test_what_a_load_brings_holds_wherever_in_it_the_server_dies(tmp_path: Path, calls: int) -> None:
    """State and options: also where all of it was written and nobody had been told."""
    with Lives(tmp_path, fsync="never", journal_segment_bytes=5000) as lives:
        mirror = Mirror(lives.address)
        mirror.step(0)
        mirror.step(1)
        death = lives.die_behind(calls)
        mirror.load()
        mirror.step(2)
        death.join()
        assert death.happened
        mirror.step(3)
        mirror.close()


@pytest.mark.parametrize("calls", range(1, 8))
@pytest.mark.parametrize("apply", ["streaming", "atomic"])
def test_what_is_written_between_two_steps_holds_wherever_in_the_next_one_the_server_dies(
    tmp_path: Path, apply: Literal["streaming", "atomic"], calls: int
) -> None:
    """Also where the step had begun, and not all of what it was to bring was there."""
    with Lives(tmp_path, fsync="never") as lives:
        mirror = Mirror(lives.address, options=ProxyOptions(bucket_bytes=1024, apply=apply))
        mirror.step(0)
        mirror.write()
        death = lives.die_behind(calls)
        mirror.step(1)
        death.join()
        assert death.happened
        mirror.step(2)
        mirror.close()
