"""The parameter server's side."""

from __future__ import annotations

from ckpt_engine import ParameterServer, request_inference_to_update

__all__ = ["ParameterServer", "request_inference_to_update"]
