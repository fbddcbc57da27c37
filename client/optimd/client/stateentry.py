"""One parameter's entry of `opt.state`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping
from typing import Any, Final, NamedTuple

import torch

_PART: Final = 1 << 20
"""How many elements are looked at at once: what that takes of memory is small beside a model."""


class _Mark(NamedTuple):
    """What a value of an entry was when it came from the server."""

    kind: Any
    digest: int


class StateEntry(dict[str, Any]):
    """`opt.state[p]`: a dict that is fetched from the server when it is first looked at, and again after each step.

    What is put into it, and in-place changes of its tensors, reach the server with the next step. A tensor taken out of
    it shows the state as it was then. Not thread-safe.

    Args:
        own: The keys that are the server's business.
        fetch: Gives the entry's present content; None where it is not the server's.
    """

    def __init__(self, own: Collection[str], fetch: Callable[[], dict[str, Any]] | None = None) -> None:
        super().__init__()
        self._own = own
        self._fetch = fetch
        self.is_attached = True
        """Whether it is a parameter's entry."""
        self._marks: dict[str, _Mark] = {}
        self.is_fresh = fetch is None
        """Whether it holds its content."""

    def load(self) -> None:
        """Fetches the content, unless it is there."""
        if not self.is_fresh and self._fetch is not None:
            self.fill(self._fetch())

    def fill(self, content: Mapping[str, Any]) -> None:
        """Takes `content` for what the server holds."""
        self.is_fresh = True
        super().clear()
        super().update(content)
        self._marks = {key: _marked(value) for key, value in content.items() if key in self._own}

    def forget(self, fetch: Callable[[], dict[str, Any]]) -> None:
        """The server has moved on: what is looked at next is fetched with `fetch`."""
        self.is_fresh = False
        self._fetch = fetch
        super().clear()
        self._marks = {}

    def detach(self) -> None:
        """Keeps the content, which is the server's no longer."""
        self.load()
        self._fetch = None
        self._marks = {}
        self.is_attached = False

    @property
    def is_edited(self) -> bool:
        """Whether any of its own keys is not what the server holds."""
        if not self.is_fresh:
            return False
        mine = {key for key in self._own if dict.__contains__(self, key)}
        return mine != self._marks.keys() or any(
            _marked(dict.__getitem__(self, key)) != self._marks[key] for key in mine
        )

    def copy(self) -> dict[str, Any]:
        """A plain dict of the content."""
        self.load()
        return dict(dict.items(self))

    def __eq__(self, other: object) -> bool:
        return dict.__eq__(self.copy(), other.copy() if isinstance(other, StateEntry) else other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = None  # as a dict's

    def __deepcopy__(self, memo: dict[int, Any]) -> dict[str, Any]:
        return copy.deepcopy(self.copy(), memo)

    def __reduce__(self) -> tuple[Any, ...]:
        return (dict, (self.copy(),))


def _looking_first(name: str) -> Callable[..., Any]:
    method = getattr(dict, name)

    def looking(self: StateEntry, *args: Any, **kwargs: Any) -> Any:
        self.load()
        return method(self, *args, **kwargs)

    looking.__name__ = name
    return looking


for _name in (
    *("__contains__", "__delitem__", "__getitem__", "__ior__", "__iter__", "__len__", "__or__", "__repr__"),
    *(
        "__reversed__",
        "__ror__",
        "__setitem__",
        "clear",
        "get",
        "items",
        "keys",
        "pop",
        "popitem",
        "setdefault",
        "update",
        "values",
    ),
):
    setattr(StateEntry, _name, _looking_first(_name))


def _marked(value: Any) -> _Mark:
    if not isinstance(value, torch.Tensor):
        return _Mark(value, 0)
    return _Mark((value.dtype, value.shape), _digest(value.detach()))


def _digest(tensor: torch.Tensor) -> int:
    """A number that changes with the content: in-place writes are not all seen by a tensor's version."""
    flat = tensor.contiguous().view(-1)
    if flat.is_complex():
        flat = torch.view_as_real(flat).view(-1)
    integers = flat.view({8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}[flat.element_size()])
    total = 0
    for place, part in enumerate(torch.split(integers, _PART) if len(integers) else ()):
        # Bits are mixed with their place before they are summed up, as MurmurHash3's finalizer does it, so that neither
        # exchanges nor flipped signs cancel out. All of it wraps around.
        mixed = torch.arange(place * _PART, place * _PART + len(part), device=part.device)
        mixed *= -7046029254386353131
        mixed ^= part
        for factor in (-49064778989728563, -4265267296055464877):
            mixed ^= mixed >> 33
            mixed *= factor
        mixed ^= mixed >> 33
        total = (total + int(mixed.sum())) % (1 << 64)
    return total
