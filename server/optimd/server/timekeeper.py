"""Tells jobs of the time: leases end, and waits that have been too long."""

from __future__ import annotations

import logging
import threading
import time
from typing import Final

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
        self._busy: set[Job] = set()  # guarded by self._lock

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
        for job in self._registry.due(time.monotonic()):
            with self._lock:
                if job in self._busy:
                    continue
                self._busy.add(job)
            threading.Thread(target=self._tick, args=(job,), name="optimd-tick", daemon=True).start()

    def _tick(self, job: Job) -> None:
        try:
            self._registry.tick(job, time.monotonic())
        except Exception:  # noqa: BLE001  # the others go on, and so does the time
            _log.exception("job %s: its leases could not be looked at", job.name)
        finally:
            with self._lock:
                self._busy.discard(job)
