"""Devices, and the choice of one by name or by what is there."""

from __future__ import annotations

import os

from ckpt_engine.devices.base import Device, Ring
from ckpt_engine.devices.cpu import CpuDevice, SharedRing, cpu_uuid
from ckpt_engine.devices.handles import RingHandle
from ckpt_engine.errors import ConfigError, ProtocolError
from ckpt_engine.settings import Settings

__all__ = ["CpuDevice", "Device", "Ring", "SharedRing", "cpu_uuid", "make_device", "open_ring"]


def make_device(name: str | None, settings: Settings, index: int) -> Device:
    """The rank's device.

    Args:
        name: `cpu`, or None to detect. `cuda` and `npu` are refused until their modules are there.
        index: the device's number on this host.

    Raises:
        ConfigError: no such device in this version.
    """
    if name in (None, "cpu"):
        return CpuDevice(settings, index)
    raise ConfigError(f"device={name!r}: this version runs on 'cpu' only")


def open_ring(handle: RingHandle, descriptors: list[int], *, writable: bool) -> Ring:
    """Maps a ring from its handle; takes over the descriptors, also on failure."""
    fd, *others = descriptors or [-1]
    for other in others:
        _close(other)
    if fd < 0 or others:
        _close(fd)
        raise ProtocolError(f"a shared-memory ring needs one descriptor, got {len(descriptors)}")
    return SharedRing.open(fd, handle.nbytes, writable=writable)


def _close(fd: int) -> None:
    if fd >= 0:
        os.close(fd)
