"""A torch optimizer whose state and update live on a server."""

from __future__ import annotations

import dataclasses
import warnings
import weakref
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from types import TracebackType
from typing import Any, Self, overload

import torch
from torch.optim.optimizer import StateDict
from torch.utils.hooks import RemovableHandle

from optimd.client.buffers import AttachedBuffers
from optimd.client.connection import Connection
from optimd.client.credentials import INSECURE, Credentials
from optimd.client.environment import read_environment
from optimd.client.exceptions import (
    ConfigurationError,
    ConnectionLostError,
    JobMismatchError,
    OptimizerClosedError,
)
from optimd.client.jobline import JobLine
from optimd.client.options import ProxyOptions, Sync
from optimd.client.overlap import SCALED, Overlap
from optimd.client.parameters import gradients, refuse_shared_memory, titles
from optimd.client.placement import names, place
from optimd.client.receipts import StepReceipt
from optimd.client.remoteoptimizer import RemoteOptimizer, untraced
from optimd.client.session import Session
from optimd.client.tracker import ParameterTracker
from optimd.client.watching import ServerStepHooks


class OptimizerProxy(RemoteOptimizer):
    """The part of a remote optimizer that every update rule shares.

    Subclass it together with torch's class of the rule. Hooks, param_groups, schedulers and the form of `state_dict`
    are torch's own. `step` pushes gradients, changed hyperparameters and whatever else was changed since the last step,
    and receives the new parameters. The process holds no optimizer state.

    All methods that reach the server block. An optimizer is not thread-safe, as torch's are not.
    """

    _finalizer: weakref.finalize[..., Any] | None
    _warned_of_disagreement: bool
    _server_step_hooks: ServerStepHooks | None
    _buffers: AttachedBuffers | None
    _overlap: Overlap | None
    last_receipt: StepReceipt | None
    """What became of the last `step()`; None before the first."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """An optimizer that has opened no job yet."""
        optimizer = super().__new__(cls, *args, **kwargs)
        optimizer._finalizer = optimizer.last_receipt = None
        optimizer._server_step_hooks = optimizer._buffers = optimizer._overlap = None
        optimizer._warned_of_disagreement = False
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
        if options.overlap and self._is_made_here():
            raise ConfigurationError(
                f"{self._made_here_by} has the step made in the worker, which sends no gradients; leave overlap out"
            )
        tensors = self._tensors()
        parameters = self._described(self.param_groups)
        refuse_shared_memory(tensors, [parameter.name for parameter in parameters])
        environment = read_environment()
        placement = place(server, job, options, environment, rule=self._rule, private=private)
        name = (placement.request.job, placement.request.worker_id)
        connection: Connection | None = None
        try:
            connection = Connection(
                placement.find_server(),
                options.transport,
                INSECURE if placement.is_embedded else Credentials.chosen(options, environment),
            )
            connection.reach(options.retry_timeout_s)
            line = JobLine(
                connection,
                placement.request,
                retry_timeout_s=0 if placement.is_embedded else options.retry_timeout_s,
                local=_LocalValues(weakref.ref(self)),
            )
            session = Session(line)
            if self._is_made_here():
                self._check_made_here(alone=session.is_alone)
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
        session.acknowledge(self.param_groups)
        self._tracker = ParameterTracker(self._state_tensors)
        if options.overlap:
            self._overlap = Overlap(session)
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
    def rank(self) -> int:
        """This worker's rank: the one that it was given, or that the server chose for it."""
        return self._open_session().rank

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
        # What the job may be set back from on the way, the gradients belong to.
        rewinds = session.rewinds
        push = self._step_here(session, tensors) if self._is_made_here() else self._push(session, tensors)
        ahead = None
        if self._overlap is not None:
            if push.grad_scale is not None or push.skipped:
                # GradScaler takes them away behind the step, which it does not come to: the next one is without it.
                for name in ("grad_scale", "found_inf"):
                    self.__dict__.pop(name, None)
                raise ConfigurationError(SCALED)
            ahead = self._overlap.complete(tensors, push.grads)
        with hooks.held_back():
            receipt = session.step(push, tensors, rewinds=rewinds, on_received=self._tracker.received, ahead=ahead)
            self.last_receipt = receipt
            self._settle()
            if push.grad_scale is not None and not push.skipped:
                # torch's fused kernel leaves the gradients divided by their scale.
                for grad in push.grads:
                    if grad is not None:
                        grad.div_(push.grad_scale)
            if session.wants_buffers and self._buffers is not None:
                self._refresh_buffers(session, self._buffers)
        if receipt.outcome == "dropped_late" and (push.values or push.states) and session.rewinds == rewinds:
            warnings.warn(
                f"the job had gone on to step {receipt.step} without this worker: values or states that were changed "
                "since its last step were dropped with its gradients",
                stacklevel=4,
            )
        if receipt.hyperparameters_disagreed and not self._warned_of_disagreement:
            self._warned_of_disagreement = True
            warnings.warn(
                f"step {receipt.step}: the workers' param_groups differ; those of the lowest rank hold", stacklevel=4
            )
        hooks.settle(receipt.step)
        return loss

    def accumulate(self) -> None:
        """Hands the gradients to the server, which adds them up for the next step; they are None afterwards.

        For micro-batches: call it after each backward, so that no gradient has to be kept meanwhile. `step` adds what
        gradients there are then. Returns when the server holds the sum. A `GradScaler` looks for infinite gradients in
        the worker only: it does not see those that were handed over (`ProxyOptions(nonfinite="skip")` does).

        Raises:
            RuntimeError: a gradient is sparse, or this is a server step hook.
            ConfigurationError: the step is made in this process (`differentiable=True`).
            OptimdError: the gradients are not held. They are as they were.
        """
        self._own_hooks().refuse_in_hook("accumulate()")
        if self._overlap is not None:
            raise ConfigurationError(
                "with ProxyOptions(overlap=True) gradients leave while backward runs. Run every backward but the last "
                "one under `with optimizer.no_sync():`, which adds them up here, or leave overlap out"
            )
        if self._is_made_here():
            raise ConfigurationError(
                f"accumulate() leaves gradients to the server, and {self._made_here_by} has the step made in the worker"
            )
        session = self._open_session()
        tensors, rewinds = self._tensors(), session.rewinds
        self._follow_layout(session, tensors)
        grads = gradients(tensors, session.parameters, sparse_error=self._sparse_error)
        session.accumulate(len(self.param_groups), grads, rewinds=rewinds)
        for tensor in tensors:
            tensor.grad = None

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """A context in which backward only adds up gradients in this process, as torch's DDP has it.

        For micro-batches with `ProxyOptions(overlap=True)`: run every backward but the last one in it. Without overlap
        gradients stay here until `step()` anyway, and it does nothing. Does not reach the server.
        """
        with self._overlap.paused() if self._overlap is not None else nullcontext():
            yield

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

    def snapshot(self) -> int:
        """Has the server write the job to its disk: values, state and all that it takes to go on from there.

        Blocks until the server has it on disk and has read it back; training goes on meanwhile. A server writes
        snapshots by itself too.

        Returns:
            The job step that the snapshot is of.

        Raises:
            RuntimeError: this is a server step hook.
            NotDurableError: the server keeps nothing on disk.
            OptimdError: it could not be written, or the server cannot be reached.
        """
        self._own_hooks().refuse_in_hook("snapshot()")
        return self._open_session().snapshot()

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
        is one of this worker's, they never run beside the code that trains; in any other they do. Where the job is set
        back to an earlier step, they are called for the steps that follow on that.

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
            untraced(super().add_param_group)(param_group)
            group = self.param_groups[before]
            _refuse_repetition(group)
            if session is not None and follows:
                tensors, added = self._tensors(), group["params"]
                refuse_shared_memory(tensors, [title for known in self.param_groups for title in titles(known)])
                described = self._described([group], len(tensors) - len(added))
                adopted = session.add_group(group, added, described)
                if adopted is not None:
                    _adopt(group, adopted)
                    session.acknowledge(self.param_groups)
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
        if self._overlap is not None:
            self._overlap.discard()
        if self._session is not None and self._session.holds_gradients:
            self._own_hooks().refuse_in_hook("zero_grad()")
            self._session.discard_accumulated()
        untraced(super().zero_grad)(set_to_none)

    def load_state_dict(self, state_dict: StateDict, *, force: bool = False) -> None:
        """As `RemoteOptimizer.load_state_dict`, with whose errors.

        Raises:
            RuntimeError: this is a server step hook.
        """
        self._own_hooks().refuse_in_hook("load_state_dict()")
        super().load_state_dict(state_dict, force=force)

    def __setstate__(self, state: dict[str, Any]) -> None:
        if self._session is not None:
            super().__setstate__(state)
            return
        # A copy, or what comes out of a pickle: a job of its own with the same state.
        state = dict(state)
        server, options = state.pop("_requested", (None, ProxyOptions()))
        here = defaultdict(dict, state.pop("state"))
        with self._having_state(here):
            super().__setstate__(state)
            entries = self._entries_here()
        alone = dataclasses.replace(
            options, aggregation=Sync(), rank=0, world_size=1, worker_id=None, on_existing="resume"
        )
        self._connect(server, None, alone, private=True)
        self._open_session().load(self.param_groups, entries, force=False)
        self._tracker.replace_state(self._tensors(), here, self._fetcher())
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
        self._leave()

    def _leave(self, *, failed: bool = False) -> None:
        session, finalizer = self._session, self._finalizer
        if session is not None and finalizer is not None and finalizer.detach() is not None:
            names.give_back(session.job, session.worker_id)
            self._own_hooks().close()
            if self._overlap is not None:
                self._overlap.close()
            session.leave(failed=failed)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # A script that ends with an exception is to be started again: `Sync(on_loss="wait")` waits for that.
        self._leave(failed=error is not None)

    # --- inside

    def _settle(self) -> None:
        super()._settle()
        if self._overlap is not None:
            self._overlap.watch(self._tensors())

    def _set_back(self, step: int) -> None:
        """The job was set back to `step`, and the parameters are its: what came behind that is gone."""
        if not self._loading:
            self._state_here = None
        self._tracker.settle(self._tracker.known, self._fetcher())
        self._own_hooks().rewind(step)

    def _refresh_buffers(self, session: Session, buffers: AttachedBuffers) -> None:
        try:
            session.push_buffers(buffers)
        except (JobMismatchError, ConnectionLostError) as error:
            # The step is made: what keeps the server's copy from being refreshed is no reason to fail it.
            warnings.warn(f"the server's copy of the buffers was not refreshed: {error}", stacklevel=4)

    def _own_hooks(self) -> ServerStepHooks:
        if self._server_step_hooks is None:
            raise OptimizerClosedError("this optimizer never opened a job: its constructor failed")
        return self._server_step_hooks


def _adopt(group: dict[str, Any], options: Mapping[str, Any]) -> None:
    """Puts the job's options into a worker's group, in place where they are tensors."""
    for key, value in options.items():
        group[key] = _adopted(group.get(key), value)


def _adopted(here: Any, value: Any) -> Any:
    if isinstance(here, torch.Tensor):
        return here.fill_(value)
    if isinstance(here, tuple) and isinstance(value, tuple) and len(here) == len(value):
        return tuple(map(_adopted, here, value))
    return value


def _refuse_repetition(group: Mapping[str, Any]) -> None:
    seen: dict[int, int] = {}
    for index, (tensor, title) in enumerate(zip(group["params"], titles(group), strict=True)):
        if id(tensor) in seen:
            raise ValueError(
                f"parameter {index} {title} of the group is the same tensor as parameter {seen[id(tensor)]}; give "
                "each once"
            )
        seen[id(tensor)] = index


class _LocalValues:
    """What the line of an optimizer may know of its parameters, without keeping it alive.

    Args:
        optimizer: The optimizer.
    """

    def __init__(self, optimizer: weakref.ref[OptimizerProxy]) -> None:
        self._optimizer = optimizer

    def tensors(self) -> Sequence[torch.Tensor]:
        """The parameters that the job knows, in order."""
        here = self._optimizer()
        return [] if here is None else here._tensors()[: len(here._tracker.known)]  # noqa: SLF001  # its own

    def written(self) -> Collection[int]:
        """Those that the program has written to."""
        here = self._optimizer()
        return () if here is None else here._tracker.written(self.tensors())  # noqa: SLF001  # its own

    def received(self, kept: Collection[int]) -> None:
        """They have the server's values, but for those that were kept."""
        here = self._optimizer()
        if here is not None:
            here._tracker.refresh(self.tensors(), kept)  # noqa: SLF001  # its own

    def rewound(self, step: int) -> None:
        """The job was set back, and they have the server's values."""
        here = self._optimizer()
        if here is not None:
            here._set_back(step)  # noqa: SLF001  # its own


def _let_go(session: Session) -> None:
    """What happens to a session whose optimizer was dropped without `close()`. Must not wait: any thread may run it."""
    names.give_back(session.job, session.worker_id)
    session.abandon()
