"""What ``cffi_build/kernel.py`` compiles. Only ondemand/syscalls.py imports it."""

from typing import Protocol

class _Lib(Protocol):
    FAN_CLASS_PRE_CONTENT: int
    FAN_CLOEXEC: int
    FAN_NONBLOCK: int
    FAN_UNLIMITED_QUEUE: int
    FAN_UNLIMITED_MARKS: int
    FAN_PRE_ACCESS: int
    FAN_MARK_ADD: int
    FAN_MARK_REMOVE: int
    O_LARGEFILE: int
    FSOPEN_CLOEXEC: int
    FSMOUNT_CLOEXEC: int
    FSCONFIG_SET_FLAG: int
    FSCONFIG_SET_STRING: int
    FSCONFIG_CMD_CREATE: int
    MOUNT_ATTR_RDONLY: int
    MNT_DETACH: int
    MNT_FORCE: int
    UMOUNT_NOFOLLOW: int
    FALLOC_FL_KEEP_SIZE: int
    FALLOC_FL_PUNCH_HOLE: int
    MS_RDONLY: int
    CLONE_FS: int

    def fanotify_init(self, flags: int, event_f_flags: int) -> int: ...
    def k_fanotify_mark(self, group_fd: int, flags: int, mask: int, fd: int) -> int: ...
    def k_fsopen(self, fsname: bytes, flags: int) -> int: ...
    def k_fsconfig(
        self, fs_fd: int, cmd: int, key: bytes | object, value: bytes | object, aux: int
    ) -> int: ...
    def k_fsmount(self, fs_fd: int, flags: int, attr_flags: int) -> int: ...
    def k_move_mount(self, from_fd: int, to_path: bytes) -> int: ...
    def umount2(self, target: bytes, flags: int) -> int: ...
    def fallocate(self, fd: int, mode: int, offset: int, length: int) -> int: ...
    def unshare(self, flags: int) -> int: ...
    def k_read_complete(self, fd: int, msg_id: int) -> int: ...
    def k_fork_mount(self, source: bytes, target: bytes, type: bytes, flags: int, data: bytes) -> int: ...

class _FFI(Protocol):
    NULL: object
    errno: int

    def from_buffer(self, data: object) -> object: ...
    def cast(self, cdecl: str, source: object) -> int: ...

ffi: _FFI
lib: _Lib
