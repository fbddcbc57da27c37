"""What a worker has changed besides gradients and hyperparameters, in terms of the job's parameters."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from optimd.client.changes import ValueWatch
from optimd.client.parameters import form_of
from optimd.client.remotestate import ReadAhead, StateCache
from optimd.client.statetransfer import RemoteEntry
from optimd.wire.layout import Parameter


class Changes(NamedTuple):
    """What the next push brings besides gradients, by parameter index."""

    values: dict[int, torch.Tensor]
    states: dict[int, RemoteEntry]


class ParameterTracker:
    """Knows the parameters and the state as the server has them. Not thread-safe.

    Args:
        state_tensors: torch's keys of the tensors in the rule's state, besides `step`.
    """

    def __init__(self, state_tensors: Collection[str]) -> None:
        self._state_tensors = tuple(state_tensors)
        self.cache = StateCache({"step", *state_tensors})
        self.read_ahead = ReadAhead()
        self._watch = ValueWatch()
        # Parameters that count as written to, whatever is noticed.
        self._dirty: set[int] = set()

    @property
    def known(self) -> Sequence[torch.Tensor]:
        """The parameters that the server has, by index."""
        return self.cache.known

    def settle(self, tensors: Sequence[torch.Tensor], fetch: Callable[[int], dict[str, Any]]) -> None:
        """The server has all that `changes` gave, and the tensors have the server's values.

        Args:
            tensors: The parameters.
            fetch: Fetches the state of one. Must not keep the optimizer alive.
        """
        self.read_ahead.clear()
        self.cache.settle(tensors, fetch)
        self.refresh(tensors)

    def replace_state(
        self, tensors: Sequence[torch.Tensor], content: Mapping[Any, Any], fetch: Callable[[int], dict[str, Any]]
    ) -> None:
        """The server was given a whole state. Values that were written are still to be pushed.

        Args:
            tensors: The parameters, as many as are known.
            content: The state, by parameter.
            fetch: As in `settle`.
        """
        self._dirty |= self._replaced(tensors)
        self.read_ahead.clear()
        self.cache.know(tensors)
        self.cache.replace(content, fetch)

    def grow(self, tensors: Sequence[torch.Tensor]) -> None:
        """Parameters were added to the job, behind those that are known, some of which others may have replaced."""
        known = len(self.known)
        self._dirty |= self._watch.changed(tensors[:known])
        self._watch.remember(tensors)
        self.cache.know([*self.known, *tensors[known:]])

    def relocate(self, tensors: Sequence[torch.Tensor], fetch: Callable[[int], dict[str, Any]]) -> None:
        """The job's parameters were replaced by these, with their values; edits of state are still to be pushed."""
        self.read_ahead.clear()
        self.cache.relocate(tensors, fetch)
        self.refresh(tensors)

    def refresh(self, tensors: Sequence[torch.Tensor], kept: Collection[int] = ()) -> None:
        """The tensors were given the server's values, but for those that were `kept`, by index."""
        self._dirty = set(kept)
        self._watch.remember(tensors)

    def received(self, index: int, tensor: torch.Tensor) -> None:
        """A tensor has been given the server's value: before `settle`, for which that leaves less to do."""
        self._watch.look_at(index, tensor)

    def written(self, tensors: Sequence[torch.Tensor]) -> set[int]:
        """The parameters, by index, whose values are the program's and not the server's."""
        return self._dirty | self._replaced(tensors) | self._watch.changed(tensors)

    def touch(self) -> None:
        """All parameters count as written to."""
        self._dirty = set(range(len(self.known)))

    def keep_departed(self, tensors: Sequence[torch.Tensor], list_stepped: Callable[[], Collection[int]]) -> None:
        """Takes the state of parameters that are no longer among `tensors` from the server, as torch keeps it.

        Args:
            tensors: The parameters as they are now.
            list_stepped: Tells which of the job's have a state.
        """
        present = {id(tensor) for tensor in tensors}
        gone = [index for index, tensor in enumerate(self.known) if id(tensor) not in present]
        if not gone:
            return
        stepped = set(list_stepped())
        for index in gone:
            if index in stepped and self.known[index] not in self.cache.removed:
                self.cache.take_over(self.known[index])

    def layout_differs(
        self, parameters: Sequence[Parameter], group_sizes: Sequence[int], groups: Sequence[Mapping[str, Any]]
    ) -> bool:
        """Whether the job has to be given other parameters before it can be stepped.

        Args:
            parameters: The job's.
            group_sizes: The job's.
            groups: torch's param_groups.
        """
        if [len(group["params"]) for group in groups] != list(group_sizes):
            return True
        index = 0
        for group in groups:
            for tensor in group["params"]:
                parameter = parameters[index]
                if form_of(tensor) != (parameter.dtype, parameter.shape):
                    return True
                if tensor is not self.known[index] and self.cache.index(tensor) is not None:
                    return True
                index += 1
        return False

    def carried(
        self, tensors: Sequence[torch.Tensor], described: list[Parameter], job: Sequence[Parameter]
    ) -> dict[int, int]:
        """Which of the parameters keep their state where a layout is replaced: the job's index by the new one.

        Args:
            tensors: The new parameters.
            described: Their descriptions. One that keeps its state keeps the job's, whose memory order the state has.
            job: The job's descriptions.
        """
        edits = self.cache.edits()
        carried = {}
        for index, tensor in enumerate(tensors):
            origin = self.cache.index(tensor)
            if origin is None or tensor in edits:
                continue
            here = described[index]
            if (job[origin].server_dtype, job[origin].shape) == (here.server_dtype, here.shape):
                described[index] = dataclasses.replace(job[origin], dtype=here.dtype, master_dtype=here.master_dtype)
                carried[index] = origin
        return carried

    def changes(self, tensors: Sequence[torch.Tensor]) -> Changes:
        """What was changed since the last `settle`.

        Raises:
            KeyError: a state that was put in by hand has no `step`.
        """
        edits = self.cache.edits()
        replaced = self._replaced(tensors)
        written = self.written(tensors)
        states = {}
        if edits or replaced:
            for index, tensor in enumerate(tensors):
                entry = edits.get(tensor)
                if entry and not self.cache.own.isdisjoint(entry):
                    named = {name: entry[name].detach() for name in self._state_tensors if name in entry}
                    states[index] = RemoteEntry(float(entry["step"]), named)
                elif tensor in edits or index in replaced:
                    states[index] = RemoteEntry(0.0, {})
        return Changes({index: tensors[index] for index in sorted(written)}, states)

    def _replaced(self, tensors: Sequence[torch.Tensor]) -> set[int]:
        """Those that are other tensors than the ones that are known."""
        return {index for index, tensor in enumerate(tensors) if tensor is not self.known[index]}
