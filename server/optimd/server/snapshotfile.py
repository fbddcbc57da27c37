"""The files of a snapshot: tensors in a safetensors file, all else in a manifest.

The data file has a tensor for each parameter and kind, flat and in the parameter's memory order, named `kind/index`,
and one for each buffer, `buffer/name`: anything that reads safetensors reads it. It is written piece by piece, in any
order, so that no second copy of a model is ever in memory. What a parameter does not have of a kind is zeros there; the
manifest says so.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from optimd.server.errors import DataDirError
from optimd.server.files import Files, Part
from optimd.server.records import checksum_of, frame, read_record
from optimd.v1 import snapshot_pb2
from optimd.wire.buffers import Buffer, BufferValues, decode_buffer
from optimd.wire.kinds import decode_kind
from optimd.wire.layout import Bucket, Parameter, decode_bucket, decode_parameter, unpack_bits
from optimd.wire.tensors import bytes_of, tensor_over

FORMAT_VERSION: Final = 1

DATA_NAME: Final = "data.safetensors"
MANIFEST_NAME: Final = "manifest"

_LENGTH: Final = struct.Struct("<Q")
_BUFFER_CHUNK_BYTES: Final = 1 << 20
_NAMES: Final[dict[torch.dtype, str]] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
# As pairs of reals: the format has no name for the wider one.
_COMPLEX: Final = {torch.complex64: torch.float32, torch.complex128: torch.float64}


class SnapshotDamageError(Exception):
    """A snapshot is not whole. The message names the file and says what is wrong."""


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a tensor is in the data file."""

    offset: int
    nbytes: int


class DataLayout:
    """Where everything is in a data file: the same for the same parameters, kinds and buffers.

    Args:
        parameters: The job's.
        kinds: The kinds of tensors that are kept of them.
        buffers: The job's buffers.
    """

    def __init__(self, parameters: Sequence[Parameter], kinds: Sequence[str], buffers: Sequence[Buffer]) -> None:
        self._places: dict[str, _Place] = {}
        entries: dict[str, Any] = {}
        offset = 0

        def add(name: str, dtype: torch.dtype, shape: Sequence[int], nbytes: int) -> None:
            nonlocal offset
            real = _COMPLEX.get(dtype)
            entries[name] = {
                "dtype": _NAMES[real or dtype],
                "shape": [*shape, 2] if real else [*shape],
                "data_offsets": [offset, offset + nbytes],
            }
            self._places[name] = _Place(offset, nbytes)
            offset += nbytes

        for kind in kinds:
            for index, parameter in enumerate(parameters):
                add(f"{kind}/{index}", parameter.server_dtype, [parameter.numel], parameter.nbytes)
        self.buffers_at = offset
        for buffer in buffers:
            add(f"buffer/{buffer.name}", buffer.dtype, buffer.shape, buffer.nbytes)
        header = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
        header += b" " * (-len(header) % 8)
        self.head = _LENGTH.pack(len(header)) + header
        """What the file begins with."""
        self.nbytes = len(self.head) + offset
        """How long the file is."""

    def runs(self, kind: str, bucket: Bucket, present: Sequence[bool]) -> Iterator[tuple[int, int]]:
        """Where one kind of a bucket's present slices are in the file: offsets and lengths, neighbours together."""
        begin = end = -1
        for piece, here in zip(bucket.slices, present, strict=True):
            if not here or not piece.length:
                continue
            itemsize = bucket.server_dtype.itemsize
            start = len(self.head) + self._places[f"{kind}/{piece.parameter}"].offset + piece.offset * itemsize
            if start != end:
                if end > begin:
                    yield begin, end - begin
                begin = start
            end = start + piece.length * itemsize
        if end > begin:
            yield begin, end - begin


class SnapshotWriter:
    """Writes a snapshot's files into a folder that is there. All methods may raise OSError.

    Args:
        files: The system's files.
        folder: The folder.
        layout: Where everything goes.
    """

    def __init__(self, files: Files, folder: Path, layout: DataLayout) -> None:
        self._files = files
        self._folder = folder
        self._layout = layout
        self._descriptor = files.open(folder / DATA_NAME)
        try:
            files.truncate(self._descriptor, layout.nbytes)
            files.write(self._descriptor, [layout.head], 0)
        except BaseException:
            files.close(self._descriptor)
            raise

    def write_bucket(self, bucket: Bucket, copies: Sequence[tuple[str, Sequence[bool], torch.Tensor]]) -> int:
        """Writes a bucket: of each kind which slices there are, and their elements. Gives the checksum."""
        checksum = 0
        for kind, present, elements in copies:
            left = bytes_of(elements)
            checksum = checksum_of([left], checksum)
            for offset, length in self._layout.runs(kind, bucket, present):
                self._files.write(self._descriptor, [left[:length]], offset)
                left = left[length:]
        return checksum

    def write_buffers(self, values: BufferValues) -> int:
        """Writes the buffers. Gives the checksum."""
        checksum = 0
        base = len(self._layout.head) + self._layout.buffers_at
        for offset, parts in values.chunks(_BUFFER_CHUNK_BYTES):
            checksum = checksum_of(parts, checksum)
            self._files.write(self._descriptor, parts, base + offset)
        return checksum

    def finish(self, manifest: snapshot_pb2.SnapshotManifest) -> None:
        """Writes the manifest, and returns once all of it is on the disk."""
        self._files.sync(self._descriptor)
        descriptor = self._files.open(self._folder / MANIFEST_NAME)
        try:
            parts: list[Part] = frame(0, manifest.SerializeToString(), ())
            self._files.write(descriptor, parts, 0)
            self._files.sync(descriptor)
        finally:
            self._files.close(descriptor)
        self._files.sync_folder(self._folder)

    def close(self) -> None:
        """Closes the data file."""
        self._files.close(self._descriptor)


class SnapshotReader:
    """Reads a snapshot, checking what it reads.

    Args:
        files: The system's files.
        folder: The snapshot's.

    Raises:
        SnapshotDamageError: it is not whole.
        DataDirError: it is of another version.
    """

    def __init__(self, files: Files, folder: Path) -> None:
        self.folder = folder
        self._files = files
        self.manifest = self._read_manifest(folder / MANIFEST_NAME)
        if self.manifest.format_version != FORMAT_VERSION:
            raise DataDirError(
                f"the snapshot {folder} is of version {self.manifest.format_version}; this server reads "
                f"{FORMAT_VERSION}: start the optimd that wrote it"
            )
        self.parameters = [decode_parameter(spec) for spec in self.manifest.parameters]
        self.buckets = [decode_bucket(spec) for spec in self.manifest.buckets]
        self.kinds = [decode_kind(number) for number in self.manifest.kinds]
        self.buffers = [decode_buffer(spec) for spec in self.manifest.buffers]
        self._layout = DataLayout(self.parameters, self.kinds, self.buffers)

    def contents(self) -> Iterator[tuple[Bucket, Sequence[float], list[tuple[str, list[bool], torch.Tensor]]]]:
        """The buckets, in order: the step counters of their slices, and of each kind which are there, with elements.

        Raises:
            SnapshotDamageError: a bucket is not what was written.
        """
        path = self.folder / DATA_NAME
        descriptor = self._open(path)
        try:
            if self._files.size(descriptor) != self._layout.nbytes:
                raise SnapshotDamageError(f"{path} is not as long as it was written")
            if self._files.read(descriptor, len(self._layout.head), 0) != self._layout.head:
                raise SnapshotDamageError(f"{path}: its header is damaged")
            for bucket, kept in zip(self.buckets, self.manifest.contents, strict=True):
                checksum = 0
                copies = []
                for kind, bitmap in zip(self.kinds, kept.present, strict=True):
                    present = unpack_bits(bitmap, len(bucket.slices))
                    pieces = [
                        self._files.read(descriptor, length, offset)
                        for offset, length in self._layout.runs(kind, bucket, present)
                    ]
                    data = pieces[0] if len(pieces) == 1 else b"".join(pieces)
                    checksum = checksum_of([data], checksum)
                    copies.append((kind, present, data))
                if checksum != kept.checksum:
                    raise SnapshotDamageError(f"{path}: bucket {bucket.bucket_id} is damaged")
                yield (
                    bucket,
                    list(kept.steps),
                    [
                        (kind, present, tensor_over(memoryview(data), bucket.server_dtype))
                        for kind, present, data in copies
                    ],
                )
        finally:
            self._files.close(descriptor)

    def buffer_values(self) -> BufferValues | None:
        """The buffers; None where there are none.

        Raises:
            SnapshotDamageError: they are not what was written.
        """
        if not self.buffers:
            return None
        values = BufferValues(self.buffers)
        path = self.folder / DATA_NAME
        descriptor = self._open(path)
        try:
            base = len(self._layout.head) + self._layout.buffers_at
            checksum = 0
            for offset in range(0, values.nbytes, _BUFFER_CHUNK_BYTES):
                length = min(_BUFFER_CHUNK_BYTES, values.nbytes - offset)
                data = self._files.read(descriptor, length, base + offset)
                checksum = checksum_of([data], checksum)
                if len(data) == length:
                    values.write(offset, memoryview(data))
        except ValueError as error:
            raise SnapshotDamageError(f"{path}: {error}") from error
        finally:
            self._files.close(descriptor)
        if checksum != self.manifest.buffers_checksum:
            raise SnapshotDamageError(f"{path}: the buffers are damaged")
        return values

    def verify(self) -> None:
        """Reads all of it.

        Raises:
            SnapshotDamageError: it is not whole.
        """
        for _ in self.contents():
            pass
        self._check_zeros()
        self.buffer_values()

    def _check_zeros(self) -> None:
        """Where a parameter does not have a kind, others than this reader see zeros."""
        path = self.folder / DATA_NAME
        descriptor = self._open(path)
        try:
            for bucket, kept in zip(self.buckets, self.manifest.contents, strict=True):
                for kind, bitmap in zip(self.kinds, kept.present, strict=True):
                    absent = [not here for here in unpack_bits(bitmap, len(bucket.slices))]
                    for offset, length in self._layout.runs(kind, bucket, absent):
                        if self._files.read(descriptor, length, offset).count(0) != length:
                            raise SnapshotDamageError(f"{path}: bucket {bucket.bucket_id} is damaged")
        finally:
            self._files.close(descriptor)

    def _read_manifest(self, path: Path) -> snapshot_pb2.SnapshotManifest:
        descriptor = self._open(path)
        try:
            content = self._files.read(descriptor, self._files.size(descriptor), 0)
        finally:
            self._files.close(descriptor)
        record = read_record(lambda length, at: content[at : at + length], 0)
        if record is None or content != b"".join(frame(0, record.message, ())):
            raise SnapshotDamageError(f"{path} is damaged")
        return snapshot_pb2.SnapshotManifest.FromString(record.message)

    def _open(self, path: Path) -> int:
        if path.name not in self._files.names(path.parent):
            raise SnapshotDamageError(f"{path} is missing")
        return self._files.open(path)
