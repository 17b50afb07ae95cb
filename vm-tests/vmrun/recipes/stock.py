"""Debian's binary kernels, extracted and not installed; for on-demand mode with two modules rebuilt.

No Debian kernel enables ``CACHEFILES_ONDEMAND``, but no code outside ``fs/cachefiles`` and ``fs/erofs`` tests
the symbols, so those two modules built alone fit the unmodified kernel. They go to ``updates/``, which
modprobe prefers.

The headers are downloaded and extracted as well: installing them pulls a kernel and an initrd onto the host.
"""

from __future__ import annotations

import gzip
import os
import re
import shutil
import subprocess
from pathlib import Path

from vmrun import cache, packages
from vmrun.errors import RunnerError

from . import source

_REVISION = b"1"  # raise when the steps below change what comes out
_TOOLS = ("gcc-12", "make", "kmod", "libelf1", "xz-utils")
_INITRD_TOOLS = ("busybox-static", "cpio")
_MODULES = ("cachefiles", "erofs")
# In a kernel without these two built in, the root cannot be mounted before an initrd loads them.
_ROOT_MODULES = ("virtio_pci", "virtiofs")

# Per module: which objects become unconditional, and what IS_ENABLED() and #ifdef shall see.
_MAKEFILE_EDITS = {
    "cachefiles": ("cachefiles-$(CONFIG_CACHEFILES_ONDEMAND)", "cachefiles-y", ("CACHEFILES_ONDEMAND",)),
    "erofs": ("erofs-$(CONFIG_EROFS_FS_ONDEMAND)", "erofs-y", ("EROFS_FS_ONDEMAND", "CACHEFILES_ONDEMAND")),
}

# The suite whose kernels have pre-content events, and the packages it may have them in.
_FANOTIFY_SUITE = "trixie-backports"
_SPLIT = re.compile(
    r"linux-binary-(.*-cloud-amd64)"
)  # from 6.19: kernel, modules and config in three packages
_WHOLE = re.compile(r"linux-image-(\d.*-cloud-amd64)")


def fingerprint() -> str:
    """Names the recipe for kernels with rebuilt modules."""
    return cache.fingerprint(b"on-demand", _REVISION)


def fingerprint_fanotify() -> str:
    """Names the recipe for the fanotify kernel, and the version prefix asked for, if any."""
    return cache.fingerprint(b"fanotify", _REVISION, _wanted_fanotify_prefix().encode())


def source_version(series: str) -> str | None:
    """Version of the installed source package, which the kernel image has to match."""
    return packages.installed_version(source.package(series))


def build_on_demand(name: str, series: str) -> cache.Built:
    """Extract Debian's cloud kernel of *series* and rebuild its two modules: about a minute, no kernel build.

    Raises:
        RunnerError: No image of exactly the source's version is in the archive, or a step failed.
    """
    packages.ensure([source.package(series), *_TOOLS, *(["pahole"] if series != "6.1" else [])])
    version = source_version(series)
    assert version is not None
    archive = packages.Archive()
    release = _image_matching(archive, series, version)
    with cache.scratch(name) as work:
        made = work / "made"
        archive.extract([f"linux-image-{release}={version}"], work / "debs", made)
        _flatten(made)
        built = [*_rebuild_modules(name, archive, series, version, release, work)]
        updates = made / "lib/modules" / release / "updates"
        updates.mkdir(parents=True)
        for module in built:
            subprocess.run(["strip", "--strip-debug", "-o", updates / module.name, module], check=True)
        files = _finish(made, release, made / f"boot/vmlinuz-{release}")
        return cache.publish(name, made, fingerprint(), version, release, files)


def build_fanotify(name: str) -> cache.Built:
    """Extract the newest complete cloud kernel of the backports; ``$EROFSD_VM_FANOTIFY``: of that prefix."""
    packages.ensure(["kmod"])
    with cache.scratch(name) as work:
        archive = packages.PrivateArchive(work / "apt", _FANOTIFY_SUITE)
        release, version, wanted = _newest_complete(archive, _wanted_fanotify_prefix())
        made = work / "made"
        archive.extract([f"{package}={version}" for package in wanted], work / "debs", made)
        _flatten(made)
        kernel = made / "lib/modules" / release / "vmlinuz"
        files = _finish(made, release, kernel if kernel.exists() else made / f"boot/vmlinuz-{release}")
        return cache.publish(name, made, fingerprint_fanotify(), version, release, files)


def _wanted_fanotify_prefix() -> str:
    return os.environ.get("EROFSD_VM_FANOTIFY", "")


def _image_matching(archive: packages.Archive, series: str, version: str) -> str:
    """The release whose cloud image has exactly *version*: other versions' modules would not load."""
    # 6.1 counts ABIs (6.1.0-56-cloud-amd64), later kernels carry the version (6.12.117+deb12-cloud-amd64).
    found = archive.search(rf"linux-image-{re.escape(series)}\.[0-9][0-9a-z.+-]*-cloud-amd64")
    for package, image_version in found.items():
        if image_version == version:
            return package.removeprefix("linux-image-")
    raise RunnerError(
        f"no linux-image-{series}*-cloud-amd64 of version {version} in the archive: "
        f"upgrade {source.package(series)} so that source and image agree"
    )


def _newest_complete(archive: packages.Archive, prefix: str) -> tuple[str, str, list[str]]:
    """Release, version and packages of the newest kernel of which all parts are in the archive.

    Backports keep shells of old kernels: some have a ``linux-binary`` package whose modules are gone.
    """
    names = archive.search(r"linux-(binary|modules|base|image)-[0-9].*-cloud-amd64")
    complete: list[tuple[str, str, list[str]]] = []
    for package, version in names.items():
        if match := _SPLIT.fullmatch(package):
            parts = [f"linux-{part}-{match[1]}" for part in ("binary", "modules", "base")]
        elif (match := _WHOLE.fullmatch(package)) and f"linux-binary-{match[1]}" not in names:
            parts = [package]
        else:
            continue
        if all(names.get(part) == version for part in parts) and match[1].startswith(prefix):
            complete.append((match[1], version, parts))
    usable = [
        kernel for kernel in complete if _numbers(kernel[0]) >= (6, 15)
    ]  # pre-content events with ranges
    if not usable:
        raise RunnerError(f"{_FANOTIFY_SUITE} has no complete cloud kernel {prefix or 'from 6.15 on'}")
    return max(usable, key=lambda kernel: _numbers(kernel[0]))


def _numbers(release: str) -> tuple[int, ...]:
    head = re.match(r"[\d.]+", release)
    return tuple(int(part) for part in head[0].strip(".").split(".")) if head else ()


def _flatten(made: Path) -> None:
    """Make ``lib/modules`` the place in packages of any age: from trixie on it is ``usr/lib/modules``."""
    if not (made / "lib").exists():
        (made / "lib").symlink_to("usr/lib")


def _rebuild_modules(
    name: str, archive: packages.Archive, series: str, version: str, release: str, work: Path
) -> list[Path]:
    """Build cachefiles.ko and erofs.ko with on-demand mode against the extracted headers."""
    tree = source.unpack(series, work, [f"fs/{module}" for module in _MODULES])
    headers = work / "headers"
    archive.extract(
        [
            f"linux-headers-{release}={version}",
            f"linux-headers-{release.removesuffix('-cloud-amd64')}-common={version}",
            f"{_kbuild_package(archive, series, version)}={version}",
        ],
        work / "debs",
        headers,
    )
    usr_src = headers / "usr/src"
    makefile = usr_src / f"linux-headers-{release}" / "Makefile"
    makefile.write_text(makefile.read_text().replace("/usr/src", str(usr_src)))
    objects = []
    for module in _MODULES:
        directory = tree / "fs" / module
        _enable_on_demand(directory / "Makefile", module)
        # The headers name their own compiler: no CC= here.
        source.make(name, makefile.parent, f"M={directory}", "modules", compiler=None)
        objects.append(directory / f"{module}.ko")
    return objects


def _kbuild_package(archive: packages.Archive, series: str, version: str) -> str:
    """The package with the build scripts: linux-kbuild-6.1, but linux-kbuild-6.12.117+deb12."""
    for package, kbuild_version in archive.search(rf"linux-kbuild-{re.escape(series)}[0-9a-z.+-]*").items():
        if kbuild_version == version:
            return package
    raise RunnerError(f"no linux-kbuild-{series}* of version {version} in the archive")


def _enable_on_demand(makefile: Path, module: str) -> None:
    """Turn the on-demand parts of *module* on in its Makefile, whatever the kernel's configuration says."""
    conditional, always, symbols = _MAKEFILE_EDITS[module]
    text = makefile.read_text()
    if conditional not in text:
        raise RunnerError(f"{makefile}: {conditional} not found; this source lays the module out differently")
    flags = " ".join(f"-DCONFIG_{symbol}=1" for symbol in symbols)
    makefile.write_text(f"ccflags-y += {flags}\n" + text.replace(conditional, always))


def _finish(made: Path, release: str, kernel: Path) -> dict[str, str]:
    """Index the modules, make an initrd where the kernel needs one, and say which file is what."""
    subprocess.run(["depmod", "-b", made, release], check=True)
    shutil.rmtree(made / "usr/share", ignore_errors=True)
    files = {"kernel": str(kernel.relative_to(made)), "modules": "."}
    if not _built_in(made, release, _ROOT_MODULES[-1]):
        packages.ensure(_INITRD_TOOLS)
        (made / "initrd").write_bytes(_initrd(made, release))
        files["initrd"] = "initrd"
    return files


def _built_in(made: Path, release: str, module: str) -> bool:
    listing = (made / "lib/modules" / release / "modules.builtin").read_text()
    return f"/{module}.ko" in listing


def _initrd(made: Path, release: str) -> bytes:
    """A busybox initrd that loads what the root needs, mounts it and starts the guest's init there."""
    tree = made.parent / "initrd"
    for directory in ("bin", "mods", "new", "proc"):
        (tree / directory).mkdir(parents=True)
    shutil.copy("/bin/busybox", tree / "bin/busybox")
    order: list[Path] = []
    for module in _ROOT_MODULES:
        show = ["modprobe", "-d", str(made), "-S", release, "--show-depends", module]
        reply = subprocess.run(show, check=True, capture_output=True, text=True)
        order += [Path(line.split()[1]) for line in reply.stdout.splitlines() if line.startswith("insmod")]
    order = list(dict.fromkeys(order))
    for path in order:
        shutil.copy(path, tree / "mods" / path.name)
    script = [
        "#!/bin/busybox sh",
        "/bin/busybox mount -t proc proc /proc",
        *(f"/bin/busybox insmod /mods/{path.name}" for path in order),
        "for word in $(/bin/busybox cat /proc/cmdline); do",
        "    case $word in init=*) init=${word#init=};; esac",
        "done",
        "/bin/busybox mount -t virtiofs -o ro hostroot /new",
        "/bin/busybox mount -t devtmpfs devtmpfs /new/dev",  # without an initrd the kernel itself does that
        "/bin/busybox umount /proc",
        "exec /bin/busybox switch_root /new $init",
    ]
    (tree / "init").write_text("\n".join(script) + "\n")
    (tree / "init").chmod(0o755)
    listing = "\n".join(str(path.relative_to(tree)) for path in sorted(tree.rglob("*")))
    cpio = ["cpio", "-o", "-H", "newc", "--quiet"]
    archive = subprocess.run(cpio, cwd=tree, input=listing.encode(), check=True, capture_output=True)
    return gzip.compress(archive.stdout, mtime=0)
