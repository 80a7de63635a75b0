"""How ranks tell each other what they hold: who they are each time, layouts only where they have changed.

A share's layout is its host buffers: addresses, names, dtypes, shapes. A checkpoint of a large model has tens
of thousands of tensors, and in a training loop every step's has the layout of one before: then a digest of it
is all that travels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from pydantic import BaseModel, ConfigDict, ValidationError

from ckpt_engine.deadline import Deadline
from ckpt_engine.errors import ErrorRecord, ProtocolError
from ckpt_engine.metadata import Layout, Metas, RankMetas, layout_from_json, layout_to_json
from ckpt_engine.transport.control import Control, error_of

KEPT = 2
"""Of how many gathers, the latest, the layouts are kept: trainers fill one arena while another is sent."""

Meet = Callable[[str, Callable[[], bytes]], Mapping[int, bytes]]
"""Meets the others for a purpose (empty: the gather itself), and returns what each brought, by rank. What it
brings itself is made once it has come: if that fails, the others get to know."""


class _Card(BaseModel):
    """`held`: without its buffers, whose digest is `layout`. `known`: the gathers whose layouts are kept."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    held: RankMetas
    layout: str
    known: tuple[str, ...]


@dataclass(kw_only=True, frozen=True)
class Gathered:
    """`metas`: what each rank holds; `layouts`: the digest of each one's layout."""

    metas: Metas
    layouts: dict[int, str]


@dataclass(kw_only=True)
class Meetings:
    """Where the ranks meet in one gather. `without_lost`: without those that are gone, which are then `lost`,
    with why; `failed`: why this rank's share could not be registered."""

    control: Control
    purpose: str
    members: Sequence[int]
    deadline: Deadline
    without_lost: bool
    failed: ErrorRecord | None
    lost: dict[int, str] = field(default_factory=dict)

    def meet(self, what: str, payload: Callable[[], bytes]) -> Mapping[int, bytes]:
        """As of `Meet`. Raises UpdateError: a rank did not come, or could not register its share."""
        round_ = self.control.open_round(f"{self.purpose}: {what}" if what else self.purpose, self.members)
        try:
            if self.failed is not None:
                raise error_of(self.failed)
            return round_.exchange(payload(), self.deadline, without_lost=self.without_lost)
        except BaseException as error:
            round_.abort(ErrorRecord.from_exception(error, rank=self.control.rank, stage="gather"))
            raise
        finally:
            self.lost.update(round_.lost)
            round_.leave()


class Gathering:
    """One rank's gathers. `layouts_sent`: in how many of them layouts had to travel."""

    def __init__(self) -> None:
        self._kept: dict[str, dict[str, Layout]] = {}
        self._text, self._layout, self._epoch = b"", "", ""
        self.layouts_sent = 0

    def gather(self, mine: Callable[[], RankMetas], meet: Meet) -> Gathered:
        """What all ranks hold; `mine`: this one's.

        Raises:
            ProtocolError: another rank told something else than what it announced, or is of another version.
            Whatever `meet` raises.
        """
        cards = _cards(meet("", lambda: self._card_of(mine()).model_dump_json().encode()))
        name = _name_of(cards)
        if all(name in one.known for one in cards.values()):
            layouts = self._kept[name]
        else:
            self.layouts_sent += 1
            answers = meet("layouts", lambda: self._text)
            cards = {rank: cards[rank] for rank in answers}  # one that was there may be gone by now
            layouts = self._layouts_of(cards, answers)
            name = _name_of(cards)
        self._kept.pop(name, None)
        self._kept[name] = layouts  # the latest last
        while len(self._kept) > KEPT:
            del self._kept[next(iter(self._kept))]
        metas = {
            rank: one.held.model_copy(update={"buffers": layouts[one.layout]}) for rank, one in cards.items()
        }
        return Gathered(metas=metas, layouts={rank: one.layout for rank, one in cards.items()})

    def _card_of(self, mine: RankMetas) -> _Card:
        if not mine.epoch or mine.epoch != self._epoch:  # else it is the share of last time
            self._text = layout_to_json(mine.buffers)
            self._layout, self._epoch = _digest(self._text), mine.epoch
        held = mine.model_copy(update={"buffers": ()})
        return _Card(held=held, layout=self._layout, known=tuple(self._kept))

    def _layouts_of(self, cards: Mapping[int, _Card], answers: Mapping[int, bytes]) -> dict[str, Layout]:
        known = {digest: layout for kept in self._kept.values() for digest, layout in kept.items()}
        layouts: dict[str, Layout] = {}
        for rank, answer in answers.items():
            digest = cards[rank].layout
            if digest not in layouts:
                layouts[digest] = known[digest] if digest in known else _layout_of(rank, digest, answer)
        return layouts


def _name_of(cards: Mapping[int, _Card]) -> str:
    """Of the layouts of a gather, whoever has them."""
    return _digest(" ".join(sorted({one.layout for one in cards.values()})).encode())


def _cards(answers: Mapping[int, bytes]) -> dict[int, _Card]:
    cards = {}
    for rank, answer in answers.items():
        try:
            cards[rank] = _Card.model_validate_json(answer)
        except ValidationError as error:
            raise ProtocolError(f"rank {rank} is of another version of ckpt-engine: {error}") from None
        if cards[rank].held.rank != rank:
            raise ProtocolError(f"rank {rank} claims to be rank {cards[rank].held.rank}")
    return cards


def _layout_of(rank: int, digest: str, answer: bytes) -> Layout:
    if _digest(answer) != digest:
        raise ProtocolError(f"rank {rank} announced another layout than the one that it sent")
    try:
        return layout_from_json(answer)
    except ValidationError as error:
        raise ProtocolError(f"rank {rank} sent what is no layout: {error}") from None


def _digest(text: bytes) -> str:
    return hashlib.sha256(text).hexdigest()
