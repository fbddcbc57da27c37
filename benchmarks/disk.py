"""What a step's bytes take by themselves: checksums, writes and syncs, in pieces of the size of a bucket."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Final
from zlib import crc32

from benchmarks.timing import Contender
from optimd.wire.limits import DEFAULT_BUCKET_BYTES

CRC: Final = "CRC-32"
WRITE_NEW: Final = "pwritev, new file"
SYNC_NEW: Final = "fdatasync behind it"
WRITE_OVER: Final = "pwritev over a file"
SYNC_OVER: Final = "fdatasync behind that"
COSTS: Final = (CRC, WRITE_NEW, SYNC_NEW, WRITE_OVER, SYNC_OVER)
"""The names of the contenders."""


@contextmanager
def raw_costs(folder: Path, nbytes: int) -> Iterator[list[Contender]]:
    """The contenders, one for each name of `COSTS`.

    Args:
        folder: Where they write.
        nbytes: How much each writes, or reads.
    """
    whole, rest = divmod(nbytes, DEFAULT_BUCKET_BYTES)
    sizes = [DEFAULT_BUCKET_BYTES] * whole + [rest] * bool(rest)
    pieces = [random.Random(0).randbytes(size) for size in sizes]
    offsets = [0, *accumulate(sizes)][:-1]

    def check() -> None:
        for piece in pieces:
            crc32(piece)

    def write(descriptor: int) -> None:
        for piece, offset in zip(pieces, offsets, strict=True):
            os.pwritev(descriptor, [piece], offset)

    over = os.open(folder / "over", os.O_RDWR | os.O_CREAT)
    new = os.open(folder / "new", os.O_RDWR | os.O_CREAT)
    try:
        write(over)

        def empty() -> None:
            # As good as new: it has no blocks.
            os.ftruncate(new, 0)
            os.fsync(new)

        def refill() -> None:
            empty()
            write(new)

        yield [
            Contender(CRC, check),
            Contender(WRITE_NEW, partial(write, new), lambda _round: empty(), partial(os.fsync, new)),
            Contender(SYNC_NEW, partial(os.fdatasync, new), lambda _round: refill()),
            Contender(WRITE_OVER, partial(write, over), settle=partial(os.fsync, over)),
            Contender(SYNC_OVER, partial(os.fdatasync, over), lambda _round: write(over)),
        ]
    finally:
        os.close(over)
        os.close(new)
