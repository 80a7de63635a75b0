"""Whether an update's tensors are those of the engine's models: all of them, and no others."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch

from ckpt_engine.ipc.messages import TensorLayout
from ckpt_engine.loading.recording import Recording, Written
from ckpt_engine.loading.rehearsal import WeightsMismatch

_DERIVED = re.compile(r"rotary_(pos_)?emb\.(inv_freq|cos_cached|sin_cached)$")
"""Tables that some checkpoints hold, and engines compute."""
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
_SHOWN = 12


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What may be left out.

    `partial`: modules that nothing was sent for keep their weights; one that gets any tensor needs all of
    its own. `ignored`: patterns (fnmatch) of names that no model need read. `parallel_size`: ranks over which
    a tensor may be cut. `shares`: other ranks hold layers or experts that this one passes over.
    `layer_count`: how many layers they have together, if that is known. `drafter_layers`: numbers, behind the
    main model's own, of layers that only a drafter has.
    `passed_over`: what else this engine's models do not read of their own checkpoint, by name.
    """

    partial: bool = False
    ignored: tuple[str, ...] = ()
    parallel_size: int = 1
    shares: bool = False
    layer_count: int | None = None
    drafter_layers: range = range(0)
    passed_over: re.Pattern[str] | None = None

    def ignores(self, name: str) -> bool:
        return any(fnmatchcase(name, pattern) for pattern in self.ignored)


def check_names(tensors: Sequence[TensorLayout], read: Collection[str], rules: Rules) -> None:
    """Raises WeightsMismatch with the names of tensors that are not among those `read` by any model."""
    patterns = {_pattern(name) for name in read} if rules.shares else set()
    unknown = [
        tensor.name
        for tensor in tensors
        if tensor.name not in read
        and 0 not in tensor.shape
        and not _may_be_unread(tensor.name, rules, patterns)
    ]
    if unknown:
        raise WeightsMismatch(
            f"the model has no place for {_listed(unknown)}: is it this model's checkpoint? "
            "Names that it may pass over can be given as ignored patterns"
        )


def check_shapes(
    tensors: Sequence[TensorLayout], recording: Recording, padded: Iterable[str], rules: Rules
) -> None:
    """Raises WeightsMismatch where a model read too little of a tensor: it cut a slice out of one too large.

    Args:
        padded: parameters whose own loaders check shapes, and pad what they read.
    """
    checked = {
        name
        for parameter in padded
        if parameter in recording.parameters
        for name in recording.parameters[parameter].sources
    }
    wrong = []
    for tensor in tensors:
        numel, read = torch.Size(tensor.shape).numel(), recording.read.get(tensor.name, 0)
        if read and read * rules.parallel_size < numel and tensor.name not in checked:
            wrong.append(f"{tensor.name} {list(tensor.shape)} (the model takes {read} of {numel} elements)")
    if wrong:
        raise WeightsMismatch(f"wrong shapes: {_listed(wrong)}")


def check_complete(
    recording: Recording,
    rules: Rules,
    optional: Collection[str] = (),
    packed: Mapping[str, Sequence[str]] | None = None,
) -> None:
    """Raises WeightsMismatch with the parameters that the update would not fill, and the tensors that would.

    Args:
        optional: parameters that need not be filled.
        packed: fused modules and those that they are made of (a model's `packed_modules_mapping`).
    """
    touched = recording.modules
    missing = [
        _what_is_missing(name, written, packed or {}, recording.read.keys())
        for name, written in recording.parameters.items()
        if not written.complete
        and name not in optional
        and not (rules.partial and _module(name) not in touched)
    ]
    if missing:
        advice = (
            "a module that gets a part of its tensors needs all of them"
            if rules.partial
            else "partial=True updates some modules only"
        )
        raise WeightsMismatch(f"the update does not fill {_listed(missing)}: {advice}")


def parameters_in(model: torch.nn.Module, kind: type[torch.nn.Module]) -> list[str]:
    """Names of the parameters of modules of this kind."""
    return [
        f"{name}.{parameter}" if name else parameter
        for name, module in model.named_modules()
        if isinstance(module, kind)
        for parameter, tensor in module._parameters.items()
        if tensor is not None
    ]


def _may_be_unread(name: str, rules: Rules, patterns: set[str]) -> bool:
    layer = _LAYER.search(name)
    nobodys = layer is not None and rules.layer_count is not None and int(layer[1]) >= rules.layer_count
    return bool(
        _DERIVED.search(name)
        or rules.ignores(name)
        or (_pattern(name) in patterns and not nobodys)
        or (layer and int(layer[1]) in rules.drafter_layers)
        or (rules.passed_over and rules.passed_over.search(name))
    )


def _what_is_missing(
    name: str, written: Written, packed: Mapping[str, Sequence[str]], given: Collection[str]
) -> str:
    module, _, leaf = name.rpartition(".")
    parent, _, fused = module.rpartition(".")
    parts = [f"{parent}.{part}.{leaf}" if parent else f"{part}.{leaf}" for part in packed.get(fused, ())]
    absent = [part for part in parts if part not in given]
    if absent:
        return f"{name} (missing {', '.join(absent)})"
    if not written.regions:
        return name
    got = ", ".join(sorted(written.sources))
    return f"{name} (only {written.written} of {written.numel} elements, from {got})"


def _pattern(name: str) -> str:
    return re.sub(r"\d+", "#", name)


def _module(name: str) -> str:
    return name.rpartition(".")[0]


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
