from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from ckpt_engine.cli import format_nbytes, printable
from tests.support.npy_files import NpyFile

Cli = Callable[..., Any]


def test_shards_are_one_tensor(cli: Cli, tmp_path: Path) -> None:
    for tp in range(2):
        NpyFile([("w", torch.zeros(4, 3), 1)]).write(tmp_path / f"model.0.{tp}.npy")
    summary = json.loads(cli("inspect", tmp_path, "--json").stdout)
    assert summary["tensors"] == 1
    assert summary["names_in_several_files"] == []
    assert summary["largest"] == [
        {
            "name": "w",
            "dtype": "float32",
            "shape": [4, 6],
            "bytes": 96,
            "file": "model.0.0.npy",
            "shards": 2,
        }
    ]
    assert "model.0.0.npy and 1 more" in cli("inspect", tmp_path).stdout
    (tmp_path / "model.0.0.npy").unlink()
    done = cli("inspect", tmp_path)
    assert done.exit_code == 1
    assert "shard 0 of 2 is missing: model.0.0.npy is not among the files" in done.stderr


def test_json(cli: Cli, checkpoint: Path) -> None:
    done = cli("inspect", checkpoint, "--json")
    assert done.exit_code == 0, done.output
    summary = json.loads(done.stdout)
    assert summary["tensors"] == 4
    assert summary["bytes"] == 8192 + 64 + 2048 + 192
    assert summary["dtypes"] == {
        "float32": {"tensors": 2, "bytes": 8384},
        "bfloat16": {"tensors": 2, "bytes": 2112},
    }
    assert [Path(file["path"]).name for file in summary["files"]] == ["one.safetensors", "two.safetensors"]
    assert summary["largest"][0] == {
        "name": "a.weight",
        "dtype": "float32",
        "shape": [2048],
        "bytes": 8192,
        "file": "one.safetensors",
        "shards": 1,
    }
    assert summary["names_in_several_files"] == []
    assert "all_tensors" not in summary


def test_all_tensors(cli: Cli, checkpoint: Path) -> None:
    listed = json.loads(cli("inspect", checkpoint, "--json", "--tensors").stdout)["all_tensors"]
    assert [tensor["name"] for tensor in listed] == ["a.bias", "a.weight", "b.weight", "b[red]"]


def test_tables_keep_names_as_they_are(cli: Cli, tmp_path: Path) -> None:
    names = ["x" * 200, "b[red]", ":smile:", "evil\x1b[2J"]
    save_file({name: torch.ones(2) for name in names}, tmp_path / "m.safetensors")
    done = cli("inspect", tmp_path / "m.safetensors")
    assert done.exit_code == 0, done.output
    assert "4 tensors, 32 B" in done.stdout
    for name in (*names[:3], r"evil\x1b[2J"):
        assert name in done.stdout
    assert "\x1b" not in done.stdout


def test_a_name_in_two_files_is_told(cli: Cli, checkpoint: Path) -> None:
    save_file({"a.bias": torch.ones(1)}, checkpoint / "three.safetensors")
    assert "in several files: a.bias" in cli("inspect", checkpoint).stdout


def test_a_lying_file(cli: Cli, lying_file: Path) -> None:
    done = cli("inspect", lying_file)
    assert done.exit_code == 1
    assert done.stderr.startswith(f"error: {lying_file}: tensor 'w': ")
    assert "past the end of the file" in done.stderr


def test_only_headers_are_read(cli: Cli, tmp_path: Path) -> None:
    """A sparse file of 1 TiB: reading it would take hours."""
    nbytes = 2**40
    header = json.dumps({"w": {"dtype": "U8", "shape": [nbytes], "data_offsets": [0, nbytes]}}).encode()
    path = tmp_path / "sparse.safetensors"
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + nbytes)
    assert "1.00 TiB" in cli("inspect", path).stdout
    assert json.loads(cli("plan", path, "--world-size", 2, "--json").stdout)["bytes"] == nbytes


def test_sizes_and_names_for_people() -> None:
    assert [format_nbytes(n) for n in (0, 1023, 1024, 1.5 * 2**30, 2**55)] == [
        "0 B",
        "1023 B",
        "1.00 KiB",
        "1.50 GiB",
        "32768.00 TiB",
    ]
    assert printable("gewicht-ü\n\u202e") == "gewicht-ü\\n\\u202e"
