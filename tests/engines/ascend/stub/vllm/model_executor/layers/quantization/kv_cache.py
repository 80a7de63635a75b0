"""What gives attention its scales for a quantised KV cache. No model of the tests has one."""

from __future__ import annotations

from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase


class BaseKVCacheMethod(QuantizeMethodBase):
    pass
