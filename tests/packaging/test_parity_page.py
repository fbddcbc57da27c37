"""docs/parity.md says of every part of torch's optimizer what it is here, and names tests that exist."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

import pytest
import torch

from tests.support import ROOT

PAGE = (ROOT / "docs" / "parity.md").read_text()
NAMED = sorted(set(re.findall(r"`(test_\w+\.py)::(test_\w+)`", PAGE)))


def functions_in(path: Path) -> set[str]:
    """The test functions of a file."""
    return {
        node.name
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }


@pytest.fixture(scope="module")
def known() -> dict[str, set[str]]:
    """The tests of all files of a name, by that name."""
    found: dict[str, set[str]] = {}
    for path in (ROOT / "tests").rglob("test_*.py"):
        found.setdefault(path.name, set()).update(functions_in(path))
    return found


def test_every_test_that_the_page_names_is_there(known: dict[str, set[str]]) -> None:
    """A renamed or deleted test is noticed."""
    assert len(NAMED) > 50
    missing = [f"{file}::{name}" for file, name in NAMED if name not in known.get(file, ())]
    assert not missing


def test_every_parity_test_file_is_on_the_page() -> None:
    """A new subject of tests is a new line of the page."""
    files = {path.name for path in (ROOT / "tests" / "parity").glob("test_*.py")}
    assert files <= {file for file, _ in NAMED}


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.AdamW])
def test_every_argument_and_method_of_torchs_is_on_the_page(optimizer: type) -> None:
    """What a newer torch adds is noticed."""
    arguments = set(inspect.signature(optimizer.__init__).parameters) - {"self"}  # type: ignore[misc]
    methods = {name for name in dir(optimizer) if not name.startswith("_")}
    written = set(re.findall(r"`(\w+)[`(=]", PAGE)) | set(re.findall(r"(\w+)=", PAGE))
    assert arguments | methods <= written


def test_every_scheduler_of_torchs_is_on_the_page() -> None:
    """By its class; aliases and private ones aside."""
    schedulers = {
        name
        for name, member in vars(torch.optim.lr_scheduler).items()
        if inspect.isclass(member)
        and issubclass(member, torch.optim.lr_scheduler.LRScheduler)
        and not name.startswith("_")
        and name != "LRScheduler"
    }
    assert len(schedulers) > 10
    assert schedulers <= set(re.findall(r"`(\w+)`", PAGE))
