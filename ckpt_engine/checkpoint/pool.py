"""The shared memory pool: one host arena that checkpoints use in turn.

Making and pinning an arena takes far longer than filling one that is there. A trainer that registers the
next step's weights as soon as the last ones are unregistered pays for it once.
"""

from __future__ import annotations

from ckpt_engine.checkpoint.arena import HostArena
from ckpt_engine.errors import HostMemoryError
from ckpt_engine.host_memory import available_host_memory


class ArenaPool:
    """Keeps at most one arena. Its owner sees to it that one checkpoint at a time uses it.

    `threads`, `huge_pages`, `cpus`: as of `HostArena`.
    """

    def __init__(
        self,
        threads: int | None = None,
        huge_pages: bool | None = None,
        cpus: frozenset[int] | None = None,
    ) -> None:
        self._threads = threads
        self._huge_pages = huge_pages
        self._cpus = cpus
        self._arena: HostArena | None = None
        self._new = False  # made by the last `fit`, and not `keep`-ed yet

    @property
    def nbytes(self) -> int:
        """Bytes that it holds now."""
        return self._arena.nbytes if self._arena is not None else 0

    def fit(self, nbytes: int) -> HostArena:
        """An arena of at least `nbytes`: the kept one if it is large enough, else a new one in its place.

        The old one is let go first: seldom is there room for both. Follow with `keep` or `drop_new`.

        Raises:
            HostMemoryError: it cannot be had. The kept arena is still there if that was foreseeable.
        """
        kept = self._arena
        if kept is not None and nbytes <= kept.nbytes:
            return kept
        if kept is not None:
            available = available_host_memory()
            if nbytes > available + kept.nbytes:
                raise HostMemoryError(
                    f"the shared memory pool has {kept.nbytes} bytes, {nbytes} are needed, and only "
                    f"{available} more are available on this host: register less, or use more hosts"
                )
            self._arena = None
            kept.close()
        arena = self._arena = HostArena(
            nbytes, threads=self._threads, huge_pages=self._huge_pages, cpus=self._cpus
        )
        self._new = True
        return arena

    def keep(self) -> None:
        """Filling the arena succeeded: it stays."""
        self._new = False

    def drop_new(self) -> None:
        """Filling it failed: an arena made for it goes, one that was there before stays."""
        if self._new:
            self.close()

    def detach(self) -> HostArena | None:
        """Empties the pool; the caller closes what was in it."""
        arena, self._arena, self._new = self._arena, None, False
        return arena

    def close(self) -> None:
        """Frees the arena. Idempotent; the pool can be used again."""
        arena = self.detach()
        if arena is not None:
            arena.close()
