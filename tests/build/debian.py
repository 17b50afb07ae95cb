"""Ordinary images of real files: layers of installed Debian packages, with all that is awkward among them.

GNU tar makes the layers and GNU tar unpacks them again into what conversions are judged by: neither our tar
reader nor our merging of layers has a part in that.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import random
import shutil
import stat
import struct
import subprocess
import sys
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import zstandard

from tests.build import tars
from tests.build.ordinary import LAYER_TYPE, Layout
from tests.images.sourcetree import make_tree

ZSTD_LAYER_TYPE = "application/vnd.oci.image.layer.v1.tar+zstd"
STAMP = 1_650_000_000_123_456_789
#: Fetched where the machine has fewer files than wanted.
MORE_PACKAGES = ("llvm-14-dev", "libllvm14", "golang-1.19-src", "golang-1.19-go", "openjdk-17-jre-headless")
_WHITEOUT = ".wh."
#: Packages have /sys and /run, too.
_STILL = (b"/usr/", b"/etc/", b"/bin/", b"/sbin/", b"/lib", b"/opt/")


@dataclass
class Part:
    """Some paths below a directory, as raw bytes: one run of names for tar."""

    top: Path
    paths: dict[bytes, None] = field(default_factory=dict)
    size: int = 0

    def add(self, paths: Iterable[bytes]) -> None:
        """Add absolute *paths* and their parents, by the names they have without links among the parents."""
        top = os.path.realpath(os.fsencode(self.top))
        for path in paths:
            real = os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path))
            while real != top and (name := os.path.relpath(real, top)) not in self.paths:
                if not os.path.lexists(real) or stat.S_ISSOCK((status := os.lstat(real)).st_mode):
                    break
                self.paths[name] = None
                self.size += status.st_size if stat.S_ISREG(status.st_mode) else 0
                real = os.path.dirname(real)


def package_parts(size: int, count: int, downloads: Path) -> list[Part]:
    """*count* parts of installed packages, about *size* bytes together.

    Args:
        downloads: Where packages are unpacked that have to be fetched.
    """
    parts = [Part(Path("/"))]
    for paths in _installed(size // count // 2):
        if parts[-1].size >= size // count:
            if len(parts) == count:
                return parts
            parts.append(Part(Path("/")))
        parts[-1].add(paths)
    parts.append(_downloaded(downloads))
    found = sum(part.size for part in parts)
    if found < size * 9 // 10:
        pytest.skip(f"only {found} bytes of Debian packages here, and {size} are wanted")
    return parts


def _installed(largest: int) -> Iterator[list[bytes]]:
    """The paths of each installed package whose files have at most about *largest* bytes."""
    form = "${db:Status-Status} ${Installed-Size} ${Package}:${Architecture}\n"
    try:
        listed = subprocess.run(["dpkg-query", "-W", "-f", form], capture_output=True, check=True, text=True)
    except FileNotFoundError:
        pytest.skip("no dpkg here")
    names = []
    for status, kilobytes, package in sorted(map(str.split, listed.stdout.splitlines()), key=lambda w: w[2]):
        if status == "installed" and int(kilobytes) << 10 <= largest:
            names.append(package.removesuffix(":all"))
    random.Random(1).shuffle(names)  # neighbours are alike
    for at in range(0, len(names), 50):
        text = subprocess.run(
            ["dpkg-query", "-L", *names[at : at + 50]], capture_output=True, check=True
        ).stdout
        for paths in text.split(b"\n\n"):
            yield [path for path in paths.splitlines() if path.startswith(_STILL)]


def _downloaded(directory: Path) -> Part:
    """MORE_PACKAGES, unpacked in *directory*."""
    done = subprocess.run(
        ["apt-get", "download", "--quiet=2", "-o", "APT::Sandbox::User=root", *MORE_PACKAGES],
        cwd=directory, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        why = done.stderr.strip().rpartition("\n")[2]
        pytest.skip(f"too few packages are installed, and more cannot be fetched: {why}")
    top = directory / "unpacked"
    for archive in sorted(directory.glob("*.deb")):
        subprocess.run(["dpkg-deb", "--extract", archive, top], check=True)
        archive.unlink()
    return part_of(top)


# --- what is awkward ---


def make_awkward(top: Path, *, huge: bool) -> None:
    """Fill the new directory *top* with ``odd``. Needs root.

    Args:
        huge: With a sparse file of more than 4 GiB.
    """
    odd = top / "odd"
    odd.mkdir(parents=True)
    make_tree(odd)  # owners, devices, capabilities, ACLs, sparse files, FIFOs, duplicates, long targets
    (odd / "sock").unlink()  # which layers cannot hold
    (odd / ("n" * 255)).write_text("a long name")
    (odd / os.fsdecode(b"not \xff\xfe UTF-8\nnor one line")).write_text("an odd name")
    (odd / "target").symlink_to("t/" * 2047 + "t")
    for name in ("target", "fifo", "chr", "blk", "empty file"):
        path = odd / name
        if not os.path.lexists(path):
            path.touch()
        os.link(path, odd / f"{name} again", follow_symlinks=False)
        os.link(path, odd / "many" / f"{name} yet again", follow_symlinks=False)
    values = odd / "values"
    values.write_text("attributes")
    os.setxattr(values, "user.lines and NUL", b"one\ntwo\0three=\n\xff")
    os.setxattr(values, "user.empty", b"")
    os.setxattr(values, "trusted.own", b"\0")
    os.setxattr(odd / "target", "trusted.link", b"of a link", follow_symlinks=False)
    os.setxattr(odd / "chr", "security.device", b"of a device")
    capability = struct.pack("<IIIIII", 0x3000001, 1 << 12, 0, 0, 0, 1000)  # version 3: of a user namespace
    os.setxattr(odd / "text" / "4097", "security.capability", capability)
    with (odd / "sparse too").open("wb") as file:
        for at in (4096, 1_000_000, 70_000_000):
            file.seek(at)
            file.write(b"data between holes")
        file.truncate((4 << 30 if huge else 80 << 20) + 1)
    for n in range(30):
        (odd / "opaque" / f"{n}" / "sub").mkdir(parents=True)
        (odd / "opaque" / f"{n}" / "sub" / "below").write_text(f"{n}")
    os.setxattr(odd / "opaque" / "1", "user.directory", b"\n")
    for name in ("old name", "old name of a directory/below"):
        (odd / "was" / name).parent.mkdir(parents=True, exist_ok=True)
        (odd / "was" / name).write_text(name)
    _set_times(top)


def make_changes(top: Path, line: str) -> None:
    """Fill the new directory *top* with what a layer above `make_awkward` changes.

    Args:
        line: One line of a file of 500.
    """
    odd = top / "odd"
    for path in ("opaque/3/sub", "opaque/5", "was", "many", "dup", "empty", "new"):
        (odd / path).mkdir(parents=True)
    lines = [f"option_{n} = {n}" for n in range(500)]
    lines[250] = line
    (odd / "new" / "settings").write_text("\n".join(lines) + "\n")
    for path in ("opaque/3", "opaque/5", "many"):
        (odd / path / f"{_WHITEOUT}{_WHITEOUT}.opq").touch()
    (odd / "opaque" / "3" / "sub" / "own").write_text("kept")
    (odd / "opaque" / "5" / "own").write_text("kept")
    for path in ("zeros", "dup/a", "fifo again", "target", "was/old name of a directory"):
        gone = odd / path
        gone.with_name(f"{_WHITEOUT}{gone.name}").touch()
    (odd / "was" / "old name").mkdir()  # was a file
    (odd / "was" / "old name" / "below").write_text("now a directory")
    (odd / "noise").write_text("was a directory")
    os.mkfifo(odd / "big")
    (odd / "empty").chmod(0o2750)
    os.chown(odd / "empty", 4_000_000_000, 70_001)
    os.setxattr(odd / "empty", "user.new", b"\0")
    _set_times(top)


def links_between_layers(lower: Path) -> bytes:
    """Entries for the front of a layer above *lower*: what a tar of a directory does not come to.

    Hard links to files of *lower*, and files behind a link among their parents.
    """
    directory = {"mode": 0o755, "mtime": 1_500_000_000}
    links = ((b"dup", "odd/dup/b"), (b"device", "odd/blk"), (b"soft", "odd/target again"))
    return b"".join((
        tars.header(b"late/", b"5", **directory),
        *(_link(b"late/" + name, lower, target) for name, target in links),
        tars.header(b"late/via", b"2", target=b"real/../real"),
        tars.header(b"late/real/", b"5", **directory),
        tars.file(b"late/via/file", b"behind a link"),
        tars.pax((b"mtime", b"-1.5")), tars.file(b"late/via/old", b"before 1970"),
        tars.header(b"late/real/", b"5", **directory),
        tars.header(b"late/", b"5", **directory),
    ))  # fmt: skip


def _link(name: bytes, top: Path, target: str) -> bytes:
    # A link's entry states attributes, too, and containerd sets them: the same ones here.
    status = (top / target).lstat()
    mtime = b"%d.%09d" % divmod(status.st_mtime_ns, 10**9)
    fields = {"mode": stat.S_IMODE(status.st_mode), "uid": status.st_uid, "gid": status.st_gid}
    return tars.pax((b"mtime", mtime)) + tars.header(name, b"1", target=target.encode(), **fields)


def _set_times(top: Path) -> None:
    for n, path in enumerate(sorted(top.rglob("*"), key=os.fsencode)):
        stamp = STAMP + n * 1_000_000_007
        os.utime(path, ns=(stamp, stamp), follow_symlinks=False)


def part_of(top: Path) -> Part:
    """All of a directory."""
    part = Part(top)
    part.add(os.fsencode(path) for path in top.rglob("*"))
    return part


# --- layers ---


def layer_tar(parts: Iterable[Part], lists: Path, front: bytes = b"") -> Iterator[bytes]:
    """The pieces of a tar with *parts*, made by GNU tar, behind the entries *front*.

    Args:
        lists: Directory for lists of names.
    """
    command = ["tar", "-c", "--format=posix", "--pax-option=delete=atime,delete=ctime", "--numeric-owner",
               "--sparse", "--xattrs", "--xattrs-include=*", "--acls", "--no-recursion", "--null",
               "--verbatim-files-from"]  # fmt: skip
    for n, part in enumerate(parts):
        names = lists / f"names-{n}"
        # A directory's own entries in one run: else GNU tar, unpacking, spoils its time with a later one.
        paths = sorted(part.paths, key=lambda path: path.split(b"/"))
        names.write_bytes(b"".join(path + b"\0" for path in paths))
        command += ["-C", str(part.top), "-T", str(names)]
    yield front
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        while piece := process.stdout.read(1 << 20):
            yield piece
    # 1: somebody wrote there meanwhile. What counts is what GNU tar makes of the layer.
    assert process.returncode in (0, 1)


@dataclass
class Image:
    """An image under construction in *layout*.

    Attributes:
        layers: Descriptors, lowest first.
        diff_ids: Of these.
        stored_size: Bytes of all layers.
    """

    layout: Layout
    layers: list[dict[str, Any]] = field(default_factory=list)
    diff_ids: list[str] = field(default_factory=list)

    @property
    def stored_size(self) -> int:
        return sum(layer["size"] for layer in self.layers)

    def add(self, pieces: Iterable[bytes], *, zstd: bool = False) -> None:
        """Store a layer: gzip, or zstd."""
        blobs = self.layout.path / "blobs" / "sha256"
        stored, plain = hashlib.sha256(), hashlib.sha256()
        size = 0
        with (blobs / "new").open("wb") as out:
            for piece in _packed(pieces, plain, zstd):
                out.write(piece)
                stored.update(piece)
                size += len(piece)
        (blobs / "new").rename(blobs / stored.hexdigest())
        media_type = ZSTD_LAYER_TYPE if zstd else LAYER_TYPE
        digest = f"sha256:{stored.hexdigest()}"
        self.layers.append({"mediaType": media_type, "digest": digest, "size": size})
        self.diff_ids.append(f"sha256:{plain.hexdigest()}")

    def tag(self, name: str) -> str:
        """Name the image; its reference."""
        config = {"rootfs": {"type": "layers", "diff_ids": self.diff_ids}}
        self.layout.image(name, layers=self.layers, config=config)
        return self.layout.ref(name)


def _packed(pieces: Iterable[bytes], plain: Any, zstd: bool) -> Iterator[bytes]:
    packer: Any = zstandard.ZstdCompressor(1).compressobj() if zstd else _deflater()
    for piece in pieces:
        plain.update(piece)
        yield packer.compress(piece)
    yield packer.flush()


def _deflater() -> Any:
    """Makes gzip members, fast where it can: the size of layers is of no interest."""
    try:
        from isal import isal_zlib
    except ImportError:
        return zlib.compressobj(1, wbits=31)
    return isal_zlib.compressobj(1, isal_zlib.DEFLATED, 31)


# --- the tree that they should make ---


def unpack(layout: Path, manifest: dict[str, Any], top: Path) -> None:
    """Unpack an image as a real directory: whiteouts by the letter of what they mean, else by GNU tar."""
    top.mkdir()
    for layer in manifest["layers"]:
        path = layout / "blobs" / "sha256" / layer["digest"].removeprefix("sha256:")
        packing = "--zstd" if layer["mediaType"] == ZSTD_LAYER_TYPE else _gunzip()
        archive = [packing, "-b2048", "-P", "-f", path]
        command = ["tar", "-t", *archive, "--quoting-style=literal"]
        listed = subprocess.run(command, capture_output=True, check=True)
        _make_room(top, listed.stdout.splitlines())
        subprocess.run(
            ["tar", "-x", *archive, "-C", top, "--numeric-owner", "-p", "--same-owner",
             "--xattrs", "--xattrs-include=*", "--acls", f"--exclude={_WHITEOUT}*"],
            check=True,
        )  # fmt: skip


def _gunzip() -> str:
    """How GNU tar opens gzip: by what is three times as fast, where that is installed."""
    if importlib.util.find_spec("isal") is None:
        return "--gzip"
    return f"--use-compress-program={sys.executable} -m isal.igzip"


def _make_room(top: Path, names: list[bytes]) -> None:
    """Remove what whiteouts hide, and directories that something else replaces."""
    for line in names:
        parent, _, name = line.rpartition(b"/")
        directory = Path(top, os.fsdecode(parent))
        hidden = os.fsdecode(name)
        gone = [directory / hidden] if name and _is_directory(directory / hidden) else []
        if hidden == f"{_WHITEOUT}{_WHITEOUT}.opq":
            gone = list(directory.iterdir()) if directory.is_dir() else []
        elif hidden.startswith(_WHITEOUT):
            gone = [directory / hidden.removeprefix(_WHITEOUT)]
        for path in gone:
            shutil.rmtree(path) if _is_directory(path) else path.unlink()


def _is_directory(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()
