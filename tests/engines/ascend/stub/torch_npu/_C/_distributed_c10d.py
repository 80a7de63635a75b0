"""hccl: gloo over the CPU tensors behind the device's, as work on the current stream."""

from __future__ import annotations

import os
import threading
import time
from datetime import timedelta

import torch
import torch.distributed as dist

from torch_npu.streams import Stream, current_stream
from torch_npu.tensor import NpuTensor


class _Work:
    """Starts when the stream has come to it; `wait` makes the stream wait, not the caller."""

    def __init__(self, group: ProcessGroupHCCL, tensor: torch.Tensor, options: dist.BroadcastOptions) -> None:
        self._group, self._tensor, self._options = group, tensor, options
        self._thread: threading.Thread | None = None
        self._failed: list[Exception] = []
        self._ends = float("inf")

    def _run(self) -> None:
        try:
            self._group.gloo.broadcast([self._tensor], self._options).wait()
        except Exception as error:  # noqa: BLE001 - told when the stream is looked at
            self._failed.append(error)

    def _step(self) -> bool:
        if self._group.aborted:
            raise RuntimeError("HCCL communicator was aborted, error code is 107020")
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="fake-hccl", daemon=True)
            self._thread.start()
            self._ends = time.monotonic() + float(os.environ.get("HCCL_EXEC_TIMEOUT", "1836"))
        self._thread.join(0.001)
        if self._thread.is_alive() and time.monotonic() > self._ends:
            raise RuntimeError("HCCL task timed out (HCCL_EXEC_TIMEOUT), error code is 507048")
        if self._failed:
            raise RuntimeError(f"HCCL broadcast failed: {self._failed[0]}")
        return not self._thread.is_alive()

    def wait(self) -> None:
        self.enqueue(current_stream())

    def enqueue(self, stream: Stream) -> None:
        self._stream = stream
        stream.enqueue(self._step)

    def is_left(self) -> bool:
        """Whether the stream is still to do it, or at it."""
        return self._step in self._stream._tasks


class ProcessGroupHCCL:
    class Options:
        def __init__(self) -> None:
            self.op_timeout = timedelta(seconds=1800)
            self._timeout = timedelta(seconds=1800)
            self.is_high_priority_stream = False
            self.global_ranks_in_group: list[int] = []
            self.hccl_config: dict[str, object] = {}
            self.group_id = ""

    def __init__(self, store: dist.Store, rank: int, size: int, options: ProcessGroupHCCL.Options) -> None:
        self.gloo = dist.ProcessGroupGloo(store, rank, size, options._timeout)
        self.aborted = False

    def broadcast(self, tensors: list[torch.Tensor], options: dist.BroadcastOptions) -> _Work:
        (tensor,) = tensors
        assert isinstance(tensor, NpuTensor), "hccl moves what lies on NPUs"
        return _Work(self, tensor.raw, options)

    def abort_hccl_comm(self, reason: str | None = None) -> None:
        self.aborted = True
