"""The services: what comes from gRPC goes to a session, a job or the registry, and back."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version

import grpc
import torch

from optimd.server import logcontext, update
from optimd.server.callers import certificate_name, secret_of
from optimd.server.errors import InvalidFieldError, LimitExceededError, ShuttingDownError
from optimd.server.patience import Patience
from optimd.server.readers import ReadHold
from optimd.server.reading import read_state
from optimd.server.registry import JobRegistry
from optimd.server.session import TrainSession
from optimd.server.tokens import Caller, Gate
from optimd.server.watching import encode_step
from optimd.v1 import job_pb2, reading_pb2
from optimd.wire.codec import MalformedMessageError, decode
from optimd.wire.limits import MAX_BUCKET_BYTES, MAX_MESSAGE_BYTES
from optimd.wire.methods import SERVICE, WATCHING_HEADER
from optimd.wire.sharedmemory import NotSharedError, check_shared

_OPENING_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What the server takes."""

    max_workers: int
    max_job_workers: int
    max_jobs: int
    max_job_bytes: int
    shares_memory: bool = True


class OptimizerService:
    """`optimd.v1.OptimizerService`. Its calls whose messages carry payloads take and give bytes.

    It holds at most `3 * max_workers` threads for as long as a worker likes: of streams, reads and watchers. A snapshot
    counts as a read.

    Args:
        registry: The server's jobs.
        limits: What the server takes.
        gate: Who may call.
        patience: Ends calls that say nothing.
    """

    def __init__(self, registry: JobRegistry, limits: Limits, gate: Gate, patience: Patience) -> None:
        self._registry = registry
        self._limits = limits
        self._gate = gate
        self._patience = patience
        self._streams = threading.BoundedSemaphore(limits.max_workers)
        self._reads = threading.BoundedSemaphore(limits.max_workers)
        self._watchers = threading.BoundedSemaphore(limits.max_workers)
        self._draining = threading.Event()

    def drain(self) -> None:
        """Takes no new streams from now on."""
        self._draining.set()

    def handlers(self) -> grpc.GenericRpcHandler:
        """What to register with a `grpc.Server`."""
        return grpc.method_handlers_generic_handler(
            SERVICE,
            {
                "GetCapabilities": grpc.unary_unary_rpc_method_handler(
                    self.get_capabilities,
                    request_deserializer=reading_pb2.GetCapabilitiesRequest.FromString,
                    response_serializer=reading_pb2.GetCapabilitiesResponse.SerializeToString,
                ),
                "Heartbeat": grpc.unary_unary_rpc_method_handler(
                    self.heartbeat,
                    request_deserializer=reading_pb2.HeartbeatRequest.FromString,
                    response_serializer=reading_pb2.HeartbeatResponse.SerializeToString,
                ),
                "Train": grpc.stream_stream_rpc_method_handler(self.train),
                "ReadState": grpc.unary_stream_rpc_method_handler(self.read_state),
                "WatchSteps": grpc.unary_stream_rpc_method_handler(
                    self.watch_steps,
                    request_deserializer=reading_pb2.WatchStepsRequest.FromString,
                    response_serializer=reading_pb2.WatchStepsResponse.SerializeToString,
                ),
                "Snapshot": grpc.unary_unary_rpc_method_handler(
                    self.snapshot,
                    request_deserializer=reading_pb2.SnapshotRequest.FromString,
                    response_serializer=reading_pb2.SnapshotResponse.SerializeToString,
                ),
            },
        )

    def get_capabilities(
        self, request: reading_pb2.GetCapabilitiesRequest, context: grpc.ServicerContext
    ) -> reading_pb2.GetCapabilitiesResponse:
        """What the server is and how much it takes, and whether it is where a worker has shared memory.

        Raises:
            UnauthenticatedError: no token was brought, or one that is not known. So does every method below.
        """
        self._admit(context)
        reason = ""
        if request.HasField("shared_memory"):
            reason = self._not_shared_because(request.shared_memory)
        return reading_pb2.GetCapabilitiesResponse(
            server_version=version("optimd"),
            torch_version=torch.__version__,
            device=str(self._registry.device),
            max_message_bytes=MAX_MESSAGE_BYTES,
            max_bucket_bytes=MAX_BUCKET_BYTES,
            max_workers=self._limits.max_workers,
            max_jobs=self._limits.max_jobs,
            max_job_bytes=self._limits.max_job_bytes,
            rules=[update.RULE],
            shares_memory=request.HasField("shared_memory") and not reason,
            not_shared_because=reason,
        )

    def _admit(self, context: grpc.ServicerContext) -> Caller:
        """Who calls.

        Raises:
            UnauthenticatedError: nobody who may.
        """
        return self._gate.admit(secret_of(context))

    def _admit_to(self, job: str, context: grpc.ServicerContext) -> Caller:
        """Who calls, about a job.

        Raises:
            UnauthenticatedError: nobody who may.
            PermissionDeniedError: the token is not good for the job.
        """
        logcontext.bind(job=job)
        caller = self._admit(context)
        caller.check_job(job)
        return caller

    def _not_shared_because(self, offer: job_pb2.SharedMemory) -> str:
        """Why a worker's memory is not shared; empty where it is."""
        if not self._limits.shares_memory:
            return "the server is not to share memory (--no-shared-memory)"
        try:
            check_shared(offer.name, offer.token)
        except NotSharedError as error:
            return str(error)
        return ""

    def heartbeat(
        self, request: reading_pb2.HeartbeatRequest, context: grpc.ServicerContext
    ) -> reading_pb2.HeartbeatResponse:
        """A worker is alive. Waits for nothing.

        Raises:
            PermissionDeniedError: the token is not good for the job. So does every method below.
        """
        self._admit_to(request.job, context)
        in_job = self._registry.hear(request.job, request.worker_id, request.incarnation)
        return reading_pb2.HeartbeatResponse(in_job=in_job)

    def train(self, requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        """One worker's stream.

        Raises:
            LimitExceededError: there are too many.
            ShuttingDownError: the server is stopping.
            RequestError: what the session raises.
        """
        caller = self._admit(context)
        if self._draining.is_set():
            raise ShuttingDownError("the server is shutting down")
        if not self._streams.acquire(blocking=False):
            raise LimitExceededError(
                f"this server serves {self._limits.max_workers} workers at once and is full (--max-workers)"
            )
        session = TrainSession(
            self._registry,
            requests,
            is_active=context.is_active,
            cancel=context.cancel,
            shares_memory=self._limits.shares_memory,
            authorize=caller.check_job,
            proofs=_proofs(caller, context),
        )
        leave = self._gate.stay(caller, context.cancel)
        # A stream that says nothing would hold its place for ever.
        opened = self._patience.hold(_OPENING_TIMEOUT_S, context.cancel)

        def on_end() -> None:
            opened()
            leave()
            self._streams.release()
            session.end()

        if _at_the_end(context, on_end):
            yield from session.responses(on_opened=opened)

    def read_state(self, request: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
        """Values and state of a job.

        Raises:
            LimitExceededError: there are too many reads already.
            InvalidFieldError: the request is malformed.
            RequestError: what `JobRegistry.get` and `read_state` raise.
        """
        try:
            message, _ = decode(reading_pb2.ReadStateRequest, request)
        except MalformedMessageError as error:
            raise InvalidFieldError("ReadStateRequest", str(error)) from error
        caller = self._admit_to(message.job, context)
        if not self._reads.acquire(blocking=False):
            raise LimitExceededError(
                f"this server serves {self._limits.max_workers} reads at once and is busy (--max-workers)"
            )
        if _at_the_end(context, self._reads.release):
            _at_the_end(context, self._gate.stay(caller, context.cancel))
            job = self._registry.get(message.job)

            def on_hold(hold: ReadHold) -> None:
                _at_the_end(context, lambda: job.release(hold))

            yield from read_state(job, message, on_hold=on_hold)

    def watch_steps(
        self, request: reading_pb2.WatchStepsRequest, context: grpc.ServicerContext
    ) -> Iterator[reading_pb2.WatchStepsResponse]:
        """The steps of a job, as it commits them.

        Raises:
            LimitExceededError: there are too many watchers already, or this one has fallen behind.
            ShuttingDownError: the server is stopping.
            UnknownJobError: there is no job of that name.
            JobDeletedError: the job went away.
        """
        caller = self._admit_to(request.job, context)
        if self._draining.is_set():
            raise ShuttingDownError("the server is shutting down")
        if not self._watchers.acquire(blocking=False):
            raise LimitExceededError(
                f"this server serves {self._limits.max_workers} watchers at once and is busy (--max-workers)"
            )
        if _at_the_end(context, self._watchers.release):
            _at_the_end(context, self._gate.stay(caller, context.cancel))
            job = self._registry.get(request.job)
            watch = job.history.watch(request.after_step)
            _at_the_end(context, watch.end)
            context.send_initial_metadata(((WATCHING_HEADER, str(job.step)),))
            for step in watch:
                job.journal.await_durable()
                yield encode_step(step, request.worker_id)

    def snapshot(
        self, request: reading_pb2.SnapshotRequest, context: grpc.ServicerContext
    ) -> reading_pb2.SnapshotResponse:
        """A snapshot of a job. Waits until it is on disk.

        Raises:
            LimitExceededError: there are too many reads already.
            RequestError: what `JobRegistry.snapshot` raises.
        """
        self._admit_to(request.job, context)
        if not self._reads.acquire(blocking=False):
            raise LimitExceededError(
                f"this server serves {self._limits.max_workers} reads at once and is busy (--max-workers)"
            )
        try:
            taken = self._registry.snapshot(request.job)
            return reading_pb2.SnapshotResponse(step=taken.step, path=str(taken.folder), nbytes=taken.nbytes)
        finally:
            self._reads.release()


def _proofs(caller: Caller, context: grpc.ServicerContext) -> str:
    """What a caller has shown, for the log."""
    certificate = certificate_name(context)
    return ", ".join(f"{what} {name}" for what, name in (("token", caller.name), ("certificate", certificate)) if name)


def _at_the_end(context: grpc.ServicerContext, work: Callable[[], None]) -> bool:
    """Has `work` done when the call is over, however it ends.

    A handler's generator is closed when the last reference to it goes, which may be much later. And gRPC calls back
    in the one thread that serves all calls, which must not wait for a job's lock: hence a thread.

    Returns:
        Whether the call is still under way. If it is not, the work is done already.
    """

    def start() -> None:
        threading.Thread(target=work, name="optimd-call-end", daemon=True).start()

    if context.add_callback(start):
        return True
    work()
    return False
