"""vLLM's LLM class with two workers, for models whose layers are split in ways of their own."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.engines.vllm.engines import Checkpoints, OfflineEngine
from tests.engines.vllm.servers import Fleet

pytestmark = pytest.mark.timeout(600)


@pytest.mark.parametrize("architecture", ["llama", "moe", "tied"])
def test_they_answer_as_if_loaded_from_disk_update_after_update(
    offline: OfflineEngine, checkpoints: Checkpoints, tmp_path: Path, architecture: str
) -> None:
    paths = {version: checkpoints(architecture, version) for version in "ab"}
    expected = {version: offline.from_disk(path, 2) for version, path in paths.items()}
    assert expected["a"].generated != expected["b"].generated
    offline.start(paths["a"], load_format="dummy", tensor_parallel_size=2)
    fleet = Fleet(2, tmp_path / "ranks.txt", CKPT_ENGINE_SLOT_MIB="0.05")
    try:
        for version in "aba":
            fleet.start_update(None, paths[version], tells=True)
            statuses = offline.rpc("update_weights_from_ipc", fleet.handles())
            fleet.go_on()
            assert [status["outcome"] for status in statuses] == ["committed"] * 2, statuses
            assert ["report" in result for result in fleet.results()] == [True] * 2
            assert offline.answers() == expected[version]
    finally:
        fleet.close()
