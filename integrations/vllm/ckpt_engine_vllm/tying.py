"""An output embedding (lm_head) that a config ties to the input embedding.

vLLM does what the checkpoint says, not the config: an lm_head of its own that differs is used, an equal one
is tied again, and without one it is tied (`model_loader.weight_tying`). So each update decides anew, and a
head comes apart from the embedding, or back to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ckpt_engine.errors import ConfigError
from ckpt_engine.loading.completeness import Rules
from ckpt_engine.loading.recording import Recording
from ckpt_engine.loading.rehearsal import WeightsMismatch
from ckpt_engine_vllm.parts import Part


@dataclass(frozen=True)
class Head:
    """A model's head and input embedding, by name and module, of which the config says that they are tied."""

    name: str
    module: Any
    embedding_name: str
    embedding: Any
    by_checkpoint: bool
    """Whether this vLLM looks what the checkpoint has; older ones tie them, come what may."""

    @classmethod
    def of(cls, model: torch.nn.Module, model_config: Any) -> Head | None:  # noqa: ANN401 - vLLM's
        """None where vLLM itself would leave the two as they are."""
        untied = getattr(model_config, "word_embeddings_untied_by_checkpoint", None)
        text_config = getattr(model_config, "hf_text_config", None)
        if not untied and not getattr(text_config, "tie_word_embeddings", False):
            return None
        from vllm.model_executor.layers.vocab_parallel_embedding import (
            ParallelLMHead,
            UnquantizedEmbeddingMethod,
            VocabParallelEmbedding,
        )

        found = [
            (name, module)
            for name, module in model.named_modules()
            if isinstance(module, VocabParallelEmbedding)
            and isinstance(module.quant_method, UnquantizedEmbeddingMethod)
        ]
        heads = [pair for pair in found if isinstance(pair[1], ParallelLMHead)]
        embeddings = [pair for pair in found if not isinstance(pair[1], ParallelLMHead)]
        if len(heads) != 1 or len(embeddings) != 1:
            return None
        if heads[0][1].weight.shape != embeddings[0][1].weight.shape:
            return None
        return cls(*heads[0], *embeddings[0], by_checkpoint=untied is not None)

    @property
    def weight_name(self) -> str:
        return f"{self.name}.weight"

    @property
    def tied(self) -> bool:
        return self.module.weight is self.embedding.weight

    def tie(self) -> None:
        self.module.tie_weights(self.embedding)

    def check(self, recording: Recording, rules: Rules) -> set[str]:
        """The parameters that need not be filled. Raises WeightsMismatch where the head alone is."""
        head = recording.parameters[self.weight_name]
        embedding = recording.parameters[f"{self.embedding_name}.weight"]
        if head.regions and not embedding.complete and not rules.partial:
            raise WeightsMismatch(
                f"the update fills {self.weight_name}, not {self.embedding_name}.weight: send both, or the "
                "embedding alone where they are tied"
            )
        return set() if head.regions else {self.weight_name}


def heads_of(parts: Sequence[Part]) -> dict[str, Head]:
    """By the parts' names. A drafter often has the main model's modules: they are counted once, there."""
    heads: dict[str, Head] = {}
    seen: set[int] = set()
    for part in parts:
        head = Head.of(part.model, part.config)
        if head is not None and not seen & {id(head.module), id(head.embedding)}:
            heads[part.name] = head
        seen |= {id(module) for module in part.model.modules()}
    return heads


class Tying:
    """What becomes of a head in one update.

    Raises:
        ConfigError: it would move, and graphs may hold its place; or this vLLM ties it, come what may.
    """

    def __init__(self, head: Head, recording: Recording, vllm_config: Any) -> None:  # noqa: ANN401 - vLLM's
        self._head = head
        self._filled = bool(recording.parameters[head.weight_name].regions)
        embedding = bool(recording.parameters[f"{head.embedding_name}.weight"].regions)
        self._comes_back = not self._filled and embedding and not head.tied
        # Graphs of drafters have the head in them, those of the main model have not.
        self._in_graphs = (
            vllm_config.speculative_config is not None and not vllm_config.model_config.enforce_eager
        )
        self._own: torch.nn.Parameter | None = None
        if self._comes_back:
            self._refuse_to_move("has none")
        if self._filled and head.tied:
            self._refuse_to_move("has one of its own")
            weight = head.module.weight
            # Made before anything is touched: there may be no memory for it.
            self._own = torch.nn.Parameter(weight.detach().clone(), requires_grad=False)
            self._own.__class__ = weight.__class__
            vars(self._own).update(vars(weight))

    @property
    def moving(self) -> set[str]:
        """The parameters that may lie elsewhere afterwards."""
        return {self._head.weight_name} if self._filled or self._comes_back else set()

    def begin(self) -> None:
        if self._own is not None:
            self._head.module.weight = self._own
        elif self._comes_back:
            self._head.tie()

    def finish(self) -> None:
        """Ties what turned out equal, as vLLM does after it has loaded both."""
        head = self._head
        if not self._filled or head.tied or self._in_graphs:
            return
        if torch.equal(head.module.weight, head.embedding.weight):
            head.tie()

    def _refuse_to_move(self, what: str) -> None:
        name = self._head.weight_name
        told = f"this engine has {name} {'tied to' if self._head.tied else 'apart from'} "
        told += f"{self._head.embedding_name}.weight, and the update {what}"
        remedy = f"if it is the same, ignore it (ignored=[{name!r}]), else " if self._head.tied else ""
        if not self._head.by_checkpoint:
            raise ConfigError(f"{told}: {remedy}use a newer vLLM, which decides by the checkpoint")
        if self._in_graphs:
            raise ConfigError(
                f"{told}, but graphs of the drafter may hold its place: {remedy}start the engine with "
                "--enforce-eager, or restart it with the new checkpoint"
            )
