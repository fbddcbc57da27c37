"""The worker's side: drop-in `Adam` and `AdamW` whose state and update live on a server."""

import os

# gRPC's core writes a line to stderr at every fork, of a DataLoader's workers say, in a process that has a channel. It
# reads this when it is first imported; who wants to see more has set it.
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")

from optimd.client.adam import Adam, AdamW
from optimd.client.exceptions import (
    AccumulationLostError,
    AuthenticationError,
    AuthorizationError,
    CertificateError,
    ConfigurationError,
    ConnectionLostError,
    EmbeddedServerError,
    EvictedError,
    ForkedProcessError,
    InternalServerError,
    JobDeletedError,
    JobExistsError,
    JobMismatchError,
    JobRewoundError,
    LimitExceededError,
    LoadNeedsForceError,
    NonFiniteGradientError,
    NotDurableError,
    OptimdError,
    OptimizerClosedError,
    ProtocolError,
    ServerUnavailableError,
    StepTimeoutError,
    SupersededError,
    UnknownJobError,
    UnsupportedError,
    UpdateRefusedError,
    WorkerInUseError,
)
from optimd.client.options import Async, ProxyOptions, Sync, Tls, WireDtypes
from optimd.client.proxy import OptimizerProxy
from optimd.client.receipts import StepReceipt

__all__ = [
    "AccumulationLostError",
    "Adam",
    "AdamW",
    "Async",
    "AuthenticationError",
    "AuthorizationError",
    "CertificateError",
    "ConfigurationError",
    "ConnectionLostError",
    "EmbeddedServerError",
    "EvictedError",
    "ForkedProcessError",
    "InternalServerError",
    "JobDeletedError",
    "JobExistsError",
    "JobMismatchError",
    "JobRewoundError",
    "LimitExceededError",
    "LoadNeedsForceError",
    "NonFiniteGradientError",
    "NotDurableError",
    "OptimdError",
    "OptimizerClosedError",
    "OptimizerProxy",
    "ProtocolError",
    "ProxyOptions",
    "ServerUnavailableError",
    "StepReceipt",
    "StepTimeoutError",
    "SupersededError",
    "Sync",
    "Tls",
    "UnknownJobError",
    "UnsupportedError",
    "UpdateRefusedError",
    "WireDtypes",
    "WorkerInUseError",
]
