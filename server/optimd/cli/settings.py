"""A server's settings as a command takes them: by flag, `OPTIMD_*` or a TOML file, in that order."""

from __future__ import annotations

import difflib
import inspect
import json
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from optimd.cli.errors import CommandError
from optimd.cli.logs import LogFormat, LogLevel
from optimd.cli.signatures import option, own_parameters, with_parameters
from optimd.server import ServerConfig

_PREFIX: Final = "OPTIMD_"
# By the names of click's `ParameterSource`, which is another class where typer brings its own click.
_SOURCES: Final = {"COMMANDLINE": "flag", "ENVIRONMENT": "environment", "DEFAULT_MAP": "file"}
_KINDS: Final = {bool: "true or false", int: "a whole number", float: "a number", str: "a string"}


@dataclass(frozen=True, slots=True)
class Setting:
    """One setting: of the server, or of the command that runs it."""

    name: str
    default: Any
    text: str
    """What it means."""

    @property
    def variable(self) -> str:
        """The environment variable that it is read from."""
        return _PREFIX + self.name.upper()

    @property
    def kind(self) -> type:
        """The type of its values: one of bool, int, float, str, or an enumeration of strings."""
        return type(self.default)


@dataclass(frozen=True, slots=True)
class Chosen:
    """All settings, and where each has come from."""

    values: Mapping[str, Any]
    sources: Mapping[str, str]
    """"flag", "environment", "file" or "default"."""

    def server_config(self) -> ServerConfig:
        """The server's.

        Raises:
            ConfigurationError: a value is out of its range.
        """
        return ServerConfig(**{setting.name: self.values[setting.name] for setting in _SERVER})

    def as_toml(self) -> str:
        """A file that sets them all, each with what it means and where it has come from."""
        parts = []
        for setting in SETTINGS:
            value = json.dumps(self.values[setting.name], ensure_ascii=False)
            parts.append(f"# {setting.text}\n{setting.name} = {value}  # {self.sources[setting.name]}\n")
        return "\n".join(parts)

    def as_json(self) -> dict[str, Any]:
        """The same for a script."""
        return {
            setting.name: {"value": self.values[setting.name], "source": self.sources[setting.name]}
            for setting in SETTINGS
        }


_SERVER: Final = tuple(Setting(item.name, item.default, item.metadata["help"]) for item in fields(ServerConfig))
SETTINGS: Final = (
    *_SERVER,
    Setting("log_level", LogLevel.INFO, "Log from this level on."),
    Setting("log_format", LogFormat.CONSOLE, "Log lines for a person, or JSON for a collector."),
)
"""All that a file may set, in the order of `--help`."""


def with_settings(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command one flag for each setting, and `--config`.

    Args:
        command: Takes `chosen: Chosen`, and flags of its own by keyword.
    """

    def wrapped(context: typer.Context, config: Path | None = None, **given: Any) -> None:  # noqa: ARG001  # eager
        own = {name: value for name, value in given.items() if name not in _NAMES}
        values = {name: given[name] for name in _NAMES}
        sources = {name: _source(context, name) for name in _NAMES}
        command(chosen=Chosen(values, sources), **own)

    parameters = [
        inspect.Parameter("context", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context),
        option("config", _CONFIG, None),
        *(_parameter(setting) for setting in SETTINGS),
        *own_parameters(command, without="chosen"),
    ]
    return with_parameters(wrapped, command, parameters)


def _parameter(setting: Setting) -> inspect.Parameter:
    text = typer.Option(help=setting.text, envvar=setting.variable)
    return option(setting.name, Annotated[setting.kind, text], setting.default)


def _source(context: typer.Context, name: str) -> str:
    source = context.get_parameter_source(name)
    return "default" if source is None else _SOURCES.get(source.name, "default")


def _read_file(context: typer.Context, path: Path | None) -> Path | None:
    """Puts a file's values below what flags and the environment say. Called before any other option is looked at."""
    if path is not None:
        try:
            context.default_map = {**(context.default_map or {}), **read_settings(path)}
        except CommandError as error:
            typer.echo(f"optimd: {error}", err=True)
            raise typer.Exit(2) from None
    return path


_CONFIG: Final = Annotated[
    Path | None,
    typer.Option(
        help='A TOML file of settings: a flag\'s name with underscores, such as data_dir = "/var/lib/optimd". Flags '
        "and OPTIMD_* come before it.",
        envvar=_PREFIX + "CONFIG",
        callback=_read_file,
        is_eager=True,
    ),
]

_BY_NAME: Final = {setting.name: setting for setting in SETTINGS}
_NAMES: Final = tuple(_BY_NAME)


def read_settings(path: Path) -> dict[str, Any]:
    """The settings of a TOML file.

    Raises:
        CommandError: it cannot be read, is no TOML, or sets something that is no setting, or to no value of one.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CommandError(f"cannot read {path}: {(error.strerror or str(error)).lower()}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise CommandError(f"{path} is not TOML: {error}") from error
    for name, value in content.items():
        setting = _BY_NAME.get(name)
        if setting is None:
            raise CommandError(f"{path}: {name!r} is not a setting{_suggestion(name)}")
        _check_type(path, setting, value)
    return content


def _suggestion(name: str) -> str:
    near = difflib.get_close_matches(name.replace("-", "_"), _NAMES, n=1)
    return f"; did you mean {near[0]}?" if near else "; `optimd serve --print-config` shows them all"


def _check_type(path: Path, setting: Setting, value: object) -> None:
    kind = setting.kind
    if issubclass(kind, StrEnum):
        choices = [choice.value for choice in kind]
        if value not in choices:
            raise CommandError(f"{path}: {setting.name} is {value!r}; it must be one of {', '.join(choices)}")
        return
    # To Python a bool is an int, and an int will do where a number is wanted.
    fits = type(value) is kind or (kind is float and type(value) is int)
    if not fits:
        raise CommandError(f"{path}: {setting.name} is {value!r}; it must be {_KINDS[kind]}")
