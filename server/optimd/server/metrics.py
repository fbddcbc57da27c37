"""A server's metrics as Prometheus reads them: what is counted and what stands, asked for whenever it comes.

Needs prometheus-client, which `optimd[server]` installs.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib.metadata import version
from itertools import accumulate
from typing import Any, Final
from wsgiref.simple_server import WSGIServer

import torch
from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector, start_http_server
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from optimd.server.config import host_of, port_of
from optimd.server.errors import ConfigurationError
from optimd.server.job import Job
from optimd.server.measures import Histogram
from optimd.server.storage import Storage

# Not "job": that is what Prometheus calls what it scrapes.
_JOB: Final = ("job_name",)
_WORKER: Final = ("job_name", "worker", "rank")


class ServerCollector(Collector):
    """Asks a server's jobs for what they have counted. Waits for no job's lock for long: reads what may be read.

    Args:
        jobs: Gives the jobs.
        device: Where their tensors are.
        failures: Gives how many calls have ended with each reason.
        storage: Where jobs are kept, if they are.
    """

    def __init__(
        self,
        jobs: Callable[[], Sequence[Job]],
        device: torch.device,
        failures: Callable[[], Mapping[str, int]],
        storage: Storage | None,
    ) -> None:
        self._jobs = jobs
        self._device = device
        self._failures = failures
        self._storage = storage

    def describe(self) -> Iterable[Metric]:
        """Nothing: it need not be asked before anybody reads it."""
        return ()

    def collect(self) -> Iterator[Metric]:
        """All metrics as they are now."""
        jobs = self._jobs()
        yield InfoMetricFamily(
            "optimd",
            "What the server is.",
            value={"version": version("optimd"), "torch": torch.__version__, "device": str(self._device)},
        )
        yield GaugeMetricFamily("optimd_jobs", "Jobs that the server holds.", value=len(jobs))
        failures = CounterMetricFamily(
            "optimd_failed_calls",
            "Calls that were refused, or failed, by reason.",
            labels=("reason",),
        )
        for reason, count in sorted(self._failures().items()):
            failures.add_metric((reason.lower(),), count)
        yield failures
        yield from _steps(jobs)
        yield from _timings(jobs)
        yield from _workers(jobs)
        if self._storage is not None:
            yield from _durability(jobs, self._storage)
        yield from _memory(jobs)
        if self._device.type == "cuda":
            yield from _gpu(self._device)


def _durability(jobs: Sequence[Job], storage: Storage) -> Iterator[Metric]:
    written = CounterMetricFamily("optimd_journal_bytes", "Bytes written to a job's journal, ever.", labels=_JOB)
    replayed = GaugeMetricFamily("optimd_journal_replay_bytes", "Bytes that a restart would replay.", labels=_JOB)
    syncs = HistogramMetricFamily(
        "optimd_journal_sync_seconds", "How long what was to be acknowledged has waited for the disk.", labels=_JOB
    )
    stuck = GaugeMetricFamily(
        "optimd_journal_stuck", "1 while a job waits for its journal to be writable again, else 0.", labels=_JOB
    )
    age = GaugeMetricFamily(
        "optimd_snapshot_age_seconds",
        "Age of a job's last snapshot; while it has none, since when the job is here.",
        labels=_JOB,
    )
    yield GaugeMetricFamily(
        "optimd_snapshot_interval_seconds", "How often snapshots are taken; 0: not by time.", value=storage.snapshot_s
    )
    took = GaugeMetricFamily("optimd_snapshot_seconds", "How long that took to write.", labels=_JOB)
    step = GaugeMetricFamily("optimd_snapshot_step", "The job step that it is of.", labels=_JOB)
    for job in jobs:
        label = (job.name,)
        if job.journal.is_kept:
            written.add_metric(label, job.journal.position)
            replayed.add_metric(label, storage.replay_bytes(job))
            stuck.add_metric(label, bool(job.journal.trouble))
            _add_histogram(syncs, label, job.journal.sync_seconds)
        told = storage.last_snapshot(job)
        age.add_metric(label, job.measures.age_s if told is None else told.age_s)
        if told is not None:
            took.add_metric(label, told.took_s)
            step.add_metric(label, told.step)
    yield from (written, replayed, syncs, stuck, age, took, step)


def _steps(jobs: Sequence[Job]) -> Iterator[Metric]:
    step = GaugeMetricFamily("optimd_job_step", "Steps that a job has committed, ever.", labels=_JOB)
    steps = CounterMetricFamily("optimd_steps", "Steps that it has committed on this server.", labels=_JOB)
    pushes = CounterMetricFamily(
        "optimd_pushes", "Workers' pushes by what became of them.", labels=("job_name", "outcome")
    )
    resumed = CounterMetricFamily("optimd_pushes_resumed", "Pushes that went on after a broken line.", labels=_JOB)
    deduplicated = CounterMetricFamily(
        "optimd_pushes_deduplicated", "Pushes that came again after they had been answered.", labels=_JOB
    )
    received = CounterMetricFamily("optimd_received_bytes", "Bytes from workers, in shared memory too.", labels=_JOB)
    sent = CounterMetricFamily("optimd_sent_bytes", "Bytes to workers, in shared memory too.", labels=_JOB)
    for job in jobs:
        label, measures = (job.name,), job.measures
        step.add_metric(label, job.step)
        steps.add_metric(label, measures.steps)
        for outcome, count in measures.outcomes.items():
            pushes.add_metric((job.name, outcome.name.lower()), count)
        resumed.add_metric(label, measures.resumed)
        deduplicated.add_metric(label, measures.deduplicated)
        came, went = measures.bytes_transferred
        received.add_metric(label, came)
        sent.add_metric(label, went)
    yield from (step, steps, pushes, resumed, deduplicated, received, sent)


def _timings(jobs: Sequence[Job]) -> Iterator[Metric]:
    steps = HistogramMetricFamily(
        "optimd_step_seconds", "From the begin of a push to its receipt, with waits for other workers.", labels=_JOB
    )
    buckets = HistogramMetricFamily(
        "optimd_bucket_seconds", "What a bucket of gradients took once it was here, journal included.", labels=_JOB
    )
    staleness = HistogramMetricFamily(
        "optimd_staleness_steps", "Steps committed between a worker's pull and the use of its push.", labels=_JOB
    )
    for job in jobs:
        _add_histogram(steps, (job.name,), job.measures.step_seconds)
        _add_histogram(buckets, (job.name,), job.measures.bucket_seconds)
        _add_histogram(staleness, (job.name,), job.measures.staleness_steps)
    yield from (steps, buckets, staleness)


def _workers(jobs: Sequence[Job]) -> Iterator[Metric]:
    workers = GaugeMetricFamily("optimd_workers", "Workers that are in a job.", labels=("job_name", "state"))
    lag = GaugeMetricFamily(
        "optimd_worker_lag_pushes", "How many pushes a worker is ahead of the slowest.", labels=_WORKER
    )
    silent = GaugeMetricFamily("optimd_worker_silent_seconds", "Since when it was not heard of.", labels=_WORKER)
    lease = GaugeMetricFamily("optimd_lease_seconds", "How long it may be silent and stays in the job.", labels=_JOB)
    waited = CounterMetricFamily(
        "optimd_worker_wait_seconds", "How long it has waited for others, its own push complete.", labels=_WORKER
    )
    lost = CounterMetricFamily("optimd_workers_lost", "Workers whose leases have ended.", labels=_JOB)
    backup = GaugeMetricFamily(
        "optimd_job_backup_workers", "How many pushes of each step are dropped by design.", labels=_JOB
    )
    for job in jobs:
        members = job.members()
        connected = sum(member.alive for member in members)
        workers.add_metric((job.name, "connected"), connected)
        workers.add_metric((job.name, "broken"), len(members) - connected)
        workers.add_metric((job.name, "lost"), len(job.awaited_absent()))
        lease.add_metric((job.name,), job.lease_s)
        for member in members:
            label = (job.name, member.worker.worker_id, str(member.worker.rank))
            lag.add_metric(label, job.lag(member))
            silent.add_metric(label, member.silent_s)
            waited.add_metric(label, member.waits.total_s)
        lost.add_metric((job.name,), job.measures.lost)
        backup.add_metric((job.name,), job.settings.backup_workers)
    yield from (workers, lag, silent, lease, waited, lost, backup)


def _memory(jobs: Sequence[Job]) -> Iterator[Metric]:
    memory = GaugeMetricFamily("optimd_memory_bytes", "What a job takes, by kind.", labels=("job_name", "kind"))
    for job in jobs:
        memory.add_metric((job.name, "values"), job.store.value_bytes)
        memory.add_metric((job.name, "state"), job.store.state_bytes)
        memory.add_metric((job.name, "buffers"), job.buffers_bytes)
        memory.add_metric((job.name, "held"), sum(member.held_bytes for member in job.members()))
    yield memory


def _gpu(device: torch.device) -> Iterator[Metric]:
    memory = GaugeMetricFamily("optimd_device_memory_bytes", "The GPU's memory.", labels=("device", "kind"))
    free, total = torch.cuda.mem_get_info(device)
    for kind, nbytes in (("used", total - free), ("total", total), ("allocated", torch.cuda.memory_allocated(device))):
        memory.add_metric((str(device), kind), nbytes)
    yield memory
    try:
        percent = torch.cuda.utilization(device)
    except (ModuleNotFoundError, RuntimeError, AttributeError):
        # Needs NVIDIA's management library, which torch does not bring.
        return
    busy = GaugeMetricFamily("optimd_device_utilization_ratio", "How much of the time it is busy.", labels=("device",))
    busy.add_metric((str(device),), percent / 100)
    yield busy


def _add_histogram(family: HistogramMetricFamily, labels: Sequence[str], histogram: Histogram) -> None:
    counts, total = histogram.counts()
    ends = [*(f"{bound:g}" for bound in histogram.bounds), "+Inf"]
    family.add_metric(labels, list(zip(ends, accumulate(counts), strict=True)), sum_value=total)


class MetricsServer:
    """Answers Prometheus at an address, in threads of its own.

    Args:
        address: "host:port".
        collector: What it tells.

    Raises:
        ConfigurationError: the address cannot be bound.
    """

    def __init__(self, address: str, collector: ServerCollector) -> None:
        registry = CollectorRegistry(auto_describe=False)
        for each in (ProcessCollector, PlatformCollector, GCCollector):
            each(registry=registry)
        registry.register(collector)
        try:
            self._server, self._thread = _start(port_of(address), host_of(address), registry)
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            raise ConfigurationError(
                f"cannot serve metrics at {address}: {reason}; choose another with --metrics-address"
            ) from error
        self.address = f"{address.rpartition(':')[0]}:{self._server.server_port}"

    def stop(self) -> None:
        """Stops answering."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def _start(port: int, host: str, registry: CollectorRegistry) -> tuple[WSGIServer, threading.Thread]:
    started: Any = start_http_server(port, host, registry)
    server, thread = started
    return server, thread
