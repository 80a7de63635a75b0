"""Models that load differently, and a server that did not wait."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from ckpt_engine_sglang.plugin import OTHER_WAIT_FLAG

from ckpt_engine.errors import UpdateError
from tests.engines.sglang.parameter_servers import command_line, tensors_of, update_from
from tests.engines.sglang.servers import Checkpoints, Server

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module", params=["tied", "moe"])
def family(
    request: pytest.FixtureRequest, checkpoints: Checkpoints, log: Callable[[str], Path]
) -> Iterator[tuple[str, Server]]:
    """Servers whose wait for weights ends after a second."""
    name = request.param
    server = Server(checkpoints(name, 1), log(name), OTHER_WAIT_FLAG, SGLANG_WAIT_WEIGHTS_READY_TIMEOUT="1")
    try:
        yield name, server.wait("/health")
    finally:
        server.close()


def test_a_server_that_serves_its_dummy_weights(family: tuple[str, Server], checkpoints: Checkpoints) -> None:
    name, server = family
    assert server.client.info().waits_for_weights, "the plugin makes SGLang's flag of the other one"
    arguments = ("--checkpoint-path", checkpoints(name, 1), "--endpoint", server.url)
    done = command_line(*arguments)
    assert done.returncode == 0, f"{done.stderr}\n{server.tail()}"
    assert f"warning: {server.url} was serving its dummy weights" in done.stderr
    assert "dummy" not in command_line(*arguments).stderr


def test_one_checkpoint_after_the_other(family: tuple[str, Server], checkpoints: Checkpoints) -> None:
    name, server = family
    states = []
    for seed in (2, 1):
        server.load_from_disk(checkpoints(name, seed))
        states.append(server.state())
    assert states[0] != states[1]
    for seed in (2, 1):
        update_from(server, checkpoints(name, seed), slot_nbytes=128 * 1024)
        assert server.state() == states[2 - seed]


def test_an_incomplete_checkpoint(family: tuple[str, Server], checkpoints: Checkpoints) -> None:
    name, server = family
    server.load_from_disk(checkpoints(name, 1))
    before = server.state()
    tensors = tensors_of(checkpoints(name, 2))
    gone, told = {
        "tied": ("model.embed_tokens.weight", "model.embed_tokens.weight"),
        "moe": (
            "model.layers.1.mlp.experts.3.up_proj.weight",
            "model.layers.1.mlp.experts.w13_weight (only ",
        ),
    }[name]
    del tensors[gone]
    with pytest.raises(UpdateError) as caught:
        update_from(server, tensors)
    assert f"does not fill {told}" in str(caught.value)
    assert server.state() == before
