"""The worker extension's decisions, on the stand-ins. Run by test_npu_on_the_stand_in.py."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch_npu
from ckpt_engine_ascend import NpuColocateWorkerExtension, refusals, reload
from ckpt_engine_ascend.refusals import refuse_unsupported
from ckpt_engine_ascend.reload import Reload, models_of
from ckpt_engine_ascend.worker_extension import device_index, update_worker
from ckpt_engine_vllm import VllmColocateWorkerExtension
from ckpt_engine_vllm.device_identity import on_npu
from vllm.config import set_current_vllm_config

from ckpt_engine.devices.npu import load as load_npu
from ckpt_engine.errors import ConfigError
from tests.engines.ascend.npu_checkpoint_for_tests import checkpoint
from tests.engines.ascend.npu_model_for_tests import TinyModel

NPU = load_npu()
DEVICE = torch.device("npu", 0)
# What NPUWorker and vLLM's WorkerBase have (versions 0.11 to main of August 2026).
NAMES_OF_WORKERS = """
    check_health compile_or_warm_up_model determine_available_memory device execute_dummy_batch
    execute_model finish_weight_update get_cache_block_size_bytes get_draft_model get_kv_cache_spec
    get_kv_connector_handshake_metadata get_model get_supported_pooling_tasks get_supported_tasks
    init_device init_weight_transfer_engine initialize_cache initialize_from_config list_loras
    load_model local_rank model_config model_runner pin_lora profile rank reload_weights remove_lora
    reset_mm_cache shutdown sleep start_draft_weight_update start_weight_update take_draft_token_ids
    update_config update_weights vllm_config vocab_size wake_up weight_transfer_engine
"""


def config(quantization: str | None = None, speculative: object = None) -> SimpleNamespace:
    model_config = SimpleNamespace(quantization=quantization)
    return SimpleNamespace(model_config=model_config, speculative_config=speculative)


@pytest.fixture(autouse=True)
def nz_is_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_ASCEND_ENABLE_NZ", "0")


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """A vLLM without the layer-wise reload."""
    monkeypatch.setattr(reload, "has_layerwise_reload", lambda: False)
    monkeypatch.setattr(refusals, "has_layerwise_reload", lambda: False)


def test_no_name_is_a_workers_own() -> None:
    mine = {name for name in vars(NpuColocateWorkerExtension) if not name.startswith("__")}
    assert mine == {"update_weights_from_ipc", "ckpt_engine_status"}
    assert not mine & set(re.findall(r"\w+", NAMES_OF_WORKERS))


@pytest.mark.parametrize(
    ("device", "local_rank", "index"),
    [(None, 3, 3), (torch.device("npu", 1), 5, 1), (torch.device("npu"), 2, 2)],
)
def test_the_device_of_a_worker(device: torch.device | None, local_rank: int, index: int) -> None:
    assert device_index(SimpleNamespace(device=device, local_rank=local_rank)) == index


def test_a_worker_elsewhere_is_refused() -> None:
    with pytest.raises(ConfigError, match="VllmColocateWorkerExtension"):
        device_index(SimpleNamespace(device=torch.device("cpu"), local_rank=0))
    with pytest.raises(ConfigError, match="is it initialised"):
        device_index(SimpleNamespace())


def test_no_exception_leaves_the_worker() -> None:
    for handles in ([], [["a"]], {"NPU-x": "tcp://nowhere"}, None):
        status = update_worker(SimpleNamespace(rank=4), handles)  # type: ignore[arg-type]
        assert status["outcome"] == "failed"
        assert status["rank"] == 4
        assert not status["touched"]


def test_the_extension_for_all_devices_knows_an_npu() -> None:
    for device, expected in ((None, True), (DEVICE, True), (torch.device("cpu"), False)):
        assert on_npu(SimpleNamespace(device=device)) is expected


def test_what_an_npu_cannot_do_is_refused_in_a_status() -> None:
    worker = VllmColocateWorkerExtension()
    for options in ({"partial": True}, {"ignored": ["x.*"]}):
        status = worker.update_weights_from_ipc([], **options)  # type: ignore[arg-type]
        assert "not for NPUs" in status["error"]
        assert status["outcome"] == "failed"
    assert worker.ckpt_engine_status() == {"rank": None, "weights": "initial", "version": None}


@pytest.mark.parametrize(
    ("mode", "quantization", "refused"),
    [
        ("0", None, False),
        ("1", None, False),
        ("1", "ascend", True),
        ("2", None, True),
        ("0", "ascend", False),
    ],
)
def test_the_nz_format_is_refused_with_the_remedy(
    monkeypatch: pytest.MonkeyPatch, mode: str, quantization: str | None, refused: bool
) -> None:
    """1, the default, means quantised weights only: an unquantised engine is as updatable as without it."""
    monkeypatch.setenv("VLLM_ASCEND_ENABLE_NZ", mode)
    model = TinyModel(DEVICE)
    if not refused:
        refuse_unsupported(model, config(quantization))
        return
    with pytest.raises(ConfigError, match=r"FRACTAL_NZ.*\"weight_nz_mode\": 0.*VLLM_ASCEND_ENABLE_NZ=0"):
        refuse_unsupported(model, config(quantization))


def test_newer_versions_say_the_mode_in_their_config(monkeypatch: pytest.MonkeyPatch) -> None:
    package, module = ModuleType("vllm_ascend"), ModuleType("vllm_ascend.ascend_config")
    module.get_ascend_config = lambda: SimpleNamespace(weight_nz_mode=2)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm_ascend", package)
    monkeypatch.setitem(sys.modules, "vllm_ascend.ascend_config", module)
    assert refusals.nz_mode() == 2

    def not_set_up() -> None:
        raise RuntimeError("Ascend config is not initialized")

    module.get_ascend_config = not_set_up  # type: ignore[attr-defined]
    assert refusals.nz_mode() == 0


def test_a_parameter_in_the_nz_format_is_refused_whatever_the_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        torch_npu, "get_npu_format", lambda tensor: 29 if tensor.dim() == 3 else 2, raising=False
    )
    with pytest.raises(ConfigError, match=r"4 parameters are in the FRACTAL_NZ format, w13.0.weight"):
        refuse_unsupported(TinyModel(DEVICE), config())


def test_without_layerwise_reload_experts_and_quantised_weights_are_refused(plain: None) -> None:
    refuse_unsupported(TinyModel(DEVICE, experts=False), config())
    with pytest.raises(ConfigError, match=r"quantised weights.*model_loader.reload"):
        refuse_unsupported(TinyModel(DEVICE, experts=False), config("ascend"))
    model = torch.nn.Module()
    model.register_parameter("w13_weight", torch.nn.Parameter(torch.zeros(1), requires_grad=False))
    with pytest.raises(ConfigError, match="experts"):
        refuse_unsupported(model, config())


def drafting(name: str, method: str) -> SimpleNamespace:
    model, draft = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    speculative = SimpleNamespace(method=method, draft_model_config="draft config")
    runner = SimpleNamespace(model=model, **{name: SimpleNamespace(model=draft)})
    return SimpleNamespace(model_runner=runner, vllm_config=config(speculative=speculative))


@pytest.mark.parametrize("name", ["drafter", "speculator"])
def test_a_drafter_of_the_same_checkpoint_is_updated_too(name: str) -> None:
    worker = drafting(name, "deepseek_mtp")
    models = models_of(worker)
    assert [model for model, _ in models] == [
        worker.model_runner.model,
        getattr(worker.model_runner, name).model,
    ]
    assert models[1][1] == "draft config"


def test_other_drafters_keep_their_weights() -> None:
    assert len(models_of(drafting("drafter", "eagle3"))) == 1
    ngram = drafting("drafter", "mtp")
    ngram.model_runner.drafter = SimpleNamespace()
    assert len(models_of(ngram)) == 1
    ngram.model_runner.drafter = None
    assert len(models_of(ngram)) == 1


def to_device(tensors: dict[str, torch.Tensor]) -> list[tuple[str, torch.Tensor]]:
    return [(name, tensor.to(DEVICE)) for name, tensor in tensors.items()]


def same(model: TinyModel, tensors: dict[str, torch.Tensor]) -> bool:
    held = model.as_checkpoint()
    return all(torch.equal(held[name], tensors[name]) for name in tensors)


def test_a_plain_load_is_post_processed(plain: None) -> None:
    model, vllm_config, wanted = TinyModel(DEVICE, experts=False), config(), checkpoint(1)
    processed: list[bool] = []
    model.embed.process = lambda: processed.append(True)  # type: ignore[assignment]
    update = Reload(model, vllm_config.model_config, DEVICE)
    with set_current_vllm_config(vllm_config):
        update.begin()
        update.load(to_device(wanted))
        update.finish()
    assert same(model, wanted)
    assert processed == [True]


def test_slots_may_be_overwritten_while_a_layer_is_incomplete() -> None:
    """q lies in one bucket, k and v in the next, in the same slot; the layer keeps references to them."""
    model, vllm_config, wanted = TinyModel(DEVICE), config(), checkpoint(2)
    places = model.places()
    update = Reload(model, vllm_config.model_config, DEVICE)
    with set_current_vllm_config(vllm_config):
        update.begin()
        for name, tensor in sorted(wanted.items(), key=lambda item: item[0].split(".")[-1]):
            slot = tensor.to(DEVICE)
            update.load([(name, slot)])
            NPU.synchronize()
            slot.zero_()
        update.finish()
    assert same(model, wanted)
    assert model.places() == places


def test_an_abandoned_reload_can_be_followed_by_another() -> None:
    model, vllm_config, old, new = TinyModel(DEVICE), config(), checkpoint(3), checkpoint(4)
    places = model.places()

    def load(wanted: dict[str, torch.Tensor], names: Iterable[str], end: str) -> None:
        update = Reload(model, vllm_config.model_config, DEVICE)
        with set_current_vllm_config(vllm_config):
            update.begin()
            update.load(to_device({name: wanted[name] for name in names}))
            getattr(update, end)()

    load(old, old, "finish")
    load(new, ["embed", "layers.0.q", "layers.1.w13"], "abandon")
    held = model.as_checkpoint()
    assert torch.equal(held["embed"], new["embed"]), "a complete layer has the new weights"
    assert torch.equal(held["layers.0.q"], old["layers.0.q"]), "an incomplete one its old weights"
    assert torch.equal(held["layers.2.v"], old["layers.2.v"])
    load(new, new, "finish")
    assert same(model, new)
    assert model.places() == places


def test_the_environment_is_the_stand_ins() -> None:
    assert "stub" in str(torch_npu.__file__)
    assert "FAKE_NPU_MACHINE" in os.environ
