"""Adam's state as torch names and keeps it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import torch

from optimd.client.statetransfer import RemoteEntry

RULE: Final = "adam"
"""The update rule, by the schema's name."""

STATE_TENSORS: Final = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
"""The tensors of a parameter's state, by torch's keys and in torch's order, besides `step`."""


def in_torchs_form(entry: RemoteEntry, group: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """A parameter's state as torch's own step would have left it.

    Args:
        entry: What the server holds.
        group: The options of the parameter's group.
        device: The parameter's.

    The rules are those of `torch.optim.Adam._init_group`.
    """
    beside = bool(group["capturable"] or group["fused"])
    wide = torch.get_default_dtype() is torch.float64 and not group["fused"]
    step = torch.tensor(entry.step, dtype=torch.float64 if wide else torch.float32, device=device if beside else "cpu")
    return {"step": step, **{name: value.to(device) for name, value in entry.tensors.items()}}
