"""Server step hooks: called for every step that the job commits, in a thread that listens to the server.

Who holds whom: the optimizer owns its `ServerStepHooks`, and these the hooks, which often refer to the optimizer. The
thread has the stream and a `_Delivery`, and knows the other two by weak references: an optimizer that is dropped is
gone at once, its stream is cancelled with its connection, and that ends the thread.
"""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum, auto
from typing import TYPE_CHECKING, Any, Final

from torch.utils.hooks import RemovableHandle

from optimd.client.connection import LEAVE_TIMEOUT_S, StepStream
from optimd.client.exceptions import (
    ConnectionLostError,
    OptimdError,
    ProtocolError,
    ServerUnavailableError,
    StepTimeoutError,
)
from optimd.client.receipts import StepReceipt
from optimd.client.session import Session

if TYPE_CHECKING:
    from optimd.client.proxy import OptimizerProxy

_log = logging.getLogger("optimd.client")

_PAUSE_S: Final = 0.2
"""How long to wait before a stream of steps that broke is opened anew, in seconds."""

# What this thread is calling hooks of, if it is.
_here = threading.local()


class ServerStepHooks:
    """The server step hooks of one optimizer, and the thread that calls them while there are any.

    Belongs to the optimizer's thread, but for what its docstring says may be called in a hook.

    Args:
        optimizer: What the hooks are given. Not kept alive.
        session: Its session.
        timeout_s: How long to wait for the server to begin, and for a step's hooks to have run, in seconds.
    """

    def __init__(self, optimizer: OptimizerProxy, session: Session, timeout_s: float) -> None:
        self._optimizer = weakref.ref(optimizer)
        self._session = session
        self._timeout_s = timeout_s
        self._lock = threading.Lock()
        # Both: written to with self._lock held, but for what torch's handles remove; read without it.
        self._hooks = _Hooks(weakref.WeakMethod(self._stop_if_empty))
        self._delivery: _Delivery | None = None
        # What a hook has raised and no `step()` has yet. Not the delivery's, which the thread holds: its traceback
        # leads to the optimizer.
        self._error: BaseException | None = None  # guarded by self._lock

    def register(self, function: Callable[[Any, StepReceipt], object]) -> RemovableHandle:
        """Has a function called for every step from now on. Waits until the server will tell of them. Works in a hook.

        Raises:
            ServerUnavailableError: the server did not answer within `timeout_s`.
            OptimdError: it does not take the call, or the optimizer cannot be used.
        """
        self._session.check()
        handle = RemovableHandle(self._hooks)
        with self._lock:
            self._hooks[handle.id] = _Hook(function, self._session.job_step)
            is_told = self._delivery is not None and self._delivery.phase is not _Phase.ENDED
        try:
            if not is_told:
                self._start()
        except BaseException:
            handle.remove()
            raise
        return handle

    @contextmanager
    def held_back(self) -> Iterator[None]:
        """Begins no hooks until the block ends: not while a step writes the parameters."""
        delivery = self._delivery
        # A forked child has no such thread, and maybe a lock that it held.
        if delivery is None or not self._session.is_own:
            yield
            return
        delivery.hold(held=True)
        try:
            yield
        finally:
            delivery.hold(held=False)

    def settle(self, step: int) -> None:
        """Waits until all hooks have been called for the steps up to `step`.

        Raises:
            StepTimeoutError: they have not within `timeout_s`.
            OptimdError: the server no longer tells of steps; with what it said.
            BaseException: what a hook has raised since the last call.
        """
        delivery = self._delivery
        if delivery is not None:
            delivery.await_given(step, self._timeout_s)
        with self._lock:
            error, self._error = self._error, None
        if error is not None:
            try:
                raise error
            finally:
                # Its traceback has this frame now: they must not hold each other.
                del error

    def rewind(self, step: int) -> None:
        """The job was set back to `step`: hooks are told of what it commits from there on."""
        if not self._session.is_own:
            return
        self.begin_again(step)
        delivery = self._delivery
        if delivery is not None:
            delivery.rewind(step)

    def begin_again(self, step: int) -> None:
        """The steps behind `step` are of interest, whatever has been told of those numbers. The thread calls it too."""
        # A copy, made in one piece: hooks come and go meanwhile.
        for hook in tuple(self._hooks.values()):
            hook.after_step = min(hook.after_step, step)

    def refuse_in_hook(self, call: str) -> None:
        """Refuses, in a hook, what would wait for hooks or disturb the step that waits for this one.

        Raises:
            RuntimeError: this is one.
        """
        if getattr(_here, "hooks", None) is self:
            raise RuntimeError(
                f"{call} was called in a server step hook, which step() waits for; a hook may read the optimizer, "
                "state_dict() included, and leave the rest to the code that calls step()"
            )

    def call(self, optimizer: OptimizerProxy, receipt: StepReceipt) -> None:
        """Calls the hooks for a step. What they raise is kept for the next `settle`. Called by the thread."""
        _here.hooks = self
        try:
            # A copy, made in one piece: hooks come and go meanwhile.
            for key, hook in tuple(self._hooks.items()):
                if key in self._hooks and receipt.step > hook.after_step:
                    try:
                        hook.function(optimizer, receipt)
                    except BaseException as error:  # noqa: BLE001  # whatever it is, step() raises it
                        self._keep(error, receipt.step)
        finally:
            _here.hooks = None

    def close(self) -> None:
        """Removes all hooks and ends the thread; waits for it, up to `LEAVE_TIMEOUT_S`. Works in a hook."""
        delivery = self._delivery
        if not self._session.is_own:
            return
        self._hooks.clear()
        self._stop_if_empty()
        if delivery is not None and threading.current_thread() is not delivery.thread:
            delivery.thread.join(LEAVE_TIMEOUT_S)
        with self._lock:
            error, self._error = self._error, None
        if error is not None:
            _log.error("a server step hook had raised when the optimizer was closed", exc_info=error)

    def _start(self) -> None:
        delivery = _Delivery(self._session.watch_steps, self._session.job_step, self._session.retry_timeout_s)
        with self._lock:
            self._delivery = delivery
        delivery.thread = threading.Thread(
            target=_deliver, args=(delivery, self._optimizer, weakref.ref(self)), name="optimd-hooks", daemon=True
        )
        delivery.thread.start()
        delivery.await_begun(self._timeout_s)

    def _stop_if_empty(self) -> None:
        if not self._session.is_own:
            return
        with self._lock:
            if self._hooks or self._delivery is None:
                return
            delivery, self._delivery = self._delivery, None
        delivery.end(None)
        self._session.end_watch(delivery.stream)

    def _keep(self, error: BaseException, step: int) -> None:
        with self._lock:
            if self._error is None:
                self._error = error
                return
        _log.error("a server step hook raised for step %d, after another one", step, exc_info=error)


@dataclass(slots=True)
class _Hook:
    function: Callable[[Any, StepReceipt], object]
    after_step: int
    """The last step that is not of interest to it."""


class _Hooks(OrderedDict[int, _Hook]):
    """What torch's handle removes hooks from: says so when it does."""

    def __init__(self, on_removal: weakref.WeakMethod[Callable[[], None]]) -> None:
        super().__init__()
        self._on_removal = on_removal

    def __delitem__(self, key: int) -> None:
        super().__delitem__(key)
        on_removal = self._on_removal()
        if on_removal is not None:
            on_removal()


class _Phase(Enum):
    """Where a delivery is in its life."""

    OPENING = auto()
    OPEN = auto()
    ENDED = auto()


class _Delivery:
    """What the thread and the steps that wait for it share. Thread-safe.

    Args:
        watch: Opens a stream of the job's steps behind a given one.
        given: The last step that is not of interest.
        retry_timeout_s: How long to try again where the stream breaks, in seconds.
    """

    thread: threading.Thread

    def __init__(self, watch: Callable[[int], StepStream], given: int, retry_timeout_s: float) -> None:
        self._watch = watch
        self._retry_timeout_s = retry_timeout_s
        self.stream = watch(given)
        self._changed = threading.Condition()
        # All below: guarded by self._changed. `phase` may be read without it.
        self.phase = _Phase.OPENING
        self._given = given
        self._running: int | None = None
        self._held = False
        # Whether what the stream still brings is of a past that the job has left.
        self._is_outdated = False
        # Whether the thread has found that out before the optimizer.
        self._has_followed = False
        self._failure: Exception | None = None

    # --- for the optimizer

    def await_begun(self, timeout_s: float) -> None:
        """Waits until the server has taken the call.

        Raises:
            ServerUnavailableError: it has not answered in time.
            OptimdError: it does not take it.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self.phase is not _Phase.OPENING, timeout_s):
                raise ServerUnavailableError(f"the server did not begin to tell of steps within {timeout_s:g} s")
            if self._failure is not None:
                raise self._kind_locked()(str(self._failure)) from None

    def hold(self, *, held: bool) -> None:
        """Begins no hooks while `held`."""
        with self._changed:
            self._held = held
            self._changed.notify_all()

    def await_given(self, step: int, timeout_s: float) -> None:
        """Waits until all hooks have been called for `step`, or delivery has ended in good order.

        Raises:
            StepTimeoutError: they have not in time.
            OptimdError: delivery has failed.
        """
        with self._changed:
            if not self._changed.wait_for(
                lambda: self._given >= step or (self.phase is _Phase.ENDED and self._running is None), timeout_s
            ):
                what = (
                    "the server has not told its hooks of it"
                    if self._running is None
                    else f"a server step hook still runs, for step {self._running}"
                )
                raise StepTimeoutError(
                    f"step {step} is committed, but after {timeout_s:g} s {what}; "
                    "ProxyOptions(retry_timeout_s=...) sets how long step() waits"
                )
            if self._given < step and self._failure is not None:
                raise self._kind_locked()(
                    f"server step hooks are not told of steps any more: {self._failure}. Remove them, or register one "
                    "anew"
                ) from self._failure

    def rewind(self, step: int) -> None:
        """The job was set back to `step`, as the optimizer has heard: goes on from there, on a new stream."""
        with self._changed:
            if self._has_followed:
                self._has_followed = False
                return
            self._rewind_locked(step)

    def _rewind_locked(self, step: int) -> None:
        self._given = min(self._given, step)
        self._is_outdated = True
        self._changed.notify_all()
        # What waits for it opens another one, behind the last step that was given.
        self.stream.cancel()

    def end(self, failure: Exception | None) -> None:
        """Nothing more is delivered. The first reason holds."""
        with self._changed:
            if self.phase is not _Phase.ENDED:
                self.phase = _Phase.ENDED
                self._failure = failure
            self._changed.notify_all()

    # --- for the thread

    def begun(self, step: int) -> bool:
        """The server has taken the call, with the job at `step`. Returns whether the job was set back to that."""
        with self._changed:
            if self.phase is _Phase.OPENING:
                self.phase = _Phase.OPEN
                self._changed.notify_all()
            if step >= self._given:
                return False
            _log.warning("the job was set back from step %d to step %d: hooks go on from there", self._given, step)
            self._has_followed = True
            self._rewind_locked(step)
            return True

    def resume(self, cause: ConnectionLostError) -> int:
        """Goes on behind the last step that was given, on a new stream, where the last one broke.

        Returns:
            The job's step when the server took the call.

        Raises:
            ConnectionLostError: no server has answered in time, or delivery was ended.
            OptimdError: the server does not take the call; with what it said.
        """
        deadline = time.monotonic() + self._retry_timeout_s
        while time.monotonic() < deadline:
            with self._changed:
                if self._changed.wait_for(lambda: self.phase is _Phase.ENDED, _PAUSE_S):
                    break
                given, self._is_outdated = self._given, False
            try:
                stream = self._watch(given)
                step = stream.await_begin()
            except ServerUnavailableError:
                continue
            with self._changed:
                if self.phase is not _Phase.ENDED and not self._is_outdated:
                    self.stream = stream
                    return step
            stream.cancel()
        raise cause

    def take(self, step: int) -> bool:
        """Waits for the end of a step that writes parameters, which the server bounds.

        Returns:
            Whether hooks are to be called for `step`: False where delivery was ended, or the job set back meanwhile.
        """
        with self._changed:
            self._changed.wait_for(lambda: not self._held or self._is_outdated or self.phase is _Phase.ENDED)
            if self._is_outdated or self.phase is _Phase.ENDED:
                return False
            self._running = step
            return True

    def gave(self, step: int) -> None:
        """All hooks have been called for `step`."""
        with self._changed:
            self._running = None
            if not self._is_outdated:
                self._given = step
            self._changed.notify_all()

    def _kind_locked(self) -> type[OptimdError]:
        """What the failure is raised as: one of ours, whatever it was."""
        return type(self._failure) if isinstance(self._failure, OptimdError) else ProtocolError


def _deliver(delivery: _Delivery, optimizer: weakref.ref[OptimizerProxy], hooks: weakref.ref[ServerStepHooks]) -> None:
    """What the thread does."""
    failure: Exception | None = None
    try:
        try:
            step = delivery.stream.await_begin()
        except ConnectionLostError as error:
            # The line had broken, and nobody had noticed yet.
            step = delivery.resume(error.with_traceback(None))
        _begin(delivery, hooks, step)
        while True:
            try:
                receipt = delivery.stream.receive()
            except ConnectionLostError as error:
                # Without its traceback, as below.
                _begin(delivery, hooks, delivery.resume(error.with_traceback(None)))
                continue
            if delivery.take(receipt.step):
                try:
                    _call(optimizer, hooks, receipt)
                finally:
                    delivery.gave(receipt.step)
            elif delivery.phase is _Phase.ENDED:
                break
    except Exception as error:  # noqa: BLE001  # whatever it is, who waits for this thread hears of it
        # Without its traceback, which would lead from the failure to the delivery and back.
        failure = error.with_traceback(None)
        failure.__context__ = None
    delivery.end(failure)


def _begin(delivery: _Delivery, hooks: weakref.ref[ServerStepHooks], step: int) -> None:
    """The server tells of steps, with the job at `step`."""
    its_hooks = hooks()
    if delivery.begun(step) and its_hooks is not None:
        its_hooks.begin_again(step)


def _call(optimizer: weakref.ref[OptimizerProxy], hooks: weakref.ref[ServerStepHooks], receipt: StepReceipt) -> None:
    # A function of its own: strong references end with it, before the thread waits for the next step.
    alive, its_hooks = optimizer(), hooks()
    if alive is not None and its_hooks is not None:
        its_hooks.call(alive, receipt)
