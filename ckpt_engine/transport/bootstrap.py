"""Where ranks find each other.

On several hosts that is torch's store, of our own or of the caller's default group. On one host it is a Unix
socket in this user's directory for them: the store listens on TCP and asks nobody who they are, so it is made
only where torch's groups are to meet on it.
"""

from __future__ import annotations

import itertools
import socket
import time
from collections.abc import Callable
from datetime import timedelta
from functools import cached_property, partial
from pathlib import Path

import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from ckpt_engine.deadline import Deadline
from ckpt_engine.errors import ConfigError
from ckpt_engine.ipc.sockets import SocketDirectory, published_directory
from ckpt_engine.settings import Settings

CONTROL_SOCKET = "control"
LATE_SECONDS = 60.0
"""How long ranks may take to meet at a store that is made after the ranks met."""
LONGEST_PAUSE_SECONDS = 0.25
"""Between two looks whether rank 0 is there; the first ones follow each other sooner."""

_GENERATIONS = itertools.count()


class MeetingPoint:
    """What all ranks reach.

    Args:
        store: makes the store, when it is first used.
        address: where rank 0 may be reached for other things too.
        path: on one host: the Unix socket of rank 0's control server; None: the store tells where that is.
    """

    def __init__(self, store: Callable[[], Store], address: str, path: Path | None = None) -> None:
        self._make_store = store
        self.address = address
        self.path = path

    @cached_property
    def store(self) -> Store:
        return self._make_store()


def place_of(rank: int | None, world_size: int | None, settings: Settings) -> tuple[int, int]:
    """(rank, world size) from the arguments, else from RANK and WORLD_SIZE, else a lone rank.

    Raises:
        ConfigError: they do not fit together.
    """
    size = world_size if world_size is not None else settings.world_size
    place = rank if rank is not None else settings.rank
    if size is None and place is None:
        return 0, 1
    if size is None or size < 1:
        raise ConfigError(f"world_size={size}: give world_size (or WORLD_SIZE), at least 1")
    if place is None or not 0 <= place < size:
        raise ConfigError(f"rank={place}: give rank (or RANK), from 0 to {size - 1}")
    return place, size


def store_of_caller(rank: int, world_size: int, address: str | None) -> MeetingPoint:
    """A part of the store of torch's default group, which the caller owns.

    Raises:
        ConfigError: the caller's group has other ranks.
    """
    if (dist.get_rank(), dist.get_world_size()) != (rank, world_size):
        raise ConfigError(
            f"rank {rank} of {world_size} is rank {dist.get_rank()} of {dist.get_world_size()} in torch's "
            "default group: give both the same ranks"
        )
    # The store outlives a parameter server: the next one must not find the last one's keys.
    prefix = f"ckpt-engine/{next(_GENERATIONS)}"
    store = PrefixStore(prefix, dist.distributed_c10d._get_default_store())
    return MeetingPoint(lambda: store, address or host_ip(None))


def own_store(
    rank: int,
    world_size: int,
    address: str | None,
    port: int | None,
    settings: Settings,
    deadline: Deadline,
    directory: SocketDirectory | None = None,
) -> MeetingPoint:
    """A TCPStore of our own, served by rank 0 at `address` (MASTER_ADDR) and `port` (MASTER_PORT + 1).

    Args:
        directory: this rank's; with it the ranks of one host meet there, and the store is made when used.

    Raises:
        ConfigError: nothing says where rank 0 is, or it cannot be served or reached there.
    """
    if world_size == 1:
        # Nobody else must find it: any free port of the loopback will do.
        address, port = address or "127.0.0.1", port or 0
    else:
        address = address or settings.master_addr
        if port is None and settings.master_port is not None:
            port = settings.master_port + 1
    if address is None or port is None:
        raise ConfigError(
            f"world_size={world_size}, but nothing says where rank 0 is: give master_addr and "
            "master_port, or start the ranks with torchrun (MASTER_ADDR, MASTER_PORT)"
        )
    store = partial(_tcp_store, rank, world_size, address, port)
    # A launcher that starts all ranks of the world on this host says so.
    if directory is None or (world_size > 1 and settings.local_world_size != world_size):
        made = store(deadline)
        return MeetingPoint(lambda: made, address)

    def late() -> Store:
        # Not what is left of a deadline that may be past.
        return store(deadline if deadline.remaining > 1.0 else Deadline.after(LATE_SECONDS))

    if rank:
        return MeetingPoint(late, address, published_directory(directory.base, port) / CONTROL_SOCKET)
    if world_size > 1:
        directory.publish(port, deadline)
    return MeetingPoint(late, address, directory.path / CONTROL_SOCKET)


def _tcp_store(rank: int, world_size: int, address: str, port: int, deadline: Deadline) -> Store:
    timeout = timedelta(seconds=max(1.0, deadline.remaining))
    try:
        if rank:
            _wait_for_listener(address, port, deadline)
            return TCPStore(address, port, world_size, timeout=timeout, wait_for_workers=False)
        # Bound to the address that the others use, not to every interface of the host.
        family = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.create_server((address, port), family=family, backlog=1024)
        return TCPStore(
            address,
            listener.getsockname()[1],
            world_size,
            is_master=True,
            timeout=timeout,
            wait_for_workers=False,
            master_listen_fd=listener.detach(),
        )
    except (OSError, dist.DistError) as error:
        raise ConfigError(
            f"rank {rank} cannot {'serve' if rank == 0 else 'reach'} the control store at {address}:{port}: "
            f"{error}. It is MASTER_ADDR and MASTER_PORT + 1 unless master_addr and master_port are given"
        ) from error


def _wait_for_listener(address: str, port: int, deadline: Deadline) -> None:
    """Until something listens there. torch would wait too, but no signal ends its wait: a launcher that ends
    this rank would have to kill it. Raises OSError: nothing does at the deadline."""

    def listens() -> bool:
        try:
            socket.create_connection((address, port), timeout=max(0.001, deadline.remaining)).close()
        except OSError:
            if deadline.passed:
                raise
            return False
        return True

    wait_until(listens, deadline)


def wait_until(come: Callable[[], bool], deadline: Deadline) -> bool:
    """Asks `come` again and again, and lets signals be handled meanwhile; False at the deadline."""
    pause = 0.01
    while not come():
        if deadline.passed:
            return False
        time.sleep(min(pause, deadline.remaining))
        pause = min(LONGEST_PAUSE_SECONDS, 2 * pause)
    return True


def host_ip(towards: str | None) -> str:
    """The address of this host's interface that faces `towards`, of the same family (no packet is sent)."""
    try:
        family, _, _, _, address = socket.getaddrinfo(towards or "127.0.0.1", 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as sock:
            sock.connect(address)
            return str(sock.getsockname()[0])
    except OSError:
        return "127.0.0.1"
