"""One update of one model, through vLLM's layer-wise reload.

Post-processing turns loaded weights into what the kernels want (packed, transposed, quantised), and cannot be
undone. vLLM's layer-wise reload therefore gives every layer fresh tensors in the checkpoint's layout, loads
and processes them once the layer is complete, and copies the result to where the old weights lie, so that
CUDA graphs stay valid.

Until a layer is complete it keeps references to the tensors it was given. Ours lie in a slot, which is given
back, and overwritten, when `load` returns. So `load` copies those that are still held by then: the members of
fused parameters whose group goes on in a later bucket, mostly.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ckpt_engine.loading.recording import Recording
from ckpt_engine_vllm import moe, quantisation
from ckpt_engine_vllm.layerwise import abandon_layerwise_reload, some_of_a_drafter
from ckpt_engine_vllm.tying import Tying


class Moved(RuntimeError):
    """A parameter lies elsewhere than before. No later update mends what graphs hold."""


class Reload:
    """From `begin` on the model must not run, until `finish` or `abandon` has returned."""

    def __init__(
        self,
        model: torch.nn.Module,
        model_config: Any,  # noqa: ANN401 - vLLM's
        recording: Recording,
        *,
        partial: bool = False,
    ) -> None:
        self.model = model
        self.kept_nbytes = 0
        """Bytes copied because they were held beyond their bucket."""
        self.tensor_count = len(recording.taken)
        """Tensors of the update that this model takes."""
        self._model_config = model_config
        self._names = recording.taken
        self._modules = recording.modules
        self._partial = partial
        # Before any model's `begin`: models may share modules, such as vLLM's rotary tables.
        self._addresses = _addresses(model)
        self._active = False
        self.tying: Tying | None = None
        """What becomes of an output embedding that may be tied."""

    def begin(self) -> None:
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        self._active = True
        if self._names and not self._partial:
            quantisation.default_cache_scales(self.model)
        if self.tying is not None:
            self.tying.begin()
        initialize_layerwise_reload(self.model)

    def load(self, tensors: Sequence[tuple[str, torch.Tensor]]) -> None:
        """Loads those of `tensors` that this model reads. None of them is referred to afterwards."""
        mine = [(name, tensor) for name, tensor in tensors if name in self._names]
        if not mine:
            return
        with torch.no_grad(), some_of_a_drafter():
            self.model.load_weights(iter(mine))  # type: ignore[operator]
            self._copy_held({_storage(tensor) for _, tensor in mine})

    def finish(self) -> None:
        """Processes what is left, and checks that nothing has moved.

        Raises:
            Moved: a parameter lies elsewhere than before.
        """
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        with torch.no_grad():
            finalize_layerwise_reload(self.model, self._model_config)
            self._active = False
            moe.pack_experts(self.model, self._modules)
            if self.tying is not None:
                self.tying.finish()
            _process_tied(self.model, self._modules)
        self._check_places()

    def _check_places(self) -> None:
        may_move = set() if self.tying is None else self.tying.moving
        after = _addresses(self.model)
        moved = {name for name, address in self._addresses.items() if after.get(name) != address}
        changed = sorted((moved | after.keys() ^ self._addresses.keys()) - may_move)
        if changed:
            raise Moved(
                f"the reload moved {', '.join(changed[:8])}, and captured graphs would go on reading the old "
                "place: restart the engine with the new checkpoint"
            )

    def abandon(self) -> None:
        """Puts the layers that are not complete back as they were. Does nothing after `finish`."""
        if self._active:
            abandon_layerwise_reload(self.model, self._model_config)
            self._active = False

    def _copy_held(self, storages: set[int]) -> None:
        """Copies the tensors of these storages that layers wait with. Each one once."""
        from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

        copies: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

        def copied(value: Any) -> Any:  # noqa: ANN401 - an argument of a weight loader
            if isinstance(value, tuple):
                return tuple(copied(item) for item in value)
            if isinstance(value, dict):
                return {key: copied(item) for key, item in value.items()}
            if not isinstance(value, torch.Tensor) or value.is_meta or _storage(value) not in storages:
                return value
            if id(value) not in copies:
                copies[id(value)] = (value, value.clone())
                self.kept_nbytes += value.nbytes
            return copies[id(value)][1]

        for module in self.model.modules():
            for _, bound in get_layerwise_info(module).loaded_weights:
                for key, value in bound.arguments.items():
                    bound.arguments[key] = copied(value)


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _addresses(model: torch.nn.Module) -> dict[str, int]:
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {name: tensor.data_ptr() for name, tensor in tensors}


def _process_tied(model: torch.nn.Module, loaded: set[str]) -> None:
    """Post-processes modules whose parameter was loaded through another module's: what theirs made of it
    (a packed copy, on CPUs) is still that of the old weights."""
    from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase

    owners: dict[int, str] = {}
    for name, module in model.named_modules():
        if name in loaded:
            owners |= {
                id(parameter): name for parameter in module._parameters.values() if parameter is not None
            }
    for name, module in model.named_modules():
        tied = any(owners.get(id(p), name) != name for p in module._parameters.values() if p is not None)
        method = getattr(module, "quant_method", None)
        if tied and name not in loaded and isinstance(method, QuantizeMethodBase):
            method.process_weights_after_loading(module)
