"""What a model would do with a set of tensors, found out before any of them is sent.

A model's own `load_weights` decides which parameter a name belongs to, how tensors are fused and which slice
a rank keeps. So it is asked: its parameters are put aside for ones without storage, in the checkpoint's
layout, and it loads tensors without storage, while every write is recorded. That moves no byte and changes
nothing, and tells which names the model does not know, which parameters nothing would fill, and which shapes
do not fit, while the old weights still serve.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ckpt_engine.errors import CheckpointError
from ckpt_engine.ipc.messages import TensorLayout

_COPY = torch.ops.aten.copy_.default
_FILLS = (torch.ops.aten.fill_.Scalar, torch.ops.aten.fill_.Tensor, torch.ops.aten.zero_.default)
Region = tuple[int, tuple[int, ...], tuple[int, ...]]
"""A view of a storage: offset, shape, strides, in elements."""


class WeightsMismatch(CheckpointError):
    """The tensors of an update are not those of the engine's model; the message has their names."""


@dataclass
class Written:
    """What was written to a parameter: `regions` of it, and the tensors that they came from."""

    numel: int
    regions: dict[Region, int] = field(default_factory=dict)
    sources: set[str] = field(default_factory=set)

    @property
    def written(self) -> int:
        """Elements; regions that load_weights wrote twice count once."""
        return min(self.numel, sum(self.regions.values()))

    @property
    def complete(self) -> bool:
        return self.written == self.numel


@dataclass
class Rehearsal:
    """A model's dealings with an update.

    `parameters`: by the parameter's name in the model. `read`: by a tensor's name in the update, how many of
    its elements were copied somewhere; 0 where the model passed over it.
    """

    parameters: dict[str, Written]
    read: dict[str, int]


def rehearse(model: torch.nn.Module, tensors: Sequence[TensorLayout]) -> Rehearsal:
    """Has `model` load tensors without storage; the model is as before when it returns or raises.

    A bucket at a time, as the update itself will: a model that wants several tensors in one call of its
    load_weights shows here that it does not get them.

    Args:
        tensors: in the order of the update; where one does not lie behind the one before, a bucket begins.

    Raises:
        WeightsMismatch: load_weights refused a tensor: a name that it does not know, or a shape that does
            not fit.
    """
    with _without_storage(model) as parameters, torch.no_grad():
        recorder = _Recorder(parameters)
        current: list[TensorLayout] = []

        def bare_tensors(bucket: Sequence[TensorLayout]) -> Iterator[tuple[str, torch.Tensor]]:
            for tensor in bucket:
                current[:] = [tensor]
                bare = torch.empty(tensor.shape, dtype=getattr(torch, tensor.dtype), device="meta")
                recorder.add_source(tensor.name, bare)
                yield tensor.name, bare

        try:
            with recorder, some_of_a_drafter():
                for bucket in buckets_of(tensors):
                    model.load_weights(bare_tensors(bucket))  # type: ignore[operator]
        except Exception as error:
            at = (
                f"{current[0].name!r} ({current[0].dtype}, {list(current[0].shape)})"
                if current
                else "nothing"
            )
            raise WeightsMismatch(
                f"{type(model).__name__} cannot load tensor {at}: {type(error).__name__}: {error}"
            ) from error
    return Rehearsal(recorder.parameters, recorder.read)


def buckets_of(tensors: Sequence[TensorLayout]) -> list[list[TensorLayout]]:
    """`tensors` in the order of the update, cut where its buckets end."""
    buckets: list[list[TensorLayout]] = []
    end = 0
    for tensor in tensors:
        if not buckets or tensor.offset < end:
            buckets.append([])
        buckets[-1].append(tensor)
        end = tensor.offset + tensor.nbytes
    return buckets


@contextmanager
def some_of_a_drafter() -> Iterator[None]:
    """MTP drafters complain when a call of load_weights has not all of their tensors. Whether the update has,
    is found out from all of its calls together."""
    try:
        from vllm.model_executor.model_loader.mtp_validation import disable_mtp_completeness_check
    except ImportError:
        # A version without that check.
        yield
    else:
        with disable_mtp_completeness_check():
            yield


class _Recorder(TorchDispatchMode):
    """Records copies from the sources' storages, or from what was made of them, to the parameters'."""

    def __init__(self, parameters: dict[str, torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.parameters = {name: Written(tensor.numel()) for name, tensor in parameters.items()}
        self.read: dict[str, int] = {}
        self._targets = {_storage(tensor): name for name, tensor in parameters.items()}
        self._sources: dict[int, frozenset[str]] = {}
        self._kept = list(parameters.values())  # a storage's address names it only while it lives

    def add_source(self, name: str, tensor: torch.Tensor) -> None:
        self.read[name] = 0
        self._sources[_storage(tensor)] = frozenset([name])
        self._kept.append(tensor)

    def __torch_dispatch__(
        self,
        func: Any,  # noqa: ANN401 - an operator
        types: Any,  # noqa: ANN401
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        result = func(*args, **(kwargs or {}))
        if func is _COPY:
            self._note(args[0], args[1])
        elif func in _FILLS:
            self._note(args[0], None)
        else:
            self._follow(args, result)
        return result

    def _note(self, target: torch.Tensor, source: torch.Tensor | None) -> None:
        names = frozenset() if source is None else self._sources.get(_storage(source), frozenset())
        name = self._targets.get(_storage(target))
        if name is None:
            # Into a tensor on the way to a parameter.
            self._sources[_storage(target)] = self._sources.get(_storage(target), frozenset()) | names
            self._kept.append(target)
            return
        written = self.parameters[name]
        region = (int(target.storage_offset()), tuple(target.shape), tuple(target.stride()))
        written.regions[region] = target.numel()
        written.sources |= names
        for each in names:
            self.read[each] += 0 if source is None else source.numel()

    def _follow(self, args: tuple[Any, ...], result: Any) -> None:  # noqa: ANN401
        """What an operator makes of a source is still that source's."""
        flat = [item for arg in args for item in (arg if isinstance(arg, list | tuple) else [arg])]
        storages = {_storage(item) for item in flat if isinstance(item, torch.Tensor)}
        names = frozenset[str]().union(*(self._sources.get(storage, frozenset()) for storage in storages))
        if not names:
            return
        for item in result if isinstance(result, list | tuple) else [result]:
            if isinstance(item, torch.Tensor) and _storage(item) not in self._targets:
                self._sources[_storage(item)] = self._sources.get(_storage(item), frozenset()) | names
                self._kept.append(item)


def _storage(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


@contextmanager
def _without_storage(model: torch.nn.Module) -> Iterator[dict[str, torch.Tensor]]:
    """Puts tensors without storage, in the checkpoint's layout, in the place of all of the model's.

    Yields:
        The parameters by name. Tied ones stand under each of their names, apart.
    """
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info
    from vllm.model_executor.model_loader.reload.meta import restore_layer_on_meta, to_meta_tensor

    saved: list[tuple[torch.nn.Module, dict[str, Any], dict[str, Any]]] = []
    try:
        for module in model.modules():
            # Registries are part of a module's dict, and changed in place.
            registries = {key: value.copy() for key, value in vars(module).items() if key in _REGISTRIES}
            saved.append((module, dict(vars(module)), registries))
            restore_layer_on_meta(module, get_layerwise_info(module))
            for registry in (module._parameters, module._buffers):
                for name, tensor in registry.items():
                    if tensor is not None:
                        registry[name] = _unwrapped(to_meta_tensor(tensor))  # type: ignore[assignment]
        yield dict(model.named_parameters(remove_duplicate=False))
    finally:
        for module, attributes, registries in reversed(saved):
            vars(module).clear()
            vars(module).update(attributes)
            for key, value in registries.items():
                registry = vars(module)[key]
                registry.clear()
                registry.update(value)


_REGISTRIES = ("_parameters", "_buffers", "_non_persistent_buffers_set")


def _unwrapped(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` with its own weight loader: an earlier reload left a wrapped one, which does nothing now."""
    loader = getattr(tensor, "weight_loader", None)
    while getattr(loader, "__name__", "") == "online_process_loader":
        loader = loader.__wrapped__  # type: ignore[union-attr]
    if loader is not None:
        tensor.weight_loader = loader  # type: ignore[attr-defined]
    return tensor
