"""Talking to a server as its operator."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import grpc

from optimd.cli.errors import CommandError
from optimd.v1 import admin_pb2
from optimd.v1.admin_service_pb2_grpc import AdminServiceStub

_TIMEOUT_S = 10.0


class Admin:
    """A server's admin service. Every call ends within ten seconds.

    Args:
        address: "host:port" or "unix:///path".
    """

    def __init__(self, address: str) -> None:
        self._address = address

    def jobs(self) -> list[admin_pb2.JobSummary]:
        """All jobs, in order of name.

        Raises:
            CommandError: the server does not answer.
        """
        jobs: list[admin_pb2.JobSummary] = []
        token = ""
        with self._stub() as stub:
            while True:
                page = stub.ListJobs(admin_pb2.ListJobsRequest(page_token=token), timeout=_TIMEOUT_S)
                jobs += page.jobs
                token = page.next_page_token
                if not token:
                    return jobs

    def job(self, name: str) -> admin_pb2.GetJobResponse:
        """One job.

        Raises:
            CommandError: there is none of that name, or the server does not answer.
        """
        with self._stub() as stub:
            return stub.GetJob(admin_pb2.GetJobRequest(job=name), timeout=_TIMEOUT_S)

    def delete(self, name: str, *, force: bool) -> None:
        """Drops a job.

        Raises:
            CommandError: there is none of that name, it is in use, or the server does not answer.
        """
        with self._stub() as stub:
            stub.DeleteJob(admin_pb2.DeleteJobRequest(job=name, force=force), timeout=_TIMEOUT_S)

    @contextmanager
    def _stub(self) -> Iterator[AdminServiceStub]:
        with grpc.insecure_channel(self._address) as channel:
            try:
                yield AdminServiceStub(channel)
            except grpc.RpcError as error:
                unreachable = isinstance(error, grpc.Call) and error.code() in (
                    grpc.StatusCode.UNAVAILABLE,
                    grpc.StatusCode.DEADLINE_EXCEEDED,
                )
                if unreachable:
                    raise CommandError(
                        f"no optimd server answers at {self._address}; start one with `optimd serve`, or name it "
                        "with --server"
                    ) from error
                raise CommandError(error.details() if isinstance(error, grpc.Call) else str(error)) from error
