"""Tensors as bytes and bytes as tensors, and the order in which elements travel.

Shape suffix used here: a `flat` tensor is 1-D and contiguous, on the CPU, with the elements of a parameter in its
memory order.
"""

from __future__ import annotations

import ctypes
import functools
import warnings
from typing import Final, NamedTuple

import torch

# What is copied in less time than it takes to let go of the interpreter's lock, and to get it again.
_QUICK_BYTES: Final = 32 * 1024
_copy_quickly = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)(
    ctypes.cast(ctypes.memmove, ctypes.c_void_p).value or 0
)

# torch warns once per process that a tensor over received bytes must not be written to. Nothing here writes to
# one; the warning is spent now, so that no user meets it. numpy would do without, but is no dependency of a worker.
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    torch.frombuffer(b"\0", dtype=torch.uint8)


@functools.lru_cache(maxsize=4096)
def _array_of(nbytes: int) -> type[ctypes.Array[ctypes.c_char]]:
    """A type for so many bytes. To make one takes ctypes longer than all else that a view needs."""
    return ctypes.c_char * nbytes


def bytes_of(flat: torch.Tensor) -> memoryview:
    """The bytes of a flat CPU tensor, without a copy. The view keeps the tensor alive."""
    if flat.device.type != "cpu" or not flat.is_contiguous():
        raise ValueError("only the bytes of a contiguous CPU tensor can be viewed")
    return memory_at(flat.data_ptr(), flat.numel() * flat.element_size(), flat)


def memory_at(address: int, nbytes: int, owner: object) -> memoryview:
    """A view of the host's memory. Keeps `owner` alive, which has to keep the memory."""
    array = _array_of(nbytes).from_address(address)
    array.owner = owner  # type: ignore[attr-defined]  # what the views of the array hold on to
    return memoryview(array).cast("B")


class Span(NamedTuple):
    """Bytes in the host's memory, by their address: what costs least to make, and to copy with `copy_bytes`."""

    address: int
    nbytes: int
    owner: object
    """What keeps the memory."""


def span_of(flat: torch.Tensor) -> Span:
    """The bytes of a flat, contiguous CPU tensor."""
    if flat.device.type != "cpu" or not flat.is_contiguous():
        raise ValueError("only the bytes of a contiguous CPU tensor can be told of")
    return Span(flat.data_ptr(), flat.numel() * flat.element_size(), flat)


def address_of(payload: memoryview) -> int:
    """Where bytes lie that something else keeps."""
    return torch.frombuffer(payload, dtype=torch.uint8).data_ptr() if payload.nbytes else 0


def copy_bytes(target: int, source: int, nbytes: int) -> None:
    """Copies memory that does not overlap, by addresses. Lets other threads run meanwhile, if it takes long enough.

    The C library knows to write what is large past the processor's cache: a quarter to a third faster than torch's loop
    where the target is not in the cache already.
    """
    if nbytes < _QUICK_BYTES:
        _copy_quickly(target, source, nbytes)
    else:
        ctypes.memmove(target, source, nbytes)


def tensor_over(payload: memoryview, dtype: torch.dtype) -> torch.Tensor:
    """A flat CPU tensor over `payload`, without a copy. It keeps the payload alive and must not be written to.

    Only complex128 is copied where the payload lies askew: torch's kernels load it with instructions that fault there.
    All other types are loaded from any address.

    Raises:
        ValueError: the payload is not a whole number of elements.
    """
    if payload.nbytes % dtype.itemsize:
        raise ValueError(f"{payload.nbytes} bytes are not a whole number of {dtype} elements")
    if not payload.nbytes:
        return torch.empty(0, dtype=dtype)
    tensor = torch.frombuffer(payload, dtype=torch.uint8)
    if dtype is torch.complex128 and tensor.data_ptr() % dtype.itemsize:
        tensor = tensor.clone()
    return tensor.view(dtype)


def memory_order(tensor: torch.Tensor) -> tuple[int, ...]:
    """The dimensions of `tensor` from the outermost in memory to the innermost.

    For a dense tensor (one that covers its memory without holes or overlaps: contiguous, transposed, channels-last)
    these are the dimensions by falling stride, so that `flatten` is a view. Any other tensor gets row-major order.
    """
    # A dimension of one element has no say in where the others lie, whatever its stride: it stays where it is.
    order = list(range(tensor.dim()))
    wide = [dim for dim in order if tensor.size(dim) != 1]
    strides = tensor.stride()
    by_stride = sorted(wide, key=lambda dim: -strides[dim])
    for slot, dim in zip(wide, by_stride, strict=True):
        order[slot] = dim
    if tensor.numel() and tensor.permute(order).is_contiguous():
        return tuple(order)
    return tuple(range(tensor.dim()))


def flatten(tensor: torch.Tensor, order: tuple[int, ...]) -> torch.Tensor:
    """The elements of `tensor` in memory order `order`, 1-D.

    A contiguous view where the tensor is dense in that order. Any other gives a view if one stride describes it,
    which then is not contiguous, else a copy.
    """
    return tensor.permute(order).reshape(-1)


def unflatten(flat: torch.Tensor, shape: torch.Size, order: tuple[int, ...]) -> torch.Tensor:
    """The inverse of `flatten`: a view of `flat` with `shape`, whose elements lie in memory order `order`."""
    permuted = flat.view([shape[dim] for dim in order])
    inverse = [0] * len(order)
    for position, dim in enumerate(order):
        inverse[dim] = position
    return permuted.permute(inverse)
