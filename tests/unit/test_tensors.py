"""Tensors as bytes, bytes as tensors, and the order in which elements travel."""

from __future__ import annotations

import gc
import weakref
from typing import Final

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optimd.wire.tensors import bytes_of, flatten, memory_order, tensor_over, unflatten

DTYPES: Final = (
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.complex64,
    torch.complex128,
)

several = settings(max_examples=100, deadline=None)


def numbered(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A contiguous tensor whose elements are all different."""
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float64).to(dtype).reshape(shape)


def is_view_of(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors share memory."""
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


DENSE: Final = {
    "contiguous": (numbered(2, 3, 4), (0, 1, 2)),
    "one dimension": (numbered(5), (0,)),
    "0-dim": (numbered(), ()),
    "transposed": (numbered(3, 4).t(), (1, 0)),
    "permuted": (numbered(2, 3, 4).permute(2, 0, 1), (1, 2, 0)),
    "channels last": (numbered(2, 3, 4, 5).to(memory_format=torch.channels_last), (0, 2, 3, 1)),
    "channels last of 1x1": (numbered(2, 3, 1, 1).to(memory_format=torch.channels_last), (0, 1, 2, 3)),
    "size-1 dimension of odd stride": (torch.as_strided(numbered(12), (3, 1, 4), (4, 1, 1)), (0, 1, 2)),
    "transposed around a size-1 dimension": (torch.as_strided(numbered(12), (4, 1, 3), (1, 99, 4)), (2, 1, 0)),
    "only size-1 dimensions": (torch.as_strided(numbered(3), (1, 1), (7, 9), 1), (0, 1)),
    "a slice of rows": (numbered(6, 4)[2:4], (0, 1)),
    "transposed slice of rows": (numbered(6, 4)[2:4].t(), (1, 0)),
}
NOT_DENSE: Final = {
    "every other column": numbered(4, 6)[:, ::2],
    "a slice of columns": numbered(4, 6)[:, :3],
    "transposed slice of columns": numbered(4, 6)[:, :3].t(),
    "expanded rows": numbered(3).expand(4, 3),
    "expanded columns": numbered(3, 1).expand(3, 4),
    "expanded scalar": numbered().expand(5),
    "every other element": numbered(10)[::2],
    "one column": numbered(6, 4)[:, 1:2],
    "overlapping": torch.as_strided(numbered(6), (4, 3), (1, 1)),
}


@pytest.mark.parametrize("case", DENSE)
def test_the_memory_order_of_a_dense_tensor_is_that_of_its_strides(case: str) -> None:
    """From the outermost dimension to the innermost; a dimension of one element stays where it is."""
    tensor, order = DENSE[case]
    assert memory_order(tensor) == order


@pytest.mark.parametrize("case", DENSE)
def test_flattening_a_dense_tensor_is_a_view(case: str) -> None:
    """Gradients of any dense layout are sent without a copy."""
    tensor, order = DENSE[case]
    flat = flatten(tensor, order)
    assert flat.shape == (tensor.numel(),)
    assert flat.is_contiguous()
    assert is_view_of(flat, tensor)


@pytest.mark.parametrize("case", DENSE)
def test_unflatten_inverts_flatten(case: str) -> None:
    """The elements come back to where they were, seen through a view with the same strides."""
    tensor, order = DENSE[case]
    back = unflatten(flatten(tensor, order), tensor.shape, order)
    assert torch.equal(back, tensor)
    assert is_view_of(back, tensor)
    assert memory_order(back) == order


@pytest.mark.parametrize("case", NOT_DENSE)
def test_any_other_tensor_gets_row_major_order(case: str) -> None:
    """Holes and overlaps have no order in memory that could be kept."""
    tensor = NOT_DENSE[case]
    assert memory_order(tensor) == tuple(range(tensor.dim()))


@pytest.mark.parametrize("case", NOT_DENSE)
def test_flattening_any_other_tensor_gives_its_elements_in_row_major_order(case: str) -> None:
    """As a view where one stride describes them, else as a contiguous copy."""
    tensor = NOT_DENSE[case]
    flat = flatten(tensor, memory_order(tensor))
    assert flat.tolist() == [item.item() for item in tensor.contiguous().view(-1)]
    assert flat.is_contiguous() != is_view_of(flat, tensor)


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 4), (2, 0, 3)])
def test_tensors_without_elements_have_row_major_order(shape: tuple[int, ...]) -> None:
    """Nothing is in memory, in any order; flattening and back keeps the shape."""
    tensor = torch.empty(shape).transpose(0, -1)
    order = memory_order(tensor)
    assert order == tuple(range(len(shape)))
    assert flatten(tensor, order).shape == (0,)
    assert unflatten(flatten(tensor, order), tensor.shape, order).shape == tensor.shape


@several
@given(data=st.data(), shape=st.lists(st.integers(1, 5), max_size=5))
def test_permuted_tensors_flatten_to_their_memory(data: st.DataObject, shape: list[int]) -> None:
    """Whatever the permutation of a contiguous tensor, flat is what lies in memory, and comes back."""
    memory = numbered(*shape)
    tensor = memory.permute(data.draw(st.permutations(range(len(shape)))))
    order = memory_order(tensor)
    flat = flatten(tensor, order)
    assert is_view_of(flat, memory)
    assert torch.equal(flat, memory.view(-1))
    assert torch.equal(unflatten(flat, tensor.shape, order), tensor)


@several
@given(data=st.data(), shape=st.lists(st.integers(1, 5), max_size=5))
def test_elements_travel_in_the_order_of_the_other_side(data: st.DataObject, shape: list[int]) -> None:
    """A tensor flattened in any order, its own or not, comes back equal."""
    tensor = numbered(*shape)
    order = tuple(data.draw(st.permutations(range(len(shape)))))
    flat = flatten(tensor, order)
    assert torch.equal(flat, tensor.permute(order).contiguous().view(-1))
    assert torch.equal(unflatten(flat, tensor.shape, order), tensor)


@pytest.mark.parametrize("dtype", DTYPES)
def test_bytes_and_tensors_are_views_of_one_memory(dtype: torch.dtype) -> None:
    """Neither direction copies: what is written into the one is seen through the other."""
    flat = numbered(5, dtype=dtype)
    view = bytes_of(flat)
    assert view.nbytes == flat.nbytes
    assert view.format == "B"
    over = tensor_over(view, dtype)
    assert over.dtype == dtype
    assert over.shape == (5,)
    flat[3] = 42
    assert over[3] == 42


def test_the_bytes_are_those_of_the_elements() -> None:
    """Little-endian, one element after another."""
    assert bytes(bytes_of(torch.tensor([1.0, -2.0]))) == b"\x00\x00\x80\x3f\x00\x00\x00\xc0"
    assert tensor_over(memoryview(b"\x00\x00\x80\x3f\x00\x00\x00\xc0"), torch.float32).tolist() == [1.0, -2.0]


def test_the_bytes_of_a_slice_are_its_own() -> None:
    """A tensor that begins in the middle of its storage is seen from there."""
    assert bytes(bytes_of(numbered(8)[2:5])) == bytes(bytes_of(numbered(8)))[8:20]


def test_nothing_has_no_bytes() -> None:
    """Empty tensors and empty payloads are no exception."""
    assert bytes(bytes_of(torch.empty(0))) == b""
    assert tensor_over(memoryview(b""), torch.bfloat16).shape == (0,)
    assert tensor_over(memoryview(b""), torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shift", [1, 2, 3, 5, 7])
def test_payloads_of_any_alignment_are_read(dtype: torch.dtype, shift: int) -> None:
    """A payload lies where the header before it ends."""
    flat = numbered(100, dtype=dtype)
    data = bytes(shift) + bytes(bytes_of(flat))
    over = tensor_over(memoryview(data)[shift:], dtype)
    assert torch.equal(over, flat)
    assert torch.equal(over + over, flat + flat)


@pytest.mark.parametrize(("nbytes", "dtype"), [(3, torch.bfloat16), (6, torch.float32), (8, torch.complex128)])
def test_a_payload_that_is_no_whole_number_of_elements_is_refused(nbytes: int, dtype: torch.dtype) -> None:
    """The error names the bytes and the dtype."""
    with pytest.raises(ValueError, match=f"{nbytes} bytes are not a whole number of {dtype} elements"):
        tensor_over(memoryview(bytes(nbytes)), dtype)


@pytest.mark.parametrize("tensor", [numbered(10)[::2], numbered(3, 4).t(), torch.empty(3, device="meta")])
def test_only_contiguous_cpu_tensors_have_bytes(tensor: torch.Tensor) -> None:
    """Anything else would show bytes that are not the elements'."""
    with pytest.raises(ValueError, match="contiguous CPU tensor"):
        bytes_of(tensor)


def test_the_bytes_keep_the_tensor_alive() -> None:
    """As long as any view of them is there, and no longer."""
    flat = torch.full((1000,), 7.0)
    alive = weakref.ref(flat)
    part = bytes_of(flat)[400:404]
    del flat
    gc.collect()
    assert alive() is not None
    assert bytes(part) == b"\x00\x00\xe0\x40"
    del part
    gc.collect()
    assert alive() is None


def test_a_tensor_keeps_its_payload_alive() -> None:
    """A received message may be forgotten while its payload is in use."""

    class Payload(bytearray):
        """A buffer that can be watched."""

    payload = Payload(b"\x00\x00\xe0\x40" * 1000)
    alive = weakref.ref(payload)
    over = tensor_over(memoryview(payload)[4:], torch.float32)[10:]
    del payload
    gc.collect()
    assert alive() is not None
    assert over.tolist() == [7.0] * 989
    del over
    gc.collect()
    assert alive() is None
