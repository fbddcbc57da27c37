"""Certificates for tests, made when they are needed."""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass
from pathlib import Path

import trustme

from optimd.client import Tls


@dataclass(frozen=True, slots=True)
class Pair:
    """A certificate and its key, as paths of PEM files."""

    cert: str
    key: str


class Authority:
    """One that vouches for servers and clients.

    Args:
        folder: Where its files are written to.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        self._folder = folder
        self._ca = trustme.CA()
        self._count = 0
        self.path = str(folder / "ca.pem")
        self._ca.cert_pem.write_to_path(self.path)

    def server(self, *, expired: bool = False) -> Pair:
        """A certificate for this host's loopback names."""
        return self._issue("localhost", "127.0.0.1", name="server", expired=expired)

    def client(self, name: str, *, expired: bool = False) -> Pair:
        """A certificate for a worker of that name."""
        return self._issue("worker.example", name=name, expired=expired)

    def trusted_by(self, shows: Pair | None = None, server_name: str | None = None) -> Tls:
        """What a client that trusts it speaks TLS with."""
        cert, key = (None, None) if shows is None else (shows.cert, shows.key)
        return Tls(ca=self.path, cert=cert, key=key, server_name=server_name)

    def _issue(self, *identities: str, name: str, expired: bool) -> Pair:
        past = dt.datetime.now(dt.UTC) - dt.timedelta(days=1)
        issued = self._ca.issue_cert(*identities, common_name=name, not_after=past if expired else None)
        self._count += 1
        pair = Pair(str(self._folder / f"{self._count}.pem"), str(self._folder / f"{self._count}.key"))
        issued.private_key_pem.write_to_path(pair.key)
        with Path(pair.cert).open("wb") as file:
            file.writelines(blob.bytes() for blob in issued.cert_chain_pems)
        return pair
