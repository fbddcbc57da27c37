"""The standard health and reflection services, which `optimd[server]` installs."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Final

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from optimd.v1 import admin_service_pb2, optimizer_service_pb2

_SERVICES = (
    optimizer_service_pb2.DESCRIPTOR.services_by_name["OptimizerService"].full_name,
    admin_service_pb2.DESCRIPTOR.services_by_name["AdminService"].full_name,
)


MAX_WATCHERS: Final = 64
"""How many watchers of the health service are told of changes at once; others wait until one goes away."""


def add_standard_services(server: grpc.Server) -> health.HealthServicer:
    """Adds both to `server`: healthy as a whole and for each service of this package.

    Returns:
        The health service, whose answers the caller may change.
    """
    # A thread for each watcher, of a pool of their own: calls for health itself and for training never wait for one.
    # Without threads, what tells watchers of a change waits, with the service's lock held, for gRPC's one thread, which
    # takes that lock where a watcher goes away: a stopping server was seen to hang.
    servicer = health.HealthServicer(
        experimental_non_blocking=False,
        experimental_thread_pool=ThreadPoolExecutor(MAX_WATCHERS, thread_name_prefix="optimd-health"),
    )
    for name in ("", *_SERVICES):
        servicer.set(name, health_pb2.HealthCheckResponse.SERVING)
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    reflection.enable_server_reflection((*_SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
    return servicer
