"""Real images through real mounts of this host's own kernel."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import rafs
from tests.daemon.conftest import SLOWNESS, Daemon, wait_for
from tests.daemon.trees import assert_same, facts_of, load_facts
from tests.registry import Origin, RegistryServer, need

TAGS = ("zstd", "lz4-128k", "batch", "dict", "index")


def drop_caches() -> None:
    Path("/proc/sys/vm/drop_caches").write_text("3\n")


def engine_events(daemon: Daemon) -> int:
    return int(daemon.metric("erofsd_engine_events_total"))


def tree(seed: int, count: int = 60, size: int = 300_000) -> dict[str, bytes]:
    rng = random.Random(seed)
    files = {f"d{k % 5}/file{k:03d}": rng.randbytes(rng.randrange(1, size)) for k in range(count)}
    files["big"] = b"".join(rng.randbytes(4096) * 16 for _ in range(64))  # 4 MiB that compress
    files["empty"] = b""
    return files


def assert_content(top: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        assert (top / name).read_bytes() == content, name


@pytest.mark.parametrize("tag", TAGS)
def test_nydus_images_from_a_registry_equal_their_facts(
    daemon: Daemon, nydusify: str, testdata: Path, tag: str
) -> None:
    mounted = daemon.mount(f"docker://{nydusify}:{tag}")
    assert_same(facts_of(mounted), load_facts(testdata / "nydusify" / "facts.jsonl"))
    daemon.cli("prefetch", mounted)
    status = daemon.ls(mounted)
    assert status["state"] == "complete"
    assert status["fetched_bytes"] == status["total_bytes"] > 0
    assert status["verified"] == "blake3"
    assert status["errors"] == 0
    daemon.cli("umount", mounted)
    assert daemon.ls() == []


def test_loose_nydus_files_from_a_directory(daemon: Daemon, testdata: Path) -> None:
    texture = testdata / "nydus-texture"
    mounted = daemon.mount(f"file:{texture}/bootstrap/rafs-v6-2.2.boot", "--blobs", texture / "blobs")
    expected = json.loads((texture / "expected" / "expected.json").read_text())
    assert expected
    assert sorted(os.listdir(mounted)) == ["lib.rs", "sync_io.rs"]
    assert len((mounted / "lib.rs").read_bytes()) == 16931


def test_a_blob_with_its_own_bootstrap(daemon: Daemon, testdata: Path) -> None:
    blob = testdata / "nydus-texture/toc/2fa78cad554b75ac91a4a125ed148d0ddeb25efa4aaa8bd80e5dc292690a4dca"
    mounted = daemon.mount(f"file:{blob}")
    assert {p.name: p.stat().st_size for p in mounted.iterdir()} == {
        "error.rs": 2816,
        "lib.rs": 678,
        "logger.rs": 3115,
    }
    assert b"fn " in (mounted / "logger.rs").read_bytes()


@pytest.mark.parametrize("kind", ["encrypted", "rafs-v5", "tarfs"])
def test_other_kinds_of_nydus_images_are_refused_by_name(daemon: Daemon, testdata: Path, kind: str) -> None:
    loose = testdata / "nydusify" / "refuse" / kind
    blobs = loose / "blobs" if (loose / "blobs").is_dir() else loose
    target = daemon.directory / "refused"
    target.mkdir()
    done = daemon.cli("mount", f"file:{loose}/boot", target, "--blobs", blobs, check=False)
    assert done.returncode == 4, done.stderr
    named = {"encrypted": "encrypt", "rafs-v5": "v5", "tarfs": "tarfs"}[kind]
    assert named in done.stderr.lower()
    assert not os.path.ismount(target)


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("-zlz4",),
        ("-zlz4hc,9", "-C65536"),
        ("-zlz4", "-Eztailpacking"),
        ("-zlz4", "-Efragments"),
        ("-Eforce-inode-extended",),
    ],
    ids=["plain", "lz4", "big-pcluster", "ztailpacking", "fragments", "extended"],
)
def test_single_file_images_of_mkfs_erofs(
    daemon: Daemon,
    engine_here: str,
    make_directory: Callable[[], Path],
    tmp_path: Path,
    options: tuple[str, ...],
) -> None:
    source = make_directory()  # on a file system with extended attributes, which tmpfs has of late only
    files = tree(3, count=30, size=60_000) | {"text": b"the same line again and again\n" * 40_000}
    for name, content in files.items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(content)
    (source / "link").symlink_to("d1/file001")
    os.setxattr(source / "big", "user.note", b"a value\n\0")
    image = tmp_path / "image.erofs"
    subprocess.run([need("mkfs.erofs"), "--quiet", *options, image, source], check=True, capture_output=True)
    if engine_here == "cachefiles" and os.uname().release.startswith("6.1."):
        target = daemon.directory / "refused"
        target.mkdir()
        done = daemon.cli("mount", image, target, check=False)
        if any(option.startswith("-z") for option in options):
            assert (done.returncode, "compressed" in done.stderr) == (3, True)
            return
        daemon.cli("umount", target)
    mounted = daemon.mount(str(image))
    drop_caches()
    assert_content(mounted, files)
    assert os.readlink(mounted / "link") == "d1/file001"
    assert os.getxattr(mounted / "big", "user.note") == b"a value\n\0"
    status = daemon.ls(mounted)
    assert (status["verified"], status["format"]) == ("none", "erofs")


def test_chunked_images_with_a_blob_device(daemon: Daemon, tmp_path: Path) -> None:
    source = tmp_path / "source"
    files = tree(4, count=20)
    for name, content in files.items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(content)
    image, device = tmp_path / "image.erofs", tmp_path / "image.blob"
    subprocess.run(
        [need("mkfs.erofs"), "--quiet", "--chunksize=65536", f"--blobdev={device}", image, source],
        check=True,
        capture_output=True,
    )
    mounted = daemon.mount(f"file:{image}", "--blobs", device)
    assert_content(mounted, files)


def test_a_small_read_of_a_large_image_moves_little(
    daemon: Daemon, tmp_path: Path, registry: RegistryServer
) -> None:
    rng = random.Random(5)
    files = {f"f{k:03d}": rng.randbytes(1 << 20) for k in range(200)} | {"small": rng.randbytes(4096)}
    image = rafs.make_image(files)
    rafs.write_layout(image, tmp_path / "layout")
    registry.push_layout(tmp_path / "layout", "latest", "large")
    mounted = daemon.mount(f"docker://{registry.host}/large:latest")
    assert (mounted / "small").read_bytes() == files["small"]
    assert daemon.ls(mounted)["transferred_bytes"] < 3 << 20


def test_a_complete_image_causes_no_events_and_needs_nobody(
    daemon: Daemon, nydusify: str, testdata: Path
) -> None:
    mounted = daemon.mount(f"docker://{nydusify}:zstd")
    daemon.cli("prefetch", mounted)
    before = engine_events(daemon)
    drop_caches()
    for who in ("keeper", "worker"):
        os.kill(daemon.pid(who), signal.SIGSTOP)
    try:
        assert_same(facts_of(mounted), load_facts(testdata / "nydusify" / "facts.jsonl"))
    finally:
        for who in ("keeper", "worker"):
            os.kill(daemon.pid(who), signal.SIGCONT)
    assert engine_events(daemon) == before


def read_everything(top: Path, files: dict[str, bytes], seed: int, wrong: list[str]) -> None:
    """Every 4 KiB page of every file, in random order."""
    rng = random.Random(seed)
    pages = [(name, at) for name, content in files.items() for at in range(0, len(content), 4096)]
    rng.shuffle(pages)
    for name, at in pages:
        fd = os.open(top / name, os.O_RDONLY)
        try:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
            if os.pread(fd, 4096, at) != files[name][at : at + 4096]:
                wrong.append(f"{name}@{at}")
        except OSError as exc:
            wrong.append(f"{name}@{at}: {exc}")
        finally:
            os.close(fd)


def run_readers(
    top: Path, files: dict[str, bytes], count: int = 8
) -> tuple[list[threading.Thread], list[str]]:
    wrong: list[str] = []
    readers = [threading.Thread(target=read_everything, args=(top, files, k, wrong)) for k in range(count)]
    for reader in readers:
        reader.start()
    return readers, wrong


def test_eight_random_readers_get_right_bytes_and_one_fetch_a_chunk(daemon: Daemon, tmp_path: Path) -> None:
    files = tree(6)
    image = rafs.make_image(files, shared=[name for name in files if name.startswith("d1/")])
    boot = rafs.write_files(image, tmp_path)
    mounted = daemon.mount(f"file:{boot}", "--blobs", tmp_path / "blobs")
    readers, wrong = run_readers(mounted, files)
    for reader in readers:
        reader.join()
    assert not wrong
    status = daemon.ls(mounted)
    assert status["state"] == "complete"
    assert status["transferred_bytes"] <= status["total_bytes"] + (256 << 10)  # chunk information beside


def test_readers_survive_a_worker_that_is_killed_every_half_second(
    daemon: Daemon, tmp_path: Path, origin: Origin
) -> None:
    files = tree(7, count=120)
    image = rafs.make_image(files, chunk_size=64 << 10)
    boot = rafs.write_files(image, tmp_path)
    for blob_id, data in image.blobs.items():
        origin.objects[f"/{blob_id}"] = data
    mounted = daemon.mount(f"file:{boot}", "--blobs", origin.url)
    over = threading.Event()
    kills = 0

    def kill() -> None:
        nonlocal kills
        while not over.wait(0.5 * SLOWNESS):  # a worker has to get to work before it is killed
            daemon.kill_worker()
            kills += 1

    killer = threading.Thread(target=kill)
    killer.start()
    wrong: list[str] = []
    while kills < 12 and not wrong:
        drop_caches()
        readers, wrong = run_readers(mounted, files)
        for reader in readers:
            reader.join()
    over.set()
    killer.join()
    assert not wrong
    assert kills >= 12
    assert daemon.ls(mounted)["errors"] == 0


def test_a_killed_keeper_is_replaced_by_the_worker(daemon: Daemon, tmp_path: Path) -> None:
    files = tree(8, count=40)
    boot = rafs.write_files(rafs.make_image(files), tmp_path)
    mounted = daemon.mount(f"file:{boot}", "--blobs", tmp_path / "blobs")
    for _ in range(3):
        keeper, worker = daemon.pid("keeper"), daemon.pid("worker")
        readers, wrong = run_readers(mounted, files, 2)
        os.kill(keeper, signal.SIGKILL)
        wait_for(lambda keeper=keeper: daemon.pid("keeper") != keeper, "a new keeper")
        wait_for(lambda worker=worker: daemon.pid("worker") != worker, "a new worker")
        for reader in readers:
            reader.join()
        assert not wrong
        assert daemon.parent(daemon.pid("worker")) == daemon.pid("keeper")
        assert daemon.ls(mounted)["errors"] == 0
        drop_caches()
    daemon.cli("umount", mounted)


def test_mounting_is_idempotent_and_a_directory_has_one_image(daemon: Daemon, nydusify: str) -> None:
    mounted = daemon.mount(f"docker://{nydusify}:zstd")
    daemon.cli("mount", f"docker://{nydusify}:zstd", mounted)
    assert len(daemon.ls()) == 1
    other = daemon.cli("mount", f"docker://{nydusify}:batch", mounted, check=False)
    assert other.returncode == 1
    assert "is mounted there" in other.stderr
    second = daemon.mount(f"docker://{nydusify}:zstd")
    subprocess.run(["umount", second], check=True)
    wait_for(lambda: len(daemon.ls()) == 1, "umount(8) to be noticed")
    assert daemon.cli("umount", second, check=False).returncode == 1


def test_two_directories_share_one_fetch(daemon: Daemon, tmp_path: Path) -> None:
    files = tree(9, count=20)
    boot = rafs.write_files(rafs.make_image(files), tmp_path)
    first = daemon.mount(f"file:{boot}", "--blobs", tmp_path / "blobs")
    second = daemon.mount(f"file:{boot}", "--blobs", tmp_path / "blobs")
    assert_content(first, files)
    moved = daemon.ls(first)["transferred_bytes"]
    assert_content(second, files)
    assert daemon.ls(second)["state"] == "complete"
    assert daemon.ls(first)["transferred_bytes"] == moved
    daemon.cli("umount", first)
    drop_caches()
    assert_content(second, files)


def test_an_image_with_other_digests_shares_nothing(daemon: Daemon, tmp_path: Path) -> None:
    files = tree(10, count=20)
    image = rafs.make_image(files)
    good = rafs.write_files(image, tmp_path / "good")
    first = daemon.mount(f"file:{good}", "--blobs", tmp_path / "good" / "blobs")
    assert_content(first, files)
    # The same blob id, other bytes, other digests: what a hostile registry could serve under any name.
    (blob_id,) = image.blobs
    evil = rafs.make_image({name: bytes(len(content)) for name, content in files.items()}, compressor="none")
    (evil_id,) = evil.blobs
    boot = evil.bootstrap.replace(evil_id.encode(), blob_id.encode())
    (tmp_path / "evil" / "blobs").mkdir(parents=True)
    (tmp_path / "evil" / "image.boot").write_bytes(boot)
    (tmp_path / "evil" / "blobs" / blob_id).write_bytes(evil.blobs[evil_id])
    second = daemon.mount(f"file:{tmp_path}/evil/image.boot", "--blobs", tmp_path / "evil" / "blobs")
    assert (second / "big").read_bytes() == bytes(len(files["big"]))
    drop_caches()
    assert_content(first, files)


def test_mounts_come_back_without_the_network(daemon: Daemon, tmp_path: Path, origin: Origin) -> None:
    files = tree(11, count=20)
    image = rafs.make_image(files)
    boot = rafs.write_files(image, tmp_path)
    for blob_id, data in image.blobs.items():
        origin.objects[f"/{blob_id}"] = data
    mounted = daemon.mount(f"file:{boot}", "--blobs", origin.url)
    assert (mounted / "big").read_bytes() == files["big"]
    boot.unlink()
    honest, origin.objects = origin.objects, {}
    assert daemon.stop() == 0
    assert not os.path.ismount(mounted)
    daemon.start()
    assert os.path.ismount(mounted)
    assert (mounted / "big").read_bytes() == files["big"]
    origin.objects = honest
    assert_content(mounted, files)
    daemon.cli("umount", mounted)
    assert daemon.stop() == 0
    daemon.start()
    assert daemon.ls() == []


def test_another_mount_namespace_gets_errors_not_zeros_at_the_end(daemon: Daemon, tmp_path: Path) -> None:
    files = tree(12, count=20)
    boot = rafs.write_files(rafs.make_image(files), tmp_path)
    mounted = daemon.mount(f"file:{boot}", "--blobs", tmp_path / "blobs")
    script = (
        "import os, sys; print('ready', flush=True); sys.stdin.readline()\n"
        "try:\n data = open(sys.argv[1], 'rb').read(4096)\n"
        "except OSError as exc: print(exc.errno)\n"
        "else: print('zeros' if not any(data) else 'data')\n"
    )
    other = subprocess.Popen(
        ["unshare", "-m", "--propagation", "private", sys.executable, "-c", script, str(mounted / "big")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert other.stdout is not None
    assert other.stdout.readline() == "ready\n"
    assert daemon.stop() == 1
    out, _ = other.communicate("\n", timeout=20)
    assert int(out) in (errno.EIO, errno.ENOBUFS)  # the latter with cachefiles
    assert str(mounted) in daemon.log()


def test_unmounting_while_another_namespace_reads_goes_on_serving_it(daemon: Daemon, tmp_path: Path) -> None:
    files = tree(13, count=10)
    boot = rafs.write_files(rafs.make_image(files), tmp_path)
    mounted = daemon.mount(f"file:{boot}", "--blobs", tmp_path / "blobs")
    script = (
        "import hashlib, sys; print('ready', flush=True); sys.stdin.readline()\n"
        "print(hashlib.sha256(open(sys.argv[1], 'rb').read()).hexdigest())"
    )
    other = subprocess.Popen(
        ["unshare", "-m", "--propagation", "private", sys.executable, "-c", script, str(mounted / "big")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert other.stdout is not None
    assert other.stdout.readline() == "ready\n"
    daemon.cli("umount", mounted)
    daemon.kill_worker()
    out, _ = other.communicate("\n", timeout=20)
    import hashlib

    assert out.strip() == hashlib.sha256(files["big"]).hexdigest()
    wait_for(lambda: daemon.ls() == [], "the guard of the other namespace to end")


def standalone(directory: Path, *arguments: object) -> list[str]:
    verb = [sys.executable, "-m", "erofsd", "mount", "--standalone", "--config", directory / "config.toml"]
    return [*map(str, verb), *map(str, arguments)]


def test_standalone_ends_with_its_mount(
    engine_here: str, make_directory: Callable[[], Path], tmp_path: Path
) -> None:
    files = tree(14, count=10)
    boot = rafs.write_files(rafs.make_image(files), tmp_path)
    directory = make_directory()
    (directory / "config.toml").write_text(f'state_dir = "{directory}/state"\n')
    target = directory / "mnt"
    target.mkdir()
    process = subprocess.Popen(
        standalone(directory, f"file:{boot}", target, "--blobs", tmp_path / "blobs"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    try:
        assert str(target) in process.stdout.readline()
        assert_content(target, files)
        subprocess.run(["umount", target], check=True)
        assert process.wait(timeout=20) == 0
    finally:
        subprocess.run(["umount", "-l", target], check=False, capture_output=True)
        process.kill()


def test_standalone_says_why_it_cannot(engine_here: str, make_directory: Callable[[], Path]) -> None:
    directory = make_directory()
    (directory / "config.toml").write_text(f'state_dir = "{directory}/state"\n')
    (directory / "mnt").mkdir()
    done = subprocess.run(
        standalone(directory, "/nonexistent/image.erofs", directory / "mnt"),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 5, done.stderr
    assert "/nonexistent/image.erofs" in done.stderr
    assert "Traceback" not in done.stderr
