"""The standard health and reflection services, which `optimd[server]` installs."""

from __future__ import annotations

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from optimd.v1 import admin_service_pb2, optimizer_service_pb2

_SERVICES = (
    optimizer_service_pb2.DESCRIPTOR.services_by_name["OptimizerService"].full_name,
    admin_service_pb2.DESCRIPTOR.services_by_name["AdminService"].full_name,
)


def add_standard_services(server: grpc.Server) -> health.HealthServicer:
    """Adds both to `server`: healthy as a whole and for each service of this package.

    Returns:
        The health service, whose answers the caller may change.
    """
    servicer = health.HealthServicer()
    for name in ("", *_SERVICES):
        servicer.set(name, health_pb2.HealthCheckResponse.SERVING)
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    reflection.enable_server_reflection((*_SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
    return servicer
