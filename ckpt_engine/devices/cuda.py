"""CUDA devices: rings shared by CUDA IPC, with an inter-process event for each slot.

The parameter server announces a bucket when its *ready* event has happened; the worker enqueues the reload
and records *given back*, at which the parameter server looks before it reuses the slot. While it looks, the
copies into the other slots go on. Nobody waits for a whole device, nor on the device for another process.
"""

from __future__ import annotations

import logging
import resource
import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import ClassVar

import torch

from ckpt_engine.devices import cudart
from ckpt_engine.devices.draining import drained
from ckpt_engine.devices.handles import CudaRing
from ckpt_engine.errors import ConfigError, DeviceError, HostMemoryError, ProtocolError
from ckpt_engine.host_memory import HostMemoryPinner
from ckpt_engine.settings import Settings

logger = logging.getLogger(__name__)

MAX_EVENTS = 65536
"""More slots than that are no sensible ring."""


def device_uuid_of(index: int) -> str:
    """`GPU-{uuid}` of cuda:`index`, as NVML writes it."""
    return f"GPU-{torch.cuda.get_device_properties(index).uuid}"


def cuda_uuid(settings: Settings, index: int) -> str:
    """What both sides of a device call it: CKPT_ENGINE_DEVICE_UUID, else `GPU-{uuid}`."""
    return settings.device_uuid or device_uuid_of(index)


class _DeviceMemory:
    """Raw device memory that torch can wrap without a copy."""

    def __init__(self, address: int, nbytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (nbytes,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 3,
            "strides": None,
        }


def _as_bytes(index: int, address: int, nbytes: int) -> torch.Tensor:
    with torch.cuda.device(index):
        return torch.as_tensor(_DeviceMemory(address, nbytes), device=torch.device("cuda", index))


class _Events:
    """Inter-process events, one for each slot."""

    def __init__(self, index: int, count: int) -> None:
        with torch.cuda.device(index):
            self.events = [torch.cuda.Event(interprocess=True) for _ in range(count)]
            # An event has a handle only once it exists on the device.
            for event in self.events:
                event.record(torch.cuda.current_stream(index))
            self.handles: tuple[bytes, ...] = tuple(bytes(event.ipc_handle()) for event in self.events)


def _open_events(index: int, handles: Sequence[bytes]) -> list[torch.cuda.Event]:
    device = torch.device("cuda", index)
    with torch.cuda.device(index):
        return [torch.cuda.Event.from_ipc_handle(device, handle) for handle in handles]


class _Exported:
    """A ring's memory. CUDA maps it into other processes only: a worker in this one uses it, and gives its
    events, directly. Who closes last frees it."""

    _by_handle: ClassVar[dict[bytes, _Exported]] = {}
    _lock: ClassVar[threading.Lock] = threading.Lock()

    def __init__(self, index: int, nbytes: int) -> None:
        self._index = index
        self._users = 1
        self.given_back: list[torch.cuda.Event] | None = None
        """The events of a worker in this process."""
        self.address = cudart.malloc(index, nbytes)
        try:
            self.handle = cudart.ipc_handle(index, self.address)
        except BaseException:
            cudart.free(index, self.address)
            raise
        with self._lock:
            self._by_handle[self.handle] = self

    @classmethod
    def use(cls, handle: bytes) -> _Exported | None:
        """That of this process, for one more user; None of another's."""
        with cls._lock:
            found = cls._by_handle.get(handle)
            if found is not None:
                found._users += 1
            return found

    def release(self) -> None:
        """Once by each user."""
        with self._lock:
            self._users -= 1
            if self._users:
                return
            del self._by_handle[self.handle]
        cudart.free(self._index, self.address)


class ServerRing:
    """The parameter server's ring: it owns the memory."""

    def __init__(self, index: int, nbytes: int, event_count: int) -> None:
        self.nbytes = nbytes
        self._index = index
        self._memory = _Exported(index, nbytes)
        self._closed = False
        try:
            self._bytes: torch.Tensor | None = _as_bytes(index, self._memory.address, nbytes)
            with torch.cuda.device(index):
                self._ready = [torch.cuda.Event() for _ in range(event_count)]
        except BaseException:
            self._memory.release()
            raise
        self._given_back: list[torch.cuda.Event] = []

    def view(self, offset: int, nbytes: int) -> torch.Tensor:
        if self._bytes is None:
            raise ValueError("the ring is closed")
        return self._bytes[offset : offset + nbytes]

    def handle(self) -> CudaRing:
        return CudaRing(
            nbytes=self.nbytes,
            memory=self._memory.handle,
            event_count=len(self._ready),
            device=device_uuid_of(self._index),
        )

    def descriptors(self) -> list[int]:
        return []

    def accept_events(self, given_back: Sequence[bytes]) -> None:
        if len(given_back) != len(self._ready):
            raise ProtocolError(f"the worker has {len(given_back)} events for a ring of {len(self._ready)}")
        # CUDA opens handles of other processes only.
        own = self._memory.given_back
        self._given_back = _open_events(self._index, given_back) if own is None else own

    def is_given_back(self, bucket: int) -> bool:
        return bool(self._given_back[bucket % len(self._given_back)].query())

    def mark_ready(self, bucket: int) -> None:
        self._ready[bucket % len(self._ready)].record(torch.cuda.current_stream(self._index))

    def is_ready(self, bucket: int) -> bool:
        return bool(self._ready[bucket % len(self._ready)].query())

    def close(self) -> None:
        self._bytes = None
        self._given_back = []
        if not self._closed:
            self._closed = True
            self._memory.release()


class WorkerRing:
    """A worker's map of the ring, on its own index of the same device."""

    def __init__(self, index: int, handle: CudaRing) -> None:
        if not 0 < handle.event_count <= MAX_EVENTS:
            raise ProtocolError(f"a CUDA ring with {handle.event_count} events")
        mine = device_uuid_of(index)
        if handle.device != mine:
            raise ConfigError(
                f"the ring lies on {handle.device}, but this worker's cuda:{index} is {mine}: give each "
                "side the same device (CUDA_VISIBLE_DEVICES, device_id)"
            )
        self.nbytes = handle.nbytes
        self._index = index
        self._own = _Exported.use(handle.memory)
        self._address = (
            cudart.open_ipc_handle(index, handle.memory) if self._own is None else self._own.address
        )
        try:
            self._bytes: torch.Tensor | None = _as_bytes(index, self._address, handle.nbytes)
            self._given_back = _Events(index, handle.event_count)
        except BaseException:
            self._unmap(self._address)
            raise
        if self._own is not None:
            self._own.given_back = self._given_back.events

    def view(self, offset: int, nbytes: int) -> torch.Tensor:
        if self._bytes is None:
            raise ValueError("the ring is closed")
        return self._bytes[offset : offset + nbytes]

    def own_events(self) -> tuple[bytes, ...]:
        return self._given_back.handles

    def mark_given_back(self, bucket: int) -> None:
        events = self._given_back.events
        events[bucket % len(events)].record(torch.cuda.current_stream(self._index))

    def check(self) -> None:
        torch.cuda.current_stream(self._index).query()

    def synchronize(self) -> None:
        torch.cuda.current_stream(self._index).synchronize()

    def close(self) -> None:
        if not self._address:
            return
        self._bytes = None
        address, self._address = self._address, 0
        if not self._drained():
            # Unmapping under a running copy would break the engine's context for good.
            logger.error(
                "cuda:%d has not finished reading the ring; %d bytes stay mapped: restart the engine",
                self._index,
                self.nbytes,
            )
            return
        self._unmap(address)
        torch.cuda.ipc_collect()

    def _unmap(self, address: int) -> None:
        if self._own is None:
            cudart.close_ipc_handle(self._index, address)
        else:
            self._own.given_back = None
            self._own.release()

    def _drained(self) -> bool:
        done = torch.cuda.Event()
        done.record(torch.cuda.current_stream(self._index))
        return drained(done)


class CudaStaging:
    """Device memory outside torch's allocator, with an event for each direction."""

    def __init__(self, index: int, nbytes: int) -> None:
        self.nbytes = nbytes
        self._index = index
        self._address = cudart.malloc(index, nbytes)
        self._bytes: torch.Tensor | None = None
        try:
            self._bytes = _as_bytes(index, self._address, nbytes)
            with torch.cuda.device(index):
                self._filled, self._emptied = torch.cuda.Event(), torch.cuda.Event()
        except BaseException:
            self.close()
            raise

    def fill(self) -> torch.Tensor:
        return self._after(self._emptied)

    def mark_filled(self) -> None:
        self._filled.record(torch.cuda.current_stream(self._index))

    def empty(self) -> torch.Tensor:
        return self._after(self._filled)

    def mark_emptied(self) -> None:
        self._emptied.record(torch.cuda.current_stream(self._index))

    def _after(self, event: torch.cuda.Event) -> torch.Tensor:
        assert self._bytes is not None
        torch.cuda.current_stream(self._index).wait_event(event)
        return self._bytes

    def close(self) -> None:
        self._bytes = None
        address, self._address = self._address, 0
        if address:
            cudart.free(self._index, address)


class CudaPinner:
    """Pins host memory in place (cudaHostRegister)."""

    def __init__(self, index: int) -> None:
        self._index = index

    def pin(self, address: int, nbytes: int, *, read_only: bool = False) -> None:
        """Raises HostMemoryError: the driver refuses."""
        try:
            cudart.host_register(self._index, address, nbytes, read_only=read_only)
        except DeviceError as error:
            raise HostMemoryError(f"{error}. {self._advice(nbytes)}") from error

    @staticmethod
    def _advice(nbytes: int) -> str:
        limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
        if limit != resource.RLIM_INFINITY and limit < nbytes:
            return f"The memlock limit is {limit} bytes: raise it (ulimit -l)"
        return "If the host or its container is out of memory, register less at a time"

    def unpin(self, address: int) -> None:
        cudart.host_unregister(self._index, address)


class CudaDevice:
    """cuda:`index` of this process."""

    type = "cuda"
    collectives = "nccl"
    enqueues = True

    def __init__(self, settings: Settings, index: int) -> None:
        count = torch.cuda.device_count()
        if index >= count:
            raise ConfigError(
                f"device cuda:{index} is not there: this process sees {count}; set gpu_count to the number "
                "of ranks that share this host's devices, or check CUDA_VISIBLE_DEVICES"
            )
        self.index = index
        self._uuid = cuda_uuid(settings, index)
        self._pool = f"{settings.host_id}/{device_uuid_of(index)}"
        self.pinner: HostMemoryPinner | None = CudaPinner(index)
        self._copies = torch.cuda.Stream(index)
        self._broadcasts = torch.cuda.Stream(index)

    def uuid(self) -> str:
        return self._uuid

    def memory_pool(self) -> str:
        return self._pool

    def make_current(self) -> None: ...

    def free_memory(self) -> int:
        return int(torch.cuda.mem_get_info(self.index)[0])

    def allocate_ring(self, nbytes: int, event_count: int) -> ServerRing:
        return ServerRing(self.index, nbytes, event_count)

    def allocate_staging(self, nbytes: int) -> CudaStaging:
        return CudaStaging(self.index, nbytes)

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        target.copy_(source, non_blocking=True)

    def use_copy_stream(self) -> AbstractContextManager[object]:
        return torch.cuda.stream(self._copies)

    def use_broadcast_stream(self) -> AbstractContextManager[object]:
        return torch.cuda.stream(self._broadcasts)

    def synchronize(self) -> None:
        self._copies.synchronize()
        self._broadcasts.synchronize()

    def collect(self) -> None:
        torch.cuda.ipc_collect()
