"""Adam's update of a list of tensors: torch's own, chosen and called as `torch.optim.Adam.step` would.

Pure torch: no job, bucket or wire. The rule is `torch.optim.adam.adam`, the functional form that `torch.optim.Adam` and
`AdamW` call (Kingma and Ba, https://arxiv.org/abs/1412.6980; Loshchilov and Hutter, https://arxiv.org/abs/1711.05101),
so that its numbers are torch's to the last bit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch
from torch.optim.adam import adam

RULE: Final = "adam"
"""The rule's name: the field of `ParamGroup.options` that holds its options."""

_HALF: Final = frozenset({torch.bfloat16, torch.float16})


def state_names(options: Mapping[str, Any]) -> tuple[str, ...]:
    """The tensors that a parameter's state has, by torch's keys, besides `step`."""
    if options["amsgrad"]:
        return ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
    return ("exp_avg", "exp_avg_sq")


def uses_fused(options: Mapping[str, Any], dtype: torch.dtype) -> bool:
    """Whether the fused kernel is taken.

    It is where it was asked for, and where neither kernel was and torch has it for `dtype`: on CPU and CUDA these are
    the real floating-point types.
    """
    if options["fused"] is None:
        return options["foreach"] is None and dtype.is_floating_point
    return bool(options["fused"])


def is_split_invariant(options: Mapping[str, Any], dtype: torch.dtype) -> bool:
    """Whether slices that start at multiples of 64 elements get the bits that the whole tensor would.

    Measured: all kernels are, but for bfloat16 and float16 where the kernel is not fused.
    """
    return dtype not in _HALF or uses_fused(options, dtype)


def is_made_in_worker(options: Mapping[str, Any]) -> bool:
    """Whether the step is made in the worker, whose autograd graph goes through it; a server is given its results."""
    return bool(options["differentiable"])


def refusal(options: Mapping[str, Any], dtype: torch.dtype, device: torch.device) -> str | None:
    """Why torch would not step with `options`, or a server cannot; None where nothing speaks against it.

    torch finds these out in the middle of a step, with counters and moments already changed.
    """
    if options["differentiable"]:
        return "differentiable=True needs the state in the worker's autograd graph; a server cannot hold it"
    if options["capturable"] and device.type == "cpu":
        return "capturable=True needs parameters on a CUDA device, and this server's are on the CPU"
    if options["fused"] and not dtype.is_floating_point:
        return f"fused=True needs real floating-point parameters, and this one is {dtype}"
    beta1, beta2 = options["betas"]
    if not uses_fused(options, dtype) and (beta1 == 1 or beta2 > 1):
        return f"betas {(beta1, beta2)} have torch's kernel divide by zero or take the root of a negative number"
    return None


def new_step(options: Mapping[str, Any], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A step counter at 0, where torch would put it: beside the parameters if the kernel reads it there."""
    beside = uses_fused(options, dtype) or options["capturable"]
    return torch.zeros((), dtype=torch.float32, device=device if beside else "cpu")


@torch.no_grad()
def update(
    params: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor],
    state: Mapping[str, Sequence[torch.Tensor]],
    steps: Sequence[torch.Tensor],
    options: Mapping[str, Any],
    *,
    grad_scale: float | None = None,
) -> None:
    """Makes one Adam step in place, as one tensor-list call.

    Args:
        params: Parameters or slices of them, dense, of one dtype and device.
        grads: Their gradients, of the same sizes. Not written to.
        state: For each of `state_names(options)` the tensors beside `params`.
        steps: 0-dim float32 counters of the updates so far; advanced by 1.
        options: One param group's options, by torch's names.
        grad_scale: What `grads` were multiplied by, if by anything.

    Raises:
        RuntimeError: torch refuses the combination of options and tensors. Where `refusal` says why, nothing has
        changed.
    """
    if not params:
        return
    reason = refusal(options, params[0].dtype, params[0].device)
    if reason is not None:
        raise RuntimeError(reason)
    beta1, beta2 = options["betas"]
    lr = options["lr"]
    if options["capturable"] and isinstance(lr, torch.Tensor):
        lr = lr.to(params[0].device)
    fused = uses_fused(options, params[0].dtype)
    kernel_scale: torch.Tensor | None = None
    if grad_scale is not None:
        scale = torch.tensor(grad_scale, dtype=torch.float32, device=params[0].device)
        if fused:
            # The kernel divides, in float32 at least, and leaves the quotients in what it is given.
            kernel_scale = scale
            grads = [grad.clone() for grad in grads]
        else:
            grads = [(grad.to(torch.promote_types(grad.dtype, scale.dtype)) / scale).to(grad.dtype) for grad in grads]
    tensors = (
        list(params),
        list(grads),
        list(state["exp_avg"]),
        list(state["exp_avg_sq"]),
        list(state.get("max_exp_avg_sq", ())),
        list(steps),
    )
    try:
        if fused and not any(isinstance(number, torch.Tensor) for number in (lr, beta1, beta2)):
            # What torch's function does in the end, of one dtype and device: on its way there it takes as long as the
            # kernel does for 100,000 elements.
            torch._foreach_add_(tensors[-1], 1)
            kernel = torch._fused_adamw_ if options["decoupled_weight_decay"] else torch._fused_adam_
            kernel(
                *tensors,
                lr=lr,
                beta1=beta1,
                beta2=beta2,
                weight_decay=options["weight_decay"],
                eps=options["eps"],
                amsgrad=options["amsgrad"],
                maximize=options["maximize"],
                grad_scale=kernel_scale,
                found_inf=None,
            )
            return
        adam(
            *tensors,
            # Where both are set, by hand, torch takes the fused one.
            foreach=False if fused else options["foreach"],
            fused=fused or options["fused"],
            capturable=options["capturable"],
            differentiable=False,
            has_complex=params[0].is_complex(),
            amsgrad=options["amsgrad"],
            beta1=beta1,
            beta2=beta2,
            lr=lr,
            weight_decay=options["weight_decay"],
            eps=options["eps"],
            maximize=options["maximize"],
            decoupled_weight_decay=options["decoupled_weight_decay"],
            grad_scale=kernel_scale,
        )
    except (ArithmeticError, TypeError, ValueError) as error:
        # What torch's kernels in Python make of numbers that they cannot compute with.
        raise RuntimeError(f"{type(error).__name__}: {error}") from error
