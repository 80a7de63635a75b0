"""Which RDMA devices each rank of a host uses.

    PS_P2P_STORE_RDMA_DEVICES=mlx5_0,mlx5_1      these, and an error if one is not there
    NCCL_IB_HCA='^=mlx5_9'                       else those that NCCL would use
                                                 else every device with an active port

The devices are dealt to the host's GPUs in equal numbers: those nearest in the host's PCIe tree, where sysfs
shows it for all of them, else by their order.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

from ckpt_engine.errors import ConfigError
from ckpt_engine.settings import Settings
from ckpt_engine.transport.verbs import RdmaDevice, list_devices

logger = logging.getLogger(__name__)

MAX_DEVICES = 32
"""That NCCL uses at most."""

SYSFS = Path("/sys")


def parse_nccl_ib_hca(value: str | None, available: Sequence[str]) -> list[str]:
    """The devices that a value of NCCL_IB_HCA chooses, in the order of `available`, at most 32.

    The value is a list of names, separated by commas. A name means every device that begins with it, unless
    it is the whole name of one: then it means just that (NCCL itself would take `mlx5_10` for `mlx5_1`,
    too). `=` before the list: names are whole names. `^` before the list, or `^=`: all devices but these.
    What follows a colon is a port, and does not count. Nothing at all means every device.

    Raises:
        ConfigError: the list begins with `=^`.
    """
    text = (value or "").strip()
    if text.startswith("=^"):
        raise ConfigError(
            f"NCCL_IB_HCA={value!r} begins with '=^': write '^=' for all devices but those named"
        )
    if not text:
        return list(available[:MAX_DEVICES])
    excludes = text.startswith("^")
    text = text.removeprefix("^")
    exact = text.startswith("=")
    names = [token.split(":")[0].strip() for token in text.removeprefix("=").split(",")]
    named: set[str] = set()
    for name in filter(None, names):
        found = {name} & {*available}
        if not found and not exact:
            found = {device for device in available if device.startswith(name)}
        if not found:
            logger.warning("NCCL_IB_HCA=%r: no RDMA device is called %r here", value, name)
        named |= found
    return [device for device in available if (device in named) != excludes][:MAX_DEVICES]


def chosen_devices(settings: Settings, found: Sequence[RdmaDevice]) -> list[str]:
    """Those of the devices found here that the settings choose.

    Raises:
        ConfigError: one that PS_P2P_STORE_RDMA_DEVICES names cannot be used, or NCCL_IB_HCA is malformed.
    """
    usable = [device.name for device in found if not device.problem]
    named = [name.strip() for name in (settings.rdma_devices or "").split(",") if name.strip()]
    if not named:
        return parse_nccl_ib_hca(settings.nccl_ib_hca, usable)
    problems = {device.name: device.problem for device in found if device.problem}
    for name in named:
        if name not in usable:
            why = problems.get(name, f"libibverbs lists {', '.join(usable) or 'no usable device'}")
            raise ConfigError(f"PS_P2P_STORE_RDMA_DEVICES names {name}, which cannot be used here: {why}")
    return list(dict.fromkeys(named))


def devices_of_ranks(
    settings: Settings,
    gpu_count: int,
    pci_addresses: Sequence[str] = (),
    *,
    found: Sequence[RdmaDevice] | None = None,
    sysfs: Path = SYSFS,
) -> list[str]:
    """For each of a host's GPUs, by local rank, its devices: names joined by commas, "" where there are none.

    Args:
        gpu_count: GPUs of this host, each with a rank.
        pci_addresses: theirs, such as "0000:1b:00.0", if known.
        found: the host's devices; by default what libibverbs lists.

    Raises:
        ConfigError: the settings name what is not there, or the devices cannot be shared out equally.
    """
    devices = chosen_devices(settings, list_devices() if found is None else found)
    if not devices:
        return [""] * gpu_count
    return share_out(devices, gpu_count, pci_closeness(devices, pci_addresses, gpu_count, sysfs))


Closeness = Callable[[int, str], int]
"""(a GPU's number, a device's name) -> how close they are: more is closer."""


def share_out(devices: Sequence[str], gpu_count: int, closeness: Closeness | None = None) -> list[str]:
    """Gives each GPU its devices, joined by commas, every GPU the same number, every device to as many.

    The closest pairs first; without `closeness`, or between equally close ones, in the order of GPUs and
    devices: equal runs.

    Raises:
        ConfigError: neither number divides the other.
    """
    larger, smaller = max(len(devices), gpu_count), min(len(devices), gpu_count)
    if not devices or gpu_count < 1 or larger % smaller:
        raise ConfigError(
            f"{len(devices)} RDMA devices ({', '.join(devices)}) cannot be shared out equally among "
            f"{gpu_count} GPUs: choose as many, a divisor or a multiple of it with PS_P2P_STORE_RDMA_DEVICES "
            "or NCCL_IB_HCA"
        )
    per_gpu = len(devices) // smaller if len(devices) > gpu_count else 1
    gpus_each = gpu_count // smaller if gpu_count > len(devices) else 1
    pairs = sorted(
        (-closeness(gpu, device) if closeness else 0, gpu, number)
        for gpu in range(gpu_count)
        for number, device in enumerate(devices)
    )
    # The tree's closeness is that of a hierarchy, in which taking the closest pair first is best over all.
    taken: list[list[int]] = [[] for _ in range(gpu_count)]
    uses = [0] * len(devices)
    for _, gpu, number in pairs:
        if len(taken[gpu]) < per_gpu and uses[number] < gpus_each:
            taken[gpu].append(number)
            uses[number] += 1
    return [",".join(devices[number] for number in sorted(numbers)) for numbers in taken]


def pci_closeness(
    devices: Sequence[str], pci_addresses: Sequence[str], gpu_count: int, sysfs: Path = SYSFS
) -> Closeness | None:
    """How many steps down the host's tree (NUMA node, root complex, switches) two devices have in common.

    None where sysfs does not show the place of all of them.
    """
    if len(pci_addresses) != gpu_count:
        return None
    gpus = [_place(sysfs / "bus/pci/devices" / address.lower(), sysfs) for address in pci_addresses]
    nics = {device: _place(sysfs / "class/infiniband" / device / "device", sysfs) for device in devices}
    if not all(gpus) or not all(nics.values()):
        return None

    def common(gpu: int, device: str) -> int:
        steps = 0
        for mine, theirs in zip(gpus[gpu], nics[device], strict=False):
            if mine != theirs:
                break
            steps += 1
        return steps

    return common


def _place(link: Path, sysfs: Path) -> tuple[str, ...]:
    """From the NUMA node down to the device; empty where it is not a PCI device that sysfs shows."""
    path = link.resolve()
    try:
        steps = path.relative_to(sysfs.resolve() / "devices").parts
        node = (path / "numa_node").read_text().strip()
    except (OSError, ValueError):
        return ()
    return (f"node {node}", *steps)
