"""A checkpoint's share in host memory: tensors in host buffers, buffers in an arena or in mapped files."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial

import torch

from ckpt_engine.checkpoint.arena import HostArena
from ckpt_engine.checkpoint.mapped_file import MappedFile
from ckpt_engine.checkpoint.packing import PackedBuffer
from ckpt_engine.checksum import checksum, digest_of
from ckpt_engine.errors import CheckpointError, ConfigError
from ckpt_engine.metadata import HostBufferMeta, TensorMeta


@dataclass(kw_only=True, frozen=True, slots=True)
class Share:
    """What a rank holds of a checkpoint: bytes and number of its tensors; `digests`: all of them have one."""

    name: str
    nbytes: int
    tensors: int
    digests: bool


@dataclass(kw_only=True, slots=True, eq=False)
class HostCheckpoint:
    """One rank's share of a checkpoint in host memory.

    `epoch`: a uuid (hex) that no other share has, of this name or another, refills of an arena included.
    `buffers`: first those in `arena`, in order, each one's tensors sorted by name; then those in `files`,
    each one's tensors in the file's order and with the file's alignment. Addresses are this process's.
    `arena` may be larger than its buffers. `pooled`: it belongs to a pool, and outlives this share.
    """

    name: str
    arena: HostArena
    buffers: tuple[HostBufferMeta, ...]
    files: tuple[MappedFile, ...] = ()
    pooled: bool = False
    epoch: str = field(default_factory=lambda: uuid.uuid4().hex)
    _memories: tuple[HostArena | MappedFile, ...] = field(repr=False)
    _closed: bool = field(default=False, init=False, repr=False)

    @classmethod
    def of(
        cls,
        name: str,
        arena: HostArena,
        packed: Sequence[PackedBuffer],
        files: Sequence[tuple[MappedFile, Sequence[PackedBuffer]]],
        *,
        pooled: bool,
    ) -> HostCheckpoint:
        """Puts it together; each `PackedBuffer.start` counts from the begin of its memory."""
        placed: list[tuple[HostArena | MappedFile, PackedBuffer]] = [(arena, buffer) for buffer in packed]
        placed += [(file, buffer) for file, parts in files for buffer in parts]
        return cls(
            name=name,
            arena=arena,
            buffers=tuple(
                HostBufferMeta(
                    address=memory.address + buffer.start, nbytes=buffer.nbytes, tensors=buffer.tensors
                )
                for memory, buffer in placed
            ),
            files=tuple(file for file, _ in files),
            pooled=pooled,
            _memories=tuple(memory for memory, _ in placed),
        )

    @classmethod
    def of_memory(cls, name: str, arena: HostArena, buffers: tuple[HostBufferMeta, ...]) -> HostCheckpoint:
        """Of buffers that lie in `arena`, or are to."""
        return cls(name=name, arena=arena, buffers=buffers, _memories=(arena,) * len(buffers))

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, without the padding between them."""
        return sum(tensor.nbytes for buffer in self.buffers for tensor in buffer.tensors)

    @property
    def share(self) -> Share:
        tensors = [tensor for buffer in self.buffers for tensor in buffer.tensors]
        return Share(
            name=self.name,
            nbytes=self.nbytes,
            tensors=len(tensors),
            digests=bool(tensors) and all(tensor.digest for tensor in tensors),
        )

    @property
    def memories(self) -> tuple[HostArena | MappedFile, ...]:
        """What holds its bytes, each once."""
        return (self.arena, *self.files)

    def view(self, buffer_index: int, offset: int, nbytes: int) -> torch.Tensor:
        """Bytes [offset, offset + nbytes) of a host buffer: a 1-D uint8 tensor that shares the memory.

        Only for reading: a mapped file's memory cannot be written. A view of a pool's memory shows the next
        checkpoint once the pool is refilled.

        Raises:
            ConfigError: not inside that buffer.
            CheckpointError: the checkpoint is closed.
        """
        if self._closed:
            raise CheckpointError(f"checkpoint {self.name!r} is closed")
        if not 0 <= buffer_index < len(self.buffers):
            raise ConfigError(f"checkpoint {self.name!r} has no host buffer {buffer_index}")
        buffer = self.buffers[buffer_index]
        if not 0 <= offset <= offset + nbytes <= buffer.nbytes:
            raise ConfigError(
                f"bytes {offset} .. {offset + nbytes} are not inside host buffer {buffer_index} "
                f"of checkpoint {self.name!r} ({buffer.nbytes} bytes)"
            )
        memory = self._memories[buffer_index]
        return memory.view(buffer.address - memory.address + offset, nbytes)

    def add_digests(self, threads: int) -> None:
        """Of each tensor's bytes, to its meta; reads them all."""

        def with_digest(number: int, tensor: TensorMeta) -> TensorMeta:
            data = self.view(number, tensor.offset, tensor.nbytes)
            return tensor.model_copy(update={"digest": digest_of(checksum(data)).hex()})

        with ThreadPoolExecutor(threads, thread_name_prefix="ckpt-engine-digest") as pool:
            self.buffers = tuple(
                buffer.model_copy(
                    update={"tensors": tuple(pool.map(partial(with_digest, number), buffer.tensors))}
                )
                for number, buffer in enumerate(self.buffers)
            )

    def unlink_files(self) -> None:
        """Removes the names of the files that were taken as a whole, in place: from here on it owns them."""
        for file in self.files:
            if file.whole:
                file.unlink()

    def close(self) -> None:
        """Unpins its memory and lets go of it; freed with the last view. A pool keeps its own. Idempotent."""
        self._closed = True
        for file in self.files:
            file.close()
        if not self.pooled:
            self.arena.close()
