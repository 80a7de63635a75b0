"""vllm-ascend's communicator: its members know each other by an id alone, and it cannot be aborted.

As in all of its releases it has no end of its own: who made one destroys its `comm`, on the comm's own NPU,
when nothing is left to be done by it.
"""

from __future__ import annotations

import ctypes
import os
from datetime import timedelta
from itertools import count
from typing import Any

import torch
import torch.distributed as dist
from torch_npu import memory, npu
from torch_npu._C._distributed_c10d import _Work
from torch_npu.streams import current_stream
from torch_npu.tensor import NpuTensor
from vllm.distributed.utils import StatelessProcessGroup

_alive: dict[int, PyHcclCommunicator] = {}
"""Communicators of this process by their number."""
_numbers = count(1)


class hcclUniqueId(ctypes.Structure):
    _fields_ = [("internal", ctypes.c_byte * 4108)]


class HCCLLibrary:
    def __init__(self, so_file: str | None = None) -> None:
        if os.environ.get("FAKE_NO_HCCL_LIBRARY"):
            raise OSError("libhccl.so: cannot open shared object file")

    def hcclCommDestroy(self, comm: int) -> None:
        communicator = _alive.pop(comm)
        if communicator.device.index != npu.current_device():
            raise RuntimeError("HCCL error: the communicator is of another device than this thread's")
        if any(work.is_left() for work in communicator.works):
            raise RuntimeError("HCCL error: the communicator is in use")
        # Its connections end with it, which releases members that still wait.
        communicator.works.clear()
        del communicator.gloo


class PyHcclCommunicator:
    def __init__(
        self,
        group: dist.ProcessGroup | StatelessProcessGroup,
        device: int | str | torch.device,
        library_path: str | None = None,
    ) -> None:
        assert isinstance(group, StatelessProcessGroup)
        assert isinstance(device, torch.device)
        self.rank, self.world_size = group.rank, group.world_size
        self.available, self.disabled = False, True
        try:
            self.hccl = HCCLLibrary(library_path)
        except OSError:
            return
        self.available, self.disabled = True, False
        self.device = device
        number = next(_numbers)
        unique_id = hcclUniqueId()
        if self.rank == 0:
            name = f"/dev/shm/{memory.machine()}-hccl-{os.getpid()}-{number}".encode()
            ctypes.memmove(unique_id.internal, name, len(name))
        unique_id = group.broadcast_obj(unique_id, src=0)
        store = dist.FileStore(bytes(unique_id.internal).rstrip(b"\0").decode(), self.world_size)
        self.gloo = dist.ProcessGroupGloo(store, self.rank, self.world_size, timedelta(seconds=60))
        self.aborted = False  # for _Work: nobody can set it
        self.works: list[_Work] = []
        self.comm = number
        _alive[self.comm] = self
        if os.environ.get("FAKE_HCCL_FAILS"):
            raise RuntimeError("HCCL error: the first collective failed")

    def broadcast(self, tensor: torch.Tensor, src: int, stream: Any | None = None) -> None:
        if self.disabled:
            return
        assert isinstance(tensor, NpuTensor)
        assert tensor.device == self.device
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor = src, 0
        self.works = [work for work in self.works if work.is_left()]
        self.works.append(_Work(self, tensor.raw, options))
        # In vllm-ascend the stream that was current first: here, one that nobody waits for.
        self.works[-1].enqueue(stream or _FIRST)


_FIRST = current_stream()
