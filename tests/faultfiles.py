"""Files that fail when they are told to, and files of which a power loss leaves what a disk may be left with."""

from __future__ import annotations

import copy
import errno
import os
import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

from optimd.server.files import Files

Operation = Literal["open", "write_some", "truncate", "sync", "sync_folder", "make_folder", "rename", "remove"]
OPERATIONS: Final[tuple[Operation, ...]] = (
    "open",
    "write_some",
    "truncate",
    "sync",
    "sync_folder",
    "make_folder",
    "rename",
    "remove",
)
"""All that changes a disk."""


class WatchedFiles(Files):
    """Tells of each call that changes the disk. Nothing is really synced: no test outlives a power loss.

    Args:
        observe: Called behind each, in the caller's thread, with no other one under way.
    """

    def __init__(self, observe: Callable[[Operation, Path], object] = lambda *_: None) -> None:
        self.observe = observe
        self.calls: Counter[Operation] = Counter()
        self._alone = threading.RLock()
        self._paths: dict[int, Path] = {}

    @contextmanager
    def still(self) -> Iterator[None]:
        """No call but the block's own is under way, or begun."""
        with self._alone:
            yield

    def open(self, path: Path) -> int:
        descriptor = self._call("open", path, path)
        assert isinstance(descriptor, int)
        return descriptor

    def close(self, descriptor: int) -> None:
        with self._alone:
            self._paths.pop(descriptor, None)
            super().close(descriptor)

    def write_some(self, descriptor: int, parts: Sequence[memoryview], offset: int) -> int:
        written = self._call("write_some", self._paths[descriptor], descriptor, parts, offset)
        assert isinstance(written, int)
        return written

    def truncate(self, descriptor: int, length: int) -> None:
        self._call("truncate", self._paths[descriptor], descriptor, length)

    def sync(self, descriptor: int) -> None:
        self._call("sync", self._paths[descriptor], descriptor)

    def sync_folder(self, folder: Path) -> None:
        self._call("sync_folder", folder, folder)

    def make_folder(self, folder: Path) -> None:
        self._call("make_folder", folder, folder)

    def rename(self, path: Path, target: Path) -> None:
        self._call("rename", target, path, target)

    def remove(self, path: Path) -> None:
        self._call("remove", path, path)

    def _call(self, operation: Operation, path: Path, *arguments: Any) -> object:
        with self._alone:
            result = self._do(operation, *arguments)
            self.calls[operation] += 1
            self.observe(operation, path)
            return result

    def _do(self, operation: Operation, *arguments: Any) -> object:
        if operation in ("sync", "sync_folder"):
            return None
        result = getattr(super(), operation)(*arguments)
        if operation == "open":
            self._paths[result] = arguments[0]
        return result


@dataclass(eq=False)
class Fault:
    """One that was planned with `FailingFiles.fail`. All numbers are counted from then on."""

    operation: Operation
    number: int
    code: int
    written: float
    times: float
    below: str
    seen: int = 0
    """How many calls there have been that it might have hit."""
    fired: int = 0
    """How many it did hit."""
    fires: threading.Event = field(default_factory=threading.Event)
    """Set when it first does."""

    def stop(self) -> None:
        """Hits no more."""
        self.times = 0

    def hits(self, operation: Operation, path: Path) -> bool:
        """Whether it hits a call."""
        if self.operation != operation or self.below not in str(path):
            return False
        self.seen += 1
        if not self.number <= self.seen < self.number + self.times:
            return False
        self.fired += 1
        self.fires.set()
        return True


class FailingFiles(WatchedFiles):
    """Files whose calls fail as they are told to. Thread-safe.

    Args:
        observe: As in `WatchedFiles`.
    """

    def __init__(self, observe: Callable[[Operation, Path], object] = lambda *_: None) -> None:
        super().__init__(observe)
        self._faults: list[Fault] = []

    def fail(
        self,
        operation: Operation,
        number: int = 1,
        *,
        code: int = errno.EIO,
        written: float = 0.0,
        times: float = 1,
        below: str = "",
    ) -> Fault:
        """Has a call fail.

        Args:
            operation: Which kind.
            number: Which of those that are made from now on, from 1.
            code: With what error. 0: without one, where a write takes less than it was given.
            written: Of a write: what part of its bytes is written all the same.
            times: How many fail, that one and those behind it. Infinite: until `Fault.stop`.
            below: Hits only paths with this in them.
        """
        fault = Fault(operation, number, code, written, times, below)
        with self._alone:
            self._faults.append(fault)
        return fault

    def _call(self, operation: Operation, path: Path, *arguments: Any) -> object:
        with self._alone:
            hit = [fault for fault in self._faults if fault.hits(operation, path)]
            return self._fail(hit[0], *arguments) if hit else super()._call(operation, path, *arguments)

    def _fail(self, fault: Fault, *arguments: Any) -> object:
        written = 0
        if fault.operation == "write_some":
            descriptor, parts, offset = arguments
            data = b"".join(parts)
            written = max(int(fault.written * len(data)), 0 if fault.code else 1)
            if written:
                self._do("write_some", descriptor, [memoryview(data[:written])], offset)
        if fault.code:
            raise OSError(fault.code, os.strerror(fault.code))
        return written


# --- power loss

Keeps = Callable[[int], int]
"""Of so many changes, one after the other, that were not synced: how many a disk has."""

_BLOCK_BYTES: Final = 512


def nothing(_changes: int) -> int:
    """The disk has what was synced, and no more."""
    return 0


def everything(changes: int) -> int:
    """The disk has it all, as after the death of a process."""
    return changes


def some(dice: random.Random) -> Keeps:
    """The disk has some blocks and some names of what was not synced, in no order."""
    share = dice.choice((0.0, 0.3, 0.7, 0.95))
    return lambda changes: changes if dice.random() < share else dice.randrange(changes + 1)


@dataclass(eq=False)
class _File:
    synced: bytearray = field(default_factory=bytearray)
    since: list[tuple[int, bytes] | int] = field(default_factory=list)
    """What it was written to, or cut off at, since it was synced."""

    def change(self, change: tuple[int, bytes] | int) -> None:
        self.since.append(change)

    def sync(self) -> None:
        for change in self.since:
            _change(self.synced, change)
        self.since.clear()

    def left(self, keeps: Keeps) -> bytes:
        """What a disk may have of it. Each block is as of a moment of its own; and so is the length."""
        lengths, content = [len(self.synced)], bytearray(self.synced)
        blocks: dict[int, list[bytes]] = {}
        for change in self.since:
            before = bytes(content)
            _change(content, change)
            lengths.append(len(content))
            for number in range(-(-max(len(before), len(content)) // _BLOCK_BYTES)):
                was, now = _block(before, number), _block(content, number)
                if was != now:
                    blocks.setdefault(number, [was]).append(now)
        left = bytearray(self.synced)
        for number, versions in blocks.items():
            version = versions[keeps(len(versions) - 1)]
            _write(left, number * _BLOCK_BYTES, version)
        _cut(left, lengths[keeps(len(lengths) - 1)])
        return bytes(left)


def _change(content: bytearray, change: tuple[int, bytes] | int) -> None:
    if isinstance(change, int):
        _cut(content, change)
    else:
        _write(content, *change)


def _write(content: bytearray, offset: int, data: bytes) -> None:
    if len(content) < offset:
        content.extend(bytes(offset - len(content)))
    content[offset : offset + len(data)] = data


def _cut(content: bytearray, length: int) -> None:
    del content[length:]
    content.extend(bytes(length - len(content)))


def _block(content: bytes | bytearray, number: int) -> bytes:
    block = bytes(content[number * _BLOCK_BYTES : (number + 1) * _BLOCK_BYTES])
    return block.ljust(_BLOCK_BYTES, b"\0")


@dataclass(eq=False)
class _Folder:
    synced: dict[str, _Node] = field(default_factory=dict)
    now: dict[str, _Node] = field(default_factory=dict)
    since: list[tuple[_Node, str | None]] = field(default_factory=list)
    """What has been given which name, or none, since it was synced."""

    def name(self, node: _Node, name: str | None) -> None:
        self.since.append((node, name))
        _name(self.now, node, name)

    def sync(self) -> None:
        self.synced = dict(self.now)
        self.since.clear()

    def left(self, keeps: Keeps) -> dict[str, _Node]:
        """What a disk may have of it: each change has happened or has not."""
        left = dict(self.synced)
        for node, name in self.since:
            if keeps(1):
                _name(left, node, name)
        return left


_Node = _File | _Folder


def _name(names: dict[str, _Node], node: _Node, name: str | None) -> None:
    for old in [old for old, other in names.items() if other is node]:
        del names[old]
    if name is not None:
        names[name] = node


class VolatileFiles(FailingFiles):
    """Files of which a power loss takes what was not synced. What a sync that failed was to bring to the disk is lost.

    Everything is in real files below `root`; what has been synced of it is remembered. Renames stay in their folder.

    Args:
        root: A folder that is there. What is in it is on the disk.
        observe: As in `WatchedFiles`.
    """

    def __init__(self, root: Path, observe: Callable[[Operation, Path], object] = lambda *_: None) -> None:
        super().__init__(observe)
        self._root = root
        self._tree = _found(root)
        self._files: dict[int, _File] = {}

    def crash(self, target: Path, keeps: Keeps = nothing) -> None:
        """Makes `target` what the disk may have of `root` after a power loss at this moment."""
        with self._alone:
            _lay_out(self._tree, target, keeps)

    def outlive(self, target: Path) -> VolatileFiles:
        """What the next process finds in `target` if this one dies at this moment: everything, synced or not."""
        with self._alone:
            self.crash(target, everything)
            survivor = VolatileFiles(target)
            survivor._tree = copy.deepcopy(self._tree)
            return survivor

    def _do(self, operation: Operation, *arguments: Any) -> object:
        result = super()._do(operation, *arguments)
        first = arguments[0]
        match operation:
            case "open":
                folder = self._folder(first.parent)
                node = folder.now.get(first.name)
                if node is None:
                    node = _File()
                    folder.name(node, first.name)
                assert isinstance(node, _File)
                assert isinstance(result, int)
                self._files[result] = node
            case "write_some":
                data = b"".join(arguments[1])
                assert result == len(data)
                self._files[first].change((arguments[2], data))
            case "truncate":
                self._files[first].change(arguments[1])
            case "sync":
                self._files[first].sync()
            case "sync_folder":
                self._folder(first).sync()
            case "make_folder":
                self._make_folder(first)
            case "rename":
                target = arguments[1]
                assert first.parent == target.parent
                folder = self._folder(first.parent)
                folder.name(folder.now[first.name], target.name)
            case "remove":
                folder = self._folder(first.parent)
                if first.name in folder.now:
                    node = folder.now[first.name]
                    _empty(node)
                    folder.name(node, None)
        return result

    def _fail(self, fault: Fault, *arguments: Any) -> object:
        if fault.operation == "sync":
            # The system says so once, and takes the blocks for written.
            self._files[arguments[0]].since.clear()
        return super()._fail(fault, *arguments)

    def _make_folder(self, path: Path) -> None:
        folder = self._tree
        for name in path.relative_to(self._root).parts:
            if name not in folder.now:
                folder.name(_Folder(), name)
            child = folder.now[name]
            assert isinstance(child, _Folder)
            folder = child

    def _folder(self, path: Path) -> _Folder:
        node: _Node = self._tree
        for name in path.relative_to(self._root).parts:
            assert isinstance(node, _Folder)
            node = node.now[name]
        assert isinstance(node, _Folder)
        return node


def _found(path: Path) -> _Folder:
    folder = _Folder()
    for child in path.iterdir():
        folder.name(_found(child) if child.is_dir() else _File(bytearray(child.read_bytes())), child.name)
    folder.sync()
    return folder


def _empty(node: _Node) -> None:
    if isinstance(node, _Folder):
        for child in list(node.now.values()):
            _empty(child)
            node.name(child, None)


def _lay_out(folder: _Folder, path: Path, keeps: Keeps) -> None:
    path.mkdir()
    for name, node in folder.left(keeps).items():
        if isinstance(node, _Folder):
            _lay_out(node, path / name, keeps)
        else:
            (path / name).write_bytes(node.left(keeps))
