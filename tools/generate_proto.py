"""Generates the Python code of the schema, or checks that what is checked in is what would be generated."""

from __future__ import annotations

import argparse
import filecmp
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = Path("optimd/v1")
GENERATED_SUFFIXES = ("_pb2.py", "_pb2.pyi", "_pb2_grpc.py", "_pb2_grpc.pyi")


def generate(out: Path) -> None:
    """Writes the generated modules of every schema file below `out`."""
    protos = sorted((ROOT / "proto" / PACKAGE).glob("*.proto"))
    # The stub plugin is a console script beside this interpreter, which need not be on PATH.
    plugin = Path(sys.executable).parent / "protoc-gen-mypy_grpc"
    subprocess.run(
        [
            sys.executable,
            "-m",
            "grpc_tools.protoc",
            f"--plugin=protoc-gen-mypy_grpc={plugin}",
            f"-I{ROOT / 'proto'}",
            f"--python_out={out}",
            f"--pyi_out={out}",
            *[str(proto) for proto in protos],
        ],
        check=True,
    )
    # Only files that define a service get gRPC code; elsewhere protoc would leave empty modules.
    services = [str(proto) for proto in protos if proto.stem.endswith("_service")]
    subprocess.run(
        [
            sys.executable,
            "-m",
            "grpc_tools.protoc",
            f"--plugin=protoc-gen-mypy_grpc={plugin}",
            f"-I{ROOT / 'proto'}",
            f"--grpc_python_out={out}",
            f"--mypy_grpc_out={out}",
            *services,
        ],
        check=True,
    )


def generated_files(root: Path) -> set[str]:
    """The names of the generated modules below `root`."""
    return {path.name for path in (root / PACKAGE).iterdir() if path.name.endswith(GENERATED_SUFFIXES)}


def drift(checked_in: Path, fresh: Path) -> list[str]:
    """The names of the modules that are missing, superfluous or different in `checked_in`."""
    names = generated_files(checked_in) | generated_files(fresh)
    _, different, missing = filecmp.cmpfiles(checked_in / PACKAGE, fresh / PACKAGE, sorted(names), shallow=False)
    return sorted(different + missing)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder that holds optimd/v1, generated")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 where the code differs")
    arguments = parser.parse_args()
    if not arguments.check:
        for name in generated_files(arguments.out):
            (arguments.out / PACKAGE / name).unlink()
        generate(arguments.out)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        fresh = Path(folder)
        generate(fresh)
        differing = drift(arguments.out, fresh)
    for name in differing:
        print(f"{PACKAGE / name} is not what the schema generates; run `make proto`", file=sys.stderr)
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
