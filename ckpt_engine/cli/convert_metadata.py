"""`ckpt-engine convert-metadata`: checkpoint-engine's pickled sidecars of `.npy` files, as JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ckpt_engine.cli import Verbose
from ckpt_engine.errors import CheckpointError


def convert_metadata(
    paths: Annotated[
        list[Path], typer.Argument(help=".npy files, or directories of them.", show_default=False)
    ],
    force: Annotated[bool, typer.Option("--force", help="Replace JSON sidecars that are there.")] = False,
    verbose: Verbose = False,
) -> None:
    """Write a JSON sidecar for each .npy file that has a pickled one (X.npy.meta -> X.npy.json).

    Only for files that you trust: a pickle is a program. Names that no sidecar needs are refused. Each
    sidecar is checked against its file before it is written; the pickles stay.
    """
    import msgspec

    from ckpt_engine.checkpoint.npy_file import PICKLE_SUFFIX, read_npy_header, sidecar_of
    from ckpt_engine.cli.files import write
    from ckpt_engine.cli.pickled_sidecars import read_pickled_sidecar

    files = _files(paths, PICKLE_SUFFIX)
    sizes = _tp_sizes(files)
    for file in files:
        target = sidecar_of(file)
        if target.exists() and not force:
            typer.echo(f"{target} is there already (--force replaces it)")
            continue
        sidecar = read_pickled_sidecar(file.with_name(file.name + PICKLE_SUFFIX), sizes[file])
        read_npy_header(file, sidecar)  # raises where they disagree
        write(target, msgspec.json.format(msgspec.json.encode(sidecar), indent=1) + b"\n")
        typer.echo(f"{target}: {len(sidecar.tensors)} tensors")


def _files(paths: list[Path], suffix: str) -> list[Path]:
    """The `.npy` files that have pickled sidecars."""
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            files = sorted(
                file.with_name(file.name.removesuffix(suffix)) for file in path.glob(f"*.npy{suffix}")
            )
            if not files:
                raise CheckpointError(f"{path} holds no *.npy{suffix}")
            found.extend(files)
        elif path.name.endswith(suffix):
            found.append(path.with_name(path.name.removesuffix(suffix)))
        else:
            found.append(path)
    return list(dict.fromkeys(found))


def _tp_sizes(files: list[Path]) -> dict[Path, int]:
    """How many shards each file's layer has, by the files in its directory: later, none may be missing."""
    from ckpt_engine.checkpoint.npy_file import NPY_SUFFIX, PICKLE_SUFFIX, parse_npy_name

    sizes: dict[tuple[Path, tuple[str, str]], int] = {}
    for directory in {file.parent for file in files}:
        for file in {*files, *directory.glob(f"*{NPY_SUFFIX}")}:
            if file in files or file.with_name(file.name + PICKLE_SUFFIX).exists():
                name = parse_npy_name(file)
                key = (file.parent, name.group)
                sizes[key] = max(sizes.get(key, 0), name.tp + 1)
    return {file: sizes[file.parent, parse_npy_name(file).group] for file in files}
