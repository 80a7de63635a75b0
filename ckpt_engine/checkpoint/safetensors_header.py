"""The header of a safetensors file, read from the file's own bytes.

Layout (source: the format section of the safetensors README): 8 bytes, the header's length N as an
unsigned little-endian integer; N bytes of JSON, an object of `name -> {dtype, shape, data_offsets}`, which
may be padded with spaces; then the tensors' bytes, without holes, to the end of the file.

Nothing is believed: a header that lies about its file would otherwise send reads to the wrong place in
host memory, so all that it says is checked against the file's size before a byte of data is read.
"""

from __future__ import annotations

import json
import logging
import os
import stat
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, TypeGuard

from ckpt_engine.errors import CheckpointError, CheckpointFormatError
from ckpt_engine.metadata import DTYPE_NBYTES

MAX_HEADER_NBYTES = 100_000_000
"""Longest header that safetensors itself accepts, in bytes."""

DTYPES: dict[str, str] = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
    "I16": "int16",
    "U16": "uint16",
    "F16": "float16",
    "BF16": "bfloat16",
    "I32": "int32",
    "U32": "uint32",
    "F32": "float32",
    "I64": "int64",
    "U64": "uint64",
    "F64": "float64",
    "C64": "complex64",
}
"""safetensors' dtype -> torch's name."""

# A tuple: `in` must also take a dtype that is a list. F4 and F6 are smaller than a byte.
_KNOWN_UNSUPPORTED = ("F4", "F6_E2M3", "F6_E3M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ")
_LENGTH_NBYTES = 8
_MAX_INT = 2**63 - 1  # sizes and offsets beyond this do not fit torch's integers

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class HeaderEntry:
    """One tensor of a file: `dtype` by torch's name; its bytes are [begin, end) of the whole file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.begin


@dataclass(frozen=True, slots=True)
class SafetensorsHeader:
    """What a file of `file_nbytes` bytes holds; tensors in the order in which they lie in the file."""

    path: Path
    file_nbytes: int
    tensors: tuple[HeaderEntry, ...]


def read_header(path: str | os.PathLike[str]) -> SafetensorsHeader:
    """Reads and checks the header of one file; its `__metadata__` is skipped.

    Raises:
        CheckpointError: there is no such file, it is not a regular file, or it may not be read.
        CheckpointFormatError: the file is not what its header says, or not a safetensors file; the message
            names the file and, where one is to blame, the tensor.
    """
    path = Path(path)
    with open_regular(path) as (file, file_nbytes):
        if file_nbytes < _LENGTH_NBYTES:
            raise CheckpointFormatError(
                f"{path}: {file_nbytes} bytes are too few for a safetensors file (its first 8 are a length)"
            )
        header_nbytes = int.from_bytes(read_exactly(file, _LENGTH_NBYTES, path), "little")
        data_begin = _LENGTH_NBYTES + header_nbytes
        # The file's end first: it is what a truncated download and a file of another kind run into.
        if data_begin > file_nbytes:
            raise CheckpointFormatError(
                f"{path}: the header claims {header_nbytes} bytes, but the file has only {file_nbytes}: "
                "truncated, or not a safetensors file"
            )
        if header_nbytes > MAX_HEADER_NBYTES:
            raise CheckpointFormatError(
                f"{path}: a header of {header_nbytes} bytes is over the limit of {MAX_HEADER_NBYTES}"
            )
        text = read_exactly(file, header_nbytes, path)
    fields = parse_json_object(text, f"{path}: header")
    _check_metadata(path, fields.pop("__metadata__", None))
    tensors = [_entry(path, name, value, data_begin, file_nbytes) for name, value in fields.items()]
    tensors.sort(key=lambda entry: (entry.begin, entry.end))
    _check_coverage(path, tensors, data_begin, file_nbytes)
    return SafetensorsHeader(path, file_nbytes, tuple(tensors))


def _check_metadata(path: Path, metadata: object) -> None:
    """As the format has it; what it says is not looked at."""
    if metadata is None:
        return
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointFormatError(f"{path}: header: __metadata__ is not an object of strings")


def read_header_unless_empty(path: str | os.PathLike[str]) -> SafetensorsHeader | None:
    """As `read_header`, but None, with a warning in the log, for a file of 0 bytes.

    Some writers leave such files for ranks that have nothing to write.
    """
    with open_regular(Path(path)) as (_, file_nbytes):
        pass
    if file_nbytes == 0:
        logger.warning("%s is empty (0 bytes): skipped", path)
        return None
    return read_header(path)


@contextmanager
def open_regular(path: Path) -> Iterator[tuple[BinaryIO, int]]:
    """Opens a regular file unbuffered; yields it with its size in bytes.

    Raises:
        CheckpointError: as of `read_header`; a failing read inside the block is reported alike.
    """
    if "\0" in str(path):
        raise CheckpointError(f"{str(path)!r} is not a path: it has a null character")
    try:
        # Before opening: to open a FIFO would wait for its writer.
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise CheckpointError(f"{path} is a directory, not a file")
        if not stat.S_ISREG(mode):
            raise CheckpointError(f"{path} is not a regular file")
        with path.open("rb", buffering=0) as file:
            yield file, os.fstat(file.fileno()).st_size
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist") from None
    except PermissionError:
        raise CheckpointError(f"{path}: no permission to read it") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error


def parse_json_object(text: bytes, what: str) -> dict[str, Any]:
    """Parses strict UTF-8 JSON whose top level is an object; `what` begins each error message.

    Raises:
        CheckpointFormatError: not UTF-8, not JSON, not an object, or an object with a key twice.
    """

    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        fields = dict(pairs)
        if len(fields) < len(pairs):
            twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
            raise CheckpointFormatError(f"{what}: key {twice!r} is there twice")
        return fields

    def no_constant(name: str) -> NoReturn:
        raise CheckpointFormatError(f"{what}: {name} is not JSON")

    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=no_duplicates, parse_constant=no_constant)
    except UnicodeDecodeError as error:
        raise CheckpointFormatError(f"{what}: not UTF-8 (byte {error.start})") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointFormatError(f"{what}: not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointFormatError(f"{what}: a JSON {type(value).__name__} where an object was expected")
    return value


def read_exactly(file: BinaryIO, nbytes: int, path: Path) -> bytes:
    """The file's next `nbytes` bytes.

    Raises:
        CheckpointFormatError: it ends before.
    """
    parts: list[bytes] = []
    while nbytes:
        part = file.read(nbytes)
        if not part:
            raise CheckpointFormatError(f"{path}: truncated while reading its header")
        parts.append(part)
        nbytes -= len(part)
    return b"".join(parts)


def _entry(path: Path, name: str, value: object, data_begin: int, file_nbytes: int) -> HeaderEntry:
    """Checks one `name -> {...}` of the header by itself."""

    def lie(problem: str) -> CheckpointFormatError:
        return CheckpointFormatError(f"{path}: tensor {name!r}: {problem}")

    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        raise lie("its name has a lone surrogate, which no message could carry") from None
    if not name:
        raise lie("its name is empty")
    if not isinstance(value, dict):
        raise lie(f"its entry is a JSON {type(value).__name__}, not an object")
    missing = [key for key in ("dtype", "shape", "data_offsets") if key not in value]
    if missing:
        raise lie(f"its entry lacks {', '.join(missing)}")

    claimed = value["dtype"]
    dtype = DTYPES.get(claimed) if isinstance(claimed, str) else None
    if dtype is None:
        kind = "not supported" if claimed in _KNOWN_UNSUPPORTED else "unknown"
        raise lie(f"dtype {claimed!r} is {kind}; supported are {', '.join(DTYPES)}")
    shape, offsets = value["shape"], value["data_offsets"]
    if not _are_sizes(shape):
        raise lie(f"shape {shape!r} is not a list of integers from 0 up")
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise lie(f"data_offsets {offsets!r} are not two integers from 0 up")

    nbytes = nbytes_of(dtype, shape)
    if nbytes is None:
        raise lie(f"shape {shape} of {dtype} overflows 63 bits")
    begin, end = offsets
    if begin > end:
        raise lie(f"data_offsets {offsets} are reversed")
    if data_begin + end > file_nbytes:
        raise lie(
            f"data_offsets {offsets} end {data_begin + end - file_nbytes} bytes past the end of the file "
            f"({file_nbytes} bytes): truncated?"
        )
    if end - begin != nbytes:
        raise lie(f"data_offsets {offsets} span {end - begin} bytes, but {shape} of {dtype} is {nbytes}")
    return HeaderEntry(name, dtype, tuple(shape), data_begin + begin, data_begin + end)


def nbytes_of(dtype: str, shape: Sequence[int]) -> int | None:
    """Bytes of a tensor; None where it, or one of its strides, would not fit 63 bits."""
    nbytes = DTYPE_NBYTES[dtype]
    for size in shape:
        # A zero must not hide the others: torch computes strides from them.
        nbytes *= size or 1
        if nbytes > _MAX_INT:
            return None
    return 0 if 0 in shape else nbytes


def _are_sizes(value: object) -> TypeGuard[list[int]]:
    # type(), not isinstance: JSON's true is an int to Python.
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _check_coverage(path: Path, tensors: list[HeaderEntry], data_begin: int, file_nbytes: int) -> None:
    """Checks that the tensors, sorted by offset, cover the file's data once, as the format demands."""
    end, before = data_begin, "the header"
    for entry in tensors:
        if entry.begin < end:
            raise CheckpointFormatError(f"{path}: tensor {entry.name!r} overlaps {before}")
        if entry.begin > end:
            raise CheckpointFormatError(
                f"{path}: a hole of {entry.begin - end} bytes between {before} and tensor {entry.name!r}"
            )
        end, before = entry.end, f"tensor {entry.name!r}"
    if end < file_nbytes:
        raise CheckpointFormatError(f"{path}: {file_nbytes - end} bytes after {before} belong to no tensor")
