"""Lets one virtual environment see another's packages, but not what is installed there in editable mode.

A folder named in a .pth file is searched for packages, while the .pth files inside it, which editable installs
consist of, are not read. So the tests can run against the built wheel without installing torch twice.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def site_packages(venv: Path) -> Path:
    """The folder that `venv` installs packages into."""
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    return venv.resolve() / "lib" / version / "site-packages"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--from", dest="source", type=Path, required=True, help="the environment that has the packages")
    parser.add_argument("--to", dest="target", type=Path, required=True, help="the environment that is to see them")
    arguments = parser.parse_args()
    link = site_packages(arguments.target) / "dependencies.pth"
    link.write_text(f"{site_packages(arguments.source)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
