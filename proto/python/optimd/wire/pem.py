"""PEM files that TLS is spoken with: whether they are what they should be, which gRPC does not say."""

from __future__ import annotations

import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class PemError(ValueError):
    """A file is not what it should be."""


def load_pair(context: ssl.SSLContext, cert: str | Path, key: str | Path) -> None:
    """Has `context` show a certificate.

    Raises:
        PemError: the files are not a certificate and its key.
    """
    try:
        # A password, lest it be asked for at the terminal.
        context.load_cert_chain(cert, key, password="")
    except (ssl.SSLError, ValueError, OSError) as error:
        raise PemError(
            f"{cert} and {key} are not a certificate and its key, both PEM, the key not encrypted ({_reason(error)})"
        ) from error


def load_authorities(context: ssl.SSLContext, path: str | Path) -> None:
    """Has `context` trust the authorities in a file.

    Raises:
        PemError: there are none in it.
    """
    with _authorities_of(path):
        context.load_verify_locations(path)


def client_context(ca: str | None) -> ssl.SSLContext:
    """What a client speaks TLS with that trusts the authorities in a file; None: those of the system.

    Raises:
        PemError: there are none in it.
    """
    with _authorities_of(ca):
        return ssl.create_default_context(cafile=ca)


@contextmanager
def _authorities_of(path: str | Path | None) -> Iterator[None]:
    try:
        yield
    except (ssl.SSLError, OSError) as error:
        raise PemError(f"{path} has no certificates of authorities in PEM ({_reason(error)})") from error


def _reason(error: Exception) -> str:
    said = getattr(error, "reason", None)
    return said.lower().replace("_", " ") if isinstance(said, str) else str(error)
