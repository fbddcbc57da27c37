"""deploy/compose.yaml brought up for real: two workers train through a server, which is killed on the way."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from tests.support import ROOT

PROJECT = "optimd-compose-test"
DEPLOY = ROOT / "deploy"

# Containers may not reach a package index that the host does: build with the host's network.
BUILD_ON_HOSTS_NETWORK = """
version: "3.8"
services:
  server: {build: {network: host}}
  worker-0: {build: {network: host}}
  worker-1: {build: {network: host}}
"""


def compose_command() -> list[str]:
    """Docker compose, in either of its forms. Skips where there is no engine."""
    if (
        shutil.which("docker") is None
        or subprocess.run(["docker", "info"], capture_output=True, check=False).returncode
    ):
        pytest.skip("no Docker engine runs here")
    plugin = subprocess.run(["docker", "compose", "version"], capture_output=True, check=False)
    return ["docker", "compose"] if plugin.returncode == 0 else ["docker-compose"]


class Stack:
    """The services, by `docker compose`.

    Args:
        files: The compose files.
    """

    def __init__(self, files: list[Path]) -> None:
        self._command = [*compose_command(), "-p", PROJECT, *(part for file in files for part in ("-f", str(file)))]

    def call(self, *arguments: str, **environment: str) -> str:
        """Runs a subcommand. Gives what it writes."""
        ended = subprocess.run(
            [*self._command, *arguments],
            capture_output=True,
            text=True,
            timeout=1200,
            check=False,
            env={**os.environ, **environment},
        )
        assert ended.returncode == 0, ended.stdout + ended.stderr
        return ended.stdout

    def container(self, service: str) -> str:
        """A service's container."""
        # One that has ended is listed by `ps -a` of one form and by `ps` of the other.
        output = subprocess.run(
            [
                "docker",
                "ps",
                "-aq",
                f"--filter=label=com.docker.compose.project={PROJECT}",
                f"--filter=label=com.docker.compose.service={service}",
            ],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        (container,) = output.split()
        return container

    def inspect(self, service: str, form: str) -> str:
        """A field of what the engine says of a service's container."""
        command = ["docker", "inspect", "-f", form, self.container(service)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    def logs(self) -> str:
        """What all services have written."""
        return self.call("logs", "--no-color")

    def await_success(self, *services: str, timeout_s: float = 300) -> None:
        """Waits until services have ended, with status 0."""
        deadline = time.monotonic() + timeout_s
        for service in services:
            while self.inspect(service, "{{.State.Status}}") != "exited":
                assert time.monotonic() < deadline, self.logs()
                time.sleep(0.5)
            assert self.inspect(service, "{{.State.ExitCode}}") == "0", self.logs()

    def weights(self, folder: Path) -> dict[str, torch.Tensor]:
        """What worker 0 has saved."""
        target = folder / "weights.pt"
        subprocess.run(["docker", "cp", f"{self.container('worker-0')}:/out/weights.pt", str(target)], check=True)
        loaded: dict[str, torch.Tensor] = torch.load(target, weights_only=True)
        return loaded


def metrics() -> str:
    """The server's metrics; empty while it does not answer."""
    try:
        with urllib.request.urlopen("http://127.0.0.1:9464/metrics", timeout=5) as answer:
            return str(answer.read().decode())
    except OSError:
        return ""


def job_step() -> int:
    """Where the job is; 0 while that is not known."""
    found = re.search(r'^optimd_job_step\{job_name="digits"\} (\S+)', metrics(), re.MULTILINE)
    return int(float(found.group(1))) if found else 0


@pytest.fixture(scope="module")
def override(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("compose") / "override.yaml"
    path.write_text(BUILD_ON_HOSTS_NETWORK, encoding="utf-8")
    return path


@contextmanager
def up(override: Path, *overlays: str, epochs: int) -> Iterator[Stack]:
    """The stack, built and started, until the block ends."""
    stack = Stack([DEPLOY / "compose.yaml", *(DEPLOY / overlay for overlay in overlays), override])
    stack.call("down", "-v", "--remove-orphans")
    stack.call("build", "server", "worker-0")
    try:
        stack.call("up", "-d", EPOCHS=str(epochs))
        yield stack
    finally:
        stack.call("down", "-v", "--remove-orphans")


def test_a_server_killed_in_the_middle_of_training_changes_nothing(override: Path, tmp_path: Path) -> None:
    """The workers succeed, and end with the bits of a run in which nothing was killed."""
    epochs = 60
    with up(override, epochs=epochs) as stack:
        stack.await_success("worker-0", "worker-1")
        undisturbed = stack.weights(tmp_path)
        steps = job_step()
    with up(override, epochs=epochs) as stack:
        deadline = time.monotonic() + 120
        while job_step() < steps // 5:
            assert time.monotonic() < deadline, stack.logs()
            time.sleep(0.05)
        killed_at = job_step()
        # From outside: nothing kills the first process of a container from inside.
        os.kill(int(stack.inspect("server", "{{.State.Pid}}")), signal.SIGKILL)
        stack.await_success("worker-0", "worker-1")
        assert killed_at < steps, "it was over before it was killed"
        assert stack.inspect("server", "{{.RestartCount}}") == "1"
        assert job_step() == steps
        disturbed = stack.weights(tmp_path)
        logs = stack.logs()
        assert "test accuracy" in logs
        assert "trying for 60 s to take up job digits again" in logs
        # A server that is up again, and that says so.
        deadline = time.monotonic() + 60
        while stack.inspect("server", "{{.State.Health.Status}}") != "healthy":
            assert time.monotonic() < deadline
            time.sleep(0.5)
    assert disturbed.keys() == undisturbed.keys()
    for name, weight in undisturbed.items():
        assert torch.equal(disturbed[name], weight), name


def test_containers_run_as_nobody_in_particular_and_keep_data_on_a_volume(override: Path) -> None:
    """What is in them is what they need, and belongs to root."""
    with up(override, epochs=1) as stack:
        stack.await_success("worker-0", "worker-1")
        for service in ("server", "worker-0"):
            assert stack.inspect(service, "{{.Config.User}}") not in ("", "root", "0")
        mounts = json.loads(stack.inspect("server", "{{json .Mounts}}"))
        assert [mount["Type"] for mount in mounts if mount["Destination"] == "/var/lib/optimd"] == ["volume"]
        inside = [
            ("id -u", "10001"),
            ("touch /opt/optimd/x 2>&1 || true", "Permission denied"),
            ("ls /var/lib/optimd", "jobs"),
            ("optimd status", "jobs, kept on disk"),
            ("optimd jobs list", "digits"),
        ]
        for command, expected in inside:
            assert expected in stack.call("exec", "-T", "server", "sh", "-c", command), command
        stack.call("stop", "server")
        assert stack.inspect("server", "{{.State.ExitCode}}") == "0"


def test_with_tls_everybody_shows_a_certificate(override: Path) -> None:
    """The workers train; who shows none is told so."""
    with up(override, "compose.tls.yaml", epochs=2) as stack:
        stack.await_success("certificates", "worker-0", "worker-1")
        logs = stack.logs()
        assert "certificate worker) " in logs
        told = stack.call(
            "exec",
            "-T",
            "server",
            "sh",
            "-c",
            "optimd status --server localhost:50551 --tls-ca /tls/ca.pem 2>&1 || true",
        )
        assert "this worker shows no certificate" in told
        told = stack.call("exec", "-T", "server", "sh", "-c", "optimd status --server localhost:50551 2>&1 || true")
        assert "speaks TLS" in told


@pytest.mark.parametrize("overlay", ["compose.gpu.yaml", "compose.observability.yaml"])
def test_overlays_fit_the_base(override: Path, overlay: str) -> None:
    """As far as compose can say without their images, or a GPU."""
    stack = Stack([DEPLOY / "compose.yaml", DEPLOY / overlay, override])
    assert "optimd-server" in stack.call("config")
