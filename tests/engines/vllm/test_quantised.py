"""Quantised models: updated, they are what they are after loading from disk, or they are refused by name."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from ckpt_engine.errors import UpdateError
from tests.engines.vllm.engines import SEEDS, Answers, Checkpoints, OfflineEngine
from tests.engines.vllm.parameter_servers import update_from
from tests.engines.vllm.quantised import LIMITS, quantise, skipping_without_kernel
from tests.engines.vllm.test_offline import tensor_names

SLOT_NBYTES = 9000
"""Fused groups and their scales lie in several buckets."""


@dataclass
class Quantised:
    offline: OfflineEngine
    checkpoints: Checkpoints
    base: Path

    def __call__(self, layout: str, version: str, kv_scale: float | None = None, *, of: str = "wide") -> Path:
        directory = self.base / f"{of}-{layout}-{version}-{kv_scale}"
        if not directory.exists():
            quantise(self.checkpoints(of, version), directory, layout, kv_scale)
        return directory

    def start(self, model: Path, **options: Any) -> Answers:  # noqa: ANN401 - of LLM
        with skipping_without_kernel():
            self.offline.start(model, **LIMITS, **options)
        return self.offline.answers()

    def update(self, checkpoint: Path, slot_nbytes: int | None = None) -> Answers:
        update_from(self.offline, checkpoint, slot_nbytes=slot_nbytes)
        return self.offline.answers()


@pytest.fixture(scope="module")
def quantised(
    offline: OfflineEngine, checkpoints: Checkpoints, tmp_path_factory: pytest.TempPathFactory
) -> Quantised:
    return Quantised(offline, checkpoints, tmp_path_factory.mktemp("quantised"))


@pytest.mark.parametrize("layout", ["fp8-block", "ct-fp8", "ct-int8", "ct-int4", "gptq", "awq"])
def test_a_quantised_checkpoint(quantised: Quantised, layout: str) -> None:
    paths = {version: quantised(layout, version) for version in "ab"}
    expected = {version: quantised.start(paths[version]) for version in "ab"}
    assert expected["a"].generated != expected["b"].generated
    if layout == "ct-int8" and "on oneDNN" in quantised.offline.rpc("test_kernels")[0]:
        pytest.skip("without AMX vLLM's int8 is oneDNN's, which is refused: see the test of asymmetric ones")
    for version, slot_nbytes in (("a", None), ("b", SLOT_NBYTES), ("a", SLOT_NBYTES)):
        assert quantised.update(paths[version], slot_nbytes) == expected[version]


@pytest.mark.parametrize("quantization", ["fp8_per_block", "fp8_per_channel"])
def test_an_engine_that_quantises_what_it_loads(quantised: Quantised, quantization: str) -> None:
    """The checkpoint has ordinary weights, as a trainer does."""
    paths = {version: quantised.checkpoints("wide", version) for version in "ab"}
    expected = {version: quantised.start(path, quantization=quantization) for version, path in paths.items()}
    assert expected["a"].generated != expected["b"].generated
    for version, slot_nbytes in (("a", None), ("b", SLOT_NBYTES), ("a", SLOT_NBYTES)):
        assert quantised.update(paths[version], slot_nbytes) == expected[version]


def test_scales_of_a_quantised_cache_come_and_go(quantised: Quantised) -> None:
    """A checkpoint without them means 1, not what the one before had, nor what a dummy was given."""
    paths = {"high": quantised("fp8-block", "a", 0.5), "low": quantised("fp8-block", "a", 0.03125)}
    paths["none"] = quantised("fp8-block", "a")
    expected = {name: quantised.start(path, kv_cache_dtype="fp8") for name, path in paths.items()}
    scale = "model.layers.1.self_attn.attn._v_scale_float"
    assert [answers.digests[0][scale] for answers in expected.values()] == ["0.25", "0.015625", "1.0"]
    assert expected["high"].generated != expected["none"].generated != expected["low"].generated
    quantised.start(paths["high"], kv_cache_dtype="fp8", load_format="dummy")
    for name in ("none", "low", "none", "high"):
        assert quantised.update(paths[name], SLOT_NBYTES) == expected[name]


def test_scales_that_are_in_cuda_graphs_are_refused_where_they_would_change(quantised: Quantised) -> None:
    """An update with scales, and one without where the engine's are not 1, by a backend that has them in its
    graphs. By one that reads them from memory both are right."""
    paths = {"scaled": quantised("fp8-block", "b", 0.5), "plain": quantised("fp8-block", "b")}
    expected = {name: quantised.start(path, kv_cache_dtype="fp8") for name, path in paths.items()}
    for start, update, allowed in (
        ("plain", "scaled", False),
        ("scaled", "plain", False),
        ("plain", "plain", True),
    ):
        before = quantised.start(paths[start], kv_cache_dtype="fp8")
        quantised.offline.rpc("test_graphs", "MADE_UP")
        try:
            if allowed:
                update_from(quantised.offline, paths[update])
            else:
                message = r"ConfigError: .*attn: MADE_UP keeps .* scales in its CUDA graphs.*--enforce-eager"
                with pytest.raises(UpdateError, match=message) as caught:
                    update_from(quantised.offline, paths[update])
                assert caught.value.touched is False
        finally:
            quantised.offline.rpc("test_graphs", None)
        assert quantised.offline.answers() == before
    for name in ("scaled", "plain"):
        quantised.offline.rpc("test_graphs", "TRITON_ATTN")
        update_from(quantised.offline, paths[name])
        quantised.offline.rpc("test_graphs", None)
        assert quantised.offline.answers() == expected[name]


def test_every_border_between_buckets(quantised: Quantised) -> None:
    """The scales of a fused group are tensors of their own, and cut off from it like any other."""
    paths = {version: quantised("ct-int4", version) for version in "ab"}
    expected = {version: quantised.start(paths[version]).digests for version in "ab"}
    count = len(tensor_names(paths["a"]))
    rng = random.Random(SEEDS["a"])
    splits = [[border] for border in range(1, count)]
    splits += [sorted(rng.sample(range(1, count), rng.randint(2, 12))) for _ in range(20)]
    for number, borders in enumerate(splits):
        version = "ab"[number % 2]
        quantised.offline.rpc("test_reload", str(paths[version]), borders)
        assert quantised.offline.rpc("test_digests") == expected[version], borders


def test_a_kernel_that_a_reload_would_break_is_refused_by_name(quantised: Quantised) -> None:
    before = quantised.start(quantised("ct-int8-asymmetric", "a"))
    message = r"ConfigError: model.layers.0.self_attn.qkv_proj: .*CompressedTensorsW8A8Int8 with .* on oneDNN"
    with pytest.raises(UpdateError, match=message) as caught:
        update_from(quantised.offline, quantised("ct-int8-asymmetric", "b"))
    assert caught.value.touched is False
    assert quantised.offline.answers() == before


def test_quantised_experts_are_refused_by_name(quantised: Quantised) -> None:
    path = quantised.checkpoints("moe", "a")
    before = quantised.start(path, quantization="int8_per_channel_weight_only")
    with pytest.raises(UpdateError, match=r"ConfigError: .*experts: .*CPUExpertsInt8") as caught:
        update_from(quantised.offline, quantised.checkpoints("moe", "b"))
    assert caught.value.touched is False
    assert quantised.offline.answers() == before
