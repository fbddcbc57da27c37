"""`opt.state` of an optimizer whose state is elsewhere."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Collection, ItemsView, Iterator, Mapping, MutableMapping, Sequence, ValuesView
from typing import Any, Final

import torch

from optimd.client.stateentry import StateEntry

_READS_ALONE: Final = 3
"""How many entries are read one by one before those that follow are read with them."""

_AHEAD_BYTES: Final = 4 << 20
"""How much is read ahead, at most: a worker may have no room for all of it."""

_MOST_AHEAD: Final = 1024


class StateCache:
    """What a process holds of the optimizer's state besides the server: entries looked at, edits, and foreign keys.

    Not thread-safe.

    Args:
        own: torch's keys of the rule's own state; all others are foreign and stay in this process.
    """

    def __init__(self, own: Collection[str]) -> None:
        self.own = frozenset(own)
        self.fetch: Callable[[int], dict[str, Any]] | None = None
        self.listed: frozenset[int] | None = None
        """Which parameters have a state on the server, once that was asked for."""
        self.known: list[torch.Tensor] = []
        """The parameters whose state the server holds, by index."""
        self._positions: dict[int, int] = {}
        self.entries: dict[torch.Tensor, StateEntry] = {}
        self.removed: set[torch.Tensor] = set()
        self.foreign: dict[torch.Tensor, dict[str, Any]] = {}
        self.others: dict[Any, Any] = {}
        """What is kept under keys that are no parameters."""

    def index(self, tensor: torch.Tensor) -> int | None:
        """The index under which the server holds a parameter's state; None where it does not."""
        return self._positions.get(id(tensor))

    def take_over(self, tensor: torch.Tensor) -> None:
        """Keeps a parameter's state in this process from now on."""
        entry = self.entries.get(tensor)
        if entry is None:
            index = self.index(tensor)
            if index is None or self.fetch is None:
                return
            entry = self.entries[tensor] = StateEntry(self.own, self.fetcher(tensor, index, self.fetch))
        entry.detach()

    def edits(self) -> dict[torch.Tensor, StateEntry | None]:
        """The parameters whose state was changed by hand, with their entries; None where it was taken away."""
        edits: dict[torch.Tensor, StateEntry | None] = dict.fromkeys(self.removed)
        edits.update((tensor, entry) for tensor, entry in self.entries.items() if entry.is_edited)
        return edits

    def settle(self, known: Sequence[torch.Tensor], fetch: Callable[[int], dict[str, Any]]) -> None:
        """All edits are with the server, which has moved on.

        Args:
            known: The job's parameters.
            fetch: Fetches the state of the parameter with a given index, without foreign keys.
        """
        self.fetch = fetch
        self.listed = None
        for tensor, entry in self.entries.items():
            if entry.is_fresh:
                foreign = {key: value for key, value in dict.items(entry) if key not in self.own}
                self.foreign[tensor] = foreign
        self.know(known)
        for tensor, entry in [*self.entries.items()]:
            index = self.index(tensor)
            if index is not None:
                entry.forget(self.fetcher(tensor, index, fetch))
            elif entry.is_fresh:
                # As torch keeps the state of a parameter that is in no group any more.
                entry.detach()
            else:
                entry.fill({})
                entry.detach()
                del self.entries[tensor]
        self.foreign = {tensor: keys for tensor, keys in self.foreign.items() if keys}
        self.removed.clear()

    def know(self, known: Sequence[torch.Tensor]) -> None:
        """The server holds the state of these parameters, by index."""
        if len(known) != len(self.known) or any(a is not b for a, b in zip(known, self.known, strict=True)):
            self.known = list(known)
            self._positions = {id(tensor): index for index, tensor in enumerate(known)}

    def relocate(self, known: Sequence[torch.Tensor], fetch: Callable[[int], dict[str, Any]]) -> None:
        """As `settle`, but that edits are still to be sent."""
        edited = {tensor: entry for tensor, entry in self.entries.items() if entry.is_edited}
        for tensor in edited:
            del self.entries[tensor]
        self.settle(known, fetch)
        self.entries.update(edited)

    def replace(self, content: Mapping[Any, Any], fetch: Callable[[int], dict[str, Any]]) -> None:
        """The server has been given a whole state, without what is foreign to it.

        Args:
            content: The state, by parameter.
            fetch: As in `settle`.
        """
        for entry in self.entries.values():
            if entry.is_edited:
                entry.detach()
        self.entries = {tensor: entry for tensor, entry in self.entries.items() if not entry.is_edited}
        self.settle(self.known, fetch)
        self.foreign.clear()
        self.others.clear()
        for key, entry in content.items():
            if isinstance(key, torch.Tensor):
                self.foreign[key] = {name: value for name, value in entry.items() if name not in self.own}
            else:
                self.others[key] = entry
        self.foreign = {tensor: keys for tensor, keys in self.foreign.items() if keys}

    def fetcher(
        self, tensor: torch.Tensor, index: int, fetch: Callable[[int], dict[str, Any]]
    ) -> Callable[[], dict[str, Any]]:
        """Fetches one parameter's entry, foreign keys included."""
        # Entries do not keep the cache that holds them alive, and with it the parameters.
        cache = weakref.ref(self)

        def fetch_entry() -> dict[str, Any]:
            here = cache()
            return {**fetch(index), **(here.foreign.get(tensor, {}) if here is not None else {})}

        return fetch_entry


class ReadAhead:
    """Reads entries one by one, and those that follow with them once it is clear that they are wanted.

    A program that goes over its parameters asks for one state after another: each would be a call of its own.
    """

    def __init__(self) -> None:
        self._ahead: dict[int, dict[str, Any]] = {}
        self._reads = 0

    def clear(self) -> None:
        """What was read ahead is the server's no longer."""
        self._ahead.clear()
        self._reads = 0

    def read(
        self,
        index: int,
        fetch: Callable[[Sequence[int]], dict[int, dict[str, Any]]],
        list_sizes: Callable[[], Sequence[int]],
    ) -> dict[str, Any]:
        """The state of the parameter with this index.

        Args:
            index: The index.
            fetch: Fetches the state of the parameters with the given indices.
            list_sizes: Tells what the states of all parameters take, in bytes.
        """
        if index in self._ahead:
            return self._ahead.pop(index)
        self._reads += 1
        wanted, room = [index], _AHEAD_BYTES
        sizes = list_sizes() if self._reads > _READS_ALONE else ()
        for following in range(index + 1, min(len(sizes), index + _MOST_AHEAD)):
            room -= sizes[following]
            if room < 0:
                break
            wanted.append(following)
        fetched = fetch(wanted)
        self._ahead = {each: fetched.get(each, {}) for each in wanted[1:]}
        return fetched.get(index, {})


class RemoteState(MutableMapping[Any, Any]):
    """The optimizer state by parameter, as torch's `opt.state`: a mapping that gives what it lacks an empty dict.

    What is put into it reaches the server with the next step. A look at an entry is a call to the server and blocks;
    `items` and `values` fetch all of it. Not thread-safe.

    Args:
        cache: What this process holds of it.
        fetch: Fetches the state of the parameters with the given indices, or of all.
        fetch_one: Fetches that of one. Must not keep the optimizer alive.
        list_indices: Which parameters have a state on the server.
        plain: Whether `items` gives plain dicts, of which nothing is kept here.
    """

    def __init__(
        self,
        cache: StateCache,
        fetch: Callable[[Sequence[int]], dict[int, dict[str, Any]]],
        fetch_one: Callable[[int], dict[str, Any]],
        list_indices: Callable[[], Collection[int]],
        *,
        plain: bool = False,
    ) -> None:
        self._cache = cache
        self._fetch = fetch
        self._fetch_one = fetch_one
        self._list_indices = list_indices
        self._plain = plain

    def __getitem__(self, key: Any) -> Any:
        cache = self._cache
        if not isinstance(key, torch.Tensor):
            return cache.others.setdefault(key, {})
        entry = cache.entries.get(key)
        if entry is None:
            index = None if key in cache.removed else cache.index(key)
            if index is None:
                entry = StateEntry(cache.own)
                entry.update(cache.foreign.get(key, {}))
            else:
                entry = StateEntry(cache.own, cache.fetcher(key, index, self._fetch_one))
            cache.entries[key] = entry
        return entry

    def __setitem__(self, key: Any, value: Any) -> None:
        cache = self._cache
        if not isinstance(key, torch.Tensor):
            cache.others[key] = value
            return
        before = cache.entries.get(key)
        if before is value:
            return
        if before is not None:
            before.detach()
        if isinstance(value, StateEntry) and not value.is_attached:
            # One that was taken out from under another parameter: whoever holds it goes on to write to this state.
            entry = value
            entry.detach()
        else:
            entry = StateEntry(cache.own)
            entry.update(value)
        cache.foreign.pop(key, None)
        cache.entries[key] = entry
        if not entry and cache.index(key) is not None:
            cache.removed.add(key)
        else:
            cache.removed.discard(key)

    def __delitem__(self, key: Any) -> None:
        cache = self._cache
        if not isinstance(key, torch.Tensor):
            del cache.others[key]
            return
        if key not in self:
            raise KeyError(key)
        entry = cache.entries.get(key)
        if entry is not None:
            entry.detach()
            del cache.entries[key]
        cache.foreign.pop(key, None)
        if cache.index(key) is not None:
            cache.removed.add(key)

    def __contains__(self, key: object) -> bool:
        cache = self._cache
        if not isinstance(key, torch.Tensor):
            return key in cache.others
        entry = cache.entries.get(key)
        if key in cache.removed:
            return entry is not None
        if (entry is not None and entry.is_fresh) or key in cache.foreign:
            return True
        index = cache.index(key)
        return index is not None and index in self._listed()

    def __iter__(self) -> Iterator[Any]:
        cache = self._cache
        listed = set(self._listed())
        keys: list[Any] = []
        for index, tensor in enumerate(cache.known):
            entry = cache.entries.get(tensor)
            here = (entry is not None and entry.is_fresh) or tensor in cache.foreign
            if here or (index in listed and tensor not in cache.removed):
                keys.append(tensor)
        keys += [tensor for tensor in cache.entries if cache.index(tensor) is None]
        return iter([*keys, *cache.others])

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def get(self, key: Any, default: Any = None) -> Any:
        """The entry of a parameter, or `default` where it has none. Adds none, as a look by `[]` does."""
        if key not in self:
            return default
        return self[key]

    def setdefault(self, key: Any, default: Any = None) -> Any:
        """The entry of a parameter; where it has none, `default` becomes it."""
        if key not in self:
            self[key] = {} if default is None else default
        return self[key]

    def pop(self, key: Any, *default: Any) -> Any:
        """Takes an entry away and gives it; `default`, if given, where there is none."""
        if key not in self:
            if default:
                return default[0]
            raise KeyError(key)
        entry = self[key]
        del self[key]
        return entry

    def clear(self) -> None:
        """Takes all state away: the next step starts anew."""
        cache = self._cache
        for entry in cache.entries.values():
            entry.detach()
        cache.entries.clear()
        cache.foreign.clear()
        cache.others.clear()
        cache.removed = set(cache.known)

    def copy(self) -> dict[Any, Any]:
        """A dict of all entries."""
        return dict(self.items())

    def snapshot(self) -> dict[Any, Any]:
        """The whole state in plain dicts, edits included, of which nothing is kept here. Fetched in one call."""
        cache = self._cache
        fetched = self._fetch(())
        content: dict[Any, Any] = {}
        for index, tensor in enumerate(cache.known):
            entry = cache.entries.get(tensor)
            if entry is not None and entry.is_fresh:
                plain = entry.copy()
            else:
                own = {} if tensor in cache.removed else fetched.get(index, {})
                plain = {**own, **cache.foreign.get(tensor, {})}
            if plain:
                content[tensor] = plain
        unknown = (tensor for tensor, entry in cache.entries.items() if cache.index(tensor) is None and entry)
        content.update((tensor, cache.entries[tensor].copy()) for tensor in unknown)
        return {**content, **cache.others}

    def items(self) -> ItemsView[Any, Any]:
        """All entries, fetched in one call."""
        if self._plain:
            return self.snapshot().items()
        self._fetch_all()
        return super().items()

    def values(self) -> ValuesView[Any]:
        """All entries, fetched in one call."""
        self._fetch_all()
        return super().values()

    def _listed(self) -> Collection[int]:
        cache = self._cache
        if cache.listed is None:
            cache.listed = frozenset(self._list_indices())
        return cache.listed

    def _fetch_all(self) -> None:
        cache = self._cache
        for index, content in self._fetch(()).items():
            tensor = cache.known[index]
            if tensor in cache.removed:
                continue
            entry = self[tensor]
            if not entry.is_fresh:
                entry.fill({**content, **cache.foreign.get(tensor, {})})

    def __repr__(self) -> str:
        return f"{type(self).__name__}({dict(self.items())!r})"

    def __deepcopy__(self, memo: dict[int, Any]) -> dict[Any, Any]:
        return copy.deepcopy(self.copy(), memo)

    def __reduce__(self) -> tuple[Any, ...]:
        return (dict, (self.copy(),))
