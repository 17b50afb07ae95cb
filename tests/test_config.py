"""The configuration file: every mistake is named by file and key."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from erofsd.config import Config, load_config, parse_config
from erofsd.errors import ConfigError

FILE = Path("/etc/x.toml")


def test_empty_file_means_the_defaults() -> None:
    assert parse_config("", FILE) == Config()
    assert Config().socket == Path("/run/erofsd/api.sock")
    assert Config().state_dir == Path("/var/lib/erofsd")
    assert Config().deadline == 60


def test_all_keys_are_read() -> None:
    config = parse_config(
        """
        socket = "/tmp/s"
        state_dir = "/srv/e"
        deadline = 5
        log_level = "debug"
        keep_mounts = true
        [registry."r.example:5000"]
        plain_http = true
        username = "u"
        password = "p"
        """,
        FILE,
    )
    assert config.socket == Path("/tmp/s")
    assert config.state_dir == Path("/srv/e")
    assert config.deadline == 5.0
    assert config.log_level == "debug"
    assert config.keep_mounts
    assert config.registry["r.example:5000"].plain_http


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("soket = '/x'", "unknown key soket", "socket"),
        ("statedir = '/x'", "unknown key statedir", "state_dir"),
        ("xyzzy = 1", "unknown key xyzzy", "known here: socket"),
        ('[registry."h:1"]\nplain_htp = true', 'unknown key registry."h:1".plain_htp', "plain_http"),
        ("deadline = 'soon'", "deadline: expected `float`, got `str`", ""),
        ("deadline = 0", "deadline: 0 is not between", ""),
        ("deadline = nan", "deadline: nan is not between", ""),
        ("log_level = 'loud'", "log_level: invalid enum value 'loud'", ""),
        ("socket = 1", "socket: ", ""),
        ("socket = 'relative'", "socket: relative is not an absolute path", ""),
        ("registry = 1", "registry: expected", ""),
        ("a = = b", "not TOML", ""),
    ],
)
def test_mistake_is_named_by_file_and_key(text: str, message: str, hint: str) -> None:
    with pytest.raises(ConfigError) as info:
        parse_config(text, FILE)
    assert str(info.value).startswith(f"{FILE}: ")
    assert message in str(info.value)
    assert hint in info.value.hint


@given(st.text(max_size=200))
def test_any_text_is_a_configuration_or_refused(text: str) -> None:
    try:
        parse_config(text, FILE)
    except ConfigError:
        return


def test_file_that_was_named_must_exist(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such configuration file"):
        load_config(tmp_path / "missing.toml")


def test_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_bytes(b"\xff\xff")
    with pytest.raises(ConfigError, match="not UTF-8"):
        load_config(path)


def test_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text("deadline = 7.5")
    assert load_config(path).deadline == 7.5
