"""Norms of whole gradients, clipping, and what is finite, without a job."""

from __future__ import annotations

from typing import Final

import pytest
import torch

from optimd.server import clipping

DTYPES: Final = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.complex64, torch.complex128)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_one_bad_element_makes_a_gradient_not_finite(bad: float, dtype: torch.dtype) -> None:
    """Wherever it is, in vectorised part and tail."""
    for position in (0, 63, 64, 100):
        pieces = [torch.ones(101, dtype=dtype), torch.ones(101, dtype=dtype), torch.ones((), dtype=dtype)]
        assert clipping.is_finite(pieces)
        pieces[1][position] = bad
        assert not clipping.is_finite(pieces)


def test_a_bad_imaginary_part_counts() -> None:
    """A complex element is finite if both of its parts are."""
    assert not clipping.is_finite([torch.tensor([1 + 1j, complex(1, torch.inf)])])


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_largest_numbers_are_finite(dtype: torch.dtype) -> None:
    """Neither their sum nor their modulus has to be representable."""
    largest = torch.finfo(dtype).max
    assert clipping.is_finite(
        [torch.full((100,), complex(largest, -largest) if dtype.is_complex else largest, dtype=dtype)]
    )


def test_nothing_is_finite_and_has_norm_zero() -> None:
    """A step without a gradient, and gradients without an element."""
    assert clipping.is_finite([])
    assert clipping.is_finite([torch.ones(0)])
    assert clipping.total_norm([]).item() == 0.0
    assert clipping.total_norm([[torch.ones(0)]]).item() == 0.0
    clipping.clip_([], 1.0, torch.tensor(0.0))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_norm_is_torchs_however_the_gradients_are_cut(dtype: torch.dtype) -> None:
    """Bit for bit; the sum of the slices' squares would not be."""
    generator = torch.Generator().manual_seed(3)
    grads = [torch.randn(length, dtype=dtype, generator=generator) for length in (5000, 3, 777)]
    pieces = [list(torch.split(grad, 192)) for grad in grads]
    norm = clipping.total_norm(pieces)
    expected = torch.nn.utils.get_total_norm(grads)
    assert norm.dtype is expected.dtype
    assert torch.equal(norm, expected)
    clipping.clip_(pieces, 1.0, norm)
    params = [torch.nn.Parameter(torch.zeros_like(grad)) for grad in grads]
    fresh = torch.Generator().manual_seed(3)
    for p in params:
        p.grad = torch.randn(p.shape, dtype=dtype, generator=fresh)
    torch.nn.utils.clip_grad_norm_(params, 1.0)
    assert all(torch.equal(grad, p.grad) for grad, p in zip(grads, params, strict=True))
