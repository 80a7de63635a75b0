"""Devices, and the choice of one by name or by what is there."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import torch

from ckpt_engine.devices.base import Device, MappedRing, Ring, RingMemory, Staging
from ckpt_engine.devices.cpu import CpuDevice, SharedRing, cpu_uuid
from ckpt_engine.devices.handles import NpuRing, RingHandle, SharedMemoryRing
from ckpt_engine.devices.npu import load as load_npu
from ckpt_engine.devices.npu import npu_is_available, npu_uuid
from ckpt_engine.devices.numa import NumaPlace, numa_place
from ckpt_engine.errors import ConfigError, ProtocolError
from ckpt_engine.settings import Settings, load_settings

__all__ = [
    "CpuDevice",
    "Device",
    "MappedRing",
    "Ring",
    "RingMemory",
    "SharedRing",
    "Staging",
    "cpu_uuid",
    "detect_device",
    "device_count",
    "make_device",
    "map_ring",
    "numa_place_of",
    "open_shared_ring",
    "pci_addresses",
    "synchronize_stream",
    "worker_uuid",
]


def detect_device(name: str | None) -> str:
    """The kind of device to use: `name`, or what this host has.

    Raises:
        ConfigError: no such kind, or none of it is here.
    """
    if name not in (None, "cpu", "cuda", "npu"):
        raise ConfigError(f"device={name!r}: give 'cuda', 'npu' or 'cpu', or leave it out to detect it")
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device='cuda', but torch finds no CUDA device here")
    if name == "npu" and not load_npu().is_available():
        raise ConfigError("device='npu', but torch_npu finds no Ascend NPU here")
    return name or ("cuda" if torch.cuda.is_available() else "npu" if npu_is_available() else "cpu")


def device_count(kind: str) -> int | None:
    """How many devices of this kind this process sees; None where any number will do."""
    if kind == "npu":
        return int(load_npu().device_count())
    return torch.cuda.device_count() if kind == "cuda" else None


def pci_addresses(kind: str) -> list[str]:
    """Of all devices of this kind that this process sees, such as "0000:1b:00.0"; empty where unknown."""
    if kind != "cuda":
        return []
    from ckpt_engine.devices.cudart import pci_address

    return [pci_address(index) for index in range(torch.cuda.device_count())]


def numa_place_of(kind: str, index: int) -> NumaPlace | None:
    """Where the device is in the host; None where there is one node only, or nothing says so."""
    addresses = pci_addresses(kind)
    return numa_place(addresses[index]) if index < len(addresses) else None


def make_device(name: str | None, settings: Settings, index: int) -> Device:
    """The rank's device.

    Args:
        name: `cuda`, `npu` or `cpu`, or None to detect.
        index: the device's number among those that this process sees.

    Raises:
        ConfigError: no such device here.
    """
    kind = detect_device(name)
    if settings.custom_dist == "vllm_hccl" and kind != "npu":
        raise ConfigError(
            f"CKPT_ENGINE_CUSTOM_DIST=vllm_hccl is for NPUs; this rank's device is of kind {kind}"
        )
    if kind == "cpu":
        return CpuDevice(settings, index)
    if kind == "npu":
        from ckpt_engine.devices.npu import NpuDevice

        return NpuDevice(settings, index)
    from ckpt_engine.devices.cuda import CudaDevice

    return CudaDevice(settings, index)


def worker_uuid(device_id: int, kind: str | None = None) -> str:
    """The key of an engine worker's own device, to give to `serve_update`.

    Args:
        device_id: the worker's own index of it; on CPU CKPT_ENGINE_CPU_DEVICES maps it to the host's.
        kind: `cuda`, `npu` or `cpu`, or None to detect.

    Raises:
        ConfigError: no such device here.
        DeviceError: it cannot be told which NPU it is.
    """
    settings = load_settings()
    kind = detect_device(kind)
    if kind == "cpu":
        return cpu_uuid(settings, device_id)
    if kind == "npu":
        # Not the whole device: that is for those who export memory, and an engine's may be set up otherwise.
        return npu_uuid(settings, device_id)
    return make_device(kind, settings, device_id).uuid()


def map_ring(handle: RingHandle, descriptors: list[int], device_id: int | None) -> MappedRing:
    """Maps a ring in a worker; takes over the descriptors, also on failure.

    Args:
        device_id: the worker's own index of the device; None on CPU.

    Raises:
        ProtocolError: the handle or its descriptors are not what they claim to be.
        ConfigError: the ring lies on another device.
    """
    if isinstance(handle, SharedMemoryRing):
        return open_shared_ring(handle, descriptors, writable=True)
    _close_all(descriptors)
    if descriptors:
        raise ProtocolError("descriptors came with a ring in device memory, which needs none")
    if device_id is None:
        raise ConfigError(
            "the ring lies in device memory: give device_id, this worker's own index of the device"
        )
    if isinstance(handle, NpuRing):
        from ckpt_engine.devices import npu

        return npu.WorkerRing(device_id, handle)
    from ckpt_engine.devices.cuda import WorkerRing

    return WorkerRing(device_id, handle)


def synchronize_stream(device_id: int | None) -> None:
    """Waits for a worker's current stream (nothing on CPU). Raises what the device reports as failed."""
    if device_id is not None and torch.cuda.is_available():
        torch.cuda.current_stream(device_id).synchronize()
    elif device_id is not None and "torch_npu" in sys.modules:
        load_npu().current_stream(device_id).synchronize()


def open_shared_ring(handle: RingHandle, descriptors: Sequence[int], *, writable: bool) -> SharedRing:
    """Maps a ring in host memory; takes over the descriptors, also on failure."""
    if not isinstance(handle, SharedMemoryRing) or len(descriptors) != 1:
        _close_all(descriptors)
        raise ProtocolError(f"a shared-memory ring needs one descriptor, got {len(descriptors)}")
    return SharedRing.open(descriptors[0], handle.nbytes, writable=writable)


def _close_all(descriptors: Sequence[int]) -> None:
    for fd in descriptors:
        os.close(fd)
