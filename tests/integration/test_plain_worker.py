"""The protocol is public: a worker made of generated code alone trains, and goes on when it is started again."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from grpc_tools import protoc  # type: ignore[import-untyped]

from tests.support import ROOT, running_server

RUN = """
import runpy, sys
generated, script = sys.argv[1:3]
sys.path.insert(0, generated)
sys.argv = [script, *sys.argv[3:]]
runpy.run_path(script, run_name="__main__")
ours = [m.__file__ for name, m in sys.modules.items() if name.startswith("optimd.") and getattr(m, "__file__", None)]
assert ours and all(path.startswith(generated) for path in ours), ours
assert "torch" not in sys.modules
"""


def test_a_worker_of_generated_code_alone_trains(tmp_path: Path) -> None:
    """With what its docstring says; to the plane that the points are on. Nothing of optimd's own is imported."""
    generated = tmp_path / "generated"
    generated.mkdir()
    schema = sorted((ROOT / "proto" / "optimd" / "v1").glob("*.proto"))
    arguments = [f"-I{ROOT / 'proto'}", f"--python_out={generated}", f"--grpc_python_out={generated}"]
    assert protoc.main(["protoc", *arguments, *map(str, schema)]) == 0
    # What is installed here is a package, and would come before what is none.
    (generated / "optimd" / "v1" / "__init__.py").touch()
    script = ROOT / "examples" / "plain_worker" / "worker.py"

    def run(server: str, steps: int) -> str:
        ended = subprocess.run(
            [sys.executable, "-c", RUN, str(generated), str(script), f"--server={server}", f"--steps={steps}"],
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
        )
        assert ended.returncode == 0, ended.stdout + ended.stderr
        return ended.stdout

    with running_server() as server:
        assert "stands at step 0" in run(server.address, 100)
        output = run(server.address, 300)
        assert "stands at step 100" in output
        assert server.registry.get("plain").step == 300
        assert not server.registry.get("plain").members()
    found = re.search(r"loss (\S+): weight (\[.*\]), bias (\S+)", output)
    assert found is not None
    assert float(found.group(1)) < 1e-9
    assert found.group(2, 3) == ("[2.0, -1.0, 0.5]", "1.000")
