"""Who makes a gRPC call, as far as it tells."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

import grpc

AUTHORIZATION: Final = "authorization"
_SCHEME: Final = "bearer "


def secret_of(context: grpc.ServicerContext) -> str | None:
    """The secret that a call brings in `authorization: Bearer ...`; None where it brings none."""
    for key, value in context.invocation_metadata() or ():
        if key == AUTHORIZATION and isinstance(value, str) and value[: len(_SCHEME)].lower() == _SCHEME:
            return value[len(_SCHEME) :].strip()
    return None


def certificate_name(context: grpc.ServicerContext) -> str:
    """Whose certificate a call's connection was made with; empty where there was none."""
    properties: Mapping[str, Iterable[bytes]] = context.auth_context()  # type: ignore[assignment]  # so it documents
    for key in ("x509_common_name", "x509_subject_alternative_name"):
        for value in properties.get(key, ()):
            return value.decode(errors="replace")
    return ""
