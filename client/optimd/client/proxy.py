"""A torch optimizer whose state and update live on a server."""

from __future__ import annotations

import dataclasses
import functools
import sys
import warnings
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, ClassVar, ParamSpec, Self, TypeVar, overload

import torch
from torch.optim.optimizer import Optimizer, StateDict
from torch.utils.hooks import RemovableHandle

from optimd.client.buffers import AttachedBuffers
from optimd.client.connection import Connection
from optimd.client.environment import read_environment
from optimd.client.exceptions import JobMismatchError, OptimizerClosedError
from optimd.client.options import ProxyOptions
from optimd.client.parameters import describe, refuse_shared_memory
from optimd.client.placement import names, place
from optimd.client.receipts import StepReceipt
from optimd.client.remotestate import RemoteState
from optimd.client.session import Session
from optimd.client.statetransfer import RemoteEntry
from optimd.client.watching import ServerStepHooks
from optimd.wire.layout import Parameter

P = ParamSpec("P")
T = TypeVar("T")


class OptimizerProxy(Optimizer):
    """The part of a remote optimizer that every update rule shares.

    Subclass it together with torch's class of the rule. Hooks, param_groups, `zero_grad`, schedulers and the form of
    `state_dict` are torch's own. `step` pushes gradients and changed hyperparameters and receives the new parameters.
    The process holds no optimizer state.

    All methods that reach the server block. An optimizer is not thread-safe, as torch's are not.
    """

    _rule: ClassVar[str]
    """The update rule, by the schema's name."""

    _state_tensors: ClassVar[tuple[str, ...]]
    """The tensors that the rule may keep for a parameter, by torch's keys, besides `step`."""

    _session: Session | None = None
    _finalizer: weakref.finalize[..., Any] | None = None
    _warned_of_disagreement = False
    _server_step_hooks: ServerStepHooks | None = None
    _buffers: AttachedBuffers | None = None
    last_receipt: StepReceipt | None = None
    """What became of the last `step()`; None before the first."""

    def _connect(
        self, server: str | None, job: str | None, options: ProxyOptions | None, *, private: bool = False
    ) -> None:
        """Opens the job, once torch's constructor has built the param_groups.

        Raises:
            ValueError: parameters that a server cannot hold, or that share memory.
            OptimdError: the job cannot be opened.
        """
        self._requested = (server, options or ProxyOptions())
        tensors = self._tensors()
        parameters = self._described(self.param_groups)
        refuse_shared_memory(tensors, [parameter.name for parameter in parameters])
        options = options or ProxyOptions()
        placement = place(server, job, options, read_environment(), rule=self._rule, private=private)
        name = (placement.request.job, placement.request.worker_id)
        connection: Connection | None = None
        try:
            connection = Connection(placement.find_server())
            connection.probe(options.retry_timeout_s)
            session = Session(connection, placement.request)
            adopted = session.open(self.param_groups, tensors, parameters)
        except BaseException:
            names.give_back(*name)
            if connection is not None:
                connection.close()
            raise
        self._session = session
        self._finalizer = weakref.finalize(self, _let_go, session)
        self._server_step_hooks = ServerStepHooks(self, session, options.retry_timeout_s)
        for group, options_of_job in zip(self.param_groups, adopted or (), strict=False):
            _adopt(group, options_of_job)

    # --- where it is

    @property
    def server(self) -> str:
        """The server's address."""
        return self._open_session().address

    @property
    def job(self) -> str:
        """The job's name."""
        return self._open_session().job

    @property
    def job_step(self) -> int:
        """How many steps the job had committed when this worker last heard of it."""
        return self._open_session().job_step

    @property
    def next_sequence(self) -> int:
        """The number of this worker's next step, over all of its restarts: where to take up its data."""
        return self._open_session().next_sequence

    @property
    def resumed(self) -> bool:
        """Whether the job had steps behind it when this process opened it."""
        return self._open_session().resumed

    # --- torch.optim.Optimizer

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Makes one step: pushes gradients, receives parameters.

        Parameters whose gradient is None are skipped. In a synchronous job this waits for the other workers.

        Args:
            closure: Computes the loss anew, with gradients; called once.

        Returns:
            The closure's loss, or None.

        Raises:
            RuntimeError: a gradient is sparse, torch refuses the update, or this is a server step hook.
            OptimdError: the step failed. Gradients are as they were.
            BaseException: what a server step hook raised. The step is made.
        """
        hooks = self._own_hooks()
        hooks.refuse_in_hook("step()")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        session = self._open_session()
        tensors = self._tensors()
        grads = self._gradients(session, tensors)
        with hooks.held_back():
            receipt = session.step(self.param_groups, tensors, grads)
            self.last_receipt = receipt
            if session.wants_buffers and self._buffers is not None:
                session.push_buffers(self._buffers)
        if receipt.hyperparameters_disagreed and not self._warned_of_disagreement:
            self._warned_of_disagreement = True
            warnings.warn(
                f"step {receipt.step}: the workers' param_groups differ; those of the lowest rank hold", stacklevel=3
            )
        hooks.settle(receipt.step)
        return loss

    def attach_buffers(self, module: torch.nn.Module) -> None:
        """Has the server keep a module's buffers, such as BatchNorm's statistics, for workers that join later.

        The first worker of a job to attach them uploads their values; the others, and those that join or resume the job
        later, receive the server's in place. Its copy is refreshed now and then, inside `step()`, from the lowest rank
        that has attached them: where it is older than 30 s, and when a worker waits to join. Buffers are only kept, not
        averaged: between that, each worker's go their own way, as under DDP without `broadcast_buffers`.

        The buffers are those that `module.state_dict()` saves, by the names of `module.named_buffers()`: what is
        registered with `persistent=False` is made anew by the module's constructor and is no state. Blocks.

        Args:
            module: The model; all workers attach an equal one. Not kept alive by this.

        Raises:
            ValueError: a buffer cannot be carried; it is named.
            RuntimeError: buffers are attached already, or this is a server step hook.
            JobMismatchError: the job has other buffers; the first that differs is named. Nothing has changed.
            LimitExceededError: the job would become too large. Nothing has changed.
            OptimdError: the server cannot be reached.
        """
        self._own_hooks().refuse_in_hook("attach_buffers()")
        if self._buffers is not None:
            raise RuntimeError("buffers are attached to this optimizer already; attach the module that holds them all")
        attached = AttachedBuffers(module)
        self._open_session().attach_buffers(attached)
        self._buffers = attached

    def register_server_step_hook(self, hook: Callable[[Any, StepReceipt], object]) -> RemovableHandle:
        """Has a function called for every step that the job commits from now on, by whichever workers.

        The server tells of steps on a stream of their own, to a thread that lives while there are such hooks and calls
        them: each hook once for each step, steps in order, hooks in order of registration. `step()` returns when they
        have been called for its own step, with the new parameters in place. So in a synchronous job, whose every step
        is one of this worker's, they never run beside the code that trains; in any other they do.

        A hook may read the optimizer (`state_dict()`, `param_groups`, `job_step`), register hooks and remove them, and
        close it. What it raises, `step()` raises when it waits for it, or else the next one; other hooks, and those of
        later steps, are called all the same, and what they raise meanwhile is logged.

        Waits until the server will tell of steps. `step()` waits up to `ProxyOptions.retry_timeout_s` for hooks.

        Args:
            hook: Called with the optimizer and the step's `StepReceipt`, whose `sequence` is None where this worker did
                not contribute to the step, and whose byte counts are 0.

        Returns:
            A handle whose `remove()` takes the hook away, as those of torch's hooks.

        Raises:
            LimitExceededError: too many watch already.
            OptimdError: the server does not answer, or the optimizer cannot be used.
        """
        return self._own_hooks().register(hook)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a param group, on the server too. Each worker of a job adds it between the same two steps.

        Args:
            param_group: As torch's.

        Raises:
            ValueError: torch does not take it, or a parameter shares memory with another or is given twice.
            RuntimeError: this is a server step hook.
            OptimdError: the job does not take it. The param_groups are as they were.
        """
        if self._server_step_hooks is not None:
            self._server_step_hooks.refuse_in_hook("add_param_group()")
        before = len(self.param_groups)
        try:
            _untraced(super().add_param_group)(param_group)
            group = self.param_groups[before]
            _refuse_repetition(group)
            self._check_group(group)
            if self._session is not None:
                tensors = self._tensors()
                titles = [parameter.name for parameter in self._described(self.param_groups)]
                refuse_shared_memory(tensors, titles)
                added = group["params"]
                adopted = self._session.add_group(group, added, self._described([group], len(tensors) - len(added)))
                if adopted is not None:
                    _adopt(group, adopted)
        except BaseException:
            del self.param_groups[before:]
            raise

    def _check_group(self, group: Mapping[str, Any]) -> None:
        """Refuses, in the constructor and in `add_param_group`, options that no server can step with."""

    def zero_grad(self, set_to_none: bool = True) -> None:  # noqa: FBT001, FBT002  # torch's signature
        """Clears the gradients, as torch's does. Does not reach the server.

        Args:
            set_to_none: Whether gradients become None rather than zero.
        """
        _untraced(super().zero_grad)(set_to_none)

    def state_dict(self) -> StateDict:
        """The state in torch's own form, fetched from the server: it loads into `torch.optim.Adam` and goes on there.

        Raises:
            OptimdError: the server cannot be read.
        """
        if "state" in self.__dict__:
            # A hook of load_state_dict looks at what is being loaded, before the server has it.
            return _untraced(super().state_dict)()
        with self._state_here():
            own = self._tensors()
            for index, entry in self._fetch().items():
                self.state[own[index]] = entry
            return _untraced(super().state_dict)()

    def load_state_dict(self, state_dict: StateDict, *, force: bool = False) -> None:
        """Loads a state_dict, of this class or of torch's.

        Each worker of a job loads an equal one between the same two steps.

        Args:
            state_dict: As torch's.
            force: Whether to replace the state of a job that has steps behind it and other workers.

        Raises:
            ValueError: it does not fit the param_groups.
            RuntimeError: this is a server step hook.
            LoadNeedsForceError: `force` is needed.
            OptimdError: the job does not take it. The param_groups are as they were.
        """
        self._own_hooks().refuse_in_hook("load_state_dict()")
        session = self._open_session()
        before = self.param_groups
        try:
            with self._state_here():
                _untraced(super().load_state_dict)(state_dict)
                session.load(self.param_groups, self._entries_here(), force=force)
        except BaseException:
            self.param_groups = before
            raise

    @property
    def state(self) -> Any:
        """The optimizer state, by parameter: a `RemoteState`."""
        here = self.__dict__.get("state")
        return RemoteState(self._tensors, self._fetch) if here is None else here

    @state.setter
    def state(self, value: Any) -> None:
        # torch's constructor gives every optimizer an empty one. This one's is on the server.
        if value:
            raise AttributeError("the state is on the server; load_state_dict replaces it")

    def __getstate__(self) -> dict[str, Any]:
        own = self._tensors()
        return {
            "defaults": self.defaults,
            "state": {own[index]: entry for index, entry in self._fetch().items()},
            "param_groups": self.param_groups,
            "_requested": self._requested,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        if self._session is not None:
            # torch's load_state_dict, on its way.
            super().__setstate__(state)
            return
        # A copy, or what comes out of a pickle: a job of its own with the same state.
        state = dict(state)
        server, options = state.pop("_requested", (None, ProxyOptions()))
        here = defaultdict(dict, state.pop("state"))
        with self._state_here():
            super().__setstate__({**state, "state": here})
            entries = self._entries_here()
        aggregation = dataclasses.replace(options.aggregation, world_size=None)
        alone = dataclasses.replace(
            options, aggregation=aggregation, rank=0, world_size=1, worker_id=None, on_existing="resume"
        )
        self._connect(server, None, alone, private=True)
        self._open_session().load(self.param_groups, entries, force=False)

    # --- leaving

    def close(self) -> None:
        """Leaves the job. A private job is dropped by the server. May be called more than once."""
        session, finalizer = self._session, self._finalizer
        if session is not None and finalizer is not None and finalizer.detach() is not None:
            names.give_back(session.job, session.worker_id)
            self._own_hooks().close()
            session.leave()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    # --- inside

    def _open_session(self) -> Session:
        if self._session is None:
            raise OptimizerClosedError("this optimizer never opened a job: its constructor failed")
        return self._session

    def _own_hooks(self) -> ServerStepHooks:
        if self._server_step_hooks is None:
            raise OptimizerClosedError("this optimizer never opened a job: its constructor failed")
        return self._server_step_hooks

    def _tensors(self) -> list[torch.Tensor]:
        return [parameter for group in self.param_groups for parameter in group["params"]]

    def _described(self, groups: Sequence[Mapping[str, Any]], first: int = 0) -> list[Parameter]:
        described = []
        for group in groups:
            titles = group.get("param_names") or [""] * len(group["params"])
            for tensor, title in zip(group["params"], titles, strict=True):
                try:
                    described.append(describe(tensor, title))
                except ValueError as error:
                    index = first + len(described)
                    name = f"parameter {index} ({title})" if title else f"parameter {index}"
                    raise ValueError(f"{name}: {error}") from error
        return described

    def _gradients(self, session: Session, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor | None]:
        grads = []
        for index, (tensor, parameter) in enumerate(zip(tensors, session.parameters, strict=True)):
            grad = tensor.grad
            if tensor.dtype != parameter.dtype or tuple(tensor.shape) != parameter.shape:
                raise JobMismatchError(
                    f"{parameter.title(index)} has become {tensor.dtype} {list(tensor.shape)}; the job has "
                    f"{parameter.dtype} {list(parameter.shape)}"
                )
            if grad is not None and grad.layout is not torch.strided:
                raise RuntimeError("Adam does not support sparse gradients, please consider SparseAdam instead")
            if grad is not None and (grad.dtype != tensor.dtype or grad.shape != tensor.shape):
                raise RuntimeError(
                    f"{parameter.title(index)} is {tensor.dtype} {list(tensor.shape)}, its gradient {grad.dtype} "
                    f"{list(grad.shape)}; they have to be alike"
                )
            grads.append(grad)
        return grads

    def _fetch(self, indices: Sequence[int] = (), *, tensors: bool = True) -> dict[int, dict[str, Any]]:
        """The remote state of parameters in torch's form, by index: all of them where none is named."""
        session = self._open_session()
        entries, _ = session.read(self._state_tensors if tensors else (), indices)
        own = [(tensor, group) for group in self.param_groups for tensor in group["params"]]
        return {index: _in_torchs_form(entries[index], *own[index]) for index in sorted(entries)}

    @contextmanager
    def _state_here(self) -> Iterator[None]:
        """Has `self.state` be a dict of this process for a while, for torch's methods to work on."""
        before = self.__dict__.get("state")
        self.__dict__["state"] = defaultdict(dict)
        try:
            yield
        finally:
            if before is None:
                del self.__dict__["state"]
            else:
                self.__dict__["state"] = before

    def _entries_here(self) -> dict[int, RemoteEntry]:
        """What `self.state` holds, while it is here, as a server takes it.

        Raises:
            JobMismatchError: a tensor has another shape than its parameter.
        """
        entries = {}
        for index, parameter in enumerate(self._tensors()):
            entry = self.state.get(parameter)
            if not entry:
                continue
            tensors = {name: entry[name] for name in self._state_tensors if name in entry}
            for name, tensor in tensors.items():
                if tensor.shape != parameter.shape:
                    raise JobMismatchError(
                        f"{name} of parameter {index} has shape {list(tensor.shape)}, the parameter "
                        f"{list(parameter.shape)}"
                    )
            entries[index] = RemoteEntry(float(entry["step"]), tensors)
        return entries


def _untraced(method: Callable[P, T]) -> Callable[P, T]:
    """A bound method of torch's Optimizer without the wrapper that keeps torch.compile from tracing it.

    The wrapper imports torch._dynamo, which takes a process 74 MB and most of a second. Where nobody has imported it,
    nothing is being traced. A worker may be on a machine that has no memory to spare.
    """
    inner = getattr(method, "__wrapped__", None)
    if inner is None or "torch._dynamo" in sys.modules:
        return method
    return functools.partial(inner, method.__self__)  # type: ignore[attr-defined]  # a bound method has one


def _adopt(group: dict[str, Any], options: Mapping[str, Any]) -> None:
    """Puts the job's options into a worker's group, in place where they are tensors."""
    for key, value in options.items():
        here = group.get(key)
        if isinstance(here, torch.Tensor):
            here.fill_(value)
        else:
            group[key] = value


def _refuse_repetition(group: Mapping[str, Any]) -> None:
    titles = group.get("param_names") or [""] * len(group["params"])
    seen: dict[int, int] = {}
    for index, (tensor, title) in enumerate(zip(group["params"], titles, strict=True)):
        if id(tensor) in seen:
            raise ValueError(
                f"parameter {index} {title} of the group is the same tensor as parameter {seen[id(tensor)]}; give "
                "each once"
            )
        seen[id(tensor)] = index


def _in_torchs_form(entry: RemoteEntry, tensor: torch.Tensor, group: Mapping[str, Any]) -> dict[str, Any]:
    """A parameter's state as torch's step would have left it: dtype and device of `step` follow the kernel."""
    beside = bool(group["capturable"] or group["fused"])
    wide = torch.get_default_dtype() is torch.float64 and not group["fused"]
    step = torch.tensor(
        entry.step, dtype=torch.float64 if wide else torch.float32, device=tensor.device if beside else "cpu"
    )
    return {"step": step, **{name: value.to(tensor.device) for name, value in entry.tensors.items()}}


def _let_go(session: Session) -> None:
    """What happens to a session whose optimizer was dropped without `close()`. Must not wait: any thread may run it."""
    names.give_back(session.job, session.worker_id)
    session.abandon()
