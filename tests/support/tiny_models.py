"""Checkpoints of tiny models in several architectures, drawn from a seed, with a tokenizer of their own."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch

VOCAB_SIZE = 512
_SHAPE = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 2048,
}
_EXPERTS = {"moe_intermediate_size": 64, "num_experts": 8, "num_experts_per_tok": 2}
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3": ("Qwen3Config", {"tie_word_embeddings": False}),
    "llama": ("LlamaConfig", {"tie_word_embeddings": False, "attention_bias": True}),
    "qwen2": ("Qwen2Config", {"tie_word_embeddings": False}),
    # Qwen2 with a layer that predicts one more token, which SGLang loads as the draft model.
    "mtp": ("Qwen2Config", {"tie_word_embeddings": False, "num_nextn_predict_layers": 1}),
    "tied": ("Qwen3Config", {"tie_word_embeddings": True}),
    # Not tiny: 0.9 GB, to measure with.
    "medium": (
        "Qwen3Config",
        {
            "tie_word_embeddings": False,
            "hidden_size": 1024,
            "intermediate_size": 3072,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 128,
        },
    ),
    # Each matrix can be cut into blocks of 128 x 128.
    "wide": ("Qwen3Config", {"tie_word_embeddings": False, "head_dim": 64}),
    # So can each half of them.
    "wider": ("Qwen3Config", {"tie_word_embeddings": False, "head_dim": 64, "num_key_value_heads": 4}),
    "moe": ("Qwen3MoeConfig", {"tie_word_embeddings": False, **_EXPERTS}),
    # vLLM's kernels for CPU want multiples of 32: it pads these.
    "moe-padded": (
        "Qwen3MoeConfig",
        {"tie_word_embeddings": False, **_EXPERTS, "moe_intermediate_size": 48},
    ),
    "fp8": ("Qwen3Config", {"tie_word_embeddings": False, "head_dim": 64}),
    "fp8-moe": (
        "Qwen3MoeConfig",
        {"tie_word_embeddings": False, "head_dim": 64, **_EXPERTS, "moe_intermediate_size": 128},
    ),
}
"""name -> transformers' config class, and what differs from the common shape."""


_FP8_BLOCK = 128


def make_tiny_checkpoint(directory: Path, architecture: str, seed: int) -> None:
    """Writes config.json, model.safetensors in bfloat16 and a tokenizer, mostly under 2 MiB in all. Those
    whose name begins with `fp8` have their projections in float8, with a scale for each block (as
    DeepSeek's)."""
    import transformers

    name, options = ARCHITECTURES[architecture]
    config = getattr(transformers, name)(**_SHAPE | options)
    config.dtype = torch.bfloat16
    model = transformers.AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            parameter.copy_(_draw(parameter_name, parameter, generator))
    model.to(torch.bfloat16).save_pretrained(directory)
    if architecture.startswith("fp8"):
        _quantise(directory)
    if architecture == "mtp":
        _add_mtp_layer(directory, generator)
    _save_tokenizer(directory)


def _add_mtp_layer(directory: Path, generator: torch.Generator) -> None:
    """A layer as the others, with what joins a token to the model's state; named as MiMo's are."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(directory / "model.safetensors")
    width = tensors["model.norm.weight"].numel()
    shapes = {
        name.removeprefix("model.layers.0."): tensor.shape
        for name, tensor in tensors.items()
        if name.startswith("model.layers.0.")
    }
    shapes |= {f"{name}_layernorm.weight": torch.Size([width]) for name in ("token", "hidden", "final")}
    shapes["input_proj.weight"] = torch.Size([width, 2 * width])
    tensors |= {
        f"model.mtp_layers.0.{name}": _draw(name, torch.empty(shape), generator).to(torch.bfloat16)
        for name, shape in shapes.items()
    }
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    config["architectures"] = ["MiMoForCausalLM"]
    (directory / "config.json").write_text(json.dumps(config))


def _quantise(directory: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = {}
    for name, tensor in load_file(directory / "model.safetensors").items():
        if name.endswith("proj.weight"):
            tensors[name], tensors[f"{name}_scale_inv"] = _in_blocks(tensor.float())
        else:
            tensors[name] = tensor
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    block = [_FP8_BLOCK, _FP8_BLOCK]
    config["quantization_config"] = {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": block,
    }
    (directory / "config.json").write_text(json.dumps(config))


def _in_blocks(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix in float8, and what each of its blocks is to be multiplied by."""
    rows, columns = (-(-size // _FP8_BLOCK) for size in weight.shape)
    padded = torch.zeros(rows * _FP8_BLOCK, columns * _FP8_BLOCK)
    padded[: weight.shape[0], : weight.shape[1]] = weight
    blocks = padded.view(rows, _FP8_BLOCK, columns, _FP8_BLOCK)
    scales = blocks.abs().amax(dim=(1, 3)) / torch.finfo(torch.float8_e4m3fn).max
    whole = (blocks / scales[:, None, :, None]).view_as(padded)
    return whole[: weight.shape[0], : weight.shape[1]].to(torch.float8_e4m3fn).contiguous(), scales


def _draw(name: str, parameter: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Weights of unit gain, so that what a model answers depends on each of them."""
    noise = torch.randn(parameter.shape, generator=generator)
    if parameter.ndim == 1:
        return 0.1 * noise if name.endswith("bias") else 1 + 0.1 * noise
    return noise * (0.02 if "embed" in name else 1.5 / math.sqrt(parameter.shape[-1]))


def _save_tokenizer(directory: Path) -> None:
    """One word for each token: `w7` is token 7."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"w{index}": index for index in range(VOCAB_SIZE)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0", eos_token="w1").save_pretrained(
        directory
    )
