"""A server's values in memory that others map: the same elements, each change numbered, nothing left."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch

from optimd.wire.layout import Parameter
from optimd.wire.sharedmemory import FOLDER, NotSharedError, new_file, remove_file, sweep
from optimd.wire.sharedvalues import MappedValues, ValuesFile

PARAMETERS = [
    Parameter("a", torch.float32, (3, 5), (0, 1)),
    Parameter("b", torch.bfloat16, (7,), (0,), torch.float32),
    Parameter("c", torch.float64, (0,), (0,)),
    Parameter("d", torch.complex128, (), ()),
]


@pytest.fixture
def file() -> Iterator[ValuesFile]:
    made = ValuesFile.create(PARAMETERS)
    yield made
    made.close()


def test_what_one_side_writes_the_other_one_reads(file: ValuesFile) -> None:
    """In the dtypes that the server keeps; what is there at first is zero."""
    mapped = MappedValues(file.name, file.token, PARAMETERS)
    for parameter, written, read in zip(PARAMETERS, file.flats, mapped.flats, strict=True):
        assert written.dtype == read.dtype == parameter.server_dtype
        assert len(written) == len(read) == parameter.numel
        assert not read.any()
        written.copy_(torch.arange(len(written)) + 1)
        assert torch.equal(read, written)
        assert read.data_ptr() % 64 == 0 or not len(read)


def test_changes_are_numbered(file: ValuesFile) -> None:
    mapped = MappedValues(file.name, file.token, PARAMETERS)
    assert mapped.version == 0
    for version in (1, 2, 1 << 40):
        file.change(version)
        assert mapped.version == version


def test_a_file_that_is_gone_stays_good_for_who_has_it(file: ValuesFile) -> None:
    """Nobody else finds it."""
    mapped = MappedValues(file.name, file.token, PARAMETERS)
    file.close()
    file.close()
    assert not (FOLDER / file.name).exists()
    file.flats[0].fill_(3)
    assert torch.equal(mapped.flats[0], torch.full((15,), 3.0))
    with pytest.raises(NotSharedError):
        MappedValues(file.name, file.token, PARAMETERS)


def test_one_that_nobody_refers_to_is_removed_and_keeps_no_file_open() -> None:
    process = psutil.Process()
    before = process.num_fds()
    flats, name = [], ""
    for _ in range(5):
        made = ValuesFile.create(PARAMETERS)
        flats.append(made.flats)
        name = made.name
        assert (FOLDER / name).exists()
        del made
        gc.collect()
        assert not (FOLDER / name).exists()
    assert process.num_fds() <= before
    flats[0][0].fill_(1)


def test_whoever_lives_keeps_its_file(file: ValuesFile) -> None:
    sweep()
    assert (FOLDER / file.name).exists()


@pytest.mark.parametrize("what", ["name", "token", "size"])
def test_what_is_not_the_servers_file_is_not_mapped(file: ValuesFile, what: str) -> None:
    if what == "name":
        with pytest.raises(NotSharedError):
            MappedValues("optimd-" + "0" * 32, file.token, PARAMETERS)
    elif what == "token":
        with pytest.raises(NotSharedError):
            MappedValues(file.name, bytes(32), PARAMETERS)
    else:
        path, descriptor, token = new_file()
        with pytest.raises(NotSharedError, match="fewer values"):
            MappedValues(path.name, token, PARAMETERS)
        remove_file(path, descriptor)


def test_more_than_half_of_what_is_left_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.statvfs(FOLDER)
    few = os.statvfs_result((real.f_bsize, real.f_frsize, real.f_blocks, real.f_bfree, 2, *real[5:]))
    monkeypatch.setattr(os, "statvfs", lambda _: few)
    with pytest.raises(OSError, match="more than half"):
        ValuesFile.create([Parameter("large", torch.float32, (real.f_frsize,), (0,))])


def test_what_torch_cannot_map_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever asks has other memory: too few descriptors are no reason to refuse a job."""

    def refuse(*_: object, **__: object) -> torch.Tensor:
        raise RuntimeError("unable to open file </dev/shm/x> in read-write mode: Too many open files (24)\nmore")

    monkeypatch.setattr(torch, "from_file", refuse)
    before = set(Path(FOLDER).iterdir())
    with pytest.raises(OSError, match="Too many open files"):
        ValuesFile.create(PARAMETERS)
    assert set(Path(FOLDER).iterdir()) == before
