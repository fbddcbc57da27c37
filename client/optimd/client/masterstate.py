"""State on its way through torch's `load_state_dict`, which rounds it to the dtypes of the parameters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch.optim.optimizer import Optimizer, StateDict

from optimd.wire.layout import Parameter


@contextmanager
def remembering_what_is_loaded(optimizer: Optimizer) -> Iterator[list[StateDict]]:
    """Has a load within the block leave behind the state_dict that all hooks had made of its argument.

    Yields:
        A list that the load puts it in, before it converts anything.
    """
    seen: list[StateDict] = []

    def remember(_: Optimizer, state_dict: StateDict) -> None:
        seen.append(state_dict)

    # torch runs hooks in the order of their registration: this one comes behind the user's.
    handle = optimizer.register_load_state_dict_pre_hook(remember)
    try:
        yield seen
    finally:
        handle.remove()


def unrounded(
    loaded: StateDict, tensors: Sequence[torch.Tensor], parameters: Sequence[Parameter], names: Sequence[str]
) -> Iterator[tuple[torch.Tensor, dict[str, torch.Tensor]]]:
    """The state that a server keeps in a master dtype, as it stands in a state_dict.

    Args:
        loaded: The state_dict.
        tensors: The optimizer's parameters, in order.
        parameters: What describes them.
        names: The tensors of a state that are meant, by torch's keys.

    Yields:
        Parameters that have a master dtype and a state, and their tensors in that dtype.
    """
    saved: Mapping[Any, Any] = loaded["state"]
    indices = chain.from_iterable(group["params"] for group in loaded["param_groups"])
    for index, tensor, parameter in zip(indices, tensors, parameters, strict=True):
        entry = saved.get(index)
        if parameter.master_dtype is not None and entry is not None:
            yield (
                tensor,
                {
                    name: entry[name].to(device=tensor.device, dtype=parameter.master_dtype)
                    for name in names
                    if isinstance(entry.get(name), torch.Tensor)
                },
            )
