"""A stand-in for torch_npu: real `npu:0` tensors whose memory lies in files below /dev/shm.

torch's hooks for a backend written in Python give tensors whose device is an NPU; their bytes are a CPU
tensor's. Names, arguments and fields are those of torch_npu 2.13; so are the things that go wrong easily:

- work on a stream is done only when somebody waits for it or looks at an event behind it;
- an exported allocation is freed once its reader counter, an unsigned number in shared memory, is 0;
- a tensor that came from another process cannot be exported again, nor one of an expandable segment.

FAKE_NPU_COUNT devices (2) of FAKE_NPU_MEMORY bytes (1 GiB) each, shared by processes with the same
FAKE_NPU_MACHINE.
"""

from __future__ import annotations

import torch
from torch.multiprocessing import reductions as _torch_reductions
from torch.utils import backend_registration as _backend

__version__ = "2.13.0"

from torch_npu import memory as _memory
from torch_npu import npu
from torch_npu.tensor import install as _install

_backend._setup_privateuseone_for_python_backend("npu", backend_module=npu)
_install()

from torch_npu.multiprocessing import reductions as _reductions  # noqa: E402 - needs the backend

_torch_reductions.reduce_tensor = _reductions._npu_reduce_tensor
# Made in C, without keywords; the wrapper of typed storages takes one, and drops it.
torch.UntypedStorage._release_ipc_counter_npu = staticmethod(_memory.release_counter)
torch.TypedStorage._release_ipc_counter_npu = staticmethod(
    lambda *args, device="npu", **kwargs: torch.UntypedStorage._release_ipc_counter_npu(*args, **kwargs)
)
