"""One of SGLang's models, loaded bucket by bucket with what SGLang itself uses to load it from disk."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch

from ckpt_engine.errors import ConfigError
from ckpt_engine.ipc.messages import TensorLayout
from ckpt_engine.loading.completeness import Rules, check_complete, parameters_in
from ckpt_engine.loading.loaded import LoadedModel
from ckpt_engine.loading.recording import Recording
from ckpt_engine.loading.rehearsal import NotRehearsable, named_parameters, rehearse
from ckpt_engine_sglang import layouts, versions
from ckpt_engine_sglang.leniency import filled_well_enough

logger = logging.getLogger(__name__)

NamedTensors = list[tuple[str, torch.Tensor]]


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
        self._addresses: dict[str, int] = {}
        self._live: Recording | None = None
        self.recording: Recording | None = None
        """Known before the load where the model can be rehearsed, after it where it cannot."""

    # Before the first byte

    def refuse_unsupported(self) -> None:
        """Raises ConfigError where a write into the weights in place would not be enough, or too much."""
        reason = versions.cache_problem(self._model, getattr(self._runner, "weight_updater", self._runner))
        if getattr(self._model, "flash_rl_initial_load_complete", False):
            reason = "it was loaded as flash_rl, which quantises all weights of a checkpoint in one call"
        if reason is None:
            reason = layouts.no_way_back(self._model)
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
        try:
            with self._default_dtype():
                self.recording = rehearse(self._model, [tensors], layouts.restored)
        except NotRehearsable as error:
            logger.info("%s model: judged after the load, since it %s", self.role, error)
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
        if not self._restored:
            self._restored = True
            self._addresses = self._parameter_addresses()
            versions.restore(self._model, self._device)
            if self.recording is None:
                self._live = Recording(named_parameters(self._model))
        with self._default_dtype():
            if self._live is None:
                versions.load(self._model, tensors, self._device)
                return
            self._live.set_targets(named_parameters(self._model))
            for name, tensor in tensors:
                self._live.add_source(name, tensor)
            with self._live.at_work():
                versions.load(self._model, tensors, self._device)
            self._live.drop_sources()

    def finish(self, rules: Rules) -> None:
        """What SGLang does after a load. Raises WeightsMismatch when not all parameters were filled."""
        if self._live is not None:
            self.recording = self._live
            self.check_complete(rules)
        self._postprocess()
        self._check_graphs()

    def check_complete(self, rules: Rules) -> None:
        """Raises WeightsMismatch: the update does not fill all parameters, or with what does not fit."""
        assert self.recording is not None
        layouts.check_dtypes(self.recording, named_parameters(self._model))
        optional = filled_well_enough(
            self.recording, self.quantized_parameters(), repacked=self._live is not None
        )
        check_complete(self.recording, rules, optional)

    def loaded(self) -> LoadedModel:
        """For what is compared once it is loaded."""
        assert self.recording is not None
        return self._model, self.recording, str

    def give_up(self) -> None:
        """After a failure: what was restored for loading must be what the forward pass expects again."""
        if self._restored:
            self._postprocess()

    def _postprocess(self) -> None:
        self._restored = False
        with self._default_dtype():
            versions.post_process(self._model, self._device)

    def _parameter_addresses(self) -> dict[str, int]:
        return {name: tensor.data_ptr() for name, tensor in named_parameters(self._model).items()}

    def _check_graphs(self) -> None:
        """CUDA graphs read the memory that weights had when they were captured."""
        if not versions.has_cuda_graphs(self._runner):
            return
        now = self._parameter_addresses()
        moved = [name for name, address in self._addresses.items() if now.get(name) != address]
        if moved:
            raise ConfigError(
                f"{self.role} model: SGLang moved {len(moved)} weights in memory ({moved[0]} ...), but its "
                "CUDA graphs read the old ones: start the server with --disable-cuda-graph to update it"
            )

    def _default_dtype(self) -> Any:  # noqa: ANN401 - a context manager
        from sglang.srt.model_loader.utils import set_default_torch_dtype

        return set_default_torch_dtype(self._runner.model_config.dtype)
