"""One update of one model of vllm-ascend's.

Post-processing turns loaded weights into what the kernels want; experts are transposed by it, each time.
Where vLLM has its layer-wise reload, every layer gets fresh tensors in the checkpoint's layout first, is
processed once it is complete, and the result is copied to where the old weights lie, so that captured graphs
stay valid. Without it, weights are loaded over the old ones: right for dense models, refused for others.

Every tensor is copied first: layers may keep references to it until they are complete, and ours lies in a
slot that is overwritten when `load` returns.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from ckpt_engine_vllm.layerwise import abandon_layerwise_reload, some_of_a_drafter

_LAYERWISE = "vllm.model_executor.model_loader.reload"


def has_layerwise_reload() -> bool:
    try:
        return importlib.util.find_spec(_LAYERWISE) is not None
    except ModuleNotFoundError:
        return False


def models_of(worker: Any) -> list[tuple[torch.nn.Module, Any]]:  # noqa: ANN401 - vllm-ascend's NPUWorker
    """The worker's models with their configs: the engine's own, and the one that speculates if its weights
    come with the same checkpoint (MTP; those of other methods are another checkpoint's, and stay)."""
    config = worker.vllm_config
    models = [(_module(worker.model_runner), config.model_config)]
    speculative = getattr(config, "speculative_config", None)
    if speculative is None or "mtp" not in str(getattr(speculative, "method", "")):
        return models
    runner = worker.model_runner
    # `speculator` is the V2 runner's name for it; both exist only once set up.
    proposer = getattr(runner, "drafter", None) or getattr(runner, "speculator", None)
    drafter = getattr(proposer, "model", None)
    if isinstance(drafter, torch.nn.Module):
        models.append((drafter, speculative.draft_model_config))
    return models


def _module(runner: Any) -> torch.nn.Module:  # noqa: ANN401
    """The model itself: graph capture may have put a wrapper around it."""
    get_model = getattr(runner, "get_model", None)
    model = get_model() if get_model is not None else runner.model
    assert isinstance(model, torch.nn.Module)
    return model


class Reload:
    """From `begin` on the model must not run, until `finish` or `abandon` has returned."""

    def __init__(self, model: torch.nn.Module, model_config: Any, device: torch.device) -> None:  # noqa: ANN401
        self._model = model
        self._model_config = model_config
        self._device = device
        self._layerwise = has_layerwise_reload()
        self._active = False

    def begin(self) -> None:
        self._active = True
        if self._layerwise:
            from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

            initialize_layerwise_reload(self._model)

    def load(self, tensors: list[tuple[str, torch.Tensor]]) -> None:
        with torch.no_grad(), some_of_a_drafter():
            copies = ((name, tensor.clone()) for name, tensor in tensors)
            self._model.load_weights(copies)  # type: ignore[operator]

    def finish(self) -> None:
        with torch.no_grad():
            if self._layerwise:
                from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

                finalize_layerwise_reload(self._model, self._model_config)
            else:
                # Looked up now: vllm-ascend puts its own function in this place.
                from vllm.model_executor.model_loader import utils

                utils.process_weights_after_loading(self._model, self._model_config, self._device)
        self._active = False

    def abandon(self) -> None:
        """Puts layers that are not complete back as they were. Does nothing before `begin` and after
        `finish`."""
        if self._active and self._layerwise:
            abandon_layerwise_reload(self._model, self._model_config)
            self._active = False
