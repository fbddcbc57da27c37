"""How a server is set up. Nothing here is read from the environment: who builds a config does that."""

from __future__ import annotations

import ipaddress
import os
import threading
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Final

import torch

from optimd.server.errors import ConfigurationError

DEFAULT_ADDRESS: Final = "127.0.0.1:50551"
DURABILITIES: Final = ("off", "snapshot", "log")
FSYNCS: Final = ("never", "step", "interval")
_MOST_WORKERS: Final = 65_536
_LONGEST_SOCKET_PATH: Final = 107
"""On Linux: `sun_path` has 108, with the NUL behind it."""

_UNIX: Final = "unix://"
# What a job may take of the machine's memory where nobody says otherwise.
_MEMORY_SHARE: Final = 0.8


def setting(default: Any, text: str) -> Any:
    """A field of `ServerConfig`. `text` is its documentation, in code and in every `--help`."""
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """The settings of one server. Each field's `help` says what it means.

    Raises:
        ConfigurationError: a number is out of range, an address is malformed, or an address is reachable from other
            hosts while `insecure` is not set.
    """

    address: str = setting(DEFAULT_ADDRESS, "Where to listen: host:port or unix:///path. Port 0 takes a free one.")
    device: str = setting(
        "auto", "Where parameters and state live: auto (the first GPU, else the CPU), cpu, cuda or cuda:N."
    )
    threads: int = setting(0, "How many threads torch computes with. 0: half of the cores, at least 1 and at most 4.")
    max_workers: int = setting(
        256, "The most workers at once, over all jobs. Each holds a thread, and one more while it reads or watches."
    )
    max_connections: int = setting(
        0, "The most connections at once; others are closed as they come. 0: twice --max-workers, and 64 for operators."
    )
    max_job_workers: int = setting(0, "The most workers of one job at once. 0: as many as the server takes in all.")
    lease_s: float = setting(
        15.0, "How long a worker that is not heard of stays in its job, in seconds. Others wait for it meanwhile."
    )
    max_jobs: int = setting(1000, "The most jobs at once.")
    max_job_bytes: int = setting(
        0, "The most bytes that values and state of one job may take. 0: 80 % of the device's memory."
    )
    insecure: bool = setting(
        default=False, text="Speak plaintext beyond loopback addresses and Unix sockets, on a network that you trust."
    )
    tls_cert: str = setting(
        "", "A PEM file with this server's certificate and those that lead to its authority: speak TLS."
    )
    tls_key: str = setting("", "A PEM file with the private key of --tls-cert, not encrypted.")
    tls_client_ca: str = setting(
        "",
        "A PEM file of authorities: take only clients that show a certificate of one of these. All three files may be "
        "replaced while the server runs.",
    )
    tokens: str = setting(
        "", "A TOML file of the tokens of which callers have to bring one (docs/security.md). SIGHUP reads it again."
    )
    data_dir: str = setting(
        "", "The folder to keep jobs in, so that they outlive this server. Empty: they live in memory and end with it."
    )
    durability: str = setting(
        "log",
        "What is kept in the data dir: log (every step, before it is acknowledged), snapshot (a copy now and then: a "
        "server that dies goes back to the last one) or off.",
    )
    fsync: str = setting(
        "step",
        "When the journal is forced to the disk: step (before a step is acknowledged: power loss loses nothing), "
        "interval (every --fsync-interval-s) or never (the death of the server loses nothing, power loss may).",
    )
    fsync_interval_s: float = setting(
        1.0, "How often the journal is forced to the disk with --fsync interval, in seconds."
    )
    snapshot_steps: int = setting(0, "Take a snapshot of a job every so many steps. 0: by time and size alone.")
    snapshot_s: float = setting(
        600.0, "Take a snapshot of a job that has changed every so many seconds. 0: never by time."
    )
    snapshots_kept: int = setting(
        2, "How many snapshots of a job to keep. One that is damaged is stood in for by the last."
    )
    journal_max_bytes: int = setting(
        0,
        "Take a snapshot when a job's journal has grown by this. 0: four times its values and state, at least 256 MiB.",
    )
    journal_segment_bytes: int = setting(
        64 * 1024 * 1024, "How long a file of a journal gets before the next is begun."
    )
    accept_loss: bool = setting(
        default=False,
        text="Go on from what stands before a damaged record. What stands behind it is deleted: copy the folder first.",
    )
    shared_memory: bool = setting(
        default=True,
        text="Let workers on this host hand over payloads in shared memory, where they run as the same user.",
    )
    metrics_address: str = setting(
        "", "Where to serve metrics to Prometheus: host:port, at /metrics, in the clear. Port 0 takes a free one."
    )
    metrics_insecure: bool = setting(
        default=False, text="Serve metrics to other hosts: names of jobs and workers, in the clear and to whoever asks."
    )
    drain_timeout_s: float = setting(10.0, "How long a stopping server waits for open steps, in seconds.")
    health: bool = setting(default=True, text="Serve the standard health service. It needs optimd[server].")
    reflection: bool = setting(
        default=True, text="Serve the standard reflection service, where health is served: grpcurl shows the schema."
    )

    def __post_init__(self) -> None:
        for name in ("max_workers", "max_jobs"):
            if getattr(self, name) < 1:
                raise ConfigurationError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name, most in (("max_workers", _MOST_WORKERS), ("max_connections", _MOST_WORKERS * 4), ("threads", 4096)):
            if getattr(self, name) > most:
                raise ConfigurationError(f"{name} is {getattr(self, name)}; it must be at most {most}")
        for item in fields(self):
            if "\0" in str(getattr(self, item.name)):
                raise ConfigurationError(f"{item.name} has a NUL character in it")
        if not 0.1 <= self.lease_s <= threading.TIMEOUT_MAX:
            raise ConfigurationError(f"lease_s is {self.lease_s}; it must be at least 0.1 seconds")
        for name, choices in (("durability", DURABILITIES), ("fsync", FSYNCS)):
            if getattr(self, name) not in choices:
                raise ConfigurationError(f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(choices)}")
        if not 0.01 <= self.fsync_interval_s <= threading.TIMEOUT_MAX:
            raise ConfigurationError(f"fsync_interval_s is {self.fsync_interval_s}; it must be at least 0.01 seconds")
        for name in ("snapshots_kept", "journal_segment_bytes"):
            if getattr(self, name) < 1:
                raise ConfigurationError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if not 0 <= self.snapshot_s <= threading.TIMEOUT_MAX:
            raise ConfigurationError(f"snapshot_s is {self.snapshot_s}; it must be a number of seconds, or 0")
        for name in (
            "threads",
            "max_connections",
            "max_job_workers",
            "max_job_bytes",
            "drain_timeout_s",
            "snapshot_steps",
            "journal_max_bytes",
        ):
            if getattr(self, name) < 0:
                raise ConfigurationError(f"{name} is {getattr(self, name)}; it must not be negative")
        # A NaN is not negative either.
        if not self.drain_timeout_s <= threading.TIMEOUT_MAX:
            raise ConfigurationError(f"drain_timeout_s is {self.drain_timeout_s}; it must be a number of seconds")
        self._check_tls()
        if self.socket_path is not None:
            if len(os.fsencode(self.socket_path)) > _LONGEST_SOCKET_PATH:
                raise ConfigurationError(
                    f"the path of {self.address} is too long for a Unix socket, which may have "
                    f"{_LONGEST_SOCKET_PATH} bytes"
                )
            if not self.socket_path.is_absolute():
                raise ConfigurationError(f"{self.address!r} is not an address; write host:port or unix:///path")
        elif not _is_loopback(self.host) and not self.insecure and not self.tls_cert:
            raise ConfigurationError(
                f"{self.address} can be reached from other hosts, and this server speaks plaintext: give it a "
                "certificate (--tls-cert and --tls-key), listen on 127.0.0.1 or unix:///path, or pass --insecure on a "
                "network that you trust"
            )

        if (
            self.metrics_address
            and not _is_loopback(host_of(self.metrics_address))
            and not self.insecure
            and not self.metrics_insecure
        ):
            raise ConfigurationError(
                f"metrics at {self.metrics_address} could be read from other hosts, in the clear and by whoever asks: "
                "serve them at 127.0.0.1, or pass --metrics-insecure on a network that you trust"
            )

    def _check_tls(self) -> None:
        if bool(self.tls_cert) != bool(self.tls_key):
            given, missing = ("tls_cert", "tls_key") if self.tls_cert else ("tls_key", "tls_cert")
            raise ConfigurationError(f"{given} needs {missing}: a certificate and its key go together")
        if self.tls_client_ca and not self.tls_cert:
            raise ConfigurationError(
                "tls_client_ca needs tls_cert and tls_key: clients show certificates over TLS only"
            )
        if self.tls_cert and self.socket_path is not None:
            raise ConfigurationError(
                f"{self.address} is a Unix socket, which its file's permissions protect: leave tls_cert out, or listen "
                "on host:port"
            )

    @classmethod
    def help_of(cls, name: str) -> str:
        """What the setting `name` means, for a `--help`."""
        return next(str(item.metadata["help"]) for item in fields(cls) if item.name == name)

    @property
    def keeps_jobs(self) -> bool:
        """Whether jobs are kept on disk."""
        return bool(self.data_dir) and self.durability != "off"

    @property
    def socket_path(self) -> Path | None:
        """The Unix socket's path; None for a TCP address."""
        return Path(self.address[len(_UNIX) :]) if self.address.startswith(_UNIX) else None

    @property
    def host(self) -> str:
        """The host part of a TCP address.

        Raises:
            ConfigurationError: the address is not "host:port".
        """
        return host_of(self.address, "host:port or unix:///path")

    def resolved_max_connections(self) -> int:
        """The most connections at once."""
        return self.max_connections or 2 * self.max_workers + 64

    def resolved_threads(self) -> int:
        """The number of torch threads."""
        return self.threads or max(1, min(4, len(os.sched_getaffinity(0)) // 2))

    def resolved_max_job_bytes(self) -> int:
        """The most bytes a job may take.

        Raises:
            ConfigurationError: the device, of whose memory it is a share, is not there.
        """
        if self.max_job_bytes:
            return self.max_job_bytes
        device = self.resolved_device()
        if device.type == "cuda":
            return int(torch.cuda.get_device_properties(device).total_memory * _MEMORY_SHARE)
        return int(_host_memory_bytes() * _MEMORY_SHARE)

    def resolved_device(self) -> torch.device:
        """The device.

        Raises:
            ConfigurationError: it is not there, or the name is not one.
        """
        if self.device == "auto":
            return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
        try:
            device = torch.device(self.device)
        except RuntimeError:
            raise ConfigurationError(f"{self.device!r} is not a device; write auto, cpu or cuda:N") from None
        if device.type == "cpu":
            return torch.device("cpu")
        if device.type != "cuda":
            raise ConfigurationError(f"device {self.device} is not supported; write auto, cpu or cuda:N")
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        index = device.index or 0
        if index >= count:
            here = f"it has cuda:0 to cuda:{count - 1}" if count else "it has no CUDA device"
            raise ConfigurationError(f"device {self.device} is not on this machine ({here}); use --device auto or cpu")
        return torch.device("cuda", index)


def host_of(address: str, forms: str = "host:port") -> str:
    """The host of a TCP address.

    Raises:
        ConfigurationError: it is none; it should have one of these `forms`.
    """
    host, separator, port = address.rpartition(":")
    if not separator or not host or not port.isdecimal() or int(port) > 65535:
        raise ConfigurationError(f"{address!r} is not an address; write {forms}")
    return host.strip("[]")


def port_of(address: str) -> int:
    """The port of an address that `host_of` has found to be one."""
    return int(address.rpartition(":")[2])


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _host_memory_bytes() -> int:
    """The memory that this process may use: the machine's, or what its container allows."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        allowed = Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii").strip()
    except OSError:
        return memory
    return min(memory, int(allowed)) if allowed.isdecimal() else memory
