"""Who else holds a share's weights, or will soon: what joiners ask an owner before they choose whom to read.

Many joiners may come at once. Each is to know those who came before it, or all of them would read the owners:
so one that is to announce itself holds up the answer to the next one, for PATIENCE_SECONDS at most. An entry
lives as long as the connection of whoever made it.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from ckpt_engine.transport.lease_messages import MAX_GROUPS, Announce, Found, Seek

PATIENCE_SECONDS = 5.0

W = TypeVar("W", bound=Hashable)
"""Whatever stands for who asks, and can be a key."""


@dataclass(kw_only=True)
class _Entry(Generic[W]):
    who: W
    group: str
    metas: bytes


@dataclass(kw_only=True)
class _Book(Generic[W]):
    """Of one checkpoint, as long as anybody is known who has sought it. `coming`: who is to announce itself
    next, and until when it is waited for."""

    entries: list[_Entry[W]] = field(default_factory=list)
    waiting: deque[tuple[W, Seek]] = field(default_factory=deque)
    coming: tuple[W, float] | None = None


class Directory(Generic[W]):
    """`say` sends an answer; it may `forget` whom it cannot reach."""

    def __init__(self, say: Callable[[W, Found], object]) -> None:
        self._say = say
        self._books: dict[str, _Book[W]] = {}
        self._checkpoints: dict[W, str] = {}

    def seek(self, who: W, seek: Seek) -> None:
        """Answers, once those before it have announced themselves."""
        book = self._books.setdefault(seek.checkpoint, _Book())
        self._checkpoints[who] = seek.checkpoint
        if seek.waits:
            book.waiting.append((who, seek))
            self._go_on(book)
        else:
            self._say(who, Found(0, ()))

    def announce(self, who: W, announce: Announce) -> None:
        """Others are told of it from now on. Only who has sought may."""
        book = self._books[self._checkpoints[who]]
        book.entries = [entry for entry in book.entries if entry.who != who]
        book.entries.append(_Entry(who=who, group=announce.group, metas=announce.metas))
        self._came(book, who)

    def forget(self, who: W) -> None:
        """It is gone. Who is not known is ignored."""
        checkpoint = self._checkpoints.pop(who, None)
        if checkpoint is None:
            return
        book = self._books[checkpoint]
        book.entries = [entry for entry in book.entries if entry.who != who]
        book.waiting = deque(one for one in book.waiting if one[0] != who)
        self._came(book, who)
        if checkpoint not in self._checkpoints.values():  # others may still announce themselves, or go
            self._books.pop(checkpoint, None)

    def look_at_the_clock(self) -> None:
        """To be called every second or so."""
        now = time.monotonic()
        for book in list(self._books.values()):
            if book.coming is not None and now > book.coming[1]:
                self._came(book, book.coming[0])

    def _came(self, book: _Book[W], who: W) -> None:
        if book.coming is not None and book.coming[0] == who:
            book.coming = None
            self._go_on(book)

    def _go_on(self, book: _Book[W]) -> None:
        while book.waiting and book.coming is None:
            who, seek = book.waiting.popleft()
            if seek.announces:
                book.coming = (who, time.monotonic() + PATIENCE_SECONDS)
            groups: dict[str, list[bytes]] = {}
            for entry in book.entries:
                groups.setdefault(entry.group, []).append(entry.metas)
            newest = tuple(tuple(metas) for metas in groups.values())[-MAX_GROUPS:]
            self._say(who, Found(len(groups), newest))
