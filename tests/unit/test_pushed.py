"""What workers push besides gradients, put together; and the gradients that are held for a worker's next push."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import permutations
from typing import Final

import pytest
import torch

from optimd.server.aggregation import Worker
from optimd.server.member import HeldGradients
from optimd.server.pushed import PushedContent
from optimd.server.store import StagedState, Store
from optimd.wire.kinds import PARAMETER
from optimd.wire.layout import Bucket, Parameter, Slice, cut_buckets
from optimd.wire.limits import MIN_BUCKET_BYTES

A, B, C = (Worker(rank, f"host-{rank}") for rank in range(3))
NUMEL: Final = 4
PARAMETERS: Final = 3
CPU: Final = torch.device("cpu")


@pytest.fixture
def store() -> Store:
    """Three parameters of four zeros, of which the second has been stepped five times."""
    made = Store(CPU)
    parameters = [Parameter("", torch.float32, (NUMEL,), (0,)) for _ in range(PARAMETERS)]
    made.add(parameters, cut_buckets(list(enumerate(parameters)), group=0, first_id=0, bucket_bytes=MIN_BUCKET_BYTES))
    for bucket in made.buckets:
        made.write_values(bucket, torch.zeros(NUMEL * PARAMETERS))
    made.install_state(1, 5.0, {"exp_avg": torch.full((NUMEL,), 0.5), "exp_avg_sq": torch.full((NUMEL,), 0.25)})
    return made


def install(content: PushedContent, store: Store) -> dict[int, Worker]:
    """Puts everything in place. Gives whose values each replaced parameter has now."""
    merged, owners = content.merged()
    store.install(merged)
    return owners


def staged(
    store: Store,
    values: Mapping[int, float] | None = None,
    states: Mapping[int, tuple[float, Mapping[str, float]]] | None = None,
) -> StagedState:
    """Content as a worker brings it: every element of a tensor is the number that is given for it."""
    values, states = values or {}, states or {}
    content = store.stage([(index, step, [*names]) for index, (step, names) in states.items()], values=values)
    for index, value in values.items():
        content.values[index].fill_(value)
    for index, (_, tensors) in states.items():
        for name, value in tensors.items():
            content.tensors[index][name].fill_(value)
    return content


def read(store: Store, kind: str, index: int) -> list[float]:
    (bucket,) = store.buckets
    (part,) = store.read(kind, bucket, [piece.parameter == index for piece in bucket.slices])
    return torch.frombuffer(bytearray(part), dtype=torch.float32).tolist()


# --- content that workers push


def test_nothing_that_was_pushed_changes_nothing(store: Store) -> None:
    """And is false."""
    content = PushedContent()
    assert not content
    assert set(install(content, store)) == set()
    assert read(store, PARAMETER, 0) == [0.0] * NUMEL
    assert store.steps_of(1) == [5.0]


def test_values_and_states_are_put_in_place_and_the_replaced_values_are_named(store: Store) -> None:
    """Of the parameters that were pushed, and of no other."""
    content = PushedContent()
    content.bring(A, staged(store, {0: 3.0}, {2: (7.0, {"exp_avg": 1.0, "exp_avg_sq": 2.0})}))
    assert content
    assert read(store, PARAMETER, 0) == [0.0] * NUMEL
    assert set(install(content, store)) == {0}
    assert content.differing == set()
    assert read(store, PARAMETER, 0) == [3.0] * NUMEL
    assert read(store, PARAMETER, 1) == read(store, PARAMETER, 2) == [0.0] * NUMEL
    assert read(store, "exp_avg", 2) == [1.0] * NUMEL
    assert read(store, "exp_avg_sq", 2) == [2.0] * NUMEL
    assert (store.steps_of(1), store.steps_of(2)) == ([5.0], [7.0])
    assert read(store, "exp_avg", 1) == [0.5] * NUMEL


def test_a_state_without_tensors_takes_away_what_there_was(store: Store) -> None:
    """As for a parameter that has never been updated."""
    content = PushedContent()
    content.bring(A, staged(store, states={1: (0.0, {})}))
    assert set(install(content, store)) == set()
    assert store.state_names_of(1) == ()
    assert store.steps_of(1) == [0.0]
    assert store.state_bytes == 0


@pytest.mark.parametrize("order", [*permutations((A, B, C))])
def test_the_lowest_rank_s_holds_whoever_came_first(store: Store, order: tuple[Worker, ...]) -> None:
    """For each tensor of its own: what the lowest did not push is the next one's."""
    brought = {
        A: staged(store, {0: 1.0}),
        B: staged(store, {0: 2.0, 1: 2.0}, {2: (2.0, {"exp_avg": 2.0})}),
        C: staged(store, {0: 3.0, 1: 3.0, 2: 3.0}, {2: (3.0, {"exp_avg": 3.0}), 1: (3.0, {})}),
    }
    content = PushedContent()
    for worker in order:
        content.bring(worker, brought[worker])
    assert content.differing == {0, 1, 2}
    assert set(install(content, store)) == {0, 1, 2}
    assert [read(store, PARAMETER, index)[0] for index in range(PARAMETERS)] == [1.0, 2.0, 3.0]
    assert (read(store, "exp_avg", 2), store.steps_of(2)) == ([2.0] * NUMEL, [2.0])
    assert (store.state_names_of(1), store.steps_of(1)) == ((), [3.0])


def test_equal_content_is_held_once(store: Store) -> None:
    """All workers that load one checkpoint push the same; a server has no room for it as often as it has workers."""
    content = PushedContent()
    everything = [staged(store, {0: 1.0, 1: 2.0}, {2: (4.0, {"exp_avg": 3.0, "exp_avg_sq": 0.0})}) for _ in range(3)]
    for worker, one in zip((B, A, C), everything, strict=True):
        content.bring(worker, one)
    assert content.differing == set()
    pointers = {
        (kind, tensor.data_ptr())
        for one in everything
        for kind, tensor in [*one.values.items(), *((name, one.tensors[2][name]) for name in one.tensors[2])]
    }
    assert len(pointers) == 4
    install(content, store)
    assert read(store, PARAMETER, 1) == [2.0] * NUMEL
    assert read(store, "exp_avg", 2) == [3.0] * NUMEL


def test_content_of_different_parameters_does_not_differ(store: Store) -> None:
    """A worker that leaves a tensor alone has no say in it, and a value is no state."""
    content = PushedContent()
    content.bring(A, staged(store, {0: 1.0}))
    content.bring(B, staged(store, {1: 2.0}, {0: (3.0, {"exp_avg": 1.0})}))
    assert content.differing == set()
    assert set(install(content, store)) == {0, 1}


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"values": {1: 1.0}}, {"values": {1: 2.0}}),
        ({"values": {1: 0.0}}, {"values": {1: -0.0}}),
        ({"states": {1: (1.0, {"exp_avg": 1.0})}}, {"states": {1: (2.0, {"exp_avg": 1.0})}}),
        ({"states": {1: (1.0, {"exp_avg": 1.0})}}, {"states": {1: (1.0, {"exp_avg": 2.0})}}),
        ({"states": {1: (1.0, {"exp_avg": 1.0})}}, {"states": {1: (1.0, {"exp_avg_sq": 1.0})}}),
        ({"states": {1: (1.0, {"exp_avg": 1.0})}}, {"states": {1: (1.0, {"exp_avg": 1.0, "exp_avg_sq": 1.0})}}),
        ({"states": {1: (0.0, {})}}, {"states": {1: (0.0, {"exp_avg": 0.0})}}),
    ],
    ids=["value", "sign of zero", "step", "tensor", "other tensors", "more tensors", "removal"],
)
def test_what_workers_push_differently_is_named(store: Store, one: dict[str, float], other: dict[str, float]) -> None:
    """In either order, by parameter; what they agree on beside it is not."""
    for first, second in ((one, other), (other, one)):
        content = PushedContent()
        for worker, kind in ((A, first), (B, second)):
            both = staged(store, **kind)
            both.values[2] = torch.full((NUMEL,), 6.0)
            content.bring(worker, both)
        assert content.differing == {1}


def test_a_worker_that_differs_from_any_other_is_named(store: Store) -> None:
    """Also where it agrees with the one before."""
    content = PushedContent()
    for worker, value in ((A, 1.0), (B, 2.0), (C, 2.0)):
        content.bring(worker, staged(store, {0: value, 1: 5.0}))
    assert content.differing == {0}


def test_a_nan_is_equal_to_itself(store: Store) -> None:
    """In a value and in a state."""
    content = PushedContent()
    for worker in (A, B):
        content.bring(worker, staged(store, {0: math.nan}, {1: (2.0, {"exp_avg": math.nan})}))
    assert content.differing == set()
    assert set(install(content, store)) == {0}
    assert all(math.isnan(value) for value in read(store, PARAMETER, 0))


def test_equal_removals_do_not_differ(store: Store) -> None:
    """Nothing is equal to nothing."""
    content = PushedContent()
    for worker in (A, B):
        content.bring(worker, staged(store, states={1: (0.0, {})}))
    assert content.differing == set()
    install(content, store)
    assert store.state_names_of(1) == ()


# --- gradients that are held


FIRST, SECOND = (Bucket(bucket_id, 0, torch.float32, (Slice(0, 0, 2), Slice(1, 0, 3))) for bucket_id in range(2))


def grads(*numbers: float) -> torch.Tensor:
    return torch.tensor(numbers)


def test_what_is_held_and_what_is_pushed_are_added() -> None:
    """The held ones first, as one backward pass after the other adds up in `.grad`."""
    held = HeldGradients()
    for _ in range(2):
        held.add(FIRST, [True, True], grads(1, 2, 3, 4, 5), CPU)
        held.end_accumulation()
    present, payload = held.take(FIRST, [True, True], grads(10, 10, 10, 10, 10))
    assert present == [True, True]
    assert payload.tolist() == [12, 14, 16, 18, 20]
    assert list(held.rest()) == []


def test_held_gradients_are_added_in_the_order_in_which_they_came() -> None:
    """Floating-point sums depend on it: a small one is lost in a large one, or is not."""
    held = HeldGradients()
    for value in (2.0**24, 1.0):
        held.add(FIRST, [True, False], grads(value, value), CPU)
    _, payload = held.take(FIRST, [True, False], grads(1.0, -(2.0**24)))
    assert payload.tolist() == [2.0**24, 0.0]


def test_without_anything_held_a_push_is_what_it_is() -> None:
    """Not even copied."""
    held = HeldGradients()
    payload = grads(1, 2)
    assert held.take(FIRST, [True, False], payload) == ([True, False], payload)
    held.add(FIRST, [True, False], grads(5, 5), CPU)
    held.discard()
    present, same = held.take(FIRST, [False, True], payload)
    assert present == [False, True]
    assert same is payload


def test_slices_that_only_one_of_both_has_are_there() -> None:
    """A parameter may have a gradient in one micro-batch and none in the next."""
    held = HeldGradients()
    held.add(FIRST, [True, False], grads(1, 2), CPU)
    present, payload = held.take(FIRST, [False, True], grads(7, 8, 9))
    assert present == [True, True]
    assert payload.tolist() == [1, 2, 7, 8, 9]
    held.add(SECOND, [False, True], grads(1, 1, 1), CPU)
    present, payload = held.take(SECOND, [False, True], grads(2, 2, 2))
    assert present == [False, True]
    assert payload.tolist() == [3, 3, 3]


def test_held_buckets_that_the_push_did_not_have_are_the_rest() -> None:
    """In order of id, and given out once."""
    held = HeldGradients()
    for bucket in (SECOND, FIRST):
        held.add(bucket, [True, False], grads(bucket.bucket_id, 1), CPU)
    held.end_accumulation()
    assert [(number, present, payload.tolist()) for number, present, payload in held.rest()] == [
        (0, [True, False], [0, 1]),
        (1, [True, False], [1, 1]),
    ]
    assert list(held.rest()) == []
    held.forget()
    held.add(FIRST, [True, False], grads(1, 1), CPU)
    held.add(SECOND, [True, False], grads(1, 1), CPU)
    held.take(SECOND, [True, True], grads(1, 1, 1, 1, 1))
    assert [number for number, _, _ in held.rest()] == [0]


def test_received_gradients_are_only_read() -> None:
    """They are views of a message."""
    held = HeldGradients()
    first, second = grads(1, 2, 3, 4, 5), grads(1, 1, 1, 1, 1)
    held.add(FIRST, [True, True], first, CPU)
    held.take(FIRST, [True, True], second)
    assert first.tolist() == [1, 2, 3, 4, 5]
    assert second.tolist() == [1, 1, 1, 1, 1]


def test_a_bucket_that_comes_twice_in_one_accumulation_is_added_once() -> None:
    """As it does where the line broke in between: the worker sends all of it again."""
    held = HeldGradients()
    for _ in range(2):
        held.add(FIRST, [True, True], grads(1, 2, 3, 4, 5), CPU)
    held.end_accumulation()
    assert held.micro == 1
    assert [payload.tolist() for _, _, payload in held.rest()] == [[1, 2, 3, 4, 5]]


def test_what_a_push_was_given_can_be_given_again_until_the_push_is_over() -> None:
    """Others' share of the same bucket may have been taken out of the step, and this one's with it."""
    held = HeldGradients()
    held.add(FIRST, [True, True], grads(1, 2, 3, 4, 5), CPU)
    held.add(SECOND, [True, False], grads(1, 1), CPU)
    held.end_accumulation()
    held.take(FIRST, [True, True], grads(10, 10, 10, 10, 10))
    assert held.again(1) is None
    _, again = held.again(0) or ([], grads())
    assert again.tolist() == [11, 12, 13, 14, 15]
    _, payload = held.take(FIRST, [True, True], grads(10, 10, 10, 10, 10))
    assert payload.tolist() == [11, 12, 13, 14, 15]
    held.spend()
    held.settle()
    assert held.again(0) is None


def test_what_is_discarded_is_not_in_what_comes_after() -> None:
    """The count of micro-batches is the job's to keep."""
    held = HeldGradients()
    held.micro = 2
    held.add(FIRST, [True, True], grads(9, 9, 9, 9, 9), CPU)
    held.discard()
    assert list(held.rest()) == []
    assert held.micro == 2
    held.add(FIRST, [True, False], grads(1, 1), CPU)
    present, payload = held.take(FIRST, [True, False], grads(2, 2))
    assert present == [True, False]
    assert payload.tolist() == [3, 3]


def test_what_a_push_has_spent_is_lost_where_there_was_something() -> None:
    """A push that is refused afterwards cannot be made again without it."""
    held = HeldGradients()
    held.spend()
    assert not held.spent
    held.micro = 1
    held.add(FIRST, [True, False], grads(1, 1), CPU)
    held.spend()
    assert held.spent
    held.settle()
    assert list(held.rest()) == []
    assert held.nbytes == 0
    held.forget()
    assert (held.micro, held.spent) == (0, False)


def test_a_discard_makes_up_for_what_was_spent() -> None:
    """Whoever discards does not want it any more."""
    held = HeldGradients()
    held.micro = 1
    held.spend()
    held.discard()
    assert not held.spent


def test_what_is_forgotten_is_not_held() -> None:
    """The push is over, and counting starts anew; the next buckets may be others of the same number."""
    held = HeldGradients()
    held.micro = 3
    held.add(FIRST, [True, True], grads(9, 9, 9, 9, 9), CPU)
    held.forget()
    assert held.micro == 0
    assert list(held.rest()) == []
    longer = Bucket(0, 0, torch.float32, (Slice(0, 0, 6),))
    held.add(longer, [True], torch.ones(6), CPU)
    assert [payload.tolist() for _, _, payload in held.rest()] == [[1.0] * 6]


def test_gradients_narrower_than_their_masters_are_held_in_the_masters_dtype() -> None:
    """Their sum is wanted in it, and would lose bits in their own."""
    bucket = Bucket(0, 0, torch.bfloat16, (Slice(0, 0, 1),), torch.float32)
    held = HeldGradients()
    for _ in range(2):
        held.add(bucket, [True], torch.full((1,), 1.0, dtype=torch.bfloat16), CPU)
        held.end_accumulation()
    _, payload = held.take(bucket, [True], torch.full((1,), 2.0**-8, dtype=torch.bfloat16))
    assert payload.dtype == torch.float32
    assert payload.item() == 2.0 + 2.0**-8
