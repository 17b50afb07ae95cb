"""cachefiles as a host: which objects the kernel may open, and under which names.

The kernel keeps the data here, in cache files of its own below the state directory; what is ours is the chunk
map of each. An image has one object for its primary, named by the mount's fsid, and one for each data blob,
named by the stored blob: images in one domain share those. An object is known to the provider from before
mount(2) until the superblock is gone, because the kernel closes and opens objects as it likes in between; an
object that nobody registered is refused when it is opened.

The primary is not shared: fsid and domain name a superblock, and two mounts of one image are two of those.
A bootstrap's object goes with its mount. A plain image's primary is data like any other: it stays as cache
(`erofsd.daemon.culling`), under a name that the next mount of the same image takes again.
"""

from __future__ import annotations

import asyncio
import errno
import os
import re
import sys
import tempfile
import uuid
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from itertools import count
from pathlib import Path

import msgspec
import structlog

from erofsd.backends.localfs import LocalBackend
from erofsd.backends.retry import RetryBackend
from erofsd.blobs.layout import BlobLayout, uniform_layout
from erofsd.blobs.store import BlobStore, StoredBlob, identity_of
from erofsd.daemon.culling import CacheFiles
from erofsd.daemon.images import OpenedImage
from erofsd.daemon.mount import Mount, in_thread
from erofsd.daemon.mountinfo import mount_points, superblocks
from erofsd.daemon.state import ImageFiles
from erofsd.errors import NotPossibleHere
from erofsd.fill.provider import FillProvider
from erofsd.images.base import Image
from erofsd.images.erofs.format import parse_superblock
from erofsd.images.source import FileSource
from ondemand import fscache, syscalls
from ondemand.provider import ObjectKey
from ondemand.ranges import RangeSet

DOMAIN = "erofsd"
VOLUME = b"erofs," + DOMAIN.encode()
LATE_MOUNT_S = 5.0

_BOOT = "e-"  # begins the fsid of a mount whose primary is a bootstrap
_PRIMARY = "p-"  # and of one whose primary is data
_FIRST = ".0"  # ends the name of a blob's first variant
_DIGEST = re.compile(r"[0-9a-f]{64}")  # with one of the above it is nothing else's name

log = structlog.get_logger("erofsd.cookies")

# Walks a tree until something in it is refused; for a process of its own, which we can answer.
WALK = (
    "import os, sys\n"
    "try:\n"
    "    for top, directories, files in os.walk(sys.argv[1], onerror=lambda exc: sys.exit(exc.errno)):\n"
    "        for name in directories + files: os.lstat(os.path.join(top, name))\n"
    "except OSError as exc: sys.exit(exc.errno)\n"
)


class UnopenedSink:
    """The sink of an object that the kernel has not open."""

    block_size = 4096

    def write(self, offset: int, data: memoryview) -> None:
        """Raises OSError."""
        raise OSError(errno.ENOTCONN, "the kernel has not opened the object")

    def data(self) -> RangeSet:
        """Nothing that anybody knows of."""
        return RangeSet()


def cookie_of(name: str) -> str:
    """Cookie key of the stored blob *name*: the blob id, where that is a digest and has but one file."""
    return name[: -len(_FIRST)] if _DIGEST.fullmatch(name.removesuffix(_FIRST)) else name


def name_of(cookie: str) -> str:
    """The stored blob whose cookie key is *cookie*."""
    return cookie + _FIRST if _DIGEST.fullmatch(cookie) else cookie


def object_key(name: str) -> ObjectKey:
    """The name under which the kernel opens the stored blob *name*."""
    return ObjectKey(cookie_of(name).encode(), VOLUME)


def new_fsid() -> str:
    """A name for one mount of RAFS, and its bootstrap."""
    return f"{_BOOT}{uuid.uuid4().hex[:20]}"


def _tags(bootstrap: Path) -> list[str]:
    """What the device table of a RAFS image names its devices."""
    source = FileSource(bootstrap)
    try:
        slots = parse_superblock(source).devices
    finally:
        source.close()
    return [slot.tag.rstrip(b"\0").decode("latin-1") for slot in slots]


class Cookies:
    """Registers objects, and mounts images over fscache.

    Args:
        store: Keeps chunk maps only.
        cache: Where the kernel has the data.
        scratch: A directory for trial mounts.
        reserved: The fsids that mounts have, or will have when they come back.
    """

    engine = "cachefiles"

    def __init__(
        self,
        *,
        store: BlobStore,
        cache: CacheFiles,
        files: ImageFiles,
        provider: FillProvider,
        scratch: Path,
        reserved: Callable[[], set[str]],
    ) -> None:
        self.store = store
        self.cache = cache
        self._reserved = reserved
        self._files = files
        self._provider = provider
        self._scratch = scratch
        self._decompresses: bool | None = None

    def check(self, image: Image) -> None:
        """See Host."""
        if image.block_size != os.sysconf("SC_PAGESIZE"):
            raise NotPossibleHere(
                f"engine cachefiles: needs blocks of a page; this image has blocks of {image.block_size}",
                hint="build the image with -b 4096",
            )

    def bind(self, mount: Mount, opened: OpenedImage, stored: tuple[str, ...]) -> None:
        """See Host."""
        with self.cache.lock:
            self._bind(mount, opened, stored)

    def _bind(self, mount: Mount, opened: OpenedImage, stored: tuple[str, ...]) -> None:
        record, image = mount.record, opened.image
        if not record.fsid:
            fsid = new_fsid() if image.primary is None else self._free_fsid(image.primary)
            mount.record = record = msgspec.structs.replace(record, fsid=fsid)
        devices = list(image.devices)
        if image.primary is not None:
            primary = self.store.bind(image.primary, name=record.fsid)
            primary.source = opened.source
            mount.bindings.append(primary)
        else:
            assert image.bootstrap is not None
            path = self._files.bootstrap_path(record.image)
            layout = uniform_layout(record.fsid, len(image.bootstrap), pin=f"image {record.image}")
            mount.boot = primary = self.store.bind(layout, name=record.fsid)
            primary.source = RetryBackend(LocalBackend(files={record.fsid: path}), 1)
        for layout, name in zip(devices, stored[1:] or (None,) * len(devices), strict=True):
            binding = self.store.bind(layout, name=name)
            binding.source = opened.source
            mount.bindings.append(binding)
        for binding in mount.all_bindings:
            binding.image = record.ref
            key = object_key(binding.blob.name)
            if not self._provider.attached(key):  # another mount may have it open: it keeps its sink
                self._provider.attach(key, binding.blob, UnopenedSink())

    def _free_fsid(self, primary: BlobLayout) -> str:
        """A name for a mount of a plain image: the first of its own that no mount has."""
        stem = f"{_PRIMARY}{identity_of(primary).hex()[:40]}"
        taken = self._reserved() | {name.rpartition(",")[2] for name in superblocks()}
        names = (f"{stem}-{number}" for number in count())
        return next(fsid for fsid in names if fsid not in taken and self.store.opened(fsid) is None)

    async def prepare(self, mount: Mount) -> None:
        """See Host."""
        assert mount.image is not None
        if mount.image.compressed:
            await self._try_compressed(mount)

    async def _try_compressed(self, mount: Mount) -> None:
        """Find out whether this kernel decompresses over fscache; Linux 6.1 refuses such inodes."""
        if self._decompresses is None:
            with tempfile.TemporaryDirectory(dir=self._scratch, prefix="trial-") as directory:
                await fscache.mount(directory, self.options(mount))
                try:
                    walk = await asyncio.create_subprocess_exec(sys.executable, "-IS", "-c", WALK, directory)
                    code = await walk.wait()
                finally:
                    await in_thread(syscalls.umount2, directory, 0)
            if code not in (0, errno.EOPNOTSUPP):
                raise NotPossibleHere(
                    f"engine cachefiles: a trial mount of {mount.record.ref}: {os.strerror(code)}"
                )
            self._decompresses = code == 0
        if not self._decompresses:
            raise NotPossibleHere(
                f"engine cachefiles: {mount.record.ref} has compressed files, which this kernel refuses",
                hint="build the image without compression, or use a newer kernel",
            )

    @asynccontextmanager
    async def serving(self, mount: Mount) -> AsyncIterator[None]:
        """See Host: being registered is all."""
        yield

    def options(self, mount: Mount) -> str:
        """What ``mount -t erofs -o`` needs for *mount*.

        Raises:
            NotPossibleHere: They do not fit into a page.
        """
        assert mount.image is not None
        devices = mount.bindings if mount.boot is not None else mount.bindings[1:]
        names = [cookie_of(binding.blob.name) for binding in devices]
        # Where no name is given the kernel takes the device tag: in RAFS, as a rule, the blob id.
        by_tag = mount.boot is not None and names == _tags(self._files.bootstrap_path(mount.record.image))
        try:
            return fscache.mount_options(mount.record.fsid, domain_id=DOMAIN, devices=() if by_tag else names)
        except ValueError as exc:
            raise NotPossibleHere(f"engine cachefiles: {mount.record.ref}: {exc}") from exc

    async def mount(self, mount: Mount) -> None:
        """See Host."""
        await asyncio.to_thread(self.cache.make_room)  # where there is none, the kernel makes no objects
        try:
            await fscache.mount(mount.record.dir, self.options(mount))
        except OSError as exc:
            if exc.errno == errno.ENOBUFS and self.cache.is_short():
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from exc
            # A mount that was under way when a worker was killed goes on, and gets its answers from us.
            if exc.errno not in (errno.EBUSY, errno.EEXIST) or not await self._came_late(mount):
                raise

    async def _came_late(self, mount: Mount) -> bool:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + LATE_MOUNT_S
        while loop.time() < deadline:
            if any(
                point.directory == mount.record.dir and point.fsid == mount.record.fsid
                for point in mount_points()
            ):
                return True
            await asyncio.sleep(0.05)
        return False

    async def relax(self, blob: StoredBlob) -> None:
        """See Host: the kernel asks for nothing that is there."""

    async def drop(self, blob: StoredBlob) -> None:
        """See Host. Its data stay where another mount may want them."""
        if not blob.bindings:
            self._provider.detach(object_key(blob.name))
            os.utime(blob.fd)  # used until now
            blob.close()
            if blob.name.startswith(_BOOT):
                self.cache.leave(blob.name)

    def spoil(self, blob: StoredBlob) -> None:
        """See Host: once nobody holds the device, reads of what is missing fail by themselves."""

    def doubt(self, names: Iterable[str]) -> None:
        """See Host: nothing is taken away from an object before the kernel closes it."""

    async def settle(self, names: Iterable[str]) -> None:
        """See Host."""

    # -- what lies there --------------------------------------------------------------------------------

    async def adopt(self) -> None:
        """Take up what predecessors left behind: bootstraps of mounts that are gone, files of nobody.

        Only where all mounts are known that there may be.
        """
        kept = self._reserved()
        left = [name for name in self.store.names() if name.startswith(_BOOT) and name not in kept]
        try:
            await asyncio.to_thread(self.cache.adopt)
        except OSError as exc:  # the file system is in trouble; what lies there harms nobody
            log.error("cull.failed", errno=exc.errno, error=str(exc))
        for name in left:
            self.cache.leave(name)

    def went(self, name: str) -> ObjectKey:
        """The kernel's file of *name* was deleted: so are its chunks. Returns what the kernel called it."""
        key = object_key(name)
        self._provider.gone(key)
        return key
