"""What the pages say: their commands run, and their tables have all that there is."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.main import get_command

from optimd.cli.app import app
from optimd.client import Adam, ProxyOptions
from optimd.client.translation import EXCEPTION_OF_REASON
from tests.command import optimd
from tests.support import ROOT, running_server

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def commands(page: Path) -> Iterator[str]:
    """The `optimd` commands in a page's blocks, without comments."""
    for language, block in _BLOCK.findall(page.read_text(encoding="utf-8")):
        for line in block.splitlines() if not language else ():
            command = line.partition("  #")[0].strip()
            if re.match(r"optimd [a-z]", command) and not re.match(r"optimd \d", command):
                yield command


ALL = sorted({(page.name, command) for page in PAGES for command in commands(page)})


def test_there_are_commands_to_run() -> None:
    """The pages are read as they are meant to be."""
    assert len(ALL) >= 15
    assert {page for page, _ in ALL} >= {"README.md", "operations.md", "durability.md", "security.md"}


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


def run(command: str) -> None:
    """An `optimd` command of a page, in this process and its working directory, with its redirection."""
    typed, _, file = command.partition(" > ")
    status, output = optimd(*shlex.split(typed)[1:])
    assert status == 0, (command, output)
    if file:
        Path(file.strip()).write_text(output, encoding="utf-8")


def test_the_commands_of_an_operator_do_what_the_page_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In their order, as an operator types them; `jobs verify` at the end, for it needs a server that is stopped."""
    data_dir = tmp_path / "data"
    page = ROOT / "docs" / "operations.md"
    typed = [command for command in commands(page) if "serve" not in command or "--print-config" in command]
    monkeypatch.chdir(tmp_path)
    with running_server(data_dir=str(data_dir)) as server:
        monkeypatch.setenv("OPTIMD_SERVER", server.address)
        p = nn.Parameter(torch.ones(100))
        with Adam([p], server=server.address, job="digits", options=ProxyOptions(rank=0, world_size=1)) as optimizer:
            p.grad = torch.ones(100)
            optimizer.step()
        for command in typed:
            if "jobs verify" not in command:
                run(command)
    assert torch.load("digits.pt", weights_only=True)["optimizer"]["state"][0]["step"] == 1
    for command in typed:
        if "jobs verify" in command:
            run(command.replace("/var/lib/optimd", str(data_dir)))
    assert {"export", "import", "status", "top", "bench", "jobs"} <= {command.split()[1] for command in typed}


@pytest.mark.parametrize(("page", "command"), [(page, command) for page, command in ALL if " serve " in command])
def test_every_server_on_a_page_has_settings_that_are_taken(page: str, command: str) -> None:
    """All that `serve` does before it opens anything."""
    words = shlex.split(command.partition(" > ")[0].partition(" & ")[0])[1:]
    words = [word for word in words if word not in {"...", "--config", "optimd.toml", "--print-config"}]
    status, output = optimd(*words, "--print-config")
    assert status == 0, (page, command, output)


def test_every_reason_of_failure_is_on_the_page_with_its_exception() -> None:
    """An operator reads the metric, a user the exception."""
    page = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    table = page[page.index("## What the errors mean") :]
    for reason, exception in EXCEPTION_OF_REASON.items():
        rows = [line for line in table.splitlines() if line.startswith("|")]
        row = next((line for line in rows if reason.lower() in re.split(r"[\s|,]+", line.split("|")[1])), "")
        assert row, reason
        if reason not in ("UNKNOWN_WORKER", "JOB_IN_USE"):
            # Of admin calls alone.
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
