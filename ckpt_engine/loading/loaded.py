"""What an engine's models hold of an update's tensors once these are loaded: for `verify="full"`.

Names tell little: q, k and v lie in one parameter, and a rank has a part of most. But the recording of a load
has every region of a parameter into which a part of a tensor was copied as it is. Read back from there, the
parts must have the bytes that came. What was converted, computed with, or laid out anew by the engine cannot
be told, and is left out: the receiver counts and names it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import combinations, pairwise
from typing import NamedTuple

import torch

from ckpt_engine.loading.recording import Layout, Recording, Region, Written, layout_of
from ckpt_engine.loading.rehearsal import named_parameters

_KEEP_THEIRS = frozenset({"NoneType", "UnquantizedEmbeddingMethod", "UnquantizedLinearMethod"})
"""Kinds of engines' `quant_method` that leave a parameter as it was loaded, or give it another layout."""

LoadedModel = tuple[torch.nn.Module, Recording, Callable[[str], str | None]]
"""A model, what it was recorded to load, and what it calls a tensor of the update (None: not its own)."""


class _Part(NamedTuple):
    """Of a tensor: its region `source` lies in the region `target` of the parameter."""

    parameter: str
    target: Region
    source: Region


class _Holder:
    """One model's parts of tensors."""

    def __init__(self, model: torch.nn.Module, recording: Recording) -> None:
        self.recording = recording
        self._model = model
        self._parts: dict[str, list[_Part]] = {}
        self._now: dict[str, torch.Tensor] | None = None
        modules = dict(model.named_modules(remove_duplicate=False))
        for name, written in recording.parameters.items():
            if written.copied and _keeps_them(modules[name.rpartition(".")[0]]) and _is_plain(written):
                for target, (tensor, source) in written.copied.items():
                    self._parts.setdefault(tensor, []).append(_Part(name, target, source))

    def groups(self, tensor: str) -> list[list[_Part]]:
        """Parts that are all of the tensor: each parameter's that are, else those of several together."""
        parts, layout = self._parts.get(tensor, []), self.recording.given[tensor]
        of_each: dict[str, list[_Part]] = {}
        for part in parts:
            of_each.setdefault(part.parameter, []).append(part)
        alone = [group for group in of_each.values() if _are_all(group, layout)]
        return alone or ([parts] if _are_all(parts, layout) else [])

    def share(self, tensor: str) -> list[_Part]:
        """The parts that this model has, where all that it read of the tensor is in them."""
        parts = self._parts.get(tensor, [])
        return parts if _numel(parts) == self.recording.read[tensor] else []

    def read(self, part: _Part) -> torch.Tensor | None:
        """What lies there now; None where the engine has laid the parameter out anew."""
        if self._now is None:
            self._now = named_parameters(self._model)
        parameter = self._now.get(part.parameter)
        if parameter is None or layout_of(parameter) != self.recording.parameters[part.parameter].layout:
            return None
        return view_of(parameter, part.target)

    def read_all(self, parts: Sequence[_Part], layout: Layout) -> torch.Tensor | None:
        """The tensor, put together again from `parts`."""
        read = [self.read(part) for part in parts]
        found = [view for view in read if view is not None]
        if len(found) != len(parts):
            return None
        if [part.source for part in parts] == [(0, *layout[:2])]:
            return found[0]
        whole = torch.empty(layout[0], dtype=layout[2], device=found[0].device)
        for part, view in zip(parts, found, strict=True):
            view_of(whole, part.source).copy_(view)
        return whole


class LoadedTensors:
    """`loaded` of `ipc.receiver.serve_update`, for models whose loads were recorded.

    Args:
        models: those of the update; one whose recording is not made yet is left out of what is returned.
    """

    def __init__(self, models: Callable[[], Iterable[LoadedModel]]) -> None:
        self._models = models
        self._holders: dict[int, _Holder] = {}

    def __call__(self, name: str) -> list[torch.Tensor]:
        """All of the tensor `name`, from each model that takes it; empty where one of them cannot tell.

        Each has the tensor's shape and dtype; one that lies in several places is a copy.
        """
        found: list[torch.Tensor] = []
        for holder, own in self._takers(name):
            groups = holder.groups(own)
            read = [holder.read_all(group, holder.recording.given[own]) for group in groups]
            wholes = [whole for whole in read if whole is not None]
            if not wholes or len(wholes) < len(read):
                return []
            found += wholes
        return found

    def arriving(self, name: str, tensor: torch.Tensor) -> list[torch.Tensor]:
        """The parts of the arriving `tensor` that the models will keep, where none of them keeps all of it,
        as views."""
        takers = self._takers(name)
        if any(holder.groups(own) for holder, own in takers):
            return []
        return [view_of(tensor, part.source) for holder, own in takers for part in holder.share(own)]

    def kept(self, name: str) -> list[torch.Tensor]:
        """What the models hold of these parts, in the same order; empty where one of them cannot tell."""
        read = [holder.read(part) for holder, own in self._takers(name) for part in holder.share(own)]
        found = [view for view in read if view is not None]
        return found if len(found) == len(read) else []

    def _takers(self, name: str) -> list[tuple[_Holder, str]]:
        takers = []
        for model, recording, own_name in self._models():
            own = own_name(name)
            if own is not None and recording.read.get(own):
                holder = self._holders.get(id(recording))
                if holder is None:
                    holder = self._holders[id(recording)] = _Holder(model, recording)
                takers.append((holder, own))
        return takers


def view_of(tensor: torch.Tensor, region: Region) -> torch.Tensor:
    offset, shape, strides = region
    return tensor.detach().as_strided(shape, strides, tensor.storage_offset() + offset)


def _keeps_them(module: torch.nn.Module) -> bool:
    """Whether what is loaded into the module's own parameters stays there as it is, or gets a layout that
    tells of the change."""
    kind = type(getattr(module, "quant_method", None)).__name__
    return kind in _KEEP_THEIRS and not hasattr(module, "process_weights_after_loading")


def _is_plain(written: Written) -> bool:
    """Whether the last bytes that came to each region are those that were copied there."""
    return not written.altered and _are_apart(list(written.regions))


def _are_all(parts: Sequence[_Part], layout: Layout) -> bool:
    sources = [part.source for part in parts]
    return bool(parts) and _numel(parts) == math.prod(layout[0]) and _are_apart(sources)


def _numel(parts: Sequence[_Part]) -> int:
    return sum(math.prod(part.source[1]) for part in parts)


def _are_apart(regions: Sequence[Region]) -> bool:
    """Whether no two have an element in common, as far as that is easily known."""
    ordered = sorted(regions)
    if all(_end(one) <= other[0] for one, other in pairwise(ordered)):
        return True
    return all(_are_beside(one, other) for one, other in combinations(ordered, 2))


def _end(region: Region) -> int:
    offset, shape, strides = region
    if 0 in shape:
        return offset
    return offset + 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))


def _are_beside(one: Region, other: Region) -> bool:
    """Whether two boxes of one tensor do not meet: columns of the same rows, as ranks' shards are."""
    if _end(one) <= other[0]:
        return True
    strides = one[2]
    if strides != other[2] or list(strides) != sorted(strides, reverse=True) or 0 in strides:
        return False
    place, other_place = one[0], other[0]
    for size, other_size, stride in zip(one[1], other[1], strides, strict=True):
        (start, place), (other_start, other_place) = divmod(place, stride), divmod(other_place, stride)
        if start + size <= other_start or other_start + other_size <= start:
            return True
    return False
