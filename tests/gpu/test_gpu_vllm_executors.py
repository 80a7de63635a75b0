"""vLLM's other executors on CUDA: the worker in the LLM class's own process, and one worker on each of two
GPUs, with a parameter server beside each."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed", allow_module_level=True)

from tests.engines.vllm.engines import Answers, Checkpoints, OfflineEngine
from tests.engines.vllm.servers import Fleet
from tests.gpu.vllm_engines import APART, DECODES, SMALL, WHOLE_GRAPHS, same, tell

pytestmark = pytest.mark.timeout(500)

OPTIONS = WHOLE_GRAPHS | SMALL | {"enforce_eager": False}
SIZE = 2
NO_MULTICAST = {"VLLM_ALLREDUCE_USE_SYMM_MEM": "0", "NCCL_NVLS_ENABLE": "0", "NCCL_CUMEM_ENABLE": "0"}
"""Machines that lend some of their GPUs have no multicast between them."""


def test_the_worker_the_parameter_server_and_the_llm_class_are_one_process(tmp_path: Path) -> None:
    """As in a trainer that holds the engine: CUDA opens no memory of its own process by its handle."""
    checkpoints = Checkpoints(tmp_path)
    paths = {version: checkpoints("qwen3", version) for version in "ab"}
    expected = {}
    for version in "ba":
        engine = OfflineEngine(tmp_path / f"engine-{version}.log", TEST_DEVICE="cuda")
        try:
            engine.start(paths[version], **OPTIONS)
            expected[version] = engine.answers()
            if version == "a":
                (replays,) = engine.rpc("test_replays")
                for updated in "bab":
                    committed = engine.ask("update", [str(paths[updated]), {}])
                    same(engine.answers(), expected[updated])
                    assert engine.rpc("ckpt_engine_status")[0]["version"] == committed
                assert engine.rpc("test_replays")[0] >= replays + DECODES, "no CUDA graphs ran"
                engine.rpc("test_fault", "run", 0)
                with pytest.raises(RuntimeError, match="injected in run"):
                    engine.ask("update", [str(paths["a"]), {}])
                engine.ask("update", [str(paths["a"]), {}])
                same(engine.answers(), expected["a"])
        finally:
            engine.close()


@pytest.mark.skipif(torch.cuda.device_count() < SIZE, reason="needs two CUDA devices")
@pytest.mark.parametrize("custom_dist", ["auto", "vllm_nccl"])
def test_two_workers_each_on_a_gpu_of_its_own(tmp_path: Path, custom_dist: str) -> None:
    checkpoints = Checkpoints(tmp_path)
    paths = {version: checkpoints("qwen3", version) for version in "ab"}
    options = OPTIONS | {"tensor_parallel_size": SIZE}
    expected = {}
    for version in "ba":
        engine = OfflineEngine(tmp_path / f"engine-{version}.log", **APART, **NO_MULTICAST)
        try:
            engine.start(paths[version], **options)
            expected[version] = engine.answers()
            if version == "a":
                _update_both(engine, paths, expected, tmp_path / "ranks.txt", custom_dist)
        finally:
            engine.close()


def _update_both(
    engine: OfflineEngine, paths: dict[str, Path], expected: dict[str, Answers], log: Path, custom_dist: str
) -> None:
    one, other = expected["a"].digests
    assert one != other
    fleet = Fleet(
        SIZE,
        log,
        CKPT_ENGINE_SLOT_MIB="0.05",
        CKPT_ENGINE_CUSTOM_DIST=custom_dist,
        TEST_DEVICE="cuda",
        **NO_MULTICAST,
    )
    try:
        differences = []
        for version in "bab":
            fleet.start_update(None, paths[version], tells=True)
            statuses = engine.rpc("update_weights_from_ipc", fleet.handles())
            fleet.go_on()
            assert [status["outcome"] for status in statuses] == ["committed"] * SIZE, statuses
            assert ["report" in result for result in fleet.results()] == [True] * SIZE
            differences.append(same(engine.answers(), expected[version]))
        tell(custom_dist=custom_dist, logprob_differences=differences)
    finally:
        fleet.close()
