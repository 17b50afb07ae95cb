"""The proof that /dev/cachefiles serves EROFS: a tiny image is mounted, and its hole filled when asked."""

from __future__ import annotations

import errno
import mmap
import os
import select
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

from ondemand import syscalls
from ondemand.binding import BUILD_HINT, RESTORE_HINT, open_device
from ondemand.cachefiles import Device
from ondemand.canary import BLOCK_SIZE, PROBE_TIMEOUT_S, image, pattern
from ondemand.errors import EngineUnavailable, MalformedMessage
from ondemand.fscache import SOURCE, mount_options
from ondemand.wire import cachefiles as wire

_SIZE = 4 * BLOCK_SIZE


def prove_cachefiles(directory: str) -> None:
    """Bind a cache in *directory*, mount an image with a hole, and fill the hole when asked to.

    Takes some ten milliseconds, at worst twice `PROBE_TIMEOUT_S`. Leaves nothing behind, the device closed.
    Not while this or another process has it.

    Raises:
        EngineUnavailable: With what was refused, or went wrong.
    """
    try:
        scratch = Path(tempfile.mkdtemp(prefix=".probe-", dir=directory))
    except OSError as exc:
        raise EngineUnavailable(f"cannot write into {directory}: {exc}") from exc
    try:
        device_fd = open_device(scratch)
        try:
            _prove(Device(device_fd), scratch)
        finally:
            os.close(device_fd)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _prove(device: Device, scratch: Path) -> None:
    try:
        device.command(wire.Restore())
    except OSError as exc:
        raise EngineUnavailable(
            f"restore: {exc.strerror}: a crash of the daemon would leave readers hanging",
            RESTORE_HINT,
        ) from exc
    target = scratch / "mount"
    target.mkdir()
    server = _Server(device)
    try:
        # Names of its own: the objects of a mount of the same names could still be on their way out.
        fsid = scratch.name.lstrip(".")
        server.contents = {fsid.encode(): image([_SIZE]), b"device": pattern(0, _SIZE)}
        options = mount_options(fsid, devices=["device"])
        pid = syscalls.fork_mount(SOURCE, str(target), "erofs", syscalls.MS_RDONLY, options)
        _mounted(server, pid)
        seen = _read(server, target)
    finally:
        server.close()
    if isinstance(seen, OSError):
        raise EngineUnavailable(f"reading a hole failed after {server.reads} requests: {seen}") from seen
    if seen != pattern(0, _SIZE) or not server.reads:
        raise EngineUnavailable(f"a hole was read as something else, with {server.reads} requests")


def _mounted(server: _Server, pid: int) -> None:
    status: list[int] = []

    def ended() -> bool:
        done, code = os.waitpid(pid, os.WNOHANG)
        if done:
            status.append(os.waitstatus_to_exitcode(code))
        return bool(done)

    if not server.serve_until(ended):
        server.close()  # and, in the caller, the device: only that lets go of the mount
        threading.Thread(target=os.waitpid, args=(pid, 0), daemon=True).start()
        raise EngineUnavailable(f"a mount did not end within {PROBE_TIMEOUT_S:.0f} s")
    if status[0]:
        hints = {
            errno.ENODEV: "load the file system: modprobe erofs",
            errno.ENOENT: f"this kernel's EROFS does not know fscache: {BUILD_HINT}",  # "none", as a file
            errno.EINVAL: f"this kernel's EROFS does not know fscache: {BUILD_HINT}",  # fsid, from 7.2 on
            errno.ENOTBLK: f"this kernel's EROFS does not know fscache: {BUILD_HINT}",
        }
        raise EngineUnavailable(f"mount: {os.strerror(status[0])}", hints.get(status[0], ""))


def _read(server: _Server, target: Path) -> bytes | OSError:
    """Read the file in a thread, serve it in this one; unmount, and see the objects closed."""
    seen: list[bytes | OSError] = []

    def read() -> None:
        try:
            try:
                [file] = target.iterdir()
                seen.append(file.read_bytes())
            finally:
                syscalls.umount2(str(target))
        except OSError as exc:
            seen.append(exc)

    reader = threading.Thread(target=read, name="canary", daemon=True)
    reader.start()
    ended = server.serve_until(lambda: not reader.is_alive())
    if not ended:
        server.close()
        try:
            syscalls.umount2(str(target), syscalls.MNT_DETACH)
        except OSError:
            pass  # then it is not there
        raise EngineUnavailable(f"a read did not end within {PROBE_TIMEOUT_S:.0f} s")
    server.serve_until(lambda: not server.objects)  # an unread CLOSE would keep the cache in use
    return seen[0]


class _Server:
    """Answers requests for known contents, one at a time."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self.contents: dict[bytes, bytes] = {}
        self.objects: dict[int, tuple[int, bytes]] = {}
        self.reads = 0
        self._buffer = mmap.mmap(-1, _SIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)

    def serve_until(self, condition: Callable[[], bool]) -> bool:
        """False if *condition* did not come true within the time limit."""
        poll = select.poll()
        poll.register(self._device.fileno(), select.POLLIN)
        give_up = time.monotonic() + PROBE_TIMEOUT_S
        while not condition():
            if time.monotonic() > give_up:
                return False
            if poll.poll(2) and (buf := self._device.read()):
                self._answer(wire.parse(buf))
        return True

    def _answer(self, message: wire.Message) -> None:
        match message:
            case wire.Open():
                os.set_inheritable(message.fd, False)
                content = self.contents.get(message.cookie_key)
                size = -errno.ENOENT if content is None else len(content)
                self.objects[message.object_id] = (message.fd, content or b"")
                self._device.command(wire.Copen(message.msg_id, size))
            case wire.Read():
                if message.object_id not in self.objects:
                    raise MalformedMessage(f"READ of unknown object {message.object_id}")
                fd, content = self.objects[message.object_id]
                piece = content[message.offset : message.offset + message.length]
                self._buffer[: len(piece)] = piece
                self._device.write(fd, memoryview(self._buffer)[: len(piece)], message.offset)
                self._device.complete(fd, message.msg_id)
                self.reads += 1
            case wire.Close():
                if message.object_id in self.objects:
                    os.close(self.objects.pop(message.object_id)[0])

    def close(self) -> None:
        """Close what is still open: with the device, that ends every request."""
        for fd, _ in self.objects.values():
            os.close(fd)
        self.objects.clear()
