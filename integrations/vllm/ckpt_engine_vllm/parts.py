"""The models of an engine that an update may have tensors for: the main one, and the one that speculates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import torch

from ckpt_engine.errors import ConfigError
from ckpt_engine.ipc.messages import TensorLayout
from ckpt_engine.loading.recording import Recording

DRAFTER_PREFIX = "drafter."
"""Of tensors for a drafter with a checkpoint of its own, which has the names of the main model's too."""
_WITHOUT_WEIGHTS = frozenset({"ngram", "ngram_gpu", "suffix", "custom_class", "extract_hidden_states"})
"""Ways to speculate that have no checkpoint: for some of them vLLM gives the main model's config."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """One model. `prefix`: of its tensors' names in an update; `foreign`: of names that are others'."""

    name: str
    model: torch.nn.Module
    config: Any
    prefix: str = ""
    foreign: str | None = None

    def own_name(self, name: str) -> str | None:
        """What the model calls the tensor `name` of an update; None where it is not for this model."""
        if self.foreign is not None and name.startswith(self.foreign):
            return None
        return name.removeprefix(self.prefix) if name.startswith(self.prefix) else None

    def layouts(self, tensors: Sequence[TensorLayout]) -> list[TensorLayout]:
        """This model's, under its own names."""
        named = ((self.own_name(tensor.name), tensor) for tensor in tensors)
        return [msgspec.structs.replace(tensor, name=name) for name, tensor in named if name is not None]

    def tensors(self, tensors: Sequence[tuple[str, torch.Tensor]]) -> list[tuple[str, torch.Tensor]]:
        """This model's, under its own names."""
        named = ((self.own_name(name), tensor) for name, tensor in tensors)
        return [(name, tensor) for name, tensor in named if name is not None]


def parts_of(worker: Any) -> list[Part]:  # noqa: ANN401 - vLLM's Worker
    """The models of a worker, the main one first.

    An MTP or DSpark drafter whose layers are a part of the main model's checkpoint takes them from there. Any
    other drafter has a checkpoint of its own, whose tensors are sent as `drafter.NAME`; without them it keeps
    its weights.

    Raises:
        ConfigError: the engine speculates with weights that are not found.
    """
    config = worker.vllm_config
    main = worker.get_model()
    drafter = _drafter_of(worker)
    speculative = config.speculative_config
    if drafter is None:
        if speculates_with_weights(speculative) and _is_on_this_rank(config):
            raise ConfigError(
                f"this engine speculates by {speculative.method!r}, but its vLLM does not show where that "
                "model is, which an update would leave behind: start the engine without it"
            )
        return [Part(name="model", model=main, config=config.model_config)]
    prefix = "" if _is_in_the_mains_checkpoint(speculative, config.model_config) else DRAFTER_PREFIX
    return [
        Part(name="model", model=main, config=config.model_config, foreign=prefix or None),
        Part(name="drafter", model=drafter, config=speculative.draft_model_config, prefix=prefix),
    ]


def speculates_with_weights(speculative: Any) -> bool:  # noqa: ANN401 - vLLM's SpeculativeConfig, or None
    """Whether there is a model that speculates, which an update must not leave behind in silence."""
    return speculative is not None and speculative.method not in _WITHOUT_WEIGHTS


def _is_in_the_mains_checkpoint(speculative: Any, main: Any) -> bool:  # noqa: ANN401
    """vLLM also takes these methods for a checkpoint apart, and a draft model that has the main one's path
    for a model apart."""
    # Up to vLLM 0.11 the method had the model's name before it.
    if not speculative.method.endswith("mtp") and speculative.method != "dspark":
        return False
    return bool(_paths(main) & _paths(speculative.draft_model_config))


def _paths(model_config: Any) -> set[str]:  # noqa: ANN401
    # A loader that streams keeps what was asked for in `model_weights`, and has a cache's path in `model`.
    return {model_config.model, getattr(model_config, "model_weights", None)} - {"", None}


def _is_on_this_rank(config: Any) -> bool:  # noqa: ANN401 - vLLM's VllmConfig
    """Of a pipeline's ranks the last one speculates."""
    if config.parallel_config.pipeline_parallel_size == 1:
        return True
    from vllm.distributed import get_pp_group

    return bool(get_pp_group().is_last_rank)


def refuse_to_write_the_mains(part: Part, main: Part, recording: Recording) -> None:
    """Raises ConfigError where tensors for a drafter would be loaded into parameters of the main model: vLLM
    has it share what was the same, or not there, when it started."""
    if part is main or not part.prefix:
        return
    mains = {id(parameter) for parameter in main.model.parameters()}
    for name, parameter in part.model.named_parameters(remove_duplicate=False):
        if id(parameter) in mains and recording.parameters[name].regions:
            tensor = part.prefix + ", ".join(sorted(recording.parameters[name].sources))
            raise ConfigError(
                f"{tensor}: this engine's drafter has no {name} of its own, it uses the model's. If it is "
                f"the same, ignore it (ignored=[{tensor!r}]), else start the engine from the checkpoints"
            )


def _drafter_of(worker: Any) -> torch.nn.Module | None:  # noqa: ANN401
    """The model that speculates, if there is one with weights of its own."""
    runner = worker.model_runner
    get_draft_model = getattr(runner, "get_draft_model", None)
    if get_draft_model is not None:
        found = get_draft_model()
    else:
        speculator = getattr(runner, "drafter", None) or getattr(runner, "speculator", None)
        found = getattr(speculator, "model", None)
    unwrap = getattr(found, "unwrap", None)  # what replays graphs may stand in its place
    if unwrap is not None and not isinstance(found, torch.nn.Module):
        found = unwrap()
    return found if isinstance(found, torch.nn.Module) else None
