"""Weights in float8 with a scale for each block, dense and of experts, in SGLang's own layers.

Their kernels are not there on CPU, so that the server only loads: its checksums tell.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from ckpt_engine.errors import UpdateError
from tests.engines.sglang.parameter_servers import tensors_of, update_from
from tests.engines.sglang.servers import Checkpoints, Server

pytestmark = pytest.mark.timeout(600)
PROJECTION = "model.layers.1.self_attn.o_proj.weight"
EXPERT = "model.layers.1.mlp.experts.3.up_proj.weight"


@pytest.fixture(scope="module")
def server(checkpoints: Checkpoints, log: Callable[[str], Path]) -> Iterator[Server]:
    made = Server(
        checkpoints("fp8-moe", 1), log("float8"), "--skip-server-warmup", SGLANG_FP8_AS_ON_GPU="true"
    )
    try:
        yield made.wait()
    finally:
        made.close()


def test_one_checkpoint_after_the_other(server: Server, checkpoints: Checkpoints) -> None:
    expected = {}
    for seed in (2, 1):
        server.load_from_disk(checkpoints("fp8-moe", seed))
        expected[seed] = server.weights()
    assert expected[1] != expected[2]
    for seed in (2, 1, 2):
        update_from(server, checkpoints("fp8-moe", seed), slot_nbytes=256 * 1024)
        assert server.weights() == expected[seed]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({f"{PROJECTION}_scale_inv": None}, "does not fill model.layers.1.self_attn.o_proj.weight_scale_inv"),
        ({f"{EXPERT}_scale_inv": None}, "does not fill model.layers.1.mlp.experts.w13_weight_scale_inv"),
        ({EXPERT: None}, "does not fill model.layers.1.mlp.experts.w13_weight (only "),
        ({PROJECTION: torch.bfloat16}, f"{PROJECTION} is float8_e4m3fn, {PROJECTION} bfloat16"),
        ({EXPERT: torch.bfloat16}, "these must be quantised before they are sent"),
    ],
)
def test_what_is_refused_before_a_byte_moves(
    server: Server, checkpoints: Checkpoints, change: dict[str, torch.dtype | None], told: str
) -> None:
    update_from(server, checkpoints("fp8-moe", 1))
    before = server.weights()
    tensors = tensors_of(checkpoints("fp8-moe", 2))
    for name, dtype in change.items():
        tensor = tensors.pop(name)
        if dtype is not None:
            tensors[name] = tensor.to(dtype)
    with pytest.raises(UpdateError) as caught:
        update_from(server, tensors)
    assert told in str(caught.value)
    assert caught.value.touched is False
    assert server.weights() == before
