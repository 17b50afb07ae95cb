"""Images of mkfs.erofs, with and without devices, read right; complete, they cause no READ any more.

Neither with the page cache dropped, nor after a remount, nor with another worker.

kernels: on-demand
time limit: 400 s under emulation, 60 s else
"""

from __future__ import annotations

import hashlib
import os
import random
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fscache_rig import HOME, Keeper, drop_caches

TREE = HOME / "tree"
IMAGES = HOME / "images"


def make_tree() -> None:
    TREE.mkdir(parents=True)
    IMAGES.mkdir()
    dice = random.Random(4)
    (TREE / "large").write_bytes(dice.randbytes(8 << 20))
    for n in range(60):
        size = (0, 1, 100, 4095, 4096, 4097, 20000, 70000)[n % 8]
        (TREE / f"small{n}").write_bytes(dice.randbytes(size))
    (TREE / "deep/er").mkdir(parents=True)
    (TREE / "deep/er/file").write_bytes(dice.randbytes(300000))
    (TREE / "link").symlink_to("deep/er/file")
    with (TREE / "sparse").open("wb") as sparse:
        sparse.write(b"start")
        sparse.truncate(1 << 20)


def make_image(name: str, *arguments: str) -> None:
    subprocess.run(["mkfs.erofs", "--quiet", *arguments, IMAGES / name, TREE], check=True)


def sums(root: Path) -> dict[str, str]:
    return {
        str(path.relative_to(root)): os.readlink(path)
        if path.is_symlink()
        else hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_symlink() or path.is_file()
    }


def file_content(name: str):
    path = IMAGES / name

    def read(offset: int, length: int) -> bytes:
        with path.open("rb", buffering=0) as file:
            data = os.pread(file.fileno(), length, offset)
        return data + bytes(length - len(data))

    return path.stat().st_size, read


def main() -> None:
    make_tree()
    make_image("plain")
    make_image("meta", "--chunksize=65536", f"--blobdev={IMAGES}/blob")
    expected = sums(TREE)
    mounts = {
        "plain": "fsid=plain",
        "meta": "fsid=meta,device=blob",
        "shared": "fsid=meta,domain_id=domain,device=blob",
    }
    contents = {name.encode(): file_content(name) for name in ("plain", "meta", "blob")}
    with Keeper(contents) as keeper:
        for name, options in mounts.items():
            target = keeper.mount(name, options)
            assert sums(target) == expected, f"{name}: wrong, cold"
        cold = keeper.shared["reads"]
        for name in mounts:
            drop_caches()
            assert sums(HOME / name) == expected, f"{name}: wrong, warm"
        keeper.replace_worker()
        for name in mounts:
            drop_caches()
            assert sums(HOME / name) == expected, f"{name}: wrong, another worker"
        for name, options in mounts.items():
            keeper.unmount(HOME / name)
            target = keeper.mount(name, options)
            assert sums(target) == expected, f"{name}: wrong, mounted again"
        assert keeper.shared["reads"] == cold, f"{keeper.shared['reads'] - cold} READs of complete data"
    print(f"{len(mounts)} mounts of {len(expected)} files right four times, {cold} READs, all of them cold")


main()
