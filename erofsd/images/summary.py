"""What ``inspect`` tells of an image: its figures, and each of its files."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from erofsd.blobs.layout import BlobLayout
from erofsd.images.base import Entry, Image, Tree

Facts = dict[str, object]


@dataclass(frozen=True, slots=True)
class BlobSummary:
    """Figures of one blob; sizes in bytes.

    Attributes:
        size: Decoded, as the kernel sees it, padding included.
        stored_size: In the backend, as far as the image states it.
        chunks: Chunks that the blob holds.
        used_chunks: Those that this image uses.
        used_size: Their decoded bytes.
        used_stored_size: Their compressed bytes, distinct units once: what a complete fetch transfers.
    """

    blob_id: str
    codec: str
    digester: str | None
    size: int
    stored_size: int
    chunks: int
    units: int
    used_chunks: int
    used_size: int
    used_stored_size: int


@dataclass(frozen=True, slots=True)
class ImageSummary:
    """Figures of an image; sizes in bytes. ``dataclasses.asdict`` makes it JSON.

    Attributes:
        verified: What stands behind the data: names of digests, or ``"none"``.
        entries: Number of names by type (``reg dir lnk chr blk fifo sock``).
        files_size: Sum of the sizes of regular files, hard links once.
        metadata_size: Of the bootstrap, or of the parts of the primary that are needed before the mount.
        blobs: In slot order; first the primary, where that is filled on demand.
        prefetch: Number of entries in the prefetch table.
    """

    format: str
    verified: str
    block_size: int
    compressed: bool
    entries: dict[str, int]
    files_size: int
    metadata_size: int
    chunks: int
    used_chunks: int
    used_size: int
    used_stored_size: int
    blobs: tuple[BlobSummary, ...]
    prefetch: int


def summarize(image: Image, tree: Tree) -> ImageSummary:
    """Count what is in an image. Walks all of the tree, but reads no file data.

    Raises:
        CorruptImage: As Tree.walk.
    """
    entries: Counter[str] = Counter()
    files_size = 0
    seen: set[int] = set()
    for entry in tree.walk():
        entries[entry.type] += 1
        if entry.type == "reg" and entry.nid not in seen:
            files_size += entry.size
            if entry.nlink > 1:
                seen.add(entry.nid)
    layouts = (*([image.primary] if image.primary else []), *image.devices)
    blobs = tuple(map(summarize_blob, layouts))
    return ImageSummary(
        format=image.format,
        verified=image.verified,
        block_size=image.block_size,
        compressed=image.compressed,
        entries=dict(sorted(entries.items())),
        files_size=files_size,
        metadata_size=image.metadata.byte_count if image.bootstrap is None else len(image.bootstrap),
        chunks=sum(blob.chunks for blob in blobs),
        used_chunks=sum(blob.used_chunks for blob in blobs),
        used_size=sum(blob.used_size for blob in blobs),
        used_stored_size=sum(blob.used_stored_size for blob in blobs),
        blobs=blobs,
        prefetch=len(image.prefetch),
    )


def summarize_blob(layout: BlobLayout) -> BlobSummary:
    """Count what is in a blob, and what of it the image uses."""
    used = [chunk for chunk, stated in enumerate(layout.stated) if stated]
    units = {layout.chunk_unit[chunk] for chunk in used}
    return BlobSummary(
        blob_id=layout.blob_id,
        codec=layout.codec,
        digester=layout.digester,
        size=layout.size,
        stored_size=layout.stored_size,
        chunks=layout.chunk_count,
        units=layout.unit_count,
        used_chunks=len(used),
        used_size=sum(layout.chunk_size[chunk] for chunk in used),
        used_stored_size=sum(layout.unit_stored[unit] for unit in units),
    )


def entry_facts(entry: Entry, groups: Mapping[int, bytes]) -> Facts:
    """One entry as a JSON object, with keys only where they mean something.

    Args:
        groups: First path of each group of hard links, by nid.
    """
    facts: Facts = {
        "path": entry.path.decode("latin-1"),
        "type": entry.type,
        "mode": entry.mode,
        "uid": entry.uid,
        "gid": entry.gid,
    }
    if entry.path != b"/":  # builders set it to anything
        facts["mtime"] = entry.mtime
    if entry.type == "reg":
        facts["size"] = entry.size
    if entry.type in ("chr", "blk"):
        facts["rdev"] = entry.rdev
    if entry.target is not None:
        facts["target"] = entry.target.decode("latin-1")
    if entry.xattrs:
        facts["xattrs"] = {
            name.decode("latin-1"): value.hex() for name, value in sorted(entry.xattrs.items())
        }
    if entry.type != "dir" and entry.nlink > 1:
        facts["nlink"] = entry.nlink
        facts["group"] = groups[entry.nid].decode("latin-1")
    return facts


def tree_facts(tree: Tree, *, digests: bool = False) -> Iterator[Facts]:
    """Every entry of *tree* as a JSON object, sorted by path.

    Args:
        digests: Add the SHA-256 of each regular file's content; reads all of it.

    Raises:
        CorruptImage, BlobCorrupt, SourceError: As the tree.
    """
    entries = sorted(tree.walk(), key=lambda entry: entry.path)
    groups: dict[int, bytes] = {}
    for entry in entries:
        if entry.type != "dir" and entry.nlink > 1:
            groups.setdefault(entry.nid, entry.path)
    known: dict[int, str] = {}
    for entry in entries:
        facts = entry_facts(entry, groups)
        if digests and entry.type == "reg":
            facts["sha256"] = known.get(entry.nid) or content_digest(tree, entry)
            if entry.nlink > 1:
                known[entry.nid] = str(facts["sha256"])
        yield facts


def content_digest(tree: Tree, entry: Entry) -> str:
    """SHA-256 of a regular file's content, as lower-case hexadecimal digits."""
    digest = hashlib.sha256()
    for piece in tree.content(entry):
        digest.update(piece)
    return digest.hexdigest()
