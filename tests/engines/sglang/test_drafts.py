"""A server with a draft model, which the target's checkpoint holds too: one update is for both.

SGLang's kernels for speculative decoding are not there on CPU, so that the server only loads: its checksums,
those of the draft among them, tell.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from ckpt_engine.errors import UpdateError
from tests.engines.sglang.parameter_servers import command_line, tensors_of, update_from
from tests.engines.sglang.servers import WAIT, Checkpoints, Server

pytestmark = pytest.mark.timeout(600)
DRAFT = "draft.model.mtp_block."


def serving(checkpoints: Checkpoints, log: Path, *arguments: str) -> Server:
    return Server(
        *(checkpoints("mtp", 1), log, "--skip-server-warmup", *arguments),
        *("--speculative-algorithm", "EAGLE", "--speculative-eagle-topk", "1"),
        *("--speculative-num-steps", "1", "--speculative-num-draft-tokens", "2"),
        SGLANG_DRAFTS_WITHOUT_KERNELS="true",
        SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION="false",
        SGLANG_WAIT_WEIGHTS_READY_TIMEOUT="600",
    )


def of_draft(server: Server) -> dict[str, str]:
    """Checksums of the draft's own layer; its embeddings are the target's."""
    (weights,) = server.weights()
    return {name: checksum for name, checksum in weights.items() if name.startswith(DRAFT)}


@pytest.fixture(scope="module")
def server(checkpoints: Checkpoints, log: Callable[[str], Path]) -> Iterator[Server]:
    made = serving(checkpoints, log("draft"), WAIT)
    with closing(made):
        yield made.wait()


def test_one_checkpoint_after_the_other(server: Server, checkpoints: Checkpoints) -> None:
    assert not server.client.is_ready()
    done = command_line("--checkpoint-path", checkpoints("mtp", 1), "--endpoint", server.url)
    assert done.returncode == 0, f"{done.stderr}\n{server.tail()}"
    assert server.client.is_ready()
    received = {1: server.weights()}
    update_from(server, checkpoints("mtp", 2), slot_nbytes=64 * 1024)
    received[2] = server.weights()
    update_from(server, checkpoints("mtp", 1))
    assert server.weights() == received[1]
    drafts = []
    for seed in (2, 1):
        server.load_from_disk(checkpoints("mtp", seed))
        assert server.weights() == received[seed]
        drafts.append(of_draft(server))
    assert len(drafts[0]) > 5
    assert all(drafts[0][name] != drafts[1][name] for name in drafts[0])


@pytest.mark.parametrize(
    ("gone", "told"),
    [
        ("model.mtp_layers.0.self_attn.k_proj.weight", "model.mtp_block.self_attn.qkv_proj.weight (only "),
        ("model.mtp_layers.0.input_proj.weight", "does not fill model.input_proj.weight"),
        ("model.layers.0.mlp.down_proj.weight", "does not fill model.layers.0.mlp.down_proj.weight"),
    ],
)
def test_a_tensor_of_either_model_that_is_missing(
    server: Server, checkpoints: Checkpoints, gone: str, told: str
) -> None:
    update_from(server, checkpoints("mtp", 1))
    before = server.weights()
    tensors = tensors_of(checkpoints("mtp", 2))
    del tensors[gone]
    with pytest.raises(UpdateError) as caught:
        update_from(server, tensors)
    assert told in str(caught.value)
    assert caught.value.touched is False
    assert server.weights() == before


def test_a_draft_with_a_checkpoint_of_its_own(checkpoints: Checkpoints, log: Callable[[str], Path]) -> None:
    """It was made for other weights: the update is for the target, and the log says so."""
    path = str(checkpoints("mtp", 3))
    server = serving(checkpoints, log("own-draft"), "--speculative-draft-model-path", path)
    try:
        server.wait("/health")
        before = of_draft(server)
        assert len(before) > 5
        received = []
        for seed in (2, 1):
            update_from(server, checkpoints("mtp", seed))
            assert of_draft(server) == before
            received.append(server.weights())
        assert received[0] != received[1]
        assert f"the draft model has a checkpoint of its own, {path}" in server.log.read_text()
    finally:
        server.close()
