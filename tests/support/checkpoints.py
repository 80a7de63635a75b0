"""Checkpoints that a test and the processes it steers make alike, from a kind and a seed."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tests.support.worker import digest

Tensors = dict[str, torch.Tensor]

LAYERS = 24


def layers(seed: int) -> Tensors:
    """24 buckets of two tensors each, with slots of 256 KiB."""
    generator = torch.Generator().manual_seed(seed)
    return {
        f"layers.{layer:02}.{name}": torch.randn(shape, generator=generator)
        for layer in range(LAYERS)
        for name, shape in (("bias", (512,)), ("weight", (64, 997)))
    }


def large(seed: int) -> Tensors:
    """A tensor of 64 MiB."""
    return layers(seed) | {"embedding": torch.full((16, 1024, 1024), float(seed))}


_KINDS = {"layers": layers, "large": large}


def make(kind: str, seed: int) -> Tensors:
    return _KINDS[kind](seed)


def share_of(kind: str, seed: int, parts: Sequence[int], of: int) -> Tensors:
    """The tensors of some of `of` parts: neighbours by name are in one part."""
    tensors = make(kind, seed)
    names = sorted(tensors)
    return {name: tensors[name] for place, name in enumerate(names) if place * of // len(names) in parts}


def digests_of(kind: str, seed: int) -> dict[str, str]:
    return {name: digest(tensor) for name, tensor in make(kind, seed).items()}
