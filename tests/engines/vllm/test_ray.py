"""vLLM's executors on Ray, with two workers, which are Ray's actors.

vLLM knows no device of Ray's for CPUs, so a platform of this test's gives it one (`ray_platform.py`). The
executors, the workers and Ray itself are the real ones.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path

import pytest

from tests.engines.vllm.engines import ROOT, Checkpoints, OfflineEngine
from tests.engines.vllm.servers import Fleet

pytestmark = pytest.mark.timeout(600)
RAY = Path(sys.prefix) / "ray"
"""`make test-vllm` installs it there."""
SIZE = 2
SHARED_MEMORY, WORKERS_MEMORY = Path("/dev/shm"), "[!v]*-cpushm_*"
"""Not that of the other executors' workers, whose names begin with vllm_dist_."""
RESOURCES = {"CPU": 2, "GPU": SIZE, "object_store_memory": 100 * 2**20}
"""What Ray believes that this machine has."""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """Of a process in which vLLM finds Ray, and the platform that lets it have workers there."""
    assert (RAY / "ray").is_dir(), "Ray is not installed for these tests: make .venv-vllm/ray/.stamp"
    plugin = tmp_path / "platform" / "ray_platform-0.dist-info"
    plugin.mkdir(parents=True)
    (plugin / "METADATA").write_text("Metadata-Version: 2.1\nName: ray-platform\nVersion: 0\n")
    (plugin / "entry_points.txt").write_text(
        "[vllm.platform_plugins]\nray_cpu = tests.engines.vllm.ray_platform:name\n"
    )
    path = [str(ROOT), str(plugin.parent), str(RAY), os.environ.get("PYTHONPATH", "")]
    return {
        "PYTHONPATH": os.pathsep.join(filter(None, path)),
        "RAY_OVERRIDE_RESOURCES": json.dumps(RESOURCES),
        "RAY_USAGE_STATS_ENABLED": "0",
    }


@pytest.mark.parametrize(
    ("executor", "module", "is_v2"),
    [("RayExecutorV2", "ray_executor_v2", "1"), ("RayDistributedExecutor", "ray_executor", "0")],
    ids=["v2", "v1"],
)
def test_it_answers_as_if_loaded_from_disk_update_after_update(
    offline: OfflineEngine,
    checkpoints: Checkpoints,
    environment: dict[str, str],
    tmp_path: Path,
    executor: str,
    module: str,
    is_v2: str,
) -> None:
    vllm = importlib.util.find_spec("vllm")
    assert vllm is not None
    assert vllm.origin is not None
    if not (Path(vllm.origin).parent / "v1" / "executor" / f"{module}.py").exists():
        pytest.skip("this vLLM has no such executor")
    paths = {version: checkpoints("qwen3", version) for version in "ab"}
    # Of the multiprocess executor: the same workers compute the same.
    expected = {version: offline.from_disk(path, SIZE) for version, path in paths.items()}
    before = set(SHARED_MEMORY.glob(WORKERS_MEMORY))
    log = tmp_path / "log.txt"
    engine = OfflineEngine(log, **environment, VLLM_USE_RAY_V2_EXECUTOR_BACKEND=is_v2)
    fleet = Fleet(SIZE, tmp_path / "ranks.txt", first=1, CKPT_ENGINE_SLOT_MIB="0.05")
    # The environment names the port before the store's.
    place = {"rank": 0, "world_size": SIZE, "master_addr": "127.0.0.1", "master_port": fleet.port + 1}

    def update(version: str) -> str:
        """`ckpt_engine_vllm.update` with the first rank in the LLM class's process."""
        fleet.start_update(None, paths[version], tells=True)
        return engine.ask("update", [str(paths[version]), {}])

    try:
        engine.start(
            paths["a"],
            load_format="dummy",
            tensor_parallel_size=SIZE,
            distributed_executor_backend="ray",
        )
        assert engine.ask("executor", None) == executor
        assert engine.answers().generated != expected["a"].generated
        engine.ask("join", place)
        for version in "aba":
            committed = update(version)
            assert [result["report"]["version"] for result in fleet.results()] == [committed]
            assert engine.answers() == expected[version]
            found = engine.rpc("ckpt_engine_status")
            assert [(each["rank"], each["version"]) for each in found] == [(0, committed), (1, committed)]

        engine.rpc("test_fault", "run", 1, 1)
        with pytest.raises(RuntimeError, match="injected in run"):
            update("b")
        assert ["injected in run" in result["error"] for result in fleet.results()] == [True]
        assert [each["weights"] for each in engine.rpc("ckpt_engine_status")] == ["incomplete"] * SIZE
        assert [engine.rpc("test_echo", value) for value in range(3)] == [[0, 0], [1, 1], [2, 2]]
        update("b")
        assert ["report" in result for result in fleet.results()] == [True]
        assert engine.answers() == expected["b"]
    except RuntimeError:
        print(log.read_text()[-6000:])  # noqa: T201 - what Ray said
        raise
    finally:
        fleet.close()
        engine.close()
        # vLLM ends workers on Ray by killing them, which leaves what they shared.
        for left in set(SHARED_MEMORY.glob(WORKERS_MEMORY)) - before:
            left.unlink()
