"""RDMA devices as libibverbs lists them: their names, their makers, and which of their ports are up.

The library is asked through ctypes: of its structures only the fields that are read here are named, at the
offsets of rdma-core's `infiniband/verbs.h` (the ABI IBVERBS_1.1), with room behind them for what a newer
library may write. Devices are opened, asked and closed again; nothing is kept.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import logging
import os
from dataclasses import dataclass
from typing import Any

logger = logging.getLogger(__name__)

LIBRARY = "libibverbs.so.1"
EFA_VENDOR_ID = 0x1D0F
_PORT_ACTIVE = 4


class DeviceAttributes(ctypes.Structure):
    """The head of `struct ibv_device_attr`."""

    _fields_ = (
        ("firmware", ctypes.c_char * 64),
        ("_guids_and_sizes", ctypes.c_uint64 * 4),
        ("vendor_id", ctypes.c_uint32),
        ("_limits", ctypes.c_uint8 * 127),
        ("port_count", ctypes.c_uint8),
        ("_room", ctypes.c_uint8 * 284),
    )


class PortAttributes(ctypes.Structure):
    """The head of `struct ibv_port_attr`."""

    _fields_ = (("state", ctypes.c_uint32), ("_room", ctypes.c_uint8 * 508))


@dataclass(kw_only=True, frozen=True, slots=True)
class RdmaDevice:
    """`active_ports` count from 1. `problem`: why it cannot be used, empty if it can."""

    name: str
    vendor_id: int = 0
    active_ports: tuple[int, ...] = ()
    problem: str = ""

    @property
    def is_efa(self) -> bool:
        """Whether it is an Elastic Fabric Adapter of AWS."""
        return self.vendor_id == EFA_VENDOR_ID


def list_devices(library: Any = None) -> list[RdmaDevice]:  # noqa: ANN401 - what ctypes loads
    """Every RDMA device of this host, usable or not, in the library's order; none without the library."""
    library = library or load_library()
    if library is None:
        return []
    count = ctypes.c_int()
    listed = library.ibv_get_device_list(ctypes.byref(count))
    if not listed:
        number = ctypes.get_errno()
        if number != errno.ENOSYS:  # that is a kernel without RDMA
            logger.warning("libibverbs lists no devices: %s", os.strerror(number))
        return []
    try:
        return [_examine(library, listed[index]) for index in range(count.value)]
    finally:
        library.ibv_free_device_list(listed)


def _examine(library: Any, device: int) -> RdmaDevice:  # noqa: ANN401
    name = library.ibv_get_device_name(device).decode()
    context = library.ibv_open_device(device)
    if not context:
        why = os.strerror(ctypes.get_errno())
        return RdmaDevice(name=name, problem=f"it cannot be opened: {why}")
    try:
        attributes = DeviceAttributes()
        code = library.ibv_query_device(context, ctypes.byref(attributes))
        if code:
            return RdmaDevice(name=name, problem=f"it does not answer: {os.strerror(abs(code))}")
        states = {port: _state(library, context, port) for port in range(1, attributes.port_count + 1)}
    finally:
        library.ibv_close_device(context)
    active = tuple(port for port, state in states.items() if state == _PORT_ACTIVE)
    return RdmaDevice(
        name=name,
        vendor_id=attributes.vendor_id,
        active_ports=active,
        problem="" if active else f"none of its {len(states)} ports is active",
    )


def _state(library: Any, context: int, port: int) -> int:  # noqa: ANN401
    attributes = PortAttributes()
    code = library.ibv_query_port(context, port, ctypes.byref(attributes))
    return 0 if code else int(attributes.state)


@functools.cache
def load_library() -> Any:  # noqa: ANN401
    """libibverbs, or None where it is not installed."""
    try:
        library = ctypes.CDLL(LIBRARY, use_errno=True)
    except OSError as error:
        logger.info("no RDMA devices: %s", error)
        return None
    pointer = ctypes.c_void_p
    for name, result, arguments in (
        ("ibv_get_device_list", ctypes.POINTER(pointer), (ctypes.POINTER(ctypes.c_int),)),
        ("ibv_free_device_list", None, (ctypes.POINTER(pointer),)),
        ("ibv_get_device_name", ctypes.c_char_p, (pointer,)),
        ("ibv_open_device", pointer, (pointer,)),
        ("ibv_close_device", ctypes.c_int, (pointer,)),
        ("ibv_query_device", ctypes.c_int, (pointer, ctypes.POINTER(DeviceAttributes))),
        ("ibv_query_port", ctypes.c_int, (pointer, ctypes.c_uint8, ctypes.POINTER(PortAttributes))),
    ):
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library
