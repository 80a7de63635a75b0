"""A rank under torchrun: a real ParameterServer and a real worker process, through a list of scenarios.

Every scenario is an update (or a misuse of the API) that all ranks walk through together; what each
rank saw goes to `{out}/rank-{r}.json` as {scenario: {...}}. A fault hits one rank; the others must learn.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ckpt_engine import ParameterServer
from ckpt_engine.checkpoint import split_checkpoint
from ckpt_engine.deadline import Deadline
from ckpt_engine.errors import UpdateError
from ckpt_engine.server.engine_client import request_inference_to_update
from tests.support.worker import digest

TIMEOUT = 60.0
VICTIM_BUCKETS = {"first": 0, "middle": 2, "last": -1}


class Worker:
    """The worker process of this rank's device."""

    module = "tests.support.worker"
    index_variable = "CKPT_ENGINE_CPU_DEVICES"
    """How it is told which device is its own."""

    def __init__(self, local_rank: int, **environment: str) -> None:
        env = os.environ | {self.index_variable: str(local_rank)} | environment
        self.process = subprocess.Popen(
            [sys.executable, "-m", self.module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=env,
        )
        self.pid = self._read()["pid"]
        self.last: dict[str, Any] = {}
        self.asked = False

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the engine lost its worker (status {self.process.wait()})")
        return json.loads(line)

    def update(self, handles: list[tuple[str, str]], fault: dict[str, Any] | None) -> None:
        assert self.process.stdin is not None
        self.asked = True
        self.process.stdin.write(json.dumps({"handles": handles, "fault": fault}) + "\n")
        self.process.stdin.flush()
        self.last = self._read()
        if self.last["status"]["outcome"] != "committed":
            raise RuntimeError(f"the engine says: {self.last['status']['error']}")

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


def meet(out: Path, what: str, rank: int, size: int) -> None:
    """Waits until all ranks are here, by other means than those that are tested."""
    here = [out / f"{what}-{number}" for number in range(size)]
    here[rank].touch()
    deadline = Deadline.after(TIMEOUT)
    while not all(file.exists() for file in here):
        assert not deadline.passed, what
        time.sleep(0.01)


class Rank:
    def __init__(self, ps: ParameterServer, worker: Worker, out: Path) -> None:
        self.ps = ps
        self.worker = worker
        self.out = out
        self.results: dict[str, Any] = {}

    def record(self, scenario: str, call: Callable[[], Any]) -> None:
        """Runs `call`, and writes down how it ended."""
        started = time.monotonic()
        entry: dict[str, Any] = {"error": None}
        self.worker.asked = False
        try:
            report = call()
            if report is not None:
                entry["version"], entry["buckets"] = report.version, report.buckets
        except Exception as error:  # noqa: BLE001 - what was raised is the result
            entry["error"] = type(error).__name__
            entry["message"] = str(error)
            if isinstance(error, UpdateError):
                entry["record"] = error.record.to_dict()
                entry["touched"] = error.touched
        entry["seconds"] = time.monotonic() - started
        entry["worker"] = self.worker.last
        entry["asked"] = self.worker.asked
        entry["threads"] = [thread.name for thread in threading.enumerate()]
        entry["sockets"] = sorted(os.listdir(self.ps._me.directory.path)) if self.ps._me else []
        entry["fds"] = len(os.listdir("/proc/self/fd"))
        self.results[scenario] = entry

    def save(self) -> None:
        (self.out / f"rank-{self.ps.rank}.json").write_text(json.dumps(self.results))

    def together(self, what: str) -> None:
        meet(self.out, what, self.ps.rank, self.ps.world_size)

    def skip_a_call(self, name: str) -> None:
        """The last rank leaves out an update that the others call; it goes on when they have given up."""
        if self.ps.rank < self.ps.world_size - 1:
            self.record("skipped by one", self.update(name, timeout=3))
        self.together("skipped")

    def update(
        self,
        name: str,
        fault: dict[str, Any] | None = None,
        fails: str = "",
        ranks: list[int] | None = None,
        timeout: float = TIMEOUT,
    ) -> Callable[[], Any]:
        """An update; `fault` hits the worker of the last rank, `fails` its req_func."""
        victim = self.ps.rank == self.ps.world_size - 1

        def req_func(paths: list[tuple[str, str]]) -> None:
            if victim and fails == "raise":
                raise ValueError("req_func gave up")
            if victim and fails:
                request_inference_to_update(fails, paths, timeout=5)
            self.worker.update(paths, fault if victim else None)

        return lambda: self.ps.update(name, req_func, timeout=timeout, ranks=ranks)


def broken_files(directory: Path, good: Path) -> dict[str, Path]:
    """A file that is not there, one cut short, and one whose header claims more than there is."""
    directory.mkdir()
    data = min(good.glob("*.safetensors")).read_bytes()
    (directory / "truncated.safetensors").write_bytes(data[:-1000])
    header = json.dumps({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 9]}}).encode()
    (directory / "lying.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(9))
    return {kind: directory / f"{kind}.safetensors" for kind in ("missing", "truncated", "lying")}


def main() -> None:
    out, first, second, refusing, broken = (Path(sys.argv[1]), *map(Path, sys.argv[2:4]), *sys.argv[4:6])
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(1)
    hosts = int(os.environ.get("TEST_HOSTS", "1"))
    if hosts > 1:
        os.environ["CKPT_ENGINE_HOST_ID"] = f"host{rank * hosts // size}"
    kind = os.environ.get("TEST_DEVICE", "cpu")
    gpus = int(os.environ.get("TEST_GPUS", "1")) if kind == "cuda" else None
    environment = {}
    if gpus is not None:
        environment["TEST_GPU"] = str(rank % gpus)
        if gpus < size:
            # Ranks share a GPU: its own UUID would be there twice.
            os.environ["CKPT_ENGINE_DEVICE_UUID"] = f"GPU-test-{rank}"
    worker = Worker(rank % int(os.environ["LOCAL_WORLD_SIZE"]), **environment)
    with ParameterServer(device=kind, gpu_count=gpus) as ps:
        me = Rank(ps, worker, out)
        try:
            me.record("update before gather", me.update("a"))
            ps.register_checkpoint("a", files=split_checkpoint(first, rank, size))
            me.record("registered, not gathered", me.update("a"))
            ps.gather_metas("a")
            me.record("first", me.update("a"))
            for kind, file in broken_files(out / f"broken-{rank}", first).items():
                # The last rank's share is broken; the others' are good.
                files = [file] if rank == size - 1 else split_checkpoint(first, rank, size)
                me.record(f"register {kind}", lambda files=files: ps.register_checkpoint("bad", files=files))
                me.record(f"gather {kind}", lambda: ps.gather_metas("bad"))
                ps.unregister_checkpoint("bad")
                me.record(f"after {kind}", me.update("a"))
            me.record("gather unknown", lambda: ps.gather_metas("nobody"))
            ps.register_checkpoint("b", files=split_checkpoint(second, rank, size))
            ps.gather_metas("b")
            me.record("second", me.update("b"))
            me.record("back", me.update("a"))
            me.record("slow", me.update("b", {"kind": "slow"}))
            me.record("writes", me.update("a", {"kind": "writes"}))
            last = me.results["first"]["buckets"] - 1
            for place, bucket in VICTIM_BUCKETS.items():
                fault = {"kind": "run", "bucket": last if bucket < 0 else bucket, "action": "raise"}
                me.record(f"raise in {place} bucket", me.update("b", fault))
                me.record(f"after raise in {place} bucket", me.update("b" if place == "middle" else "a"))
            me.record("raise in post_hook", me.update("b", {"kind": "post_hook", "action": "raise"}))
            me.record("after raise in post_hook", me.update("b"))
            me.record("missing handle", me.update("a", {"kind": "missing"}))
            me.record("after missing handle", me.update("b"))
            me.record("req_func raises", me.update("a", fails="raise"))
            me.record("after req_func raises", me.update("a"))
            me.record("engine refuses", me.update("a", fails=str(refusing)))
            me.record("after engine refuses", me.update("b"))
            me.record("engine answers 500", me.update("a", fails=str(broken)))
            me.record("after engine answers 500", me.update("a"))
            me.record("mistake of one", me.update("b", ranks=[99] if rank == size - 1 else None))
            # The call that the others are still to make is not the next one of the rank that was wrong.
            me.together("mistaken")
            me.record("after mistake of one", me.update("b"))
            if size > 1:
                me.skip_a_call("b")
            me.record("after skipped by one", me.update("a"))
            ps.unregister_checkpoint("b")
            me.record("unregistered", me.update("b"))
            ps.unregister_checkpoint("never there")
            # Weights made in this process, changed and registered again under the same name.
            ps.register_checkpoint(
                "b", named_tensors={f"rank{rank}.weight": torch.full((1000,), float(rank))}
            )
            # Each rank changed its share since it gathered: nothing may be sent from old metas.
            me.record("not gathered again", me.update("b"))
            ps.gather_metas("b")
            me.record("tensors", me.update("b"))
            me.results["expected"] = {
                f"rank{r}.weight": digest(torch.full((1000,), float(r))) for r in range(size)
            }
        finally:
            worker.close()
            me.save()


if __name__ == "__main__":
    main()
