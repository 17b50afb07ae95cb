"""``convert --to oci``: a lazily mountable image becomes an ordinary one of one gzip layer.

Tree and config are the same; the same image gives the same bytes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from erofsd.backends.documents import (
    CONFIG_MAX,
    Descriptor,
    Index,
    Manifest,
    fetch_whole,
    parse_document,
)
from erofsd.backends.located import locate
from erofsd.backends.manifest import fits, is_nydus, this_platform
from erofsd.backends.reference import LayoutReference, Reference, RegistryReference
from erofsd.backends.retry import RetryBackend
from erofsd.backends.settings import SourceSettings
from erofsd.backends.sources import open_image_source
from erofsd.build import compare, sides
from erofsd.build.assemble import not_the_same
from erofsd.build.destination import Destination
from erofsd.build.expected import Expected
from erofsd.build.job import Outcome
from erofsd.build.publish import (
    Json,
    ReadyImage,
    Stored,
    image_index,
    new_config,
    parse_json,
    plain_config,
    plain_image,
    publish,
    total_size,
    with_platform,
)
from erofsd.build.readback import open_located
from erofsd.build.report import Reporter
from erofsd.build.restore import RestoredLayer, restore_layer
from erofsd.build.workdir import WorkDir
from erofsd.errors import UnsupportedImage, UsageError
from erofsd.images.base import Tree


async def convert_back(
    reference: Reference,
    destination: Destination,
    settings: SourceSettings,
    work: WorkDir,
    report: Reporter,
    *,
    platforms: Sequence[str],
    threads: int,
    check: bool,
) -> Outcome:
    """Make an ordinary image of the one behind *reference*, and publish it.

    Raises:
        UsageError: What was asked for contradicts itself.
        ImageRefused: The source is no lazily mountable image, or is damaged; or the result is not the same.
        SourceError: Source or destination do not answer, or refuse.
    """
    if destination.loose:
        raise UsageError(f"{destination}: an ordinary image needs a registry or a layout")
    conversion = _Back(destination, settings, work, report, threads, check)
    members, index = await _members(reference, settings, platforms)
    images = [await conversion.image(member, n) for n, member in enumerate(members)]
    outcome = conversion.outcome
    body = None
    if index is not None:
        body = image_index(images, index.get("annotations") or {})
    target = destination.open(settings, uploads=work.uploads)
    try:
        with report.phase("push", total_size(images)) as tell:
            published = await publish(target, images, body, destination.tag, tell)
    finally:
        await target.aclose()
    outcome.digest, outcome.layers = published.digest, len(images)
    outcome.ref = destination.named(published.digest)
    outcome.uploaded_bytes, outcome.present_bytes = published.uploaded_bytes, published.present_bytes
    return outcome


@dataclass(frozen=True, slots=True)
class _Member:
    """One image of the source.

    Attributes:
        reference: Names it alone.
        entry: Of the index that names it; None if none does.
    """

    reference: Reference
    manifest: Manifest | None
    config: Json
    entry: Json | None


async def _members(
    reference: Reference, settings: SourceSettings, platforms: Sequence[str]
) -> tuple[list[_Member], Json | None]:
    """The images to convert, and the index that names them if there is one."""
    if not isinstance(reference, RegistryReference | LayoutReference):
        return [_Member(reference, None, new_config(this_platform()), None)], None
    source = open_image_source(reference, settings)
    backend = RetryBackend(source, settings.attempts)
    try:
        selector = reference.selector if isinstance(reference, RegistryReference) else reference.tag
        document = await backend.call(lambda: source.fetch_document(selector))
        parsed = parse_document(document)
        if isinstance(parsed, Manifest):
            return [await _member(backend, reference, parsed, None)], None
        raw = parse_json(document.body, document.name)
        members = []
        for descriptor, entry in _lazy(parsed, raw["manifests"], platforms, document.name):
            digest = descriptor.digest
            inner = parse_document(await backend.call(partial(source.fetch_document, digest)))
            if not isinstance(inner, Manifest):
                raise UnsupportedImage(f"{document.name}: indexes nested too deep")
            members.append(await _member(backend, _by_digest(reference, digest), inner, entry))
    finally:
        await backend.aclose()
    return members, raw if len(members) > 1 or not platforms else None


def _lazy(
    index: Index, entries: list[Json], platforms: Sequence[str], name: str
) -> list[tuple[Descriptor, Json]]:
    """Entries of *index* for Linux; where a platform has an ordinary and a Nydus image, the latter."""
    found: dict[str, tuple[Descriptor, Json]] = {}
    for descriptor, entry in zip(index.manifests, entries, strict=True):
        platform = str(descriptor.platform or "")
        if descriptor.platform is not None and descriptor.platform.os not in ("", "linux"):
            continue
        if platforms and not any(fits(descriptor, asked) for asked in platforms):
            continue
        if platform not in found or is_nydus(descriptor):
            found[platform] = descriptor, entry
    if not found:
        raise UnsupportedImage(f"{name}: nothing in it is for {', '.join(platforms) or 'Linux'}")
    return list(found.values())


def _by_digest(reference: RegistryReference | LayoutReference, digest: str) -> Reference:
    if isinstance(reference, RegistryReference):
        return replace(reference, tag=None, digest=digest)
    return replace(reference, tag=digest)


async def _member(
    backend: RetryBackend, reference: Reference, manifest: Manifest, entry: Json | None
) -> _Member:
    config = new_config(this_platform())
    if manifest.config is not None:
        name = f"{reference}: config"
        config = parse_json(await fetch_whole(backend, manifest.config, CONFIG_MAX, name), name)
    return _Member(reference, manifest, config, entry)


class _Back:
    def __init__(
        self,
        destination: Destination,
        settings: SourceSettings,
        work: WorkDir,
        report: Reporter,
        threads: int,
        check: bool,
    ) -> None:
        self._settings = settings
        self._work = work
        self._report = report
        self._threads = threads
        self._check = check
        self.outcome = Outcome(str(destination))

    async def image(self, member: _Member, number: int) -> ReadyImage:
        """Make the ordinary image of one member."""
        layer = await self._restore(member.reference, number)
        if layer.expected is not None:
            await self._prove(str(member.reference), layer.expected, layer.stored)
        annotations = (member.manifest.annotations if member.manifest else None) or {}
        ready = plain_image(plain_config(member.config, layer.diff_id), layer.stored, annotations)
        platform = (member.entry or {}).get("platform") or with_platform(member.config)
        platform = {key: value for key, value in platform.items() if key != "os.features"}
        self.outcome.platforms.append("/".join(filter(None, map(platform.get, ("os", "architecture")))))
        return replace(ready, platform=platform)

    async def _restore(self, reference: Reference, number: int) -> RestoredLayer:
        # The image lives here only: reading the layer back takes as much memory again.
        path = self._work.scratch(f"layer-{number}.tar.gz")
        expected = self._work.scratch(f"expected-{number}") if self._check else None
        located = await locate(reference, settings=self._settings)
        try:
            image = await open_located(located)
            try:
                size = await asyncio.to_thread(_content_size, image.tree)
                with self._report.phase("convert", size) as tell:
                    layer = await asyncio.to_thread(
                        restore_layer, image.tree, path, self._threads, self._warn, tell, expected=expected
                    )
            finally:
                image.close()
        finally:
            await located.backend.aclose()
        self.outcome.entries += layer.entries
        self.outcome.content_bytes += size
        self.outcome.blob_bytes += layer.stored.size
        return layer

    async def _prove(self, name: str, expected: Expected, stored: Stored) -> None:
        """Read the layer back and compare it with the image; its content has been hashed already."""
        assert isinstance(stored.content, Path)  # see restore_layer
        with self._report.phase("check", stored.size) as tell:
            root = await asyncio.to_thread(sides.tar_tree, stored.content, self._warn, tell)
            found = compare.node_items(root)
            result = await asyncio.to_thread(compare.compare, expected.items(), found)
        if not result.same:
            raise not_the_same(name, result)
        self.outcome.checked = True

    def _warn(self, text: str) -> None:
        self.outcome.warnings.append(text)
        self._report.warn(text)


def _content_size(tree: Tree) -> int:
    seen: set[int] = set()
    size = 0
    for entry in tree.walk():
        if entry.type == "reg" and (entry.nlink == 1 or entry.nid not in seen):
            seen.add(entry.nid)
            size += entry.size
    return size
