"""Putting back what was there before, after an update that failed (`on_failure="restore"`).

The ranks meet once more and tell how the update left their workers. Where one of them may have loaded
something, all that can still be asked get the version that was committed last, by an update like any other.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

import msgspec

from ckpt_engine.deadline import Deadline
from ckpt_engine.errors import (
    CheckpointError,
    CkptEngineError,
    ErrorRecord,
    ProtocolError,
    PublishError,
    RestoreError,
    UpdateError,
)
from ckpt_engine.gathered import Senders
from ckpt_engine.settings import Verify
from ckpt_engine.transport.control import Control
from ckpt_engine.update.introduction import Before
from ckpt_engine.update.session import UpdateSession

logger = logging.getLogger(__name__)


@dataclass(kw_only=True, frozen=True, slots=True)
class Committed:
    """What this rank's worker got last. `digest`: of where its bytes came from; `nbytes`: what this rank
    held of it."""

    checkpoint: str
    version: str
    digest: str
    nbytes: int


class _After(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How a failed update left one rank. `asked`: its worker will be updated again; `checkpoint`, `version`:
    what it had before."""

    touched: bool
    asked: bool
    checkpoint: str
    version: str


def purpose_of_restore(checkpoint_name: str) -> str:
    return f"restore after update({checkpoint_name!r})"


@dataclass(kw_only=True)
class Restorable:
    """What one rank could put back, looked at before a byte moves.

    `committed`: what its worker has; None: nothing yet, or it has no worker in this update. `receives`:
    whether it has one. `known`: the names that were gathered. `prepare`: where the bytes of one come from, or
    raises. `needed`: which ranks must take part in an update with one.
    """

    committed: Committed | None
    receives: bool
    members: Sequence[int]
    verify: Verify
    known: Collection[str]
    prepare: Callable[[str], Senders]
    needed: Callable[[str], Collection[int]]

    def look(self) -> Before:
        """What the other ranks are told of it.

        Raises:
            CheckpointError: this rank's worker could not get back what it has.
        """
        ready = {}
        for name in self.known:
            # What was unregistered since, or changed, is not there to be put back.
            with contextlib.suppress(CkptEngineError):
                ready[name] = self.prepare(name).digest
        if not self.receives:
            return Before(ready=ready)
        before = self._check()
        return Before(checkpoint=before.checkpoint, version=before.version, digest=before.digest, ready=ready)

    def _check(self) -> Committed:
        before = self.committed
        if before is None:
            raise CheckpointError(
                "on_failure='restore': nothing was put into this rank's worker yet that could be put back: "
                "make the first update with on_failure='raise'"
            )
        needs = (
            f"on_failure='restore' needs {before.checkpoint!r} (version {before.version!r}), which the "
            f"engines have now, registered beside the new one: {before.nbytes} bytes of host memory on this "
            "rank"
        )
        try:
            senders = self.prepare(before.checkpoint)
            if self.verify != "off":
                senders.digests(senders.names)
            missing = set(self.needed(before.checkpoint)) - set(self.members)
        except CkptEngineError as error:
            raise CheckpointError(f"{needs}. {error}") from error
        if senders.digest != before.digest:
            raise CheckpointError(f"{needs}. It was registered or gathered anew since")
        if missing:
            raise CheckpointError(
                f"{needs}. Ranks {sorted(missing)} hold a part of it that cannot be read by P2P, and take no "
                f"part in this update: let them, with ranks={sorted({*self.members, *missing})}, or register "
                "their part on ranks that do"
            )
        return before


@dataclass(kw_only=True, frozen=True)
class Restore:
    """One rank's part.

    `before`: what it would put back; None where it has no worker in the update. `again`: sends a checkpoint
    as a version, to this rank's worker too or not.
    """

    control: Control
    members: Sequence[int]
    failed: UpdateSession
    before: Committed | None
    again: Callable[[str, str, bool], object]
    deadline: Deadline

    def run(self, error: UpdateError) -> UpdateError:
        """What is to be raised in place of the update's `error`: that error, which says what was put back; or
        a `RestoreError`."""
        try:
            version = self._put_back(bool(error.touched))
        except PublishError as unheard:
            logger.error("what was there before is back, but: %s", unheard)
            version = self.before.version if self.before is not None else None
        except UpdateError as again:
            return self._failed(again.record, error)
        except CkptEngineError as again:
            return self._failed(ErrorRecord.from_exception(again, stage="restore"), error)
        if version is not None:
            error.restored = version
            error.touched = False
            logger.warning("version %r is back after a failed update", version)
        return error

    def _put_back(self, touched: bool) -> str | None:
        """The version that this rank's worker has again; None: it was not touched, or cannot be asked."""
        before = self.before
        mine = _After(
            touched=touched,
            asked=self.failed.has_worker,
            checkpoint=before.checkpoint if before is not None else "",
            version=before.version if before is not None else "",
        )
        others = self._meet(mine)
        if not any(other.touched for other in others):
            return None
        wanted = {(other.checkpoint, other.version) for other in others if other.asked or other.touched}
        if len(wanted) != 1:
            raise ProtocolError(f"the workers had different versions before: {sorted(wanted)}")
        if not any(other.asked for other in others):
            raise ProtocolError("no worker is left that could be asked")
        (checkpoint, version), *_ = wanted
        self.again(checkpoint, version, mine.asked)
        return version if mine.asked else None

    def _meet(self, mine: _After) -> list[_After]:
        round_ = self.control.open_round(purpose_of_restore(self.failed.checkpoint_name), self.members)
        try:
            blobs = round_.exchange(msgspec.json.encode(mine), self.deadline)
            return [msgspec.json.decode(blob, type=_After) for _, blob in sorted(blobs.items())]
        finally:
            round_.leave()

    def _failed(self, record: ErrorRecord, error: UpdateError) -> RestoreError:
        record = replace(record, stage=record.stage or "restore")
        return RestoreError(record, touched=error.touched, update_record=error.record)
