"""How a worker proves who it is, and that the server is who it says: TLS, and a token."""

from __future__ import annotations

import ipaddress
import socket
import ssl
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import grpc

from optimd.client.environment import WorkerEnvironment
from optimd.client.exceptions import ConfigurationError
from optimd.client.options import ProxyOptions, Tls
from optimd.wire.pem import PemError, client_context, load_pair

_UNIX: Final = "unix:"
_LOOK_TIMEOUT_S: Final = 5.0

_Stamp = tuple[tuple[int, int, int], ...]


class Credentials:
    """What lines to one server are opened with. Files are read whenever a line or a call is opened.

    A file of a token that cannot be read just now, since it is being replaced, is stood in for by what it had before.

    Args:
        tls: How TLS is spoken; None: it is not.
        token: What is brought to every call.
        token_file: Or a file that has it.
        insecure: Whether a token may travel in the clear to other hosts.
    """

    def __init__(
        self,
        tls: Tls | None = None,
        *,
        token: str | None = None,
        token_file: str | None = None,
        insecure: bool = False,
    ) -> None:
        self._tls = tls
        self._token = token
        self._token_file = token_file
        self._insecure = insecure
        self._last_token: str | None = None

    @classmethod
    def chosen(cls, options: ProxyOptions, environment: WorkerEnvironment) -> Credentials:
        """Those that options ask for, or else the environment."""
        asks_for_token = options.token is not None or options.token_file is not None
        return cls(
            environment.tls if options.tls is None else options.tls,
            token=options.token if asks_for_token else environment.token,
            token_file=options.token_file if asks_for_token else environment.token_file,
            insecure=options.insecure or environment.insecure,
        )

    def channel(self, address: str, options: Sequence[tuple[str, Any]] = ()) -> grpc.Channel:
        """A line to the server at `address`. On a Unix socket there is no TLS: its file's permissions protect it.

        Raises:
            ConfigurationError: a file cannot be read or is not what it should be, or a token would travel in the clear.
        """
        if self._tls is None or address.startswith(_UNIX):
            if (self._token or self._token_file) and not self._insecure and not _is_on_this_host(address):
                raise ConfigurationError(
                    f"a token would travel in the clear to {address}: set ProxyOptions(tls=Tls(ca=...)) or "
                    "$OPTIMD_TLS_CA, or ProxyOptions(insecure=True) on a network that you trust"
                )
            return grpc.insecure_channel(address, options=[*_own_options(address), *options])
        if self._tls.server_name is not None:
            options = [*options, ("grpc.ssl_target_name_override", self._tls.server_name)]
        credentials = grpc.ssl_channel_credentials(
            root_certificates=_read(self._tls.ca),
            private_key=_read(self._tls.key),
            certificate_chain=_read(self._tls.cert),
        )
        # gRPC would say nothing of files that do not go together, and fail every handshake.
        _context(self._tls)
        return grpc.secure_channel(address, credentials, options=[*_own_options(address), *options])

    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What goes with every call.

        Raises:
            ConfigurationError: the file that has the token cannot be read, or has none.
        """
        token = self._token
        if token is None and self._token_file is not None:
            token = self._last_token = self._read_token(self._token_file)
        if token is None:
            return ()
        if not token.isascii() or not token.isprintable():
            raise ConfigurationError("the token is not printable ASCII, of one line")
        return (("authorization", f"Bearer {token}"),)

    def _read_token(self, path: str) -> str:
        try:
            token = (_read(path) or b"").decode(errors="replace").strip()
        except ConfigurationError:
            if self._last_token is None:
                raise
            token = ""
        token = token or self._last_token or ""
        if not token:
            raise ConfigurationError(f"the token file {path} is empty")
        return token

    def stamp(self) -> _Stamp:
        """What changes when files are replaced that a line is opened with."""
        tls = self._tls
        paths = [] if tls is None else [Path(path) for path in (tls.ca, tls.cert, tls.key) if path is not None]
        try:
            return tuple((stat.st_mtime_ns, stat.st_size, stat.st_ino) for stat in (path.stat() for path in paths))
        except OSError:
            # Being replaced just now: whoever reads them says so.
            return ()

    def problem(self, address: str) -> str | None:
        """Why no line comes about although something listens at `address`; None where that is not it. Blocks.

        gRPC tells of most failed handshakes as it tells of a server that is gone, and tries again for ever.
        """
        if address.startswith(_UNIX):
            return None
        host, _, port = address.rpartition(":")
        host = host.strip("[]")
        try:
            with socket.create_connection((host, int(port)), timeout=_LOOK_TIMEOUT_S) as line:
                if self._tls is None:
                    return _speaks_tls(line, address)
                return _refusal(line, self._tls, self._tls.server_name or host, address)
        except (OSError, ValueError, ConfigurationError):
            return None


INSECURE: Final = Credentials()
"""Plaintext, without a token."""


def _speaks_tls(line: socket.socket, address: str) -> str | None:
    """Whether something that was greeted in the clear speaks TLS."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    try:
        with context.wrap_socket(line):
            pass
    except (ssl.SSLError, OSError):
        return None
    return (
        f"the server at {address} speaks TLS: set ProxyOptions(tls=Tls(ca=...)) or $OPTIMD_TLS_CA to a file with the "
        "certificate of its authority"
    )


def _own_options(address: str) -> list[tuple[str, Any]]:
    # gRPC has `$http_proxy` stand between two programs of one host, too, and hands it what is not to leave it.
    return [("grpc.enable_http_proxy", 0)] if _is_on_this_host(address) else []


def _context(tls: Tls) -> ssl.SSLContext:
    """What Python speaks TLS with as gRPC does.

    Raises:
        ConfigurationError: a file is not what it should be, or the key is not that of the certificate.
    """
    try:
        context = client_context(tls.ca)
        if tls.cert is not None and tls.key is not None:
            load_pair(context, tls.cert, tls.key)
    except PemError as error:
        raise ConfigurationError(str(error)) from error
    # gRPC takes authorities that do not say what they may sign, as Python does until 3.12.
    context.verify_flags &= ~ssl.VERIFY_X509_STRICT
    context.set_alpn_protocols(["h2"])
    return context


def _refusal(line: socket.socket, tls: Tls, server_name: str, address: str) -> str | None:
    """What one of the two sides has against the other's certificate."""
    context = _context(tls)
    reason = ""
    try:
        with context.wrap_socket(line, server_hostname=server_name) as shaken:
            # The server looks at a client's certificate when the client is done with the handshake, and a server that
            # stays on the line says something at once.
            if _stays(shaken):
                return None
    except ssl.SSLCertVerificationError as error:
        return (
            f"the certificate of the server at {address} is not accepted: {error.verify_message.rstrip('.')}; "
            "ProxyOptions(tls=Tls(ca=..., server_name=...)), or $OPTIMD_TLS_CA and $OPTIMD_TLS_SERVER_NAME, have to fit"
        )
    except (ssl.SSLEOFError, ConnectionError):
        # It hangs up before it has said anything: it is full, or something in between has nobody to hand this on to.
        return None
    except ssl.SSLError as error:
        reason = (error.reason or str(error)).lower().replace("_", " ")
        if "wrong version number" in reason or "record layer" in reason:
            return f"the server at {address} does not speak TLS: leave tls out, or start it with --tls-cert"
        if "alert" not in reason:
            return f"no TLS with the server at {address}: {reason}"
    shown = "this worker shows no certificate" if tls.cert is None else f"it does not accept {tls.cert}"
    return (
        f"the server at {address} hangs up, as one does that asks for certificates: {shown}"
        f"{f' ({reason})' if reason else ''}; set ProxyOptions(tls=Tls(cert=..., key=...)), or $OPTIMD_CLIENT_CERT and "
        "$OPTIMD_CLIENT_KEY, to one that has not expired, of an authority that it knows"
    )


def _stays(line: ssl.SSLSocket) -> bool:
    try:
        return bool(line.recv(1))
    except TimeoutError:
        return True
    except ConnectionError:
        return False


def _read(path: str | None) -> bytes | None:
    if path is None:
        return None
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ConfigurationError(f"cannot read {path}: {(error.strerror or str(error)).lower()}") from error


def _is_on_this_host(address: str) -> bool:
    if address.startswith(_UNIX):
        return True
    host = address.rpartition(":")[0].strip("[]")
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
