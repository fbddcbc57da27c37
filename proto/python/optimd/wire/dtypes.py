"""torch dtypes and the schema's names for them."""

from __future__ import annotations

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


def encode_dtype(dtype: torch.dtype) -> tensor_pb2.Dtype:
    """The schema's name for `dtype`.

    Raises:
        ValueError: the wire does not carry `dtype`.
    """
    try:
        return _DTYPES[dtype]
    except KeyError:
        carried = ", ".join(str(known) for known in _DTYPES)
        raise ValueError(f"{dtype} is not carried; use one of {carried}") from None


def decode_dtype(number: int) -> torch.dtype:
    """The torch dtype that the schema's `number` stands for.

    Raises:
        ValueError: `number` is unknown or unspecified.
    """
    try:
        return _TORCH[number]  # type: ignore[index]  # protobuf enums are ints at run time
    except KeyError:
        raise ValueError(f"unknown dtype {number}") from None
