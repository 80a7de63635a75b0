"""The CPU as a device: host memory in place of device memory, memfds in place of CUDA IPC.

A ring is a memfd: no name in any file system, gone with its last descriptor after any crash. It is
sealed against resizing, so that no peer can make another's access fault (SIGBUS); it is not sealed
against writing, because its worker maps it read-write as it would with CUDA IPC. Other ranks of the
host map it read-only.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch

from ckpt_engine.devices.base import Staging
from ckpt_engine.devices.handles import SharedMemoryRing
from ckpt_engine.errors import ConfigError, HostMemoryError, ProtocolError
from ckpt_engine.host_memory import HostMemoryPinner, available_host_memory
from ckpt_engine.settings import Settings

_SIZE_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


def cpu_uuid(settings: Settings, local_index: int) -> str:
    """`CPU-{host}-{index}`, or CKPT_ENGINE_DEVICE_UUID: what both sides of a device call it.

    Args:
        local_index: the process's own numbering; CKPT_ENGINE_CPU_DEVICES maps it to the host's.
    """
    return settings.device_uuid or f"CPU-{settings.host_id}-{settings.local_cpu_index(local_index)}"


class SharedRing:
    """A map of a memfd. The maker holds the descriptor; a mapper of a received one closes its own."""

    def __init__(self, fd: int, nbytes: int, *, writable: bool) -> None:
        self.nbytes = nbytes
        self._fd = fd
        self._map: mmap.mmap | None = None
        if nbytes:
            protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
            self._map = mmap.mmap(fd, nbytes, flags=mmap.MAP_SHARED, prot=protection)
        self._bytes: torch.Tensor | None = _as_bytes(self._map, nbytes)

    @classmethod
    def create(cls, nbytes: int) -> SharedRing:
        """Makes a ring; its pages come when they are first written.

        Raises:
            HostMemoryError: the host has less than `nbytes` available, or a limit of this process is lower.
        """
        available = available_host_memory()
        if nbytes > available:
            raise HostMemoryError(f"a ring of {nbytes} bytes does not fit: {available} bytes are available")
        fd = os.memfd_create("ckpt-engine-ring", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, nbytes)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SIZE_SEALS)
            return cls(fd, nbytes, writable=True)
        except OSError as error:
            # A limit of the address space or of a file's length, which the available memory knows nothing of.
            os.close(fd)
            raise HostMemoryError(f"a ring of {nbytes} bytes cannot be made: {error}") from error
        except BaseException:
            os.close(fd)
            raise

    @classmethod
    def open(cls, fd: int, nbytes: int, *, writable: bool) -> SharedRing:
        """Maps a received descriptor and takes it over (it is closed on failure too).

        Raises:
            ProtocolError: not a memfd of `nbytes` bytes sealed against resizing.
            HostMemoryError: it is, but this process may not map as much.
        """
        try:
            try:
                seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
            except OSError as error:
                raise ProtocolError(f"the received ring is not a memfd: {error}") from None
            if seals & _SIZE_SEALS != _SIZE_SEALS or os.fstat(fd).st_size != nbytes:
                raise ProtocolError(
                    f"the received ring is not a memfd of {nbytes} bytes sealed against resizing"
                )
            try:
                return cls(fd, nbytes, writable=writable)
            except OSError as error:
                if error.errno == errno.ENOMEM:
                    raise HostMemoryError(f"a ring of {nbytes} bytes cannot be mapped: {error}") from error
                # A descriptor that is read-only, or a memfd sealed against writing.
                raise ProtocolError(f"the received ring cannot be mapped: {error}") from None
        except BaseException:
            os.close(fd)
            raise

    def view(self, offset: int, nbytes: int) -> torch.Tensor:
        """1-D uint8 view; shares the map, which lives until the last view is gone."""
        if self._bytes is None:
            raise ValueError("the ring is closed")
        if not 0 <= offset <= offset + nbytes <= self.nbytes:
            raise ValueError(f"{nbytes} bytes at {offset} are not inside a ring of {self.nbytes} bytes")
        return self._bytes[offset : offset + nbytes]

    def handle(self) -> SharedMemoryRing:
        return SharedMemoryRing(nbytes=self.nbytes)

    def descriptors(self) -> list[int]:
        return [self._fd]

    # Everything is done when it returns: there is nothing to wait for.

    def accept_events(self, given_back: Sequence[bytes]) -> None:
        if given_back:
            raise ProtocolError("events of a device with streams, for a ring in host memory")

    def is_given_back(self, bucket: int) -> bool:
        return True

    def mark_ready(self, bucket: int) -> None: ...

    def is_ready(self, bucket: int) -> bool:
        return True

    def own_events(self) -> tuple[bytes, ...]:
        return ()

    def mark_given_back(self, bucket: int) -> None: ...

    def check(self) -> None: ...

    def synchronize(self) -> None: ...

    def close(self) -> None:
        # Dropping the references unmaps unless someone kept a view: closing the map under a view
        # would turn that view's next access into a crash of the engine.
        self._bytes = None
        self._map = None
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _as_bytes(memory: mmap.mmap | None, nbytes: int) -> torch.Tensor:
    if memory is None:
        return torch.empty(0, dtype=torch.uint8)
    if _writable(memory):
        return torch.frombuffer(memory, dtype=torch.uint8, count=nbytes)
    with warnings.catch_warnings():
        # torch warns that a read-only buffer may be written through a tensor; ours is only read.
        warnings.simplefilter("ignore", UserWarning)
        return torch.frombuffer(memory, dtype=torch.uint8, count=nbytes)


def _writable(memory: mmap.mmap) -> bool:
    return not memoryview(memory).readonly


class CpuDevice:
    """One rank's share of the host, named by an index."""

    type = "cpu"
    collectives = "gloo"
    enqueues = False
    pinner: HostMemoryPinner | None = None

    def __init__(self, settings: Settings, index: int) -> None:
        # A parameter server's index is the host's: CKPT_ENGINE_CPU_DEVICES is for engines.
        self.index = index
        self._uuid = settings.device_uuid or f"CPU-{settings.host_id}-{index}"
        self._pool = settings.host_id

    def uuid(self) -> str:
        return self._uuid

    def memory_pool(self) -> str:
        return self._pool

    def make_current(self) -> None: ...

    def free_memory(self) -> int:
        return available_host_memory()

    def allocate_ring(self, nbytes: int, event_count: int) -> SharedRing:
        return SharedRing.create(nbytes)

    def allocate_staging(self, nbytes: int) -> Staging:
        raise ConfigError("the CPU needs no staging buffer: owners copy straight into their rings")

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        target.copy_(source)

    def use_copy_stream(self) -> AbstractContextManager[object]:
        return nullcontext()

    def use_broadcast_stream(self) -> AbstractContextManager[object]:
        return nullcontext()

    def synchronize(self) -> None: ...

    def collect(self) -> None: ...
