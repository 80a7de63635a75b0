"""Whole files, dealt to ranks."""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from pathlib import Path

from ckpt_engine.checkpoint.index import checkpoint_files
from ckpt_engine.errors import CheckpointError


def files_of(paths: Iterable[str | Path]) -> list[Path]:
    """The files at `paths`, each a `.safetensors` file or a directory of them; each file once.

    Raises:
        CheckpointError, CheckpointFormatError: as `checkpoint_files`.
    """
    return list(dict.fromkeys(file for path in paths for file in checkpoint_files(path)))


def split_files(files: Iterable[Path], world_size: int) -> list[list[Path]]:
    """Every rank's files, balanced by bytes: the largest first, each to the rank with the fewest so far.

    Raises:
        CheckpointError: a file is gone.
    """
    try:
        sizes = [(file.stat().st_size, file) for file in files]
    except OSError as error:
        raise CheckpointError(f"{error.filename} cannot be read: {error.strerror or error}") from error
    shares: list[list[Path]] = [[] for _ in range(world_size)]
    loads = [(0, rank) for rank in range(world_size)]
    for nbytes, file in sorted(sizes, key=lambda item: (-item[0], item[1])):
        load, rank = loads[0]
        shares[rank].append(file)
        heapq.heapreplace(loads, (load + nbytes, rank))
    return [sorted(share) for share in shares]
