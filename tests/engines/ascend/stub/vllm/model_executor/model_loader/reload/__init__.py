"""vLLM's layer-wise reload, cut down to what an extension can notice."""

from __future__ import annotations

from vllm.model_executor.model_loader.reload.layerwise import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)

__all__ = ["finalize_layerwise_reload", "initialize_layerwise_reload"]
