"""What is built, what is exported, what is imported."""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
import subprocess
import sys
import zipfile
from pathlib import Path

import optimd
import optimd.client
import optimd.server
from tests.support import ROOT


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)


def test_optimd_is_a_namespace_without_an_init() -> None:
    """A stray __init__.py in one root would hide the others."""
    assert optimd.__file__ is None
    for root in ("client", "server", "proto/python"):
        assert (ROOT / root / "optimd").is_dir()
        assert not (ROOT / root / "optimd" / "__init__.py").exists()
    assert {module.name for module in pkgutil.iter_modules(optimd.__path__)} == {
        "cli",
        "client",
        "server",
        "v1",
        "wire",
    }


def test_the_wheels_only_top_level_is_optimd(tmp_path: Path) -> None:
    """Five packages, typed, with the licence; nothing of tests, tools or benchmarks."""
    built = subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"optimd"}
    assert {name.split("/")[1] for name in names if name.startswith("optimd/")} == {
        "cli",
        "client",
        "server",
        "v1",
        "wire",
    }
    for package in ("cli", "client", "server", "v1", "wire"):
        assert f"optimd/{package}/__init__.py" in names
        assert f"optimd/{package}/py.typed" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_exported_names_are_these() -> None:
    """A change of this list is a change of the API: it belongs in the CHANGELOG."""
    assert optimd.client.__all__ == [
        "AccumulationLostError",
        "Adam",
        "AdamW",
        "Async",
        "AuthenticationError",
        "AuthorizationError",
        "CertificateError",
        "ConfigurationError",
        "ConnectionLostError",
        "EmbeddedServerError",
        "EvictedError",
        "ForkedProcessError",
        "InternalServerError",
        "JobDeletedError",
        "JobExistsError",
        "JobMismatchError",
        "JobRewoundError",
        "LimitExceededError",
        "LoadNeedsForceError",
        "NonFiniteGradientError",
        "NotDurableError",
        "OptimdError",
        "OptimizerClosedError",
        "OptimizerProxy",
        "ProtocolError",
        "ProxyOptions",
        "ServerUnavailableError",
        "StepReceipt",
        "StepTimeoutError",
        "SupersededError",
        "Sync",
        "Tls",
        "UnknownJobError",
        "UnsupportedError",
        "UpdateRefusedError",
        "WireDtypes",
        "WorkerInUseError",
    ]
    assert optimd.server.__all__ == ["ConfigurationError", "Server", "ServerConfig", "run"]
    for package in (optimd.client, optimd.server):
        assert package.__all__ == sorted(package.__all__)
        assert all(hasattr(package, name) for name in package.__all__)


def test_every_error_of_the_tree_is_exported_and_drawn() -> None:
    """The tree in the docstring is the tree in the code."""
    exceptions = importlib.import_module("optimd.client.exceptions")
    tree = {
        name
        for name, value in vars(exceptions).items()
        if isinstance(value, type) and issubclass(value, exceptions.OptimdError)
    }
    assert tree <= set(optimd.client.__all__)
    assert exceptions.__doc__ is not None
    assert all(name in exceptions.__doc__ for name in tree)


BLOCK = """
import sys

class Blocker:
    blocked = {"typer", "rich", "structlog", "safetensors", "grpc_health", "grpc_reflection", "psutil"}

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in self.blocked:
            raise ModuleNotFoundError(f"blocked: {name}", name=name)

sys.meta_path.insert(0, Blocker())
"""


def test_a_worker_and_its_embedded_server_need_torch_grpcio_and_protobuf_alone() -> None:
    """With everything else of the extras out of reach; the worker imports nothing of the server."""
    ended = run(
        BLOCK
        + """
import torch, optimd.client, optimd.server.__main__
loaded = {name for name in sys.modules if name.startswith("optimd.cli.")}
assert not loaded, loaded
server = optimd.server.Server(optimd.server.ServerConfig(address="127.0.0.1:0", health=False))
address = server.start()
p = torch.nn.Parameter(torch.ones(3))
p.grad = torch.ones(3)
with optimd.client.Adam([p], server=address) as optimizer:
    optimizer.step()
    print(optimizer.job_step)
server.stop()
"""
    )
    assert ended.stdout == "1\n", ended.stderr
    ended = run("import sys, optimd.client; print([name for name in sys.modules if name.startswith('optimd.server')])")
    assert ended.stdout == "[]\n", ended.stderr


def test_what_is_missing_is_named_with_the_extra_that_has_it() -> None:
    """For the command, and for a server with health."""
    ended = run(BLOCK + "import optimd.cli; optimd.cli.main()")
    assert ended.returncode == 1
    assert ended.stderr == "optimd: the command line needs typer: pip install 'optimd[server]'\n"
    ended = run(BLOCK + "import optimd.server.__main__ as m; sys.exit(m.main(['--address=127.0.0.1:0']))")
    assert ended.returncode == 2
    assert "the health service needs grpc_health" in ended.stderr
    assert "--no-health" in ended.stderr


def test_a_breaking_change_of_the_schema_is_noticed(tmp_path: Path) -> None:
    """The check that guards the schema can fail."""
    buf = Path(sys.executable).parent / "buf"
    if not buf.exists():
        buf = ROOT / ".venv" / "bin" / "buf"
    proto = tmp_path / "proto"
    (proto / "optimd" / "v1").mkdir(parents=True)
    for source in [ROOT / "proto" / "buf.yaml", *(ROOT / "proto" / "optimd" / "v1").glob("*.proto")]:
        target = proto / source.relative_to(ROOT / "proto")
        target.write_text(source.read_text().replace("uint64 base_step = 2", "uint64 base_step = 99"))
    against = f"{ROOT / 'proto' / 'baseline.binpb'}"
    command = [str(buf), "breaking", str(proto), "--against", against]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode != 0
    assert "base_step" in ended.stdout + ended.stderr


def test_drift_of_the_generated_code_is_noticed(tmp_path: Path) -> None:
    """A module that was edited, one that is missing and one too many are each named."""
    spec = importlib.util.spec_from_file_location("generate_proto", ROOT / "tools" / "generate_proto.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    drift = module.drift
    for side in ("checked_in", "fresh"):
        (tmp_path / side / "optimd" / "v1").mkdir(parents=True)
        for name in ("a_pb2.py", "b_pb2.py"):
            (tmp_path / side / "optimd" / "v1" / name).write_text(name)
    checked_in, fresh = tmp_path / "checked_in", tmp_path / "fresh"
    assert drift(checked_in, fresh) == []
    (checked_in / "optimd/v1/a_pb2.py").write_text("edited")
    (checked_in / "optimd/v1/b_pb2.py").unlink()
    (checked_in / "optimd/v1/c_pb2.py").write_text("stray")
    assert drift(checked_in, fresh) == ["a_pb2.py", "b_pb2.py", "c_pb2.py"]
