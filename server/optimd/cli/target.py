"""Which server a command talks to, and how: the same flags for all of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any, Final

import typer

from optimd.cli.signatures import option, own_parameters, with_parameters
from optimd.client import ProxyOptions, Tls
from optimd.client.credentials import Credentials
from optimd.server.config import DEFAULT_ADDRESS


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A server, and what lines to it are opened with."""

    address: str
    tls: Tls | None = None
    token: str | None = field(default=None, repr=False)
    token_file: str | None = None
    insecure: bool = False

    @property
    def credentials(self) -> Credentials:
        """For a line."""
        return Credentials(self.tls, token=self.token, token_file=self.token_file, insecure=self.insecure)

    def options(self, **others: Any) -> ProxyOptions:
        """For an optimizer, with other options."""
        return ProxyOptions(
            tls=self.tls, token=self.token, token_file=self.token_file, insecure=self.insecure, **others
        )


_OPTIONS: Final[dict[str, tuple[Any, Any]]] = {
    "server": (
        Annotated[str, typer.Option(help="The server: host:port or unix:///path.", envvar="OPTIMD_SERVER")],
        DEFAULT_ADDRESS,
    ),
    "tls_ca": (
        Annotated[
            str | None,
            typer.Option(help="Speak TLS; a PEM file of the authorities to trust.", envvar="OPTIMD_TLS_CA"),
        ],
        None,
    ),
    "tls_server_name": (
        Annotated[
            str | None,
            typer.Option(
                help="The name that the server's certificate is for, where it is not its address's host.",
                envvar="OPTIMD_TLS_SERVER_NAME",
            ),
        ],
        None,
    ),
    "client_cert": (
        Annotated[str | None, typer.Option(help="A PEM file with a certificate to show.", envvar="OPTIMD_CLIENT_CERT")],
        None,
    ),
    "client_key": (
        Annotated[str | None, typer.Option(help="A PEM file with its key.", envvar="OPTIMD_CLIENT_KEY")],
        None,
    ),
    "token_file": (
        Annotated[
            str | None,
            typer.Option(
                help="A file with the token to bring; $OPTIMD_TOKEN may hold it instead.", envvar="OPTIMD_TOKEN_FILE"
            ),
        ],
        None,
    ),
    "insecure": (
        Annotated[
            bool,
            typer.Option(
                "--insecure",
                help="Let a token travel in the clear, on a network that you trust.",
                envvar="OPTIMD_INSECURE_TOKEN",
            ),
        ],
        False,
    ),
}
_TOKEN: Final = Annotated[str | None, typer.Option(hidden=True, envvar="OPTIMD_TOKEN")]


def at_server(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command the flags that say which server it talks to.

    Args:
        command: Takes `target: Target` by keyword, and arguments and flags of its own.
    """

    def wrapped(**given: Any) -> None:
        address, ca, server_name, cert, key, token_file, insecure = (given.pop(name) for name in _OPTIONS)
        token = given.pop("token")
        speaks_tls = bool(ca or server_name or cert or key)
        target = Target(
            address=address,
            tls=Tls(ca=ca, cert=cert, key=key, server_name=server_name) if speaks_tls else None,
            token=None if token_file else token,
            token_file=token_file,
            insecure=insecure,
        )
        command(target=target, **given)

    options = [option(name, annotation, default) for name, (annotation, default) in _OPTIONS.items()]
    parameters = [*own_parameters(command, without="target"), *options, option("token", _TOKEN, None)]
    return with_parameters(wrapped, command, parameters)
