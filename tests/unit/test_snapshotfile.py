"""A snapshot's files: what was written is read back, by anything that reads safetensors too, and damage is found."""

from __future__ import annotations

import errno
import random
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from optimd.server.errors import DataDirError
from optimd.server.files import Files
from optimd.server.snapshotfile import (
    DATA_NAME,
    FORMAT_VERSION,
    MANIFEST_NAME,
    DataLayout,
    SnapshotDamageError,
    SnapshotReader,
    SnapshotWriter,
)
from optimd.server.store import Store
from optimd.v1 import snapshot_pb2
from optimd.wire.buffers import Buffer, BufferValues, encode_buffer
from optimd.wire.kinds import PARAMETER, encode_kind
from optimd.wire.layout import Parameter, cut_buckets, encode_bucket, encode_parameter, pack_bits
from tests.faultfiles import FailingFiles, Operation, VolatileFiles, nothing

KINDS = (PARAMETER, "exp_avg", "exp_avg_sq")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.complex64, torch.complex128)
SHAPES = st.sampled_from(((), (0,), (1,), (7,), (300,), (3, 5), (2, 2, 64)))


def parameter(name: str, dtype: torch.dtype, shape: tuple[int, ...], master: torch.dtype | None = None) -> Parameter:
    return Parameter(name, dtype, shape, tuple(range(len(shape))), master)


def filled(parameters: Sequence[Parameter], stepped: Sequence[bool], seed: int = 0) -> Store:
    """A store whose parameters have random values, and those of them that are `stepped` random state."""
    generator = torch.Generator().manual_seed(seed)
    store = Store(torch.device("cpu"))
    store.add(parameters, cut_buckets(enumerate(parameters), group=0, first_id=0, bucket_bytes=1024))
    for index, (each, here) in enumerate(zip(parameters, stepped, strict=True)):
        for kind in KINDS if here else (PARAMETER,):
            elements = torch.randint(1, 256, (each.nbytes,), dtype=torch.uint8, generator=generator)
            flat = elements.view(each.server_dtype) if each.nbytes else torch.empty(0, dtype=each.server_dtype)
            for bucket_id, position in store.places(index):
                bucket = store.buckets[bucket_id]
                present = [place == position for place in range(len(bucket.slices))]
                piece = bucket.slices[position]
                store.restore(kind, bucket, present, flat[piece.offset : piece.end])
        if here:
            store.set_step(index, float(3 + index))
    return store


def buffer_values(seed: int = 1) -> BufferValues:
    generator = torch.Generator().manual_seed(seed)
    values = BufferValues(
        [
            Buffer("0.running_mean", torch.float32, (5,)),
            Buffer("0.num_batches_tracked", torch.int64, ()),
            Buffer("mask", torch.bool, (3, 3)),
            Buffer("größe/…", torch.uint8, (7,)),
            Buffer("phase", torch.complex64, (2,)),
            Buffer("empty", torch.int8, (0,)),
        ]
    )
    for tensor in values.tensors.values():
        tensor.copy_(torch.randint(0, 2, tensor.shape, generator=generator))
    return values


def write(folder: Path, store: Store, values: BufferValues | None = None, files: Files | None = None) -> None:
    layout = DataLayout(store.parameters, KINDS, values.buffers if values is not None else ())
    writer = SnapshotWriter(files or Files(), folder, layout)
    manifest = snapshot_pb2.SnapshotManifest(
        format_version=FORMAT_VERSION,
        parameters=[encode_parameter(each) for each in store.parameters],
        buckets=[encode_bucket(bucket) for bucket in store.buckets],
        kinds=[encode_kind(kind) for kind in KINDS],
    )
    try:
        # In any order.
        contents = {}
        for bucket in store.buckets[::-1]:
            copies = [(kind, *store.copy(kind, bucket)) for kind in KINDS]
            contents[bucket.bucket_id] = snapshot_pb2.KeptBucket(
                steps=store.steps_in(bucket),
                present=[pack_bits(present) for _, present, _ in copies],
                checksum=writer.write_bucket(bucket, copies),
            )
        manifest.contents.extend(contents[bucket.bucket_id] for bucket in store.buckets)
        if values is not None:
            manifest.buffers.extend(encode_buffer(buffer) for buffer in values.buffers)
            manifest.buffers_checksum = writer.write_buffers(values)
        writer.finish(manifest)
    finally:
        writer.close()


def read(folder: Path) -> tuple[Store, BufferValues | None]:
    reader = SnapshotReader(Files(), folder)
    reader.verify()
    store = Store(torch.device("cpu"))
    store.add(reader.parameters, reader.buckets)
    for bucket, steps, copies in reader.contents():
        for kind, present, elements in copies:
            store.restore(kind, bucket, present, elements)
        store.restore_steps(bucket, steps)
    return store, reader.buffer_values()


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """NaNs are compared too."""
    return tensor.contiguous().reshape(-1).view(torch.uint8) if tensor.numel() else torch.empty(0, dtype=torch.uint8)


def assert_equal(ours: Store, theirs: Store) -> None:
    assert (ours.parameters, ours.buckets) == (theirs.parameters, theirs.buckets)
    for bucket in theirs.buckets:
        assert ours.steps_in(bucket) == theirs.steps_in(bucket)
        for kind in KINDS:
            (present, elements), (expected, others) = ours.copy(kind, bucket), theirs.copy(kind, bucket)
            assert present == expected
            assert torch.equal(bits(elements), bits(others))


@settings(max_examples=60, deadline=None)
@given(kept=st.lists(st.tuples(st.sampled_from(DTYPES), SHAPES, st.booleans()), max_size=6), has_buffers=st.booleans())
def test_a_snapshot_is_read_back_as_it_was_written(
    kept: list[tuple[torch.dtype, tuple[int, ...], bool]],
    has_buffers: bool,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """Values, state where there is one, steps and buffers; here and by the safetensors library."""
    folder = tmp_path_factory.mktemp("snapshot")
    store = filled(
        [parameter(f"p{index}", dtype, shape) for index, (dtype, shape, _) in enumerate(kept)],
        [stepped for *_, stepped in kept],
    )
    values = buffer_values() if has_buffers else None
    write(folder, store, values)
    again, buffers = read(folder)
    assert_equal(again, store)
    assert (buffers is None) == (values is None)
    opened = load_file(folder / DATA_NAME)
    assert len(opened) == len(KINDS) * len(kept) + (len(values.buffers) if values is not None else 0)
    for index, (dtype, shape, stepped) in enumerate(kept):
        for kind in KINDS:
            tensor = opened[f"{kind}/{index}"]
            real = {torch.complex64: torch.float32, torch.complex128: torch.float64}.get(dtype, dtype)
            assert tensor.dtype == real
            flat = torch.cat([tensor.new_empty(0), *_flat(store, kind, index)])
            expected = flat if stepped or kind == PARAMETER else torch.zeros_like(tensor).reshape(-1)
            assert torch.equal(bits(tensor), bits(expected)), f"{kind} of {dtype} {shape}"
    if values is not None and buffers is not None:
        for name, tensor in values.tensors.items():
            assert torch.equal(buffers.tensors[name], tensor)
            whole = opened[f"buffer/{name}"]
            assert torch.equal(torch.view_as_complex(whole) if tensor.is_complex() else whole, tensor)


def _flat(store: Store, kind: str, index: int) -> list[torch.Tensor]:
    """A parameter's elements, as reals, from the buckets that they are in."""
    pieces = []
    for bucket_id, position in store.places(index):
        bucket = store.buckets[bucket_id]
        present, elements = store.copy(kind, bucket)
        if present[position]:
            begin = sum(
                piece.length for piece, here in zip(bucket.slices[:position], present[:position], strict=True) if here
            )
            part = elements[begin : begin + bucket.slices[position].length]
            pieces.append(torch.view_as_real(part).reshape(-1) if part.is_complex() else part)
    return pieces


def test_master_weights_are_kept_in_their_own_dtype(tmp_path: Path) -> None:
    """Not in the narrower one of the worker."""
    store = filled([parameter("p", torch.bfloat16, (300,), torch.float32)], [True])
    write(tmp_path, store)
    assert_equal(read(tmp_path)[0], store)
    assert {tensor.dtype for tensor in load_file(tmp_path / DATA_NAME).values()} == {torch.float32}


@pytest.fixture
def snapshot(tmp_path: Path) -> Path:
    """One with parameters that have state, and that have none, and with buffers."""
    shapes = ((70,), (3,), (2, 2))
    store = filled([parameter(f"p{i}", torch.float32, shape) for i, shape in enumerate(shapes)], [True, False, True])
    write(tmp_path, store, buffer_values())
    SnapshotReader(Files(), tmp_path).verify()
    return tmp_path


@pytest.mark.parametrize("name", [DATA_NAME, MANIFEST_NAME])
def test_a_flipped_bit_anywhere_is_found_and_the_file_is_named(snapshot: Path, name: str) -> None:
    """In what a parameter has of state and in the zeros where it has none, in the header and in what pads it."""
    path = snapshot / name
    content = path.read_bytes()
    dice = random.Random(5)
    for at in range(len(content)):
        flipped = bytearray(content)
        flipped[at] ^= 1 << dice.randrange(8)
        path.write_bytes(flipped)
        with pytest.raises(SnapshotDamageError, match=str(path)):
            SnapshotReader(Files(), snapshot).verify()
    path.write_bytes(content)
    SnapshotReader(Files(), snapshot).verify()


@pytest.mark.parametrize("name", [DATA_NAME, MANIFEST_NAME])
def test_a_file_that_is_cut_off_or_longer_or_missing_is_found_and_named(snapshot: Path, name: str) -> None:
    """At any length; and looking for it does not make it."""
    path = snapshot / name
    content = path.read_bytes()
    for size in range(len(content)):
        path.write_bytes(content[:size])
        with pytest.raises(SnapshotDamageError, match=str(path)):
            SnapshotReader(Files(), snapshot).verify()
    path.write_bytes(content + b"\0")
    with pytest.raises(SnapshotDamageError, match=str(path)):
        SnapshotReader(Files(), snapshot).verify()
    path.unlink()
    for _ in range(2):
        with pytest.raises(SnapshotDamageError, match=f"{path} is missing"):
            SnapshotReader(Files(), snapshot).verify()


def test_a_manifest_of_another_version_is_refused_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is no damage: an older snapshot must not be used in its place."""
    monkeypatch.setitem(globals(), "FORMAT_VERSION", FORMAT_VERSION + 1)
    write(tmp_path, filled([], []))
    with pytest.raises(DataDirError, match=f"{tmp_path} is of version 2; this server reads 1"):
        SnapshotReader(Files(), tmp_path)


@pytest.mark.parametrize("operation", ["open", "truncate", "write_some", "sync", "sync_folder"])
def test_a_snapshot_that_cannot_be_written_is_an_error_and_closes_its_files(
    tmp_path: Path, operation: Operation
) -> None:
    """Whichever call fails."""
    store = filled([parameter("p", torch.float32, (300,))], [True])
    before = len([*Path("/proc/self/fd").iterdir()])
    number = 0
    while True:
        number += 1
        files = FailingFiles()
        fault = files.fail(operation, number, code=errno.ENOSPC)
        folder = tmp_path / str(number)
        folder.mkdir()
        try:
            write(folder, store, buffer_values(), files)
        except OSError:
            assert fault.fired == 1
        else:
            break
        if operation not in ("sync", "sync_folder"):
            with pytest.raises(SnapshotDamageError):
                SnapshotReader(Files(), folder).verify()
    assert number > 1
    assert_equal(read(tmp_path / str(number))[0], store)
    assert len([*Path("/proc/self/fd").iterdir()]) == before


def test_a_snapshot_that_is_complete_is_on_the_disk(tmp_path: Path) -> None:
    """Once `finish` has returned, though not under its last name."""
    disk = tmp_path / "disk"
    disk.mkdir()
    files = VolatileFiles(disk)
    files.make_folder(disk / "making")
    files.sync_folder(disk)
    store = filled([parameter("p", torch.float32, (300,))], [True])
    write(disk / "making", store, buffer_values(), files)
    files.crash(tmp_path / "left", nothing)
    assert_equal(read(tmp_path / "left" / "making")[0], store)
