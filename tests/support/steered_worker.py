"""A worker that serves one update after another; see `steered.SteeredWorker`.

Whoever connects to its socket says {"handles": [[uuid, handle], ...], "fault": {...}} on one line, and gets
the outcome on another; the test gets it on stdout. A fault is what to do, and where:

    {"act": "kill" | "stop" | "raise", "at": "begin" | "hello" | "map" | "bucket" | "post_hook" |
        "commit", "bucket": i}
    {"act": "flip", "at": "bucket", "bucket": i}     a bit of that bucket's first tensor, as it is loaded
    {"act": "limit", "nbytes": n}     the address space may grow by n bytes only, while the update lasts
    {"act": "flip", "at": "slot", "bucket": i}     a bit of the ring, when that bucket is announced
    {"act": "clock", "at": ..., "by": s}     the wall clock jumps by s seconds, until the update ends
    {"act": "lose" | "twice" | "late" | "close", "message": "Ready" ...}     what becomes of the first such

`raise` is for the engine's own code: a bucket's reload, and the post hook.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import zmq

from ckpt_engine.devices import cpu_uuid, map_ring
from ckpt_engine.ipc import messages, receiver
from ckpt_engine.ipc.connection import ServerConnection
from ckpt_engine.settings import load_settings
from tests.support.worker import digest


def say(**what: object) -> None:
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()


def limit_address_space(nbytes: int) -> None:
    """By how much it may grow from now on; -1: without limit."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = nbytes if nbytes < 0 else pages * resource.getpagesize() + nbytes
    resource.setrlimit(resource.RLIMIT_AS, (limit, -1))


_time = time.time


def jump(seconds: float) -> None:
    """The wall clock of this process stands so far off from now on."""
    time.time = lambda: _time() + seconds


class Unreliable:
    """What carries messages, and does with the first of one kind what `fault` says:
    {"act": "lose" | "twice" | "late" | "close", "message": kind}. Late: behind the next one; close: the
    connection, in its place."""

    def __init__(self) -> None:
        self.fault: dict[str, Any] = {}
        self._held: list[Callable[[], object]] = []

    def send(self, message: Any, pass_on: Callable[[Any], object], connection: socket.socket) -> None:  # noqa: ANN401
        if self.fault.get("message") != type(message).__name__:
            pass_on(message)
            while self._held:
                self._held.pop()()
            return
        act, self.fault = self.fault["act"], {}
        say(event="fault", at=time.monotonic())
        if act == "late":
            self._held.append(lambda: pass_on(message))
        elif act == "close":
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        else:
            for _ in range({"lose": 0, "twice": 2}[act]):
                pass_on(message)

    def forget(self) -> None:
        """What was held, and what has not happened."""
        self.fault = {}
        self._held.clear()


class SteeredWorkerProcess:
    def __init__(self, path: str) -> None:
        self.weights: dict[str, torch.Tensor] = {}
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.uuid = cpu_uuid(load_settings(), 0)
        self.fault: dict[str, Any] = {}
        self.flips = False
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.listener.bind(path)
        self.listener.listen()
        self.unreliable = Unreliable()
        self.ring: Any = None
        self.starts: list[int] = []
        real_send, real_receive, real_map = ServerConnection.send, ServerConnection.receive, map_ring

        def send(connection: ServerConnection, message: messages.WorkerMessage) -> None:
            self.unreliable.send(message, lambda one: real_send(connection, one), connection.lifeline)
            if isinstance(message, messages.Hello):
                self.at("hello")

        def receive(connection: ServerConnection, *arguments: Any) -> messages.ServerMessage:  # noqa: ANN401
            message = real_receive(connection, *arguments)
            if isinstance(message, messages.Begin):
                self.starts = [bucket.ring_offset for bucket in message.buckets]
            elif isinstance(message, messages.BucketReady):
                self.at("slot", message.index)
            elif isinstance(message, messages.Commit):
                self.at("commit")
            return message

        def mapped(*arguments: Any) -> Any:  # noqa: ANN401
            self.at("map")
            self.ring = real_map(*arguments)
            return self.ring

        ServerConnection.send = send  # type: ignore[method-assign, assignment]
        ServerConnection.receive = receive  # type: ignore[method-assign, assignment]
        receiver.map_ring = mapped  # type: ignore[attr-defined, assignment]

    def at(self, place: str, bucket: int | None = None) -> None:
        """Here the fault happens, if it is due."""
        if self.fault.get("at") != place or self.fault.get("bucket") != bucket:
            return
        fault, self.fault = self.fault, {}
        act = fault["act"]
        say(event="fault", at=time.monotonic())
        if act == "clock":
            jump(fault["by"])
            return
        if act == "flip" and place == "slot":
            assert bucket is not None
            self.ring.view(self.starts[bucket], 8)[5] ^= 4
            return
        if act == "flip":
            self.flips = True
            return
        if act == "raise":
            raise RuntimeError(f"injected in {place}")
        os.kill(os.getpid(), {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}[act])

    def serve(self) -> None:
        while True:
            engine, _ = self.listener.accept()
            with engine, engine.makefile() as lines:
                request = json.loads(lines.readline())
                status = self.update(request["handles"], request["fault"] or {})
                # The rank that asked may be dead by now, or not wait for this.
                with contextlib.suppress(OSError):
                    engine.sendall(json.dumps(status).encode() + b"\n")

    def update(self, handles: list[list[str]], fault: dict[str, Any]) -> dict[str, Any]:
        self.fault = fault
        seen = 0
        self.flips = False
        self.unreliable.fault = fault if "message" in fault else {}
        self.at("begin")
        if fault.get("act") == "limit":
            limit_address_space(fault["nbytes"])

        def run(tensors: list[tuple[str, torch.Tensor]]) -> None:
            nonlocal seen
            seen += 1
            self.at("bucket", seen - 1)
            for name, tensor in tensors:
                self.weights[name] = tensor.clone()
                if self.flips:
                    self.weights[name].reshape(-1).view(torch.uint8)[5] ^= 16
                    self.flips = False

        status = receiver.serve_update(
            self.context,
            handles,
            self.uuid,
            None,
            run=run,
            post_hook=lambda: self.at("post_hook"),
            loaded=self.weights.get,
        )
        ended = time.monotonic()
        limit_address_space(-1)
        jump(0)
        self.unreliable.forget()
        self.ring = None
        digests = {name: digest(tensor) for name, tensor in self.weights.items()}
        say(status=status, digests=digests, ended=ended, buckets=seen)
        return status


def main() -> None:
    torch.set_num_threads(1)
    worker = SteeredWorkerProcess(sys.argv[1])
    say(pid=os.getpid())
    worker.serve()


if __name__ == "__main__":
    main()
