"""The tiny model's checkpoint, for processes that know nothing of NPUs."""

from __future__ import annotations

import torch

LAYERS, HIDDEN, EXPERTS = 4, 128, 4


def checkpoint(seed: int) -> dict[str, torch.Tensor]:
    """As on disk: q, k and v apart, experts as they were trained."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {"embed": torch.randn((1000, HIDDEN), generator=generator).to(torch.bfloat16)}
    for layer in range(LAYERS):
        for part in ("q", "k", "v"):
            tensors[f"layers.{layer}.{part}"] = torch.randn((HIDDEN, HIDDEN), generator=generator)
        tensors[f"layers.{layer}.w13"] = torch.randn((EXPERTS, 2 * 64, HIDDEN), generator=generator)
    return tensors
