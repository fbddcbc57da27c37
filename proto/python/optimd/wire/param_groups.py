"""torch's param_groups as the schema writes them.

Nothing here knows an option by name: the fields of the rule's message in `ParamGroup.options` are torch's keys.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import torch
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from optimd.v1 import param_group_pb2
from optimd.wire.dtypes import decode_dtype, encode_dtype

# `params` are tensors and `param_names` travel with the parameters they name.
_NOT_OPTIONS: Final = frozenset({"params", "param_names"})
_INT64: Final = range(-(2**63), 2**63)
# Protobuf parsers give up at 100 nested messages, and a list in a list is two.
_MAX_DEPTH: Final = 16

RULES: Final = tuple(field.name for field in param_group_pb2.ParamGroup.DESCRIPTOR.oneofs_by_name["options"].fields)
"""The update rules that the schema has options for."""


def encode_group(
    index: int, rule: str, group: Mapping[str, Any], *, parameter_count: int = 0
) -> param_group_pb2.ParamGroup:
    """The options of one of torch's param_groups.

    Numbers become doubles, one-element tensors their value, with their dtype beside it. What a scheduler or a user
    added travels in `extra`; values that the schema cannot express are left out.

    Args:
        index: The group's index.
        rule: The update rule, one of `RULES`.
        group: The group's dict, complete for the rule.
        parameter_count: How many parameters it has; 0 where only its options matter.
    """
    message = param_group_pb2.ParamGroup(index=index, parameter_count=parameter_count)
    options = getattr(message, rule)
    options.SetInParent()
    known = {field.name for field in options.DESCRIPTOR.fields}
    for field in options.DESCRIPTOR.fields:
        value = group[field.name]
        if field.message_type is not None:
            nested = getattr(options, field.name)
            for place, (part, item) in enumerate(zip(field.message_type.fields, value, strict=True)):
                setattr(nested, part.name, _number(message, f"{field.name}.{place}", item))
        elif value is not None:
            setattr(options, field.name, _number(message, field.name, value))
    for key, value in group.items():
        if key in known or key in _NOT_OPTIONS or not isinstance(key, str) or not key.isprintable():
            continue
        encoded = _encode_extra(value)
        if encoded is not None:
            message.extra[key].CopyFrom(encoded)
    return message


def decode_group(message: param_group_pb2.ParamGroup) -> dict[str, Any]:
    """The options in `message` as one of torch's param_groups, without its parameters.

    Options that were tensors are 0-dim tensors on the CPU.

    Raises:
        ValueError: the message has options of no rule, an extra in the place of one, or a tensor of an unknown dtype.
    """
    rule = message.WhichOneof("options")
    if rule is None:
        raise ValueError("a param group without options")
    options = getattr(message, rule)
    _check_tensors(message, options)
    group: dict[str, Any] = {}
    for field in options.DESCRIPTOR.fields:
        if field.message_type is not None:
            nested = getattr(options, field.name)
            group[field.name] = tuple(
                _restored(message, f"{field.name}.{place}", getattr(nested, part.name))
                for place, part in enumerate(field.message_type.fields)
            )
        elif field.has_presence and not options.HasField(field.name):
            group[field.name] = None
        else:
            group[field.name] = _restored(message, field.name, getattr(options, field.name))
    for key, value in message.extra.items():
        if key in group or key in _NOT_OPTIONS:
            raise ValueError(f"extra must not have {key!r}, which is an option of its own")
        group[key] = _decode_extra(value)
    return group


def rule_of(message: param_group_pb2.ParamGroup) -> str | None:
    """The update rule whose options `message` has; None where it has none."""
    rule: str | None = message.WhichOneof("options")
    return rule


def _number(message: param_group_pb2.ParamGroup, key: str, value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        # Such as numpy's 0-dim arrays, which compute as numbers do.
        return float(value) if hasattr(value, "__float__") and not isinstance(value, int | float) else value
    if value.dtype.is_floating_point:
        message.tensors[key] = encode_dtype(value.dtype)
    return value.item()


def _check_tensors(message: param_group_pb2.ParamGroup, options: Message) -> None:
    """Only numbers can have been tensors, and only of a floating type.

    Raises:
        ValueError: another option is said to be one.
    """
    possible = set()
    for field in options.DESCRIPTOR.fields:
        if field.message_type is not None:
            possible |= {f"{field.name}.{place}" for place in range(len(field.message_type.fields))}
        elif field.type == FieldDescriptor.TYPE_DOUBLE:
            possible.add(field.name)
    for key, number in message.tensors.items():
        if key not in possible or not decode_dtype(number).is_floating_point:
            raise ValueError(f"option {key!r} cannot be a tensor of dtype {number}")


def _restored(message: param_group_pb2.ParamGroup, key: str, value: Any) -> Any:
    if key not in message.tensors:
        return value
    return torch.tensor(value, dtype=decode_dtype(message.tensors[key]))


def _encode_extra(value: Any, depth: int = 0) -> param_group_pb2.ExtraValue | None:
    """`value` as the schema writes it; None where it cannot."""
    encoded = param_group_pb2.ExtraValue()
    match value:
        case None:
            pass
        case bool():
            encoded.bool_value = value
        case int() if value in _INT64:
            encoded.int_value = value
        case float():
            encoded.double_value = value
        case str() if value.isprintable():
            encoded.string_value = value
        case list() | tuple() if depth < _MAX_DEPTH:
            items = [_encode_extra(item, depth + 1) for item in value]
            if any(item is None for item in items):
                return None
            encoded.list_value.SetInParent()
            encoded.list_value.items.extend(item for item in items if item is not None)
        case torch.Tensor() if value.numel() == 1 and value.dtype.is_floating_point:
            encoded.double_value = float(value)
        case _:
            return None
    return encoded


def _decode_extra(value: param_group_pb2.ExtraValue) -> Any:
    kind = value.WhichOneof("value")
    if kind is None:
        return None
    if kind == "list_value":
        return [_decode_extra(item) for item in value.list_value.items]
    return getattr(value, kind)
