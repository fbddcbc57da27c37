"""What operators ask a server for, and have it do."""

from __future__ import annotations

import logging
import os
import threading
import time
from importlib.metadata import version
from pathlib import Path
from typing import Final

import grpc
import torch

from optimd.server import logcontext, update
from optimd.server.aggregation import Worker
from optimd.server.callers import describe, secret_of
from optimd.server.job import Job
from optimd.server.member import Member
from optimd.server.opening import encode_aggregation, encode_apply
from optimd.server.registry import JobRegistry
from optimd.server.services import Limits
from optimd.server.tokens import Gate
from optimd.v1 import admin_pb2, job_pb2
from optimd.v1.admin_service_pb2_grpc import AdminServiceServicer
from optimd.wire.paging import paginate
from optimd.wire.param_groups import encode_group

_log = logging.getLogger(__name__)

_MAX_PAGE: Final = 1000
_MAX_GROUPS_SHOWN: Final = 100
_EVICTION_TIMEOUT_S: Final = 60.0


class AdminService(AdminServiceServicer):
    """`optimd.v1.AdminService`. Every call is for callers whose token is good for it.

    Args:
        registry: The server's jobs.
        limits: What the server takes.
        gate: Who may call.
    """

    def __init__(self, registry: JobRegistry, limits: Limits, gate: Gate) -> None:
        self._registry = registry
        self._limits = limits
        self._gate = gate
        self._began_s = time.monotonic()
        self._draining = threading.Event()

    def drain(self) -> None:
        """Tells from now on that the server is stopping."""
        self._draining.set()

    def _admit(self, context: grpc.ServicerContext, job: str | None = None) -> str:
        """Who calls, for the log.

        Raises:
            UnauthenticatedError: nobody who may.
            PermissionDeniedError: the token is not good for admin calls.
        """
        if job is not None:
            logcontext.bind(job=job)
        caller = self._gate.admit(secret_of(context))
        caller.check_admin()
        return f"token {caller.name}, {describe(context)}" if caller.name else describe(context)

    def ListJobs(  # noqa: N802  # the schema's name
        self, request: admin_pb2.ListJobsRequest, context: grpc.ServicerContext
    ) -> admin_pb2.ListJobsResponse:
        """The jobs, in order of name."""
        self._admit(context)
        size = min(request.page_size or _MAX_PAGE, _MAX_PAGE)
        jobs = [job for job in self._registry.all() if job.name > request.page_token]
        page = jobs[:size]
        return admin_pb2.ListJobsResponse(
            jobs=[self._summary(job) for job in page],
            next_page_token=page[-1].name if len(jobs) > size else "",
        )

    def GetJob(  # noqa: N802  # the schema's name
        self, request: admin_pb2.GetJobRequest, context: grpc.ServicerContext
    ) -> admin_pb2.GetJobResponse:
        """One job in detail."""
        self._admit(context, request.job)
        job = self._registry.get(request.job)
        settings = job.settings
        groups = (encode_group(index, update.RULE, group) for index, group in enumerate(job.groups[:_MAX_GROUPS_SHOWN]))
        shown, _ = next(paginate(groups))
        return admin_pb2.GetJobResponse(
            summary=self._summary(job),
            aggregation=encode_aggregation(settings),
            apply=encode_apply(settings),
            bucket_bytes=settings.bucket_bytes,
            bucket_count=len(job.store.buckets),
            workers=[
                *(_worker_status(job, member) for member in job.members()),
                *(_absent_status(job, worker) for worker in job.awaited_absent()),
            ],
            param_groups=shown,
        )

    def GetStatus(  # noqa: N802  # the schema's name
        self, _request: admin_pb2.GetStatusRequest, context: grpc.ServicerContext
    ) -> admin_pb2.GetStatusResponse:
        """How the server is."""
        self._admit(context)
        jobs = self._registry.all()
        return admin_pb2.GetStatusResponse(
            server_version=version("optimd"),
            torch_version=torch.__version__,
            device=str(self._registry.device),
            uptime_s=time.monotonic() - self._began_s,
            job_count=len(jobs),
            worker_count=sum(job.worker_count for job in jobs),
            max_workers=self._limits.max_workers,
            max_jobs=self._limits.max_jobs,
            resident_bytes=_resident_bytes(),
            cpu_s=time.process_time(),
            keeps_jobs=self._registry.storage is not None,
            draining=self._draining.is_set(),
        )

    def EvictWorker(  # noqa: N802  # the schema's name
        self, request: admin_pb2.EvictWorkerRequest, context: grpc.ServicerContext
    ) -> admin_pb2.EvictWorkerResponse:
        """Takes a worker out of a job."""
        who = self._admit(context, request.job)
        left_s = context.time_remaining()
        # A little earlier: the caller hears why.
        timeout_s = _EVICTION_TIMEOUT_S if left_s is None else min(_EVICTION_TIMEOUT_S, left_s * 0.8)
        self._registry.evict(request.job, request.worker_id, timeout_s)
        _log.info("job %s: worker %s was taken out by %s", request.job, request.worker_id, who)
        return admin_pb2.EvictWorkerResponse()

    def DeleteJob(  # noqa: N802  # the schema's name
        self, request: admin_pb2.DeleteJobRequest, context: grpc.ServicerContext
    ) -> admin_pb2.DeleteJobResponse:
        """Drops a job."""
        who = self._admit(context, request.job)
        self._registry.delete(request.job, force=request.force)
        _log.info("job %s: deleted by %s", request.job, who)
        return admin_pb2.DeleteJobResponse()

    def _summary(self, job: Job) -> admin_pb2.JobSummary:
        received, sent = job.measures.bytes_transferred
        storage = self._registry.storage
        return admin_pb2.JobSummary(
            job=job.name,
            step=job.step,
            worker_count=job.worker_count,
            parameter_count=len(job.store.parameters),
            element_count=sum(parameter.numel for parameter in job.store.parameters),
            value_bytes=job.store.value_bytes,
            state_bytes=job.store.state_bytes,
            device=str(job.store.device),
            private=job.settings.private,
            bytes_received=received,
            bytes_sent=sent,
            replay_bytes=storage.replay_bytes(job) if storage is not None else 0,
        )


def _worker_status(job: Job, member: Member) -> admin_pb2.WorkerStatus:
    record = job.record(member.worker.worker_id)
    return admin_pb2.WorkerStatus(
        worker=job_pb2.WorkerIdentity(
            worker_id=member.worker.worker_id, rank=member.worker.rank, incarnation=member.incarnation
        ),
        pushes=record.pushes,
        bytes_received=member.bytes_received,
        bytes_sent=member.bytes_sent,
        connected=member.alive,
        silent_s=member.silent_s,
        dropped=record.dropped,
        lag=job.lag(member),
        waited_s=member.waits.total_s,
        staleness=record.receipt.staleness if record.receipt is not None else 0,
    )


def _absent_status(job: Job, worker: Worker) -> admin_pb2.WorkerStatus:
    """Of one that is lost, and whose place is kept."""
    record = job.record(worker.worker_id)
    return admin_pb2.WorkerStatus(
        worker=job_pb2.WorkerIdentity(worker_id=worker.worker_id, rank=worker.rank),
        pushes=record.pushes,
        dropped=record.dropped,
        staleness=record.receipt.staleness if record.receipt is not None else 0,
        lost=True,
    )


def _resident_bytes() -> int:
    """The memory that this process has now; 0 where the system does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")
