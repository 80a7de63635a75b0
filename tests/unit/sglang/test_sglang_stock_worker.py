"""The worker for SGLang's own handler: what it refuses, but where an update says that it may be left out."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch
from ckpt_engine_sglang import stock_worker
from ckpt_engine_sglang.options import Options

from ckpt_engine.ipc.messages import TensorLayout
from ckpt_engine.loading.rehearsal import WeightsMismatch


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = torch.nn.Linear(2, 2, bias=False)
        self.b = torch.nn.Linear(2, 2, bias=False)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        parameters = dict(self.named_parameters())
        for name, tensor in weights:
            if name in parameters:
                parameters[name].data.copy_(tensor)


def layouts(*names: str) -> list[TensorLayout]:
    return [TensorLayout(name=name, dtype="float32", shape=(2, 2), offset=0, nbytes=16) for name in names]


def test_the_model_s_tensors_are_taken() -> None:
    stock_worker.check(Model(), layouts("a.weight", "b.weight"))


@pytest.mark.parametrize(
    ("names", "options"),
    [
        (("a.weight",), Options(partial=True)),
        (("a.weight", "b.weight", "visual.weight"), Options(ignored=("visual.*",))),
    ],
)
def test_what_options_allow(names: tuple[str, ...], options: Options) -> None:
    with pytest.raises(WeightsMismatch):
        stock_worker.check(Model(), layouts(*names))
    stock_worker.check(Model(), layouts(*names), options)
