"""One update on one rank, all or nothing: begin -> buckets -> finish -> every rank agrees -> commit.

Whatever fails on any rank becomes one decision on the control store; every rank then raises the same
record, tells its worker, and cleans up. A rank learns the decision through the descriptor of its watcher,
so it is interrupted in any wait.
"""

from __future__ import annotations

import logging
import secrets
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import msgspec
import zmq

from ckpt_engine.checkpoint import HostCheckpoint
from ckpt_engine.deadline import Deadline
from ckpt_engine.devices import Device, Ring
from ckpt_engine.errors import (
    CheckpointError,
    ConfigError,
    ErrorRecord,
    OutcomeUnknown,
    ProtocolError,
    UpdateError,
    UpdateTimeout,
)
from ckpt_engine.ipc.messages import Begin
from ckpt_engine.ipc.reactor import Reactor
from ckpt_engine.ipc.sender import WorkerChannel
from ckpt_engine.ipc.sockets import SocketDirectory
from ckpt_engine.metadata import Metas
from ckpt_engine.planning.plan import UpdatePlan, make_plan
from ckpt_engine.settings import Settings
from ckpt_engine.transport.collectives import Collectives, GlooCollectives
from ckpt_engine.transport.control import Control, Round, Verdict, error_of
from ckpt_engine.transport.shared_memory import HostLinks
from ckpt_engine.update.pipeline import Hosts, Pipeline
from ckpt_engine.update.request import EngineRequest, SocketPaths

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], object]
"""Called with (bytes given back by this rank's worker, bytes in all)."""


@dataclass(kw_only=True, frozen=True, slots=True)
class UpdateReport:
    """A committed update, as this rank saw it. `nbytes`: of all tensors; `stages`: seconds of each."""

    checkpoint: str
    version: str
    tensors: int
    nbytes: int
    buckets: int
    ring_nbytes: int
    seconds: float
    stages: dict[str, float]


class _Introduction(msgspec.Struct, frozen=True):
    """What a rank tells the others at the start of an update."""

    host: str
    device_uuid: str
    handle: str
    peer_path: str
    free_memory: int
    slot_nbytes: int
    slot_count: int
    metas_digest: str
    token: str
    between_hosts: str


@dataclass(kw_only=True)
class Rank:
    """What a rank keeps between updates."""

    rank: int
    settings: Settings
    mem_fraction: float
    device: Device
    control: Control
    directory: SocketDirectory
    zmq_ctx: zmq.Context[zmq.Socket[bytes]]
    between_hosts: Collectives | None = None
    between_hosts_name: str = ""

    def drop_groups(self) -> None:
        """Groups are not used again after an abort: a member may still wait in them."""
        if self.between_hosts is not None:
            self.between_hosts.close()
        self.between_hosts, self.between_hosts_name = None, ""


@dataclass(kw_only=True)
class UpdateSession:
    """Runs one update. `prepare` returns this rank's share, the metas and their digest, or raises."""

    me: Rank
    checkpoint_name: str
    prepare: Callable[[], tuple[HostCheckpoint | None, Metas, str]]
    req_func: Callable[[SocketPaths], object]
    deadline: Deadline
    progress: Progress | None = None
    _stage: str = "begin"
    _stages: dict[str, float] = field(default_factory=dict)
    _started: float = field(default_factory=time.monotonic)
    _reactor: Reactor = field(default_factory=Reactor)
    _met: bool = False
    _channel: WorkerChannel | None = None
    _links: HostLinks | None = None
    _ring: Ring | None = None
    _request: EngineRequest | None = None
    _pipeline: Pipeline | None = None
    _verdict: Verdict | None = None

    def run(self) -> UpdateReport:
        """The whole update.

        Raises:
            UpdateError: it did not commit; the same record on every rank.
            PublishError: it did, but `req_func` failed.
        """
        round_ = self.me.control.open_round()
        try:
            try:
                plan = self._begin(round_)
                self._handshake()
                self._move()
                verdict = self._agree(round_)
            except BaseException as error:  # noqa: BLE001 - decided for all ranks, then raised again
                verdict = self._abort(round_, error)
            self._commit(verdict)
        finally:
            round_.leave()
            self._close()
            round_.join_watcher()
        return UpdateReport(
            checkpoint=self.checkpoint_name,
            version=str(verdict.version),
            tensors=plan.tensor_count,
            nbytes=plan.nbytes,
            buckets=len(plan.buckets),
            ring_nbytes=plan.ring.nbytes,
            seconds=time.monotonic() - self._started,
            stages=self._stages,
        )

    # The stages

    def _enter(self, stage: str) -> None:
        now = time.monotonic()
        self._stages[self._stage] = now - self._started - sum(self._stages.values())
        self._stage = stage

    def _begin(self, round_: Round) -> UpdatePlan:
        """Meets the other ranks, makes the plan, the ring and the links, and asks the engine."""
        me = self.me
        checkpoint, metas, digest = self.prepare()
        self._channel = WorkerChannel(me.zmq_ctx, me.directory, me.device.uuid(), self._reactor)
        self._links = HostLinks(me.directory.peer_path, me.rank, self._reactor)
        mine = _Introduction(
            host=me.settings.host_id,
            device_uuid=me.device.uuid(),
            handle=self._channel.handle,
            peer_path=me.directory.peer_path,
            free_memory=int(me.device.free_memory() * me.mem_fraction),
            slot_nbytes=me.settings.slot_nbytes,
            slot_count=me.settings.slot_count,
            metas_digest=digest,
            token=secrets.token_hex(16),
            between_hosts=me.between_hosts_name,
        )
        blobs = round_.exchange(f"update({self.checkpoint_name!r})", msgspec.json.encode(mine), self.deadline)
        self._met = True
        ranks = [msgspec.json.decode(blob, type=_Introduction) for blob in blobs]
        wake = round_.watch(self.deadline.remaining + 60)
        self._reactor.add(wake, lambda: self._on_verdict(round_, wake))
        _check_agreement(me.rank, ranks)
        hosts = Hosts.of({rank: other.host for rank, other in enumerate(ranks)})
        plan = make_plan(
            self.checkpoint_name,
            metas,
            slot_nbytes=min(other.slot_nbytes for other in ranks),
            slot_count=min(other.slot_count for other in ranks),
            # Ranks of a host share its memory.
            budget=min(other.free_memory // len(hosts.local_ranks(rank)) for rank, other in enumerate(ranks)),
        )
        self._ring = me.device.allocate_ring(plan.ring.nbytes)
        self._pipeline = Pipeline(
            plan=plan,
            rank=me.rank,
            hosts=hosts,
            checkpoint=checkpoint,
            device=me.device,
            ring=self._ring,
            channel=self._channel,
            links=self._links,
            between_hosts=self._group_between(round_, hosts, ranks),
            reactor=self._reactor,
            deadline=self.deadline,
            reply_timeout=me.settings.reply_timeout,
            progress=self._progress_of(plan),
        )
        self._channel.begin(
            Begin(
                session=ranks[0].token,
                checkpoint=self.checkpoint_name,
                version=str(round_.number),
                ring=self._ring.handle(),
                buckets=plan.layouts,
                budget=self.deadline.remaining,
            ),
            self._ring,
        )
        self._request = EngineRequest(self.req_func, [(other.device_uuid, other.handle) for other in ranks])
        request = self._request
        self._reactor.add(request.fileno(), lambda: self._on_request(request))
        local = {rank: ranks[rank].peer_path for rank in hosts.local_ranks(me.rank) if rank != me.rank}
        if local:
            self._links.connect(
                local,
                ranks[0].token,
                self._ring,
                self._pipeline.on_note,
                self.deadline,
                poll=lambda: self._reactor.turn(0),
            )
        return plan

    def _progress_of(self, plan: UpdatePlan) -> Callable[[int], object]:
        tell = self.progress
        return (lambda nbytes: tell(nbytes, plan.nbytes)) if tell else (lambda nbytes: None)

    def _group_between(
        self, round_: Round, hosts: Hosts, ranks: Sequence[_Introduction]
    ) -> Collectives | None:
        """The leaders' group, kept from the last update if every leader still has it."""
        me = self.me
        if len(hosts.leaders) == 1 or me.rank not in hosts.leaders:
            me.drop_groups()
            return None
        names = {ranks[leader].between_hosts for leader in hosts.leaders}
        if len(names) > 1 or not me.between_hosts_name:
            me.drop_groups()
            name = f"between-hosts-{round_.number}-{'-'.join(map(str, hosts.leaders))}"
            place = hosts.leaders.index(me.rank)
            me.between_hosts = GlooCollectives(
                me.control.store, name, place, len(hosts.leaders), self.deadline
            )
            me.between_hosts_name = name
        return me.between_hosts

    def _handshake(self) -> None:
        self._enter("handshake")
        assert self._channel is not None
        channel = self._channel
        deadline = self.deadline.or_after(self.me.settings.handshake_timeout)
        if not self._reactor.wait(lambda: channel.ready, deadline):
            what = "has not mapped the ring" if channel.connected else "has not connected to its handle"
            raise self._timeout(f"the worker of device {self.me.device.uuid()} {what}")

    def _move(self) -> None:
        self._enter("buckets")
        assert self._pipeline is not None
        self._pipeline.run()

    def _agree(self, round_: Round) -> Verdict:
        assert self._channel is not None
        channel = self._channel
        channel.finish()
        for stage, done in (
            ("release", lambda: channel.released),
            ("post_hook", lambda: channel.finished),
        ):
            self._enter(stage)
            if not self._reactor.wait(done, self.deadline):
                raise self._timeout("the worker did not answer")
        self._enter("decide")
        round_.vote(str(round_.number))
        if not self._reactor.wait(lambda: self._verdict is not None, self.deadline):
            raise self._timeout("not every rank finished")
        assert self._verdict is not None
        return self._verdict

    def _commit(self, verdict: Verdict) -> None:
        """Tells the worker, and waits for `req_func`."""
        self._enter("publish")
        assert self._channel is not None
        if self._channel.connected and not self._channel.gone:
            self._channel.commit(str(verdict.version))
            if not self._channel.wait_until_gone():
                logger.warning("the worker of device %s did not say goodbye", self.me.device.uuid())
        if self._request is not None:
            self._request.finish(self.deadline)
        self._enter("end")

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
        record = ErrorRecord.from_exception(
            error,
            rank=self.me.rank,
            host=self.me.settings.host_id,
            device=self.me.device.uuid(),
            stage=self._stage,
            elapsed=time.monotonic() - self._started,
        )
        touched = self._channel is not None and self._channel.touched
        try:
            verdict = round_.abort(record)
        except OutcomeUnknown as unknown:
            self._tell_worker(unknown.record)
            raise OutcomeUnknown(unknown.record, touched=touched) from error
        if verdict.record is None:
            return verdict
        _clear_frames(error)
        self.me.drop_groups()
        self._tell_worker(verdict.record)
        # A caller's own mistake on this rank, and an interrupt, stay what they are.
        if not isinstance(error, Exception) or (
            isinstance(error, CheckpointError | ConfigError) and not self._met
        ):
            raise error
        raise error_of(verdict.record, touched=touched) from (
            error if not isinstance(error, UpdateError) else error.__cause__
        )

    def _tell_worker(self, record: ErrorRecord) -> None:
        if self._channel is not None and not self._channel.abort(record.describe()):
            logger.error(
                "the worker of device %s (pid %s) has not left its loop: its engine needs a restart",
                self.me.device.uuid(),
                self._channel.worker_pid,
            )

    def _timeout(self, message: str) -> UpdateTimeout:
        return UpdateTimeout(ErrorRecord(error_type="UpdateTimeout", message=message, stage=self._stage))

    def _close(self) -> None:
        # The worker's sockets first: an engine that waits on them lets req_func return.
        if self._channel is not None:
            self._channel.close()
        if self._request is not None:
            self._reactor.remove(self._request.fileno())
            self._request.abandon()
            self._request.close()
        if self._links is not None:
            self._links.close()
        if self._ring is not None:
            self._ring.close()


def _clear_frames(error: BaseException | None) -> None:
    """Drops the locals of the frames that the error's traceback keeps: they hold views of the ring, whose
    memory would otherwise stay until the garbage collector finds the cycle."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def _check_agreement(rank: int, ranks: Sequence[_Introduction]) -> None:
    for other, introduction in enumerate(ranks):
        if introduction.metas_digest != ranks[rank].metas_digest:
            raise ProtocolError(
                f"rank {rank} and rank {other} have gathered different metas: call gather_metas on all ranks"
            )
