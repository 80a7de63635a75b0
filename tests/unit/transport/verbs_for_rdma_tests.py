"""Stands for libibverbs where there is no RDMA device: the same calls, on devices that are made up."""

from __future__ import annotations

import ctypes
import errno
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from ckpt_engine.transport.verbs import DeviceAttributes, PortAttributes

DOWN, INIT, ACTIVE = 1, 2, 4

Pointer: TypeAlias = Any
"""What ctypes passes."""


@dataclass
class Device:
    """`ports`: their states. `open_errno`, `query_code`: how it fails."""

    name: str
    ports: list[int]
    vendor_id: int = 0x15B3
    open_errno: int = 0
    query_code: int = 0


@dataclass
class Library:
    """Counts what is open, so that a test can see that nothing stays so."""

    devices: list[Device]
    list_errno: int = 0
    lists: int = 0
    contexts: int = 0
    _arrays: list[Any] = field(default_factory=list)

    def ibv_get_device_list(self, count: Pointer) -> Pointer:
        if self.list_errno:
            ctypes.set_errno(self.list_errno)
            return None
        self.lists += 1
        count._obj.value = len(self.devices)
        # A pointer is a device's number, from 1.
        self._arrays.append((ctypes.c_void_p * (len(self.devices) + 1))(*range(1, len(self.devices) + 1)))
        return ctypes.cast(self._arrays[-1], ctypes.POINTER(ctypes.c_void_p))

    def ibv_free_device_list(self, listed: Pointer) -> None:
        self.lists -= 1

    def ibv_get_device_name(self, device: int) -> bytes:
        return self.devices[device - 1].name.encode()

    def ibv_open_device(self, device: int) -> int | None:
        if self.devices[device - 1].open_errno:
            ctypes.set_errno(self.devices[device - 1].open_errno)
            return None
        self.contexts += 1
        return device

    def ibv_close_device(self, context: int) -> int:
        self.contexts -= 1
        return 0

    def ibv_query_device(self, context: int, attributes: Pointer) -> int:
        device = self.devices[context - 1]
        written: DeviceAttributes = attributes._obj
        written.vendor_id, written.port_count = device.vendor_id, len(device.ports)
        return device.query_code

    def ibv_query_port(self, context: int, port: int, attributes: Pointer) -> int:
        states = self.devices[context - 1].ports
        if not 1 <= port <= len(states):
            return errno.EINVAL
        written: PortAttributes = attributes._obj
        written.state = states[port - 1]
        return 0
