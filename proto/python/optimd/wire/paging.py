"""Long lists in messages of bounded size."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

from google.protobuf.message import Message

from optimd.wire.limits import PAGE_BYTES

M = TypeVar("M", bound=Message)


def paginate(items: Iterable[M], page_bytes: int = PAGE_BYTES) -> Iterator[tuple[list[M], bool]]:
    """Cuts `items` into pages of at most `page_bytes` bytes, or of one item where one alone is larger.

    Yields:
        The items of a page and whether it is the last. There is always a last page, if an empty one.
    """
    page: list[M] = []
    size = 0
    for item in items:
        item_bytes = item.ByteSize()
        if page and size + item_bytes > page_bytes:
            yield page, False
            page, size = [], 0
        page.append(item)
        size += item_bytes
    yield page, True
