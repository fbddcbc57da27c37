"""The `optimd` command, run in this process."""

from __future__ import annotations

import logging

from typer.testing import CliRunner

from optimd.cli.app import app


def optimd(*arguments: str, **environment: str) -> tuple[int, str]:
    """Runs the command: its status, and what it wrote."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    try:
        result = CliRunner().invoke(app, arguments, env={"COLUMNS": "120", "TERM": "dumb", **environment})
    finally:
        # `serve` has its log go to where the command writes, which is gone now.
        root.handlers[:] = handlers
        root.setLevel(level)
    return result.exit_code, result.output
