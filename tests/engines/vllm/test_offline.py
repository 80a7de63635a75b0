"""vLLM's LLM class, one worker: updates in place against the same engine after loading from disk."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ckpt_engine.errors import UpdateError
from ckpt_engine.metadata import align_up
from ckpt_engine.planning.layers import layer_of
from tests.engines.vllm.engines import SEEDS, Answers, Checkpoints, OfflineEngine
from tests.engines.vllm.parameter_servers import update_from


@dataclass
class Model:
    """An engine that started with dummy weights, and what it should answer for either version."""

    engine: OfflineEngine
    paths: dict[str, Path]
    expected: dict[str, Answers]
    dummy: Answers

    def make_ready(self) -> None:
        """Serving, whatever a test that failed has left of it."""
        if self.engine.lives:
            self.engine.rpc("test_clean")
        else:
            self.engine.start(self.paths["a"], load_format="dummy")


@pytest.fixture(scope="module", params=["qwen3", "llama", "tied", "moe"])
def model(request: pytest.FixtureRequest, offline: OfflineEngine, checkpoints: Checkpoints) -> Model:
    paths = {version: checkpoints(request.param, version) for version in "ab"}
    expected = {version: offline.from_disk(path) for version, path in paths.items()}
    assert expected["a"].generated != expected["b"].generated
    offline.start(paths["a"], load_format="dummy")
    return Model(offline, paths, expected, offline.answers())


@pytest.fixture(autouse=True)
def ready(model: Model) -> None:
    """Before each test."""
    model.make_ready()


def test_it_answers_as_if_loaded_from_disk_update_after_update(model: Model) -> None:
    assert model.dummy.generated != model.expected["a"].generated
    for version in "aba":
        report = update_from(model.engine, model.paths[version])
        assert model.engine.answers() == model.expected[version]
        (status,) = model.engine.rpc("ckpt_engine_status")
        assert (status["rank"], status["weights"], status["version"]) == (0, "serving", report.version)


@pytest.mark.parametrize("slot_nbytes", [1, 3000, 9000, 20_000, 33_000, 70_000, 150_000, 10_000_000])
def test_any_bucket_size(model: Model, slot_nbytes: int) -> None:
    """From a tensor in each bucket to the whole model in one; slots are used again."""
    for version in "ba":
        update_from(model.engine, model.paths[version], slot_nbytes=slot_nbytes)
        assert model.engine.rpc("test_digests") == model.expected[version].digests


def test_a_layer_that_fits_a_slot_is_not_copied(model: Model) -> None:
    """Several layers to a slot, and many slots: no border is inside a layer, so that nothing is kept."""
    tensors = load_file(model.paths["b"] / "model.safetensors")
    layers: dict[str, int] = {}
    for name, tensor in tensors.items():
        # With what lies between q, k and v by name, and the padding.
        layer = layer_of(name)
        layers[layer] = layers.get(layer, 0) + align_up(tensor.nbytes)
    slot = 2 * max(layers.values())
    report = update_from(model.engine, model.paths["b"], slot_nbytes=slot)
    (status,) = model.engine.rpc("ckpt_engine_status")
    assert report.buckets > 1, (slot, layers)
    assert status["last"]["kept_bytes"] == 0
    update_from(model.engine, model.paths["a"], slot_nbytes=1)
    (status,) = model.engine.rpc("ckpt_engine_status")
    assert status["last"]["kept_bytes"] > 0


def test_every_border_between_buckets(model: Model) -> None:
    """So each fused parameter is cut at each of its members; then cuts at random."""
    rng = random.Random(SEEDS["a"])
    count = len(tensor_names(model.paths["a"]))
    splits = [[border] for border in range(1, count)]
    splits += [sorted(rng.sample(range(1, count), rng.randint(2, min(12, count - 1)))) for _ in range(20)]
    kept = set()
    for number, borders in enumerate(splits):
        version = "ab"[number % 2]
        kept.add(model.engine.rpc("test_reload", str(model.paths[version]), borders)[0])
        assert model.engine.rpc("test_digests") == model.expected[version].digests, borders
    assert 0 in kept
    assert max(kept) > 0


def test_it_is_verified_in_full(model: Model) -> None:
    """Of what vLLM keeps packed for its kernels on CPUs, no bytes can be compared, which is told."""
    names = set(tensor_names(model.paths["a"]))
    for slot_nbytes in (9000, 10_000_000):
        update_from(model.engine, model.paths["a"], slot_nbytes=slot_nbytes, verify="full")
        (status,) = model.engine.rpc("ckpt_engine_status")
        verified = status["last"]["verified"]
        assert verified["arrived"] == len(names)
        left_out = status["last"]["not_compared"]
        assert 0 < verified["loaded"] <= len(names) - len(left_out)  # of which the first are named
        packed = ("proj", "experts", "mlp.gate.", "lm_head")
        assert all(any(part in name for part in packed) for name in left_out), left_out


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.layers.1.input_layernorm.weight"])
def test_a_bit_that_flips_once_it_is_loaded_is_found_and_named(model: Model, name: str) -> None:
    model.engine.rpc("test_flip", name)
    with pytest.raises(UpdateError, match=f"tensor '{name}' .*was loaded as other bytes") as caught:
        update_from(model.engine, model.paths["a"], verify="full")
    assert (caught.value.record.error_type, caught.value.record.stage) == ("CorruptionError", "post_hook")
    (status,) = model.engine.rpc("ckpt_engine_status")
    assert status["weights"] == "incomplete"
    update_from(model.engine, model.paths["a"], verify="full")
    assert model.engine.answers() == model.expected["a"]


def test_a_model_that_wants_tensors_together_is_refused_where_they_come_apart(model: Model) -> None:
    """What no later call would mend must be found before the weights are touched."""
    update_from(model.engine, model.paths["a"])
    model.engine.rpc("test_pairs", True)
    try:
        with pytest.raises(UpdateError, match=r"WeightsMismatch: .*gate_proj.weight"):
            update_from(model.engine, model.paths["b"], slot_nbytes=3000)
        assert model.engine.rpc("test_digests") == model.expected["a"].digests
        update_from(model.engine, model.paths["b"])
        assert model.engine.rpc("test_digests") == model.expected["b"].digests
    finally:
        model.engine.rpc("test_pairs", False)


def test_update_in_one_call(model: Model) -> None:
    for version in "ba":
        committed = model.engine.ask("update", [str(model.paths[version]), {}])
        assert model.engine.answers() == model.expected[version]
        assert model.engine.rpc("ckpt_engine_status")[0]["version"] == committed


def test_update_in_one_call_raises_what_the_worker_did(model: Model) -> None:
    update_from(model.engine, model.paths["a"])
    model.engine.rpc("test_fault", "run", 0)
    with pytest.raises(RuntimeError, match="UpdateError") as caught:
        model.engine.ask("update", [str(model.paths["b"]), {}])
    assert "RuntimeError: injected in run" in str(caught.value)
    assert "tests/engines/vllm/extension.py" in str(caught.value)
    model.engine.ask("update", [str(model.paths["b"]), {}])
    assert model.engine.answers() == model.expected["b"]


def test_update_in_one_call_has_the_workers_options(model: Model, tmp_path: Path) -> None:
    update_from(model.engine, model.paths["a"])
    name, unknown = "model.norm.weight", "model.layers.0.mlp.down_proj.bias"
    part = {name: load_file(model.paths["b"] / "model.safetensors")[name]}
    save_file(part | {unknown: torch.zeros(128, dtype=torch.bfloat16)}, tmp_path / "model.safetensors")
    for options in ({"partial": True}, {"ignored": [unknown]}):
        with pytest.raises(RuntimeError, match="WeightsMismatch"):
            model.engine.ask("update", [str(tmp_path), options])
        assert model.engine.rpc("test_digests") == model.expected["a"].digests
    model.engine.ask("update", [str(tmp_path), {"partial": True, "ignored": [unknown]}])
    expected = dict(model.expected["a"].digests[0])
    expected[name] = model.expected["b"].digests[0][name]
    assert model.engine.rpc("test_digests") == [expected]


def test_a_part_of_the_model_only_when_asked_for(model: Model) -> None:
    update_from(model.engine, model.paths["a"])
    name = "model.norm.weight"
    part = {name: load_file(model.paths["b"] / "model.safetensors")[name]}
    with pytest.raises(UpdateError, match=r"does not fill .*partial=True"):
        update_from(model.engine, part)
    assert model.engine.answers() == model.expected["a"]
    update_from(model.engine, part, partial=True)
    expected = dict(model.expected["a"].digests[0])
    assert expected[name] != model.expected["b"].digests[0][name]
    expected[name] = model.expected["b"].digests[0][name]
    assert model.engine.rpc("test_digests") == [expected]


def test_a_part_of_a_module_is_refused(model: Model) -> None:
    """Its other parameters would be neither the old ones nor new ones."""
    update_from(model.engine, model.paths["a"])
    tensors = load_file(model.paths["b"] / "model.safetensors")
    member = "model.layers.0.self_attn.v_proj.weight"
    with pytest.raises(UpdateError, match=r"qkv_proj.weight \(missing .*q_proj.weight, .*k_proj.weight\)"):
        update_from(model.engine, {member: tensors[member]}, partial=True)
    assert model.engine.rpc("test_digests") == model.expected["a"].digests


def test_tensors_that_the_model_has_no_place_for_may_be_ignored(model: Model) -> None:
    tensors = load_file(model.paths["b"] / "model.safetensors")
    tensors["model.layers.0.mlp.down_proj.bias"] = torch.zeros(128, dtype=torch.bfloat16)
    with pytest.raises(UpdateError, match=r"WeightsMismatch.*mlp.down_proj.bias"):
        update_from(model.engine, tensors)
    update_from(model.engine, tensors, ignored=["model.layers.*.mlp.down_proj.bias"])
    assert model.engine.answers() == model.expected["b"]


def tensor_names(checkpoint: Path) -> list[str]:
    from safetensors import safe_open

    with safe_open(checkpoint / "model.safetensors", framework="pt") as file:
        return list(file.keys())
