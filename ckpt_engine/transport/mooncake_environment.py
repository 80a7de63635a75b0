"""The environment in which mooncake's engines start: what chooses their transport, and their patience.

mooncake reads these variables itself, some of them for each transfer: so they stay set. What the user has set
is never changed; where it contradicts what is wanted, that is an error.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Sequence

from ckpt_engine.errors import P2PUnavailable

logger = logging.getLogger(__name__)

_FORCE = {"tcp": "MC_FORCE_TCP", "rdma": "MC_FORCE_HCA"}
_AGAINST = {
    "tcp": "MC_FORCE_HCA",
    "rdma": "MC_FORCE_TCP",
    "efa": "MC_FORCE_TCP",
    "ascend_direct": "MC_FORCE_TCP",
}


def wanted_transport(
    device_type: str, rdma_devices: Sequence[str], efa_devices: Collection[str], asked: str = "auto"
) -> str:
    """`ascend_direct` on NPUs, `efa` or `rdma` as the devices are, `tcp` without any or with MC_FORCE_TCP.

    Args:
        asked: CKPT_ENGINE_P2P_TRANSPORT. `tcp` goes wherever there is no NPU; any other one must be what it
            would be by itself.

    Raises:
        P2PUnavailable: it is not; or some of the devices are EFA, and some are not.
    """
    if asked == "tcp" and device_type != "npu":
        return "tcp"
    found = _own_transport(device_type, rdma_devices, efa_devices)
    if asked not in ("auto", found):
        why = (
            "MC_FORCE_TCP is set"
            if found == "tcp" and rdma_devices
            else f"the devices are {', '.join(rdma_devices) or 'no RDMA devices'} of a {device_type} host"
        )
        raise P2PUnavailable(f"CKPT_ENGINE_P2P_TRANSPORT={asked}, but P2P would go over {found} here: {why}")
    return found


def _own_transport(device_type: str, rdma_devices: Sequence[str], efa_devices: Collection[str]) -> str:
    if device_type == "npu":
        return "ascend_direct"
    if not rdma_devices or "MC_FORCE_TCP" in os.environ:
        return "tcp"
    found = {name in efa_devices for name in rdma_devices}
    if len(found) > 1:
        raise P2PUnavailable(
            f"of the RDMA devices {', '.join(rdma_devices)} some are EFA and some are not: choose one "
            "kind with PS_P2P_STORE_RDMA_DEVICES"
        )
    return "efa" if found == {True} else "rdma"


def prepare_environment(transport: str, stall_seconds: float, *, ipv6: bool) -> None:
    """Sets what is not set yet.

    Args:
        stall_seconds: after how long without a byte a transfer over TCP fails. mooncake then closes the
            connection, so that no byte of it comes later.

    Raises:
        P2PUnavailable: a variable that the user has set forces another transport.
    """
    against = _AGAINST.get(transport)
    if against in os.environ:
        raise P2PUnavailable(
            f"{against} is set, which forces another transport than {transport}: unset it, or choose other "
            "RDMA devices (PS_P2P_STORE_RDMA_DEVICES, NCCL_IB_HCA)"
        )
    seconds = max(1, round(stall_seconds))
    wanted = {
        "MC_LOG_LEVEL": "ERROR",
        "MC_TCP_PROGRESS_TIMEOUT_SEC": str(seconds),
        # Below the transfer's: else mooncake gives up first, and goes on writing.
        "MC_TCP_STATUS_TIMEOUT_SEC": str(seconds),
        "MC_TRANSFER_TIMEOUT": str(max(5, 2 * seconds)),
    }
    if transport in _FORCE:
        wanted[_FORCE[transport]] = "1"
    if transport == "efa":
        wanted["FI_EFA_ENABLE_SHM_TRANSFER"] = (
            "0"  # libfabric's own way inside a host faults on device memory
        )
    if ipv6:
        wanted["MC_USE_IPV6"] = "1"
    for name, value in wanted.items():
        if os.environ.setdefault(name, value) != value:
            logger.info("%s=%s is kept, where %s would be set", name, os.environ[name], value)
    if float(os.environ["MC_TCP_STATUS_TIMEOUT_SEC"]) >= float(os.environ["MC_TRANSFER_TIMEOUT"]):
        logger.warning(
            "MC_TCP_STATUS_TIMEOUT_SEC=%s should be below MC_TRANSFER_TIMEOUT=%s",
            os.environ["MC_TCP_STATUS_TIMEOUT_SEC"],
            os.environ["MC_TRANSFER_TIMEOUT"],
        )
