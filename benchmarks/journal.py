"""What it costs to keep a job on disk: steps with a journal and without, in turns, and what limits them."""

from __future__ import annotations

import statistics
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch

from benchmarks import models
from benchmarks.disk import COSTS, raw_costs
from benchmarks.processes import ServerProcess, cpu_seconds, loopback_address, optimd_server
from benchmarks.timing import Contender, Times, take_turns
from optimd.client import Adam

OFF: Final = "off"
_FLAGS: Final[dict[str, tuple[str, ...]]] = {
    OFF: (),
    "log, fsync never": ("--durability=log", "--fsync=never"),
    "log, fsync interval": ("--durability=log", "--fsync=interval"),
    "log, fsync step": ("--durability=log", "--fsync=step"),
    "snapshot": ("--durability=snapshot",),
}
MARKS: Final = {"log, fsync never": 1.25, "log, fsync step": 1.6}
"""How much longer a step may take than without a data dir."""

STEPS: Final = 4
"""How many steps in a row are a turn: long enough for what a server does every second to fall into turns."""
SNAPSHOT_STEPS: Final = 8
"""After so many a server takes a snapshot, which is awaited before anything else is timed."""
WARMUP_STEPS: Final = 3 * SNAPSHOT_STEPS
"""By then there are two snapshots, and files of the journal that are used again."""

_SNAPSHOT_TIMEOUT_S: Final = 120.0
_POLL_S: Final = 0.002


@dataclass(frozen=True, slots=True, kw_only=True)
class Turns:
    """How often a model is stepped."""

    model: str
    rounds: int


FULL: Final = Turns(model="resnet50-26m", rounds=16)
QUICK: Final = Turns(model="decoder-10m", rounds=4)


@dataclass(frozen=True, slots=True, kw_only=True)
class JournalTimes:
    """What was measured. Dicts are by how the job is kept."""

    model: str
    parameters: int
    step_bytes: int
    """What a step's gradients take."""
    filesystem: str
    """What the data dirs are on."""
    times: dict[str, Times]
    """Of a step."""
    raw: dict[str, Times]
    """What a step's bytes take by themselves."""
    server_cpu_s: dict[str, float]
    """The mean of the processor time that a step takes of the server: steadier than a time where others compute too."""
    snapshot_s: dict[str, float]
    """The median of what snapshots took."""
    new_files: dict[str, int]
    """How many files of the journal were made, rather than used again, while steps were timed."""
    bit_equal: bool
    """Whether all jobs ended with the same parameters."""

    def ratio(self, mode: str) -> float:
        """What a step takes, in steps without a data dir."""
        return self.times[mode].median_s / self.times[OFF].median_s

    def holds(self, mode: str) -> bool | None:
        """Whether that is at most what it may be; None where there is no mark."""
        return self.ratio(mode) <= MARKS[mode] if mode in MARKS else None

    @property
    def missed(self) -> list[str]:
        """Where it is more."""
        return [mode for mode in self.times if self.holds(mode) is False]


class _Job:
    """One worker's job on a server of its own, which may keep it on disk.

    Args:
        model: What is trained.
        server: The server.
        data_dir: Where it keeps the job; None where it does not.
    """

    def __init__(self, model: str, server: ServerProcess, data_dir: Path | None) -> None:
        self.model = models.build(model)
        self.optimizer = Adam(self.model.parameters(), server=server.addresses[0], job="benchmark")
        self.cpu_s: list[float] = []
        self.snapshot_s: list[float] = []
        self._pid = server.pid
        self._data_dir = data_dir
        self._steps = 0
        self._snapshots: set[str] = set()
        self._files: set[int] = set()

    def contender(self, name: str) -> Contender:
        """Its turns."""
        return Contender(name, self._step, self._prepare, self._await_snapshot)

    def _prepare(self, number: int) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        models.compute_gradients(self.model, number)

    def _step(self) -> None:
        before_s = cpu_seconds(self._pid)
        for _ in range(STEPS):
            self.optimizer.step()
        self._steps += STEPS
        self.cpu_s.append((cpu_seconds(self._pid) - before_s) / STEPS)

    def _await_snapshot(self) -> None:
        """Waits for the snapshot that is due, if one is."""
        if self._data_dir is None or self._steps % SNAPSHOT_STEPS:
            return
        deadline = time.monotonic() + _SNAPSHOT_TIMEOUT_S
        begun: float | None = None
        while True:
            names = {path.name for path in self._data_dir.glob("jobs/*/snapshots/*")}
            if "making" in names:
                begun = begun or time.monotonic()
            elif names - self._snapshots:
                break
            if time.monotonic() > deadline:
                raise TimeoutError(f"no snapshot appeared in {self._data_dir} within {_SNAPSHOT_TIMEOUT_S:g} s")
            time.sleep(_POLL_S)
        self._snapshots = names
        if begun is not None:
            self.snapshot_s.append(time.monotonic() - begun)

    def new_files(self) -> int:
        """How many files its journal has that it did not have the last time. One may be called what another was."""
        folders = () if self._data_dir is None else self._data_dir.glob("jobs/*/journal/*")
        files = {path.stat().st_ino for path in folders}
        count = len(files - self._files)
        self._files |= files
        return count

    def forget(self) -> None:
        """What was measured so far does not count."""
        self.cpu_s.clear()
        self.snapshot_s.clear()
        self.new_files()


def measure(plan: Turns, folder: Path | None = None) -> JournalTimes:
    """Times steps of one worker over TCP loopback, with one torch thread in every process. Blocks.

    Args:
        plan: What is stepped, and how often.
        folder: Where data dirs are made; None for the system's temporary folder.

    Raises:
        TimeoutError: a server takes no snapshots.
    """
    torch.set_num_threads(1)
    with ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="optimd-bench-", dir=folder)))
        jobs: dict[str, _Job] = {}
        for number, (mode, flags) in enumerate(_FLAGS.items()):
            data_dir = None if mode == OFF else work / str(number)
            keeping = () if data_dir is None else (f"--data-dir={data_dir}", f"--snapshot-steps={SNAPSHOT_STEPS}")
            server = stack.enter_context(optimd_server(loopback_address(), *flags, *keeping))
            jobs[mode] = _Job(plan.model, server, data_dir)
            stack.callback(jobs[mode].optimizer.close)
        contenders = [job.contender(mode) for mode, job in jobs.items()]
        first = jobs[OFF].model
        parameters = models.parameter_count(first)
        step_bytes = parameters * torch.float32.itemsize
        raw = stack.enter_context(raw_costs(work, step_bytes))
        take_turns(contenders, warmups=0, rounds=WARMUP_STEPS // STEPS)
        for job in jobs.values():
            job.forget()
        times = take_turns([*contenders, *raw], warmups=0, rounds=plan.rounds)
        return JournalTimes(
            model=plan.model,
            parameters=parameters,
            step_bytes=step_bytes,
            filesystem=_filesystem_of(work),
            times={mode: times[mode].split(STEPS) for mode in jobs},
            raw={name: times[name] for name in COSTS},
            server_cpu_s={mode: statistics.mean(job.cpu_s) for mode, job in jobs.items()},
            snapshot_s={mode: statistics.median(job.snapshot_s) for mode, job in jobs.items() if job.snapshot_s},
            new_files={mode: job.new_files() for mode, job in jobs.items()},
            bit_equal=all(models.bit_equal(first, job.model) for job in jobs.values()),
        )


def _filesystem_of(folder: Path) -> str:
    """The type of the file system that a folder is on; empty where the system does not say."""
    try:
        lines = Path("/proc/self/mounts").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    mounts = {line.split()[1]: line.split()[2] for line in lines}
    return next(
        (mounts[str(path)] for path in (folder.resolve(), *folder.resolve().parents) if str(path) in mounts), ""
    )
