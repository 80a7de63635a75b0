"""A model that speculates beside the main one: it is updated with it, under names of its own."""

from __future__ import annotations

import pytest
from safetensors.torch import load_file

from ckpt_engine.errors import UpdateError
from tests.engines.vllm.engines import Checkpoints, OfflineEngine
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
