"""A server's certificate, and whose clients it takes: files that may be replaced while it runs."""

from __future__ import annotations

import logging
import ssl
from pathlib import Path

import grpc

from optimd.server.errors import ConfigurationError
from optimd.wire.pem import PemError, load_authorities, load_pair

_log = logging.getLogger(__name__)

_Stamp = tuple[tuple[int, int, int], ...]


class CertificateFiles:
    """The files that a server proves who it is with. New connections meet them as they are then.

    Belongs to gRPC once `credentials` has been called, which looks at them in threads of its own, one at a time.

    Args:
        cert: PEM, the server's certificate and those that lead to its authority.
        key: PEM, its private key, not encrypted.
        client_ca: PEM, the authorities whose clients are taken; None: clients need no certificate.
    """

    def __init__(self, cert: Path, key: Path, client_ca: Path | None) -> None:
        self._cert = cert
        self._key = key
        self._client_ca = client_ca
        self._files = [path for path in (cert, key, client_ca) if path is not None]
        self._seen: _Stamp | None = None
        self._complaint = ""

    def credentials(self) -> grpc.ServerCredentials:
        """What to listen with.

        Raises:
            ConfigurationError: a file cannot be read, is not what it should be, or key and certificate are not a pair.
        """
        self._seen = self._stamp()
        return grpc.dynamic_ssl_server_credentials(
            self._read(),
            self._renewed,  # type: ignore[arg-type]  # which may say None, as gRPC's documentation has it
            require_client_authentication=self._client_ca is not None,
        )

    def _renewed(self) -> grpc.ServerCertificateConfiguration | None:
        """What holds from the next connection on; None: what has held until now."""
        try:
            stamp = self._stamp()
            if stamp == self._seen:
                return None
            # Once for each state of the files: half of them may have been replaced yet.
            self._seen = stamp
            configuration = self._read()
        except ConfigurationError as error:
            if str(error) != self._complaint:
                # Once: every connection comes by here, and anybody may make those.
                self._complaint = str(error)
                _log.error("the certificate stays as it was: %s", error)
            return None
        self._complaint = ""
        _log.info("read the certificate in %s again", self._cert)
        return configuration

    def _stamp(self) -> _Stamp:
        try:
            # The inode: what is mounted into a container is often a link that is turned to another file.
            return tuple(
                (stat.st_mtime_ns, stat.st_size, stat.st_ino) for stat in (path.stat() for path in self._files)
            )
        except OSError as error:
            raise ConfigurationError(_unreadable(error)) from error

    def _read(self) -> grpc.ServerCertificateConfiguration:
        try:
            key, cert = self._key.read_bytes(), self._cert.read_bytes()
            authorities = None if self._client_ca is None else self._client_ca.read_bytes()
        except OSError as error:
            raise ConfigurationError(_unreadable(error)) from error
        self._check()
        return grpc.ssl_server_certificate_configuration([(key, cert)], authorities)

    def _check(self) -> None:
        """Whether the files go together: gRPC would say nothing, and fail every handshake."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        try:
            load_pair(context, self._cert, self._key)
            if self._client_ca is not None:
                load_authorities(context, self._client_ca)
        except PemError as error:
            raise ConfigurationError(str(error)) from error


def _unreadable(error: OSError) -> str:
    return f"cannot read {error.filename}: {(error.strerror or str(error)).lower()}"
