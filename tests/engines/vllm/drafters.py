"""Tiny models that speculate, for the tiny checkpoints: an EAGLE head of a Llama, and MiMo's MTP layer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

_MIMO_CONFIG = """
from transformers import Qwen2Config


class MiMoConfig(Qwen2Config):
    model_type = "mimo"
"""
"""transformers does not know MiMo's: a checkpoint brings it."""


def make_eagle(source: Path, directory: Path, *, embedding: bool = False) -> Path:
    """An EAGLE head from the first layer of the Llama at `source`.

    Args:
        embedding: it has an input embedding of its own; else it uses the model's.
    """
    directory.mkdir()
    weights = load_file(source / "model.safetensors")
    prefix = "model.layers.0."
    tensors = {
        name.removeprefix("model."): tensor
        for name, tensor in weights.items()
        if name.startswith(prefix) and "input_layernorm" not in name
    }
    # Such a layer first puts an embedding and a hidden state together.
    projection = weights[f"{prefix}mlp.gate_proj.weight"].float()
    tensors["fc.weight"] = (projection[:128].repeat(1, 2) / 2).to(torch.bfloat16)
    if embedding:
        tensors["embed_tokens.weight"] = weights["lm_head.weight"].clone()
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text()) | {"num_hidden_layers": 1}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def make_mimo(source: Path, directory: Path) -> Path:
    """A MiMo, which is a Qwen2 with an MTP layer in the same checkpoint, from the one at `source`."""
    shutil.copytree(source, directory)
    weights = load_file(source / "model.safetensors")
    ours, prefix = "model.mtp_layers.0.", "model.layers.1."
    tensors = dict(weights)
    for name, tensor in weights.items():
        if name.startswith(prefix):
            tensors[ours + name.removeprefix(prefix)] = tensor.flip(0).contiguous()
    norm = weights["model.norm.weight"]
    for number, name in enumerate(("token_layernorm", "hidden_layernorm", "final_layernorm")):
        tensors[f"{ours}{name}.weight"] = norm.roll(number + 1)
    projection = weights[f"{prefix}mlp.up_proj.weight"].float()
    tensors[f"{ours}input_proj.weight"] = (projection[:128].repeat(1, 2) / 2).to(torch.bfloat16)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    config |= {
        "architectures": ["MiMoForCausalLM"],
        "model_type": "mimo",
        "num_nextn_predict_layers": 1,
        "auto_map": {"AutoConfig": "configuration_mimo.MiMoConfig"},
    }
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "configuration_mimo.py").write_text(_MIMO_CONFIG)
    return directory
