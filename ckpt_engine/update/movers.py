"""Which mover a rank uses: it follows from who the members of the update are, alike on every rank."""

from __future__ import annotations

from collections.abc import Callable

from ckpt_engine.ipc.reactor import Reactor
from ckpt_engine.transport.collectives import Collectives, make_group
from ckpt_engine.transport.shared_memory import HostLinks
from ckpt_engine.update.device_movers import DirectMover, GroupMover, Mover
from ckpt_engine.update.host_mover import HostMover, Hosts
from ckpt_engine.update.introduction import Meeting
from ckpt_engine.update.part import Part
from ckpt_engine.update.rank import Rank


def make_mover(me: Rank, meeting: Meeting, part: Part, links: HostLinks) -> Mover:
    """Connects this rank with the others, too. Collective: every member calls it.

    Raises:
        PeerLost, UpdateTimeout: not all members came.
    """
    if len(meeting.members) == 1:
        return DirectMover(part)
    if not meeting.in_host_memory:
        # nccl refuses two ranks on one device.
        kind = me.collectives("gloo" if meeting.devices_shared else me.device.collectives)
        group = _group(me, meeting, part, meeting.members, kind)
        assert group is not None
        return GroupMover(part, meeting.members, group)
    hosts = Hosts.of(meeting.hosts())
    leaders = _group(me, meeting, part, hosts.leaders, me.collectives("gloo"))
    mover = HostMover(part, hosts, links, leaders)
    local = hosts.local_ranks(me.rank)
    if len(local) > 1:
        links.connect(
            {rank: meeting.by_rank[rank].peer_path for rank in local if rank != me.rank},
            meeting.token,
            part.ring,
            mover.on_note,
            part.deadline,
            poll=_poll(part.reactor),
        )
    return mover


def _group(me: Rank, meeting: Meeting, part: Part, members: tuple[int, ...], kind: str) -> Collectives | None:
    """The members' group, kept from the last update if every member still has it."""
    if len(members) == 1 or me.rank not in members:
        me.drop_groups()
        return None
    names = {meeting.by_rank[member].group_name for member in members}
    # The slash ends the members: ranks 0 and 1 must not take the group of 0, 1 and 2 for theirs.
    like = f"{kind}-{'-'.join(map(str, members))}/"
    if len(names) > 1 or not me.group_name.startswith(like):
        me.drop_groups()
        name = like + meeting.name
        me.group = make_group(
            kind,
            me.control.store,
            name,
            members.index(me.rank),
            len(members),
            me.device.index,
            part.deadline,
            poll=_poll(part.reactor),
        )
        me.group_name = name
    return me.group


def _poll(reactor: Reactor) -> Callable[[], None]:
    return lambda: reactor.turn(0)
