"""The workers that are in a job."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from optimd.server.aggregation import Worker


@dataclass(slots=True, eq=False)
class Member:
    """One worker process on its stream. Guarded by its job's lock, but for the byte counts, which its stream owns."""

    worker: Worker
    incarnation: int
    groups: list[dict[str, Any]] = field(default_factory=list)
    """Its param_groups as far as the server knows: the job's when it joined, then what it sent."""
    speaks: bool = False
    """Whether its hyperparameters count: the creator's do, a newcomer's from its first change on."""
    ready: bool = False
    """Whether it has its parameters: from JobReady on."""
    alive: bool = True
    buffers_attached: bool = False
    bytes_received: int = 0
    bytes_sent: int = 0


@dataclass(slots=True)
class WorkerRecord:
    """What a job remembers of a worker_id across its processes. Guarded by the job's lock."""

    next_sequence: int = 0
    pushes: int = 0


def speaker(members: Mapping[Worker, Member], contributors: tuple[Worker, ...]) -> Member | None:
    """The contributor whose hyperparameters hold for a step: the one of lowest rank that speaks, if any does."""
    for worker in contributors:
        member = members.get(worker)
        if member is not None and member.speaks:
            return member
    return None


def disagree(members: Mapping[Worker, Member], contributors: tuple[Worker, ...]) -> bool:
    """Whether contributors that speak have different hyperparameters."""
    voices = [members[worker].groups for worker in contributors if worker in members and members[worker].speaks]
    # A NaN, which a schedule may well arrive at, is not equal to itself; its text is.
    return any(groups != voices[0] and _text(groups) != _text(voices[0]) for groups in voices[1:])


def _text(groups: Sequence[Mapping[str, Any]]) -> str:
    return repr([sorted(group.items()) for group in groups])
