"""Checkpoints in files: in torch's form, or in that of safetensors, as the file's name says."""

from __future__ import annotations

import os
import pickle
import secrets
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Final, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from optimd.cli.checkpoint import from_checkpoint
from optimd.cli.errors import CommandError
from optimd.cli.safetensorsform import pack, unpack
from optimd.client.wholejob import WholeJob

_TORCH: Final = ".pt"
_SAFETENSORS: Final = ".safetensors"


def check_target(path: Path, *, force: bool) -> None:
    """Checks, before there is anything to write, whether it could be written.

    Args:
        path: Where to.
        force: Whether it may be there already.

    Raises:
        CommandError: the file's name says no form, it is there, or its folder is not.
    """
    _check_form(path)
    if path.is_dir() or not path.parent.is_dir():
        raise CommandError(f"{path} cannot be written: {'it' if path.is_dir() else path.parent} is {_not_a(path)}")
    if path.exists() and not force:
        raise CommandError(f"{path} exists; write to another file, or replace it with --force")


def write_checkpoint(
    checkpoint: dict[str, Any], path: Path, *, on_bytes: Callable[[int], object] = lambda _: None
) -> None:
    """Writes a checkpoint, in the place of what is there. Whatever happens, there is all of it or what was before.

    Args:
        checkpoint: The checkpoint.
        path: Where to.
        on_bytes: Called with the number of bytes that have been written since it was called last.

    Raises:
        CommandError: it cannot be written.
    """
    _check_form(path)
    try:
        with _replacing(path) as temporary:
            if path.suffix == _TORCH:
                _write_torch(checkpoint, temporary, on_bytes)
            else:
                tensors, metadata = pack(checkpoint)
                save_file(tensors, temporary, metadata)
                on_bytes(temporary.stat().st_size)
    except OSError as error:
        raise CommandError(f"{path} cannot be written: {error.strerror or error}") from error
    except SafetensorError as error:
        raise CommandError(f"{path} cannot be written: {error}") from error


def read_checkpoint(path: Path) -> tuple[str, WholeJob]:
    """Reads a checkpoint. Nothing that is in the file is run.

    Returns:
        The job's name, and all of it.

    Raises:
        CommandError: it cannot be read, or is none.
    """
    _check_form(path)
    try:
        return from_checkpoint(_read_torch(path) if path.suffix == _TORCH else _read_safetensors(path))
    except OSError as error:
        raise CommandError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
    except (AttributeError, LookupError, TypeError) as error:
        reason = f"a part of it is missing, or is something else ({error!r})"
    raise CommandError(f"{path} is not what `optimd export` writes: {reason}")


def _write_torch(checkpoint: dict[str, Any], path: Path, on_bytes: Callable[[int], object]) -> None:
    with path.open("wb") as file:
        counting = _Counting(file, on_bytes)
        try:
            torch.save(checkpoint, cast("IO[bytes]", counting))
        except RuntimeError:
            # torch says no more than that the file is not as long as it should be.
            if counting.failure is not None:
                raise counting.failure from None
            raise


def _read_torch(path: Path) -> Any:
    with path.open("rb") as file:
        # torch reads plain pickles too, and when it does not, says how to run what is in them.
        if not zipfile.is_zipfile(file):
            raise ValueError("it is no archive")
        file.seek(0)
        try:
            return torch.load(file, map_location="cpu", weights_only=True)
        except (RuntimeError, pickle.UnpicklingError) as error:
            raise ValueError("torch does not read plain values and tensors from it") from error


def _read_safetensors(path: Path) -> Any:
    # For errors as of any other file.
    path.open("rb").close()
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(str(error)) from error
    return unpack(tensors, metadata)


def _check_form(path: Path) -> None:
    if path.suffix not in (_TORCH, _SAFETENSORS):
        raise CommandError(
            f"{path} should end in {_TORCH}, for a file that torch.load reads, or in {_SAFETENSORS}: that says its form"
        )


def _not_a(path: Path) -> str:
    return "a folder" if path.is_dir() else "no folder"


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """Where to write a new file, which takes the place of `path` once it is on the disk, or goes if the block fails."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        temporary.touch(exist_ok=False)
        mode = temporary.stat().st_mode
        yield temporary
        # A library may have put a file of its own there, that is its writer's alone.
        temporary.chmod(mode)
        _sync(temporary)
        temporary.replace(path)
        _sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class _Counting:
    """A file that tells how much is written to it.

    Args:
        file: The file.
        on_bytes: Called with the bytes of each write.
    """

    def __init__(self, file: IO[bytes], on_bytes: Callable[[int], object]) -> None:
        self._file = file
        self._on_bytes = on_bytes
        self.failure: OSError | None = None
        """Why something could not be written."""

    def write(self, data: bytes) -> int:
        """Writes all of `data`."""
        try:
            written = self._file.write(data)
        except OSError as error:
            self.failure = error
            raise
        self._on_bytes(written)
        return written

    def flush(self) -> None:
        """Hands what is held to the system."""
        self._file.flush()
