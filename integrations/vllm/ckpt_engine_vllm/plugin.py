"""What vLLM loads in each of its processes (entry point `vllm.general_plugins`): it names our weight-transfer
backend, for `--weight-transfer-config '{"backend": "ckpt_engine"}'`. Called more than once, and by engines
that never use it: it imports nothing of ours."""

from __future__ import annotations

BACKEND = "ckpt_engine"


def register() -> None:
    try:
        from vllm.distributed.weight_transfer import WeightTransferEngineFactory
    except ImportError:
        return  # a version without such backends
    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(
            BACKEND, "ckpt_engine_vllm.weight_transfer", "CkptEngineWeightTransfer"
        )
