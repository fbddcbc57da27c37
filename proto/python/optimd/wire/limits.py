"""The sizes that both sides keep to."""

from __future__ import annotations

from typing import Final

MAX_MESSAGE_BYTES: Final = 4 * 1024 * 1024
"""gRPC's default limit on a received message. Every message stays under it, so that nobody has to raise it."""

MAX_BUCKET_BYTES: Final = 3 * 1024 * 1024
"""The largest payload of a bucket: with its header it stays under `MAX_MESSAGE_BYTES`."""

DEFAULT_BUCKET_BYTES: Final = 2 * 1024 * 1024
"""The payload of a bucket where nobody asks for another and payloads travel whole, in messages."""

MIN_BUCKET_BYTES: Final = 1024
"""The smallest `bucket_bytes`: `SLICE_ALIGNMENT` elements of the widest dtype, complex128."""

SLICE_ALIGNMENT: Final = 64
"""Slices start at multiples of this many elements of their parameter. torch's vectorised kernels and their
scalar tails differ in the last bit; cut here, a parameter's elements meet the kernel they would meet whole."""

MAX_BUCKET_SLICES: Final = 16_384
"""The most slices in a bucket: keeps the bucket's entry in the table, and its bitmap, well under a message."""

PAGE_BYTES: Final = 1024 * 1024
"""Lists (layouts, tables, groups, entries) travel in pages of about this many bytes."""

MAX_PARAMETER_DIMS: Final = 64
"""The most dimensions of a parameter, as in torch."""

MAX_NAME_BYTES: Final = 1024
"""The longest name of a job, a worker or a parameter, in UTF-8."""
