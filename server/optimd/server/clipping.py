"""Whole gradients: their norm, scaling them down to one, and whether they are finite.

Pure torch. A `whole` gradient is that of one parameter, in one piece; it lies in `pieces`, flat views one for each of
the parameter's slices, in order of offset. Norm and scaling are those of `torch.nn.utils.clip_grad_norm_` with its
defaults, operation by operation, so that their bits are torch's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.utils._foreach_utils import _group_tensors_by_device_and_dtype


def is_finite(pieces: Sequence[torch.Tensor]) -> bool:
    """Whether no element is infinite or a NaN. Waits for the device."""
    extremes = [
        extreme
        for piece in pieces
        if piece.numel()
        # One pass that takes no memory, where isfinite().all() takes a mask; a NaN becomes both extremes.
        for extreme in torch.aminmax(torch.view_as_real(piece) if piece.is_complex() else piece)
    ]
    return not extremes or bool(torch.isfinite(torch.stack(extremes)).all())


@torch.no_grad()
def total_norm(grads: Sequence[Sequence[torch.Tensor]]) -> torch.Tensor:
    """The 2-norm of a gradient over all parameters, as `torch.nn.utils.get_total_norm` computes it.

    The norms of the parameters are taken one after the other, so that one whole gradient at a time is put together,
    then the norm of these: in order of the parameters, where they are of several dtypes in the order in which torch
    groups dtypes. torch leaves that order to a hash table. Asking torch for it makes the bits those of the torch that
    runs here; another build of torch may have another order, and differ in the last bit. So may torch itself for a
    gradient whose strides are not its parameter's, since it adds elements up in the order in which they lie in memory.

    Args:
        grads: For each parameter that has a gradient its pieces, all on one device.

    Returns:
        A 0-dim tensor on that device; 0.0 where there is no gradient.
    """
    if not grads:
        return torch.tensor(0.0)
    norms: list[torch.Tensor] = []
    for indices in _torchs_groups(grads):
        for index in indices:
            pieces = grads[index]
            # On a GPU in memory of its own, as torch's gradients are: the kernel's order depends on the alignment.
            alone = pieces[0] if pieces[0].device.type == "cpu" else pieces[0].clone()
            whole = alone if len(pieces) == 1 else torch.cat(list(pieces))
            norms += torch._foreach_norm([whole], 2.0)  # noqa: SLF001  # what torch's clipping calls
    total: torch.Tensor = torch.linalg.vector_norm(torch.stack(norms), 2.0)
    return total


@torch.no_grad()
def clip_(grads: Sequence[Sequence[torch.Tensor]], max_norm: float, norm: torch.Tensor) -> None:
    """Scales gradients down in place, as `torch.nn.utils.clip_grads_with_norm_` does.

    Args:
        grads: For each parameter that has a gradient its pieces, all on one device.
        max_norm: The norm that they are scaled down to.
        norm: Theirs, as `total_norm` computed it.
    """
    if not grads:
        return
    coefficient = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
    for indices in _torchs_groups(grads):
        torch._foreach_mul_([piece for index in indices for piece in grads[index]], coefficient)


def _torchs_groups(grads: Sequence[Sequence[torch.Tensor]]) -> list[list[int]]:
    """The indices of `grads` by dtype, in torch's order."""
    stand_ins = [pieces[0].new_empty(0) for pieces in grads]
    grouped = _group_tensors_by_device_and_dtype([list(stand_ins)], with_indices=True)
    return [indices for _, indices in grouped.values()]
