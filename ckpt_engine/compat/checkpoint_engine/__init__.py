"""The reference's names, on top of ckpt_engine. See ckpt_engine.compat."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ckpt_engine import ParameterServer as ParameterServer
    from ckpt_engine import request_inference_to_update as request_inference_to_update

    from .worker import update_weights_from_ipc as update_weights_from_ipc

__all__ = ["ParameterServer", "request_inference_to_update", "update_weights_from_ipc"]


def __getattr__(name: str) -> Any:  # noqa: ANN401 - an attribute
    # On first use: a worker of an engine loads no parameter server.
    if name == "update_weights_from_ipc":
        from . import worker  # under the name by which this package was imported

        return worker.update_weights_from_ipc
    if name in __all__:
        import ckpt_engine

        return getattr(ckpt_engine, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
