"""What is written to a model's parameters, and from which tensors of an update."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_COPY = torch.ops.aten.copy_.default
_FILLS = (torch.ops.aten.fill_.Scalar, torch.ops.aten.fill_.Tensor, torch.ops.aten.zero_.default)
_ITEM = torch.ops.aten._local_scalar_dense.default
Region = tuple[int, tuple[int, ...], tuple[int, ...]]
"""A part of a tensor: offset, shape, strides, in elements."""
Layout = tuple[tuple[int, ...], tuple[int, ...], torch.dtype]
"""Shape, strides (a square matrix may be transposed) and dtype."""


@dataclass
class Written:
    """What was written to a parameter: `regions` of it, the tensors that they came from, and the dtypes that
    were converted to the parameter's. `layout`: the parameter's; `copied`: the regions into which a part of
    one tensor was copied as it is, and which tensor's and part; `altered`: it was computed with in place."""

    numel: int
    layout: Layout
    regions: dict[Region, int] = field(default_factory=dict)
    sources: set[str] = field(default_factory=set)
    dtypes: set[torch.dtype] = field(default_factory=set)
    copied: dict[Region, tuple[str, Region]] = field(default_factory=dict)
    altered: bool = False

    @property
    def written(self) -> int:
        """Elements; regions that load_weights wrote twice count once."""
        return min(self.numel, sum(self.regions.values()))

    @property
    def complete(self) -> bool:
        return self.written == self.numel


class Recording:
    """A model's dealings with an update, in all threads that it loads with.

    `parameters`: by the parameter's name in the model. `read`: by a tensor's name in the update, how many of
    its elements were copied somewhere; 0 where the model passed over it. `given`: its layout. `together`:
    tensors of which one write was made, so that one call of load_weights must get them all.
    """

    def __init__(self, parameters: dict[str, torch.Tensor]) -> None:
        self.parameters = {
            name: Written(tensor.numel(), layout_of(tensor)) for name, tensor in parameters.items()
        }
        self.read: dict[str, int] = {}
        self.given: dict[str, Layout] = {}
        self.together: set[frozenset[str]] = set()
        self._targets: dict[int, list[tuple[str, int]]] = {}  # names, and where they begin in the storage
        self._sources: dict[int, frozenset[str]] = {}
        # The tensors of the update themselves, by storage: they may all be views of one ring.
        self._given: dict[int, list[_Given]] = {}
        self._kept: list[torch.Tensor] = []  # a storage's address names it only while it lives
        self._lock = threading.Lock()
        self.set_targets(parameters)

    def set_targets(self, parameters: dict[str, torch.Tensor]) -> None:
        """The parameters' tensors as they are now."""
        self._targets = {}
        for name, tensor in parameters.items():
            if tensor.numel():
                place = (name, int(tensor.storage_offset()))
                self._targets.setdefault(_storage(tensor), []).append(place)
                self.parameters[name].layout = layout_of(tensor)
        self._kept += parameters.values()

    def add_source(self, name: str, tensor: torch.Tensor) -> None:
        self.read.setdefault(name, 0)
        self.given[name] = layout_of(tensor)
        if tensor.numel():
            self._given.setdefault(_storage(tensor), []).append(_Given.of(name, tensor))
            self._kept.append(tensor)

    def drop_sources(self) -> None:
        """Their memory is used for others from now on."""
        self._sources.clear()
        self._given.clear()
        self._kept.clear()

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Records what happens inside, also in what it gives to threads of executors."""
        submit = ThreadPoolExecutor.submit
        recorded = {threading.get_ident()}

        def recorded_submit(
            pool: ThreadPoolExecutor,
            function: Callable[..., Any],
            /,
            *args: Any,  # noqa: ANN401
            **kwargs: Any,  # noqa: ANN401
        ) -> Future[Any]:
            if threading.get_ident() not in recorded:
                return submit(pool, function, *args, **kwargs)

            def run() -> Any:  # noqa: ANN401
                recorded.add(threading.get_ident())
                try:
                    with _Mode(self), torch.no_grad():
                        return function(*args, **kwargs)
                finally:
                    recorded.discard(threading.get_ident())

            return submit(pool, run)

        with mock.patch.object(ThreadPoolExecutor, "submit", recorded_submit), _Mode(self):
            yield

    @property
    def taken(self) -> set[str]:
        """Tensors of the update that the model did not pass over."""
        return {name for name, numel in self.read.items() if numel}

    @property
    def modules(self) -> set[str]:
        """Names of the modules that something was written to."""
        return {name.rpartition(".")[0] for name, written in self.parameters.items() if written.regions}

    # What the modes call

    def note_write(self, target: torch.Tensor, source: torch.Tensor | None) -> None:
        with self._lock:
            names = frozenset[str]() if source is None else self._names_of(source)
            places = self._targets.get(_storage(target), ())
            if not places:
                # Into a tensor on the way to a parameter.
                if names:
                    self._follow_locked(names, [target])
                return
            part = self._part_copied(target, source)
            for name, start in places:  # several where they are tied
                written, region = self.parameters[name], _region(target, start)
                written.regions[region] = target.numel()
                written.copied.pop(region, None)
                if part is not None and target.dtype == written.layout[2]:
                    written.copied[region] = part
                written.sources |= names
                if source is not None:
                    written.dtypes.add(source.dtype)
            for each in names:
                self.read[each] += 0 if source is None else source.numel()
            if len(names) > 1:
                self.together.add(names)

    def note_change(self, target: torch.Tensor) -> None:
        """It was computed with in place: what it holds is no tensor's any more."""
        with self._lock:
            for name, _ in self._targets.get(_storage(target), ()):
                self.parameters[name].altered = True

    def note_item(self, source: torch.Tensor) -> bool:
        """One element was read as a number. False: not of a tensor of the update, but perhaps of something
        computed from one, on which a decision may hang."""
        with self._lock:
            for each in self._names_of(source):
                self.read[each] += 1
            return _storage(source) in self._given

    def follow(self, arguments: Sequence[Any], results: Sequence[Any]) -> None:
        """What an operator makes of a source is still that source's."""
        with self._lock:
            tensors = [item for item in arguments if isinstance(item, torch.Tensor)]
            names = frozenset[str]().union(*(self._names_of(tensor) for tensor in tensors))
            if names:
                self._follow_locked(names, [item for item in results if isinstance(item, torch.Tensor)])

    def _names_of(self, tensor: torch.Tensor) -> frozenset[str]:
        """The tensors of the update that `tensor` is a view of, or was made of."""
        if _storage(tensor) not in self._given:
            return self._sources.get(_storage(tensor), frozenset())
        return frozenset(given.name for given in self._given_of(tensor))

    def _given_of(self, tensor: torch.Tensor) -> list[_Given]:
        """Those that `tensor` is a view of."""
        given, at = self._given.get(_storage(tensor), []), tensor.data_ptr()
        # Without storage all addresses are 0, but each has a storage of its own.
        return given if len(given) == 1 else [each for each in given if each.start <= at < each.end]

    def _part_copied(self, target: torch.Tensor, source: torch.Tensor | None) -> tuple[str, Region] | None:
        """The one tensor of which a part, `source`, is copied as it is, and which part; None: none is."""
        given = [] if source is None else self._given_of(source)
        if source is None or len(given) != 1 or source.shape != target.shape:
            return None
        if not source.dtype == target.dtype == given[0].dtype:
            return None
        return given[0].name, _region(source, given[0].offset)

    def _follow_locked(self, names: frozenset[str], tensors: Sequence[torch.Tensor]) -> None:
        for tensor in tensors:
            storage = _storage(tensor)
            if storage not in self._targets and storage not in self._given:
                self._sources[storage] = self._sources.get(storage, frozenset()) | names
                self._kept.append(tensor)


@dataclass(frozen=True, slots=True)
class _Given:
    """A tensor of the update: where it lies, in bytes, and where it begins in its storage, in elements."""

    name: str
    start: int
    end: int
    offset: int
    dtype: torch.dtype

    @classmethod
    def of(cls, name: str, tensor: torch.Tensor) -> _Given:
        start = tensor.data_ptr()
        return cls(name, start, start + tensor.nbytes, int(tensor.storage_offset()), tensor.dtype)


class _Mode(TorchDispatchMode):
    def __init__(self, recording: Recording) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._recording = recording

    def __torch_dispatch__(
        self,
        func: Any,  # noqa: ANN401 - an operator
        types: Any,  # noqa: ANN401
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        if func is _ITEM:
            ours = self._recording.note_item(args[0])
            # A tensor without storage has no number: any will do, since nothing is kept of it.
            if ours and args[0].is_meta:
                return 1 if not args[0].is_floating_point() else 1.0
        result = func(*args, **(kwargs or {}))
        if func is _COPY:
            self._recording.note_write(args[0], args[1])
        elif func in _FILLS:
            self._recording.note_write(args[0], None)
        else:
            self._recording.follow(_flat(args), _flat((result,)))
            for changed in _changed_by(func, args) if func._schema.is_mutable else ():
                self._recording.note_change(changed)
        return result


def layout_of(tensor: torch.Tensor) -> Layout:
    return tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype


def _region(view: torch.Tensor, start: int) -> Region:
    """Of the tensor that begins at `start` of the view's storage."""
    return int(view.storage_offset()) - start, tuple(view.shape), tuple(view.stride())


def _changed_by(func: Any, args: tuple[Any, ...]) -> list[torch.Tensor]:  # noqa: ANN401 - an operator
    arguments = zip(func._schema.arguments, args, strict=False)  # keywords are never written to, but outs
    written = [value for argument, value in arguments if argument.alias_info and argument.alias_info.is_write]
    return [item for item in _flat(written) if isinstance(item, torch.Tensor)]


def _flat(values: Sequence[Any]) -> list[Any]:
    return [item for value in values for item in (value if isinstance(value, list | tuple) else [value])]


def _storage(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
