"""nccl's C functions without a GPU: vLLM's own wrapper and communicator call them, ranks are threads.

Each is a C function of the type that vLLM's wrapper declares for it, so arguments of another number or kind
fail. As with nccl, making a communicator waits for its last member; a broadcast is only enqueued, and happens
once each member has enqueued it.
"""

from __future__ import annotations

import ctypes
import threading
from typing import Any

from vllm.distributed.device_communicators.pynccl_wrapper import NCCLLibrary

SECONDS = 60.0
"""How long a communicator waits for its members."""
VERSION = 22703
FAILED = 1
ITEM_NBYTES = {1: 1, 7: 4}
"""Of nccl's data types: uint8, and the float32 of vLLM's warm-up."""


class Wire:
    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.calls: list[tuple[Any, ...]] = []
        """Broadcasts as (communicator, bytes, root, stream), and ("abort", communicator)."""
        self.place_of: dict[int, tuple[bytes, int]] = {}
        """Communicator -> the id of its group, and its place in it."""
        self.fails = False
        """Whether broadcasts are refused from now on."""
        self._ids = 0
        self._size_of: dict[bytes, int] = {}
        self._enqueued: dict[int, list[tuple[int, int, int, int]]] = {}
        self._done: dict[bytes, int] = {}

    def load(self, library: Any) -> None:  # noqa: ANN401
        """In place of NCCLLibrary's constructor."""
        library._funcs = {
            each.name: ctypes.CFUNCTYPE(each.restype, *each.argtypes)(getattr(self, each.name))
            for each in NCCLLibrary.exported_functions
            if hasattr(self, each.name)
        }
        # What Python hands to C as a string would never be freed.
        library._funcs["ncclGetErrorString"] = lambda result: b"refused by the test"

    def ncclGetVersion(self, version: Any) -> int:  # noqa: ANN401 - nccl's names
        version[0] = VERSION
        return 0

    def ncclGetUniqueId(self, unique_id: Any) -> int:  # noqa: ANN401
        with self.changed:
            self._ids += 1
            unique_id[0].internal[0] = self._ids
        return 0

    def ncclCommInitRank(self, comm: Any, size: int, unique_id: Any, rank: int) -> int:  # noqa: ANN401
        with self.changed:
            group = bytes(unique_id)
            assert self._size_of.setdefault(group, size) == size
            handle = len(self.place_of) + 1
            self.place_of[handle] = (group, rank)
            self._enqueued[handle] = []
            self._done.setdefault(group, 0)
            self.changed.notify_all()
            if not self.changed.wait_for(lambda: len(self._members(group)) == size, SECONDS):
                return FAILED
        comm[0] = handle
        return 0

    def ncclAllReduce(
        self, source: int, target: int, count: int, dtype: int, operation: int, comm: int, stream: int | None
    ) -> int:
        """Of zeros, vLLM's warm-up."""
        ctypes.memset(target, 0, count * ITEM_NBYTES[dtype])
        return 0

    def ncclBroadcast(
        self,
        source: int | None,
        target: int,
        count: int,
        dtype: int,
        root: int,
        comm: int,
        stream: int | None,
    ) -> int:
        if self.fails:
            return FAILED
        with self.changed:
            group, _ = self.place_of[comm]
            nbytes = count * ITEM_NBYTES[dtype]
            self.calls.append((comm, nbytes, root, stream))
            self._enqueued[comm].append((source or 0, target, nbytes, root))
            self._move(group)
            self.changed.notify_all()
        return 0

    def ncclCommAbort(self, comm: int) -> int:
        with self.changed:
            self.calls.append(("abort", comm))
            self.changed.notify_all()
        return 0

    def moved(self, count: int) -> bool:
        """Whether so many broadcasts have happened, in all groups together."""
        return sum(self._done.values()) >= count

    def aborted(self) -> set[int]:
        return {call[1] for call in self.calls if call[0] == "abort"}

    def _members(self, group: bytes) -> dict[int, int]:
        """Place -> communicator."""
        return {place: handle for handle, (of, place) in self.place_of.items() if of == group}

    def _move(self, group: bytes) -> None:
        members = self._members(group)
        while all(len(self._enqueued[handle]) > self._done[group] for handle in members.values()):
            turn = {place: self._enqueued[handle][self._done[group]] for place, handle in members.items()}
            ((nbytes, root),) = {(each[2], each[3]) for each in turn.values()}
            for place, (_, target, _, _) in turn.items():
                if place != root:
                    ctypes.memmove(target, turn[root][0], nbytes)
            self._done[group] += 1
