"""Programs nobody thought of: whatever a worker does, each server that is started on its disk has what torch has."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from optimd.client import ProxyOptions
from tests.faultfiles import Operation
from tests.keptjobs import Mirror, Point, assert_is_one_of, recovered
from tests.lives import Lives

ACTS = (
    "step",
    "step",
    "step without",
    "accumulate",
    "write",
    "add group",
    "load",
    "snapshot",
    "recover",
    "recover in mid-act",
    "recover in mid-act",
    "die",
    "die in mid-act",
)


class Play:
    """One program, as it goes.

    Args:
        lives: The server.
        folder: Where copies of the data dir go.
        apply: How steps are applied.
        wire: What gradients and parameters are narrowed to on their way.
    """

    def __init__(self, lives: Lives, folder: Path, apply: str, wire: torch.dtype | None) -> None:
        self._lives = lives
        self._folder = folder
        options = ProxyOptions(bucket_bytes=1024, apply=apply, wire_dtype=wire)
        self.mirror = Mirror(lives.address, options=options)
        self._copies: list[tuple[Path, list[Point]]] = []

    def act(self, act: str, seed: int) -> None:
        mirror = self.mirror
        match act:
            case "step":
                mirror.step(seed)
            case "step without":
                mirror.step(seed, without=(seed % 3, 3))
            case "accumulate":
                mirror.accumulate(seed)
            case "write":
                mirror.write()
            case "add group":
                mirror.add_group(seed, (1 + seed % 200, 2))
            case "load":
                mirror.load()
            case "snapshot":
                self._lives.server.registry.snapshot("job")
            case "recover":
                self._copy()
            case "die":
                self._lives.die_and_resume()

    def act_and_recover_in_the_middle(self, act: str, seed: int, calls: int) -> None:
        """Looks at what is on the disk behind so many writes."""
        left = [calls]

        def observe(operation: Operation, _: Path) -> None:
            if operation == "write_some":
                left[0] -= 1
                if left[0] == 0:
                    self._copy()

        self._lives.files.observe = observe
        try:
            self.act(act, seed)
        finally:
            self._lives.files.observe = lambda *_: None

    def act_and_die_in_the_middle(self, act: str, seed: int, calls: int) -> None:
        death = self._lives.die_behind(calls)
        try:
            self.act(act, seed)
        finally:
            death.join()

    def _copy(self) -> None:
        target = self._folder / str(len(self._copies))
        with self._lives.files.still():
            shutil.copytree(self._lives.data_dir, target)
            self._copies.append((target, self.mirror.allowed()))

    def check(self) -> None:
        for path, allowed in self._copies:
            with recovered(path, fsync="never") as jobs:
                assert_is_one_of(jobs["job"], allowed)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    apply=st.sampled_from(("streaming", "atomic")),
    wire=st.sampled_from((None, torch.bfloat16)),
    segment_bytes=st.sampled_from((700, 5000, 1 << 20)),
    acts=st.lists(st.tuples(st.sampled_from(ACTS), st.integers(0, 1000), st.integers(1, 6)), min_size=4, max_size=14),
)
def test_each_server_that_is_started_on_a_jobs_disk_has_what_torch_has(
    apply: str,
    wire: torch.dtype | None,
    segment_bytes: int,
    acts: list[tuple[str, int, int]],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """Between two acts and in the middle of one; and the worker goes on with it."""
    folder = tmp_path_factory.mktemp("play")
    (folder / "copies").mkdir()
    with Lives(folder, fsync="never", journal_segment_bytes=segment_bytes) as lives:
        play = Play(lives, folder / "copies", apply, wire)
        try:
            pending: tuple[str, int] | None = None
            for act, seed, calls in acts:
                if act.endswith("in mid-act"):
                    # Of the next act that writes.
                    pending = act, calls
                    continue
                if pending is None or act in ("write", "snapshot", "recover", "die"):
                    play.act(act, seed)
                    continue
                (how, moment), pending = pending, None
                if how.startswith("die"):
                    play.act_and_die_in_the_middle(act, seed, moment)
                else:
                    play.act_and_recover_in_the_middle(act, seed, moment)
            play.act("recover", 0)
            play.act("step", 7)
            play.act("recover", 0)
        finally:
            play.mirror.close()
        play.check()
    shutil.rmtree(folder)
