"""The full names of the calls whose messages carry payloads and so bypass the generated (de)serialisers; headers."""

from __future__ import annotations

from typing import Final

from optimd.v1 import optimizer_service_pb2

SERVICE: Final = optimizer_service_pb2.DESCRIPTOR.services_by_name["OptimizerService"].full_name
TRAIN: Final = f"/{SERVICE}/Train"
READ_STATE: Final = f"/{SERVICE}/ReadState"

WATCHING_HEADER: Final = "optimd-watching"
"""The initial metadata key that a `WatchSteps` call begins with: the job's step when it did. A call that fails at once
may have a header too, but not with this."""
