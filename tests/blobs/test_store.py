"""Who shares which file, and what is believed of files found there."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from erofsd.blobs import chunkmap, store
from erofsd.blobs.layout import uniform_layout
from erofsd.blobs.store import Binding, BlobStore, FileSink
from erofsd.errors import CacheFull, CorruptImage
from ondemand.ranges import Range
from tests.fill.images import Built, build, content, restate, simple

BUILT = simple(10, 20_000)


def put(binding: Binding, built: Built, *chunks: int) -> None:
    blob = binding.blob
    for chunk in chunks:
        data = built.chunks[chunk] + bytes(-len(built.chunks[chunk]) % 4096)
        FileSink(blob.fd).write(built.layout.chunk_offset[chunk], memoryview(data))
        assert blob.map.persist([chunk], blob.map.epoch)
        blob.mark([chunk], blob.map.epoch)


def present(binding: Binding) -> list[int]:
    return [i for i, bit in enumerate(binding.blob.map.present) if bit]


def test_equal_images_share_one_file_and_its_counters(tmp_path: Path) -> None:
    blobs = BlobStore(tmp_path)
    first, second = blobs.bind(BUILT.layout), blobs.bind(simple(10, 20_000).layout)
    assert first.blob is second.blob
    assert first.tally is second.tally
    assert first.layout is second.layout
    assert blobs.names() == ["blob.0"]


def test_images_that_state_different_parts_share_and_count_their_own(tmp_path: Path) -> None:
    blobs = BlobStore(tmp_path)
    built = simple(12, 20_000, batch=3)
    stored = built.layout.unit_stored
    first = blobs.bind(restate(built, [0, 1, 2, 3]).layout)
    second = blobs.bind(restate(built, [2, 4, 11]).layout)
    assert first.blob is second.blob
    assert first.total_stored_bytes == stored[0] + stored[1]
    assert second.total_stored_bytes == stored[0] + stored[1] + stored[3]
    put(first, built, 2, 4)
    assert (first.missing_count, second.missing_count) == (3, 1)
    assert (first.fetched_stored_bytes, second.fetched_stored_bytes) == (0, stored[0] + stored[1])
    put(first, built, 0, 1)
    assert first.fetched_stored_bytes == stored[0]
    assert list(first.missing()) == [3]
    put(first, built, 3, 11)
    assert first.blob.complete
    first.blob.take([2])
    assert not first.blob.complete
    assert first.fetched_stored_bytes == stored[1]
    assert second.fetched_stored_bytes == stored[1] + stored[3]
    fresh = blobs.bind(restate(built, [1, 2, 3]).layout)
    assert (fresh.missing_count, fresh.fetched_stored_bytes) == (1, stored[1])


def test_images_that_disagree_get_files_of_their_own(tmp_path: Path) -> None:
    blobs = BlobStore(tmp_path)
    other_digests = simple(10, 20_000, seed=3)
    other_sizes = build([content(100)] * 10)
    names = [blobs.bind(b.layout).blob.name for b in (BUILT, other_digests, other_sizes)]
    assert names == ["blob.0", "blob.1", "blob.2"]
    again = BlobStore(tmp_path)
    assert again.bind(other_sizes.layout).blob.name == "blob.2"
    assert again.bind(BUILT.layout).blob.name == "blob.0"


def test_one_disagreeing_chunk_among_many_is_enough(tmp_path: Path) -> None:
    blobs = BlobStore(tmp_path)
    first = blobs.bind(restate(BUILT, range(5)).layout)
    digests = bytearray(BUILT.layout.digests)
    digests[4 * 32] ^= 1
    lying = replace(BUILT.layout, digests=bytes(digests))
    assert blobs.bind(lying).blob is not first.blob
    agreeing_elsewhere = replace(lying, stated=restate(BUILT, range(5, 10)).layout.stated)
    assert blobs.bind(agreeing_elsewhere).blob is first.blob


def test_pinned_images_share_only_under_one_pin(tmp_path: Path) -> None:
    blobs = BlobStore(tmp_path)
    plain = uniform_layout("app.erofs", 300_000, pin="etag-1")
    assert blobs.bind(plain).blob is blobs.bind(uniform_layout("app.erofs", 300_000, pin="etag-1")).blob
    assert blobs.bind(uniform_layout("app.erofs", 300_000, pin="etag-2")).blob.name == "app.erofs.1"


def test_names_are_safe_whatever_the_blob_is_called(tmp_path: Path) -> None:
    blobs = BlobStore(tmp_path / "blobs")
    for blob_id in ("../../etc/passwd", "a" * 500, ".hidden", "sha256:abc", "", "a/b", "\udcff", "-x"):
        name = blobs.bind(replace(BUILT.layout, blob_id=blob_id)).blob.name
        assert set(name) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-")
        assert len(name) <= 200
        assert name[0] not in ".-"
    assert [path.name for path in tmp_path.iterdir()] == ["blobs"]
    assert (tmp_path / "blobs").stat().st_mode & 0o777 == 0o700


def test_present_chunks_come_back(tmp_path: Path) -> None:
    binding = BlobStore(tmp_path).bind(BUILT.layout)
    put(binding, BUILT, 2, 3)
    found = BlobStore(tmp_path).bind(BUILT.layout)
    assert present(found) == [2, 3]
    assert found.fetched_stored_bytes == sum(BUILT.layout.unit_stored[2:4])


@pytest.mark.parametrize("harm", ["gone", "truncated", "punched", "replaced"])
def test_bits_are_not_believed_without_their_data(tmp_path: Path, harm: str) -> None:
    binding = BlobStore(tmp_path).bind(BUILT.layout)
    put(binding, BUILT, 2, 3)
    path = binding.blob.path
    match harm:
        case "gone":
            path.unlink()
        case "truncated":
            os.truncate(path, 50_000)
        case "punched":
            offset = BUILT.layout.chunk_offset[2]
            subprocess.run(
                ["fallocate", "--punch-hole", "--offset", str(offset + 4096), "--length", "4096", path],
                check=True,
            )
        case "replaced":
            path.unlink()
            path.touch()
            os.truncate(path, binding.blob.size)
    found = BlobStore(tmp_path).bind(BUILT.layout)
    assert present(found) == ([3] if harm == "punched" else [])
    assert os.fstat(found.blob.fd).st_size == found.blob.size


def test_a_damaged_map_is_put_aside_and_the_blob_starts_afresh(tmp_path: Path) -> None:
    binding = BlobStore(tmp_path).bind(BUILT.layout)
    put(binding, BUILT, 2)
    (tmp_path / "blob.0.map").write_bytes(os.urandom(5000))
    found = BlobStore(tmp_path).bind(BUILT.layout)
    assert found.blob.name == "blob.0"
    assert present(found) == []
    assert (tmp_path / "blob.0.map.bad").exists()


async def test_what_was_flushed_survives_a_reboot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    binding = BlobStore(tmp_path).bind(BUILT.layout)
    put(binding, BUILT, 2, 3)
    await binding.blob.flush()
    assert binding.blob.map.is_durable
    put(binding, BUILT, 4)
    monkeypatch.setattr(chunkmap, "boot_id", lambda: b"x" * 16)
    assert present(BlobStore(tmp_path).bind(BUILT.layout)) == [2, 3]


async def test_a_sync_that_fails_takes_the_doubtful_chunks_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    binding = BlobStore(tmp_path).bind(BUILT.layout)
    put(binding, BUILT, 2)
    await binding.blob.flush()
    put(binding, BUILT, 3)

    def broken(present: bytes, epoch: int) -> bool:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(binding.blob, "_sync", broken)
    with pytest.raises(OSError, match="Input/output"):
        await binding.blob.flush()
    assert present(binding) == [2]
    assert binding.missing_count == 9


def test_held_descriptors_are_used_instead_of_opening(tmp_path: Path) -> None:
    first = BlobStore(tmp_path).bind(BUILT.layout)
    put(first, BUILT, 1)
    held = os.dup(first.blob.fd)
    found = BlobStore(tmp_path, held={"blob.0": held}).bind(BUILT.layout)
    assert found.blob.fd == held
    assert present(found) == [1]


def test_a_held_file_without_its_map_goes_to_nobody_but_its_owner(tmp_path: Path) -> None:
    first = BlobStore(tmp_path).bind(BUILT.layout)
    held = os.dup(first.blob.fd)
    (tmp_path / "blob.0.map").write_bytes(b"damaged")
    later = BlobStore(tmp_path, held={"blob.0": held})
    assert later.bind(BUILT.layout).blob.name == "blob.1"
    assert later.bind(BUILT.layout, name="blob.0").blob.fd == held


def test_a_living_superblock_gets_its_file_or_an_error(tmp_path: Path) -> None:
    blobs = BlobStore(tmp_path)
    blobs.bind(BUILT.layout)
    assert blobs.bind(BUILT.layout, name="blob.0").blob.name == "blob.0"
    with pytest.raises(CorruptImage):
        blobs.bind(simple(10, 20_000, seed=3).layout, name="blob.0")


def test_a_closed_blob_is_opened_anew(tmp_path: Path) -> None:
    blobs = BlobStore(tmp_path)
    binding = blobs.bind(BUILT.layout)
    put(binding, BUILT, 5)
    fd = binding.blob.fd
    assert binding.blob.retain()
    binding.release()
    binding.blob.close()
    os.fstat(fd)  # somebody still writes
    binding.blob.release()
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(fd)
    assert present(blobs.bind(BUILT.layout)) == [5]


@pytest.mark.parametrize("is_open", [True, False])
def test_a_destroyed_blob_is_empty_for_those_who_still_have_it(tmp_path: Path, is_open: bool) -> None:
    binding = BlobStore(tmp_path).bind(BUILT.layout)
    put(binding, BUILT, *range(10))
    reader = os.open(binding.blob.path, os.O_RDONLY)
    if is_open:
        binding.blob.spoil()
        assert not binding.blob.complete
        assert not binding.blob.retain()
    else:
        BlobStore(tmp_path).drop("blob.0")
    assert os.fstat(reader).st_size == 0
    assert list(tmp_path.iterdir()) == []
    found = BlobStore(tmp_path).bind(BUILT.layout)
    assert present(found) == []
    assert os.fstat(reader).st_size == 0
    os.close(reader)


@pytest.mark.parametrize(
    ("offsets", "sizes"),
    [([0, 100], [50, 50]), ([0, 4096], [5000, 10]), ([0, 4096], [10, 10_000]), ([4096, 0], [10, 10])],
)
def test_chunks_that_could_touch_each_other_are_refused(
    tmp_path: Path, offsets: list[int], sizes: list[int]
) -> None:
    from array import array

    good = build([b"a" * 100, b"b" * 100]).layout
    bad = replace(good, chunk_offset=array("Q", offsets), chunk_size=array("I", sizes))
    with pytest.raises(CorruptImage):
        BlobStore(tmp_path).bind(bad)


def test_no_room_for_a_map_is_said_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(fd: int, offset: int, length: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(CacheFull, match="No space"):
        BlobStore(tmp_path).bind(BUILT.layout)
    assert list(tmp_path.iterdir()) == []


def test_allocated_ranges_are_found(tmp_path: Path) -> None:
    with open(tmp_path / "sparse", "w+b") as file:
        os.truncate(file.fileno(), 1 << 20)
        os.pwrite(file.fileno(), b"x" * 8192, 65536)
        os.pwrite(file.fileno(), b"x" * 4096, 1 << 19)
        assert list(store.allocated(file.fileno())) == [Range.of(65536, 8192), Range.of(1 << 19, 4096)]


WRITER = """
import sys, random
from pathlib import Path
from erofsd.blobs.store import BlobStore, FileSink
from tests.fill.images import simple
built = simple(400, 6000)
blob = BlobStore(Path(sys.argv[1])).bind(built.layout).blob
sink = FileSink(blob.fd)
order = list(range(400))
random.Random(int(sys.argv[2])).shuffle(order)
print("ready", flush=True)
for chunk in order:
    data = built.chunks[chunk] + bytes(-len(built.chunks[chunk]) % 4096)
    sink.write(built.layout.chunk_offset[chunk], memoryview(data))
    blob.map.persist([chunk], blob.map.epoch)
    if chunk % 50 == 0:
        blob.map.take([chunk])
"""


def test_a_killed_writer_leaves_no_claim_without_its_data(tmp_path: Path) -> None:
    built = simple(400, 6000)
    counts = []
    for round_ in range(12):
        directory = tmp_path / str(round_)
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, directory, str(round_)], stdout=subprocess.PIPE
        )
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"ready\n"
        time.sleep(0.0007 * round_)  # not a wait: the moment of the kill is what varies
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        writer.stdout.close()
        binding = BlobStore(directory).bind(built.layout)
        counts.append(len(present(binding)))
        for chunk in present(binding):
            expected = built.chunks[chunk]
            assert os.pread(binding.blob.fd, len(expected), built.layout.chunk_offset[chunk]) == expected
    assert max(counts) > 0
