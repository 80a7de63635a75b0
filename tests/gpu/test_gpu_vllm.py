"""Real vLLM on CUDA with its graphs on: after updates by CUDA IPC it is the engine that loads from disk.

Compared with an engine of the same vLLM that loaded the same checkpoint itself: the bytes of every parameter,
the greedy tokens, and the log-probabilities within TOLERANCE.
"""

from __future__ import annotations

import importlib.util
import json
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed", allow_module_level=True)

from safetensors.torch import load_file

from ckpt_engine.errors import UpdateError
from tests.engines.vllm.engines import Answers, Checkpoints, OfflineEngine
from tests.engines.vllm.parameter_servers import update_from
from tests.engines.vllm.servers import Server
from tests.integration.conftest import torchrun

pytestmark = pytest.mark.timeout(500)

# vLLM's default has Inductor write the kernels, runs pieces of a prompt and whole decodes in graphs. Without
# Inductor its own kernels run, prompts too in whole graphs.
WHOLE_GRAPHS = {"compilation_config": {"mode": 0, "cudagraph_mode": "FULL"}}
MODES: dict[str, dict[str, Any]] = {"qwen3": {}, "tied": WHOLE_GRAPHS, "moe": WHOLE_GRAPHS}
SMALL = {"gpu_memory_utilization": 0.05, "kv_cache_memory_bytes": 2**28}
"""Several engines share the device."""
SLOT_NBYTES = 100_000
"""So that an update of a tiny model takes several buckets."""
TOLERANCE = 0.02
"""Of log-probabilities: another order of the sums in a kernel, which tuning may choose, changes logits of
about 4 by a unit in bfloat16's last place, 2 ** -6. With code from vLLM's cache there should be none."""
BETWEEN_SERVERS = 0.2
"""The same, between two servers of a larger model, of which one wrote the compiled code that the other found:
three units in the last place of logits near 16. In one process TOLERANCE holds."""
APART = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "TEST_DEVICE": "cuda"}
"""As vLLM is by default: its worker in another process than the LLM class."""
SERVER_OPTIONS = (
    *("--gpu-memory-utilization", "0.2", "--kv-cache-memory-bytes", str(2**30)),
    *("--weight-transfer-config", '{"backend": "ckpt_engine"}'),
)
DECODES = 30
"""Of the steps of an engine's answers, at least."""


@dataclass
class Model:
    """An engine that started with dummy weights; what it answered then, and what it should for a version."""

    engine: OfflineEngine
    paths: dict[str, Path]
    expected: dict[str, Answers]
    dummy: Answers


@dataclass
class Served:
    """A server that started with dummy weights; `link` leads to the checkpoint that it was given."""

    server: Server
    paths: dict[str, Path]
    link: Path


@dataclass
class Starting:
    """What is started takes most of the time, so all starts at once; each may fail alone."""

    models: dict[str, Future[Model]]
    served: Future[Served]


def _point(link: Path, target: Path) -> Path:
    """Engines of one model are given the same path: vLLM finds the code it compiled by that."""
    link.unlink(missing_ok=True)
    link.symlink_to(target)
    return link


def _start_model(base: Path, architecture: str, paths: dict[str, Path]) -> Model:
    options = MODES[architecture] | SMALL | {"enforce_eager": False}
    link = base / f"{architecture}-current"
    expected = {}
    for version, path in paths.items():
        engine = OfflineEngine(base / f"{architecture}-{version}.log", **APART)
        engine.start(_point(link, path), **options)
        expected[version] = engine.answers()
        engine.close()
    engine = OfflineEngine(base / f"{architecture}-updated.log", **APART)
    engine.start(link, load_format="dummy", **options)
    return Model(engine, paths, expected, engine.answers())


def _start_server(base: Path) -> Served:
    checkpoints = Checkpoints(base)
    paths = {version: checkpoints("medium", version) for version in "ab"}
    link = _point(base / "medium-current", paths["a"])
    log = base / "server-updated.log"
    server = Server(link, 1, log, "--load-format", "dummy", *SERVER_OPTIONS, eager=False)
    server.wait()
    return Served(server, paths, link)


@pytest.fixture(scope="module")
def starting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Starting]:
    base = tmp_path_factory.mktemp("engines")
    checkpoints = Checkpoints(base)
    paths = {name: {version: checkpoints(name, version) for version in "ab"} for name in MODES}
    with ThreadPoolExecutor(len(MODES) + 1) as pool:
        models = {name: pool.submit(_start_model, base, name, paths[name]) for name in MODES}
        yield Starting(models, served := pool.submit(_start_server, base))
    for model in models.values():
        if model.exception() is None:
            model.result().engine.close()
    if served.exception() is None:
        served.result().server.close()


@pytest.fixture(params=MODES)
def model(request: pytest.FixtureRequest, starting: Starting) -> Model:
    return starting.models[request.param].result()


def test_updates_equal_loads_from_disk(model: Model) -> None:
    assert model.dummy.digests != model.expected["a"].digests
    (addresses,) = model.engine.rpc("test_addresses")
    (replays,) = model.engine.rpc("test_replays")
    differences = []
    for version in "aba":
        report = update_from(model.engine, model.paths[version], slot_nbytes=SLOT_NBYTES, device="cuda")
        assert report.buckets > 1
        differences.append(_same(model.engine.answers(), model.expected[version]))
        (status,) = model.engine.rpc("ckpt_engine_status")
        assert (status["weights"], status["version"]) == ("serving", report.version)
        # The graphs that were captured before read what is there now.
        assert model.engine.rpc("test_addresses") == [addresses]
        (now,) = model.engine.rpc("test_replays")
        assert now >= replays + DECODES, "no CUDA graphs ran"
        replays = now
    _tell(logprob_differences=differences, parameters=len(addresses), replays=replays)


def test_update_in_one_call(model: Model) -> None:
    for version in "ba":
        committed = model.engine.ask("update", [str(model.paths[version]), {}])
        _same(model.engine.answers(), model.expected[version])
        assert model.engine.rpc("ckpt_engine_status")[0]["version"] == committed


def test_an_exception_in_the_worker_comes_back_and_the_next_update_works(model: Model) -> None:
    update_from(model.engine, model.paths["a"], device="cuda")
    model.engine.rpc("test_fault", "run", 1)
    with pytest.raises(UpdateError, match="RuntimeError: injected in run"):
        update_from(model.engine, model.paths["b"], slot_nbytes=SLOT_NBYTES, device="cuda")
    assert model.engine.rpc("ckpt_engine_status")[0]["weights"] == "incomplete"
    update_from(model.engine, model.paths["b"], device="cuda")
    _same(model.engine.answers(), model.expected["b"])


def test_a_missing_tensor_is_refused_and_the_old_weights_serve(model: Model) -> None:
    update_from(model.engine, model.paths["a"], device="cuda")
    tensors = load_file(model.paths["b"] / "model.safetensors")
    del tensors["model.layers.0.self_attn.k_proj.weight"]
    with pytest.raises(UpdateError, match=r"WeightsMismatch: .*k_proj.weight"):
        update_from(model.engine, tensors, device="cuda")
    _same(model.engine.answers(), model.expected["a"])


def test_a_server_is_updated_sooner_than_restarted(starting: Starting, tmp_path: Path) -> None:
    served = starting.served.result()
    server = served.server
    (addresses,) = server.rpc("test_addresses")
    ways = [("a", "--pause", "keep"), ("b",), ("a",), ("b", "--native")]
    updates = [
        _command_line(server, served.paths[version], tmp_path / f"{number}.json", *options)
        for number, (version, *options) in enumerate(ways)
    ]
    received = server.answers()
    assert server.rpc("test_addresses") == [addresses]
    server.close()
    # What was compiled is in vLLM's cache, as before most restarts.
    began = time.monotonic()
    link = _point(served.link, served.paths["b"])
    server = Server(
        link, 1, tmp_path / "server-restarted.log", "--load-format", "auto", *SERVER_OPTIONS, eager=False
    )
    try:
        server.wait()
        seconds = time.monotonic() - began
        from_disk = server.answers()
        _same(received, from_disk, BETWEEN_SERVERS)
        # In one process the same weights answer alike, wherever they came from.
        updates += [
            _command_line(server, served.paths[version], tmp_path / f"again-{version}.json")
            for version in "ab"
        ]
        difference = _same(server.answers(), from_disk)
    finally:
        server.close()
    nbytes = (served.paths["b"] / "model.safetensors").stat().st_size
    _tell(nbytes=nbytes, updates=updates, restart_seconds=round(seconds, 2), logprob_difference=difference)
    assert all(update["update_seconds"] < seconds for update in updates)


def _command_line(server: Server, checkpoint: Path, report: Path, *options: str) -> dict[str, float]:
    """`ckpt-engine update --engine vllm`: the update's seconds, and the whole command's."""
    began = time.monotonic()
    torchrun(
        1,
        "ckpt_engine.cli.main",
        *("update", "--checkpoint-path", str(checkpoint), "--endpoint", server.url, "--engine", "vllm"),
        *("--report-file", str(report), "--timeout", "100", "--health-timeout", "60", *options),
        timeout=150,
        GLOO_SOCKET_IFNAME="lo",
        CKPT_ENGINE_HOST_ID="here",
    )
    command = time.monotonic() - began
    update = float(json.loads(report.read_bytes())["update_seconds"])
    return {"update_seconds": round(update, 3), "command_seconds": round(command, 2)}


def _same(received: Answers, expected: Answers, tolerance: float = TOLERANCE) -> float:
    """Fails unless these are of the same weights; the largest difference of a log-probability."""
    assert received.digests == expected.digests
    difference = 0.0
    for (tokens, steps), (right_tokens, right_steps) in zip(
        received.generated, expected.generated, strict=True
    ):
        assert tokens == right_tokens
        for token, step, right_step in zip(tokens, steps, right_steps, strict=True):
            found, right = dict(step), dict(right_step)
            assert token in found.keys() & right.keys()
            difference = max(
                difference, *(abs(found[each] - right[each]) for each in found.keys() & right.keys())
            )
    assert difference < tolerance
    return difference


def _tell(**what: Any) -> None:  # noqa: ANN401 - JSON
    print(json.dumps(what))  # noqa: T201 - a measurement
