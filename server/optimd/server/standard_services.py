"""The standard health and reflection services, which `optimd[server]` installs."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Final

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from optimd.server.callers import secret_of
from optimd.server.registry import JobRegistry
from optimd.server.tokens import Gate
from optimd.v1 import admin_service_pb2, optimizer_service_pb2

_SERVICES = (
    optimizer_service_pb2.DESCRIPTOR.services_by_name["OptimizerService"].full_name,
    admin_service_pb2.DESCRIPTOR.services_by_name["AdminService"].full_name,
)

JOB_PREFIX: Final = "job/"
"""What the name of a job's health begins with."""

MAX_WATCHERS: Final = 64
"""How many watchers of the health service are told of changes at once; others wait until one goes away."""


class Health(health.HealthServicer):  # type: ignore[misc]  # has no types
    """Health of the server as a whole, of each service, and of each job: `job/NAME`.

    A server answers once its jobs are back from disk. A job is healthy unless it waits for a disk that it can write to.
    That of a job can be checked, not watched, and where tokens are asked for only with one that is good for it.

    Args:
        registry: The server's jobs.
        gate: Who may ask for jobs.
    """

    def __init__(self, registry: JobRegistry, gate: Gate) -> None:
        # A thread for each watcher, of a pool of their own: calls for health itself and for training never wait for
        # one. Without threads, what tells watchers of a change waits, with the service's lock held, for gRPC's one
        # thread, which takes that lock where a watcher goes away: a stopping server was seen to hang.
        super().__init__(
            experimental_non_blocking=False,
            experimental_thread_pool=ThreadPoolExecutor(MAX_WATCHERS, thread_name_prefix="optimd-health"),
        )
        self._registry = registry
        self._gate = gate

    def Check(  # noqa: N802  # the schema's name
        self, request: health_pb2.HealthCheckRequest, context: grpc.ServicerContext
    ) -> health_pb2.HealthCheckResponse:
        """How something is now; NOT_FOUND where there is none of that name.

        Raises:
            UnauthenticatedError: a job is asked for, and no token was brought that is known.
            PermissionDeniedError: the token is not good for the job.
            UnknownJobError: there is none of that name.
        """
        if not request.service.startswith(JOB_PREFIX):
            answer: health_pb2.HealthCheckResponse = super().Check(request, context)
            return answer
        name = request.service.removeprefix(JOB_PREFIX)
        self._gate.admit(secret_of(context)).check_job(name)
        job = self._registry.get(name)
        healthy = not self._gracefully_shutting_down and not job.journal.trouble and not job.journal.has_failed
        return health_pb2.HealthCheckResponse(
            status=health_pb2.HealthCheckResponse.SERVING if healthy else health_pb2.HealthCheckResponse.NOT_SERVING
        )


def add_standard_services(server: grpc.Server, registry: JobRegistry, gate: Gate, *, reflects: bool) -> Health:
    """Adds health to `server`, and reflection if it `reflects`.

    Returns:
        The health service, whose answers the caller may change.
    """
    servicer = Health(registry, gate)
    for name in ("", *_SERVICES):
        servicer.set(name, health_pb2.HealthCheckResponse.SERVING)
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    if reflects:
        reflection.enable_server_reflection((*_SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
    return servicer
