"""Makes an image of one directory, or of one tar: one layer, one tree."""

from __future__ import annotations

import stat
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from erofsd.backends.localfs import translate
from erofsd.backends.manifest import this_platform
from erofsd.backends.settings import SourceSettings
from erofsd.build import plain
from erofsd.build.chunks import ImageChunks
from erofsd.build.content import with_digests
from erofsd.build.destination import Destination
from erofsd.build.job import Job, Outcome, Wanted
from erofsd.build.layers import pack_layer
from erofsd.build.pack import Packer
from erofsd.build.publish import converted_annotations, new_config
from erofsd.build.record import LayerRecord
from erofsd.build.report import Reporter, Tell, Told
from erofsd.build.source import DirectorySource, SourceEntry
from erofsd.build.tarstream import TarSource
from erofsd.build.workdir import WorkDir
from erofsd.errors import UsageError


async def create(
    path: Path,
    destination: Destination,
    wanted: Wanted,
    settings: SourceSettings,
    work: WorkDir,
    report: Reporter,
) -> Outcome:
    """Make an image of what is at *path*, and publish it.

    Raises:
        UsageError: It is neither a directory nor a file.
        CorruptImage: It is no sound tar.
        SourceError: It cannot be read, or the destination does not answer.
    """
    job = Job(wanted, destination, settings, work, report)
    try:
        await job.dictionaries.open(wanted.chunk_dicts, settings)
        record = await job.in_thread(_pack, job, path)
        finished = await job.finish(str(path), [record], 0)
        if destination.loose:
            await job.write_loose(finished)
            return job.outcome
        config = new_config(wanted.platforms[0] if wanted.platforms else this_platform())
        job.outcome.platforms = ["/".join(filter(None, (config["os"], config["architecture"])))]
        target = job.open_target()
        try:
            annotations = converted_annotations({}, None, None)
            await job.publish(target, [await job.ready(finished, config, annotations, target)], None)
        finally:
            await target.aclose()
    finally:
        await job.aclose()
    return job.outcome


def _pack(job: Job, path: Path) -> LayerRecord:
    with _named(path):
        status = path.stat()
    if stat.S_ISDIR(status.st_mode):
        with job.report.phase("build", None) as tell:
            return _pack_source(job, path, DirectorySource(path, job.wanted.prefetch), tell)
    if not stat.S_ISREG(status.st_mode):
        raise UsageError(f"{path}: neither a directory nor a file")
    with _named(path):
        file = path.open("rb")
    with file, job.report.phase("build", status.st_size) as tell:
        source = TarSource(Told(file, tell), str(path))
        return _pack_source(job, path, source, lambda size: None)


@contextmanager
def _named(path: Path) -> Iterator[None]:
    # Only while the source is opened: what is said later may be about where the result goes.
    try:
        yield
    except OSError as exc:
        raise translate(exc, str(path)) from exc


def _pack_source(job: Job, path: Path, source: Iterable[SourceEntry], tell: Tell) -> LayerRecord:
    wanted = job.wanted
    options = plain.spool_options(wanted.options) if wanted.format == "erofs" else wanted.options
    chunks = ImageChunks(job.dictionaries.chunks)
    scratch = job.work.scratch("blob")
    entries = with_digests(source, digests=wanted.check, stop=job.stop)
    with (
        scratch.open("wb") as out,
        Packer(options, chunks, out, progress=tell) as packer,
        closing(entries),
    ):
        layer = pack_layer(str(path), entries, packer, whiteouts=False, warn=job.warn)
    if layer.blob is not None:
        job.work.keep_blob(scratch, layer.blob.blob_id)
        if wanted.format != "erofs":  # else it is a spool, which nobody keeps
            job.work.write_back(layer.blob.blob_id)
    job.outcome.layers = 1
    return LayerRecord(layer, chunks.chunks)
