"""`opt.state` of an optimizer whose state is elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch


class RemoteState(Mapping[torch.Tensor, Mapping[str, Any]]):
    """A read-only view of the optimizer state on the server, by parameter.

    Each look is a call to the server and gives new tensors: `opt.state[p]["exp_avg"]` blocks for as long as it takes to
    fetch that parameter's state. A parameter that has never been updated has an empty entry, as in torch.

    Args:
        parameters: Gives the optimizer's parameters, in order.
        fetch: Fetches the state of the parameters with the given indices, or of all; without tensors if so told.
    """

    def __init__(
        self,
        parameters: Callable[[], Sequence[torch.Tensor]],
        fetch: Callable[..., dict[int, dict[str, Any]]],
    ) -> None:
        self._parameters = parameters
        self._fetch = fetch

    def __getitem__(self, parameter: torch.Tensor) -> Mapping[str, Any]:
        for index, own in enumerate(self._parameters()):
            if own is parameter:
                return MappingProxyType(self._fetch((index,)).get(index, {}))
        raise KeyError("not a parameter of this optimizer")

    def __iter__(self) -> Iterator[torch.Tensor]:
        own = self._parameters()
        return iter([own[index] for index in self._fetch((), tensors=False)])

    def __len__(self) -> int:
        return len(self._fetch((), tensors=False))
