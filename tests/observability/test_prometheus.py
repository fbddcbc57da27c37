"""The dashboard and the alert rules, asked of a real Prometheus that watches a server at work."""

from __future__ import annotations

import json
import re
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from optimd.client import Adam, Async, OptimdError, ProxyOptions, Sync
from optimd.server import Server
from tests.observability.prometheus import Prometheus, program, running_prometheus
from tests.support import ROOT, eventually, running_server

DASHBOARD = ROOT / "deploy" / "grafana" / "dashboards" / "optimd.json"
RULES = ROOT / "deploy" / "prometheus" / "alerts.yml"

QUIET = {
    "optimd_device_memory_bytes": "there is no GPU",
    "optimd_device_utilization_ratio": "there is no GPU",
}
"""What has no data here, and why."""


@pytest.fixture(scope="module")
def tools(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tools")


def panels() -> list[tuple[str, str]]:
    """The title and the expression of everything that the dashboard draws."""
    dashboard = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    return [(panel["title"], target["expr"]) for panel in dashboard["panels"] for target in panel.get("targets", ())]


def train(server: Server, job: str, rank: int, world_size: int, stop: threading.Event, policy: Sync | Async) -> None:
    """One worker's steps until it is told to stop. Without the last of them others would wait: it leaves."""
    p = nn.Parameter(torch.randn(20_000))
    options = ProxyOptions(rank=rank, world_size=world_size, worker_id=f"worker-{rank}", aggregation=policy)
    with Adam([p], server=server.address, job=job, options=options) as optimizer:
        while not stop.is_set():
            p.grad = torch.randn(20_000)
            try:
                optimizer.step()
            except OptimdError:
                # The other one has left.
                return
            time.sleep(0.01)


def be_refused(server: Server, stop: threading.Event) -> None:
    """Somebody who keeps asking for what he is not given."""
    options = ProxyOptions(rank=5, world_size=6, on_existing="fail")
    while not stop.wait(0.5):
        with pytest.raises(OptimdError):
            Adam([nn.Parameter(torch.ones(1))], server=server.address, job="sync", options=options)


@pytest.fixture(scope="module")
def watched(tools: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Prometheus]]:
    """A server with a synchronous and an asynchronous job at work, and a Prometheus that has watched it for a while."""
    binary = program("prometheus", tools)
    folder = tmp_path_factory.mktemp("prometheus")
    stop = threading.Event()
    with running_server(metrics_address="127.0.0.1:0", data_dir=str(folder / "jobs"), snapshot_s=2.0) as server:
        threads = [
            threading.Thread(target=train, args=(server, job, rank, 2, stop, policy))
            for job, policy in (("sync", Sync()), ("async", Async(max_staleness=2)))
            for rank in range(2)
        ]
        for thread in threads:
            thread.start()
        config = folder / "prometheus.yml"
        config.write_text(
            (ROOT / "deploy" / "prometheus" / "prometheus.yml")
            .read_text(encoding="utf-8")
            .replace("server:9464", server.metrics_address)
            .replace("5s", "1s")
            .replace("alerts.yml", str(RULES)),
            encoding="utf-8",
        )
        try:
            with running_prometheus(binary, config, folder) as prometheus:
                _break_lines(server)
                threads.append(threading.Thread(target=be_refused, args=(server, stop)))
                threads[-1].start()
                assert eventually(lambda: len(prometheus.query("optimd_steps_total[20s]")) > 0, 30)
                # Long enough for a rate over several scrapes.
                assert eventually(lambda: _scrapes(prometheus) >= 12, 60)
                yield server, prometheus
        finally:
            stop.set()
            for thread in threads:
                thread.join(60)
            assert not any(thread.is_alive() for thread in threads)


def _scrapes(prometheus: Prometheus) -> float:
    found = prometheus.query('count_over_time(up{job="optimd"}[1m])')
    return float(found[0]["value"][1]) if found else 0.0


def _break_lines(server: Server) -> None:
    """Ends workers' streams in the middle of what they do, so that pushes go on where they were."""
    for _ in range(20):
        for job in server.registry.all():
            for member in job.members():
                member.cancel()
        time.sleep(0.1)


def test_every_expression_of_the_dashboard_has_data(watched: tuple[Server, Prometheus]) -> None:
    """Or is known to have none here."""
    _, prometheus = watched
    found = panels()
    assert len(found) > 30
    silent = []
    for title, expression in found:
        asked = expression.replace("$__rate_interval", "10s").replace("$job_name", ".*")
        if not prometheus.query(asked):
            silent.append((title, expression))
    assert {expression for _, expression in silent} == QUIET.keys(), silent


def test_what_is_measured_is_what_happened(watched: tuple[Server, Prometheus]) -> None:
    """Steps, workers and sizes are those of the jobs; quantiles are of numbers."""
    server, prometheus = watched
    for name in ("sync", "async"):
        (step,) = prometheus.query(f'optimd_job_step{{job_name="{name}"}}')
        assert 0 < float(step["value"][1]) <= server.registry.get(name).step
        (workers,) = prometheus.query(f'sum(optimd_workers{{job_name="{name}"}})')
        assert float(workers["value"][1]) == 2
        (values,) = prometheus.query(f'optimd_memory_bytes{{job_name="{name}", kind="values"}}')
        assert float(values["value"][1]) == 80_000
        (quantile,) = prometheus.query(
            f'histogram_quantile(0.5, sum by (le) (rate(optimd_step_seconds_bucket{{job_name="{name}"}}[10s])))'
        )
        assert 0 < float(quantile["value"][1]) < 60
    (merged,) = prometheus.query('optimd_pushes_total{job_name="sync", outcome="merged"}')
    assert float(merged["value"][1]) > 0
    (resumed,) = prometheus.query("sum(optimd_pushes_resumed_total + optimd_pushes_deduplicated_total)")
    assert float(resumed["value"][1]) > 0
    (refused,) = prometheus.query('optimd_failed_calls_total{reason="job_exists"}')
    assert float(refused["value"][1]) >= 1


def test_every_alert_rule_is_sound_and_asks_for_what_there_is(watched: tuple[Server, Prometheus]) -> None:
    """Prometheus has evaluated each without an error; the metrics that they name are all there."""
    _, prometheus = watched
    assert eventually(lambda: all(rule["health"] == "ok" for rule in _rules(prometheus)))
    rules = _rules(prometheus)
    assert len(rules) == RULES.read_text(encoding="utf-8").count("- alert:")
    assert [
        rule["name"] for rule in rules if rule["state"] == "firing" and rule["labels"]["severity"] == "critical"
    ] == []
    known = set(prometheus.get("label/__name__/values"))
    for rule in rules:
        names = set(re.findall(r"\b(?:optimd|process)_[a-z_]+", rule["query"]))
        assert names <= known, rule["name"]


def _rules(prometheus: Prometheus) -> list[dict[str, Any]]:
    (group,) = prometheus.get("rules")["groups"]
    return list(group["rules"])


def test_each_alert_fires_when_it_should_and_else_does_not(tools: Path) -> None:
    """By promtool, which plays what the metrics would say in such a case."""
    cases = ROOT / "tests" / "observability" / "alert_cases.yml"
    ended = subprocess.run(
        [program("promtool", tools), "test", "rules", str(cases)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    alerts = set(re.findall(r"- alert: (\w+)", RULES.read_text(encoding="utf-8")))
    assert alerts == set(re.findall(r"alertname: (\w+)", cases.read_text(encoding="utf-8")))


def test_operations_says_what_to_do_about_each_alert() -> None:
    """An alert without a remedy wakes somebody for nothing."""
    page = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    for alert in re.findall(r"- alert: (\w+)", RULES.read_text(encoding="utf-8")):
        assert alert in page
