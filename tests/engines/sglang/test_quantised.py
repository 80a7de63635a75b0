"""Updates of quantised and repacked weights: which are restored, loaded and processed, and which are refused.

Real parameter servers and SGLang's real loading functions, and its own float8 method.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ckpt_engine_sglang import layouts
from ckpt_engine_sglang.worker_update import INCOMPLETE

from ckpt_engine.errors import UpdateError
from tests.engines.sglang.schedulers import NamedTensors, Plain, Scheduler, drawn, parameter, runner, update

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(autouse=True)
def in_process(sglang_in_process: None) -> None:
    from sglang.srt.layers.quantization.base_config import QuantizeMethodBase

    QuantizeMethodBase.register(Transposing)


class Transposing:
    """Keeps a weight transposed and doubled, which it can undo."""

    def __init__(self) -> None:
        self.did: list[str] = []
        self.fails = False
        self.asks_for_values = False

    def apply(self, layer: torch.nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:  # noqa: ANN401
        raise NotImplementedError

    def process_weights_after_loading(self, layer: Any) -> None:  # noqa: ANN401
        self.did.append("process")
        if self.fails:
            raise RuntimeError("cannot process")
        layer.weight.data = (layer.weight.data * 2).t().contiguous()

    def restore_weights_before_loading(self, layer: Any) -> None:  # noqa: ANN401
        if self.asks_for_values:
            layer.weight.sum().item()
        if not layer.weight.is_meta:
            self.did.append("restore")
        layer.weight.data = layer.weight.data.t().contiguous() / 2


class Quantised(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Module()
        self.layer.register_parameter("weight", parameter(4, 8))  # as it serves: transposed
        self.layer.quant_method = Transposing()  # type: ignore[assignment]
        self.norm = parameter(4)

    def load_weights(self, weights: NamedTensors) -> None:
        for name, tensor in weights:
            target = dict(self.named_parameters()).get(name)
            if target is not None:
                target.data.copy_(tensor)


@pytest.mark.parametrize("asks_for_values", [False, True])
def test_quantised_weights_are_restored_loaded_and_processed(asks_for_values: bool) -> None:
    model = Quantised()
    method: Any = model.layer.quant_method
    method.asks_for_values = asks_for_values
    tensors = {"layer.weight": drawn(w=(8, 4))["w"], "norm": torch.ones(4)}
    for _ in range(2):
        assert update(Scheduler([("target", runner(model))]), tensors)[0]
        assert torch.equal(model.layer.weight, (tensors["layer.weight"] * 2).t())
    assert method.did == ["restore", "process"] * 2


INCOMPLETE_TENSORS: list[tuple[dict[str, tuple[int, ...]], str]] = [
    ({"layer.weight": (8, 4)}, "the update does not fill norm: "),
    ({"norm": (4,)}, "the update does not fill layer.weight: "),
    ({"layer.weight": (8, 4), "norm": (4,), "other": (4,)}, "the model has no place for other: "),
]


@pytest.mark.parametrize(("tensors", "told"), INCOMPLETE_TENSORS)
def test_incomplete_quantised_weights_are_refused_before_a_byte_moves(
    tensors: dict[str, tuple[int, ...]], told: str
) -> None:
    model = Quantised()
    method: Any = model.layer.quant_method
    scheduler = Scheduler([("target", runner(model))])
    with pytest.raises(UpdateError, match=told) as caught:
        update(scheduler, {name: torch.ones(shape) for name, shape in tensors.items()})
    assert caught.value.touched is False
    assert method.did == []
    assert not model.layer.weight.any()
    assert model.layer.weight.shape == (4, 8)
    assert scheduler.did == ["version None", "flush"]


@pytest.mark.parametrize(("tensors", "told"), INCOMPLETE_TENSORS)
def test_incomplete_quantised_weights_that_cannot_be_rehearsed(
    tensors: dict[str, tuple[int, ...]], told: str
) -> None:
    model = Quantised()
    method: Any = model.layer.quant_method
    method.asks_for_values = True
    scheduler = Scheduler([("target", runner(model))])
    with pytest.raises(UpdateError, match=told):
        update(scheduler, {name: torch.ones(shape) for name, shape in tensors.items()})
    assert method.did == ["restore", "process"]
    # As the kernels want it: the server goes on, and says what it is.
    assert model.layer.weight.shape == (4, 8)
    assert scheduler.did == [f"version {INCOMPLETE}", "flush"]


class OneWay(Transposing):
    """Has no way back, as most of SGLang's quantisation methods."""

    def restore_weights_before_loading(self, layer: Any) -> None: ...  # noqa: ANN401


@pytest.mark.parametrize("square", [False, True])
def test_a_layout_that_cannot_be_undone(square: bool) -> None:
    model = Quantised()
    method = OneWay()
    model.layer.quant_method = method  # type: ignore[assignment]
    shape = (4, 4) if square else (8, 4)
    model.layer.register_parameter("weight", parameter(*shape))
    layouts.remember(model)
    model.layer.weight.data = model.layer.weight.data.t()
    before = model.layer.weight.data_ptr()
    scheduler = Scheduler([("target", runner(model))])
    with pytest.raises(UpdateError, match=r"cannot undo that: layer\.weight, float32\[\d, 4\]") as caught:
        update(scheduler, {"layer.weight": torch.ones(shape), "norm": torch.ones(4)})
    assert caught.value.touched is False
    assert method.did == []
    assert model.layer.weight.data_ptr() == before
    assert not model.norm.any()


def test_a_way_back_that_nobody_can_tell() -> None:
    model = Quantised()
    method: Any = model.layer.quant_method
    model.layer.register_parameter("weight", parameter(8, 4))
    layouts.remember(model)
    method.process_weights_after_loading(model.layer)
    tensors = {"layer.weight": drawn(w=(8, 4))["w"], "norm": torch.ones(4)}
    assert update(Scheduler([("target", runner(model))]), tensors)[0]
    assert torch.equal(model.layer.weight, (tensors["layer.weight"] * 2).t())
    method.asks_for_values = True
    with pytest.raises(
        UpdateError, match=r"nobody can tell whether SGLang can undo the layout of layer\.weight"
    ):
        update(Scheduler([("target", runner(model))]), tensors)
    assert torch.equal(model.layer.weight, (tensors["layer.weight"] * 2).t())


def fp8_layer(*, serialized: bool) -> torch.nn.Module:
    """A linear layer with SGLang's own float8 method, after it was loaded."""
    from sglang.srt.layers.quantization.fp8 import Fp8Config, Fp8LinearMethod

    model = torch.nn.Module()
    model.layer = torch.nn.Module()
    method = Fp8LinearMethod(Fp8Config(is_checkpoint_fp8_serialized=serialized))
    method.cutlass_fp8_supported = serialized
    method.create_weights(
        model.layer,
        input_size_per_partition=32,
        output_partition_sizes=[16, 16],
        input_size=32,
        output_size=32,
        params_dtype=torch.float32,
        weight_loader=lambda parameter, tensor: parameter.data.copy_(tensor),
    )
    for each in model.parameters():
        each.data.fill_(1)
    model.layer.quant_method = method

    def load_weights(weights: NamedTensors) -> None:
        for name, tensor in weights:
            target = dict(model.named_parameters())[name]
            target.weight_loader(target, tensor)  # type: ignore[attr-defined]

    model.load_weights = load_weights
    layouts.remember(model)
    method.process_weights_after_loading(model.layer)
    return model


@pytest.mark.parametrize("serialized", [True, False])
def test_sglang_s_float8_with_one_scale_for_a_tensor(
    serialized: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is transposed when it was loaded, for good; also where the matrix is square."""
    from sglang.srt.layers.quantization import fp8

    # Its kernels are not there on CPU; what it does with the parameters is the same.
    for name in ("_is_cpu", "_is_cuda"):
        monkeypatch.setattr(fp8, name, False)
    monkeypatch.setattr(fp8, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(
        fp8, "input_to_float8", lambda weight: (weight.to(torch.float8_e4m3fn), torch.ones(1)), raising=False
    )
    model = fp8_layer(serialized=serialized)
    before = model.layer.weight.data.view(torch.uint8).clone()  # type: ignore[operator, union-attr]
    tensors = {"layer.weight": torch.ones(32, 32)}
    if serialized:
        tensors["layer.weight"] = tensors["layer.weight"].to(torch.float8_e4m3fn)
        tensors["layer.weight_scale"] = torch.ones(2)
    with pytest.raises(UpdateError, match=r"cannot undo that: layer\.weight, float(8_e4m3fn|32)\[32, 32\]"):
        update(Scheduler([("target", runner(model))]), tensors)
    assert torch.equal(model.layer.weight.data.view(torch.uint8), before)  # type: ignore[operator, union-attr]


def test_weights_that_were_not_quantised_for_parameters_that_are() -> None:
    model = Plain(a=(4,))
    model.register_parameter("b", torch.nn.Parameter(torch.zeros(4).to(torch.float8_e4m3fn), False))
    told = "must be quantised before they are sent: b is float8_e4m3fn, b float32"
    with pytest.raises(UpdateError, match=told) as caught:
        update(Scheduler([("target", runner(model))]), {"a": torch.ones(4), "b": torch.ones(4)})
    assert caught.value.touched is False
    quantised = {"a": torch.ones(4), "b": torch.ones(4).to(torch.float8_e4m3fn)}
    assert update(Scheduler([("target", runner(model))]), quantised)[0]
    assert torch.equal(model.b.float(), torch.ones(4))


class Graphs:
    """Stands for what SGLang captured."""


class DecodeCudaGraphRunner(Graphs): ...


class Moving(Transposing):
    def process_weights_after_loading(self, layer: Any) -> None:  # noqa: ANN401
        super().process_weights_after_loading(layer)
        layer.weight.data = layer.weight.data.clone()


@pytest.mark.parametrize("graphs", [None, DecodeCudaGraphRunner()])
def test_weights_that_move_in_memory_under_cuda_graphs(graphs: object) -> None:
    model = Quantised()
    kept = model.layer.weight.data  # so that its memory is not taken again
    model.layer.quant_method = Moving()  # type: ignore[assignment]
    made = runner(model)
    made.decode_cuda_graph_runner = graphs
    tensors = {"layer.weight": torch.ones(8, 4), "norm": torch.ones(4)}
    scheduler = Scheduler([("target", made)])
    if graphs is None:
        assert update(scheduler, tensors)[0]
    else:
        with pytest.raises(UpdateError, match=r"moved 1 weights in memory \(layer\.weight"):
            update(scheduler, tensors)
        assert scheduler.did == [f"version {INCOMPLETE}", "flush"]
    assert not kept.any()


def test_post_processing_that_fails() -> None:
    model = Quantised()
    method: Any = model.layer.quant_method
    scheduler = Scheduler([("target", runner(model))])
    method.fails = True
    tensors = {"layer.weight": torch.ones(8, 4), "norm": torch.ones(4)}
    with pytest.raises(UpdateError, match="cannot process"):
        update(scheduler, tensors)
    assert scheduler.did == [f"version {INCOMPLETE}", "flush"]
