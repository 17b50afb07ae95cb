"""``inspect`` and ``check`` on images that other people's tools made, and on what is no image."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
import subprocess
from pathlib import Path
from typing import Any

import pytest

from erofsd.cli import main
from tests.images.plainlayout import TAG, make_layout, run_mkfs

needs_mkfs = pytest.mark.skipif(not shutil.which("mkfs.erofs"), reason="mkfs.erofs is not installed")


def lines(out: str) -> list[dict[str, Any]]:
    """Printed JSON lines."""
    return [json.loads(line) for line in out.splitlines()]


@pytest.mark.parametrize("tag", ["zstd", "lz4-128k", "batch", "dict", "index"])
def test_files_of_a_nydusify_image_are_as_the_kernel_shows_them(
    tag: str, testdata: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", "--json", "--files", "--digests", f"oci:{testdata}/nydusify/layout:{tag}"]) == 0
    found = lines(capsys.readouterr().out)
    expected = lines((testdata / "nydusify/facts.jsonl").read_text())
    assert [fact["path"] for fact in found] == [fact["path"] for fact in expected]
    for fact, wanted in zip(found, expected, strict=True):
        assert fact == wanted


@pytest.mark.parametrize("tag", ["zstd", "lz4-128k", "batch", "dict", "index"])
def test_sound_image_passes(tag: str, testdata: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "--json", f"oci:{testdata}/nydusify/layout:{tag}"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ok"]
    assert report["faults"] == []
    assert report["verified"] == "blake3"
    assert report["entries"] == 471
    assert report["chunks"] > 380


@pytest.mark.parametrize(
    ("tag", "word"), [("zran", "zran"), ("source", "ordinary OCI image"), ("missing", "missing")]
)
@pytest.mark.parametrize("verb", ["inspect", "check"])
def test_what_cannot_be_read_is_refused_by_name(
    tag: str, word: str, verb: str, testdata: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = main([verb, f"oci:{testdata}/nydusify/layout:{tag}"])
    assert code == (5 if tag == "missing" else 4)
    captured = capsys.readouterr()
    assert word in captured.err
    assert captured.err.startswith("erofsd: ")
    assert captured.out == ""


@pytest.mark.parametrize(
    ("kind", "word"), [("encrypted", "encrypted"), ("rafs-v5", "RAFS v5"), ("tarfs", "tarfs")]
)
def test_loose_files_of_other_kinds_are_refused_by_name(
    kind: str, word: str, testdata: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = testdata / "nydusify/refuse" / kind
    blobs = directory / "blobs"
    argv = ["inspect", f"file:{directory}/boot", "--blobs", str(blobs if blobs.exists() else directory)]
    assert main(argv) == 4
    assert word in capsys.readouterr().err


def test_loose_bootstrap_with_its_blob(testdata: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = testdata / "nydus-texture"
    ref = [f"file:{base}/bootstrap/rafs-v6-2.2.boot", "--blobs", str(base / "blobs")]
    assert main(["check", *ref]) == 0
    assert "sound" in capsys.readouterr().out
    assert main(["inspect", "--json", "--files", "--digests", *ref]) == 0
    digests = {fact["path"]: fact.get("sha256") for fact in lines(capsys.readouterr().out)}
    assert digests == {
        "/": None,
        "/lib.rs": "1810eba864521293bb0d6b55a3c82318d4d89f294ed761c456d9088a17de0c69",
        "/sync_io.rs": "e629ab260ff0dc02a24648a3e0dd8c13a5daf233d535c330e3201925f5eeff96",
    }
    assert main(["inspect", "--json", "--chunks", *ref]) == 0
    chunks = lines(capsys.readouterr().out)
    assert [(c["offset"], c["size"], c["stored_offset"], c["stored_size"]) for c in chunks] == [
        (0, 16931, 0, 4828),
        (20480, 13400, 4828, 2974),
    ]
    assert chunks[0]["digest"] == "f7e2735f1c6ae9cde91e537416b09d8bb71b306a421d19cc1012a51f93a7fe69"
    assert main(["inspect", "--json", "--files", "--chunks", *ref]) == 0
    of_files = {fact["path"]: fact.get("chunks") for fact in lines(capsys.readouterr().out)}
    assert of_files == {
        "/": None,
        "/lib.rs": [{"file_offset": 0, **chunks[0]}],
        "/sync_io.rs": [{"file_offset": 0, **chunks[1]}],
    }
    assert main(["inspect", "--files", "--chunks", *ref]) == 0
    header, _, *listed = capsys.readouterr().out.splitlines()
    assert header.split()[-1] == "DIGEST"
    assert [line.split()[-1] for line in listed] == [
        "/lib.rs",
        chunks[0]["digest"],
        "/sync_io.rs",
        chunks[1]["digest"],
    ]


def test_chunks_of_a_file_with_holes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    with (tree / "holes").open("wb") as file:
        for at in (0, 8 << 20):
            file.seek(at)
            file.write(os.urandom(100_000))
    assert (
        main(["build", "--chunk-size", "64K", str(tree), f"file:{tmp_path}/x", "--blobs", str(tmp_path)]) == 0
    )
    capsys.readouterr()
    ref = [f"file:{tmp_path}/x", "--blobs", str(tmp_path)]
    assert main(["inspect", "--json", "--files", "--chunks", *ref]) == 0
    (file_fact,) = [fact for fact in lines(capsys.readouterr().out) if fact["path"] == "/holes"]
    data = [
        c for c in file_fact["chunks"] if c["file_offset"] in (0, 64 << 10, 8 << 20, (8 << 20) + (64 << 10))
    ]
    assert [c["size"] for c in data] == [65536, 65536, 65536, 100_000 - 65536]
    assert len({c["digest"] for c in data}) == 4
    zeros = {c["digest"] for c in file_fact["chunks"]} - {c["digest"] for c in data}
    assert len(zeros) == 1  # RAFS has one chunk for all holes
    assert [c["file_offset"] for c in file_fact["chunks"]] == list(range(0, (8 << 20) + 100_000, 64 << 10))


def test_bootstrap_inside_of_a_blob(testdata: Path, capsys: pytest.CaptureFixture[str]) -> None:
    [blob] = (testdata / "nydus-texture/toc").iterdir()
    assert main(["check", f"file:{blob}"]) == 0
    assert main(["inspect", "--json", f"file:{blob}"]) == 0
    summary = json.loads(capsys.readouterr().out.partition("\n")[2])
    assert summary["format"] == "rafs6"
    assert summary["entries"] == {"reg": 3, "dir": 1}
    assert summary["blobs"][0]["blob_id"] == blob.name


def damaged(testdata: Path, target: Path, offset: int) -> list[str]:
    """A copy of the loose image whose blob has one bit flipped, as arguments."""
    base = testdata / "nydus-texture"
    [blob] = (base / "blobs").iterdir()
    data = bytearray(blob.read_bytes())
    data[offset] ^= 1
    target.mkdir()
    (target / blob.name).write_bytes(data)
    return [f"file:{base}/bootstrap/rafs-v6-2.2.boot", "--blobs", str(target)]


@pytest.mark.parametrize(
    ("offset", "word"),
    [
        (5000, "chunk 1 (stored at 4828, 2974 bytes)"),
        (8314 + 40, "blob.meta"),
        (12954 + 3, "blob.digest"),
        (13530 + 20, "TOC"),
    ],
)
def test_damage_is_named_and_ends_with_4(
    offset: int, word: str, testdata: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", *damaged(testdata, tmp_path / "blobs", offset)]) == 4
    assert word in capsys.readouterr().err


def test_damage_is_in_the_report_for_scripts_too(
    testdata: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", "--json", *damaged(testdata, tmp_path / "blobs", 5000)]) == 4
    report = json.loads(capsys.readouterr().out)
    assert not report["ok"]
    assert len(report["faults"]) == 1
    assert "chunk 1" in report["faults"][0]


def test_digests_of_damaged_files_are_never_printed(
    testdata: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = damaged(testdata, tmp_path / "blobs", 5000)
    assert main(["inspect", "--files", "--digests", *argv]) == 4
    assert "sync_io" not in capsys.readouterr().out


def test_missing_blob_is_the_sources_fault(
    testdata: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    boot = f"file:{testdata}/nydus-texture/bootstrap/rafs-v6-2.2.boot"
    assert main(["check", boot, "--blobs", str(tmp_path)]) == 5
    assert "be7d77eeb719" in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"", b"x", b"\0" * 5000, b"<html>" * 1000])
def test_what_is_no_image_is_refused(
    content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "image").write_bytes(content)
    assert main(["inspect", str(tmp_path / "image")]) == 4
    assert "Traceback" not in capsys.readouterr().err


def make_tree(root: Path) -> Path:
    """A small tree of every kind of entry that needs no privilege."""
    (root / "dir/empty").mkdir(parents=True)
    (root / "dir/file").write_bytes(b"hello\n")
    (root / "big").write_bytes(bytes(range(256)) * 1500)
    (root / "dir/zeros").write_bytes(bytes(50000))
    os.link(root / "big", root / "dir/link")
    (root / "symlink").symlink_to("dir/file")
    os.mkfifo(root / "fifo")
    (root / "big").chmod(0o4750)
    return root


def expected_of(root: Path) -> dict[str, dict[str, Any]]:
    """What inspect must say of the tree."""
    found = {}
    for path in [root, *root.rglob("*")]:
        status = path.lstat()
        name = "/" + str(path.relative_to(root)) if path != root else "/"
        fact: dict[str, Any] = {"mode": stat.S_IMODE(status.st_mode), "uid": status.st_uid}
        if stat.S_ISREG(status.st_mode):
            fact |= {"size": status.st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        if path.is_symlink():
            fact["target"] = os.readlink(path)
        found[name] = fact
    return found


@needs_mkfs
@pytest.mark.parametrize(
    "options", [[], ["-zlz4hc"], ["-zlz4hc", "-Efragments"], ["-Enoinline_data"], ["blobdev"]]
)
def test_images_of_mkfs_erofs(options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tree = make_tree(tmp_path / "tree")
    image = tmp_path / "image.erofs"
    ref = [str(image)]
    if options == ["blobdev"]:
        options = ["--chunksize=4096", f"--blobdev={tmp_path}/device"]
        ref += ["--blobs", str(tmp_path / "device")]
    subprocess.run(["mkfs.erofs", *options, str(image), str(tree)], check=True, capture_output=True)
    assert main(["inspect", "--json", "--files", "--digests", *ref]) == 0
    found = {fact["path"]: fact for fact in lines(capsys.readouterr().out)}
    for path, wanted in expected_of(tree).items():
        assert wanted.items() <= found[path].items()
    assert found["/dir/link"]["group"] == "/big"
    assert main(["check", *ref]) == 0
    assert "verified: none" in capsys.readouterr().out


@needs_mkfs
def test_plain_image_is_compared_with_the_digest_of_its_layer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_mkfs(tmp_path / "image", make_tree(tmp_path / "tree"))
    make_layout(tmp_path / "layout", tmp_path / "image")
    ref = f"oci:{tmp_path}/layout:{TAG}"
    assert main(["check", ref]) == 0
    largest = max((tmp_path / "layout/blobs/sha256").iterdir(), key=lambda p: p.stat().st_size)
    with largest.open("r+b") as file:
        file.seek(-10, os.SEEK_END)
        file.write(b"!")
    capsys.readouterr()
    assert main(["check", ref]) == 4
    assert largest.name in capsys.readouterr().err


def test_summary_for_people_names_format_files_and_blobs(
    testdata: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", f"oci:{testdata}/nydusify/layout:zstd"]) == 0
    text = capsys.readouterr().out
    assert "rafs6, blocks of 4096, verified: blake3" in text
    assert "385 reg, 79 dir, 5 lnk, 1 chr, 1 blk" in text
    assert "8d4ff28b35a45dbe806d375205a4a9e0fceaf8c15b692b83f8175f86096c5e1a" in text


def test_names_cannot_move_the_cursor(testdata: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "--files", f"oci:{testdata}/nydusify/layout:zstd"]) == 0
    text = capsys.readouterr().out
    assert len(text.splitlines()) == 471  # one name has a line feed in it
    assert "not utf8\\n" in text
