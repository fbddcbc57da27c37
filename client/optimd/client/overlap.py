"""Sending gradients while backward still computes others."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.hooks import RemovableHandle

from optimd.client.aheadpush import AheadPush
from optimd.client.changes import content_of, is_same
from optimd.client.exceptions import ConfigurationError
from optimd.client.parameters import is_held
from optimd.client.session import Session
from optimd.wire.layout import Bucket

_SECOND = (
    "a second backward has added to gradients that have left for the server (ProxyOptions(overlap=True)). Run every "
    "backward but the last one before step() under `with optimizer.no_sync():`, and call optimizer.zero_grad() where "
    "no step() is to follow. Where one backward comes to a parameter twice, as reentrant checkpointing of modules that "
    "share it does, use torch.utils.checkpoint(..., use_reentrant=False)"
)

_CHANGED = (
    "gradients were changed after backward, when they had left for the server already (ProxyOptions(overlap=True)); "
    "nothing was applied. To clip, use ProxyOptions(max_grad_norm=...), which has the server do it; instead of a "
    'GradScaler, autocast to torch.bfloat16, or use ProxyOptions(nonfinite="skip"). zero_grad() discards what has '
    "left; for other changes, leave overlap out"
)

SCALED = (
    "a GradScaler knows whether gradients are infinite when all of them are computed, and with "
    "ProxyOptions(overlap=True) they leave for the server before that; nothing was applied. Autocast to "
    "torch.bfloat16, which needs no scaler, or have the server skip infinite gradients: "
    'ProxyOptions(nonfinite="skip")'
)


class _Left:
    """A gradient that has left, as it was then. Does not keep it."""

    def __init__(self, grad: torch.Tensor) -> None:
        self._memory = StorageWeakRef(grad.untyped_storage())  # type: ignore[no-untyped-call]  # torch's
        self._pointer = grad.data_ptr()
        self._version = grad._version  # noqa: SLF001  # torch has no other name for it
        self._content = content_of(grad.detach())

    def is_changed(self, grad: torch.Tensor) -> bool:
        """Whether `grad` has other elements now, or is another."""
        # Writes through `.data` move no version: `p.grad.data.clamp_()` is an old way to clip.
        return self.writes_to(grad) != 0 or not is_same(content_of(grad.detach()), self._content)

    def writes_to(self, grad: torch.Tensor) -> int:
        """How often it has been written to since, if `grad` is it; -1 where that is another."""
        if self._memory.expired() or grad.data_ptr() != self._pointer:  # type: ignore[no-untyped-call]  # torch's
            return -1
        return int(grad._version) - self._version  # noqa: SLF001


class Overlap:
    """Has the gradients of parameters leave for the server from hooks, bucket by bucket, as backward comes to them.

    A bucket leaves when all of its parameters that require a gradient have theirs; what has not left by `step()` leaves
    then. Nothing is applied before that. Hooks do not wait for the line, and keep nothing alive.

    Thread-safe: autograd calls hooks in threads of its own.

    Args:
        session: The job. What it sends else ends what is being sent ahead, which then is pushed whole in the step.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self._lock = threading.Lock()
        # All below: guarded by self._lock.
        self._hooks: dict[int, tuple[weakref.ref[torch.Tensor], RemovableHandle]] = {}
        self._let_go = weakref.finalize(self, _remove, self._hooks)
        self._tensors: list[weakref.ref[torch.Tensor]] = []
        self._index: dict[int, int] = {}
        self._pauses = 0
        self._push: AheadPush | None = None
        # Gradients that have left from their hooks, by index of parameter.
        self._left: dict[int, _Left] = {}
        # Those that were there already when the others of their bucket left: of parameters that were not waited for.
        self._carried: dict[int, _Left] = {}
        # Of those that have left on a GPU: when they are computed.
        self._computed: dict[int, torch.cuda.Event] = {}
        # Of the push that is open: buckets that have left, with which of their slices, and how many parameters the
        # others wait for.
        self._sent: dict[int, list[bool]] = {}
        self._waiting: dict[int, int] = {}
        self._waited: set[int] = set()
        self._buckets_of: dict[int, list[Bucket]] = {}

    def watch(self, tensors: Sequence[torch.Tensor]) -> None:
        """Looks after these parameters from now on, in order of their indices, and no others. Not during backward."""
        with self._lock:
            self._index = {id(tensor): index for index, tensor in enumerate(tensors)}
            self._tensors = [weakref.ref(tensor) for tensor in tensors]
            for key in self._hooks.keys() - self._index.keys():
                self._hooks.pop(key)[1].remove()
            here = weakref.ref(self)

            def hook(tensor: torch.Tensor) -> None:
                overlap = here()
                if overlap is not None:
                    overlap._has_gradient(tensor)  # noqa: SLF001  # its own

            for tensor in tensors:
                known = self._hooks.get(id(tensor))
                # Another tensor may have come to lie where one was.
                is_hooked = known is not None and known[0]() is tensor
                if not is_hooked and tensor.requires_grad and is_held(tensor):
                    handle = tensor.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]  # torch's
                    self._hooks[id(tensor)] = weakref.ref(tensor), handle

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Gradients stay here meanwhile, and are added up."""
        with self._lock:
            self._pauses += 1
        try:
            yield
        finally:
            with self._lock:
                self._pauses -= 1

    def discard(self) -> None:
        """What has left is not to be stepped with. Does not wait for the server."""
        with self._lock:
            self._discard_locked()

    def close(self) -> None:
        """Lets go of the parameters."""
        with self._lock:
            self._discard_locked()
            self._let_go()

    def complete(self, tensors: Sequence[torch.Tensor], grads: Sequence[torch.Tensor | None]) -> AheadPush | None:
        """Sends what has not left yet: all of the next push's gradients are under way then.

        Args:
            tensors: The parameters as they are now, in order.
            grads: As in `Push`.

        Returns:
            What they are sent with; None where they have to be pushed in the step, all of them.

        Raises:
            ConfigurationError: gradients that have left were changed.
        """
        with self._lock:
            push, is_cleared = self._push, False
            if [id(tensor()) for tensor in self._tensors] != [id(tensor) for tensor in tensors]:
                # Somebody has edited param_groups: what has left goes by other indices.
                self._discard_locked()
                return None
            for index, left in self._left.items():
                grad = grads[index] if index < len(grads) else None
                is_cleared = is_cleared or grad is None
                if grad is not None and left.is_changed(grad):
                    raise ConfigurationError(_CHANGED)
            layout = self._session.layout
            now = {
                bucket.bucket_id: [grads[piece.parameter] is not None for piece in bucket.slices]
                for bucket in layout.buckets
            }
            is_other = is_cleared or any(now[bucket_id] != there for bucket_id, there in self._sent.items())
            is_other = is_other or any(
                (grad := grads[index]) is None or left.is_changed(grad) for index, left in self._carried.items()
            )
            if push is None or is_other or not push.is_open:
                self._discard_locked()
                return None
            for bucket in layout.buckets:
                if bucket.bucket_id not in self._sent and any(now[bucket.bucket_id]):
                    indices = {piece.parameter for piece in bucket.slices}
                    found = {index: grad for index in indices if (grad := grads[index]) is not None}
                    push.put(bucket, now[bucket.bucket_id], found)
            push.complete()
            self._forget_locked()
            return push

    # --- in hooks

    def _has_gradient(self, tensor: torch.Tensor) -> None:
        if not self._session.is_own:
            # A child of the process whose line this is: it has none.
            return
        with self._lock:
            index, grad = self._index.get(id(tensor)), tensor.grad
            if index is None or grad is None:
                return
            left = self._left.get(index)
            if left is not None:
                if left.writes_to(grad) == 1:
                    raise RuntimeError(_SECOND)
                # Those that had left were taken away, by other means than zero_grad().
                self._discard_locked()
            if self._pauses:
                return
            if self._push is None:
                self._begin_locked()
            if self._push is None:
                return
            try:
                self._leaves_locked(self._push, index, tensor, grad)
            except BaseException:
                # What has left may not be what is noted down of it.
                self._push.abandon()
                raise

    def _leaves_locked(self, push: AheadPush, index: int, tensor: torch.Tensor, grad: torch.Tensor) -> None:
        """A gradient is computed: it leaves with the last of its bucket."""
        buckets = self._buckets_of.get(index, ())
        has_left = any(bucket.bucket_id in self._sent for bucket in buckets)
        if not push.is_open or has_left or not self._fits(index, tensor, grad):
            push.abandon()
        if grad.layout is torch.strided and grad._base is None:  # noqa: SLF001  # torch has no other name for it
            self._left[index] = _Left(grad)
        else:
            # Views of one buffer count each other's writes: nothing could be said of any.
            push.abandon()
        if grad.is_cuda:
            # In the stream that computes it, which need not be that of the last one of its bucket.
            self._computed[index] = torch.cuda.current_stream(grad.device).record_event()
        for bucket in buckets if index in self._waited else ():
            self._waiting[bucket.bucket_id] -= 1
            if not self._waiting[bucket.bucket_id]:
                self._send_locked(push, bucket)

    def _begin_locked(self) -> None:
        layout = self._session.layout
        if len(layout.parameters) != len(self._tensors):
            # The job does not know of all of them yet.
            return
        self._push = self._session.begin_ahead()
        if self._push is None:
            return
        self._buckets_of.clear()
        self._waiting.clear()
        self._waited = {
            index for index, tensor in enumerate(self._tensors) if (each := tensor()) is not None and each.requires_grad
        }
        for bucket in layout.buckets:
            indices = {piece.parameter for piece in bucket.slices}
            self._waiting[bucket.bucket_id] = len(indices & self._waited)
            for index in indices:
                self._buckets_of.setdefault(index, []).append(bucket)

    def _fits(self, index: int, tensor: torch.Tensor, grad: torch.Tensor) -> bool:
        """Whether the job knows a parameter as it is, and its gradient is one to send: else `step()` sees to it."""
        parameter = self._session.layout.parameters[index]
        forms = {(each.dtype, tuple(each.shape)) for each in (tensor, grad)}
        return forms == {(parameter.dtype, parameter.shape)} and grad.layout is torch.strided

    def _send_locked(self, push: AheadPush, bucket: Bucket) -> None:
        grads = {}
        for index in {piece.parameter for piece in bucket.slices}:
            tensor = self._tensors[index]()
            if tensor is not None and is_held(tensor) and tensor.grad is not None:
                grads[index] = tensor.grad
                if index not in self._left:
                    if tensor.grad.layout is not torch.strided:
                        push.abandon()
                        return
                    self._carried[index] = _Left(tensor.grad)
        present = [piece.parameter in grads for piece in bucket.slices]
        if push.is_open:
            push.put(bucket, present, grads, [event for index in grads if (event := self._computed.get(index))])
        self._sent[bucket.bucket_id] = present

    def _discard_locked(self) -> None:
        if self._push is not None:
            self._push.abandon()
        self._forget_locked()

    def _forget_locked(self) -> None:
        self._push = None
        self._left.clear()
        self._carried.clear()
        self._computed.clear()
        self._sent.clear()


def _remove(hooks: dict[int, tuple[weakref.ref[torch.Tensor], RemovableHandle]]) -> None:
    while hooks:
        hooks.popitem()[1][1].remove()
