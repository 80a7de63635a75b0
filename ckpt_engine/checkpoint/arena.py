"""Host arenas: one big anonymous mapping per checkpoint, which threads populate and a device may pin.

The kernel's page faults, not the reads, are what limits filling fresh memory: many threads that populate
their own piece with one system call are several times faster than one that touches page after page.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import logging
import mmap
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

from ckpt_engine.checkpoint.pinning import pin_while_alive
from ckpt_engine.errors import CheckpointError, ConfigError, HostMemoryError
from ckpt_engine.host_memory import HostMemoryPinner, available_host_memory

MiB = 1024 * 1024
PIECE_NBYTES = 16 * MiB
"""Bytes that one thread populates, reads or copies at a time."""

_MADV_POPULATE_WRITE = 23  # linux/mman.h, since 5.14; Python's mmap has no name for it
_PROBE_NBYTES = 16 * MiB
_PROBE_FROM = 256 * MiB  # the probe takes up to ~0.3 s on a slow machine, more than a small arena would gain

logger = logging.getLogger(__name__)

_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_libc.madvise.restype = ctypes.c_int
_libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_libc.mprotect.restype = ctypes.c_int


def default_threads() -> int:
    """Threads that fill an arena unless told otherwise: min(16, 2 * CPUs of this process)."""
    return min(16, 2 * len(os.sched_getaffinity(0)))


class HostArena:
    """`nbytes` bytes of zeroed, page-aligned, private host memory at `address`.

    The memory belongs to the arena and to every view of it: it goes back to the system when the arena is
    closed and the last view is gone, so no view can ever dangle. It is unpinned when it is closed.

    `populated`: who populated or filled all of it may set it; `populate` then has nothing left to do.

    `threads`: most threads that `populate` uses. `cpus`: those that its threads run on, since memory lies on
    the NUMA node of the CPU that touches it first; None: any. `huge_pages`: whether to ask for transparent
    huge pages; None measures once per process, for arenas of at least 256 MiB, which are faster to touch
    here. The attribute says what was chosen; None: what the system does by itself.

    Raises:
        HostMemoryError: the host, or the cgroup, has less than `nbytes` available; nothing was allocated.
    """

    def __init__(
        self,
        nbytes: int,
        *,
        threads: int | None = None,
        huge_pages: bool | None = None,
        cpus: frozenset[int] | None = None,
    ) -> None:
        if nbytes < 0:
            raise ConfigError(f"an arena of {nbytes} bytes: give 0 or more")
        if threads is not None and threads < 1:
            raise ConfigError(f"threads={threads}: give 1 or more")
        self.nbytes = nbytes
        self.address = 0
        self.huge_pages: bool | None = None
        self.populated = False
        self._unpin: Callable[[], object] | None = None
        self._before_close: list[Callable[[], object]] = []
        self._threads = threads or default_threads()
        self._cpus = cpus
        self._closed = False
        self._mapping: mmap.mmap | None = None  # None too for 0 bytes, which cannot be mapped
        if nbytes:
            available = available_host_memory()
            if nbytes > available:
                raise HostMemoryError(_too_little(nbytes, available))
            if huge_pages is None and nbytes >= _PROBE_FROM:
                huge_pages = _huge_pages_are_faster()
            self.huge_pages = huge_pages
            self._mapping = _map(nbytes, huge_pages)
            self.address = _address_of(self._mapping)

    @property
    def closed(self) -> bool:
        return self._closed

    def view(self, offset: int, nbytes: int) -> torch.Tensor:
        """Bytes [offset, offset + nbytes) as a 1-D uint8 tensor that shares the memory."""
        mapping = self._checked(offset, nbytes)
        if mapping is None or nbytes == 0:  # torch refuses a view of nothing
            return torch.empty(0, dtype=torch.uint8)
        return torch.frombuffer(mapping, dtype=torch.uint8, count=nbytes, offset=offset)

    def memory(self, offset: int, nbytes: int) -> memoryview:
        """Bytes [offset, offset + nbytes) as a writable memoryview."""
        mapping = self._checked(offset, nbytes)
        return memoryview(bytearray() if mapping is None else mapping)[offset : offset + nbytes]

    def populate(self, offset: int = 0, nbytes: int | None = None) -> None:
        """Gives the range its pages now, in as few system calls as possible, without the GIL.

        Contents stay. Ranges over 16 MiB are shared out over the arena's threads. Does nothing on kernels
        that cannot (before 5.14): the pages then come at the first touch.

        Raises:
            HostMemoryError: the system has no memory for these pages.
        """
        nbytes = self.nbytes - offset if nbytes is None else nbytes
        mapping = self._checked(offset, nbytes)
        if mapping is None or nbytes == 0 or self.populated:
            return
        end = offset + nbytes
        starts = range(offset, end, PIECE_NBYTES)
        if len(starts) == 1 and not self._cpus:
            _populate(mapping, self.address + offset, nbytes)
            return
        with ThreadPoolExecutor(
            min(self._threads, len(starts)), "ckpt-populate", _run_on, (self._cpus,)
        ) as pool:
            pieces = [
                pool.submit(_populate, mapping, self.address + start, min(PIECE_NBYTES, end - start))
                for start in starts
            ]
            for piece in pieces:
                piece.result()

    @property
    def pinned(self) -> bool:
        return self._unpin is not None

    def pin(self, pinner: HostMemoryPinner) -> None:
        """Pins all of it, as one range: a device's copy across the border of two ranges would fail.

        Populate it first: the driver makes missing pages in one thread. Does nothing where it is pinned.

        Raises:
            HostMemoryError: it cannot be pinned; the message says why and what to do.
        """
        mapping = self._checked(0, 0)
        if mapping is not None and self._unpin is None:
            self._unpin = pin_while_alive(self, mapping, pinner, self.address, self.nbytes, read_only=False)

    def before_close(self, call: Callable[[], object]) -> None:
        """`call` is called before this memory is unpinned, and let go."""
        self._before_close.append(call)

    def close(self) -> None:
        """Unpins the memory and lets go of it; it is freed with the last view. Idempotent."""
        while self._before_close:
            self._before_close.pop()()
        unpin, self._unpin = self._unpin, None
        if unpin is not None:
            unpin()
        # mmap.close() would unmap under the feet of tensors: torch keeps the mmap object, not its export.
        self._closed = True
        self._mapping = None

    def _checked(self, offset: int, nbytes: int) -> mmap.mmap | None:
        if self._closed:
            raise CheckpointError("this host arena is closed")
        if not 0 <= offset <= offset + nbytes <= self.nbytes:
            raise ConfigError(
                f"bytes {offset} .. {offset + nbytes} are not inside an arena of {self.nbytes} bytes"
            )
        return self._mapping


def _too_little(needed: int, available: int) -> str:
    return (
        f"host memory: {needed} bytes ({needed / 2**30:.2f} GiB) are needed, {available} bytes "
        f"({available / 2**30:.2f} GiB) are available; unregister a checkpoint or use more hosts"
    )


def _map(nbytes: int, huge_pages: bool | None) -> mmap.mmap:
    try:
        mapping = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, OverflowError) as error:
        # An address-space limit or strict overcommit, which MemAvailable knows nothing of.
        raise HostMemoryError(f"{_too_little(nbytes, available_host_memory())} ({error})") from error
    if huge_pages is not None:
        advice = mmap.MADV_HUGEPAGE if huge_pages else mmap.MADV_NOHUGEPAGE
        try:
            mapping.madvise(advice)
        except OSError as error:
            if error.errno != errno.EINVAL:  # a kernel without them: ordinary pages it is
                raise
    return mapping


def _address_of(mapping: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(mapping))


def advise(address: int, nbytes: int, advice: int) -> int:
    """One madvise() of the pages of that range. The errno of a failure; 0 too where the kernel cannot."""
    begin = address - address % mmap.PAGESIZE
    if _libc.madvise(begin, address + nbytes - begin, advice) == 0:
        return 0
    code = ctypes.get_errno()
    return 0 if code in (errno.EINVAL, errno.EINTR, errno.EAGAIN) else code


def make_writable(address: int, nbytes: int) -> bool:
    """Whether the pages of that range can be written from now on; not if they are a file's that is not open
    for writing."""
    begin = address - address % mmap.PAGESIZE
    code: int = _libc.mprotect(begin, address + nbytes - begin, mmap.PROT_READ | mmap.PROT_WRITE)
    return code == 0


def _run_on(cpus: frozenset[int] | None) -> None:
    """Binds the calling thread, which lives for one `populate` only."""
    if cpus:
        try:
            os.sched_setaffinity(0, cpus)
        except OSError as error:  # they were taken from this container meanwhile
            logger.warning("cannot run on the CPUs of the device's NUMA node: %s", error.strerror or error)


def _populate(mapping: mmap.mmap, address: int, nbytes: int) -> None:
    """One MADV_POPULATE_WRITE; `mapping` is an argument so that it lives through the call."""
    code = advise(address, nbytes, _MADV_POPULATE_WRITE)  # where the kernel cannot, the first touch does it
    if code:
        raise HostMemoryError(f"host memory: cannot populate {nbytes} bytes: {os.strerror(code)}")


@functools.cache
def _huge_pages_are_faster() -> bool:
    """Times the first touch of 16 MiB with and without huge pages.

    On some virtual machines huge pages are several times slower to touch; elsewhere they are much faster.
    """
    scratch: list[mmap.mmap] = []  # all kept to the end: a page that was just freed is quick to get back
    seconds = {True: 0.0, False: 0.0}
    for huge in (True, False, False, True):  # forth and back, so that warming up favours neither
        scratch.append(_map(_PROBE_NBYTES, huge))
        address = _address_of(scratch[-1])
        begin = time.perf_counter()
        ctypes.memset(address, 1, _PROBE_NBYTES)
        seconds[huge] += time.perf_counter() - begin
    for mapping in scratch:
        mapping.close()
    return seconds[True] <= seconds[False]
