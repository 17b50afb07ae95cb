"""The configuration file: TOML, checked strictly, every mistake named by file and key."""

from __future__ import annotations

import difflib
import re
import tomllib
from pathlib import Path
from typing import Any, Literal

import msgspec

from erofsd.backends.settings import RegistrySettings
from erofsd.errors import ConfigError

DEFAULT_PATH = Path("/etc/erofsd/config.toml")
DEFAULT_SOCKET = Path("/run/erofsd/api.sock")
DEFAULT_STATE_DIR = Path("/var/lib/erofsd")

LogLevel = Literal["debug", "info", "warning", "error"]


class Config(msgspec.Struct, frozen=True, kw_only=True):
    """Everything the operator can set.

    Attributes:
        socket: Unix socket of the API; ``keeper.pid`` and ``worker.pid`` lie beside it.
        state_dir: Blobs, bootstraps and the mounts database. Needs ext4, XFS or btrfs.
        deadline: Seconds within which a read is served or fails with EIO.
        log_level: Least severity that is logged.
        keep_mounts: Leave complete fanotify mounts in place at the end.
        registry: Settings of a registry by ``host`` or ``host:port``.
    """

    socket: Path = DEFAULT_SOCKET
    state_dir: Path = DEFAULT_STATE_DIR
    deadline: float = 60.0
    log_level: LogLevel = "info"
    keep_mounts: bool = False
    registry: dict[str, RegistrySettings] = {}


def load_config(path: Path | None = None) -> Config:
    """The configuration in *path*; without one in the default place, where it may be absent.

    Raises:
        ConfigError: Names the file, and the key where one is to blame.
    """
    chosen = path or DEFAULT_PATH
    try:
        text = chosen.read_bytes().decode("utf-8")
    except FileNotFoundError as exc:
        if path is None:
            return Config()
        raise ConfigError(f"{path}: no such configuration file") from exc
    except UnicodeDecodeError as exc:
        raise ConfigError(f"{chosen}: not UTF-8 text: byte {exc.start}") from exc
    except OSError as exc:
        raise ConfigError(f"{chosen}: cannot be read: {exc.strerror}") from exc
    return parse_config(text, chosen)


def parse_config(text: str, path: Path) -> Config:
    """The configuration written in *text*; *path* is for error messages and relative paths in it.

    Raises:
        ConfigError: As for `load_config`.
    """
    try:
        raw = tomllib.loads(text)
    except tomllib.TOMLDecodeError as exc:
        raise ConfigError(f"{path}: not TOML: {exc}") from exc
    _refuse_unknown_keys(raw, path)
    try:
        config = msgspec.convert(raw, Config, dec_hook=_decode_path)
    except msgspec.ValidationError as exc:
        raise ConfigError(f"{path}: {_explain(str(exc))}") from exc
    if not 0 < config.deadline <= 86400:
        raise ConfigError(f"{path}: deadline: {config.deadline:g} is not between 0 and 86400 seconds")
    for key in ("socket", "state_dir"):
        if not getattr(config, key).is_absolute():
            raise ConfigError(f"{path}: {key}: {getattr(config, key)} is not an absolute path")
    return config


def _decode_path(kind: type, value: object) -> Path:
    if kind is Path and isinstance(value, str) and value:
        return Path(value)
    raise TypeError(f"Expected a path, got `{value!r}`")


def _refuse_unknown_keys(raw: dict[str, Any], path: Path) -> None:
    # msgspec could forbid them too, but does not say which name was probably meant.
    _check_names(raw, Config, path, where="")
    registries = raw.get("registry", {})
    if isinstance(registries, dict):
        for host, settings in registries.items():
            if isinstance(settings, dict):
                _check_names(settings, RegistrySettings, path, where=f'registry."{host}".')


def _check_names(table: dict[str, Any], struct: type[msgspec.Struct], path: Path, where: str) -> None:
    known = [f.encode_name for f in msgspec.structs.fields(struct)]
    for key in table:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            raise ConfigError(
                f"{path}: unknown key {where}{key}",
                hint=f"did you mean {where}{near[0]}?" if near else f"known here: {', '.join(known)}",
            )


def _explain(message: str) -> str:
    """msgspec's "Expected `float`, got `str` - at `$.deadline`", with the key in front."""
    if match := re.fullmatch(r"(.*) - at `\$\.?(.*)`", message):
        what, key = match.groups()
        return f"{key}: {what[0].lower()}{what[1:]}"
    return message
