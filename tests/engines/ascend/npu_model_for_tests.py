"""A tiny model on an NPU with what makes models difficult: fused parameters, and transposed experts."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from vllm.model_executor.model_loader.reload.layerwise import buffer

from tests.engines.ascend.npu_checkpoint_for_tests import EXPERTS, HIDDEN, LAYERS


class Layer(torch.nn.Module):
    """One parameter, whose parts are loaded one by one."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.checkpoint_shape = shape
        self.weight = torch.nn.Parameter(torch.zeros(shape, dtype=dtype, device=device), requires_grad=False)

    def load(self, place: slice, loaded: torch.Tensor) -> None:
        if not buffer(self, place, loaded):
            self.copy_into(place, loaded)

    def copy_into(self, place: slice, loaded: torch.Tensor) -> None:
        assert self.weight[place].shape == loaded.shape
        self.weight[place].copy_(loaded)


class Experts(Layer):
    """Post-processing transposes them, each time."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(shape, dtype, device)
        self.process()

    def process(self) -> None:
        self.weight = torch.nn.Parameter(self.weight.transpose(1, 2).contiguous(), requires_grad=False)


class TinyModel(torch.nn.Module):
    def __init__(self, device: torch.device, experts: bool = True) -> None:
        super().__init__()
        self.embed = Layer((1000, HIDDEN), torch.bfloat16, device)
        self.qkv = torch.nn.ModuleList(
            Layer((3 * HIDDEN, HIDDEN), torch.float32, device) for _ in range(LAYERS)
        )
        kind = Experts if experts else Layer
        self.w13 = torch.nn.ModuleList(
            kind((EXPERTS, 2 * 64, HIDDEN), torch.float32, device) for _ in range(LAYERS)
        )

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        for name, tensor in weights:
            if name == "embed":
                self.embed.load(slice(None), tensor)
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
            held[f"layers.{layer}.w13"] = w13.transpose(1, 2) if isinstance(self.w13[layer], Experts) else w13
        return held

    def places(self) -> list[int]:
        """Addresses that captured graphs would hold."""
        return [parameter.raw.data_ptr() for parameter in self.parameters()]  # type: ignore[attr-defined]
