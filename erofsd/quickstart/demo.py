"""The demonstration: image, registry, daemon, lazy mount, a program run from it, figures."""

from __future__ import annotations

import asyncio
import hashlib
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec

from erofsd.api import MountInfo, MountRequest
from erofsd.client import Client, DaemonUnreachable
from erofsd.errors import ErofsdError
from erofsd.quickstart.registry import LayoutRegistry, serve_layout
from erofsd.quickstart.sample import TAG, Sample, make_sample

START_S = 30.0
STOP_S = 20.0
POLL_S = 0.02
READ_PIECE = 128 << 10

#: Imported by a fresh interpreter whose whole library is in the mount: some sixty modules.
PROGRAM = """
import sys
import argparse, asyncio, csv, datetime, decimal, email.message, html, json, logging, tomllib, zipfile
files = {getattr(module, "__file__", None) or "" for module in list(sys.modules.values())}
print(json.dumps(sorted(file for file in files if file.startswith(sys.argv[1]))))
"""


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """The figures of one run.

    Attributes:
        image_bytes, content_bytes: Of the image as it is stored, and of the files in it.
        fetched_bytes: Sent by the registry until the program had ended.
        requests: Answered by the registry until then.
        files_read: Distinct files whose bytes were read through the mount.
        files_compared: Those of them whose bytes were compared with the source's.
        mount_s, program_s: Seconds until the mount could be read; that the program ran.
        repeat_s: Seconds that the same program ran a second time.
        waits: Times a reader had to wait for data.
        complete_s: Seconds to fetch the rest and compare every file of the image.
    """

    engine: str
    image_bytes: int
    content_bytes: int
    fetched_bytes: int
    requests: int
    files: int
    files_read: int
    files_compared: int
    waits: int
    mount_s: float
    program_s: float
    repeat_s: float
    complete_s: float


@dataclass(frozen=True, slots=True)
class Place:
    """Where one run keeps its things; all of it is removed afterwards."""

    root: Path

    @property
    def socket(self) -> Path:
        """The private daemon's."""
        return self.root / "api.sock"

    @property
    def mount(self) -> Path:
        """Where the image is mounted."""
        return self.root / "mnt"

    def remove(self) -> None:
        """Remove all of it, unless an unmount failed."""
        if not os.path.ismount(self.mount):
            shutil.rmtree(self.root, ignore_errors=True)


async def run_demo(base: Path, say: Callable[[str], None]) -> Result:
    """Run the demonstration in a new directory below *base*; *say* hears what happens.

    Raises:
        ErofsdError: What did not work.
    """
    place = Place(Path(tempfile.mkdtemp(prefix="erofsd-quickstart-", dir=base)))
    try:
        place.mount.mkdir()
        say(
            f"erofsd build {place.root}/tree oci:{place.root}/layout:{TAG}    (this machine's Python library)"
        )
        sample = await asyncio.to_thread(make_sample, place.root)
        async with serve_layout(sample.layout) as registry:
            say(f"serve it from a registry of our own at {registry.address}, and start a private daemon")
            async with _daemon(place):
                return await _story(place, sample, registry, say)
    finally:
        place.remove()


async def _story(
    place: Place, sample: Sample, registry: LayoutRegistry, say: Callable[[str], None]
) -> Result:
    ref = f"docker://{registry.address}/quickstart:{TAG}"
    async with Client(place.socket) as client:
        say(f"erofsd mount {ref} {place.mount}")
        began = time.monotonic()
        await client.mount(MountRequest(ref=ref, dir=str(place.mount)))
        mount_s = time.monotonic() - began
        try:
            say("run a Python program whose whole library is in the mount")
            began = time.monotonic()
            read = await _run_program(place)
            program_s = time.monotonic() - began
            fetched, requests = registry.traffic.bytes, registry.traffic.requests
            seen = await _mounted(client, place)
            began = time.monotonic()
            await _run_program(place)
            repeat_s = time.monotonic() - began
            say("read every file, and compare it with the source")
            began = time.monotonic()
            compared = await asyncio.to_thread(_compare, sample.tree, place.mount)
            complete_s = time.monotonic() - began
        finally:
            await client.unmount(str(place.mount))
    return Result(
        engine=seen.engine,
        image_bytes=sample.image_size,
        content_bytes=sample.content_size,
        fetched_bytes=fetched,
        requests=requests,
        files=sample.files,
        files_read=read,
        files_compared=compared,
        waits=seen.waits,
        mount_s=mount_s,
        program_s=program_s,
        repeat_s=repeat_s,
        complete_s=complete_s,
    )


@asynccontextmanager
async def _daemon(place: Place) -> AsyncIterator[None]:
    """A daemon of our own, with nothing of this machine's configuration."""
    config = place.root / "config.toml"
    config.write_text("")
    log_path = place.root / "daemon.log"
    with log_path.open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *("-m", "erofsd", "serve", "--config", str(config), "--socket", str(place.socket)),
            *("--state-dir", str(place.root / "state")),
            stdin=asyncio.subprocess.DEVNULL,
            stderr=log,
            stdout=log,
            start_new_session=True,  # a ^C is ours to handle: unmount first, then stop it
        )
    try:
        async with asyncio.timeout(START_S):
            while not await _answers(place.socket):
                if process.returncode is not None:
                    raise ErofsdError(f"the daemon ended with {process.returncode}", hint=_tail(log_path))
                await asyncio.sleep(POLL_S)
        yield
    except TimeoutError as exc:
        raise ErofsdError(f"the daemon did not answer within {START_S:g} s", hint=_tail(log_path)) from exc
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGTERM)
            try:
                async with asyncio.timeout(STOP_S):
                    await process.wait()
            except TimeoutError:
                process.kill()
                await process.wait()


async def _answers(socket: Path) -> bool:
    try:
        async with Client(socket, patience_s=1.0) as client:
            await client.daemon()
    except DaemonUnreachable:
        return False
    return True


def _tail(log: Path) -> str:
    lines = log.read_text("utf-8", "replace").strip().splitlines()
    return "its log ends with: " + " | ".join(lines[-5:]) if lines else "its log is empty"


async def _mounted(client: Client, place: Place) -> MountInfo:
    for mount in await client.mounts():
        if mount.dir == str(place.mount):
            return mount
    raise ErofsdError(f"{place.mount} is not mounted any more")


async def _run_program(place: Place) -> int:
    """Run PROGRAM with its library in the mount; returns how many files of the mount it used."""
    library = place.mount / "python"
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-S", "-B", "-c", PROGRAM, str(place.mount)),
        env={"PYTHONPATH": f"{library}:{library / 'lib-dynload'}", "PATH": os.environ.get("PATH", "")},
        cwd="/",
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        out, err = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
    if process.returncode:
        raise ErofsdError(
            f"the program run from the mount ended with {process.returncode}",
            hint=err.decode("utf-8", "replace").strip()[-300:],
        )
    return len(msgspec.json.decode(out, type=list[str]))


def _compare(tree: Path, mount: Path) -> int:
    """Compare every file of *mount* with its source; returns their number.

    Raises:
        ErofsdError: Two files differ, or one cannot be read.
    """
    count = 0
    for directory, _, names in os.walk(tree):
        for name in names:
            source = Path(directory, name)
            path = mount / source.relative_to(tree)
            try:
                same = _digest(source) == _digest(path)
            except OSError as exc:
                raise ErofsdError(f"{path}: {exc.strerror}") from exc
            if not same:
                raise ErofsdError(f"{path} does not equal {source}: this is a bug in erofsd")
            count += 1
    return count


def _digest(path: Path) -> bytes:
    # os.read and never mmap: a page fault on a lazy file would stop this whole process, registry included.
    hasher = hashlib.sha256()
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        while piece := os.read(fd, READ_PIECE):
            hasher.update(piece)
    finally:
        os.close(fd)
    return hasher.digest()
