"""`ckpt-engine inspect`: what a checkpoint holds, from the headers of its files alone."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ckpt_engine.cli import AsJson, Verbose, format_nbytes, print_table, printable, table_console

if TYPE_CHECKING:
    from ckpt_engine.checkpoint import HeaderEntry, NpyHeader, SafetensorsHeader
    from ckpt_engine.checkpoint.tensor_shards import ShardedTensor

_LARGEST = 10


def inspect_checkpoint(
    path: Annotated[Path, typer.Argument(help="A checkpoint's file, or a directory of them.")],
    all_tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor.")] = False,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Show what a checkpoint holds.

    Reads and checks the headers of its files, never the weights.
    """
    from ckpt_engine.checkpoint import describe

    summary = summarize(path, describe(path), all_tensors=all_tensors)
    if as_json:
        typer.echo(json.dumps(summary))
    else:
        _show(summary)


def summarize(
    path: Path, files: Sequence[tuple[Path, SafetensorsHeader | NpyHeader]], *, all_tensors: bool
) -> dict[str, Any]:
    """The checkpoint as JSON-ready data. `bytes` are the tensors', without headers.

    A tensor of several shards is one, with the first one's file.

    Raises:
        CheckpointFormatError: a shard is missing, or shards disagree.
    """
    tensors = _tensors(files)
    counts: Counter[str] = Counter()
    nbytes: Counter[str] = Counter()
    for tensor in tensors:
        counts[tensor["dtype"]] += 1
        nbytes[tensor["dtype"]] += tensor["bytes"]
    names = Counter(tensor["name"] for tensor in tensors)
    summary = {
        "path": str(path),
        "tensors": len(tensors),
        "bytes": nbytes.total(),
        "dtypes": {
            dtype: {"tensors": counts[dtype], "bytes": total} for dtype, total in nbytes.most_common()
        },
        "files": [
            {"path": str(file), "file_bytes": header.file_nbytes, "tensors": len(header.tensors)}
            for file, header in files
        ],
        # An index may decide between them; without one, such a checkpoint cannot be registered.
        "names_in_several_files": sorted(name for name, count in names.items() if count > 1),
        "largest": sorted(tensors, key=lambda tensor: (-tensor["bytes"], tensor["name"]))[:_LARGEST],
    }
    if all_tensors:
        summary["all_tensors"] = sorted(tensors, key=lambda tensor: (tensor["name"], tensor["file"]))
    return summary


def _tensors(files: Sequence[tuple[Path, SafetensorsHeader | NpyHeader]]) -> list[dict[str, Any]]:
    from ckpt_engine.checkpoint import SafetensorsHeader
    from ckpt_engine.checkpoint.tensor_shards import assemble

    def row(tensor: HeaderEntry | ShardedTensor, file: Path, shards: int) -> dict[str, Any]:
        return {
            "name": tensor.name,
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "bytes": tensor.nbytes,
            "file": file.name,
            "shards": shards,
        }

    whole = [
        row(entry, file, 1)
        for file, header in files
        if isinstance(header, SafetensorsHeader)
        for entry in header.tensors
    ]
    sharded = assemble([(header, None) for _, header in files if not isinstance(header, SafetensorsHeader)])
    return whole + [row(tensor, tensor.shards[0].path, len(tensor.shards)) for tensor in sharded]


def _show(summary: dict[str, Any]) -> None:
    console = table_console()
    console.print(
        f"{printable(summary['path'])}: {summary['tensors']} tensors, {format_nbytes(summary['bytes'])} "
        f"({summary['bytes']} bytes); files: {len(summary['files'])}"
    )
    for name in summary["names_in_several_files"]:
        console.print(f"in several files: {printable(name)}")
    print_table(
        console,
        "Files",
        (("file", False), ("size", True), ("tensors", True)),
        (
            (printable(file["path"]), format_nbytes(file["file_bytes"]), str(file["tensors"]))
            for file in summary["files"]
        ),
    )
    print_table(
        console,
        "Dtypes",
        (("dtype", False), ("tensors", True), ("bytes", True)),
        ((dtype, str(of["tensors"]), format_nbytes(of["bytes"])) for dtype, of in summary["dtypes"].items()),
    )
    shown = "all_tensors" if "all_tensors" in summary else "largest"
    print_table(
        console,
        "Tensors" if shown == "all_tensors" else "Largest tensors",
        (("name", False), ("dtype", False), ("shape", False), ("bytes", True), ("file", False)),
        (
            (
                printable(tensor["name"]),
                tensor["dtype"],
                str(tensor["shape"]),
                format_nbytes(tensor["bytes"]),
                printable(tensor["file"]) + f" and {tensor['shards'] - 1} more" * (tensor["shards"] > 1),
            )
            for tensor in summary[shown]
        ),
    )
