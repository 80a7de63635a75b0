"""`torch.npu`: what of it the tests need, with torch_npu's names and arguments."""

from __future__ import annotations

import os
import threading
from typing import Any

import torch

from torch_npu import memory
from torch_npu.streams import Event, Stream, current_stream, stream, synchronize

__all__ = ["Event", "Stream", "current_stream", "stream", "synchronize"]

_LOCAL = threading.local()
_initialized = False


def visible() -> list[int]:
    """The machine's numbers of this process' devices."""
    value = os.environ.get("ASCEND_RT_VISIBLE_DEVICES")
    count = int(os.environ.get("FAKE_NPU_COUNT", "2"))
    return list(range(count)) if value is None else [int(part) for part in value.split(",") if part]


def is_available() -> bool:
    return device_count() > 0


def is_initialized() -> bool:
    return _initialized


def _is_in_bad_fork() -> bool:
    return False


def _lazy_init() -> None:
    global _initialized
    _initialized = True


def device_count() -> int:
    return len(visible())


def current_device() -> int:
    _lazy_init()
    return getattr(_LOCAL, "current", 0)


def set_device(device: int) -> None:
    """For this thread: others go on with theirs, or with 0."""
    if not 0 <= device < device_count():
        raise RuntimeError(f"SetDevice: invalid device id {device}, error code is 107001")
    _LOCAL.current = device


class device:
    """A context, in which another device is the current one."""

    def __init__(self, device: Any) -> None:
        self.idx = torch.device(device).index if not isinstance(device, int) else device
        self.prev_idx = -1

    def __enter__(self) -> None:
        self.prev_idx = current_device()
        set_device(self.idx)

    def __exit__(self, type: Any, value: Any, traceback: Any) -> bool:
        set_device(self.prev_idx)
        return False


def mem_get_info(device: int | None = None) -> tuple[int, int]:
    index = current_device() if device is None else device
    assert 0 <= index < device_count()
    total = memory.total_nbytes()
    return total - memory.used_nbytes(visible()[index]), total


def empty_cache() -> None:
    pass


def ipc_collect() -> None:
    memory.collect()


def manual_seed_all(seed: int) -> None:
    pass
