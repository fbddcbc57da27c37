"""A job as a checkpoint for people: a plain dict of what torch reads and writes.

    {"format": "optimd-export-1", "job": name, "step": steps that the job had committed,
     "optimizer": a state_dict of torch.optim.Adam,
     "parameters": {name: value}, "buffers": {name: value}, "settings": {...}}

Parameters are in the order of their indices. Where one has no name, or two have the same, all go by their indices.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch

from optimd.client import Async, ProxyOptions, Sync
from optimd.client.parameters import describe, titles
from optimd.client.statetransfer import RemoteEntry
from optimd.client.torchform import RULE, STATE_TENSORS, in_torchs_form
from optimd.client.wholejob import WholeJob
from optimd.wire.buffers import Buffer, encode_buffer
from optimd.wire.dtypes import encode_dtype
from optimd.wire.layout import Parameter
from optimd.wire.param_groups import decode_group, encode_group

FORMAT: Final = "optimd-export-1"

_CPU: Final = torch.device("cpu")


def to_checkpoint(job: str, whole: WholeJob) -> dict[str, Any]:
    """A job as a checkpoint. It shares the job's tensors.

    Args:
        job: Its name.
        whole: All of it.
    """
    keys = _keys(whole.parameters)
    return {
        "format": FORMAT,
        "job": job,
        "step": whole.step,
        "optimizer": _state_dict(whole),
        "parameters": {key: whole.values[index] for index, key in enumerate(keys)},
        "buffers": dict(whole.buffers),
        "settings": _settings(whole, keys),
    }


def from_checkpoint(checkpoint: Any) -> tuple[str, WholeJob]:
    """The job that a checkpoint is of: its name, and all of it. It shares the checkpoint's tensors.

    Args:
        checkpoint: What was read from a file, whatever that is.

    Raises:
        ValueError: it is none, or its parts do not fit together.
        AttributeError, LookupError, TypeError: a part of it is missing, or is something else.
    """
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != FORMAT:
        raise ValueError(f"its format is not {FORMAT!r}")
    keys, values = list(checkpoint["parameters"]), list(checkpoint["parameters"].values())
    groups = checkpoint["optimizer"]["param_groups"]
    if not values or [index for group in groups for index in group["params"]] != list(range(len(values))):
        raise ValueError("its param_groups do not have its parameters, each once and in order")
    settings = checkpoint["settings"]
    names = [name for group in groups for name in titles(group)]
    masters = settings["master_dtypes"]
    parameters = [
        _parameter(name, value, _dtype(masters[key]) if key in masters else None)
        for name, key, value in zip(names, keys, values, strict=True)
    ]
    for name, value in checkpoint["buffers"].items():
        encode_buffer(Buffer(name, value.dtype, tuple(value.shape)))
    return str(checkpoint["job"]), WholeJob(
        step=int(checkpoint["step"]),
        options=_options(settings),
        # By way of the schema: what it does not carry, or is missing, is noticed here.
        groups=[decode_group(encode_group(index, RULE, group)) for index, group in enumerate(groups)],
        sizes=[len(group["params"]) for group in groups],
        parameters=parameters,
        values=dict(enumerate(values)),
        entries={index: _entry(index, entry, parameters) for index, entry in checkpoint["optimizer"]["state"].items()},
        buffers=checkpoint["buffers"],
    )


def _keys(parameters: Sequence[Parameter]) -> list[str]:
    names = [parameter.name for parameter in parameters]
    is_named = all(names) and len(set(names)) == len(names)
    return names if is_named else [str(index) for index in range(len(names))]


def _state_dict(whole: WholeJob) -> dict[str, Any]:
    """What `state_dict()` of a `torch.optim.Adam` with these parameters gives."""
    state: dict[int, dict[str, Any]] = {}
    packed: list[dict[str, Any]] = []
    is_named = all(parameter.name for parameter in whole.parameters)
    first = 0
    for group, size in zip(whole.groups, whole.sizes, strict=True):
        indices = list(range(first, first + size))
        first += size
        state.update(
            {index: in_torchs_form(whole.entries[index], group, _CPU) for index in indices if index in whole.entries}
        )
        named = {"param_names": [whole.parameters[index].name for index in indices]} if is_named else {}
        packed.append({**group, **named, "params": indices})
    return {"state": state, "param_groups": packed}


def _settings(whole: WholeJob, keys: Sequence[str]) -> dict[str, Any]:
    options = whole.options
    policy = "async" if isinstance(options.aggregation, Async) else "sync"
    return {
        "aggregation": {"policy": policy, **dataclasses.asdict(options.aggregation)},
        "apply": options.apply,
        "bucket_bytes": options.bucket_bytes,
        "max_grad_norm": options.max_grad_norm,
        "nonfinite": options.nonfinite,
        "master_dtypes": {
            key: str(parameter.master_dtype).removeprefix("torch.")
            for key, parameter in zip(keys, whole.parameters, strict=True)
            if parameter.master_dtype is not None
        },
    }


def _parameter(name: str, value: torch.Tensor, master_dtype: torch.dtype | None) -> Parameter:
    encode_dtype(value.dtype)
    described = describe(value, name, master_dtype)
    if described.master_dtype is not master_dtype:
        raise ValueError(f"{master_dtype} is no master dtype of a parameter of {value.dtype}")
    return described


def _entry(index: int, entry: Mapping[str, Any], parameters: Sequence[Parameter]) -> RemoteEntry:
    if not 0 <= index < len(parameters):
        raise ValueError(f"it has a state of parameter {index}, which there is not")
    tensors = {name: entry[name] for name in STATE_TENSORS if name in entry}
    unknown = entry.keys() - {"step", *tensors}
    if unknown:
        raise ValueError(f"the state of parameter {index} has {', '.join(sorted(unknown))}, which Adam's has not")
    for name, tensor in tensors.items():
        if tuple(tensor.shape) != parameters[index].shape:
            raise ValueError(f"{name} of {parameters[index].title(index)} has another shape than the parameter")
    return RemoteEntry(float(entry["step"]), tensors)


def _options(settings: Mapping[str, Any]) -> ProxyOptions:
    policy = dict(settings["aggregation"])
    aggregation: Sync | Async = {"sync": Sync, "async": Async}[policy.pop("policy")](**policy)
    return ProxyOptions(
        aggregation=aggregation,
        apply=settings["apply"],
        bucket_bytes=settings["bucket_bytes"],
        max_grad_norm=settings["max_grad_norm"],
        nonfinite=settings["nonfinite"],
    )


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name)
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"{name!r} is no dtype")
    return dtype
