"""The kernel's own part, without our engine: an image mounted by fsid, read, and read again from the cache.

Tells a kernel that was built wrong from an engine that is wrong. Messages: include/uapi/linux/cachefiles.h.

kernels: on-demand
time limit: 180 s under emulation, 30 s else
"""

import fcntl
import mmap
import os
import random
import select
import struct
import subprocess
from pathlib import Path

STATE = Path("/var/lib/erofsd")
OPEN, CLOSE, READ = 0, 1, 2
READ_COMPLETE = 0x40049801  # _IOW(0x98, 1, int)


class Server:
    """Answers requests out of one image file and counts them."""

    def __init__(self, image: Path) -> None:
        self.reads = 0
        self._image = image.read_bytes()
        self._objects: dict[int, int] = {}
        self._device = os.open("/dev/cachefiles", os.O_RDWR | os.O_CLOEXEC)
        cache = STATE / "cache-root"
        cache.mkdir()
        for command in (f"dir {cache}", "tag scenario", "bind ondemand"):
            os.write(self._device, command.encode())

    def serve_until_ended(self, *command: str) -> None:
        """Answer requests while *command* runs, and after it until nothing is asked any more."""
        with subprocess.Popen(command, stdin=subprocess.DEVNULL) as process:
            while process.poll() is None or self._ready(0):
                if self._ready(20):
                    self._answer(os.read(self._device, 1024))
        assert process.returncode == 0, command

    def _ready(self, timeout_ms: int) -> bool:
        poll = select.poll()
        poll.register(self._device, select.POLLIN)
        return bool(poll.poll(timeout_ms))

    def _answer(self, message: bytes) -> None:
        if not message:
            return
        msg_id, opcode, _, object_id = struct.unpack_from("=IIII", message)
        if opcode == OPEN:
            (self._objects[object_id],) = struct.unpack_from("=I", message, 24)
            os.set_inheritable(self._objects[object_id], False)
            os.write(self._device, f"copen {msg_id},{len(self._image)}".encode())
        elif opcode == READ:
            self.reads += 1
            offset, length = struct.unpack_from("=QQ", message, 16)
            piece = self._image[offset : offset + length]
            with mmap.mmap(-1, length) as buffer:  # page-aligned, zero-padded
                buffer[: len(piece)] = piece
                os.pwrite(self._objects[object_id], buffer, offset)
            fcntl.ioctl(self._objects[object_id], READ_COMPLETE, msg_id)
        elif opcode == CLOSE:
            os.close(self._objects.pop(object_id))


def main() -> None:
    tree = STATE / "tree"
    tree.mkdir()
    (tree / "file").write_bytes(random.Random(4).randbytes(3_000_001))
    image, mount_point = STATE / "image", STATE / "mount-point"
    subprocess.run(["mkfs.erofs", "--quiet", image, tree], check=True)
    mount_point.mkdir()
    server = Server(image)
    mount = ("mount", "-t", "erofs", "-o", "fsid=scenario", "none", str(mount_point))
    compare = ("cmp", str(tree / "file"), str(mount_point / "file"))

    server.serve_until_ended(*mount)
    server.serve_until_ended(*compare)
    first = server.reads
    assert first > 0, "nothing was asked: the bytes came from nowhere"
    server.serve_until_ended("umount", str(mount_point))

    server.serve_until_ended(*mount)
    server.serve_until_ended(*compare)
    assert server.reads == first, "complete, yet asked again after a remount"
    server.serve_until_ended("umount", str(mount_point))
    print(f"{first} reads, none the second time")


main()
