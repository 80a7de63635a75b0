"""Which RDMA devices P2P would use here, and which rank which of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from ckpt_engine.devices import detect_device, device_count, pci_addresses
from ckpt_engine.errors import ConfigError
from ckpt_engine.findings import Finding, Level
from ckpt_engine.settings import Settings
from ckpt_engine.transport.rdma import devices_of_ranks
from ckpt_engine.transport.verbs import LIBRARY, RdmaDevice, list_devices, load_library


def find(settings: Settings, environment: Mapping[str, str]) -> Iterator[Finding]:
    """Each device with its ports, and the devices of each local rank."""
    try:
        kind = detect_device(None)
    except ConfigError as error:
        yield Finding("rdma", Level.WARNING, str(error))
        return
    if kind == "npu":
        yield Finding(
            "rdma", Level.OK, "P2P between NPUs goes over ascend_direct, without the host's devices"
        )
        return
    if load_library() is None:
        yield Finding(
            "rdma",
            Level.OK,
            f"{LIBRARY} is not installed: P2P would go over TCP",
            remedy="where there are RDMA devices, install libibverbs1 and the driver's providers",
        )
    found = list_devices()
    yield from describe(settings, found, kind)


def describe(settings: Settings, found: list[RdmaDevice], kind: str) -> Iterator[Finding]:
    """What there is to say of these RDMA devices, where ranks have devices of `kind`."""
    for device in found:
        ports = ", ".join(map(str, device.active_ports))
        yield Finding(
            f"rdma {device.name}",
            Level.WARNING if device.problem else Level.OK,
            device.problem or f"{'EFA, ' if device.is_efa else ''}port {ports} active",
        )
    try:
        count = device_count(kind) or settings.local_world_size or 1
        shared = devices_of_ranks(settings, count, pci_addresses(kind), found=found)
    except ConfigError as error:
        yield Finding("rdma devices", Level.WARNING, str(error))
        return
    for local_rank, names in enumerate(shared):
        yield Finding(
            f"rdma rank {local_rank}", Level.OK, names or "no RDMA device: its P2P would go over TCP"
        )
