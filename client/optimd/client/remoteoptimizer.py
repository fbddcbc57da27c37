"""What a remote optimizer is made of: torch's param_groups here, their state on a server, and what goes between."""

from __future__ import annotations

import functools
import sys
import threading
import weakref
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, ParamSpec, Self, TypeVar

import torch
from torch.optim.optimizer import Optimizer, StateDict

from optimd.client.exceptions import AccumulationLostError, ConfigurationError, JobMismatchError, OptimizerClosedError
from optimd.client.masterstate import remembering_what_is_loaded, unrounded
from optimd.client.options import ProxyOptions
from optimd.client.parameters import describe_groups, gradients, refuse_shared_memory
from optimd.client.pushes import Push
from optimd.client.remotestate import RemoteState
from optimd.client.session import Session
from optimd.client.statetransfer import RemoteEntry
from optimd.client.tracker import ParameterTracker
from optimd.wire.layout import Parameter

P = ParamSpec("P")
T = TypeVar("T")


class RemoteOptimizer(Optimizer):
    """The parameters and the state of a remote optimizer, and what has changed of them since its last step.

    What is a rule's own is left to subclasses: `_check_step`, `_is_made_here`, `_make_step`, `_in_torchs_form`.
    """

    _rule: ClassVar[str]
    """The update rule, by the schema's name."""

    _state_tensors: ClassVar[tuple[str, ...]]
    """The tensors that the rule may keep for a parameter, by torch's keys, besides `step`."""

    _made_here_by: ClassVar[str]
    """What has steps made in this process, as a message to a person says it."""

    _sparse_error: ClassVar[str]
    """What torch says of sparse gradients."""

    # Values are given in `__new__`, not here: trainers wrap an optimizer in an object of a class derived from the
    # optimizer's, which forwards only the attributes that it does not find.
    _session: Session | None
    _tracker: ParameterTracker
    _requested: tuple[str | None, ProxyOptions]
    """What the constructor was asked for: server and options."""
    _loading: Sequence[StateDict]
    """While a state_dict is being loaded, what torch was given to load."""
    _packing: set[int]
    """The threads in which torch's `state_dict` is packing."""
    _state_here: dict[Any, Any] | None
    """The state, while it is in this process: where steps are made here, and for torch's methods to work on."""

    def __new__(cls, *_args: Any, **_kwargs: Any) -> Self:
        """An optimizer that has opened no job yet."""
        optimizer = super().__new__(cls)
        optimizer._session = optimizer._state_here = None
        optimizer._loading = ()
        optimizer._packing = set()
        return optimizer

    def state_dict(self) -> StateDict:
        """The state in torch's own form, fetched from the server: it loads into `torch.optim.Adam` and goes on there.

        Raises:
            OptimdError: the server cannot be read.
        """
        if self._state_here is not None:
            # It lives here; or a hook of load_state_dict looks at what is being loaded, before the server has it.
            return untraced(super().state_dict)()
        # Only for this thread: a server step hook may call this while another one is using the optimizer.
        thread = threading.get_ident()
        self._packing.add(thread)
        try:
            return untraced(super().state_dict)()
        finally:
            self._packing.discard(thread)

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
        session = self._open_session()
        self._follow_layout(session, self._tensors())
        before, state_before = self.param_groups, self._state_here
        try:
            with remembering_what_is_loaded(self) as self._loading:
                # torch's calls `__setstate__`, from where on the loaded state is here, for hooks to see.
                untraced(super().load_state_dict)(state_dict)
            session.load(self.param_groups, self._entries_here(), force=force)
        except BaseException:
            self.param_groups, self._state_here = before, state_before
            raise
        finally:
            self._loading = ()
        if not self._is_made_here():
            loaded, self._state_here = self.state, None
            self._tracker.replace_state(self._tensors(), loaded, self._fetcher())

    @property
    def state(self) -> Any:
        """The optimizer state, by parameter: a `RemoteState`."""
        if self._state_here is not None:
            return self._state_here
        return RemoteState(
            self._tracker.cache,
            self._fetch,
            self._fetcher(),
            self._stepped,
            plain=threading.get_ident() in self._packing,
        )

    @state.setter
    def state(self, value: Any) -> None:
        # torch's constructor gives every optimizer an empty one, before there is a server.
        if self._session is not None:
            # Before it is cleared: it may be a view of the same state.
            content = dict(value)
            state = self.state
            state.clear()
            state.update(content)

    def __setstate__(self, state: dict[str, Any]) -> None:
        rest = dict(state)
        if "state" in rest:
            # torch's load_state_dict, on its way.
            self._state_here = rest.pop("state")
        for loaded in self._loading:
            # It has rounded what the server keeps in a master dtype.
            described = self._open_session().parameters
            for parameter, entry in unrounded(loaded, self._tensors(), described, self._state_tensors):
                self.state[parameter].update(entry)
        super().__setstate__(rest)

    def __getstate__(self) -> dict[str, Any]:
        return {
            "defaults": self.defaults,
            "state": self._content(),
            "param_groups": self.param_groups,
            "_requested": self._requested,
        }

    def _open_session(self) -> Session:
        if self._session is None:
            raise OptimizerClosedError("this optimizer never opened a job: its constructor failed")
        return self._session

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

    def _check_made_here(self, *, alone: bool) -> None:
        """Checks that nobody and nothing else has a say in steps that are made in this process.

        Raises:
            ConfigurationError: there are several workers, or the server was to do something to gradients.
        """
        options = self._requested[1]
        if not alone:
            raise ConfigurationError(
                f"{self._made_here_by} has the step made in the worker, and several workers would make different ones; "
                "use one worker, synchronous"
            )
        if options.max_grad_norm is not None or options.nonfinite != "allow" or options.master_dtype is not None:
            raise ConfigurationError(
                f"{self._made_here_by} has the step made in the worker, where max_grad_norm, nonfinite and "
                "master_dtype of ProxyOptions do nothing; leave them out"
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
        grads = gradients(tensors, session.parameters, sparse_error=self._sparse_error)
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
        self._check_made_here(alone=session.is_alone)
        if self._state_here is None:
            self._state_here = defaultdict(dict, self._content())
        self._follow_layout(session, tensors)
        if self._state_here is None:
            # The job was set back on the way.
            self._state_here = defaultdict(dict, self._content())
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
            return here._tracker.read_ahead.read(index, here._fetch, here._state_sizes)  # noqa: SLF001  # its own

        return fetch

    def _state_sizes(self) -> list[int]:
        """What the states of the job's parameters take, in bytes, at most."""
        return [parameter.nbytes * len(self._state_tensors) for parameter in self._open_session().parameters]

    def _stepped(self) -> Collection[int]:
        """The indices of the parameters that have a state on the server."""
        entries, _ = self._open_session().read(())
        return sorted(entries)

    @contextmanager
    def _having_state(self, state: dict[Any, Any]) -> Iterator[None]:
        """Has `self.state` be a dict of this process for a while, for torch's methods."""
        before, self._state_here = self._state_here, state
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


def untraced(method: Callable[P, T]) -> Callable[P, T]:
    """A bound method of torch's Optimizer without the wrapper that keeps torch.compile from tracing it.

    The wrapper imports torch._dynamo, which takes a process 74 MB and most of a second. Where nobody has imported it,
    nothing is being traced. A worker may be on a machine that has no memory to spare.
    """
    inner = getattr(method, "__wrapped__", None)
    if inner is None or "torch._dynamo" in sys.modules:
        return method
    return functools.partial(inner, method.__self__)  # type: ignore[attr-defined]  # a bound method has one
