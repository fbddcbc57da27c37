"""Under torchrun: workers that it starts again, all three modes of the example, and two optimizers of one name."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import pytest
import torch

from tests.support import ROOT, server_process

pytestmark = pytest.mark.timeout(150)

EXAMPLE = ROOT / "examples" / "train_digits.py"


def torchrun(*arguments: str | Path, folder: Path, **environment: str) -> list[str]:
    """Runs a script under torchrun. Gives the lines that its workers have written, one worker's after another's."""
    logs = folder / "logs"
    finished = subprocess.run(
        # torchrun has Python write every word at once: in one file, two workers' lines would get into each other.
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--redirects=1", f"--log-dir={logs}"),
            *arguments,
        ],
        check=False,
        capture_output=True,
        text=True,
        timeout=140,
        env={**os.environ, "TMPDIR": tempfile.mkdtemp(prefix="t-"), **environment},
        cwd=folder,
    )
    assert finished.returncode == 0, finished.stderr
    return [line for log in sorted(logs.rglob("stdout.log")) for line in log.read_text().splitlines()]


@pytest.mark.parametrize("mode", ["async", "bounded"])
def test_the_example_learns_as_well_where_nobody_waits_for_everybody(tmp_path: Path, mode: str) -> None:
    """In the band of the synchronous run, which ends at 97 to 99 %."""
    lines = torchrun("--nproc-per-node=3", EXAMPLE, f"--mode={mode}", "--epochs=12", folder=tmp_path)
    accuracy = lines[-1].removeprefix("test accuracy ").removesuffix("%")
    assert float(accuracy) >= 96


def test_a_worker_that_torchrun_starts_again_takes_up_its_data_and_its_schedule(tmp_path: Path) -> None:
    """One of two kills itself at step 20; torchrun starts both again. The job goes on where it stood, its rate too."""
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(
            """
            import os, signal, sys, torch
            from pathlib import Path
            from optimd.client import Adam

            rank, attempt = int(os.environ["RANK"]), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
            p = torch.nn.Parameter(torch.zeros(500))
            with Adam([p], lr=1.0, server=sys.argv[1], job="restarted") as optimizer:
                schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 0.9 ** optimizer.job_step)
                print("start", rank, attempt, optimizer.job_step, optimizer.param_groups[0]["lr"], flush=True)
                while optimizer.job_step < 40:
                    if rank == 1 and attempt == 0 and optimizer.job_step == 20:
                        Path("died").write_text(str(optimizer.job_step))
                        os.kill(os.getpid(), signal.SIGKILL)
                    step = optimizer.job_step
                    generator = torch.Generator().manual_seed(100 * rank + step)
                    p.grad = torch.randn(500, generator=generator)
                    optimizer.step()
                    schedule.step()
                    print("step", rank, optimizer.last_receipt.step, optimizer.last_receipt.contributors, flush=True)
                print("end", rank, optimizer.param_groups[0]["lr"], optimizer.job_step, flush=True)
                torch.save(p.detach(), f"final-{rank}.pt")
            """
        )
    )
    with server_process("--lease-s=2") as (_, address):
        lines = torchrun("--nproc-per-node=2", "--max-restarts=1", script, address, folder=tmp_path)
    assert (tmp_path / "died").read_text() == "20"
    starts = [line.split()[1:] for line in lines if line.startswith("start")]
    resumed = [(int(step), float(rate)) for _, attempt, step, rate in starts if attempt == "1"]
    assert len(resumed) == 2
    for step, rate in resumed:
        assert step >= 20
        assert rate == pytest.approx(0.9**step)
    ends = [line.split()[1:] for line in lines if line.startswith("end")]
    assert [int(step) for _, _, step in ends] == [40, 40]
    assert [float(rate) for _, rate, _ in ends] == pytest.approx([0.9**40] * 2)
    assert torch.equal(torch.load(tmp_path / "final-0.pt"), torch.load(tmp_path / "final-1.pt"))


def test_two_optimizers_of_one_name_are_two_jobs_for_all_workers(tmp_path: Path) -> None:
    """As in a GAN: the generator's and the discriminator's steps do not meet, and both are the workers' mean."""
    script = tmp_path / "gan.py"
    script.write_text(
        textwrap.dedent(
            """
            import os, sys, torch
            from torch import nn
            from optimd.client import Adam

            rank = int(os.environ["RANK"])
            torch.manual_seed(0)
            generator = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2))
            critic = nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, 1))
            torch.manual_seed(rank)
            with (
                Adam(generator.parameters(), lr=1e-2, server=sys.argv[1], job="gan") as opt_g,
                Adam(critic.parameters(), lr=1e-3, server=sys.argv[1], job="gan") as opt_c,
            ):
                bce = nn.functional.binary_cross_entropy_with_logits
                for _ in range(10):
                    real, fake = torch.randn(8, 2) + 3, generator(torch.randn(8, 4))
                    opt_c.zero_grad()
                    loss = bce(critic(real), torch.ones(8, 1)) + bce(critic(fake.detach()), torch.zeros(8, 1))
                    loss.backward()
                    opt_c.step()
                    opt_g.zero_grad()
                    bce(critic(fake), torch.ones(8, 1)).backward()
                    opt_g.step()
                print("jobs", opt_g.job, opt_c.job, opt_g.job_step, opt_c.job_step, flush=True)
                assert opt_c.last_receipt.contributors == (0, 1)
            torch.save([generator.state_dict(), critic.state_dict()], f"gan-{rank}.pt")
            """
        )
    )
    with server_process() as (_, address):
        lines = torchrun("--nproc-per-node=2", script, address, folder=tmp_path)
    assert lines == ["jobs gan gan/2 10 10"] * 2
    first, second = torch.load(tmp_path / "gan-0.pt"), torch.load(tmp_path / "gan-1.pt")
    for mine, other in zip(first, second, strict=True):
        assert all(torch.equal(mine[name], other[name]) for name in mine)
