"""A rank that does what JSON lines on stdin say, and answers each with how that ended; see `steered`.

`update` may be given a fault of this rank, and one of its worker (`steered_worker`):

    {"act": "kill" | "stop" | "raise" | "interrupt" | "terminate", "at": "request" | "buckets" | "restore"}

when its engine is to be asked, when a third of the bytes is loaded, or before it meets the others to restore.
{"act": "unknown", "at": "decide"}: it cannot learn that the update was decided against.
{"act": "clock", "at": "buckets", "by": s}: its wall clock jumps by s seconds.
{"act": "lose" | "twice" | "late" | "close", "message": kind}: what becomes of the first such message to the
worker, or to the control server (`steered_worker.Unreliable`).

`register_files` may be told that reading fails once it has begun: "cut": the file is truncated there; "io":
the kernel says EIO.

`limit`, and `file_limit`: by how many bytes its address space may grow, and how large a file (and so a
memfd) may get, while it does what it is told to.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal

import torch

from ckpt_engine import ParameterServer
from ckpt_engine.errors import ErrorRecord, OutcomeUnknown, UpdateError
from ckpt_engine.ipc.sender import WorkerChannel
from ckpt_engine.metadata import metas_from_json, metas_to_json
from ckpt_engine.settings import Verify
from ckpt_engine.termination import ends_in_order
from ckpt_engine.transport.control import Control
from tests.support.checkpoints import share_of
from tests.support.steered_worker import Unreliable, jump, limit_address_space, say

Fault = dict[str, Any] | None


def act(what: str, where: str, by: float = 0) -> None:
    say(event="fault", at=time.monotonic())
    if what == "raise":
        raise RuntimeError(f"injected in {where}")
    if what == "interrupt":
        raise KeyboardInterrupt
    if what == "clock":
        jump(by)
        return
    if what == "terminate":
        os.kill(os.getpid(), signal.SIGTERM)
        return
    os.kill(os.getpid(), {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}[what])


@contextmanager
def limited(limit: int | None, file_limit: int | None) -> Iterator[None]:
    if limit is not None:
        limit_address_space(limit)
    if file_limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, -1))
    try:
        yield
    finally:
        limit_address_space(-1)
        resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))


class SteeredRankProcess:
    def __init__(self, ps: ParameterServer, engine: str) -> None:
        self.ps = ps
        self.engine = engine
        self.asked = False
        self.error: BaseException | None = None
        self.to_worker, self.to_ranks = Unreliable(), Unreliable()  # of threads of their own
        to_worker, to_ranks = WorkerChannel._send, Control.send

        def send(channel: WorkerChannel, message: Any) -> None:  # noqa: ANN401
            lifeline = next(line for line in channel._lifelines if line.identity == channel._identity)
            self.to_worker.send(message, lambda one: to_worker(channel, one), lifeline.sock)

        def tell(control: Control, message: Any) -> None:  # noqa: ANN401
            self.to_ranks.send(message, lambda one: to_ranks(control, one), control._sock)

        WorkerChannel._send = send  # type: ignore[method-assign]
        Control.send = tell  # type: ignore[method-assign]

    @contextmanager
    def as_it_was(self) -> Iterator[None]:
        try:
            yield
        finally:
            jump(0)
            self.to_worker.forget()
            self.to_ranks.forget()

    def register(
        self,
        name: str,
        kind: str,
        seed: int,
        parts: list[int],
        of: int,
        limit: int | None = None,
        digests: bool | None = None,
    ) -> None:
        share = share_of(kind, seed, parts, of)
        with limited(limit, None):
            self.ps.register_checkpoint(name, named_tensors=share, digests=digests)

    def flip(self, name: str, buffer: int, number: int, byte: int) -> dict[str, str]:
        """A bit of one of the registered tensors; its name."""
        held = self.ps._registry.get(name)
        tensor = held.buffers[buffer].tensors[number]
        held.view(buffer, tensor.offset + byte, 1)[0] ^= 1
        return {"tensor": tensor.name}

    def register_files(self, name: str, files: list[str], reading: str = "") -> None:
        real = os.preadv

        def preadv(descriptor: int, targets: Any, offset: int) -> int:  # noqa: ANN401
            say(event="fault", at=time.monotonic())
            if reading == "cut":
                os.truncate(files[-1], offset)
                return real(descriptor, targets, offset)
            with open("/proc/self/mem", "rb") as nothing:  # whose first page cannot be read
                return real(nothing.fileno(), targets, 0)

        os.preadv = preadv if reading else real
        try:
            self.ps.register_checkpoint(name, files=files)
        finally:
            os.preadv = real

    def unregister(self, name: str, force: bool = False) -> None:
        self.ps.unregister_checkpoint(name, force=force)

    def gather(self, name: str, ranks: list[int] | None = None) -> None:
        self.ps.gather_metas(name, timeout=120, ranks=ranks)

    def load_metas(self, texts: list[str]) -> None:
        self.ps.load_metas([metas_from_json(text) for text in texts])

    def metas(self) -> dict[str, Any]:
        """What was gathered last, as JSON."""
        return {"metas": metas_to_json(self.ps.get_metas()).decode()}

    def forge(self, name: str) -> None:
        """From now on this rank believes that it gathered one tensor less."""
        known, rank = self.ps._gathered._by_name[name], self.ps.rank
        held = known.metas[rank]
        first = held.buffers[0]
        less = held.model_copy(
            update={"buffers": (first.model_copy(update={"tensors": first.tensors[1:]}), *held.buffers[1:])}
        )
        self.ps._gathered._by_name[name] = replace(
            known, metas=known.metas | {rank: less}, layouts={**known.layouts, rank: "forged"}
        )

    def state(self) -> dict[str, Any]:
        """What lies between updates."""
        me = self.ps._me
        return {
            "threads": sorted(thread.name for thread in threading.enumerate()),
            "sockets": sorted(os.listdir(me.directory.path)) if me else [],
            "names": self.ps.checkpoint_names,
            "metas": sorted(self.ps.get_metas()),
            "weights": self.ps.weights.to_dict(),
        }

    def update(
        self,
        name: str,
        ranks: list[int] | None = None,
        wait: bool = True,
        fault: Fault = None,
        worker_fault: Fault = None,
        limit: int | None = None,
        file_limit: int | None = None,
        keep: bool = False,
        version: str | None = None,
        on_failure: Literal["raise", "restore"] = "raise",
        always: bool = False,
        verify: Verify | None = None,
    ) -> dict[str, Any]:
        """`wait`: whether req_func waits for the engine's answer, or returns at once. `always`: the worker
        meets with its fault in the restore, too."""
        faults, of_worker = [fault] if fault and "at" in fault else [], worker_fault
        for one in (self.to_worker, self.to_ranks):
            one.fault = fault if fault and "message" in fault else {}

        def on_progress(done: int, total: int) -> None:
            if faults and faults[0]["at"] == "buckets" and done >= total // 3:
                fault = faults.pop()
                act(fault["act"], "on_progress", fault.get("by", 0))

        def req_func(paths: list[tuple[str, str]]) -> None:
            nonlocal of_worker
            if faults and faults[0]["at"] == "request":
                act(faults.pop()["act"], "req_func")
            self.asked = True
            worker_fault, of_worker = of_worker, of_worker if always else None
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as engine:
                engine.connect(self.engine)
                with engine.makefile("rw") as lines:
                    lines.write(json.dumps({"handles": paths, "fault": worker_fault}) + "\n")
                    lines.flush()
                    answer = lines.readline() if wait else '{"outcome": "unknown"}'
            if not answer:
                raise RuntimeError("the engine lost its worker")
            status = json.loads(answer)
            if status["outcome"] == "failed":
                raise RuntimeError(f"the engine says: {status['error']}")

        with limited(limit, file_limit), self.control_with(fault), self.as_it_was():
            report = self.ps.update(
                name,
                req_func,
                timeout=120,
                ranks=ranks,
                keep=keep,
                on_progress=on_progress,
                version=version,
                on_failure=on_failure,
                verify=verify,
            )
        return {
            "version": report.version,
            "buckets": report.buckets,
            "content": report.content,
            "transport": report.transport,
            "p2p_nbytes": report.p2p_nbytes,
            "lost_sources": report.lost_sources,
            "kept_nbytes": report.kept_nbytes,
        }

    @contextmanager
    def control_with(self, fault: Fault) -> Iterator[None]:
        """The control plane, with what this rank meets there."""
        me = self.ps._me
        place = (fault or {}).get("at")
        if me is None or fault is None or place not in ("restore", "decide"):
            yield
            return
        real = me.control.open_round

        def open_round(purpose: str, *of: Any, **by: Any) -> Any:  # noqa: ANN401
            if place == "restore" and purpose.startswith("restore after"):
                act(fault["act"], "open_round")
            round_ = real(purpose, *of, **by)
            if place == "decide":
                abort = round_.abort

                def unknown(record: ErrorRecord) -> None:
                    abort(record)
                    say(event="fault", at=time.monotonic())
                    message = "cannot learn the outcome"
                    raise OutcomeUnknown(
                        ErrorRecord(error_type="OutcomeUnknown", message=message, stage="decide")
                    )

                round_.abort = unknown  # type: ignore[method-assign, assignment]
            return round_

        me.control.open_round = open_round  # type: ignore[method-assign]
        try:
            yield
        finally:
            me.control.open_round = real  # type: ignore[method-assign]

    def do(self, what: str, arguments: dict[str, Any]) -> dict[str, Any]:
        answer: dict[str, Any] = {"error": None, "message": ""}
        self.asked, self.error = False, None
        say(event="started", at=time.monotonic())
        try:
            answer |= getattr(self, what)(**arguments) or {}
        except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001 - what was raised is the answer
            self.error = error
            answer |= {"error": type(error).__name__, "message": str(error)}
            if isinstance(error, UpdateError):
                answer |= {"record": error.record.to_dict(), "touched": error.touched}
                answer |= {"restored": error.restored}
        return answer | {"ended": time.monotonic(), "asked": self.asked}


def main() -> None:
    torch.set_num_threads(1)
    with ends_in_order(), ParameterServer(device="cpu") as ps:
        rank = SteeredRankProcess(ps, sys.argv[1])
        for line in sys.stdin:
            request = json.loads(line)
            what = request.pop("do")
            if what == "end":
                if rank.error is not None:
                    # As in a program that does not catch it.
                    raise rank.error
                return
            say(**rank.do(what, request))


if __name__ == "__main__":
    main()
