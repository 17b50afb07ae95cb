"""What ``vm-tests/run`` promises, tried on every selected kernel."""

from __future__ import annotations

import hashlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import HERE, Guest
from vmrun import roots

PYTHON = sys.executable  # the checkout's own environment, used in the guest under the same path


@pytest.mark.parametrize("code", [0, 3, 77])
def test_ends_with_the_commands_exit_code(guest: Guest, code: int) -> None:
    assert guest.run("sh", "-c", f"exit {code}").returncode == code


def test_output_comes_back_separate_and_unaltered(guest: Guest, tmp_path: Path) -> None:
    source = tmp_path / "bytes"
    source.write_bytes(os.urandom(10_000_000))
    script = 'cat "$0"; tail -c 100000 "$0" >/dev/stderr; printf end >/dev/stderr'
    reply = guest.run("sh", "-c", script, source)
    assert reply.returncode == 0
    assert hashlib.sha256(reply.stdout).digest() == hashlib.sha256(source.read_bytes()).digest()
    assert reply.stderr == source.read_bytes()[-100_000:] + b"end"


def test_output_is_relayed_while_the_command_runs(guest: Guest, tmp_path: Path) -> None:
    out = tmp_path / "out"
    # The command goes on only after the reader of its output has said so, on a directory that both see.
    script = 'echo first; while [ ! -e "$VM_OUT/seen" ]; do sleep 0.1; done; echo second'
    with subprocess.Popen(
        [*guest.arguments(), "--", "sh", "-c", script],
        env={**os.environ, **guest.environment, "VM_OUT": str(out)},
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"first\n"
        (out / "seen").touch()
        assert process.stdout.read() == b"second\n"
    assert process.returncode == 0


def test_command_sees_directory_environment_and_arguments_of_the_caller(guest: Guest, tmp_path: Path) -> None:
    cwd = tmp_path / "a b\n'c\" $d"
    cwd.mkdir()
    words = ["", "two words", "line\nbreak", "'\"\\$(x)`y`*", "-n", "--", "ünï", b"\xff\xfe"]
    program = "import os, sys; print([os.getcwd(), sys.argv[1:], dict(os.environ), os.read(0, 1)], end='')"
    odd = {"npm_config_x-y": "1", "EMPTY": "", "LINES_": "a\nb '\"$", "é": "ü"}
    reply = guest.run(PYTHON, "-c", program, *words, cwd=cwd, **odd)
    assert reply.returncode == 0, reply.stderr
    seen_cwd, seen_words, seen_environment, stdin = eval(reply.stdout)
    assert seen_cwd == str(cwd)
    assert [os.fsencode(word) for word in seen_words] == [os.fsencode(word) for word in words]
    assert stdin == b""
    expected = {**os.environ, **guest.environment, **odd, "VM_KERNEL": guest.kernel}
    assert {name: seen_environment.get(name) for name in expected if name != "PYTEST_CURRENT_TEST"} == {
        name: value for name, value in expected.items() if name != "PYTEST_CURRENT_TEST"
    }


def test_a_command_with_an_equals_sign_in_its_name_is_run(guest: Guest, tmp_path: Path) -> None:
    program = tmp_path / "a=b"
    program.write_text("#!/bin/sh\necho ran\n")
    program.chmod(0o755)
    assert guest.run(program).stdout == b"ran\n"


def test_the_time_limit_ends_the_guest_with_124_and_names_the_kernel_log(guest: Guest) -> None:
    limit = "45" if guest.emulated else "4"
    reply = guest.run("sh", "-c", "echo before; sleep 600", options=("--timeout", limit))
    assert reply.returncode == 124
    assert reply.stdout == b"before\n"
    assert b"time limit of " + limit.encode() in reply.stderr
    _assert_kernel_log_named(reply.stderr)


def test_a_panic_is_a_lost_guest(guest: Guest) -> None:
    reply = guest.run("sh", "-c", "echo before; sleep 1; echo c >/proc/sysrq-trigger; sleep 600")
    assert reply.returncode == 125
    assert reply.stdout == b"before\n"
    assert b"guest lost while the command ran" in reply.stderr
    assert "sysrq triggered crash" in _assert_kernel_log_named(reply.stderr).lower()


def test_a_guest_killed_from_outside_is_a_lost_guest(guest: Guest, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with subprocess.Popen(
        [*guest.arguments(), "--", "sh", "-c", 'touch "$VM_OUT/up"; sleep 600'],
        env={**os.environ, **guest.environment, "VM_OUT": str(out)},
        stderr=subprocess.PIPE,
    ) as process:
        _wait_until((out / "up").exists)
        victims = [pid for pid in _children(process.pid) if _is_guest(pid)]
        os.kill(victims[-1], signal.SIGKILL)
        assert process.stderr is not None
        assert b"guest lost while the command ran" in process.stderr.read()
    assert process.returncode == 125


def test_a_failing_command_leaves_its_kernel_log_and_a_good_one_leaves_nothing(guest: Guest) -> None:
    jobs = Path(guest.environment["TMPDIR"])
    assert guest.run("true").returncode == 0
    assert list(jobs.iterdir()) == []
    reply = guest.run("false")
    assert list(jobs.iterdir()) == [_kernel_log(reply.stderr)]


def test_a_terminated_runner_takes_its_guest_along(guest: Guest, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with subprocess.Popen(
        [*guest.arguments(), "--", "sh", "-c", 'touch "$VM_OUT/up"; sleep 600'],
        env={**os.environ, **guest.environment, "VM_OUT": str(out)},
    ) as process:
        _wait_until((out / "up").exists)
        started = _descendants(process.pid)
        assert started
        process.terminate()
        assert process.wait() == 128 + signal.SIGTERM
    _wait_until(lambda: not any(_alive(pid) for pid in started))


def test_files_for_the_host_arrive_in_the_callers_vm_out(guest: Guest, tmp_path: Path) -> None:
    out = tmp_path / "a b" / "out"
    script = 'mkdir "$VM_OUT/d" && printf data >"$VM_OUT/d/file" && cat "$VM_OUT/input"'
    out.mkdir(parents=True)
    (out / "input").write_bytes(b"from the host")
    reply = guest.run("sh", "-c", script, VM_OUT=str(out))
    assert (reply.returncode, reply.stdout) == (0, b"from the host")
    assert (out / "d/file").read_bytes() == b"data"


def test_without_vm_out_a_fresh_directory_is_named_and_kept(guest: Guest) -> None:
    reply = guest.run("sh", "-c", 'printf data >"$VM_OUT/file"; printf %s "$VM_OUT"')
    assert (Path(os.fsdecode(reply.stdout)) / "file").read_bytes() == b"data"


def test_root_is_writable_and_forgets_while_the_state_directory_is_a_fresh_ext4(guest: Guest) -> None:
    script = """
        set -e
        id -u; uname -r
        echo x >/etc/erofsd-vm-test; echo x >/usr/bin/erofsd-vm-test
        stat -f -c '%T' /var/lib/erofsd
        echo $(($(stat -f -c '%b * %S' /var/lib/erofsd) >> 20))
        ls -A /var/lib/erofsd
        echo x >/var/lib/erofsd/file
    """
    for _ in range(2):  # the second one must not see what the first one wrote
        reply = guest.run("bash", "-c", script)
        assert reply.returncode == 0, reply.stderr
        uid, release, kind, size_mib, *names = reply.stdout.decode().split()
        assert uid == "0"
        assert release != os.uname().release
        assert kind == "ext2/ext3"  # what stat calls ext4's magic number
        assert 3900 <= int(size_mib) <= 4096
        assert names == ["lost+found"]
    assert not Path("/etc/erofsd-vm-test").exists()
    assert not Path("/usr/bin/erofsd-vm-test").exists()


def test_loopback_is_the_only_network_and_it_is_up(guest: Guest) -> None:
    program = """if True:
        import os, socket
        names = [name for _, name in socket.if_nameindex()]
        up = {name for name in names if int(open(f"/sys/class/net/{name}/flags").read(), 16) & 1}
        with socket.create_server(("127.0.0.1", 0)) as server:
            socket.create_connection(server.getsockname()).close()
        print(sorted(up), end="")
    """
    reply = guest.run(PYTHON, "-c", program)
    assert (reply.returncode, reply.stdout) == (0, b"['lo']"), reply.stderr


def test_the_checkouts_python_environment_works(guest: Guest) -> None:
    program = "import asyncio, aiohttp, uvloop; uvloop.run(asyncio.sleep(0.01)); print('ran', end='')"
    reply = guest.run(PYTHON, "-c", program)
    assert (reply.returncode, reply.stdout) == (0, b"ran"), reply.stderr


def test_processes_left_behind_do_not_hold_up_the_end(guest: Guest) -> None:
    reply = guest.run(
        "sh", "-c", "sleep 600 & setsid sleep 600 & echo over; exit 5", options=("--timeout", "60")
    )
    assert (reply.returncode, reply.stdout) == (5, b"over\n")


def test_a_process_beyond_sigkill_does_not_hold_up_the_end(guest: Guest) -> None:
    # A frozen file system keeps its writer in an unkillable wait, with the command's pipes open.
    freeze = (
        "import fcntl, os; fcntl.ioctl(os.open('/var/lib/erofsd', os.O_RDONLY), 0xC0045877, 0)"  # FIFREEZE
    )
    script = f"""
        {PYTHON} -c "{freeze}"
        touch /var/lib/erofsd/file & writer=$!
        until grep -q 'State:.D' /proc/$writer/status; do sleep 0.1; done
        echo stuck
        exit 6
    """
    reply = guest.run("sh", "-c", script, options=("--timeout", "90"))
    assert (reply.returncode, reply.stdout) == (6, b"stuck\n"), reply.stderr


def test_the_kernel_has_the_interface_it_is_for(guest: Guest) -> None:
    reply = guest.run(
        PYTHON, HERE / "scenarios" / ("on_demand_device.py" if guest.on_demand else "pre_content.py")
    )
    assert reply.returncode == 0, reply.stdout + reply.stderr


def test_a_command_under_systemd_is_like_any_other(guest: Guest, tmp_path: Path) -> None:
    if roots.find() is None:
        pytest.skip("the root with systemd is not built: `vm-tests/run --build-root`")
    disk = tmp_path / "disk"
    options = ("--root", "systemd", "--disk", str(disk))
    script = """
        cat /proc/1/comm; cat /var/lib/erofsd/left 2>&1 >/dev/null | wc -l
        echo err >&2; echo x >/var/lib/erofsd/left; sync; exit 7
    """
    for missing in (1, 0):  # the second one finds what the first one left on the disk
        reply = guest.run("sh", "-c", script, options=options)
        assert (reply.returncode, reply.stdout) == (7, f"systemd\n{missing}\n".encode()), reply.stderr
        assert reply.stderr.startswith(b"err\n")


def test_a_kernel_that_is_not_built_is_125_and_says_so(tmp_path: Path) -> None:
    reply = subprocess.run(
        [HERE / "run", "--kernel", "uml-6.12", "--no-build", "--", "true"],
        env={**os.environ, "EROFSD_VM_CACHE": str(tmp_path)},
        capture_output=True,
    )
    assert reply.returncode == 125
    assert b"uml-6.12 is not built" in reply.stderr


def _kernel_log(stderr: bytes) -> Path:
    match = re.search(rb"kernel log: (\S+)", stderr)
    assert match, stderr
    return Path(os.fsdecode(match[1]))


def _assert_kernel_log_named(stderr: bytes) -> str:
    text = _kernel_log(stderr).read_text(errors="replace")
    assert "Linux version" in text
    return text


def _children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _descendants(pid: int) -> list[int]:
    found = _children(pid)
    for child in list(found):
        found += _descendants(child)
    return found


def _is_guest(pid: int) -> bool:
    name = Path(f"/proc/{pid}/comm").read_text().strip()
    return name in ("linux", "qemu-system-x86")


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def _wait_until(condition: object, limit_s: float = 120) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)
