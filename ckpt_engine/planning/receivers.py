"""Which rank reads which bucket by P2P, and in which order.

A topology says which ranks are behind which RDMA device, `{device: ranks}`; ranks behind one device share its
bandwidth. So of the ranks that share one, only the lowest receives, and buckets are dealt in rounds
in which no owner's device is read twice: each read of a round can have a device on both sides to itself.

    from ckpt_engine.planning import assign_receiver_ranks

    assign_receiver_ranks(
        [(0, "a"), (0, "b"), (1, "c")],
        {"mlx5_0@new": {0, 1}, "mlx5_1@new": {2, 3}},
        {"mlx5_0@old": {0}, "mlx5_1@old": {1}},
    )
    # [(0, 0, 'a'), (2, 1, 'c'), (0, 0, 'b')]
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from itertools import zip_longest
from typing import TypeVar

from ckpt_engine.errors import PlanError

B = TypeVar("B")
Topology = Mapping[str, Collection[int]]
"""RDMA device -> ranks behind it. The order of the devices counts."""


def assign_receiver_ranks(
    buckets: Sequence[tuple[int, B]], local_topo: Topology, remote_topo: Topology
) -> list[tuple[int, int, B]]:
    """Gives each bucket a receiver.

    Args:
        buckets: (owner rank, bucket), in the owners' order.
        local_topo: the ranks that are updated, by their RDMA devices; a device without ranks does not count.
        remote_topo: the owners, by theirs.

    Returns:
        (receiver rank, owner rank, bucket), in the order of the reads. Buckets of one owner's device keep
        their order; devices take turns, in the order of their first buckets. The lowest ranks of the first
        devices of `local_topo` receive, as many as there are devices with buckets, in rounds: a round ends
        when each has a bucket, or before a bucket whose owner's device is in it already.

    Raises:
        PlanError: an owner behind no device, a rank behind two, or nobody to receive.
    """
    if not buckets:
        return []
    device_of = _device_of(remote_topo, "remote_topo")
    _device_of(local_topo, "local_topo")
    groups: dict[str, list[tuple[int, B]]] = {}
    for owner, bucket in buckets:
        if owner not in device_of:
            raise PlanError(
                f"rank {owner} owns a bucket, but is behind none of the devices of remote_topo "
                f"({', '.join(remote_topo) or 'it is empty'}): gather or load the metas of all owners"
            )
        groups.setdefault(device_of[owner], []).append((owner, bucket))
    receivers = [min(ranks) for ranks in local_topo.values() if ranks][: len(groups)]
    if not receivers:
        raise PlanError("local_topo names no rank: nobody can receive")
    assigned: list[tuple[int, int, B]] = []
    used: set[str] = set()
    for owner, bucket in (item for turn in zip_longest(*groups.values()) for item in turn if item):
        if len(used) == len(receivers) or device_of[owner] in used:
            used.clear()
        assigned.append((receivers[len(used)], owner, bucket))
        used.add(device_of[owner])
    return assigned


def _device_of(topo: Topology, name: str) -> dict[int, str]:
    """Rank -> its device."""
    found: dict[int, str] = {}
    for device, ranks in topo.items():
        for rank in ranks:
            other = found.setdefault(rank, device)
            if other != device:
                raise PlanError(f"{name}: rank {rank} is behind {other} and behind {device}")
    return found
