"""vllm-ascend's side: which NPU a process uses, and the worker extension that receives updates.

vllm serve MODEL --worker-extension-cls ckpt_engine_ascend.NpuColocateWorkerExtension
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ckpt_engine_ascend.identity import IdentityError, device_uuid
    from ckpt_engine_ascend.worker_extension import NpuColocateWorkerExtension

_PLACES = {
    "IdentityError": "identity",
    "NpuColocateWorkerExtension": "worker_extension",
    "device_uuid": "identity",
}

__all__ = ["IdentityError", "NpuColocateWorkerExtension", "device_uuid"]


def __getattr__(name: str) -> object:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_PLACES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_PLACES])
