"""Converts images of ordinary layers into lazily mountable ones, and publishes them.

Layers are converted one after the other, each by several threads, while the next ones arrive. A finished
layer is remembered in the work directory, so neither another platform of the image, nor another image, nor a
rerun after whatever happened converts it again. Manifests follow when all has been read back and compared.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import replace

from erofsd.backends.documents import Descriptor
from erofsd.backends.localfs import Place
from erofsd.backends.push import ImageTarget
from erofsd.backends.reference import Reference, RegistryReference
from erofsd.backends.settings import SourceSettings
from erofsd.build import plain
from erofsd.build.arrivals import Arrival, LayerFile
from erofsd.build.chunks import ImageChunks
from erofsd.build.content import with_digests
from erofsd.build.destination import Destination, subject_of
from erofsd.build.job import Job, Outcome, Wanted
from erofsd.build.layers import pack_layer
from erofsd.build.origin import Origin, Selection, SourceImage, open_origin
from erofsd.build.pack import Packer
from erofsd.build.publish import (
    ReadyImage,
    converted_annotations,
    image_index,
    parse_json,
)
from erofsd.build.record import LayerRecord
from erofsd.build.report import Reporter, Tell
from erofsd.build.tarstream import TarSource
from erofsd.build.workdir import WorkDir
from erofsd.errors import ImageRefused, SourceError, UsageError

ARRIVALS_AT_ONCE = 2
_RULES = 2  # counts up when the same layer and options give something else than before
_PLATFORM = ("os", "architecture", "variant")


async def convert(
    reference: Reference,
    destination: Destination,
    wanted: Wanted,
    settings: SourceSettings,
    work: WorkDir,
    report: Reporter,
) -> Outcome:
    """Convert the image behind *reference*.

    Raises:
        UsageError: What was asked for contradicts itself.
        ImageRefused: The source cannot be converted, or the result is not the same.
        SourceError: Source or destination do not answer, or refuse.
    """
    job = Job(wanted, destination, settings, work, report)
    origin = await open_origin(reference, settings)
    try:
        selection = await origin.select(wanted.platforms)
        if destination.loose and len(selection.images) > 1:
            raise UsageError(
                f"{destination}: one file cannot hold {len(selection.images)} images",
                hint="choose one: --platform linux/amd64",
            )
        await job.dictionaries.open(wanted.chunk_dicts, settings)
        await _Conversion(job, origin, reference).run(selection)
    finally:
        await job.aclose()
        await origin.aclose()
    return job.outcome


class _Conversion:
    def __init__(self, job: Job, origin: Origin, reference: Reference) -> None:
        self._job = job
        self._origin = origin
        self._reference = reference
        self._options = (
            plain.spool_options(job.wanted.options) if job.wanted.format == "erofs" else job.wanted.options
        )

        self._fresh: dict[str, LayerRecord] = {}

    async def run(self, selection: Selection) -> None:
        """Everything."""
        job = self._job
        await self._convert_layers(selection)
        if job.destination.loose:
            image = selection.images[0]
            finished = await job.finish(image.name, self._records(image), 0)
            await job.write_loose(finished)
            return
        target = job.open_target()
        try:
            images = [await self._ready(image, n, target) for n, image in enumerate(selection.images)]
            await job.publish(target, images, self._index(selection, images))
        finally:
            await target.aclose()

    # --- layers ---

    async def _convert_layers(self, selection: Selection) -> None:
        job = self._job
        todo: dict[str, Descriptor] = {}
        for image in selection.images:
            for layer in image.manifest.layers:
                key = self._key(layer)
                job.outcome.layers += 1
                if job.work.knows(key):
                    job.outcome.layers_reused += 1
                else:
                    todo.setdefault(key, layer)
        size = sum(layer.size for layer in todo.values())
        with job.report.phase("convert", size) as tell:
            try:
                async with asyncio.TaskGroup() as group:
                    sources = self._fetch(todo, group)
                    for key, layer in todo.items():
                        await self._convert_layer(key, layer, sources[key], tell)
            except BaseExceptionGroup as exc:
                raise exc.exceptions[0] from exc

    def _fetch(self, todo: Mapping[str, Descriptor], group: asyncio.TaskGroup) -> dict[str, Place | Arrival]:
        """Have all layers come here, some at a time; where each will be."""
        places: dict[str, Place | Arrival] = {}
        coming: list[tuple[Arrival, Descriptor]] = []
        for key, layer in todo.items():
            place = self._origin.place(layer)
            if place is None:
                arrival = Arrival(self._job.work.fetched(layer.digest), layer.size)
                coming.append((arrival, layer))
            places[key] = place or arrival
        waiting = iter(coming)

        async def work() -> None:
            for arrival, layer in waiting:
                await arrival.fill(self._origin.holders(layer), layer.blob_id)

        for _ in range(min(ARRIVALS_AT_ONCE, len(coming))):
            group.create_task(work())
        return places

    async def _convert_layer(self, key: str, layer: Descriptor, source: Place | Arrival, tell: Tell) -> None:
        with LayerFile(source, layer, f"layer {layer.digest}", tell) as file:
            try:
                record = await self._job.in_thread(self._pack, key, layer, file)
            finally:
                file.give_up()  # nobody may wait for more of it
        if isinstance(source, Arrival):
            source.place.path.unlink(missing_ok=True)
        self._fresh[key] = record

    def _pack(self, key: str, layer: Descriptor, file: LayerFile) -> LayerRecord:
        job = self._job
        name = f"layer {layer.digest}"
        warnings: list[str] = []
        chunks = ImageChunks(job.dictionaries.chunks)
        path = job.work.scratch(f"blob-{layer.blob_id}")
        entries = with_digests(TarSource(file, name, lenient_end=True), stop=job.stop)
        try:
            with (
                path.open("wb") as out,
                Packer(self._options, chunks, out) as packer,
                closing(entries),
            ):
                packed = pack_layer(name, entries, packer, whiteouts=True, warn=warnings.append)
            file.finish()
        except ImageRefused:
            file.finish()  # what is wrong with it is that it is another one
            raise
        if packed.blob is not None:
            job.work.keep_blob(path, packed.blob.blob_id)
        record = LayerRecord(packed, chunks.chunks, warnings)
        job.work.save(key, record)
        return record

    def _records(self, image: SourceImage) -> Iterator[LayerRecord]:
        """What the layers of *image* became, lowest first."""
        for layer in image.manifest.layers:
            key = self._key(layer)
            record = self._fresh.pop(key, None) or self._job.work.load(key)
            if record is None:
                raise SourceError(f"{self._job.work.path}: layer {layer.digest} has gone from it")
            for warning in record.warnings:
                self._job.warn(warning)
            yield record

    def _key(self, layer: Descriptor) -> str:
        return f"{_RULES} {layer.digest} {self._options.fingerprint}{self._job.dictionaries.fingerprint}"

    # --- images ---

    async def _ready(self, image: SourceImage, number: int, target: ImageTarget) -> ReadyImage:
        job = self._job
        finished = await job.finish(image.name, self._records(image), number)
        registry = isinstance(self._reference, RegistryReference)
        annotations = converted_annotations(
            image.manifest.annotations or {},
            image.document.digest,
            str(self._reference).removeprefix("docker://") if registry else None,
        )
        subject = None
        if job.wanted.referrer:
            subject = subject_of(image.document, image.manifest.media_type or image.document.media_type)
        ready = await job.ready(finished, image.config, annotations, target, subject=subject)
        platform = image.platform
        job.outcome.platforms.append("/".join(filter(None, map(platform.get, _PLATFORM))))
        entry_annotations = (image.entry or {}).get("annotations") or {}
        return replace(ready, platform=platform, annotations=entry_annotations)

    def _index(self, selection: Selection, images: list[ReadyImage]) -> bytes | None:
        if selection.index is None:
            return None
        source = parse_json(selection.index.body, selection.index.name)
        subject = None
        if self._job.wanted.referrer:
            subject = subject_of(selection.index, source.get("mediaType") or selection.index.media_type)
        return image_index(images, source.get("annotations") or {}, subject)
