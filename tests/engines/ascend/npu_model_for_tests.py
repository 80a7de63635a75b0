"""A tiny model on an NPU with what makes models difficult: fused parameters, and transposed experts."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.model_loader.reload.layerwise import record_metadata_for_reloading

from tests.engines.ascend.npu_checkpoint_for_tests import EXPERTS, HIDDEN, LAYERS


def load_part(parameter: torch.Tensor, loaded: torch.Tensor, place: slice) -> None:
    """A weight loader: one part of a fused parameter, or all of it."""
    assert parameter[place].shape == loaded.shape, f"{tuple(loaded.shape)} does not fit"
    parameter[place].copy_(loaded)


class Layer(torch.nn.Module):
    """One parameter, whose parts are loaded one by one."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(shape, dtype=dtype, device=device), requires_grad=False)
        self.weight.weight_loader = load_part  # type: ignore[attr-defined]

    def load(self, place: slice, loaded: torch.Tensor) -> None:
        self.weight.weight_loader(self.weight, loaded, place)  # type: ignore[operator]


class TransposeExperts(QuantizeMethodBase):
    """vllm-ascend's, for experts that are not quantised: (E, 2I, H) to (E, H, 2I), each time, in a parameter
    of its own that has no loader."""

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        layer.weight = torch.nn.Parameter(
            layer.weight.data.transpose(1, 2).contiguous(),  # type: ignore[operator]
            requires_grad=False,
        )


class TinyModel(torch.nn.Module):
    def __init__(self, device: torch.device, experts: bool = True) -> None:
        super().__init__()
        self.embed = Layer((1000, HIDDEN), torch.bfloat16, device)
        self.qkv = torch.nn.ModuleList(
            Layer((3 * HIDDEN, HIDDEN), torch.float32, device) for _ in range(LAYERS)
        )
        self.w13 = torch.nn.ModuleList(
            Layer((EXPERTS, 2 * 64, HIDDEN), torch.float32, device) for _ in range(LAYERS)
        )
        record_metadata_for_reloading(self)
        self.experts = experts
        for layer in self.w13 if experts else ():
            layer.quant_method = TransposeExperts()  # type: ignore[assignment]
            layer.quant_method.process_weights_after_loading(layer)  # type: ignore[operator]

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Passes over what it does not know, as some of vLLM's models do."""
        for name, tensor in weights:
            if name == "embed":
                self.embed.load(slice(None), tensor)
                continue
            if not name.startswith("layers."):
                continue
            _, layer, part = name.split(".")
            if part == "w13":
                self.w13[int(layer)].load(slice(None), tensor)  # type: ignore[operator]
                continue
            start = "qkv".index(part) * HIDDEN
            self.qkv[int(layer)].load(slice(start, start + HIDDEN), tensor)  # type: ignore[operator]

    def as_checkpoint(self) -> dict[str, torch.Tensor]:
        """What the parameters hold, in the checkpoint's terms, on the host."""
        held = {"embed": self.embed.weight.cpu()}
        for layer in range(LAYERS):
            qkv = self.qkv[layer].weight.cpu()
            for number, part in enumerate("qkv"):
                held[f"layers.{layer}.{part}"] = qkv[number * HIDDEN : (number + 1) * HIDDEN]
            w13 = self.w13[layer].weight.cpu()
            held[f"layers.{layer}.w13"] = w13.transpose(1, 2) if self.experts else w13
        return held

    def places(self) -> list[int]:
        """Addresses that captured graphs would hold."""
        return [parameter.data_ptr() for parameter in self.parameters()]
