"""``--blobs WHERE``: where data blobs are, if not where their image is."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path

from erofsd.backends.http import HttpBackend
from erofsd.backends.localfs import LocalBackend, path_id
from erofsd.backends.measured import MeasuredBackend, streaming
from erofsd.backends.settings import SourceSettings
from erofsd.backends.transport import HttpClient, HttpLimits
from erofsd.errors import BlobNotFound
from ondemand.ranges import Range


class FirstOf:
    """Several sources as one: each blob comes from the first that has it.

    Args:
        sources: At least one.
    """

    def __init__(self, sources: Sequence[MeasuredBackend]) -> None:
        self.sources = tuple(sources)
        self._holder: dict[str, MeasuredBackend] = {}

    @property
    def name(self) -> str:
        """All of them: which one a blob comes from shows when it has come."""
        return " or ".join(source.name for source in self.sources)

    @property
    def transferred_bytes(self) -> int:
        """Of all together."""
        return sum(s.transferred_bytes for s in self.sources)

    @property
    def requests(self) -> int:
        """Of all together."""
        return sum(s.requests for s in self.sources)

    async def size(self, blob_id: str) -> int:
        """See Backend."""
        for source in (sources := self._candidates(blob_id)):
            try:
                size = await source.size(blob_id)
            except BlobNotFound:
                if source is sources[-1]:
                    raise
            else:
                self._holder[blob_id] = source
                return size
        raise AssertionError("unreachable: there is at least one source")

    async def stream(self, blob_id: str, want: Range) -> AsyncIterator[bytes]:
        """See Backend."""
        for source in (sources := self._candidates(blob_id)):
            try:
                async with streaming(source, blob_id, want) as pieces:
                    async for piece in pieces:
                        self._holder[blob_id] = source
                        yield piece
                return
            except BlobNotFound:  # comes before the first piece or not at all
                if source is sources[-1]:
                    raise

    def _candidates(self, blob_id: str) -> tuple[MeasuredBackend, ...]:
        holder = self._holder.get(blob_id)
        return self.sources if holder is None else (holder,)

    async def aclose(self) -> None:
        """See Backend."""
        for source in self.sources:
            await source.aclose()


def is_url(place: str) -> bool:
    """True if *place* is for HTTP."""
    return place.startswith(("http://", "https://"))


def listed_files(places: Sequence[str]) -> dict[str, Path]:
    """The single files among *places* by blob id, in their order: devices that are given one by one."""
    paths = [Path(p) for p in places if not is_url(p)]
    return {path_id(path): path for path in paths if not path.is_dir()}


def open_places(
    places: Sequence[str],
    settings: SourceSettings,
    *,
    files: Mapping[str, Path] | None = None,
    pins: Mapping[str, str] | None = None,
) -> MeasuredBackend:
    """A backend over *places*: directories, files (each a blob named by its file name), URL prefixes.

    One file and nothing else holds whatever blob is asked for, as ``blob_file`` in nydusd's configuration.

    Args:
        files: More single files, by blob id.
        pins: What single files must still be, by blob id.
    """
    local = [Path(p) for p in places if not is_url(p)]
    listed = listed_files(places)
    by_name = {path.name: path for path in listed.values()} | listed | dict(files or {})
    only = next(iter(listed.values())) if len(places) == 1 and listed else None
    sources: list[MeasuredBackend] = []
    if local or by_name:
        directories = [path for path in local if path not in listed.values()]
        sources.append(LocalBackend(directories, files=by_name, fallback=only, pins=pins))
    sources.extend(
        HttpBackend(HttpClient(HttpLimits.of(settings)), prefix=place) for place in places if is_url(place)
    )
    return sources[0] if len(sources) == 1 else FirstOf(sources)
