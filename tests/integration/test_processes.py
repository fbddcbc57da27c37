"""Servers and workers as processes: the embedded server, forks, signals, optimizers that are merely dropped."""

from __future__ import annotations

import gc
import os
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import grpc
import psutil
import pytest
import torch
from torch import nn

from optimd.cli.admin import Admin
from optimd.cli.target import Target
from optimd.client import Adam, ConnectionLostError, ForkedProcessError, ProxyOptions
from optimd.server import ConfigurationError, Server
from optimd.v1 import admin_pb2
from optimd.v1.admin_service_pb2_grpc import AdminServiceStub
from tests.support import ROOT, eventually, running_server, server_process

EXAMPLE = ROOT / "examples" / "train_digits.py"


def run_script(script: str, folder: Path, **environment: str) -> subprocess.Popen[str]:
    """Runs Python source as a process whose embedded servers meet below `folder`."""
    path = folder / "script.py"
    path.write_text(textwrap.dedent(script))
    return subprocess.Popen(
        # From 3.12 on, Python warns of forks in processes with threads, which is what is tested here.
        [sys.executable, "-W", "ignore::DeprecationWarning", str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(folder), **environment},
    )


@pytest.fixture
def folder() -> Path:
    """A short one: a Unix socket's path has to fit into 107 bytes."""
    return Path(tempfile.mkdtemp(prefix="t-"))


def meeting_places(folder: Path) -> list[Path]:
    return [place for place in folder.glob("optimd-*/*") if place.is_dir()]


def test_without_a_server_the_process_has_one_for_all_its_optimizers(folder: Path) -> None:
    """A child on a private socket that nobody else may enter, gone with its parent, its folder too."""
    process = run_script(
        """
        import os, torch
        from optimd.client import Adam
        optimizers = [Adam([torch.nn.Parameter(torch.ones(3))]) for _ in range(3)]
        for optimizer in optimizers:
            optimizer.param_groups[0]["params"][0].grad = torch.ones(3)
            optimizer.step()
        print(len({optimizer.server for optimizer in optimizers}), optimizers[0].server, flush=True)
        input()
        """,
        folder,
    )
    assert process.stdout is not None
    count, address = process.stdout.readline().split()
    assert count == "1"
    children = psutil.Process(process.pid).children()
    assert len(children) == 1
    place = Path(address.removeprefix("unix://")).parent
    assert stat.S_IMODE(place.stat().st_mode) == 0o700
    assert stat.S_IMODE(place.parent.stat().st_mode) == 0o700
    process.kill()  # the hardest end: no clean-up of any kind
    process.communicate(timeout=10)
    assert eventually(lambda: not children[0].is_running())
    assert eventually(lambda: not place.exists())


@pytest.mark.parametrize("end", ["return", "raise RuntimeError('at the end')", "os._exit(3)"])
def test_the_embedded_server_ends_however_its_process_ends(folder: Path, end: str) -> None:
    """In good order, by an exception, and without any clean-up."""
    process = run_script(
        f"""
        import os, torch
        from optimd.client import Adam

        def main():
            optimizer = Adam([torch.nn.Parameter(torch.ones(3))])
            print(optimizer.server, flush=True)
            input()
            {end}

        main()
        """,
        folder,
    )
    assert process.stdout is not None
    address = process.stdout.readline().strip()
    children = psutil.Process(process.pid).children()
    assert len(children) == 1
    _, errors = process.communicate("\n", timeout=30)
    assert eventually(lambda: not children[0].is_running()), errors
    assert eventually(lambda: not Path(address.removeprefix("unix://")).parent.exists())


def test_the_embedded_server_ends_if_its_process_is_killed_while_it_starts(folder: Path) -> None:
    """The server has nobody left to serve by the time it is ready."""
    process = run_script("import torch, optimd.client; optimd.client.Adam([torch.nn.Parameter(torch.ones(3))])", folder)
    parent = psutil.Process(process.pid)
    assert eventually(lambda: bool(parent.children()))
    (child,) = parent.children()
    process.kill()
    process.communicate(timeout=10)
    assert child.is_running()  # it was still starting when its parent was killed
    assert eventually(lambda: not child.is_running(), timeout_s=60)
    assert eventually(lambda: not meeting_places(folder))


def test_what_keeps_the_embedded_server_from_starting_is_said(folder: Path) -> None:
    """The folder for it belongs to everybody."""
    (folder / f"optimd-{os.getuid()}").mkdir()
    (folder / f"optimd-{os.getuid()}").chmod(0o777)
    process = run_script(
        """
        import torch
        from optimd.client import Adam, EmbeddedServerError
        try:
            Adam([torch.nn.Parameter(torch.ones(3))])
        except EmbeddedServerError as error:
            print(error)
        """,
        folder,
    )
    output, errors = process.communicate(timeout=60)
    assert "others may enter it; remove it, or set TMPDIR" in output, errors


def test_forked_data_loader_workers_neither_crash_nor_disturb_training(folder: Path) -> None:
    """Two epochs with forked workers, while a job is open: torch's bits, and nothing on stderr."""
    process = run_script(
        """
        import os, torch
        from torch import nn
        from torch.utils.data import DataLoader, Dataset
        from optimd.client import Adam

        class Numbers(Dataset):
            def __len__(self):
                return 32

            def __getitem__(self, index):
                return torch.full((4,), float(index)), os.getpid()

        torch.set_num_threads(1)
        torch.manual_seed(0)
        ours, theirs = nn.Linear(4, 2), nn.Linear(4, 2)
        theirs.load_state_dict(ours.state_dict())
        for _ in range(3):
            Adam(nn.Linear(2, 2).parameters()).close()  # what is left of these must not disturb a child either
        loaders = set()
        with Adam(ours.parameters(), fused=True) as remote:
            local = torch.optim.Adam(theirs.parameters(), fused=True)
            for _ in range(4):
                for x, pids in DataLoader(Numbers(), batch_size=8, num_workers=2, multiprocessing_context="fork"):
                    loaders |= set(pids.tolist())
                    for model, optimizer in ((ours, remote), (theirs, local)):
                        optimizer.zero_grad()
                        model(x).square().sum().backward()
                        optimizer.step()
            print(remote.job_step, torch.equal(ours.weight, theirs.weight), len(loaders), os.getpid() in loaders)
        """,
        folder,
    )
    output, errors = process.communicate(timeout=100)
    assert output == "16 True 8 False\n", errors
    assert errors == ""


def test_a_forked_child_is_refused_may_have_its_own_and_leaves_the_parents_alone(folder: Path) -> None:
    """The child exits in the ordinary way, with all of its clean-up; the parent's stream survives that."""
    process = run_script(
        """
        import os, sys, time, torch
        from optimd.client import Adam, ForkedProcessError

        def step(optimizer):
            optimizer.param_groups[0]["params"][0].grad = torch.ones(3)
            optimizer.step()
            return optimizer.job_step

        torch.set_num_threads(1)  # torch's own thread pool does not survive a fork
        optimizer = Adam([torch.nn.Parameter(torch.ones(3))])
        step(optimizer)
        child = os.fork()
        if child == 0:
            try:
                step(optimizer)
            except ForkedProcessError as error:
                print("refused:", error, flush=True)
            own = Adam([torch.nn.Parameter(torch.ones(3))])
            print("own:", step(own), own.server != optimizer.server, flush=True)
            started = time.monotonic()
            optimizer.close()
            print("closed:", time.monotonic() - started < 4, flush=True)
            sys.exit(7)
        print("status:", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
        print("parent:", step(optimizer))
        """,
        folder,
    )
    output, errors = process.communicate(timeout=60)
    assert "refused: this optimizer belongs to process" in output
    assert output.splitlines()[1:] == ["own: 1 True", "closed: True", "status: 7", "parent: 2"], output + errors
    assert errors == ""
    assert eventually(lambda: not meeting_places(folder))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("kind", ["tcp", "unix"])
def test_a_signalled_server_ends_in_good_order_and_its_worker_is_told(
    folder: Path, number: signal.Signals, kind: str
) -> None:
    """Status 0, the socket removed, and a ConnectionLostError that names the address."""
    flags = ("--address=127.0.0.1:0",) if kind == "tcp" else (f"--address=unix://{folder}/s.sock",)
    with server_process(*flags) as (process, address):
        p = nn.Parameter(torch.ones(3))
        optimizer = Adam([p], server=address, options=ProxyOptions(retry_timeout_s=0.5))
        p.grad = torch.ones(3)
        optimizer.step()
        process.send_signal(number)
        assert process.wait(20) == 0
        assert not (folder / "s.sock").exists()
        with pytest.raises(ConnectionLostError, match=address):
            optimizer.step()
        with pytest.raises(ConnectionLostError, match="is closed since"):
            optimizer.step()
        optimizer.close()


def test_addresses_and_devices_that_cannot_be_had_are_named(folder: Path) -> None:
    """A port in use, a socket in use, a folder that is not there, a file in the way, no such device."""
    taken = socket.create_server(("127.0.0.1", 0))
    (folder / "file").write_text("")
    live = f"unix://{folder}/live.sock"
    with taken, running_server(address=live):
        for settings, text in (
            ({"address": f"127.0.0.1:{taken.getsockname()[1]}"}, "address already in use"),
            ({"address": live}, "a server answers at"),
            ({"address": f"unix://{folder}/none/x.sock"}, "there is no folder"),
            ({"address": f"unix://{folder}/file"}, "is not a socket"),
            ({"address": "127.0.0.1:0", "device": "cuda:97"}, "device cuda:97 is not on this machine"),
        ):
            with pytest.raises(ConfigurationError, match=text), running_server(**settings):
                pass


def test_a_server_that_cannot_start_says_one_sentence_with_status_2() -> None:
    """On stderr, without a traceback."""
    ended = subprocess.run(
        [sys.executable, "-m", "optimd.server", "--no-health", "--address=0.0.0.0:1"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended.returncode == 2
    assert ended.stderr.startswith("optimd: 0.0.0.0:1 can be reached from other hosts")
    assert ended.stderr.endswith("pass --insecure on a network that you trust\n")
    assert ended.stderr.count("\n") == 1


def test_the_socket_of_a_killed_server_is_taken_over(folder: Path) -> None:
    """A stale file in its place does not keep the next one from starting."""
    address = f"--address=unix://{folder}/s.sock"
    with server_process(address) as (process, _):
        process.kill()
        process.wait(10)
        assert (folder / "s.sock").exists()
    with server_process(address) as (_, bound), Adam([nn.Parameter(torch.ones(3))], server=bound) as optimizer:
        assert optimizer.job_step == 0


def test_a_hundred_dropped_optimizers_leave_nothing_behind(server: Server, request: pytest.FixtureRequest) -> None:
    """No job, no thread, no open file, though nobody called close()."""

    def make_and_drop() -> None:
        p = nn.Parameter(torch.ones(3))
        optimizer = Adam([p], server=server.address)
        p.grad = torch.ones(3)
        optimizer.step()

    # Not by the cycle collector: what is dropped is gone at once.
    gc.collect()
    gc.disable()
    request.addfinalizer(gc.enable)
    for _ in range(5):
        make_and_drop()
    process = psutil.Process()
    assert eventually(lambda: not server.registry.all())
    # The server is in this process too: what it needs for a few streams at once is there by now.
    files, threads = process.num_fds(), process.num_threads()
    for _ in range(100):
        make_and_drop()
    assert eventually(lambda: not server.registry.all())
    assert eventually(lambda: process.num_fds() <= files + 3), process.num_fds()
    assert eventually(lambda: process.num_threads() <= threads + 5), process.num_threads()


def test_a_thousand_dropped_optimizers_share_one_embedded_server(request: pytest.FixtureRequest) -> None:
    """One child process, and in the end no job, stream, thread or open file, though nobody called close()."""

    def make_and_drop() -> str:
        p = nn.Parameter(torch.ones(3))
        optimizer = Adam([p])
        p.grad = torch.ones(3)
        optimizer.step()
        # What a look at the state leaves behind must not keep the optimizer either.
        assert optimizer.state[p]["step"] == 1
        optimizer.state[p]["exp_avg"].zero_()
        return optimizer.server

    gc.collect()
    gc.disable()
    request.addfinalizer(gc.enable)
    address = make_and_drop()
    process = psutil.Process()
    files, threads = process.num_fds(), process.num_threads()
    for _ in range(1000):
        assert make_and_drop() == address
    assert len([child for child in process.children() if "optimd.server" in child.cmdline()]) == 1
    with grpc.insecure_channel(address) as channel:
        admin = AdminServiceStub(channel)
        assert eventually(lambda: not admin.ListJobs(admin_pb2.ListJobsRequest()).jobs)
    assert eventually(lambda: process.num_fds() <= files + 3), process.num_fds()
    assert eventually(lambda: process.num_threads() <= threads + 5), process.num_threads()


def test_an_interrupted_step_leaves_an_optimizer_that_says_so(
    quick_server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C in the middle of a step: the next one raises instead of reading the last one's answers."""
    p = nn.Parameter(torch.ones(3))
    optimizer = Adam([p], server=quick_server.address)
    p.grad = torch.ones(3)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("optimd.client.session.write_values", interrupted)
        with pytest.raises(KeyboardInterrupt):
            optimizer.step()
    with pytest.raises(ConnectionLostError, match="KeyboardInterrupt"):
        optimizer.step()
    optimizer.close()
    assert eventually(lambda: not quick_server.registry.all())


@pytest.mark.skipif(
    "[never]" in Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text(),
    reason="the kernel gives no huge pages",
)
def test_a_servers_state_lies_in_huge_pages() -> None:
    """Two moments of 16 MB each."""
    p = nn.Parameter(torch.zeros(4_000_000))
    with server_process() as (process, address), Adam([p], server=address) as optimizer:
        p.grad = torch.ones(4_000_000)
        optimizer.step()
        rollup = Path(f"/proc/{process.pid}/smaps_rollup").read_text()
        huge = next(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("AnonHugePages"))
    assert huge > 20_000


def test_a_pickled_reference_to_a_foreign_process_is_no_way_around(server: Server) -> None:
    """What a fork inherits is refused on every method that reaches the server."""
    p = nn.Parameter(torch.ones(3))
    with Adam([p], server=server.address, options=ProxyOptions()) as optimizer:
        connection = optimizer._session._line.connection
        pid = connection._pid
        connection._pid = -1
        p.grad = torch.ones(3)
        for call in (optimizer.step, optimizer.state_dict, lambda: len(optimizer.state)):
            with pytest.raises(ForkedProcessError):
                call()
        connection._pid = pid
        optimizer.step()


def last_line_of(*command: str, **environment: str) -> str:
    ended = subprocess.run(
        command, capture_output=True, text=True, timeout=150, check=False, env={**os.environ, **environment}
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout.strip().splitlines()[-1]


def accuracy(line: str) -> float:
    assert line.startswith("test accuracy "), line
    return float(line.removeprefix("test accuracy ").removesuffix("%"))


def test_the_example_learns_alone_with_a_server_and_under_torchrun(folder: Path) -> None:
    """97 % each way. Under torchrun both workers share one embedded server, which ends with them."""
    assert accuracy(last_line_of(sys.executable, str(EXAMPLE), TMPDIR=str(folder))) >= 97
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", str(EXAMPLE), "--epochs=10")
    with server_process() as (_, address):
        assert accuracy(last_line_of(*torchrun, "--server", address, "--job=digits")) >= 97
    assert accuracy(last_line_of(*torchrun, TMPDIR=str(folder))) >= 97
    assert eventually(lambda: not meeting_places(folder))


def test_a_restarted_example_takes_up_where_it_was_killed(tmp_path: Path) -> None:
    """Killed in the middle and started again, it ends with the weights of a run that was not, bit for bit."""
    with server_process() as (_, address):
        common = (sys.executable, str(EXAMPLE), "--server", address, "--epochs=4")
        last_line_of(*common, "--job=whole", "--save", str(tmp_path / "whole.pt"))
        unbuffered = (common[0], "-u", *common[1:], "--job=cut")
        process = subprocess.Popen(unbuffered, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        while not process.stdout.readline().startswith("step   44"):
            assert process.poll() is None, "it ended before it could be killed"
        process.kill()
        process.communicate()
        admin = Admin(Target(address=address))
        assert 0 < admin.job("cut").summary.step < admin.job("whole").summary.step
        last_line_of(*common, "--job=cut", "--save", str(tmp_path / "cut.pt"))
    whole, cut = torch.load(tmp_path / "whole.pt"), torch.load(tmp_path / "cut.pt")
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
