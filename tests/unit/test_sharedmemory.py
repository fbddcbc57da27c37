"""The files that shared memory is found by."""

from __future__ import annotations

import fcntl
import os
import secrets
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from optimd.wire import rings, sharedmemory
from optimd.wire.sharedmemory import NotSharedError, Segment, attach, check_shared, sweep

RING = 16 * 4096


@pytest.fixture
def segment() -> Iterator[Segment]:
    made = Segment.create()
    yield made
    made.close()


def path_of(segment: Segment) -> Path:
    return sharedmemory.FOLDER / segment.name


def test_both_sides_see_the_same_memory_each_in_its_direction(
    segment: Segment, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rings, "SMALLEST_BYTES", 1)
    worker_writes, worker_reads = segment.reserve(RING).worker_side()
    check_shared(segment.name, segment.token)
    server_writes, server_reads = attach(segment.name, segment.token, RING, RING).server_side()
    segment.close()
    for number in range(10):
        content = secrets.token_bytes(RING // 2)
        for writer, reader in ((worker_writes, server_reads), (server_writes, worker_reads)):
            position = writer.place([memoryview(content)], len(content))
            assert position is not None, number
            assert bytes(reader.read(position, len(content))) == content
            reader.release()


def test_the_file_is_its_users_alone_and_is_gone_when_closed(segment: Segment) -> None:
    status = path_of(segment).stat()
    assert stat.S_IMODE(status.st_mode) == 0o600
    assert status.st_uid == os.geteuid()
    segment.close()
    assert not path_of(segment).exists()
    segment.close()


def test_the_memory_is_taken_before_it_is_written_to(segment: Segment) -> None:
    segment.reserve(RING)
    assert path_of(segment).stat().st_blocks * 512 >= 2 * RING


def test_a_wrong_token_or_name_finds_nothing(segment: Segment) -> None:
    segment.reserve(RING)
    with pytest.raises(NotSharedError, match="different hosts"):
        check_shared(segment.name, secrets.token_bytes(32))
    with pytest.raises(NotSharedError, match="different hosts"):
        check_shared(f"optimd-{secrets.token_hex(16)}", segment.token)
    for name in ("", "optimd-", f"../shm/{segment.name}", f"{segment.name}/", "/etc/passwd", f"{segment.name}\n"):
        with pytest.raises(NotSharedError, match="not the name"):
            check_shared(name, segment.token)
    for token in (b"", segment.token[:-1], segment.token + b"\0"):
        with pytest.raises(NotSharedError, match="not the name"):
            attach(segment.name, token, RING, RING)


def test_a_link_is_not_followed(segment: Segment) -> None:
    link = sharedmemory.FOLDER / f"optimd-{secrets.token_hex(16)}"
    link.symlink_to(path_of(segment))
    try:
        with pytest.raises(NotSharedError, match="cannot be opened"):
            check_shared(link.name, segment.token)
    finally:
        link.unlink()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_another_users_file_is_not_shared(segment: Segment) -> None:
    """He could cut it short, and so kill whoever has it mapped."""
    os.chown(path_of(segment), 65534, 65534)
    with pytest.raises(NotSharedError, match="different users"):
        check_shared(segment.name, segment.token)


@pytest.mark.parametrize(("up", "down"), [(2 * RING, RING), (RING, 2 * RING), (0, RING), (RING, 100), (2**40, RING)])
def test_rings_that_are_not_there_are_not_mapped(segment: Segment, up: int, down: int) -> None:
    segment.reserve(RING)
    with pytest.raises(NotSharedError):
        attach(segment.name, segment.token, up, down)


def test_memory_that_was_not_taken_is_not_mapped(segment: Segment) -> None:
    """Touching it could fail later, in the middle of a step and by a signal."""
    os.truncate(path_of(segment), 4096 + 2 * RING)
    with pytest.raises(NotSharedError, match="not been taken"):
        attach(segment.name, segment.token, RING, RING)


def test_what_a_dead_process_left_is_swept_and_what_a_live_one_has_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # In a folder of its own: each server that is started on this machine sweeps the other one.
    monkeypatch.setattr(sharedmemory, "FOLDER", tmp_path)
    segment = Segment.create()
    program = (
        "import os, pathlib, signal, sys\n"
        "from optimd.wire import sharedmemory\n"
        "sharedmemory.FOLDER = pathlib.Path(sys.argv[1])\n"
        "print(sharedmemory.Segment.create().name, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    left = sharedmemory.FOLDER / done.stdout.strip()
    assert left.name.startswith("optimd-")
    assert left.exists(), "the process was to leave its file behind"
    sweep()
    assert not left.exists()
    assert path_of(segment).exists()
    check_shared(segment.name, segment.token)
    segment.close()


def test_a_file_that_is_swept_while_it_is_made_is_made_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between its making and its lock, it looks like a dead process's."""
    swept: list[int] = []
    original = fcntl.flock

    def locking(descriptor: int, operation: int) -> None:
        if not swept:
            swept.append(descriptor)
            monkeypatch.setattr(fcntl, "flock", original)
            sweep()
        original(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", locking)
    made = Segment.create()
    try:
        assert swept
        check_shared(made.name, made.token)
    finally:
        made.close()
