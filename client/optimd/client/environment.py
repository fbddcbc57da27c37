"""What the environment says about a worker: the one place where it is read. Explicit arguments win."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from optimd.client.exceptions import ConfigurationError
from optimd.client.options import Tls

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerEnvironment:
    """`$OPTIMD_SERVER` and its like, and what torchrun tells its workers."""

    server: str | None = None
    job: str | None = None
    tls: Tls | None = None
    """None where the environment says nothing of it."""
    token: str | None = field(default=None, repr=False)
    token_file: str | None = None
    insecure: bool = False
    rank: int | None = None
    """torchrun's rank; None without it."""
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    run_id: str | None = None
    """torchrun's run id; None where there is none, or where it is "none"."""
    host_group: str | None = None
    """What the workers that one torchrun started on this host have in common; None without torchrun."""

    @property
    def host(self) -> str:
        """This host's name."""
        return socket.gethostname()

    @property
    def default_worker_id(self) -> str:
        """Host and local rank: the same when the worker is restarted, which torchrun's RANK need not be."""
        return f"{self.host}-{self.local_rank}"


def read_environment(variables: Mapping[str, str] = os.environ) -> WorkerEnvironment:
    """Reads the environment.

    Raises:
        ConfigurationError: a number is not one, or a certificate has no key.
    """
    run_id = variables.get("TORCHELASTIC_RUN_ID")
    under_torchrun = run_id is not None
    return WorkerEnvironment(
        server=variables.get("OPTIMD_SERVER") or None,
        job=variables.get("OPTIMD_JOB") or None,
        tls=_tls(variables),
        token=variables.get("OPTIMD_TOKEN") or None,
        token_file=variables.get("OPTIMD_TOKEN_FILE") or None,
        insecure=_flag(variables, "OPTIMD_INSECURE_TOKEN"),
        rank=_number(variables, "RANK", None),
        world_size=_number(variables, "WORLD_SIZE", 1),
        # Started by hand with ranks alone, several may be on this host.
        local_rank=_number(variables, "LOCAL_RANK", _number(variables, "RANK", 0)),
        # Without torchrun's word for it, assume that other workers may be on other hosts.
        local_world_size=_number(variables, "LOCAL_WORLD_SIZE", 1),
        run_id=run_id if run_id not in (None, "none") else None,
        host_group=_host_group(variables) if under_torchrun else None,
    )


def _tls(variables: Mapping[str, str]) -> Tls | None:
    names = {
        "ca": "OPTIMD_TLS_CA",
        "cert": "OPTIMD_CLIENT_CERT",
        "key": "OPTIMD_CLIENT_KEY",
        "server_name": "OPTIMD_TLS_SERVER_NAME",
    }
    given = {key: variables[name] for key, name in names.items() if variables.get(name)}
    if not given:
        return None
    if ("cert" in given) != ("key" in given):
        raise ConfigurationError("$OPTIMD_CLIENT_CERT and $OPTIMD_CLIENT_KEY go together; set both, or neither")
    return Tls(**given)


def _flag(variables: Mapping[str, str], name: str) -> bool:
    text = variables.get(name, "").lower()
    if text in ("", "0", "false", "no", "off"):
        return False
    if text in ("1", "true", "yes", "on"):
        return True
    raise ConfigurationError(f"${name} is {variables[name]!r}; set it to 1 or 0")


def _host_group(variables: Mapping[str, str]) -> str:
    """A text that names one torchrun on this host and one start of its workers.

    torchrun gives each worker a file for its error below a folder that it makes anew for every start. Where it is
    told not to, the rendezvous address stands in.
    """
    error_file = variables.get("TORCHELASTIC_ERROR_FILE")
    if error_file:
        return str(Path(error_file).parent.parent)
    parts = ("TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RESTART_COUNT")
    return " ".join(variables.get(part, "") for part in parts)


def _number(variables: Mapping[str, str], name: str, default: T) -> int | T:
    text = variables.get(name)
    if not text:
        return default
    try:
        return int(text)
    except ValueError:
        raise ConfigurationError(f"${name} is {text!r}, which is not a number") from None
