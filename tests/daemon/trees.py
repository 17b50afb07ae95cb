"""Compares a mounted tree with what it should be."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import stat
from pathlib import Path
from typing import Any

TYPES = {
    stat.S_IFREG: "reg",
    stat.S_IFDIR: "dir",
    stat.S_IFLNK: "lnk",
    stat.S_IFCHR: "chr",
    stat.S_IFBLK: "blk",
    stat.S_IFIFO: "fifo",
    stat.S_IFSOCK: "sock",
}


def load_facts(path: Path) -> list[dict[str, Any]]:
    """The lines of a ``facts.jsonl``."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def facts_of(top: Path) -> list[dict[str, Any]]:
    """What lstat, readlink, getxattr and read say below *top*, in the form of ``facts.jsonl``."""
    found = []
    root = os.fsencode(top)
    groups: dict[int, str] = {}
    for directory, subdirectories, names in os.walk(root):
        entries = [directory] if directory == root else []
        entries += [os.path.join(directory, name) for name in subdirectories + names]
        for entry in entries:
            found.append(_facts(root, entry))
    found.sort(key=lambda fact: fact["path"].encode("latin-1"))
    for fact in found:
        inode = fact.pop("inode")
        if fact.get("nlink") is not None:
            fact["group"] = groups.setdefault(inode, fact["path"])
    return found


def _facts(root: bytes, entry: bytes) -> dict[str, Any]:
    status = os.lstat(entry)
    kind = TYPES[stat.S_IFMT(status.st_mode)]
    path = b"/" + os.path.relpath(entry, root) if entry != root else b"/"
    fact: dict[str, Any] = {
        "path": path.decode("latin-1"),
        "type": kind,
        "mode": stat.S_IMODE(status.st_mode),
        "uid": status.st_uid,
        "gid": status.st_gid,
        "inode": status.st_ino,
    }
    if entry != root:
        fact["mtime"] = status.st_mtime_ns
    if kind == "reg":
        fact["size"] = status.st_size
        with open(entry, "rb") as file:
            fact["sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
    if kind == "lnk":
        fact["target"] = os.readlink(entry).decode("latin-1")
    if kind in ("chr", "blk"):
        fact["rdev"] = status.st_rdev
    xattrs = {
        name: os.getxattr(entry, name, follow_symlinks=False).hex()
        for name in os.listxattr(entry, follow_symlinks=False)
    }
    if xattrs:
        fact["xattrs"] = xattrs
    if kind != "dir" and status.st_nlink > 1:
        fact["nlink"] = status.st_nlink
    return fact


def assert_same(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    """Fails with the first differences, not with two thousand lines."""
    ours = {fact["path"]: fact for fact in found}
    theirs = {fact["path"]: fact for fact in expected}
    assert sorted(ours) == sorted(theirs)
    wrong = [(path, ours[path], theirs[path]) for path in ours if ours[path] != theirs[path]]
    assert not wrong, f"{len(wrong)} differ, first: {wrong[0]}"


def listing(path: Path) -> list[str]:
    """Lines of a gzipped listing."""
    return gzip.decompress(path.read_bytes()).decode().splitlines()
