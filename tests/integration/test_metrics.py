"""The page that Prometheus reads."""

from __future__ import annotations

import shutil
import urllib.request
from pathlib import Path

import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families
from torch import nn

from optimd.client import Adam, ProxyOptions
from optimd.server import Server, ServerConfig
from optimd.server.errors import ConfigurationError
from tests.command import optimd
from tests.support import ROOT, running_server

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def read(server: Server) -> Samples:
    """All samples, by name and labels."""
    with urllib.request.urlopen(f"http://{server.metrics_address}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def of(samples: Samples, name: str, **labels: str) -> float:
    return samples[name, frozenset(labels.items())]


def steps(server: Server, count: int, job: str = "j") -> Samples:
    p = nn.Parameter(torch.ones(1000))
    with Adam([p], server=server.address, job=job, options=ProxyOptions(rank=0, world_size=1)) as optimizer:
        for _ in range(count):
            p.grad = torch.ones(1000)
            optimizer.step()
        return read(server)


def test_a_job_is_counted_as_it_trains_and_gone_when_it_is_deleted(tmp_path: Path) -> None:
    """What is kept on disk, too; a deleted job's series end."""
    with running_server(metrics_address="127.0.0.1:0", data_dir=str(tmp_path)) as server:
        samples = steps(server, 5)
        assert of(samples, "optimd_steps_total", job_name="j") == 5
        assert of(samples, "optimd_job_step", job_name="j") == 5
        assert of(samples, "optimd_pushes_total", job_name="j", outcome="applied") == 5
        assert of(samples, "optimd_step_seconds_count", job_name="j") == 5
        assert of(samples, "optimd_bucket_seconds_count", job_name="j") == 5
        assert of(samples, "optimd_workers", job_name="j", state="connected") == 1
        assert of(samples, "optimd_memory_bytes", job_name="j", kind="state") == 8000
        assert of(samples, "optimd_received_bytes_total", job_name="j") > 5 * 4000
        assert of(samples, "optimd_sent_bytes_total", job_name="j") > 5 * 4000
        assert of(samples, "optimd_journal_bytes_total", job_name="j") > 5 * 4000
        assert of(samples, "optimd_journal_sync_seconds_count", job_name="j") >= 5
        server.registry.snapshot("j")
        samples = steps(server, 2)
        assert of(samples, "optimd_steps_total", job_name="j") == 7
        assert of(samples, "optimd_snapshot_step", job_name="j") == 5
        assert (
            0
            < of(samples, "optimd_journal_replay_bytes", job_name="j")
            < of(samples, "optimd_journal_bytes_total", job_name="j")
        )
        server.registry.delete("j", force=False)
        assert not any("job_name" in dict(labels) for _, labels in read(server))


def test_a_server_without_a_data_dir_says_nothing_of_one() -> None:
    """What cannot be is not zero."""
    with running_server(metrics_address="127.0.0.1:0") as server:
        assert not any(name.startswith(("optimd_journal", "optimd_snapshot")) for name, _ in steps(server, 1))


def test_every_metric_is_on_the_page_for_operators(tmp_path: Path) -> None:
    """And nothing is there that is not measured."""
    page = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    with running_server(metrics_address="127.0.0.1:0", data_dir=str(tmp_path)) as server:
        steps(server, 1)
        server.registry.snapshot("j")
        names = {name.removesuffix("_bucket").removesuffix("_count").removesuffix("_sum") for name, _ in read(server)}
    ours = {name for name in names if name.startswith("optimd_")} - {"optimd_info", "optimd_jobs"}
    assert {name for name in ours if f"`{name}" not in page} == set()


def test_an_address_that_is_taken_is_one_sentence_and_status_2() -> None:
    """With the flag to choose another."""
    with running_server(metrics_address="127.0.0.1:0") as server:
        status, output = optimd("serve", "--address=127.0.0.1:0", f"--metrics-address={server.metrics_address}")
        assert (status, output.count("\n")) == (2, 1)
        assert "address already in use; choose another with --metrics-address" in output


def test_an_address_that_is_none_is_refused() -> None:
    """Before anything is started."""
    with pytest.raises(ConfigurationError, match="'9464' is not an address; write host:port"):
        ServerConfig(metrics_address="9464")


def test_what_a_restart_replays_is_not_counted_again(tmp_path: Path) -> None:
    """A counter that begins anew is added up by whoever reads it: those pushes would be there twice."""
    settings = {"metrics_address": "127.0.0.1:0", "data_dir": str(tmp_path), "snapshot_s": 0.0}
    crashed = tmp_path.with_name("crashed")
    with running_server(**settings) as server:
        steps(server, 5)
        # As it would be found after a crash: without the snapshot of an orderly end.
        shutil.copytree(tmp_path, crashed)
    with running_server(**{**settings, "data_dir": str(crashed)}) as server:
        samples = read(server)
        assert of(samples, "optimd_job_step", job_name="j") == 5
        assert of(samples, "optimd_journal_replay_bytes", job_name="j") > 5 * 4000
        for name in ("optimd_steps_total", "optimd_staleness_steps_count", "optimd_step_seconds_count"):
            assert of(samples, name, job_name="j") == 0, name
        assert of(samples, "optimd_pushes_total", job_name="j", outcome="applied") == 0


@pytest.mark.gpu
def test_a_gpus_memory_and_use_are_told() -> None:
    """The use only with NVIDIA's management library, which is no dependency."""
    pytest.importorskip("pynvml")
    with running_server(metrics_address="127.0.0.1:0", device="cuda:0") as server:
        samples = steps(server, 3)
        total = of(samples, "optimd_device_memory_bytes", device="cuda:0", kind="total")
        used = of(samples, "optimd_device_memory_bytes", device="cuda:0", kind="used")
        assert 0 < of(samples, "optimd_device_memory_bytes", device="cuda:0", kind="allocated") <= used <= total
        assert 0 <= of(samples, "optimd_device_utilization_ratio", device="cuda:0") <= 1
