"""What an operator can set about sources."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import msgspec


class RegistrySettings(msgspec.Struct, frozen=True, kw_only=True):
    """One ``[registry."host:port"]`` table of the configuration.

    Attributes:
        plain_http: Speak HTTP without TLS. A loopback address may do so unasked.
        ca: PEM file with certificates that are trusted in addition to the system's.
        username: Takes precedence over docker's ``config.json``; with *password*.
        password: For *username*.
    """

    plain_http: bool = False
    ca: Path | None = None
    username: str | None = None
    password: str | None = None


class SourceSettings(msgspec.Struct, frozen=True, kw_only=True):
    """How sources are reached; the same for all mounts of a daemon.

    Attributes:
        registries: By ``host`` or ``host:port``, as written in references.
        plain_http: Speak HTTP without TLS to whatever registry is asked for (``--plain-http``).
        docker_config: Directory of docker's ``config.json``; None: ``$DOCKER_CONFIG``, else ``~/.docker``.
        connections: Most connections to one host, for one backend.
        connect_timeout_s: Until a connection is there, TLS included.
        inactivity_s: Longest silence of an origin in mid-answer.
        attempts: Tries of one request, the first included, where another try may help.
        locate_attempts: The same while somebody waits for ``mount`` to say what is wrong.
    """

    registries: Mapping[str, RegistrySettings] = {}
    plain_http: bool = False
    docker_config: Path | None = None
    connections: int = 16
    connect_timeout_s: float = 10.0
    inactivity_s: float = 10.0
    attempts: int = 12
    locate_attempts: int = 4

    def registry(self, host: str) -> RegistrySettings:
        """The settings of registry *host*, ``--plain-http`` worked in."""
        found = self.registries.get(host, RegistrySettings())
        return msgspec.structs.replace(found, plain_http=True) if self.plain_http else found


def settings_for_deadline(deadline_s: float, registries: Mapping[str, RegistrySettings]) -> SourceSettings:
    """Settings with which a hanging origin is noticed early enough for other tries within *deadline_s*."""
    patience_s = min(10.0, deadline_s / 4)
    return SourceSettings(registries=registries, connect_timeout_s=patience_s, inactivity_s=patience_s)
