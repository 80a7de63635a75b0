"""Both ends of the protocol: the real ones, and raw ones that say whatever a test wants.

Run as a program, it is a parameter server: `python ends_for_ipc_tests.py BASE` prints its handle, leads its
worker through the first bucket and then does nothing more, so that a test can kill it.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import zmq

from ckpt_engine.deadline import Deadline
from ckpt_engine.devices import SharedRing
from ckpt_engine.devices.handles import SharedMemoryRing
from ckpt_engine.ipc import messages
from ckpt_engine.ipc.messages import Begin, BucketLayout, TensorLayout
from ckpt_engine.ipc.reactor import Reactor
from ckpt_engine.ipc.receiver import Prepare, Run, WorkerReport, update_weights_from_ipc
from ckpt_engine.ipc.sender import WorkerChannel
from ckpt_engine.ipc.sockets import SocketDirectory

UUID = "CPU-here-0"
SECONDS = 20.0
"""For waits that end at once when the code is right; no test takes that long unless it fails."""
PROMPT_SECONDS = 5.0
"""What a death may cost, on a loaded machine; far below every deadline of an update."""
SLOT_NBYTES = 64 * 1024
TENSORS = {
    "a": torch.arange(3000, dtype=torch.int32).reshape(30, 100),
    "b": torch.linspace(-1, 1, 1000).to(torch.bfloat16),
    "c": torch.tensor(7.0),
}


def begin_of(tensors: Mapping[str, torch.Tensor], nbytes: int = 2 * SLOT_NBYTES, budget: float = 60) -> Begin:
    """One bucket for each tensor, the slots in turn."""
    buckets = tuple(
        BucketLayout(
            index % 2 * SLOT_NBYTES,
            SLOT_NBYTES,
            (
                TensorLayout(
                    name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), 64, tensor.nbytes
                ),
            ),
        )
        for index, (name, tensor) in enumerate(tensors.items())
    )
    ring = SharedMemoryRing(nbytes=nbytes)
    return Begin(session="s", checkpoint="weights", version="3", ring=ring, buckets=buckets, budget=budget)


class Sender:
    """The parameter server's end: a real channel and ring, walked through an update step by step."""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        base: Path,
        tensors: Mapping[str, torch.Tensor] = TENSORS,
    ) -> None:
        self.tensors = list(tensors.values())
        self.directory = SocketDirectory(base)
        self.reactor = Reactor()
        self.channel = WorkerChannel(context, self.directory, UUID, self.reactor)
        self.handle = self.channel.handle
        self.ring = SharedRing.create(2 * SLOT_NBYTES)
        self.plan = begin_of(tensors)
        self.between: Callable[[], object] = lambda: None

    def until(self, done: Callable[[], bool], what: str) -> None:
        assert self.reactor.wait(done, Deadline.after(SECONDS), 0.05), f"waited in vain for {what}"

    def begin(self) -> None:
        self.channel.begin(self.plan, self.ring)
        self.until(lambda: self.channel.ready, "Ready")

    def move(self, first: int = 0, last: int | None = None) -> None:
        """Buckets `first` up to `last`, one at a time."""
        for index, tensor in list(enumerate(self.tensors))[first:last]:
            self.between()
            # In no variable: the traceback of a failure would keep the ring mapped, which tests look at.
            self.ring.view(self.plan.buckets[index].ring_offset + 64, tensor.nbytes).copy_(
                tensor.reshape(-1).view(torch.uint8)
            )
            self.channel.beat()
            self.channel.announce(index)
            self.until(lambda index=index: self.channel.done == index, f"BucketDone({index})")

    def end(self) -> None:
        self.between()
        self.channel.finish()
        self.until(lambda: self.channel.released, "Released")
        self.channel.beat()
        self.channel.freed()
        self.until(lambda: self.channel.finished, "Finished")
        self.between()
        self.channel.commit(self.plan.version)
        assert self.channel.wait_until_gone(), "waited in vain for Goodbye"

    def update(self) -> None:
        self.begin()
        self.move()
        self.end()

    def close(self) -> None:
        self.channel.close()
        self.ring.close()
        self.directory.close()

    def __enter__(self) -> Sender:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Receiver:
    """The worker's end, in a thread; `result` is its report or what it raised."""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        handle: str,
        *,
        run: Run | None = None,
        prepare: Prepare | None = None,
        post_hook: Callable[[], object] | None = None,
        device_uuid: str = UUID,
        time_limit: float | None = None,
    ) -> None:
        self.loaded: dict[str, torch.Tensor] = {}
        self.threw: BaseException | None = None
        self.report: WorkerReport | None = None

        def load(tensors: list[tuple[str, torch.Tensor]]) -> None:
            self.loaded |= {name: tensor.clone() for name, tensor in tensors}

        def target() -> None:
            try:
                self.report = update_weights_from_ipc(
                    context,
                    handle,
                    None,
                    run=run or load,
                    prepare=prepare,
                    post_hook=post_hook,
                    device_uuid=device_uuid,
                    time_limit=time_limit,
                )
            except BaseException as error:  # noqa: BLE001 - a test looks at it
                self.threw = error

        self.thread = threading.Thread(target=target, daemon=True)
        self.thread.start()

    def error(self, seconds: float = SECONDS) -> BaseException:
        self.join(seconds)
        assert self.threw is not None, f"it must raise, but returned {self.report}"
        return self.threw

    def join(self, seconds: float = SECONDS) -> None:
        self.thread.join(seconds)
        assert not self.thread.is_alive(), f"the receiver has not left its loop after {seconds} s"


class WorkerProcess:
    """A process of `tests.support.worker`, which serves device UUID; one update at a time."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.worker"],
            cwd=Path(__file__).parents[3],
            env=os.environ | {"CKPT_ENGINE_DEVICE_UUID": UUID},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.pid = self.answer()["pid"]

    def ask(self, handles: Mapping[str, str], **fault: Any) -> None:  # noqa: ANN401 - JSON
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"handles": list(handles.items()), "fault": fault}) + "\n")
        self.process.stdin.flush()

    def answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline())

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


class RawWorker:
    """Connects as a worker does and says what it is told to. A stranger has no lifeline."""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        handle: str,
        *,
        lifeline: bool = True,
        hello: bool = True,
    ) -> None:
        identity = os.urandom(16).hex().encode()
        self.lifeline: socket.socket | None = None
        if lifeline:
            self.lifeline = connect(handle + ".life")
            self.lifeline.sendall(identity)
        self.zmq = context.socket(zmq.DEALER)
        self.zmq.setsockopt(zmq.ROUTING_ID, identity)
        self.zmq.setsockopt(zmq.LINGER, 0)
        self.zmq.connect(handle)
        if hello:
            self.say(messages.Hello(messages.PROTOCOL_VERSION, UUID, os.getpid()))

    def say(self, *said: messages.WorkerMessage) -> None:
        for message in said:
            self.zmq.send(messages.encode(message))

    def hear(self) -> messages.ServerMessage:
        assert self.zmq.poll(SECONDS * 1000), "waited in vain for a message"
        return messages.decode_server_message(self.zmq.recv())

    def close(self) -> None:
        self.zmq.close(0)
        if self.lifeline is not None:
            self.lifeline.close()


class RawServer:
    """Listens as a parameter server does, and answers the worker's hello with what it is told to."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], base: Path) -> None:
        self.handle = f"ipc://{base}/raw"
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.listener.bind(f"{base}/raw.life")
        self.listener.listen()
        self.listener.settimeout(SECONDS)
        self.zmq = context.socket(zmq.ROUTER)
        self.zmq.bind(self.handle)
        self.identity = b""
        self.lifeline: socket.socket | None = None

    def meet(self) -> None:
        self.lifeline, _ = self.listener.accept()
        assert isinstance(self.hear(), messages.Hello)

    def hear(self) -> messages.WorkerMessage:
        assert self.zmq.poll(SECONDS * 1000), "waited in vain for a message"
        self.identity, frame = self.zmq.recv_multipart()
        return messages.decode_worker_message(frame)

    def say(self, *said: messages.ServerMessage | bytes) -> None:
        for message in said:
            frame = message if isinstance(message, bytes) else messages.encode(message)
            self.zmq.send_multipart([self.identity, frame])

    def give(self, descriptors: list[int]) -> None:
        assert self.lifeline is not None
        socket.send_fds(self.lifeline, [b"r"], descriptors)

    def close(self) -> None:
        self.listener.close()
        self.zmq.close(0)
        if self.lifeline is not None:
            self.lifeline.close()

    def __enter__(self) -> RawServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def connect(handle: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.connect(handle.removeprefix("ipc://"))
    return sock


def ring_maps() -> list[str]:
    """This process's maps of rings."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return [line for line in lines if "memfd:ckpt-engine-ring" in line]


def open_rings() -> int:
    """Descriptors of this process that lead to rings (a map holds one of its own)."""
    return _descriptors("/memfd:ckpt-engine-ring")


def open_sockets_and_rings() -> int:
    """Descriptors of this process that an update may leave behind."""
    return _descriptors("socket:") + open_rings()


def _descriptors(start: str) -> int:
    count = 0
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            count += os.readlink(f"/proc/self/fd/{fd}").startswith(start)
    return count


def wait_for(done: Callable[[], Any], what: str, seconds: float = SECONDS) -> None:
    """For a condition that nothing announces: looks again and again until the deadline."""
    deadline, pause = Deadline.after(seconds), threading.Event()
    while not done():
        assert not deadline.passed, f"waited in vain for {what}"
        pause.wait(0.005)


if __name__ == "__main__":
    sender = Sender(zmq.Context(), Path(sys.argv[1]))
    sys.stdout.write(sender.handle + "\n")
    sys.stdout.flush()
    sender.begin()
    sender.move(last=1)
    sys.stdin.read()
