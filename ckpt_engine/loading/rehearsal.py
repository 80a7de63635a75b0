"""What a model would do with a set of tensors, found out before any of them is sent.

A model's own `load_weights` decides which parameter a name belongs to, how tensors are fused and which slice
a rank keeps; some pass over names that they do not know. So it is asked: for a moment its parameters are ones
without storage, and it loads tensors without storage, while every write is recorded. That moves no byte and
changes nothing, and tells which names no model knows, which parameters nothing would fill, and which shapes
do not fit, while the old weights still serve.

Where parameters are not in the checkpoint's layout (quantised ones, repacked after they were loaded), the
same record can be kept of the real load instead (`recording.Recording`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch

from ckpt_engine.errors import CheckpointError
from ckpt_engine.ipc.messages import TensorLayout
from ckpt_engine.loading.recording import Recording

WithoutStorage = Callable[[torch.nn.Module], AbstractContextManager[dict[str, torch.Tensor]]]


class WeightsMismatch(CheckpointError):
    """The tensors of an update are not those of the engine's model; the message has their names."""


class NotRehearsable(CheckpointError):
    """The model's load_weights needs real tensors."""


def rehearse(
    model: torch.nn.Module,
    buckets: Iterable[Sequence[TensorLayout]],
    without_storage: WithoutStorage | None = None,
) -> Recording:
    """Has `model` load tensors without storage; the model is as before when it returns or raises.

    Args:
        buckets: the update's tensors, by the calls of load_weights that get them. A model that wants several
            in one call shows here where it does not get them.
        without_storage: puts tensors without storage in the place of the model's, in the layout that
            load_weights expects, and yields the parameters by name; by default `bare_tensors`.

    Raises:
        WeightsMismatch: load_weights refused a tensor: a name that it does not know, or a shape that does
            not fit.
        NotRehearsable: load_weights needs real tensors.
    """
    with (without_storage or bare_tensors)(model) as parameters, torch.no_grad():
        recording = Recording(parameters)
        current: list[TensorLayout] = []

        def bare(bucket: Sequence[TensorLayout]) -> Iterator[tuple[str, torch.Tensor]]:
            for layout in bucket:
                current[:] = [layout]
                tensor = torch.empty(layout.shape, dtype=getattr(torch, layout.dtype), device="meta")
                recording.add_source(layout.name, tensor)
                yield layout.name, tensor

        try:
            with recording.at_work():
                for bucket in buckets:
                    model.load_weights(bare(bucket))  # type: ignore[operator]
        except Exception as error:
            told = f"{type(error).__name__}: {error}"
            if isinstance(error, NotImplementedError) or "meta tensor" in str(error).lower():
                raise NotRehearsable(f"{type(model).__name__} needs values to load: {told}") from error
            at = (
                f"{current[0].name!r} ({current[0].dtype}, {list(current[0].shape)})"
                if current
                else "nothing"
            )
            raise WeightsMismatch(f"{type(model).__name__} cannot load tensor {at}: {told}") from error
        # What lives on must not keep the model: parameters refer to it by their weight loaders.
        recording.drop_sources()
    return recording


def buckets_of(tensors: Sequence[TensorLayout]) -> list[list[TensorLayout]]:
    """`tensors` in the order of the update, cut where its buckets end: where one does not lie behind the one
    before."""
    buckets: list[list[TensorLayout]] = []
    end = 0
    for tensor in tensors:
        if not buckets or tensor.offset < end:
            buckets.append([])
        buckets[-1].append(tensor)
        end = tensor.offset + tensor.nbytes
    return buckets


def named_parameters(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Tied ones under each of their names."""
    return dict(model.named_parameters(remove_duplicate=False))


@contextmanager
def bare_tensors(model: torch.nn.Module) -> Iterator[dict[str, torch.Tensor]]:
    """Tensors without storage in the place of all of the model's; tied ones are tied again."""
    bare: dict[int, torch.Tensor] = {}
    with put_back(model):
        for module in model.modules():
            for registry in (module._parameters, module._buffers):
                for name, tensor in registry.items():
                    if tensor is not None:
                        if id(tensor) not in bare:
                            bare[id(tensor)] = _bare(tensor)
                        registry[name] = bare[id(tensor)]  # type: ignore[assignment]
        yield named_parameters(model)


@contextmanager
def put_back(model: torch.nn.Module) -> Iterator[None]:
    """All of the modules' attributes are as before afterwards, whatever was put in their places inside."""
    saved: list[tuple[torch.nn.Module, dict[str, Any], dict[str, Any]]] = []
    for module in model.modules():
        # Registries are part of a module's dict, and changed in place.
        registries = {key: value.copy() for key, value in vars(module).items() if key in _REGISTRIES}
        saved.append((module, dict(vars(module)), registries))
    try:
        yield
    finally:
        for module, attributes, registries in reversed(saved):
            vars(module).clear()
            vars(module).update(attributes)
            for key, value in registries.items():
                registry = vars(module)[key]
                registry.clear()
                registry.update(value)


_REGISTRIES = ("_parameters", "_buffers", "_non_persistent_buffers_set")


def _bare(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` without its storage: of the same class, with its weight loader and other attributes."""
    meta = torch.empty_strided(tuple(tensor.shape), tensor.stride(), dtype=tensor.dtype, device="meta")
    made: torch.Tensor = torch.Tensor._make_subclass(type(tensor), meta, tensor.requires_grad)
    vars(made).update(vars(tensor))
    return made
