"""A server with two ranks, each of which receives for itself: both get the new weights, or both fail.

They share each of the model's matrices (tensor parallel), or its layers (pipeline parallel). Of the latter
SGLang tells checksums of the first rank's layers alone; its tokens tell of both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from ckpt_engine_sglang.worker_update import INCOMPLETE
from safetensors.torch import save_file

from tests.engines.sglang.parameter_servers import command_line, outcomes, tensors_of
from tests.engines.sglang.servers import WAIT, Checkpoints, Server

pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module", params=["tp_size", "pp_size"])
def running(
    request: pytest.FixtureRequest, checkpoints: Checkpoints, log: Callable[[str], Path]
) -> Iterator[Server]:
    server = Server(
        *(checkpoints("qwen3", 1), log(f"two-ranks-{request.param}"), WAIT),
        tp_size=2 if request.param == "tp_size" else 1,
        pp_size=2 if request.param == "pp_size" else 1,
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


@pytest.fixture(scope="module")
def expected(running: Server, checkpoints: Checkpoints) -> tuple[object, object]:
    """The states that SGLang's own loading from disk makes of the two checkpoints."""
    states = []
    for seed in (2, 1):
        running.load_from_disk(checkpoints("qwen3", seed))
        states.append(running.state())
    assert states[0] != states[1]
    return states[1], states[0]


def test_the_command_makes_it_ready(server: Server, checkpoints: Checkpoints, tmp_path: Path) -> None:
    """Before the other tests: a server has its first weights once."""
    assert not server.client.is_ready()
    checksums = tmp_path / "checksums.json"
    verify = ("--endpoint", server.url, "--verify", "--checksums-file", checksums)
    done = command_line("--checkpoint-path", checkpoints("qwen3", 1), *verify)
    assert done.returncode == 0, f"{done.stderr}\n{server.tail()}"
    told = {1: "2 ranks", 2: "1 of 2 ranks"}[server.pp_size]
    assert f"checksums of {told} of 1 servers compared, and written to {checksums}" in done.stdout
    assert server.client.is_ready()
    received = server.state()
    server.load_from_disk(checkpoints("qwen3", 1))
    assert received == server.state()

    done = command_line("--checkpoint-path", checkpoints("qwen3", 2), *verify)
    assert done.returncode == 1
    assert f"the weights of {server.url} are not those of {checksums}: on rank 0 " in done.stderr


def test_one_checkpoint_after_the_other(
    server: Server, checkpoints: Checkpoints, expected: tuple[object, object]
) -> None:
    for seed in (1, 2, 1):
        answers = outcomes(server, checkpoints("qwen3", seed))
        assert [answer["outcome"] for answer in answers] == ["committed"] * 2, answers
        assert server.state() == expected[seed - 1]
        assert server.generate()[1] == str(checkpoints("qwen3", seed))


def good_again(server: Server, checkpoints: Checkpoints, expected: tuple[object, object]) -> None:
    """The server answers as it is, and is right after the next good update."""
    server.generate()
    answers = outcomes(server, checkpoints("qwen3", 1))
    assert [answer["outcome"] for answer in answers] == ["committed"] * 2, f"{answers}\n{server.tail()}"
    assert server.state() == expected[0]


def test_one_rank_without_a_handle(
    server: Server, checkpoints: Checkpoints, expected: tuple[object, object]
) -> None:
    server.load_from_disk(checkpoints("qwen3", 1))
    fault = {"kind": "without", "device": "CPU-here-1"}
    for answer in outcomes(server, checkpoints("qwen3", 2), faults=[fault]):
        assert "no handle for device CPU-here-1" in answer["error"], answer
    assert server.state() == expected[0], "no rank was touched"
    good_again(server, checkpoints, expected)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("where", ["load", "post_process"])
def test_one_rank_fails(
    server: Server, checkpoints: Checkpoints, expected: tuple[object, object], where: str, rank: int
) -> None:
    server.fail(at=where, rank=rank, action="raise")
    answers = outcomes(server, checkpoints("qwen3", 2))
    server.fail()
    for answer in answers:
        assert f"injected before {where}" in answer["error"], answer
        assert f"rank {rank} " in answer["error"]
    assert server.generate()[1] == INCOMPLETE
    good_again(server, checkpoints, expected)


@pytest.mark.parametrize("rank", [0, 1])
def test_one_parameter_server_dies(
    server: Server, checkpoints: Checkpoints, expected: tuple[object, object], rank: int
) -> None:
    faults: list[dict[str, object]] = [{}, {}]
    faults[rank] = {"kind": "exit", "after": 100_000}
    answers = outcomes(server, checkpoints("qwen3", 2), faults=faults)
    assert answers[rank] == {}
    assert answers[1 - rank]["outcome"] in ("PeerLost", "OutcomeUnknown", "UpdateError")
    assert answers[1 - rank]["seconds"] < 40
    good_again(server, checkpoints, expected)


def test_another_model_s_checkpoint(
    server: Server, checkpoints: Checkpoints, expected: tuple[object, object]
) -> None:
    answers = outcomes(server, checkpoints("qwen3", 1))
    for answer in outcomes(server, checkpoints("llama", 1)):
        assert "has no place for model.layers.0.self_attn.k_proj.bias" in answer["error"], answer
    assert server.state() == expected[0]
    assert server.generate()[1] == str(checkpoints("qwen3", 1)), answers


def test_a_layer_that_no_rank_has(
    server: Server, checkpoints: Checkpoints, expected: tuple[object, object], tmp_path: Path
) -> None:
    """A pipeline's ranks pass over each other's layers, but not over what would be neither's."""
    server.load_from_disk(checkpoints("qwen3", 1))
    tensors = tensors_of(checkpoints("qwen3", 2))
    name = "model.layers.2.input_layernorm.weight"
    save_file({**tensors, name: tensors["model.norm.weight"].clone()}, tmp_path / "model.safetensors")
    for answer in outcomes(server, tmp_path):
        assert f"has no place for {name}" in answer["error"], answer
    assert server.state() == expected[0]


def test_fewer_ranks_than_the_server_s(server: Server, checkpoints: Checkpoints) -> None:
    model = checkpoints("qwen3", 1)
    done = command_line(
        *("--checkpoint-path", model, "--endpoint", server.url, "--inference-parallel-size", 1)
    )
    assert done.returncode == 1
    assert "has 2 ranks (--tp-size times --pp-size), but 1 ranks would update it" in done.stderr
