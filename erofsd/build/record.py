"""A converted layer in a file: its entries, and where their chunks lie.

Messages, each behind its length: a head, the columns of its chunks, the entries in their order. All but the
columns are MessagePack.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, BinaryIO

import msgspec

from erofsd.build.layers import Layer, LayerEntry
from erofsd.build.source import make_node
from erofsd.images.tree import ChunkSet, Node, PackedBlob

VERSION = 1
_COLUMNS = ("blob", "index", "offset", "size", "stored_offset", "stored_size", "flags", "crc")
_LENGTH_SIZE = 4


@dataclass(slots=True)
class LayerRecord:
    """What one layer became.

    Attributes:
        layer: Its blob is its own, not one of a dictionary; content digests are in its nodes.
        chunks: Of this layer alone.
        warnings: What was said when it was converted.
    """

    layer: Layer
    chunks: ChunkSet
    warnings: list[str] = field(default_factory=list)


class _Head(msgspec.Struct):
    version: int
    name: str
    blob_id: str | None
    whiteouts: bool
    dropped: list[bytes]
    warnings: list[str]
    blobs: list[dict[str, Any]]


class _Row(msgspec.Struct, array_like=True):
    path: bytes
    link: bytes | None
    type: str
    mode: int
    uid: int
    gid: int
    mtime: int
    size: int
    rdev: int
    target: bytes
    xattrs: list[tuple[bytes, bytes]]
    chunks: bytes
    inline: bytes | None
    digest: bytes


def write_record(file: BinaryIO, record: LayerRecord) -> None:
    """Write *record* to *file*."""
    layer, chunks = record.layer, record.chunks
    head = _Head(
        VERSION,
        layer.name,
        layer.blob.blob_id if layer.blob else None,
        layer.whiteouts,
        sorted(layer.dropped),
        record.warnings,
        [asdict(packed) for packed in chunks.blobs],
    )
    encoder = msgspec.msgpack.Encoder()
    put(file, encoder.encode(head))
    for name in _COLUMNS:
        put(file, getattr(chunks, name).tobytes())
    put(file, chunks.digests)
    for entry in layer.entries:
        node = entry.node
        row = _Row(
            entry.path,
            entry.link,
            node.type,
            node.mode,
            node.uid,
            node.gid,
            node.mtime,
            node.size,
            node.rdev,
            node.target,
            list(node.xattrs.items()),
            node.chunks.tobytes(),
            node.inline,
            node.digest,
        )
        put(file, encoder.encode(row))


def read_blob_id(file: BinaryIO) -> str | None:
    """The id of the blob that the record in *file* needs; None if it needs none.

    Raises:
        As `read_record`.
    """
    return _head(messages(file)).blob_id


def read_record(file: BinaryIO) -> LayerRecord:
    """The record in *file*.

    Raises:
        ValueError, TypeError, LookupError, msgspec.MsgspecError: It is none, or one of another version.
    """
    parts = messages(file)
    head = _head(parts)
    chunks = ChunkSet()
    chunks.blobs = [PackedBlob(**blob) for blob in head.blobs]
    for name in _COLUMNS:
        getattr(chunks, name).frombytes(next(parts, b""))
    chunks.digests += next(parts, b"")
    blob = next((packed for packed in chunks.blobs if packed.blob_id == head.blob_id), None)
    layer = Layer(head.name, [], blob, head.whiteouts, set(head.dropped))
    decoder = msgspec.msgpack.Decoder(_Row)
    for message in parts:
        row = decoder.decode(message)
        layer.entries.append(LayerEntry(row.path, _node(row), row.link))
    return LayerRecord(layer, chunks, head.warnings)


def _head(parts: Iterator[bytes]) -> _Head:
    head = msgspec.msgpack.decode(next(parts, b""), type=_Head)
    if head.version != VERSION:
        raise ValueError(f"version {head.version}")
    return head


def _node(row: _Row) -> Node:
    xattrs = dict(row.xattrs)
    node = make_node(
        row.type,
        row.mode,
        row.uid,
        row.gid,
        row.mtime,
        size=row.size,
        rdev=row.rdev,
        target=row.target,
        xattrs=xattrs,
    )
    if row.chunks:
        node.chunks = array("q", row.chunks)
    node.inline, node.digest = row.inline, row.digest
    return node


def put(file: BinaryIO, message: bytes | bytearray) -> None:
    """Append one message."""
    file.write(len(message).to_bytes(_LENGTH_SIZE, "little"))
    file.write(message)


def messages(file: BinaryIO) -> Iterator[bytes]:
    """The messages from here to the end.

    Raises:
        ValueError: The last one is cut off.
    """
    while head := file.read(_LENGTH_SIZE):
        length = int.from_bytes(head, "little")
        message = file.read(length)
        if len(head) < _LENGTH_SIZE or len(message) < length:
            raise ValueError("cut off")
        yield message
