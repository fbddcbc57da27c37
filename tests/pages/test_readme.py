"""The README's shell blocks, typed as they stand: on this machine, with addresses and folders of the test's own."""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.certificates import Authority
from tests.support import ROOT

pytestmark = pytest.mark.timeout(300)

README = (ROOT / "README.md").read_text(encoding="utf-8")

TOKENS = """
[[token]]
name = "operator"
secret = "a-secret-of-twenty-four"
admin = true
"""

TRAIN = """
import torch
from optimd.client import Adam

model = torch.nn.Linear(3, 1)
with Adam(model.parameters()) as optimizer:
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
print("receipt", optimizer.last_receipt.step, optimizer.last_receipt.contributors)
"""


PRELUDE = """
trap 'kill $(jobs -p) 2> /dev/null' EXIT
# An environment that sees another one's packages has not their commands.
torchrun() { python -m torch.distributed.run "$@"; }
"""


def block(words: str) -> str:
    """The shell block that has these words."""
    fence = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
    blocks = [text for language, text in fence.findall(README) if not language]
    (found,) = (text for text in blocks if words in text)
    return str(found)


@pytest.fixture
def address() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where the blocks are typed: it has the examples of a clone."""
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    return tmp_path


def typed(script: str, address: str, folder: Path) -> str:
    """What a shell that these lines are typed into shows. What still runs behind it is stopped."""
    for theirs, ours in {
        ". .venv/bin/activate": ":",
        "127.0.0.1:50551": address,
        "0.0.0.0:50551": address,
        "gpu-host:50551": address,
        "/tmp/optimd-data": str(folder / "data"),
        "/var/lib/optimd": str(folder / "data"),
    }.items():
        script = script.replace(theirs, ours)
    shell = subprocess.run(
        ["bash", "-euc", PRELUDE + script],
        cwd=folder,
        env={
            "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin",
            "HOME": str(folder),
            "OMP_NUM_THREADS": "1",
            # What it is by default, a reader's is.
            "OPTIMD_SERVER": address,
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=240,
        check=False,
    )
    assert shell.returncode == 0, shell.stdout
    return shell.stdout


def in_background(script: str) -> str:
    """With `optimd serve` behind the rest, which a reader gives a terminal of its own."""
    wait = "tail -f -n +1 serve.log --pid $! | grep -q 'optimd is ready' || { cat serve.log; false; }"
    return re.sub(r"^(optimd serve [^#\n]*?)( *#.*)?$", rf"\1 > serve.log 2>&1 &\n{wait}", script, flags=re.MULTILINE)


def accuracies(output: str) -> list[float]:
    return [float(number) for number in re.findall(r"^test accuracy ([\d.]+)%$", output, re.MULTILINE)]


def test_a_server_of_its_own_and_its_checkpoints(address: str, folder: Path) -> None:
    """The digits alone, by two and by three; what is listed; what is exported, imported, and read by torch."""
    serving = in_background(block("train_digits.py --server 127.0.0.1:50551 --job digits\n"))
    checkpoints = block("optimd export digits digits.pt")
    output = typed(f"{serving}\n{checkpoints}\noptimd jobs list", address, folder)
    assert len(accuracies(output)) == 3
    assert min(accuracies(output)) >= 95
    for job in ("digits", "digits-by-two", "digits-async", "digits-again", "by-two"):
        assert re.search(rf"\b{job}\b", output), output
    exported = torch.load(folder / "digits.pt", weights_only=True)
    assert exported["optimizer"]["state"][0]["step"] == 15 * (1438 // 64)


def test_two_machines_with_certificates_and_tokens(address: str, folder: Path) -> None:
    """Both ranks are here; all else is as it says."""
    authority = Authority(folder / "authority")
    pair = authority.server()
    for path, name in ((pair.cert, "server.pem"), (pair.key, "server.key"), (authority.path, "ca.pem")):
        shutil.copy(path, folder / name)
    (folder / "tokens.toml").write_text(TOKENS)
    (folder / "token").write_text("a-secret-of-twenty-four\n")
    for name in ("tokens.toml", "token", "server.key"):
        (folder / name).chmod(0o600)
    (folder / "train.py").write_text(TRAIN)
    script = in_background(block("RANK=0 WORLD_SIZE=2"))
    ranks = "RANK=0 WORLD_SIZE=2 python train.py"
    assert ranks in script
    script = script.replace(ranks, f"{ranks.replace('RANK=0', 'RANK=1')} & OTHER=$!; {ranks}; wait $OTHER")
    output = typed(script, address, folder)
    assert output.count("receipt 3 (0, 1)") == 2, output
    assert "resnet50" in output


def test_a_server_killed_in_the_middle(address: str, folder: Path) -> None:
    """The worker goes on by itself, to the end."""
    script = block("kill -9 $SERVER").replace("--epochs 60", "--epochs 60 --save killed.pt")
    # The fault is one: the worker has begun, and has not ended.
    script = script.replace("kill -9 $SERVER", "kill -0 $WORKER; optimd jobs list; kill -9 $SERVER")
    whole = "python examples/train_digits.py --server 127.0.0.1:50551 --job whole --epochs 60 --save whole.pt"
    output = typed(f"{script}\n{whole}", address, folder)
    assert re.search(r"\bimmortal\b", output), output
    assert output.count("optimd is ready") == 2
    assert len(accuracies(output)) == 2
    killed, unharmed = torch.load(folder / "killed.pt"), torch.load(folder / "whole.pt")
    assert all(torch.equal(killed[name], unharmed[name]) for name in unharmed)
