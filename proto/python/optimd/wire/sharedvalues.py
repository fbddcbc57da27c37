"""A server's values in memory that workers on its host read.

The server keeps them in a file like those of `sharedmemory`, which has its name as long as they are there: workers come
at any time. Workers map it to read. `LayoutAccepted` says what lies where, `SharedValues` in the schema how.

What a worker reads there may change under it once the server holds it to be lost. So each change has a number, which
stands in the file before anything is written: who has read finds there whether that was all of one piece. Between
numbers and values lies, on both sides, a fence.
"""

from __future__ import annotations

import mmap
import os
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Final, Self

import torch

from optimd.wire.layout import Parameter
from optimd.wire.rings import fence
from optimd.wire.sharedmemory import FOLDER, HEADER_BYTES, NotSharedError, find_file, new_file, remove_file
from optimd.wire.tensors import bytes_of, tensor_over

_VERSION: Final = 128
_ALIGNMENT: Final = 64


class ValuesFile:
    """The server's side: memory for the values of parameters that follow each other, zero at first.

    Made with `create`. The file is removed when this is not referred to any more, if not before; what is mapped of it
    stays good.

    Attributes:
        name: The file's name.
        token: The random bytes in it.
        flats: The values of each parameter, 1-D, in the dtype that the server keeps.
    """

    def __init__(self, path: Path, descriptor: int, token: bytes, parameters: Sequence[Parameter]) -> None:
        # Whatever fails from here on.
        self._remove = weakref.finalize(self, remove_file, path, descriptor)
        starts, nbytes = _starts(parameters)
        os.posix_fallocate(descriptor, 0, nbytes)
        # Unlike mmap's, it keeps no open file.
        try:
            memory = torch.from_file(str(path), shared=True, size=nbytes, dtype=torch.uint8)
        except RuntimeError as error:
            # What the system said is in its text alone.
            raise OSError(f"{path} cannot be mapped: {str(error).partition(chr(10))[0]}") from error
        self.name = path.name
        self.token = token
        self.flats = [
            memory[start : start + each.numel * each.server_dtype.itemsize].view(each.server_dtype)
            for start, each in zip(starts, parameters, strict=True)
        ]
        self._version = bytes_of(memory[_VERSION : _VERSION + 8]).cast("Q")

    @classmethod
    def create(cls, parameters: Sequence[Parameter]) -> Self:
        """Takes the memory, all of it now.

        Raises:
            OSError: there is not as much, or it would leave others less than it takes.
        """
        folder = os.statvfs(FOLDER)
        _, nbytes = _starts(parameters)
        if 2 * nbytes > folder.f_bavail * folder.f_frsize:
            raise OSError(f"values of {nbytes >> 20} MB are more than half of what {FOLDER} has left")
        return cls(*new_file(), parameters)

    def change(self, version: int) -> None:
        """Values are about to change, for the `version`th time."""
        self._version[0] = version
        fence()

    def close(self) -> None:
        """Removes the file: no worker finds it any more. May be called more than once."""
        self._remove()


class MappedValues:
    """A worker's side: the values of parameters that follow each other, to be read.

    Args:
        name: The file's name.
        token: The random bytes in it.
        parameters: What lies in it.

    Attributes:
        name: The file's name.
        flats: As in `ValuesFile`. Must not be written to: that ends the process.

    Raises:
        NotSharedError: it cannot be mapped.
    """

    def __init__(self, name: str, token: bytes, parameters: Sequence[Parameter]) -> None:
        starts, nbytes = _starts(parameters)
        descriptor = find_file(name, token)
        try:
            if os.fstat(descriptor).st_size < nbytes:
                raise NotSharedError("there are fewer values than parameters")
            memory = memoryview(mmap.mmap(descriptor, nbytes, prot=mmap.PROT_READ))
        except OSError as error:
            raise NotSharedError(f"the values cannot be mapped: {error.strerror}") from error
        finally:
            os.close(descriptor)
        self.name = name
        self.flats = [
            tensor_over(memory[start : start + each.numel * each.server_dtype.itemsize], each.server_dtype)
            for start, each in zip(starts, parameters, strict=True)
        ]
        self._version = memory[_VERSION : _VERSION + 8].cast("Q")

    @property
    def version(self) -> int:
        """The number of the last change of any of these values."""
        fence()
        return self._version[0]


def _starts(parameters: Sequence[Parameter]) -> tuple[list[int], int]:
    """Where the values of parameters lie in a file, and how long that is."""
    starts, end = [], HEADER_BYTES
    for parameter in parameters:
        start = -(-end // _ALIGNMENT) * _ALIGNMENT
        starts.append(start)
        end = start + parameter.numel * parameter.server_dtype.itemsize
    return starts, end
