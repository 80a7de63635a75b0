"""Whether an update's tensors are those of the engine's models: all of them, and no others."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from ckpt_engine.ipc.messages import TensorLayout
from ckpt_engine_sglang.rehearsal import Recording, WeightsMismatch, Written

_DERIVED = re.compile(r"rotary_(pos_)?emb\.(inv_freq|cos_cached|sin_cached)$")
"""Tables that some checkpoints hold, and engines compute."""
_SCALE = re.compile(r"(_scale|_scale_inv|_zero_point|_global_scale|\.scale|_offset)\d*$")
"""What a quantised layer computes where the checkpoint does not hold it."""
_DRAFTER = re.compile(r"^(model\.)?mtp\.")
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
_SHOWN = 12


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What may be left out.

    `partial`: modules that nothing was sent for keep their weights; one that gets any tensor needs all of
    its own. `ignored`: patterns (fnmatch) of names that no model need read. `parallel_size`: ranks over which
    a tensor may be cut. `shares`: other ranks hold layers or experts that this one passes over.
    `drafter_layers`: numbers, behind the model's own, of layers that only a drafter has. `tied`: the model's
    output embedding is its input embedding.
    """

    partial: bool = False
    ignored: tuple[str, ...] = ()
    parallel_size: int = 1
    shares: bool = False
    drafter_layers: range = range(0)
    tied: bool = False


def check_names(tensors: Sequence[TensorLayout], recordings: Iterable[Recording], rules: Rules) -> None:
    """Raises WeightsMismatch with the names of tensors that no model reads."""
    read = {name for recording in recordings for name, numel in recording.read.items() if numel}
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
        numel, read = _numel(tensor.shape), recording.read.get(tensor.name, 0)
        if read and read * rules.parallel_size < numel and tensor.name not in checked:
            wrong.append(f"{tensor.name} {list(tensor.shape)} (the model takes {read} of {numel} elements)")
    if wrong:
        raise WeightsMismatch(f"wrong shapes: {_listed(wrong)}")


def check_complete(recording: Recording, loose: Iterable[str], rules: Rules) -> None:
    """Raises WeightsMismatch with the parameters that the update would not fill.

    Args:
        loose: parameters of quantised modules: one write is enough, and scales may be computed.
    """
    loose = set(loose)
    touched = {_module(name) for name, written in recording.parameters.items() if written.regions}
    missing = []
    for name, written in recording.parameters.items():
        if written.complete or (rules.partial and _module(name) not in touched):
            continue
        if name in loose and (written.regions or _SCALE.search(name)):
            continue
        missing.append(_what_is_missing(name, written))
    if missing:
        advice = (
            "a module that gets a part of its tensors needs all of them"
            if rules.partial
            else "a partial update is asked for with `partial`"
        )
        raise WeightsMismatch(f"the update does not fill {_listed(missing)}: {advice}")


def _may_be_unread(name: str, rules: Rules, patterns: set[str]) -> bool:
    layer = _LAYER.search(name)
    return bool(
        _DERIVED.search(name)
        or any(fnmatchcase(name, pattern) for pattern in rules.ignored)
        or _pattern(name) in patterns
        or (rules.tied and name.endswith("lm_head.weight"))
        or _DRAFTER.search(name)
        or (layer and int(layer[1]) in rules.drafter_layers)
        # A pipeline stage passes over what stands before and behind its layers.
        or (
            rules.shares
            and not layer
            and name.endswith(("embed_tokens.weight", "lm_head.weight", "norm.weight"))
        )
    )


def _what_is_missing(name: str, written: Written) -> str:
    if not written.regions:
        return name
    got = ", ".join(sorted(written.sources))
    return f"{name} (only {written.written} of {written.numel} elements, from {got})"


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
