"""A rank under torchrun on the stand-in for NPUs: a real ParameterServer and a real worker process.

What the rank saw goes to `{out}/rank-{r}.json` as {scenario: {...}}; `free` is the free memory of its device
after each scenario, by every process' count.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ckpt_engine import ParameterServer
from ckpt_engine.checkpoint import split_checkpoint
from ckpt_engine.deadline import Deadline
from ckpt_engine.devices.npu import load as load_npu
from ckpt_engine.errors import UpdateError
from tests.support.rank import Worker, meet

TIMEOUT = 60.0


class NpuWorker(Worker):
    """The worker process of this rank's device."""

    module = "tests.engines.ascend.npu_worker_for_tests"
    index_variable = "TEST_INDEX"


class Rank:
    def __init__(self, ps: ParameterServer, index: int, out: Path) -> None:
        self.ps, self.index, self.out = ps, index, out
        self.worker = NpuWorker(index)
        self.results: dict[str, Any] = {}

    def record(self, scenario: str, call: Callable[[], Any]) -> None:
        started = time.monotonic()
        entry: dict[str, Any] = {"error": None}
        try:
            report = call()
            if report is not None:
                entry["buckets"], entry["version"] = report.buckets, report.version
        except Exception as error:  # noqa: BLE001 - what was raised is the result
            entry |= {"error": type(error).__name__, "message": str(error)}
            if isinstance(error, UpdateError):
                entry["record"] = error.record.to_dict()
        entry["seconds"] = time.monotonic() - started
        group = self.ps._me and self.ps._me.group
        entry["group"] = type(group).__name__ if group else None
        entry["worker"] = self.worker.last
        entry["communicators"] = self.communicators(0 if entry["error"] else 1)
        # Ranks may share the device: none is at it while one looks.
        meet(self.out, f"{scenario} ended", self.ps.rank, self.ps.world_size)
        entry["free"] = load_npu().mem_get_info(self.index)[0]
        meet(self.out, f"{scenario} seen", self.ps.rank, self.ps.world_size)
        self.results[scenario] = entry

    def communicators(self, expected: int) -> int:
        """How many of vllm-ascend's there are; one that is in use ends when its broadcast does."""
        made = sys.modules.get("vllm_ascend.distributed.device_communicators.pyhccl")
        deadline = Deadline.after(TIMEOUT)
        while made is not None and len(made._alive) != expected and not deadline.passed:
            time.sleep(0.01)
        return len(made._alive) if made is not None else 0

    def update(
        self, name: str, fault: dict[str, Any] | None = None, *, asks: bool = True, keep: bool = False
    ) -> Callable[[], Any]:
        """An update; `fault` hits the worker of the last rank, which is not even asked without `asks`."""
        victim = self.ps.rank == self.ps.world_size - 1

        def req_func(paths: list[tuple[str, str]]) -> None:
            if victim and not asks:
                raise ValueError("the engine is not there")
            self.worker.update(paths, fault if victim else None)

        return lambda: self.ps.update(name, req_func, timeout=TIMEOUT, keep_buffers=keep)

    def new_worker(self) -> None:
        self.worker.close()
        self.worker = NpuWorker(self.index)

    def walk(self, first: Path, second: Path) -> None:
        ps = self.ps
        for name, directory in (("a", first), ("b", second)):
            ps.register_checkpoint(name, files=split_checkpoint(directory, ps.rank, ps.world_size))
            ps.gather_metas(name)
        self.record("first", self.update("a"))
        self.record("second", self.update("b"))
        self.record("kept", self.update("a", keep=True))
        self.record("kept again", self.update("b", keep=True))
        self.record("kept no more", self.update("a"))
        self.record("identity", self.update("b", {"kind": "identity", "scenario": "dcmi_fail"}))
        self.record("after identity", self.update("b"))
        self.record("raise", self.update("a", {"kind": "run", "bucket": 2, "action": "raise"}))
        self.record("after raise", self.update("a"))
        self.record("not asked", self.update("b", asks=False))
        self.record("after not asked", self.update("b"))
        self.record("killed", self.update("a", {"kind": "run", "bucket": 1, "action": "exit"}))
        self.new_worker()
        self.record("after killed", self.update("a"))


def main() -> None:
    out, first, second = map(Path, sys.argv[1:4])
    rank = int(os.environ["RANK"])
    torch.set_num_threads(1)
    shared = os.environ.get("TEST_SHARED_NPU")
    if shared:
        os.environ["CKPT_ENGINE_DEVICE_UUID"] = f"NPU-test-{rank}"
    with ParameterServer(device="npu", gpu_count=1 if shared else None) as ps:
        me = Rank(ps, 0 if shared else rank, out)
        me.results["uuid"] = ps._device.uuid()
        try:
            me.walk(first, second)
        finally:
            me.worker.close()
            ps.close()
            me.results["communicators"] = me.communicators(0)
            (out / f"rank-{rank}.json").write_text(json.dumps(me.results))


if __name__ == "__main__":
    main()
