"""Sums of several workers' gradients of one bucket."""

from __future__ import annotations

from typing import Final

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optimd.server.accumulator import GradientAccumulator
from optimd.wire.layout import Bucket, Slice

CPU: Final = torch.device("cpu")
LENGTHS: Final = (3, 1, 0, 4)


def accumulator(dtype: torch.dtype = torch.float32, lengths: tuple[int, ...] = LENGTHS) -> GradientAccumulator:
    """An accumulator of a bucket with a slice of each length."""
    slices = tuple(Slice(index, 0, length) for index, length in enumerate(lengths))
    return GradientAccumulator(Bucket(0, 0, dtype, slices), CPU)


def payload(value: float, present: list[bool], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Present slices whose elements are all `value`."""
    return torch.full((sum(n for n, here in zip(LENGTHS, present, strict=True) if here),), value, dtype=dtype)


def lists(tensors: list[torch.Tensor]) -> list[list[float]]:
    """The elements of `tensors`."""
    return [tensor.tolist() for tensor in tensors]


ALL: Final = [True, True, True, True]
OUTER: Final = [True, False, False, True]
INNER: Final = [False, True, True, False]


def test_nothing_that_was_added_is_nothing() -> None:
    """No slice has a gradient."""
    empty = accumulator()
    assert empty.present == [False] * 4
    assert empty.reduced(1) == []
    assert empty.slice(0).tolist() == [0.0] * 3


def test_one_contribution_is_itself() -> None:
    """Slice by slice."""
    sums = accumulator()
    sums.add(torch.arange(8.0), ALL)
    assert sums.present == ALL
    assert lists(sums.reduced(1)) == [[0, 1, 2], [3], [], [4, 5, 6, 7]]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.complex64])
def test_contributions_add_up(dtype: torch.dtype) -> None:
    """In the bucket's dtype."""
    sums = accumulator(dtype)
    for value in (1.0, 2.0, 4.0):
        sums.add(payload(value, ALL, dtype), ALL)
    reduced = sums.reduced(1)
    assert {tensor.dtype for tensor in reduced} == {dtype}
    assert torch.equal(torch.cat(reduced), payload(7.0, ALL, dtype))


def test_a_mean_divides_by_the_contributors() -> None:
    """Also by those who had no gradient: they count as zero."""
    sums = accumulator()
    sums.add(payload(1.0, ALL), ALL)
    sums.add(payload(5.0, OUTER), OUTER)
    assert lists(sums.reduced(4)) == [[1.5] * 3, [0.25], [], [1.5] * 4]


def test_a_slice_that_nobody_has_is_left_out() -> None:
    """A parameter without any gradient is skipped, not stepped with zeros."""
    sums = accumulator()
    sums.add(payload(1.0, OUTER), OUTER)
    sums.add(payload(2.0, OUTER), OUTER)
    assert sums.present == OUTER
    assert lists(sums.reduced(1)) == [[3.0] * 3, [3.0] * 4]


def test_slices_of_several_workers_fill_each_other_up() -> None:
    """Each slice is the sum over those who had it."""
    sums = accumulator()
    sums.add(payload(1.0, OUTER), OUTER)
    sums.add(payload(2.0, INNER), INNER)
    sums.add(payload(4.0, ALL), ALL)
    assert sums.present == ALL
    assert lists(sums.reduced(1)) == [[5.0] * 3, [6.0], [], [5.0] * 4]


def test_a_full_contribution_after_a_partial_one_does_not_replace_it() -> None:
    """What was there stays in the sum."""
    sums = accumulator()
    sums.add(payload(1.0, INNER), INNER)
    sums.add(payload(4.0, ALL), ALL)
    assert lists(sums.reduced(1)) == [[4.0] * 3, [5.0], [], [4.0] * 4]


def test_contributions_are_only_read() -> None:
    """The first is copied, not kept: it may lie in a received message."""
    sums = accumulator()
    first, second = payload(1.0, ALL), payload(2.0, ALL)
    sums.add(first, ALL)
    sums.add(second, ALL)
    sums.reduced(2)
    assert torch.equal(first, payload(1.0, ALL))
    assert torch.equal(second, payload(2.0, ALL))


@pytest.mark.parametrize("before", [ALL, OUTER])
@pytest.mark.parametrize("after", [ALL, INNER, OUTER])
def test_a_cleared_sum_starts_from_nothing(before: list[bool], after: list[bool]) -> None:
    """Nothing of the step before is left, in whichever slices."""
    sums = accumulator()
    sums.add(payload(100.0, before), before)
    sums.reduced(1)
    sums.clear()
    assert sums.present == [False] * 4
    assert sums.reduced(1) == []
    sums.add(payload(1.0, after), after)
    assert sums.present == after
    assert torch.equal(torch.cat(sums.reduced(1)), payload(1.0, after))


def test_a_cleared_sum_keeps_its_memory() -> None:
    """Steps that follow take no more."""
    sums = accumulator()
    sums.add(payload(1.0, ALL), ALL)
    address = sums.reduced(1)[0].data_ptr()
    sums.clear()
    sums.add(payload(2.0, ALL), ALL)
    assert sums.reduced(1)[0].data_ptr() == address


def test_a_list_of_present_slices_that_was_handed_out_outlives_a_clear() -> None:
    """Who was told what had been applied is not told otherwise later."""
    sums = accumulator()
    sums.add(payload(1.0, OUTER), OUTER)
    present = sums.present
    sums.clear()
    assert present == OUTER


def test_a_slice_is_its_reduced_gradient_or_zeros() -> None:
    """As whole parameters are put together from their slices."""
    sums = accumulator()
    sums.add(payload(6.0, OUTER), OUTER)
    sums.reduced(2)
    assert [sums.slice(position).tolist() for position in range(4)] == [[3.0] * 3, [0.0], [], [3.0] * 4]
    assert sums.slice(1).dtype == torch.float32


def test_a_slice_of_a_cleared_sum_is_zeros() -> None:
    """Old memory is not taken for a gradient."""
    sums = accumulator(torch.bfloat16)
    sums.add(payload(6.0, ALL, torch.bfloat16), ALL)
    sums.clear()
    assert sums.slice(3).tolist() == [0.0] * 4
    assert sums.slice(3).dtype == torch.bfloat16


def test_narrow_gradients_are_added_up_and_divided_in_what_the_server_keeps() -> None:
    """257 has no bfloat16, nor has half of it."""
    sums = GradientAccumulator(Bucket(0, 0, torch.bfloat16, (Slice(0, 0, 3),), torch.float32), CPU)
    assert sums.slice(0).dtype is torch.float32
    for value in (256.0, 1.0):
        sums.add(torch.full((3,), value, dtype=torch.bfloat16), [True])
    (gradient,) = sums.reduced(2)
    assert gradient.dtype is torch.float32
    assert gradient.tolist() == [128.5] * 3


def test_a_sum_is_divided_once_and_keeps_what_is_done_to_it_then() -> None:
    """A gradient that was clipped is not reduced anew when it is applied; the next step's is."""
    sums = accumulator()
    sums.add(payload(6.0, ALL), ALL)
    for gradient in sums.reduced(2):
        gradient.mul_(0.5)
    assert torch.equal(torch.cat(sums.reduced(2)), payload(1.5, ALL))
    sums.clear()
    sums.add(payload(6.0, ALL), ALL)
    assert torch.equal(torch.cat(sums.reduced(2)), payload(3.0, ALL))


contributions = st.tuples(
    st.lists(st.booleans(), min_size=4, max_size=4), st.lists(st.integers(-1000, 1000), min_size=8, max_size=8)
)


@settings(max_examples=100, deadline=None)
@given(rounds=st.lists(st.lists(contributions, min_size=1, max_size=4), min_size=1, max_size=3))
def test_sums_are_those_of_the_present_slices(rounds: list[list[tuple[list[bool], list[int]]]]) -> None:
    """For any presence, over several steps of one accumulator."""
    sums = accumulator()
    for contributed in rounds:
        expected = torch.zeros(8)
        anybody = [False] * 4
        for present, elements in contributed:
            mask = torch.cat([torch.full((n,), here) for n, here in zip(LENGTHS, present, strict=True)])
            values = torch.tensor(elements, dtype=torch.float32)
            sums.add(values[mask], present)
            expected += values * mask
            anybody = [a or b for a, b in zip(anybody, present, strict=True)]
        assert sums.present == anybody
        pieces = torch.split(expected, LENGTHS)
        assert lists(sums.reduced(1)) == lists([piece for piece, here in zip(pieces, anybody, strict=True) if here])
        assert lists([sums.slice(position) for position in range(4)]) == lists(list(pieces))
        sums.clear()
