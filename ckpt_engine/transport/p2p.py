"""Reads from the host memory of other processes, without their doing. Behind the store stands mooncake.

    store = make_p2p_store(settings, "10.0.0.2", "cuda", ["mlx5_0"])
    store.register(address, nbytes)             # local memory: to read into, and to be read
    read = store.start_read("10.0.0.1:15403", [Piece(local=..., remote=..., nbytes=...)])
    while not read.poll(): ...                       # raises P2PError
    store.close()

A read that has failed, or was given up, may still write into its destination: that memory belongs to the
store until it is closed. Then a new store is made. So a store that serves is not the one that reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from ckpt_engine.settings import Settings


@dataclass(kw_only=True, frozen=True, slots=True)
class Piece:
    """`nbytes` bytes from address `remote` in the peer to address `local` here."""

    local: int
    remote: int
    nbytes: int


class Read(Protocol):
    """One that was started."""

    def poll(self) -> bool:
        """True once all bytes are there, and from then on. Once it has failed it raises every time.

        Raises:
            P2PError: the peer is gone, refuses, or took too long.
        """
        ...


class P2PStore(Protocol):
    """`address`: under which peers read from here; `transport`: what carries the bytes, such as `tcp`."""

    address: str
    transport: str

    def register(self, address: int, nbytes: int) -> None:
        """Memory of this process takes part, until it is unregistered. Raises P2PError: it cannot."""
        ...

    def unregister(self, address: int) -> None:
        """The range that was registered at `address`. Unknown ones are ignored."""
        ...

    def start_read(self, peer: str, pieces: Sequence[Piece]) -> Read:
        """Raises P2PError: it cannot even begin."""
        ...

    def close(self) -> None:
        """Ends all reads, also those by others; no byte is written any more. Idempotent."""
        ...


def make_p2p_store(
    settings: Settings, host_ip: str, device_type: str, rdma_devices: Sequence[str]
) -> P2PStore:
    """A store on this host.

    Args:
        host_ip: the address that others reach.
        device_type: `cuda`, `npu` or `cpu`.
        rdma_devices: the network devices to use; none: TCP.

    Raises:
        P2PUnavailable: mooncake is not installed, cannot start here, or takes another transport.
    """
    from ckpt_engine.transport.mooncake_store import start_mooncake

    return start_mooncake(settings, host_ip, device_type, rdma_devices)
