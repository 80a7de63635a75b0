"""The worker extension's decisions, on the stand-ins. Run by test_npu_on_the_stand_in.py."""

from __future__ import annotations

import inspect
import os
import re
import sys
from collections.abc import Callable, Iterable
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch_npu
from ckpt_engine_ascend import NpuColocateWorkerExtension, refusals, reload
from ckpt_engine_ascend.refusals import refuse_unsupported
from ckpt_engine_ascend.reload import LayerwiseReload, PlainReload
from ckpt_engine_ascend.worker_extension import NpuWorkerUpdate, device_index, update_worker
from ckpt_engine_vllm import VllmColocateWorkerExtension
from ckpt_engine_vllm.device_identity import on_npu
from ckpt_engine_vllm.rehearsal import rehearse
from vllm.config import set_current_vllm_config
from vllm.model_executor.model_loader.reload.layerwise import record_metadata_for_reloading

from ckpt_engine.devices.npu import load as load_npu
from ckpt_engine.errors import ConfigError
from ckpt_engine.ipc.messages import TensorLayout
from ckpt_engine.loading.recording import Recording
from ckpt_engine.loading.rehearsal import WeightsMismatch
from tests.engines.ascend.npu_checkpoint_for_tests import checkpoint
from tests.engines.ascend.npu_model_for_tests import Layer, TinyModel
from tests.engines.ascend.npu_worker_for_tests import WorkerBase
from tests.engines.ascend.npu_worker_for_tests import vllm_config as config

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


def test_both_extensions_have_the_same_methods() -> None:
    """An engine may be started with either, and callers need not know."""
    for name in ("update_weights_from_ipc", "ckpt_engine_status"):
        ours, theirs = (
            inspect.signature(getattr(kind, name))
            for kind in (NpuColocateWorkerExtension, VllmColocateWorkerExtension)
        )
        assert ours == theirs


@pytest.mark.parametrize("kind", [NpuColocateWorkerExtension, VllmColocateWorkerExtension])
def test_arguments_that_are_none_are_refused_in_a_status(kind: type) -> None:
    status = kind().update_weights_from_ipc([], False, (), "more", other=1)
    assert status["outcome"] == "failed"
    assert "takes no arguments ['more', 'other']" in status["error"]
    assert kind().ckpt_engine_status()["weights"] == "unknown"


@pytest.mark.parametrize(
    ("mode", "quantization", "refused"),
    [
        ("0", None, False),
        ("1", None, False),
        ("1", "ascend", True),
        ("2", None, True),
        ("0", "ascend", False),  # refused as unproven, further on
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


def layouts(tensors: dict[str, torch.Tensor]) -> list[TensorLayout]:
    """One bucket, in this order."""
    found, offset = [], 0
    for name, tensor in tensors.items():
        dtype = str(tensor.dtype).removeprefix("torch.")
        found.append(TensorLayout(name, dtype, tuple(tensor.shape), offset, tensor.nbytes))
        offset += tensor.nbytes
    return found


def prepare(
    tensors: dict[str, torch.Tensor],
    worker: WorkerBase | None = None,
    *,
    partial: bool = False,
    ignored: tuple[str, ...] = (),
) -> None:
    """What an update asks before it touches anything."""
    worker = worker or WorkerBase(0)
    before = worker.model.places()
    try:
        with set_current_vllm_config(worker.vllm_config):
            NpuWorkerUpdate(worker, partial=partial, ignored=ignored)._prepare(layouts(tensors))
    finally:
        assert worker.model.places() == before


@pytest.mark.parametrize("layerwise", [True, False])
def test_an_updates_tensors_are_those_of_the_model(layerwise: bool, request: pytest.FixtureRequest) -> None:
    """Judged as on vLLM's other devices, while nothing is touched; also where experts lie transposed."""
    worker = WorkerBase(0)
    if not layerwise:
        request.getfixturevalue("plain")
        # The stand-in's tensors cannot be without storage, as those of any device can.
        worker.model = TinyModel(torch.device("cpu"), experts=False)
    whole = checkpoint(1)
    prepare(whole, worker)
    lacking = {name: tensor for name, tensor in whole.items() if name != "layers.2.k"}
    with pytest.raises(WeightsMismatch, match=r"does not fill qkv.2.weight \(only .*layers.2.q, layers.2.v"):
        prepare(lacking, worker)
    with pytest.raises(WeightsMismatch, match="has no place for lm_tail"):
        prepare(whole | {"lm_tail": torch.zeros(3)}, worker)
    prepare(whole | {"lm_tail": torch.zeros(3)}, worker, ignored=("lm_*",))
    for shape in ((100, 128), (2000, 128)):
        with pytest.raises(WeightsMismatch, match="embed"):
            prepare(whole | {"embed": torch.zeros(shape, dtype=torch.bfloat16)}, worker)
    some = {name: tensor for name, tensor in whole.items() if ".1." in name}
    prepare(some, worker, partial=True)
    with pytest.raises(WeightsMismatch, match="does not fill"):
        prepare(some, worker)


def test_aliases_of_experts_do_not_hide_that_these_are_not_filled() -> None:
    """vllm-ascend gives some models a second name for their experts until these are first processed. A
    reload would fill the second name only, and leave the old experts, with a warning at most."""
    worker = WorkerBase(0)
    model = worker.model
    layer = model.w13[0]
    alias = torch.nn.Parameter(torch.zeros(layer.weight.mT.shape, device=DEVICE), requires_grad=False)
    alias.weight_loader = layer.weight.__dict__.get("weight_loader")  # type: ignore[attr-defined]
    load_weights = model.load_weights

    def load(weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        for name, tensor in weights:
            if name == "layers.0.w13":
                model.alias.copy_(tensor)
            else:
                load_weights([(name, tensor)])

    model.register_parameter("alias", alias)
    model.load_weights = load  # type: ignore[method-assign]
    with pytest.raises(WeightsMismatch, match=r"does not fill w13\.0\.weight"):
        prepare(checkpoint(1), worker)


@pytest.mark.parametrize("left", [None, torch.nn.Parameter(torch.empty(0), requires_grad=False)])
def test_weights_that_a_layer_has_freed_are_refused_by_name(left: torch.nn.Parameter | None) -> None:
    worker = WorkerBase(0)
    layer = worker.model.qkv[1]
    freed = layer.weight
    layer.register_parameter("weight", left)
    with pytest.raises(ConfigError, match=r"has freed qkv\.1\.weight"):
        refuse_unsupported(worker.model, config())
    layer.register_parameter("weight", freed)  # type: ignore[arg-type]
    refuse_unsupported(worker.model, config())


@pytest.mark.parametrize("level", [1, 2])
def test_a_sleeping_engine_is_refused(monkeypatch: pytest.MonkeyPatch, level: int) -> None:
    """Level 1 leaves a copy on the host, level 2 only the buffers. A KV cache may sleep on."""
    cache = SimpleNamespace(tag="kv_cache", cpu_backup_tensor=torch.zeros(1))
    weights = SimpleNamespace(tag="weights", cpu_backup_tensor=torch.zeros(1) if level == 1 else None)
    instance = SimpleNamespace(pointer_to_data={1: cache, 2: weights})
    module = ModuleType("vllm_ascend.device_allocator.camem")
    module.CaMemAllocator = SimpleNamespace(instance=instance)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm_ascend.device_allocator.camem", module)
    worker = WorkerBase(0)
    worker._sleep_saved_buffers = {"b": torch.zeros(1)} if level == 2 else {}  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match="asleep: wake them up first"):
        prepare(checkpoint(1), worker)
    weights.cpu_backup_tensor = None
    worker._sleep_saved_buffers = {}  # type: ignore[attr-defined]
    prepare(checkpoint(1), worker)


def test_quantised_weights_are_refused_as_long_as_no_reload_was_shown_right() -> None:
    worker = WorkerBase(0)
    worker.vllm_config = config("ascend")
    with pytest.raises(
        ConfigError, match=r"updating ascend weights of vLLM's TransposeExperts .* not in this"
    ):
        prepare(checkpoint(1), worker)


@pytest.mark.parametrize(
    "config_with",
    [
        lambda dynamic: SimpleNamespace(weight_nz_mode=0, eplb_config=SimpleNamespace(dynamic_eplb=dynamic)),
        lambda dynamic: SimpleNamespace(dynamic_eplb=dynamic),  # up to 0.13
    ],
)
def test_experts_that_move_between_ranks_are_refused(
    monkeypatch: pytest.MonkeyPatch, config_with: Callable[[bool], object]
) -> None:
    for dynamic in (False, True):
        module = ModuleType("vllm_ascend.ascend_config")
        module.get_ascend_config = lambda dynamic=dynamic: config_with(dynamic)  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "vllm_ascend.ascend_config", module)
        if not dynamic:
            prepare(checkpoint(1))
            continue
        with pytest.raises(ConfigError, match="without dynamic_eplb"):
            prepare(checkpoint(1))


class Drafter(torch.nn.Module):
    """One layer behind the model's own, of the same checkpoint."""

    def __init__(self) -> None:
        super().__init__()
        self.head = Layer((4, 4), torch.float32, DEVICE)
        record_metadata_for_reloading(self)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        for name, tensor in weights:
            if name == "layers.4.head":
                self.head.load(slice(None), tensor)


class Wrapped:
    """What replays a model's graphs."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model

    def unwrap(self) -> torch.nn.Module:
        return self.model


@pytest.mark.parametrize("method", ["mtp", "deepseek_mtp"])
@pytest.mark.parametrize("name", ["drafter", "speculator"])
@pytest.mark.parametrize("wrap", [lambda model: model, Wrapped])
def test_a_drafter_of_the_same_checkpoint_is_updated_too(
    name: str, method: str, wrap: Callable[[torch.nn.Module], object]
) -> None:
    """`speculator` is the V2 runner's name for it."""
    worker, drafter = WorkerBase(0), Drafter()
    setattr(worker.model_runner, name, SimpleNamespace(model=wrap(drafter)))
    draft_config = SimpleNamespace(model="main", quantization=None)
    worker.vllm_config = config(speculative=SimpleNamespace(method=method, draft_model_config=draft_config))
    wanted = checkpoint(5)
    with_head = wanted | {"layers.4.head": torch.arange(16.0).view(4, 4)}
    load_weights = worker.model.load_weights

    def load(weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        load_weights((name, tensor) for name, tensor in weights if not name.startswith("layers.4."))

    worker.model.load_weights = load  # type: ignore[method-assign]
    update = NpuWorkerUpdate(worker, partial=False, ignored=())
    with set_current_vllm_config(worker.vllm_config):
        update._prepare(layouts(with_head))
        assert [part.config for part, _ in update._parts] == [worker.vllm_config.model_config, draft_config]
        update._run(to_device(with_head))
        # vLLM finishes each model with its own config.
        worker.vllm_config.model_config, main = draft_config, worker.vllm_config.model_config
        drafting = update._parts.pop()[1]
        drafting.finish()
        worker.vllm_config.model_config = main
        update._finish()
    assert same(worker.model, wanted)
    assert torch.equal(drafter.head.weight.cpu(), with_head["layers.4.head"])


def test_other_drafters_keep_their_weights() -> None:
    worker = WorkerBase(0)
    draft_config = SimpleNamespace(model="eagle", quantization=None)
    worker.vllm_config = config(speculative=SimpleNamespace(method="eagle3", draft_model_config=draft_config))
    worker.model_runner.drafter = SimpleNamespace(model=Drafter())
    prepare(checkpoint(1), worker)
    # One that is not found would keep them in silence.
    for drafter in (SimpleNamespace(), None):
        worker.model_runner.drafter = drafter
        with pytest.raises(ConfigError, match=r"speculates by 'eagle3'"):
            prepare(checkpoint(1), worker)


def to_device(tensors: dict[str, torch.Tensor]) -> list[tuple[str, torch.Tensor]]:
    return [(name, tensor.to(DEVICE)) for name, tensor in tensors.items()]


def recorded(model: TinyModel, tensors: dict[str, torch.Tensor]) -> Recording:
    return rehearse(model, layouts(tensors))


def same(model: TinyModel, tensors: dict[str, torch.Tensor]) -> bool:
    held = model.as_checkpoint()
    return all(torch.equal(held[name], tensors[name]) for name in tensors)


def test_a_plain_load_is_post_processed(plain: None) -> None:
    model, vllm_config, wanted = TinyModel(DEVICE, experts=False), config(), checkpoint(1)
    processed: list[torch.nn.Module] = []
    method = SimpleNamespace(process_weights_after_loading=processed.append)
    model.embed.quant_method = method  # type: ignore[assignment]
    update = PlainReload(model, vllm_config.model_config, recorded(model, wanted), DEVICE)
    with set_current_vllm_config(vllm_config):
        update.begin()
        update.load(to_device(wanted))
        update.finish()
    assert same(model, wanted)
    assert processed == [model.embed]
    assert update.kept_nbytes == sum(tensor.nbytes for tensor in wanted.values())


def test_slots_may_be_overwritten_while_a_layer_is_incomplete() -> None:
    """q lies in one bucket, k and v in the next, in the same slot; the layer keeps references to them."""
    model, vllm_config, wanted = TinyModel(DEVICE), config(), checkpoint(2)
    places = model.places()
    update = LayerwiseReload(model, vllm_config.model_config, recorded(model, wanted), DEVICE)
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
        update = LayerwiseReload(model, vllm_config.model_config, recorded(model, wanted), DEVICE)
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
