"""What is left of a conversion that failed or was killed, and how the next one goes on with it."""

from __future__ import annotations

import fcntl
import gzip
import hashlib
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from erofsd.build.workdir import WorkDir
from tests.build import tars
from tests.build.ordinary import Layout, convert, erofsd, tree_tar
from tests.registry import Exchange, Origin, wait_until

BOTTOM = tree_tar(tars.file(b"bottom", random.Random(2).randbytes(400_000)))
TOP = tree_tar(tars.file(b"top", random.Random(3).randbytes(900_000)))
TOP_LAYER = gzip.compress(TOP, 2, mtime=0)  # not what the layout has


@pytest.fixture
def layout(tmp_path: Path, origin: Origin) -> Layout:
    """An image whose upper layer has to be fetched from *origin*."""
    origin.objects["/top"] = TOP_LAYER
    made = Layout(tmp_path / "source")
    top: dict[str, Any] = {
        "mediaType": "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip",
        "digest": f"sha256:{hashlib.sha256(TOP_LAYER).hexdigest()}",
        "size": len(TOP_LAYER),
        "urls": [f"{origin.url}/top"],
    }
    made.image("source", layers=[made.layer(BOTTOM), top])
    made.image("plain", BOTTOM, TOP)
    return made


def ranges(origin: Origin) -> list[str]:
    """What was asked for, request by request."""
    return [headers.get("Range", "") for method, _, headers in origin.seen if method == "GET"]


def test_killed_conversion_goes_on_where_it_was(layout: Layout, origin: Origin, tmp_path: Path) -> None:
    def stall(exchange: Exchange) -> None:
        exchange.head(206, len(TOP_LAYER), Content_Range=f"bytes 0-{len(TOP_LAYER) - 1}/{len(TOP_LAYER)}")
        exchange.handler.wfile.write(TOP_LAYER[:300_000])
        exchange.hang()

    origin.lie("/top", stall)
    work = tmp_path / "work"
    command = [layout.ref("source"), f"oci:{tmp_path}/out:x", "--work-dir", str(work)]
    process = subprocess.Popen([sys.executable, "-m", "erofsd", "convert", *command])
    try:
        wait_until(lambda: list(work.glob("layers/*")), "the first layer")
        fetched = work / "fetched" / f"sha256-{hashlib.sha256(TOP_LAYER).hexdigest()}"
        wait_until(lambda: fetched.exists() and fetched.stat().st_size == 300_000, "a part of the second")
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (tmp_path / "out").exists()
    origin.seen.clear()
    outcome = convert(*command)
    assert (outcome["layers"], outcome["layers_reused"], outcome["checked"]) == (2, 1, True)
    assert ranges(origin) == [f"bytes=300000-{len(TOP_LAYER) - 1}"]
    erofsd("check", f"oci:{tmp_path}/out:x", "--against", layout.ref("plain"))
    assert not list(work.glob("fetched/*"))
    assert not list(work.glob("scratch*"))


def test_layer_that_breaks_off_goes_on_at_that_byte(layout: Layout, origin: Origin, tmp_path: Path) -> None:
    origin.lie("/top", lambda exchange: (exchange.honest(cut=200_000), exchange.close()))
    convert(layout.ref("source"), f"oci:{tmp_path}/out:x")
    assert ranges(origin)[-1] == f"bytes=200000-{len(TOP_LAYER) - 1}"
    erofsd("check", f"oci:{tmp_path}/out:x", "--against", layout.ref("plain"))


def test_layer_that_arrives_damaged_is_refused_and_fetched_anew(
    layout: Layout, origin: Origin, tmp_path: Path
) -> None:
    origin.always["/top"] = lambda exchange: exchange.honest(flip=len(TOP_LAYER) - 100)
    command = (layout.ref("source"), f"oci:{tmp_path}/out:x", "--work-dir", tmp_path / "work")
    done = erofsd("convert", *command, check=False)
    assert (done.returncode, "digest" in done.stderr) == (4, True)
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()
    del origin.always["/top"]
    assert convert(*command)["layers_reused"] == 1


def test_work_directory_of_its_own_is_gone_when_all_is_done(
    layout: Layout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, origin: Origin
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    origin.always["/top"] = lambda exchange: exchange.answer(404)
    done = erofsd("convert", layout.ref("source"), f"oci:{tmp_path}/out:x", check=False)
    assert done.returncode == 5
    assert list((tmp_path / "cache" / "erofsd").iterdir())
    del origin.always["/top"]
    assert convert(layout.ref("source"), f"oci:{tmp_path}/out:x")["layers_reused"] == 1
    assert not list((tmp_path / "cache" / "erofsd").iterdir())


def test_what_killed_runs_have_left_is_cleared_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name in ("new", "old", "busy", "empty"):
        directory = tmp_path / "erofsd" / f"build-{name}"
        for part in ("blobs", "layers", "fetched", "uploads", "scratch-x"):
            (directory / part).mkdir(parents=True)
        (directory / "scratch-x" / "much").write_bytes(bytes(1000))
        (directory / "lock").touch()
        if name != "empty":
            (directory / "layers" / "one").touch()
    long_ago = time.time() - 8 * 24 * 3600
    for name in ("old", "busy"):
        os.utime(tmp_path / "erofsd" / f"build-{name}", (long_ago, long_ago))
    with (tmp_path / "erofsd" / "build-busy" / "lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with WorkDir(None, "something else") as work:
            left = {path.name: path for path in (tmp_path / "erofsd").iterdir() if path != work.path}
            assert set(left) == {"build-new", "build-busy"}
            assert not (left["build-new"] / "scratch-x").exists()
            assert (left["build-new"] / "layers" / "one").exists()
            assert (left["build-busy"] / "scratch-x" / "much").exists()


@pytest.mark.parametrize("command", ["convert", "convert --format erofs", "build", "convert --to oci"])
def test_full_disk_is_one_clear_error(layout: Layout, tmp_path: Path, command: str) -> None:
    source = layout.ref("plain")
    if command == "build":
        source = str(tmp_path / "tree")
        (tmp_path / "tree").mkdir()
        (tmp_path / "tree" / "file").write_bytes(random.Random(1).randbytes(900_000))
    elif command.endswith("oci"):
        convert(source, f"oci:{tmp_path}/lazy:x")
        source = f"oci:{tmp_path}/lazy:x"
    cache = tmp_path / "cache"
    done = subprocess.run(
        [sys.executable, "-m", "erofsd", *command.split(), source, f"oci:{tmp_path}/out:x"],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000)),
        env={**os.environ, "XDG_CACHE_HOME": str(cache)},
        capture_output=True,
        text=True,
    )
    error, hint = done.stderr.splitlines()
    assert done.returncode == 1
    assert f"erofsd: {cache}/erofsd/build-" in error
    assert error.endswith("File too large")
    assert "--work-dir" in hint
    assert not (tmp_path / "out").exists()
    assert not list(cache.glob("erofsd/*/scratch-*"))


def test_damaged_record_is_made_anew(layout: Layout, tmp_path: Path) -> None:
    work = tmp_path / "work"
    command = (layout.ref("plain"), f"oci:{tmp_path}/out:x", "--work-dir", work)
    first = convert(*command)
    one, other = sorted(work.glob("layers/*"))
    one.write_bytes(one.read_bytes()[:50])
    other.write_bytes(b"nonsense")
    second = convert(*command)
    assert (second["layers_reused"], second["digest"]) == (0, first["digest"])


def test_image_that_is_not_its_source_is_not_published(
    layout: Layout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = tmp_path / "work"
    command = (layout.ref("plain"), f"oci:{tmp_path}/out:x", "--work-dir", work, "--compression", "none")
    convert(layout.ref("plain"), f"oci:{tmp_path}/other:x", *command[2:])
    for blob in work.glob("blobs/*"):  # a disk that lies
        with blob.open("r+b") as file:
            file.seek(1000)
            byte = file.read(1)
            file.seek(1000)
            file.write(bytes([byte[0] ^ 1]))
    done = erofsd("convert", *command, check=False)
    assert done.returncode == 4
    assert "blake3" in done.stderr
    assert not (tmp_path / "out").exists()


def test_warnings_come_again_with_a_remembered_layer(layout: Layout, tmp_path: Path) -> None:
    odd = tree_tar(
        tars.pax((b"SCHILY.xattr.strange.name", b"1")), tars.file(b"odd", b"1"), tars.file(b"even", b"2")
    )
    layout.image("odd", odd)
    command = (layout.ref("odd"), f"oci:{tmp_path}/out:x", "--work-dir", tmp_path / "work")
    first, second = convert(*command), convert(*command)
    assert second["layers_reused"] == 1
    assert first["warnings"] == second["warnings"]
    assert "strange.name" in json.dumps(first["warnings"])
