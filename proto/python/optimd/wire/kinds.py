"""torch's names for the tensors of a parameter's state, and the schema's."""

from __future__ import annotations

from typing import Final, cast

from optimd.v1 import tensor_pb2

_PREFIX: Final = "TENSOR_KIND_"
_ENUM: Final = tensor_pb2.DESCRIPTOR.enum_types_by_name["TensorKind"]
_NUMBERS: Final[dict[str, int]] = {
    value.name.removeprefix(_PREFIX).lower(): value.number for value in _ENUM.values if value.number
}
_NAMES: Final = {number: name for name, number in _NUMBERS.items()}

PARAMETER: Final = "parameter"
GRADIENT: Final = "gradient"


def encode_kind(name: str) -> tensor_pb2.TensorKind:
    """The schema's number for `PARAMETER`, `GRADIENT` or a key of torch's state, such as "exp_avg".

    Raises:
        ValueError: the wire does not carry a tensor of that name.
    """
    try:
        return cast("tensor_pb2.TensorKind", _NUMBERS[name])
    except KeyError:
        raise ValueError(f"state tensor {name!r} is not carried") from None


def decode_kind(number: int) -> str:
    """The name that the schema's `number` stands for.

    Raises:
        ValueError: `number` is unknown or unspecified.
    """
    try:
        return _NAMES[number]
    except KeyError:
        raise ValueError(f"unknown tensor kind {number}") from None
