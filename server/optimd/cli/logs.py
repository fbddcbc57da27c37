"""What the server's log looks like: lines for a person, or JSON for a collector. The code logs through `logging`."""

from __future__ import annotations

import logging
import sys
from enum import StrEnum
from typing import Any

import structlog

from optimd.server import logcontext


class LogFormat(StrEnum):
    """How log records are written to stderr."""

    CONSOLE = "console"
    JSON = "json"


class LogLevel(StrEnum):
    """From which level on."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


def _add_context(_logger: Any, _method: str, record: structlog.typing.EventDict) -> structlog.typing.EventDict:
    """Which job, step and worker a record is about."""
    return {**record, **logcontext.fields()}


def configure(log_format: LogFormat, level: LogLevel) -> None:
    """Has all records of the process written to stderr, once and in one form."""
    renderer: structlog.typing.Processor
    if log_format is LogFormat.JSON:
        renderer = structlog.processors.JSONRenderer()
    else:
        renderer = structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())
    formatter = structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=[
            structlog.stdlib.add_log_level,
            structlog.stdlib.add_logger_name,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            _add_context,
        ],
        processors=[
            structlog.stdlib.ProcessorFormatter.remove_processors_meta,
            structlog.processors.format_exc_info,
            renderer,
        ],
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter)
    logging.basicConfig(level=level.value.upper(), handlers=[handler], force=True)
