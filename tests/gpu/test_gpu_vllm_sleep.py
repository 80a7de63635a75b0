"""vLLM on CUDA that has given its memory back (sleep): woken up in two steps, with an update between them."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed", allow_module_level=True)

from ckpt_engine.errors import UpdateError
from tests.engines.vllm.engines import Answers, Checkpoints, OfflineEngine
from tests.engines.vllm.parameter_servers import update_from
from tests.gpu.vllm_engines import APART, DECODES, WHOLE_GRAPHS, same, tell

pytestmark = pytest.mark.timeout(500)

ARCHITECTURE = "medium"
"""Large enough to be seen in the device's free memory."""
CACHE_NBYTES = 2**30
OPTIONS = WHOLE_GRAPHS | {
    "gpu_memory_utilization": 0.2,
    "kv_cache_memory_bytes": CACHE_NBYTES,
    "enforce_eager": False,
}
UNSEEN = 0.25
"""Of the weights' bytes: what allocators round up, and keep."""


@dataclass
class Sleeper:
    engine: OfflineEngine
    paths: dict[str, Path]
    expected: dict[str, Answers]
    weights_nbytes: int

    def free(self) -> int:
        (free,) = self.engine.rpc("test_free_memory")
        return int(free)


@pytest.fixture(scope="module")
def sleeper(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sleeper]:
    """An engine that began with version a; an engine without sleep says what b answers."""
    base = tmp_path_factory.mktemp("sleep")
    checkpoints = Checkpoints(base)
    paths = {version: checkpoints(ARCHITECTURE, version) for version in "ab"}
    engine = OfflineEngine(base / "from-disk.log", **APART)
    try:
        engine.start(paths["b"], **OPTIONS)
        expected = {"b": engine.answers()}
    finally:
        engine.close()
    engine = OfflineEngine(base / "sleeps.log", **APART)
    try:
        engine.start(paths["a"], enable_sleep_mode=True, **OPTIONS)
        expected["a"] = engine.answers()
        nbytes = (paths["a"] / "model.safetensors").stat().st_size
        yield Sleeper(engine, paths, expected, nbytes)
    finally:
        engine.close()


@pytest.mark.parametrize("level", [1, 2])
def test_an_update_between_waking_the_weights_and_waking_the_cache(sleeper: Sleeper, level: int) -> None:
    """At level 1 the old weights lie on the host meanwhile, at level 2 nowhere."""
    engine, unseen = sleeper.engine, int(UNSEEN * sleeper.weights_nbytes)
    update_from(engine, sleeper.paths["a"], device="cuda")
    (addresses,) = engine.rpc("test_addresses")
    (replays,) = engine.rpc("test_replays")
    awake = sleeper.free()
    engine.ask("sleep", level)
    asleep = sleeper.free()
    assert asleep - awake > sleeper.weights_nbytes + CACHE_NBYTES - unseen
    with pytest.raises(UpdateError, match="ConfigError: the engine's weights are asleep") as caught:
        update_from(engine, sleeper.paths["b"], device="cuda")
    assert caught.value.touched is False
    engine.ask("wake_up", ["weights"])
    weights_awake = sleeper.free()
    assert abs(asleep - weights_awake - sleeper.weights_nbytes) < unseen
    report = update_from(engine, sleeper.paths["b"], device="cuda")
    # The update was done without the cache's memory, and keeps none of its own.
    assert abs(sleeper.free() - weights_awake) < unseen
    engine.ask("wake_up", ["kv_cache"])
    assert abs(sleeper.free() - awake) < unseen
    assert engine.rpc("test_addresses") == [addresses]
    difference = same(engine.answers(), sleeper.expected["b"])
    (now,) = engine.rpc("test_replays")
    assert now >= replays + DECODES, "no CUDA graphs ran"
    (status,) = engine.rpc("ckpt_engine_status")
    assert (status["weights"], status["version"]) == ("serving", report.version)
    tell(
        level=level, given_back=asleep - awake, weights=sleeper.weights_nbytes, logprob_difference=difference
    )


def test_what_was_asleep_is_updated_again_and_again(sleeper: Sleeper) -> None:
    """Version after version, as a trainer does that has the device between the updates."""
    for number, version in enumerate("aba"):
        sleeper.engine.ask("sleep", 1 + number % 2)
        sleeper.engine.ask("wake_up", ["weights"])
        update_from(sleeper.engine, sleeper.paths[version], device="cuda")
        sleeper.engine.ask("wake_up", ["kv_cache"])
        same(sleeper.engine.answers(), sleeper.expected[version])
