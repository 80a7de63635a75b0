"""Where ranks find each other: torch's store, of our own or of the caller's default group."""

from __future__ import annotations

import itertools
import socket
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from ckpt_engine.deadline import Deadline
from ckpt_engine.errors import ConfigError
from ckpt_engine.settings import Settings

_GENERATIONS = itertools.count()


@dataclass(frozen=True, slots=True)
class MeetingPoint:
    """A store that all ranks reach; `address`: where rank 0 may be reached for other things too."""

    store: Store
    address: str


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
    return MeetingPoint(store, address or host_ip(None))


def own_store(
    rank: int, world_size: int, address: str | None, port: int | None, settings: Settings, deadline: Deadline
) -> MeetingPoint:
    """A TCPStore of our own, served by rank 0 at `address` (MASTER_ADDR) and `port` (MASTER_PORT + 1).

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
    timeout = timedelta(seconds=max(1.0, deadline.remaining))
    try:
        if rank:
            store = TCPStore(address, port, world_size, timeout=timeout, wait_for_workers=False)
            return MeetingPoint(store, address)
        # Bound to the address that the others use, not to every interface of the host.
        family = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.create_server((address, port), family=family, backlog=1024)
        store = TCPStore(
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
    return MeetingPoint(store, address)


def host_ip(towards: str | None) -> str:
    """The address of this host's interface that faces `towards`, of the same family (no packet is sent)."""
    try:
        family, _, _, _, address = socket.getaddrinfo(towards or "127.0.0.1", 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as sock:
            sock.connect(address)
            return str(sock.getsockname()[0])
    except OSError:
        return "127.0.0.1"
