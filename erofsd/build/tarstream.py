"""A tar archive as a source: headers, content and sparse files, in one pass over a stream.

What is wrong with an archive is said with its name, the offset in the decompressed stream and the entry.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

from erofsd.build import tarheader
from erofsd.build.source import SourceEntry, make_node, show
from erofsd.build.stream import ByteStream, Readable
from erofsd.build.tarheader import BLOCK_SIZE, Header, MalformedHeader
from erofsd.errors import CorruptImage, UnsupportedImage

_EXTENDED = frozenset(
    (
        tarheader.PAX,
        tarheader.PAX_GLOBAL,
        tarheader.PAX_SOLARIS,
        tarheader.LONG_NAME,
        tarheader.LONG_TARGET,
    )
)
_MAJOR_MAX, _MINOR_MAX = (1 << 12) - 1, (1 << 20) - 1


class TarSource:
    """The entries of a tar archive, packed or not, in its order.

    Args:
        file: Read from where it stands to its end, by a thread: nobody else may read it meanwhile.
        name: Of the archive, for messages.
        lenient_end: Take the end of the stream for the end of the archive where the archive does not mark it.
            Layers are unpacked so, and their digest has been checked; a file that was cut off between two
            entries looks the same.

    Raises:
        CorruptImage: It is no sound archive, or a name in it leads out of the root.
        UnsupportedImage: Something in it is of a kind that we do not know.
        SourceError: *file* cannot be read.
    """

    def __init__(self, file: Readable, name: str, *, lenient_end: bool = False) -> None:
        self.name = name
        self._file = file
        self._lenient_end = lenient_end

    def __iter__(self) -> Iterator[SourceEntry]:
        with ByteStream(self._file, self.name) as stream:
            yield from _Archive(stream, self._lenient_end).entries()


class _Archive:
    def __init__(self, stream: ByteStream, lenient_end: bool) -> None:
        self._stream = stream
        self._lenient_end = lenient_end
        self._at = 0  # where the present entry's first header lies
        self._entry = ""  # its name, once it is known
        self._next = 0  # where the next header lies
        self._globals: list[tuple[bytes, bytes]] = []

    def entries(self) -> Iterator[SourceEntry]:
        while True:
            self._entry = ""
            try:
                header = self._next_header()
                if header is None:
                    break
                self._entry = show(header.name)
                entry = self._make(header)
            except MalformedHeader as exc:
                raise self.bad(str(exc)) from exc
            if entry is not None:
                yield entry
        self._stream.drain()

    def bad(self, problem: str) -> CorruptImage:
        """The error for the present entry."""
        entry = f": {self._entry}" if self._entry else ""
        return CorruptImage(f"{self._stream.name}: at byte {self._at}{entry}: {problem}")

    def cut_off(self) -> CorruptImage:
        """The error for an archive that ends too early."""
        return self.bad(f"the archive is cut off after {self._stream.offset} bytes")

    def readinto(self, view: memoryview) -> None:
        """Content of the present entry."""
        if self._stream.readinto(view) < len(view):
            raise self.cut_off()

    # --- headers ---

    def _next_header(self) -> Header | None:
        """The next entry's header with all that extends it; None at the end."""
        records: list[tuple[bytes, bytes]] = []
        long_name = long_target = None
        extended = False
        while True:
            self._skip_to(self._next)
            if not extended:
                self._at = self._stream.offset
            header = self._read_header()
            if header is None:
                if extended:
                    raise self.bad("the archive ends after an extended header")
                return None
            if header.flag not in _EXTENDED:
                break
            extended = True
            data = self._read_meta(header.size)
            if header.flag == tarheader.LONG_NAME:
                long_name = data.partition(b"\0")[0]
            elif header.flag == tarheader.LONG_TARGET:
                long_target = data.partition(b"\0")[0]
            elif header.flag == tarheader.PAX_GLOBAL:
                self._globals += tarheader.parse_pax(data)
                extended = bool(records or long_name or long_target)
            else:
                records += tarheader.parse_pax(data)
        header.name = long_name or header.name
        header.target = long_target or header.target
        if self._globals or records:
            tarheader.apply_pax(header, [*self._globals, *records])
        return header

    def _read_header(self) -> Header | None:
        block = self._stream.read(BLOCK_SIZE)
        if not block:
            if not self._lenient_end:
                raise self.bad("the archive is cut off: the blocks of zeros that mark its end are missing")
            return None
        if len(block) < BLOCK_SIZE:
            raise self.cut_off()
        header = tarheader.parse_header(block)
        if header is None:
            second = self._stream.read(BLOCK_SIZE)
            if second.strip(b"\0"):
                raise self.bad("a block of zeros, and then a header")
            return None
        # Others may state a size, but have no data: what Go does, and so containerd.
        stored = header.size if tarheader.TYPES.get(header.flag, "reg") == "reg" else 0
        self._next = self._stream.offset + -(-stored // BLOCK_SIZE) * BLOCK_SIZE
        return header

    def _read_meta(self, size: int) -> bytes:
        if size > tarheader.META_SIZE_MAX:
            raise self.bad(f"an extended header of {size} bytes")
        data = self._stream.read(size)
        if len(data) < size:
            raise self.cut_off()
        return data

    def _skip_to(self, offset: int) -> None:
        missing = offset - self._stream.offset
        if self._stream.skip(missing) < missing:
            raise self.cut_off()

    # --- entries ---

    def _make(self, header: Header) -> SourceEntry | None:
        type_ = tarheader.TYPES.get(header.flag)
        if header.flag == tarheader.VOLUME_LABEL:
            return None
        if type_ is None:
            kind = repr(chr(header.flag))
            raise UnsupportedImage(
                f"{self._stream.name}: at byte {self._at}: {self._entry}: entries of type {kind} are unknown"
            )
        if header.flag == 0 and header.name.endswith(b"/"):
            type_ = "dir"  # before POSIX a slash was all that told a directory
        # A pax size replaces the header's, which cannot hold it.
        stored = header.size if type_ == "reg" else 0
        self._next = self._stream.offset + -(-stored // BLOCK_SIZE) * BLOCK_SIZE
        path = self._clean(header.name, "the name")
        content = self._content(header) if type_ == "reg" else None
        node = make_node(
            "reg" if type_ == "link" else type_,
            0o777 if type_ == "lnk" else header.mode,  # which is all that an unpacked one can have
            header.uid,
            header.gid,
            header.mtime,
            size=content.size if content else 0,
            rdev=_device_number(*header.device) if type_ in ("chr", "blk") else 0,
            target=header.target if type_ == "lnk" else b"",
            xattrs=header.xattrs,
        )
        link = self._clean(header.target, "the link's target") if type_ == "link" else None
        return SourceEntry(path, node, link, content)

    def _clean(self, name: bytes, what: str) -> bytes:
        """*name* without what means nothing, relative to the root."""
        names: list[bytes] = []
        for part in name.split(b"/"):
            if part == b"..":
                if not names:
                    raise self.bad(f"{what} {show(name)!r} leads out of the root")
                names.pop()
            elif part not in (b"", b"."):
                names.append(part)
        return b"/".join(names)

    def _content(self, header: Header) -> _TarContent:
        if header.real_size is None:
            return _TarContent(self, header.size, None)
        start = self._stream.offset
        if header.map_in_data:
            header.extents = self._read_map()
        while header.map_continues:
            block = self._read_meta(BLOCK_SIZE)
            # Blocks of the map are not in the stored size.
            self._next += BLOCK_SIZE
            start += BLOCK_SIZE
            more, header.map_continues = tarheader.parse_sparse_block(block)
            header.extents += more
            if len(header.extents) > tarheader.SPARSE_EXTENTS_MAX:
                raise self.bad("too many extents of a sparse file")
        stored = header.size - (self._stream.offset - start)
        extents = tarheader.check_extents(header.extents, header.real_size, stored)
        return _TarContent(self, header.real_size, extents)

    def _read_map(self) -> list[tuple[int, int]]:
        """The map of GNU sparse 1.0: lines of numbers, padded to whole blocks; the first is their count."""
        text = self._read_meta(BLOCK_SIZE)
        while b"\n" not in text:
            text += self._read_meta(BLOCK_SIZE)
            if len(text) > 2 * BLOCK_SIZE:
                raise self.bad("sparse map: no count")
        count, _, text = text.partition(b"\n")
        if not count.isdigit() or int(count) > tarheader.SPARSE_EXTENTS_MAX:
            raise self.bad(f"sparse map: {count[:20]!r} extents")
        pieces, lines = [text], text.count(b"\n")
        while lines < 2 * int(count):
            block = self._read_meta(BLOCK_SIZE)
            pieces.append(block)
            lines += block.count(b"\n")
        whole = b"".join(pieces).split(b"\n")[: 2 * int(count)]
        return tarheader.parse_sparse_map(b"".join(line + b"\n" for line in whole))


def _device_number(major: int, minor: int) -> int:
    """As in ``st_rdev``; -1 for what no Linux device can have."""
    if 0 <= major <= _MAJOR_MAX and 0 <= minor <= _MINOR_MAX:
        return os.makedev(major, minor)
    return -1


class _TarContent:
    # Content of the present entry; offsets need not be looked at, since the stream is in their order.

    __slots__ = ("_archive", "extents", "size")

    def __init__(self, archive: _Archive, size: int, extents: list[tuple[int, int]] | None) -> None:
        self._archive = archive
        self.size = size
        self.extents = extents

    def readinto(self, offset: int, view: memoryview) -> None:
        """See `erofsd.build.source.Content`."""
        self._archive.readinto(view)

    def close(self) -> None:
        """See `erofsd.build.source.Content`."""
