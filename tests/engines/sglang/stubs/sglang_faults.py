"""A plugin of SGLang's that makes it fail where a test says so.

The file that SGLANG_FAULTS names holds JSON: {"at": "load" | "post_process", "rank": a rank's number,
"action": "raise" | "exit"}, or {"flip": a parameter's name, "rank": ...}: a bit of it flips once all is
loaded. It is read at each call, so that one server serves all tests.
"""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import torch

LOADER = "sglang.srt.model_loader.loader.DefaultModelLoader"


def register() -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    def before(where: str) -> Any:  # noqa: ANN401
        def fail(*_: object, **__: object) -> None:
            fault = fault_of_this_rank()
            if fault.get("at") == where:
                if fault["action"] == "exit":
                    os.kill(os.getpid(), signal.SIGKILL)
                raise RuntimeError(f"injected before {where}")

        return fail

    def flip(_: object, model: torch.nn.Module, *__: object) -> None:
        name = fault_of_this_rank().get("flip")
        if name is not None:
            model.get_parameter(name).data.view(-1).view(torch.uint8)[5] ^= 16

    if not torch.cuda.is_available():
        # SGLang before 0.5.23 waits for CUDA before it computes checksums, also on CPU.
        torch.cuda.synchronize = lambda *_: None
    if os.environ.get("SGLANG_FP8_AS_ON_GPU"):
        from sglang.srt.layers.quantization import fp8

        fp8._is_cpu = False
    if os.environ.get("SGLANG_DRAFTS_WITHOUT_KERNELS"):
        for target in (
            "mem_cache.memory_pool.MHATokenToKVPool._init_kv_copy_and_warmup",
            "speculative.draft_utils.DraftBackendFactory.create_draft_extend_backend",
        ):
            HookRegistry.register(f"sglang.srt.{target}", lambda _: None, HookType.REPLACE)
    if os.environ.get("SGLANG_NATIVE_OPS"):
        for target, function in native_ops().items():
            HookRegistry.register(f"sglang.srt.{target}", function, HookType.REPLACE)
    HookRegistry.register(f"{LOADER}.load_weights_only", before("load"), HookType.BEFORE)
    HookRegistry.register(f"{LOADER}.postprocess_weights", before("post_process"), HookType.BEFORE)
    HookRegistry.register(f"{LOADER}.postprocess_weights", flip, HookType.AFTER)


def fault_of_this_rank() -> dict[str, Any]:
    from sglang.srt.runtime_context import get_parallel

    parallel = get_parallel()
    file = Path(os.environ["SGLANG_FAULTS"])
    fault: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    rank = parallel.pp_rank * parallel.tp_size + parallel.tp_rank
    return fault if fault.get("rank") == rank else {}


def native_ops() -> dict[str, Any]:
    """On CUDA, in place of kernels that may be missing, and of those that SGLang compiles as it goes: what
    it computes with PyTorch elsewhere. By what they replace."""
    return {
        "layers.utils.multi_platform.MultiPlatformOp.dispatch_forward": lambda layer: layer.forward_native,
        "mem_cache.memory_pool.can_use_store_cache": lambda *_: False,
        "model_executor.forward_batch_info.clamp_position": lambda lengths: torch.clamp(lengths - 1, min=0),
        "models.utils.can_use_fused_inplace_qknorm": lambda *_: False,
        "models.qwen3_moe.enable_fused_set_kv_buffer": lambda _: False,
    }
