"""The aggregation policies that a job can have."""

from __future__ import annotations

from optimd.server.aggregation import SyncAggregator
from optimd.server.settings import JobSettings
from optimd.server.staleness import AsyncAggregator

Aggregator = SyncAggregator | AsyncAggregator
"""What decides what becomes of pushes. Both have the same methods, which mean the same."""


def aggregator_for(settings: JobSettings) -> Aggregator:
    """What decides in a job of these settings."""
    streaming = settings.apply == "streaming"
    if settings.is_async:
        return AsyncAggregator(max_staleness=settings.max_staleness, streaming=streaming, timeout_s=settings.timeout_s)
    return SyncAggregator(
        world_size=settings.world_size,
        streaming=streaming,
        backup_workers=settings.backup_workers,
        separate=settings.holds_apart,
        on_loss=settings.on_loss,
        timeout_s=settings.timeout_s,
    )
