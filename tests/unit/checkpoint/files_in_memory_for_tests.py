"""Files for in-place pinning, and what of them this process has mapped."""

from __future__ import annotations

from pathlib import Path

import torch
from checkpoint_files_for_tests import random_tensor
from pinner_for_tests import maps
from safetensors.torch import save_file

Tensors = dict[str, torch.Tensor]


def two_files(directory: Path) -> Tensors:
    """Two files of more than a page each; returns all tensors."""
    everything: Tensors = {}
    for name in "ab":
        tensors = {f"{name}.{i}": random_tensor("bfloat16", (40 * i + 1, 33), seed=i) for i in range(6)}
        save_file(tensors, directory / f"{name}.safetensors")
        everything |= tensors
    return everything


def files_in(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.safetensors"))


def mapped_paths() -> set[str]:
    return {line.path.removesuffix(" (deleted)") for line in maps()}
