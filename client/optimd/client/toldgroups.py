"""What a server has been told of a worker's param_groups, so that a push brings those that have changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from optimd.v1 import param_group_pb2
from optimd.wire.param_groups import encode_group

_PLAIN: Final = frozenset((bool, int, float, str, type(None)))


class ToldGroups:
    """The options of one worker's param_groups, as the server knows them. Not thread-safe.

    Of a push that is not answered it may know what that told or what was told before.

    Args:
        rule: The update rule, by the schema's name.
    """

    def __init__(self, rule: str) -> None:
        self._rule = rule
        # What the server knows for sure, but for those groups that are in doubt.
        self._known: list[bytes] = []
        self._sizes: list[int] = []
        self._told: list[bytes] = []
        self._doubtful: set[int] = set()
        # What the options of a group looked like last, and their message: most steps change none.
        self._seen: dict[int, tuple[str, bytes]] = {}

    def __len__(self) -> int:
        return len(self._known)

    @property
    def sizes(self) -> Sequence[int]:
        """How many parameters each group has."""
        return self._sizes

    def encoded(self, groups: Sequence[Mapping[str, Any]]) -> list[param_group_pb2.ParamGroup]:
        """The messages of torch's param_groups."""
        return [encode_group(index, self._rule, group) for index, group in enumerate(groups)]

    def bring(self, groups: Sequence[param_group_pb2.ParamGroup], *, replaces: bool) -> None:
        """The job has these groups behind those that it had, or in their place."""
        if replaces:
            self._known, self._sizes = [], []
            self._doubtful.clear()
        self._known += [_serialised(group) for group in groups]
        self._sizes += [group.parameter_count for group in groups]

    def acknowledge(self, groups: Sequence[param_group_pb2.ParamGroup]) -> None:
        """The server knows all of these."""
        self._known = [_serialised(group) for group in groups]
        self._doubtful.clear()

    def tell(self, groups: Sequence[Mapping[str, Any]]) -> list[param_group_pb2.ParamGroup]:
        """What a push has to tell: those of torch's param_groups that the server may know otherwise."""
        self._told = [self._options(index, group) for index, group in enumerate(groups)]
        pairs = enumerate(zip(self._told, self._known, strict=True))
        self._doubtful |= {index for index, (new, old) in pairs if new != old}
        return [encode_group(index, self._rule, groups[index]) for index in sorted(self._doubtful)]

    def _options(self, index: int, group: Mapping[str, Any]) -> bytes:
        """A group's options as bytes that are equal where they are."""
        plain = _plain(group)
        seen = self._seen.get(index)
        if plain is not None and seen is not None and seen[0] == plain:
            return seen[1]
        options = _serialised(encode_group(index, self._rule, group))
        if plain is not None:
            self._seen[index] = plain, options
        return options

    def answered(self) -> None:
        """That push is answered: the server knows what it told."""
        self._known = self._told
        self._doubtful.clear()

    def opening(self) -> list[param_group_pb2.ParamGroup]:
        """The groups as a process that returns says them: with the options that the server knows for sure."""
        groups = [param_group_pb2.ParamGroup.FromString(group) for group in self._known]
        for group, size in zip(groups, self._sizes, strict=True):
            group.parameter_count = size
        return groups


def _plain(group: Mapping[str, Any]) -> str | None:
    """A group's options as text that is equal where they are; None where something in it may change in place."""
    options = {key: value for key, value in group.items() if key not in ("params", "param_names")}
    for value in options.values():
        parts = value if type(value) is tuple else (value,)
        if any(type(part) not in _PLAIN for part in parts):
            return None
    # As text, since as values 1, 1.0 and True are equal, and 0.0 and -0.0.
    return repr(options)


def _serialised(group: param_group_pb2.ParamGroup) -> bytes:
    """A group's options as bytes that are equal where they are."""
    options = param_group_pb2.ParamGroup()
    options.CopyFrom(group)
    options.ClearField("parameter_count")
    return options.SerializeToString(deterministic=True)
