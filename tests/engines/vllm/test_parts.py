"""Which models of an engine an update is for, as vLLM's configs tell it."""

from __future__ import annotations

from importlib import import_module
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ckpt_engine_vllm.parts import parts_of
from ckpt_engine_vllm.plugin import BACKEND, register
from ckpt_engine_vllm.weight_transfer import CkptEngineWeightTransfer, InitInfo
from ckpt_engine_vllm.worker_update import WorkerUpdate

from ckpt_engine.errors import ConfigError

MAIN = SimpleNamespace(model="main", model_weights="")
WITHOUT_WEIGHTS = ["ngram", "ngram_gpu", "suffix", "custom_class", "extract_hidden_states"]
WITH_WEIGHTS = ["draft_model", "eagle", "eagle3", "medusa", "mlp_speculator", "mtp", "dflash", "dspark"]


def config(method: str | None, draft: object = MAIN) -> SimpleNamespace:
    """vLLM gives the main model's config as the draft's for ngram and custom classes."""
    speculative = None if method is None else SimpleNamespace(method=method, draft_model_config=draft)
    return SimpleNamespace(
        model_config=MAIN,
        speculative_config=speculative,
        parallel_config=SimpleNamespace(pipeline_parallel_size=1),
    )


def worker(vllm_config: SimpleNamespace, drafter: torch.nn.Module | None = None) -> SimpleNamespace:
    main = torch.nn.Linear(2, 2)
    runner = SimpleNamespace(get_draft_model=lambda: drafter)
    return SimpleNamespace(rank=0, vllm_config=vllm_config, get_model=lambda: main, model_runner=runner)


def backend(vllm_config: SimpleNamespace) -> Any:  # noqa: ANN401 - vLLM has no types here
    return CkptEngineWeightTransfer(None, vllm_config, torch.device("cpu"), torch.nn.Linear(2, 2))


@pytest.mark.parametrize("method", [None, *WITHOUT_WEIGHTS])
def test_what_speculates_without_weights_is_no_part(method: str | None) -> None:
    assert [part.name for part in parts_of(worker(config(method)))] == ["model"]


@pytest.mark.parametrize("method", WITH_WEIGHTS)
def test_a_drafter_that_is_not_found_is_refused_by_name(method: str) -> None:
    """An update would leave it behind."""
    with pytest.raises(ConfigError, match=rf"speculates by '{method}'.*start the engine without it"):
        parts_of(worker(config(method)))


@pytest.mark.parametrize(
    ("method", "draft", "prefix"),
    [
        ("mtp", MAIN, ""),
        ("mimo_mtp", MAIN, ""),
        ("dspark", MAIN, ""),
        ("mtp", SimpleNamespace(model="cache", model_weights="main"), ""),
        ("mtp", SimpleNamespace(model="assistant"), "drafter."),
        ("mtp", SimpleNamespace(model="assistant", model_weights=""), "drafter."),
        ("dspark", SimpleNamespace(model="apart"), "drafter."),
        ("eagle", SimpleNamespace(model="head"), "drafter."),
        # The same checkpoint, loaded twice.
        ("draft_model", MAIN, "drafter."),
    ],
)
def test_a_drafters_tensors_have_a_prefix_unless_the_mains_checkpoint_has_them(
    method: str, draft: object, prefix: str
) -> None:
    main, drafter = parts_of(worker(config(method, draft), torch.nn.Linear(2, 2)))
    assert (drafter.name, drafter.prefix) == ("drafter", prefix)
    assert main.own_name("drafter.weight") == (None if prefix else "drafter.weight")


def v2_runner(kind: str | None, drafter: torch.nn.Module | None = None) -> Any:  # noqa: ANN401
    """vLLM's V2 model runner with a speculator of `kind`, both its own classes. They need Triton to be made;
    what an update asks of them needs only these fields."""
    runner = object.__new__(import_module("vllm.v1.worker.gpu.model_runner").GPUModelRunner)
    runner.model, runner.speculator = torch.nn.Linear(2, 2), None
    if kind is not None:
        module, _, name = kind.rpartition(".")
        speculator = import_module(f"vllm.v1.worker.gpu.spec_decode.{module}")
        runner.speculator = object.__new__(getattr(speculator, name))
        runner.speculator.model = drafter
    return runner


@pytest.mark.parametrize(
    ("method", "kind"),
    [
        ("eagle", "eagle.speculator.EagleSpeculator"),
        ("mtp", "mtp.speculator.MTPSpeculator"),
        ("mtp", "multi_module_mtp.speculator.MultiModuleMTPSpeculator"),
        ("draft_model", "standalone_ar.speculator.StandaloneARSpeculator"),
        ("dflash", "dflash.speculator.DFlashSpeculator"),
        ("dspark", "dspark.speculator.DSparkSpeculator"),
    ],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what vLLM's runner imports
@pytest.mark.parametrize("tells", [True, False], ids=["get_draft_model", "older"])
def test_the_speculator_of_vllms_v2_runner_is_a_part(method: str, kind: str, tells: bool) -> None:
    """A runner without `get_draft_model` is asked for its `speculator`, as a V1 runner for its `drafter`."""
    drafter = torch.nn.Linear(2, 2)
    runner = v2_runner(kind, drafter)
    asked = worker(config(method, SimpleNamespace(model="head")))
    asked.model_runner = runner if tells else SimpleNamespace(speculator=runner.speculator)
    assert [part.model for part in parts_of(asked)] == [asked.get_model(), drafter]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_speculator_of_the_v2_runner_that_has_no_weights_is_no_part() -> None:
    asked = worker(config("ngram"))
    asked.model_runner = v2_runner("ngram.speculator.NgramGPUSpeculator")
    assert [part.name for part in parts_of(asked)] == ["model"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_v2_runner_that_shows_no_model_is_refused() -> None:
    asked = worker(config("eagle", SimpleNamespace(model="head")))
    asked.model_runner = v2_runner(None)
    with pytest.raises(ConfigError, match="does not show where that model is"):
        parts_of(asked)


@pytest.mark.parametrize("method", [None, *WITHOUT_WEIGHTS])
def test_vllms_own_routes_update_an_engine_whose_drafter_has_no_weights(method: str | None) -> None:
    assert [part.name for part in parts_of(backend(config(method))._worker_of(0, 0))] == ["model"]


@pytest.mark.parametrize("method", WITH_WEIGHTS)
def test_vllms_own_routes_refuse_a_drafter(method: str) -> None:
    """They do not show it to a backend."""
    with pytest.raises(ConfigError, match="use the worker extension instead"):
        parts_of(backend(config(method))._worker_of(0, 0))


@pytest.mark.parametrize("body", [{"unknown": 1}, [1], 5, "text"])
def test_a_bad_init_body_is_told_in_the_status_and_not_raised(body: object) -> None:
    """What one worker raises puts the replies of several out of step."""
    engine = backend(config(None))
    engine.init_transfer_engine(engine.parse_init_info(body))
    last = WorkerUpdate.status_of(engine._worker_of(0, 0))["last"]
    assert last["outcome"] == "failed"
    assert last["touched"] is False
    assert "ConfigError: init_info=" in last["error"]
    assert repr(body) in last["error"]


@pytest.mark.parametrize("body", [{}, None])
def test_an_empty_init_body_is_right(body: object) -> None:
    engine = backend(config(None))
    assert isinstance(engine.parse_init_info(body), InitInfo)
    assert WorkerUpdate.status_of(engine._worker_of(0, 0))["last"] is None


def test_registering_the_backend_again_changes_nothing() -> None:
    """vLLM calls it in each of its processes, in some more than once; its own register raises at a name that
    is taken."""
    from vllm.distributed.weight_transfer import WeightTransferEngineFactory

    register()
    before = dict(WeightTransferEngineFactory._registry)
    register()
    assert before == WeightTransferEngineFactory._registry
    assert BACKEND in before
