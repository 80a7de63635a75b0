"""What an engine puts into one layer travels in one bucket where it fits."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest

from ckpt_engine.checkpoint.packing import TensorSpec, pack
from ckpt_engine.metadata import HostBufferMeta, RankMetas, align_up
from ckpt_engine.planning.layers import layer_of
from ckpt_engine.planning.plan import Bucket, cut_buckets

SEED = 20261124


def buckets(sizes: dict[str, int], bucket_nbytes: int) -> list[Bucket]:
    packed = pack([TensorSpec(name, "uint8", (nbytes,), nbytes) for name, nbytes in sizes.items()])
    held = tuple(HostBufferMeta(address=b.start, nbytes=b.nbytes, tensors=b.tensors) for b in packed)
    metas = RankMetas(rank=0, host="h", host_ip="", device_uuid="0", epoch="e", buffers=held)
    return list(cut_buckets(metas, bucket_nbytes))


def kept(cut: list[Bucket]) -> int:
    """Bytes that come in an earlier bucket than the last of their layer: the engine must copy them."""
    last = {layer_of(tensor.name): index for index, item in enumerate(cut) for tensor in item.tensors}
    return sum(
        tensor.nbytes
        for index, item in enumerate(cut)
        for tensor in item.tensors
        if index < last[layer_of(tensor.name)]
    )


def decoder(layers: int, hidden: int, intermediate: int, key_value: int) -> dict[str, int]:
    """Bytes of a dense model's tensors, with biases."""
    found = {"model.embed_tokens.weight": 9 * hidden, "lm_head.weight": 9 * hidden}
    for number in range(layers):
        layer = f"model.layers.{number}"
        widths = {"q": hidden, "k": key_value, "v": key_value, "o": hidden}
        for name, width in widths.items():
            found[f"{layer}.self_attn.{name}_proj.weight"] = hidden * width
            found[f"{layer}.self_attn.{name}_proj.bias"] = width
        for name in ("gate", "up", "down"):
            found[f"{layer}.mlp.{name}_proj.weight"] = hidden * intermediate
        found[f"{layer}.input_layernorm.weight"] = hidden
    return found


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("model.layers.3.self_attn.k_proj.bias", "model.layers.3.self_attn.q_proj+k_proj+v_proj"),
        ("model.layers.3.mlp.up_proj.weight", "model.layers.3.mlp.gate_proj+up_proj"),
        ("model.layers.3.mlp.down_proj.weight", "model.layers.3.mlp.down_proj"),
        ("model.layers.3.mlp.experts.7.up_proj.weight", "model.layers.3.mlp.experts."),
        ("model.layers.3.mlp.experts.down_proj", "model.layers.3.mlp.experts"),
        ("q_proj.weight", "q_proj+k_proj+v_proj"),
        ("weight", "weight"),
    ],
)
def test_a_tensors_layer_follows_from_its_name(name: str, layer: str) -> None:
    assert layer_of(name) == layer


def test_a_layer_that_fits_is_not_split() -> None:
    draw = random.Random(SEED)
    splits = 0
    for trial in range(200):
        sizes = decoder(draw.randint(1, 6), *(draw.randint(1, 60) * 16 for _ in range(3)))
        largest = max(sizes.values())
        limit = align_up(draw.randint(largest, 4 * largest))
        cut = buckets(sizes, limit)
        names = [tensor.name for item in cut for tensor in item.tensors]
        assert sorted(names) == sorted(sizes), (SEED, trial)
        for item in cut:
            assert item.nbytes <= limit, (SEED, trial)
        nbytes: dict[str, int] = {}
        for name in sorted(sizes):
            nbytes[layer_of(name)] = nbytes.get(layer_of(name), 0) + align_up(sizes[name])
        lies_in: dict[str, set[int]] = {}
        for index, item in enumerate(cut):
            for tensor in item.tensors:
                lies_in.setdefault(layer_of(tensor.name), set()).add(index)
        for layer, places in lies_in.items():
            # By name, o_proj lies between k_proj and q_proj.
            between = sizes.get(layer.replace("q_proj+k_proj+v_proj", "o_proj") + ".weight", 0)
            if nbytes[layer] + align_up(between) + 512 <= limit:
                assert len(places) == 1, (SEED, trial, layer)
            splits += len(places) > 1
    assert splits, "some layers must not have fitted"


def test_the_bytes_that_an_engine_keeps() -> None:
    """An 8 B model in 256 MiB slots, to scale: cut without care for layers, 3.5 GiB of 15 were kept."""
    unit = 256
    sizes = decoder(32, 4 * unit, 14 * unit, unit)
    largest = max(sizes.values())
    assert kept(buckets(sizes, 5 * largest // 2)) == 0
    assert kept(buckets(sizes, largest)) > 0, "gate and up do not fit together"


def test_buckets_stay_full() -> None:
    sizes = decoder(32, 64, 224, 16)
    limit = 3 * max(sizes.values())
    cut = buckets(sizes, limit)
    assert all(align_up(one.nbytes) + two.nbytes > limit for one, two in pairwise(cut))
