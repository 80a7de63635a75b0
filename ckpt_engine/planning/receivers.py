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

import math
from collections.abc import Collection, Mapping, Sequence
from fractions import Fraction
from itertools import accumulate, zip_longest
from typing import Protocol, TypeVar

from ckpt_engine.errors import PlanError

B = TypeVar("B")


class HasSize(Protocol):
    """`nbytes`: what is to be read."""

    @property
    def nbytes(self) -> int: ...


S = TypeVar("S", bound=HasSize)
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
    groups, device_of = _groups_of(buckets, local_topo, remote_topo)
    receivers = [min(ranks) for ranks in local_topo.values() if ranks][: len(groups)]
    assigned: list[tuple[int, int, B]] = []
    used: set[str] = set()
    for owner, bucket in (item for turn in zip_longest(*groups.values()) for item in turn if item):
        if len(used) == len(receivers) or device_of[owner] in used:
            used.clear()
        assigned.append((receivers[len(used)], owner, bucket))
        used.add(device_of[owner])
    return assigned


def balance_receiver_ranks(
    buckets: Sequence[tuple[int, S]], local_topo: Topology, remote_topo: Topology
) -> list[tuple[int, int, S]]:
    """The same by what devices can carry: arguments, result and errors as of `assign_receiver_ranks`.

    A device whose name is several joined by commas counts as many. The owners' devices come to their ends
    together, however unequal their shares are. There are as many receivers as can take what those can give,
    and each gets bytes by its devices' number. Where both sides are alike this is the assignment in rounds.
    """
    groups, _ = _groups_of(buckets, local_topo, remote_topo)
    # Where each bucket's middle lies in its device's share: exact, so that ties are ties.
    places: list[tuple[Fraction, int, tuple[int, S]]] = []
    for number, group in enumerate(groups.values()):
        ends = list(accumulate(bucket.nbytes for _, bucket in group))
        for end, item in zip(ends, group, strict=True):
            middle = Fraction(2 * end - item[1].nbytes, 2 * ends[-1]) if ends[-1] else Fraction(0)
            places.append((middle, number, item))
    widths = _widths(groups, local_topo)
    # A receiver's seconds for a byte, in a unit in which they are whole numbers.
    unit = math.lcm(*widths.values())
    costs = {rank: unit // width for rank, width in widths.items()}
    loads = dict.fromkeys(costs, 0)
    assigned: list[tuple[int, int, S]] = []
    for _, _, (owner, bucket) in sorted(places, key=lambda place: place[:2]):
        receiver = min(loads, key=lambda rank: loads[rank] + bucket.nbytes * costs[rank])
        loads[receiver] += bucket.nbytes * costs[receiver]
        assigned.append((receiver, owner, bucket))
    return assigned


def _widths(groups: Collection[str], local_topo: Topology) -> dict[int, int]:
    """Receivers, and how many RDMA devices each has: as many as there are owners' devices, and more, as long
    as those can give more than the receivers can take."""
    given = sum(map(nic_count, groups))
    widths: dict[int, int] = {}
    for device, ranks in local_topo.items():
        if ranks and (len(widths) < len(groups) or sum(widths.values()) < given):
            widths[min(ranks)] = nic_count(device)
    return widths


def nic_count(device: str) -> int:
    """How many RDMA devices a topology's key such as "mlx5_0,mlx5_1@host" stands for."""
    return device.partition("@")[0].count(",") + 1


def _groups_of(
    buckets: Sequence[tuple[int, B]], local_topo: Topology, remote_topo: Topology
) -> tuple[dict[str, list[tuple[int, B]]], dict[int, str]]:
    """The buckets by their owners' devices, and each owner's device; checks both topologies."""
    if not buckets:
        return {}, {}
    device_of = _device_of(remote_topo, "remote_topo")
    _device_of(local_topo, "local_topo")
    if not any(local_topo.values()):
        raise PlanError("local_topo names no rank: nobody can receive")
    groups: dict[str, list[tuple[int, B]]] = {}
    for owner, bucket in buckets:
        if owner not in device_of:
            raise PlanError(
                f"rank {owner} owns a bucket, but is behind none of the devices of remote_topo "
                f"({', '.join(remote_topo) or 'it is empty'}): gather or load the metas of all owners"
            )
        groups.setdefault(device_of[owner], []).append((owner, bucket))
    return groups, device_of


def _device_of(topo: Topology, name: str) -> dict[int, str]:
    """Rank -> its device."""
    found: dict[int, str] = {}
    for device, ranks in topo.items():
        for rank in ranks:
            other = found.setdefault(rank, device)
            if other != device:
                raise PlanError(f"{name}: rank {rank} is behind {other} and behind {device}")
    return found
