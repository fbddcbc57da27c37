"""Who makes a gRPC call, as far as it tells."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

import grpc

AUTHORIZATION: Final = "authorization"
_SCHEME: Final = "bearer "


def secret_of(context: grpc.ServicerContext) -> str | None:
    """The secret that a call brings in `authorization: Bearer ...`; None where it brings none."""
    return secret_in(context.invocation_metadata())


def secret_in(metadata: Iterable[tuple[str, str | bytes]] | None) -> str | None:
    """The same, of what has come with a call."""
    for key, value in metadata or ():
        if key == AUTHORIZATION and isinstance(value, str) and value[: len(_SCHEME)].lower() == _SCHEME:
            return value[len(_SCHEME) :].strip()
    return None


def describe(context: grpc.ServicerContext) -> str:
    """Where a call comes from, for the log: its peer's address, and whose certificate it shows."""
    name = certificate_name(context)
    return f"{context.peer()}, certificate {name}" if name else context.peer()


def certificate_name(context: grpc.ServicerContext) -> str:
    """Whose certificate a call's connection was made with; empty where there was none."""
    properties: Mapping[str, Iterable[bytes]] = context.auth_context()  # type: ignore[assignment]  # so it documents
    for key in ("x509_common_name", "x509_subject_alternative_name"):
        for value in properties.get(key, ()):
            return value.decode(errors="replace")
    return ""
