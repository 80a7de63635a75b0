"""One update on one rank, with what follows from its end: what the worker holds then, what is put back where
it failed, and what is kept of it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

from ckpt_engine.checkpoint import CheckpointRegistry, HostCheckpoint
from ckpt_engine.checkpoint.progress import Progress
from ckpt_engine.deadline import Deadline, Timeout, deadline_of
from ckpt_engine.errors import (
    CheckpointExistsError,
    CkptEngineError,
    ConfigError,
    ErrorRecord,
    OutcomeUnknown,
    UpdateError,
)
from ckpt_engine.gathered import GatheredMetas, Senders
from ckpt_engine.metadata import RankMetas
from ckpt_engine.settings import Verify
from ckpt_engine.state import Weights, WeightsState
from ckpt_engine.update.keeping import Keeping
from ckpt_engine.update.p2p_ends import P2PEnds
from ckpt_engine.update.rank import Rank
from ckpt_engine.update.request import SocketPaths
from ckpt_engine.update.restoring import Committed, Restorable, Restore, purpose_of_restore
from ckpt_engine.update.session import UpdateReport, UpdateSession, purpose_of

logger = logging.getLogger(__name__)

KEPT_SECONDS = 30.0
"""How long ranks may take to tell each other what they keep, once their update is committed."""
MAX_VERSION = 256
"""Longest name of a version, in characters."""


def check_arguments(version: str | None, on_failure: str, verify: str) -> None:
    """Raises ConfigError: one of them is not what an update can be called with."""
    if version is not None and not (
        isinstance(version, str) and 0 < len(version) <= MAX_VERSION and version.isprintable()
    ):
        raise ConfigError(f"version={version!r}: give 1 to {MAX_VERSION} printable characters, or None")
    if on_failure not in ("raise", "restore"):
        raise ConfigError(f"on_failure={on_failure!r}: give 'raise' or 'restore'")
    if verify not in get_args(Verify):
        raise ConfigError(f"verify={verify!r}: give 'off', 'transport' or 'full'")


@dataclass(kw_only=True, frozen=True, slots=True)
class Wanted:
    """What `ParameterServer.update` was asked for. `members`: all who take part; `receivers`: those whose
    workers are updated; `receives`: this rank is one of them; `restores`: after a failure, what was there
    before is put back."""

    checkpoint_name: str
    req_func: Callable[[SocketPaths], object]
    timeout: Timeout
    members: tuple[int, ...]
    receivers: Sequence[int]
    receives: bool
    version: str | None
    restores: bool
    verify: Verify
    keep_buffers: bool
    keep: bool
    progress: Progress | None

    @property
    def purpose(self) -> str:
        return purpose_of(self.checkpoint_name, self.version, verify=self.verify, restores=self.restores)


@dataclass(kw_only=True)
class InPlace:
    """What this rank's worker holds, and what could be put back into it, by its updates so far."""

    weights: WeightsState = field(default_factory=lambda: WeightsState(Weights("unknown")))
    committed: Committed | None = None


@dataclass(kw_only=True, frozen=True)
class Running:
    """One update on this rank. `join`: its place among the ranks, made when first needed; `metas_of`: what it
    says of a share; `gather`: as `ParameterServer.gather_metas`."""

    rank: int
    registry: CheckpointRegistry
    gathered: GatheredMetas
    p2p: P2PEnds
    in_place: InPlace
    join: Callable[[Deadline], Rank]
    metas_of: Callable[..., RankMetas]
    gather: Callable[..., None]

    def run(self, wanted: Wanted) -> UpdateReport:
        """The update, and what follows where it fails; raises as `ParameterServer.update`."""
        restorable = self._restorable(wanted)
        look_back = restorable.look if wanted.restores else None
        session = self._session(wanted, keep=wanted.keep, look_back=look_back)
        try:
            report = self._run(session)
        except BaseException as error:
            if not wanted.restores or not session.began or session.committed:
                raise
            raise self._after(error, wanted, session, restorable) from error.__cause__
        logger.info(
            "rank %d: %r is in place as version %s: %d tensors, %d bytes in %.3f s",
            self.rank,
            wanted.checkpoint_name,
            report.version,
            report.tensors,
            report.nbytes,
            report.seconds,
        )
        return report

    def _session(self, wanted: Wanted, *, keep: bool = False, **instead: Any) -> UpdateSession:  # noqa: ANN401
        """Args: instead: fields of the session that are not those of what was wanted."""
        deadline = deadline_of(wanted.timeout)
        name = instead.get("checkpoint_name", wanted.checkpoint_name)
        fields: dict[str, Any] = {
            "checkpoint_name": name,
            "purpose": wanted.purpose,
            "version": wanted.version or "",
            "receives": wanted.receives,
        }
        return UpdateSession(
            me=self.join(deadline),
            members=wanted.members,
            verify=wanted.verify,
            prepare=lambda: self._prepare(name, wanted.members, keep=keep),
            req_func=wanted.req_func,
            deadline=deadline,
            keep_buffers=wanted.keep_buffers,
            progress=wanted.progress,
            keeping=self._keeping(name) if keep else None,
            **fields | instead,
        )

    def _run(self, session: UpdateSession) -> UpdateReport:
        """Keeps what comes of it, whatever comes of it."""
        if session.receives:
            self.in_place.weights.begin()
        try:
            return session.run()
        except UpdateError as error:
            if session.receives:
                self.in_place.weights.fail(error.record.describe(), touched=error.touched is not False)
            raise
        finally:
            if session.kept is not None:  # also if it was committed, and `req_func` failed
                self.registry.adopt(session.kept)
            digest = session.metas_digest
            if session.keeping is not None and session.committed:
                digest = self._gather_what_is_kept(session) or digest
            if session.receives and session.committed:
                self.in_place.committed = Committed(
                    checkpoint=session.checkpoint_name,
                    version=session.version,
                    digest=digest,
                    nbytes=session.held_nbytes,
                )
                if session.heard:
                    self.in_place.weights.commit(session.version, session.checkpoint_name)
                else:
                    self.in_place.weights.lose(
                        f"version {session.version!r} was committed, but this rank's worker did not say "
                        "that it heard so: it may be dead, or count itself as incomplete"
                    )
            elif session.receives and self.in_place.weights.now.state == "updating":
                self.in_place.weights.fail("the update was interrupted", touched=session.touched)

    def _restorable(self, wanted: Wanted) -> Restorable:
        return Restorable(
            committed=self.in_place.committed if wanted.receives else None,
            receives=wanted.receives,
            members=wanted.members,
            verify=wanted.verify,
            known=self.gathered.names,
            prepare=lambda name: self._prepare(name, wanted.members, keep=False)[1],
            needed=lambda name: self.gathered.members(name, wanted.receivers),
        )

    def _after(
        self, error: BaseException, wanted: Wanted, session: UpdateSession, restorable: Restorable
    ) -> BaseException:
        """What is to be raised: once what was there before is back, or the others know that this rank will
        take no part in that."""

        def again(name: str, version: str, asked: bool) -> UpdateReport:
            purpose = purpose_of(name, version, verify=wanted.verify)
            return self._run(
                self._session(wanted, checkpoint_name=name, purpose=purpose, version=version, receives=asked)
            )

        control = session.me.control
        restore = Restore(
            control=control,
            members=wanted.members,
            failed=session,
            before=restorable.committed,
            again=again,
            deadline=deadline_of(wanted.timeout),
        )
        try:
            if not isinstance(error, UpdateError) or isinstance(error, OutcomeUnknown):
                raise error  # interrupted, or nobody knows what there is to be put back
            return restore.run(error)
        except BaseException as reason:
            # They must not wait for this rank: neither where they meet, nor in the update that follows.
            record = ErrorRecord.from_exception(reason, rank=self.rank, stage="restore")
            purposes = [purpose_of_restore(wanted.checkpoint_name)]
            if (before := restorable.committed) is not None:
                purposes.append(purpose_of(before.checkpoint, before.version, verify=wanted.verify))
            for purpose in purposes:
                control.tell_mistake(purpose, record)
            raise

    def _gather_what_is_kept(self, session: UpdateSession) -> str:
        """The digest of where an update would come from now; empty: of where it came from.

        The weights are in place whatever comes of this. Without it, only the directory of those who were
        read tells of what is kept.
        """
        name = session.checkpoint_name
        try:
            self.gather(name, timeout=KEPT_SECONDS, ranks=session.members)
            return self._prepare(name, session.members, keep=False)[1].digest
        except CkptEngineError as error:
            logger.warning("%r is kept, but those who join by this rank are not told: %s", name, error)
            return ""

    def _keeping(self, name: str) -> Keeping:
        def promise(share: HostCheckpoint) -> RankMetas:
            return self.metas_of(name, share, filled=False)

        return Keeping(ends=self.p2p, promise=promise)

    def _prepare(
        self, name: str, members: Sequence[int], *, keep: bool
    ) -> tuple[HostCheckpoint | None, Senders]:
        held = self.registry.find(name)
        if keep and held is not None:
            raise CheckpointExistsError(
                f"{name!r} is registered on rank {self.rank}: unregister it before another one is kept"
            )
        return held, self.gathered.of(name, held.epoch if held else "", self.registry.names(), members)
