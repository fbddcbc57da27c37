"""A torch optimizer whose state and update live on a server."""

from __future__ import annotations

import dataclasses
import functools
import sys
import warnings
import weakref
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, ClassVar, ParamSpec, Self, TypeVar, overload

import torch
from torch.optim.optimizer import Optimizer, StateDict
from torch.utils.hooks import RemovableHandle

from optimd.client.buffers import AttachedBuffers
from optimd.client.connection import Connection
from optimd.client.environment import read_environment
from optimd.client.exceptions import AccumulationLostError, ConfigurationError, JobMismatchError, OptimizerClosedError
from optimd.client.masterstate import remembering_what_is_loaded, unrounded
from optimd.client.options import ProxyOptions
from optimd.client.parameters import describe_groups, gradients, refuse_shared_memory, titles
from optimd.client.placement import names, place
from optimd.client.pushes import Push
from optimd.client.receipts import StepReceipt
from optimd.client.remotestate import RemoteState
from optimd.client.session import Session
from optimd.client.statetransfer import RemoteEntry
from optimd.client.tracker import ParameterTracker
from optimd.client.watching import ServerStepHooks
from optimd.wire.layout import Parameter

P = ParamSpec("P")
T = TypeVar("T")


class OptimizerProxy(Optimizer):
    """The part of a remote optimizer that every update rule shares.

    Subclass it together with torch's class of the rule. Hooks, param_groups, schedulers and the form of `state_dict`
    are torch's own. `step` pushes gradients, changed hyperparameters and whatever else was changed since the last step,
    and receives the new parameters. The process holds no optimizer state.

    All methods that reach the server block. An optimizer is not thread-safe, as torch's are not.
    """

    _rule: ClassVar[str]
    """The update rule, by the schema's name."""

    _state_tensors: ClassVar[tuple[str, ...]]
    """The tensors that the rule may keep for a parameter, by torch's keys, besides `step`."""

    # Values are given in `__new__`, not here: trainers wrap an optimizer in an object of a class derived from the
    # optimizer's, which forwards only the attributes that it does not find.
    _session: Session | None
    _tracker: ParameterTracker
    _finalizer: weakref.finalize[..., Any] | None
    _warned_of_disagreement: bool
    _loading: Sequence[StateDict]
    """While a state_dict is being loaded, what torch was given to load."""
    _state_here: dict[Any, Any] | None
    """The state, while it is in this process: where steps are made here, and for torch's methods to work on."""
    _server_step_hooks: ServerStepHooks | None
    _buffers: AttachedBuffers | None
    last_receipt: StepReceipt | None
    """What became of the last `step()`; None before the first."""

    def __new__(cls, *_args: Any, **_kwargs: Any) -> Self:
        """An optimizer that has opened no job yet."""
        optimizer = super().__new__(cls)
        optimizer._session = optimizer._finalizer = optimizer._state_here = optimizer.last_receipt = None
        optimizer._warned_of_disagreement = False
        optimizer._loading = ()
        optimizer._server_step_hooks = optimizer._buffers = None
        return optimizer

    def _connect(
        self, server: str | None, job: str | None, options: ProxyOptions | None, *, private: bool = False
    ) -> None:
        """Opens the job, once torch's constructor has built the param_groups.

        Raises:
            ValueError: parameters that a server cannot hold, or that share memory.
            OptimdError: the job cannot be opened.
        """
        options = options or ProxyOptions()
        self._requested = (server, options)
        tensors = self._tensors()
        parameters = self._described(self.param_groups)
        refuse_shared_memory(tensors, [parameter.name for parameter in parameters])
        placement = place(server, job, options, read_environment(), rule=self._rule, private=private)
        name = (placement.request.job, placement.request.worker_id)
        connection: Connection | None = None
        try:
            connection = Connection(placement.find_server())
            connection.probe(options.retry_timeout_s)
            session = Session(connection, placement.request)
            self._check_place_of_steps(placement.world_size)
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
        self._tracker = ParameterTracker(self._state_tensors)
        self._settle()

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
            RuntimeError: a CUDA graph is being captured, or this is a server step hook.
            OptimdError: the step failed. Gradients are as they were.
            BaseException: what torch's own step would raise: nothing has changed. Or what a server step hook raised:
                the step is made.
        """
        hooks = self._own_hooks()
        hooks.refuse_in_hook("step()")
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("an optimizer at the other end of a line cannot be captured in a CUDA graph")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        session = self._open_session()
        tensors = self._tensors()
        push = self._step_here(session, tensors) if self._is_made_here() else self._push(session, tensors)
        with hooks.held_back():
            receipt = session.step(push, tensors)
            self.last_receipt = receipt
            self._settle()
            if push.grad_scale is not None and not push.skipped:
                # torch's fused kernel leaves the gradients divided by their scale.
                torch._foreach_div_([grad for grad in push.grads if grad is not None], push.grad_scale)
            if session.wants_buffers and self._buffers is not None:
                session.push_buffers(self._buffers)
        if receipt.hyperparameters_disagreed and not self._warned_of_disagreement:
            self._warned_of_disagreement = True
            warnings.warn(
                f"step {receipt.step}: the workers' param_groups differ; those of the lowest rank hold", stacklevel=3
            )
        hooks.settle(receipt.step)
        return loss

    def accumulate(self) -> None:
        """Hands the gradients to the server, which adds them up for the next step; they are None afterwards.

        For micro-batches: call it after each backward, so that no gradient has to be kept meanwhile. `step` adds what
        gradients there are then. Returns when the server holds the sum.

        Raises:
            RuntimeError: a gradient is sparse, or this is a server step hook.
            ConfigurationError: the step is made in this process (`differentiable=True`).
            OptimdError: the gradients are not held. They are as they were.
        """
        self._own_hooks().refuse_in_hook("accumulate()")
        if self._is_made_here():
            raise ConfigurationError("accumulate() leaves gradients to the server, and this step is made in the worker")
        session = self._open_session()
        tensors = self._tensors()
        self._follow_layout(session, tensors)
        session.accumulate(len(self.param_groups), gradients(tensors, session.parameters))
        for tensor in tensors:
            tensor.grad = None

    def push_parameters(self) -> None:
        """Has the next step bring all parameters as they are then, before anything is updated.

        Only needed for what goes unnoticed: writes to a few elements of large tensors through `.data`. Does not reach
        the server.
        """
        self._open_session()
        self._tracker.touch()

    @torch.no_grad()
    def pull_parameters(self) -> None:
        """Receives the job's parameters in place. What was written into them since the last step is lost.

        Raises:
            RuntimeError: this is a server step hook.
            JobMismatchError: their number, shapes or dtypes have changed.
            OptimdError: the server cannot be read.
        """
        self._own_hooks().refuse_in_hook("pull_parameters()")
        session = self._open_session()
        tensors = self._tensors()
        if self._tracker.layout_differs(session.parameters, session.group_sizes, self.param_groups):
            raise JobMismatchError("the parameters have other shapes or dtypes than the job's; step() brings it these")
        session.pull(tensors)
        self._tracker.refresh(tensors)

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
        session = self._session
        # Where groups were changed by hand, the next step gives the job all of them at once.
        follows = session is not None and not self._tracker.layout_differs(
            session.parameters, session.group_sizes, self.param_groups
        )
        try:
            _untraced(super().add_param_group)(param_group)
            group = self.param_groups[before]
            _refuse_repetition(group)
            if session is not None and follows:
                tensors, added = self._tensors(), group["params"]
                refuse_shared_memory(tensors, [title for known in self.param_groups for title in titles(known)])
                described = self._described([group], len(tensors) - len(added))
                adopted = session.add_group(group, added, described)
                if adopted is not None:
                    _adopt(group, adopted)
                self._tracker.grow(tensors)
        except BaseException:
            del self.param_groups[before:]
            raise

    def zero_grad(self, set_to_none: bool = True) -> None:  # noqa: FBT001, FBT002  # torch's signature
        """Clears the gradients, as torch's does, and what the server holds of `accumulate`.

        Reaches the server only where it holds something.

        Args:
            set_to_none: Whether gradients become None rather than zero.

        Raises:
            RuntimeError: the server holds something, and this is a server step hook.
            OptimdError: the server could not be told.
        """
        if self._session is not None and self._session.holds_gradients:
            self._own_hooks().refuse_in_hook("zero_grad()")
            self._session.discard_accumulated()
        _untraced(super().zero_grad)(set_to_none)

    def state_dict(self) -> StateDict:
        """The state in torch's own form, fetched from the server: it loads into `torch.optim.Adam` and goes on there.

        Raises:
            OptimdError: the server cannot be read.
        """
        if self._state_here is not None:
            # It lives here; or a hook of load_state_dict looks at what is being loaded, before the server has it.
            return _untraced(super().state_dict)()
        content = self._content()
        with self._having_state():
            self.state.update(content)
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
        self._follow_layout(session, self._tensors())
        before, state_before = self.param_groups, self._state_here
        try:
            with remembering_what_is_loaded(self) as self._loading:
                # torch's calls `__setstate__`, from where on the loaded state is here, for hooks to see.
                _untraced(super().load_state_dict)(state_dict)
            session.load(self.param_groups, self._entries_here(), force=force)
        except BaseException:
            self.param_groups, self._state_here = before, state_before
            raise
        finally:
            self._loading = ()
        if not self._is_made_here():
            loaded, self._state_here = self.state, None
            self._tracker.replace_state(loaded, self._fetcher())

    @property
    def state(self) -> Any:
        """The optimizer state, by parameter: a `RemoteState`."""
        if self._state_here is not None:
            return self._state_here
        return RemoteState(self._tracker.cache, self._fetch, self._fetcher(), self._stepped)

    @state.setter
    def state(self, value: Any) -> None:
        # torch's constructor gives every optimizer an empty one, before there is a server.
        if self._session is not None:
            state = self.state
            state.clear()
            state.update(value)

    def __getstate__(self) -> dict[str, Any]:
        return {
            "defaults": self.defaults,
            "state": self._content(),
            "param_groups": self.param_groups,
            "_requested": self._requested,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        if self._session is not None:
            # torch's load_state_dict, on its way: it has rounded what the server keeps in a master dtype.
            rest = dict(state)
            if "state" in rest:
                self._state_here = rest.pop("state")
            for loaded in self._loading:
                described = self._open_session().parameters
                for parameter, entry in unrounded(loaded, self._tensors(), described, self._state_tensors):
                    self.state[parameter].update(entry)
            super().__setstate__(rest)
            return
        # A copy, or what comes out of a pickle: a job of its own with the same state.
        state = dict(state)
        server, options = state.pop("_requested", (None, ProxyOptions()))
        here = defaultdict(dict, state.pop("state"))
        with self._having_state(here):
            super().__setstate__(state)
            entries = self._entries_here()
        aggregation = dataclasses.replace(options.aggregation, world_size=None)
        alone = dataclasses.replace(
            options, aggregation=aggregation, rank=0, world_size=1, worker_id=None, on_existing="resume"
        )
        self._connect(server, None, alone, private=True)
        self._open_session().load(self.param_groups, entries, force=False)
        self._tracker.replace_state(here, self._fetcher())
        if self._is_made_here():
            self._state_here = here

    def __repr__(self) -> str:
        text = super().__repr__()
        session = self._session
        if session is None:
            return text
        return f"{text} on {session.address}, job {session.job}, step {session.job_step}"

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
        return describe_groups(groups, first, master_dtype=self._requested[1].master_dtype)

    def _check_step(self, group: Mapping[str, Any], tensor: torch.Tensor, entry: Mapping[str, Any] | None) -> None:
        """Raises what torch's own step would raise.

        Args:
            group: A param group.
            tensor: One of its parameters.
            entry: The parameter's state, where that is the question; else only the group's options are.
        """

    def _is_made_here(self) -> bool:
        """Whether steps are made in this process, and only their results go to the server."""
        return False

    def _make_step(self) -> None:
        """Makes a step in this process, where `_is_made_here`, with `self.state` in it."""
        raise NotImplementedError

    def _in_torchs_form(self, entry: RemoteEntry, tensor: torch.Tensor, group: Mapping[str, Any]) -> dict[str, Any]:
        """A parameter's state as torch's step would have left it."""
        raise NotImplementedError

    def _check_place_of_steps(self, world_size: int) -> None:
        if world_size > 1 and self._is_made_here():
            raise ConfigurationError(
                f"steps that are part of the autograd graph (differentiable=True) are made in the worker, and "
                f"{world_size} workers would make different ones; use one worker"
            )

    def _push(self, session: Session, tensors: Sequence[torch.Tensor]) -> Push:
        """What the next step brings."""
        if self._state_here is not None:
            # Steps were made here until now.
            left, self._state_here = self._state_here, None
            self.state.update(left)
        for group in self.param_groups:
            kinds = {(p.dtype, p.device): p for p in group["params"] if p.grad is not None}
            for tensor in kinds.values():
                self._check_step(group, tensor, None)
        self._follow_layout(session, tensors)
        grads = gradients(tensors, session.parameters)
        self._tracker.keep_departed(tensors, self._stepped)
        changes = self._tracker.changes(tensors)
        if changes.states:
            self._check_states(session, changes.states)
        scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        return Push(
            groups=self.param_groups,
            grads=grads,
            values=changes.values,
            states=changes.states,
            grad_scale=None if scale is None else float(scale),
            skipped=found_inf is not None and float(found_inf) != 0,
        )

    def _step_here(self, session: Session, tensors: Sequence[torch.Tensor]) -> Push:
        """Makes the step in this process. What it led to is what goes to the server."""
        if self._state_here is None:
            self._state_here = defaultdict(dict, self._content())
        self._follow_layout(session, tensors)
        self._make_step()
        return Push(
            groups=self.param_groups,
            grads=[None] * len(tensors),
            values=dict(enumerate(tensors)),
            states=self._entries_here(),
        )

    def _follow_layout(self, session: Session, tensors: Sequence[torch.Tensor]) -> None:
        """Has the job take the parameters as they are now, if their number, shapes or dtypes are not the job's.

        Raises:
            AccumulationLostError: the server holds gradients of the parameters as they were.
            Exception: what torch raises of a state that does not fit its parameter any more.
        """
        if not self._tracker.layout_differs(session.parameters, session.group_sizes, self.param_groups):
            return
        if session.holds_gradients:
            raise AccumulationLostError(
                "the parameters were replaced while the server holds gradients of them; call zero_grad() first"
            )
        described = self._described(self.param_groups)
        refuse_shared_memory(tensors, [parameter.name for parameter in described])
        self._tracker.keep_departed(tensors, self._stepped)
        carried = self._tracker.carried(tensors, described, session.parameters)
        if self._state_here is None:
            edits = self._tracker.cache.edits()
            unfit = {
                origin: index
                for index, tensor in enumerate(tensors)
                if (origin := self._tracker.cache.index(tensor)) is not None
                and index not in carried
                and tensor not in edits
            }
            for origin in self._stepped() if unfit else ():
                if origin in unfit:
                    self._refuse_state(unfit[origin], self._fetch((origin,))[origin])
        session.replace_layout(self.param_groups, tensors, described, carried)
        self._tracker.relocate(tensors, self._fetcher())

    def _check_states(self, session: Session, states: Mapping[int, RemoteEntry]) -> None:
        for index, entry in states.items():
            parameter = session.parameters[index]
            if any(
                # In the parameter's own dtype, as zeros_like gives it, it is as good: the server keeps it wider.
                tensor.dtype not in (parameter.dtype, parameter.dtype_of(name))
                or tuple(tensor.shape) != parameter.shape
                for name, tensor in entry.tensors.items()
            ):
                self._refuse_state(index, {"step": torch.tensor(entry.step), **entry.tensors})

    def _refuse_state(self, index: int, entry: Mapping[str, Any]) -> None:
        tensor, group = self._owned()[index]
        self._check_step(group, tensor, entry)
        kinds = {name: (value.dtype, list(value.shape)) for name, value in entry.items() if name != "step"}
        raise JobMismatchError(
            f"parameter {index} is {tensor.dtype} {list(tensor.shape)}, its state {kinds}: they have to be alike"
        )

    def _settle(self) -> None:
        """The server has what this process has."""
        self._tracker.settle(self._tensors(), self._fetcher())

    def _owned(self) -> list[tuple[torch.Tensor, dict[str, Any]]]:
        """The parameters with their groups."""
        return [(tensor, group) for group in self.param_groups for tensor in group["params"]]

    def _content(self) -> dict[Any, Any]:
        """The whole state, in plain dicts."""
        state = self.state
        return state.snapshot() if isinstance(state, RemoteState) else dict(state)

    def _fetch(self, indices: Sequence[int] = ()) -> dict[int, dict[str, Any]]:
        """The remote state of parameters in torch's form, by index: all of them where none is named."""
        entries, _ = self._open_session().read(self._state_tensors, indices)
        groups = dict(self._owned())
        fetched = {}
        for index in sorted(entries):
            tensor = self._tracker.known[index]
            group = groups.get(tensor, self.defaults)
            fetched[index] = self._in_torchs_form(entries[index], tensor, group)
        return fetched

    def _fetcher(self) -> Callable[[int], dict[str, Any]]:
        """Fetches one parameter's state, without keeping the optimizer alive."""
        optimizer = weakref.ref(self)

        def fetch(index: int) -> dict[str, Any]:
            here = optimizer()
            if here is None:
                raise OptimizerClosedError("the optimizer that this state belongs to is gone")
            return here._tracker.read_ahead.read(index, here._fetch, here._state_sizes())  # noqa: SLF001  # its own

        return fetch

    def _state_sizes(self) -> list[int]:
        """What the states of the job's parameters take, in bytes, at most."""
        return [parameter.nbytes * len(self._state_tensors) for parameter in self._open_session().parameters]

    def _stepped(self) -> Collection[int]:
        """The indices of the parameters that have a state on the server."""
        entries, _ = self._open_session().read(())
        return sorted(entries)

    @contextmanager
    def _having_state(self, state: dict[Any, Any] | None = None) -> Iterator[None]:
        """Has `self.state` be a dict of this process for a while, an empty one unless given, for torch's methods."""
        before = self._state_here
        self._state_here = defaultdict(dict) if state is None else state
        try:
            yield
        finally:
            self._state_here = before

    def _entries_here(self) -> dict[int, RemoteEntry]:
        """What `self.state` holds, while it is here, as a server takes it.

        Raises:
            JobMismatchError: a tensor has another shape than its parameter.
        """
        entries = {}
        own = {"step", *self._state_tensors}
        for index, parameter in enumerate(self._tensors()):
            entry = self.state.get(parameter)
            if not entry or own.isdisjoint(entry):
                continue
            tensors = {name: entry[name].detach() for name in self._state_tensors if name in entry}
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
    seen: dict[int, int] = {}
    for index, (tensor, title) in enumerate(zip(group["params"], titles(group), strict=True)):
        if id(tensor) in seen:
            raise ValueError(
                f"parameter {index} {title} of the group is the same tensor as parameter {seen[id(tensor)]}; give "
                "each once"
            )
        seen[id(tensor)] = index


def _let_go(session: Session) -> None:
    """What happens to a session whose optimizer was dropped without `close()`. Must not wait: any thread may run it."""
    names.give_back(session.job, session.worker_id)
    session.abandon()
