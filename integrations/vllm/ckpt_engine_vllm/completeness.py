"""Whether an update's tensors are those of the engine's models: all of them, and no others."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch

from ckpt_engine.ipc.messages import TensorLayout
from ckpt_engine_vllm.rehearsal import Rehearsal, WeightsMismatch, Written

_DERIVED = re.compile(r"rotary_(pos_)?emb\.(inv_freq|cos_cached|sin_cached)$")
"""Tables that some checkpoints hold, and engines compute."""
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
_SHOWN = 12


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What may be left out.

    `partial`: modules that nothing was sent for keep their weights; one that gets any tensor needs all of
    its own. `ignored`: patterns (fnmatch) of names that no model is given. `parallel_size`: ranks over which
    a tensor may be cut. `shares`: other ranks hold layers or experts that this one passes over.
    `layer_count`: of the main model; those above belong to a drafter, which need not be there.
    """

    partial: bool = False
    ignored: tuple[str, ...] = ()
    parallel_size: int = 1
    shares: bool = False
    layer_count: int | None = None

    def wanted(self, tensors: Sequence[TensorLayout]) -> list[TensorLayout]:
        """Those of `tensors` that are not ignored."""
        return [t for t in tensors if not any(fnmatchcase(t.name, pattern) for pattern in self.ignored)]


def check_names(tensors: Sequence[TensorLayout], read: set[str], rules: Rules) -> None:
    """Raises WeightsMismatch with the names of tensors that are not among those `read` by any model."""
    patterns = {_pattern(name) for name in read} if rules.shares else set()
    unknown = [
        tensor.name
        for tensor in tensors
        if tensor.name not in read
        and 0 not in tensor.shape
        and not _DERIVED.search(tensor.name)
        and _pattern(tensor.name) not in patterns
        and not _of_a_drafter(tensor.name, rules)
    ]
    if unknown:
        raise WeightsMismatch(
            f"the model has no place for {_listed(unknown)}: is it this model's checkpoint? "
            "Names that are not its can be given as patterns to ignore"
        )


def check_shapes(
    tensors: Sequence[TensorLayout], rehearsal: Rehearsal, whole: Iterable[str], rules: Rules
) -> None:
    """Raises WeightsMismatch where a model read too little of a tensor: it cut a slice out of one too large.

    Args:
        whole: parameters whose own loaders check shapes, and pad what they read.
    """
    checked = {
        name
        for parameter in whole
        if parameter in rehearsal.parameters
        for name in rehearsal.parameters[parameter].sources
    }
    wrong = []
    for tensor in tensors:
        numel, read = _numel(tensor.shape), rehearsal.read.get(tensor.name, 0)
        if read and read * rules.parallel_size < numel and tensor.name not in checked:
            wrong.append(f"{tensor.name} {list(tensor.shape)} (the model takes {read} of {numel} elements)")
    if wrong:
        raise WeightsMismatch(f"wrong shapes: {_listed(wrong)}")


def check_complete(
    model: torch.nn.Module,
    tensors: Sequence[TensorLayout],
    rehearsal: Rehearsal,
    rules: Rules,
    filled_elsewhere: Collection[int] = (),
) -> None:
    """Raises WeightsMismatch with the parameters of `model` that the update would not fill, and with the
    tensors that would.

    Args:
        filled_elsewhere: ids of parameters that this model shares with another, which has them filled.
    """
    given = {tensor.name for tensor in tensors}
    filled = {name for name, written in rehearsal.parameters.items() if written.complete}
    touched = {_module(name) for name, written in rehearsal.parameters.items() if written.regions}
    aliases = _aliases(model)
    shared = {
        name
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if id(parameter) in filled_elsewhere
    }
    missing = []
    for name, written in rehearsal.parameters.items():
        if (
            name in filled
            or name in shared
            or written.numel == 0
            or any(other in filled for other in aliases.get(name, ()))
        ):
            continue
        if rules.partial and _module(name) not in touched:
            continue
        missing.append(_what_is_missing(model, name, written, given))
    if missing:
        advice = (
            "a module that gets a part of its tensors needs all of them"
            if rules.partial
            else "partial=True updates some modules only"
        )
        raise WeightsMismatch(f"the update does not fill {_listed(missing)}: {advice}")


def _what_is_missing(model: torch.nn.Module, name: str, written: Written, given: set[str]) -> str:
    module, _, leaf = name.rpartition(".")
    parent, _, fused = module.rpartition(".")
    parts = getattr(model, "packed_modules_mapping", {}).get(fused, ())
    names = [f"{parent}.{part}.{leaf}" if parent else f"{part}.{leaf}" for part in parts]
    absent = [each for each in names if each not in given]
    if names and absent:
        return f"{name} (missing {', '.join(absent)})"
    return f"{name} ({written.written} of {written.numel} elements)" if written.regions else name


def _aliases(model: torch.nn.Module) -> dict[str, set[str]]:
    """name -> other names of the same parameter (tied embeddings)."""
    by_tensor: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        by_tensor.setdefault(id(parameter), set()).add(name)
    return {name: names - {name} for names in by_tensor.values() for name in names if len(names) > 1}


def _of_a_drafter(name: str, rules: Rules) -> bool:
    match = _LAYER.search(name)
    return rules.layer_count is not None and match is not None and int(match[1]) >= rules.layer_count


def _pattern(name: str) -> str:
    return re.sub(r"\d+", "#", name)


def _module(name: str) -> str:
    return name.rpartition(".")[0]


def _numel(shape: Sequence[int]) -> int:
    numel = 1
    for size in shape:
        numel *= size
    return numel


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
