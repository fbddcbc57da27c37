"""A real Prometheus for tests: the one that is installed, or Debian's package, unpacked beside the tests' own files."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest


def program(name: str, folder: Path) -> str:
    """The path of `prometheus` or `promtool`. Skips the test where it is neither installed nor to be had."""
    found = shutil.which(name)
    if found is not None:
        return found
    unpacked = folder / "usr" / "bin" / name
    if not unpacked.exists():
        try:
            for command in (["apt-get", "download", "prometheus"], ["dpkg", "-x", *_packages(folder), str(folder)]):
                subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=120)
        except (OSError, subprocess.SubprocessError) as error:
            pytest.skip(f"{name} is not installed (Debian: apt install prometheus), and is not to be had: {error}")
    return str(unpacked)


def _packages(folder: Path) -> Iterator[str]:
    # Looked for when it is there.
    yield from (str(path) for path in folder.glob("prometheus_*.deb"))


class Prometheus:
    """One that runs.

    Args:
        address: Where it listens.
    """

    def __init__(self, address: str) -> None:
        self._address = address

    def get(self, path: str, **parameters: str) -> Any:
        """What its API answers.

        Raises:
            AssertionError: it says that the question is wrong.
        """
        url = f"http://{self._address}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        try:
            with urllib.request.urlopen(url, timeout=10) as answer:
                return json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{parameters}: {error.read().decode()}") from error

    def query(self, expression: str) -> list[Any]:
        """What an expression comes to now."""
        return list(self.get("query", query=expression)["result"])

    def is_ready(self) -> bool:
        """Whether it answers."""
        try:
            with urllib.request.urlopen(f"http://{self._address}/-/ready", timeout=2) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False


@contextmanager
def running_prometheus(binary: str, config: Path, data: Path) -> Iterator[Prometheus]:
    """Prometheus with a config, on a free loopback port, until the block ends."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    with (data / "log").open("wb") as log:
        process = subprocess.Popen(
            [
                binary,
                f"--config.file={config}",
                f"--storage.tsdb.path={data / 'tsdb'}",
                f"--web.listen-address={address}",
            ],
            stdout=log,
            stderr=log,
        )
    try:
        prometheus = Prometheus(address)
        deadline = time.monotonic() + 30
        while not prometheus.is_ready():
            assert process.poll() is None, (data / "log").read_text()
            assert time.monotonic() < deadline, (data / "log").read_text()
            time.sleep(0.1)
        yield prometheus
    finally:
        process.kill()
        process.wait()
