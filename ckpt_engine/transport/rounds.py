"""Which calls of ranks belong together, and how each of their rounds ends. No sockets: the control server's
thread feeds it what ranks say.

Ranks do not count their calls: one that makes a call alone, or leaves one out, would be out of step for
ever. A call joins the round in which the others wait for it. A call that was given up before all had come is
remembered for those who had not: they learn why, unless the one that gave up comes again and meets them.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

from ckpt_engine.errors import ErrorRecord, ProtocolError
from ckpt_engine.transport import control_messages as messages
from ckpt_engine.transport.control_messages import Verdict

COME_AGAIN_SECONDS = 2.0
"""How long a call waits for ranks that gave it up before, and may be about to make it again."""
REMEMBERED = 64
"""How many calls that were given up are remembered: the latest."""

Members = tuple[int, ...]
"""That of all ranks is one object: of thousands, every comparison would take thousands of steps."""


@dataclass(eq=False)
class _GivenUp:
    """A call that ended before all of its members had come. `by`: who made it; `told`: who knows. `members`
    is None when the rank that made it could not know them."""

    record: ErrorRecord
    purposes: set[str]
    members: Members | None
    by: set[int]
    told: set[int]

    def is_call(self, members: Members, purpose: str) -> bool:
        if purpose not in self.purposes:
            return False
        return _alike(self.members, members) if self.members is not None else self.by <= set(members)


@dataclass(eq=False)
class _Round:
    number: int
    members: Members
    purpose: str
    without_lost: bool = False
    decides: bool = False
    brought: dict[int, bytes] = field(default_factory=dict)
    entered: set[int] = field(default_factory=set)
    met: bool = False
    votes: set[int] = field(default_factory=set)
    left: set[int] = field(default_factory=set)
    verdict: Verdict | None = None
    given_up: _GivenUp | None = None
    given_up_at: float = 0.0


class Rounds:
    """The rounds of all ranks. `tell` sends a frame to ranks; `lost`: ranks that are gone, and why.

    What a rank says takes the same number of steps whatever the number of ranks, unless some are lost.
    """

    def __init__(self, tell: Callable[[Iterable[int], messages.ServerFrame], None], world_size: int) -> None:
        self.lost: dict[int, str] = {}
        self._tell = tell
        self._everyone: Members = tuple(range(world_size))
        self._rounds: dict[int, _Round] = {}
        self._gathering: list[_Round] = []
        self._calls: dict[tuple[int, int], _Round] = {}
        self._given_up: deque[_GivenUp] = deque(maxlen=REMEMBERED)
        self._number = 0

    def waiting(self) -> set[int]:
        """Ranks that have yet to learn, or to say that they learnt, how a round ended. For any thread."""
        return {
            rank
            for round_ in list(self._rounds.values())
            for rank in tuple(round_.entered)
            if rank not in round_.left and rank not in self.lost
        }

    # What ranks say

    def hear(self, rank: int, message: messages.RoundFrame) -> None:
        """Raises ProtocolError: the rank may not say that."""
        if isinstance(message, messages.Enter):
            self.enter(rank, message)
        elif isinstance(message, messages.Vote):
            self.vote(rank, message)
        elif isinstance(message, messages.Abandon):
            self.abandon(rank, message)
        elif isinstance(message, messages.Left):
            self.leave(rank, message)
        else:
            self.mistake(rank, message)

    def enter(self, rank: int, message: messages.Enter) -> None:
        round_ = self._join(rank, message)
        if round_.verdict is not None:
            return
        round_.without_lost, round_.decides = message.without_lost, message.decides
        round_.brought[rank] = message.payload
        self._consider(round_)

    def vote(self, rank: int, message: messages.Vote) -> None:
        round_ = self._calls.get((rank, message.call))
        if round_ is None or not round_.met:
            raise ProtocolError(f"rank {rank} votes in a round that has not met")
        if round_.verdict is None:
            round_.votes.add(rank)
            if len(round_.votes) == len(round_.members):
                self._decide(round_, Verdict(version=message.version))

    def abandon(self, rank: int, message: messages.Abandon) -> None:
        round_ = self._calls.get((rank, message.call)) or self._join(rank, message)
        if round_.verdict is None:
            self._give_up(round_, self._with_missing(round_, message.record))

    def mistake(self, rank: int, message: messages.Mistake) -> None:
        """The call had no members that make sense: whoever waits for this rank in such a call is told."""
        known = _GivenUp(message.record, {message.purpose}, None, by={rank}, told={rank})
        for round_ in list(self._gathering):
            if rank not in round_.entered and known.is_call(round_.members, round_.purpose):
                self._tell_given_up(round_, known)
        self._given_up.append(known)

    def leave(self, rank: int, message: messages.Left) -> None:
        round_ = self._calls.pop((rank, message.call), None)
        if round_ is None:
            return
        round_.left.add(rank)
        if round_.verdict is None and rank not in round_.votes and (round_.decides or not round_.met):
            self._give_up(round_, _lost(rank, f"left {round_.purpose} without a word"))
        self._forget_if_over(round_)

    def lose(self, rank: int, reason: str) -> None:
        """The rank is gone: rounds that cannot do without it are decided against."""
        self.lost[rank] = reason
        for key in [key for key in self._calls if key[0] == rank]:
            del self._calls[key]
        for round_ in list(self._rounds.values()):
            if rank in round_.members:
                self._consider(round_)
                self._forget_if_over(round_)

    def look_at_the_clock(self) -> None:
        """Ends the wait for ranks that gave a call up and did not come again."""
        now = time.monotonic()
        for round_ in list(self._gathering):
            if round_.given_up is not None and now - round_.given_up_at >= COME_AGAIN_SECONDS:
                self._tell_given_up(round_, round_.given_up)

    # Which round a call belongs to

    def _join(self, rank: int, message: messages.Enter | messages.Abandon) -> _Round:
        """The round that the call belongs to; it may be decided already."""
        members = self._everyone if message.members is None else message.members
        purpose = message.purpose
        if not self._is_member(rank, members) or (rank, message.call) in self._calls:
            raise ProtocolError(f"rank {rank} is no member of its call {message.call}, or makes it twice")
        self._comes_again(rank, members, purpose)
        known = self._news(rank, members, purpose)
        others = self._gathering_of(members)
        waits = isinstance(message, messages.Enter)
        if others is not None and (others.purpose == purpose or (waits and known is None)):
            round_ = others
        else:
            self._number += 1
            round_ = self._rounds[self._number] = _Round(self._number, members, purpose)
        round_.entered.add(rank)
        self._calls[rank, message.call] = round_
        self._tell([rank], messages.Entered(message.call, round_.number))
        if round_.purpose != purpose:
            problem = f"rank {rank} does {purpose}, another rank {round_.purpose}"
            record = _record("ProtocolError", f"ranks are not doing the same: {problem}")
            self._give_up(round_, record, purpose)
        elif round_ is not others and known is not None and not (waits and others is None):
            # Late: the others are at something else by now; or this rank does not wait for them.
            self._tell_given_up(round_, known)
        elif round_ is not others and waits:
            self._gathering.append(round_)
            round_.given_up, round_.given_up_at = known, time.monotonic()
        return round_

    def _is_member(self, rank: int, members: Members) -> bool:
        return members is self._everyone or rank in members

    def _gathering_of(self, members: Members) -> _Round | None:
        return next((round_ for round_ in self._gathering if _alike(round_.members, members)), None)

    def _news(self, rank: int, members: Members, purpose: str) -> _GivenUp | None:
        """What others gave up that this rank does not know of, if it is this call."""
        alike = (known for known in self._given_up if known.is_call(members, purpose))
        return next((known for known in alike if rank not in known.told), None)

    def _comes_again(self, rank: int, members: Members, purpose: str) -> None:
        """What this rank gave up before is no news any more: it meets the others now, or is elsewhere."""
        for known in [one for one in self._given_up if rank in one.by and one.is_call(members, purpose)]:
            self._given_up.remove(known)
            for round_ in self._gathering:
                if round_.given_up is known:
                    round_.given_up = None
        others = self._gathering_of(members)
        if others is not None and others.given_up is not None and rank in others.given_up.by:
            self._tell_given_up(others, others.given_up)

    # How a round ends

    def _with_missing(self, round_: _Round, record: ErrorRecord) -> ErrorRecord:
        """Only here it is known for whom a rank waited in vain, and what became of them."""
        if record.error_type != "UpdateTimeout":
            return record
        if round_.met:
            behind = sorted(set(round_.members) - round_.votes - {record.rank})
            if round_.votes and behind:
                return replace(record, message=f"{record.message}: ranks {behind} had not")
            return record
        missing = set(round_.members) - round_.brought.keys()
        if not missing:
            return record
        what = f"{record.message}: ranks {sorted(missing)} did not arrive"
        for known in self._given_up:
            if known.by & missing and known.members in (None, round_.members):
                what += f" (rank {min(known.by & missing)} had given up {', '.join(sorted(known.purposes))}: "
                what += f"{known.record.message})"
                break
        return replace(record, message=what)

    def _consider(self, round_: _Round) -> None:
        """Lets the members meet if all that can come have come, or gives up if one that must is lost."""
        if round_.verdict is not None:
            return
        lost = {rank for rank in self.lost if self._is_member(rank, round_.members)} - round_.left
        if lost and not round_.without_lost:
            rank = min(lost)
            what = "left" if "closed its parameter server" in self.lost[rank] else "died or stopped"
            self._decide(round_, Verdict(record=_lost(rank, f"{what}: {self.lost[rank]}")))
        elif not round_.met and len(round_.brought) + len(lost - round_.brought.keys()) == len(
            round_.members
        ):
            round_.met = True
            self._gathering.remove(round_)
            payloads = [round_.brought.get(rank) for rank in round_.members]
            reasons = {rank: self.lost[rank] for rank in sorted(lost)}
            round_.brought.clear()
            self._tell(self._present(round_), messages.Met.of(round_.number, payloads, reasons))

    def _give_up(self, round_: _Round, record: ErrorRecord, *purposes: str) -> None:
        """Decides against, and remembers it for members that have not come."""
        if not round_.met and set(round_.members) - round_.entered - self.lost.keys():
            known = {round_.purpose, *purposes}
            here = round_.entered
            self._given_up.append(_GivenUp(record, known, round_.members, by=set(here), told=set(here)))
        self._decide(round_, Verdict(record=record))

    def _tell_given_up(self, round_: _Round, known: _GivenUp) -> None:
        """Decides against, for what is remembered already."""
        known.told |= round_.entered
        self._decide(round_, Verdict(record=known.record))

    def _decide(self, round_: _Round, verdict: Verdict) -> None:
        round_.verdict = verdict = replace(verdict, met=round_.met)
        round_.brought.clear()
        if round_ in self._gathering:
            self._gathering.remove(round_)
        self._tell(self._present(round_), messages.Decided(round_.number, verdict))

    def _present(self, round_: _Round) -> list[int]:
        return sorted(round_.entered - round_.left - self.lost.keys())

    def _forget_if_over(self, round_: _Round) -> None:
        lost = round_.entered.intersection(self.lost) - round_.left if self.lost else ()
        if len(round_.left) + len(lost) == len(round_.entered) and (round_.met or round_.verdict is not None):
            self._rounds.pop(round_.number, None)


def _alike(some: Members, others: Members) -> bool:
    return some is others or some == others


def _record(error_type: str, message: str) -> ErrorRecord:
    return ErrorRecord(error_type=error_type, message=message)


def _lost(rank: int, what: str) -> ErrorRecord:
    return ErrorRecord(error_type="PeerLost", message=f"rank {rank} {what}", rank=rank)
