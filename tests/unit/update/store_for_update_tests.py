"""A `P2PStore` in this process's own memory, whose reads end when the test says so, with mooncake's bad
habits: a read that has failed may still write, until its store is closed."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from ckpt_engine.errors import P2PError
from ckpt_engine.transport.lease_messages import ALL
from ckpt_engine.transport.p2p import Piece


@dataclass(eq=False)
class FakeRead:
    network: FakeNetwork
    store: FakeStore
    peer: str
    pieces: Sequence[Piece]
    ended: bool = False

    def poll(self) -> bool:
        assert not self.ended, "a read must not be asked again after its end"
        if self.store.closed:
            raise P2PError("this store is closed")
        answer = self.network.outcome(self)
        if answer is None:
            return False
        self.ended = True
        if not answer:
            self.network.failed.append(self)
            raise P2PError(f"the read from {self.peer} failed")
        self.bring()
        return True

    def bring(self) -> None:
        """Writes the bytes, as a late one does too."""
        assert not self.store.closed, "written after its store was closed"
        for piece in self.pieces:
            self.store.check(piece)
            ctypes.memmove(piece.local, piece.remote, piece.nbytes)


@dataclass(eq=False)
class FakeStore:
    network: FakeNetwork
    address: str = "here:1"
    transport: str = "memory"
    closed: bool = False
    registered: dict[int, int] = field(default_factory=dict)

    def register(self, address: int, nbytes: int) -> None:
        assert not self.closed
        self.registered[address] = nbytes

    def unregister(self, address: int) -> None:
        self.registered.pop(address, None)

    def start_read(self, peer: str, pieces: Sequence[Piece]) -> FakeRead:
        assert not self.closed
        read = FakeRead(self.network, self, peer, pieces)
        self.network.started.append(read)
        return read

    def check(self, piece: Piece) -> None:
        """RDMA writes into registered memory only; TCP would not notice."""
        assert any(
            start <= piece.local and piece.local + piece.nbytes <= start + nbytes
            for start, nbytes in self.registered.items()
        ), "read into memory that is not registered"

    def close(self) -> None:
        self.closed = True


@dataclass(eq=False)
class FakeNetwork:
    """`outcome(read)`: True once it has succeeded, False once it has failed, None while it is under way."""

    outcome: Callable[[FakeRead], bool | None] = lambda read: True
    stores: list[FakeStore] = field(default_factory=list)
    started: list[FakeRead] = field(default_factory=list)
    failed: list[FakeRead] = field(default_factory=list)

    def make_store(self) -> FakeStore:
        assert all(store.closed for store in self.stores), "the store before is still at work"
        self.stores.append(FakeStore(self))
        return self.stores[-1]


class FakeLease:
    """`checks`: how many there were; `holds`: what `check` asks; `present`: how many host buffers come."""

    def __init__(self, holds: Callable[[], bool] = lambda: True) -> None:
        self.holds = holds
        self.checks = 0
        self.present = ALL
        self.released = threading.Event()

    def check(self) -> None:
        assert not self.released.is_set()
        self.checks += 1
        if not self.holds():
            raise P2PError("the owner has ended the lease")

    def release(self) -> None:
        self.released.set()
