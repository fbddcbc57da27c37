"""Talking to a server as its operator."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import grpc

from optimd.cli.errors import CommandError
from optimd.cli.target import Target
from optimd.v1 import admin_pb2, reading_pb2
from optimd.v1.admin_service_pb2_grpc import AdminServiceStub
from optimd.v1.optimizer_service_pb2_grpc import OptimizerServiceStub
from optimd.wire.reasons import ERROR_TRAILER

_TIMEOUT_S = 10.0
_SNAPSHOT_TIMEOUT_S = 3600.0


class Admin:
    """What a server does for its operator. Every call ends within ten seconds, but for `snapshot`.

    Args:
        target: The server.
    """

    def __init__(self, target: Target) -> None:
        self._target = target
        self._address = target.address

    def jobs(self) -> list[admin_pb2.JobSummary]:
        """All jobs, in order of name.

        Raises:
            CommandError: the server does not answer.
        """
        jobs: list[admin_pb2.JobSummary] = []
        token = ""
        with self._channel() as channel:
            stub = AdminServiceStub(channel)
            while True:
                page = stub.ListJobs(
                    admin_pb2.ListJobsRequest(page_token=token), timeout=_TIMEOUT_S, metadata=self._metadata()
                )
                jobs += page.jobs
                token = page.next_page_token
                if not token:
                    return jobs

    def job(self, name: str) -> admin_pb2.GetJobResponse:
        """One job.

        Raises:
            CommandError: there is none of that name, or the server does not answer.
        """
        with self._channel() as channel:
            return AdminServiceStub(channel).GetJob(
                admin_pb2.GetJobRequest(job=name), timeout=_TIMEOUT_S, metadata=self._metadata()
            )

    def status(self) -> admin_pb2.GetStatusResponse:
        """How the server is.

        Raises:
            CommandError: the server does not answer.
        """
        with self._channel() as channel:
            return AdminServiceStub(channel).GetStatus(
                admin_pb2.GetStatusRequest(), timeout=_TIMEOUT_S, metadata=self._metadata()
            )

    def evict(self, name: str, worker_id: str) -> None:
        """Takes a worker out of a job.

        Raises:
            CommandError: there is no such job or worker, or the server does not answer.
        """
        with self._channel() as channel:
            request = admin_pb2.EvictWorkerRequest(job=name, worker_id=worker_id)
            AdminServiceStub(channel).EvictWorker(request, timeout=_TIMEOUT_S, metadata=self._metadata())

    def delete(self, name: str, *, force: bool) -> None:
        """Drops a job.

        Raises:
            CommandError: there is none of that name, it is in use, or the server does not answer.
        """
        with self._channel() as channel:
            request = admin_pb2.DeleteJobRequest(job=name, force=force)
            AdminServiceStub(channel).DeleteJob(request, timeout=_TIMEOUT_S, metadata=self._metadata())

    def snapshot(self, name: str) -> reading_pb2.SnapshotResponse:
        """Has a job written to the server's data dir, and waits until it is there, up to an hour.

        Raises:
            CommandError: there is none of that name, the server keeps none of its jobs or is an older one, the disk
                does not take it, or the server does not answer.
        """
        # Whether it answers at all is known in ten seconds; a snapshot takes as long as it takes.
        self.job(name)
        with self._channel() as channel:
            request = reading_pb2.SnapshotRequest(job=name)
            try:
                return OptimizerServiceStub(channel).Snapshot(
                    request, timeout=_SNAPSHOT_TIMEOUT_S, metadata=self._metadata()
                )
            except grpc.RpcError as error:
                if isinstance(error, grpc.Call) and error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                    raise CommandError(
                        f"no snapshot of job {name} was complete in {_SNAPSHOT_TIMEOUT_S:g} s; it may still come"
                    ) from error
                raise

    @contextmanager
    def _channel(self) -> Iterator[grpc.Channel]:
        with self._target.credentials.channel(self._address) as channel:
            try:
                yield channel
            except grpc.RpcError as error:
                raise CommandError(self._reason(error)) from error

    def _answers(self) -> bool:
        """Whether the server answers at all, in a second."""
        with self._target.credentials.channel(self._address) as channel:
            try:
                AdminServiceStub(channel).GetStatus(
                    admin_pb2.GetStatusRequest(), timeout=1.0, metadata=self._metadata()
                )
            except grpc.RpcError:
                return False
        return True

    def _metadata(self) -> tuple[tuple[str, str], ...]:
        return self._target.credentials.metadata()

    def _reason(self, error: grpc.RpcError) -> str:
        if not isinstance(error, grpc.Call):
            return str(error)
        # What a server of ours says has a reason beside it, whatever its status.
        says_why = any(key == ERROR_TRAILER for key, _ in error.trailing_metadata() or ())
        if not says_why and error.code() is grpc.StatusCode.DEADLINE_EXCEEDED and self._answers():
            return f"the server at {self._address} is there, and did not do that within {_TIMEOUT_S:g} s; try again"
        if not says_why and error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
            return self._target.credentials.problem(self._address) or (
                f"no optimd server answers at {self._address}; start one with `optimd serve`, or name it with --server"
            )
        if not says_why and error.code() is grpc.StatusCode.UNIMPLEMENTED:
            return f"the server at {self._address} is an older one, and does not do that"
        return error.details() or str(error)
