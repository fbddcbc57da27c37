"""A job as a checkpoint, and a checkpoint in the form of safetensors: all of it there and back, without a server."""

from __future__ import annotations

import dataclasses
import json
import math
import resource
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from optimd.cli.checkpoint import from_checkpoint, to_checkpoint
from optimd.cli.checkpointfiles import check_target, read_checkpoint, write_checkpoint
from optimd.cli.errors import CommandError
from optimd.cli.safetensorsform import pack, unpack
from optimd.client import Async, ProxyOptions, Sync
from optimd.client.statetransfer import RemoteEntry
from optimd.client.wholejob import WholeJob
from optimd.wire.layout import Parameter
from tests.support import assert_alike

OPTIONS: dict[str, Any] = {
    "lr": 1e-3,
    "betas": (0.9, 0.999),
    "eps": 1e-8,
    "weight_decay": 0.0,
    "amsgrad": False,
    "maximize": False,
    "foreach": None,
    "capturable": False,
    "differentiable": False,
    "fused": None,
    "decoupled_weight_decay": False,
}


def whole(names: Sequence[str] = ("a", "b"), **changes: Any) -> WholeJob:
    """Two parameters in two groups, of which the first has been stepped."""
    values = {0: torch.arange(6.0).view(2, 3).to(torch.bfloat16), 1: torch.tensor(3.0)}
    parameters = [
        Parameter(names[0], torch.bfloat16, (2, 3), (0, 1), torch.float32),
        Parameter(names[1], torch.float32, (), ()),
    ]
    moments = {"exp_avg": torch.full((2, 3), 0.1), "exp_avg_sq": torch.full((2, 3), 0.2)}
    job = WholeJob(
        step=7,
        options=ProxyOptions(aggregation=Sync(world_size=2), apply="atomic", bucket_bytes=4096),
        groups=[dict(OPTIONS), dict(OPTIONS, lr=0.5, initial_lr=1.0)],
        sizes=[1, 1],
        parameters=parameters,
        values=values,
        entries={0: RemoteEntry(5.0, moments)},
        buffers={"mean": torch.zeros(3)},
    )
    return dataclasses.replace(job, **changes)


def through_safetensors(checkpoint: dict[str, Any]) -> dict[str, Any]:
    tensors, metadata = pack(checkpoint)
    assert all(tensor.is_contiguous() and not tensor.is_complex() for tensor in tensors.values())
    return unpack(tensors, metadata)


def test_a_job_comes_back_from_its_checkpoint() -> None:
    """Settings, groups, names, master dtypes, state and values; only the parts that a job has."""
    job = whole()
    name, again = from_checkpoint(to_checkpoint("digits", job))
    assert name == "digits"
    for field in dataclasses.fields(WholeJob):
        if field.name != "entries":
            assert_alike(getattr(again, field.name), getattr(job, field.name), field.name)
    assert again.entries.keys() == {0}
    assert again.entries[0].step == 5.0
    assert_alike(again.entries[0].tensors, job.entries[0].tensors)


@pytest.mark.parametrize(
    "options",
    [
        ProxyOptions(aggregation=Async(), apply="streaming", bucket_bytes=1024),
        ProxyOptions(aggregation=Async(max_staleness=0, timeout_s=1.5), apply="atomic", bucket_bytes=1024),
        ProxyOptions(aggregation=Sync(world_size="elastic", reduction="sum"), apply="atomic", bucket_bytes=1024),
        ProxyOptions(
            aggregation=Sync(world_size=4, backup_workers=1, deterministic=True, on_loss="wait"),
            apply="atomic",
            bucket_bytes=1024,
            max_grad_norm=math.inf,
            nonfinite="error",
        ),
    ],
)
def test_settings_come_back_from_either_form(options: ProxyOptions) -> None:
    """Every policy with its numbers."""
    checkpoint = to_checkpoint("j", whole(options=options))
    assert from_checkpoint(checkpoint)[1].options == options
    assert from_checkpoint(through_safetensors(checkpoint))[1].options == options


@pytest.mark.parametrize(
    ("names", "keys", "is_named"),
    [
        (("a", "b"), ["a", "b"], True),
        (("", ""), ["0", "1"], False),
        (("a", ""), ["0", "1"], False),
        (("a", "a"), ["0", "1"], True),
        (("1", "0"), ["1", "0"], True),
    ],
)
def test_parameters_go_by_names_that_tell_them_apart_or_else_by_their_indices(
    names: tuple[str, str], keys: list[str], is_named: bool
) -> None:
    """torch's param_names are there if all have one; read again, each has the name and the master dtype that it had."""
    job = whole(names)
    checkpoint = to_checkpoint("j", job)
    assert list(checkpoint["parameters"]) == keys
    assert checkpoint["settings"]["master_dtypes"] == {keys[0]: "float32"}
    groups = checkpoint["optimizer"]["param_groups"]
    assert [group.get("param_names") for group in groups] == ([[name] for name in names] if is_named else [None, None])
    for read in (checkpoint, through_safetensors(checkpoint)):
        again = from_checkpoint(read)[1]
        assert [parameter.name for parameter in again.parameters] == (list(names) if is_named else ["", ""])
        assert [parameter.master_dtype for parameter in again.parameters] == [torch.float32, None]


def test_what_json_has_no_word_for_survives_it() -> None:
    """NaN, infinities, tuples, tensors as rates, integers beside floats, and what looks like one of our own marks."""
    odd = {
        "lr": torch.tensor(0.1, dtype=torch.float32),
        "betas": (torch.tensor(0.9, dtype=torch.float64), 0.1 + 0.2),
        "nan": math.nan,
        "far": [math.inf, -math.inf, 1e-310, -0.0, 2**62, True, None, "text", [1, 1.0]],
        "$float": "inf",
    }
    checkpoint = to_checkpoint("j", whole(groups=[dict(OPTIONS, **odd), dict(OPTIONS)]))
    _, metadata = pack(checkpoint)

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    json.loads(metadata["optimd"], parse_constant=refuse)
    assert_alike(through_safetensors(checkpoint), checkpoint)


def test_tensors_of_every_kind_survive_safetensors() -> None:
    """Complex numbers of both widths, other memory orders, no elements, no dimensions; names as they are documented."""
    values = {
        0: torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        1: torch.randn(4, 3, dtype=torch.complex128).t(),
        2: torch.randn((), dtype=torch.complex64),
        3: torch.zeros(0, 3),
    }
    parameters = [
        Parameter(f"layer.{index}", value.dtype, tuple(value.shape), (0, 2, 3, 1) if index == 0 else (1, 0))
        for index, value in values.items()
    ]
    entries = {index: RemoteEntry(1.0, {"exp_avg": value.clone()}) for index, value in values.items()}
    job = whole(
        parameters=parameters,
        values=values,
        entries=entries,
        sizes=[3, 1],
        buffers={"flag": torch.tensor([True, False]), "count": torch.tensor(3), "turn": torch.ones(2) * 1j},
    )
    checkpoint = to_checkpoint("j", job)
    assert list(pack(checkpoint)[0]) == [
        *(f"parameters.layer.{index}" for index in range(4)),
        *(f"optimizer.{index}.{key}" for index in range(4) for key in ("step", "exp_avg")),
        *("buffers.flag", "buffers.count", "buffers.turn"),
    ]
    again = through_safetensors(checkpoint)
    assert_alike(again, checkpoint)
    # Their place is their index, and torch's state has an order too.
    assert list(again["parameters"]) == list(checkpoint["parameters"])
    assert [list(entry) for entry in again["optimizer"]["state"].values()] == [["step", "exp_avg"]] * 4


def without(*path: Any) -> dict[str, Any]:
    """A checkpoint that lacks something."""
    checkpoint = to_checkpoint("j", whole())
    at: Any = checkpoint
    for key in path[:-1]:
        at = at[key]
    del at[path[-1]]
    return checkpoint


def changed(value: Any, *path: Any) -> dict[str, Any]:
    """A checkpoint in which something else stands somewhere."""
    checkpoint = to_checkpoint("j", whole())
    at: Any = checkpoint
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    return checkpoint


@pytest.mark.parametrize(
    ("checkpoint", "reason"),
    [
        ([1], "its format is not 'optimd-export-1'"),
        (changed("optimd-export-9", "format"), "its format is not 'optimd-export-1'"),
        (without("settings"), r"a part of it is missing, or is something else (KeyError('settings'))"),
        (without("settings", "apply"), "KeyError('apply')"),
        (changed(3, "parameters"), "a part of it is missing"),
        (changed(torch.zeros(2, dtype=torch.int64), "parameters", "a"), "torch.int64 is not carried"),
        (changed([1], "optimizer", "param_groups", 0, "params"), "each once and in order"),
        (without("optimizer", "param_groups", 0, "eps"), "KeyError('eps')"),
        (changed({"step": 1}, "optimizer", "state", 9), "a state of parameter 9"),
        (changed({"step": 1, "sum": 2}, "optimizer", "state", 1), "parameter 1 has sum, which Adam's has not"),
        (
            changed({"step": 1, "exp_avg": torch.zeros(2)}, "optimizer", "state", 1),
            "exp_avg of parameter 1 (b) has another shape",
        ),
        (changed("float33", "settings", "master_dtypes", "a"), "AttributeError"),
        (changed("float16", "settings", "master_dtypes", "a"), "torch.float16 is no master dtype"),
        (changed("half", "settings", "aggregation", "policy"), "KeyError('half')"),
        (changed(0, "settings", "aggregation", "world_size"), "world_size=0"),
        (changed(torch.zeros(1, dtype=torch.uint16), "buffers", "mean"), "torch.uint16 is not carried"),
    ],
)
def test_a_file_that_is_no_checkpoint_says_what_is_wrong(tmp_path: Path, checkpoint: Any, reason: str) -> None:
    """In one line, whatever part of it is odd."""
    path = tmp_path / "odd.pt"
    torch.save(checkpoint, path)
    with pytest.raises(CommandError) as caught:
        read_checkpoint(path)
    assert str(caught.value).startswith(f"{path} is not what `optimd export` writes: ")
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("empty.pt", b"", "it is no archive"),
        ("pickled.pt", b"\x80\x04]\x94.", "it is no archive"),
        ("empty.safetensors", b"", "header too small"),
        ("odd.safetensors", b"\x02\0\0\0\0\0\0\0{}", "its metadata has no 'optimd'"),
    ],
)
def test_a_file_of_another_kind_says_what_is_wrong(tmp_path: Path, name: str, content: bytes, reason: str) -> None:
    """And a file that is not there."""
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(CommandError, match=reason):
        read_checkpoint(path)
    with pytest.raises(CommandError, match="cannot be read: No such file"):
        read_checkpoint(tmp_path / f"no-{name}")


class Bomb:
    """What runs when it is unpickled, where anything does."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (exec, ("raise SystemExit('it was run')",))


def test_nothing_that_is_in_a_file_is_run(tmp_path: Path) -> None:
    """torch reads plain values alone."""
    path = tmp_path / "bomb.pt"
    torch.save(Bomb(), path)
    with pytest.raises(CommandError, match="plain values and tensors"):
        read_checkpoint(path)


@contextmanager
def files_of_at_most(nbytes: int) -> Iterator[None]:
    """Has writes fail that would make a file longer, as they do on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_file_that_cannot_be_finished_leaves_what_was_there(tmp_path: Path, suffix: str) -> None:
    """A full disk in the middle: one sentence, the file from before, and nothing beside it."""
    path = tmp_path / f"out{suffix}"
    path.write_text("before")
    checkpoint = to_checkpoint("j", whole(buffers={"large": torch.zeros(100_000)}))
    with (
        files_of_at_most(50_000),
        pytest.raises(CommandError, match=r"cannot be written: (.*I/O error: )?File too large"),
    ):
        write_checkpoint(checkpoint, path)
    assert [entry.read_text() for entry in tmp_path.iterdir()] == ["before"]
    write_checkpoint(checkpoint, path)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    assert read_checkpoint(path)[0] == "j"


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_what_is_written_is_told_of(tmp_path: Path, suffix: str) -> None:
    """In bytes, all of them; and the file is as readable as the process makes its files."""
    path = tmp_path / f"out{suffix}"
    counted: list[int] = []
    write_checkpoint(to_checkpoint("j", whole()), path, on_bytes=counted.append)
    assert sum(counted) == path.stat().st_size
    (tmp_path / "other").touch()
    assert path.stat().st_mode == (tmp_path / "other").stat().st_mode


def test_where_nothing_can_be_written_is_known_before(tmp_path: Path) -> None:
    """A suffix that is none, a folder that is missing or is in the way, a file that is there."""
    for path, reason in (
        (tmp_path / "out.bin", "should end in .pt"),
        (tmp_path / "out", "or in .safetensors"),
        (tmp_path / "no" / "out.pt", f"{tmp_path / 'no'} is no folder"),
        (tmp_path, "should end in"),
    ):
        with pytest.raises(CommandError, match=str(reason)):
            check_target(path, force=True)
    (tmp_path / "folder.pt").mkdir()
    with pytest.raises(CommandError, match="it is a folder"):
        check_target(tmp_path / "folder.pt", force=True)
    (tmp_path / "there.pt").touch()
    with pytest.raises(CommandError, match="exists; write to another file, or replace it with --force"):
        check_target(tmp_path / "there.pt", force=False)
    check_target(tmp_path / "there.pt", force=True)
    check_target(tmp_path / "new.safetensors", force=False)
