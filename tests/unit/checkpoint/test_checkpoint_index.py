"""Which files a checkpoint has, and that every split covers it exactly once."""

from __future__ import annotations

import json
import logging
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files_for_tests import contents, expected, sharded_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from ckpt_engine.checkpoint import (
    FileSelection,
    checkpoint_files,
    describe,
    load,
    read_header,
    split_checkpoint,
)
from ckpt_engine.checkpoint.file_split import balance
from ckpt_engine.checkpoint.index import INDEX_NAME
from ckpt_engine.errors import CheckpointError, CheckpointFormatError, ConfigError


def write_index(directory: Path, weight_map: dict[str, str]) -> None:
    (directory / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))


def test_files_of_a_directory(tmp_path: Path) -> None:
    sharded_checkpoint(tmp_path, index=False)
    (tmp_path / "._model.safetensors").write_text("not a checkpoint")
    (tmp_path / "config.json").write_text("{}")
    files = checkpoint_files(tmp_path)
    assert [file.name[:11] for file in files] == ["model-00001", "model-00002", "model-00003"]
    assert checkpoint_files(files[1]) == [files[1]]


def test_the_index_decides_which_files(tmp_path: Path) -> None:
    sharded_checkpoint(tmp_path)
    save_file({"other": torch.zeros(1)}, tmp_path / "consolidated.safetensors")
    assert "consolidated.safetensors" not in [file.name for file in checkpoint_files(tmp_path)]


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nor any \.safetensors or \.npy file"):
        checkpoint_files(tmp_path)
    with pytest.raises(CheckpointError, match=r"missing\.safetensors does not exist"):
        checkpoint_files(tmp_path / "missing.safetensors")
    with pytest.raises(CheckpointError, match="missing does not exist"):
        checkpoint_files(str(tmp_path / "missing"))
    (tmp_path / "weights.bin").write_text("x")
    with pytest.raises(CheckpointError, match=r"weights.bin is neither a .safetensors or .npy file nor"):
        checkpoint_files(tmp_path / "weights.bin")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "JSON list"),
        ("{}", "no weight_map"),
        ('{"weight_map": []}', "no weight_map"),
        ('{"weight_map": {}}', "no weight_map"),
        ('{"weight_map": {"a": 1}}', "1 is not a file name"),
        ('{"weight_map": {"a": "x", "a": "y"}}', "key 'a' is there twice"),
        ('{"weight_map": {"a": "../x.safetensors"}}', "tensor 'a': '../x.safetensors' leads out"),
        ('{"weight_map": {"a": "d/../../x.safetensors"}}', "leads out"),
        ('{"weight_map": {"a": "/x.safetensors"}}', "leads out"),
        ('{"weight_map": {"a": "x\\u0000.safetensors"}}', "leads out"),
        ('{"weight_map": {"a": "x.bin"}}', "not a .safetensors file"),
        ('{"weight_map": {"a": ""}}', "not a .safetensors file"),
        ('{"weight_map": {"a": "x.safetensors"}}', "'x.safetensors', which is missing"),
    ],
)
def test_bad_index(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / INDEX_NAME).write_text(text)
    with pytest.raises(CheckpointFormatError, match=message):
        checkpoint_files(tmp_path)
    with pytest.raises(CheckpointFormatError, match=message):
        split_checkpoint(tmp_path, 0, 2)


def test_index_may_name_links_out_of_the_directory(tmp_path: Path) -> None:
    """As in a Hugging Face cache."""
    (tmp_path / "snapshot").mkdir()
    save_file({"a": torch.zeros(1)}, tmp_path / "blob")
    (tmp_path / "snapshot" / "x.safetensors").symlink_to("../blob")
    write_index(tmp_path / "snapshot", {"a": "x.safetensors"})
    assert len(checkpoint_files(tmp_path / "snapshot")) == 1


def test_index_names_a_tensor_that_is_not_there(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "x.safetensors")
    write_index(tmp_path, {"a": "x.safetensors", "b": "x.safetensors"})
    with pytest.raises(CheckpointFormatError, match=r"tensor 'b' is in x\.safetensors, which does not have"):
        split_checkpoint(tmp_path, 0, 1)


def test_tensors_that_the_index_does_not_list(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_file({"a": torch.zeros(1), "stray": torch.ones(2)}, tmp_path / "x.safetensors")
    write_index(tmp_path, {"a": "x.safetensors"})
    with caplog.at_level(logging.WARNING):
        (selection,) = split_checkpoint(tmp_path, 0, 1)
    assert selection.names == {"a", "stray"}
    assert "1 tensors that the index does not list ('stray'" in caplog.text
    # In two files: nothing says which one is meant.
    save_file({"b": torch.zeros(1), "stray": torch.ones(2)}, tmp_path / "y.safetensors")
    write_index(tmp_path, {"a": "x.safetensors", "b": "y.safetensors"})
    with pytest.raises(CheckpointFormatError, match="'stray' is there twice"):
        split_checkpoint(tmp_path, 0, 1)


def test_the_index_decides_between_two_files(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1), "b": torch.zeros(1)}, tmp_path / "x.safetensors")
    save_file({"a": torch.ones(1)}, tmp_path / "y.safetensors")
    write_index(tmp_path, {"a": "y.safetensors", "b": "x.safetensors"})
    assert split_checkpoint(tmp_path, 0, 1) == [
        FileSelection(tmp_path / "x.safetensors", frozenset({"b"})),
        FileSelection(tmp_path / "y.safetensors", frozenset({"a"})),
    ]


@pytest.mark.parametrize("index", [True, False])
@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 40])
def test_split_covers_everything_once(index: bool, world_size: int, tmp_path: Path) -> None:
    tensors = sharded_checkpoint(tmp_path, index=index)
    shares = [split_checkpoint(tmp_path, rank, world_size) for rank in range(world_size)]
    assert shares == [split_checkpoint(str(tmp_path), rank, world_size) for rank in range(world_size)]
    names: Counter[str] = Counter()
    for share in shares:
        for selection in share:
            every = {entry.name for entry in read_header(selection.path).tensors}
            names.update(every if selection.names is None else selection.names)
    assert names == Counter(dict.fromkeys(tensors, 1))
    loaded: dict[str, Any] = {}
    for share in shares:
        loaded |= contents(load("c", share))
    assert loaded == expected(tensors)


@settings(derandomize=True, print_blob=True, deadline=None)
@given(st.lists(st.integers(0, 1000), max_size=60), st.integers(1, 9))
def test_balance(nbytes: list[int], world_size: int) -> None:
    shares = balance([(size, key) for key, size in enumerate(nbytes)], world_size)
    assert sorted(key for share in shares for key in share) == list(range(len(nbytes)))
    loads = [sum(nbytes[key] for key in share) for share in shares]
    # Largest first: no rank is ahead of another by more than one tensor.
    assert max(loads) - min(loads) <= max(nbytes, default=0)
    assert balance(reversed([(size, key) for key, size in enumerate(nbytes)]), world_size) == shares


def test_balance_is_largest_first_then_lowest_rank() -> None:
    assert balance([(1, "a"), (1, "b"), (5, "c"), (3, "d")], 2) == [["c"], ["d", "a", "b"]]


def test_split_of_one_file(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "x.safetensors")
    assert split_checkpoint(tmp_path / "x.safetensors", 0, 2) == [FileSelection(tmp_path / "x.safetensors")]
    assert split_checkpoint(tmp_path / "x.safetensors", 1, 2) == []


@pytest.mark.parametrize(("rank", "world_size"), [(-1, 2), (2, 2), (0, 0)])
def test_bad_rank(rank: int, world_size: int, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="rank"):
        split_checkpoint(tmp_path, rank, world_size)


def test_describe(tmp_path: Path) -> None:
    tensors = sharded_checkpoint(tmp_path, index=False)
    (tmp_path / "empty.safetensors").touch()
    described = describe(tmp_path)
    assert [path for path, _ in described] == checkpoint_files(tmp_path)[1:]
    assert {entry.name for _, header in described for entry in header.tensors} == set(tensors)
