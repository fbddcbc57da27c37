"""The `optimd` command."""

import sys

__all__ = ["main"]


def main() -> None:
    """Runs the command line. Ends the process with the command's status."""
    try:
        from optimd.cli.app import app  # noqa: PLC0415  # only `optimd[server]` has what it needs
    except ModuleNotFoundError as error:
        if error.name in {"rich", "safetensors", "structlog", "typer"}:
            sys.exit(f"optimd: the command line needs {error.name}: pip install 'optimd[server]'")
        raise
    app()
