"""The owner's end of P2P: what others may read of this rank's host memory, and the leases that keep it.

A store of its own, apart from that of the reads: one that a failed read made this rank close would take
this rank's address with it, which others know. Memory is registered once, when the first checkpoint in it is
offered, and for as long as it is there: refilling the shared memory pool registers nothing.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable

from ckpt_engine.checkpoint import HostCheckpoint
from ckpt_engine.deadline import Deadline
from ckpt_engine.errors import CheckpointError, P2PError
from ckpt_engine.metadata import layout_digest
from ckpt_engine.transport.lease_messages import ALL
from ckpt_engine.transport.lease_server import LeaseServer
from ckpt_engine.transport.p2p import P2PStore

logger = logging.getLogger(__name__)


class Serving:
    """Begins with the first `offer`.

    Args:
        make_store: raises P2PUnavailable.
        host_ip, port: where leases are served; port 0: any free one.
        max_readers: updates that may read a checkpoint of this rank at the same time.
    """

    def __init__(
        self, make_store: Callable[[], P2PStore], host_ip: str, max_readers: int, port: int = 0
    ) -> None:
        self.session = secrets.token_hex(16)
        self._make_store = make_store
        self._host_ip = host_ip
        self._port = port
        self._max_readers = max_readers
        self._store: P2PStore | None = None
        self._leases: LeaseServer | None = None
        self._registered: set[tuple[int, int]] = set()

    def start(self) -> tuple[str, str, str]:
        """(P2P address, transport, address of the leases).

        Raises:
            P2PUnavailable, ConfigError: others cannot read from this rank.
        """
        if self._store is None:
            self._store = self._make_store()
        if self._leases is None:
            self._leases = LeaseServer(self._host_ip, self._port, self.session, max_readers=self._max_readers)
        return self._store.address, self._store.transport, self._leases.address

    def promise(self, checkpoint: HostCheckpoint) -> None:
        """Others may take leases on it from now on, though nothing of it is there yet: see `came`."""
        self._publish(checkpoint, 0)

    def came(self, checkpoint_name: str, buffer_count: int) -> None:
        """So many host buffers of one that was promised are there, the first ones, in registered memory."""
        assert self._leases is not None
        self._leases.came(checkpoint_name, buffer_count)

    def offer(self, checkpoint: HostCheckpoint) -> None:
        """Others may read it from now on. Raises P2PError: its memory cannot be registered."""
        self.register(checkpoint)
        self._publish(checkpoint, ALL)

    def _publish(self, checkpoint: HostCheckpoint, present: int) -> None:
        assert self._leases is not None
        self._leases.publish(
            checkpoint.name, checkpoint.epoch, lambda: layout_digest(checkpoint.buffers), present
        )

    def register(self, checkpoint: HostCheckpoint) -> None:
        """Its memory takes part, as long as it is there. Raises P2PError: it cannot."""
        assert self._store is not None
        if self._store.transport != "tcp":
            # Drivers register no pages for peers that this process may not write itself.
            try:
                for file in checkpoint.files:
                    file.allow_writes()
            except CheckpointError as error:
                raise P2PError(f"{checkpoint.name!r} cannot be read by P2P: {error}") from error
        for memory in checkpoint.memories:
            place = (memory.address, memory.nbytes)
            if memory.nbytes and place not in self._registered:
                self._store.register(*place)
                self._registered.add(place)
                memory.before_close(lambda place=place: self._unregister(place))  # type: ignore[misc]

    def withdraw(self, checkpoint_name: str, deadline: Deadline, *, force: bool = False) -> None:
        """No more reads of it: waits until nobody reads.

        Args:
            force: at the deadline, readers lose it: their updates fail.

        Raises:
            CheckpointError: somebody still reads it at the deadline.
        """
        if self._leases is None:
            return
        readers = self._leases.withdraw(checkpoint_name, deadline)
        if not readers:
            return
        if not force:
            raise CheckpointError(
                f"{checkpoint_name!r} is still being read by P2P, by {', '.join(readers)}: its memory stays. "
                "Unregister it again later, or with force=True, which ends these updates"
            )
        logger.warning("%r is freed while it is read by %s: their updates fail", checkpoint_name, readers)
        self._leases.end_leases(checkpoint_name)
        self._replace_store()

    def _replace_store(self) -> None:
        """Only a store that is closed surely reads no more of what is freed next. Others' metas are void
        then."""
        store, self._store = self._store, None
        if store is not None:
            store.close()
            self._registered.clear()

    def _unregister(self, place: tuple[int, int]) -> None:
        if place in self._registered and self._store is not None:
            self._registered.discard(place)
            self._store.unregister(place[0])

    def close(self) -> None:
        """Nobody reads any more. Idempotent."""
        leases, self._leases = self._leases, None
        if leases is not None:
            leases.close()
        self._replace_store()
