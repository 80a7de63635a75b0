"""What is found out about an update without an engine: models of plain torch, loaded in odd ways."""

from __future__ import annotations

import gc
import re
import threading
import weakref
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import ClassVar

import pytest
import torch
from msgspec.structs import replace

from ckpt_engine.ipc.messages import TensorLayout
from ckpt_engine.loading.completeness import Rules, check_complete, check_names, check_shapes, parameters_in
from ckpt_engine.loading.recording import Recording
from ckpt_engine.loading.rehearsal import (
    NotRehearsable,
    WeightsMismatch,
    buckets_of,
    named_parameters,
    rehearse,
)

NamedTensors = Iterable[tuple[str, torch.Tensor]]


def layout(name: str, *shape: int, dtype: str = "float32") -> TensorLayout:
    numel = torch.Size(shape).numel()
    return TensorLayout(name=name, dtype=dtype, shape=shape, offset=0, nbytes=numel * 4)


class Fused(torch.nn.Module):
    """One parameter of two tensors, which one call must see; a scalar; a tensor that is no parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.fused = torch.nn.Parameter(torch.zeros(6, 4), requires_grad=False)
        self.scale = torch.nn.Parameter(torch.zeros(1), requires_grad=False)
        self.derived: torch.Tensor | None = None

    def load_weights(self, weights: NamedTensors) -> None:
        waiting: dict[str, torch.Tensor] = {}
        for name, tensor in weights:
            if name == "scale":
                self.scale.data.fill_(tensor.item())
            elif name in ("a", "b"):
                waiting[name] = tensor
            if len(waiting) == 2:
                self.fused.data.copy_(torch.cat([waiting.pop("a"), waiting.pop("b")], dim=0))
        self.derived = self.fused.data * 2


FUSED = [layout("a", 2, 4), layout("scale", 1), layout("b", 4, 4)]


def test_tensors_that_make_one_parameter_belong_together() -> None:
    model = Fused()
    recording = rehearse(model, [FUSED])
    assert recording.together == {frozenset({"a", "b"})}
    assert {name: written.complete for name, written in recording.parameters.items()} == {
        "fused": True,
        "scale": True,
    }
    assert recording.read == {"a": 24, "b": 24, "scale": 1}


def test_the_model_is_as_before() -> None:
    model = Fused()
    kept = torch.ones(1)
    model.derived = kept
    before = dict(model.named_parameters())
    rehearse(model, [FUSED])
    assert model.derived is kept
    assert all(parameter is before[name] for name, parameter in model.named_parameters())
    assert not model.fused.any()


def test_the_model_is_as_before_when_it_refuses() -> None:
    model = Fused()
    before = dict(model.named_parameters())
    with pytest.raises(WeightsMismatch, match=r"Fused cannot load tensor 'b' \(float32, \[5, 4\]\)"):
        rehearse(model, [[layout("a", 2, 4), layout("b", 5, 4)]])
    assert all(parameter is before[name] for name, parameter in model.named_parameters())


class Threaded(torch.nn.Module):
    """Loads in threads, as some engines' larger models do, and is tied."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Parameter(torch.zeros(8, 4), requires_grad=False)
        self.head = self.embed
        self.rest = torch.nn.Parameter(torch.zeros(4, 4), requires_grad=False)

    def load_weights(self, weights: NamedTensors) -> None:
        parameters = dict(self.named_parameters())
        with ThreadPoolExecutor(2) as pool:
            list(
                pool.map(
                    lambda item: parameters[item[0]].data.copy_(item[1][: len(parameters[item[0]])]),
                    [item for item in weights if item[0] in parameters],
                )
            )


def test_threads_are_seen_and_tied_parameters_are_one() -> None:
    tensors = [layout("embed", 8, 4), layout("rest", 4, 4), layout("more", 3)]
    recording = rehearse(Threaded(), [tensors])
    check_complete(recording, Rules())
    with pytest.raises(WeightsMismatch, match="no place for more:"):
        check_names(tensors, recording.taken, Rules())
    check_names(tensors, recording.taken, Rules(ignored=("m*",)))


def test_a_tensor_that_is_too_large_is_not_cut() -> None:
    tensors = [layout("embed", 8, 4), layout("rest", 8, 4)]
    recording = rehearse(Threaded(), [tensors])
    with pytest.raises(WeightsMismatch, match=r"rest \[8, 4\] \(the model takes 16 of 32 elements\)"):
        check_shapes(tensors, recording, (), Rules())
    check_shapes(tensors, recording, (), Rules(parallel_size=2))


def test_a_recording_of_the_real_load() -> None:
    model = Threaded()
    recording = Recording(named_parameters(model))
    for name, tensor in (("embed", torch.ones(8, 4)), ("rest", torch.ones(2, 4))):
        recording.add_source(name, tensor)
        with recording.at_work():
            model.load_weights([(name, tensor)] if name == "embed" else [])
        recording.drop_sources()
    assert model.head.all()
    assert recording.read == {"embed": 32, "rest": 0}
    with pytest.raises(WeightsMismatch, match="does not fill rest:"):
        check_complete(recording, Rules())
    with pytest.raises(WeightsMismatch, match="a part of its tensors needs all"):
        check_complete(recording, Rules(partial=True))


class Inspecting(torch.nn.Module):
    """Decides by the values that it gets, which tensors without storage do not have."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(2), requires_grad=False)

    def load_weights(self, weights: NamedTensors) -> None:
        for _, tensor in weights:
            if bool((tensor > 0).any()):
                self.weight.data.copy_(tensor)


def test_a_model_that_needs_values_cannot_be_rehearsed() -> None:
    with pytest.raises(NotRehearsable, match="Inspecting needs values"):
        rehearse(Inspecting(), [[layout("weight", 2)]])


def test_what_other_ranks_hold_and_what_only_a_drafter_has() -> None:
    tensors = [
        *(layout("embed", 8, 4), layout("rest", 4, 4)),
        *(layout(f"model.layers.{index}.mlp.experts.{index}.w", 4) for index in range(3)),
        layout("mtp.norm.weight", 4),
    ]
    recording = rehearse(Threaded(), [tensors])
    recording.read["model.layers.0.mlp.experts.0.w"] = 4
    with pytest.raises(WeightsMismatch) as caught:
        check_names(tensors, recording.taken, Rules(drafter_layers=range(2, 3)))
    assert "no place for model.layers.1.mlp.experts.1.w, mtp.norm.weight:" in str(caught.value)
    check_names(tensors, recording.taken, Rules(shares=True, passed_over=re.compile("^mtp")))
    with pytest.raises(WeightsMismatch, match=r"no place for mtp.norm.weight:"):
        check_names(tensors, recording.taken, Rules(shares=True))
    # Nobody's, if they have two layers together.
    with pytest.raises(WeightsMismatch, match=r"no place for model.layers.2.mlp.experts.2.w:"):
        check_names(
            tensors, recording.taken, Rules(shares=True, layer_count=2, passed_over=re.compile("^mtp"))
        )


class Halves(torch.nn.Module):
    """Two tensors make a parameter, each at its place."""

    packed: ClassVar = {"qkv": ["q", "kv"]}

    def __init__(self) -> None:
        super().__init__()
        self.qkv = torch.nn.Linear(4, 6, bias=False)
        self.norm = torch.nn.LayerNorm(4, elementwise_affine=False)
        self.tied = self.qkv

    def load_weights(self, weights: NamedTensors) -> None:
        for name, tensor in weights:
            start = 0 if name == "q.weight" else 4
            self.qkv.weight.data[start : start + len(tensor)].copy_(tensor)


def test_what_would_fill_a_parameter_is_named() -> None:
    recording = rehearse(Halves(), [[layout("q.weight", 4, 4)]])
    with pytest.raises(
        WeightsMismatch, match=r"fill qkv.weight \(missing kv.weight\), tied.weight \(only 16"
    ):
        check_complete(recording, Rules(), packed=Halves.packed)
    check_complete(recording, Rules(), optional={"qkv.weight", "tied.weight"})
    both = rehearse(Halves(), [[layout("q.weight", 4, 4)], [layout("kv.weight", 2, 4)]])
    check_complete(both, Rules())
    assert parameters_in(Halves(), torch.nn.Linear) == ["qkv.weight"]


def test_a_model_that_wants_tensors_together_is_asked_bucket_by_bucket() -> None:
    a, b = layout("a", 2, 4), layout("b", 4, 4)
    together = buckets_of([a, replace(b, offset=a.nbytes)])
    apart = buckets_of([a, b])
    assert [len(bucket) for bucket in together] == [2]
    assert [len(bucket) for bucket in apart] == [1, 1]
    assert rehearse(Fused(), together).parameters["fused"].complete
    assert not rehearse(Fused(), apart).parameters["fused"].complete


def test_a_recording_does_not_keep_the_model() -> None:
    model = Fused()
    model.fused.weight_loader = model.load_weights  # type: ignore[attr-defined]
    recording = rehearse(model, [FUSED])
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    assert recording.parameters["fused"].complete


def test_what_others_give_to_executors_meanwhile_is_theirs() -> None:
    """An engine's process has threads of its own."""
    model, target = Threaded(), torch.zeros(4, 4)
    recording = Recording(named_parameters(model) | {"theirs": target})
    with ThreadPoolExecutor(1) as pool, recording.at_work():
        other = threading.Thread(target=lambda: pool.submit(target.fill_, 1.0))
        other.start()
        other.join()
    assert target.all()
    assert not recording.parameters["theirs"].regions
