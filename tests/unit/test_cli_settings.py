"""Where `optimd serve` takes its settings from: flags, then OPTIMD_*, then a TOML file."""

from __future__ import annotations

import json
import tomllib
from dataclasses import fields
from pathlib import Path

import pytest

from optimd.server import ServerConfig
from tests.command import optimd


def serve(*arguments: str, **environment: str) -> tuple[int, str]:
    """Runs `optimd serve` in this process: its status, and what it wrote."""
    return optimd("serve", *arguments, **environment)


def told(path: Path, content: str) -> Path:
    path.write_text(content, encoding="utf-8")
    return path


def test_a_flag_comes_before_the_environment_and_that_before_a_file(tmp_path: Path) -> None:
    """What each setting ends up as, and where it has come from, is printed for a script."""
    path = told(
        tmp_path / "optimd.toml", 'threads = 3\nlease_s = 4\nmax_jobs = 5\nlog_format = "json"\nhealth = false\n'
    )
    status, output = serve(
        "--config", str(path), "--max-jobs=7", "--print-config", "--json", OPTIMD_LEASE_S="6", OPTIMD_MAX_JOBS="8"
    )
    assert status == 0, output
    settings = json.loads(output)
    chosen = {name: (each["value"], each["source"]) for name, each in settings.items() if each["source"] != "default"}
    assert chosen == {
        "threads": (3, "file"),
        "lease_s": (6.0, "environment"),
        "max_jobs": (7, "flag"),
        "log_format": ("json", "file"),
        "health": (False, "file"),
    }
    assert settings["max_workers"] == {"value": ServerConfig().max_workers, "source": "default"}


def test_the_file_can_be_named_in_the_environment(tmp_path: Path) -> None:
    """As a container would."""
    path = told(tmp_path / "optimd.toml", "threads = 3\n")
    assert "\nthreads = 3  # file\n" in serve("--print-config", OPTIMD_CONFIG=str(path))[1]


def test_what_is_printed_is_a_file_that_sets_everything_the_same_way(tmp_path: Path) -> None:
    """`optimd serve --print-config > optimd.toml` is how to begin one."""
    _, printed = serve("--print-config", "--data-dir", 'a "quoted" \\ folder', "--accept-loss")
    content = tomllib.loads(printed)
    assert content.keys() == {field.name for field in fields(ServerConfig)} | {"log_level", "log_format"}
    _, again = serve("--print-config", "--json", "--config", str(told(tmp_path / "optimd.toml", printed)))
    assert {name: each["value"] for name, each in json.loads(again).items()} == content
    assert {each["source"] for each in json.loads(again).values()} == {"file"}


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("data_dirr = 'x'", "'data_dirr' is not a setting; did you mean data_dir?"),
        ("data-dir = 'x'", "'data-dir' is not a setting; did you mean data_dir?"),
        ("zzz = 1", "'zzz' is not a setting; `optimd serve --print-config` shows them all"),
        ("[server]\nthreads = 1", "'server' is not a setting"),
        ("threads = '3'", "threads is '3'; it must be a whole number"),
        ("threads = true", "threads is True; it must be a whole number"),
        ("threads = 1.5", "threads is 1.5; it must be a whole number"),
        ("insecure = 1", "insecure is 1; it must be true or false"),
        ("lease_s = 'x'", "lease_s is 'x'; it must be a number"),
        ("data_dir = 1", "data_dir is 1; it must be a string"),
        ("log_level = 'loud'", "log_level is 'loud'; it must be one of debug, info, warning, error"),
        ("threads = ", "is not TOML"),
    ],
)
def test_a_bad_file_is_one_sentence_that_names_it_and_status_2(tmp_path: Path, content: str, problem: str) -> None:
    """Whatever is wrong with it; nothing is started."""
    path = told(tmp_path / "optimd.toml", content)
    status, output = serve("--config", str(path))
    assert (status, output.count("\n")) == (2, 1), output
    assert output.startswith("optimd: ")
    assert str(path) in output
    assert problem in output


def test_a_file_that_is_not_there_or_is_no_text_is_one_sentence(tmp_path: Path) -> None:
    """So are a folder and a file of bytes."""
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    for path, problem in (
        (tmp_path / "none.toml", "no such file or directory"),
        (tmp_path, "is a directory"),
        (tmp_path / "bytes", "is not TOML"),
    ):
        status, output = serve("--config", str(path))
        assert (status, output.count("\n"), problem in output) == (2, 1, True), output


def test_values_are_checked_whatever_they_come_from(tmp_path: Path) -> None:
    """By the server's own rules, as flags are."""
    path = told(tmp_path / "optimd.toml", "max_jobs = 0\n")
    assert serve("--config", str(path)) == (2, "optimd: max_jobs is 0; it must be at least 1\n")
    assert serve("--print-config", OPTIMD_MAX_JOBS="0") == (2, "optimd: max_jobs is 0; it must be at least 1\n")
    status, output = serve(OPTIMD_THREADS="many")
    assert (status, "'OPTIMD_THREADS'" in output) == (2, True)
