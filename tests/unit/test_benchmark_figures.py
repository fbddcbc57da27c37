"""What the benchmark makes of its measurements."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import models, report
from benchmarks.link import ATOMIC, OVERLAPPED, RAW, LinkTimes, OverlapTimes
from benchmarks.marks import Mark, marks
from benchmarks.memory import MB, MemoryUse, Peak
from benchmarks.peers import LOCAL, GlooServer, Optimd
from benchmarks.peers.backward import ALONE
from benchmarks.step_time import MIDDLE, ONE_WORKER, SMALL, StepTimes
from benchmarks.timing import Contender, Times, take_turns

SHM, UNIX, TCP = (Optimd(transport=transport).name for transport in ("shm", "unix", "tcp"))
N = 25_000_000


def with_times(model: str, workers: int, milliseconds: dict[str, float]) -> StepTimes:
    times = {name: Times(3, taken / 1e3, taken / 1e3, taken / 1e3) for name, taken in milliseconds.items()}
    return StepTimes(model=model, parameters=N, tensors=161, workers=workers, times=times)


def marked(all_marks: list[Mark], beginning: str) -> Mark:
    (mark,) = [mark for mark in all_marks if mark.figure.startswith(beginning)]
    return mark


def peaks(workers: int, server_mb: float, worker_mb: float) -> MemoryUse:
    def peak(role: str, megabytes: float, tensors: int) -> Peak:
        return Peak(role=role, bytes=round(megabytes * MB), parameters=N, tensor_bytes=tensors * N)

    return MemoryUse(
        model=MIDDLE,
        parameters=N,
        workers=workers,
        transport="grpc",
        steps=4,
        baseline_bytes=0,
        server=peak("server", server_mb, 12),
        workers_peaks=[peak(f"worker {rank}", worker_mb, 8) for rank in range(workers)],
        local=None,
    )


def test_marks_are_ratios_of_medians_of_one_suite() -> None:
    """Of shared memory: twice the local step holds, and is not what is aimed at; more than half of gloo's does not."""
    found = marks([with_times(MIDDLE, 1, {LOCAL: 20, SHM: 40, GlooServer().name: 70})], None, [])
    local = marked(found, "shm step / local")
    assert (local.value, local.holds, local.aimed) == (2.0, True, False)
    gloo = marked(found, "shm step / gloo")
    assert gloo.value == pytest.approx(4 / 7)
    assert gloo.holds is False


def test_the_echo_that_counts_is_the_fastest_of_all_message_sizes() -> None:
    """The mark's base is the best that the line can do."""
    echoes = {"raw grpcio echo, TCP, 1 MiB": 100, "raw grpcio echo, TCP, 2 MiB": 80, "raw grpcio echo, TCP, 4 MiB": 90}
    found = marks([with_times(MIDDLE, 1, {LOCAL: 20, TCP: 120, **echoes})], None, [])
    assert marked(found, "TCP fp32 step").value == pytest.approx(1.5)


def test_what_was_not_measured_neither_holds_nor_fails() -> None:
    """A run without root, or of one part alone, reports no marks of what it left out."""
    found = marks([with_times(SMALL, 1, {LOCAL: 1, UNIX: 2})], None, [])
    assert {mark.holds for mark in found} == {None}


def test_four_workers_move_four_times_the_bytes() -> None:
    """Per byte, four workers that take four times as long are as fast as one."""
    found = marks([with_times(MIDDLE, 4, {LOCAL: 20, TCP: 400, f"{TCP}{ONE_WORKER}": 100})], None, [])
    assert marked(found, "4 workers").value == pytest.approx(1.0)


def test_memory_marks_grow_with_the_model() -> None:
    """13 bytes a parameter and 100 MB for one worker, 17 and 150 for four."""
    found = marks([], None, [peaks(1, 424, 263), peaks(4, 576, 263)])
    one = marked(found, "server memory, 1 worker, grpc")
    assert (one.must, one.aim, one.holds, one.aimed) == (425, 376.5, True, False)
    four = marked(found, "server memory, 4 workers, grpc")
    assert (four.must, four.holds) == (575, False)
    worker = marked(found, "worker memory")
    assert (worker.value, worker.holds, worker.aimed) == (63, True, False)


def test_overlap_is_what_a_step_takes_beyond_the_backward() -> None:
    """1 s of backward: 0.3 s beyond it with overlap, 0.5 s without."""
    taken = {ALONE: 1000, ATOMIC.name: 1500, OVERLAPPED.name: 1300}
    overlap = OverlapTimes(model=MIDDLE, multiplications=1, upload_s=1.0, times=with_times(MIDDLE, 1, taken).times)
    line = LinkTimes(steps=with_times(MIDDLE, 1, {RAW: 100, TCP: 110}), arithmetic_s=0.1, overlap=overlap)
    found = marks([], line, [])
    assert marked(found, "1 Gbit/s: beyond").value == pytest.approx(0.6)
    assert marked(found, "1 Gbit/s, fp32").value == pytest.approx(1.1)


def test_figures_are_plain_values() -> None:
    """What `--json` writes can be read by any program, with ratios and marks in it."""
    steps = [with_times(MIDDLE, 1, {LOCAL: 20, SHM: 30})]
    written = json.loads(json.dumps(report.as_json(steps, None, [peaks(1, 400, 250)], [], marks(steps, None, []))))
    assert [*written] == ["environment", "step_time", "link", "memory", "marks", "journal"]
    assert written["step_time"][0]["ratio_to_local"] == {LOCAL: 1.0, SHM: 1.5}
    assert written["marks"][0] == {
        "figure": "shm step / local fused Adam step",
        "must": 2.0,
        "aim": 1.3,
        "value": 1.5,
        "unit": "x",
        "holds": True,
        "aimed": False,
    }
    assert written["memory"][0]["server"]["bytes"] == 400 * MB


def test_figures_replace_those_of_a_page(tmp_path: Path) -> None:
    """What stands around them stays, and writing twice leaves one copy."""
    page = tmp_path / "page.md"
    page.write_text(f"before\n\n{report.BEGIN}\nold\n{report.END}\n\nbehind\n")
    for title in ("first", "second"):
        report.write_into(page, [report.Table(title, ("", "ms"), [("a", "1")])])
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("behind\n")
    assert "| a | 1 |" in text
    assert text.count("**second**") == 1
    assert "old" not in text
    assert "first" not in text


def test_a_page_without_a_place_for_figures_is_left_alone(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("nothing")
    with pytest.raises(ValueError, match="no place for figures"):
        report.write_into(page, [])
    assert page.read_text() == "nothing"


def test_contenders_take_turns_on_the_same_steps() -> None:
    """Each runs once a round, prepared with the same numbers; who times itself is believed."""
    prepared: dict[str, list[int]] = {"a": [], "b": []}
    contenders = [Contender(name, lambda: 2.0, prepared[name].append) for name in prepared]
    times = take_turns(contenders, warmups=1, rounds=3, in_a_row=2)
    assert prepared["a"] == prepared["b"] == [*range(8)]
    assert times["a"] == Times(3, 2.0, 2.0, 2.0)


def test_models_have_the_tensors_of_real_ones() -> None:
    """At least 150, but for the one that is about round trips."""
    for name in models.NAMES:
        assert len(models._SHAPES[name]()) >= 150 or name == SMALL


def test_means_of_workers_gradients_are_exact() -> None:
    """In whatever order four workers' gradients are added up, the mean is the one that the local Adam is given."""
    ranks = range(4)
    for step in range(20):
        single = [models._factor(step, 3, (rank,)) for rank in ranks]
        assert len(set(single)) > 1
        assert sum(single) / 4 == sum(reversed(single)) / 4 == models._factor(step, 3, ranks)


def test_a_paced_backward_has_exact_gradients() -> None:
    """What it computes besides is a permutation: every gradient is what it is without."""
    plain, paced = (models.Model([(3, 5), (7,)], multiplications) for multiplications in (0, 9))
    for model in (plain, paced):
        models.compute_gradients(model, 2)
    for one, other in zip(plain.parameters(), paced.parameters(), strict=True):
        assert one.grad is not None
        assert other.grad is not None
        assert one.grad.equal(other.grad)
