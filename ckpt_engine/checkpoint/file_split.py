"""Whole files, dealt to ranks."""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from pathlib import Path
from typing import TypeVar

from ckpt_engine.checkpoint.npy_file import NPY_SUFFIX, parse_npy_name
from ckpt_engine.errors import CheckpointError

_Key = TypeVar("_Key")


def split_files(files: Iterable[Path], world_size: int) -> list[list[Path]]:
    """Every rank's files, sorted, balanced by bytes. A layer's `.npy` files, which hold shards of the same
    tensors, go to one rank.

    Raises:
        CheckpointError: a file is gone.
        CheckpointFormatError: a `.npy` file has not the name of one.
    """
    units: dict[object, list[Path]] = {}
    for file in files:
        unit = parse_npy_name(file).group if file.suffix == NPY_SUFFIX else file
        units.setdefault(unit, []).append(file)
    try:
        sizes = [(sum(file.stat().st_size for file in unit), sorted(unit)) for unit in units.values()]
    except OSError as error:
        raise CheckpointError(f"{error.filename} cannot be read: {error.strerror or error}") from error
    return [sorted(file for unit in share for file in unit) for share in balance(sizes, world_size)]


def balance(sizes: Iterable[tuple[int, _Key]], world_size: int) -> list[list[_Key]]:
    """Deals `(nbytes, key)` to ranks: the largest first, each to the rank with the fewest bytes so far.

    Ties go by key, then to the lower rank, so that every rank deals alike.
    """
    shares: list[list[_Key]] = [[] for _ in range(world_size)]
    loads = [(0, rank) for rank in range(world_size)]
    for nbytes, key in sorted(sizes, key=lambda item: (-item[0], item[1])):
        load, rank = loads[0]
        shares[rank].append(key)
        heapq.heapreplace(loads, (load + nbytes, rank))
    return shares
