"""Who may call: bearer tokens, and what each is good for.

A file of tokens is TOML, one table a token:

    [[token]]
    name = "vision"             # what the log calls who brings it
    secret = "..."              # at least 16 characters: openssl rand -hex 32
    jobs = ["resnet*", "vit"]   # the jobs that it may train and read; default: all
    admin = false               # whether it may make admin calls, too
"""

from __future__ import annotations

import fnmatch
import hashlib
import hmac
import logging
import threading
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from optimd.server.errors import ConfigurationError, PermissionDeniedError, UnauthenticatedError

_log = logging.getLogger(__name__)

MIN_SECRET_CHARACTERS: Final = 16
"""The shortest secret that is taken. What can be guessed is none."""

_SHOWN: Final = 100
"""How much of a name is shown that somebody brings who may be anybody."""

_KEYS: Final = {"name": str, "secret": str, "jobs": list, "admin": bool}


@dataclass(frozen=True, slots=True)
class Caller:
    """Who is calling, and what for.

    Args:
        name: What the log calls it; empty where nobody has to say who they are.
        jobs: Patterns of the jobs that it may use, as of a shell.
        admin: Whether it may make admin calls.
        digest: SHA-256 of its token's secret: who brings another one is somebody else. All digests are of one length,
            and take as long to compare.
    """

    name: str = ""
    jobs: tuple[str, ...] = ("*",)
    admin: bool = True
    digest: bytes = field(default=b"", repr=False)

    def check_job(self, job: str) -> None:
        """Whether it may use a job, be there one of that name or not.

        Raises:
            PermissionDeniedError: it may not.
        """
        if not any(fnmatch.fnmatchcase(job, pattern) for pattern in self.jobs):
            raise PermissionDeniedError(
                f"the token {self.name!r} is not good for job {job[:_SHOWN]!r}: bring one that is, or have its `jobs` "
                "extended"
            )

    def check_admin(self) -> None:
        """Whether it may make admin calls.

        Raises:
            PermissionDeniedError: it may not.
        """
        if not self.admin:
            raise PermissionDeniedError(
                f"the token {self.name!r} is not good for admin calls: bring one that has `admin = true`"
            )


ANYBODY: Final = Caller()
"""Who calls a server that asks for no tokens."""


def read_tokens(path: Path) -> list[Caller]:
    """Whom a file of tokens lets in.

    Raises:
        ConfigurationError: it cannot be read, or is not what this module's docstring shows. Secrets are not told of.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigurationError(
            f"cannot read the tokens in {path}: {(error.strerror or str(error)).lower()}"
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        # What stands around the place might be a secret.
        raise ConfigurationError(f"{path} is not TOML: {str(error).partition(chr(10))[0]}") from None
    tables = content.pop("token", None)
    if content or not isinstance(tables, list) or not tables:
        raise ConfigurationError(f"{path} has to consist of [[token]] tables, at least one")
    callers = [_read_token(path, number, table) for number, table in enumerate(tables, 1)]
    for what, values in (
        ("name", [caller.name for caller in callers]),
        ("secret", [caller.digest for caller in callers]),
    ):
        if len(set(values)) < len(values):
            raise ConfigurationError(f"{path}: two tokens have the same {what}")
    return callers


def _read_token(path: Path, number: int, table: Any) -> Caller:
    where = f"{path}: token {number}"
    if not isinstance(table, dict):
        raise ConfigurationError(f"{where} is no table; write [[token]]")
    unknown = sorted(table.keys() - _KEYS.keys())
    if unknown:
        raise ConfigurationError(f"{where} has {unknown[0]!r}, which is none of {', '.join(_KEYS)}")
    for key in ("name", "secret"):
        if not table.get(key):
            raise ConfigurationError(f"{where} has no {key}")
    for key, value in table.items():
        if type(value) is not _KEYS[key]:
            raise ConfigurationError(f"{where}: its {key} has to be a {_KEYS[key].__name__}")
    if len(table["secret"]) < MIN_SECRET_CHARACTERS:
        raise ConfigurationError(
            f"{where}: its secret has fewer than {MIN_SECRET_CHARACTERS} characters; `openssl rand -hex 32` makes one"
        )
    if not table["secret"].isascii() or not table["secret"].isprintable() or " " in table["secret"]:
        raise ConfigurationError(f"{where}: its secret has to be printable ASCII without spaces, to fit into a header")
    jobs = table.get("jobs", ["*"])
    if not all(isinstance(job, str) for job in jobs):
        raise ConfigurationError(f"{where}: its jobs have to be strings")
    return Caller(table["name"], tuple(jobs), table.get("admin", False), _digest(table["secret"]))


def _digest(secret: str) -> bytes:
    return hashlib.sha256(secret.encode()).digest()


class Gate:
    """Lets callers in who bring a token, and ends their calls when it is revoked. Thread-safe.

    Args:
        path: The file of tokens. None: everybody may do everything.

    Raises:
        ConfigurationError: as of `read_tokens`.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._callers: Sequence[Caller] = [] if path is None else read_tokens(path)  # replaced as a whole
        # Long calls that are under way: whose, and what ends them.
        self._guests: dict[int, tuple[Caller, Callable[[], object]]] = {}  # guarded by self._lock
        self._next_guest = 0

    @property
    def is_open(self) -> bool:
        """Whether nobody has to bring a token."""
        return self._path is None

    def admit(self, secret: str | None) -> Caller:
        """Who brings a secret.

        Raises:
            UnauthenticatedError: it is none of the tokens, or none was brought where one is needed.
        """
        if self._path is None:
            return ANYBODY
        if secret is None:
            raise UnauthenticatedError(
                "this server asks for a token: set ProxyOptions(token=...) or $OPTIMD_TOKEN, or name a file that has it"
            )
        digest = _digest(secret)
        # All of them, whichever it is: how long it takes tells nothing.
        found = [caller for caller in self._callers if hmac.compare_digest(caller.digest, digest)]
        if not found:
            raise UnauthenticatedError("this server does not know the token that was brought; it may have been revoked")
        return found[0]

    def stay(self, caller: Caller, end: Callable[[], object]) -> Callable[[], None]:
        """A call begins that may take long.

        Args:
            caller: Whose.
            end: Ends it; called if its token is revoked, or is good for less. Must not block.

        Returns:
            To be called when it is over.
        """
        with self._lock:
            number, self._next_guest = self._next_guest, self._next_guest + 1
            self._guests[number] = (caller, end)
            is_revoked = self._path is not None and caller not in self._callers
        if is_revoked:
            # Between `admit` and now.
            end()

        def leave() -> None:
            with self._lock:
                self._guests.pop(number, None)

        return leave

    def reload(self) -> None:
        """Reads the file again, and ends the calls of tokens that are not in it any more as they were.

        One that cannot be used is told of in the log, and the tokens stay as they were.
        """
        if self._path is None:
            _log.info(
                "asked to read the tokens again, and there is no file of them; certificates are read by themselves"
            )
            return
        try:
            callers = read_tokens(self._path)
        except ConfigurationError as error:
            _log.error("the tokens stay as they were: %s", error)
            return
        with self._lock:
            # A secret that is another one is revoked, too, whatever its token is called.
            gone = set(self._callers).difference(callers)
            self._callers = callers
            ended = [end for caller, end in self._guests.values() if caller in gone]
        for end in ended:
            end()
        _log.info("read %d tokens from %s; %d calls of others ended", len(callers), self._path, len(ended))
