"""What an engine's worker holds, as the worker itself and its parameter server tell it.

    serving(version)  --begin-->  updating  --commit(version)-->  serving(version)
                                     |
                                     |--commit, the worker unheard-->  unknown(reason)
                                     |--fail, nothing loaded-->   as before
                                     `--fail, something loaded-->  incomplete(reason)

What is incomplete stays so until an update of everything commits.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal


@dataclass(frozen=True, slots=True)
class Weights:
    """`unknown`: nobody has asked yet, the worker is gone, or it did not say that it heard of a commit.
    `version`: of what is served; None: what the engine began with. `checkpoint`: its name. `reason`: why the
    weights are neither the old nor the new, or why nobody knows."""

    state: Literal["unknown", "serving", "updating", "incomplete"]
    version: str | None = None
    checkpoint: str | None = None
    reason: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


SERVING_INITIAL = Weights("serving")
"""What an engine began with."""


class WeightsState:
    """The machine; `now` can be read from any thread."""

    def __init__(self, initial: Weights) -> None:
        self.now = self._before = initial

    @property
    def complete(self) -> bool:
        """Whether what is there now is one whole version, as far as is known."""
        return self.now.state not in ("updating", "incomplete")

    def begin(self) -> None:
        broke_off = Weights("incomplete", reason="an update broke off without a word")
        self._before = broke_off if self.now.state == "updating" else self.now
        self.now = Weights("updating", self._before.version, self._before.checkpoint, self._before.reason)

    def commit(self, version: str, checkpoint: str | None = None) -> None:
        self.now = self._before = Weights("serving", version, checkpoint)

    def lose(self, reason: str) -> None:
        """The update was committed, but whether the worker knows of it is unknown."""
        self.now = self._before = Weights("unknown", reason=reason)

    def fail(self, reason: str, *, touched: bool) -> None:
        """The update ended without a commit. `touched`: some of its weights may have been loaded."""
        self.now = self._before = Weights("incomplete", reason=reason) if touched else self._before
