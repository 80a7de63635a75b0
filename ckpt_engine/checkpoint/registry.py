"""The checkpoints that this process holds in host memory, by name."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence

import torch

from ckpt_engine.checkpoint.arena import HostArena, default_threads
from ckpt_engine.checkpoint.host_checkpoint import HostCheckpoint
from ckpt_engine.checkpoint.loader import load
from ckpt_engine.checkpoint.pool import ArenaPool
from ckpt_engine.checkpoint.progress import Progress
from ckpt_engine.checkpoint.sources import FileSource, Incoming
from ckpt_engine.checkpoint.tensor_copies import has_lone_surrogate
from ckpt_engine.errors import CheckpointError, CheckpointExistsError, ConfigError, UnknownCheckpointError
from ckpt_engine.host_memory import HostMemoryPinner


class CheckpointRegistry:
    """Registers, finds and frees checkpoints. Any thread may call anything at any time.

    `threads`, `huge_pages`, `pinner`, `cpus`: for loading, as of `loader.load`.

    Its shared memory pool is one arena that the checkpoints registered with `use_shared_memory_pool` use in
    turn, one at a time. Unregistering them keeps it, for the next one to fill.
    """

    def __init__(
        self,
        threads: int | None = None,
        huge_pages: bool | None = None,
        pinner: HostMemoryPinner | None = None,
        cpus: frozenset[int] | None = None,
    ) -> None:
        self._threads = threads
        self._huge_pages = huge_pages
        self._pinner = pinner
        self._cpus = cpus
        self._lock = threading.Lock()
        self._held: dict[str, HostCheckpoint] = {}
        self._loading: set[str] = set()
        self._pool = ArenaPool(threads, huge_pages, cpus)
        self._pool_user: str | None = None  # the name that the pool belongs to, from its loading on
        self._closed = False

    def register(
        self,
        checkpoint_name: str,
        *,
        files: Sequence[FileSource] | None = None,
        named_tensors: Mapping[str, torch.Tensor] | None = None,
        incoming: Incoming | None = None,
        use_shared_memory_pool: bool = False,
        use_inplace_pin_memory: bool = False,
        digests: bool = False,
        on_progress: Progress | None = None,
    ) -> HostCheckpoint:
        """Loads this rank's share and keeps it under the name. Neither files nor tensors: an empty share.

        Args:
            use_shared_memory_pool: into the pool's arena, which grows where it must.
            use_inplace_pin_memory: files below /dev/shm stay where they are (`loader.load`: `in_place`), and
                their names are removed once everything is registered, if all of their tensors were taken.
            digests: make one of each tensor.
            incoming, on_progress: as of `loader.load`.

        Raises:
            ConfigError: the name is empty, or an argument is not what it may be.
            CheckpointExistsError: the name is registered, or being registered, already.
            CheckpointError: another checkpoint is in the pool.
            CheckpointError and below: as of `loader.load`; nothing is registered then, nothing but the pool's
                memory is held, and no file is removed.
        """
        if not isinstance(checkpoint_name, str) or not checkpoint_name:
            raise ConfigError(f"checkpoint_name={checkpoint_name!r}: give a non-empty string")
        if has_lone_surrogate(checkpoint_name):
            raise ConfigError(
                f"checkpoint_name={checkpoint_name!r}: no message could carry its lone surrogate"
            )
        self._reserve(checkpoint_name, pooled=use_shared_memory_pool)
        checkpoint: HostCheckpoint | None = None
        registered = False
        try:
            # Not under the lock: it takes seconds, and others may be used or registered meanwhile.
            checkpoint = load(
                checkpoint_name,
                files,
                named_tensors,
                incoming=incoming,
                threads=self._threads,
                huge_pages=self._huge_pages,
                pinner=self._pinner,
                cpus=self._cpus,
                on_progress=on_progress,
                in_place=use_inplace_pin_memory,
                pool=self._pool if use_shared_memory_pool else None,
            )
            if digests:
                checkpoint.add_digests(self._threads or default_threads())
            with self._lock:
                self._check_open()
                self._loading.discard(checkpoint_name)
                self._held[checkpoint_name] = checkpoint
                registered = True
        finally:
            if not registered:
                if checkpoint is not None:
                    checkpoint.close()
                self._forget(checkpoint_name, pooled=use_shared_memory_pool)
        # The last step, outside of all that may undo the others: a removed file's bytes are only here.
        checkpoint.unlink_files()
        return checkpoint

    def adopt(self, checkpoint: HostCheckpoint) -> None:
        """Keeps one that was filled elsewhere, under its name.

        Raises:
            CheckpointExistsError: the name is taken; it is not kept.
        """
        self._reserve(checkpoint.name, pooled=False)
        with self._lock:
            self._loading.discard(checkpoint.name)
            self._held[checkpoint.name] = checkpoint

    def _reserve(self, checkpoint_name: str, *, pooled: bool) -> None:
        with self._lock:
            self._check_open()
            if checkpoint_name in self._held or checkpoint_name in self._loading:
                raise CheckpointExistsError(
                    f"checkpoint {checkpoint_name!r} is registered already: unregister it first, "
                    "or choose another name"
                )
            if pooled and self._pool_user is not None:
                raise CheckpointError(
                    f"checkpoint {self._pool_user!r} is in the shared memory pool, which holds one at a "
                    f"time: unregister it first (that keeps the memory for {checkpoint_name!r}), or register "
                    f"{checkpoint_name!r} without use_shared_memory_pool"
                )
            if pooled:
                self._pool_user = checkpoint_name
            self._loading.add(checkpoint_name)

    def _forget(self, checkpoint_name: str, *, pooled: bool) -> None:
        """Undoes `_reserve`."""
        with self._lock:
            self._loading.discard(checkpoint_name)
            if pooled:
                self._pool_user = None
            arena = self._idle_arena() if self._closed else None
        if arena is not None:
            arena.close()

    def get(self, checkpoint_name: str) -> HostCheckpoint:
        """The checkpoint of that name.

        Raises:
            UnknownCheckpointError: nothing is registered under it; the message lists the known names.
        """
        with self._lock:
            checkpoint = self._held.get(checkpoint_name)
            known = sorted(self._held)
        if checkpoint is None:
            names = ", ".join(repr(name) for name in known) or "none"
            raise UnknownCheckpointError(
                f"no checkpoint {checkpoint_name!r} is registered here; registered: {names}"
            )
        return checkpoint

    def find(self, checkpoint_name: str) -> HostCheckpoint | None:
        """The checkpoint of that name; None: nothing is registered under it."""
        with self._lock:
            return self._held.get(checkpoint_name)

    def unregister(self, checkpoint_name: str, *, force: bool = False) -> bool:
        """Frees the checkpoint; False if there was none of that name (or it is still being loaded).

        The memory of one in the pool is kept for the next, unless `force`: that frees the pool, unless
        another checkpoint is in it. `force` does so too, and is True for it, where the name is unknown.
        """
        with self._lock:
            checkpoint = self._held.pop(checkpoint_name, None)
            if checkpoint is not None and checkpoint.pooled:
                # Under the lock, and quick: it must not be read any more when another one fills the pool.
                checkpoint.close()
                self._pool_user = None
            arena = self._idle_arena() if force else None
        if checkpoint is not None:
            checkpoint.close()
        if arena is not None:
            arena.close()
        return checkpoint is not None or (arena is not None and arena.nbytes > 0)

    def names(self) -> list[str]:
        """The registered names, sorted."""
        with self._lock:
            return sorted(self._held)

    def held(self) -> list[HostCheckpoint]:
        """All of them, sorted by name."""
        with self._lock:
            return [self._held[name] for name in sorted(self._held)]

    def close(self) -> None:
        """Frees every checkpoint; one that is being loaded is freed when its loading ends. Idempotent."""
        with self._lock:
            self._closed = True
            held, self._held = list(self._held.values()), {}
            if any(checkpoint.pooled for checkpoint in held):
                self._pool_user = None
            arena = self._idle_arena()
        for checkpoint in held:
            checkpoint.close()
        if arena is not None:
            arena.close()

    def _idle_arena(self) -> HostArena | None:
        """Takes the pool's arena out of it, unless somebody uses it; to be called under the lock."""
        return self._pool.detach() if self._pool_user is None else None

    def _check_open(self) -> None:
        if self._closed:
            raise CheckpointError("this registry of checkpoints is closed")
