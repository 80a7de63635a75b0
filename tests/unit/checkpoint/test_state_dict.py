"""What is read of a trainer's state dict, and who is to own which tensor. (Ranks: tests/integration.)"""

from __future__ import annotations

import itertools
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ckpt_engine.checkpoint.packing import TensorSpec
from ckpt_engine.checkpoint.shares import Owned, rounds, share_out
from ckpt_engine.checkpoint.state_dict import Held, Sharding, read_state_dict
from ckpt_engine.errors import CheckpointError, ConfigError

PLAIN = {
    "b": torch.zeros(2, 3),
    "a": torch.zeros(4, dtype=torch.int8),
    "c": torch.zeros((), dtype=torch.bfloat16),
}

reproducible = settings(derandomize=True, print_blob=True, deadline=None, max_examples=60)


def held_of(tensors: dict[str, torch.Tensor], **options: Any) -> Held:  # noqa: ANN401
    return read_state_dict(tensors, **options).held


def test_what_travels_is_the_same_after_a_way_as_json() -> None:
    held = held_of(PLAIN)
    assert list(held.entries) == ["a", "b", "c"]
    assert [(entry.dtype, entry.shape, entry.sharding) for entry in held.entries.values()] == [
        ("int8", (4,), -1),
        ("float32", (2, 3), -1),
        ("bfloat16", (), -1),
    ]
    assert msgspec.json.decode(msgspec.json.encode(held), type=Held) == held


def test_names_and_dtypes() -> None:
    def names(name: str) -> str | None:
        return None if name == "c" else f"model.{name}"

    state = read_state_dict(PLAIN, names, torch.float16)
    assert {name: entry.dtype for name, entry in state.held.entries.items()} == {
        "model.a": "int8",
        "model.b": "float16",
    }
    assert state.tensors["model.b"] is PLAIN["b"]  # cast where it is copied
    some = read_state_dict(PLAIN, names, lambda name: {"model.b": torch.float64}.get(name))
    assert some.held.entries["model.b"].dtype == "float64"


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_what_is_quantised_is_not_cast(dtype: torch.dtype) -> None:
    held = held_of({"w": torch.zeros(3, dtype=dtype)}, dtype=torch.bfloat16)
    assert held.entries["w"].dtype == str(dtype).removeprefix("torch.")


def test_tied_tensors() -> None:
    embedding, other = torch.zeros(4, 3), torch.zeros(4, 3)
    tensors = {"head": embedding, "embed": embedding, "other": other, "row": embedding[:1]}
    assert read_state_dict(tensors).tied == (("embed", "head"),)
    assert read_state_dict({"a": torch.empty(0), "b": torch.empty(0)}).tied == ()
    one = read_state_dict(tensors, lambda name: "embed" if name == "head" else name)
    assert sorted(one.held.entries) == ["embed", "other", "row"]
    assert one.tied == ()


@pytest.mark.parametrize(
    ("tensors", "options", "error", "message"),
    [
        ([("a", torch.zeros(1))], {}, ConfigError, "state_dict is a list: give a mapping"),
        ({"a": 1}, {}, ConfigError, "'a' is a int, not a torch.Tensor: leave it out"),
        (
            {"a": PLAIN["a"], "b": PLAIN["b"]},
            {"rename": lambda name: "x"},
            ConfigError,
            "'a' and 'b' the same name, 'x'",
        ),
        (
            {"a": PLAIN["b"]},
            {"rename": lambda name: ""},
            ConfigError,
            "state_dict: '' is not a tensor's name",
        ),
        (
            {"a": PLAIN["b"]},
            {"dtype": torch.int8},
            ConfigError,
            "dtype=torch.int8 for 'a': give a floating-point",
        ),
        ({"a": PLAIN["b"]}, {"dtype": lambda name: "bf16"}, ConfigError, "dtype='bf16' for 'a'"),
        ({"a": torch.zeros(1, device="meta")}, {}, CheckpointError, "'a' is on the meta device.*to_empty"),
        (
            {"a": torch.zeros(2).to_sparse()},
            {},
            CheckpointError,
            "state_dict: tensor 'a' has layout torch.sparse",
        ),
    ],
)
def test_what_cannot_be_taken(
    tensors: Any,  # noqa: ANN401
    options: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    with pytest.raises(error, match=message):
        read_state_dict(tensors, **options)


def test_every_tensor_has_one_owner_among_those_that_have_it() -> None:
    layers = {f"layers.{number:02}": torch.zeros(10, 10) for number in range(12)}
    held = {0: held_of(layers), 1: held_of(layers | {"own": torch.zeros(3)}), 2: held_of(layers)}
    owned = share_out(held)
    assert sorted(one.spec.name for one in owned) == [*sorted(layers), "own"]
    assert [(one.owner, one.spec.name) for one in owned] == sorted(
        (one.owner, one.spec.name) for one in owned
    )
    of_layers = [one.owner for one in sorted(owned, key=lambda one: one.spec.name)][:12]
    assert of_layers == [0] * 4 + [1] * 4 + [2] * 4  # runs, equal ones
    assert {one.owner for one in owned if one.spec.name == "own"} == {1}


@reproducible
@given(st.lists(st.integers(0, 1000), min_size=1, max_size=40), st.integers(1, 8))
def test_shares_are_about_equal(sizes: list[int], ranks: int) -> None:
    held = held_of({f"{number:03}": torch.zeros(size, dtype=torch.int8) for number, size in enumerate(sizes)})
    loads = [0] * ranks
    for one in share_out(dict.fromkeys(range(ranks), held)):
        loads[one.owner] += one.spec.nbytes
    assert sum(loads) == sum(sizes)
    assert max(loads) <= sum(sizes) / ranks + max(sizes)


@reproducible
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 300)), max_size=40))
def test_rounds_keep_the_order_and_the_limit(parts: list[tuple[int, int]]) -> None:
    owned = sorted(
        (
            Owned(TensorSpec(f"{n:03}", "int8", (size,), size), owner, None)
            for n, (owner, size) in enumerate(parts)
        ),
        key=lambda one: (one.owner, one.spec.name),
    )
    walked = list(rounds(owned, 500))
    for owner in range(3):
        names = [one.spec.name for together in walked for one in together if one.owner == owner]
        assert names == [one.spec.name for one in owned if one.owner == owner]
        for together in walked:
            sizes = [one.spec.nbytes for one in together if one.owner == owner]
            assert len(sizes) <= 1 or sum(sizes) <= 500
    assert all(walked)


MESHES = st.sampled_from(
    [((4,), (0, 1, 2, 3)), ((2, 2), (0, 1, 2, 3)), ((2, 3), (5, 1, 2, 0, 4, 3)), ((2, 2, 2), tuple(range(8)))]
)


@reproducible
@given(MESHES, st.lists(st.integers(0, 7), min_size=1, max_size=3), st.data())
def test_an_owners_pieces_make_the_tensor_whole(
    mesh: tuple[tuple[int, ...], tuple[int, ...]], shape: list[int], data: st.DataObject
) -> None:
    """Each element comes once, from a rank that has it; each holder knows what it gives."""
    sizes, ranks = mesh
    placements = data.draw(st.tuples(*[st.integers(-1, len(shape) - 1) for _ in sizes]))
    sharding = Sharding(ranks=ranks, shape=sizes, placements=placements, device="cpu")
    spec = TensorSpec("w", "int8", tuple(shape), 0)
    for owner in ranks:
        one = Owned(spec, owner, sharding)
        pieces = list(one.pieces())
        seen = torch.zeros(shape, dtype=torch.int8)
        for piece in pieces:
            assert tuple(seen[piece.slices].shape) == piece.shape
            seen[piece.slices] += 1
            assert one.piece_of(piece.holder) == piece
        assert bool((seen == 1).all())
        holders = [piece.holder for piece in pieces]
        assert len(set(holders)) == len(holders)
        assert all(one.piece_of(rank) is None for rank in set(ranks) - set(holders))
    assert Owned(spec, ranks[0], sharding).piece_of(max(ranks) + 1) is None


@pytest.mark.parametrize("parts", [1, 2, 3, 4, 5, 8])
def test_shards_are_those_of_torch_chunk(parts: int) -> None:
    sharding = Sharding(ranks=tuple(range(parts)), shape=(parts,), placements=(0,), device="cpu")
    for size in range(10):
        one = Owned(TensorSpec("w", "int8", (size,), size), 0, sharding)
        chunks = [chunk.tolist() for chunk in torch.arange(size).chunk(parts) if chunk.numel()]
        assert [torch.arange(size)[piece.slices].tolist() for piece in one.pieces()] == chunks


def test_replicas_on_meshes_of_their_own() -> None:
    """Tensor parallel inside each of two replicas: whoever owns it takes its own replica's shards."""
    entry = {"w": ("float32", (4, 4), 0)}
    held = {
        rank: msgspec.convert(
            {
                "entries": {"w": dict(zip(("dtype", "shape", "sharding"), entry["w"], strict=True))},
                "shardings": [
                    {"ranks": pair, "shape": [2], "placements": [0], "device": "cpu"},
                ],
            },
            type=Held,
        )
        for pair in ([0, 1], [2, 3])
        for rank in pair
    }
    (one,) = share_out(held)
    assert {piece.holder for piece in one.pieces()} == ({0, 1} if one.owner < 2 else {2, 3})
    with pytest.raises(
        CheckpointError, match=r"'w' is sharded over ranks \(2, 3\) on rank 2, but rank 3 has no"
    ):
        share_out({rank: held[rank] for rank in range(3)})


def test_what_differs_is_said() -> None:
    two = {0: held_of({"w": torch.zeros(2)}), 1: held_of({"w": torch.zeros(3)})}
    with pytest.raises(
        CheckpointError, match=r"'w' has float32 \(2,\) on rank 0, and float32 \(3,\) on rank 1"
    ):
        share_out(two)
    assert list(itertools.chain(*rounds(share_out({0: held_of({})}), 10))) == []
