"""What can go wrong for a worker.

OptimdError
├── ConfigurationError        (ValueError)       the settings contradict each other or the environment
├── ServerUnavailableError    (ConnectionError)  no server answers at the address
│   ├── EmbeddedServerError                      the server of this process did not start
│   ├── CertificateError                         one side does not accept the other's certificate
│   └── ConnectionLostError                      the line broke while a job was open
├── AuthenticationError       (PermissionError)  the server asks for a token, or does not know the one it got
├── AuthorizationError        (PermissionError)  the token is not good for the job, or not for admin calls
├── JobMismatchError          (ValueError)       parameters, groups, settings or loads are not the job's
├── JobExistsError                               on_existing="fail", and the job exists
├── JobDeletedError                              the job was deleted under the worker
├── JobRewoundError           (RuntimeError)     the server has come back with less than it had acknowledged
├── UnknownJobError           (LookupError)      no job of that name
├── WorkerInUseError                             a live worker has that worker_id or rank
├── EvictedError              (RuntimeError)     an operator has taken this worker out of the job
├── SupersededError           (RuntimeError)     another process has taken this one's worker_id
├── LimitExceededError                           a limit of the server
├── StepTimeoutError          (TimeoutError)     other workers did not come in time
├── LoadNeedsForceError                          load_state_dict over other workers' progress
├── UpdateRefusedError        (RuntimeError)     torch refused the update on the server
├── NonFiniteGradientError    (ArithmeticError)  nonfinite="error", and a gradient was not finite
├── AccumulationLostError                        the server does not hold what accumulate() gave it
├── NotDurableError                              the server keeps nothing on disk, and was asked to
├── UnsupportedError                             the server does not do what was asked for
├── ProtocolError                                the two sides do not understand each other
├── InternalServerError                          a defect of the server; has an incident id
├── OptimizerClosedError      (RuntimeError)     used after close()
└── ForkedProcessError        (RuntimeError)     used in a child of the process that opened it
"""

from __future__ import annotations


class OptimdError(Exception):
    """The root of all errors that optimd raises in a worker, but for torch's own."""


class ConfigurationError(OptimdError, ValueError):
    """The settings contradict each other or the environment."""


class ServerUnavailableError(OptimdError, ConnectionError):
    """No server answers at the address."""


class EmbeddedServerError(ServerUnavailableError):
    """The server of this process did not start."""


class CertificateError(ServerUnavailableError):
    """One side speaks TLS and the other does not, or one does not accept the other's certificate."""


class AuthenticationError(OptimdError, PermissionError):
    """The server asks for a token and was given none, or one that it does not know."""


class AuthorizationError(OptimdError, PermissionError):
    """The token is not good for the job, or not for admin calls."""


class ConnectionLostError(ServerUnavailableError):
    """The line to the server broke while a job was open, or an interrupted step left it unusable."""


class JobMismatchError(OptimdError, ValueError):
    """The worker's parameters, groups, settings or loads are not the job's."""


class JobExistsError(OptimdError):
    """The job exists, and the worker asked for a new one."""


class JobDeletedError(OptimdError):
    """The job was deleted while the worker was in it."""


class JobRewoundError(OptimdError, RuntimeError):
    """The job stands at an earlier point than this worker was acknowledged at.

    Its server was started again from what it had on disk, and that was less. With `ProxyOptions(on_rewind="follow")`
    the worker takes the job as it is.
    """


class UnknownJobError(OptimdError, LookupError):
    """The server has no job of that name."""


class WorkerInUseError(OptimdError):
    """A live worker of the job has that worker_id or that rank."""


class EvictedError(OptimdError, RuntimeError):
    """An operator has taken this worker out of the job. Another process can take its place."""


class SupersededError(OptimdError, RuntimeError):
    """Another process has taken this worker's worker_id: its successor, after a restart. This one cannot come back."""


class LimitExceededError(OptimdError):
    """One of the server's limits is reached. The message names its flag."""


class StepTimeoutError(OptimdError, TimeoutError):
    """Other workers did not join or contribute in time, or a server step hook did not end. The message says which."""


class LoadNeedsForceError(OptimdError):
    """`load_state_dict` would replace the state of a job with steps and other workers."""


class UpdateRefusedError(OptimdError, RuntimeError):
    """torch refused the update with the param_groups as they are."""


class NonFiniteGradientError(OptimdError, ArithmeticError):
    """A gradient of the step has an infinite element or a NaN, and `ProxyOptions(nonfinite="error")` refuses that."""


class AccumulationLostError(OptimdError):
    """The server does not hold the gradients that `accumulate()` gave it: they have to be computed again."""


class NotDurableError(OptimdError):
    """The server keeps nothing on disk, and was asked for a snapshot."""


class UnsupportedError(OptimdError):
    """The server does not do what was asked for."""


class ProtocolError(OptimdError):
    """The two sides do not understand each other: their versions differ, or one of them has a defect."""


class InternalServerError(OptimdError):
    """A defect of the server. Its log has a traceback under the incident id in the message."""


class OptimizerClosedError(OptimdError, RuntimeError):
    """The optimizer was used after `close()`."""


class ForkedProcessError(OptimdError, RuntimeError):
    """The optimizer was used in a child of the process that opened it."""
