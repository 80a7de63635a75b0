"""Which tensors engines put into one layer, by their names alone.

Engines fuse projections (q, k and v; gate and up) and keep a layer's experts in one parameter. One that
processes a layer once it is complete (vLLM's layer-wise reload) must copy what came in an earlier bucket.
A name that is not known here costs such copies, no more.
"""

from __future__ import annotations

from collections.abc import Iterable

from ckpt_engine.metadata import TensorMeta, align_up

_FUSED = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("in_proj_qkv", "in_proj_z"),
    ("in_proj_b", "in_proj_a"),
)
_LAYER = {member: "+".join(members) for members in _FUSED for member in members}
_EXPERTS = ".experts."


def layer_of(name: str) -> str:
    """The engine's layer that the tensor is a part of.

    "model.layers.0.self_attn.k_proj.bias" -> "model.layers.0.self_attn.q_proj+k_proj+v_proj"
    """
    module, dot, _ = name.rpartition(".")
    if not dot:
        return name
    before, experts, _ = module.partition(_EXPERTS)
    if experts:
        return before + experts
    parent, dot, last = module.rpartition(".")
    return parent + dot + _LAYER.get(last, last)


def spans(tensors: Iterable[TensorMeta]) -> dict[str, int]:
    """First tensor of each layer -> bytes, with padding, up to the end of the layer's last one here."""
    begins: dict[str, tuple[str, int]] = {}
    found: dict[str, int] = {}
    end = 0
    for tensor in tensors:
        start = align_up(end)
        end = start + tensor.nbytes
        first, begin = begins.setdefault(layer_of(tensor.name), (tensor.name, start))
        found[first] = end - begin
    return found
