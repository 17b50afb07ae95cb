"""The runner's parts that need no guest."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vmrun import cache, packages, roots, space
from vmrun.errors import RunnerError
from vmrun.job import command_script
from vmrun.recipes import stock, uml

# What execve can carry: any bytes but NUL; a name has no equals sign.
WORDS = st.text(st.characters(blacklist_characters="\0", blacklist_categories=("Cs",)))
NAMES = WORDS.filter(lambda name: name and "=" not in name)


@given(words=st.lists(WORDS, max_size=4), name=NAMES, value=WORDS)
def test_the_command_script_hands_over_words_and_environment_unaltered(
    words: list[str], name: str, value: str
) -> None:
    show = ["/usr/bin/printf", "%s\\0"]
    script = command_script([*show, *words], {name: value}, Path("/"), 0o022)
    reply = subprocess.run(["/bin/sh"], input=script, capture_output=True)
    assert reply.stdout == b"".join(word.encode() + b"\0" for word in words or [""])

    reply = subprocess.run(
        ["/bin/sh"], input=command_script(["env", "-0"], {name: value}, Path("/"), 0o022), capture_output=True
    )
    assert reply.stdout == f"{name}={value}".encode() + b"\0"


def test_a_built_kernel_is_found_by_source_version_and_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EROFSD_VM_CACHE", str(tmp_path))
    for version in ("6.1-1", "6.1-2"):
        with cache.scratch("k") as work:
            made = work / "made"
            made.mkdir()
            (made / "linux").write_text(version)
            cache.publish("k", made, "c0ffee", version, "6.1", {"kernel": "linux"})
    built = cache.find("k", "6.1-1", "c0ffee")
    assert built is not None
    assert (built.file("kernel") or Path()).read_text() == "6.1-1"
    newest = cache.find("k", None, "c0ffee")
    assert newest is not None
    assert newest.source_version == "6.1-2"
    assert cache.find("k", "6.1-3", "c0ffee") is None
    assert cache.find("k", "6.1-1", "other") is None


def test_a_failed_build_leaves_nothing_to_boot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EROFSD_VM_CACHE", str(tmp_path))

    def build() -> None:
        with cache.scratch("k") as work:
            (work / "linux").touch()
            raise RunnerError("make failed")

    with pytest.raises(RunnerError):
        build()
    assert cache.find("k", None, "c0ffee") is None
    assert list((tmp_path / "build").iterdir()) == []


def test_symbols_that_kconfig_dropped_are_noticed() -> None:
    whole = "".join(path.read_text() for path in uml.FRAGMENTS)
    assert uml.lost_symbols(whole) == set()
    assert uml.lost_symbols(whole.replace("CONFIG_EROFS_FS_ONDEMAND=y", "")) == {"CONFIG_EROFS_FS_ONDEMAND"}


class _Listing(packages.Archive):
    """An archive that lists what it is told to."""

    def __init__(self, versions: dict[str, str]) -> None:
        super().__init__()
        self._versions = versions

    def search(self, pattern: str) -> dict[str, str]:
        return self._versions


def test_the_newest_kernel_whose_parts_are_all_there_is_taken() -> None:
    split = ("linux-binary-{}", "linux-modules-{}", "linux-base-{}", "linux-image-{}")
    listing = {part.format("7.2.12+deb13-cloud-amd64"): "7.2.12-1" for part in split}
    listing |= {part.format("7.2.9+deb13-cloud-amd64"): "7.2.9-1" for part in split}
    listing |= {part.format("7.3.0+deb13-cloud-amd64"): "7.3.0-1" for part in (split[0], split[3])}  # a shell
    listing |= {"linux-image-6.18.15+deb13-cloud-amd64": "6.18.15-1"}
    release, version, parts = stock._newest_complete(_Listing(listing), "")
    assert (release, version, len(parts)) == ("7.2.12+deb13-cloud-amd64", "7.2.12-1", 3)
    release, _, parts = stock._newest_complete(_Listing(listing), "6.18")
    assert parts == ["linux-image-6.18.15+deb13-cloud-amd64"]
    with pytest.raises(RunnerError, match=r"no complete cloud kernel 6\.17"):
        stock._newest_complete(_Listing(listing), "6.17")


@pytest.mark.parametrize("path", ["/a b", "/a,b", "/a:b", "/a\nb"])
def test_paths_that_a_kernel_command_line_would_split_are_refused(path: str) -> None:
    assert not space.is_plain(Path(path))


def test_a_root_of_its_own_gets_the_checkouts_units_and_program(tmp_path: Path) -> None:
    roots.overlay(tmp_path, Path("/job/init"))
    enabled = sorted((tmp_path / "etc/systemd/system/multi-user.target.wants").iterdir())
    assert [unit.name for unit in enabled] == ["erofsd.service", "vm-command.service"]
    assert "ExecStart=/bin/sh /job/init command\n" in enabled[1].read_text()
    assert (tmp_path / "usr/bin/erofsd").readlink() == roots.CHECKOUT / ".venv/bin/erofsd"


def test_a_root_of_its_own_sees_the_checkout_and_the_callers_directory_once() -> None:
    assert roots.CHECKOUT in roots.visible(roots.CHECKOUT / "tests")
    assert roots.CHECKOUT / "tests" not in roots.visible(roots.CHECKOUT / "tests")
    assert Path("/srv/elsewhere") in roots.visible(Path("/srv/elsewhere"))
