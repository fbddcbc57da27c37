"""Who a server talks to: TLS, certificates of clients, tokens, and what each is good for."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from torch import nn

from optimd.client import (
    Adam,
    AuthenticationError,
    AuthorizationError,
    CertificateError,
    ConfigurationError,
    ProxyOptions,
    Sync,
    Tls,
)
from optimd.server import Server
from optimd.v1 import admin_pb2, admin_service_pb2, job_pb2, optimizer_service_pb2, reading_pb2, training_pb2
from optimd.wire.reasons import ERROR_TRAILER
from tests.certificates import Authority, Pair
from tests.command import optimd
from tests.support import eventually, running_server, server_process

TOKENS = """
[[token]]
name = "vision"
secret = "vision-secret-0123"
jobs = ["vision*"]

[[token]]
name = "speech"
secret = "speech-secret-0123"
jobs = ["speech"]

[[token]]
name = "operator"
secret = "operator-secret-01"
admin = true
"""


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "ours")


@pytest.fixture
def stranger(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "theirs")


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    path = tmp_path / "tokens.toml"
    path.write_text(TOKENS, encoding="utf-8")
    return path


def train(address: str, steps: int = 3, *, job: str = "vision", **options: Any) -> torch.Tensor:
    """Some steps of a job, and what its parameter is then."""
    p = nn.Parameter(torch.linspace(-1, 1, 1000))
    settings = ProxyOptions(rank=0, world_size=1, **{"retry_timeout_s": 20, **options})
    with Adam([p], server=address, job=job, options=settings) as optimizer:
        for step in range(steps):
            p.grad = torch.full((1000,), step + 1.0)
            optimizer.step()
    return p.detach()


def trained_locally(steps: int = 3) -> torch.Tensor:
    p = nn.Parameter(torch.linspace(-1, 1, 1000))
    optimizer = torch.optim.Adam([p], fused=True)
    for step in range(steps):
        p.grad = torch.full((1000,), step + 1.0)
        optimizer.step()
    return p.detach()


@contextmanager
def tls_server(pair: Pair, client_ca: str = "", **settings: Any) -> Iterator[Server]:
    with running_server(tls_cert=pair.cert, tls_key=pair.key, tls_client_ca=client_ca, **settings) as server:
        yield server


def test_training_over_tls_is_bit_equal(authority: Authority) -> None:
    """And needs nothing but the certificate of the authority."""
    with tls_server(authority.server()) as server:
        assert torch.equal(train(server.address, tls=authority.trusted_by()), trained_locally())


def test_a_client_certificate_is_asked_for_and_its_name_is_in_the_log(
    authority: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    """With it a worker trains."""
    with tls_server(authority.server(), authority.path) as server, caplog.at_level(logging.INFO):
        tls = authority.trusted_by(authority.client("worker-7"))
        assert torch.equal(train(server.address, tls=tls), trained_locally())
    assert "certificate worker-7) created it" in caplog.text


def test_the_environment_says_how_to_speak_tls(authority: Authority, monkeypatch: pytest.MonkeyPatch) -> None:
    """A container's does; the commands read the same."""
    pair = authority.client("worker-7")
    variables = {
        "OPTIMD_TLS_CA": authority.path,
        "OPTIMD_CLIENT_CERT": pair.cert,
        "OPTIMD_CLIENT_KEY": pair.key,
        "OPTIMD_TLS_SERVER_NAME": "localhost",
    }
    with tls_server(authority.server(), authority.path) as server:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        assert torch.equal(train(server.address), trained_locally())
        assert optimd("jobs", "list", "--server", server.address)[0] == 0
        for name in variables:
            monkeypatch.delenv(name)
        flags = ("--tls-ca", authority.path, "--client-cert", pair.cert, "--client-key", pair.key)
        assert optimd("jobs", "list", "--server", server.address, *flags)[0] == 0
        status, output = optimd("jobs", "list", "--server", server.address, "--tls-ca", authority.path)
        assert (status, "this worker shows no certificate" in output, output.count("\n")) == (2, True, 1)
        status, output = optimd("jobs", "list", "--server", server.address)
        assert (status, "speaks TLS" in output) == (2, True)


def refused(address: str, problem: str, **options: Any) -> None:
    """A worker is told why it is not let in, soon."""
    began = time.monotonic()
    with pytest.raises(CertificateError, match=problem) as caught:
        train(address, retry_timeout_s=60, **options)
    assert time.monotonic() - began < 20
    assert address in str(caught.value)


def test_a_server_that_is_not_who_it_should_be_is_not_talked_to(authority: Authority, stranger: Authority) -> None:
    """Another authority's, another name, one that has expired: the worker says which, at once."""
    with tls_server(authority.server()) as server:
        refused(server.address, "unable to get local issuer", tls=stranger.trusted_by())
        refused(server.address, "Hostname mismatch", tls=authority.trusted_by(server_name="elsewhere.example"))
    with tls_server(authority.server(expired=True)) as server:
        refused(server.address, "certificate has expired", tls=authority.trusted_by())
        assert server.registry.all() == []


def test_a_worker_whose_certificate_is_not_accepted_is_told_so(authority: Authority, stranger: Authority) -> None:
    """Foreign, expired, none at all, or no TLS."""
    with tls_server(authority.server(), authority.path) as server:
        for pair in (stranger.client("worker-7"), authority.client("worker-7", expired=True)):
            refused(server.address, f"does not accept {pair.cert}", tls=authority.trusted_by(pair))
        refused(server.address, "this worker shows no certificate", tls=authority.trusted_by())
        refused(server.address, r"speaks TLS: set ProxyOptions\(tls")
        assert server.registry.all() == []


def test_tls_with_a_server_that_speaks_none_is_told_apart(authority: Authority) -> None:
    """From one that is down."""
    with running_server() as server:
        refused(server.address, "does not speak TLS", tls=authority.trusted_by())


def test_new_certificates_are_met_without_a_restart(
    tmp_path: Path, authority: Authority, stranger: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    """While a worker trains on; half of a pair, and what is none, leave the old ones in force."""
    served = Pair(str(tmp_path / "served.pem"), str(tmp_path / "served.key"))

    def serve(pair: Pair) -> None:
        shutil.copy(pair.cert, served.cert)
        shutil.copy(pair.key, served.key)

    serve(authority.server())
    with tls_server(served) as server, caplog.at_level(logging.INFO, "optimd.server.tls"):
        p = nn.Parameter(torch.ones(10))
        options = ProxyOptions(rank=0, world_size=1, tls=authority.trusted_by())
        with Adam([p], server=server.address, job="old", options=options) as optimizer:
            p.grad = torch.ones(10)
            optimizer.step()
            shutil.copy(stranger.server().cert, served.cert)
            train(server.address, tls=authority.trusted_by())
            assert "are not a certificate and its key" in caplog.text
            Path(served.cert).write_text("no certificate", encoding="utf-8")
            train(server.address, tls=authority.trusted_by())
            serve(stranger.server())
            train(server.address, tls=stranger.trusted_by())
            refused(server.address, "is not accepted", tls=authority.trusted_by())
            optimizer.step()
            assert optimizer.job_step == 2
    assert "again" in caplog.text


def test_a_worker_comes_back_with_the_certificate_that_its_file_has_now(tmp_path: Path, authority: Authority) -> None:
    """Those that live for days are replaced while it trains for weeks."""
    mine = Pair(str(tmp_path / "mine.pem"), str(tmp_path / "mine.key"))
    old, new = authority.client("old"), authority.client("new")
    shutil.copy(old.cert, mine.cert)
    shutil.copy(old.key, mine.key)
    with tls_server(authority.server(), authority.path) as server:
        p = nn.Parameter(torch.ones(10))
        options = ProxyOptions(rank=0, world_size=1, tls=authority.trusted_by(mine))
        with Adam([p], server=server.address, job="vision", options=options) as optimizer:
            p.grad = torch.ones(10)
            optimizer.step()
            shutil.copy(new.cert, mine.cert)
            shutil.copy(new.key, mine.key)
            (member,) = server.registry.get("vision").members()
            member.cancel()
            with capturing("optimd.server.session") as log:
                optimizer.step()
            assert optimizer.job_step == 2
            assert any("certificate new) returned" in line for line in log)


@contextmanager
def capturing(name: str) -> Iterator[list[str]]:
    """What is logged under a name."""
    lines: list[str] = []

    class _Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    logger, handler = logging.getLogger(name), _Keep()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield lines
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


# --- tokens


def test_a_worker_with_a_token_of_its_job_trains(tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Given outright, in a file, or by the environment; with and without TLS."""
    (tmp_path / "token").write_text("vision-secret-0123\n", encoding="utf-8")
    with running_server(tokens=str(tokens)) as server:
        assert torch.equal(train(server.address, token="vision-secret-0123"), trained_locally())
        train(server.address, job="vision/2", token_file=str(tmp_path / "token"))
        monkeypatch.setenv("OPTIMD_TOKEN", "vision-secret-0123")
        train(server.address, job="vision/3")
        monkeypatch.delenv("OPTIMD_TOKEN")
        monkeypatch.setenv("OPTIMD_TOKEN_FILE", str(tmp_path / "token"))
        train(server.address, job="vision/4")
    authority = Authority(tmp_path / "ours")
    with tls_server(authority.server(), tokens=str(tokens)) as server:
        train(server.address, job="vision/5", tls=authority.trusted_by())


def test_a_worker_without_a_good_token_is_told_so_and_leaves_nothing_behind(tokens: Path) -> None:
    """Missing, wrong, or good for another job: whether there is one of that name makes no difference."""
    with running_server(tokens=str(tokens)) as server:
        with pytest.raises(AuthenticationError, match=r"asks for a token: set ProxyOptions\(token"):
            train(server.address)
        with pytest.raises(AuthenticationError, match="does not know the token"):
            train(server.address, token="vision-secret-9999")
        train(server.address, job="speech", token="speech-secret-0123")
        messages = []
        for job in ("speech", "speeches"):
            with pytest.raises(AuthorizationError) as caught:
                train(server.address, job=job, token="vision-secret-0123")
            messages.append(str(caught.value).replace(job, "JOB"))
        assert messages[0] == messages[1]
        assert "the token 'vision' is not good for job 'JOB'" in messages[0]
        assert [job.name for job in server.registry.all()] == ["speech"]


def _requests() -> dict[str, tuple[Any, str]]:
    """A request for each method of both services, about the job "speech", and what refuses it to the token "vision"."""
    opening = training_pb2.TrainRequest(open=job_pb2.OpenJob(job="speech"))
    job, admin = "not good for job 'speech'", "not good for admin calls"
    return {
        "OptimizerService/Train": (opening, job),
        "OptimizerService/GetCapabilities": (reading_pb2.GetCapabilitiesRequest(), ""),
        "OptimizerService/Heartbeat": (reading_pb2.HeartbeatRequest(job="speech"), job),
        "OptimizerService/ReadState": (reading_pb2.ReadStateRequest(job="speech"), job),
        "OptimizerService/WatchSteps": (reading_pb2.WatchStepsRequest(job="speech"), job),
        "OptimizerService/Snapshot": (reading_pb2.SnapshotRequest(job="speech"), job),
        "AdminService/ListJobs": (admin_pb2.ListJobsRequest(), admin),
        "AdminService/GetJob": (admin_pb2.GetJobRequest(job="speech"), admin),
        "AdminService/GetStatus": (admin_pb2.GetStatusRequest(), admin),
        "AdminService/EvictWorker": (admin_pb2.EvictWorkerRequest(job="speech", worker_id="x"), admin),
        "AdminService/DeleteJob": (admin_pb2.DeleteJobRequest(job="speech"), admin),
    }


def _call(channel: grpc.Channel, method: str, request: Any, token: str | None) -> grpc.RpcError | None:
    """Calls a method with one message. What it ended with; None where it was answered."""
    metadata = [] if token is None else [("authorization", f"Bearer {token}")]
    multi: grpc.StreamStreamMultiCallable[bytes, bytes] = channel.stream_stream(f"/optimd.v1.{method}")
    call = multi(iter([request.SerializeToString()]), metadata=metadata, timeout=10)
    try:
        next(call)
    except StopIteration:
        return None
    except grpc.RpcError as error:
        return error
    finally:
        call.cancel()
    return None


def test_every_method_asks_for_a_token_that_is_good_for_it(tokens: Path) -> None:
    """None has been forgotten; the answers have nothing but the reason in them."""
    requests = _requests()
    services = (optimizer_service_pb2.DESCRIPTOR, admin_service_pb2.DESCRIPTOR)
    assert requests.keys() == {
        f"{service.name}/{method.name}"
        for file in services
        for service in file.services_by_name.values()
        for method in service.methods
    }
    with running_server(tokens=str(tokens)) as server, grpc.insecure_channel(server.address) as channel:
        train(server.address, job="speech", token="speech-secret-0123")
        for method, (request, refusal) in requests.items():
            for token in (None, "vision-secret-9999", ""):
                error = _call(channel, method, request, token)
                assert isinstance(error, grpc.Call), method
                assert error.code() is grpc.StatusCode.UNAUTHENTICATED, method
                assert ERROR_TRAILER in dict(error.trailing_metadata() or ())
            if not refusal:
                assert _call(channel, method, request, "vision-secret-0123") is None
                continue
            error = _call(channel, method, request, "vision-secret-0123")
            assert isinstance(error, grpc.Call), method
            assert error.code() is grpc.StatusCode.PERMISSION_DENIED, method
            assert refusal in (error.details() or ""), method
        assert [job.step for job in server.registry.all()] == [3]


def test_commands_bring_the_token_of_an_operator(tokens: Path, tmp_path: Path) -> None:
    """A worker's is not good for them, and one sentence says so."""
    for name, secret in (("operator", "operator-secret-01"), ("worker", "vision-secret-0123")):
        (tmp_path / name).write_text(secret, encoding="utf-8")
    with running_server(tokens=str(tokens)) as server:
        train(server.address, token="vision-secret-0123")
        at = ("--server", server.address)
        status, output = optimd("jobs", "list", *at)
        assert (status, "asks for a token" in output, output.count("\n")) == (2, True, 1)
        status, output = optimd("jobs", "list", *at, "--token-file", str(tmp_path / "worker"))
        assert (status, "not good for admin calls" in output) == (2, True)
        status, output = optimd("jobs", "list", *at, "--token-file", str(tmp_path / "none"))
        assert (status, "cannot read" in output) == (2, True)
        operator = ("--token-file", str(tmp_path / "operator"))
        assert "vision" in optimd("jobs", "list", *at, *operator)[1]
        assert "vision" in optimd("jobs", "list", *at, OPTIMD_TOKEN="operator-secret-01")[1]
        out = str(tmp_path / "out.pt")
        assert optimd("export", "vision", out, *at, *operator)[0] == 0
        assert optimd("jobs", "delete", "vision", *at, *operator)[0] == 0
        assert optimd("import", out, "--job", "vision", *at, *operator)[0] == 0


def test_a_token_does_not_travel_in_the_clear_to_another_host() -> None:
    """Unless one says that the network is to be trusted."""
    with pytest.raises(ConfigurationError, match="a token would travel in the clear to gpu-host:50551"):
        train("gpu-host:50551", token="vision-secret-0123")
    with pytest.raises(ConfigurationError, match="in the clear"):
        train("10.0.0.1:50551", token="vision-secret-0123")
    status, output = optimd("jobs", "list", "--server", "gpu-host:50551", OPTIMD_TOKEN="vision-secret-0123")
    assert (status, "in the clear" in output) == (2, True)


def test_options_do_not_show_the_token() -> None:
    """They end up in logs."""
    assert "secret" not in repr(ProxyOptions(token="vision-secret-0123"))


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"token": "a", "token_file": "b"}, "give one"),
        ({"tls": True}, r"a Tls\(...\) is needed"),
    ],
)
def test_options_that_contradict_each_other_are_refused(options: dict[str, Any], problem: str) -> None:
    """Before anything is opened."""
    with pytest.raises(ConfigurationError, match=problem):
        ProxyOptions(**options)


def test_a_certificate_without_its_key_is_refused() -> None:
    """And the other way round."""
    for given in ({"cert": "x"}, {"key": "x"}):
        with pytest.raises(ConfigurationError, match="go together"):
            Tls(**given)


def test_sighup_revokes_a_token_and_ends_what_it_is_used_for(tokens: Path) -> None:
    """Its worker is told at its next step; another one trains on as if nothing had happened."""
    with server_process(f"--tokens={tokens}") as (process, address):
        workers: dict[str, tuple[nn.Parameter, Adam]] = {}
        for name in ("vision", "speech"):
            p = nn.Parameter(torch.linspace(-1, 1, 1000))
            options = ProxyOptions(
                rank=0, world_size=1, aggregation=Sync(), token=f"{name}-secret-0123", retry_timeout_s=20
            )
            workers[name] = (p, Adam([p], server=address, job=name, options=options))

        def step(name: str, number: int) -> None:
            p, optimizer = workers[name]
            p.grad = torch.full((1000,), number + 1.0)
            optimizer.step()

        for name in workers:
            step(name, 0)
        tokens.write_text(TOKENS.replace("vision-secret-0123", "vision-secret-4567"), encoding="utf-8")
        os.kill(process.pid, signal.SIGHUP)

        def is_revoked() -> bool:
            with grpc.insecure_channel(address) as channel:
                request, _ = _requests()["OptimizerService/GetCapabilities"]
                return _call(channel, "OptimizerService/GetCapabilities", request, "vision-secret-0123") is not None

        assert eventually(is_revoked)
        with pytest.raises(AuthenticationError, match="may have been revoked"):
            step("vision", 1)
        for number in (1, 2):
            step("speech", number)
        assert torch.equal(workers["speech"][0].detach(), trained_locally())
        assert workers["speech"][1].last_receipt is not None
        assert not workers["speech"][1].last_receipt.resumed
        workers["speech"][1].close()
        assert process.poll() is None


# --- a server that cannot be set up so


def test_sighup_ends_no_server_that_has_no_tokens() -> None:
    """Whoever sends it for the certificates' sake finds it still there."""
    with server_process() as (process, address):
        process.send_signal(signal.SIGHUP)
        assert optimd("status", "--server", address)[0] == 0
        time.sleep(0.5)
        assert process.poll() is None


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"tls_cert": "x"}, "tls_cert needs tls_key"),
        ({"tls_key": "x"}, "tls_key needs tls_cert"),
        ({"tls_client_ca": "x"}, "tls_client_ca needs tls_cert"),
        ({"tls_cert": "none.pem", "tls_key": "none.key"}, "cannot read none.pem: no such file or directory"),
        ({"tokens": "none.toml"}, "cannot read the tokens in none.toml"),
        ({"address": "unix:///tmp/x.sock", "tls_cert": "x", "tls_key": "y"}, "is a Unix socket"),
    ],
)
def test_serve_with_files_that_do_not_go_together_is_one_sentence(settings: dict[str, str], problem: str) -> None:
    """And status 2."""
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in {"address": "127.0.0.1:0", **settings}.items()]
    status, output = optimd("serve", *flags)
    assert (status, output.count("\n")) == (2, 1), output
    assert problem in output


def test_serve_with_a_key_of_another_certificate_is_one_sentence(authority: Authority) -> None:
    """Both are named."""
    cert, key = authority.server().cert, authority.server().key
    status, output = optimd("serve", "--address=127.0.0.1:0", f"--tls-cert={cert}", f"--tls-key={key}")
    assert (status, output.count("\n")) == (2, 1), output
    assert f"{cert} and {key} are not a certificate and its key" in output


def test_with_a_certificate_a_server_may_listen_beyond_the_host(authority: Authority) -> None:
    """Without one it needs to be asked for."""
    pair = authority.server()
    with tls_server(pair, address="0.0.0.0:0") as server:
        port = server.address.rpartition(":")[2]
        train(f"127.0.0.1:{port}", tls=authority.trusted_by())
    assert "give it a certificate" in optimd("serve", "--address=0.0.0.0:0")[1]


def test_connections_beyond_the_limit_are_closed_as_they_come() -> None:
    """Those that are there stay, and there is room again when one goes."""

    def connect(address: str) -> tuple[socket.socket, bool]:
        host, _, port = address.rpartition(":")
        line = socket.create_connection((host, int(port)), timeout=5)
        # What HTTP/2 begins with, and no settings.
        line.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0]))
        try:
            return line, bool(line.recv(9))
        except ConnectionError:
            return line, False

    with running_server(max_connections=3) as server:
        lines = [connect(server.address) for _ in range(6)]
        assert [stays for _, stays in lines].count(True) == 3
        next(line for line, stays in lines if stays).close()

        def has_room() -> bool:
            line, stays = connect(server.address)
            lines.append((line, stays))
            return stays

        assert eventually(has_room)
        for line, _ in lines:
            line.close()
        assert eventually(lambda: _trains(server.address))


def _trains(address: str) -> bool:
    try:
        return torch.equal(train(address, job="another", on_existing="replace", retry_timeout_s=1), trained_locally())
    except ConnectionError:
        return False
