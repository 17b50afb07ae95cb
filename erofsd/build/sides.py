"""Trees to compare an image with: of a tar, of an ordinary image; read without storing anything."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path
from typing import cast

from erofsd.backends.documents import Descriptor
from erofsd.backends.localfs import translate
from erofsd.build.arrivals import Arrival, LayerFile
from erofsd.build.content import Digester, with_digests
from erofsd.build.layers import Layer, merge, pack_layer
from erofsd.build.origin import Origin, SourceImage
from erofsd.build.pack import Packer
from erofsd.build.report import Tell, Told
from erofsd.build.source import SourceEntry, Warn
from erofsd.build.tarstream import TarSource
from erofsd.build.workdir import WorkDir
from erofsd.errors import ImageRefused
from erofsd.images.tree import Node


def tar_tree(path: Path, warn: Warn, tell: Tell = lambda size: None) -> Node:
    """The tree in one tar, with content digests. Blocks.

    Args:
        tell: Hears how many more bytes of the tar were read.

    Raises:
        CorruptImage, UnsupportedImage, SourceError: It cannot be read.
    """
    try:
        with path.open("rb") as file:
            layer = _digested(str(path), TarSource(Told(file, tell), str(path)), warn, whiteouts=False)
    except OSError as exc:
        raise translate(exc, str(path)) from exc
    return merge([layer], warn=warn)


async def image_tree(origin: Origin, image: SourceImage, work: WorkDir, warn: Warn, tell: Tell) -> Node:
    """The tree that the layers of *image* make, with content digests.

    Raises:
        ImageRefused, SourceError: A layer is not what it should be, or cannot be had.
    """
    layers: list[Layer] = []
    for descriptor in image.manifest.layers:
        layers.append(await _layer(origin, descriptor, work, warn, tell))
    return await asyncio.to_thread(merge, layers, warn=warn)


async def _layer(origin: Origin, descriptor: Descriptor, work: WorkDir, warn: Warn, tell: Tell) -> Layer:
    place = origin.place(descriptor)
    name = f"layer {descriptor.digest}"
    if place is not None:
        with LayerFile(place, descriptor, name, tell) as file:
            return await asyncio.to_thread(_read_layer, name, file, warn)
    arrival = Arrival(work.scratch(descriptor.blob_id), descriptor.size)
    async with asyncio.TaskGroup() as group:
        group.create_task(arrival.fill(origin.holders(descriptor), descriptor.blob_id))
        with LayerFile(arrival, descriptor, name, tell) as file:
            try:
                layer = await asyncio.to_thread(_read_layer, name, file, warn)
            except asyncio.CancelledError:
                file.give_up()
                raise
    arrival.place.path.unlink()
    return layer


def _read_layer(name: str, file: LayerFile, warn: Warn) -> Layer:
    try:
        layer = _digested(name, TarSource(file, name, lenient_end=True), warn, whiteouts=True)
        file.finish()
    except ImageRefused:
        file.finish()  # what is wrong with it is that it is another one
        raise
    return layer


def _digested(name: str, source: Iterable[SourceEntry], warn: Warn, *, whiteouts: bool) -> Layer:
    with closing(with_digests(source)) as entries:
        digester = cast(Packer, Digester())
        return pack_layer(name, entries, digester, whiteouts=whiteouts, warn=warn)
