"""How a server may be set up, and how not."""

from __future__ import annotations

import dataclasses
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from optimd.server.config import DEFAULT_ADDRESS, ServerConfig
from optimd.server.errors import ConfigurationError

FIELDS = [field.name for field in dataclasses.fields(ServerConfig)]


def test_the_defaults_are_a_valid_server_on_a_loopback_address() -> None:
    """`optimd serve` starts as it is."""
    config = ServerConfig()
    assert config.address == DEFAULT_ADDRESS
    assert config.host == "127.0.0.1"
    assert config.socket_path is None
    assert not config.insecure


@pytest.mark.parametrize("address", ["127.0.0.1:0", "127.8.9.10:50551", "localhost:50551", "[::1]:50551"])
def test_plaintext_on_loopback_addresses_is_allowed(address: str) -> None:
    """Nobody else can listen in."""
    assert ServerConfig(address=address).address == address


@pytest.mark.parametrize(
    "address", ["0.0.0.0:50551", "[::]:50551", "192.168.1.7:50551", "gpu-host:50551", "localhost.example.org:50551"]
)
def test_plaintext_beyond_the_host_needs_to_be_asked_for(address: str) -> None:
    """The error names the address and the remedy; `insecure` lets it through."""
    with pytest.raises(ConfigurationError, match="pass --insecure") as caught:
        ServerConfig(address=address)
    assert address in str(caught.value)
    assert ServerConfig(address=address, insecure=True).address == address


@pytest.mark.parametrize("insecure", [False, True])
@pytest.mark.parametrize(
    "address",
    [
        "",
        "localhost",
        "localhost:",
        ":50551",
        "127.0.0.1:65536",
        "127.0.0.1:-1",
        "127.0.0.1:http",
        "127.0.0.1:50551/path",
        "unix:/tmp/optimd.sock",
        "unix://",
    ],
)
def test_a_malformed_address_is_refused(address: str, insecure: bool) -> None:
    """At once, not when the server starts, and whether or not it may speak plaintext."""
    with pytest.raises(ConfigurationError, match="write host:port or unix:///path"):
        ServerConfig(address=address, insecure=insecure)


def test_a_unix_address_is_a_path() -> None:
    """Such a socket needs no `insecure`: it does not leave the host."""
    config = ServerConfig(address="unix:///run/optimd/server.sock")
    assert config.socket_path == Path("/run/optimd/server.sock")


@pytest.mark.parametrize(("address", "host"), [("[::1]:7", "::1"), ("127.0.0.1:65535", "127.0.0.1")])
def test_the_host_is_what_stands_before_the_port(address: str, host: str) -> None:
    """Without the brackets of an IPv6 address."""
    assert ServerConfig(address=address).host == host


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"max_workers": 0}, "max_workers is 0; it must be at least 1"),
        ({"max_workers": -3}, "max_workers is -3; it must be at least 1"),
        ({"max_jobs": 0}, "max_jobs is 0; it must be at least 1"),
        ({"threads": -1}, "threads is -1; it must not be negative"),
        ({"max_job_bytes": -1}, "max_job_bytes is -1; it must not be negative"),
        ({"drain_timeout_s": -0.5}, "drain_timeout_s is -0.5; it must not be negative"),
        ({"drain_timeout_s": math.nan}, "drain_timeout_s is nan"),
    ],
)
def test_a_number_out_of_range_is_refused(setting: dict[str, Any], message: str) -> None:
    """The error names the setting, its value and the range."""
    with pytest.raises(ConfigurationError, match=message):
        ServerConfig(**setting)


def test_the_smallest_numbers_are_taken() -> None:
    """The bounds belong to the ranges."""
    config = ServerConfig(max_workers=1, max_jobs=1, threads=0, max_job_bytes=0, drain_timeout_s=0.0)
    assert (config.max_workers, config.drain_timeout_s) == (1, 0.0)


def test_a_config_cannot_be_changed_nor_given_by_position() -> None:
    """It is checked once, when it is made."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        ServerConfig().threads = 2  # type: ignore[misc]
    with pytest.raises(TypeError):
        ServerConfig("127.0.0.1:1")  # type: ignore[call-arg]


@pytest.mark.parametrize("name", FIELDS)
def test_every_setting_has_a_help_text(name: str) -> None:
    """A sentence, the same in every --help."""
    text = ServerConfig.help_of(name)
    assert text[0].isupper()
    assert text.endswith(".")


def test_the_help_is_the_setting_s_own() -> None:
    """No two are mixed up."""
    assert "host:port or unix:///path" in ServerConfig.help_of("address")
    assert len({ServerConfig.help_of(name) for name in FIELDS}) == len(FIELDS)


def test_threads_default_to_half_of_the_cores_and_at_most_four(monkeypatch: pytest.MonkeyPatch) -> None:
    """At least one; a number that is given holds."""
    assert ServerConfig(threads=7).resolved_threads() == 7
    for cores, threads in ((1, 1), (2, 1), (3, 1), (4, 2), (8, 4), (64, 4)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, cores=cores: set(range(cores)))
        assert ServerConfig().resolved_threads() == threads


def test_a_job_may_take_four_fifths_of_the_memory_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """A number that is given holds."""
    monkeypatch.setattr(os, "sysconf", {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 1000}.__getitem__)
    assert ServerConfig().resolved_max_job_bytes() == 3_276_800
    assert ServerConfig(max_job_bytes=5).resolved_max_job_bytes() == 5


def pretend_cuda(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """Lets torch say that the machine has `count` CUDA devices."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


@pytest.mark.parametrize(
    ("name", "count", "device"),
    [
        ("auto", 0, "cpu"),
        ("auto", 2, "cuda:0"),
        ("cpu", 2, "cpu"),
        ("cpu:0", 0, "cpu"),
        ("cuda", 1, "cuda:0"),
        ("cuda:1", 2, "cuda:1"),
    ],
)
def test_a_device_that_is_there_is_taken(monkeypatch: pytest.MonkeyPatch, name: str, count: int, device: str) -> None:
    """The first GPU where nobody says otherwise and there is one, else the CPU."""
    pretend_cuda(monkeypatch, count)
    assert ServerConfig(device=name).resolved_device() == torch.device(device)


@pytest.mark.parametrize(
    ("name", "count", "message"),
    [
        ("cuda", 0, "device cuda is not on this machine .it has no CUDA device."),
        ("cuda:2", 2, "device cuda:2 is not on this machine .it has cuda:0 to cuda:1."),
        ("mps", 0, "device mps is not supported"),
        ("meta", 0, "device meta is not supported"),
        ("gpu", 1, "'gpu' is not a device"),
        ("cuda:", 1, "'cuda:' is not a device"),
        ("", 1, "'' is not a device"),
    ],
)
def test_a_device_that_is_not_there_is_refused(
    monkeypatch: pytest.MonkeyPatch, name: str, count: int, message: str
) -> None:
    """With what is there instead."""
    pretend_cuda(monkeypatch, count)
    with pytest.raises(ConfigurationError, match=message):
        ServerConfig(device=name).resolved_device()
