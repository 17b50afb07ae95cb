"""References and paths, as another process with another working directory must be told them."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from erofsd.cli.options import absolute_blobs, absolute_ref, socket_path
from erofsd.cli.prefetch import read_list
from erofsd.errors import ConfigError, UsageError


@pytest.mark.parametrize(
    ("ref", "expected"),
    [
        ("example.org/repo:tag", "example.org/repo:tag"),
        ("docker://example.org/repo:tag", "docker://example.org/repo:tag"),
        ("https://example.org/x.erofs", "https://example.org/x.erofs"),
        ("oci:/abs/layout:tag", "oci:/abs/layout:tag"),
        ("oci:layout:tag", "oci:{cwd}/layout:tag"),
        ("file:boot", "file:{cwd}/boot"),
        ("./x.erofs", "{cwd}/x.erofs"),
        ("/abs/../x.erofs", "/x.erofs"),
    ],
)
def test_local_paths_in_references_become_absolute(
    ref: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert absolute_ref(ref) == expected.format(cwd=tmp_path)


def test_blob_directories_become_absolute_and_urls_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert absolute_blobs(["blobs", "/b", "http://example.org/b"]) == [
        str(tmp_path / "blobs"),
        "/b",
        "http://example.org/b",
    ]
    assert absolute_blobs(None) is None


def test_file_list_keeps_every_byte_of_a_name(tmp_path: Path) -> None:
    path = tmp_path / "list"
    path.write_bytes(b"/a b\n# comment\n\n\xff\xfe \n\r\n")
    assert read_list(str(path)) == ["/a b", "/\xff\xfe ", "/\r"]


def test_file_list_that_is_missing_is_wrong_usage(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No such file"):
        read_list(str(tmp_path / "missing"))


def test_socket_is_that_of_the_option_the_environment_or_the_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "config.toml"
    config.write_text('socket = "/configured"')
    args = argparse.Namespace(socket=Path("/option"), config=config)
    monkeypatch.setenv("EROFSD_SOCKET", "/environment")
    assert socket_path(args) == Path("/option")
    args.socket = None
    assert socket_path(args) == Path("/environment")
    monkeypatch.delenv("EROFSD_SOCKET")
    assert socket_path(args) == Path("/configured")
    config.write_text("sockt = 1")
    with pytest.raises(ConfigError):
        socket_path(args)
