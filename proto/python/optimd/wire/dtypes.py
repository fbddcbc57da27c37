"""torch dtypes and the schema's names for them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import torch

from optimd.v1 import tensor_pb2

_DTYPES: Final[dict[torch.dtype, tensor_pb2.Dtype]] = {
    torch.float64: tensor_pb2.DTYPE_FLOAT64,
    torch.float32: tensor_pb2.DTYPE_FLOAT32,
    torch.bfloat16: tensor_pb2.DTYPE_BFLOAT16,
    torch.float16: tensor_pb2.DTYPE_FLOAT16,
    torch.complex64: tensor_pb2.DTYPE_COMPLEX64,
    torch.complex128: tensor_pb2.DTYPE_COMPLEX128,
}
_TORCH: Final = {number: dtype for dtype, number in _DTYPES.items()}

# Nothing differentiates a buffer: it may hold counters and masks besides.
_BUFFER_DTYPES: Final[dict[torch.dtype, tensor_pb2.Dtype]] = {
    **_DTYPES,
    torch.int64: tensor_pb2.DTYPE_INT64,
    torch.int32: tensor_pb2.DTYPE_INT32,
    torch.int16: tensor_pb2.DTYPE_INT16,
    torch.int8: tensor_pb2.DTYPE_INT8,
    torch.uint8: tensor_pb2.DTYPE_UINT8,
    torch.bool: tensor_pb2.DTYPE_BOOL,
}
_TORCH_OF_BUFFER: Final = {number: dtype for dtype, number in _BUFFER_DTYPES.items()}


def is_carried(dtype: torch.dtype) -> bool:
    """Whether the wire carries parameters of `dtype`."""
    return dtype in _DTYPES


def encode_dtype(dtype: torch.dtype) -> tensor_pb2.Dtype:
    """The schema's name for `dtype`, that of a parameter.

    Raises:
        ValueError: the wire does not carry parameters of `dtype`.
    """
    return _encode(dtype, _DTYPES)


def decode_dtype(number: int) -> torch.dtype:
    """The torch dtype, that of a parameter, that the schema's `number` stands for.

    Raises:
        ValueError: `number` is unknown, unspecified, or of buffers only.
    """
    return _decode(number, _TORCH)


def encode_buffer_dtype(dtype: torch.dtype) -> tensor_pb2.Dtype:
    """The schema's name for `dtype`, that of a buffer.

    Raises:
        ValueError: the wire does not carry buffers of `dtype`.
    """
    return _encode(dtype, _BUFFER_DTYPES)


def decode_buffer_dtype(number: int) -> torch.dtype:
    """The torch dtype, that of a buffer, that the schema's `number` stands for.

    Raises:
        ValueError: `number` is unknown or unspecified.
    """
    return _decode(number, _TORCH_OF_BUFFER)


def _encode(dtype: torch.dtype, table: Mapping[torch.dtype, tensor_pb2.Dtype]) -> tensor_pb2.Dtype:
    try:
        return table[dtype]
    except KeyError:
        raise ValueError(f"{dtype} is not carried; use one of {', '.join(map(str, table))}") from None


def _decode(number: int, table: Mapping[tensor_pb2.Dtype, torch.dtype]) -> torch.dtype:
    try:
        return table[number]  # type: ignore[index]  # protobuf enums are ints at run time
    except KeyError:
        raise ValueError(f"unknown dtype {number}") from None
