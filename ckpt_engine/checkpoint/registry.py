"""The checkpoints that this process holds in host memory, by name."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence

import torch

from ckpt_engine.checkpoint.loader import FileSource, HostCheckpoint, load
from ckpt_engine.errors import CheckpointError, CheckpointExistsError, ConfigError, UnknownCheckpointError


class CheckpointRegistry:
    """Registers, finds and frees checkpoints. Any thread may call anything at any time.

    `threads`, `huge_pages`: for loading, as of `loader.load`.
    """

    def __init__(self, threads: int | None = None, huge_pages: bool | None = None) -> None:
        self._threads = threads
        self._huge_pages = huge_pages
        self._lock = threading.Lock()
        self._held: dict[str, HostCheckpoint] = {}
        self._loading: set[str] = set()
        self._closed = False

    def register(
        self,
        checkpoint_name: str,
        *,
        files: Sequence[FileSource] | None = None,
        named_tensors: Mapping[str, torch.Tensor] | None = None,
    ) -> HostCheckpoint:
        """Loads this rank's share and keeps it under the name. Neither files nor tensors: an empty share.

        Raises:
            ConfigError: the name is empty, or an argument is not what it may be.
            CheckpointExistsError: the name is registered, or being registered, already.
            CheckpointError and below: as of `loader.load`; nothing is registered then and nothing is held.
        """
        if not isinstance(checkpoint_name, str) or not checkpoint_name:
            raise ConfigError(f"checkpoint_name={checkpoint_name!r}: give a non-empty string")
        with self._lock:
            self._check_open()
            if checkpoint_name in self._held or checkpoint_name in self._loading:
                raise CheckpointExistsError(
                    f"checkpoint {checkpoint_name!r} is registered already: unregister it first, "
                    "or choose another name"
                )
            self._loading.add(checkpoint_name)
        checkpoint: HostCheckpoint | None = None
        try:
            # Not under the lock: it takes seconds, and others may be used or registered meanwhile.
            checkpoint = load(
                checkpoint_name, files, named_tensors, threads=self._threads, huge_pages=self._huge_pages
            )
            with self._lock:
                self._check_open()
                self._held[checkpoint_name] = checkpoint
        except BaseException:
            if checkpoint is not None:
                checkpoint.close()
            raise
        finally:
            with self._lock:
                self._loading.discard(checkpoint_name)
        return checkpoint

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

    def unregister(self, checkpoint_name: str) -> bool:
        """Frees the checkpoint; False if there was none of that name (or it is still being loaded)."""
        with self._lock:
            checkpoint = self._held.pop(checkpoint_name, None)
        if checkpoint is None:
            return False
        checkpoint.close()
        return True

    def names(self) -> list[str]:
        """The registered names, sorted."""
        with self._lock:
            return sorted(self._held)

    def close(self) -> None:
        """Frees every checkpoint; one that is being loaded is freed when its loading ends. Idempotent."""
        with self._lock:
            self._closed = True
            held, self._held = list(self._held.values()), {}
        for checkpoint in held:
            checkpoint.close()

    def _check_open(self) -> None:
        if self._closed:
            raise CheckpointError("this registry of checkpoints is closed")
