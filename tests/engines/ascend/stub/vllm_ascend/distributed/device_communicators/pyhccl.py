"""vllm-ascend's communicator: its members know each other by an id alone, and it cannot be aborted."""

from __future__ import annotations

import ctypes
import os
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch_npu import memory
from torch_npu._C._distributed_c10d import _Work
from torch_npu.streams import current_stream, synchronize
from torch_npu.tensor import NpuTensor
from vllm.distributed.utils import StatelessProcessGroup

_made = 0


class hcclUniqueId(ctypes.Structure):
    _fields_ = [("internal", ctypes.c_byte * 4108)]


class PyHcclCommunicator:
    aborted = False

    def __init__(
        self,
        group: dist.ProcessGroup | StatelessProcessGroup,
        device: int | str | torch.device,
        library_path: str | None = None,
    ) -> None:
        global _made
        assert isinstance(group, StatelessProcessGroup)
        assert isinstance(device, torch.device)
        self.rank, self.world_size = group.rank, group.world_size
        self.device = device
        self.available = not os.environ.get("FAKE_NO_HCCL_LIBRARY")
        self.disabled = not self.available
        if self.disabled:
            return
        unique_id = hcclUniqueId()
        if self.rank == 0:
            _made += 1
            name = f"/dev/shm/{memory.machine()}-hccl-{os.getpid()}-{_made}".encode()
            ctypes.memmove(unique_id.internal, name, len(name))
        unique_id = group.broadcast_obj(unique_id, src=0)
        store = dist.FileStore(bytes(unique_id.internal).rstrip(b"\0").decode(), self.world_size)
        self.gloo = dist.ProcessGroupGloo(store, self.rank, self.world_size, timedelta(seconds=60))

    def broadcast(self, tensor: torch.Tensor, src: int, stream: Any | None = None) -> None:
        if self.disabled:
            return
        if not self.available:
            raise RuntimeError("HCCL communicator is closed")
        assert isinstance(tensor, NpuTensor)
        assert tensor.device == self.device
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor = src, 0
        # In vllm-ascend the stream that was current first: here, one that nobody waits for.
        _Work(self, tensor.raw, options).enqueue(stream or _FIRST)

    def close(self) -> None:
        if not self.available:
            return
        self.available = False
        synchronize(self.device)


_FIRST = current_stream()
