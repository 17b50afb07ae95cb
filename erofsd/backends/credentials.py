"""Who we are to a registry: the configuration, docker's ``config.json``, credential helpers.

Sources: docker/cli cli/config/configfile ("config.json", its fields), docker/docker-credential-helpers
("Development": the protocol of ``get``).
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import os
import re
from dataclasses import dataclass
from pathlib import Path

import msgspec

from erofsd.backends.reference import DOCKER_HUB
from erofsd.backends.settings import RegistrySettings, SourceSettings
from erofsd.errors import BackendDenied, BackendTemporary, ConfigError

DOCKER_HUB_KEY = "https://index.docker.io/v1/"  # what docker login calls it, for historical reasons
HELPER_TIMEOUT_S = 15.0  # helpers talk to keyrings and clouds, but a reader may be waiting
_HELPER_OUTPUT_MAX = 64 << 10
_HELPER_NAME = re.compile(r"[\w.-]+", re.ASCII)
_TOKEN_USER = "<token>"  # the secret is then an identity token (docker-credential-helpers, credentials.go)


@dataclass(frozen=True, slots=True)
class Credentials:
    """A user's name and password, or an identity token; never shown."""

    username: str
    password: str
    identity_token: str = ""

    def __repr__(self) -> str:
        return f"Credentials({self.username!r}, …)"

    @property
    def basic(self) -> str:
        """The value of an Authorization header."""
        return "Basic " + base64.b64encode(f"{self.username}:{self.password}".encode()).decode()


class _Auth(msgspec.Struct):
    auth: str = ""
    username: str = ""
    password: str = ""
    identitytoken: str = ""


class _DockerConfig(msgspec.Struct, rename="camel"):
    auths: dict[str, _Auth] | None = None
    cred_helpers: dict[str, str] | None = None
    creds_store: str | None = None


class _HelperAnswer(msgspec.Struct, rename="pascal"):
    username: str = ""
    secret: str = ""


async def find_credentials(
    host: str, settings: RegistrySettings, sources: SourceSettings
) -> Credentials | None:
    """Credentials for registry *host*, looked for afresh: a new ``docker login`` is seen at once.

    Returns:
        None if there are none; many registries need none.

    Raises:
        ConfigError: ``config.json`` is broken.
        BackendDenied, BackendTemporary: The credential helper failed, or did not answer in time.
    """
    if settings.username is not None:
        return Credentials(settings.username, settings.password or "")
    directory = sources.docker_config or _docker_config_directory()
    config = await asyncio.to_thread(_load, directory / "config.json")
    keys = _keys(host)
    for key in keys:
        if helper := (config.cred_helpers or {}).get(key):
            return await _ask_helper(helper, key)
    # With a credential store the entries of auths are only empty markers.
    if config.creds_store and (found := await _ask_helper(config.creds_store, keys[0])):
        return found
    by_host = {_host_of(key): auth for key, auth in reversed((config.auths or {}).items())}
    auth = next((config.auths[k] for k in keys if config.auths and k in config.auths), by_host.get(host))
    return _decode(auth, host, directory / "config.json") if auth else None


def _docker_config_directory() -> Path:
    if directory := os.environ.get("DOCKER_CONFIG"):
        return Path(directory)
    try:
        return Path.home() / ".docker"
    except RuntimeError:  # neither $HOME nor an entry in passwd
        return Path("/nonexistent")


def _keys(host: str) -> list[str]:
    """Names under which *host* may be configured, the usual one first."""
    if host == DOCKER_HUB:
        return [DOCKER_HUB_KEY, DOCKER_HUB, "index.docker.io", "registry-1.docker.io"]
    return [host, f"https://{host}"]


def _host_of(key: str) -> str:
    """The host in a key of auths, which old logins wrote as URLs. Source: docker/cli, ConvertToHostname."""
    host = re.sub(r"^https?://", "", key).partition("/")[0]
    return DOCKER_HUB if host == "index.docker.io" else host


def _load(path: Path) -> _DockerConfig:
    try:
        raw = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return _DockerConfig()
    except OSError as exc:
        raise ConfigError(f"{path}: cannot be read: {exc.strerror}") from exc
    try:
        return msgspec.json.decode(raw, type=_DockerConfig)
    except (msgspec.MsgspecError, UnicodeDecodeError) as exc:
        raise ConfigError(f"{path}: {exc}") from exc


def _decode(auth: _Auth, host: str, path: Path) -> Credentials | None:
    username, password = auth.username, auth.password
    if auth.auth:
        try:
            text = base64.b64decode(auth.auth, validate=True).decode()
        except (binascii.Error, UnicodeDecodeError) as exc:
            raise ConfigError(f"{path}: the entry of {host} is not base64 of user:password") from exc
        username, colon, password = text.rstrip("\0").partition(":")
        if not colon:
            raise ConfigError(f"{path}: the entry of {host} is not base64 of user:password")
    if not (username or auth.identitytoken):
        return None
    return Credentials(username, password, auth.identitytoken)


async def _ask_helper(name: str, key: str) -> Credentials | None:
    if not _HELPER_NAME.fullmatch(name):
        raise ConfigError(f"docker's config.json: {name!r} cannot be the name of a credential helper")
    program = f"docker-credential-{name}"
    try:
        process = await asyncio.create_subprocess_exec(
            program,
            "get",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
        )
    except OSError as exc:
        raise BackendDenied(
            f"{program}: cannot be started: {exc.strerror}",
            hint="docker's config.json names it: install it, or take it out there",
        ) from exc
    try:
        async with asyncio.timeout(HELPER_TIMEOUT_S):
            output, _ = await process.communicate(key.encode())
    except TimeoutError as exc:
        raise BackendTemporary(f"{program}: no answer within {HELPER_TIMEOUT_S:g} s") from exc
    finally:
        if process.returncode is None:
            process.kill()
    if process.returncode != 0:
        # The program's words go to stdout. Source: docker-credential-helpers, credentials/error.go.
        if b"credentials not found" in output:
            return None
        raise BackendDenied(f"{program}: failed with status {process.returncode} for {key}")
    try:
        answer = msgspec.json.decode(output[:_HELPER_OUTPUT_MAX], type=_HelperAnswer)
    except (msgspec.MsgspecError, UnicodeDecodeError) as exc:
        raise BackendDenied(f"{program}: its answer is not the JSON it should be") from exc
    if answer.username == _TOKEN_USER:
        return Credentials("", "", answer.secret)
    return Credentials(answer.username, answer.secret) if answer.secret else None
