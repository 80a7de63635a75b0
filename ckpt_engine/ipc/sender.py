"""The parameter server's side of the protocol: one channel to the worker on the same device."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from dataclasses import dataclass
from functools import partial

import zmq

from ckpt_engine.deadline import Deadline
from ckpt_engine.devices import Ring
from ckpt_engine.errors import ErrorRecord, PeerLost, ProtocolError, UpdateError
from ckpt_engine.ipc import messages
from ckpt_engine.ipc.reactor import Reactor
from ckpt_engine.ipc.sockets import IDENTITY_NBYTES, SocketDirectory, check_peer, listen, tune

logger = logging.getLogger(__name__)

GOODBYE_SECONDS = 10.0
"""How long a worker may take to leave after it was told the outcome."""


@dataclass
class _Lifeline:
    sock: socket.socket
    pid: int
    identity: bytes = b""


class WorkerChannel:
    """Binds the worker's handle, and follows the worker through one update.

    Progress is read from the attributes; a worker's failure or death is raised from the reactor's turn
    that reads it. Made in the stage before the engine is asked to receive; closed by the session.

    A process without a lifeline is a stranger: it gets nothing, and what it says is dropped.
    """

    def __init__(
        self,
        zmq_ctx: zmq.Context[zmq.Socket[bytes]],
        directory: SocketDirectory,
        device_uuid: str,
        reactor: Reactor,
    ) -> None:
        self._uuid = device_uuid
        self._reactor = reactor
        self._path = directory.worker_path()
        self.handle = f"ipc://{self._path}"
        self.worker_pid: int | None = None
        self.ready = False
        self.done = -1  # index of the last bucket the worker has given back
        self.announced = -1
        self.released = False
        self.finished = False
        self.gone = False  # said goodbye, or died
        self.died = False  # without a word
        self.heard = False  # it said goodbye, once it was told how the update ended
        self._reported = False  # its own failure
        self._begin: messages.Begin | None = None
        self._begun = False
        self._layouts: tuple[messages.BucketLayout, ...] = ()
        self._ring: Ring | None = None
        self._abort_frame: bytes | None = None
        self._identity: bytes | None = None
        self._lifelines: list[_Lifeline] = []
        self._known: set[bytes] = set()  # identities that came over a lifeline
        self._finishing = self._freed = False
        self._told = False  # how the update ended
        self._zmq = zmq_ctx.socket(zmq.ROUTER)
        self._listener: socket.socket | None = None
        try:
            tune(self._zmq, messages.MAX_WORKER_MESSAGE_NBYTES)
            self._zmq.bind(self.handle)
            self._listener = listen(f"{self._path}.life")
        except BaseException:
            self.close()
            raise
        reactor.add(self._zmq, self._on_message)
        reactor.add(self._listener.fileno(), self._on_connection)

    # What the session says

    def begin(self, begin: messages.Begin, ring: Ring) -> None:
        """What the worker gets when it connects, or at once if it is there."""
        self._begin, self._ring, self._layouts = begin, ring, begin.buckets
        self._start()

    def announce(self, index: int) -> None:
        """Bucket `index` lies in its slot."""
        self._send(messages.BucketReady(index))
        self.announced = index

    def finish(self) -> None:
        self._finishing = True
        self._send(messages.Finish())

    def freed(self) -> None:
        """The ring's memory is free: the worker may run its post hook."""
        self._freed = True
        self._send(messages.Freed())

    def beat(self) -> None:
        """A sign of life, for a worker that waits for something."""
        if self._begun and not self._told and not self.gone:
            self._send(messages.StillHere())

    def commit(self, version: str) -> None:
        self._told = True
        self._send(messages.Commit(version))

    def abort(self, reason: str) -> bool:
        """Tells every connected worker, and waits until they have left. Returns False when one has not."""
        self._told = True
        self._abort_frame = messages.encode(messages.Abort.because(reason))
        for lifeline in self._lifelines:
            self._send_abort(lifeline)
        return self.wait_until_gone()

    def _send_abort(self, lifeline: _Lifeline) -> None:
        if lifeline.identity in self._known and self._abort_frame is not None:
            self._zmq.send_multipart([lifeline.identity, self._abort_frame])

    def wait_until_gone(self) -> bool:
        """Waits for the worker's goodbye (or death)."""
        if self._identity is None:
            return True
        deadline = Deadline.after(GOODBYE_SECONDS)
        while not self.gone and not deadline.passed:
            # Its failure is no news any more: the outcome is decided.
            with contextlib.suppress(UpdateError, ProtocolError):
                self._reactor.wait(lambda: self.gone, deadline)
        return self.gone

    def close(self) -> None:
        """Closes and removes the sockets. Idempotent."""
        self._reactor.remove(self._zmq)
        self._zmq.close(linger=0)
        if self._listener is not None:
            self._reactor.remove(self._listener.fileno())
            self._listener.close()
            self._listener = None
        for lifeline in self._lifelines:
            self._reactor.remove(lifeline.sock.fileno())
            lifeline.sock.close()
        self._lifelines.clear()
        for path in (self._path, f"{self._path}.life"):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)

    @property
    def touched(self) -> bool:
        """Whether the worker may have loaded something."""
        return self.announced >= 0

    @property
    def connected(self) -> bool:
        return self._identity is not None

    # What the worker says

    def _on_connection(self) -> None:
        """Accepts everybody who waits."""
        while self._listener is not None:
            try:
                sock, _ = self._listener.accept()
            except BlockingIOError:
                return
            try:
                lifeline = _Lifeline(sock, check_peer(sock))
            except ProtocolError as error:
                logger.warning("%s", error)
                sock.close()
                continue
            sock.setblocking(False)
            self._lifelines.append(lifeline)
            self._reactor.add(sock.fileno(), partial(self._on_lifeline, lifeline))

    def _read(self, lifeline: _Lifeline) -> bool:
        """Reads an identity from it; False at EOF."""
        try:
            data = lifeline.sock.recv(4096)
        except BlockingIOError:
            return True
        except ConnectionError:
            data = b""
        # A worker says no more than that; who does is a stranger.
        lifeline.identity = (lifeline.identity + data)[: IDENTITY_NBYTES + 1]
        if len(lifeline.identity) == IDENTITY_NBYTES:
            self._known.add(lifeline.identity)
        return bool(data)

    def _knows(self, identity: bytes) -> bool:
        """Whether it came over a lifeline. A worker's message may be here before its lifeline was read."""
        if identity not in self._known:
            self._on_connection()
            for lifeline in self._lifelines:
                self._read(lifeline)
        return identity in self._known

    def _on_lifeline(self, lifeline: _Lifeline) -> None:
        if self._read(lifeline):
            self._start()
            return
        # EOF. Read first what the worker said before it went.
        self._reactor.remove(lifeline.sock.fileno())
        self._lifelines.remove(lifeline)
        lifeline.sock.close()
        lost = False
        try:
            while not self.gone and self._zmq.poll(50):
                self._on_message()
        finally:
            # Also after its Failure: nobody must wait for its goodbye.
            if lifeline.identity == self._identity and not self.gone:
                self.gone = lost = True
            elif self._identity is None and len(lifeline.identity) == IDENTITY_NBYTES:
                lost = True  # it died before its Hello was out
        if lost:
            self.died = not self._reported
            raise self._lost(lifeline.pid)

    def _lost(self, pid: int) -> PeerLost:
        """Says where the worker was: the session may be far ahead of it, or still meeting other ranks."""
        stage, bucket = "handshake", None
        if self.finished:
            stage = "decide"
        elif self.released:
            stage = "post_hook"
        elif self._finishing and self.done == self.announced:
            stage = "release"
        elif self.ready:
            stage, bucket = "buckets", self.done + 1 if self.done < self.announced else None
        record = ErrorRecord(
            error_type="PeerLost",
            message=f"the worker of device {self._uuid} (pid {pid}) died or closed its connection",
            stage=stage,
            device=self._uuid,
            bucket=bucket,
            tensors=() if bucket is None else messages.names_of(self._layouts[bucket]),
        )
        return PeerLost(record)

    def _on_message(self) -> None:
        while True:
            try:
                frames = self._zmq.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            if not self._knows(frames[0]):
                logger.warning("dropped a message to %s: its sender has no lifeline", self.handle)
                continue
            if len(frames) != 2:
                raise ProtocolError(f"a worker's message has {len(frames)} frames")
            self._take(frames[0], messages.decode_worker_message(frames[1]))

    def _take(self, identity: bytes, message: messages.WorkerMessage) -> None:
        if isinstance(message, messages.Failure):
            self._failed(message)
        if isinstance(message, messages.Hello):
            self._hello(identity, message)
            return
        if identity != self._identity:
            raise ProtocolError(f"{type(message).__name__} from a process that has not said hello")
        if not self._in_turn(message):
            raise ProtocolError(f"the worker of device {self._uuid} sent {message} out of turn")
        if isinstance(message, messages.Ready):
            self._ring_of_update().accept_events(message.given_back)
            self.ready = True
        elif isinstance(message, messages.BucketDone):
            self.done = message.index
        elif isinstance(message, messages.Released):
            self.released = True
        elif isinstance(message, messages.Finished):
            self.finished = True
        else:
            self.gone = self.heard = True

    def _in_turn(self, message: messages.WorkerMessage) -> bool:
        if isinstance(message, messages.Ready):
            return self._begun and not self.ready
        if isinstance(message, messages.BucketDone):
            return self.done + 1 == message.index <= self.announced
        if isinstance(message, messages.Released):
            return self._finishing and not self.released
        if isinstance(message, messages.Finished):
            return self._freed and not self.finished
        return self._told

    def _hello(self, identity: bytes, hello: messages.Hello) -> None:
        if hello.protocol != messages.PROTOCOL_VERSION:
            raise ProtocolError(
                f"the worker speaks protocol {hello.protocol}, this parameter server "
                f"{messages.PROTOCOL_VERSION}: install the same ckpt-engine on both sides"
            )
        if hello.device_uuid and hello.device_uuid != self._uuid:
            raise ProtocolError(
                f"the worker of device {hello.device_uuid} connected to {self._uuid}'s handle"
            )
        if self._identity is not None:
            raise ProtocolError(f"two workers connected to the handle of device {self._uuid}")
        self._identity = identity
        self.worker_pid = hello.pid
        self._start()

    def _ring_of_update(self) -> Ring:
        if self._ring is None:
            raise ProtocolError("the worker speaks of a ring that it was not given")
        return self._ring

    def _start(self) -> None:
        """Sends Begin once the worker has said hello and its lifeline is there."""
        lifeline = next((line for line in self._lifelines if line.identity == self._identity), None)
        if lifeline is None:
            return
        if self._abort_frame is not None:
            self._send_abort(lifeline)  # it came after the others were told
            return
        if self._begin is None or self._ring is None:
            return
        try:
            socket.send_fds(lifeline.sock, [b"r"], self._ring.descriptors())
        except ConnectionError:
            return  # it died: the reactor reads that from its lifeline
        self._send(self._begin)
        self._begin, self._begun = None, True

    def _failed(self, failure: messages.Failure) -> None:
        self._reported = True
        record = ErrorRecord(
            error_type=failure.error_type,
            message=failure.message,
            stage=failure.stage,
            device=failure.device_uuid or self._uuid,
            bucket=failure.bucket,
            tensors=failure.tensors,
            left_out=failure.left_out,
            traceback=failure.traceback,
        )
        raise UpdateError(record, touched=failure.touched)

    def _send(self, message: messages.ServerMessage) -> None:
        assert self._identity is not None
        self._zmq.send_multipart([self._identity, messages.encode(message)])
