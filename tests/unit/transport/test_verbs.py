"""The binding of libibverbs: made-up devices behind the same calls, and the real library where it is."""

from __future__ import annotations

import ctypes
import errno
import logging

import pytest
from verbs_for_rdma_tests import ACTIVE, DOWN, INIT, Device, Library

from ckpt_engine.transport import verbs
from ckpt_engine.transport.verbs import DeviceAttributes, PortAttributes, RdmaDevice, list_devices


def test_offsets_are_those_of_the_header() -> None:
    """As a C compiler laid out `infiniband/verbs.h` of rdma-core 44: offsetof and sizeof."""
    assert (DeviceAttributes.vendor_id.offset, DeviceAttributes.port_count.offset) == (96, 227)
    assert ctypes.sizeof(DeviceAttributes) >= 232
    assert PortAttributes.state.offset == 0
    assert ctypes.sizeof(PortAttributes) >= 52


def test_devices_with_their_active_ports() -> None:
    library = Library(
        [
            Device("mlx5_0", [ACTIVE]),
            Device("mlx5_1", [DOWN, ACTIVE, INIT, ACTIVE]),
            Device("efa_0", [ACTIVE], vendor_id=0x1D0F),
        ]
    )
    found = list_devices(library)
    assert found == [
        RdmaDevice(name="mlx5_0", vendor_id=0x15B3, active_ports=(1,)),
        RdmaDevice(name="mlx5_1", vendor_id=0x15B3, active_ports=(2, 4)),
        RdmaDevice(name="efa_0", vendor_id=0x1D0F, active_ports=(1,)),
    ]
    assert [device.is_efa for device in found] == [False, False, True]
    assert (library.lists, library.contexts) == (0, 0)


def test_what_cannot_be_used_says_why() -> None:
    library = Library(
        [
            Device("mlx5_0", [DOWN, INIT]),
            Device("mlx5_1", [ACTIVE], open_errno=errno.EACCES),
            Device("mlx5_2", [ACTIVE], query_code=errno.EIO),
            Device("mlx5_3", []),
        ]
    )
    assert {device.name: device.problem for device in list_devices(library)} == {
        "mlx5_0": "none of its 2 ports is active",
        "mlx5_1": "it cannot be opened: Permission denied",
        "mlx5_2": "it does not answer: Input/output error",
        "mlx5_3": "none of its 0 ports is active",
    }
    assert (library.lists, library.contexts) == (0, 0)


def test_a_kernel_without_rdma_has_no_devices_and_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    assert list_devices(Library([], list_errno=errno.ENOSYS)) == []
    assert caplog.messages == []


def test_another_failure_to_list_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    assert list_devices(Library([], list_errno=errno.EPERM)) == []
    assert caplog.messages == ["libibverbs lists no devices: Operation not permitted"]


def test_without_the_library_there_are_no_devices(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(verbs, "LIBRARY", "libibverbs-that-is-not-there.so.1")
    verbs.load_library.cache_clear()
    try:
        assert list_devices() == []
        assert "libibverbs-that-is-not-there.so.1" in caplog.text
    finally:
        verbs.load_library.cache_clear()


@pytest.mark.skipif(verbs.load_library() is None, reason="libibverbs1 is not installed")
def test_the_real_library_answers() -> None:
    """Whatever devices there are: names are unique, and each is usable or says why not."""
    found = list_devices()
    assert len({device.name for device in found}) == len(found)
    assert all(bool(device.active_ports) != bool(device.problem) for device in found)
