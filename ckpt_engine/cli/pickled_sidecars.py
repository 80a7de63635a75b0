"""Reads checkpoint-engine's sidecars of `.npy` files, which are pickles: for conversion, never for loading.

`X.npy.meta` is a list, an item for each array of `X.npy`, of dicts with the keys `key` (the tensor's name),
`dtype` (torch's), `shape` (torch.Size), `type` (the tensor's class) and `tp_concat_dim`. The unpickler knows
the few names that such a list needs, and calls nothing but `tuple`; still, a pickle is a program, so that
only files of a source that is trusted should be given to it.
"""

from __future__ import annotations

import io
import pickle
import pickletools
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch

from ckpt_engine.checkpoint.npy_file import Sidecar, SidecarTensor
from ckpt_engine.checkpoint.safetensors_header import open_regular, read_exactly
from ckpt_engine.errors import CheckpointFormatError

MAX_PICKLE_NBYTES = 100_000_000

_CLASSES = frozenset(
    {
        ("torch", "Tensor"),
        ("torch._tensor", "Tensor"),
        ("torch.nn.parameter", "Parameter"),
        ("numpy", "ndarray"),
        ("numpy", "memmap"),
    }
)
_KEYS = ("key", "dtype", "shape", "tp_concat_dim")


@dataclass(frozen=True, slots=True)
class _Dtype:
    name: str


@dataclass(frozen=True, slots=True)
class _Class:
    """Stands for a class that the pickle names; nothing can be made of it."""

    name: str


class _Refused(Exception):
    pass


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:  # noqa: ANN401
        if (module, name) == ("torch", "Size"):
            return tuple
        # vars(): torch imports more of itself where it is asked for an attribute.
        if module == "torch" and isinstance(vars(torch).get(name), torch.dtype):
            return _Dtype(name)
        if (module, name) in _CLASSES:
            return _Class(f"{module}.{name}")
        raise _Refused(f"names {module}.{name}, which no sidecar needs: refused")

    def persistent_load(self, pid: Any) -> NoReturn:  # noqa: ANN401
        raise _Refused("has a persistent id: refused")


def _check_memo(text: bytes) -> None:
    """Raises _Refused for a place in the memo beyond what so short a pickle could use: the unpickler would
    allocate all places up to it, which may be 4 G."""
    for opcode, argument, _ in pickletools.genops(text):
        if opcode.name.endswith("PUT") and int(argument or 0) > len(text):
            raise _Refused("has a memo that is larger than itself: refused")


def read_pickled_sidecar(path: Path, tp_size: int | None) -> Sidecar:
    """What the pickle at `path` says of the arrays of its file. Whether it is true is not checked here.

    Raises:
        CheckpointError: it cannot be read.
        CheckpointFormatError: it is not such a list, or names anything that one would not need.
    """
    with open_regular(path) as (file, nbytes):
        if nbytes > MAX_PICKLE_NBYTES:
            raise CheckpointFormatError(f"{path}: {nbytes} bytes are over the limit of {MAX_PICKLE_NBYTES}")
        text = read_exactly(file, nbytes, path)
    try:
        _check_memo(text)
        items = _Unpickler(io.BytesIO(text)).load()
    except _Refused as error:
        raise CheckpointFormatError(f"{path}: {error}") from None
    except Exception as error:  # noqa: BLE001 - a broken pickle may raise anything
        raise CheckpointFormatError(f"{path}: not a pickle of a sidecar: {error}") from None
    if not isinstance(items, list):
        raise CheckpointFormatError(f"{path}: a {type(items).__name__}, not a list of tensors' metadata")
    return Sidecar(
        version=1,
        tensors=tuple(_tensor(path, number, item) for number, item in enumerate(items)),
        tp_size=tp_size,
    )


def _tensor(path: Path, number: int, item: object) -> SidecarTensor:
    def wrong(problem: str) -> CheckpointFormatError:
        return CheckpointFormatError(f"{path}: item {number} {problem}")

    if not isinstance(item, dict):
        raise wrong(f"is a {type(item).__name__}, not a dict")
    missing = [key for key in _KEYS if key not in item]
    if missing:
        raise wrong(f"lacks {', '.join(missing)}")
    name, dtype, shape, concat_dim = (item[key] for key in _KEYS)
    if not isinstance(name, str):
        raise wrong(f"has the key {name!r}, which is no tensor's name")
    if not isinstance(dtype, _Dtype):
        raise wrong(f"({name!r}) has the dtype {dtype!r}, which is none of torch's")
    if not isinstance(shape, (tuple, list)) or not all(type(size) is int for size in shape):
        raise wrong(f"({name!r}) has the shape {shape!r}, which is not one of integers")
    if type(concat_dim) is not int:
        raise wrong(f"({name!r}) has the tp_concat_dim {concat_dim!r}, which is no integer")
    # torch.float and torch.half are names of the same dtypes.
    dtype_name = str(vars(torch)[dtype.name]).removeprefix("torch.")
    if concat_dim < -1:
        concat_dim += len(shape)  # torch.cat counts from the end too; -1 is taken: shared
    return SidecarTensor(name, dtype_name, tuple(shape), concat_dim)
