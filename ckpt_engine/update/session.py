"""One update on one rank, all or nothing: begin -> buckets -> finish -> every rank agrees -> commit.

Whatever fails on any rank becomes one decision of the control server; every rank then raises the same
record, tells its worker, and cleans up. A rank learns the decision through the descriptor of its watcher,
so it is interrupted in any wait.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import msgspec

from ckpt_engine.checkpoint import HostCheckpoint
from ckpt_engine.checkpoint.progress import Progress
from ckpt_engine.deadline import Deadline
from ckpt_engine.errors import (
    CheckpointError,
    ConfigError,
    ErrorRecord,
    OutcomeUnknown,
    PeerLost,
    UpdateError,
    UpdateTimeout,
    clear_frames,
)
from ckpt_engine.gathered import Senders
from ckpt_engine.ipc.messages import Begin
from ckpt_engine.ipc.reactor import Reactor
from ckpt_engine.ipc.sender import WorkerChannel
from ckpt_engine.logs import tell_stage
from ckpt_engine.planning.plan import UpdatePlan
from ckpt_engine.settings import Verify
from ckpt_engine.timeline.recorder import NO_RECORDER, Recorder
from ckpt_engine.transport.control import Round, Verdict, error_of
from ckpt_engine.transport.shared_memory import HostLinks
from ckpt_engine.update.inflow import Inflow
from ckpt_engine.update.introduction import Before, Meeting, introduce
from ckpt_engine.update.keeping import Keeping
from ckpt_engine.update.movers import make_mover
from ckpt_engine.update.no_worker import Channel, NoWorker
from ckpt_engine.update.p2p_reader import P2PReader
from ckpt_engine.update.part import Part
from ckpt_engine.update.pipeline import Pipeline
from ckpt_engine.update.rank import Rank
from ckpt_engine.update.request import EngineRequest, SocketPaths

logger = logging.getLogger(__name__)

CAUSE_SECONDS = 0.5
"""How long a rank that lost another one waits to hear why."""


def purpose_of(
    checkpoint_name: str, version: str | None = None, *, verify: Verify = "off", restores: bool = False
) -> str:
    """What ranks must be doing alike."""
    return (
        f"update({checkpoint_name!r}"
        + (f", version={version!r}" if version else "")
        + (f", verify={verify!r}" if verify != "off" else "")
        + (", on_failure='restore'" if restores else "")
        + ")"
    )


@dataclass(kw_only=True, frozen=True, slots=True)
class UpdateReport:
    """A committed update, as this rank saw it. `nbytes`: of all tensors; `stages`: seconds of each.

    `content`: the digest of the weights (`metadata.content_digest`). `transport`: by which this rank read
    `p2p_nbytes` bytes of tensors from owners outside of the update, empty where it read none. `lost_sources`:
    owners that could not be read to the end, in whose place others were. `kept_nbytes`: of what it keeps.
    A rank that was not needed has no version, and no tensors.
    """

    checkpoint: str
    version: str
    tensors: int
    nbytes: int
    buckets: int
    ring_nbytes: int
    seconds: float
    stages: dict[str, float]
    content: str = ""
    transport: str = ""
    p2p_nbytes: int = 0
    lost_sources: tuple[str, ...] = ()
    kept_nbytes: int = 0

    @classmethod
    def not_needed(cls, checkpoint: str) -> UpdateReport:
        """Of a rank that took no part."""
        return cls(
            checkpoint=checkpoint,
            version="",
            tensors=0,
            nbytes=0,
            buckets=0,
            ring_nbytes=0,
            seconds=0.0,
            stages={},
        )


@dataclass(kw_only=True)
class UpdateSession:
    """Runs one update on one of its `members`.

    `receives`: whether this rank's worker is to be updated, too. `keep_buffers`: keep the ring for the next
    update instead of freeing it before the post hooks run. `keeping`: how to keep what is read by P2P;
    `kept`: what was. `prepare` returns this rank's share, and where all bytes come from, or raises.
    `purpose`: what all ranks do (`purpose_of`). `version`: what a commit is to be called; empty: the round's
    number. `verify`: what workers compare with the digests of what was registered. `look_back`: what this
    rank would put back, for an update that restores; or raises.
    """

    me: Rank
    members: tuple[int, ...]
    receives: bool
    checkpoint_name: str
    purpose: str
    prepare: Callable[[], tuple[HostCheckpoint | None, Senders]]
    req_func: Callable[[SocketPaths], object]
    deadline: Deadline
    keep_buffers: bool = False
    progress: Progress | None = None  # of bytes that this rank's worker gave back
    keeping: Keeping | None = None
    version: str = ""
    verify: Verify = "off"
    look_back: Callable[[], Before] | None = None
    _stage: str = "begin"
    _stages: dict[str, float] = field(default_factory=dict)
    _started: float = field(default_factory=time.monotonic)
    _reactor: Reactor = field(default_factory=Reactor)
    _met: bool = False
    _channel: Channel | None = None
    _links: HostLinks | None = None
    _inflow: Inflow | None = None
    _request: EngineRequest | None = None
    _pipeline: Pipeline | None = None
    _recorder: Recorder = NO_RECORDER
    _left_behind: bool = False
    metas_digest: str = field(default="", init=False)  # of where the bytes come from
    held_nbytes: int = field(default=0, init=False)  # of them, on this rank
    _verdict: Verdict | None = None

    def run(self) -> UpdateReport:
        """The whole update.

        Raises:
            UpdateError: it did not commit; the same record on every rank.
            PublishError: it did, but `req_func` failed.
        """
        with ExitStack() as ending:
            self._recorder = self.me.recorder(self.checkpoint_name)
            ending.enter_context(self._recorder.update())
            round_ = self.me.control.open_round(self.purpose, self.members, decides=True)
            ending.callback(round_.leave)
            ending.callback(self._close)
            interrupt: BaseException | None = None
            try:
                plan = self._begin(round_)
                self._handshake()
                self._move()
                verdict = self._agree(round_)
            except BaseException as error:  # noqa: BLE001 - decided for all ranks, then raised again
                verdict = self._abort(round_, error)
                interrupt = None if isinstance(error, Exception) else error
            self._commit(verdict)
            if interrupt is not None:
                raise interrupt
        return UpdateReport(
            checkpoint=self.checkpoint_name,
            version=str(verdict.version),
            tensors=plan.tensor_count,
            nbytes=plan.nbytes,
            buckets=len(plan.buckets),
            ring_nbytes=plan.ring.nbytes,
            seconds=time.monotonic() - self._started,
            stages=self._stages,
            **self._inflow_of_report(),
        )

    # The stages

    def _enter(self, stage: str) -> None:
        self._tell_stage()
        self._stage = stage
        self._recorder.stage(stage)

    def _tell_stage(self, error: BaseException | None = None) -> None:
        """That the stage at work has ended, well or with `error`."""
        seconds = time.monotonic() - self._started - sum(self._stages.values())
        self._stages[self._stage] = seconds
        tell_stage(
            logger,
            self._stage,
            seconds,
            rank=self.me.rank,
            checkpoint=self.checkpoint_name,
            version=self.version,
            error=error,
        )

    def _begin(self, round_: Round) -> UpdatePlan:
        """Meets the other ranks, makes the plan, the ring and the links, and asks the engine."""
        me = self.me
        checkpoint, senders = self.prepare()
        self.metas_digest = senders.digest
        self.held_nbytes = checkpoint.nbytes if checkpoint is not None else 0
        before = self.look_back() if self.look_back is not None else None
        self._inflow = inflow = Inflow(
            me=me,
            senders=senders,
            leads=me.rank == self.members[0],
            token=secrets.token_hex(16),
            deadline=self.deadline,
            keeping=self.keeping,
        )
        p2p = inflow.prepare()
        channel: Channel = NoWorker()
        if self.receives:
            channel = WorkerChannel(me.zmq_ctx, me.directory, me.device.uuid(), self._reactor)
        self._channel = channel
        self._links = HostLinks(me.directory.peer_path, me.rank, self._reactor)
        mine = msgspec.json.encode(introduce(me, channel.handle, senders.digest, inflow.token, p2p, before))
        blobs = round_.exchange(mine, self.deadline)
        self._met = True
        wake = round_.watch()
        self._reactor.add(wake, lambda: self._on_verdict(round_, wake))
        meeting = Meeting.of(round_.name, blobs)
        self._recorder.met(meeting.token, len(meeting.members))
        meeting.check(me.rank)
        self.version = self.version or meeting.name
        outside, assign = inflow.plan_reads(meeting)
        plan = me.planner.plan(
            self.checkpoint_name,
            senders.metas,
            senders.layout,
            outside=outside,
            assign=assign,
            slot_nbytes=meeting.slot_nbytes,
            slot_count=meeting.slot_count,
            budget=meeting.budget,
            # In host memory roots stage in their rings, from which the others copy.
            staging=len(meeting.members) > 1 and not meeting.in_host_memory,
        )
        self._recorder.planned(plan)
        ring = me.buffers.ring(plan.ring.nbytes, plan.ring.count)
        is_root = any(item.root == me.rank for item in plan.buckets)
        part = Part(
            plan=plan,
            rank=me.rank,
            checkpoint=checkpoint,
            device=me.device,
            ring=ring,
            staging=me.buffers.staging(plan.staging_nbytes if is_root else 0),
            channel=channel,
            reactor=self._reactor,
            deadline=self.deadline,
            reply_timeout=me.settings.reply_timeout,
            recorder=self._recorder,
            reader=self._start_reads(inflow, plan, meeting),
        )
        channel.begin(
            Begin(
                session=meeting.token,
                checkpoint=self.checkpoint_name,
                version=self.version,
                ring=ring.handle(),
                buckets=plan.layouts,
                budget=self.deadline.remaining,
                **self._verification_of(plan, senders),
            ),
            ring,
        )
        self._reactor.every_second(channel.beat)
        if self.receives:
            self._ask(meeting.socket_paths)
        mover = make_mover(me, meeting, part, self._links)
        self._pipeline = Pipeline(part, mover, self._progress_of(plan))
        self._pipeline.begin()
        return plan

    def _verification_of(self, plan: UpdatePlan, senders: Senders) -> dict[str, Any]:
        if self.verify == "off":
            return {}
        digests = iter(senders.digests(tensor.name for bucket in plan.layouts for tensor in bucket.tensors))
        of_buckets = (b"".join(islice(digests, len(bucket.tensors))) for bucket in plan.layouts)
        return {"verify": self.verify, "digests": tuple(of_buckets)}

    def _start_reads(self, inflow: Inflow, plan: UpdatePlan, meeting: Meeting) -> P2PReader | None:
        reader = inflow.start(plan, meeting, self._recorder)
        if reader is not None:
            self._reactor.add(reader.fileno(), reader.check)
        return reader

    def _ask(self, socket_paths: SocketPaths) -> None:
        self._request = request = EngineRequest(self.req_func, socket_paths)
        self._reactor.add(request.fileno(), lambda: self._on_request(request))

    def _progress_of(self, plan: UpdatePlan) -> Callable[[int], object]:
        tell = self.progress
        return (lambda nbytes: tell(nbytes, plan.nbytes)) if tell else (lambda nbytes: None)

    def _handshake(self) -> None:
        self._enter("handshake")
        assert self._channel is not None
        channel = self._channel
        deadline = self.deadline.or_after(self.me.settings.handshake_timeout)
        if not self._reactor.wait(lambda: channel.ready, deadline):
            what = "has not mapped the ring" if channel.connected else "has not connected to its handle"
            raise self._timeout(
                f"the worker of device {self.me.device.uuid()} {what} "
                "(CKPT_ENGINE_HANDSHAKE_TIMEOUT is how long it may take)"
            )

    def _move(self) -> None:
        self._enter("buckets")
        assert self._pipeline is not None
        self._pipeline.run()

    def _agree(self, round_: Round) -> Verdict:
        assert self._channel is not None
        channel = self._channel
        channel.finish()
        if self.keep_buffers:
            channel.freed()  # as far as it will be: the worker need not come back to hear it
        self._enter("release")
        self._wait_for(lambda: channel.released)
        # All that was enqueued has happened, or it failed: then nobody may commit.
        self.me.device.synchronize()
        if not self.keep_buffers:
            self.me.buffers.free()
            channel.freed()
        self._enter("post_hook")
        self._wait_for(lambda: channel.finished)
        self._enter("decide")
        round_.vote(self.version)
        if not self._reactor.wait(lambda: self._verdict is not None, self.deadline):
            raise self._timeout("not every rank finished")
        assert self._verdict is not None
        return self._verdict

    def _wait_for(self, done: Callable[[], bool]) -> None:
        """For the worker, which has `reply_timeout` for each of its steps."""
        if not self._reactor.wait(done, self.deadline.or_after(self.me.settings.reply_timeout)):
            raise self._timeout(
                "the worker did not answer: it is stopped, or stuck in the engine's own code "
                "(CKPT_ENGINE_REPLY_TIMEOUT is how long it may take)"
            )

    def _commit(self, verdict: Verdict) -> None:
        """Tells the worker, and waits for `req_func`."""
        self._enter("publish")
        if self._inflow is not None:
            self._inflow.commit()
        assert self._channel is not None
        if self._channel.connected and not self._channel.gone:
            self._channel.commit(str(verdict.version))
            self._channel.wait_until_gone()
        if not self._channel.heard:
            logger.error(
                "the worker of device %s did not say that it heard the commit", self.me.device.uuid()
            )
        if self._request is not None:
            self._request.finish(self.deadline)
        self._enter("end")

    @property
    def committed(self) -> bool:
        return self._verdict is not None and self._verdict.committed

    @property
    def heard(self) -> bool:
        """Whether this rank's worker has said that it knows of the commit."""
        return self.committed and self._channel is not None and self._channel.heard

    @property
    def touched(self) -> bool:
        """Whether this rank's worker may have loaded something."""
        return self._channel is not None and self._channel.touched

    @property
    def began(self) -> bool:
        """Whether all members had met: from then on some worker may have loaded something."""
        return self._met or (self._verdict is not None and self._verdict.met)

    @property
    def has_worker(self) -> bool:
        """Whether this rank's worker can be asked again."""
        return self.receives and self._channel is not None and not (self._channel.died or self._left_behind)

    @property
    def kept(self) -> HostCheckpoint | None:
        return self._inflow.kept if self._inflow is not None else None

    # What may come in between

    def _on_verdict(self, round_: Round, wake: int) -> None:
        self._reactor.remove(wake)
        self._verdict = round_.peek()
        if self._verdict is not None and self._verdict.record is not None:
            raise error_of(self._verdict.record)

    def _on_request(self, request: EngineRequest) -> None:
        self._reactor.remove(request.fileno())
        request.check()

    def _abort(self, round_: Round, error: BaseException) -> Verdict:
        """Decides against for all ranks and raises what was decided; returns a commit that came first."""
        self._tell_stage(error)
        record = ErrorRecord.from_exception(
            error,
            rank=self.me.rank,
            host=self.me.settings.host_id,
            device=self.me.device.uuid(),
            stage=self._stage,
            elapsed=time.monotonic() - self._started,
        )
        touched = self.touched
        if isinstance(error, PeerLost) and error.record.device is None:
            # A rank that fails closes its links: its own error, on its way, tells more than their end.
            round_.wait_for_verdict(Deadline.after(CAUSE_SECONDS))
        try:
            verdict = round_.abort(record)
        except OutcomeUnknown as unknown:
            self._tell_worker(unknown.record)
            raise OutcomeUnknown(unknown.record, touched=touched) from error
        self._verdict = verdict
        if verdict.record is None:
            return verdict
        clear_frames(error)
        decided = verdict.record
        if not decided.stage:  # a lost rank cannot say how far it had come: this one says how far it had
            decided = replace(
                decided,
                stage=record.stage,
                bucket=record.bucket,
                tensors=record.tensors,
                left_out=record.left_out,
            )
        self._tell_worker(decided)
        self.me.drop_groups()
        # A caller's own mistake on this rank, and an interrupt, stay what they are.
        if not isinstance(error, Exception) or (
            isinstance(error, CheckpointError | ConfigError) and not self._met
        ):
            raise error
        raise error_of(decided, touched=touched) from (
            error if not isinstance(error, UpdateError) else error.__cause__
        )

    def _tell_worker(self, record: ErrorRecord) -> None:
        if self._channel is not None and not self._channel.abort(record.describe()):
            logger.error(
                "the worker of device %s (pid %s) has not left its loop: its engine needs a restart",
                self.me.device.uuid(),
                self._channel.worker_pid,
            )
            self._left_behind = not self._channel.gone

    def _timeout(self, message: str) -> UpdateTimeout:
        return UpdateTimeout(ErrorRecord(error_type="UpdateTimeout", message=message, stage=self._stage))

    def _close(self) -> None:
        with ExitStack() as ending:  # The last first, and each whatever the others raise.
            if self.me.settings.release_groups:
                ending.callback(self.me.drop_groups)
            if self._inflow is not None:
                ending.callback(self._inflow.close)
            ending.callback(self._close_buffers)
            if self._inflow is not None:
                ending.callback(self._inflow.stop)
            if self._links is not None:
                ending.callback(self._links.close)
            if self._request is not None:
                ending.callback(self._request.close)
                ending.callback(self._request.abandon)
                ending.callback(self._reactor.remove, self._request.fileno())
            # The worker's sockets first: an engine that waits on them lets req_func return.
            if self._channel is not None:
                ending.callback(self._channel.close)

    def _inflow_of_report(self) -> dict[str, Any]:
        return self._inflow.report() if self._inflow is not None else {}

    def _close_buffers(self) -> None:
        if self._left_behind and self.me.device.type != "cpu":
            logger.error(
                "%d bytes on device %s stay taken: the worker may still read them",
                self.me.buffers.abandon(),
                self.me.device.uuid(),
            )
        elif not (self.keep_buffers and self.committed):
            self.me.buffers.free()
