"""Tells jobs of the time: leases end, waits have been too long, snapshots are due."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Final

from optimd.server import logcontext
from optimd.server.job import Job
from optimd.server.registry import JobRegistry

_log = logging.getLogger(__name__)

_END_S: Final = 5.0


class TimeKeeper:
    """A thread that looks at all jobs every now and then.

    It never waits for a job: one for which something is due is seen to in a thread of its own, since it may be in the
    middle of a large step, or have to wait for a reader.

    Args:
        registry: The jobs.
        period_s: How often it looks, in seconds.
    """

    def __init__(self, registry: JobRegistry, *, period_s: float) -> None:
        self._registry = registry
        self._period_s = period_s
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="optimd-timekeeper", daemon=True)
        self._lock = threading.Lock()
        self._busy: set[tuple[Job | None, str]] = set()  # guarded by self._lock
        self._flushed_s = 0.0

    def start(self) -> None:
        """Begins to look."""
        self._thread.start()

    def stop(self) -> None:
        """Looks no more. Waits for the thread."""
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join(_END_S)

    def _keep(self) -> None:
        while not self._stopped.wait(self._period_s):
            try:
                self._look()
            except Exception:  # noqa: BLE001  # whatever it was, time goes on
                _log.exception("the jobs could not be told of time")

    def _look(self) -> None:
        now = time.monotonic()
        for job in self._registry.due(now):
            self._start((job, "leases"), partial(self._registry.tick, job, now))
        storage = self._registry.storage
        if storage is None:
            return
        for job in self._registry.all():
            if storage.is_due(job, now):
                self._start((job, "snapshot"), partial(storage.tick, job))
        if storage.flush_interval_s is not None and now >= self._flushed_s + storage.flush_interval_s:
            self._flushed_s = now
            self._start((None, "journals"), storage.flush)

    def _start(self, what: tuple[Job | None, str], work: Callable[[], object]) -> None:
        with self._lock:
            if what in self._busy:
                return
            self._busy.add(what)
        threading.Thread(target=self._do, args=(what, work), name="optimd-tick", daemon=True).start()

    def _do(self, what: tuple[Job | None, str], work: Callable[[], object]) -> None:
        job = what[0]
        try:
            with logcontext.about(job=job.name, step=lambda: job.step) if job is not None else nullcontext():
                work()
        except Exception:  # noqa: BLE001  # the others go on, and so does the time
            _log.exception(
                "job %s: its %s could not be looked at", job.name if job is not None else "of any name", what[1]
            )
        finally:
            with self._lock:
                self._busy.discard(what)
