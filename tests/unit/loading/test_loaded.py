"""What models hold of an update's tensors is read back from where a recorded load put them; what cannot be
told is left out, never taken for right."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch

from ckpt_engine.ipc.messages import TensorLayout
from ckpt_engine.loading.loaded import LoadedTensors, _are_apart
from ckpt_engine.loading.recording import Recording
from ckpt_engine.loading.rehearsal import named_parameters, rehearse

SEED = 20261128
NamedTensors = Iterable[tuple[str, torch.Tensor]]


def parameter(*shape: int, dtype: torch.dtype = torch.float32) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.zeros(shape, dtype=dtype), requires_grad=False)


class Packed(torch.nn.Module):
    """Packs what it has loaded, in place."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = parameter(4, 4)
        self.quant_method = object()


class Model(torch.nn.Module):
    """Loads in all the ways there are."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = parameter(8)
        self.qkv = parameter(12, 8)  # of q, k and v
        self.embedding = parameter(16, 8)  # padded
        self.rows = parameter(8, 4)  # the second half of each of `columns`' rows
        self.wide = parameter(4, 8)  # from another dtype
        self.scaled = parameter(4, 8)  # computed with once it is loaded
        self.doubled = parameter(4, 8)  # a computed tensor
        self.tied = self.norm
        self.first = parameter(3, 8)  # two parameters, of one tensor
        self.second = parameter(5, 8)
        self.turned = parameter(8, 6)  # a transposed tensor
        self.packed = Packed()
        self.other_name = self.packed  # of the same module

    def load_weights(self, weights: NamedTensors) -> None:
        for name, tensor in weights:
            if name in ("norm", "wide", "scaled"):
                getattr(self, name).data.copy_(tensor)
            elif name in ("q", "k", "v"):
                self.qkv.data.narrow(0, 4 * "qkv".index(name), 4).copy_(tensor)
            elif name == "embedding":
                self.embedding.data[:12].copy_(tensor)
                self.embedding.data[12:].fill_(0)
            elif name == "columns":
                self.rows.data.copy_(tensor.narrow(1, 4, 4))
            elif name == "doubled":
                self.doubled.data.copy_(tensor * 2)
            elif name == "cut":
                self.first.data.copy_(tensor[:3])
                self.second.data.copy_(tensor[3:])
            elif name == "turned":
                self.turned.data.copy_(tensor.t())
            elif name == "packed":
                self.packed.weight.data.copy_(tensor)
            if name == "scaled":
                self.scaled.data.mul_(2)


SHAPES: dict[str, tuple[int, ...]] = {
    "norm": (8,), "q": (4, 8), "k": (4, 8), "v": (4, 8), "embedding": (12, 8), "columns": (8, 8),
    "wide": (4, 8), "scaled": (4, 8), "doubled": (4, 8), "cut": (8, 8), "turned": (6, 8), "packed": (4, 4),
    "unknown": (2,),
}  # fmt: skip
WHOLE = ("norm", "q", "k", "v", "embedding", "cut", "turned")


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(SEED)
    drawn = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    return drawn | {"wide": drawn["wide"].bfloat16()}


def rehearsed(model: Model, tensors: dict[str, torch.Tensor]) -> Recording:
    layouts = [
        TensorLayout(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), 0, tensor.nbytes)
        for name, tensor in tensors.items()
    ]
    recording = rehearse(model, [layouts])
    model.load_weights(tensors.items())
    return recording


def recorded(model: Model, tensors: dict[str, torch.Tensor]) -> Recording:
    """The real load, out of one buffer with a hole before each tensor."""
    recording = Recording(named_parameters(model))
    ring = torch.zeros(1 << 14)
    views, end = {}, 64
    for name, tensor in tensors.items():
        views[name] = ring.view(tensor.dtype).as_strided(
            tensor.shape, tensor.stride(), end * 4 // tensor.itemsize
        )
        views[name].copy_(tensor)
        recording.add_source(name, views[name])
        end += tensor.numel() + 64
    with recording.at_work():
        model.load_weights(views.items())
    ring.fill_(7)
    recording.drop_sources()
    return recording


@pytest.mark.parametrize("record", [rehearsed, recorded])
def test_what_was_copied_as_it_is_is_read_back(record: object, tensors: dict[str, torch.Tensor]) -> None:
    model = Model()
    recording = record(model, tensors)  # type: ignore[operator]
    loaded = LoadedTensors(lambda: [(model, recording, str)])
    for name in SHAPES:
        held = loaded(name)
        assert (len(held) > 0) == (name in WHOLE), name
        assert all(torch.equal(each, tensors[name]) for each in held), name
    assert {name for name in SHAPES if loaded.arriving(name, tensors[name])} == {"columns"}
    (arriving,), (kept,) = loaded.arriving("columns", tensors["columns"]), loaded.kept("columns")
    assert torch.equal(arriving, kept)
    assert torch.equal(kept, model.rows)


@pytest.mark.parametrize("name", WHOLE)
def test_a_bit_that_flips_afterwards_is_seen(name: str, tensors: dict[str, torch.Tensor]) -> None:
    model = Model()
    recording = rehearsed(model, tensors)
    own = {"q": "qkv", "k": "qkv", "v": "qkv", "cut": "second"}.get(name, name)
    row = 4 * "qkv".index(name) if own == "qkv" else 2
    getattr(model, own).data.view(torch.int32)[row] ^= 1
    loaded = LoadedTensors(lambda: [(model, recording, str)])
    for each in WHOLE:
        assert all(torch.equal(held, tensors[each]) == (each != name) for held in loaded(each)), each


def test_a_parameter_that_was_laid_out_anew_is_left_out(tensors: dict[str, torch.Tensor]) -> None:
    model = Model()
    recording = rehearsed(model, tensors)
    model.qkv = torch.nn.Parameter(model.qkv.data.t().contiguous().t(), requires_grad=False)
    model.rows = torch.nn.Parameter(torch.empty(0), requires_grad=False)
    loaded = LoadedTensors(lambda: [(model, recording, str)])
    assert [name for name in WHOLE if not loaded(name)] == ["q", "k", "v"]
    assert loaded.arriving("columns", tensors["columns"])
    assert loaded.kept("columns") == []


def test_where_two_models_take_a_tensor_both_must_tell(tensors: dict[str, torch.Tensor]) -> None:
    main, drafter = Model(), Model()
    recordings = [rehearsed(model, tensors) for model in (main, drafter)]
    loaded = LoadedTensors(lambda: [(main, recordings[0], str), (drafter, recordings[1], str)])
    drafter.norm.data[3] += 1
    assert [torch.equal(held, tensors["norm"]) for held in loaded("norm")].count(False) >= 1
    drafter.qkv = torch.nn.Parameter(torch.empty(0), requires_grad=False)
    loaded = LoadedTensors(lambda: [(main, recordings[0], str), (drafter, recordings[1], str)])
    assert not loaded("q")
    assert loaded("embedding")
    renamed = LoadedTensors(lambda: [(main, recordings[0], lambda name: name.removeprefix("model."))])
    assert torch.equal(renamed("model.norm")[0], tensors["norm"])


def test_what_was_written_twice_is_told_by_the_last_write() -> None:
    class Twice(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = parameter(4, 4), parameter(4, 4)

        def load_weights(self, weights: NamedTensors) -> None:
            for name, tensor in weights:
                self.one.data.copy_(tensor)
                if name == "a":
                    self.other.data.copy_(tensor)
                else:
                    self.other.data[1:3].copy_(tensor[1:3])

    model = Twice()
    tensors = {name: torch.full((4, 4), float(value)) for name, value in (("a", 1), ("b", 2))}
    recording = recorded(model, tensors)  # type: ignore[arg-type]
    loaded = LoadedTensors(lambda: [(model, recording, str)])
    assert loaded("a") == []
    assert torch.equal(loaded("b")[0], tensors["b"])


@pytest.mark.parametrize(
    ("one", "other", "apart"),
    [
        ((0, (2, 8), (8, 1)), (16, (2, 8), (8, 1)), True),
        ((0, (2, 8), (8, 1)), (8, (2, 8), (8, 1)), False),
        ((0, (4, 4), (8, 1)), (4, (4, 4), (8, 1)), True),
        ((0, (4, 5), (8, 1)), (4, (4, 4), (8, 1)), False),
        ((0, (4, 4), (8, 1)), (4, (4, 4), (1, 8)), False),
        ((0, (2, 2, 2), (16, 4, 1)), (10, (2, 2, 2), (16, 4, 1)), True),
    ],
)
def test_regions_that_are_apart(
    one: tuple[int, tuple[int, ...], tuple[int, ...]],
    other: tuple[int, tuple[int, ...], tuple[int, ...]],
    apart: bool,
) -> None:
    assert _are_apart([one, other]) == _are_apart([other, one]) == apart
