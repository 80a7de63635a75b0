"""Odd but legal input is loaded bit by bit, and what cannot travel is refused at once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files_for_tests import contents, expected, random_tensor, raw_file
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ckpt_engine.checkpoint import CheckpointRegistry, describe, load, read_header, split_checkpoint
from ckpt_engine.checkpoint.safetensors_header import MAX_HEADER_NBYTES
from ckpt_engine.errors import CheckpointError, CheckpointFormatError, ConfigError, HostMemoryError
from ckpt_engine.metadata import RankMetas, metas_from_json, metas_to_json
from ckpt_engine.planning.plan import make_plan

ODD_NAMES = [
    "a\0b",
    "\0",
    " ",
    "\n\t",
    "../../etc/passwd",
    "/absolute",
    "model.weight\u202egpj",
    "größe",
    "重み.0",
    "\U0001f600" * 3,
    "\ufeff",
    "__metadata",
    "é",
    "e\u0301",  # the same to the eye, another name
    "x" * 1_000_000,
]


def file_of(path: Path, names: list[str]) -> Path:
    """One tensor of two bytes for each name: its number."""
    header = {
        name: {"dtype": "U8", "shape": [2], "data_offsets": [2 * number, 2 * number + 2]}
        for number, name in enumerate(names)
    }
    return raw_file(path, header, b"".join(number.to_bytes(2, "big") for number in range(len(names))))


def check_names(names: list[str], file: Path) -> None:
    """Through a file, through tensors, through metas as JSON, into a plan."""
    wanted = {name: ("uint8", (2,), number.to_bytes(2, "big")) for number, name in enumerate(names)}
    checkpoint = load("c", [file_of(file, names)])
    assert contents(checkpoint) == wanted
    tensors = {name: torch.tensor(list(data), dtype=torch.uint8) for name, (_, _, data) in wanted.items()}
    assert contents(load("c", named_tensors=tensors)) == wanted
    metas = RankMetas(
        rank=0,
        host="h",
        host_ip="::1",
        device_uuid="CPU-h-0",
        epoch=checkpoint.epoch,
        buffers=checkpoint.buffers,
    )
    assert metas_from_json(metas_to_json({0: metas})) == {0: metas}
    plan = make_plan("c", {0: metas}, slot_nbytes=1024, slot_count=2, budget=1 << 30)
    assert {name for item in plan.buckets for name in item.names()} == set(names)


def test_odd_names(tmp_path: Path) -> None:
    check_names(ODD_NAMES, tmp_path / "a.safetensors")


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)  # the directory may be shared
@given(
    st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), unique=True, max_size=8).filter(
        lambda names: "__metadata__" not in names
    )
)
def test_any_unicode_name(tmp_path: Path, names: list[str]) -> None:
    if names:
        check_names(names, tmp_path / "a.safetensors")


@pytest.mark.parametrize("name", ["\ud800", "a\udfffb", "\udc80"])
def test_lone_surrogates_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="lone surrogate"):
        load("c", named_tensors={name: torch.ones(1)})
    with pytest.raises(CheckpointFormatError, match="lone surrogate"):
        load("c", [file_of(tmp_path / "a.safetensors", [name])])
    held = CheckpointRegistry()
    with pytest.raises(ConfigError, match="lone surrogate"):
        held.register(name)
    assert held.names() == []
    held.close()


def test_a_pair_of_surrogates_in_json_is_one_character(tmp_path: Path) -> None:
    header = b'{"\\ud83d\\ude00":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'
    assert contents(load("c", [raw_file(tmp_path / "a", header, b"x")])) == {
        "\U0001f600": ("uint8", (1,), b"x")
    }


def test_a_large_header(tmp_path: Path) -> None:
    """5 MB of names, and as many spaces after them."""
    count = 50_000
    header = {
        f"layers.{number}.{'x' * 40}": {"dtype": "I8", "shape": [], "data_offsets": [number, number + 1]}
        for number in range(count)
    }
    text = json.dumps(header).encode()
    path = raw_file(tmp_path / "a.safetensors", text + b" " * len(text), bytes(i % 251 for i in range(count)))
    held = load("c", [path])
    assert sum(len(buffer.tensors) for buffer in held.buffers) == count
    number = 40_007
    place = next(t for b in held.buffers for t in b.tensors if t.name.startswith(f"layers.{number}."))
    assert held.view(0, place.offset, 1).tolist() == [number % 251]
    assert place.shape == ()


def test_headers_at_the_limit_are_read_no_further(tmp_path: Path) -> None:
    """A file may claim 100 MB of header: what is not JSON there is refused, over that nothing is read."""
    path = tmp_path / "a.safetensors"
    with path.open("wb") as file:
        file.write(MAX_HEADER_NBYTES.to_bytes(8, "little"))
        file.truncate(MAX_HEADER_NBYTES + 8)  # sparse zeros
    with pytest.raises(CheckpointFormatError, match="not valid JSON"):
        read_header(path)


WRONG: dict[str, tuple[Any, bytes, str]] = {
    "past the end": (
        {"w": {"dtype": "F32", "shape": [9], "data_offsets": [0, 36]}}, b"1234", "past the end",
    ),
    "overlapping": (
        {
            "w": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]},
            "v": {"dtype": "U8", "shape": [3], "data_offsets": [1, 4]},
        },
        b"1234",
        "overlaps",
    ),
    "negative": ({"w": {"dtype": "U8", "shape": [4], "data_offsets": [-4, 0]}}, b"1234", "data_offsets"),
    "bad JSON": (b'{"w": {"dtype"', b"", "not valid JSON"),
    "name twice": (b'{"w": {}, "w": {}}', b"", "there twice"),
    "unknown dtype": ({"w": {"dtype": "Q4", "shape": [4], "data_offsets": [0, 4]}}, b"1234", "unknown"),
}  # fmt: skip


@pytest.mark.parametrize("use_shared_memory_pool", [False, True])
@pytest.mark.parametrize("wrong", WRONG)
def test_a_bad_file_among_good_ones_registers_nothing(
    wrong: str, use_shared_memory_pool: bool, tmp_path: Path
) -> None:
    header, data, message = WRONG[wrong]
    good = file_of(tmp_path / "good.safetensors", ["a", "b"])
    bad = raw_file(tmp_path / "bad.safetensors", header, data)
    held = CheckpointRegistry()
    for files in ([good, bad], [bad, good]):
        with pytest.raises(CheckpointFormatError, match=message) as caught:
            held.register("c", files=files, use_shared_memory_pool=use_shared_memory_pool)
        assert str(bad) in str(caught.value)
        assert held.names() == []
        assert held._pool.nbytes == 0
    with pytest.raises(CheckpointFormatError, match=message):
        describe(tmp_path)
    held.register("c", files=[good], use_shared_memory_pool=use_shared_memory_pool)
    held.close()


def test_out_of_host_memory_registers_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    held = CheckpointRegistry()
    with monkeypatch.context() as patch:
        patch.setattr("ckpt_engine.checkpoint.arena.available_host_memory", lambda: 1000)
        with pytest.raises(HostMemoryError, match="4000 bytes"):
            held.register("c", named_tensors={"w": torch.zeros(1000)})
    assert held.names() == []
    held.register("c", named_tensors={"w": torch.zeros(1000)})
    held.close()


def test_a_file_of_more_bytes_than_there_are(tmp_path: Path) -> None:
    """Sparse: 16 TiB that no host can hold, refused before anything is read."""
    path = tmp_path / "a.safetensors"
    nbytes = 8 * 2**40
    header = {"w": {"dtype": "U8", "shape": [nbytes], "data_offsets": [0, nbytes]}}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + nbytes)
    with pytest.raises(HostMemoryError, match="unregister a checkpoint or use more hosts"):
        load("c", [path])


def test_splits_of_odd_names_are_disjoint(tmp_path: Path) -> None:
    names = [name for name in ODD_NAMES if len(name) < 1000]
    file_of(tmp_path / "a.safetensors", names)
    (tmp_path / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": dict.fromkeys(names, "a.safetensors")})
    )
    shares = [load("c", split_checkpoint(tmp_path, rank, 3)) for rank in range(3)]
    held = [name for share in shares for name in contents(share)]
    assert sorted(held) == sorted(names)


@pytest.mark.parametrize(
    "dtype", ["bfloat16", "float16", "float32", "float8_e4m3fn", "float8_e5m2", "int8", "int64", "bool"]
)
@pytest.mark.parametrize("pooled", [False, True])
def test_dtypes_through_the_registry(dtype: str, pooled: bool) -> None:
    tensors = {
        f"{number}": random_tensor(dtype, shape, seed=number)
        for number, shape in enumerate([(), (0,), (0, 5), (1,), (17, 3)])
    }
    held = CheckpointRegistry()
    for _ in range(2):  # the second time into memory with other bytes in it
        checkpoint = held.register("c", named_tensors=tensors, use_shared_memory_pool=pooled)
        assert contents(checkpoint) == expected(tensors)
        held.unregister("c")
        with pytest.raises(CheckpointError):
            checkpoint.view(0, 0, 1)
    held.close()


def test_tensors_whose_bits_a_copy_must_flip() -> None:
    """Lazy conjugates and negatives share the bits of what they come from."""
    values = torch.view_as_complex(torch.arange(1.0, 9.0).view(4, 2))
    negative = values.conj().imag
    assert negative.is_neg()
    tensors = {
        "conj": values.conj(),
        "negative": negative,
        "plain": values,
        "row": values.conj().view(2, 2)[1],
        "scalar": negative[0],
    }
    wanted = expected({name: tensor.resolve_conj().resolve_neg() for name, tensor in tensors.items()})
    assert contents(load("c", named_tensors=tensors)) == wanted


def test_tensors_that_overlap_or_have_an_offset() -> None:
    base = random_tensor("int16", (100,), seed=9)
    tensors = {
        "first": base[:60],
        "second": base[40:],
        "window": base.as_strided((3, 5), (2, 1), 7),
        "column": base.view(10, 10)[:, 3],
        "transposed": base.view(10, 10).t(),
    }
    assert contents(load("c", named_tensors=tensors)) == expected(tensors)
