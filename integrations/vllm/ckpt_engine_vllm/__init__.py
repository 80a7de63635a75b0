"""ckpt-engine in vLLM: the worker extension, and updates of an engine in this process.

    vllm serve MODEL --load-format dummy --worker-extension-cls ckpt_engine_vllm.VllmColocateWorkerExtension

Names are resolved on first use: a worker imports what it needs and no more.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ckpt_engine_vllm.offline import update
    from ckpt_engine_vllm.server_client import VllmServer
    from ckpt_engine_vllm.worker_extension import VllmColocateWorkerExtension

__all__ = ["VllmColocateWorkerExtension", "VllmServer", "update"]

_HOMES = {
    "VllmColocateWorkerExtension": "ckpt_engine_vllm.worker_extension",
    "VllmServer": "ckpt_engine_vllm.server_client",
    "update": "ckpt_engine_vllm.offline",
}


def __getattr__(name: str) -> Any:  # noqa: ANN401 - whatever the name stands for
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
