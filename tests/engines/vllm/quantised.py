"""Quantised versions of the tiny checkpoints, in the layouts that vLLM reads."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file


@contextmanager
def skipping_without_kernel() -> Iterator[None]:
    """Skips the test where the CPU lacks what vLLM's kernels need."""
    try:
        yield
    except RuntimeError as error:
        if "Failed to find a kernel" in str(error) or "requires x86 with AVX-512 or AMX" in str(error):
            pytest.skip(f"vLLM has no kernel for this on this CPU: {str(error).splitlines()[-1][:200]}")
        raise


Tensors = dict[str, torch.Tensor]
GROUP = 32
BLOCK = 128
LIMITS: dict[str, Any] = {"max_model_len": 256, "max_num_batched_tokens": 256}
"""vLLM tries a batch of so many tokens as it starts, and some of these kernels are slow."""
KEPT = ("lm_head", "embed_tokens", "mlp.gate.")
"""Matrices that stay as they are."""


def _fp8(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return (weight / scale).clamp(-448, 448).to(torch.float8_e4m3fn)


def _fp8_tensor(name: str, weight: torch.Tensor) -> Tensors:
    scale = weight.abs().max() / 448
    return {name: _fp8(weight, scale), f"{name}_scale": scale}


def _fp8_static(name: str, weight: torch.Tensor) -> Tensors:
    """With a scale for what goes into the layer."""
    scale = weight.abs().max() / 8
    return _fp8_tensor(name, weight) | {name.replace("weight", "input_scale"): scale}


def _fp8_block(name: str, weight: torch.Tensor) -> Tensors:
    rows, columns = weight.shape
    blocks = weight.view(rows // BLOCK, BLOCK, columns // BLOCK, BLOCK)
    scale = blocks.abs().amax((1, 3), keepdim=True) / 448
    return {
        name: _fp8(blocks, scale).view(rows, columns),
        f"{name}_scale_inv": scale[:, 0, :, 0].contiguous(),
    }


def _fp8_channel(name: str, weight: torch.Tensor) -> Tensors:
    scale = weight.abs().amax(1, keepdim=True) / 448
    return {name: _fp8(weight, scale), f"{name}_scale": scale}


def _int8_channel(name: str, weight: torch.Tensor) -> Tensors:
    scale = weight.abs().amax(1, keepdim=True) / 127
    return {name: (weight / scale).round().to(torch.int8), f"{name}_scale": scale}


def _int4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`weight` (outputs, inputs) as numbers 0 to 15 around 8, and their scales (outputs, groups)."""
    groups = weight.view(weight.shape[0], -1, GROUP)
    scale = groups.abs().amax(2, keepdim=True) / 7
    return ((groups / scale).round() + 8).to(torch.int32).view(weight.shape), scale.squeeze(2)


def _packed(numbers: torch.Tensor, dimension: int, order: tuple[int, ...] = tuple(range(8))) -> torch.Tensor:
    """Eight numbers of 4 bits in an int32, along a dimension."""
    numbers = numbers.movedim(dimension, -1)
    eights = numbers.reshape(*numbers.shape[:-1], -1, 8)[..., list(order)]
    packed = torch.zeros(eights.shape[:-1], dtype=torch.int32)
    for place in range(8):
        packed |= eights[..., place] << (4 * place)
    return packed.movedim(-1, dimension).contiguous()


def _pack_quantized(name: str, weight: torch.Tensor) -> Tensors:
    numbers, scale = _int4(weight)
    return {
        f"{name}_packed": _packed(numbers, 1),
        f"{name}_scale": scale.to(torch.bfloat16),
        f"{name}_shape": torch.tensor(weight.shape),
    }


def _gptq(name: str, weight: torch.Tensor) -> Tensors:
    numbers, scale = _int4(weight)
    base = name.removesuffix("weight")
    zeros = torch.full((scale.shape[1], weight.shape[0]), 7, dtype=torch.int32)
    return {
        f"{base}qweight": _packed(numbers.t(), 0),
        f"{base}qzeros": _packed(zeros, 1),
        f"{base}scales": scale.t().contiguous().to(torch.bfloat16),
        f"{base}g_idx": torch.arange(weight.shape[1], dtype=torch.int32) // GROUP,
    }


def _awq(name: str, weight: torch.Tensor) -> Tensors:
    numbers, scale = _int4(weight)
    base, order = name.removesuffix("weight"), (0, 2, 4, 6, 1, 3, 5, 7)
    zeros = torch.full((scale.shape[1], weight.shape[0]), 8, dtype=torch.int32)
    return {
        f"{base}qweight": _packed(numbers.t(), 1, order),
        f"{base}qzeros": _packed(zeros, 1, order),
        f"{base}scales": scale.t().contiguous().to(torch.bfloat16),
    }


def _compressed(format: str, weights: dict[str, Any], inputs: dict[str, Any] | None) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    return {"quant_method": "compressed-tensors", "format": format, "config_groups": {"group_0": group}}


def _bits(num_bits: int, kind: str, strategy: str, **more: Any) -> dict[str, Any]:  # noqa: ANN401 - JSON
    common = {"num_bits": num_bits, "type": kind, "strategy": strategy, "symmetric": True, "dynamic": False}
    return common | more


_KEPT_MODULES = {"modules_to_not_convert": ["lm_head"]}
_IGNORED = {"ignore": ["lm_head", "re:.*mlp.gate$"]}
_PER_TOKEN = {"dynamic": True}
LAYOUTS: dict[str, tuple[Callable[[str, torch.Tensor], Tensors], dict[str, Any]]] = {
    "fp8": (_fp8_tensor, {"quant_method": "fp8", "activation_scheme": "dynamic", **_KEPT_MODULES}),
    "fp8-static": (_fp8_static, {"quant_method": "fp8", "activation_scheme": "static", **_KEPT_MODULES}),
    "fp8-block": (
        _fp8_block,
        {
            "quant_method": "fp8",
            "activation_scheme": "dynamic",
            "weight_block_size": [BLOCK, BLOCK],
            **_KEPT_MODULES,
        },
    ),
    "ct-fp8": (
        _fp8_channel,
        _compressed("float-quantized", _bits(8, "float", "channel"), _bits(8, "float", "token", **_PER_TOKEN))
        | _IGNORED,
    ),
    "ct-int8": (
        _int8_channel,
        _compressed("int-quantized", _bits(8, "int", "channel"), _bits(8, "int", "token", **_PER_TOKEN))
        | _IGNORED,
    ),
    # Asymmetric inputs take another kernel.
    "ct-int8-asymmetric": (
        _int8_channel,
        _compressed(
            "int-quantized",
            _bits(8, "int", "channel"),
            _bits(8, "int", "token", **_PER_TOKEN) | {"symmetric": False},
        )
        | _IGNORED,
    ),
    "ct-int4": (
        _pack_quantized,
        _compressed("pack-quantized", _bits(4, "int", "group", group_size=GROUP), None) | _IGNORED,
    ),
    "gptq": (
        _gptq,
        {
            "quant_method": "gptq",
            "bits": 4,
            "group_size": GROUP,
            "desc_act": False,
            "sym": True,
            "lm_head": False,
        },
    ),
    "awq": (
        _awq,
        {
            "quant_method": "awq",
            "bits": 4,
            "group_size": GROUP,
            "zero_point": True,
            "version": "gemm",
            **_KEPT_MODULES,
        },
    ),
}


def quantise(source: Path, directory: Path, layout: str, kv_scale: float | None = None) -> None:
    """Writes a quantised copy of a tiny checkpoint.

    Args:
        layout: a key of LAYOUTS.
        kv_scale: with scales for a KV cache in fp8, which is this for keys and half of it for values.
    """
    quantised, config = LAYOUTS[layout]
    shutil.copytree(source, directory)
    tensors: Tensors = {}
    for name, weight in load_file(source / "model.safetensors").items():
        if weight.ndim == 2 and name.endswith("weight") and not any(part in name for part in KEPT):
            tensors |= quantised(name, weight.float())
        else:
            tensors[name] = weight
        if kv_scale is not None and name.endswith("k_proj.weight"):
            base = name.removesuffix("k_proj.weight")
            tensors[f"{base}attn.k_scale"] = torch.tensor(kv_scale)
            tensors[f"{base}attn.v_scale"] = torch.tensor(kv_scale / 2)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": config}))
