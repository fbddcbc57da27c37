"""What a fork does to a process that has a job open.

gRPC's threads do not survive a fork, its sockets do. A child must neither use the parent's streams nor shut them down
while it cleans up after itself. So in a child every connection is marked as foreign, and its gRPC objects are kept for
ever: what is never destroyed sends nothing on a socket that the parent still uses.
"""

from __future__ import annotations

import ctypes
import gc
import os
import weakref
from typing import Protocol


class ForkAware(Protocol):
    """Something that a child process must not touch."""

    def forked(self) -> object:
        """Called in the child. Returns what must never be destroyed there."""


_aware: weakref.WeakSet[ForkAware] = weakref.WeakSet()


def watch(thing: ForkAware) -> None:
    """Has `thing.forked()` called in every child that is forked while it lives."""
    _aware.add(thing)


def _after_in_child() -> None:
    things = list(_aware)
    if things:
        # Nor may the collector find, in what the parent had not collected yet, gRPC objects that were closed before.
        gc.freeze()
    for thing in things:
        # A reference that nobody gives back: a list would be emptied when the child's interpreter ends.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object((thing, thing.forked())))


os.register_at_fork(after_in_child=_after_in_child)
