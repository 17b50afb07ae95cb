"""Builds ``ondemand._kernel``: the system calls that Python's ``os`` does not have.

The numbers come from the headers where these know them. What Debian 12's headers lack, and what glibc older
than 2.36 has no function for, is added by ``#ifndef`` with the value of the kernel's own header.
"""

from cffi import FFI

ffibuilder = FFI()

ffibuilder.set_source(
    "ondemand._kernel",
    """
    #ifndef _GNU_SOURCE
    #define _GNU_SOURCE
    #endif
    #include <fcntl.h>
    #include <errno.h>
    #include <linux/falloc.h>
    #include <sched.h>
    #include <stdint.h>
    #include <sys/fanotify.h>
    #include <sys/ioctl.h>
    #include <sys/mount.h>
    #include <sys/syscall.h>
    #include <unistd.h>

    /* include/uapi/linux/fanotify.h, "fanotify: introduce FAN_PRE_ACCESS permission event", Linux 6.14 */
    #ifndef FAN_PRE_ACCESS
    #define FAN_PRE_ACCESS 0x00100000
    #endif

    /* include/uapi/linux/mount.h; these system calls have one number on every architecture */
    #ifndef SYS_move_mount
    #define SYS_move_mount 429
    #endif
    #ifndef SYS_fsopen
    #define SYS_fsopen 430
    #endif
    #ifndef SYS_fsconfig
    #define SYS_fsconfig 431
    #endif
    #ifndef SYS_fsmount
    #define SYS_fsmount 432
    #endif
    #ifndef FSOPEN_CLOEXEC
    #define FSOPEN_CLOEXEC 0x00000001
    #define FSMOUNT_CLOEXEC 0x00000001
    #define MOVE_MOUNT_F_EMPTY_PATH 0x00000004
    #define MOUNT_ATTR_RDONLY 0x00000001
    #define FSCONFIG_SET_FLAG 0
    #define FSCONFIG_SET_STRING 1
    #define FSCONFIG_CMD_CREATE 6
    #endif

    /* include/uapi/linux/cachefiles.h, "cachefiles: implement on-demand read", Linux 5.19 */
    #ifndef CACHEFILES_IOC_READ_COMPLETE
    #define CACHEFILES_IOC_READ_COMPLETE _IOW(0x98, 1, int)
    #endif

    #ifndef SYS_close_range
    #define SYS_close_range 436
    #endif

    static int k_fanotify_mark(int group_fd, unsigned int flags, uint64_t mask, int fd)
    {
        return fanotify_mark(group_fd, flags, mask, fd, NULL);
    }

    static int k_fsopen(const char *fsname, unsigned int flags)
    {
        return syscall(SYS_fsopen, fsname, flags);
    }

    static int k_fsconfig(int fs_fd, unsigned int cmd, const char *key, const char *value, int aux)
    {
        return syscall(SYS_fsconfig, fs_fd, cmd, key, value, aux);
    }

    static int k_fsmount(int fs_fd, unsigned int flags, unsigned int attr_flags)
    {
        return syscall(SYS_fsmount, fs_fd, flags, attr_flags);
    }

    static int k_move_mount(int from_fd, const char *to_path)
    {
        return syscall(SYS_move_mount, from_fd, "", AT_FDCWD, to_path, MOVE_MOUNT_F_EMPTY_PATH);
    }

    static int k_read_complete(int fd, unsigned long msg_id)
    {
        return ioctl(fd, CACHEFILES_IOC_READ_COMPLETE, msg_id);
    }

    /* _Fork() and not fork(): no handlers run in the child, which does nothing but system calls. */
    static int k_fork_mount(const char *source, const char *target, const char *type, unsigned long flags,
                            const char *data)
    {
        int pid = _Fork();
        if (pid != 0)
            return pid;
        if (syscall(SYS_close_range, 0, ~0U, 0) != 0)
            _exit(errno);
        _exit(mount(source, target, type, flags, data) == 0 ? 0 : errno);
    }
    """,
)

ffibuilder.cdef("""
    typedef int... off_t;

    #define FAN_CLASS_PRE_CONTENT ...
    #define FAN_CLOEXEC ...
    #define FAN_NONBLOCK ...
    #define FAN_UNLIMITED_QUEUE ...
    #define FAN_UNLIMITED_MARKS ...
    #define FAN_PRE_ACCESS ...
    #define FAN_MARK_ADD ...
    #define FAN_MARK_REMOVE ...
    #define O_LARGEFILE ...

    #define FSOPEN_CLOEXEC ...
    #define FSMOUNT_CLOEXEC ...
    #define FSCONFIG_SET_FLAG ...
    #define FSCONFIG_SET_STRING ...
    #define FSCONFIG_CMD_CREATE ...
    #define MOUNT_ATTR_RDONLY ...
    #define MNT_DETACH ...
    #define MNT_FORCE ...
    #define UMOUNT_NOFOLLOW ...

    #define FALLOC_FL_KEEP_SIZE ...
    #define FALLOC_FL_PUNCH_HOLE ...

    #define MS_RDONLY ...
    #define CLONE_FS ...

    int fanotify_init(unsigned int flags, unsigned int event_f_flags);
    int k_fanotify_mark(int group_fd, unsigned int flags, uint64_t mask, int fd);
    int k_fsopen(const char *fsname, unsigned int flags);
    int k_fsconfig(int fs_fd, unsigned int cmd, const char *key, const char *value, int aux);
    int k_fsmount(int fs_fd, unsigned int flags, unsigned int attr_flags);
    int k_move_mount(int from_fd, const char *to_path);
    int umount2(const char *target, int flags);
    int fallocate(int fd, int mode, off_t offset, off_t length);
    int unshare(int flags);
    int k_read_complete(int fd, unsigned long msg_id);
    int k_fork_mount(const char *source, const char *target, const char *type, unsigned long flags,
                     const char *data);
""")

if __name__ == "__main__":
    ffibuilder.compile(verbose=True)
