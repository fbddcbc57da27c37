"""The server: its parts put together, started and stopped."""

from __future__ import annotations

import logging
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Final

import grpc
import torch

from optimd.server.adminservice import AdminService
from optimd.server.admission import Admission
from optimd.server.config import ServerConfig
from optimd.server.datadir import DataDir
from optimd.server.errors import ConfigurationError
from optimd.server.files import Files
from optimd.server.interceptor import ErrorTranslation
from optimd.server.patience import Patience
from optimd.server.registry import JobRegistry
from optimd.server.services import Limits, OptimizerService
from optimd.server.storage import Storage, StorageSettings
from optimd.server.timekeeper import TimeKeeper
from optimd.server.tls import CertificateFiles
from optimd.server.tokens import Gate
from optimd.v1.admin_service_pb2_grpc import add_AdminServiceServicer_to_server
from optimd.wire.sharedmemory import sweep

if TYPE_CHECKING:
    from grpc_health.v1.health import HealthServicer

    from optimd.server.metrics import MetricsServer

_log = logging.getLogger(__name__)

RESERVED_THREADS: Final = 8
"""Threads for health and admin calls beside those for streams: they answer while every stream is taken."""

_THREAD_END_S: Final = 5.0

_CHANNEL_OPTIONS: Final = (
    # Without this a second server on the same port would silently share its connections.
    ("grpc.so_reuseport", 0),
    # Workers compute for minutes between two steps and ping meanwhile: that is no abuse.
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    # Measured on TCP: frames of a bucket's size with a window above it gave 15-30 %.
    ("grpc.http2.max_frame_size", 4 * 1024 * 1024),
    ("grpc.http2.lookahead_bytes", 8 * 1024 * 1024),
)


_KEEPALIVE: Final = (
    # The line of a worker whose machine is gone is closed within a minute, and its thread is free again.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 20_000),
)

_TICK_S: Final = 0.25
"""How often jobs are told of time, in seconds."""


class Server:
    """An optimizer daemon in this process. torch's thread count is a setting of the process: one server is enough.

    Args:
        config: Its settings.
        files: What it keeps its jobs in; None for the system's files.

    Raises:
        ConfigurationError: its device is not there, or its data dir, certificate or tokens cannot be used.
    """

    def __init__(self, config: ServerConfig, *, files: Files | None = None) -> None:
        self._config = config
        self._gate = Gate(Path(config.tokens) if config.tokens else None)
        self._credentials = _credentials(config)
        self.device = config.resolved_device()
        limits = Limits(
            max_workers=config.max_workers,
            max_job_workers=config.max_job_workers or config.max_workers,
            max_jobs=config.max_jobs,
            max_job_bytes=config.resolved_max_job_bytes(),
            shares_memory=config.shared_memory,
        )
        self._storage = _storage(config, self.device, files) if config.keeps_jobs else None
        self.registry = JobRegistry(
            self.device,
            max_jobs=limits.max_jobs,
            max_job_bytes=limits.max_job_bytes,
            max_job_workers=limits.max_job_workers,
            lease_s=config.lease_s,
            storage=self._storage,
        )
        self._keeper = TimeKeeper(self.registry, period_s=min(_TICK_S, config.lease_s / 4))
        threads = 3 * config.max_workers + RESERVED_THREADS
        self._patience = Patience()
        self._service = OptimizerService(self.registry, limits, self._gate, self._patience)
        self._translation = ErrorTranslation()
        self._server = grpc.server(
            # A stream holds its thread; its worker may read state and watch steps besides.
            ThreadPoolExecutor(threads, thread_name_prefix="optimd"),
            interceptors=[self._translation, Admission(self._gate, self._patience, threads)],
            # A peer on this machine that is gone is seen to be; one that is stopped may rest for as long as it likes.
            options=(
                *_CHANNEL_OPTIONS,
                ("grpc.max_allowed_incoming_connections", config.resolved_max_connections()),
                *(() if config.socket_path is not None else _KEEPALIVE),
            ),
        )
        self._server.add_generic_rpc_handlers((self._service.handlers(),))
        self._admin_service = AdminService(self.registry, limits, self._gate)
        add_AdminServiceServicer_to_server(self._admin_service, self._server)
        self._health = self._add_standard_services() if config.health else None
        self._metrics: MetricsServer | None = None
        self._grpc_threads: list[threading.Thread] = []
        self.address = config.address
        self.metrics_address = ""
        """Where metrics are served, once it has started; empty where they are not."""

    def start(self) -> str:
        """Brings back the jobs of the data dir, binds the address and begins to serve.

        Returns:
            The address as bound: with the port that was taken for port 0.

        Raises:
            ConfigurationError: the address cannot be bound, or a job cannot be brought back.
        """
        torch.set_num_threads(self._config.resolved_threads())
        if self._config.shared_memory:
            sweep()
        self.registry.recover()
        path = self._config.socket_path
        try:
            if path is not None:
                _clear_stale_socket(path)
                self._server.add_insecure_port(f"unix:{path}")
            else:
                _try_bind(self._config)
                port = (
                    self._server.add_insecure_port(self._config.address)
                    if self._credentials is None
                    else self._server.add_secure_port(self._config.address, self._credentials)
                )
                self.address = f"{self._config.address.rpartition(':')[0]}:{port}"
        except (RuntimeError, OSError) as error:
            raise ConfigurationError(
                f"cannot listen on {self._config.address}: {error}; choose another with --address"
            ) from error
        if self._config.metrics_address:
            self._metrics = self._serve_metrics()
            self.metrics_address = self._metrics.address
        self.registry.begin()
        self._keeper.start()
        self._patience.start()
        before = set(threading.enumerate())
        self._server.start()
        self._grpc_threads = [thread for thread in threading.enumerate() if thread not in before]
        return self.address

    def reload(self) -> None:
        """Reads the file of tokens again. Certificates need no such call."""
        self._gate.reload()

    def stop(self) -> None:
        """Stops: takes no new streams, waits up to `drain_timeout_s` for open steps, ends the streams. Blocks."""
        self._service.drain()
        self._admin_service.drain()
        if self._health is not None:
            self._health.enter_graceful_shutdown()
        deadline = time.monotonic() + self._config.drain_timeout_s
        if self._storage is not None:
            # A job that waits for a full disk does so with its lock held.
            patience = threading.Timer(self._config.drain_timeout_s, self._storage.stopping.set)
            patience.daemon = True
            patience.start()
        for job in self.registry.all():
            if not job.drain(max(0.0, deadline - time.monotonic())):
                _log.warning("job %s: stopped in the middle of step %d", job.name, job.step + 1)
        self._keeper.stop()
        self._server.stop(grace=0.2).wait()
        self._patience.stop()
        # gRPC's own threads are daemons: one that is still on its way out when the interpreter ends is torn down inside
        # C++ code, and the process aborts instead of exiting with 0.
        for thread in self._grpc_threads:
            thread.join(_THREAD_END_S)
        if self._metrics is not None:
            self._metrics.stop()
        for job in self.registry.all():
            job.store.hide()
        if self._storage is not None:
            self._storage.stopping.set()
            self._storage.close()
        path = self._config.socket_path
        if path is not None:
            path.unlink(missing_ok=True)

    def _add_standard_services(self) -> HealthServicer:
        # Only `optimd serve` needs these; the embedded server runs on what a worker installs.
        try:
            from optimd.server.standard_services import add_standard_services  # noqa: PLC0415
        except ImportError as error:
            raise ConfigurationError(
                f"the health service needs {error.name}: pip install 'optimd[server]', or pass --no-health"
            ) from error
        return add_standard_services(self._server, self.registry, self._gate, reflects=self._config.reflection)

    def _serve_metrics(self) -> MetricsServer:
        # Only where they are asked for: a worker's embedded server does without what this needs.
        try:
            from optimd.server.metrics import MetricsServer, ServerCollector  # noqa: PLC0415
        except ImportError as error:
            raise ConfigurationError(f"--metrics-address needs {error.name}: pip install 'optimd[server]'") from error
        collector = ServerCollector(self.registry.all, self.device, lambda: self._translation.failures, self._storage)
        return MetricsServer(self._config.metrics_address, collector)


def _credentials(config: ServerConfig) -> grpc.ServerCredentials | None:
    if not config.tls_cert:
        return None
    client_ca = Path(config.tls_client_ca) if config.tls_client_ca else None
    return CertificateFiles(Path(config.tls_cert), Path(config.tls_key), client_ca).credentials()


def _storage(config: ServerConfig, device: torch.device, files: Files | None) -> Storage:
    settings = StorageSettings(
        durability="log" if config.durability == "log" else "snapshot",
        fsync=config.fsync,  # type: ignore[arg-type]  # checked by the config
        fsync_interval_s=config.fsync_interval_s,
        snapshot_steps=config.snapshot_steps,
        snapshot_s=config.snapshot_s,
        snapshots_kept=config.snapshots_kept,
        journal_max_bytes=config.journal_max_bytes,
        segment_bytes=config.journal_segment_bytes,
        accept_loss=config.accept_loss,
    )
    return Storage(DataDir(Path(config.data_dir), files), settings, device)


def _try_bind(config: ServerConfig) -> None:
    """Binds a TCP address for a moment: the system says why it cannot be had, gRPC only that it cannot.

    Raises:
        OSError: it cannot be bound.
    """
    port = int(config.address.rpartition(":")[2])
    family, kind, _, _, address = socket.getaddrinfo(config.host, port, type=socket.SOCK_STREAM)[0]
    with socket.socket(family, kind) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except OSError as error:
            raise OSError((error.strerror or str(error)).lower()) from error


def _clear_stale_socket(path: Path) -> None:
    """Removes the socket of a server that died; gRPC would take over that of a living one.

    Raises:
        OSError: the path is not a socket, a server answers there, or its folder is missing.
    """
    if not path.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {path.parent}")
    if not path.exists():
        return
    if not path.is_socket():
        raise FileExistsError(f"{path} exists and is not a socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
            return
    raise OSError(f"a server answers at {path}")
