"""What lines are opened with, where something is not as it should be: files, proxies, servers that come later."""

from __future__ import annotations

import copy
import pickle
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn

from optimd.client import Adam, CertificateError, ConfigurationError, ProxyOptions, ServerUnavailableError, Tls
from optimd.client.credentials import Credentials
from tests.certificates import Authority
from tests.support import running_server

SECRET = "a-secret-that-stays-here"


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "ours")


@contextmanager
def listening(answer: bytes = b"") -> Iterator[tuple[str, list[bytes]]]:
    """Something that answers the first bytes of a connection with these, and hangs up. Its address, and what came."""
    came: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            while True:
                try:
                    line, _ = server.accept()
                except OSError:
                    return
                with line:
                    if answer:
                        came.append(line.recv(65536))
                        line.sendall(answer)
                        came.append(line.recv(65536))
                    else:
                        came.append(b"")

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield f"127.0.0.1:{server.getsockname()[1]}", came
        finally:
            server.shutdown(socket.SHUT_RDWR)
            thread.join(10)


def one_step(address: str, **options: object) -> Adam:
    p = nn.Parameter(torch.ones(3))
    settings = ProxyOptions(rank=0, world_size=1, **options)
    with Adam([p], server=address, job="j", options=settings) as optimizer:
        p.grad = torch.ones(3)
        optimizer.step()
    return optimizer


# --- proxies


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_a_proxy_does_not_stand_between_two_programs_of_a_host(
    host: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A token may travel in the clear there because it does not leave the host."""
    tokens = tmp_path / "tokens.toml"
    tokens.write_text(f'[[token]]\nname = "t"\nsecret = "{SECRET}"\n')
    with listening(b"HTTP/1.1 200 OK\r\n\r\n") as (proxy, came), running_server(tokens=str(tokens)) as server:
        for name in ("http_proxy", "https_proxy", "grpc_proxy"):
            monkeypatch.setenv(name, f"http://{proxy}")
        port = server.address.rpartition(":")[2]
        assert one_step(f"{host}:{port}", token=SECRET, retry_timeout_s=5).job_step == 1
        assert came == []


# --- files


def test_files_that_are_not_what_they_should_be_are_named_at_once(authority: Authority, tmp_path: Path) -> None:
    """gRPC would take them, and fail every handshake for a minute."""
    one, other = authority.client("one"), authority.client("other")
    empty, binary, locked = tmp_path / "empty.pem", tmp_path / "ca.der", tmp_path / "locked.key"
    empty.write_text("")
    subprocess.run(["openssl", "x509", "-in", authority.path, "-outform", "DER", "-out", str(binary)], check=True)
    command = ["openssl", "pkey", "-in", one.key, "-aes256", "-passout", "pass:secret", "-out", str(locked)]
    subprocess.run(command, check=True)
    cases = [
        (Tls(ca=str(empty)), "empty.pem has no certificates"),
        (Tls(ca=str(binary)), "ca.der has no certificates"),
        (Tls(ca=authority.path, cert=one.cert, key=other.key), "are not a certificate and its key"),
        (Tls(ca=authority.path, cert=one.key, key=one.key), "are not a certificate and its key"),
        # And nobody is asked for a password.
        (Tls(ca=authority.path, cert=one.cert, key=str(locked)), "the key not encrypted"),
    ]
    for tls, problem in cases:
        began = time.monotonic()
        with pytest.raises(ConfigurationError, match=problem):
            one_step("127.0.0.1:1", tls=tls)
        assert time.monotonic() - began < 30


def test_a_token_file_that_is_being_replaced_is_what_it_was(tmp_path: Path) -> None:
    """Between two writes it is empty, and between two names not there. From the start it has to have one."""
    path = tmp_path / "token"
    credentials = Credentials(token_file=str(path))
    with pytest.raises(ConfigurationError, match="cannot read"):
        credentials.metadata()
    path.write_text("first-token\n")
    assert credentials.metadata() == (("authorization", "Bearer first-token"),)
    path.write_text("")
    assert credentials.metadata() == (("authorization", "Bearer first-token"),)
    path.unlink()
    assert credentials.metadata() == (("authorization", "Bearer first-token"),)
    path.write_text("second-token\n")
    assert credentials.metadata() == (("authorization", "Bearer second-token"),)


def test_a_line_comes_back_while_its_certificates_are_being_replaced(authority: Authority, tmp_path: Path) -> None:
    """With those that it had."""
    pair, ca = authority.server(), tmp_path / "ca.pem"
    ca.write_bytes(Path(authority.path).read_bytes())
    with running_server(tls_cert=pair.cert, tls_key=pair.key) as server:
        p = nn.Parameter(torch.ones(3))
        options = ProxyOptions(rank=0, world_size=1, tls=Tls(ca=str(ca)), retry_timeout_s=20)
        with Adam([p], server=server.address, job="j", options=options) as optimizer:
            p.grad = torch.ones(3)
            optimizer.step()
            ca.unlink()
            server.registry.get("j").members()[0].cancel()
            optimizer.step()
            assert optimizer.job_step == 2


def test_a_pickled_optimizer_has_no_token_in_it(tmp_path: Path) -> None:
    """A copy within the process keeps it."""
    options = ProxyOptions(token=SECRET, rank=3)
    assert SECRET.encode() not in pickle.dumps(options)
    assert pickle.loads(pickle.dumps(options)) == ProxyOptions(rank=3)
    assert copy.deepcopy(options).token == copy.copy(options).token == SECRET


# --- servers that are not there, or not yet


def test_who_came_before_the_server_hears_of_certificates_too(authority: Authority) -> None:
    """Not that nobody answers: both sides are often started at once."""
    pair = authority.server()
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    failures: list[Exception] = []

    def work() -> None:
        try:
            one_step(address, tls=Tls(ca=authority.path), retry_timeout_s=60)
        except (CertificateError, ServerUnavailableError) as error:
            failures.append(error)

    worker = threading.Thread(target=work)
    worker.start()
    worker.join(1)
    assert worker.is_alive()
    with running_server(address=address, tls_cert=pair.cert, tls_key=pair.key, tls_client_ca=authority.path):
        worker.join(40)
    assert not worker.is_alive()
    (failure,) = failures
    assert isinstance(failure, CertificateError)
    assert "this worker shows no certificate" in str(failure)


def test_who_hangs_up_without_a_word_may_be_full(authority: Authority) -> None:
    """As a server at its most connections does, or a balancer with nobody behind it: it is tried again."""
    with listening() as (address, came):
        with pytest.raises(ServerUnavailableError):
            one_step(address, tls=Tls(ca=authority.path), retry_timeout_s=4)
        assert len(came) > 2
