"""vLLM's LLM class with two workers, for models whose layers are split in ways of their own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.engines.vllm.engines import Checkpoints, OfflineEngine
from tests.engines.vllm.quantised import LIMITS, quantise, skipping_without_kernel
from tests.engines.vllm.servers import Fleet

pytestmark = pytest.mark.timeout(600)


def loads_and_updates_are_alike(
    engine: OfflineEngine,
    paths: Mapping[str, Path],
    fleet: Fleet,
    *,
    verifies: bool = False,
    starts: Mapping[str, Mapping[str, Any]] | None = None,
    held: Callable[[OfflineEngine], Any] = OfflineEngine.answers,
    **options: Any,  # noqa: ANN401 - LLM's arguments
) -> dict[str, Any]:
    """Each version is loaded from disk once; the engine that loaded the last one is updated from there on.

    Args:
        paths: what the updates send.
        verifies: the parameter servers verify in full.
        starts: LLM's arguments for each version, where they are more than its path.
        held: what is compared, and returned.
    """
    expected = {}
    for version, path in paths.items():
        start = {"model": path} if starts is None else starts[version]
        engine.start(**start, tensor_parallel_size=2, **options)
        expected[version] = held(engine)
    assert expected["a"] != expected["b"]
    for version in "abab":
        fleet.start_update(None, paths[version], tells=True)
        statuses = engine.rpc("update_weights_from_ipc", fleet.handles())
        fleet.go_on()
        assert [status["outcome"] for status in statuses] == ["committed"] * 2, statuses
        assert ["report" in result for result in fleet.results()] == [True] * 2
        assert held(engine) == expected[version]
        for status in statuses if verifies else ():
            # Each worker has a part of the embedding, and all of each norm.
            verified, left_out = status["verified"], status["not_compared"]
            assert 0 < verified["loaded"] <= verified["arrived"] == status["tensors"]
            assert not [name for name in left_out if "embed" in name or "norm" in name], left_out
    return expected


@pytest.mark.parametrize("architecture", ["llama", "moe", "tied"])
def test_they_answer_as_if_loaded_from_disk_update_after_update(
    offline: OfflineEngine, checkpoints: Checkpoints, tmp_path: Path, architecture: str
) -> None:
    paths = {version: checkpoints(architecture, version) for version in "ab"}
    fleet = Fleet(2, tmp_path / "ranks.txt", CKPT_ENGINE_SLOT_MIB="0.05", CKPT_ENGINE_VERIFY="full")
    try:
        expected = loads_and_updates_are_alike(offline, paths, fleet, verifies=True)
        assert expected["a"].generated != expected["b"].generated
    finally:
        fleet.close()


@pytest.mark.parametrize("layout", ["fp8-block", "ct-int4"])
def test_they_have_their_shards_of_a_quantised_checkpoint(
    offline: OfflineEngine, checkpoints: Checkpoints, tmp_path: Path, layout: str
) -> None:
    """Fused groups and their scales lie in several buckets."""
    paths = {version: tmp_path / version for version in "ab"}
    for version, path in paths.items():
        quantise(checkpoints("wider", version), path, layout)
    fleet = Fleet(2, tmp_path / "ranks.txt", CKPT_ENGINE_SLOT_MIB=str(9000 / 2**20))
    try:
        with skipping_without_kernel():
            expected = loads_and_updates_are_alike(offline, paths, fleet, **LIMITS)
        assert expected["a"].generated != expected["b"].generated
        first, second = expected["a"].digests
        assert first != second
    finally:
        fleet.close()
