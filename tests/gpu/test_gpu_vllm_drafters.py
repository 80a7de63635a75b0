"""Models that speculate beside the main one, on CUDA, by both of vLLM's model runners: each model has the
weights of its own checkpoint after an update."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed", allow_module_level=True)

from safetensors.torch import load_file

from tests.engines.vllm.drafters import make_eagle, make_mimo
from tests.engines.vllm.engines import Answers, Checkpoints, OfflineEngine
from tests.engines.vllm.parameter_servers import update_from
from tests.gpu.vllm_engines import APART, DECODES, SLOT_NBYTES, SMALL, WHOLE_GRAPHS, same, tell

pytestmark = pytest.mark.timeout(500)

CASES = [("eagle", 1), ("eagle", 2), ("mtp", 1), ("mtp", 2), ("draft_model", 1), ("ngram", 1)]
"""A method of vLLM's, and the runner that speculates by it: V1 or V2."""
RUNNERS = {1: "vllm.v1.worker.gpu_model_runner", 2: "vllm.v1.worker.gpu.model_runner"}
AT_A_TIME = 3
"""Engines that start at the same time."""


@dataclass
class Version:
    """A version of both models: what the engine is started with, and what an update sends."""

    model: Path
    speculative: dict[str, Any]
    tensors: Mapping[str, torch.Tensor]


@dataclass
class Held:
    answers: Answers
    drafter: list[dict[str, str]]
    """Digests; none without weights."""


@dataclass
class Speculating:
    engine: OfflineEngine
    versions: dict[str, Version]
    expected: dict[str, Held]
    has_weights: bool

    def held(self) -> Held:
        return _held(self.engine, self.has_weights)


def _held(engine: OfflineEngine, has_weights: bool) -> Held:
    return Held(engine.answers(), engine.rpc("test_drafter_digests") if has_weights else [])


def _version(method: str, base: Path, checkpoints: Checkpoints, version: str) -> Version:
    if method == "mtp":
        model = make_mimo(checkpoints("qwen2", version), base / version)
        return Version(model, {}, load_file(model / "model.safetensors"))
    model = checkpoints("llama", version)
    tensors = load_file(model / "model.safetensors")
    if method == "ngram":
        return Version(model, {"prompt_lookup_max": 2}, tensors)
    # Another model than the main one.
    drafter = checkpoints("llama", "ab".replace(version, ""))
    if method == "eagle":
        drafter = make_eagle(model, base / version)
    drafts = load_file(drafter / "model.safetensors")
    return Version(
        model, {"model": str(drafter)}, tensors | {f"drafter.{name}": each for name, each in drafts.items()}
    )


def _start(case: tuple[str, int], base: Path) -> Speculating:
    method, runner = case
    base.mkdir()
    checkpoints = Checkpoints(base)
    versions = {version: _version(method, base, checkpoints, version) for version in "ab"}
    options = WHOLE_GRAPHS | SMALL | {"enforce_eager": False, "trust_remote_code": True}
    expected: dict[str, Held] = {}
    for version in "ba":
        engine = OfflineEngine(
            base / f"engine-{version}.log", **APART, VLLM_USE_V2_MODEL_RUNNER=str(runner - 1)
        )
        of = versions[version]
        speculative = {"method": method, "num_speculative_tokens": 1} | of.speculative
        try:
            engine.start(of.model, speculative_config=speculative, **options)
            assert engine.rpc("test_runner") == [RUNNERS[runner]]
            expected[version] = _held(engine, method != "ngram")
        except BaseException:
            engine.close()
            raise
        if version == "b":
            engine.close()
    return Speculating(engine, versions, expected, method != "ngram")


@pytest.fixture(scope="module")
def starting(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[dict[tuple[str, int], Future[Speculating]]]:
    import transformers

    # Its lazy module is not made for several threads.
    transformers.LlamaConfig, transformers.Qwen2Config, transformers.AutoModelForCausalLM  # noqa: B018
    base = tmp_path_factory.mktemp("drafters")
    with ThreadPoolExecutor(AT_A_TIME) as pool:
        futures = {case: pool.submit(_start, case, base / f"{case[0]}-{case[1]}") for case in CASES}
        yield futures
    for future in futures.values():
        if future.exception() is None:
            future.result().engine.close()


@pytest.mark.parametrize("case", CASES, ids=[f"{method}-v{runner}" for method, runner in CASES])
def test_both_models_are_those_of_a_load_from_disk(
    starting: dict[tuple[str, int], Future[Speculating]], case: tuple[str, int]
) -> None:
    """The engine began with version a from disk; another one tells what b is."""
    speculating = starting[case].result()
    engine, expected = speculating.engine, speculating.expected
    if speculating.has_weights:
        assert expected["a"].drafter != expected["b"].drafter
    (replays,) = engine.rpc("test_replays")
    differences = []
    for version in "bab":
        report = update_from(
            engine, speculating.versions[version].tensors, slot_nbytes=SLOT_NBYTES, device="cuda"
        )
        assert report.buckets > 1
        held = speculating.held()
        if speculating.has_weights:
            differences.append(same(held.answers, expected[version].answers))
        else:
            # What n-grams propose, and so how many tokens a step verifies at once, made near ties of a tiny
            # model fall otherwise on an H200: its weights say what an update did.
            assert held.answers.digests == expected[version].answers.digests
        assert held.drafter == expected[version].drafter
    (now,) = engine.rpc("test_replays")
    assert now >= replays + DECODES, "no CUDA graphs ran"
    (status,) = engine.rpc("ckpt_engine_status")
    models = status["last"]["models"]
    assert set(models) == ({"model", "drafter"} if speculating.has_weights else {"model"})
    assert all(models.values())
    tell(case=case, models=models, logprob_differences=differences)
