"""Ascend NPUs: rings shared by torch_npu's IPC of tensors.

It has no calls for plain device memory, so a ring is a tensor, exported as torch_npu exports one: 15 fields,
of which nine travel and the others are the same for every ring. Differences to CUDA that matter here:

- A reader is counted in host memory (/dev/shm), and torch_npu frees an exported tensor only once its counter
  is exactly 0. A worker that was killed, or never came, leaves it at 1: closing the ring does its part. One
  that is counted down twice is never freed: a ring is exported once, to one worker.
- Without inter-process events (older drivers) nobody can look at the other side's stream. The parameter
  server looks at its own *ready* events; the worker waits for its stream before it gives a bucket back.
- Host memory is not pinned: a copy from it has been done when it returns.

torch_npu is imported when a device is first asked for: its import replaces torch's reductions, so it has to
come before they are taken. No NPU has run this file: integrations/ascend/README.md says what has.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import struct
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, cast

import torch

from ckpt_engine.devices.draining import drained
from ckpt_engine.devices.handles import NpuRing
from ckpt_engine.devices.npu_environment import refuse_expandable_segments, require_execution_timeout
from ckpt_engine.errors import ConfigError, DeviceError, ProtocolError
from ckpt_engine.host_memory import HostMemoryPinner
from ckpt_engine.settings import Settings

logger = logging.getLogger(__name__)


_FIELD_COUNT = 15
_DEVICE_FIELD = 6
_MAX_BYTES_FIELD = 4096
"""No handle of a sensible ring has a longer field."""
_COUNTERS_OFFSET = 64
"""Bytes that torch puts in front of a shared file's contents."""


def load() -> Any:  # noqa: ANN401 - torch.npu has no types
    """`torch.npu`, with torch_npu's reductions in place.

    Raises:
        ConfigError: torch_npu is not installed, or cannot be loaded.
    """
    try:
        importlib.import_module("torch_npu")
    except (ImportError, RuntimeError, OSError) as error:
        raise ConfigError(
            f"device 'npu' needs torch_npu, which cannot be imported ({error}): install the build that fits "
            "this torch, and source CANN's set_env.sh"
        ) from error
    return cast(Any, torch).npu


def npu_is_available() -> bool:
    """Whether torch_npu is installed and finds a device.

    Raises:
        ConfigError: it is installed, but cannot be loaded.
    """
    return importlib.util.find_spec("torch_npu") is not None and bool(load().is_available())


def npu_uuid(settings: Settings, index: int) -> str:
    """What both sides of a device call it: CKPT_ENGINE_DEVICE_UUID, else `NPU-{ip}-{number}`.

    Raises:
        DeviceError: npu-smi does not tell.
    """
    # The adapter's package, in this distribution: only NPUs need it.
    from ckpt_engine_ascend.identity import device_uuid

    if not settings.device_uuid:
        # npu-smi lists a process once it has used its device.
        torch.zeros(1, device=_device(index)).cpu()
    return device_uuid(index, settings=settings)


def _device(index: int) -> torch.device:
    return torch.device("npu", index)


def _allocate(index: int, nbytes: int) -> torch.Tensor:
    npu = load()
    # So that the memory is not a part of a larger block, whose handle would export that too.
    npu.empty_cache()
    try:
        # Without a byte there would be nothing to export.
        return torch.empty(max(nbytes, 1), dtype=torch.uint8, device=_device(index))
    except RuntimeError as error:
        raise DeviceError(f"allocating {nbytes} bytes on npu:{index}: {error}") from error


def _export(tensor: torch.Tensor) -> NpuRing:
    """The fields from which another process maps the tensor (1-D uint8, a whole storage)."""
    from torch.multiprocessing import reductions

    rebuild, fields = reductions.reduce_tensor(tensor)  # type: ignore[no-untyped-call]
    if rebuild.__name__ != "rebuild_npu_tensor" or len(fields) != _FIELD_COUNT:
        version = getattr(importlib.import_module("torch_npu"), "__version__", "unknown")
        raise DeviceError(
            f"torch_npu {version} exports a tensor as {len(fields)} fields for {rebuild.__name__}, not as "
            f"{_FIELD_COUNT} for rebuild_npu_tensor: install torch_npu 2.7.1 of its 7.2 line, or a newer one"
        )
    _, size, _, offset, _, _, _, memory, storage_nbytes, storage_offset, _, *counter_and_event = fields
    counter, counter_offset, event, event_sync = counter_and_event
    assert tuple(size) == (tensor.numel(),)
    assert offset == 0
    return NpuRing(
        nbytes=tensor.numel(),
        memory=bytes(memory),
        storage_nbytes=int(storage_nbytes),
        storage_offset=int(storage_offset),
        counter=bytes(counter),
        counter_offset=int(counter_offset),
        event=bytes(event or b""),
        event_sync=bool(event_sync),
    )


def _rebuild(index: int, ring: NpuRing) -> torch.Tensor:
    """Maps an exported tensor on npu:`index`. Raises ProtocolError: the fields make no sense."""
    numbers = (ring.storage_nbytes - ring.nbytes, ring.nbytes, ring.storage_offset, ring.counter_offset)
    parts = (ring.memory, ring.counter, ring.event)
    if min(numbers) < 0 or not (ring.memory and ring.counter) or max(map(len, parts)) > _MAX_BYTES_FIELD:
        raise ProtocolError("the fields of an NPU ring contradict each other")
    load()
    reductions = importlib.import_module("torch_npu.multiprocessing.reductions")
    fields = (
        torch.Tensor,
        torch.Size([ring.nbytes]),
        (1,),
        0,
        torch.storage.TypedStorage,
        torch.uint8,
        index,  # this process' own number of the device, field 6: the parameter server's may be another
        ring.memory,
        ring.storage_nbytes,
        ring.storage_offset,
        False,
        ring.counter,
        ring.counter_offset,
        ring.event,
        ring.event_sync,
    )
    assert len(fields) == _FIELD_COUNT
    assert fields[_DEVICE_FIELD] == index
    try:
        return cast(torch.Tensor, reductions.rebuild_npu_tensor(*fields))
    except RuntimeError as error:
        raise DeviceError(
            f"mapping the ring on npu:{index}: {error}; the engine and its parameter server need one IPC "
            "namespace, one /dev/shm, and a driver that shares memory (HDK 25.3, CANN 8.3 or newer)"
        ) from error


def _count_down(ring: NpuRing) -> None:
    """Does the part of a worker that is gone: torch_npu frees what it exported once its counter is 0."""
    path = f"/dev/shm/{ring.counter.decode(errors='replace').lstrip('/')}"  # noqa: S108 - torch's own place
    try:
        with open(path, "rb") as file:
            file.seek(_COUNTERS_OFFSET + 8 * ring.counter_offset)
            (readers,) = struct.unpack("=q", file.read(8))
    except (OSError, struct.error) as error:
        logger.warning("cannot see whether a worker still reads %d bytes (%s): %s", ring.nbytes, path, error)
        return
    if readers == 1:
        cast(Any, torch.UntypedStorage)._release_ipc_counter_npu(ring.counter, ring.counter_offset)
    elif readers:
        logger.warning("%s counts %d readers of a ring, not one or none: left as it is", path, readers)


def _settle(index: int) -> None:
    """Waits for the device before memory goes back to the allocator, which would give it to others while
    copies still write it. An error, such as that of an aborted broadcast, must not keep the memory."""
    try:
        load().synchronize(index)
    except RuntimeError as error:
        logger.warning("npu:%d, while memory on it is freed: %s", index, error)


class ServerRing:
    """The parameter server's ring: it owns the memory."""

    def __init__(self, index: int, nbytes: int, event_count: int) -> None:
        refuse_expandable_segments(os.environ)
        npu = load()
        self.nbytes = nbytes
        self._index = index
        self._bytes: torch.Tensor | None = _allocate(index, nbytes)
        self._ready = [npu.Event() for _ in range(event_count)]
        self._exported: NpuRing | None = None

    def view(self, offset: int, nbytes: int) -> torch.Tensor:
        if self._bytes is None:
            raise ValueError("the ring is closed")
        return self._bytes[offset : offset + nbytes]

    def handle(self) -> NpuRing:
        """Exports the ring. A kept one is exported anew for each update, from fresh memory: torch_npu counts
        the readers of one export, and would stack the exports of one tensor on each other."""
        npu = load()
        if self._exported is not None:
            self._let_go()
            self._bytes = _allocate(self._index, self.nbytes)
        assert self._bytes is not None
        npu.current_stream(self._index).synchronize()
        self._exported = _export(self._bytes)
        return self._exported

    def descriptors(self) -> list[int]:
        return []

    def accept_events(self, given_back: Sequence[bytes]) -> None:
        if given_back:
            raise ProtocolError("the worker has events for a ring on an NPU, which needs none")

    def is_given_back(self, bucket: int) -> bool:
        return True  # the worker waited for its stream before it said so

    def mark_ready(self, bucket: int) -> None:
        self._ready[bucket % len(self._ready)].record(load().current_stream(self._index))

    def is_ready(self, bucket: int) -> bool:
        return bool(self._ready[bucket % len(self._ready)].query())

    def close(self) -> None:
        if self._bytes is None:
            return
        npu = load()
        _settle(self._index)
        self._let_go()
        npu.ipc_collect()
        npu.empty_cache()

    def _let_go(self) -> None:
        exported, self._exported = self._exported, None
        if exported is not None:
            _count_down(exported)
        self._bytes = None


class WorkerRing:
    """A worker's map of the ring, on its own index of the same device."""

    def __init__(self, index: int, handle: NpuRing) -> None:
        self.nbytes = handle.nbytes
        self._index = index
        self._bytes: torch.Tensor | None = _rebuild(index, handle)

    def view(self, offset: int, nbytes: int) -> torch.Tensor:
        if self._bytes is None:
            raise ValueError("the ring is closed")
        return self._bytes[offset : offset + nbytes]

    def own_events(self) -> tuple[bytes, ...]:
        return ()

    def mark_given_back(self, bucket: int) -> None:
        # The parameter server cannot look at this stream: what it is told must have happened.
        self.synchronize()

    def synchronize(self) -> None:
        load().current_stream(self._index).synchronize()

    def check(self) -> None:
        load().current_stream(self._index).query()

    def close(self) -> None:
        mapped, self._bytes = self._bytes, None
        if mapped is None:
            return
        if not self._drained():
            # torch_npu unmaps first and waits for the stream then.
            _STILL_READ.append(mapped)
            logger.error(
                "npu:%d has not finished reading the ring; %d bytes stay mapped: restart the engine",
                self._index,
                self.nbytes,
            )
            return
        del mapped
        load().ipc_collect()

    def _drained(self) -> bool:
        npu = load()
        done = npu.Event()
        done.record(npu.current_stream(self._index))
        return drained(done)


_STILL_READ: list[torch.Tensor] = []
"""Maps that a device may still read: kept for the life of the process."""


class NpuStaging:
    """Device memory of this process' own, with an event for each direction."""

    def __init__(self, index: int, nbytes: int) -> None:
        npu = load()
        self.nbytes = nbytes
        self._index = index
        self._bytes: torch.Tensor | None = _allocate(index, nbytes)
        self._filled, self._emptied = npu.Event(), npu.Event()

    def fill(self) -> torch.Tensor:
        return self._after(self._emptied)

    def mark_filled(self) -> None:
        self._filled.record(load().current_stream(self._index))

    def empty(self) -> torch.Tensor:
        return self._after(self._filled)

    def mark_emptied(self) -> None:
        self._emptied.record(load().current_stream(self._index))

    def _after(self, event: Any) -> torch.Tensor:  # noqa: ANN401 - torch.npu has no types
        assert self._bytes is not None
        load().current_stream(self._index).wait_event(event)
        return self._bytes

    def close(self) -> None:
        if self._bytes is not None:
            _settle(self._index)
        self._bytes = None


class NpuDevice:
    """npu:`index` of this process."""

    type = "npu"
    enqueues = False
    """Host memory is not pinned here, so copies from it block."""
    pinner: HostMemoryPinner | None = None
    """Pinning host memory in place is not offered: files below /dev/shm are copied."""

    def __init__(self, settings: Settings, index: int) -> None:
        npu = load()
        refuse_expandable_segments(os.environ)
        count = npu.device_count()
        if index >= count:
            raise ConfigError(
                f"device npu:{index} is not there: this process sees {count}; set gpu_count to the number of "
                "ranks that share this host's devices, or check ASCEND_RT_VISIBLE_DEVICES (ids must ascend)"
            )
        self.index = index
        self.collectives: str = "vllm_hccl" if settings.custom_dist == "vllm_hccl" else "hccl"
        if self.collectives == "vllm_hccl":
            require_execution_timeout(os.environ)
        # Else calls without a device would give this process a context on NPU 0, too.
        npu.set_device(index)
        self._uuid = npu_uuid(settings, index)
        # Where the operator names the keys, ranks of one device may have different ones.
        place = os.environ.get("ASCEND_RT_VISIBLE_DEVICES", "") if settings.device_uuid else ""
        self._pool = f"{settings.host_id}/{f'npu{place}:{index}' if settings.device_uuid else self._uuid}"
        self._copies = npu.Stream(index)
        self._broadcasts = npu.Stream(index)

    def uuid(self) -> str:
        return self._uuid

    def memory_pool(self) -> str:
        return self._pool

    def make_current(self) -> None:
        load().set_device(self.index)

    def free_memory(self) -> int:
        npu = load()
        # What this process' allocator holds unused counts as free: an update may have it.
        npu.empty_cache()
        return int(npu.mem_get_info(self.index)[0])

    def allocate_ring(self, nbytes: int, event_count: int) -> ServerRing:
        return ServerRing(self.index, nbytes, event_count)

    def allocate_staging(self, nbytes: int) -> NpuStaging:
        return NpuStaging(self.index, nbytes)

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        # From host memory, which is not pinned: blocking. Between device buffers it is only enqueued.
        target.copy_(source)

    def use_copy_stream(self) -> AbstractContextManager[object]:
        return cast(AbstractContextManager[object], load().stream(self._copies))

    def use_broadcast_stream(self) -> AbstractContextManager[object]:
        return cast(AbstractContextManager[object], load().stream(self._broadcasts))

    def synchronize(self) -> None:
        self._copies.synchronize()
        self._broadcasts.synchronize()

    def collect(self) -> None:
        npu = load()
        npu.ipc_collect()
        npu.empty_cache()
