"""TP-sharded `.npy` files: what is loaded is what torch.cat makes of the shards."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch
from checkpoint_files_for_tests import contents, expected, open_files, random_tensor
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from ckpt_engine.checkpoint import (
    ArenaPool,
    FileSelection,
    HostCheckpoint,
    checkpoint_files,
    describe,
    load,
    split_checkpoint,
    strided_reads,
)
from ckpt_engine.errors import CheckpointError, CheckpointFormatError
from ckpt_engine.metadata import DTYPE_NBYTES
from tests.support.npy_files import NpyFile, described, write_sidecar

DTYPES = sorted(DTYPE_NBYTES)


def write_layer(
    directory: Path, layer: int, tensors: dict[str, tuple[torch.Tensor, int]], tp: int, ep: int | None = None
) -> list[Path]:
    """Cuts whole tensors into `tp` equal shards; `ep` files each of which has its share of the tensors."""
    paths = []
    for rank in range(tp):
        for expert in range(ep or 1):
            file = NpyFile()
            for number, (name, (tensor, dim)) in enumerate(tensors.items()):
                if number % (ep or 1) == expert:
                    shard = tensor if dim < 0 else tensor.chunk(tp, dim)[rank]
                    file.tensors.append((name, shard, dim))
            suffix = "" if ep is None else f".{expert}"
            paths.append(file.write(directory / f"model.{layer}.{rank}{suffix}.npy"))
    return paths


def whole(tensors: dict[str, tuple[torch.Tensor, int]]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, (tensor, _) in tensors.items()}


def a_layer(layer: int = 0, tp: int = 2) -> dict[str, tuple[torch.Tensor, int]]:
    return {
        f"{layer}.rows": (random_tensor("bfloat16", (4 * tp, 24), 1 + layer), 0),
        f"{layer}.columns": (random_tensor("float8_e4m3fn", (6, 8 * tp), 2 + layer), 1),
        f"{layer}.middle": (random_tensor("float32", (3, 2 * tp, 5), 3 + layer), 1),
        f"{layer}.norm": (random_tensor("bfloat16", (24,), 4 + layer), -1),
        f"{layer}.scale": (random_tensor("float32", (), 5 + layer), -1),
    }


@st.composite
def sharded(draw: st.DrawFn) -> tuple[str, list[torch.Tensor], int]:
    """A dtype, shards that may differ along the dimension that is returned too."""
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.integers(0, 5), min_size=1, max_size=4))
    dim = draw(st.integers(0, len(shape) - 1))
    sizes = draw(st.lists(st.integers(0, 40), min_size=1, max_size=5))
    seed = draw(st.integers(0, 2**31))
    shards = []
    for number, size in enumerate(sizes):
        shape[dim] = size
        shards.append(random_tensor(dtype, tuple(shape), seed + number))
    return dtype, shards, dim


@settings(max_examples=60, deadline=None)
@given(
    parts=st.lists(sharded(), min_size=1, max_size=4),
    direct=st.sampled_from([1, 8, 1 << 20]),
    piece=st.sampled_from([64, 1 << 24]),
)
def test_is_what_torch_cat_makes(
    parts: list[tuple[str, list[torch.Tensor], int]], direct: int, piece: int
) -> None:
    """Every dimension and dtype, any number of shards and of layers, read in each of the ways."""
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        patch.setattr(strided_reads, "_DIRECT_NBYTES", direct)
        patch.setattr(strided_reads, "_SEGMENT_NBYTES", 32)
        patch.setattr(strided_reads, "_SCRATCH_NBYTES", 48)
        patch.setattr(strided_reads, "PIECE_NBYTES", piece)
        directory, paths, tensors = Path(name), [], {}
        for layer, (_, shards, dim) in enumerate(parts):
            tensors[f"t{layer}"] = (
                torch.cat([shard.view(torch.uint8) for shard in shards], dim)
                if (shards[0].element_size() == 1)
                else torch.cat(shards, dim)
            )
            tensors[f"t{layer}"] = tensors[f"t{layer}"].view(shards[0].dtype)
            for tp, shard in enumerate(shards):
                file = NpyFile([(f"t{layer}", shard, dim)])
                paths.append(file.write(directory / f"model.{layer}.{tp}.npy", tp_size=len(shards)))
        assert contents(load("c", list(reversed(paths)))) == expected(tensors)


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("ep", [None, 1, 3])
def test_layers_of_several_tensors(tmp_path: Path, tp: int, ep: int | None) -> None:
    tensors = {layer: a_layer(layer, tp) for layer in range(3)}
    paths = [path for layer in tensors for path in write_layer(tmp_path, layer, tensors[layer], tp, ep)]
    before = open_files()
    checkpoint = load("c", paths)
    assert contents(checkpoint) == expected(
        whole({k: v for layer in tensors.values() for k, v in layer.items()})
    )
    assert open_files() == before


@pytest.mark.parametrize("rows", [3, 300])
@pytest.mark.parametrize("run", [2, 4096, 40_000, 1 << 20])
def test_runs_of_every_length_at_their_real_limits(tmp_path: Path, rows: int, run: int) -> None:
    if rows * run > 1 << 24:
        rows = 3
    tensors = {"w": (random_tensor("bfloat16", (rows, run // 2 * 3), 7), 1)}
    checkpoint = load("c", write_layer(tmp_path, 0, tensors, 3))
    assert contents(checkpoint) == expected(whole(tensors))


def test_beside_safetensors_and_tensors_and_into_a_pool(tmp_path: Path) -> None:
    save_file({"a": torch.arange(7)}, tmp_path / "x.safetensors")
    paths = [tmp_path / "x.safetensors", *write_layer(tmp_path, 0, a_layer(), 2)]
    more = {"z": torch.ones(3)}
    pool = ArenaPool()
    all_of_it = expected(whole(a_layer()) | {"a": torch.arange(7)} | more)
    for _ in range(2):
        checkpoint = load("c", paths, more, pool=pool)
        assert contents(checkpoint) == all_of_it
        checkpoint.close()
    with pytest.raises(CheckpointFormatError, match=r"'0\.norm' is there twice: in .*model\.0\.0\.npy"):
        load("c", paths, {"0.norm": torch.zeros(1)})
    pool.close()


def test_a_selection_of_tensors(tmp_path: Path) -> None:
    paths = write_layer(tmp_path, 0, a_layer(), 2)
    some = [FileSelection(path, frozenset({"0.columns", "0.norm"})) for path in paths]
    assert contents(load("c", some)).keys() == {"0.columns", "0.norm"}
    with pytest.raises(CheckpointFormatError, match=r"has no tensor 'nope'"):
        load("c", [FileSelection(paths[0], frozenset({"nope"}))])


def test_a_directory_is_split_by_layer(tmp_path: Path) -> None:
    tensors = {layer: a_layer(layer) for layer in range(5)}
    for layer, of_layer in tensors.items():
        write_layer(tmp_path, layer, of_layer, 2, 2)
    (tmp_path / "model.9.0.npy.txt").touch()
    assert len(checkpoint_files(tmp_path)) == len(describe(tmp_path)) == 20
    shares = [split_checkpoint(tmp_path, rank, 2) for rank in range(2)]
    held: dict[str, object] = {}
    for share in shares:
        part = contents(load("c", share))
        assert part and not part.keys() & held.keys()
        held |= part
    assert held == expected(whole({k: v for layer in tensors.values() for k, v in layer.items()}))


def test_other_arrays_beside_a_checkpoint_are_left_alone(tmp_path: Path) -> None:
    save_file({"a": torch.arange(7)}, tmp_path / "x.safetensors")
    (tmp_path / "statistics.npy").write_bytes(b"?")
    assert checkpoint_files(tmp_path) == [tmp_path / "x.safetensors"]
    write_layer(tmp_path, 0, a_layer(), 2)
    with pytest.raises(CheckpointError, match=r"statistics\.npy has no sidecar"):
        describe(tmp_path)


# Shards that are missing, or disagree


def load_all(directory: Path) -> HostCheckpoint:
    return load("c", checkpoint_files(directory))


def test_a_missing_shard(tmp_path: Path) -> None:
    write_layer(tmp_path, 3, a_layer(3, 4), 4)
    (tmp_path / "model.3.2.npy").unlink()
    with pytest.raises(
        CheckpointFormatError, match=r"'3\.rows'.* shard 2 of 4 is missing: model\.3\.2\.npy is"
    ):
        load_all(tmp_path)


def test_the_last_shard_is_missed_where_the_sidecar_knows(tmp_path: Path) -> None:
    for tp in range(2):
        NpyFile([("w", torch.ones(2, 2), 0)]).write(tmp_path / f"model.0.{tp}.npy", tp_size=3)
    with pytest.raises(CheckpointFormatError, match=r"shard 2 of 3 is missing: model\.0\.2\.npy"):
        load_all(tmp_path)


def test_a_tensor_that_one_shard_lacks(tmp_path: Path) -> None:
    NpyFile([("w", torch.ones(2, 2), 0), ("x", torch.ones(2), -1)]).write(tmp_path / "model.0.0.npy")
    NpyFile([("x", torch.ones(2), -1)]).write(tmp_path / "model.0.1.npy")
    with pytest.raises(CheckpointFormatError, match=r"'w'.*shard 1 of 2 is missing.*or does not have it"):
        load_all(tmp_path)


@pytest.mark.parametrize(
    ("one", "other", "message"),
    [
        (
            (torch.ones(2, 2), 0),
            (torch.ones(2, 3), 0),
            r"shape is \[2, 2\] in .*0\.npy, \[2, 3\] in .*1\.npy",
        ),
        ((torch.ones(2, 2), 0), (torch.ones(2), 0), r"shape is \[2, 2\] in .*, \[2\]"),
        ((torch.ones(2, 2), 0), (torch.ones(2, 2).double(), 0), r"dtype is float32 in .*, float64 in"),
        ((torch.ones(2, 2), 0), (torch.ones(2, 2), 1), r"concat_dim is 0 in .*, 1 in"),
        ((torch.ones(2, 2), -1), (torch.ones(2, 2), 1), r"concat_dim is -1 in .*, 1 in"),
        ((torch.ones(2, 2), -1), (torch.ones(4, 2), -1), r"shape is \[2, 2\] in .*, \[4, 2\]"),
        ((torch.ones(2, 2), -1), (torch.zeros(2, 2), -1), r"'w': its bytes in .*0\.npy are others than in"),
    ],
)
def test_shards_that_disagree(
    tmp_path: Path, one: tuple[torch.Tensor, int], other: tuple[torch.Tensor, int], message: str
) -> None:
    NpyFile([("w", *one)]).write(tmp_path / "model.0.0.npy")
    NpyFile([("w", *other)]).write(tmp_path / "model.0.1.npy")
    before = open_files()
    with pytest.raises(CheckpointFormatError, match=message):
        load_all(tmp_path)
    assert open_files() == before


def test_replicas_of_a_shard_in_files_of_several_ep(tmp_path: Path) -> None:
    halves = [torch.ones(2, 2), torch.zeros(2, 2)]
    for tp in range(2):
        for ep in range(2):
            NpyFile([("w", halves[tp], 1), (f"e{ep}", torch.full((3,), tp), 0)]).write(
                tmp_path / f"model.0.{tp}.{ep}.npy"
            )
    assert contents(load_all(tmp_path)) == expected(
        {"w": torch.cat(halves, 1)} | {f"e{ep}": torch.tensor([0, 0, 0, 1, 1, 1]) for ep in range(2)}
    )
    NpyFile([("w", torch.ones(2, 2), 1), ("e1", torch.ones(3).long(), 0)]).write(tmp_path / "model.0.1.1.npy")
    with pytest.raises(CheckpointFormatError, match=r"'w': its bytes in .*1\.0\.npy are others.*1\.1\.npy"):
        load_all(tmp_path)
    NpyFile([("w", torch.ones(2, 3), 1), ("e1", torch.ones(3).long(), 0)]).write(tmp_path / "model.0.1.1.npy")
    with pytest.raises(CheckpointFormatError, match=r"'w': shape is \[2, 2\] in .*, \[2, 3\]"):
        load_all(tmp_path)


def test_a_tensor_of_two_layers_and_a_file_given_twice(tmp_path: Path) -> None:
    paths = [NpyFile([("w", torch.ones(2), 0)]).write(tmp_path / f"model.{i}.0.npy") for i in range(2)]
    with pytest.raises(CheckpointFormatError, match=r"'w' is there twice: in .*0\.0\.npy .*1\.0\.npy"):
        load("c", paths)
    with pytest.raises(CheckpointFormatError, match=r"model\.0\.0\.npy is given twice"):
        load("c", [paths[0], paths[0]])
    (tmp_path / "more").mkdir()
    twin = NpyFile([("w", torch.ones(2), 0)]).write(tmp_path / "more" / "model.0.0.npy")
    with pytest.raises(CheckpointFormatError, match=r"are of the same layer, tp and ep"):
        load("c", [paths[0], twin])


def test_sidecars_that_disagree_about_tp_size(tmp_path: Path) -> None:
    for tp in range(2):
        NpyFile([("w", torch.ones(2), 0)]).write(tmp_path / f"model.0.{tp}.npy", tp_size=2 + tp)
    with pytest.raises(CheckpointFormatError, match=r"disagree: tp_size 2, and tp_size 3"):
        load_all(tmp_path)
    NpyFile([("w", torch.ones(2), 0)]).write(tmp_path / "model.0.0.npy", tp_size=1)
    NpyFile([("w", torch.ones(2), 0)]).write(tmp_path / "model.0.1.npy")
    with pytest.raises(
        CheckpointFormatError, match=r"1\.npy: is of tensor-parallel rank 1, but .* tp_size 1"
    ):
        load_all(tmp_path)


def test_a_shape_of_all_shards_that_overflows(tmp_path: Path) -> None:
    for tp in range(2):
        path = NpyFile([("w", torch.empty(0), 0)]).write(tmp_path / f"model.0.{tp}.npy")
        sidecar = described("w", torch.empty(0), 1) | {"shape": [0, 2**60]}
        write_sidecar(path, [sidecar])
    with pytest.raises(CheckpointFormatError, match=r"of all its shards overflows"):
        load_all(tmp_path)


@pytest.mark.parametrize("run", [256, 40_000])
def test_a_file_that_is_cut_meanwhile(tmp_path: Path, run: int, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = write_layer(tmp_path, 0, {"w": (random_tensor("uint8", (64, 2 * run)), 1)}, 2)
    real = strided_reads.StridedPiece.read

    def cut(self: strided_reads.StridedPiece, descriptor: int, path: Path, arena: object) -> None:
        with paths[1].open("r+b") as file:
            file.truncate(1000)
        real(self, descriptor, path, arena)  # type: ignore[arg-type]

    monkeypatch.setattr(strided_reads.StridedPiece, "read", cut)
    before = open_files()
    with pytest.raises(CheckpointFormatError, match=r"model\.0\.1\.npy: truncated while reading tensor 'w'"):
        load("c", paths)
    assert open_files() == before
