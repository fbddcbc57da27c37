"""`Adam` and `AdamW`: torch's, with the state and the update on a server."""

from __future__ import annotations

import copy
import inspect
from collections import defaultdict
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any, ClassVar, Self

import torch
from torch.optim.adam import Adam as TorchAdam
from torch.optim.adam import adam
from torch.optim.adamw import AdamW as TorchAdamW
from torch.optim.optimizer import ParamsT

from optimd.client.options import ProxyOptions
from optimd.client.proxy import OptimizerProxy
from optimd.client.statetransfer import RemoteEntry
from optimd.client.torchform import RULE, STATE_TENSORS, in_torchs_form

# torch's classes are bound here, once: a program may put ours in their place, under torch's own names.


class _AdamRule(OptimizerProxy):
    """What Adam and AdamW have in common."""

    _rule: ClassVar[str] = RULE
    _state_tensors: ClassVar[tuple[str, ...]] = STATE_TENSORS

    _made_here_by: ClassVar[str] = "differentiable=True"
    _sparse_error: ClassVar[str] = "Adam does not support sparse gradients, please consider SparseAdam instead"
    _rehearsed: frozenset[Any]

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """An optimizer that has opened no job yet."""
        optimizer = super().__new__(cls, *args, **kwargs)
        optimizer._rehearsed = frozenset()
        return optimizer

    def _is_made_here(self) -> bool:
        return any(group["differentiable"] for group in self.param_groups)

    def _make_step(self) -> None:
        step = inspect.unwrap(TorchAdam.step)
        with torch.set_grad_enabled(bool(self.defaults["differentiable"])):
            step(self)

    def _check_step(self, group: Mapping[str, Any], tensor: torch.Tensor, entry: Mapping[str, Any] | None) -> None:
        # What torch objects to depends on these; a rate that changes with every step does not make it another question.
        key = (
            tensor.dtype,
            tensor.device,
            *(_kind(group[name]) for name in ("lr", "eps", "weight_decay")),
            *((_kind(beta), beta if not 0 <= float(beta) < 1 else None) for beta in group["betas"]),
            *(group[name] for name in ("amsgrad", "maximize", "foreach", "capturable", "fused")),
            getattr(self, "grad_scale", None) is None,
            getattr(self, "found_inf", None) is None,
        )
        if entry is None and key in self._rehearsed:
            return
        if entry is None:
            parameter = torch.zeros(1, dtype=tensor.dtype, device=tensor.device)
        else:
            parameter = tensor.detach().clone()
        scaling = {
            name: torch.ones(()) for name in ("grad_scale", "found_inf") if getattr(self, name, None) is not None
        }
        _rehearse(parameter, group, {} if entry is None else copy.deepcopy(dict(entry)), scaling)
        if entry is None:
            self._rehearsed |= {key}

    def _in_torchs_form(self, entry: RemoteEntry, tensor: torch.Tensor, group: Mapping[str, Any]) -> dict[str, Any]:
        return in_torchs_form(entry, group, tensor.device)


def _rehearse(
    parameter: torch.Tensor, group: Mapping[str, Any], entry: dict[str, Any], scaling: Mapping[str, torch.Tensor]
) -> None:
    """Has torch step a parameter that is nobody's, for the errors that it raises."""
    parameter.grad = torch.zeros_like(parameter)
    stand_in = SimpleNamespace(state=defaultdict(dict, {parameter: entry}))
    lists: list[list[Any]] = [[] for _ in range(6)]
    params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps = lists
    init_group: Any = TorchAdam._init_group  # noqa: SLF001  # raises what belongs to a state
    init_group(stand_in, dict(group, params=[parameter]), *lists)
    beta1, beta2 = group["betas"]
    adam(
        params,
        grads,
        exp_avgs,
        exp_avg_sqs,
        max_exp_avg_sqs,
        steps,
        foreach=group["foreach"],
        capturable=group["capturable"],
        differentiable=False,
        fused=group["fused"],
        has_complex=parameter.is_complex(),
        amsgrad=group["amsgrad"],
        beta1=beta1,
        beta2=beta2,
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=group["maximize"],
        decoupled_weight_decay=group["decoupled_weight_decay"],
        **scaling,
    )


def _kind(value: Any) -> Any:
    """What of a number decides whether torch takes it."""
    if isinstance(value, torch.Tensor):
        return (value.dtype, value.shape, value.device)
    return type(value)


class Adam(_AdamRule, TorchAdam):
    """`torch.optim.Adam`, with the optimizer state and the update on a server.

    The first worker of a job creates it and uploads its parameters; later ones receive the job's parameters and
    hyperparameters in place. Blocks until the job is open.

    Args:
        params: As torch's: parameters, named parameters, or param groups. Those that are stepped are float64, float32,
            bfloat16, float16, complex64 or complex128.
        lr: Learning rate, a number or a one-element tensor.
        betas: Decay rates of the two moments.
        eps: Added to the denominator.
        weight_decay: L2 penalty.
        amsgrad: Whether to use AMSGrad.
        foreach: torch's multi-tensor kernel on the server.
        maximize: Whether to maximize.
        capturable: As torch's; needs a server with a CUDA device.
        differentiable: Whether autograd goes through steps: they are made in this process then. One worker only.
        fused: torch's fused kernel on the server. With `foreach` and `fused` None it is taken wherever torch has it.
        decoupled_weight_decay: Whether weight decay is AdamW's.
        server: "host:port" or "unix:///path". None: `$OPTIMD_SERVER`, else a server that this process starts for
            itself.
        job: The name that the workers of one training job share. None: `$OPTIMD_JOB`, else torchrun's run id, else a
            job of this process's own, which ends with it.
        options: Everything else.

    Raises:
        ValueError: what torch's constructor raises; parameters that share memory or that a server cannot hold.
        ServerUnavailableError: no server answered within `options.retry_timeout_s`.
        JobMismatchError: the job has other parameters; the first that differs is named.
        OptimdError: the job cannot be opened.

    The algorithm is that of `torch.optim.Adam` (https://arxiv.org/abs/1412.6980), computed by torch itself.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float | torch.Tensor, float | torch.Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,  # noqa: FBT001, FBT002  # torch's signature
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        server: str | None = None,
        job: str | None = None,
        options: ProxyOptions | None = None,
    ) -> None:
        TorchAdam.__init__(
            self,
            params,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            amsgrad=amsgrad,
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            decoupled_weight_decay=decoupled_weight_decay,
        )
        self._connect(server, job, options)


class AdamW(_AdamRule, TorchAdamW):
    """`torch.optim.AdamW`, with the optimizer state and the update on a server.

    The arguments are those of `torch.optim.AdamW`, and `server`, `job` and `options` as in `Adam`, with whose errors.

    The algorithm is that of `torch.optim.AdamW` (https://arxiv.org/abs/1711.05101), computed by torch itself.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float | torch.Tensor, float | torch.Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,  # noqa: FBT001, FBT002  # torch's signature
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        server: str | None = None,
        job: str | None = None,
        options: ProxyOptions | None = None,
    ) -> None:
        TorchAdamW.__init__(
            self,
            params,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            amsgrad=amsgrad,
            maximize=maximize,
            foreach=foreach,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
        )
        self._connect(server, job, options)
