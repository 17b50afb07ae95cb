"""Prometheus text of what the daemon does."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields

import psutil
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from erofsd.api import MountInfo
from ondemand.engines.base import EngineStatistics

GAUGES = {"in_flight"}  # of EngineStatistics; all others only grow

MOUNT_COUNTERS = {
    "transferred_bytes": "Bytes that came from the source for this mount",
    "waits": "Misses: times a reader had to wait",
    "errors": "Misses that ended in EIO",
}
MOUNT_GAUGES = {
    "fetched_bytes": "Stored bytes of the image's chunks that are present",
    "total_bytes": "Stored bytes of all of the image's chunks",
}


class _Collector:
    def __init__(self, mounts: Iterable[MountInfo], engines: Mapping[str, EngineStatistics]) -> None:
        self._mounts = list(mounts)
        self._engines = engines

    def collect(self) -> Iterator[Metric]:
        labels = ["dir", "ref", "engine"]
        for name, text in MOUNT_COUNTERS.items():
            counter = CounterMetricFamily(f"erofsd_mount_{name}", text, labels=labels)
            for mount in self._mounts:
                counter.add_metric([mount.dir or "", mount.ref, mount.engine], getattr(mount, name))
            yield counter
        for name, text in MOUNT_GAUGES.items():
            gauge = GaugeMetricFamily(f"erofsd_mount_{name}", text, labels=labels)
            for mount in self._mounts:
                gauge.add_metric([mount.dir or "", mount.ref, mount.engine], getattr(mount, name))
            yield gauge
        states = GaugeMetricFamily("erofsd_mounts", "Mounts by state", labels=["state"])
        for state in ("lazy", "complete", "failed"):
            states.add_metric([state], sum(mount.state == state for mount in self._mounts))
        yield states
        for field in fields(EngineStatistics):
            kind = GaugeMetricFamily if field.name in GAUGES else CounterMetricFamily
            family = kind(f"erofsd_engine_{field.name}", f"Engine: {field.name}", labels=["engine"])
            for name, statistics in self._engines.items():
                family.add_metric([name], getattr(statistics, field.name))
            yield family
        yield from _process()


def _process() -> Iterator[Metric]:
    process = psutil.Process()
    with process.oneshot():
        times = process.cpu_times()
        yield CounterMetricFamily("erofsd_cpu_seconds", "CPU time of the worker", times.user + times.system)
        yield GaugeMetricFamily(
            "erofsd_resident_bytes", "Resident memory of the worker", process.memory_info().rss
        )
        yield GaugeMetricFamily("erofsd_threads", "Threads of the worker", process.num_threads())
        yield GaugeMetricFamily("erofsd_tasks", "asyncio tasks of the worker", len(asyncio.all_tasks()))
        yield GaugeMetricFamily("erofsd_descriptors", "Open descriptors of the worker", process.num_fds())


def render(mounts: Iterable[MountInfo], engines: Mapping[str, EngineStatistics]) -> bytes:
    """The metrics in Prometheus' text format, version 0.0.4."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Collector(mounts, engines))
    return generate_latest(registry)
