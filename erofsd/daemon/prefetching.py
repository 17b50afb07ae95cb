"""Filling before anybody reads: a whole image, some of its files, or what it asks for itself."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from erofsd.blobs.store import Binding
from erofsd.errors import ErofsdError
from erofsd.fill.provider import FillProvider
from erofsd.images.base import Image
from erofsd.images.erofs.format import Inode
from erofsd.images.erofs.reader import ErofsReader
from erofsd.images.erofs.tree import ErofsTree
from erofsd.images.open import open_tree
from ondemand.ranges import Range

REPORT_INTERVAL_S = 0.1

Report = Callable[[int, int], Awaitable[None]]


@dataclass(slots=True)
class Wanted:
    """What to fill.

    Attributes:
        parts: Ranges of decoded devices, by device slot (0: the primary of plain EROFS).
        files: nids of files the kernel decompresses: where they lie shows while they are read.
    """

    parts: dict[int, list[Range]] = field(default_factory=dict)
    files: list[int] = field(default_factory=list)


def find_files(tree: ErofsTree, paths: Sequence[str]) -> Wanted:
    """What *paths* occupy: absolute inside the image, bytes as latin-1; directories with all below. Blocking.

    Raises:
        ErofsdError: One of them is not there.
    """
    reader = tree.reader
    return _collect(reader, (_look_up(reader, path) for path in paths))


def find_hints(tree: ErofsTree, nids: Iterable[int]) -> Wanted:
    """What the nids of a prefetch table occupy; directories with all below. Blocking."""
    return _collect(tree.reader, map(tree.reader.inode, nids))


def _look_up(reader: ErofsReader, path: str) -> Inode:
    inode = reader.root
    for name in path.encode("latin-1").split(b"/"):
        if name in (b"", b"."):
            continue
        found = None
        if inode.type == "dir":
            found = next((dirent.nid for dirent in reader.entries(inode) if dirent.name == name), None)
        if found is None:
            raise ErofsdError(f"{path}: not in the image")
        inode = reader.inode(found)
    return inode


def _below(reader: ErofsReader, inode: Inode) -> Iterator[Inode]:
    stack = [inode]
    seen = set()
    while stack:
        inode = stack.pop()
        if inode.nid in seen:
            continue
        seen.add(inode.nid)
        if inode.type == "dir":
            stack.extend(reader.inode(dirent.nid) for dirent in reader.entries(inode))
        elif inode.type == "reg":
            yield inode


def _collect(reader: ErofsReader, inodes: Iterable[Inode]) -> Wanted:
    wanted = Wanted()
    for start in inodes:
        for inode in _below(reader, start):
            if inode.compressed:
                wanted.files.append(inode.nid)
                continue
            for extent in reader.extents(inode):
                if extent.offset is not None:
                    wanted.parts.setdefault(extent.device, []).append(Range.of(extent.offset, extent.length))
    return wanted


class Prefetcher:
    """Fills what one image has bound."""

    def __init__(self, provider: FillProvider, image: Image, bindings: Sequence[Binding]) -> None:
        self._provider = provider
        self._image = image
        self._bindings = list(bindings)
        self._loop = asyncio.get_running_loop()
        # Slot 0 is the primary, which only plain EROFS fills on demand.
        self._slots = ([None] if image.primary is None else []) + self._bindings

    async def everything(self, report: Report | None = None) -> None:
        """Fill all that the image states.

        Raises:
            ErofsdError: Why some of it cannot be; the rest is filled.
        """
        await self._fill([(binding, None) for binding in self._bindings], report)

    async def files(self, paths: Sequence[str], report: Report | None = None) -> None:
        """Fill the content of *paths*.

        Raises:
            ErofsdError: One is not there, or cannot be filled.
        """
        tree = self._tree()
        await self._wanted(tree, await asyncio.to_thread(find_files, tree, paths), report)

    async def hints(self) -> None:
        """Fill what the image's own prefetch table names, if it names anything.

        Nydus writes a table with the root alone into every image for which nobody chose files: that is no
        hint but "all of it", which `everything` is for.

        Raises:
            ErofsdError: As for `files`.
        """
        if self._image.prefetch:
            tree = self._tree()
            if self._image.prefetch == (tree.reader.super.root_nid,):
                return
            await self._wanted(tree, await asyncio.to_thread(find_hints, tree, self._image.prefetch), None)

    def _tree(self) -> ErofsTree:
        tree = open_tree(self._image, self._read)
        assert isinstance(tree, ErofsTree)
        return tree

    def _read(self, device: int, want: Range) -> bytes:
        """Decoded bytes, filled if need be; called from threads."""
        binding = self._slots[device]
        assert binding is not None  # the bootstrap of RAFS is read from memory
        asyncio.run_coroutine_threadsafe(self._provider.ensure(binding, want), self._loop).result()
        return os.pread(binding.blob.fd, len(want), want.start)

    async def _wanted(self, tree: ErofsTree, wanted: Wanted, report: Report | None) -> None:
        work = []
        for device, parts in wanted.parts.items():
            binding = self._slots[device]
            if binding is not None:
                chunks = {chunk for part in parts for chunk in binding.layout.chunks_in(part)}
                work.append((binding, sorted(chunk for chunk in chunks if binding.layout.stated[chunk])))
        await self._fill(work, report)
        for nid in wanted.files:
            await asyncio.to_thread(self._drain, tree, nid)

    @staticmethod
    def _drain(tree: ErofsTree, nid: int) -> None:
        for _ in tree.reader.content(tree.reader.inode(nid)):
            pass

    async def _fill(self, work: Sequence[tuple[Binding, list[int] | None]], report: Report | None) -> None:
        seen: dict[int, tuple[int, int]] = {}

        async def fill(number: int, binding: Binding, chunks: list[int] | None) -> None:
            def progress(done: int, total: int) -> None:
                seen[number] = (done, total)

            await self._provider.prefetch(binding, chunks=chunks, progress=progress)

        async def tell() -> None:
            assert report is not None
            while True:
                await asyncio.sleep(REPORT_INTERVAL_S)
                await report(sum(d for d, _ in seen.values()), sum(t for _, t in seen.values()))

        try:
            async with asyncio.TaskGroup() as group:
                teller = group.create_task(tell()) if report is not None else None
                fills = [group.create_task(fill(k, *each)) for k, each in enumerate(work)]
                if fills:
                    await asyncio.wait(fills)
                if teller is not None:
                    teller.cancel()
        except BaseExceptionGroup as exc:
            raise next((e for e in exc.exceptions if isinstance(e, ErofsdError)), exc.exceptions[0]) from exc
        if report is not None:
            await report(sum(d for d, _ in seen.values()), sum(t for _, t in seen.values()))
