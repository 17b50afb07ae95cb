"""What ``check --against`` compares an image with: another image of either kind, a directory, a tar."""

from __future__ import annotations

import argparse
import asyncio
import os
import re
from collections.abc import AsyncIterator, Iterable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from erofsd.backends.located import locate
from erofsd.backends.manifest import OrdinaryImage, this_platform
from erofsd.backends.reference import (
    ArchiveReference,
    PathReference,
    Reference,
    parse_reference,
)
from erofsd.backends.settings import SourceSettings
from erofsd.backends.sniff import HEAD_SIZE, sniff
from erofsd.build import sides
from erofsd.build.compare import Item, directory_items, image_items, node_items
from erofsd.build.origin import open_origin
from erofsd.build.readback import open_located
from erofsd.build.workdir import WorkDir
from erofsd.cli.imaging import Console, source_settings
from erofsd.images.tree import Node

_TAR_NAME = re.compile(r"\.(tar(\.\w+)?|tgz)$")


@dataclass(frozen=True, slots=True)
class Side:
    """The other tree.

    Attributes:
        warnings: What of it no image can hold, and is left out.
    """

    items: Iterable[Item]
    warnings: list[str]


@asynccontextmanager
async def open_side(args: argparse.Namespace, console: Console) -> AsyncIterator[Side]:
    """The tree that ``--against`` names.

    Raises:
        UsageError, ImageRefused, SourceError: It cannot be read.
    """
    settings = source_settings(args)
    warnings: list[str] = []

    def warn(text: str) -> None:
        warnings.append(text)
        console.warn(text)

    async with AsyncExitStack() as stack:
        reference = _parse(args.against)
        items: Iterable[Item]
        if isinstance(reference, PathReference) and reference.path.is_dir():
            items = directory_items(reference.path)
        elif isinstance(reference, PathReference) and not _is_image(reference.path):
            with console.phase("read", os.stat(reference.path).st_size) as tell:
                root = await asyncio.to_thread(sides.tar_tree, reference.path, warn, tell)
            items = node_items(root)
        else:
            items = await _image_items(reference, args, settings, stack, console, warnings)
        yield Side(items, warnings)


def _parse(text: str) -> Reference:
    """*text* as a reference; a directory or tar that is there needs no ./ before it."""
    path = Path(text)
    if path.is_dir() or (_TAR_NAME.search(text) and path.is_file()):
        return PathReference(path)
    return parse_reference(text)


def _is_image(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return sniff(file.read(HEAD_SIZE)) is not None
    except OSError:
        return True  # whoever opens it as one says what is wrong


async def _image_items(
    reference: Reference,
    args: argparse.Namespace,
    settings: SourceSettings,
    stack: AsyncExitStack,
    console: Console,
    warnings: list[str],
) -> Iterable[Item]:
    if not isinstance(reference, ArchiveReference):
        try:
            located = await locate(reference, settings=settings, blobs=args.blobs or None)
        except OrdinaryImage:
            pass
        else:
            stack.push_async_callback(located.backend.aclose)
            image = await open_located(located)
            stack.callback(image.close)
            return image_items(image.tree)
    return node_items(await _ordinary_tree(reference, settings, console, warnings))


async def _ordinary_tree(
    reference: Reference, settings: SourceSettings, console: Console, warnings: list[str]
) -> Node:
    def warn(text: str) -> None:
        warnings.append(text)
        console.warn(text)

    origin = await open_origin(reference, settings)
    try:
        selection = await origin.select([this_platform()])
        chosen = selection.images[0]
        size = sum(layer.size for layer in chosen.manifest.layers)
        with WorkDir(None, f"against {reference}") as work, console.phase("read", size) as tell:
            return await sides.image_tree(origin, chosen, work, warn, tell)
    finally:
        await origin.aclose()
