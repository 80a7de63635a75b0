"""The embedded engine's model: checkpoints made from nothing, dummy weights, loading by name.

Everything comes from a local directory; no model hub is asked. Weights are drawn from a seed, so that
two machines make the same checkpoint.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch

from ckpt_engine.embedded_engine import missing_extra
from ckpt_engine.errors import CheckpointError

try:
    import transformers
    from safetensors import safe_open
    from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PreTrainedModel
    from transformers.utils import logging as transformers_logging
except ImportError as error:
    raise missing_extra(error) from error

Size = Literal["tiny", "small"]

SIZES: dict[str, dict[str, Any]] = {
    "tiny": {
        "vocab_size": 256,
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    "small": {
        "vocab_size": 8192,
        "hidden_size": 512,
        "intermediate_size": 1408,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
    },
}
"""Llama shapes: tiny is about 0.2 MB in bfloat16 (tests), small about 56 MB (the demo)."""
MAX_SHARD_SIZE = {"tiny": "60KB", "small": "16MB"}


class WeightsMismatch(CheckpointError, KeyError):
    """A tensor has a name, shape or dtype that the model does not; none of its bucket was copied."""

    def __str__(self) -> str:
        # KeyError would print the repr of the message.
        return str(self.args[0]) if self.args else ""


def make_checkpoint(directory: Path | str, *, seed: int, size: Size = "tiny") -> None:
    """Writes a Llama checkpoint in bfloat16 with tied embeddings: config.json, shards, their index."""
    if size not in SIZES:
        raise CheckpointError(f"size={size!r}: choose one of {', '.join(SIZES)}")
    config = LlamaConfig(tie_word_embeddings=True, max_position_embeddings=1024, **SIZES[size])
    config.dtype = torch.bfloat16
    model = _build(config, seed)
    with _no_progress_bars():
        model.save_pretrained(directory, max_shard_size=MAX_SHARD_SIZE[size])


def load_dummy(directory: Path | str, seed: int) -> PreTrainedModel:
    """The model that config.json describes, with random weights; the directory's weights are not read."""
    return _build(AutoConfig.from_pretrained(directory, local_files_only=True), seed)


def load_from_disk(directory: Path | str) -> PreTrainedModel:
    """What transformers itself makes of the directory: the yardstick for an updated engine."""
    keyword = "torch_dtype" if transformers.__version__.startswith("4.") else "dtype"
    options: dict[str, Any] = {keyword: "auto", "local_files_only": True}
    with _no_progress_bars():
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(directory, **options)
    model.train(False)
    return model


@torch.no_grad()
def load_weights(model: PreTrainedModel, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Copies tensors into the model's parameters, by name and in place.

    The call checks every tensor before it copies the first. Tied parameters share storage: a
    checkpoint that leaves `lm_head.weight` out fills it through the embeddings, and one that has it
    writes the same bytes twice.

    Raises:
        WeightsMismatch: an unknown name, another shape or another dtype (nothing is cast).
    """
    targets = model.state_dict()
    pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
    for name, tensor in named_tensors:
        target = targets.get(name)
        if target is None:
            raise WeightsMismatch(f"the model has no parameter {name!r}")
        if target.shape != tensor.shape:
            raise WeightsMismatch(
                f"tensor {name!r} has shape {list(tensor.shape)}, the model's has {list(target.shape)}"
            )
        if target.dtype != tensor.dtype:
            raise WeightsMismatch(f"tensor {name!r} is {tensor.dtype}, the model's is {target.dtype}")
        pairs.append((target, tensor))
    for target, tensor in pairs:
        target.copy_(tensor)


@torch.inference_mode()
def generate_greedily(model: PreTrainedModel, prompt_token_ids: Sequence[int], max_tokens: int) -> list[int]:
    """`max_tokens` new tokens, each the likeliest; no token ends the sequence early."""
    generated: list[int] = []
    inputs = torch.tensor([list(prompt_token_ids)], dtype=torch.long)
    cache = None
    while len(generated) < max_tokens:
        output = model(input_ids=inputs, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        generated.append(int(output.logits[0, -1].argmax()))
        inputs = torch.tensor([generated[-1:]], dtype=torch.long)
    return generated


def parameter_digests(model: PreTrainedModel) -> dict[str, str]:
    """name -> SHA-256 of the parameter's bytes; tied parameters once, under the first name."""
    return {name: digest(parameter) for name, parameter in model.named_parameters()}


def file_digests(directory: Path | str) -> tuple[dict[str, str], int]:
    """name -> SHA-256 of each tensor in the directory's safetensors files, and their bytes in all."""
    digests: dict[str, str] = {}
    nbytes = 0
    for path in sorted(Path(directory).glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - a safetensors file, not a dict
                tensor = file.get_tensor(name)
                digests[name] = digest(tensor)
                nbytes += tensor.nbytes
    return digests, nbytes


def digest(tensor: torch.Tensor) -> str:
    """SHA-256, in hex, of the tensor's bytes in row-major order."""
    flat = tensor.detach().contiguous().flatten().view(torch.uint8)
    return hashlib.sha256(flat.numpy().data).hexdigest()


def _build(config: Any, seed: int) -> PreTrainedModel:  # noqa: ANN401 - transformers' configs share no useful type
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(_draw(name, parameter, generator))
    model.train(False)
    return model


def _draw(name: str, parameter: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Weights that make generation depend on every layer.

    With the usual small initialisation the residual stream is the embedding itself, and a model with
    tied embeddings repeats its last token whatever its weights are. So: projections that keep the
    variance of their input, embeddings far below it, norms that are not all ones.
    """
    noise = torch.randn(parameter.shape, generator=generator)
    if parameter.ndim == 1:
        return 0.1 * noise if name.endswith("bias") else 1 + 0.1 * noise
    if "embed" in name:
        return 0.02 * noise
    return noise * (1.5 / math.sqrt(parameter.shape[-1]))


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    enabled = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if enabled:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]
