"""How elements become the bytes of a payload and come back: as they are, or narrowed.

An encoding works on slices: what a bucket's payload holds is the encoded present slices, one after another, of which
one without elements takes no room. Another encoding is another subclass of `Encoding`, with a value of the schema's
`PayloadEncoding`, listed in `_ENCODINGS`.
"""

from __future__ import annotations

import ctypes
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

import torch

from optimd.v1 import tensor_pb2
from optimd.wire.tensors import Span, address_of, bytes_of, copy_bytes, span_of, tensor_over


class Encoding(ABC):
    """Turns slices into payloads and back. Has no state: may be used from any thread.

    Shape suffix: a `flat` tensor is 1-D with the elements of one slice.
    """

    name: str
    """What messages to a person call it."""

    number: tensor_pb2.PayloadEncoding
    """What the schema calls it."""

    is_exact: bool
    """Whether what comes back has the bits of what was encoded, for every dtype that it takes."""

    is_elementwise: bool
    """Whether each element is encoded by itself: slices of one dtype that follow each other are encoded as one."""

    @abstractmethod
    def takes(self, dtype: torch.dtype) -> bool:
        """Whether elements of `dtype` can be encoded, and are the better for it."""

    @abstractmethod
    def payload_bytes(self, numel: int, dtype: torch.dtype) -> int:
        """How many bytes a slice of `numel` elements of `dtype` takes: a number that depends on nothing else."""

    @abstractmethod
    def encode(self, flat: torch.Tensor, into: memoryview) -> None:
        """Writes the payload of a slice.

        Args:
            flat: Its elements, on any device and of any stride. Only read.
            into: Where to, as many bytes as `payload_bytes` says. Need not be a buffer that says it is writable.
        """

    @abstractmethod
    def decode(self, payload: memoryview, into: torch.Tensor) -> None:
        """Writes the elements of a slice.

        Args:
            payload: What `encode` wrote. Only read; of any alignment.
            into: Where to: flat, on any device, of any stride, of the dtype that was encoded or a wider one.
        """

    def of(self, dtype: torch.dtype) -> Encoding:
        """What elements of `dtype` are encoded in where this is asked for: as they are, if it does not take them."""
        return self if self.takes(dtype) else EXACT

    def rounded(self, flat: torch.Tensor) -> torch.Tensor:
        """What comes back of a slice that is encoded: a copy of the same dtype, on the same device."""
        payload = torch.empty(self.payload_bytes(flat.numel(), flat.dtype), dtype=torch.uint8)
        into = bytes_of(payload)
        self.encode(flat, into)
        returned = torch.empty(flat.shape, dtype=flat.dtype, device=flat.device)
        self.decode(into, returned)
        return returned


class _Exact(Encoding):
    """Elements as they are. What sends or receives them can do without a copy: see `bytes_of` and `tensor_over`."""

    name = "exact"
    number = tensor_pb2.PAYLOAD_ENCODING_UNSPECIFIED
    is_exact = True
    is_elementwise = True

    def takes(self, dtype: torch.dtype) -> bool:  # noqa: ARG002  # all of them
        return True

    def payload_bytes(self, numel: int, dtype: torch.dtype) -> int:
        return numel * dtype.itemsize

    def encode(self, flat: torch.Tensor, into: memoryview) -> None:
        tensor_over(into, torch.uint8).copy_(flat.contiguous().view(torch.uint8))

    def decode(self, payload: memoryview, into: torch.Tensor) -> None:
        into.copy_(tensor_over(payload, into.dtype))


class _Narrowed(Encoding):
    """Real elements rounded to a type of 2 bytes, as `Tensor.to` rounds them."""

    is_exact = False
    is_elementwise = True

    def __init__(self, dtype: torch.dtype, number: tensor_pb2.PayloadEncoding) -> None:
        self.dtype = dtype
        self.name = str(dtype).removeprefix("torch.")
        self.number = number

    def takes(self, dtype: torch.dtype) -> bool:
        return dtype.is_floating_point and dtype.itemsize > self.dtype.itemsize

    def payload_bytes(self, numel: int, dtype: torch.dtype) -> int:  # noqa: ARG002  # the same for all
        return numel * self.dtype.itemsize

    def encode(self, flat: torch.Tensor, into: memoryview) -> None:
        # Rounds and stores in one pass, without the interpreter's lock.
        tensor_over(into, self.dtype).copy_(flat)

    def decode(self, payload: memoryview, into: torch.Tensor) -> None:
        into.copy_(tensor_over(payload, self.dtype))


EXACT: Final[Encoding] = _Exact()
BFLOAT16: Final[Encoding] = _Narrowed(torch.bfloat16, tensor_pb2.PAYLOAD_ENCODING_BFLOAT16)
FLOAT16: Final[Encoding] = _Narrowed(torch.float16, tensor_pb2.PAYLOAD_ENCODING_FLOAT16)

_ENCODINGS: Final[dict[int, Encoding]] = {encoding.number: encoding for encoding in (EXACT, BFLOAT16, FLOAT16)}
_BY_DTYPE: Final = {torch.bfloat16: BFLOAT16, torch.float16: FLOAT16}

NARROW_DTYPES: Final = tuple(_BY_DTYPE)
"""The dtypes that elements can be narrowed to."""


def known_encoding(number: int) -> Encoding | None:
    """The encoding that the schema's `number` stands for; None where this version knows none of that number."""
    return _ENCODINGS.get(number)


def encoding_for(number: int, dtype: torch.dtype) -> Encoding:
    """The encoding that the schema's `number` stands for, where elements of `dtype` have come in it.

    Raises:
        ValueError: this version knows none of that number, or it does not take `dtype`.
    """
    encoding = known_encoding(number)
    if encoding is None or not encoding.takes(dtype):
        raise ValueError(f"encoding {number} is not one of {dtype}")
    return encoding


def narrowing_to(dtype: torch.dtype | None) -> Encoding:
    """The encoding that narrows to `dtype`; None: that of elements as they are.

    Raises:
        ValueError: there is none.
    """
    if dtype is None:
        return EXACT
    try:
        return _BY_DTYPE[dtype]
    except (KeyError, TypeError):
        raise ValueError(f"{dtype} is not one of {', '.join(map(str, NARROW_DTYPES))}") from None


@dataclass(frozen=True, slots=True)
class Encoded:
    """A part of a payload that is encoded where it is written: in a message or in shared memory."""

    encoding: Encoding
    flat: torch.Tensor
    """The elements, as `Encoding.encode` takes them. They must not change until they are written."""
    dtype: torch.dtype
    """What dtype they count as: they may be kept in a wider one."""

    @property
    def nbytes(self) -> int:
        """How many bytes it takes."""
        return self.encoding.payload_bytes(self.flat.numel(), self.dtype)

    def write(self, into: memoryview) -> None:
        """Writes it. `into` is as in `Encoding.encode`."""
        self.encoding.encode(self.flat, into)


Part = memoryview | Span | Encoded
"""A part of a payload: bytes that are there, or elements that are encoded where they are written."""


def part_of(flat: torch.Tensor, encoding: Encoding, dtype: torch.dtype) -> Part:
    """A slice as a part of a payload.

    Args:
        flat: Its elements. Without a copy where they are on the CPU, of `dtype`, and as they are.
        encoding: One that takes `dtype`.
        dtype: What dtype they count as.
    """
    return span_of(flat.to(dtype).cpu()) if encoding.is_exact else Encoded(encoding, flat, dtype)


# How C makes an object of bytes: without content, to be filled in before anybody else sees it. `bytes(n)` would write
# zeros first, and hold the interpreter's lock meanwhile.
_new_bytes: Final = ctypes.pythonapi.PyBytes_FromStringAndSize
_new_bytes.restype = ctypes.py_object
_new_bytes.argtypes = (ctypes.c_char_p, ctypes.c_ssize_t)


def write_parts(parts: Iterable[Part], into: memoryview) -> None:
    """Writes a payload, each byte once, without holding the interpreter's lock for long.

    Args:
        parts: Its parts.
        into: Where to, as in `Encoding.encode`: as many bytes as they take.
    """
    address, start = address_of(into), 0
    for part in parts:
        end = start + part.nbytes
        if isinstance(part, Span):
            copy_bytes(address + start, part.address, part.nbytes)
        elif isinstance(part, Encoded):
            part.write(into[start:end])
        else:
            copy_bytes(address + start, address_of(part), part.nbytes)
        start = end


def payload_of(parts: Sequence[Part]) -> bytes:
    """A payload by itself: what it shows does not change any more."""
    return bytes_from(b"", parts)


def bytes_from(header: bytes, parts: Sequence[Part]) -> bytes:
    """A header and the concatenation of parts, each byte written once."""
    nbytes = len(header) + sum(part.nbytes for part in parts)
    if not nbytes:
        return b""
    data: bytes = _new_bytes(None, nbytes)
    view = memoryview(data)
    start = len(header)
    if header:
        write_parts([Span(address_of(memoryview(header)), start, header)], view[:start])
    write_parts(parts, view[start:])
    return data


def decode_slices(
    encoding: Encoding, payload: memoryview, lengths: Sequence[int], dtype: torch.dtype, into: torch.Tensor
) -> None:
    """Writes the elements of a payload.

    Args:
        encoding: What it is encoded in.
        payload: The payload.
        lengths: How many elements each of its slices has.
        dtype: The dtype that was encoded.
        into: Where to: flat, as many elements as the slices have.
    """
    if encoding.is_elementwise:
        encoding.decode(payload, into)
        return
    start = place = 0
    for length in filter(None, lengths):
        size = encoding.payload_bytes(length, dtype)
        encoding.decode(payload[start : start + size], into[place : place + length])
        start, place = start + size, place + length
