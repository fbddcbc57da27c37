"""What the pages say: their commands run, and their tables have all that there is."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.main import get_command

from optimd.cli.app import app
from optimd.client import Adam, ProxyOptions
from optimd.client.translation import EXCEPTION_OF_REASON
from optimd.server import Server
from tests.support import ROOT, running_server

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

_BLOCK = re.compile(r"^```\n(.*?)^```", re.MULTILINE | re.DOTALL)


def commands(page: Path) -> Iterator[str]:
    """The `optimd` commands in a page's blocks, without comments."""
    for block in _BLOCK.findall(page.read_text(encoding="utf-8")):
        for line in block.splitlines():
            command = line.partition("  #")[0].strip()
            if re.match(r"optimd [a-z]", command) and not re.match(r"optimd \d", command):
                yield command


ALL = sorted({(page.name, command) for page in PAGES for command in commands(page)})
LIVE = [command for name, command in ALL if name == "operations.md" and not command.startswith("optimd serve")]


def test_there_are_commands_to_run() -> None:
    """The pages are read as they are meant to be."""
    assert len(ALL) >= 15
    assert any(command.startswith("optimd top") for command in LIVE)


@pytest.mark.parametrize(("page", "command"), ALL)
def test_every_command_and_flag_on_a_page_is_one(page: str, command: str) -> None:
    """By what the command line knows of them."""
    words = shlex.split(command.partition(" > ")[0].partition(" & ")[0].replace("[", "").replace("]", ""))[1:]
    known = get_command(app)
    while hasattr(known, "commands"):
        assert words[0] in known.commands, f"{page}: {command}"
        known = known.commands[words.pop(0)]
    flags = {flag for option in known.params for flag in (*option.opts, *getattr(option, "secondary_opts", ()))}
    assert {word.partition("=")[0] for word in words if word.startswith("--")} <= flags, f"{page}: {command}"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One that has the job that the pages speak of."""
    with running_server(data_dir=str(tmp_path_factory.mktemp("data"))) as running:
        p = nn.Parameter(torch.ones(100))
        with Adam([p], server=running.address, job="digits", options=ProxyOptions(rank=0, world_size=1)) as optimizer:
            p.grad = torch.ones(100)
            optimizer.step()
        yield running


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("docs")


def test_the_commands_of_an_operator_do_what_the_page_says(server: Server, folder: Path) -> None:
    """In their order, as an operator types them; `jobs verify` needs a server that is stopped."""
    optimd = str(Path(sys.executable).parent / "optimd")
    environment = {**os.environ, "OPTIMD_SERVER": server.address, "COLUMNS": "100"}
    page = ROOT / "docs" / "operations.md"
    ran = 0
    for command in commands(page):
        if (
            command == "optimd serve --print-config > optimd.toml"
            or "--print-config" in command
            or "serve" not in command
        ):
            if "jobs verify" in command:
                continue
            line = command.replace("optimd ", f"{shlex.quote(optimd)} ", 1)
            ended = subprocess.run(
                line, shell=True, cwd=folder, env=environment, capture_output=True, text=True, timeout=100, check=False
            )
            assert ended.returncode == 0, (command, ended.stdout, ended.stderr)
            ran += 1
    assert ran >= 10
    assert (folder / "digits.pt").exists()


def test_every_reason_of_failure_is_on_the_page_with_its_exception() -> None:
    """An operator reads the metric, a user the exception."""
    page = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    table = page[page.index("## What the errors mean") :]
    for reason, exception in EXCEPTION_OF_REASON.items():
        if reason == "JOB_IN_USE":
            # Of admin calls alone.
            continue
        rows = [line for line in table.splitlines() if line.startswith("|")]
        row = next((line for line in rows if reason.lower() in re.split(r"[\s|,]+", line.split("|")[1])), "")
        assert row, reason
        if reason != "UNKNOWN_WORKER":
            assert exception.__name__ in row, reason


def test_links_lead_somewhere() -> None:
    """Within the repository; to headings, too."""
    for page in PAGES:
        for target in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
            if target.startswith("http"):
                continue
            path, _, heading = target.partition("#")
            file = (page.parent / path).resolve() if path else page
            assert file.exists(), f"{page.name}: {target}"
            if heading:
                titles = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
                assert heading in {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}, target
