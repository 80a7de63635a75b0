"""Which files a checkpoint consists of, and how they are split over ranks.

A checkpoint is one `.safetensors` file or a directory of them. A directory may have an index,
`model.safetensors.index.json`, whose `weight_map` says which tensor is in which file. Without one, it may
hold TP-sharded `.npy` files as well, or instead.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from ckpt_engine.checkpoint.file_split import balance, split_files
from ckpt_engine.checkpoint.npy_file import (
    NPY_SUFFIX,
    PICKLE_SUFFIX,
    NpyHeader,
    read_npy_header,
    sidecar_of,
)
from ckpt_engine.checkpoint.safetensors_header import (
    MAX_HEADER_NBYTES,
    SafetensorsHeader,
    open_regular,
    parse_json_object,
    read_header,
    read_header_unless_empty,
)
from ckpt_engine.errors import CheckpointError, CheckpointFormatError, ConfigError

INDEX_NAME = "model.safetensors.index.json"
SUFFIX = ".safetensors"

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class FileSelection:
    """The tensors called `names` of the file at `path`; every tensor in it if `names` is None."""

    path: Path
    names: frozenset[str] | None = None


def files_of(paths: Iterable[str | os.PathLike[str]]) -> list[Path]:
    """The files at `paths`, each a file or a directory of them; each file once.

    Raises:
        CheckpointError, CheckpointFormatError: as `checkpoint_files`.
    """
    return list(dict.fromkeys(file for path in paths for file in checkpoint_files(path)))


def checkpoint_files(path: str | os.PathLike[str]) -> list[Path]:
    """The files of the checkpoint at `path`, sorted: those that its index names, else `*.safetensors` and
    TP-sharded `*.npy`.

    A `.npy` file beside `.safetensors` files counts only if one of them has a sidecar: it may be anything.

    Raises:
        CheckpointError: nothing is there, or no file of a checkpoint is.
        CheckpointFormatError: the index is malformed, or names a file that is missing or elsewhere.
    """
    path = Path(path)
    if not path.is_dir():
        if path.suffix not in (SUFFIX, NPY_SUFFIX) and path.exists():
            raise CheckpointError(
                f"{path} is neither a {SUFFIX} or {NPY_SUFFIX} file nor a directory of them"
            )
        with open_regular(path):  # raises where it is missing, special or forbidden
            return [path]
    if (path / INDEX_NAME).exists():
        return sorted(set(_read_weight_map(path).values()))
    try:
        # No hidden files: some systems leave "._x.safetensors" beside x.safetensors.
        found = sorted(
            file
            for file in path.iterdir()
            if file.suffix in (SUFFIX, NPY_SUFFIX) and not file.name.startswith(".") and not file.is_dir()
        )
    except OSError as error:
        raise CheckpointError(f"{path} cannot be listed: {error.strerror or error}") from error
    whole = [file for file in found if file.suffix == SUFFIX]
    if whole and not any(map(_has_sidecar, found)):
        return whole
    if not found:
        raise CheckpointError(f"{path} holds neither {INDEX_NAME} nor any {SUFFIX} or {NPY_SUFFIX} file")
    return found


def _has_sidecar(file: Path) -> bool:
    pickled = file.with_name(file.name + PICKLE_SUFFIX)
    return file.suffix == NPY_SUFFIX and (sidecar_of(file).exists() or pickled.exists())


def describe(path: str | os.PathLike[str]) -> list[tuple[Path, SafetensorsHeader | NpyHeader]]:
    """Every file of the checkpoint at `path` with its header; `.safetensors` of 0 bytes are left out.

    Raises:
        CheckpointError, CheckpointFormatError: as `checkpoint_files`, `read_header` and `read_npy_header`.
    """
    headers = ((file, _header_of(file)) for file in checkpoint_files(path))
    return [(file, header) for file, header in headers if header is not None]


def _header_of(file: Path) -> SafetensorsHeader | NpyHeader | None:
    return read_npy_header(file) if file.suffix == NPY_SUFFIX else read_header_unless_empty(file)


def split_checkpoint(path: str | os.PathLike[str], rank: int, world_size: int) -> list[FileSelection]:
    """The share of `rank`: by tensor where the checkpoint has an index, else by whole file.

    Shares are balanced by bytes, and all ranks' shares together are the checkpoint exactly once. Each rank
    computes the same split by itself, from the same files.

    Raises:
        ConfigError: not 0 <= rank < world_size.
        CheckpointError, CheckpointFormatError: as `describe`; or the index names
            a tensor that its file does not have.
    """
    if not 0 <= rank < world_size:
        raise ConfigError(f"rank {rank} of {world_size}: give 0 <= rank < world_size")
    path = Path(path)
    if path.is_dir() and (path / INDEX_NAME).exists():
        return _split_by_tensor(path, rank, world_size)
    return [FileSelection(file) for file in split_files(checkpoint_files(path), world_size)[rank]]


def _split_by_tensor(directory: Path, rank: int, world_size: int) -> list[FileSelection]:
    weight_map = _read_weight_map(directory)
    names_of: dict[Path, set[str]] = {}
    for name, file in weight_map.items():
        names_of.setdefault(file, set()).add(name)

    sizes: list[tuple[int, tuple[str, Path]]] = []
    extras: dict[str, Path] = {}
    for file, names in sorted(names_of.items()):
        in_file = {entry.name: entry.nbytes for entry in read_header(file).tensors}
        lacking = sorted(names - in_file.keys())
        if lacking:
            raise CheckpointFormatError(
                f"{directory / INDEX_NAME}: says that tensor {lacking[0]!r} is in {file.name}, which does "
                f"not have it" + (f" ({len(lacking)} such tensors)" if len(lacking) > 1 else "")
            )
        # An index may be out of date, and engines load what is in the files; where a name is in several of
        # them, the index decides.
        unlisted = sorted(name for name in in_file if name not in weight_map)
        if unlisted:
            logger.warning(
                "%s has %d tensors that the index does not list (%r ...): taken too",
                file, len(unlisted), unlisted[0],
            )  # fmt: skip
        for name in unlisted:
            if name in extras:
                raise CheckpointFormatError(
                    f"tensor {name!r} is there twice: in {extras[name]} and in {file}; "
                    "the index lists neither"
                )
            extras[name] = file
        sizes.extend((in_file[name], (name, file)) for name in sorted(names | set(unlisted)))

    share: dict[Path, set[str]] = {}
    for name, file in balance(sizes, world_size)[rank]:
        share.setdefault(file, set()).add(name)
    return [FileSelection(file, frozenset(names)) for file, names in sorted(share.items())]


def _read_weight_map(directory: Path) -> dict[str, Path]:
    """The index of `directory`: tensor name -> path of a file that is there."""
    index = directory / INDEX_NAME
    with open_regular(index) as (_, nbytes):
        if nbytes > MAX_HEADER_NBYTES:
            raise CheckpointFormatError(f"{index}: {nbytes} bytes are over the limit of {MAX_HEADER_NBYTES}")
        text = index.read_bytes()
    weight_map = parse_json_object(text, str(index)).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointFormatError(f"{index}: has no weight_map of tensor names to file names")
    paths: dict[str, Path] = {}  # each file's name is checked once
    for name, value in weight_map.items():
        if not isinstance(value, str):
            raise CheckpointFormatError(f"{index}: tensor {name!r}: {value!r} is not a file name")
        if value not in paths:
            paths[value] = _file_in(directory, index, name, value)
    return {name: paths[value] for name, value in weight_map.items()}


def _file_in(directory: Path, index: Path, name: str, value: str) -> Path:
    # By its text only: in a Hugging Face cache each file is a link to a blob outside the directory.
    relative = PurePosixPath(value)
    if relative.is_absolute() or ".." in relative.parts or "\0" in value:
        raise CheckpointFormatError(f"{index}: tensor {name!r}: {value!r} leads out of the directory")
    if relative.suffix != SUFFIX:
        raise CheckpointFormatError(f"{index}: tensor {name!r}: {value!r} is not a {SUFFIX} file")
    file = directory / relative
    if not file.is_file():
        raise CheckpointFormatError(f"{index}: tensor {name!r} is said to be in {value!r}, which is missing")
    return file
