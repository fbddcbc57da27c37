"""How an optimizer is connected: what torch's constructors have no argument for."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any, Literal

import torch

from optimd.client.exceptions import ConfigurationError
from optimd.wire.dtypes import encode_dtype
from optimd.wire.encodings import NARROW_DTYPES
from optimd.wire.limits import MAX_BUCKET_BYTES, MIN_BUCKET_BYTES


@dataclass(frozen=True, slots=True, kw_only=True)
class Sync:
    """Synchronous training: a step is one contribution of every live worker.

    A worker that joins later does so between two steps. One that dies is not waited for once its lease has ended (the
    server's `--lease-s`); one that leaves, at once. Gradients that come too late, or of which only a part has come, are
    in no step. All workers of a job give the same.

    Raises:
        ConfigurationError: a number is out of range, a word unknown, or two settings contradict each other.
    """

    world_size: int | Literal["elastic"] | None = None
    """How many workers the first step waits for. None: `ProxyOptions.world_size`."""

    reduction: Literal["mean", "sum"] = "mean"
    """How the workers' gradients become one. They are added up in their own dtype, and a mean divides the sum: with
    float16, gradients near the end of its range overflow where dividing first would not."""

    backup_workers: int = 0
    """How many workers a step can do without: of `world_size` pushes it is made of the first `world_size -
    backup_workers` complete ones, and the slower ones are dropped (Chen et al., "Revisiting Distributed Synchronous
    SGD", 2016). Less than `world_size`, which must be a number. Takes memory for one gradient a worker."""

    deterministic: bool = False
    """Whether gradients are added up in order of rank rather than as they come, so that a run of the same workers
    repeats bit for bit. Takes memory for one gradient a worker."""

    on_loss: Literal["shrink", "wait"] = "shrink"
    """What becomes of the place of a worker that died, or whose script ended with an exception. Shrink: steps go on
    without it, and a mean divides by those that are left. Wait: steps wait until it is started again, under its
    `worker_id` or its rank. What had come of its push is kept, and what its successor pushes under the same sequence
    number completes it: a script that takes up its data at `opt.next_sequence`, and computes the same gradients again,
    comes to the same weights as if nothing had happened."""

    timeout_s: float = 300.0
    """How long complete pushes wait for a worker that is alive and does not push, in seconds. Then the step is made
    without it, and it is waited for again once it has pushed; with `on_loss="wait"`, `step()` raises
    `StepTimeoutError` in those that wait, and can be called again."""

    join_timeout_s: float = 300.0
    """How long a worker waits for the others to join before the first step, in seconds."""

    def __post_init__(self) -> None:
        if self.world_size is not None and self.world_size != "elastic" and self.world_size < 1:
            raise ConfigurationError(f"Sync(world_size={self.world_size}): at least 1 is needed")
        if self.reduction not in ("mean", "sum"):
            raise ConfigurationError(f'Sync(reduction={self.reduction!r}): "mean" or "sum" is needed')
        if self.on_loss not in ("shrink", "wait"):
            raise ConfigurationError(f'Sync(on_loss={self.on_loss!r}): "shrink" or "wait" is needed')
        if self.backup_workers < 0:
            raise ConfigurationError(f"Sync(backup_workers={self.backup_workers}): it must not be negative")
        _check_times("Sync", timeout_s=self.timeout_s, join_timeout_s=self.join_timeout_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Async:
    """Asynchronous training: each push is a step of its own, applied as it arrives, and nobody waits for anybody.

    With a bound it is stale synchronous parallel (Ho et al., "More Effective Distributed ML via a Stale Synchronous
    Parallel Parameter Server", 2013). All workers of a job give the same. A worker that joins later, or comes back,
    starts as one of the slowest.

    Raises:
        ConfigurationError: a number is out of range.
    """

    max_staleness: int | None = None
    """How many pushes a worker may be ahead of the slowest live one and still be given parameters: `step()` of one that
    is further ahead waits. 0: everybody makes the same number of steps. None: nobody waits."""

    timeout_s: float = 300.0
    """How long a worker waits for slower ones, in seconds. Then those are not waited for any more until they begin
    their next push."""

    join_timeout_s: float = 300.0
    """How long a worker waits for another one that is uploading parameters, in seconds."""

    def __post_init__(self) -> None:
        if self.max_staleness is not None and not 0 <= self.max_staleness < 2**32:
            raise ConfigurationError(f"Async(max_staleness={self.max_staleness}): 0 or more is needed, or None")
        _check_times("Async", timeout_s=self.timeout_s, join_timeout_s=self.join_timeout_s)


def _check_times(kind: str, **times: float) -> None:
    for name, seconds in times.items():
        if not 0 < seconds <= threading.TIMEOUT_MAX:
            raise ConfigurationError(f"{kind}({name}={seconds}): a positive number of seconds is needed")


@dataclass(frozen=True, slots=True, kw_only=True)
class WireDtypes:
    """What gradients and parameters are narrowed to on the wire, each way by itself: `ProxyOptions.wire_dtype`.

    Raises:
        ConfigurationError: one is not torch.bfloat16, torch.float16 or None.
    """

    gradients: torch.dtype | None = None
    """On the way to the server. None: their own dtypes."""

    parameters: torch.dtype | None = None
    """On the way back, in the course of steps. None: their own dtypes."""

    def __post_init__(self) -> None:
        _check_narrow(f"WireDtypes(gradients={self.gradients!r})", self.gradients)
        _check_narrow(f"WireDtypes(parameters={self.parameters!r})", self.parameters)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tls:
    """How TLS is spoken with a server: paths of PEM files, which are read when a line is opened.

    Raises:
        ConfigurationError: a certificate comes without its key, or a key without its certificate.
    """

    ca: str | None = None
    """The authorities that may vouch for the server. None: those that gRPC brings."""

    cert: str | None = None
    """The worker's certificate and those that lead to its authority, where the server asks for one."""

    key: str | None = None
    """Its private key, not encrypted."""

    server_name: str | None = None
    """The name that the server's certificate has to be for. None: the host of its address."""

    def __post_init__(self) -> None:
        if (self.cert is None) != (self.key is None):
            raise ConfigurationError("Tls: cert and key go together; give both, or neither")


@dataclass(frozen=True, slots=True, kw_only=True)
class ProxyOptions:
    """How an optimizer is connected to its server and its job.

    Raises:
        ConfigurationError: a number is out of range or a word unknown.
    """

    aggregation: Sync | Async = Sync()
    """How the pushes of several workers become steps."""

    rank: int | None = None
    """This worker's rank, from 0. None: torchrun's `RANK`, else 0; where workers come and go as they like ("elastic",
    or asynchronous) and no torchrun has started them, the lowest that is free."""

    world_size: int | Literal["elastic"] | None = None
    """How many workers train, or "elastic": whoever is there, from the first on. None: torchrun's `WORLD_SIZE`, else 1.
    An asynchronous job waits for no number."""

    worker_id: str | None = None
    """This worker's name in the job, the same when it is restarted. None: host name and local rank (without
    torchrun's, rank); host name and process where the server chooses the rank."""

    on_existing: Literal["resume", "fail", "replace"] = "resume"
    """What to do where the job exists: go on from where it stands, raise `JobExistsError`, or start it anew if
    nobody is in it. A job that is just being formed by its workers is joined in every case."""

    apply: Literal["auto", "streaming", "atomic"] = "auto"
    """When the server applies a push: each bucket as it arrives, or all of them when every worker has pushed. Auto:
    streaming with one worker and in an asynchronous job, atomic with several. Streaming with several synchronous
    workers, one that is lost midway has its gradients in some buckets and not in others."""

    overlap: bool = False
    """Whether gradients leave for the server while backward still computes others, rather than in `step()`. Nothing is
    applied before `step()`, and parameters change only in it. A bucket leaves when all of its parameters have their
    gradients; the last parameters come first. Run every backward but the last one before `step()` under
    `Adam.no_sync()`; a second one outside of it raises. Gradients must not be changed between backward and `step()`:
    clip with `max_grad_norm`, and instead of a `GradScaler` autocast to bfloat16, or use `nonfinite`. A change is
    refused, but for one through `.data` of some elements of a large gradient, which a sample may miss. The server takes
    as much memory as the gradients for each worker that does so; where it has none left they travel in `step()`. Each
    worker's own choice."""

    transport: Literal["auto", "grpc", "shm"] = "auto"
    """How gradients and parameters travel in a step: in shared memory, which needs a server on the same host that runs
    as the same user, or in gRPC's messages. Auto: the first where it is to be had. Shm: an error where it is not."""

    master_dtype: torch.dtype | None = None
    """A real floating-point dtype, such as torch.float32, in which the server keeps values and state of the parameters
    that are of a narrower one; parameters as wide or wider and complex ones are left as they are. Gradients are added
    up in it, `state_dict` has it, and the worker's parameters are the master weights rounded. None: the parameters' own
    dtypes. All workers of a job give the same. The master weights themselves are in no `state_dict`: a job that is
    created anew starts from the rounded ones."""

    wire_dtype: torch.dtype | WireDtypes | None = None
    """What the elements of wider real floating-point parameters are rounded to where they travel in a step, gradients
    on the way to the server (`accumulate()` too) and parameters on the way back: torch.bfloat16 or torch.float16. The
    server widens gradients before anything is done with them and keeps values and state as wide as ever; parameters
    and gradients in this process keep their dtype. What opening a job, `pull_parameters()`, `state_dict()` and written
    values carry is not rounded. Bfloat16 has float32's range, and three significant digits. Float16 has four, and makes
    what lies beyond 65504 infinite and what is tiny zero: scale the loss with a `GradScaler`, or have `nonfinite` see
    to it. `WireDtypes` sets the two ways apart. Each worker's own choice: workers of one job may differ. None: nothing
    is rounded."""

    max_grad_norm: float | None = None
    """What the server scales a step's gradient down to where its norm, over all parameters, is larger, as
    `torch.nn.utils.clip_grad_norm_` does; positive. The gradient is the one that the step is made with: reduced over
    the workers, in the dtype that the server keeps. `StepReceipt.grad_norm` has the norm. Applies steps atomically.
    None: no clipping. All workers of a job give the same."""

    nonfinite: Literal["allow", "skip", "error"] = "allow"
    """What becomes of a step whose gradient, reduced over the workers and not yet clipped, has an infinite element or a
    NaN. Allow: it is applied, as in torch. Skip: nothing is changed, the job's step does not advance, and the receipts
    say "skipped_nonfinite". Error: nothing is changed, and `step()` raises `NonFiniteGradientError` in every worker; it
    can be called again. The last two apply steps atomically. All workers of a job give the same."""

    bucket_bytes: int | None = None
    """The largest payload of a message, in bytes, from 1 KiB to 3 MiB. None: the server's choice: 2 MiB, and 3 MiB
    where the worker that creates the job shares memory with it or narrows both ways."""

    retry_timeout_s: float = 60.0
    """How long to try to reach the server, in seconds: when the job is opened, and again when the line breaks. A server
    that is started again has to have its jobs back from disk in that time."""

    on_rewind: Literal["error", "follow"] = "error"
    """What to do where the job stands at an earlier point than this worker was told: its server was started again from
    what it had on disk, and that was less. Error: raise `JobRewoundError`, from the call that meets it and from every
    later one. Follow: take the job as it is, with a warning. Then the job's parameters, `job_step` and `next_sequence`
    hold; what was written, changed or accumulated since is gone, and a `step()` in whose middle it happens drops its
    gradients (`StepReceipt.outcome` is "dropped_late"), as they are of parameters that are gone."""

    tls: Tls | None = None
    """How TLS is spoken. None: as `$OPTIMD_TLS_CA`, `$OPTIMD_CLIENT_CERT`, `$OPTIMD_CLIENT_KEY` and
    `$OPTIMD_TLS_SERVER_NAME` say; without any of them, plaintext. On a Unix socket there is none."""

    token: str | None = field(default=None, repr=False)
    """What the server is shown to be let in. None: what `token_file` has, else `$OPTIMD_TOKEN`.
    It is not pickled."""

    token_file: str | None = None
    """A file that has the token. It is read for every call, and may be replaced. None: `$OPTIMD_TOKEN_FILE`, where
    there is no `token` either."""

    insecure: bool = False
    """Whether a token may travel in the clear to other hosts, on a network that you trust. Also
    `$OPTIMD_INSECURE_TOKEN`."""

    def __post_init__(self) -> None:
        if self.tls is not None and not isinstance(self.tls, Tls):
            raise ConfigurationError(f"ProxyOptions(tls={self.tls!r}): a Tls(...) is needed, or None")
        if self.token is not None and self.token_file is not None:
            raise ConfigurationError("ProxyOptions: token and token_file are two ways to say the same; give one")
        if self.rank is not None and self.rank < 0:
            raise ConfigurationError(f"ProxyOptions(rank={self.rank}): ranks count from 0")
        if self.world_size is not None and self.world_size != "elastic" and self.world_size < 1:
            raise ConfigurationError(f"ProxyOptions(world_size={self.world_size}): at least 1 is needed")
        if self.on_existing not in ("resume", "fail", "replace"):
            raise ConfigurationError(
                f'ProxyOptions(on_existing={self.on_existing!r}): "resume", "fail" or "replace" is needed'
            )
        if self.apply not in ("auto", "streaming", "atomic"):
            raise ConfigurationError(f'ProxyOptions(apply={self.apply!r}): "auto", "streaming" or "atomic" is needed')
        if self.on_rewind not in ("error", "follow"):
            raise ConfigurationError(f'ProxyOptions(on_rewind={self.on_rewind!r}): "error" or "follow" is needed')
        if self.transport not in ("auto", "grpc", "shm"):
            raise ConfigurationError(f'ProxyOptions(transport={self.transport!r}): "auto", "grpc" or "shm" is needed')
        self._check_numerics()
        if self.bucket_bytes is not None and not MIN_BUCKET_BYTES <= self.bucket_bytes <= MAX_BUCKET_BYTES:
            raise ConfigurationError(
                f"ProxyOptions(bucket_bytes={self.bucket_bytes}): {MIN_BUCKET_BYTES} to {MAX_BUCKET_BYTES} is needed"
            )
        if not 0 < self.retry_timeout_s <= threading.TIMEOUT_MAX:
            raise ConfigurationError(
                f"ProxyOptions(retry_timeout_s={self.retry_timeout_s}): a positive number of seconds is needed"
            )

    def __reduce__(self) -> tuple[Any, ...]:
        # A file of an optimizer is no place for a secret: whoever loads it brings one of its own.
        named = {item.name: getattr(self, item.name) for item in fields(self) if item.name != "token"}
        return partial(ProxyOptions, **named), ()

    def __copy__(self) -> ProxyOptions:
        return self

    def __deepcopy__(self, _memo: dict[int, Any]) -> ProxyOptions:
        # Nothing of it changes; and within a process it keeps its token.
        return self

    def _check_numerics(self) -> None:
        if self.master_dtype is not None and not _can_be_master(self.master_dtype):
            raise ConfigurationError(
                f"ProxyOptions(master_dtype={self.master_dtype!r}): a real floating-point dtype that the wire carries "
                "is needed, such as torch.float32"
            )
        if not isinstance(self.wire_dtype, WireDtypes):
            _check_narrow(f"ProxyOptions(wire_dtype={self.wire_dtype!r})", self.wire_dtype)
        if self.max_grad_norm is not None and not self.max_grad_norm > 0:
            raise ConfigurationError(f"ProxyOptions(max_grad_norm={self.max_grad_norm}): a positive number is needed")
        if self.nonfinite not in ("allow", "skip", "error"):
            raise ConfigurationError(
                f'ProxyOptions(nonfinite={self.nonfinite!r}): "allow", "skip" or "error" is needed'
            )
        if self.apply == "streaming" and isinstance(self.aggregation, Sync):
            asked = "backup_workers" if self.aggregation.backup_workers else "on_loss"
            if self.aggregation.backup_workers or self.aggregation.on_loss == "wait":
                raise ConfigurationError(
                    f'ProxyOptions(apply="streaming"): {asked} of Sync needs steps of which nothing is applied before '
                    'all of it is there; leave apply at "auto", or choose "atomic"'
                )
        if self.apply == "streaming" and (self.max_grad_norm is not None or self.nonfinite != "allow"):
            raise ConfigurationError(
                'ProxyOptions(apply="streaming"): max_grad_norm and nonfinite look at a whole step before any of it is '
                'applied; leave apply at "auto", or choose "atomic"'
            )


def _check_narrow(what: str, dtype: object) -> None:
    if dtype is not None and dtype not in NARROW_DTYPES:
        raise ConfigurationError(f"{what}: one of {', '.join(map(str, NARROW_DTYPES))} is needed, or None")


def _can_be_master(dtype: object) -> bool:
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        return False
    try:
        encode_dtype(dtype)
    except ValueError:
        return False
    return True
