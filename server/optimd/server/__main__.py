"""`python -m optimd.server`: serves with what a worker installs, no more.

`optimd serve` is the same with colours, health checks and JSON logs. The embedded server of a training process is
started through this module.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from optimd.server.config import ServerConfig
from optimd.server.errors import ConfigurationError
from optimd.server.run import run


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m optimd.server", description="Hold training jobs' parameters and optimizer state, and step them."
    )
    for setting in fields(ServerConfig):
        flag = "--" + setting.name.replace("_", "-")
        if isinstance(setting.default, bool):
            parser.add_argument(
                flag, default=setting.default, action=argparse.BooleanOptionalAction, help=setting.metadata["help"]
            )
        else:
            parser.add_argument(
                flag,
                default=setting.default,
                type=type(setting.default),
                help=f"{setting.metadata['help']} (default: {setting.default})".replace("%", "%%"),
            )
    parser.add_argument("--log-level", default="info", choices=("debug", "info", "warning", "error"))
    parser.add_argument("--lifeline", type=Path, help="a named pipe; the server stops when nobody holds it open")
    parser.add_argument("--ready-fd", type=int, help="a descriptor to write the bound address to, once ready")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Serves until told to stop. Returns the exit status: 0, or 2 where the server could not start."""
    parsed = vars(_parser().parse_args(arguments))
    logging.basicConfig(
        level=parsed.pop("log_level").upper(), format="%(asctime)s %(levelname)s optimd: %(message)s", stream=sys.stderr
    )
    lifeline_path, ready_fd = parsed.pop("lifeline"), parsed.pop("ready_fd")
    try:
        lifeline = None if lifeline_path is None else _open_lifeline(lifeline_path)
        run(ServerConfig(**parsed), on_ready=lambda server: _tell_ready(ready_fd, server.address), lifeline=lifeline)
    except ConfigurationError as error:
        print(f"optimd: {error}", file=sys.stderr)
        return 2
    finally:
        if lifeline_path is not None:
            _remove_meeting_place(lifeline_path)
    return 0


def _open_lifeline(path: Path) -> int:
    """Opens a pipe to read from without waiting for a writer: who was to be that may have been killed by now."""
    lifeline = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    os.set_blocking(lifeline, True)  # reads do wait, for as long as somebody holds it
    return lifeline


def _remove_meeting_place(lifeline_path: Path) -> None:
    """Removes the pipe and its folder, which were made for this server: whoever made them may have been killed."""
    lifeline_path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        lifeline_path.parent.rmdir()


def _tell_ready(ready_fd: int | None, address: str) -> None:
    if ready_fd is not None:
        # Who was to read it may have been killed by now: the lifeline tells what follows from that.
        with contextlib.suppress(BrokenPipeError):
            os.write(ready_fd, f"{address}\n".encode())
        os.close(ready_fd)


if __name__ == "__main__":
    sys.exit(main())
