"""The system's memory allocator, set for messages of a megabyte that come and go, and for tensors that stay.

gRPC and Python take the memory of every message from malloc. glibc, left to itself, gives much of it back to the system
as soon as a message is gone; the next one's then comes anew, and is zeroed and mapped page by page.
"""

from __future__ import annotations

import ctypes
import os
from typing import Final

# Of <malloc.h>.
_M_TRIM_THRESHOLD: Final = -1
_M_MMAP_THRESHOLD: Final = -3

_KEPT_BYTES: Final = 32 * 1024 * 1024
"""How much free memory at its end each of the allocator's arenas keeps."""
_MAPPED_BYTES: Final = 8 * 1024 * 1024
"""From here on an allocation is given back to the system when it is freed: larger than any message."""


def keep_messages_memory() -> None:
    """Has freed memory of the size of messages used again, in this process.

    Nothing happens where malloc is not glibc's. To be called before threads are started. Larger allocations, a job's
    tensors say, are given back as before.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        # Both: setting one ends glibc's own adjustment of the other.
        mallopt(_M_MMAP_THRESHOLD, _MAPPED_BYTES)
        mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)


def ask_for_huge_pages() -> None:
    """Has torch ask for huge pages for CPU tensors of 2 MiB and more, unless the environment says otherwise.

    An update goes through all of a job's state once in a step, and finds more of it by what the processor remembers
    of pages. Nothing happens where the kernel has none to give. To be called before the first tensor is made.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
