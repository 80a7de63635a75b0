"""Collectives behind one small seam: torch.distributed's backends here, stateless groups beside them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from datetime import timedelta
from typing import Protocol

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store

from ckpt_engine.deadline import Deadline
from ckpt_engine.errors import ErrorRecord, PeerLost, UpdateTimeout

SLICE = timedelta(milliseconds=20)
BEYOND_DEADLINE = timedelta(seconds=10)
"""How much later gloo would end a wait by itself: ours names what was waited for."""


class Collectives(Protocol):
    """A private group of ranks. All members call in the same order; none touches the default group.

    vLLM's stateless groups (`vllm_nccl`, `vllm_hccl`) are further implementations of this.
    """

    def broadcast(
        self, tensor: torch.Tensor, root: int, deadline: Deadline, poll: Callable[[], None]
    ) -> None:
        """Broadcasts bytes from member `root` (its place in the group) to all members, in place.

        `poll` is called while waiting; what it raises ends the wait.

        Raises:
            PeerLost: a member's connection broke.
            UpdateTimeout: the deadline passed.
        """
        ...

    def close(self) -> None:
        """Drops the group: members that still wait in it get PeerLost. Idempotent."""
        ...


class GlooCollectives:
    """gloo on its own prefix of the store.

    Its abort does not release a member that waits in a broadcast, so waits are cut into slices; when a
    member drops the group, its closing connections release the others.
    """

    def __init__(self, store: Store, prefix: str, place: int, size: int, deadline: Deadline) -> None:
        timeout = timedelta(seconds=max(1.0, deadline.remaining))
        self._group: dist.ProcessGroupGloo | None = dist.ProcessGroupGloo(
            PrefixStore(prefix, store), place, size, timeout
        )

    def broadcast(
        self, tensor: torch.Tensor, root: int, deadline: Deadline, poll: Callable[[], None]
    ) -> None:
        assert self._group is not None
        options = dist.BroadcastOptions()
        options.rootRank = root
        options.rootTensor = 0
        # The group outlives the update that made it: its own timeout may be shorter than this deadline.
        options.timeout = timedelta(seconds=deadline.remaining) + BEYOND_DEADLINE
        work = self._group.broadcast([tensor], options)  # type: ignore[attr-defined]
        while not work.is_completed():
            # A slice that times out raises, as a broken connection does: is_completed() tells them apart.
            with contextlib.suppress(RuntimeError):
                work.wait(SLICE)
            poll()
            if deadline.passed and not work.is_completed():
                record = ErrorRecord(
                    error_type="UpdateTimeout", message="a broadcast between hosts did not end"
                )
                raise UpdateTimeout(record)
        try:
            work.wait()
        except RuntimeError as error:
            record = ErrorRecord(
                error_type="PeerLost",
                message=f"a broadcast between hosts broke: {str(error).splitlines()[0]}",
            )
            raise PeerLost(record) from error

    def close(self) -> None:
        self._group = None
