"""Actors that take turns in an order drawn from a seed: one runs at a time, until it pauses.

A *walk* is a function in a thread of its own, which pauses wherever others may come in between. A *daemon*
has small steps and no end. When nobody can go on, and a walk has not ended, that is a deadlock.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from typing import Protocol

WEIGHTS = (0.02, 0.3, 1.0, 4.0)
"""How often an actor is drawn, against others: some run far ahead, some hardly at all."""
TURNS_BETWEEN_MOODS = 60
LIMIT_SECONDS = 60.0
"""For one turn: an actor computes, and waits for nothing but its next turn."""


class Deadlock(AssertionError):
    """Nobody can go on."""


class _Over(BaseException):
    """Ends a walk whose schedule has ended."""


class Daemon(Protocol):
    def ready(self) -> bool: ...

    def step(self) -> None: ...


class Walk:
    """`pause` is for its own thread, the rest for the schedule's."""

    def __init__(self, name: str, run: Callable[[], object]) -> None:
        self.name = name
        self.waiting_for = "its first turn"
        self.ended = False
        self._run = run
        self._error: BaseException | None = None
        self._ready: Callable[[], bool] = lambda: True
        # Released by the other side: whose turn it is.
        self._mine, self._theirs = threading.Lock(), threading.Lock()
        self._mine.acquire()
        self._theirs.acquire()
        self._over = False
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def pause(self, waiting_for: str, ready: Callable[[], bool] = lambda: True) -> None:
        """Lets others go on; comes back at some time when `ready()`."""
        self.waiting_for, self._ready = waiting_for, ready
        self._theirs.release()
        self._mine.acquire()
        if self._over:
            raise _Over

    def _work(self) -> None:
        self._mine.acquire()
        try:
            if not self._over:
                self._run()
        except _Over:
            pass
        except BaseException as error:  # noqa: BLE001 - raised again by the schedule
            self._error = error
        self.ended = True
        self._theirs.release()

    def ready(self) -> bool:
        return not self.ended and self._ready()

    def step(self) -> None:
        self._mine.release()
        if not self._theirs.acquire(timeout=LIMIT_SECONDS):
            raise AssertionError(f"{self.name} has not come back from {self.waiting_for}")
        if self._error is not None:
            raise self._error

    def end(self) -> None:
        self._over = True
        self._mine.release()
        self._thread.join(LIMIT_SECONDS)


class Schedule:
    """Whose turn it is."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.walks: list[Walk] = []
        self.daemons: list[Daemon] = []

    def run(self) -> None:
        """Until every walk has ended and no daemon has anything to do. Raises what a walk raised."""
        actors: list[Walk | Daemon] = [*self.walks, *self.daemons]
        weights: dict[int, float] = {}
        turns = 0
        try:
            while able := [actor for actor in actors if actor.ready()]:
                if turns % TURNS_BETWEEN_MOODS == 0:
                    weights = {id(actor): self.random.choice(WEIGHTS) for actor in actors}
                turns += 1
                actor = self.random.choices(able, [weights[id(actor)] for actor in able])[0]
                actor.step()
            waiting = [f"{walk.name} waits for {walk.waiting_for}" for walk in self.walks if not walk.ended]
            if waiting:
                raise Deadlock("; ".join(waiting))
        finally:
            for walk in self.walks:
                walk.end()
