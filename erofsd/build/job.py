"""What converting and building have in common: from packed layers to an image that can be published."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ParamSpec, TypeVar

from erofsd.backends.localfs import translate
from erofsd.backends.push import ImageTarget, store
from erofsd.backends.reference import FileReference, RegistryReference
from erofsd.backends.settings import SourceSettings
from erofsd.build import assemble, plain
from erofsd.build.assemble import Assembly, WrittenBootstrap
from erofsd.build.destination import Destination
from erofsd.build.dictionary import Dictionaries
from erofsd.build.expected import Expected, write_expected
from erofsd.build.options import BuildOptions
from erofsd.build.publish import (
    Json,
    ReadyImage,
    Stored,
    bootstrap_layer,
    data_layer,
    erofs_image,
    erofs_layer,
    nydus_image,
    publish,
    total_size,
)
from erofsd.build.record import LayerRecord
from erofsd.build.report import Reporter, Tell
from erofsd.build.workdir import WorkDir

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the user asked for.

    Attributes:
        format: ``rafs`` or ``erofs``.
        prefetch: Paths in the image, most urgent first.
        check: Read the image back and compare it with its source before it is published.
    """

    options: BuildOptions
    format: str = "rafs"
    chunk_dicts: tuple[str, ...] = ()
    prefetch: tuple[bytes, ...] = ()
    platforms: tuple[str, ...] = ()
    referrer: bool = False
    check: bool = True
    work_dir: Path | None = None


@dataclass(frozen=True, slots=True)
class Finished:
    """An image in files, proved where that was asked for.

    Attributes:
        image: Bootstrap, or EROFS image.
        bootstrap: Of a RAFS image.
        blobs: Own blobs by blob id.
        foreign: Blob ids of dictionary blobs that it refers to.
    """

    image: Path
    bootstrap: WrittenBootstrap | None
    blobs: Mapping[str, Path]
    foreign: tuple[str, ...]


@dataclass(slots=True)
class Outcome:
    """What came of it, for whoever asked. Sizes in bytes.

    Attributes:
        digest: Of the manifest or index; None for a loose image.
        blob_bytes: Stored size of all blobs, made or reused, but for those of dictionaries; for plain EROFS,
            of the image.
        checked: The image was read back and compared with its source.
    """

    ref: str
    digest: str | None = None
    platforms: list[str] = field(default_factory=list)
    entries: int = 0
    content_bytes: int = 0
    blob_bytes: int = 0
    layers: int = 0
    layers_reused: int = 0
    uploaded_bytes: int = 0
    present_bytes: int = 0
    checked: bool = False
    warnings: list[str] = field(default_factory=list)


class Job:
    """One run, with all that it has open.

    Attributes:
        outcome: Filled as it goes.
        stop: Set when nobody waits any more: threads end soon.
    """

    def __init__(
        self,
        wanted: Wanted,
        destination: Destination,
        settings: SourceSettings,
        work: WorkDir,
        report: Reporter,
    ) -> None:
        self.wanted = wanted
        self.destination = destination
        self.settings = settings
        self.work = work
        self.report = report
        self.dictionaries = Dictionaries(wanted.options)
        self.outcome = Outcome(str(destination))
        self.stop = threading.Event()

    async def in_thread(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """The result of *work*, which a thread does. A thread cannot be cancelled: it is told to stop."""
        try:
            return await asyncio.to_thread(work, *args, **kwargs)
        except asyncio.CancelledError:
            self.stop.set()
            raise

    def warn(self, text: str) -> None:
        """Tell, and remember."""
        self.outcome.warnings.append(text)
        self.report.warn(text)

    def open_target(self, mounts: Sequence[str] = ()) -> ImageTarget:
        """Where images with a manifest go."""
        mounts = [*mounts, *self._repositories()]
        return self.destination.open(self.settings, mounts, uploads=self.work.uploads)

    def _repositories(self) -> list[str]:
        reference = self.destination.reference
        if not isinstance(reference, RegistryReference):
            return []
        return self.dictionaries.all_repositories(reference.host)

    async def finish(self, name: str, records: Iterable[LayerRecord], number: int) -> Finished:
        """Merge *records*, write the image, and prove it.

        Args:
            name: For messages.
            number: Tells the images of one run apart.

        Raises:
            ImageRefused: The layers make no tree, or not one that the format can hold; or it is not proved.
        """
        finished, expected = await self._write(records, number)
        if expected is not None:
            with self.report.phase("check", expected.content_bytes) as tell:
                prove = self._prove_plain if finished.bootstrap is None else self._prove_rafs
                await prove(name, expected, finished, tell)
            self.outcome.checked = True
        return finished

    async def _write(self, records: Iterable[LayerRecord], number: int) -> tuple[Finished, Expected | None]:
        # The tree lives here only: reading the image back takes as much memory again.
        assembly = await self.in_thread(assemble.assemble, records, self.warn)
        self.outcome.entries += assembly.entries
        self.outcome.content_bytes += assembly.content_bytes
        expected = None
        if self.wanted.check:
            expected = await self.in_thread(
                write_expected, assembly.root, self.work.scratch(f"expected-{number}")
            )
        path = self.work.scratch(f"image-{number}")
        if self.wanted.format == "erofs":
            return await self._finish_plain(assembly, path), expected
        return await self._finish_rafs(assembly, path), expected

    async def _finish_rafs(self, assembly: Assembly, path: Path) -> Finished:
        wanted = self.wanted
        bootstrap = await asyncio.to_thread(
            assemble.write, assembly, path, wanted.options, wanted.prefetch, self.warn
        )
        own = {b.blob_id: self.work.blob(b.blob_id) for b in bootstrap.blobs}
        own = {blob_id: blob for blob_id, blob in own.items() if blob.exists()}
        foreign = tuple(b.blob_id for b in bootstrap.blobs if b.blob_id not in own)
        self.outcome.blob_bytes += sum(b.stored_size for b in bootstrap.blobs if b.blob_id in own)
        return Finished(path, bootstrap, own, foreign)

    async def _finish_plain(self, assembly: Assembly, path: Path) -> Finished:
        blobs = {b.blob_id: self.work.blob(b.blob_id) for b in assembly.chunks.blobs}
        self.outcome.blob_bytes += await asyncio.to_thread(
            plain.write, assembly, path, self.wanted.options, blobs
        )
        return Finished(path, None, {}, ())

    async def _prove_rafs(self, name: str, expected: Expected, finished: Finished, tell: Tell) -> None:
        assert finished.bootstrap is not None
        await assemble.prove(
            name,
            expected,
            finished.bootstrap,
            finished.blobs,
            self.dictionaries.blobs,
            self.wanted.options.jobs,
            tell,
        )

    async def _prove_plain(self, name: str, expected: Expected, finished: Finished, tell: Tell) -> None:
        await plain.prove(name, expected, finished.image, self.settings, tell)

    # --- as a registry holds it ---

    async def ready(
        self,
        finished: Finished,
        config: Json,
        annotations: Mapping[str, str],
        target: ImageTarget,
        *,
        subject: Json | None = None,
    ) -> ReadyImage:
        """The image with config and manifest.

        Args:
            config: Of its source.
            annotations: Of the manifest.
            target: Where it goes: asked for blobs of dictionaries.
            subject: See `nydus_image`.
        """
        if finished.bootstrap is None:
            layer = await asyncio.to_thread(erofs_layer, finished.image)
            return erofs_image(config, layer, annotations)
        data = [data_layer(blob_id, path.stat().st_size, path) for blob_id, path in finished.blobs.items()]
        foreign = {blob_id: await self._foreign_layer(blob_id, target) for blob_id in finished.foreign}
        by_id = {layer.digest.removeprefix("sha256:"): layer for layer in data} | foreign
        ordered = [by_id[blob.blob_id] for blob in finished.bootstrap.blobs]
        layer, diff_id = await asyncio.to_thread(
            bootstrap_layer,
            finished.image,
            finished.bootstrap.blob_metas,
            finished.image.with_name(f"{finished.image.name}.tar.gz"),
            self.wanted.options.jobs,
        )
        return nydus_image(config, ordered, layer, diff_id, annotations=annotations, subject=subject)

    async def _foreign_layer(self, blob_id: str, target: ImageTarget) -> Stored:
        """A blob of a dictionary as a layer; fetched only if *target* cannot come by it otherwise."""
        size = await self.dictionaries.size(blob_id)
        reference = self.destination.reference
        mounts: list[str] = []
        if isinstance(reference, RegistryReference):
            mounts = self.dictionaries.repositories(reference.host, blob_id)
        if await target.provide(f"sha256:{blob_id}", size, mounts):
            return data_layer(blob_id, size, b"", mounts)
        path = self.work.scratch(blob_id)
        await self.dictionaries.fetch(blob_id, path)
        return data_layer(blob_id, size, path, mounts)

    # --- out ---

    async def publish(self, target: ImageTarget, images: Sequence[ReadyImage], index: bytes | None) -> None:
        """Store *images* where they were wanted.

        Raises:
            As `erofsd.build.publish.publish`.
        """
        with self.report.phase("push", total_size(images)) as tell:
            published = await publish(target, images, index, self.destination.tag, tell)
        self.outcome.digest = published.digest
        self.outcome.ref = self.destination.named(published.digest)
        self.outcome.uploaded_bytes = published.uploaded_bytes
        self.outcome.present_bytes = published.present_bytes

    async def write_loose(self, finished: Finished) -> None:
        """Write an image in files where it was wanted: its blobs first.

        Raises:
            SourceError: It cannot be written, or a blob of a dictionary cannot be had.
        """
        assert isinstance(self.destination.reference, FileReference)
        blobs = dict(finished.blobs)
        for blob_id in finished.foreign:
            blobs[blob_id] = self.work.scratch(blob_id)
            await self.dictionaries.fetch(blob_id, blobs[blob_id])
        if (directory := self.destination.blobs) is not None:
            await asyncio.to_thread(_make_directory, directory)  # mounts name it, even if nothing is in it
        for blob_id, path in blobs.items():
            assert directory is not None  # parse_destination saw to it
            await asyncio.to_thread(store, path, directory / blob_id)
        await asyncio.to_thread(store, finished.image, self.destination.reference.path, replace=True)

    async def aclose(self) -> None:
        """Close all connections."""
        await self.dictionaries.aclose()


def _make_directory(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise translate(exc, str(path)) from exc
