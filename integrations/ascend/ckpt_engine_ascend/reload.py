"""One update of one model of vllm-ascend's.

Post-processing turns loaded weights into what the kernels want; experts are transposed by it, each time.
Where vLLM has its layer-wise reload, that is used as on other devices: every layer gets fresh tensors in the
checkpoint's layout first, is processed once it is complete, and the result is copied to where the old weights
lie, so that captured graphs stay valid. Without it, weights are loaded over the old ones: right for dense
models, refused for others.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

import torch
from ckpt_engine_vllm.layerwise import some_of_a_drafter
from ckpt_engine_vllm.reload import Reload

from ckpt_engine.loading.recording import Recording

_LAYERWISE = "vllm.model_executor.model_loader.reload"


def has_layerwise_reload() -> bool:
    try:
        return importlib.util.find_spec(_LAYERWISE) is not None
    except ModuleNotFoundError:
        return False


class LayerwiseReload(Reload):
    """With the worker's NPU as torch's default device, as in vllm-ascend's own updates: what post-processing
    makes without naming a device must not come to lie on the host."""

    def __init__(
        self,
        model: torch.nn.Module,
        model_config: Any,  # noqa: ANN401 - vLLM's
        recording: Recording,
        device: torch.device,
        *,
        partial: bool = False,
    ) -> None:
        super().__init__(model, model_config, recording, partial=partial)
        self._device = device

    def begin(self) -> None:
        with self._device:
            super().begin()

    def load(self, tensors: Sequence[tuple[str, torch.Tensor]]) -> None:
        with self._device:
            super().load(tensors)

    def finish(self) -> None:
        with self._device:
            super().finish()

    def abandon(self) -> None:
        with self._device:
            super().abandon()


class PlainReload(LayerwiseReload):
    """Over the old weights, for a vLLM without the layer-wise reload."""

    def begin(self) -> None:
        pass  # nothing is put in another place

    def load(self, tensors: Sequence[tuple[str, torch.Tensor]]) -> None:
        # Copied, since loaders may keep what they are given, and a slot is overwritten when this returns.
        mine = [(name, tensor.clone()) for name, tensor in tensors if name in self._names]
        self.kept_nbytes += sum(tensor.nbytes for _, tensor in mine)
        if mine:
            with self._device, torch.no_grad(), some_of_a_drafter():
                self.model.load_weights(iter(mine))  # type: ignore[operator]

    def finish(self) -> None:
        # Looked up now: vllm-ascend puts its own function in this place.
        from vllm.model_executor.model_loader import utils

        with self._device, torch.no_grad():
            utils.process_weights_after_loading(self.model, self._model_config, self._device)
        self._check_places()

    def abandon(self) -> None:
        pass
