"""Who else holds the weights of a fleet that is joined: asked of that fleet, and in which order it is read.

Joiners that keep what they read, and announce that, are sources from their first bucket on. Each new one
reads the one before it: a chain, in which every network device receives and sends each byte once, and the
owners send it once however many join (`planning/fanout.py`; no other trees are faster by its model).
"""

from __future__ import annotations

import logging
import random
from dataclasses import dataclass

from ckpt_engine.deadline import Deadline
from ckpt_engine.errors import CheckpointError, CheckpointFormatError, P2PError
from ckpt_engine.gathered import Senders
from ckpt_engine.metadata import Metas, RankMetas, metas_from_json, metas_to_json
from ckpt_engine.planning.fanout import OWNERS, chain
from ckpt_engine.planning.sources import check_fleets
from ckpt_engine.transport.lease_messages import Found
from ckpt_engine.transport.leases import Announcement, Share

logger = logging.getLogger(__name__)

SEEK_SECONDS = 60.0
"""How long a directory may take to answer: those who came before are to announce themselves first."""


@dataclass(kw_only=True, frozen=True)
class Others:
    """`fleets`: those that announced themselves, the newest last. `order`: numbers of all fleets, those that
    were loaded first, in which they are to be asked for admission."""

    fleets: tuple[Metas, ...] = ()
    order: tuple[int, ...]

    def to_json(self) -> tuple[str, ...]:
        return tuple(metas_to_json(fleet).decode() for fleet in self.fleets)


def directory_of(senders: Senders) -> RankMetas | None:
    """The rank that is asked, the same for all who loaded these metas; None: nobody can be."""
    for fleet in senders.fleets:
        for _, held in sorted(fleet.items()):
            if held.tensor_count and held.readable:
                return held
    return None


def seek(
    directory: RankMetas, deadline: Deadline, *, announces: bool, waits: bool = True
) -> tuple[Announcement, Found]:
    """As `Announcement.seek`."""
    patience = deadline.or_after(SEEK_SECONDS)
    return Announcement.seek(Share.of(directory), patience, announces=announces, waits=waits)


def others_of(found: Found | None, senders: Senders) -> Others:
    """Those among whom this update may choose. An announcement that makes no sense here is left out."""
    owners = list(range(len(senders.fleets)))
    random.shuffle(owners)
    if found is None:
        return Others(order=tuple(owners))
    fleets: list[Metas] = []
    numbers: dict[int, int] = {}  # of a group, among all that announced themselves -> of its fleet here
    for group, texts in enumerate(found.groups, found.place - len(found.groups)):
        fleet = _fleet_of(texts, senders)
        if fleet is not None:
            numbers[group] = len(owners) + len(fleets)
            fleets.append(fleet)
    source = chain(found.place + 1).sources[found.place]
    if source == OWNERS or source not in numbers:
        source = max(numbers, default=OWNERS)
    before = [] if source == OWNERS else [numbers.pop(source)]
    return Others(fleets=tuple(fleets), order=(*before, *sorted(numbers.values(), reverse=True), *owners))


def _fleet_of(texts: tuple[bytes, ...], senders: Senders) -> Metas | None:
    transports = {held.p2p_transport for fleet in senders.fleets for held in fleet.values()}
    try:
        fleet = {rank: held for text in texts for rank, held in metas_from_json(text).items()}
        check_fleets([*senders.fleets, fleet])
    except (CheckpointFormatError, CheckpointError) as error:
        logger.warning("who announced itself as a source is not read: %s", error)
        return None
    return fleet if {held.p2p_transport for held in fleet.values()} <= transports else None


def find(senders: Senders, deadline: Deadline, *, announces: bool) -> tuple[Announcement | None, Others]:
    """Asks the directory, if there is one; what was loaded is enough where it does not answer."""
    directory = directory_of(senders)
    if directory is None:
        return None, others_of(None, senders)
    try:
        announcement, found = seek(directory, deadline, announces=announces)
    except P2PError as error:
        logger.info("nobody tells who else holds %r: %s", directory.checkpoint, error)
        return None, others_of(None, senders)
    if not announces:
        announcement.release()
    return announcement if announces else None, others_of(found, senders)
