"""Which devices a parameter server would use here, and what it would call them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from ckpt_engine.devices import cpu_uuid, detect_device, device_count, numa_place_of
from ckpt_engine.devices.numa import NumaPlace
from ckpt_engine.errors import ConfigError
from ckpt_engine.findings import Finding, Level
from ckpt_engine.settings import Settings


def find(settings: Settings, environment: Mapping[str, str]) -> Iterator[Finding]:
    """The kind that would be detected, and the keys of CUDA and CPU devices (NPUs': the Ascend adapter's)."""
    try:
        kind = detect_device(None)
    except ConfigError as error:
        yield Finding("devices", Level.ERROR, str(error))
        return
    count = device_count(kind)
    yield Finding("devices", Level.OK, kind if count is None else f"{count} of kind {kind}")
    if kind == "cpu":
        yield Finding("cpu 0", Level.OK, settings.device_uuid or cpu_uuid(settings, 0))
    if kind == "cuda":
        from ckpt_engine.devices.cuda import cuda_uuid

        for index in range(count or 0):
            yield Finding(f"cuda {index}", Level.OK, cuda_uuid(settings, index))
            place = numa_place_of(kind, index)
            if place is not None:
                yield _numa(f"cuda {index}", place, settings)


def _numa(subject: str, place: NumaPlace, settings: Settings) -> Finding:
    if not settings.numa:
        return Finding(subject, Level.OK, f"is on {place}; CKPT_ENGINE_NUMA is off")
    if place.cpus:
        return Finding(subject, Level.OK, f"is on {place}: there host arenas are made")
    return Finding(
        subject,
        Level.WARNING,
        f"is on {place}: host arenas lie on another node, whence copies to it are slower",
        remedy="allow this container CPUs of that node (--cpuset-cpus), or another GPU",
    )
