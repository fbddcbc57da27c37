"""What became of a push, as the job remembers it and tells its worker."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from optimd.v1 import training_pb2


class Outcome(Enum):
    """What became of a push: exactly one of these."""

    APPLIED = training_pb2.STEP_OUTCOME_APPLIED
    MERGED = training_pb2.STEP_OUTCOME_MERGED
    DROPPED_LATE = training_pb2.STEP_OUTCOME_DROPPED_LATE
    SKIPPED_NONFINITE = training_pb2.STEP_OUTCOME_SKIPPED_NONFINITE

    @classmethod
    def of_step(cls, contributor_count: int) -> Outcome:
        """What became of each push whose gradients are in a step with so many of them."""
        return cls.MERGED if contributor_count > 1 else cls.APPLIED


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """What became of one push. The fields are those of the schema's `StepReceipt`."""

    sequence: int
    step: int
    outcome: Outcome
    contributors: tuple[int, ...] = ()
    partial_contributors: tuple[int, ...] = ()
    hyperparameters_disagreed: bool = False
    grad_norm: float | None = None
    pushed_differently: tuple[int, ...] = ()
    staleness: int = 0
    lag: int = 0


def decode_receipt(message: training_pb2.StepReceipt) -> Receipt:
    """The inverse of `encode_receipt`.

    Raises:
        ValueError: the outcome is unknown.
    """
    return Receipt(
        sequence=message.sequence,
        step=message.step,
        outcome=Outcome(message.outcome),
        contributors=tuple(message.contributors),
        partial_contributors=tuple(message.partial_contributors),
        hyperparameters_disagreed=message.hyperparameters_disagreed,
        grad_norm=message.grad_norm if message.HasField("grad_norm") else None,
        pushed_differently=tuple(message.pushed_differently),
        staleness=message.staleness,
        lag=message.lag,
    )


def encode_receipt(receipt: Receipt, *, wants_buffers: bool = False) -> training_pb2.StepReceipt:
    """`receipt` as the schema has it."""
    return training_pb2.StepReceipt(
        sequence=receipt.sequence,
        step=receipt.step,
        outcome=receipt.outcome.value,
        contributors=receipt.contributors,
        partial_contributors=receipt.partial_contributors,
        hyperparameters_disagreed=receipt.hyperparameters_disagreed,
        grad_norm=receipt.grad_norm,
        pushed_differently=receipt.pushed_differently,
        wants_buffers=wants_buffers,
        staleness=receipt.staleness,
        lag=receipt.lag,
    )
