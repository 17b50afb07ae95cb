"""What a map still claims after kills, reboots and damage."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from erofsd.blobs import chunkmap
from erofsd.blobs.chunkmap import ChunkMap, MapRefused, both, runs, spans, without
from ondemand.ranges import Range, RangeSet
from tests.fill.images import simple

ID = bytes(range(32))
BUILT = simple(10, 8192)


def new(tmp_path: Path, count: int = 10) -> ChunkMap:
    made = ChunkMap.create(tmp_path / "x.map", count, ID, 32)
    assert made.claim(BUILT.layout)
    return made


def reopen(tmp_path: Path) -> ChunkMap:
    found = ChunkMap.open(tmp_path / "x.map", 10, ID, 32)
    assert found is not None
    return found


def put(chunk_map: ChunkMap, *chunks: int) -> None:
    assert chunk_map.persist(chunks, chunk_map.epoch)
    chunk_map.mark(chunks, chunk_map.epoch)


def sync(chunk_map: ChunkMap) -> None:
    present = bytes(chunk_map.present)
    assert chunk_map.write_durable(present, chunk_map.epoch)
    chunk_map.durable_now(present, chunk_map.epoch)


def present(chunk_map: ChunkMap) -> list[int]:
    return [i for i, bit in enumerate(chunk_map.present) if bit]


def reboot(monkeypatch: pytest.MonkeyPatch) -> None:
    another = os.urandom(16)
    monkeypatch.setattr(chunkmap, "boot_id", lambda: another)


def test_what_was_persisted_is_there_after_a_kill(tmp_path: Path) -> None:
    put(new(tmp_path), 1, 2, 7)
    assert present(reopen(tmp_path)) == [1, 2, 7]


def test_only_what_was_durable_is_there_after_a_reboot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = new(tmp_path)
    put(made, 1, 2)
    sync(made)
    put(made, 3)
    reboot(monkeypatch)
    found = reopen(tmp_path)
    assert present(found) == [1, 2]
    put(found, 5)
    assert present(reopen(tmp_path)) == [1, 2, 5]  # in the new boot, the state counts again
    reboot(monkeypatch)
    assert present(reopen(tmp_path)) == [1, 2]


def test_a_torn_slot_loses_to_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = new(tmp_path)
    put(made, 1)
    sync(made)
    put(made, 2)
    sync(made)
    newest = made._slots_at[made._generation % 2]
    raw = bytearray((tmp_path / "x.map").read_bytes())
    raw[newest + chunkmap.SLOT.size + 5] = chunkmap.PRESENT
    (tmp_path / "x.map").write_bytes(raw)
    reboot(monkeypatch)
    assert present(reopen(tmp_path)) == [1]


def test_what_was_taken_stays_away_after_kill_and_reboot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = new(tmp_path)
    put(made, 1, 2, 3)
    sync(made)
    assert made.take([2, 9]) == [2]
    assert present(reopen(tmp_path)) == [1, 3]
    reboot(monkeypatch)
    assert present(reopen(tmp_path)) == [1, 3]
    again = reopen(tmp_path)
    again.take()
    assert present(reopen(tmp_path)) == []


def test_a_write_that_began_before_a_taking_marks_nothing(tmp_path: Path) -> None:
    made = new(tmp_path)
    epoch = made.epoch
    made.take([0])
    assert not made.persist([4], epoch)
    assert made.mark([4], epoch) == []
    assert not made.write_durable(b"\1" * 10, epoch)
    made.durable_now(b"\1" * 10, epoch)
    assert present(made) == present(reopen(tmp_path)) == []
    assert not any(made.durable)


def test_data_that_could_not_be_synced_are_forgotten(tmp_path: Path) -> None:
    made = new(tmp_path)
    put(made, 1)
    sync(made)
    put(made, 2, 3)
    assert made.distrust() == [2, 3]
    assert present(made) == present(reopen(tmp_path)) == [1]


def test_bits_without_blocks_are_taken_away(tmp_path: Path) -> None:
    made = new(tmp_path)
    put(made, 0, 1, 2, 5, 9)
    allocated = RangeSet([Range(0, 12288), Range(16384, 24576), Range(40960, 49152)])
    assert made.reconcile(allocated, BUILT.layout) == [1, 9]
    assert present(reopen(tmp_path)) == [0, 2, 5]


def test_a_claim_is_kept_and_another_refused(tmp_path: Path) -> None:
    new(tmp_path)
    found = reopen(tmp_path)
    assert found.claim(BUILT.layout)
    assert not found.claim(simple(10, 8192, seed=5).layout)


def test_a_map_for_another_blob_is_not_ours(tmp_path: Path) -> None:
    new(tmp_path)
    assert ChunkMap.open(tmp_path / "x.map", 10, bytes(32), 32) is None
    assert ChunkMap.open(tmp_path / "x.map", 11, ID, 32) is None


@pytest.mark.parametrize("damage", ["empty", "short", "long", "magic", "noise"])
def test_a_damaged_file_is_refused(tmp_path: Path, damage: str) -> None:
    new(tmp_path)
    path = tmp_path / "x.map"
    raw = path.read_bytes()
    path.write_bytes(
        {
            "empty": b"",
            "short": raw[:-1],
            "long": raw + b"\0",
            "magic": b"X" + raw[1:],
            "noise": os.urandom(len(raw)),
        }[damage]
    )
    with pytest.raises(MapRefused):
        ChunkMap.open(path, 10, ID, 32)


@pytest.mark.parametrize("value", [0, 1, 0xFF])
def test_a_body_of_one_value_claims_nothing(tmp_path: Path, value: int) -> None:
    put(new(tmp_path), 3)
    path = tmp_path / "x.map"
    raw = path.read_bytes()
    path.write_bytes(raw[:4096] + bytes([value]) * (len(raw) - 4096))
    assert present(reopen(tmp_path)) == []


def test_bits_of_chunks_that_nobody_claimed_are_not_trusted(tmp_path: Path) -> None:
    made = ChunkMap.create(tmp_path / "x.map", 10, ID, 32)
    put(made, 3)
    assert present(reopen(tmp_path)) == []


@given(st.integers(0, 2**32))
def test_flipped_bits_never_crash(tmp_path_factory: pytest.TempPathFactory, seed: int) -> None:
    tmp_path = tmp_path_factory.mktemp("map")
    put(new(tmp_path), 3, 4)
    path = tmp_path / "x.map"
    raw = bytearray(path.read_bytes())
    rng = random.Random(seed)
    for _ in range(20):
        raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
    path.write_bytes(raw)
    try:
        reopen(tmp_path)
    except (MapRefused, AssertionError):
        return


columns = st.integers(0, 60).flatmap(
    lambda n: st.tuples(*[st.lists(st.integers(0, 1), min_size=n, max_size=n).map(bytes)] * 2)
)


@given(columns)
def test_column_arithmetic_is_that_of_sets(pair: tuple[bytes, bytes]) -> None:
    a, b = ({i for i, bit in enumerate(column) if bit} for column in pair)

    def members(column: bytes) -> set[int]:
        return {i for first, last in spans(column) for i in range(first, last)}

    assert members(both(*pair)) == a & b
    assert members(without(*pair)) == a - b
    assert {i for first, last in runs(sorted(a)) for i in range(first, last)} == a
