"""A checkpoint as safetensors has it: named tensors, row-major, and text beside them.

Tensors are named `parameters.NAME`, `optimizer.INDEX.KEY` and `buffers.NAME`. All else is JSON, under `optimd` in the
file's metadata. What JSON has no word for is an object with one key that begins with a dollar sign.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, Final

import torch

from optimd.wire.tensors import flatten, memory_order, unflatten

_KEY: Final = "optimd"


def pack(checkpoint: Mapping[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The tensors and the metadata of a checkpoint's file. Row-major tensors are shared, others copied."""
    parameters, state = checkpoint["parameters"], checkpoint["optimizer"]["state"]
    tensors = {
        **{f"parameters.{name}": value for name, value in parameters.items()},
        **{f"optimizer.{index}.{key}": value for index, entry in state.items() for key, value in entry.items()},
        **{f"buffers.{name}": value for name, value in checkpoint["buffers"].items()},
    }
    content = {
        **{key: checkpoint[key] for key in ("format", "job", "step", "settings")},
        "param_groups": checkpoint["optimizer"]["param_groups"],
        "parameters": list(parameters),
        "memory_orders": [_order(value) for value in parameters.values()],
        "state": {str(index): list(entry) for index, entry in state.items()},
        "buffers": list(checkpoint["buffers"]),
        # Pairs of real and imaginary parts: the format knows no complex128, and its older readers no complex64.
        "complex": [name for name, tensor in tensors.items() if tensor.is_complex()],
    }
    return (
        {name: _plain(tensor) for name, tensor in tensors.items()},
        # "pt": what other readers of such files take for tensors as torch has them.
        {"format": "pt", _KEY: json.dumps(_encode(content), allow_nan=False)},
    )


def unpack(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> dict[str, Any]:
    """The checkpoint that a file has.

    Raises:
        ValueError: it has none.
        AttributeError, LookupError, TypeError: a part of it is missing, or is something else.
    """
    if _KEY not in metadata:
        raise ValueError(f"its metadata has no {_KEY!r}")
    content = _decode(json.loads(metadata[_KEY]))
    are_complex = set(content["complex"])

    def tensor(name: str) -> torch.Tensor:
        # A copy: complex numbers have to lie at multiples of their size.
        return torch.view_as_complex(tensors[name].clone()) if name in are_complex else tensors[name]

    parameters = {}
    orders: dict[int, tuple[int, ...] | None] = {}
    for index, (name, order) in enumerate(zip(content["parameters"], content["memory_orders"], strict=True)):
        orders[index] = None if order is None else tuple(order)
        parameters[name] = _ordered(tensor(f"parameters.{name}"), orders[index])
    state = {
        int(index): {
            key: _ordered(tensor(f"optimizer.{index}.{key}"), orders[int(index)] if key != "step" else None)
            for key in keys
        }
        for index, keys in content["state"].items()
    }
    return {
        **{key: content[key] for key in ("format", "job", "step")},
        "optimizer": {"state": state, "param_groups": content["param_groups"]},
        "parameters": parameters,
        "buffers": {name: tensor(f"buffers.{name}") for name in content["buffers"]},
        "settings": content["settings"],
    }


def _order(tensor: torch.Tensor) -> tuple[int, ...] | None:
    """The memory order of a tensor; None where it is row-major."""
    order = memory_order(tensor)
    return None if order == tuple(range(tensor.dim())) else order


def _ordered(tensor: torch.Tensor, order: tuple[int, ...] | None) -> torch.Tensor:
    if order is None:
        return tensor
    return unflatten(flatten(tensor, order).contiguous(), tensor.shape, order)


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    return (torch.view_as_real(tensor) if tensor.is_complex() else tensor).contiguous()


def _encode(value: Any) -> Any:
    match value:
        case float() if not math.isfinite(value):
            return {"$float": str(value)}
        case torch.Tensor():
            return {"$tensor": [_encode(value.item()), str(value.dtype).removeprefix("torch.")]}
        case tuple():
            return {"$tuple": [_encode(item) for item in value]}
        case list():
            return [_encode(item) for item in value]
        case dict():
            return {key: _encode(item) for key, item in value.items()}
        case _:
            return value


def _decode(value: Any) -> Any:
    match value:
        case {"$float": str() as text, **rest} if not rest:
            return float(text)
        case {"$tensor": [number, str() as dtype], **rest} if not rest:
            return torch.tensor(_decode(number), dtype=getattr(torch, dtype))
        case {"$tuple": list() as items, **rest} if not rest:
            return tuple(_decode(item) for item in items)
        case dict():
            return {key: _decode(item) for key, item in value.items()}
        case list():
            return [_decode(item) for item in value]
        case _:
            return value
