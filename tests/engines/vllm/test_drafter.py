"""A model that speculates beside the main one: it is updated with it.

One with a checkpoint of its own, under names of its own; an MTP layer, from the main model's checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ckpt_engine.errors import UpdateError
from tests.engines.vllm.drafters import make_eagle, make_mimo
from tests.engines.vllm.engines import PROMPTS, Checkpoints, OfflineEngine
from tests.engines.vllm.parameter_servers import update_from


def test_a_drafter_gets_its_own_tensors_and_only_those(
    offline: OfflineEngine, checkpoints: Checkpoints
) -> None:
    """Its checkpoint has the very names of the main model's."""
    paths = {version: checkpoints("qwen3", version) for version in "ab"}
    expected = {version: offline.from_disk(path).digests[0] for version, path in paths.items()}
    speculative = {"model": str(paths["a"]), "method": "draft_model", "num_speculative_tokens": 2}
    offline.start(paths["a"], load_format="dummy", speculative_config=speculative)
    (dummy,) = offline.rpc("test_drafter_digests")

    update_from(offline, paths["a"])
    assert offline.rpc("test_digests") == [expected["a"]]
    assert offline.rpc("test_drafter_digests") == [dummy]
    # Not in silence.
    assert offline.rpc("ckpt_engine_status")[0]["last"]["models"] == {"model": 25, "drafter": 0}

    tensors = {version: load_file(path / "model.safetensors") for version, path in paths.items()}
    drafts = {f"drafter.{name}": tensor for name, tensor in tensors["a"].items()}
    update_from(offline, tensors["b"] | drafts)
    assert offline.rpc("test_digests") == [expected["b"]]
    assert offline.rpc("test_drafter_digests") == [expected["a"]]

    del drafts["drafter.model.norm.weight"]
    with pytest.raises(UpdateError, match=r"WeightsMismatch.*model.norm.weight"):
        update_from(offline, tensors["a"] | drafts)
    assert offline.rpc("test_digests") == [expected["b"]]
    assert offline.ask("generate", [[5, 6, 7]])


def _all_of(offline: OfflineEngine) -> list[Any]:
    """What the engine answers, which its drafter may not change, and what both hold."""
    return [
        offline.ask("generate", PROMPTS),
        offline.rpc("test_digests"),
        offline.rpc("test_drafter_digests"),
    ]


def _with_eagle(model: Path, eagle: Path) -> Mapping[str, torch.Tensor]:
    drafts = load_file(eagle / "model.safetensors")
    return load_file(model / "model.safetensors") | {f"drafter.{name}": each for name, each in drafts.items()}


def _speculating(method: str, **more: Any) -> dict[str, Any]:  # noqa: ANN401 - JSON
    return {"speculative_config": {"method": method, "num_speculative_tokens": 1, **more}}


def test_an_mtp_layer_comes_from_the_models_checkpoint(
    offline: OfflineEngine, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    """Embedding and head belong to both; each model gets the layers that are its own."""
    options = _speculating("mtp") | {"trust_remote_code": True}
    paths = {version: make_mimo(checkpoints("qwen2", version), tmp_path / version) for version in "ab"}
    expected = {}
    for version, path in paths.items():
        offline.start(path, **options)
        expected[version] = _all_of(offline)
    layer = "model.mtp_layers.2.input_proj.weight"
    assert expected["a"][2][0][layer] != expected["b"][2][0][layer]
    assert layer not in expected["a"][1][0]
    offline.start(paths["a"], load_format="dummy", **options)
    for version, slot_nbytes in (("a", None), ("b", 9000), ("a", 1)):
        update_from(offline, paths[version], slot_nbytes=slot_nbytes)
        assert _all_of(offline) == expected[version]
    assert offline.rpc("ckpt_engine_status")[0]["last"]["models"] == {"model": 27, "drafter": 18}

    tensors = load_file(paths["b"] / "model.safetensors")
    del tensors["model.mtp_layers.0.input_proj.weight"]
    with pytest.raises(UpdateError, match=rf"WeightsMismatch.*{layer}") as caught:
        update_from(offline, tensors)
    assert caught.value.touched is False
    assert _all_of(offline) == expected["a"]


@pytest.mark.parametrize("embedding", [False, True], ids=["the model's embedding", "an embedding of its own"])
def test_an_eagle_head(
    offline: OfflineEngine, checkpoints: Checkpoints, tmp_path: Path, embedding: bool
) -> None:
    models = {version: checkpoints("llama", version) for version in "ab"}
    eagles = {
        version: make_eagle(models[version], tmp_path / version, embedding=embedding) for version in "ab"
    }
    expected = {}
    for version in "ba":
        offline.start(models[version], **_speculating("eagle", model=str(eagles[version])))
        expected[version] = _all_of(offline)
    assert expected["a"][2][0]["model.fc as packed"] != expected["b"][2][0]["model.fc as packed"]
    for version, slot_nbytes in (("b", None), ("a", 9000), ("b", 1)):
        update_from(offline, _with_eagle(models[version], eagles[version]), slot_nbytes=slot_nbytes)
        assert _all_of(offline) == expected[version]


def test_an_embedding_for_an_eagle_head_that_uses_the_models_is_refused(
    offline: OfflineEngine, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    """Between dummy weights vLLM sees no difference, and has both use one embedding."""
    model = checkpoints("llama", "a")
    eagle = make_eagle(model, tmp_path / "eagle", embedding=True)
    offline.start(model, load_format="dummy", **_speculating("eagle", model=str(eagle)))
    before = _all_of(offline)
    tensors = _with_eagle(model, eagle)
    name = "drafter.embed_tokens.weight"
    with pytest.raises(UpdateError, match=rf"ConfigError: .*drafter has no .*ignored=\['{name}'\]") as caught:
        update_from(offline, tensors)
    assert caught.value.touched is False
    assert _all_of(offline) == before
    update_from(offline, tensors, ignored=[name])
    assert offline.answers() == offline.from_disk(model)
