"""What the rooms of a job share."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

from optimd.server.buffers import JobBuffers
from optimd.server.company import Company
from optimd.server.content import JobContent
from optimd.server.journal import JobJournal
from optimd.server.measures import JobMeasures
from optimd.server.policies import Aggregator
from optimd.server.readers import Readers
from optimd.server.settings import JobSettings
from optimd.server.watching import StepHistory


@dataclass(frozen=True, slots=True, kw_only=True)
class JobParts:
    """The parts of one job. All but name, settings, history and condition are guarded by the condition's lock."""

    name: str
    settings: JobSettings
    changed: threading.Condition
    """The job's lock, notified of all that a worker may wait for."""
    content: JobContent
    """What it optimizes."""
    aggregator: Aggregator
    """Decides what becomes of pushes."""
    company: Company
    """Who is in it."""
    readers: Readers
    """Who reads it."""
    buffers: JobBuffers
    """What it keeps besides."""
    history: StepHistory
    """Where committed steps go."""
    measures: JobMeasures
    """What is counted of it."""
    journal: JobJournal
    """Where what it does is written down first."""
    check_room: Callable[[int, str], None]
    """Checks, with the lock held, that the job may take so many more bytes, of what a message calls so."""
