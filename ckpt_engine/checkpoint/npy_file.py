"""Files of a tensor-parallel checkpoint, `model.{layer}.{tp}[.{ep}].npy`, and their sidecars.

Such a file holds one or more arrays in numpy's format (source: numpy.lib.format), one after the other; each
is one rank's shard of a tensor, or a tensor that all ranks share. What they are stands in the sidecar beside
it, `model.{layer}.{tp}[.{ep}].npy.json`, in the order of the arrays:

    {"version": 1, "tp_size": 2, "tensors": [
        {"name": "layers.0.mlp.down_proj.weight", "dtype": "bfloat16", "shape": [16, 32], "concat_dim": 1},
        {"name": "layers.0.input_layernorm.weight", "dtype": "bfloat16", "shape": [16], "concat_dim": -1}]}

`shape` is the shard's; along `concat_dim` the shards of all `tp` make up the tensor, -1: all have the same.
`tp_size` may be left out: it is what tells a checkpoint whose last shard is missing from a smaller one.

numpy has no bfloat16 and no float8: arrays of integers, or of raw bytes, hold such a tensor's bits. Nothing
is unpickled and nothing evaluated, and all that a file claims is checked before a byte of data is read.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import msgspec

from ckpt_engine.checkpoint.safetensors_header import (
    MAX_HEADER_NBYTES,
    HeaderEntry,
    nbytes_of,
    open_regular,
    parse_json_object,
    read_exactly,
)
from ckpt_engine.errors import CheckpointError, CheckpointFormatError
from ckpt_engine.metadata import DTYPE_NBYTES

NPY_SUFFIX = ".npy"
SIDECAR_SUFFIX = ".json"
"""What a file's sidecar is called: the file's whole name, and this."""
PICKLE_SUFFIX = ".meta"
"""checkpoint-engine's sidecar, which is a pickle: `ckpt-engine convert-metadata` makes ours of it."""
MAX_ARRAY_HEADER_NBYTES = 10_000
"""Longest header of one array that numpy itself takes without being told to trust it."""

_FILE_NAME = re.compile(r"([^.]+)(?:\.([^.]+))?(?:\.(\d{1,9}))?(?:\.(\d{1,9}))?\.npy")
_FIELD = re.compile(
    r"\s*(['\"])(descr|fortran_order|shape)\1\s*:\s*"
    r"('[^']*'|\"[^\"]*\"|True|False|\([\d,\s]*\))\s*(,|(?=\}))"
)
_DESCR = re.compile(r"([<>=|]?)([biufcV])(\d{1,4})")
_OWN_DESCR = {  # of the torch dtypes that numpy has as well
    "bool": "b1", "uint8": "u1", "int8": "i1", "int16": "i2", "uint16": "u2", "float16": "f2", "int32": "i4",
    "uint32": "u4", "float32": "f4", "int64": "i8", "uint64": "u8", "float64": "f8", "complex64": "c8",
}  # fmt: skip


class SidecarTensor(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One array: `dtype` by torch's name; `shape` of this shard; `concat_dim` -1: shared by all shards."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    concat_dim: int


class Sidecar(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What the arrays of one file are, in order."""

    version: int
    tensors: tuple[SidecarTensor, ...]
    tp_size: int | None = None


@dataclass(frozen=True, slots=True)
class NpyName:
    """What a file's name says; `ep` is -1 where it says none."""

    prefix: str
    layer: str
    tp: int
    ep: int

    @property
    def group(self) -> tuple[str, str]:
        """Files of the same group may hold shards of the same tensor."""
        return self.prefix, self.layer


@dataclass(frozen=True, slots=True)
class NpyHeader:
    """What a file of `file_nbytes` bytes holds, in order; tensor i is concatenated along `concat_dims[i]`."""

    path: Path
    file_nbytes: int
    tensors: tuple[HeaderEntry, ...]
    concat_dims: tuple[int, ...]
    name: NpyName
    tp_size: int | None


@dataclass(frozen=True, slots=True)
class _Array:
    """An array of a file: numpy's type of its elements (`f4`), and its bytes [begin, end) of the file."""

    kind: str
    shape: tuple[int, ...]
    begin: int
    end: int


def parse_npy_name(path: Path) -> NpyName:
    """The parts of a file's name.

    Raises:
        CheckpointFormatError: it is not of that form.
    """
    match = _FILE_NAME.fullmatch(path.name)
    if match is None:
        raise CheckpointFormatError(
            f"{path}: a file of shards is called model.LAYER.TP.npy or model.LAYER.TP.EP.npy, with the "
            "numbers of its tensor-parallel and its expert-parallel rank"
        )
    prefix, layer, tp, ep = match.groups()
    return NpyName(prefix, layer or "", int(tp or 0), -1 if ep is None else int(ep))


def sidecar_of(path: Path) -> Path:
    return path.with_name(path.name + SIDECAR_SUFFIX)


def read_npy_header(path: str | os.PathLike[str], sidecar: Sidecar | None = None) -> NpyHeader:
    """Reads and checks a file's sidecar, unless it is given, and the header of each of its arrays.

    Raises:
        CheckpointError: one of them is missing, or may not be read.
        CheckpointFormatError: they are malformed, or disagree; the message names the file and the tensor.
    """
    path = Path(path)
    name = parse_npy_name(path)
    with open_regular(path) as (file, file_nbytes):
        sidecar = read_sidecar(path) if sidecar is None else sidecar
        arrays = _read_arrays(path, file, file_nbytes, len(sidecar.tensors))
    if sidecar.tp_size is not None and not name.tp < sidecar.tp_size:
        raise CheckpointFormatError(
            f"{path}: is of tensor-parallel rank {name.tp}, but its sidecar says tp_size {sidecar.tp_size}"
        )
    names: set[str] = set()
    for tensor in sidecar.tensors:
        if tensor.name in names:
            raise CheckpointFormatError(f"{sidecar_of(path)}: tensor {tensor.name!r} is there twice")
        names.add(tensor.name)
    return NpyHeader(
        path,
        file_nbytes,
        tuple(_entry(path, *pair) for pair in zip(sidecar.tensors, arrays, strict=True)),
        tuple(tensor.concat_dim for tensor in sidecar.tensors),
        name,
        sidecar.tp_size,
    )


def read_sidecar(path: Path) -> Sidecar:
    """The sidecar of the file at `path`; its types are checked, not yet what it says.

    Raises:
        CheckpointError: there is none.
        CheckpointFormatError: it is malformed.
    """
    where = sidecar_of(path)
    if not where.exists():
        pickled = path.with_name(path.name + PICKLE_SUFFIX)
        raise CheckpointError(
            f"{path} has no sidecar {where.name}"
            + (
                f", but a pickled one, {pickled.name}: if you trust it, `ckpt-engine convert-metadata {path}`"
                if pickled.exists()
                else ", which says the names and dtypes of its tensors"
            )
        )
    with open_regular(where) as (file, nbytes):
        if nbytes > MAX_HEADER_NBYTES:
            raise CheckpointFormatError(f"{where}: {nbytes} bytes are over the limit of {MAX_HEADER_NBYTES}")
        text = read_exactly(file, nbytes, where)
    try:
        sidecar = msgspec.convert(parse_json_object(text, str(where)), Sidecar)
    except msgspec.ValidationError as error:
        raise CheckpointFormatError(f"{where}: {error}") from None
    if sidecar.version != 1:
        raise CheckpointFormatError(f"{where}: version {sidecar.version} is unknown; this package reads 1")
    if sidecar.tp_size is not None and sidecar.tp_size < 1:
        raise CheckpointFormatError(f"{where}: tp_size {sidecar.tp_size} is not 1 or more")
    return sidecar


def _entry(path: Path, tensor: SidecarTensor, array: _Array) -> HeaderEntry:
    """Checks one tensor of the sidecar against its array."""

    def lie(problem: str) -> CheckpointFormatError:
        return CheckpointFormatError(f"{path}: tensor {tensor.name!r}: {problem}")

    if not tensor.name:
        raise lie("its name is empty")
    # JSON's escapes may say it; msgspec takes it from a string of Python's.
    if not tensor.name.isascii() and any("\ud800" <= c <= "\udfff" for c in tensor.name):
        raise lie("its name has a lone surrogate, which no message could carry")
    if tensor.dtype not in DTYPE_NBYTES:
        raise lie(f"dtype {tensor.dtype!r} is unknown; supported are {', '.join(DTYPE_NBYTES)}")
    if any(size < 0 for size in tensor.shape):
        raise lie(f"shape {list(tensor.shape)} is not a list of integers from 0 up")
    if not -1 <= tensor.concat_dim < len(tensor.shape):
        raise lie(f"concat_dim {tensor.concat_dim} is no dimension of {list(tensor.shape)}, nor -1 (shared)")
    nbytes = nbytes_of(tensor.dtype, tensor.shape)
    if nbytes is None:
        raise lie(f"shape {list(tensor.shape)} of {tensor.dtype} overflows 63 bits")
    if not _can_hold(array.kind, tensor.dtype):
        raise lie(f"is {tensor.dtype} by its sidecar, and its array holds {array.kind}")
    if nbytes != array.end - array.begin:
        raise lie(
            f"{list(tensor.shape)} of {tensor.dtype} is {nbytes} bytes, its array {list(array.shape)} of "
            f"{array.kind} is {array.end - array.begin}"
        )
    same_size = int(array.kind[1:]) == DTYPE_NBYTES[tensor.dtype]
    if same_size and len(array.shape) > 1 and array.shape != tensor.shape:
        raise lie(f"has shape {list(tensor.shape)} by its sidecar, {list(array.shape)} by its array")
    return HeaderEntry(tensor.name, tensor.dtype, tensor.shape, array.begin, array.end)


def _can_hold(kind: str, dtype: str) -> bool:
    """Whether an array of numpy's `kind` can be a tensor of torch's `dtype`: its own, or bits of it."""
    own = _OWN_DESCR.get(dtype)
    if kind == own or kind[0] in "uiV":
        return True
    # Without a type of its own: people use numpy's of the same size (float16), and ml_dtypes writes f1.
    return own is None and kind == f"f{DTYPE_NBYTES[dtype]}"


def _read_arrays(path: Path, file: BinaryIO, file_nbytes: int, count: int) -> list[_Array]:
    """The headers of the arrays, which must be `count` and fill the file."""
    arrays: list[_Array] = []
    offset = 0
    while offset < file_nbytes:
        if len(arrays) == count:
            raise CheckpointFormatError(
                f"{path}: holds more arrays than its sidecar has tensors ({count}), or other data behind them"
            )
        file.seek(offset)
        array = _read_array(path, file, offset)
        if array.end > file_nbytes:
            raise CheckpointFormatError(
                f"{path}: array {len(arrays)} ends {array.end - file_nbytes} bytes past the end of the file "
                f"({file_nbytes} bytes): truncated?"
            )
        arrays.append(array)
        offset = array.end
    if len(arrays) < count:
        raise CheckpointFormatError(
            f"{path}: holds {len(arrays)} arrays, but its sidecar has {count} tensors: truncated?"
        )
    return arrays


def _read_array(path: Path, file: BinaryIO, offset: int) -> _Array:
    magic = read_exactly(file, 8, path)
    if magic[:6] != b"\x93NUMPY":
        raise CheckpointFormatError(f"{path}: no array in numpy's format at byte {offset}")
    if magic[6] not in (1, 2, 3) or magic[7] != 0:
        raise CheckpointFormatError(f"{path}: version {magic[6]}.{magic[7]} of numpy's format is unknown")
    length = int.from_bytes(read_exactly(file, 2 if magic[6] == 1 else 4, path), "little")
    if length > MAX_ARRAY_HEADER_NBYTES:
        raise CheckpointFormatError(
            f"{path}: an array's header of {length} bytes is over the limit of {MAX_ARRAY_HEADER_NBYTES}"
        )
    text = read_exactly(file, length, path).decode("latin-1")
    kind, shape = _parse_array_header(f"{path}: the array at byte {offset}", text)
    count = nbytes_of("uint8", shape)
    if count is None:
        raise CheckpointFormatError(f"{path}: the array at byte {offset}: shape {list(shape)} overflows")
    begin = file.tell()
    return _Array(kind, shape, begin, begin + count * int(kind[1:]))


def _parse_array_header(what: str, text: str) -> tuple[str, tuple[int, ...]]:
    """The type and shape of an array, from the literal of a dict that numpy writes. Nothing is evaluated."""
    fields: dict[str, str] = {}
    position = 1
    while text[:1] == "{" and (match := _FIELD.match(text, position)):
        if match[2] in fields:
            raise CheckpointFormatError(f"{what}: its header has {match[2]!r} twice")
        fields[match[2]], position = match[3], match.end()
    if len(fields) < 3 or text[position:].strip() != "}":
        raise CheckpointFormatError(
            f"{what}: its header is not that of a plain array: {text.strip()[:200]!r}"
        )
    if "O" in fields["descr"]:
        raise CheckpointFormatError(f"{what}: holds Python objects, which are pickles: refused")
    descr = _DESCR.fullmatch(fields["descr"][1:-1])
    if descr is None or not int(descr[3]):
        raise CheckpointFormatError(f"{what}: type {fields['descr'][:50]} is not supported")
    if descr[1] == ">" and descr[3] != "1":
        raise CheckpointFormatError(f"{what}: is big-endian: save it as little-endian")
    numbers = [number.strip() for number in fields["shape"][1:-1].split(",")]
    if numbers[-1] == "":
        numbers.pop()
    if fields["shape"][0] != "(" or not all(re.fullmatch(r"\d{1,19}", number) for number in numbers):
        raise CheckpointFormatError(f"{what}: its shape {fields['shape'][:50]} is not a tuple of integers")
    if fields["fortran_order"] not in ("True", "False"):
        raise CheckpointFormatError(f"{what}: its fortran_order is neither True nor False")
    shape = tuple(map(int, numbers))
    if fields["fortran_order"] == "True" and len(shape) > 1:
        raise CheckpointFormatError(f"{what}: is in Fortran's order: save it with numpy.ascontiguousarray")
    return descr[2] + descr[3], shape
