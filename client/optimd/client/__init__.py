"""The worker's side: drop-in `Adam` and `AdamW` whose state and update live on a server."""

from optimd.client.adam import Adam, AdamW
from optimd.client.exceptions import (
    ConfigurationError,
    ConnectionLostError,
    EmbeddedServerError,
    ForkedProcessError,
    InternalServerError,
    JobDeletedError,
    JobExistsError,
    JobMismatchError,
    LimitExceededError,
    LoadNeedsForceError,
    OptimdError,
    OptimizerClosedError,
    ProtocolError,
    ServerUnavailableError,
    StepTimeoutError,
    UnknownJobError,
    UnsupportedError,
    UpdateRefusedError,
    WorkerInUseError,
)
from optimd.client.options import ProxyOptions, Sync
from optimd.client.proxy import OptimizerProxy
from optimd.client.receipts import StepReceipt

__all__ = [
    "Adam",
    "AdamW",
    "ConfigurationError",
    "ConnectionLostError",
    "EmbeddedServerError",
    "ForkedProcessError",
    "InternalServerError",
    "JobDeletedError",
    "JobExistsError",
    "JobMismatchError",
    "LimitExceededError",
    "LoadNeedsForceError",
    "OptimdError",
    "OptimizerClosedError",
    "OptimizerProxy",
    "ProtocolError",
    "ProxyOptions",
    "ServerUnavailableError",
    "StepReceipt",
    "StepTimeoutError",
    "Sync",
    "UnknownJobError",
    "UnsupportedError",
    "UpdateRefusedError",
    "WorkerInUseError",
]
