"""What outlives any one process of the daemon, and the three ways in which a keeper comes by it.

- The worker of a dead keeper executes itself anew as keeper: the descriptors are its own, the rest comes in a
  memfd (`Inheritance.execute_keeper`, `Inheritance.adopt`).
- Under systemd, keeper and worker may die together: when the main process ends, the manager kills what is
  left of the service. So every descriptor is in its store as well, from before the first mark that depends
  on it until after that is gone, and comes back with the next start (`_from_store`).
- Else it is made (`_create`).

Names in the store: ``lock``, ``listener``, ``journal``, then ``engine-NAME``, in this order, so that where
there is an engine's, all is there; ``served``, a memfd with the reasons why other engines do not work, once a
worker has served; and for each incomplete blob a short name (`systemd.short_name`): which blob that is, the
descriptor's own path tells.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import structlog

from erofsd.config import Config
from erofsd.daemon.systemd import ManagerSilent, ServiceManager, short_name, take_stored
from erofsd.errors import ErofsdError
from ondemand.engines import fanotify, probe
from ondemand.engines.cachefiles import open_device
from ondemand.errors import EngineUnavailable
from ondemand.journal import Journal

INHERITANCE_ENVIRONMENT = "EROFSD_INHERITANCE"  # number of a memfd that holds an Inheritance as JSON
ENDS = frozenset({signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT})
"""Signals that end a keeper in order. A terminal sends three of them to keeper and worker at once: if both
died of one, nobody would hold the group."""
STRAYS = frozenset({signal.SIGUSR2, signal.SIGALRM, signal.SIGVTALRM, signal.SIGPROF, signal.SIGIO})
"""Signals that mean nothing to us, but would end us, too."""
ORDERS = ENDS | {signal.SIGUSR1}
"""What a keeper is told by signals: SIGUSR1 hands over."""

_ENGINE = "engine-"

log = structlog.get_logger("erofsd.keeper")


@dataclass(slots=True)
class Inheritance:
    """Descriptors that outlive any one process; the numbers are the owner's own.

    Attributes:
        engines: Name of each engine that works here to the descriptor that its requests come from:
            fanotify's group, the cachefiles device.
        why_not: Name of each other engine to reason and remedy.
        journal: memfd of the journal.
        listener: The API's listening Unix socket.
        lock: The lock on the state directory.
        blobs: Name of a stored blob to a descriptor of it, opened before its mark.
        served: True once a worker has served with these: what is mounted was guarded ever since.
        stored: True if the service manager's store has all of these, too.
    """

    engines: dict[str, int]
    why_not: dict[str, Sequence[str]]
    journal: int
    listener: int
    lock: int
    blobs: dict[str, int] = field(default_factory=dict)
    served: bool = False
    stored: bool = False

    def descriptors(self) -> list[int]:
        """All of them."""
        return [self.journal, self.listener, self.lock, *self.engines.values(), *self.blobs.values()]

    def execute_keeper(self) -> NoReturn:
        """Become the keeper: execute this program anew with these descriptors.

        Raises:
            OSError: The program is not there any more.
        """
        # In time, the service manager takes this process for the main one, and does not end the service.
        ServiceManager(os.environ).tell(MAINPID=os.getpid())
        memory = os.memfd_create("erofsd-inheritance", 0)
        fields = {name: getattr(self, name) for name in self.__slots__}
        os.write(memory, json.dumps(fields).encode())
        for fd in self.descriptors():
            os.set_inheritable(fd, True)
        environment = {**os.environ, INHERITANCE_ENVIRONMENT: str(memory)}
        if "WATCHDOG_PID" in environment:
            environment["WATCHDOG_PID"] = str(os.getpid())
        # An order that comes from now on waits until the new keeper can take it.
        signal.pthread_sigmask(signal.SIG_BLOCK, ORDERS)
        try:
            os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, ORDERS)
            os.close(memory)

    @classmethod
    def adopt(cls) -> Inheritance | None:
        """What a predecessor left to this process, if it did."""
        number = os.environ.pop(INHERITANCE_ENVIRONMENT, None)
        if number is None:
            return None
        with open(int(number), "rb") as memory:
            memory.seek(0)
            fields = json.load(memory)
        # The program may have been replaced in between: what only one of the two versions knows is left out.
        inheritance = cls(**{name: fields[name] for name in cls.__slots__ if name in fields})
        for fd in inheritance.descriptors():
            os.set_inheritable(fd, False)
        log.warning("keeper.replaced", pid=os.getpid(), blobs=len(inheritance.blobs))
        return inheritance


def obtain(config: Config, manager: ServiceManager) -> Inheritance:
    """Take over what there is, or make what there is not.

    Raises:
        ErofsdError: Another daemon serves this state directory or socket; or what is stored belongs to
            another state directory, whose readers still need it.
    """
    inheritance = Inheritance.adopt()
    if inheritance is None:
        inheritance = _from_store(config, manager) or _create(config)
        _store(inheritance, manager)
    for name in STARTERS:
        # Not one that a predecessor had tried in vain: mounts that it left alone would be taken for guarded.
        if name not in inheritance.engines and name not in inheritance.why_not:
            _start_engine(name, inheritance, config, manager)
    return inheritance


def note_served(inheritance: Inheritance, manager: ServiceManager) -> None:
    """A worker serves with these descriptors: whoever finds them need not doubt what is mounted."""
    inheritance.served = True
    if not inheritance.stored:
        return
    memory = os.memfd_create("erofsd-served")
    try:
        os.write(memory, json.dumps(inheritance.why_not).encode())
        manager.drop("served")
        manager.store("served", memory)
    except ManagerSilent as exc:
        log.warning("manager.silent", error=str(exc), consequence="the next start mounts everything anew")
    finally:
        os.close(memory)


def forget_stored(inheritance: Inheritance, manager: ServiceManager) -> None:
    """Everything is unmounted: a start that follows, for whatever reason, begins anew."""
    if inheritance.stored:
        blobs = (short_name(name) for name in inheritance.blobs)
        engines = (_ENGINE + name for name in inheritance.engines)
        for name in ("journal", "served", *blobs, *engines, "listener", "lock"):
            manager.drop(name)


def _create(config: Config) -> Inheritance:
    state_dir = Path(config.state_dir)
    state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    lock = os.open(state_dir / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as exc:
        os.close(lock)
        raise ErofsdError(
            f"another erofsd serves the state directory {state_dir}",
            hint="use `erofsd ls` to see it, or give this one its own --state-dir and --socket",
        ) from exc
    listener = _listen(Path(config.socket))
    journal = os.memfd_create("erofsd-journal", os.MFD_CLOEXEC)
    Journal.create(journal)
    return Inheritance({}, {}, journal, listener.detach(), lock)


# -- the service manager's store ------------------------------------------------------------------------


def _from_store(config: Config, manager: ServiceManager) -> Inheritance | None:
    fds: dict[str, int] = {}
    stray = []
    for name, fd in take_stored(os.environ):
        if name in fds or (name != "served" and not _is_ours(name)):
            stray.append((name, fd))
        else:
            fds[name] = fd
    if not fds.keys() >= {"lock", "listener", "journal"}:
        # Killed before all was stored. There was no engine yet, so nothing is guarded by these.
        stray += fds.items()
        fds.clear()
    for name, fd in stray:
        os.close(fd)
        if name not in fds:
            manager.drop(name)
    if not fds:
        if stray:
            manager.settle()  # the lock, for one, is free only when the manager has closed it, too
        return None
    _check_state_dir(fds["lock"], Path(config.state_dir))
    served = fds.get("served")
    engines = {name.removeprefix(_ENGINE): fd for name, fd in fds.items() if name.startswith(_ENGINE)}
    inheritance = Inheritance(
        engines={name: engines[name] for name in [*STARTERS, *engines] if name in engines},
        why_not={} if served is None else _load_json(served),
        journal=fds["journal"],
        listener=_same_or_new_listener(fds["listener"], Path(config.socket), manager),
        lock=fds["lock"],
        blobs={_blob_name(fd): fd for name, fd in fds.items() if _is_blob(name)},
        served=served is not None,
        stored=True,
    )
    if served is not None:
        os.close(served)
    log.info("keeper.continued", pid=os.getpid(), blobs=len(inheritance.blobs))
    return inheritance


def _is_blob(name: str) -> bool:
    return len(name) == len(short_name("")) and name.startswith("b")


def _is_ours(name: str) -> bool:
    return name in ("lock", "listener", "journal") or name.startswith(_ENGINE) or _is_blob(name)


def _blob_name(fd: int) -> str:
    """The file is ``blobs/NAME.data``; its name may be gone while the descriptor lives."""
    path = os.readlink(f"/proc/self/fd/{fd}").removesuffix(" (deleted)")
    return path.rpartition("/")[2].removesuffix(".data")


def _load_json(fd: int) -> dict[str, Sequence[str]]:
    found: dict[str, Sequence[str]] = json.loads(os.pread(fd, os.fstat(fd).st_size, 0))
    return found


def _check_state_dir(lock: int, state_dir: Path) -> None:
    try:
        same = os.path.samestat(os.fstat(lock), os.stat(state_dir / "lock"))
    except FileNotFoundError:
        same = False
    if not same:
        # Whoever waits for its blobs would get zeros if they were let go.
        former = os.readlink(f"/proc/self/fd/{lock}").rpartition("/")[0]
        raise ErofsdError(
            f"state directory {state_dir}: mounts of {former} are still being kept",
            hint="another state directory needs a stop and a start, which unmount: a restart hands over",
        )


def _same_or_new_listener(fd: int, path: Path, manager: ServiceManager) -> int:
    with socket.socket(fileno=fd) as listener:
        if listener.getsockname() == str(hidden(path)) and (path.exists() or hidden(path).exists()):
            return listener.detach()
    # The configuration names another one, or somebody removed it.
    new = _listen(path).detach()
    manager.drop("listener")
    manager.store("listener", new)
    return new


def _store(inheritance: Inheritance, manager: ServiceManager) -> None:
    if not manager.present or inheritance.stored:
        return
    try:
        names = ("lock", "listener", "journal")
        inheritance.stored = all(manager.store(name, getattr(inheritance, name)) for name in names)
        reason = "the unit has no store"
    except ManagerSilent as exc:
        reason = str(exc)
    if not inheritance.stored:
        log.warning(
            "store.missing",
            reason=reason,
            consequence="mounts do not outlive keeper and worker together",
            hint="FileDescriptorStoreMax= and NotifyAccess=all in the unit",
        )


# -- engines --------------------------------------------------------------------------------------------


def _start_fanotify(state_dir: Path) -> int:
    found = probe("fanotify", str(state_dir))
    if not found.works:
        raise EngineUnavailable(found.reason, found.hint)
    return fanotify.open_group()


def _start_cachefiles(state_dir: Path) -> int:
    directory = state_dir / "cachefiles"
    directory.mkdir(mode=0o700, exist_ok=True)
    return open_device(directory)


STARTERS: Mapping[str, Callable[[Path], int]] = {
    "fanotify": _start_fanotify,
    "cachefiles": _start_cachefiles,
}
"""What makes the descriptor of each engine, in the order in which ``auto`` prefers them."""


def _start_engine(name: str, inheritance: Inheritance, config: Config, manager: ServiceManager) -> None:
    try:
        fd = STARTERS[name](Path(config.state_dir))
    except EngineUnavailable as exc:
        inheritance.why_not[name] = (exc.reason, exc.hint)
        return
    if inheritance.stored and not manager.store(_ENGINE + name, fd):
        os.close(fd)
        inheritance.why_not[name] = (
            "the service manager keeps no more descriptors",
            "FileDescriptorStoreMax= in the unit",
        )
        return
    inheritance.engines[name] = fd


# -- the API's socket -----------------------------------------------------------------------------------


def hidden(path: Path) -> Path:
    """Where the socket *path* waits until the worker can answer."""
    return path.with_name(f".{path.name}.starting")


def _listen(path: Path) -> socket.socket:
    """A listening socket beside *path*, moved there once the worker can answer."""
    path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    with socket.socket(socket.AF_UNIX) as client:
        try:
            client.connect(str(path))
        except OSError as exc:
            if exc.errno not in (errno.ENOENT, errno.ECONNREFUSED, errno.ENOTSOCK):
                raise ErofsdError(f"socket {path}: {exc.strerror}") from exc
        else:
            raise ErofsdError(f"another erofsd answers on {path}", hint="give this one its own --socket")
    listener = socket.socket(socket.AF_UNIX)
    hidden(path).unlink(missing_ok=True)
    old_mask = os.umask(0o177)
    try:
        listener.bind(str(hidden(path)))
    except OSError as exc:
        raise ErofsdError(
            f"socket {path}: {exc.strerror}", hint="a Unix socket's path has at most 107 bytes"
        ) from exc
    finally:
        os.umask(old_mask)
    listener.listen(1024)
    return listener
