"""A worker's own tensors, seen as the wire sees them: flat, in the job's memory order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.nn.parameter import is_lazy

from optimd.wire.dtypes import is_carried
from optimd.wire.encodings import EXACT, Encoded, Encoding, Part
from optimd.wire.layout import Bucket, Parameter, Slice, is_master_of
from optimd.wire.tensors import Span, address_of, copy_bytes, flatten, memory_at, memory_order, tensor_over


def is_held(tensor: torch.Tensor) -> bool:
    """Whether a server holds a parameter: it has memory, and elements of a type that gradients come in.

    What is not held is what torch never looks at: frozen integers of a quantized model, parameters on the meta device
    or of a lazy module that has not run yet. It has its index in the job, and no elements.
    """
    return not is_lazy(tensor) and not tensor.is_meta and is_carried(tensor.dtype)


def has_memory(tensor: torch.Tensor) -> bool:
    """Whether a tensor's elements are there: its storage may have been emptied under it."""
    return not tensor.numel() or tensor.untyped_storage().nbytes() > 0


def form_of(tensor: torch.Tensor) -> tuple[torch.dtype, tuple[int, ...]]:
    """The dtype and the shape that the job knows a parameter by."""
    return (tensor.dtype, tuple(tensor.shape)) if is_held(tensor) else (torch.float32, (0,))


def describe(tensor: torch.Tensor, name: str, master_dtype: torch.dtype | None = None) -> Parameter:
    """What the server needs to know of a parameter.

    Args:
        tensor: The parameter.
        name: Its name, or nothing.
        master_dtype: What the server is to keep it in, if it is of a narrower real floating-point type.

    Raises:
        ValueError: it stands for elements that lie elsewhere, such as a DTensor, or is not strided.
    """
    if hasattr(tensor, "__tensor_flatten__"):
        raise ValueError(
            f"it is a {type(tensor).__name__}, whose elements lie in other tensors; only plain ones can be stepped "
            "remotely"
        )
    if tensor.layout is not torch.strided:
        raise ValueError(f"its layout is {tensor.layout}; only strided ones can be stepped remotely")
    dtype, shape = form_of(tensor)
    order = memory_order(tensor) if is_held(tensor) else (0,)
    if master_dtype is not None and not is_master_of(master_dtype, dtype):
        master_dtype = None
    return Parameter(name, dtype, shape, order, master_dtype)


def describe_groups(
    groups: Sequence[Mapping[str, Any]], first: int = 0, *, master_dtype: torch.dtype | None = None
) -> list[Parameter]:
    """Describes the parameters of torch's param_groups, in order.

    Args:
        groups: The groups.
        first: The index of their first parameter, for messages.
        master_dtype: As in `describe`.

    Raises:
        ValueError: one of them cannot be held by a server; it is named.
    """
    described: list[Parameter] = []
    for group in groups:
        for tensor, title in zip(group["params"], titles(group), strict=True):
            try:
                described.append(describe(tensor, title, master_dtype))
            except ValueError as error:
                index = first + len(described)
                name = f"parameter {index} ({title})" if title else f"parameter {index}"
                raise ValueError(f"{name}: {error}") from error
    return described


def titles(group: Mapping[str, Any]) -> list[str]:
    """The names of a group's parameters; empty ones where it has none, or not as many."""
    named = group.get("param_names") or ()
    return list(named) if len(named) == len(group["params"]) else [""] * len(group["params"])


def gradients(
    tensors: Sequence[torch.Tensor], parameters: Sequence[Parameter], *, sparse_error: str
) -> list[torch.Tensor | None]:
    """The gradients of parameters, None where they have none.

    Args:
        tensors: The parameters.
        parameters: What describes them.
        sparse_error: What is said of sparse ones.

    Raises:
        RuntimeError: one is sparse, of another shape or dtype than its parameter, of a dtype that is not carried, or
            of a parameter whose elements share memory.
    """
    grads: list[torch.Tensor | None] = []
    for index, (tensor, parameter) in enumerate(zip(tensors, parameters, strict=True)):
        grad = None if is_lazy(tensor) else tensor.grad
        if not is_held(tensor):
            # On the meta device there is nothing to step.
            if grad is not None and not tensor.is_meta:
                raise RuntimeError(
                    f"{parameter.title(index)} has a gradient and is {tensor.dtype}, which is not carried"
                )
            grad = None
        if grad is not None and grad.layout is not torch.strided:
            raise RuntimeError(sparse_error)
        if grad is not None and (grad.dtype != tensor.dtype or grad.shape != tensor.shape):
            raise RuntimeError(
                f"{parameter.title(index)} is {tensor.dtype} {list(tensor.shape)}, its gradient {grad.dtype} "
                f"{list(grad.shape)}; they have to be alike"
            )
        if grad is not None and 0 in tensor.stride() and tensor.numel() > 1:
            # Raises torch's own error where elements share memory, before anything is sent.
            tensor.detach().mul_(1)
        grads.append(grad)
    return grads


class FlatReader:
    """Reads slices of tensors as parts of payloads. Consecutive slices of one tensor flatten it once.

    Args:
        tensors: By parameter index, all of one kind.
        parameters: The job's, by index.
        encoding: What they are encoded in, where it takes their dtype.
    """

    def __init__(
        self, tensors: Mapping[int, torch.Tensor], parameters: Sequence[Parameter], encoding: Encoding = EXACT
    ) -> None:
        self._tensors = tensors
        self._parameters = parameters
        self._encoding = encoding
        self._index = -1
        self._flat = torch.empty(0)
        self._address = 0
        # Of those that are sent as they lie. All at once: between buckets, which push everything else out of the
        # processor's cache, the same takes several times as long.
        self._spans = (
            {index: span for index, tensor in tensors.items() if (span := _plain_span(tensor, parameters[index]))}
            if encoding.is_exact
            else {}
        )

    def encoding_of(self, kind: str, bucket: Bucket) -> Encoding:
        """What the parts of a bucket are encoded in."""
        return self._encoding.of(bucket.dtype_of(kind))

    def parts(self, kind: str, bucket: Bucket, present: Sequence[bool]) -> Iterator[Part]:
        """The bucket's present slices, of the dtype that tensors `kind` travel in.

        Views of the tensors where these are dense and of that dtype, else of copies. What is encoded is encoded only
        where it is written, and is on the tensors' own device until then.
        """
        dtype = bucket.dtype_of(kind)
        encoding = self._encoding.of(dtype)
        for piece, here in zip(bucket.slices, present, strict=True):
            if here and piece.length:
                span = self._spans.get(piece.parameter)
                if span is not None and self._tensors[piece.parameter].dtype is dtype:
                    size = dtype.itemsize
                    yield Span(span.address + piece.offset * size, piece.length * size, span.owner)
                    continue
                self._take(piece.parameter, dtype, encoding)
                if encoding.is_exact:
                    yield Span(self._address + piece.offset * dtype.itemsize, piece.length * dtype.itemsize, self._flat)
                else:
                    yield Encoded(encoding, self._flat[piece.offset : piece.end], dtype)

    def _take(self, index: int, dtype: torch.dtype, encoding: Encoding) -> None:
        if index == self._index:
            return
        tensor, order = self._tensors[index], self._parameters[index].memory_order
        _check_memory(index, tensor)
        flat = flatten(tensor.detach().resolve_conj().resolve_neg().to(dtype), order)
        if encoding.is_exact:
            flat = flat.cpu().contiguous()
            self._address = flat.data_ptr()
        self._flat = flat
        self._index = index


class FlatWriter:
    """Writes slices into tensors from received bytes, in place.

    Args:
        tensors: By parameter index.
        parameters: The job's, by index.
        narrowed: Has those added to it, by index, of which something comes in an encoding that is not exact.
        compares: Whether to look at what the tensors have had before, for `changed`.
        on_written: Called with each tensor, and its index, all of whose elements have been written and that need not
            wait for `flush`.
    """

    def __init__(
        self,
        tensors: Sequence[torch.Tensor] | Mapping[int, torch.Tensor],
        parameters: Sequence[Parameter],
        *,
        narrowed: set[int] | None = None,
        compares: bool = False,
        on_written: Callable[[int, torch.Tensor], object] | None = None,
    ) -> None:
        self._compares = compares
        self._on_written = on_written
        # How many elements of those that have been begun are still to be written.
        self._left: dict[int, int] = {}
        self._narrowed = set[int]() if narrowed is None else narrowed
        self.changed: set[int] = set()
        """If it compares: those that something else has been written into than they had."""
        self._tensors = tensors
        self._parameters = parameters
        self._flats: dict[int, torch.Tensor] = {}
        self._addresses: dict[int, int] = {}
        self._touched: set[int] = set()
        # Tensors that are not dense in the job's order: written to a copy first.
        self._copied: set[int] = set()

    @torch.no_grad()
    def write(
        self, kind: str, bucket: Bucket, present: Sequence[bool], payload: memoryview, encoding: Encoding = EXACT
    ) -> None:
        """Writes the bucket's present slices, which `payload` holds one after another.

        Args:
            kind: What they are of.
            bucket: The bucket.
            present: Which of its slices there are.
            payload: The payload.
            encoding: What it is encoded in: one that takes the dtype that tensors `kind` travel in.

        Raises:
            ValueError: the payload has another length than such tensors `kind`.
        """
        due = bucket.payload_bytes(kind, present, encoding)
        if payload.nbytes != due:
            raise ValueError(f"{payload.nbytes} bytes for {kind} of bucket {bucket.bucket_id}, which takes {due}")
        dtype, start = bucket.dtype_of(kind), 0
        source = address_of(payload) if encoding.is_exact else 0
        for piece, here in zip(bucket.slices, present, strict=True):
            if not here or not piece.length:
                continue
            nbytes = encoding.payload_bytes(piece.length, dtype)
            part, start = slice(start, start + nbytes), start + nbytes
            address = self._address(piece.parameter, dtype) if encoding.is_exact and not self._compares else 0
            if address:
                copy_bytes(address + piece.offset * dtype.itemsize, source + part.start, nbytes)
            else:
                self._write_slice(piece, payload[part], dtype, encoding)
            self._note(piece)

    def _write_slice(self, piece: Slice, payload: memoryview, dtype: torch.dtype, encoding: Encoding) -> None:
        into = self._flat(piece.parameter)[piece.offset : piece.end]
        if not encoding.is_exact:
            encoding.decode(payload, into)
            self._narrowed.add(piece.parameter)
            return
        elements = tensor_over(payload, dtype)
        if self._compares and piece.parameter not in self.changed and not _same_bits(into, elements):
            self.changed.add(piece.parameter)
        into.copy_(elements)

    def _note(self, piece: Slice) -> None:
        """A slice has been written."""
        if self._on_written is None:
            return
        index = piece.parameter
        left = self._left[index] = self._left.get(index, self._parameters[index].numel) - piece.length
        if left <= 0 and index not in self._copied:
            self._on_written(index, self._tensors[index])

    @torch.no_grad()
    def copy(self, bucket: Bucket, present: Sequence[bool], spans: Mapping[int, Span]) -> None:
        """Writes the bucket's present slices, as they lie in memory that others write to as well.

        Args:
            bucket: The bucket.
            present: Which of its slices there are.
            spans: The bytes of whole parameters, by index, of the dtype that they travel in.
        """
        dtype = bucket.dtype
        for piece, here in zip(bucket.slices, present, strict=True):
            if here and piece.length:
                start, nbytes = piece.offset * dtype.itemsize, piece.length * dtype.itemsize
                source = spans[piece.parameter].address + start
                address = self._address(piece.parameter, dtype)
                if address:
                    copy_bytes(address + start, source, nbytes)
                else:
                    there = tensor_over(memory_at(source, nbytes, spans[piece.parameter].owner), dtype)
                    self._flat(piece.parameter)[piece.offset : piece.end].copy_(there)
                self._note(piece)

    @torch.no_grad()
    def round(self, bucket: Bucket, present: Sequence[bool], encoding: Encoding) -> None:
        """Rounds values: what they are after this is what would have come of them in an encoding."""
        for piece, here in zip(bucket.slices, present, strict=True):
            if here and piece.length:
                values = self._flat(piece.parameter)[piece.offset : piece.end]
                values.copy_(encoding.rounded(values))
                self._narrowed.add(piece.parameter)

    @torch.no_grad()
    def flush(self) -> None:
        """Brings what was written into tensors that could not be written to slice by slice."""
        for index in self._copied:
            tensor, order = self._tensors[index], self._parameters[index].memory_order
            permuted = tensor.detach().permute(order)
            permuted.copy_(self._flats[index].view(permuted.shape))

    def prepare(self, indices: Iterable[int]) -> None:
        """Looks at the tensors that will be written to. Need not be called: see `FlatReader`."""
        for index in indices:
            self._look_at(index)

    def _address(self, index: int, dtype: torch.dtype) -> int:
        """Where a tensor's elements lie one after another in the host's memory, as `dtype`; 0 where they do not.

        For somebody who is about to write there.
        """
        address = self._addresses.get(index, -1)
        if address < 0:
            address = self._look_at(index)
        if not address or self._tensors[index].dtype is not dtype:
            return 0
        if index not in self._touched:
            self._touched.add(index)
            if not self._tensors[index].is_inference():
                # As torch's own copies do, for autograd and for whoever watches a parameter.
                torch.autograd.graph.increment_version(self._tensors[index])
        return address

    def _look_at(self, index: int) -> int:
        span = _plain_span(self._tensors[index], self._parameters[index])
        address = self._addresses[index] = 0 if span is None else span.address
        return address

    def _flat(self, index: int) -> torch.Tensor:
        flat = self._flats.get(index)
        if flat is None:
            tensor, order = self._tensors[index].detach(), self._parameters[index].memory_order
            _check_memory(index, tensor)
            flat = flatten(tensor, order)
            if flat.untyped_storage().data_ptr() != tensor.untyped_storage().data_ptr():
                self._copied.add(index)
            self._flats[index] = flat
        return flat


def _plain_span(tensor: torch.Tensor, parameter: Parameter) -> Span | None:
    """Where a tensor's elements lie one after another in the host's memory; None where they do not, or are none."""
    if not is_held(tensor) or tensor.device.type != "cpu" or not _lies_in(tensor, parameter.memory_order):
        return None
    if tensor.is_complex() or tensor.is_neg() or not has_memory(tensor):
        return None
    return Span(tensor.data_ptr(), tensor.numel() * tensor.element_size(), tensor)


def _lies_in(tensor: torch.Tensor, order: tuple[int, ...]) -> bool:
    """Whether a tensor is row-major, and its elements are to be taken in this order."""
    return tensor.is_contiguous() and order == tuple(range(len(order)))


def _same_bits(here: torch.Tensor, received: torch.Tensor) -> bool:
    """Whether a slice of a tensor has the bits of received elements. A NaN is not equal to itself; its bits are."""
    there = received.to(here.device)
    return torch.equal(here.contiguous().view(torch.uint8), there.view(torch.uint8))


def _check_memory(index: int, tensor: torch.Tensor) -> None:
    if not has_memory(tensor):
        raise RuntimeError(f"the memory of parameter {index}, or of its gradient or state, has been freed")


def refuse_shared_memory(tensors: Sequence[torch.Tensor], names: Sequence[str]) -> None:
    """Refuses distinct parameters that share elements: an update of one would change the other behind its back.

    Raises:
        ValueError: two of them do; both are named.
    """
    spans = []
    for index, tensor in enumerate(tensors):
        if is_held(tensor) and tensor.numel():
            start = tensor.storage_offset() * tensor.element_size()
            extent = sum((size - 1) * abs(stride) for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
            end = start + (extent + 1) * tensor.element_size()
            spans.append((tensor.untyped_storage().data_ptr(), start, end, index))
    spans.sort()
    for position, (storage, _, end, index) in enumerate(spans):
        for following in range(position + 1, len(spans)):
            other_storage, other_start, _, other = spans[following]
            if other_storage != storage or other_start >= end:
                break
            if _share_elements(tensors[index], tensors[other]):
                raise ValueError(
                    f"{_title(index, names)} and {_title(other, names)} share memory; an optimizer needs distinct ones"
                )


def _share_elements(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors of one storage, whose spans of it overlap, have an element in common."""
    if one.dtype != other.dtype:
        return True
    touched = torch.zeros(one.untyped_storage().nbytes() // one.element_size(), dtype=torch.bool)
    touched.as_strided(one.shape, one.stride(), one.storage_offset()).fill_(value=True)
    return bool(touched.as_strided(other.shape, other.stride(), other.storage_offset()).any())


def _title(index: int, names: Sequence[str]) -> str:
    return f"parameter {index} ({names[index]})" if names[index] else f"parameter {index}"
