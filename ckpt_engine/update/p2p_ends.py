"""A rank's two ends of P2P: what it serves to others, and what it reads from them."""

from __future__ import annotations

import logging
from typing import Any

from ckpt_engine.checkpoint import HostCheckpoint
from ckpt_engine.deadline import Deadline
from ckpt_engine.devices import Device, pci_addresses
from ckpt_engine.errors import ConfigError, P2PUnavailable
from ckpt_engine.host_memory import HostMemoryPinner
from ckpt_engine.settings import Settings
from ckpt_engine.transport.leases import Announcement
from ckpt_engine.transport.p2p import P2PStore, make_p2p_store
from ckpt_engine.transport.rdma import devices_of_ranks
from ckpt_engine.update.reading import Reading
from ckpt_engine.update.serving import Serving

logger = logging.getLogger(__name__)


class P2PEnds:
    """`reading`, `serving`: nothing is made before it is needed. CKPT_ENGINE_P2P=off: neither ever is.

    Args:
        gpu_count, local_rank: share out the host's RDMA devices.
        host_ip: this host's address for others.
    """

    def __init__(
        self, settings: Settings, device: Device, *, gpu_count: int, local_rank: int, host_ip: str
    ) -> None:
        self._settings = settings
        self._device = device
        self._place = (gpu_count, local_rank)
        self.host_ip = host_ip
        self._rdma_device: str | None = None
        self._unavailable = ""
        self.reading = Reading(self._make_store, device.pinner, self.rdma_device, device.make_current)
        port = settings.lease_port + local_rank if settings.lease_port else 0
        self.serving = Serving(self._make_store, host_ip, settings.p2p_readers, port)
        self._announcements: dict[str, Announcement] = {}

    def rdma_device(self) -> str:
        """This rank's, several joined by commas; empty: none. Raises ConfigError: as `devices_of_ranks`."""
        if self._device.type == "npu":
            return ""  # an NPU's P2P has links of its own
        if self._rdma_device is None:
            count, local_rank = self._place
            devices = devices_of_ranks(self._settings, count, pci_addresses(self._device.type))
            self._rdma_device = devices[local_rank]
        return self._rdma_device

    def _make_store(self) -> P2PStore:
        if self._settings.p2p == "off":
            raise P2PUnavailable("CKPT_ENGINE_P2P=off: nothing is read by P2P")
        devices = [name for name in self.rdma_device().split(",") if name]
        self._device.make_current()  # mooncake asks which NPU it is to use
        return make_p2p_store(self._settings, self.host_ip, self._device.type, devices)

    @property
    def pinner(self) -> HostMemoryPinner | None:
        return self._device.pinner

    def announced(self, checkpoint_name: str, announcement: Announcement) -> None:
        """It stands until the checkpoint is withdrawn."""
        self._announcements[checkpoint_name] = announcement

    def offer(self, held: HostCheckpoint | None, *, filled: bool = True) -> dict[str, Any]:
        """Lets others read this share; the fields of `RankMetas` that say how, none where they cannot.

        Args:
            filled: whether its bytes are there already; else its memory is not registered yet, either.

        Raises:
            ConfigError: CKPT_ENGINE_P2P=on, and it cannot be.
            P2PError: the memory cannot be registered.
        """
        if self._settings.p2p == "off":
            return {}
        try:
            address, transport, leases = self.serving.start()
        except P2PUnavailable as error:
            if self._settings.p2p == "on":
                raise ConfigError(f"CKPT_ENGINE_P2P=on: {error}") from error
            if str(error) != self._unavailable:
                self._unavailable = str(error)
                logger.warning("nothing of this rank can be read by P2P: %s", error)
            return {}
        if held is not None and filled:
            self.serving.offer(held)
        elif held is not None:
            self.serving.promise(held)
        return {
            "session": self.serving.session,
            "p2p_address": address,
            "p2p_transport": transport,
            "lease_address": leases,
            "rdma_device": self.rdma_device() or None,
        }

    def withdraw(self, checkpoint_name: str, *, force: bool) -> None:
        """Waits until nobody reads it, to CKPT_ENGINE_LEASE_TIMEOUT. Raises as `Serving.withdraw`."""
        if (announcement := self._announcements.pop(checkpoint_name, None)) is not None:
            announcement.release()
        deadline = Deadline.after(self._settings.lease_timeout)
        self.serving.withdraw(checkpoint_name, deadline, force=force)

    def close(self) -> None:
        """Idempotent."""
        while self._announcements:
            self._announcements.popitem()[1].release()
        self.reading.close()
        self.serving.close()
