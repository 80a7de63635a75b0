"""`ckpt-engine convert-metadata`: pickled sidecars as the reference writes them, and pickles that do more."""

from __future__ import annotations

import collections
import os
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner, Result

from ckpt_engine.checkpoint import checkpoint_files, load
from ckpt_engine.cli.main import app


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["convert-metadata", *map(str, arguments)])


def write(path: Path, tensors: dict[str, tuple[torch.Tensor, int]], *, protocol: int = 4) -> Path:
    """A file and its pickle, as checkpoint-engine reads them: arrays one after the other, a list of dicts."""
    with path.open("wb") as file:
        for tensor, _ in tensors.values():
            np.save(file, tensor.view(torch.int16 if tensor.element_size() == 2 else tensor.dtype).numpy())
    meta = [
        {
            "key": name,
            "dtype": tensor.dtype,
            "shape": tensor.shape,
            "type": torch.Tensor,
            "tp_concat_dim": dim,
        }
        for name, (tensor, dim) in tensors.items()
    ]
    Path(f"{path}.meta").write_bytes(pickle.dumps(meta, protocol))
    return path


def shards(tp: int) -> dict[str, tuple[torch.Tensor, int]]:
    return {
        "w": (torch.full((2, 4), tp, dtype=torch.bfloat16), 1),
        "n": (torch.arange(5, dtype=torch.float32), -1),
        "v": (torch.full((3,), tp, dtype=torch.int64), 0),
    }


def bytes_of(directory: Path) -> dict[str, bytes]:
    held = load("c", checkpoint_files(directory))
    return {
        tensor.name: held.view(index, tensor.offset, tensor.nbytes).numpy().tobytes()
        for index, buffer in enumerate(held.buffers)
        for tensor in buffer.tensors
    }


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_converts_a_directory_which_then_loads(tmp_path: Path, protocol: int) -> None:
    for tp in range(2):
        write(tmp_path / f"model.0.{tp}.npy", shards(tp), protocol=protocol)
    result = run(tmp_path)
    assert result.exit_code == 0, result.output
    assert result.output.count("3 tensors") == 2
    assert bytes_of(tmp_path) == {
        name: torch.cat([shards(tp)[name][0] for tp in range(2)], dim).view(torch.uint8).numpy().tobytes()
        if dim >= 0
        else tensor.view(torch.uint8).numpy().tobytes()
        for name, (tensor, dim) in shards(0).items()
    }
    # It knows how many shards there are: a file that is gone is missed, were it the last one.
    (tmp_path / "model.0.1.npy").unlink()
    with pytest.raises(Exception, match=r"shard 1 of 2 is missing"):
        bytes_of(tmp_path)


def test_files_one_by_one_know_of_each_other(tmp_path: Path) -> None:
    paths = [write(tmp_path / f"model.0.{tp}.npy", shards(tp)) for tp in range(3)]
    assert run(paths[0]).exit_code == 0
    assert run(f"{paths[1]}.meta", paths[2]).exit_code == 0
    assert len(bytes_of(tmp_path)["w"]) == 3 * 16


def test_leaves_what_is_there_unless_forced(tmp_path: Path) -> None:
    path = write(tmp_path / "model.0.0.npy", shards(0))
    sidecar = Path(f"{path}.json")
    sidecar.write_text("mine")
    result = run(path)
    assert result.exit_code == 0
    assert "--force" in result.output
    assert sidecar.read_text() == "mine"
    assert run("--force", path).exit_code == 0
    assert len(bytes_of(tmp_path)) == 3


class Evil:
    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self._path}",)


def an_item(**fields: object) -> dict[str, object]:
    item = {
        "key": "w",
        "dtype": torch.int64,
        "shape": torch.Size([2]),
        "type": torch.Tensor,
        "tp_concat_dim": 0,
    }
    return item | fields


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (an_item(), "a dict, not a list"),
        ([3], "item 0 is a int, not a dict"),
        ([{"key": "w"}], "item 0 lacks dtype, shape, tp_concat_dim"),
        ([an_item(key=3)], "key 3, which is no tensor's name"),
        ([an_item(dtype="int64")], "which is none of torch's"),
        ([an_item(shape=(2.0,))], "not one of integers"),
        ([an_item(shape="2")], "not one of integers"),
        ([an_item(tp_concat_dim=None)], "which is no integer"),
        ([an_item(tp_concat_dim=1)], "concat_dim 1 is no dimension"),
        ([an_item(shape=(3,))], "is 24 bytes, its array"),
        ([an_item(dtype=torch.int32)], "is 8 bytes, its array"),
        ([an_item(dtype=torch.qint8)], "'qint8' is unknown"),
        ([an_item(), an_item(key="v")], "holds 1 arrays, but its sidecar has 2"),
        ([an_item(shape=np.int64(2))], "names numpy.* refused"),
        ([an_item(key=collections.deque())], "names collections.deque, .* refused"),
        ([an_item(type=os.system)], "names posix.system, .* refused"),
        ([an_item(type=print)], "names builtins.print, .* refused"),
        ([an_item(type=torch.load)], "names torch.*load, .* refused"),
    ],
)
def test_pickles_that_are_not_sidecars(tmp_path: Path, content: object, message: str) -> None:
    path = tmp_path / "model.0.0.npy"
    np.save(path, np.arange(2))
    Path(f"{path}.meta").write_bytes(pickle.dumps(content))
    result = run(path)
    assert result.exit_code == 1
    assert re.search(message, result.output), result.output
    assert not Path(f"{path}.json").exists()


def test_nothing_that_a_pickle_says_is_called(tmp_path: Path) -> None:
    path = tmp_path / "model.0.0.npy"
    np.save(path, np.arange(2))
    trace = tmp_path / "called"
    # What the name stands for here cannot be called, and torch.Size is a tuple.
    called = b"\x80\x04ctorch\nTensor\n(K\x01tR."
    for text in (pickle.dumps([an_item(key=Evil(trace))]), called, b"\x80\x04Pid\n.", b"", b"junk"):
        Path(f"{path}.meta").write_bytes(text)
        result = run(path)
        assert result.exit_code == 1
        assert "refused" in result.output or "not a pickle of a sidecar" in result.output
    assert not trace.exists()


def test_nothing_to_convert(tmp_path: Path) -> None:
    result = run(tmp_path)
    assert result.exit_code == 1
    assert "holds no *.npy.meta" in result.output
    assert run(tmp_path / "model.0.0.npy").exit_code == 1
