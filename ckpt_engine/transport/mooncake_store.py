"""mooncake's TransferEngine as a `P2PStore`.

Which transport mooncake takes does not follow from the protocol that it is given, but from its environment:
with an RDMA device it takes RDMA unless MC_FORCE_TCP is set, without one TCP.
"""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

from ckpt_engine.errors import P2PError, P2PUnavailable
from ckpt_engine.settings import Settings
from ckpt_engine.transport.p2p import Piece

logger = logging.getLogger(__name__)

PIECE_NBYTES = 64 * 1024 * 1024
"""Largest of one transfer."""
START_TRIES = 8
"""mooncake looks for free ports, and may find two of them taken by others meanwhile."""


class MooncakeStore:
    def __init__(
        self, settings: Settings, host_ip: str, device_type: str, rdma_devices: Sequence[str]
    ) -> None:
        try:
            from mooncake.engine import TransferEngine  # type: ignore[import-untyped]
        except ImportError as error:
            raise P2PUnavailable(
                f"P2P needs mooncake-transfer-engine and libibverbs ({error}): pip install "
                "'ckpt-engine[p2p]', and install libibverbs1 with the system's packages"
            ) from error
        self.transport = "rdma" if rdma_devices else "tcp"
        os.environ["MC_FORCE_TCP" if not rdma_devices else "MC_FORCE_HCA"] = "1"
        os.environ.setdefault("MC_LOG_LEVEL", "ERROR")
        os.environ.setdefault("MC_TRANSFER_TIMEOUT", "30")
        # Shorter than that: mooncake then closes the connection, and writes no more, before it gives up.
        os.environ.setdefault("MC_TCP_STATUS_TIMEOUT_SEC", "20")
        self._engine: Any = None
        said = ""
        for _ in range(START_TRIES):
            with _stderr() as lines:
                engine = TransferEngine()
                failed = engine.initialize(host_ip, "P2PHANDSHAKE", self.transport, ",".join(rdma_devices))
            said = "".join(lines)
            logger.debug("mooncake starts at %s: %s", host_ip, said)
            if not failed:
                self._engine = engine
                break
        if self._engine is None:
            raise P2PUnavailable(f"mooncake cannot start at {host_ip} ({self.transport}): {said}")
        self.address = f"{host_ip}:{self._engine.get_rpc_port()}"

    def register(self, address: int, nbytes: int) -> None:
        code = self._engine.batch_register_memory([address], [nbytes])
        if code:
            raise P2PError(f"mooncake cannot register {nbytes} bytes of memory (code {code})")

    def unregister(self, address: int) -> None:
        self._engine.batch_unregister_memory([address])

    def start_read(self, peer: str, pieces: Sequence[Piece]) -> MooncakeRead:
        ids = []
        for piece in pieces:
            for start in range(0, piece.nbytes, PIECE_NBYTES):
                nbytes = min(PIECE_NBYTES, piece.nbytes - start)
                number = self._engine.batch_transfer_async_read(
                    peer, [piece.local + start], [piece.remote + start], [nbytes]
                )
                if number == 0:
                    raise P2PError(f"mooncake cannot read from {peer}: it is gone, or cannot be reached")
                ids.append(number)
        return MooncakeRead(self, peer, ids)

    def status(self, number: int) -> int:
        """1: done; 0: under way; below: failed. To be asked no more after that."""
        if self._engine is None:
            raise P2PError("this store is closed")
        return int(self._engine.transfer_check_status(number))

    def close(self) -> None:
        # Nobody else keeps the engine: it ends its threads and connections when it goes.
        self._engine = None


class MooncakeRead:
    def __init__(self, store: MooncakeStore, peer: str, numbers: list[int]) -> None:
        self._store = store
        self._peer = peer
        self._numbers = numbers

    def poll(self) -> bool:
        while self._numbers:
            status = self._store.status(self._numbers[-1])
            if status == 0:
                return False
            self._numbers.pop()
            if status != 1:
                raise P2PError(f"mooncake's read from {self._peer} failed (status {status})")
        return True


@contextlib.contextmanager
def _stderr() -> Iterator[list[str]]:
    """What is written to this process's stderr meanwhile: mooncake logs there, also when all is well."""
    lines: list[str] = []
    kept = os.dup(2)
    try:
        with tempfile.TemporaryFile() as file:
            os.dup2(file.fileno(), 2)
            try:
                yield lines
            finally:
                os.dup2(kept, 2)
            file.seek(0)
            lines.append(file.read().decode(errors="replace"))
    finally:
        os.close(kept)
