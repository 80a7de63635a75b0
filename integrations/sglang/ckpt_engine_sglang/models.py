"""One of SGLang's models, loaded bucket by bucket with what SGLang itself uses to load it from disk."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ckpt_engine.errors import ConfigError
from ckpt_engine.ipc.messages import TensorLayout
from ckpt_engine.loading.completeness import Rules, check_complete, parameters_in
from ckpt_engine.loading.recording import Recording
from ckpt_engine.loading.rehearsal import NotRehearsable, named_parameters, rehearse
from ckpt_engine_sglang.leniency import filled_well_enough

NamedTensors = list[tuple[str, torch.Tensor]]
_LOADING = ("restore_weights_before_loading", "load_weights_only", "postprocess_weights")


class Model:
    """A model runner's model during one update.

    Args:
        role: "target", or what SGLang calls the draft model.
        runner: SGLang's ModelRunner.
    """

    def __init__(self, role: str, runner: Any) -> None:  # noqa: ANN401
        self.role = role
        self.path = str(runner.model_config.model_path)
        self._runner = runner
        self._model: torch.nn.Module = runner.model
        self._device = torch.device(runner.device)
        self._restored = False
        self._live: Recording | None = None
        self.recording: Recording | None = None
        """Known before the load where the model can be rehearsed, after it where it cannot."""

    # Before the first byte

    def refuse_unsupported(self) -> None:
        """Raises ConfigError where a write into the weights in place would not be enough, or too much."""
        from sglang.srt.model_loader.loader import DefaultModelLoader

        missing = [name for name in _LOADING if not hasattr(DefaultModelLoader, name)]
        if missing:
            raise ConfigError(f"this SGLang's DefaultModelLoader has no {', '.join(missing)}")
        updater = self._runner.weight_updater
        inactive = getattr(updater, "_assert_weight_cache_inactive", None)
        if inactive is not None:
            try:
                inactive("an update")
            except RuntimeError as error:
                raise ConfigError(str(error)) from None
        from sglang.srt.model_executor.model_runner_components import weight_updater

        derived = getattr(weight_updater, "_unsupported_derived_weight_cache_error", None)
        reason = derived(self._model) if derived is not None else None
        if reason is not None:
            raise ConfigError(f"{self.role} model: {reason}")
        for name, module in self._model.named_modules():
            if getattr(module, "use_intel_amx_backend", False):
                raise ConfigError(
                    f"{self.role} model: the weights of {name} are packed for AMX, which SGLang cannot undo "
                    "to load others: restart the server with the new weights"
                )

    def rehearse(self, tensors: Sequence[TensorLayout]) -> None:
        """Finds out what the model would do with these tensors; nothing is touched.

        Raises:
            WeightsMismatch: it would refuse one.
        """
        if self.quantized_parameters():
            return
        try:
            with self._default_dtype():
                self.recording = rehearse(self._model, [tensors])
        except NotRehearsable:
            self.recording = None

    def quantized_parameters(self) -> list[str]:
        """Parameters of modules whose weights SGLang changes after it loaded them."""
        found = []
        for name, module in self._model.named_modules():
            method = getattr(module, "quant_method", None)
            if method is None or type(method).__name__.startswith("Unquantized"):
                continue
            found += [f"{name}.{leaf}" if name else leaf for leaf, _ in module.named_parameters()]
        return found

    def padded_parameters(self) -> list[str]:
        """Embeddings, whose loader checks shapes itself."""
        from sglang.srt.layers.vocab_parallel_embedding import VocabParallelEmbedding

        return parameters_in(self._model, VocabParallelEmbedding)

    # The load

    def load(self, tensors: NamedTensors) -> None:
        """One bucket, or what of it can be loaded without others."""
        from sglang.srt.model_loader.loader import DefaultModelLoader

        if not self._restored:
            self._restored = True
            DefaultModelLoader.restore_weights_before_loading(self._model, self._device)
            if self.recording is None:
                self._live = Recording(named_parameters(self._model))
        with self._default_dtype():
            if self._live is None:
                DefaultModelLoader.load_weights_only(self._model, iter(tensors), self._device)
                return
            self._live.set_targets(named_parameters(self._model))
            for name, tensor in tensors:
                self._live.add_source(name, tensor)
            with self._live.at_work():
                DefaultModelLoader.load_weights_only(self._model, iter(tensors), self._device)
            self._live.drop_sources()

    def finish(self, rules: Rules) -> None:
        """What SGLang does after a load. Raises WeightsMismatch when not all parameters were filled."""
        if self._live is not None:
            self.recording = self._live
            self.check_complete(rules)
        self._postprocess()

    def check_complete(self, rules: Rules) -> None:
        assert self.recording is not None
        check_complete(self.recording, rules, filled_well_enough(self.recording, self.quantized_parameters()))

    def give_up(self) -> None:
        """After a failure: what was restored for loading must be what the forward pass expects again."""
        if self._restored:
            self._postprocess()

    def _postprocess(self) -> None:
        from sglang.srt.model_loader.loader import DefaultModelLoader

        self._restored = False
        with self._default_dtype():
            DefaultModelLoader.postprocess_weights(self._model, self._device)

    def _default_dtype(self) -> Any:  # noqa: ANN401 - a context manager
        from sglang.srt.model_loader.utils import set_default_torch_dtype

        return set_default_torch_dtype(self._runner.model_config.dtype)
