"""Authorization at one repository of a registry: challenges, tokens, and when to get a new one.

Theory of operation. Nothing is sent until the registry asks (401 with WWW-Authenticate). The challenge says
how: ``Basic`` wants the password with every request, ``Bearer`` a token that another server issues. What was
found is kept as the value of the Authorization header. There is one such value at a time, its *generation*
is the number of attempts to get one. Whoever is refused says which generation it used: if that is not the
current one, somebody else has already been to the token server, and the news is taken, good or bad.

Sources: distribution/distribution docs/spec/auth/token.md, oauth.md; RFC 9110, 11.6.1.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from time import monotonic

import msgspec
from yarl import URL

from erofsd.backends.credentials import Credentials, find_credentials
from erofsd.backends.settings import RegistrySettings, SourceSettings
from erofsd.backends.transport import HttpClient, is_loopback, plain, refusal, refuse_page
from erofsd.errors import BackendDenied, BackendTemporary, ErofsdError

TOKEN_LIFETIME_S = 60.0  # where the server does not say (token.md, "expires_in")
TOKEN_LIFETIME_MAX_S = 24 * 3600.0
REFRESH_EARLY_S = 20.0
_TOKEN_ANSWER_MAX = 64 << 10
_CLIENT_ID = "erofsd"

_PARAMETER = re.compile(
    r'\s*([!#$%&\'*+.^_`|~\w-]+)\s*=\s*(?:"((?:[^"\\]|\\.)*)"|([^\s,"]+))\s*(?:,|$)', re.ASCII
)
_SCHEME = re.compile(r"\s*,?\s*([\w-]+)(?:\s+|$)", re.ASCII)
_TOKEN = re.compile(r"[\x21-\x7e]+")  # what may stand in a header


@dataclass(frozen=True, slots=True)
class Challenge:
    """One challenge of a WWW-Authenticate header; *scheme* in lower case."""

    scheme: str
    parameters: Mapping[str, str]


def parse_challenges(header: str) -> list[Challenge]:
    """The challenges in *header*; what cannot be understood ends the list."""
    found: list[Challenge] = []
    at = 0
    while match := _SCHEME.match(header, at):
        at = match.end()
        parameters: dict[str, str] = {}
        while parameter := _PARAMETER.match(header, at):
            name, quoted, bare = parameter.groups()
            parameters[name.lower()] = re.sub(r"\\(.)", r"\1", quoted) if quoted is not None else bare
            at = parameter.end()
        found.append(Challenge(match[1].lower(), parameters))
    return found


class _TokenAnswer(msgspec.Struct):
    token: str | None = None
    access_token: str | None = None
    expires_in: float | str | None = None


class Authorizer:
    """Holds the Authorization for one repository.

    Args:
        host: As in the reference: the key of credentials.
        scopes: ``repository:NAME:pull`` for challenges that name none; any others, all that will ever be
            needed, are asked for whatever a challenge says.
    """

    def __init__(
        self,
        client: HttpClient,
        host: str,
        scopes: Sequence[str],
        settings: RegistrySettings,
        sources: SourceSettings,
    ) -> None:
        self._client = client
        self._host = host
        self._scopes = list(scopes)
        self._reads_only = len(self._scopes) == 1 and self._scopes[0].endswith(":pull")
        self._settings = settings
        self._sources = sources
        self._lock = asyncio.Lock()
        self._challenge: Challenge | None = None
        self._secure = True
        self._value: str | None = None
        self._error: ErofsdError | None = None
        self._refresh_at = self._expires_at = float("inf")
        self.generation = 0

    async def current(self) -> str | None:
        """The Authorization to send now; None where nobody has asked for one. Waits only near its expiry.

        Raises:
            BackendDenied, BackendTemporary: A new token was due and cannot be had.
        """
        if self._challenge is not None and monotonic() >= self._refresh_at:
            try:
                await self._renew(self.generation)
            except BackendTemporary:
                if monotonic() >= self._expires_at:
                    raise
                self._refresh_at = monotonic() + 1  # the old one is still good: try again soon
        return self._value

    async def refused(self, header: str, generation: int, *, secure: bool) -> None:
        """A request was answered 401; when this returns another try makes sense.

        Args:
            header: WWW-Authenticate.
            generation: `generation` when `current` was asked for that request.
            secure: The request went over TLS, to this machine, or to where TLS was expressly not wanted.

        Raises:
            BackendDenied: There is no way in.
            BackendTemporary: The token server is not well.
        """
        challenges = {c.scheme: c for c in reversed(parse_challenges(header))}
        challenge = challenges.get("bearer") or challenges.get("basic")
        if challenge is None:
            raise BackendDenied(f"{self._host}: wants an authorization that erofsd does not know: {header!r}")
        if generation == self.generation:
            self._challenge = challenge
            self._secure = secure
        await self._renew(generation)

    async def _renew(self, generation: int) -> None:
        async with self._lock:
            if generation != self.generation:
                # Somebody was here while we waited. A denial of theirs is not repeated for each of us.
                if self._error is not None:
                    raise self._error
                return
            try:
                await self._authorize()
            except ErofsdError as exc:
                self._error = exc
                self.generation += 1
                raise
            self._error = None
            self.generation += 1

    async def _authorize(self) -> None:
        assert self._challenge is not None
        credentials = await find_credentials(self._host, self._settings, self._sources)
        if credentials and not self._secure:
            raise BackendDenied(f"{self._host}: wants a password over a connection without TLS")
        if self._challenge.scheme == "basic":
            if credentials is None:
                raise BackendDenied(
                    f"{self._host}: wants a user name and a password", hint=f"docker login {self._host}"
                )
            self._value = credentials.basic
            return
        token, lifetime_s = await self._fetch_token(self._challenge.parameters, credentials)
        self._value = f"Bearer {token}"
        self._expires_at = monotonic() + lifetime_s
        self._refresh_at = self._expires_at - min(REFRESH_EARLY_S, lifetime_s / 2)

    async def _fetch_token(
        self, parameters: Mapping[str, str], credentials: Credentials | None
    ) -> tuple[str, float]:
        url = self._realm(parameters.get("realm", ""), secret=credentials is not None)
        stated = parameters.get("scope")
        scopes = [stated] if stated and self._reads_only else self._scopes
        service = parameters.get("service")
        if credentials is not None and credentials.identity_token:
            form = {
                "grant_type": "refresh_token",
                "refresh_token": credentials.identity_token,
                "client_id": _CLIENT_ID,
                "scope": " ".join(scopes),
            }
            if service:
                form["service"] = service
            response = await self._client.send("POST", url, {}, form=form)
        else:
            headers = {"Authorization": credentials.basic} if credentials is not None else {}
            query = [("scope", scope) for scope in scopes]
            if service:
                query.append(("service", service))
            response = await self._client.send("GET", url.update_query(query), headers)
        what = f"token for {self._host}"
        if response.status != 200:
            raise await refusal(response, what)
        refuse_page(response, what)
        return self._parse_token(await self._client.read(response, _TOKEN_ANSWER_MAX), url)

    def _realm(self, realm: str, *, secret: bool) -> URL:
        try:
            url = URL(realm)
        except ValueError:
            url = URL()
        if url.scheme not in ("http", "https") or not url.host:
            raise BackendDenied(f"{self._host}: names no server for tokens: {realm!r}")
        if secret and url.scheme == "http" and not (is_loopback(url.host) or self._settings.plain_http):
            raise BackendDenied(f"{self._host}: wants the password sent without TLS to {plain(url)}")
        return url

    def _parse_token(self, body: bytes, url: URL) -> tuple[str, float]:
        try:
            answer = msgspec.json.decode(body, type=_TokenAnswer)
        except (msgspec.MsgspecError, UnicodeDecodeError) as exc:
            raise BackendTemporary(f"{plain(url)}: the answer is not a token: {exc}") from exc
        token = answer.token or answer.access_token or ""
        if not _TOKEN.fullmatch(token):
            raise BackendTemporary(f"{plain(url)}: the answer holds no token")
        try:
            lifetime_s = float(answer.expires_in or TOKEN_LIFETIME_S)
        except ValueError:
            lifetime_s = TOKEN_LIFETIME_S
        if not 0 < lifetime_s < float("inf"):
            lifetime_s = TOKEN_LIFETIME_S
        return token, min(lifetime_s, TOKEN_LIFETIME_MAX_S)
