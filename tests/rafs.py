"""A small RAFS v6 writer for tests and benchmarks: big images with known content, in a second.

Writes what Nydus 2.1 wrote: a separate bootstrap, blobs without tar framing, chunk information V1, flat
directories. Source of every offset: docs of the format cited in ``erofsd.images.rafs6.format``.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import stat
import struct
import tarfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import blake3
import lz4.block
import zstandard

BLOCK = 4096
COMPRESSORS = {"none": (0, 0x1), "lz4_block": (1, 0x2), "zstd": (3, 0x80)}
DIGESTERS = {"blake3": (0, 0x4), "sha256": (1, 0x8)}
MEDIA_BLOB = "application/vnd.oci.image.layer.nydus.blob.v1"
MEDIA_BOOTSTRAP = "application/vnd.oci.image.layer.v1.tar+gzip"


def _align(value: int, unit: int) -> int:
    return -(-value // unit) * unit


@dataclass
class Chunk:
    index: int
    digest: bytes
    offset: int
    size: int
    stored_offset: int
    stored_size: int


@dataclass
class Blob:
    """One blob under construction."""

    compressor: str
    digester: str
    data: bytearray = field(default_factory=bytearray)
    chunks: list[Chunk] = field(default_factory=list)
    size: int = 0

    def add(self, content: bytes) -> Chunk:
        """Append one chunk."""
        digest = (
            blake3.blake3(content).digest() if self.digester == "blake3" else hashlib.sha256(content).digest()
        )
        stored = {
            "none": lambda data: data,
            "zstd": zstandard.ZstdCompressor(level=3).compress,
            "lz4_block": lambda data: lz4.block.compress(data, store_size=False),
        }[self.compressor](content)
        if len(stored) >= len(content):
            stored = content
        chunk = Chunk(len(self.chunks), digest, self.size, len(content), len(self.data), len(stored))
        self.chunks.append(chunk)
        self.data += stored
        self.size += _align(len(content), BLOCK)
        return chunk

    def finish(self) -> tuple[bytes, bytes]:
        """The blob file, and its 256-byte blob table entry without index and chunk size."""
        records = b"".join(
            struct.pack(
                "<QQ",
                c.offset & 0xFFFFFFFF000 | (c.size - 1 & 0xFFFFF) << 44 | (c.size - 1) >> 20 << 8,
                c.stored_offset | (c.stored_size - 1 & 0xFFFFF) << 44 | (c.stored_size - 1) >> 20 << 40,
            )
            for c in self.chunks
        )
        offset = len(self.data)
        header = struct.pack(
            "<IIIIQQQQQI", 0xB10BB10B, 1, 0, len(self.chunks), offset, len(records), len(records), 0, 0, 0
        )
        header = header.ljust(4092, b"\0") + struct.pack("<I", 0xB10BB10B)
        file = bytes(self.data) + records + header
        entry = bytearray(256)
        entry[0:64] = hashlib.sha256(file).hexdigest().encode()
        number, _flag = COMPRESSORS[self.compressor]
        struct.pack_into(
            "<IIIIQQIIQQQ",
            entry,
            72,
            len(self.chunks),
            number,
            DIGESTERS[self.digester][0],
            1,
            offset,
            self.size,
            0,
            0,
            offset,
            len(records),
            len(records),
        )
        return file, bytes(entry)


@dataclass(frozen=True)
class RafsImage:
    """A finished image.

    Attributes:
        blobs: Blob id to bytes of the blob file.
        files: Path in the image to content.
    """

    bootstrap: bytes
    blobs: dict[str, bytes]
    files: dict[str, bytes]


def make_image(
    files: Mapping[str, bytes],
    *,
    compressor: str = "zstd",
    digester: str = "blake3",
    chunk_size: int = 1 << 20,
    shared: Iterable[str] = (),
) -> RafsImage:
    """An image of *files* (relative paths); those named in *shared* go into a blob of their own."""
    shared = set(shared)
    groups = [[n for n in sorted(files) if n not in shared], [n for n in sorted(files) if n in shared]]
    blobs = [Blob(compressor, digester) for group in groups if group]
    placed: dict[str, list[tuple[int, Chunk]]] = {}
    for number, group in enumerate(g for g in groups if g):
        for name in group:
            content = files[name]
            placed[name] = [
                (number, blobs[number].add(content[at : at + chunk_size]))
                for at in range(0, len(content), chunk_size)
            ]
    finished = [blob.finish() for blob in blobs]
    bootstrap = _bootstrap(files, placed, blobs, [entry for _, entry in finished], chunk_size)
    return RafsImage(bootstrap, {e[:64].decode(): f for f, e in finished}, dict(files))


def make_family(
    files: Mapping[str, bytes], selections: Iterable[Iterable[str]], *, chunk_size: int = 64 << 10
) -> list[RafsImage]:
    """Images over one and the same blob with all *files*: one for each selection of their names."""
    blob = Blob("zstd", "blake3")
    placed = {
        name: [(0, blob.add(content[at : at + chunk_size])) for at in range(0, len(content), chunk_size)]
        for name, content in sorted(files.items())
    }
    file, entry = blob.finish()
    images = []
    for selection in selections:
        part = {name: files[name] for name in selection}
        used = {chunk.index for name in part for _, chunk in placed[name]}
        seen = replace(blob, chunks=[chunk for chunk in blob.chunks if chunk.index in used])
        bootstrap = _bootstrap(part, {name: placed[name] for name in part}, [seen], [entry], chunk_size)
        images.append(RafsImage(bootstrap, {entry[:64].decode(): file}, part))
    return images


def _bootstrap(
    files: Mapping[str, bytes],
    placed: Mapping[str, list[tuple[int, Chunk]]],
    blobs: list[Blob],
    entries: list[bytes],
    chunk_size: int,
) -> bytes:
    tree: dict[str, dict[str, str]] = {"": {}}
    for name in files:
        parts = name.split("/")
        for depth in range(1, len(parts) + 1):
            path, parent = "/".join(parts[:depth]), "/".join(parts[: depth - 1])
            tree.setdefault(parent, {})[parts[depth - 1]] = path
    order = sorted({*tree, *files})  # "" first: the root gets nid 128
    blob_table = _align(1408 + 128 * len(blobs), BLOCK)
    meta = _align(blob_table + 256 * len(blobs), BLOCK)
    nids: dict[str, int] = {}
    at = meta + BLOCK
    for path in order:
        nids[path] = (at - meta) // 32
        at += 64 + (_align(8 * len(placed[path]), 64) if path in placed else 0)
    at = _align(at, BLOCK)
    image = bytearray(at)
    for position, path in enumerate(order):
        inode = meta + nids[path] * 32
        if path in tree:
            data, subdirectories = _directory(path, tree, nids)
            mode, nlink, size, layout, union = (
                stat.S_IFDIR | 0o755,
                2 + subdirectories,
                len(data),
                0,
                len(image) // BLOCK,
            )
            image += data.ljust(_align(len(data), BLOCK), b"\0")
        else:
            bits = (chunk_size // BLOCK).bit_length() - 1
            mode, nlink, size, layout, union = stat.S_IFREG | 0o644, 1, len(files[path]), 4, 0x20 | bits
            for k, (number, chunk) in enumerate(placed[path]):
                low, high = chunk.index & 0xFFFF, chunk.index >> 16
                struct.pack_into(
                    "<HHI", image, inode + 64 + 8 * k, low, high << 8 | number + 1, chunk.offset // BLOCK
                )
        struct.pack_into(
            "<HHHHQIIIIQII",
            image,
            inode,
            layout << 1 | 1,
            0,
            mode,
            0,
            size,
            union,
            position + 1,
            0,
            0,
            1600000000,
            5,
            nlink,
        )
    chunk_table = len(image)
    rows = [
        struct.pack(
            "<32sIIIIQQQII",
            c.digest,
            n,
            int(c.size != c.stored_size),
            c.stored_size,
            c.size,
            c.stored_offset,
            c.offset,
            0,
            c.index,
            0,
        )
        for n, blob in enumerate(blobs)
        for c in blob.chunks
    ]
    image += b"".join(rows)
    image += bytes(_align(len(image), BLOCK) - len(image))
    compressor, digester = (blobs[0].compressor, blobs[0].digester) if blobs else ("zstd", "blake3")
    flags = COMPRESSORS[compressor][1] | DIGESTERS[digester][1] | 0x10
    struct.pack_into(
        "<IIIBBHQQIIII", image, 1024, 0xE0F5E1E2, 0, 0x40000000, 12, 0, nids[""], len(order), 0, 0,
        sum(b.size for b in blobs) // BLOCK, meta // BLOCK, 0,
    )  # fmt: skip
    struct.pack_into("<IHHH", image, 1024 + 80, 0xC, 0, len(blobs), 11)
    struct.pack_into(
        "<QQIIQQQI",
        image,
        1152,
        flags,
        blob_table,
        256 * len(blobs),
        chunk_size,
        chunk_table,
        80 * len(rows),
        0,
        0,
    )
    for k, (blob, entry) in enumerate(zip(blobs, entries, strict=True)):
        struct.pack_into("<64sII", image, 1408 + 128 * k, entry[:64], blob.size // BLOCK, 0)
        image[blob_table + 256 * k : blob_table + 256 * (k + 1)] = entry
        struct.pack_into("<II", image, blob_table + 256 * k + 64, k, chunk_size)
    return bytes(image)


def _directory(path: str, tree: Mapping[str, dict[str, str]], nids: Mapping[str, int]) -> tuple[bytes, int]:
    """Directory data, and the number of subdirectories."""
    parent = path.rpartition("/")[0] if path else ""
    names = {".": path, "..": parent, **tree[path]}
    blocks: list[list[tuple[bytes, int, int]]] = [[]]
    used = 0
    for name in sorted(names, key=str.encode):
        raw = name.encode()
        if used + 12 + len(raw) > BLOCK:
            blocks.append([])
            used = 0
        blocks[-1].append((raw, nids[names[name]], 2 if names[name] in tree else 1))
        used += 12 + len(raw)
    data = b""
    for block in blocks:
        offset = 12 * len(block)
        head, tail = b"", b""
        for raw, nid, kind in block:
            head += struct.pack("<QHBB", nid, offset + len(tail), kind, 0)
            tail += raw
        data = data.ljust(_align(len(data), BLOCK), b"\0") + head + tail
    return data, sum(names[n] in tree for n in tree[path])


def write_files(image: RafsImage, directory: Path) -> Path:
    """Write ``image.boot`` and ``blobs/`` into *directory*; returns the bootstrap's path."""
    (directory / "blobs").mkdir(parents=True, exist_ok=True)
    for blob_id, data in image.blobs.items():
        (directory / "blobs" / blob_id).write_bytes(data)
    (directory / "image.boot").write_bytes(image.bootstrap)
    return directory / "image.boot"


def write_layout(image: RafsImage, directory: Path, tag: str = "latest") -> None:
    """Add *image* to the OCI layout in *directory* under *tag*, packed as nydusify packs."""
    store = directory / "blobs" / "sha256"
    store.mkdir(parents=True, exist_ok=True)

    def put(data: bytes) -> tuple[str, int]:
        digest = hashlib.sha256(data).hexdigest()
        (store / digest).write_bytes(data)
        return f"sha256:{digest}", len(data)

    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w") as tar:
        info = tarfile.TarInfo("image")
        info.type, info.mode = tarfile.DIRTYPE, 0o755
        tar.addfile(info)
        info = tarfile.TarInfo("image/image.boot")
        info.size, info.mode = len(image.bootstrap), 0o444
        tar.addfile(info, io.BytesIO(image.bootstrap))
    layers, diff_ids = [], []
    for data in image.blobs.values():
        digest, size = put(data)
        marks = {"containerd.io/snapshot/nydus-blob": "true"}
        layers.append({"mediaType": MEDIA_BLOB, "digest": digest, "size": size, "annotations": marks})
        diff_ids.append(digest)
    digest, size = put(gzip.compress(raw.getvalue(), 6, mtime=0))
    marks = {"containerd.io/snapshot/nydus-bootstrap": "true", "containerd.io/snapshot/nydus-fs-version": "6"}
    layers.append({"mediaType": MEDIA_BOOTSTRAP, "digest": digest, "size": size, "annotations": marks})
    diff_ids.append("sha256:" + hashlib.sha256(raw.getvalue()).hexdigest())
    config = {"architecture": "amd64", "os": "linux", "rootfs": {"type": "layers", "diff_ids": diff_ids}}
    digest, size = put(json.dumps(config).encode())
    manifest = {
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": {"mediaType": "application/vnd.oci.image.config.v1+json", "digest": digest, "size": size},
        "layers": layers,
    }
    digest, size = put(json.dumps(manifest).encode())
    index_path = directory / "index.json"
    index = (
        json.loads(index_path.read_text()) if index_path.exists() else {"schemaVersion": 2, "manifests": []}
    )
    index["manifests"].append(
        {
            "mediaType": manifest["mediaType"],
            "digest": digest,
            "size": size,
            "annotations": {"org.opencontainers.image.ref.name": tag},
        }
    )
    index_path.write_text(json.dumps(index))
    (directory / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
