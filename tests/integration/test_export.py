"""`optimd export` and `optimd import`: a job in a file, and a file as a job, as a person has them made."""

from __future__ import annotations

import os
import pty
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from typer.testing import CliRunner

from optimd.cli.app import app
from optimd.client import Adam, Async, JobMismatchError, ProxyOptions, Sync
from optimd.server import Server
from tests.support import assert_alike, assert_equal_states, eventually, in_threads, running_server, server_process

OPTIMD = Path(sys.executable).parent / "optimd"
FORMS = pytest.mark.parametrize("suffix", [".pt", ".safetensors"])


def optimd(*arguments: str) -> tuple[int, str]:
    """Runs the command in this process: its status, and what it wrote."""
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "120", "TERM": "dumb"})
    return result.exit_code, result.output


def done(*arguments: str) -> str:
    """Runs a command that has to succeed, and gives its one line."""
    status, output = optimd(*arguments)
    assert (status, output.count("\n")) == (0, 1), output
    return output


def refused(*arguments: str) -> str:
    """Runs a command that has to fail in one sentence, and gives that."""
    status, output = optimd(*arguments)
    assert (status, output.count("\n")) == (2, 1), output
    return output


class Net(nn.Module):
    """Every kind of parameter and buffer that a file has to hold. The same for a seed."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        dice = torch.Generator().manual_seed(seed)

        def noise(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
            return torch.randn(shape, generator=dice, dtype=dtype)

        self.wide = nn.Parameter(noise(41, 300))
        self.last = nn.Parameter(noise(4, 3, 5, 5).to(memory_format=torch.channels_last))
        self.scalar = nn.Parameter(noise(dtype=torch.float64))
        self.narrow = nn.Parameter(noise(33, 7).to(torch.bfloat16))
        self.turned = nn.Parameter(noise(5, 9).t())
        self.pairs = nn.Parameter(noise(7, dtype=torch.complex64))
        self.wide_pairs = nn.Parameter(noise(3, 2, dtype=torch.complex128))
        self.empty = nn.Parameter(torch.zeros(0, 3))
        self.still = nn.Parameter(noise(6))
        self.norm = nn.BatchNorm1d(3, affine=False)
        self.norm.running_mean = noise(3)
        self.register_buffer("mask", noise(5) > 0)

    def groups(self) -> list[dict[str, Any]]:
        """Three, with different options."""
        named = dict(self.named_parameters())
        split = [["wide", "last", "scalar"], ["narrow", "turned", "empty", "still"], ["pairs", "wide_pairs"]]
        options: list[dict[str, Any]] = [{"amsgrad": True}, {"lr": 0.5, "weight_decay": 0.1}, {"betas": (0.5, 0.7)}]
        # Numbers travel as doubles.
        options = [{"weight_decay": 0.0, **more} for more in options]
        return [
            {"params": [(name, named[name]) for name in names], **more}
            for names, more in zip(split, options, strict=True)
        ]


def give_gradients(net: nn.Module, step: int, *, leaving: Sequence[str] = ("still",)) -> None:
    """Random gradients, the same for a step; some parameters have none."""
    dice = torch.Generator().manual_seed(1000 + step)
    for name, p in net.named_parameters():
        noise = torch.randn(p.shape, generator=dice, dtype=p.dtype if p.dtype.is_complex else torch.float64)
        p.grad = None if name in leaving else torch.empty_like(p).copy_(noise)


LOOP: dict[str, Any] = {"foreach": False, "fused": False}
MASTER = ProxyOptions(master_dtype=torch.float32, bucket_bytes=4096)


def train(server: Server, job: str, steps: int = 3, *, seed: int = 0) -> tuple[Net, Adam]:
    """A job with all of `Net`, stepped and with a schedule; its worker is still in it."""
    net = Net(seed)
    optimizer = Adam(net.groups(), lr=0.01, server=server.address, job=job, options=MASTER, **LOOP)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    optimizer.attach_buffers(net)
    for step in range(steps):
        give_gradients(net, step)
        optimizer.step()
        schedule.step()
    # Has the server hear of the last rate.
    give_gradients(net, 0, leaving=[name for name, _ in net.named_parameters()])
    optimizer.step()
    return net, optimizer


def buffers_of(net: nn.Module) -> dict[str, torch.Tensor]:
    return {name: buffer.clone() for name, buffer in net.named_buffers()}


def test_a_pt_file_has_all_of_a_job_in_torchs_words(server: Server, tmp_path: Path) -> None:
    """What the worker's own state_dict says, to the bit and in its types; values, buffers and settings beside it."""
    path = tmp_path / "out.pt"
    net, optimizer = train(server, "digits")
    with optimizer:
        said = done("export", "digits", str(path), "--server", server.address)
        assert said.startswith(f"job digits at step 4 is in {path}: 9 parameters, ")
        checkpoint = torch.load(path, weights_only=True)
        assert_alike(checkpoint["optimizer"], optimizer.state_dict())
    assert [entry.name for entry in tmp_path.iterdir()] == ["out.pt"]
    assert list(checkpoint) == ["format", "job", "step", "optimizer", "parameters", "buffers", "settings"]
    assert (checkpoint["format"], checkpoint["job"], checkpoint["step"]) == ("optimd-export-1", "digits", 4)
    named = dict(net.named_parameters())
    order = [name for group in net.groups() for name, _ in group["params"]]
    assert_alike(checkpoint["parameters"], {name: named[name].detach() for name in order})
    assert list(checkpoint["parameters"]) == order
    assert_alike(checkpoint["buffers"], buffers_of(net))
    state = checkpoint["optimizer"]["state"]
    assert state[order.index("narrow")]["exp_avg"].dtype is torch.float32
    assert checkpoint["parameters"]["narrow"].dtype is torch.bfloat16
    assert order.index("still") not in state
    assert checkpoint["settings"] == {
        "aggregation": {
            "policy": "sync",
            "world_size": 1,
            "reduction": "mean",
            "backup_workers": 0,
            "deterministic": False,
            "on_loss": "shrink",
            "timeout_s": 300.0,
            "join_timeout_s": 300.0,
        },
        "apply": "streaming",
        "bucket_bytes": 4096,
        "max_grad_norm": None,
        "nonfinite": "allow",
        "master_dtypes": {"narrow": "float32"},
    }


def test_a_safetensors_file_has_the_same_under_plain_names(server: Server, tmp_path: Path) -> None:
    """Read with that library alone."""
    path = tmp_path / "out.safetensors"
    net, optimizer = train(server, "digits")
    with optimizer:
        done("export", "digits", str(path), "--server", server.address)
        state = optimizer.state_dict()["state"]
    tensors = load_file(path)
    assert torch.equal(tensors["parameters.last"], net.last)
    assert torch.equal(torch.view_as_complex(tensors["parameters.pairs"]), net.pairs)
    assert tensors["parameters.scalar"].shape == ()
    assert torch.equal(tensors["optimizer.0.max_exp_avg_sq"], state[0]["max_exp_avg_sq"])
    assert tensors["optimizer.0.step"] == 3
    assert torch.equal(tensors["buffers.mask"], net.mask)
    counted = sum(len(entry) for entry in state.values())
    assert len(tensors) == 9 + counted + len(buffers_of(net))


@FORMS
def test_an_imported_job_is_the_exported_one_to_the_bit(server: Server, tmp_path: Path, suffix: str) -> None:
    """Exported anew from another name, the files say the same but for that and the job's steps."""
    first, second = tmp_path / f"first{suffix}", tmp_path / "second.pt"
    _, optimizer = train(server, "one")
    optimizer.close()
    at = ("--server", server.address)
    done("export", "one", str(first), *at)
    done("export", "one", str(tmp_path / "first.pt"), "--force", *at)
    said = done("import", str(first), "--job", "two", *at)
    assert said.strip() == (
        "job two begins with 9 parameters, the state of 8, and 4 buffers of step 4; it waits for 1 worker"
    )
    done("export", "two", str(second), *at)
    before, after = (torch.load(tmp_path / name, weights_only=True) for name in ("first.pt", "second.pt"))
    assert (after.pop("job"), after.pop("step")) == ("two", 0)
    assert (before.pop("job"), before.pop("step")) == ("one", 4)
    assert_alike(after, before)
    # A file that came from an import is as good as any.
    done("import", str(second), "--job", "three", *at)


@pytest.mark.parametrize("kernel", [{"fused": True}, {"foreach": True}, LOOP], ids=["fused", "foreach", "loop"])
@pytest.mark.parametrize("amsgrad", [False, True])
def test_torchs_adam_goes_on_from_a_file_as_the_job_does(
    server: Server, tmp_path: Path, kernel: dict[str, Any], amsgrad: bool
) -> None:
    """Several groups, a schedule, names; the same bits after more steps on either side."""

    def model() -> nn.Module:
        torch.manual_seed(3)
        net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Linear(40, 70))
        net[0].weight = nn.Parameter(net[0].weight.detach().to(memory_format=torch.channels_last))
        return net

    def groups(net: nn.Module) -> list[dict[str, Any]]:
        named = list(net.named_parameters())
        return [{"params": named[:2], "weight_decay": 0.1}, {"params": named[2:], "lr": 0.1, "maximize": True}]

    ours, theirs = model(), model()
    options = {"lr": 0.01, "amsgrad": amsgrad, **kernel}
    with Adam(groups(ours), server=server.address, job="half", **options) as remote:
        schedule = torch.optim.lr_scheduler.StepLR(remote, 2)
        for step in range(4):
            give_gradients(ours, step, leaving=())
            remote.step()
            schedule.step()
        done("export", "half", str(tmp_path / "half.pt"), "--server", server.address)
        checkpoint = torch.load(tmp_path / "half.pt", weights_only=True)
        theirs.load_state_dict({**checkpoint["parameters"], **checkpoint["buffers"]})
        local = torch.optim.Adam(groups(theirs))
        local.load_state_dict(checkpoint["optimizer"])
        assert [group["initial_lr"] for group in local.param_groups] == [0.01, 0.1]
        for step in range(4, 8):
            for net, optimizer in ((ours, remote), (theirs, local)):
                for group in optimizer.param_groups:
                    group["lr"] = 0.02
                give_gradients(net, step, leaving=())
                optimizer.step()
        assert_alike(dict(theirs.state_dict()), dict(ours.state_dict()))
        assert_equal_states(remote, local)


@FORMS
def test_a_worker_goes_on_with_an_imported_job_as_if_nothing_had_happened(
    server: Server, tmp_path: Path, suffix: str
) -> None:
    """Half of the steps, a file, another job, a worker that knows nothing: one uninterrupted run of torch's own."""

    def model(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(30, 50), nn.BatchNorm1d(50), nn.Linear(50, 3))

    def run(net: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
        for step in steps:
            dice = torch.Generator().manual_seed(step)
            optimizer.zero_grad()
            net(torch.randn(8, 30, generator=dice)).square().sum().backward()
            optimizer.step()

    uninterrupted = model(0)
    local = torch.optim.Adam(uninterrupted.parameters(), lr=0.01, fused=True)
    run(uninterrupted, local, range(6))
    net = model(0)
    options = ProxyOptions(max_grad_norm=1e9, nonfinite="skip", bucket_bytes=1024)
    with Adam(
        net.named_parameters(), lr=0.01, fused=True, server=server.address, job="a", options=options
    ) as optimizer:
        run(net, optimizer, range(3))
        # Fresh, as a script that ends would leave them.
        optimizer.attach_buffers(net)
    path = tmp_path / f"half{suffix}"
    done("export", "a", str(path), "--server", server.address)
    done("import", str(path), "--job", "b", "--server", server.address)
    imported = server.registry.get("b")
    assert (imported.worker_count, imported.settings.private) == (0, False)
    again = model(9)
    with Adam(again.parameters(), lr=9.0, fused=True, server=server.address, job="b", options=options) as optimizer:
        optimizer.attach_buffers(again)
        assert (optimizer.job_step, optimizer.next_sequence, optimizer.resumed) == (0, 0, False)
        assert optimizer.param_groups[0]["lr"] == 0.01
        run(again, optimizer, range(3, 6))
        assert optimizer.job_step == 3
        assert_equal_states(optimizer, local)
    assert_alike(dict(again.state_dict()), dict(uninterrupted.state_dict()))


def step_together(
    server: Server, job: str, ranks: int, steps: range, options: Callable[[int], ProxyOptions], *, loads: bool = False
) -> list[nn.Parameter]:
    """Workers of one job step with the same gradients. Gives their parameters."""
    params = [nn.Parameter(torch.full((700,), float(rank))) for rank in range(ranks)]

    def work(rank: int) -> None:
        with Adam([params[rank]], fused=True, server=server.address, job=job, options=options(rank)) as optimizer:
            if loads:
                optimizer.load_state_dict(optimizer.state_dict())
            for step in steps:
                params[rank].grad = torch.full((700,), float(step + 1))
                optimizer.step()

    in_threads(work, ranks)
    return params


@FORMS
@pytest.mark.parametrize("loads", [False, True])
def test_a_job_of_two_workers_is_imported_before_either_has_come(
    server: Server, tmp_path: Path, suffix: str, loads: bool
) -> None:
    """Nobody is waited for; both are given the state, and may load another, or the same, as in any job."""
    twin = nn.Parameter(torch.zeros(700))
    local = torch.optim.Adam([twin], fused=True)
    for step in range(5):
        twin.grad = torch.full((700,), float(step + 1))
        local.step()

    def options(rank: int) -> ProxyOptions:
        return ProxyOptions(rank=rank, world_size=2, bucket_bytes=1024)

    with Adam([first := nn.Parameter(torch.zeros(700))], fused=True, server=server.address, job="alone") as optimizer:
        for step in range(3):
            first.grad = torch.full((700,), float(step + 1))
            optimizer.step()
    path = tmp_path / f"half{suffix}"
    done("export", "alone", str(path), "--server", server.address)
    said = done("import", str(path), "--job", "pair", "--world-size", "2", "--server", server.address)
    assert said.strip().endswith("it waits for 2 workers")
    assert server.registry.get("pair").settings.apply == "atomic"
    for params in step_together(server, "pair", 2, range(3, 5), options, loads=loads):
        assert torch.equal(params, twin)


def test_settings_are_those_of_the_file_but_for_what_the_command_says(server: Server, tmp_path: Path) -> None:
    """Each override by itself; what was chosen for one policy is not forced on another."""
    path, at = tmp_path / "out.pt", ("--server", server.address)
    options = ProxyOptions(
        aggregation=Sync(deterministic=True, reduction="sum", timeout_s=20),
        rank=0,
        world_size=2,
        bucket_bytes=2048,
        max_grad_norm=0.5,
        nonfinite="error",
    )
    Adam([nn.Parameter(torch.ones(3))], server=server.address, job="pair", options=options).close()
    done("export", "pair", str(path), *at)

    def imported(job: str, *flags: str) -> Any:
        done("import", str(path), "--job", job, *flags, *at)
        return server.registry.get(job).settings

    assert imported("same") == server.registry.get("pair").settings
    three = imported("three", "--world-size", "3")
    assert (three.world_size, three.reduction, three.deterministic, three.apply) == (3, "sum", True, "atomic")
    elastic = imported("elastic", "--world-size", "elastic")
    assert (elastic.world_size, elastic.timeout_s, elastic.bucket_bytes) == (None, 20, 2048)
    loose = imported("loose", "--aggregation", "async", "--max-staleness", "2")
    assert (loose.is_async, loose.max_staleness, loose.timeout_s, loose.max_grad_norm) == (True, 2, 20, 0.5)
    done("export", "loose", str(path), "--force", *at)
    assert imported("looser", "--max-staleness", "5").max_staleness == 5
    assert imported("tight", "--aggregation", "sync").world_size == 1
    said = refused("import", str(path), "--job", "x", "--world-size", "2", *at)
    assert "waits for no number of workers" in said
    assert "--max-staleness is of" in refused(
        "import", str(path), "--job", "x", "--aggregation", "sync", "--max-staleness", "1", *at
    )
    assert "a number of workers" in refused(
        "import", str(path), "--job", "x", "--aggregation", "sync", "--world-size", "0", *at
    )


def test_what_is_applied_when_is_kept_where_the_policy_is(server: Server, tmp_path: Path) -> None:
    """A forced mode is forced again; with another policy only if the command says so."""
    path, at = tmp_path / "out.pt", ("--server", server.address)
    options = ProxyOptions(apply="atomic", aggregation=Async(max_staleness=1))
    Adam([nn.Parameter(torch.ones(3))], server=server.address, job="bound", options=options).close()
    done("export", "bound", str(path), *at)
    for job, flags, mode in (
        ("same", (), "atomic"),
        ("looser", ("--max-staleness", "3"), "streaming"),
        ("forced", ("--max-staleness", "3", "--apply", "atomic"), "atomic"),
        ("alone", ("--aggregation", "sync"), "streaming"),
        ("pair", ("--aggregation", "sync", "--world-size", "2"), "atomic"),
    ):
        done("import", str(path), "--job", job, *flags, *at)
        assert server.registry.get(job).settings.apply == mode, job


def test_workers_that_differ_from_an_imported_job_are_told_how(server: Server, tmp_path: Path) -> None:
    """As of any job."""
    path = tmp_path / "out.pt"
    net, optimizer = train(server, "digits")
    optimizer.close()
    done("export", "digits", str(path), "--server", server.address)
    done("import", str(path), "--job", "other", "--server", server.address)
    with pytest.raises(
        JobMismatchError, match=r"parameter 3 \(narrow\): the job keeps its torch\.bfloat16 in torch\.float32"
    ):
        Adam(net.groups(), server=server.address, job="other", options=ProxyOptions(bucket_bytes=4096), **LOOP)


def test_a_file_is_of_one_step_while_others_are_made(server: Server, tmp_path: Path) -> None:
    """Every parameter and every state has had as many updates as the file says, however often it is asked for."""
    params = [nn.Parameter(torch.zeros(3000)) for _ in range(4)]
    options = ProxyOptions(bucket_bytes=1024)
    stop = threading.Event()
    expected: dict[int, torch.Tensor] = {}

    def work() -> None:
        while not stop.is_set():
            for p in params:
                p.grad = torch.ones(3000)
            optimizer.step()
            expected[optimizer.job_step] = params[0].detach().clone()

    with Adam(params, fused=True, server=server.address, job="busy", options=options) as optimizer:
        worker = threading.Thread(target=work)
        worker.start()
        try:
            assert eventually(lambda: optimizer.job_step > 2)
            steps = []
            for number in range(6):
                path = tmp_path / f"{number}.pt"
                done("export", "busy", str(path), "--server", server.address)
                checkpoint = torch.load(path, weights_only=True)
                steps.append(checkpoint["step"])
                assert eventually(lambda: steps[-1] in expected)
                assert {float(entry["step"]) for entry in checkpoint["optimizer"]["state"].values()} == {steps[-1]}
                assert all(torch.equal(value, expected[steps[-1]]) for value in checkpoint["parameters"].values())
        finally:
            stop.set()
            worker.join()
    assert len(set(steps)) > 1


def test_a_file_that_is_there_is_replaced_only_by_force(server: Server, tmp_path: Path) -> None:
    """And is left as it is before that."""
    path, at = tmp_path / "out.pt", ("--server", server.address)
    Adam([nn.Parameter(torch.ones(3))], server=server.address, job="j").close()
    path.write_text("mine")
    assert f"{path} exists; write to another file, or replace it with --force" in refused("export", "j", str(path), *at)
    assert path.read_text() == "mine"
    done("export", "j", str(path), "--force", *at)
    assert torch.load(path, weights_only=True)["job"] == "j"


def test_what_cannot_be_exported_is_one_sentence_and_status_2(server: Server, tmp_path: Path) -> None:
    """A wrong suffix, an unknown job, no such folder, no server; nothing is written."""
    at = ("--server", server.address)
    out = str(tmp_path / "out.pt")
    assert "should end in .pt" in refused("export", "j", str(tmp_path / "out.bin"), *at)
    assert refused("export", "j", out, *at) == "optimd: there is no job 'j' on this server\n"
    assert "is no folder" in refused("export", "j", str(tmp_path / "no" / "out.pt"), *at)
    assert "no optimd server answers at 127.0.0.1:1" in refused("export", "j", out, "--server", "127.0.0.1:1")
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_imported_is_one_sentence_and_status_2(server: Server, tmp_path: Path) -> None:
    """A job that is there, a name that is none, a file that is missing or is something else, no server."""
    path, at = tmp_path / "out.safetensors", ("--server", server.address)
    Adam([nn.Parameter(torch.ones(3))], server=server.address, job="j").close()
    done("export", "j", str(path), *at)
    assert refused("import", str(path), *at) == (
        f"optimd: job j exists on {server.address}: choose another name with --job, or drop it with "
        "`optimd jobs delete`\n"
    )
    assert "printable" in refused("import", str(path), "--job", " ", *at)
    assert "should end in" in refused("import", str(tmp_path / "out.bin"), *at)
    assert "cannot be read: No such file" in refused("import", str(tmp_path / "no.pt"), *at)
    torch.save({"model": torch.ones(3)}, tmp_path / "other.pt")
    assert "is not what `optimd export` writes" in refused("import", str(tmp_path / "other.pt"), *at)
    assert "no optimd server answers" in refused("import", str(path), "--server", "127.0.0.1:1")
    assert [job.name for job in server.registry.all()] == ["j"]


def test_a_job_that_is_too_large_for_the_server_is_not_imported_by_half(tmp_path: Path) -> None:
    """Its limits hold for what a job begins with, and nothing of it stays; what could be trained can be imported."""
    model = nn.Module()
    model.register_buffer("large", torch.zeros(100_000))
    with server_process() as (_, address):
        for job in ("bare", "large"):
            p = nn.Parameter(torch.ones(100_000))
            with Adam([p], server=address, job=job) as optimizer:
                p.grad = torch.ones(100_000)
                optimizer.step()
                if job == "large":
                    optimizer.attach_buffers(model)
            done("export", job, str(tmp_path / f"{job}.pt"), "--server", address)
    with server_process("--max-job-bytes=1300000") as (_, address):
        assert "the buffers and the copy" in refused("import", str(tmp_path / "large.pt"), "--server", address)
        assert "no jobs" in done("jobs", "list", "--server", address)
        done("import", str(tmp_path / "bare.pt"), "--server", address)
    with server_process("--max-job-bytes=1000000") as (_, address):
        assert "the parameters and their state" in refused("import", str(tmp_path / "bare.pt"), "--server", address)


def test_a_server_that_cannot_describe_its_jobs_is_said_to_be_older(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It passes over what it does not know."""
    Adam([nn.Parameter(torch.ones(3))], server=server.address, job="j").close()
    monkeypatch.setattr("optimd.server.reading._description", lambda _: iter(()))
    said = refused("export", "j", str(tmp_path / "out.pt"), "--server", server.address)
    assert "is an older one: it does not say what its jobs are" in said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("part", ["_buckets", "_buffers"])
def test_an_answer_that_lacks_something_is_no_checkpoint(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    """A file is written of a whole job or not at all."""
    Adam([nn.Parameter(torch.ones(3))], server=server.address, job="j").close()
    monkeypatch.setattr(f"optimd.server.reading.{part}", lambda *_: iter(()))
    said = refused("export", "j", str(tmp_path / "out.pt"), "--server", server.address)
    assert "a part of the job is missing" in said
    assert not list(tmp_path.iterdir())


KILLED = """
import os, pathlib
import optimd.cli, optimd.cli.checkpointfiles as files

def write_half(path):
    pathlib.Path(path).write_bytes(b"half of it")
    os.kill(os.getpid(), 9)

files.torch.save = lambda checkpoint, file: write_half(file._file.name)
files.save_file = lambda tensors, path, metadata: write_half(path)
optimd.cli.main()
"""


@FORMS
def test_an_export_that_is_killed_leaves_no_half_file(server: Server, tmp_path: Path, suffix: str) -> None:
    """In the middle of writing: there is no file, or the one from before."""
    path = tmp_path / f"out{suffix}"
    Adam([nn.Parameter(torch.ones(3))], server=server.address, job="j").close()

    def killed() -> None:
        arguments = ("export", "j", str(path), "--force", "--server", server.address)
        ended = subprocess.run(
            [sys.executable, "-c", KILLED, *arguments], capture_output=True, text=True, timeout=120, check=False
        )
        assert ended.returncode == -signal.SIGKILL, ended.stderr

    killed()
    assert not path.exists()
    assert [entry.read_bytes() for entry in tmp_path.iterdir()] == [b"half of it"]
    done("export", "j", str(path), "--server", server.address)
    whole = path.read_bytes()
    killed()
    assert path.read_bytes() == whole


def test_an_import_that_is_killed_leaves_no_job(server: Server, tmp_path: Path) -> None:
    """In the middle of uploading: a worker that opens the job then makes it anew."""
    path = tmp_path / "out.pt"
    p = nn.Parameter(torch.ones(4_000_000))
    with Adam([p], server=server.address, job="j") as optimizer:
        p.grad = torch.ones(4_000_000)
        optimizer.step()
    done("export", "j", str(path), "--server", server.address)
    code = (
        "import os, optimd.client.jobline as line, optimd.cli\n"
        "line.value_messages = lambda *_: os.kill(os.getpid(), 9)\n"
        "optimd.cli.main()\n"
    )
    arguments = ("import", str(path), "--job", "half", "--server", server.address)
    ended = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120, check=False
    )
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert eventually(lambda: "half" not in server.registry._jobs)
    fresh = nn.Parameter(torch.full((3,), 5.0))
    with Adam([fresh], server=server.address, job="half") as optimizer:
        assert (optimizer.job_step, len(optimizer.state)) == (0, 0)
        assert torch.equal(fresh, torch.full((3,), 5.0))


def test_a_terminal_shows_the_progress_and_a_pipe_the_result_alone(server: Server, tmp_path: Path) -> None:
    """In bytes, for reading and for writing."""
    Adam([nn.Parameter(torch.ones(1000))], server=server.address, job="runs[/3]").close()
    terminal, of_child = pty.openpty()
    try:
        ended = subprocess.run(
            [str(OPTIMD), "export", "runs[/3]", str(tmp_path / "out.pt"), "--server", server.address],
            stdout=subprocess.PIPE,
            stderr=of_child,
            text=True,
            timeout=120,
            check=False,
            env={**os.environ, "TERM": "xterm", "COLUMNS": "120"},
        )
    finally:
        os.close(of_child)
    shown = os.read(terminal, 1 << 16).decode()
    os.close(terminal)
    assert ended.returncode == 0, shown
    assert ended.stdout == f"job runs[/3] at step 0 is in {tmp_path / 'out.pt'}: 1 parameters, 0.0 MB\n"
    assert "reading runs[/3]" in shown
    assert "4.0/4.0 kB" in shown
    assert "writing out.pt" in shown


def test_an_imported_job_outlives_its_server(tmp_path: Path) -> None:
    """Values, state and buffers, where it is kept on disk: its journal alone has all of it."""
    with running_server() as source:
        net, optimizer = train(source, "kept")
        state = optimizer.state_dict()["state"]
        optimizer.close()
        done("export", "kept", str(tmp_path / "kept.pt"), "--server", source.address)
    with running_server(data_dir=str(tmp_path / "data")) as target:
        done("import", str(tmp_path / "kept.pt"), "--server", target.address)
        shutil.copytree(tmp_path / "data", tmp_path / "copy")
    with running_server(data_dir=str(tmp_path / "copy")) as server:
        done("export", "kept", str(tmp_path / "again.pt"), "--server", server.address)
    first, again = (torch.load(tmp_path / name, weights_only=True) for name in ("kept.pt", "again.pt"))
    assert again["parameters"].keys() == first["parameters"].keys()
    for part in ("parameters", "buffers"):
        for name, tensor in first[part].items():
            assert torch.equal(again[part][name], tensor), name
    for index, entry in state.items():
        for key, tensor in entry.items():
            assert torch.equal(again["optimizer"]["state"][index][key], tensor), (index, key)
    assert buffers_of(net).keys() == again["buffers"].keys()
