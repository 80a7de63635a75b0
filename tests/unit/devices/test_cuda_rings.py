"""Rings of CUDA memory, with the parameter server and the worker in one process or in two: CUDA maps memory
and opens events of other processes only. The runtime is a stand-in over host memory; `tests/gpu` has CUDA's.
"""

from __future__ import annotations

import ctypes
from contextlib import nullcontext
from typing import Any

import pytest
import torch

from ckpt_engine.devices import cuda, cudart
from ckpt_engine.devices.cuda import ServerRing, WorkerRing
from ckpt_engine.devices.handles import CudaRing
from ckpt_engine.errors import DeviceError

NBYTES, EVENTS = 64, 2
FOREIGN = b"f" * cudart.IPC_HANDLE_NBYTES


class Event:
    """What is recorded has happened, unless `pending`."""

    opened: list[bytes]
    pending = False

    def __init__(self, interprocess: bool = False) -> None:
        self.interprocess = interprocess

    def record(self, _stream: object) -> None: ...

    def query(self) -> bool:
        return not self.pending

    def ipc_handle(self) -> bytes:
        assert self.interprocess
        return str(id(self)).encode()

    @classmethod
    def from_ipc_handle(cls, _device: torch.device, handle: bytes) -> Event:
        cls.opened.append(handle)
        return cls()


class Runtime:
    """`cudart`'s memory, and that of another process."""

    def __init__(self) -> None:
        self.allocated: dict[int, Any] = {}
        self.foreign = ctypes.create_string_buffer(NBYTES)
        self.mapped: list[int] = []

    def malloc(self, _index: int, nbytes: int) -> int:
        memory = ctypes.create_string_buffer(nbytes)
        self.allocated[ctypes.addressof(memory)] = memory
        return ctypes.addressof(memory)

    def free(self, _index: int, address: int) -> None:
        del self.allocated[address]

    def ipc_handle(self, _index: int, address: int) -> bytes:
        return str(address).encode().ljust(cudart.IPC_HANDLE_NBYTES, b"\0")

    def open_ipc_handle(self, _index: int, handle: bytes) -> int:
        if handle != FOREIGN:
            raise DeviceError("invalid device context (cudaError 201)")
        self.mapped.append(ctypes.addressof(self.foreign))
        return self.mapped[-1]

    def close_ipc_handle(self, _index: int, address: int) -> None:
        self.mapped.remove(address)


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Runtime:
    made = Runtime()
    for name in ("malloc", "free", "ipc_handle", "open_ipc_handle", "close_ipc_handle"):
        monkeypatch.setattr(cudart, name, getattr(made, name))
    monkeypatch.setattr(cuda, "device_uuid_of", lambda index: f"GPU-{index}")
    monkeypatch.setattr(cuda, "_as_bytes", _as_bytes)
    monkeypatch.setattr(Event, "opened", [], raising=False)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "device", lambda _index: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _index: None)
    monkeypatch.setattr(torch.cuda, "ipc_collect", lambda: None)
    return made


def _as_bytes(_index: int, address: int, nbytes: int) -> torch.Tensor:
    return torch.frombuffer((ctypes.c_ubyte * nbytes).from_address(address), dtype=torch.uint8)


def test_a_worker_in_the_same_process_reads_the_ring_itself(runtime: Runtime) -> None:
    server = ServerRing(0, NBYTES, EVENTS)
    worker = WorkerRing(0, server.handle())
    server.view(0, NBYTES).copy_(torch.arange(NBYTES))
    assert torch.equal(worker.view(3, 5), torch.arange(3, 8, dtype=torch.uint8))
    server.accept_events(worker.own_events())
    assert (runtime.mapped, Event.opened) == ([], [])
    # The very events.
    worker._given_back.events[1].pending = True
    assert [server.is_given_back(bucket) for bucket in range(4)] == [True, False, True, False]
    worker._given_back.events[1].pending = False
    worker.close()
    assert len(runtime.allocated) == 1
    server.close()
    assert runtime.allocated == {}


def test_a_worker_of_another_process_maps_the_ring(runtime: Runtime) -> None:
    worker = WorkerRing(0, CudaRing(nbytes=NBYTES, memory=FOREIGN, event_count=EVENTS, device="GPU-0"))
    assert len(runtime.mapped) == 1
    worker.close()
    assert runtime.mapped == []


def test_events_of_another_processs_worker_are_opened(runtime: Runtime) -> None:
    server = ServerRing(0, NBYTES, EVENTS)
    server.accept_events([b"one", b"two"])
    assert Event.opened == [b"one", b"two"]
    server.close()
    server.close()
    assert runtime.allocated == {}


def test_the_ring_is_there_until_the_worker_has_closed_it(runtime: Runtime) -> None:
    server = ServerRing(0, NBYTES, EVENTS)
    worker = WorkerRing(0, server.handle())
    server.close()
    assert worker.view(0, NBYTES).sum() == 0
    assert len(runtime.allocated) == 1
    worker.close()
    worker.close()
    assert runtime.allocated == {}


def test_a_ring_that_is_kept_may_have_another_worker(runtime: Runtime) -> None:
    server = ServerRing(0, NBYTES, EVENTS)
    first = WorkerRing(0, server.handle())
    server.accept_events(first.own_events())
    first.close()
    server.accept_events([b"one", b"two"])
    assert Event.opened == [b"one", b"two"]
    second = WorkerRing(0, server.handle())
    server.accept_events(second.own_events())
    assert len(Event.opened) == 2
    second.close()
    server.close()
    assert runtime.allocated == {}


def test_a_ring_whose_view_fails_leaves_nothing(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    server = ServerRing(0, NBYTES, EVENTS)

    def fail(*_: object) -> torch.Tensor:
        raise DeviceError("no view")

    monkeypatch.setattr(cuda, "_as_bytes", fail)
    with pytest.raises(DeviceError, match="no view"):
        WorkerRing(0, server.handle())
    with pytest.raises(DeviceError, match="no view"):
        ServerRing(0, NBYTES, EVENTS)
    assert len(runtime.allocated) == 1
    server.close()
    assert runtime.allocated == {}
