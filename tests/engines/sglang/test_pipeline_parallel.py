"""A server whose ranks share a model's layers: one half of them on each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from ckpt_engine_sglang.worker_update import INCOMPLETE
from safetensors.torch import save_file

from tests.engines.sglang.parameter_servers import command_line, outcomes, tensors_of
from tests.engines.sglang.servers import WAIT, Checkpoints, Server

pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def running(checkpoints: Checkpoints, log: Callable[[str], Path]) -> Iterator[Server]:
    server = Server(
        *(checkpoints("llama", 1), log("pipeline-parallel"), WAIT),
        pp_size=2,
        devices="0,1",
        SGLANG_WAIT_WEIGHTS_READY_TIMEOUT="600",
    )
    try:
        yield server.wait()
    finally:
        server.close()


@pytest.fixture
def server(running: Server) -> Iterator[Server]:
    running.fail()
    yield running
    running.fail()


def update(server: Server, model: Path) -> None:
    answers = outcomes(server, model)
    assert [answer["outcome"] for answer in answers] == ["committed"] * 2, f"{answers}\n{server.tail()}"
    assert server.generate()[1] == str(model)


def test_the_command_makes_it_ready(server: Server, disk_server: Server, checkpoints: Checkpoints) -> None:
    """The tokens tell of both ranks' layers; SGLang tells checksums of the first rank alone."""
    assert not server.client.is_ready()
    done = command_line("--checkpoint-path", checkpoints("llama", 1), "--endpoint", server.url)
    assert done.returncode == 0, f"{done.stderr}\n{server.tail()}"
    assert server.client.is_ready()
    assert server.generate()[0] == disk_server.generate()[0]


def test_one_checkpoint_after_the_other(
    server: Server, disk_server: Server, checkpoints: Checkpoints
) -> None:
    tokens = []
    for seed in (2, 1):
        update(server, checkpoints("llama", seed))
        disk_server.load_from_disk(checkpoints("llama", seed))
        assert server.generate()[0] == disk_server.generate()[0]
        tokens.append(server.generate()[0])
    assert tokens[0] != tokens[1]


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("where", ["load", "post_process"])
def test_one_rank_fails(
    server: Server, disk_server: Server, checkpoints: Checkpoints, where: str, rank: int
) -> None:
    server.fail(at=where, pipeline_rank=rank, action="raise")
    answers = outcomes(server, checkpoints("llama", 2))
    server.fail()
    for answer in answers:
        assert f"injected before {where}" in answer["error"], answer
        assert f"rank {rank} " in answer["error"]
    assert server.generate()[1] == INCOMPLETE
    update(server, checkpoints("llama", 1))
    assert server.generate()[0] == disk_server.generate()[0]


@pytest.mark.parametrize("rank", [0, 1])
def test_one_parameter_server_dies(
    server: Server, disk_server: Server, checkpoints: Checkpoints, rank: int
) -> None:
    faults: list[dict[str, object]] = [{}, {}]
    faults[rank] = {"kind": "exit", "after": 100_000}
    answers = outcomes(server, checkpoints("llama", 2), faults=faults)
    assert answers[rank] == {}
    assert answers[1 - rank]["outcome"] in ("PeerLost", "OutcomeUnknown", "UpdateError")
    assert answers[1 - rank]["seconds"] < 40
    server.generate()
    update(server, checkpoints("llama", 1))
    assert server.generate()[0] == disk_server.generate()[0]


def test_another_model_s_checkpoint(server: Server, checkpoints: Checkpoints) -> None:
    update(server, checkpoints("llama", 1))
    before = server.generate()
    for answer in outcomes(server, checkpoints("qwen3", 1)):
        assert "has no place for model.layers.0.self_attn.k_norm.weight" in answer["error"], answer
    assert server.generate() == before


def test_a_layer_that_no_rank_has(server: Server, checkpoints: Checkpoints, tmp_path: Path) -> None:
    """Each rank passes over the other's layers, but not over what would be neither's."""
    update(server, checkpoints("llama", 1))
    before = server.generate()
    tensors = tensors_of(checkpoints("llama", 2))
    name = "model.layers.2.input_layernorm.weight"
    save_file({**tensors, name: tensors["model.norm.weight"].clone()}, tmp_path / "model.safetensors")
    for answer in outcomes(server, tmp_path):
        assert f"has no place for {name}" in answer["error"], answer
    assert server.generate() == before
