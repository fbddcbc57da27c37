"""What the server's process does with the memory of messages that are gone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import optimd.server.allocator

PROGRAM = """
import resource, runpy, sys

module = runpy.run_path(sys.argv[1])
if sys.argv[2] == "kept":
    module["keep_messages_memory"]()

def messages():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    held = [bytes([number]) * (1 << 20) for number in range(16)]
    del held
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

messages()
print(min(messages() for _ in range(3)))
"""


def faults(how: str) -> int:
    """How many pages are mapped anew for 16 MiB of messages, in a process that has had as many before."""
    command = [sys.executable, "-c", PROGRAM, str(Path(optimd.server.allocator.__file__)), how]
    return int(subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout)


def test_memory_of_messages_is_used_again() -> None:
    """Without that, each of their 4096 pages is given back and mapped anew."""
    if faults("as it is") < 2000:
        pytest.skip("this allocator keeps it anyway")
    assert faults("kept") < 100
