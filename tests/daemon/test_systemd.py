"""The daemon as a service: what a service manager keeps for it, and what that is good for."""

from __future__ import annotations

import configparser
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from erofsd.daemon import systemd
from erofsd.daemon.systemd import ManagerSilent, ServiceManager, short_name, take_stored
from tests import rafs
from tests.conftest import ROOT
from tests.daemon.conftest import BASE, Daemon, wait_for
from tests.daemon.manager import Manager
from tests.daemon.test_mounts import assert_content, drop_caches, run_readers, tree
from tests.registry import Exchange, Origin

ALWAYS = ["journal", "listener", "lock", "served"]
EXEC_WORD_MAX = 128 << 10  # MAX_ARG_STRLEN, include/uapi/linux/binfmts.h
UNIT = ROOT / "packaging" / "systemd" / "erofsd.service"


class Service(Daemon):
    """``erofsd serve``, started by a manager."""

    manager: Manager

    def start(self) -> Service:
        command = [sys.executable, "-m", "erofsd", "serve", *self._options()]
        with open(self.log_path, "ab") as log:
            self.process = self.manager.start([*command, "--state-dir", str(self.state_dir)], log)
        return self

    def wait_ready(self) -> Service:
        """Wait until the process that was started last has said that it is ready."""
        before = len(self.manager.told("READY"))
        assert self.process is not None
        process = self.process
        wait_for(lambda: len(self.manager.told("READY")) > before or process.poll() is not None, "READY=1")
        assert process.poll() is None, self.log()
        return self

    def kill_all(self) -> None:
        """As systemd does when the main process has died."""
        for who in ("keeper", "worker"):
            os.kill(self.pid(who), signal.SIGKILL)
        assert self.process is not None
        self.process.wait()
        wait_for(lambda: not psutil.pid_exists(self.pid("worker")), "the worker's end")

    def hand_over(self) -> int:
        """As systemd does to restart; returns the exit code."""
        assert self.process is not None
        self.process.send_signal(signal.SIGUSR1)
        return self.process.wait(timeout=20)

    def blobs(self) -> list[str]:
        """Names of stored blobs in the store."""
        return [n for n in self.manager.names if n not in ALWAYS and not n.startswith("engine-")]


@pytest.fixture
def make_service(engine_here: str) -> Iterator[Callable[..., Service]]:
    """Makes services that are ready; all end with the test, and all they mounted."""
    made: list[Service] = []

    def make(store_max: int = 4096, watchdog_s: float = 0, **config: Any) -> Service:
        directory = Path(tempfile.mkdtemp(prefix="erofsd-test-", dir=BASE))
        service = Service(directory, **{"deadline": 30, **config})
        service.manager = Manager(directory, store_max=store_max, watchdog_s=watchdog_s)
        made.append(service)
        return service.start().wait_ready()

    yield make
    for service in made:
        service.manager.going.set()
        service.destroy()
        service.manager.close()
        shutil.rmtree(service.directory, ignore_errors=True)


@pytest.fixture
def service(make_service: Callable[..., Service]) -> Service:
    return make_service()


class Slow:
    """An image whose source answers only once it is let go."""

    def __init__(self, origin: Origin, directory: Path, seed: int) -> None:
        self.files = tree(seed, count=20)
        image = rafs.make_image(self.files, chunk_size=64 << 10)
        self.boot = rafs.write_files(image, directory)
        self.url = origin.url
        self.going = threading.Event()
        self.going.set()
        for blob_id, data in image.blobs.items():
            origin.objects[f"/{blob_id}"] = data
            origin.always[f"/{blob_id}"] = self._answer

    def _answer(self, exchange: Exchange) -> None:
        self.going.wait(60)
        exchange.honest()

    def mount(self, service: Daemon) -> Path:
        mounted = service.mount(f"file:{self.boot}", "--blobs", self.url)
        drop_caches()
        return mounted


@pytest.fixture
def slow(origin: Origin, tmp_path: Path) -> Iterator[Slow]:
    image = Slow(origin, tmp_path, seed=31)
    yield image
    image.going.set()


def waiting(readers: list[threading.Thread]) -> bool:
    """True when all of them wait in the kernel."""
    states = [Path(f"/proc/self/task/{reader.native_id}/stat").read_text() for reader in readers]
    return all(state.rpartition(")")[2].split()[0] == "D" for state in states)


def test_what_must_survive_is_stored_before_a_mount_returns_and_only_as_long_as_it_must(
    service: Service, engine_here: str, slow: Slow
) -> None:
    engines = [name for name in service.manager.names if name.startswith("engine-")]
    assert f"engine-{engine_here}" in engines
    assert service.manager.names == sorted(ALWAYS + engines)
    mounted = slow.mount(service)
    if engine_here == "fanotify":
        assert [len(name) for name in service.blobs()] == [len(short_name(""))]
    service.cli("prefetch", mounted)
    wait_for(lambda: not service.blobs(), "the complete blob to leave the store")
    assert service.manager.names == sorted(ALWAYS + engines)


def test_readers_of_a_service_that_is_killed_whole_wait_and_get_right_bytes(
    service: Service, slow: Slow
) -> None:
    mounted = slow.mount(service)
    device = os.stat(mounted).st_dev
    slow.going.clear()
    readers, wrong = run_readers(mounted, slow.files)
    wait_for(lambda: waiting(readers), "all readers to wait")
    service.kill_all()
    assert waiting(readers)
    service.start().wait_ready()
    assert waiting(readers)
    slow.going.set()
    for reader in readers:
        reader.join()
    assert not wrong
    assert service.ls(mounted)["errors"] == 0
    assert os.stat(mounted).st_dev == device  # not mounted anew
    assert service.events("keeper.continued")


def test_readers_survive_a_service_that_is_killed_whole_again_and_again(service: Service, slow: Slow) -> None:
    mounted = slow.mount(service)
    device = os.stat(mounted).st_dev
    for _ in range(3):
        readers, wrong = run_readers(mounted, slow.files)
        service.kill_all()
        service.start().wait_ready()
        for reader in readers:
            reader.join()
        assert not wrong
        drop_caches()
    assert service.ls(mounted)["errors"] == 0
    assert os.stat(mounted).st_dev == device


def test_a_restart_hands_over_and_leaves_mounts_alone(service: Service, slow: Slow) -> None:
    mounted = slow.mount(service)
    device = os.stat(mounted).st_dev
    slow.going.clear()
    readers, wrong = run_readers(mounted, slow.files)
    wait_for(lambda: waiting(readers), "all readers to wait")
    worker = service.pid("worker")
    assert service.hand_over() == 0
    assert not psutil.pid_exists(worker)
    assert waiting(readers)
    service.start().wait_ready()
    slow.going.set()
    for reader in readers:
        reader.join()
    assert not wrong
    assert os.stat(mounted).st_dev == device
    assert service.ls(mounted)["errors"] == 0
    assert not service.events("mount.suspect")


def test_a_stop_unmounts_after_a_restart_too(service: Service, slow: Slow) -> None:
    mounted = slow.mount(service)
    assert service.hand_over() == 0
    service.start().wait_ready()
    assert service.stop() == 0
    assert not os.path.ismount(mounted)
    assert service.manager.told("STOPPING") == ["1"]
    client(service.manager).settle()
    assert service.manager.names == []
    service.start().wait_ready()
    assert_content(mounted, slow.files)


def test_an_order_to_stop_outranks_a_restart(service: Service, slow: Slow) -> None:
    mounted = slow.mount(service)
    keeper = service.process
    assert keeper is not None
    keeper.send_signal(signal.SIGSTOP)  # so that it finds both
    keeper.send_signal(signal.SIGUSR1)
    keeper.send_signal(signal.SIGTERM)
    keeper.send_signal(signal.SIGCONT)
    assert keeper.wait(timeout=20) == 0
    assert not os.path.ismount(mounted)


def test_an_order_to_stop_that_comes_too_early_is_followed_later(service: Service, slow: Slow) -> None:
    mounted = slow.mount(service)
    service.hand_over()
    process = service.start().process
    assert process is not None
    status = Path(f"/proc/{process.pid}/status")
    blocked = 1 << (signal.SIGTERM - 1)
    wait_for(lambda: int(re.search(r"SigBlk:\s*(\w+)", status.read_text())[1], 16) & blocked, "the block")
    process.terminate()
    assert process.wait(timeout=20) == 0
    assert not os.path.ismount(mounted)


def test_a_worker_that_becomes_the_keeper_says_so(service: Service, slow: Slow) -> None:
    mounted = slow.mount(service)
    worker = service.pid("worker")
    stored = service.manager.names
    os.kill(service.pid("keeper"), signal.SIGKILL)
    wait_for(lambda: service.manager.told("MAINPID") == [str(worker)], "MAINPID=")
    wait_for(lambda: service.pid("worker") != worker, "a new worker")
    assert_content(mounted, slow.files)
    wait_for(lambda: len(service.manager.told("READY")) == 2, "READY=1 of the new one")
    wait_for(lambda: not service.blobs(), "the complete blob to leave the store")
    assert service.manager.names == [name for name in stored if not name.startswith("b")]


def test_a_mount_is_refused_when_the_store_is_full(service: Service, slow: Slow, fanotify_here: None) -> None:
    service.manager.store_max = len(service.manager.names)
    stored = service.manager.names
    target = service.directory / "refused"
    target.mkdir()
    reply = service.cli("mount", f"file:{slow.boot}", target, "--blobs", slow.url, check=False)
    assert reply.returncode == 1
    assert "FileDescriptorStoreMax=" in reply.stderr
    assert not os.path.ismount(target)
    assert service.manager.names == stored
    service.manager.store_max += 10
    assert_content(slow.mount(service), slow.files)


def test_without_a_store_a_restart_unmounts_and_mounts(
    make_service: Callable[..., Service], slow: Slow
) -> None:
    service = make_service(store_max=0)
    assert service.events("store.missing")
    mounted = slow.mount(service)
    assert service.hand_over() == 0
    assert not os.path.ismount(mounted)
    service.start().wait_ready()
    assert_content(mounted, slow.files)


def test_without_a_manager_the_keeper_executes_itself_anew(daemon: Daemon, slow: Slow) -> None:
    mounted = slow.mount(daemon)
    device = os.stat(mounted).st_dev
    keeper, worker = daemon.pid("keeper"), daemon.pid("worker")
    readers, wrong = run_readers(mounted, slow.files)
    os.kill(keeper, signal.SIGUSR1)
    wait_for(lambda: daemon.pid("worker") != worker, "a new worker")
    for reader in readers:
        reader.join()
    assert not wrong
    assert daemon.pid("keeper") == keeper
    assert daemon.ls(mounted)["errors"] == 0
    assert os.stat(mounted).st_dev == device
    assert daemon.stop() == 0
    assert not os.path.ismount(mounted)


def test_a_hung_worker_is_replaced_before_the_watchdog_bites(
    make_service: Callable[..., Service], slow: Slow
) -> None:
    service = make_service(watchdog_s=3)
    mounted = slow.mount(service)
    alive = len(service.manager.told("WATCHDOG"))
    wait_for(lambda: len(service.manager.told("WATCHDOG")) > alive + 1, "signs of life")
    worker = service.pid("worker")
    os.kill(worker, signal.SIGSTOP)
    wait_for(lambda: service.events("worker.hung"), "the worker to be given up")
    wait_for(lambda: service.pid("worker") != worker, "another worker")
    assert_content(mounted, slow.files)
    alive = len(service.manager.told("WATCHDOG"))
    wait_for(lambda: len(service.manager.told("WATCHDOG")) > alive, "a sign of life of the new one")


def test_a_restart_with_another_state_directory_is_refused_while_readers_wait(
    service: Service, slow: Slow
) -> None:
    mounted = slow.mount(service)
    slow.going.clear()
    readers, wrong = run_readers(mounted, slow.files)
    wait_for(lambda: waiting(readers), "all readers to wait")
    service.hand_over()
    former, service.state_dir = service.state_dir, service.directory / "other"
    process = service.start().process
    assert process is not None
    assert process.wait(timeout=20) == 1
    assert str(former) in service.log()
    assert waiting(readers)
    service.state_dir = former
    service.start().wait_ready()
    slow.going.set()
    for reader in readers:
        reader.join()
    assert not wrong


def test_a_restart_may_move_the_socket(service: Service, slow: Slow) -> None:
    mounted = slow.mount(service)
    service.hand_over()
    service.socket = service.directory / "moved.sock"
    service.start().wait_ready()
    assert service.ls(mounted)["dir"] == str(mounted)
    assert_content(mounted, slow.files)


def test_a_keeper_killed_before_everything_was_stored_is_followed_by_a_fresh_one(
    make_service: Callable[..., Service], tmp_path: Path
) -> None:
    service = make_service()
    assert service.stop() == 0
    manager = service.manager
    for name in ("journal", "served", "sentinel"):
        ServiceManager({"NOTIFY_SOCKET": str(manager._path)}).store(
            name, os.open(tmp_path, os.O_RDONLY | os.O_CLOEXEC)
        )
    manager._process({"FDSTOREREMOVE": "1", "FDNAME": "lock"}, [])
    service.start().wait_ready()
    assert service.ls() == []
    assert {"journal", "listener", "lock", "served"} <= set(manager.names)
    assert "sentinel" not in manager.names


# --- the protocol alone ---


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Manager]:
    made = Manager(tmp_path)
    yield made
    made.close()


def client(manager: Manager) -> ServiceManager:
    return ServiceManager({"NOTIFY_SOCKET": str(manager._path)})


def test_a_descriptor_is_stored_when_store_returns_true(manager: Manager, tmp_path: Path) -> None:
    manager.store_max = 3
    ours = [os.open(tmp_path, os.O_RDONLY) for _ in range(3)]
    # One place is needed to see that there was another.
    assert [client(manager).store(f"n{k}", fd) for k, fd in enumerate(ours)] == [True, True, False]
    client(manager).drop("n0")
    client(manager).settle()
    assert "n0" not in manager.names
    for fd in ours:
        os.close(fd)


def test_a_silent_manager_is_an_error_in_time(
    manager: Manager, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(systemd, "ANSWER_LIMIT_S", 0.05)
    manager.going.clear()
    with pytest.raises(ManagerSilent):
        client(manager).settle()
    with pytest.raises(ManagerSilent):
        ServiceManager({"NOTIFY_SOCKET": str(tmp_path / "nobody")}).settle()
    ServiceManager({"NOTIFY_SOCKET": str(tmp_path / "nobody")}).tell(READY=1)


def test_without_a_manager_nothing_happens(tmp_path: Path) -> None:
    alone = ServiceManager({})
    alone.tell(READY=1)
    alone.settle()
    assert not alone.store("name", 0)


def test_stored_descriptors_of_another_process_are_left_alone() -> None:
    environment = {"LISTEN_FDS": "2", "LISTEN_PID": "1", "LISTEN_FDNAMES": "a:b"}
    assert take_stored(environment) == []
    assert environment == {}


def test_watchdog_settings_of_another_process_are_left_alone() -> None:
    theirs = {"NOTIFY_SOCKET": "/nowhere", "WATCHDOG_USEC": "60000000", "WATCHDOG_PID": "1"}
    assert ServiceManager(theirs).watchdog_s == 0
    assert ServiceManager({**theirs, "WATCHDOG_PID": str(os.getpid())}).watchdog_s == 60


# --- the unit ---


def unit() -> dict[str, str]:
    parser = configparser.ConfigParser(strict=False, interpolation=None)
    parser.optionxform = str  # type: ignore[assignment]
    parser.read(UNIT)
    return {key: value for section in parser.values() for key, value in section.items()}


def test_all_names_of_a_full_store_fit_into_one_word_for_execve() -> None:
    name = short_name("0" * 180)
    assert re.fullmatch(r"[a-z0-9]+", name)
    store_max = int(unit()["FileDescriptorStoreMax"])
    assert len("LISTEN_FDNAMES=") + store_max * (len(name) + 1) + 200 < EXEC_WORD_MAX


def test_the_unit_says_what_the_daemon_relies_on() -> None:
    assert (
        unit().items()
        >= {
            "Type": "notify",
            "NotifyAccess": "all",
            "KillMode": "mixed",
            "Restart": "always",
            "RestartKillSignal": "SIGUSR1",
            "RuntimeDirectoryPreserve": "restart",
            "StartLimitIntervalSec": "0",
            "OOMPolicy": "continue",
        }.items()
    )


def test_systemd_accepts_the_unit(tmp_path: Path) -> None:
    program = shutil.which("systemd-analyze")
    if program is None:
        pytest.skip("no systemd-analyze here")
    copy = tmp_path / UNIT.name
    copy.write_text(re.sub(r"^ExecStart=\S+", "ExecStart=/bin/true", UNIT.read_text(), flags=re.MULTILINE))
    reply = subprocess.run([program, "verify", "--man=no", copy], capture_output=True, text=True)
    mentioned = [line for line in reply.stderr.splitlines() if UNIT.name in line]
    assert not mentioned
