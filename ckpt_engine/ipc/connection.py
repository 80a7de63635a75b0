"""The worker's connection to its parameter server: a ZeroMQ socket for messages, a lifeline beside it."""

from __future__ import annotations

import os
import socket

import zmq

from ckpt_engine.deadline import Deadline
from ckpt_engine.errors import ConfigError, ErrorRecord, PeerLost, UpdateTimeout
from ckpt_engine.ipc import messages
from ckpt_engine.ipc.sockets import IDENTITY_NBYTES, receive_descriptors, tune

LEAVE_SECONDS = 5.0
"""How long a failed worker waits for the parameter server to have read why."""


class ServerConnection:
    """The worker's two channels to its parameter server, behind one `ipc://` handle.

    Raises:
        ConfigError: the handle is no such address.
        PeerLost: nobody listens there any more.
    """

    def __init__(self, zmq_ctx: zmq.Context[zmq.Socket[bytes]], handle: str) -> None:
        path = handle.removeprefix("ipc://")
        if path == handle:
            raise ConfigError(f"handle {handle!r}: expected an address such as 'ipc:///path'")
        identity = os.urandom(IDENTITY_NBYTES // 2).hex().encode()
        self.zmq = zmq_ctx.socket(zmq.DEALER)
        self.lifeline = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            # First: a ZeroMQ socket would try for ever to reach an address that is gone.
            self.lifeline.connect(f"{path}.life")
            self.lifeline.sendall(identity)
        except OSError as error:
            self.zmq.close()
            self.lifeline.close()
            message = f"nobody listens on {handle} any more ({error}): that update has ended"
            raise _lost(message, touched=False) from None
        tune(self.zmq, messages.MAX_MESSAGE_NBYTES)
        self.zmq.setsockopt(zmq.ROUTING_ID, identity)
        # close() must not drop a Failure that is still on its way.
        self.zmq.setsockopt(zmq.LINGER, int(LEAVE_SECONDS * 1000))
        self.zmq.connect(handle)
        self._poller = zmq.Poller()
        self._poller.register(self.zmq, zmq.POLLIN)
        self._poller.register(self.lifeline, zmq.POLLIN)
        self._descriptors: list[int] = []
        self._descriptors_due = True

    def send(self, message: messages.WorkerMessage) -> None:
        self.zmq.send(messages.encode(message))

    def receive(self, deadline: Deadline, waiting_for: str) -> messages.ServerMessage:
        """The next message. Raises UpdateTimeout at the deadline, PeerLost when the other side is gone."""
        while True:
            # In slices: no poll takes the milliseconds of an update without end.
            ready = dict(self._poller.poll(int(min(deadline.remaining, 60.0) * 1000) + 1))
            if self.zmq in ready:
                return messages.decode_server_message(self.zmq.recv())
            if ready and not self._read_lifeline():
                # EOF. What it sent before it went may still be on its way through ZeroMQ.
                if self.zmq.poll(200):
                    continue
                raise _lost(f"the parameter server died while this worker waited for {waiting_for}")
            if deadline.passed:
                record = ErrorRecord(
                    error_type="UpdateTimeout",
                    message=f"no answer from the parameter server while waiting for {waiting_for}",
                )
                raise UpdateTimeout(record)

    def _read_lifeline(self) -> bool:
        """Takes what can be read; False at EOF."""
        try:
            data, descriptors = receive_descriptors(self.lifeline, 64)
        except ConnectionError:  # closed by the other side before it read all of ours
            return False
        self._descriptors += descriptors
        self._descriptors_due = self._descriptors_due and not data
        return bool(data)

    def receive_descriptors(self) -> list[int]:
        """The descriptors that the parameter server sent ahead of its Begin; now the caller's to close."""
        lifeline = zmq.Poller()
        lifeline.register(self.lifeline, zmq.POLLIN)
        while self._descriptors_due:
            if not lifeline.poll(int(LEAVE_SECONDS * 1000)) or not self._read_lifeline():
                raise _lost("the parameter server announced a ring, but its descriptors did not come")
        descriptors, self._descriptors = self._descriptors, []
        return descriptors

    def close(self) -> None:
        self.zmq.close()
        self.lifeline.close()
        # Of a Begin that never came.
        for fd in self._descriptors:
            os.close(fd)
        self._descriptors.clear()


def _lost(message: str, *, touched: bool | None = None) -> PeerLost:
    return PeerLost(ErrorRecord(error_type="PeerLost", message=message), touched=touched)
