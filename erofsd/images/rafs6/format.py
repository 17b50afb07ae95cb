"""What RAFS v6 (Nydus) adds to EROFS on disk: numbers and records, little-endian.

Source: the description rafs-v6 (its sections in brackets below), after Nydus 2.x
rafs/src/metadata/layout/v6.rs and storage/src/meta/{mod,chunk_info_v1,chunk_info_v2,batch,toc}.rs.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

EXT_SUPER_OFFSET = 1152
EXT_SUPER = struct.Struct("<QQIIQQQII200x")  # [2.2]
BLOB = struct.Struct("<64s6I2Q2I3Q32s32sQ8sI36x")  # [2.3]
CHUNK = struct.Struct("<32s4I3Q2I")  # [2.4]
META_HEADER = struct.Struct("<4I5QI4032xI")  # [4.3]
META_MAGIC = 0xB10BB10B
CHUNK_V1 = struct.Struct("<2Q")  # [4.4]
CHUNK_V2 = struct.Struct("<3Q")
BATCH = struct.Struct("<2I32x")  # [4.7]
TOC_ENTRY = struct.Struct("<2I16s32s3Q48x")  # [4.5]
TAR_BLOCK = 512

V5_MAGIC, V5_VERSION = 0x52414653, 0x500
V3_FOOTER_MAGIC = b"LPFOOTER"  # of the branch v3, fs-version 7 [9]
V3_FOOTER_SIZE = 4096

DEVICE_TABLE_OFFSET = 1408
BLOCK_SIZE = 4096
BLOB_COUNT_MAX = 254
CHUNK_SIZE_MIN, CHUNK_SIZE_MAX = 4096, 16 << 20
# Nydus allows 2**24 chunks a blob; this bounds the memory of one image (about 80 bytes a chunk).
CHUNK_COUNT_MAX = 1 << 22
STORED_SIZE_MAX = 1 << 40
DECODED_SIZE_MAX = 1 << 44
PLACEHOLDER_ID = "x" * 64

# Flags of the extended superblock [2.2]
FLAG_COMPRESSORS = 0x1 | 0x2 | 0x40 | 0x80
FLAG_BLAKE3 = 0x4
FLAG_SHA256 = 0x8
FLAG_TARFS = 0x200
FLAG_AES_128_XTS = 0x02000000
FLAGS_KNOWN = 0x3FF | 0x01000000 | 0xFC000000 | FLAG_AES_128_XTS

COMPRESSORS = {0: "none", 1: "lz4_block", 2: "gzip", 3: "zstd"}
GZIP = 2
DIGESTERS = {0: "blake3", 1: "sha256"}

# Features of a blob [4.2]
ALIGNED = 0x1
INLINED_FS_META = 0x2
CHUNK_INFO_V2 = 0x4
ZRAN = 0x8
SEPARATE = 0x10
INLINED_CHUNK_DIGEST = 0x20
TARFS = 0x40
BATCH_CHUNKS = 0x80
ENCRYPTED = 0x100
CHUNK_DICT = 0x200
EXTERNAL = 0x800
HAS_TAR_HEADER = 0x10000000
HAS_TOC = 0x20000000
CAP_TAR_TOC = 0x40000000
INCOMPAT_KNOWN = 0x0FFF
# What we do not serve, in the words we refuse it with.
REFUSED_FEATURES = {
    ENCRYPTED: "encrypted blobs (AES)",
    TARFS: "tarfs (data in a plain tar)",
    ZRAN: "zran (data in an unmodified OCI layer, --oci-ref)",
    EXTERNAL: "external blobs (data of a model in an external backend)",
}

# Flags of a V2 chunk record [4.4]
RECORD_COMPRESSED = 0x01
RECORD_ZRAN = 0x02
RECORD_BATCH = 0x04
RECORD_ENCRYPTED = 0x08
RECORD_CRC = 0x10


@dataclass(frozen=True, slots=True)
class BlobEntry:
    """One entry of the blob table, checked. Sizes and offsets in bytes, names as in the specification [2.3].

    Attributes:
        offset: Of the entry in the bootstrap.
        toc_digest: SHA-256 of TOC and tar header; zeros if there is none.
    """

    offset: int
    blob_id: str
    chunk_size: int
    chunk_count: int
    compressor: int
    digester: int
    features: int
    compressed_size: int
    uncompressed_size: int
    toc_size: int
    ci_compressor: int
    ci_offset: int
    ci_compressed_size: int
    ci_uncompressed_size: int
    toc_digest: bytes

    @property
    def data_end(self) -> int:
        """Where the chunk data end in the blob: what compressed_size means depends on who wrote it."""
        if self.features & SEPARATE or not self.features & CAP_TAR_TOC:
            return self.compressed_size
        return self.ci_offset - (TAR_BLOCK if self.features & HAS_TAR_HEADER else 0)

    @property
    def meta_range(self) -> tuple[int, int]:
        """Offset and length in the blob of the chunk information: the array and its header."""
        return self.ci_offset, self.ci_compressed_size + META_HEADER.size

    @property
    def stored_size(self) -> int:
        """The blob's size as far as the image knows: more may follow (embedded bootstrap, digests, TOC)."""
        if self.features & SEPARATE or not self.chunk_count:
            return self.compressed_size
        return max(self.compressed_size, sum(self.meta_range))

    @property
    def codec(self) -> str:
        """Name in CODECS."""
        return COMPRESSORS[self.compressor]
