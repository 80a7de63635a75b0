"""Files in memory (/dev/shm) that become host buffers where they are: mapped and pinned, not copied.

The contract: such a file is temporary, and it is ours from the moment it is registered. Nobody may write to
it, or cut it, any more: its bytes are what engines get, and a read behind its new end would kill the process
(SIGBUS). Once everything is registered its name is removed (`unlink`), which takes the temptation away; the
memory is freed with the map. A failure before that leaves the file as it was.
"""

from __future__ import annotations

import ctypes
import logging
import mmap
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch

from ckpt_engine.checkpoint.arena import PIECE_NBYTES, advise, make_writable
from ckpt_engine.checkpoint.pinning import pin_while_alive
from ckpt_engine.errors import CheckpointError, CheckpointFormatError, ConfigError
from ckpt_engine.host_memory import HostMemoryPinner

_MADV_POPULATE_READ = 22  # linux/mman.h, since 5.14; Python's mmap has no name for it

logger = logging.getLogger(__name__)


class MappedFile:
    """Bytes [begin, end) of the file at `path`, mapped shared and read-only; byte `begin` is at `address`.

    Never write to a view: the memory is not writable, unless `allow_writes` was called, and the attempt
    kills the process. The map lives until
    it is closed and the last view is gone; it is unpinned when it is closed.

    Args:
        path: of a regular file, not of a link to it.
        file_nbytes: the size that the file must have.
        whole: all of the file's tensors are taken, so that it is ours to remove.

    Raises:
        CheckpointError: the file cannot be opened or mapped.
        CheckpointFormatError: it has another size.
    """

    def __init__(self, path: Path, begin: int, end: int, *, file_nbytes: int, whole: bool) -> None:
        if not 0 <= begin <= end <= file_nbytes:
            raise ConfigError(f"bytes {begin} .. {end} are not inside a file of {file_nbytes} bytes")
        self.path = Path(os.path.abspath(path))  # the working directory may change before it is unlinked
        self.nbytes = end - begin
        self.whole = whole
        self.address = 0
        self._file_nbytes = file_nbytes
        self._closed = False
        self._writable = False
        self._unpin: Callable[[], object] | None = None
        self._before_close: list[Callable[[], object]] = []
        self._mapping: mmap.mmap | None = None  # None too for 0 bytes, which cannot be mapped
        self._bytes = torch.empty(0, dtype=torch.uint8)
        try:
            descriptor = self._open()
            try:
                status = os.fstat(descriptor)
                self._identity = (status.st_dev, status.st_ino)
                self._check_size(status.st_size)
                if self.nbytes:
                    self._map(descriptor, begin)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be mapped: {error.strerror or error}") from error

    def _open(self) -> int:
        """For writing, too, where this user may: else its pages could never be made writable."""
        flags = os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            return os.open(self.path, os.O_RDWR | flags)
        except OSError:
            return os.open(self.path, os.O_RDONLY | flags)

    def _map(self, descriptor: int, begin: int) -> None:
        skipped = begin % mmap.ALLOCATIONGRANULARITY
        mapping = mmap.mmap(
            descriptor,
            skipped + self.nbytes,
            flags=mmap.MAP_SHARED,
            prot=mmap.PROT_READ,
            offset=begin - skipped,
        )
        self._mapping = mapping
        self.address = int(np.frombuffer(mapping, np.uint8).ctypes.data) + skipped
        # Not torch.frombuffer(mapping): it warns of every read-only buffer. It keeps this one, which keeps
        # the mapping.
        memory = (ctypes.c_uint8 * self.nbytes).from_address(self.address)
        memory.mapping = mapping  # type: ignore[attr-defined]
        self._bytes = torch.frombuffer(memory, dtype=torch.uint8)

    @property
    def closed(self) -> bool:
        return self._closed

    @property
    def pinned(self) -> bool:
        return self._unpin is not None

    def view(self, offset: int, nbytes: int) -> torch.Tensor:
        """Bytes [offset, offset + nbytes) as a 1-D uint8 tensor that shares the memory; not to be written."""
        if self._closed:
            raise CheckpointError(f"the map of {self.path} is closed")
        if not 0 <= offset <= offset + nbytes <= self.nbytes:
            raise ConfigError(
                f"bytes {offset} .. {offset + nbytes} are not inside a map of {self.nbytes} bytes"
            )
        return self._bytes[offset : offset + nbytes]

    def populate_pieces(self) -> Iterator[Callable[[], None]]:
        """Calls that map the pages now, 16 MiB each, for threads to make: pinning is faster after them.

        Each raises CheckpointFormatError where the file has no such page any more.
        """
        for start in range(0, self.nbytes, PIECE_NBYTES):
            nbytes = min(PIECE_NBYTES, self.nbytes - start)
            yield partial(self._populate, start, nbytes)

    def _populate(self, start: int, nbytes: int) -> None:
        mapping = self._mapping  # held, so that it lives through the call
        code = advise(self.address + start, nbytes, _MADV_POPULATE_READ) if mapping is not None else 0
        if code:
            raise CheckpointFormatError(
                f"{self.path}: changed while it was being mapped, or no memory for it ({os.strerror(code)})"
            )

    def pin(self, pinner: HostMemoryPinner) -> None:
        """Pins it as one read-only range. Does nothing where it is pinned.

        Raises:
            HostMemoryError: it cannot be pinned; the message says why and what to do.
            CheckpointFormatError: the file has another size by now.
        """
        mapping = self._mapping
        if mapping is not None and self._unpin is None:
            self._unpin = pin_while_alive(self, mapping, pinner, self.address, self.nbytes, read_only=True)
            self._check_size(mapping.size())

    def allow_writes(self) -> None:
        """Makes the pages writable, from here on: no driver registers others for RDMA. Nothing is copied.

        Raises:
            CheckpointError: the file may not be written by this user.
        """
        if self._mapping is None or self._writable:
            return
        if not make_writable(self.address, self.nbytes):
            raise CheckpointError(
                f"{self.path} was taken in place, and cannot be written by this user: an RDMA device needs "
                "that. Register it without use_inplace_pin_memory, or write it as the user of this process"
            )
        self._writable = True

    def unlink(self) -> None:
        """Removes the file's name, unless another file has it by now. Its failure is only warned about."""
        try:
            status = self.path.lstat()
            if (status.st_dev, status.st_ino) == self._identity:
                self.path.unlink()
            else:
                logger.warning("%s is another file than the one that was registered: left there", self.path)
        except FileNotFoundError:
            pass
        except OSError as error:
            logger.warning(
                "%s was registered in place but cannot be removed (%s): its memory stays taken until "
                "somebody removes it",
                self.path,
                error.strerror or error,
            )

    def before_close(self, call: Callable[[], object]) -> None:
        """`call` is called before this memory is unpinned, and let go."""
        self._before_close.append(call)

    def close(self) -> None:
        """Unpins the map and lets go of it; it is freed with the last view. Idempotent."""
        while self._before_close:
            self._before_close.pop()()
        unpin, self._unpin = self._unpin, None
        if unpin is not None:
            unpin()
        self._closed = True
        self._mapping = None
        self._bytes = torch.empty(0, dtype=torch.uint8)

    def _check_size(self, nbytes: int) -> None:
        if nbytes != self._file_nbytes:
            raise CheckpointFormatError(
                f"{self.path}: has {nbytes} bytes, and had {self._file_nbytes} when its header was read: "
                "somebody changed it"
            )
