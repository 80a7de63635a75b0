"""A model that speculates beside the main one: it is updated with it.

One with a checkpoint of its own, under names of its own; an MTP layer, from the main model's checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ckpt_engine.errors import UpdateError
from tests.engines.vllm.drafters import make_eagle, make_mimo
from tests.engines.vllm.engines import PROMPTS, Checkpoints, OfflineEngine
from tests.engines.vllm.parameter_servers import update_by, update_from
from tests.engines.vllm.servers import Fleet
from tests.engines.vllm.test_two_workers import loads_and_updates_are_alike


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


def _natively(offline: OfflineEngine, checkpoint: Path) -> dict[str, Any]:
    """An update by what vLLM's own routes call; the worker's status."""

    def ask(socket_paths: list[tuple[str, str]]) -> None:
        offline.rpc("start_weight_update")
        offline.rpc("update_weights", {"zmq_handles": [list(pair) for pair in socket_paths]})
        offline.rpc("finish_weight_update")

    update_by(checkpoint, ask)
    return offline.rpc("ckpt_engine_status")[0]["last"]


NATIVE = {"weight_transfer_config": {"backend": "ckpt_engine"}}


def test_vllms_own_routes_refuse_an_engine_with_a_drafter(
    offline: OfflineEngine, checkpoints: Checkpoints
) -> None:
    path = checkpoints("qwen3", "a")
    offline.start(path, **_speculating("draft_model", model=str(path)), **NATIVE)
    before = _all_of(offline)
    with pytest.raises(UpdateError, match=r"ConfigError: .*does not update drafters") as caught:
        _natively(offline, checkpoints("qwen3", "b"))
    assert caught.value.touched is False
    assert "does not update drafters" in offline.rpc("ckpt_engine_status")[0]["last"]["error"]
    assert _all_of(offline) == before


def test_vllms_own_routes_update_an_engine_that_speculates_by_n_grams(
    offline: OfflineEngine, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    """It has the main model's config as its drafter's."""
    paths = {version: checkpoints("qwen3", version) for version in "ab"}
    expected = offline.from_disk(paths["b"])
    # In a process of its own: after n-grams vLLM 0.32 cannot start another engine in the same one.
    engine = OfflineEngine(tmp_path / "log.txt")
    try:
        engine.start(paths["a"], **_speculating("ngram", prompt_lookup_max=2), **NATIVE)
        before = engine.answers()
        assert _natively(engine, paths["b"])["outcome"] == "committed"
        assert engine.rpc("test_digests") == expected.digests
        update_from(engine, paths["a"])
        assert engine.answers() == before
    finally:
        engine.close()


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


def test_an_mtp_model_of_a_checkpoint_apart_gets_its_own_tensors(
    offline: OfflineEngine, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    """vLLM calls it `mtp` too."""
    paths = {version: make_mimo(checkpoints("qwen2", version), tmp_path / version) for version in "ab"}
    expected = {}
    for main, drafter in ("ab", "ba"):
        options = _speculating("mtp", model=str(paths[drafter])) | {"trust_remote_code": True}
        offline.start(paths[main], **options)
        expected[main] = _all_of(offline)
    tensors = {version: load_file(path / "model.safetensors") for version, path in paths.items()}
    # Now the main model is b. The drafter's embedding and head may be the main model's.
    for main, drafter in ("ab", "ba"):
        drafts = {
            f"drafter.{name}": each for name, each in tensors[drafter].items() if ".mtp_layers." in name
        }
        mains = {name: each for name, each in tensors[main].items() if ".mtp_layers." not in name}
        update_from(offline, mains | drafts, partial=True)
        assert offline.rpc("test_digests") == expected[main][1]
        (digests,) = offline.rpc("test_drafter_digests")
        own = {name for name in digests if ".mtp_layers." in name}
        assert own
        assert {name: digests[name] for name in own} == {name: expected[main][2][0][name] for name in own}
    # The main model's tensors alone leave its layers as they are.
    update_from(offline, {name: each for name, each in tensors["a"].items() if ".mtp_layers." not in name})
    (after,) = offline.rpc("test_drafter_digests")
    assert {name: after[name] for name in own} == {name: digests[name] for name in own}
    assert offline.rpc("ckpt_engine_status")[0]["last"]["models"]["drafter"] == 0


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


@pytest.mark.timeout(600)
@pytest.mark.parametrize("method", ["mtp", "eagle"])
def test_two_workers_have_their_shards_of_both_models(
    offline: OfflineEngine, checkpoints: Checkpoints, tmp_path: Path, method: str
) -> None:
    """From the model's checkpoint, and from one of the drafter's own; fused groups lie in several buckets."""
    if method == "mtp":
        paths = {version: make_mimo(checkpoints("qwen2", version), tmp_path / version) for version in "ab"}
        more = _speculating("mtp") | {"trust_remote_code": True}
        starts = {version: {"model": path, **more} for version, path in paths.items()}
    else:
        paths, starts = {version: tmp_path / f"sent-{version}" for version in "ab"}, {}
        for version, path in paths.items():
            model = checkpoints("llama", version)
            eagle = make_eagle(model, tmp_path / version)
            starts[version] = {"model": model, **_speculating("eagle", model=str(eagle))}
            path.mkdir()
            save_file(dict(_with_eagle(model, eagle)), path / "model.safetensors")
    fleet = Fleet(2, tmp_path / "ranks.txt", CKPT_ENGINE_SLOT_MIB=str(9000 / 2**20))
    try:
        expected = loads_and_updates_are_alike(offline, paths, fleet, starts=starts, held=_all_of)
        of_model, of_drafter = zip(*(expected[version][1:] for version in "ab"), strict=True)
        for (first, second), (other, _) in (of_model, of_drafter):
            assert first != second
            assert first != other
        for status in offline.rpc("ckpt_engine_status"):
            assert all(status["last"]["models"][name] for name in ("model", "drafter"))
    finally:
        fleet.close()
