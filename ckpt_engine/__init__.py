"""Puts new weights into running LLM inference engines, in place.

The public names, resolved on first use (PEP 562), so that an engine's worker that imports
`ckpt_engine.ipc` loads neither the HTTP client nor the planner.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ckpt_engine.ipc.receiver import update_weights_from_ipc
    from ckpt_engine.parameter_server import ParameterServer
    from ckpt_engine.server.engine_client import request_inference_to_update

_HOMES = {
    "ParameterServer": "ckpt_engine.parameter_server",
    "request_inference_to_update": "ckpt_engine.server.engine_client",
    "update_weights_from_ipc": "ckpt_engine.ipc.receiver",
}

__all__ = ["ParameterServer", "request_inference_to_update", "update_weights_from_ipc"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:  # noqa: ANN401 - a module attribute may be anything
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
