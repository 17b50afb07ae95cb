"""Layers unpacked onto a real directory, step by step as containerd does it: what `merge` is judged by.

Source: containerd, pkg/archive/tar.go, applyNaive(), mkparent(), createTarFile(); continuity, fs/path.go,
RootPath(). Where those unpack into a directory of the layer alone (overlayfs), a directory's attributes are
its entry's, and opaque directories hide lower layers only: that is what is done here, too.
"""

from __future__ import annotations

import os
import shutil
import stat
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Item:
    """One entry of a layer: what a tar header says.

    Attributes:
        type: ``reg dir lnk link fifo``.
        data: Of a file; the target of a link.
    """

    path: str
    type: str = "reg"
    data: str = ""
    mode: int = 0o644
    mtime: int = 1
    xattrs: dict[str, bytes] = field(default_factory=dict)


class Refused(Exception):
    """containerd ends with an error here."""


def apply(root: Path, items: list[Item], times: dict[Path, int]) -> None:
    """Unpack one layer over what is in *root*.

    Args:
        times: Modification times of the directories that entries stated, in this layer or lower ones.

    Raises:
        Refused: The layer does not fit.
    """
    unpacked: set[Path] = set()
    for item in items:
        name = os.path.normpath("/" + item.path)
        if name == "/":
            continue
        parent = resolved(root, os.path.dirname(name))
        base = os.path.basename(name)
        _make_parents(root, parent, unpacked)
        path = parent / base
        if base == ".wh..wh..opq":
            _hide(parent, unpacked, times)
            continue
        if base.startswith(".wh."):
            hidden = base.removeprefix(".wh.")
            if hidden in ("", ".", ".."):
                raise Refused(name)
            _remove(parent / hidden, unpacked, times)
            continue
        if os.path.lexists(path) and not (_is_directory(path) and item.type == "dir"):
            _remove(path, unpacked, times)
        _create(root, path, item)
        if item.type == "dir":
            times[path] = item.mtime
        unpacked.add(path)
    for path, mtime in times.items():
        os.utime(path, ns=(mtime, mtime))


def resolved(root: Path, name: str) -> Path:
    """RootPath: *name* below *root* with links followed, never out of it."""
    names = [part for part in name.split("/") if part]
    at = root
    links = 0
    while names:
        part = names.pop(0)
        if part == "..":
            if at == root:
                raise Refused("a link leads out of the root")  # where containerd stays at the root
            at = at.parent
        elif (at / part).is_symlink():
            links += 1
            if links > 255:
                raise Refused("too many links")
            target = os.path.normpath(os.readlink(at / part))
            if target.startswith("/"):
                at = root
            names = [p for p in target.split("/") if p not in ("", ".")] + names
        else:
            at = at / part
    return at


def _make_parents(root: Path, path: Path, unpacked: set[Path]) -> None:
    for part in [*reversed(path.parents), path]:
        if not part.is_relative_to(root) or part == root:
            continue
        if not os.path.lexists(part):
            part.mkdir()
            part.chmod(0o755)
        elif not _is_directory(part):
            raise Refused(f"{part} is no directory")
        unpacked.add(part)


def _create(root: Path, path: Path, item: Item) -> None:
    if item.type == "dir":
        path.mkdir(exist_ok=True)
        for old in os.listxattr(path):
            os.removexattr(path, old)
    elif item.type == "reg":
        path.write_text(item.data)
    elif item.type == "lnk":
        path.symlink_to(item.data)
    elif item.type == "fifo":
        os.mkfifo(path)
    else:
        target = os.path.normpath("/" + item.data)
        linked = resolved(root, os.path.dirname(target)) / os.path.basename(target)
        if not os.path.lexists(linked) or _is_directory(linked):
            raise Refused(f"no file to link to: {linked}")
        os.link(linked, path, follow_symlinks=False)
    if not path.is_symlink():
        path.chmod(item.mode)
        for key, value in item.xattrs.items():
            os.setxattr(path, key, value)
    os.utime(path, ns=(item.mtime, item.mtime), follow_symlinks=False)


def _hide(directory: Path, unpacked: set[Path], times: dict[Path, int]) -> None:
    for path in sorted(directory.iterdir()):
        if path not in unpacked:
            _remove(path, unpacked, times)
        elif _is_directory(path):
            _hide(path, unpacked, times)


def _remove(path: Path, unpacked: set[Path], times: dict[Path, int]) -> None:
    if _is_directory(path):
        shutil.rmtree(path)
    elif os.path.lexists(path):
        path.unlink()
    for known in (unpacked, times):
        for other in [other for other in known if other.is_relative_to(path)]:
            known.pop(other) if isinstance(known, dict) else known.remove(other)


def _is_directory(path: Path) -> bool:
    return os.path.lexists(path) and stat.S_ISDIR(path.lstat().st_mode)
